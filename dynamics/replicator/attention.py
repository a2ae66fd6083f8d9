"""How softmax attention moves under gradient flow: a replicator equation with the softmax Jacobian twice.

The model is f(X) = <X v, softmax(K p)> with keys K = X W; a loss of the attention row x = softmax(K p) has
the gradient g(x). One Jacobian J(x) = diag(x) - x x^T comes from the chain rule for p, the other from dx/dp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    nan_unless,
    require_every,
    require_finite,
    require_number,
    require_shapes,
    require_vector,
)
from dynamics.flow import Trajectory, integrate
from dynamics.replicator.simplex import guarded_start, require_fit, require_simplex, require_values
from dynamics.spectra import norm

# A gradient maps a point of the simplex (n,) to the gradient of the loss there, (n,).
Gradient = Callable[[Array], Array]


def softmax_jacobian_product(x: ArrayLike, g: ArrayLike) -> Float[Array, "*batch n"]:
    r"""J(x) g = x * (g - <x, g>) along the last axis, without forming J(x) = diag(x) - x x^T.

    Args:
        x: points, shape (..., n).
        g: vectors, the shape of `x`.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> softmax_jacobian_product([0.5, 0.5], [1.0, 0.0]).tolist()
        [0.25, -0.25]
    """
    x, g = _one_dtype(x=x, g=g)
    require_shapes(x=(x, "... n"), g=(g, "... n"))
    return _product(x, g)


def _product(x: Array, g: Array) -> Array:
    return x * (g - jnp.sum(x * g, axis=-1, keepdims=True))


def softmax_jacobian(x: ArrayLike) -> Float[Array, "n n"]:
    r"""J(x) = diag(x) - x x^T for a point of the simplex, every entry to full relative precision.

    The diagonal is x_i sum_{j != i} x_j: next to a vertex, 1 - x_i would lose all its digits.

    Args:
        x: the point, shape (n,).

    Raises:
        ValueError: `x` has another shape.

    Example:
        >>> softmax_jacobian([0.5, 0.5]).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """
    x = require_vector("x", x)
    off = x[:, None] * x[None, :] * (1 - jnp.eye(x.size, dtype=x.dtype))
    return jnp.diag(jnp.sum(off, axis=1)) - off


def attention_field(x: ArrayLike, gradient: ArrayLike, key_scale: ArrayLike = 1.0) -> Float[Array, " n"]:
    r"""Softmax flow of a prompt as a field on the simplex: dx/dt = -k J(x)^2 g.

    Its integral curves are those of `softmax_flow`, seen in x = softmax(z).

    Args:
        x: point of the simplex, shape (n,).
        gradient: gradient g of the loss at x, shape (n,).
        key_scale: k, squared length of the keys, a number.

    Returns:
        dx/dt, shape (n,); NaN where a traced x is not on the simplex, or another number is not finite.

    Raises:
        ValueError: `x` is not on the simplex, the gradient's shape does not fit, a number is not finite.

    Source: softmax2025talk, theorem on local analysis, the flow that it linearizes.

    Example:
        >>> attention_field([0.5, 0.5], [1.0, 0.0]).tolist()
        [-0.125, 0.125]
    """
    x = require_simplex("x", x)
    gradient = require_fit("gradient", gradient, x)
    key_scale = require_number("key_scale", key_scale, x.dtype, at_least=0)
    jacobian = softmax_jacobian(x)
    return -key_scale * (jacobian @ (jacobian @ gradient))


def squared_error_gradient(values: ArrayLike, targets: ArrayLike, x: ArrayLike) -> Float[Array, "*batch n"]:
    r"""Gradient in each attention row x of half the squared error, (1/2) (<u, x> - y)^2: (<u, x> - y) u.

    Args:
        values: u = X v, what each token is worth, (..., n).
        targets: y, (...).
        x: attention rows, (..., n).

    Returns:
        The gradient in each row, (..., n). `jax.tree_util.Partial` with values and targets makes of it the
        gradient that `softmax_flow` (one row) and `coupled_flow` (all of them) take.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> u, y, x = jnp.array([1.0, -1.0]), jnp.array(0.5), jnp.array([0.5, 0.5])
        >>> squared_error_gradient(u, y, x).tolist()
        [-0.5, 0.5]
    """
    values, targets, x = _one_dtype(values=values, targets=targets, x=x)
    require_shapes(values=(values, "... n"), targets=(targets, "..."), x=(x, "... n"))
    return (jnp.sum(values * x, axis=-1) - targets)[..., None] * values


def _one_dtype(**arrays: ArrayLike) -> list[Array]:
    """Arrays of real numbers in the dtype that JAX promotes them to."""
    converted = [as_real(name, array) for name, array in arrays.items()]
    dtype = jnp.result_type(*converted)
    return [cast(array, dtype) for array in converted]


def softmax_flow(
    gradient: Gradient, z0: ArrayLike, ts: ArrayLike, key_scale: ArrayLike = 1.0, **options: Any
) -> Trajectory:
    r"""Gradient flow of a prompt, seen in one row of logits: dz/dt = -k J(x) g(x), x = softmax(z).

    In x it reads dx/dt = -k J(x)^2 g(x), the replicator equation with fitness F = -k J(x) g(x). It is
    exact for keys with K_i K_j^T = k delta_ij I, up to a vector added to all keys of a sample. The sum of
    the logits is conserved, and the loss falls at the rate k |J g|^2.

    Args:
        gradient: gradient of the loss in x: a function from the simplex point (n,) to (n,). It is static:
            hand in the same object (or a `jax.tree_util.Partial` with its data) to compile once.
        z0: logits at ts[0], shape (n,).
        ts: times that increase strictly, shape (T,).
        key_scale: k, the squared length of the orthogonal keys.
        **options: options of `dynamics.flow.integrate`. For horizons far beyond 1 / min(x)^2 take
            `solver=diffrax.Kvaerno5()` and logarithmic times.

    Returns:
        A `Trajectory` with `ys` = logits, shape (T, n).

    Raises:
        ValueError: `z0` has the wrong shape, a number is not finite, `gradient` returns another shape.
        RuntimeError: the solve failed.

    Source: softmax2025talk, gradient flow of the attention vectors.

    Example:
        >>> path = softmax_flow(lambda x: jnp.array([0.0, 1.0]), [0.0, 0.0], [0.0, 1.0])
        >>> float(path.ys[-1, 1] - path.ys[-1, 0]).__round__(8)  # u + sinh u = -t
        -0.49007307
    """
    z0 = _require_logits(gradient, z0, ndim=1)
    key_scale = require_number("key_scale", key_scale, z0.dtype, at_least=0)
    return integrate(_softmax_field, guarded_start(z0, key_scale), ts, (gradient, key_scale), **options)


def natural_gradient_flow(
    gradient: Gradient, z0: ArrayLike, ts: ArrayLike, scale: ArrayLike = 1.0, **options: Any
) -> Trajectory:
    r"""Natural-gradient flow of the same loss: dx/dt = -s J(x) g(x), one Jacobian: replicator with F = -s g.

    In logits dz/dt = -s (g - mean(g)): J(x) is the Fisher matrix of softmax, and the simplex with the
    Shahshahani metric diag(1/x) has J(x) g as its gradient.

    Args:
        gradient: gradient of the loss in x, from (n,) to (n,); static.
        z0: logits at ts[0], shape (n,).
        ts: times, shape (T,).
        scale: s.
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys` = logits, shape (T, n).

    Raises:
        ValueError: `z0` has the wrong shape, a number is not finite, `gradient` returns another shape.
        RuntimeError: the solve failed.

    Source: amari1998, section 2; hofbauer1998, section 19.5.

    Example:
        >>> path = natural_gradient_flow(lambda x: jnp.array([0.0, 1.0]), [0.0, 0.0], [0.0, 1.0])
        >>> float(path.ys[-1, 1] - path.ys[-1, 0]).__round__(8)
        -1.0
    """
    z0 = _require_logits(gradient, z0, ndim=1)
    scale = require_number("scale", scale, z0.dtype, at_least=0)
    return integrate(_natural_gradient_field, guarded_start(z0, scale), ts, (gradient, scale), **options)


def coupled_flow(
    gradient: Gradient, z0: ArrayLike, gram: ArrayLike, ts: ArrayLike, **options: Any
) -> Trajectory:
    r"""Gradient flow of one prompt seen in all N attention rows, for any keys; the prompt itself is gone.

    dz_i/dt = -sum_j K_i K_j^T J(x_j) g_j(x), x_j = softmax(z_j). A network trained by gradient descent
    converges to it whatever its keys; for orthogonal keys it falls apart into N copies of `softmax_flow`.

    Args:
        gradient: from all attention rows (N, n) to the gradient of the loss in each, (N, n); static.
        z0: logits at ts[0], shape (N, n).
        gram: inner products of the keys, shape (N, n, N, n): gram[i, a, j, b] = K_ia . K_jb.
        ts: times, shape (T,).
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys` = logits, shape (T, N, n).

    Raises:
        ValueError: a shape does not fit or a number is not finite.
        RuntimeError: the solve failed.

    Source: softmax2025talk, dynamics of the attention vectors before the assumption of orthogonal keys.

    Example:
        >>> keys = jnp.ones((1, 2, 3)).at[0, 1].set(0.0)
        >>> gram = jnp.einsum("iad,jbd->iajb", keys, keys)
        >>> coupled_flow(lambda x: x, [[0.0, 0.0]], gram, [0.0, 1.0]).ys.shape
        (2, 1, 2)
    """
    z0 = _require_logits(gradient, z0, ndim=2)
    gram = cast(as_real("gram", gram), z0.dtype)
    require_shapes(z0=(z0, "N n"), gram=(gram, "N n N n"))
    gram = require_finite("gram", gram)
    return integrate(_coupled_field, guarded_start(z0, gram), ts, (gradient, gram), **options)


def two_token_solution(
    ts: ArrayLike, gap: ArrayLike, key_scale: ArrayLike = 1.0, u0: ArrayLike = 0.0
) -> Float[Array, " T"]:
    r"""Closed form of `softmax_flow` for two tokens and constant gradient (0, D).

    u = z_2 - z_1 solves u + sinh u = u0 + sinh u0 - k D t. The losing token falls like 1 / (2 k D t):
    algebraically, where the natural gradient's falls exponentially, u = u0 - D t.

    Args:
        ts: times, shape (T,).
        gap: D, how much worse the second token is.
        key_scale: k.
        u0: u at time 0.

    Returns:
        u at the times, shape (T,); NaN where a traced number is not finite, or the right-hand side is beyond
        the dtype.

    Raises:
        ValueError: `ts` has another shape, or a number is not finite.

    Example:
        >>> two_token_solution([10.0], gap=1.0).round(8).tolist()
        [-2.68739012]
    """
    ts = as_real("ts", ts)
    if ts.ndim != 1:
        raise ValueError(f"ts must have shape (T,), got shape {ts.shape}")
    ts = require_finite("ts", ts)
    gap, u0 = require_number("gap", gap, ts.dtype), require_number("u0", u0, ts.dtype)
    key_scale = require_number("key_scale", key_scale, ts.dtype, at_least=0)
    target = u0 + jnp.sinh(u0) - key_scale * gap * ts
    return nan_unless(jnp.isfinite(target), _invert_x_plus_sinh(target))


@jax.jit
def _invert_x_plus_sinh(target: Array) -> Array:
    epsilon = float(jnp.finfo(target.dtype).eps)
    newton = optimistix.Newton(rtol=8 * epsilon, atol=8 * epsilon)

    def root(c):
        # asinh(c) lies beyond the root and u + sinh u is convex from there: Newton's steps are monotone.
        return optimistix.root_find(
            lambda u, c: u + jnp.sinh(u) - c, newton, jnp.arcsinh(c), args=c, throw=False
        ).value

    return jax.vmap(root)(target)


class LinearRate(NamedTuple):
    """What the over-parametrized theorem promises; see `overparametrized_rate`."""

    hypothesis: Array
    rate: Array
    displacement: Array


def attention_lipschitz(tokens: ArrayLike, keys: ArrayLike) -> Float[Array, ""]:
    r"""Lipschitz constant of p -> A(p), rows softmax(K_i p)^T X_i: half the root of sum_i |X_i|^2 |K_i|^2.

    The norms are spectral; the half is the largest eigenvalue of a softmax Jacobian.

    Args:
        tokens: X, shape (N, n, d).
        keys: K, shape (N, n, d).

    Returns:
        The constant, a scalar; NaN where a traced number is not finite.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.

    Source: softmax2025talk, over-parametrized theorem (constants derived anew, they are not public).

    Example:
        >>> float(attention_lipschitz(jnp.eye(2)[None], jnp.eye(2)[None]))
        0.5
    """
    tokens, keys = _one_dtype(tokens=tokens, keys=keys)
    require_shapes(tokens=(tokens, "N n d"), keys=(keys, "N n d"))
    tokens, keys = require_finite("tokens", tokens), require_finite("keys", keys)
    norms = jnp.linalg.norm(jnp.stack([tokens, keys]), ord=2, axis=(2, 3))
    return 0.5 * norm(norms[0] * norms[1])


def overparametrized_rate(sigma: ArrayLike, lipschitz: ArrayLike, residual: ArrayLike) -> LinearRate:
    r"""Linear convergence of L = |r|^2 / 2 in (p, v) with d >= N, near a start with small residual.

    If s^2 >= 4 L_A |r_0|, with s the smallest singular value of A(p_0) and L_A the Lipschitz constant of A,
    then gradient flow has L(t) <= exp(-2 mu t) L(0) with mu = s^2 / 4, and never moves further than
    2 |r_0| / s. Bounded prompts keep the attention away from the boundary of the simplex.

    Args:
        sigma: s > 0, smallest singular value of the matrix of attended tokens at the start.
        lipschitz: L_A > 0, from `attention_lipschitz`.
        residual: |r_0| >= 0, Euclidean norm of the residuals at the start.

    Returns:
        `LinearRate(hypothesis, rate, displacement)`: the ratio s^2 / (4 L_A |r_0|), at least 1 where the
        theorem applies; mu; the bound on the distance from the start. NaN where a traced number is out of
        range.

    Raises:
        ValueError: a number is out of range.

    Source: softmax2025talk, over-parametrized theorem (constants derived anew, they are not public).

    Example:
        >>> overparametrized_rate(1.0, 0.5, 0.25).hypothesis.tolist()
        2.0
    """
    sigma, lipschitz, residual = _one_dtype(sigma=sigma, lipschitz=lipschitz, residual=residual)
    sigma = require_every("sigma", sigma, _is_positive, "finite and > 0")
    lipschitz = require_every("lipschitz", lipschitz, _is_positive, "finite and > 0")
    residual = require_every("residual", residual, lambda r: (r >= 0) & (r < jnp.inf), "finite and >= 0")
    # Quotients come first: a square, or a product of small numbers, may vanish where the ratio does not.
    return LinearRate(sigma / (4 * lipschitz) * (sigma / residual), sigma**2 / 4, 2 * residual / sigma)


def _is_positive(number: Any) -> Any:
    return (number > 0) & (number < jnp.inf)


def _require_logits(gradient: Gradient, z0: ArrayLike, ndim: int) -> Array:
    z0 = as_real("z0", z0)
    wanted = "(n,)" if ndim == 1 else "(N, n)"
    if z0.ndim != ndim or z0.size == 0:
        raise ValueError(f"z0 must have shape {wanted}, got shape {z0.shape}")
    require_values("gradient", gradient, jax.ShapeDtypeStruct(z0.shape, z0.dtype))
    return require_finite("z0", z0)


def _softmax_field(t, z, args):
    gradient, key_scale = args
    x = jax.nn.softmax(z)
    return -key_scale * _product(x, jnp.asarray(gradient(x), x.dtype))


def _natural_gradient_field(t, z, args):
    gradient, scale = args
    g = jnp.asarray(gradient(jax.nn.softmax(z)), z.dtype)
    return -scale * (g - jnp.mean(g))


def _coupled_field(t, z, args):
    gradient, gram = args
    x = jax.nn.softmax(z, axis=-1)
    return -jnp.einsum("iajb,jb->ia", gram, _product(x, jnp.asarray(gradient(x), x.dtype)))
