"""Hidden weights on a mixture of isotropic clusters: the averaged field for any activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    nan_unless,
    require_finite,
    require_number,
    require_positive,
    require_shapes,
)

# An activation maps pre-activations to activations, elementwise; under vmap a scalar to a scalar.
Activation = Callable[[Array], Array]


class Moments(NamedTuple):
    """What a cluster does to a hidden weight v: it pulls by `gain` along its center, by `stretch` along v.

    Attributes:
        gain: E[phi'(r + |v| u)], theta_1 of the source over |v|.
        stretch: E[u phi'(r + |v| u)] / |v|, theta_2 of the source over |v|^3.
    """

    gain: Array
    stretch: Array


def isotropic_mixture_field(
    v: ArrayLike,
    centers: ArrayLike,
    weights: ArrayLike,
    bias: ArrayLike,
    activation: Activation,
    scale: ArrayLike,
) -> Float[Array, " d"]:
    r"""Field of a hidden weight v, uniform attention on Gaussian clusters x ~ N(center_c, scale^2 I).

        v' = sum_c a_c (E[phi'(s_c)] center_c + E[u phi'(s_c)] v / |v|),   s_c = r_c + |v| u

    with u ~ N(0, scale^2) and r_c = <v, center_c> + bias. It is E[g phi'(v . x + bias) x] with an upstream
    gradient that is constant within a cluster, and exact for that.

    Source: tian2024joma, Theorem 3 (where theta_1 = |v| E[phi'] and theta_2 = |v|^2 E[u phi'], which depend
    on |v| as well).

    Args:
        v: hidden weight, shape (d,).
        centers: cluster means, shape (C, d).
        weights: a_c = E[g | c] P(c), shape (C,).
        bias: what is added to <v, center_c>, a number or one per cluster, shape (C,).
        activation: phi, an elementwise function that JAX differentiates. A kink is exact at zero, as in ReLU;
            elsewhere it costs accuracy. Static: hand in the same object to compile once.
        scale: standard deviation of a cluster along any axis, positive.

    Returns:
        dv/dt, shape (d,); NaN where a traced argument is out of range.

    Raises:
        ValueError: a shape does not fit, or a number that can be looked at is not finite or `scale` <= 0.

    Example:
        >>> isotropic_mixture_field([1.0, 0.0], [[0.0, 2.0]], [0.5], 0.0, lambda s: s, 1.0).round(9).tolist()
        [0.0, 1.0]
    """
    given = {"v": v, "centers": centers, "weights": weights, "bias": bias}
    v, centers, weights, bias = (require_finite(name, as_real(name, x)) for name, x in given.items())
    require_shapes(v=(v, "d"), centers=(centers, "C d"), weights=(weights, "C"))
    if bias.shape not in ((), weights.shape):
        raise ValueError(f"bias must be a number or of shape {weights.shape}, got shape {bias.shape}")
    dtype = jnp.result_type(v.dtype, centers.dtype, weights.dtype)
    v, centers, weights, bias = (array.astype(dtype) for array in (v, centers, weights, bias))
    scale = require_positive("scale", scale, dtype)
    r = centers @ v + bias
    norm = _safe_norm(v)
    gain, stretch = jax.vmap(lambda r: gaussian_moments(r, norm, activation, scale))(r)
    return (weights * gain) @ centers + jnp.sum(weights * stretch) * v


def gaussian_moments(r: ArrayLike, norm: ArrayLike, activation: Activation, scale: ArrayLike) -> Moments:
    r"""`Moments` for a Gaussian u ~ N(0, scale^2), by `isotropic_moments`.

    Closed forms: ReLU has gain Phi(r / (scale |v|)) and stretch scale pdf(r / (scale |v|)) / |v|; the square
    phi = s^2 / 2 has gain r and stretch scale^2.

    Source: tian2024joma, Theorem 3.

    Args:
        r: mean pre-activation, a number.
        norm: |v|, a number >= 0.
        activation: phi.
        scale: standard deviation of u, positive.

    Returns:
        The moments, scalars; NaN where a traced argument is out of range.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> gaussian_moments(0.0, 2.0, jax.nn.relu, 1.0).gain.round(12).tolist()
        0.5
    """
    r = as_real("r", r)
    scale = require_positive("scale", scale, r.dtype)

    def density(u):
        return jnp.exp(-((u / scale) ** 2) / 2) / (scale * jnp.sqrt(2 * jnp.pi).astype(r.dtype))

    # Beyond nine standard deviations a Gaussian is below the rounding of its mass.
    return isotropic_moments(r, norm, activation, density, 9 * scale)


def isotropic_moments(
    r: ArrayLike, norm: ArrayLike, activation: Activation, density: Callable[[Array], Array], width: ArrayLike
) -> Moments:
    r"""`Moments` for any isotropic cluster, u being its projection on a line through the center.

    Gauss-Legendre quadrature on panels that get finer towards the point where the pre-activation is zero:
    the kink of ReLU and its like does no harm, and neither does an activation that saturates within a
    millionth of the range, as tanh does for large |v|. One that oscillates for ever is resolved while |v| u
    stays below about ten. The result depends neither on a network nor on sampling.

    Source: tian2024joma, Theorem 3.

    Args:
        r: mean pre-activation, a number.
        norm: |v|, a number >= 0.
        activation: phi, elementwise.
        density: density of u, elementwise: the one-dimensional marginal of the centred cluster.
        width: u lies in [-width, width], positive.

    Returns:
        The moments, scalars; NaN where a traced argument is out of range.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> flat = lambda u: 0.5 + 0 * u  # a marginal of the sphere in three dimensions
        >>> isotropic_moments(0.5, 1.0, jax.nn.relu, flat, 1.0).gain.round(12).tolist()
        0.75
    """
    r = as_real("r", r)
    r = require_number("r", r, r.dtype)
    norm = require_number("norm", norm, r.dtype, at_least=0)
    width = require_positive("width", width, r.dtype)
    nodes, mass = (jnp.asarray(array, r.dtype) for array in _graded_quadrature())
    kink = jnp.clip(-r / jnp.where(norm > 0, norm, 1), -width, width)
    kink = jnp.where(norm > 0, kink, 0)

    def over(end):
        u = kink + (end - kink) * nodes
        slope = jax.vmap(jax.grad(activation))(r + norm * u)
        share = jnp.abs(end - kink) * mass * density(u) * slope
        return jnp.sum(share), jnp.sum(share * u)

    (gain_low, pull_low), (gain_high, pull_high) = over(-width), over(width)
    # At v = 0 the projection does not matter, and E[u phi'] vanishes with it.
    stretch = jnp.where(norm > 0, (pull_low + pull_high) / jnp.where(norm > 0, norm, 1), 0)
    # The slope of an activation such as ReLU may be zero at NaN.
    good = jnp.isfinite(r) & jnp.isfinite(norm)
    return Moments(nan_unless(good, gain_low + gain_high), nan_unless(good, stretch))


def _graded_quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], on panels whose length halves towards zero."""
    edges = np.concatenate([[0.0], 0.5 ** np.arange(24, -1, -1)])
    nodes, mass = np.polynomial.legendre.leggauss(20)
    length = np.diff(edges)
    return (
        (edges[:-1, None] + length[:, None] * (nodes[None] + 1) / 2).ravel(),
        (length[:, None] * mass[None] / 2).ravel(),
    )


def _safe_norm(v: Array) -> Array:
    """|v| with a gradient of zero at v = 0, and without squares that underflow."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v)))
    scaled = v / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(scaled**2)
    return largest * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
