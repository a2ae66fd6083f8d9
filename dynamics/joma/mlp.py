"""Attention folded into the MLP: the modified-MLP flow for linear activation, to its blow-up and beyond."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.scipy.special import erfinv
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    require_every,
    require_finite,
    require_same_shape,
    require_times,
)
from dynamics.flow import Trajectory, integrate

# Near the blow-up a step is long in v, and what is interpolated inside it is worse than its ends.
_TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12, "max_steps": 10_000}


class Rescaled(NamedTuple):
    """The `ys` of `rescaled_mlp_flow`.

    Attributes:
        V: hidden weights.
        t: the time of the flow itself.
    """

    V: Array
    t: Array


def modified_mlp_flow(V0: ArrayLike, delta: ArrayLike, ts: ArrayLike, **options: Any) -> Trajectory:
    r"""Flow of the hidden weights with exp attention folded in: V' = exp(|row|^2 / 2) delta, row by row.

    It is what a linear activation, a stationary upstream gradient and attention logits z = |row|^2 / 2 (the
    `invariant` from zero start) give. The row with the largest |delta| goes to infinity in finite time.

    Source: tian2024joma, Theorem 2 and its extension to several hidden nodes.

    Args:
        V0: hidden weights at ts[0], shape (M,) or, for K hidden nodes, (M, K).
        delta: saliency, the shape of `V0`.
        ts: times that increase strictly, shape (T,), below the blow-up time (`blow_up_time` from zero start).
        **options: options of `dynamics.flow.integrate`; `throw=False` gives ok=False beyond the blow-up.
            The tolerances are a hundred times tighter than there where not given.

    Returns:
        A `Trajectory` with `ys` = V, shape (T, *V0.shape).

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
        RuntimeError: the solve failed: a time lies beyond the blow-up.

    Example:
        >>> path = modified_mlp_flow([0.0, 0.0], [1.0, 0.5], [0.0, 1.0])
        >>> path.ys[-1].round(5).tolist() == modified_mlp_solution(1.0, [1.0, 0.5]).round(5).tolist()
        True
    """
    V0, delta = _require_delta(V0, delta)
    try:
        return integrate(_modified_mlp_field, V0, ts, delta, **{**_TIGHT, **options})
    except RuntimeError as error:
        raise RuntimeError(
            "ts must end before the blow-up, which blow_up_time gives for a zero start; rescaled_mlp_flow "
            f"goes through it ({error})"
        ) from None


def rescaled_mlp_flow(V0: ArrayLike, delta: ArrayLike, taus: ArrayLike, **options: Any) -> Trajectory:
    r"""`modified_mlp_flow` in a time that never blows up: dtau = exp(max |row|^2 / 2) dt.

        dV/dtau = exp((|row|^2 - max |row|^2) / 2) delta,   dt/dtau = exp(-max |row|^2 / 2)

    The orbit is the same; t tends to the blow-up time while the winning row grows linearly in tau.

    Source: tian2024joma, Theorem 2 (the change of time is derived here).

    Args:
        V0: hidden weights at taus[0], shape (M,) or (M, K).
        delta: saliency, the shape of `V0`.
        taus: rescaled times that increase strictly, shape (T,).
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` over tau with `ys.V` (T, *V0.shape) and the flow's own time `ys.t` (T,), from 0.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
        RuntimeError: the solve failed.

    Example:
        >>> path = rescaled_mlp_flow([0.0, 0.0], [1.0, 0.5], [0.0, 100.0])
        >>> bool(path.ys.V[-1, 0] > 99), abs(float(path.ys.t[-1] - blow_up_time([1.0, 0.5]))) < 1e-6
        (True, True)
    """
    V0, delta = _require_delta(V0, delta)
    start = Rescaled(V0, jnp.zeros((), V0.dtype))
    taus = require_times(taus, V0.dtype, "taus")
    return integrate(_rescaled_field, start, taus, delta, **{**_TIGHT, **options})


def modified_mlp_solution(t: ArrayLike, delta: ArrayLike) -> Array:
    r"""`modified_mlp_flow` from zero start in closed form.

        v_l(t) = sqrt(2) erfinv(sqrt(2 / pi) delta_l t)

    At any time erf(v_l / sqrt(2)) / delta_l is the same for all l. The printed theorem has erf(v / 2), which
    belongs to exp(v^2 / 4). Past the blow-up time the winners stay at infinity, the others
    at their limits sqrt(2) erfinv(delta_l / max |delta|). With several hidden nodes a row keeps the direction
    of its row of delta, and its norm grows so.

    Source: tian2024joma, Theorem 2, corrected (derived here for several hidden nodes).

    Args:
        t: times >= 0, any shape.
        delta: saliency, shape (M,) or (M, K).

    Returns:
        v, shape (*t.shape, *delta.shape); NaN where a traced t is negative or a traced delta not finite.

    Raises:
        ValueError: `delta` has another shape, or is not finite or `t` negative and can be looked at.

    Example:
        >>> modified_mlp_solution(9.0, [1.0, 0.5, 0.0]).round(5).tolist()
        [inf, 0.67449, 0.0]
    """
    t, delta = require_every("t", as_real("t", t), lambda t: t >= 0, ">= 0"), _require_saliency(delta)
    if delta.ndim == 2:
        norm = _row_norms(delta)
        direction = delta / jnp.where(norm == 0, 1, norm)[:, None]
        direction = direction.reshape((1,) * t.ndim + delta.shape)
        length = modified_mlp_solution(t, norm)[..., None]
        # A component that is zero stays so where its row is infinite.
        return jnp.where((direction == 0) & (length > 0), 0, length * direction)
    dtype = jnp.promote_types(t.dtype, delta.dtype)
    largest = jnp.max(jnp.abs(delta))
    # Winners must reach infinity: a quotient of equal numbers may be rounded below one.
    share = delta / jnp.where(largest == 0, 1, largest)
    share = jnp.where(jnp.abs(delta) == largest, jnp.sign(delta), share).astype(dtype)
    progress = jnp.minimum(t.astype(dtype) * jnp.sqrt(2 / jnp.pi).astype(dtype) * largest, 1)
    progress = jnp.where(largest == 0, jnp.minimum(t, 0).astype(dtype), progress)
    share = share.reshape((1,) * t.ndim + share.shape)
    return jnp.sqrt(2.0).astype(dtype) * erfinv(progress[..., None] * share)


def blow_up_time(delta: ArrayLike) -> Float[Array, ""]:
    r"""Time at which `modified_mlp_flow` from zero start goes to infinity: sqrt(pi / 2) / max |delta_l|.

    Source: tian2024joma, Theorem 2 (derived here; rows stay parallel to those of delta).

    Args:
        delta: saliency, shape (M,) or (M, K).

    Returns:
        The time, a scalar; infinite where delta is zero, NaN where it is traced and not finite.

    Raises:
        ValueError: `delta` has another shape, or is not finite and can be looked at.

    Example:
        >>> round(float(blow_up_time([1.0, -2.0])), 6)
        0.626657
    """
    delta = _require_saliency(delta)
    return jnp.sqrt(jnp.pi / 2).astype(delta.dtype) / jnp.max(_row_norms(delta))


def _modified_mlp_field(t, V, delta):
    return _by_row(jnp.exp(_row_squares(V) / 2), delta)


def _rescaled_field(tau, state, delta):
    exponent = _row_squares(state.V) / 2
    largest = jnp.max(exponent)
    return Rescaled(_by_row(jnp.exp(exponent - largest), delta), jnp.exp(-largest))


def _row_squares(V: Array) -> Array:
    return V**2 if V.ndim == 1 else jnp.sum(V**2, axis=-1)


def _by_row(factor: Array, delta: Array) -> Array:
    return factor * delta if delta.ndim == 1 else factor[:, None] * delta


def _row_norms(delta: Array) -> Array:
    """|row|, (M,), scaled before it is squared: small saliencies would vanish."""
    if delta.ndim == 1:
        return jnp.abs(delta)
    peak = jnp.max(jnp.abs(delta))
    return peak * jnp.linalg.norm(delta / jnp.where(peak == 0, 1, peak), axis=-1)


def _require_saliency(delta: ArrayLike) -> Array:
    delta = as_real("delta", delta)
    if delta.ndim not in (1, 2) or delta.size == 0:
        raise ValueError(f"delta must have shape (M,) or (M, K), got shape {delta.shape}")
    return require_finite("delta", delta)


def _require_delta(V0: ArrayLike, delta: ArrayLike) -> tuple[Array, Array]:
    V0, delta = as_real("V0", V0), as_real("delta", delta)
    require_same_shape("(M,) or (M, K)", [1, 2], V0=V0, delta=delta)
    return require_finite("V0", V0), cast(require_finite("delta", delta), V0.dtype)
