"""Training near the critical point, and with added noise: slowing down, moments at rest, and escape.

With one hidden layer and equal strengths gamma there is one direction, c = E[x y], along which zero becomes
unstable, and one mode of each unit that is slow near gamma_c = |c|: u_j = w_j c / |c| = q. It obeys

    dq/dt = -2 (gamma - |c|) q - 2 (width + s) ahat q^3,      ahat = c^T A c / |c|^2

Gradient descent with Gaussian noise, d theta = -grad L dt + sqrt(2 T) dB, comes to rest with the density
exp(-L / T), and escapes from a minimum over a saddle at the rate of Eyring and Kramers.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    cast,
    nan_unless,
    require_arrays,
    require_every,
    require_finite,
    require_integer,
    require_number,
    require_positive,
    require_shape,
    require_shapes,
    require_sizes,
    require_vector,
)
from dynamics.collapse.landscape import require_scalar
from dynamics.collapse.moments import Moments, nan_unless_finite, require_moments, scaled

_CUT = 1e-3  # of a density at the edge of a box, over its largest value
_SERIES = 12  # terms of (1 - exp(-y)) / y up to y = 1/4, whose next one is below rounding
_AT_REST = 1e-6  # of the temperature: how far in loss a point may be from a stationary one


def critical_amplitude(
    ts: ArrayLike,
    q0: ArrayLike,
    gamma: ArrayLike,
    moments: Moments,
    noise_variance: ArrayLike,
    width: int,
) -> Float[Array, "*ts"]:
    r"""The slow mode of a network with one hidden layer, over time, near its critical strength gamma_c = |c|.

        dq/dt = -m q - k q^3,    m = 2 (gamma - |c|),    k = 2 (width + s) c^T A c / |c|^2
        q(t)^2 = q0^2 e^{-2 m t} / (1 + k q0^2 (1 - e^{-2 m t}) / m)

    It decays at the rate 2 (gamma - |c|) above gamma_c, goes to its equilibrium at the rate 4 (|c| - gamma)
    below, and at gamma_c it falls as (2 k t)^{-1/2}, whatever q0 is. It holds for gamma close to |c|, for
    hidden units that are equal, u_j = w_j c / |c| = q; without noise q^2 may be a mean over units.

    Source: ziyin2022talk, slide on critical dynamics (the law is derived here).

    Args:
        ts: times >= 0, any shape.
        q0: the mode at time 0, a number.
        gamma: strength of regularization of both layers, >= 0.
        moments: `Moments` of data with one output, whose c is not zero.
        noise_variance: s >= 0.
        width: hidden units; static.

    Returns:
        q, of the shape of `ts`, with derivatives in all numbers, at gamma = |c| as well.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> data = Moments([[1.0]], [1.0], 1.0)
        >>> critical_amplitude([0.0, 100.0], 1.0, 1.0, data, 0.0, 1).round(4).tolist()  # 1 / sqrt(1 + 4 t)
        [1.0, 0.0499]
    """
    moments = require_moments(moments)
    dtype = moments.A.dtype
    known = as_concrete(moments.c)
    if known is not None and not np.any(known):
        raise ValueError("c must not be zero, since the slow mode is the direction of E[x y], got zeros")
    ts = cast(as_real("ts", ts), dtype)
    ts = require_every("ts", ts, lambda t: (t >= 0) & (t < jnp.inf), "finite and >= 0")
    q0 = require_number("q0", q0, dtype)
    gamma = require_number("gamma", gamma, dtype, at_least=0)
    noise_variance = require_number("noise_variance", noise_variance, dtype, at_least=0)
    (width,) = require_sizes(width=width)
    return _amplitude(ts, q0, gamma, moments, noise_variance, width)


@eqx.filter_jit
def _amplitude(ts, q0, gamma, moments, noise_variance, width):
    unit, log_A, log_c = scaled(moments)
    square = unit.c @ unit.c
    length = jnp.sqrt(square) * jnp.exp(log_c)
    k = 2 * (width + noise_variance) * (unit.c @ unit.A @ unit.c) / square * jnp.exp(log_A)
    m = 2 * (gamma - length)
    # Of e^{m t} and e^{-m t} the one is taken that does not overflow.
    above = m >= 0
    size = jnp.where(above, m, -m)
    root = jnp.exp(-size * ts)
    saturation = k * q0**2 * 2 * ts * _growth(2 * size * ts)
    rest = jnp.where(above, jnp.ones_like(root), root**2) + saturation
    scale = jnp.where(above, root, 1) / jnp.sqrt(jnp.where(rest > 0, rest, jnp.finfo(rest.dtype).tiny))
    return nan_unless_finite((moments, q0, gamma, noise_variance), q0 * scale) + 0 * ts


def _growth(y):
    """(1 - exp(-y)) / y for y >= 0, and its derivatives, at 0 as well."""
    small = y < 0.25
    powers = np.array([(-1) ** n / factorial(n + 1) for n in range(_SERIES)])
    series = jnp.polyval(jnp.asarray(powers[::-1], y.dtype), jnp.where(small, y, 0))
    large = jnp.where(small, 1, y)
    return jnp.where(small, series, -jnp.expm1(-large) / large)


def gibbs_mean(
    loss: Callable[[Any], Array],
    observe: Callable[[Any], Array],
    temperature: ArrayLike,
    box: ArrayLike,
    points: int = 257,
) -> Float[Array, ""]:
    r"""Mean of a function of two parameters over the density exp(-loss / T), by quadrature.

    It is the mean at rest of gradient descent with noise, d theta = -grad L dt + sqrt(2 T) dB. The trapezoid
    rule that is used converges faster than any power of the distance of the points where the density is
    smooth and vanishes at the edges of the box. Finite steps dt of Euler's scheme have the density of

        L - dt |grad L|^2 / 4 + dt T (trace of the Hessian of L) / 2      up to dt^2

    Source: ziyin2022talk, slide on critical dynamics (quadrature is this project's own).

    Args:
        loss: scalar function L of the parameters, an array (2,); infinity outside of what they may be.
        observe: scalar function of the parameters, finite in the box.
        temperature: T, a positive number.
        box: lowest and highest value of each parameter, (2, 2), outside of which the density is nothing.
        points: of each axis, at least 2; their distance has to be below the width of the density. Static.

    Returns:
        The mean; NaN where the density at an edge of the box is more than a thousandth of the largest.

    Raises:
        ValueError: an argument is out of range and can be looked at, or a function returns no number.

    Example:
        >>> mean = gibbs_mean(lambda p: p @ p, lambda p: p[0] ** 2, 0.5, [[-6.0, 6.0], [-6.0, 6.0]])
        >>> round(float(mean), 12)  # T / 2
        0.25
    """
    (edges,) = require_arrays(box=box)
    require_shape("box", edges, (2, 2))
    known = as_concrete(edges)
    if known is None:
        edges = nan_unless(jnp.all(edges[:, 0] < edges[:, 1]), edges)
    elif not np.all(known[:, 0] < known[:, 1]):
        raise ValueError(f"box must have lower ends below upper ones, got {known.tolist()}")
    temperature = require_positive("temperature", temperature, edges.dtype)
    points = require_integer("points", points, at_least=2)
    for function in (loss, observe):
        require_scalar(function, edges[0])
    return _mean(loss, observe, temperature, edges, points)


def _mean(loss, observe, temperature, box, points):
    x, y = box[:, :1] + (box[:, 1:] - box[:, :1]) * jnp.linspace(0, 1, points, dtype=box.dtype)[None]
    grid = jnp.stack([part.reshape(-1) for part in jnp.meshgrid(x, y)], axis=1)
    ends = np.where(np.arange(points) % (points - 1), 1.0, 0.5)
    losses = jax.vmap(loss)(grid)
    least = jax.lax.stop_gradient(jnp.min(losses))
    shares = np.outer(ends, ends).reshape(-1).astype(box.dtype)
    density = jnp.exp(-(losses - least) / temperature)
    inside = jnp.max(jnp.where(shares < 1, density, 0)) < _CUT
    weights = shares * nan_unless(inside, density)
    return jnp.sum(weights * jax.vmap(observe)(grid)) / jnp.sum(weights)


def escape_rate(
    loss: Callable[[Any], Array],
    minimum: ArrayLike,
    saddle: ArrayLike,
    temperature: ArrayLike,
    saddles: ArrayLike = 1,
) -> Float[Array, ""]:
    r"""Rate of escape from a minimum over equal saddles, by Eyring and Kramers, for T well below the barrier.

        n |l| / (2 pi) sqrt(det H(minimum) / |det H(saddle)|) exp(-(L(saddle) - L(minimum)) / T)

    for d theta = -grad L dt + sqrt(2 T) dB, where l is the negative eigenvalue of the Hessian H at the
    saddle. Its inverse is the mean time until the next minimum is reached, up to a share of order T over the
    barrier; the ridge at the saddle is reached in half of that.

    Source: ziyin2022talk, slide on escaping (the law is that of Eyring and Kramers).

    Args:
        loss: scalar function L of the parameters, twice differentiable.
        minimum: the minimum, (n,), all of whose directions lead up.
        saddle: a saddle with one direction that leads down, (n,).
        temperature: T, a positive number.
        saddles: the number of saddles of that loss around the minimum, >= 0.

    Returns:
        The rate; NaN where a point that is traced is not what it has to be.

    Raises:
        ValueError: an argument is out of range, or a point is no minimum or no such saddle, and can be
            looked at.

    Example:
        >>> double_well = lambda p: jnp.sum(p**4 / 4 - p**2 / 2)
        >>> rate = escape_rate(double_well, [-1.0], [0.0], 0.1)
        >>> round(float(rate / (2**0.5 / (2 * jnp.pi) * jnp.exp(-2.5))), 6)
        1.0
    """
    minimum, saddle = require_vector("minimum", minimum), require_vector("saddle", saddle)
    require_shapes(minimum=(minimum, "n"), saddle=(saddle, "n"))
    minimum = require_finite("minimum", minimum)
    saddle = cast(require_finite("saddle", saddle), minimum.dtype)
    temperature = require_positive("temperature", temperature, minimum.dtype)
    saddles = require_number("saddles", saddles, minimum.dtype, at_least=0)
    require_scalar(loss, minimum)
    low, high = _look(loss, minimum), _look(loss, saddle)
    rate = saddles * _prefactor(low, high) * jnp.exp(-(high.loss - low.loss) / temperature)
    at_rest = [point.offset <= _AT_REST * temperature for point in (low, high)]
    for good, rule in (
        (at_rest[0] & _leads_up(low, 0), "minimum must be a minimum of the loss, with no flat direction"),
        (
            at_rest[1] & (high.values[0] < 0) & _leads_up(high, 1),
            "saddle must be a stationary point with one direction that leads down, and no flat one",
        ),
        (high.loss > low.loss, "saddle must lie above the minimum"),
    ):
        known = as_concrete(good)
        if known is not None and not known:
            raise ValueError(rule)
        rate = nan_unless(good, rate)
    return rate


class _Point(NamedTuple):
    """The loss around a point.

    Attributes:
        loss: the loss there.
        values: eigenvalues of the Hessian, ascending.
        offset: how far in loss a stationary point is, if the loss is quadratic.
    """

    loss: Array
    values: Array
    offset: Array


def _look(loss, point):
    hessian = jax.hessian(loss)(point)
    values, vectors = jax.lax.stop_gradient(jnp.linalg.eigh(hessian))
    slopes = vectors.T @ jax.lax.stop_gradient(jax.grad(loss)(point))
    curved = jnp.where(values == 0, jnp.finfo(values.dtype).tiny, jnp.abs(values))
    return _Point(loss(point), jnp.linalg.eigvalsh(hessian), jnp.sum(slopes**2 / curved) / 2)


def _leads_up(point, start):
    """Whether all directions but the first `start` ones lead up, by more than rounding."""
    values = point.values
    rounding = values.size * float(jnp.finfo(values.dtype).eps) * jnp.max(jnp.abs(values))
    return jnp.all(values[start:] > rounding) & jnp.isfinite(rounding)


def _prefactor(low, high):
    logs = [jnp.sum(jnp.log(jnp.abs(point.values))) for point in (low, high)]
    return -high.values[0] / (2 * np.pi) * jnp.exp((logs[0] - logs[1]) / 2)
