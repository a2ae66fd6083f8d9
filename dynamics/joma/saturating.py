"""Hidden weights that saturate: the effective flow behind attention that gets sparse and then dense again."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import ArrayLike, as_real, cast, require_finite, require_same_shape, require_vector
from dynamics.flow import Trajectory, integrate


def saturating_flow(v0: ArrayLike, mu: ArrayLike, ts: ArrayLike, **options: Any) -> Trajectory:
    r"""Saturating flow of the hidden weights under exp attention: v' = (mu - v) exp(v^2 / 2), elementwise.

    It is the model of a network whose upstream gradient is mu - v, falling as v comes near mu. The
    flow is stiff for mu above 3, so the default solver is implicit, and out of reach for mu above 6. Where
    s = ln(1 / |1 - v / mu|) is above 36, v equals mu to rounding; `log_residual_flow` goes on.

    Source: tian2024joma, section 4 (nonlinear activation).

    Args:
        v0: start, shape (M,).
        mu: what v tends to, shape (M,).
        ts: times that increase strictly, shape (T,).
        **options: options of `dynamics.flow.integrate`; `solver` is `diffrax.Kvaerno5()` where not given, and
            in 32-bit the tolerances are 1e-4 and 1e-5.

    Returns:
        A `Trajectory` with `ys` = v, shape (T, M).

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
        RuntimeError: the solve failed.

    Example:
        >>> saturating_flow([0.0], [1.0], [0.0, 50.0]).ys[-1].round(6).tolist()
        [1.0]
    """
    v0, mu = require_finite("v0", as_real("v0", v0)), _require_mu(mu)
    require_same_shape("(M,)", [1], v0=v0, mu=mu)
    options = {"solver": diffrax.Kvaerno5(), **options}
    if jnp.finfo(v0.dtype).bits < 64:
        # An implicit solver's own root finding cannot meet tolerances near the rounding.
        options = {"rtol": 1e-4, "atol": 1e-5, **options}
    return integrate(_saturating_field, v0, ts, cast(mu, v0.dtype), **options)


def log_residual_flow(mu: ArrayLike, ts: ArrayLike, **options: Any) -> Trajectory:
    r"""`saturating_flow` from zero start in s = ln(1 / delta), delta = 1 - v / mu, which never underflows.

        s' = exp(mu^2 (1 - e^{-s})^2 / 2),   v = mu (1 - e^{-s})

    Late on, s = exp(mu^2 / 2) (t - D(mu)) with the `onset_delay` D: the larger mu, the faster, by far. For mu
    above 8 steps get too short to integrate; that law is good to rounding there.

    Source: tian2024joma, Theorem 4 (in s, derived here).

    Args:
        mu: what v tends to, shape (M,).
        ts: times that increase strictly, shape (T,); s = 0 at ts[0].
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys` = s, shape (T, M).

    Raises:
        ValueError: `mu` has another shape, or a number is not finite.
        RuntimeError: the solve failed.

    Example:
        >>> log_residual_flow([0.0, 1.0], [0.0, 20.0]).ys[-1].round(3).tolist()
        [20.0, 32.094]
    """
    mu = _require_mu(mu)
    return integrate(_log_residual_field, jnp.zeros_like(mu), ts, mu, **options)


def rate_ratio(mu: ArrayLike, reference: ArrayLike) -> Array:
    r"""Ratio of the late rates of two components: s_j / s_k tends to exp((mu_j^2 - mu_k^2) / 2).

    At time t the ratio is off by a share of about (D_k - D_j) / t, see `onset_delay`.

    Source: tian2024joma, Theorem 4.

    Args:
        mu: mu_j, any shape.
        reference: mu_k, a number or the shape of `mu`.

    Returns:
        The ratio, of the shape of `mu`.

    Raises:
        ValueError: `reference` has another shape, or a number is not finite and can be looked at.

    Example:
        >>> float(rate_ratio(2.0, 0.0)).__round__(6)  # e^2
        7.389056
    """
    mu = require_finite("mu", as_real("mu", mu))
    reference = require_finite("reference", as_real("reference", reference))
    if reference.shape not in ((), mu.shape):
        raise ValueError(f"reference must be a number or of shape {mu.shape}, got shape {reference.shape}")
    reference = reference.astype(mu.dtype)
    return jnp.exp((mu - reference) * (mu + reference) / 2)


def onset_delay(mu: ArrayLike) -> Array:
    r"""Delay D of the late law s = exp(mu^2 / 2) (t - D(mu)) of `log_residual_flow`.

        D = int_0^inf (exp(-mu^2 (1 - e^{-x})^2 / 2) - exp(-mu^2 / 2)) dx

    Source: tian2024joma, Theorem 4 (derived here).

    Args:
        mu: what v tends to, any shape.

    Returns:
        D, of the shape of `mu`; NaN where exp(mu^2 / 2) is beyond the dtype.

    Example:
        >>> [round(float(D), 4) for D in onset_delay([0.5, 1.0, 1.5, 2.0])]
        [0.172, 0.5342, 0.8057, 0.8585]
    """
    mu = as_real("mu", mu)
    # With y = 1 - e^{-x} the range is finite, and the integrand is analytic up to its end.
    nodes, mass = np.polynomial.legendre.leggauss(64)
    y, mass = jnp.asarray((nodes + 1) / 2, mu.dtype), jnp.asarray(mass / 2, mu.dtype)

    def delay(mu):
        return jnp.sum(mass * jnp.exp(-(mu**2) / 2) * jnp.expm1(mu**2 * (1 - y**2) / 2) / (1 - y))

    return jax.vmap(delay)(mu.reshape(-1)).reshape(mu.shape)


def _saturating_field(t, v, mu):
    return (mu - v) * jnp.exp(v**2 / 2)


def _log_residual_field(t, s, mu):
    return jnp.exp((mu * jnp.expm1(-s)) ** 2 / 2)


def _require_mu(mu: ArrayLike) -> Float[Array, " M"]:
    return require_finite("mu", require_vector("mu", mu, "M"))
