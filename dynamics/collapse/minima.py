"""Global minima of regularized linear networks with one output, at any depth, and their landscape.

All that widths, noise and regularization do is in two numbers,

    rho = prod_k d_k / (d_k + s)   over the hidden layers,      Gamma = prod_k gamma_k   over all layers,

and the weights are in one: at its best for given norms, a network computes rho (A + lambda)^{-1} c, a ridge
regression with an effective ridge lambda, shrunk by the noise. Its layers are in balance, gamma_k |W_k|^2 =
n, and the loss depends on z = log lambda alone:

    l(z) = E y^2 + D n - rho c^T (A + lambda)^{-1} c,      n = (rho Gamma / lambda)^{1 / D}
    l'(z) = 0   where   (1 + 1 / D) z + log |(A + lambda)^{-1} c|^2 = log(rho Gamma) / D - log rho

With one hidden layer there is at most one minimum, whose ridge grows beyond all bounds at the transition.
With more there may be several, and they are searched for over the whole range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    require_every,
    require_number,
    require_positive,
    require_shape,
    require_sizes,
)
from dynamics.collapse.moments import (
    Moments,
    log_volume,
    nan_unless_finite,
    require_moments,
    require_widths,
    resolvent,
    scaled,
    spectrum,
)
from dynamics.collapse.search import best_ridge
from dynamics.derivatives import nan_derivatives


class Ridge(NamedTuple):
    """The minimum of ridge regression.

    Attributes:
        W: weights, (k, d).
        loss: the loss there.
    """

    W: Array
    loss: Array


class TwoLayerMinimum(NamedTuple):
    """A global minimum of a network with one hidden layer; the others differ by signs, U_j and W_j together.

    Without noise any rotation of the hidden units is a minimum as well.

    Attributes:
        b: |U_j|, the same for all j; exactly 0 where the network has collapsed.
        loss: the loss there.
        U: weights of the output, (width,).
        W: weights of the hidden layer, (width, d), of rank one.
    """

    b: Array
    loss: Array
    U: Array
    W: Array


class DeepMinimum(NamedTuple):
    """A global minimum of a network of any depth.

    Attributes:
        loss: the loss there.
        weights: the D + 1 matrices, input side first, the last one (1, d_D); of rank one, or exactly zero.
        norms: their Frobenius norms, (D + 1,); gamma_k norms_k^2 is the same for all layers.
    """

    loss: Array
    weights: list[Array]
    norms: Array


def ridge_minimum(moments: Moments, gamma: ArrayLike) -> Ridge:
    r"""The minimum of E|W x - y|^2 + gamma |W|^2, a network without hidden layer.

        W = E[y x^T] (A + gamma I)^{-1}

    Its rank is that of E[y x^T] at every gamma: nothing collapses, the norm falls as 1 / gamma.

    Source: ziyin2022talk, slide on ridge regression.

    Args:
        moments: `Moments` of the data, with any number of outputs.
        gamma: strength of regularization, a number >= 0; at 0 the solution of least norm.

    Returns:
        A `Ridge`.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> ridge_minimum(Moments([[1.0]], [1.0], 1.0), 1.0).W.tolist()
        [[0.5]]
    """
    moments = require_moments(moments, outputs=True)
    return _ridge(moments, require_number("gamma", gamma, moments.A.dtype, at_least=0))


@eqx.filter_jit
def _ridge(moments, gamma):
    c = moments.c.reshape(moments.c.shape[0], -1)
    W = resolvent(gamma, jnp.ones_like(gamma), moments.A, c, spectrum(moments.A)).T
    return Ridge(*nan_unless_finite((moments, gamma), (W, moments.y2 - jnp.trace(W @ c))))


def two_layer_minimum(
    moments: Moments, gamma_u: ArrayLike, gamma_w: ArrayLike, noise_variance: ArrayLike, width: int
) -> TwoLayerMinimum:
    r"""The global minimum of a linear network with one hidden layer, U (W x), and noise on its hidden units.

        collapsed, U = W = 0,  where |c|^2 <= gamma_u gamma_w, and else
        U = b r,  W = r c^T b [b^2 (s + width) A + gamma_w I]^{-1},  with any signs r, here all +1, and b from
        |[b^2 (s + width) A + gamma_w I]^{-1} c|^2 = gamma_u / gamma_w

    Near the transition, which is of second order, b^2 = gamma_w (|c|^2 - gamma_u gamma_w) / (2 (s + width)
    c^T A c).

    Source: ziyin2022talk, Theorem 1.

    Args:
        moments: `Moments` of data with one output.
        gamma_u: strength of regularization of U, >= 0; half of a weight decay that is added to the gradient
            of the mean of |f(x) - y|^2. (`deep_minimum` takes strengths input side first.)
        gamma_w: that of W. Where both are 0 the result is the limit of equal ones; where one of them is, the
            loss is the infimum, which no weights reach, and b, U and W are NaN.
        noise_variance: s >= 0; dropout at rate p has s = p / (1 - p).
        width: hidden units; static.

    Returns:
        A `TwoLayerMinimum`, with derivatives in all numbers away from the transition.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> least = two_layer_minimum(Moments([[1.0]], [1.0], 1.0), 0.25, 0.25, 0.0, 1)
        >>> [round(float(x), 6) for x in (least.b, least.loss)]
        [0.866025, 0.4375]
    """
    moments = require_moments(moments)
    given = {"gamma_u": gamma_u, "gamma_w": gamma_w, "noise_variance": noise_variance}
    u, w, noise = (require_number(name, x, moments.A.dtype, at_least=0) for name, x in given.items())
    widths = tuple(require_sizes(width=width))
    loss, (W, U), (_, norm) = _deep(moments, jnp.stack([w, u]), noise, widths)
    return TwoLayerMinimum(norm / width**0.5, loss, U[0], W)


def deep_minimum(
    moments: Moments, gammas: ArrayLike, noise_variance: ArrayLike, widths: Sequence[int]
) -> DeepMinimum:
    r"""The global minimum of a linear network of any depth with noise on its hidden units.

    All matrices have rank one, and gamma_k |W_k|^2 = n for all of them. What is left is a function of one
    variable, see this module's own words, whose whole range is searched: with unequal eigenvalues of A there
    may be several minima, and jumps from one to another. For D >= 2 zero is a local minimum at every gamma
    above 0, and the global one from `critical_gamma` on, where the weights jump: a transition of first order.

    Source: ziyin2022talk, Theorem 2 (deep linear networks).

    Args:
        moments: `Moments` of data with one output.
        gammas: strengths of regularization >= 0, input side first, shape (D + 1,). Where all are 0 the result
            is the limit of equal ones; where some are, the loss is the infimum and the weights are NaN.
        noise_variance: s >= 0; dropout at rate p has s = p / (1 - p).
        widths: hidden units of the D hidden layers, input side first; static. Empty for ridge regression.

    Returns:
        A `DeepMinimum`, with derivatives in all numbers away from transitions.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> least = deep_minimum(Moments([[1.0]], [1.0], 1.0), [0.1, 0.1, 0.1], 0.0, (2, 2))
        >>> [round(float(norm), 4) for norm in least.norms], round(float(least.loss), 4)
        ([0.9642, 0.9642, 0.9642], 0.2896)
    """
    moments, widths = require_moments(moments), require_widths(widths)
    dtype = moments.A.dtype
    gammas = cast(as_real("gammas", gammas), dtype)
    require_shape("gammas", gammas, (len(widths) + 1,))
    gammas = require_every("gammas", gammas, lambda g: (g >= 0) & (g < jnp.inf), "finite and >= 0")
    noise_variance = require_number("noise_variance", noise_variance, dtype, at_least=0)
    if not widths:
        W, loss = _ridge(moments, gammas[0])
        return DeepMinimum(loss, [W], _norm(W)[None])
    return _deep(moments, gammas, noise_variance, widths)


@eqx.filter_jit
def _deep(moments, gammas, noise_variance, widths):
    (unit, log_A, log_c), depth = scaled(moments), len(widths)
    of = spectrum(unit.A)
    regular, free = jnp.all(gammas > 0), jnp.all(gammas == 0)
    logs = jnp.log(jnp.where(regular, gammas, 1))
    log_rho, log_Gamma = log_volume(noise_variance, widths), jnp.sum(logs)
    # In units in which A and c are of size one, the loss is one of c^2 / A.
    log_unit = 2 * log_c - log_A
    in_units = log_Gamma - depth * log_unit - log_A
    z, alive = _effective_ridge(unit, of, in_units, log_rho, depth, jnp.sum(jnp.abs(logs)))
    one, rho = jnp.ones_like(z), jnp.exp(log_rho)
    ridge = resolvent(jnp.exp(z), one, unit.A, unit.c, of)
    log_balance = (log_rho + in_units - z) / depth
    gain = jnp.where(alive, rho * (unit.c @ ridge) - depth * jnp.exp(log_balance), 0)
    norms = jnp.where(alive, jnp.exp((log_balance + log_unit - logs) / 2), 0)

    # Without regularization lambda = 0. Its weights are those of the smallest norms, all equal.
    least = resolvent(jnp.zeros_like(z), one, unit.A, unit.c, of)
    square = jnp.sum(least**2)
    some = square > 0
    log_square = jnp.log(jnp.where(some, square, 1)) + 2 * (log_c - log_A)
    common = jnp.where(some, jnp.exp((2 * log_rho + log_square) / (2 * depth + 2)), 0)

    norms = jnp.where(regular, norms, jnp.where(free, common, jnp.nan))
    loss = moments.y2 - jnp.exp(log_unit) * jnp.where(regular, gain, rho * (unit.c @ least))
    # Where a strength is zero its derivative depends on how the others go to zero.
    loss, norms = nan_derivatives(~regular, (loss, norms), gammas)
    loss, norms = nan_unless_finite((moments, gammas, noise_variance), (loss, norms))
    map_ = jnp.where(regular, ridge, least)
    length = jnp.sum(map_**2)
    direction = map_ / jnp.sqrt(jnp.where(length > 0, length, 1))
    return DeepMinimum(loss, _layers(norms, direction, widths), norms)


@jax.jit
def _norm(W):
    """The Frobenius norm of small and large numbers, whose derivative at zero is zero."""
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(W)))
    size = jnp.where(size > 0, size, 1)
    square = jnp.sum((W / size) ** 2)
    return jnp.where(square > 0, size * jnp.sqrt(jnp.where(square > 0, square, 1)), 0 * square)


def _layers(norms, direction, widths):
    """Matrices of rank one with the given norms: equal entries, but in the first that reads one direction."""
    first = jnp.broadcast_to(direction, (widths[0], direction.shape[0])) / widths[0] ** 0.5
    shapes = zip((*widths[1:], 1), widths, strict=True)
    flat = [jnp.full((m, n), (m * n) ** -0.5, direction.dtype) for m, n in shapes]
    return [norm * layer for norm, layer in zip(norms, [first, *flat], strict=True)]


def _effective_ridge(moments, of, log_Gamma, log_rho, depth, summed):
    """The z = log lambda of the global minimum, and whether that is not zero.

    `summed` is the sum of the sizes that log_Gamma was added up from, of whose last place its rounding is
    some.
    """
    level = (log_rho + log_Gamma) / depth - log_rho
    # Without a signal any other stands for it, so that all is finite.
    some = jnp.any(moments.c != 0)
    moments = moments._replace(c=jnp.where(some, moments.c, jnp.ones_like(moments.c)))
    c = moments.c
    least = resolvent(jnp.zeros_like(level), jnp.ones_like(level), moments.A, c, of)
    largest, square = (jnp.where(x > 0, x, 1) for x in (of.values[-1], jnp.sum(least**2)))
    # |(A + lambda)^{-1} c| is at most |A^+ c|, so that no minimum has a smaller ridge than this.
    low = (level - jnp.log(square)) / (1 + 1 / depth)
    if depth == 1:
        # (1 + a / lambda)^{-2} >= 1 - 2 a / lambda bounds the one ridge from above.
        signal = jnp.sum(c**2)
        excess = -jnp.expm1(log_Gamma - jnp.log(signal))
        exists = some & (excess > 8 * float(jnp.finfo(level.dtype).eps) * (1 + summed))
        high = jnp.log(2 * (c @ moments.A @ c) / signal / jnp.where(exists, excess, 1))
        below = jnp.inf
    else:
        # Every summand of the crossing falls from here on.
        exists, below = some, 0.0
        high = jnp.log(largest * (depth + 1) / (depth - 1))
    high = jnp.where(exists, jnp.maximum(high, low), low)

    def crossing(z, powers):
        return (1 + 1 / depth) * z + jnp.log(powers.norm) - level

    def score(z, powers):
        return depth * jnp.exp((log_rho + log_Gamma - z) / depth) - jnp.exp(log_rho) * powers.fit

    return best_ridge(crossing, score, (low, high), moments, of, exists, below)


def effective_landscape(
    b: ArrayLike, moments: Moments, gamma: ArrayLike, noise_variance: ArrayLike, width: int, depth: int
) -> Float[Array, "*b"]:
    r"""The loss as a function of the amplitude b of the inner layers, all else at its best for that b.

        l(b) = - sum_i w^{2D} b^{2D} c_i^2 / (w^D (s + w)^D a_i b^{2D} + gamma) + E y^2 + gamma D w^2 b^2

    for D hidden layers of w units each and equal gammas; c_i are the components of c along the eigenvectors
    of A, whose eigenvalues are a_i. b is an entry of the matrices between hidden layers; those of the output
    are sqrt(w) b, so that at D = 1 the b of `two_layer_minimum` is sqrt(w) times this one.

    Source: ziyin2022talk, slides on more layers (where d_0 is the width w).

    Args:
        b: amplitudes, any shape.
        moments: `Moments` of data with one output.
        gamma: strength of regularization of every layer, positive.
        noise_variance: s >= 0.
        width: w, hidden units of every hidden layer.
        depth: D, hidden layers.

    Returns:
        l, of the shape of `b`.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> effective_landscape([0.0, 1.0], Moments([[1.0]], [1.0], 1.0), 0.5, 0.0, 1, 1).round(4).tolist()
        [1.0, 0.8333]
    """
    moments = require_moments(moments)
    dtype = moments.A.dtype
    b = cast(as_real("b", b), dtype)
    b = require_every("b", b, lambda b: abs(b) < jnp.inf, "finite")
    gamma = require_positive("gamma", gamma, dtype)
    noise_variance = require_number("noise_variance", noise_variance, dtype, at_least=0)
    width, depth = require_sizes(width=width, depth=depth)
    return _landscape(b, moments, gamma, noise_variance, width, depth)


@eqx.filter_jit
def _landscape(b, moments, gamma, noise_variance, width, depth):
    of, shape = spectrum(moments.A), b.shape

    def loss(b):
        scale = (width * (noise_variance + width)) ** depth * b ** (2 * depth)
        fit = (width * b) ** (2 * depth) * (moments.c @ resolvent(gamma, scale, moments.A, moments.c, of))
        return moments.y2 - fit + gamma * depth * (width * b) ** 2

    of_all = jnp.vectorize(loss)(b.reshape(-1)).reshape(shape)
    return nan_unless_finite((moments, gamma, noise_variance), of_all)
