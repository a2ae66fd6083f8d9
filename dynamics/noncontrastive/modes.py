"""Aligned modes of linear BYOL: decoupled flow, the phase line, its fixed points, the basin of collapse."""

from __future__ import annotations

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    cast,
    is_traced,
    nan_unless,
    require_arrays,
    require_every,
    require_positive,
    require_times,
)
from dynamics.derivatives import nan_derivatives
from dynamics.flow import Trajectory, integrate
from dynamics.noncontrastive.target import is_stiff, require_ema_rate, stiff_solver


class Modes(NamedTuple):
    """Aligned modes, arrays of one shape; along a trajectory each has a leading axis of time.

    Attributes:
        p: eigenvalues of the predictor W_p.
        s: eigenvalues of F = W W^T, for the same eigenvectors.
        tau: sizes of the target over those of the online network: W_a = U diag(tau sqrt(s)) V^T.
    """

    p: Any
    s: Any
    tau: Any


class FixedPoints(NamedTuple):
    """Fixed points of the phase line besides 0, arrays of one shape, NaN where there are none.

    Attributes:
        p_minus: the unstable one, the threshold of collapse.
        p_plus: the stable one.
    """

    p_minus: Array
    p_plus: Array


class _Setting(NamedTuple):
    spread: Array
    predictor_rate: Array
    ema_rate: Array
    weight_decay: Array
    by_weights: Array  # where the state is p, the network's own size and that of its target, see _by_weights


def decoupled_flow(
    p0: ArrayLike,
    s0: ArrayLike,
    tau0: ArrayLike,
    ts: ArrayLike,
    *,
    augmentation_variance: ArrayLike,
    predictor_rate: ArrayLike,
    ema_rate: ArrayLike,
    weight_decay: ArrayLike,
    **options: Any,
) -> Trajectory:
    r"""Linear BYOL on isotropic data once predictor and features are aligned: each mode moves by itself.

        dp/dt   = alpha_p s e - eta p,       e = tau - (1 + sigma^2) p
        ds/dt   = 2 p s e - 2 eta s
        dtau/dt = beta (1 - tau) - tau (p e - eta)

    Each mode has a tau of its own, which the talk prints without index; its equation there is divided by s
    here, which is small on modes that collapse. s - p^2 / alpha_p decays like exp(-2 eta t).

    All starts and rates broadcast, so that a portrait over a grid is one call. Its elements are one state of
    the solver, whose error is controlled on their root mean square; on a CPU, one for every 2048 of them.

    Source: tian2021directpred, the talk's slide on decoupled dynamics.

    Args:
        p0: eigenvalues of the predictor, any shape, of any sign.
        s0: eigenvalues of W W^T, >= 0.
        tau0: sizes of the target over those of the online network.
        ts: times, (T,).
        augmentation_variance: sigma^2 >= 0.
        predictor_rate: alpha_p >= 0.
        ema_rate: beta >= 0, concrete. At infinity tau = 1 at every time, the first one included, and `tau0`
            is ignored. Fast rates are solved by an implicit method, whose systems are three by three, unless
            `ts` is traced or starts are 32-bit: then a step takes some 1 / beta.
        weight_decay: eta >= 0.
        **options: those of `dynamics.flow.integrate`; the solver is `diffrax.Tsit5()` unless rates are fast.

    Returns:
        A `Trajectory` with `ys` the `Modes`, (T, ...) with the broadcast shape. On a mode that collapses tau
        grows without bound where eta >= beta. From p < 0 the network may pass zero, where tau is infinite:
        such modes are solved by their weights, so that tau is as exact as W is above `atol`, and NaN at
        W = 0.

    Raises:
        ValueError: the shapes do not broadcast, a number is out of range and can be looked at, or `ema_rate`
            is traced.
        RuntimeError: the solve failed.

    Example:
        >>> rates = {"augmentation_variance": 0.25, "predictor_rate": 1.0, "weight_decay": 0.04}
        >>> p0, s0 = [0.03, 0.06], [0.0009, 0.0036]
        >>> path = decoupled_flow(p0, s0, 1.0, [0.0, 400.0], ema_rate=jnp.inf, **rates)
        >>> path.ys.p[-1].round(5).tolist()  # below and above the threshold 0.0422
        [0.0, 0.75777]
    """
    if is_traced(ema_rate):
        raise ValueError("ema_rate must be concrete, since it decides about the solver, got a traced array")
    p0, s0, tau0 = require_arrays(p0=p0, s0=s0, tau0=tau0)
    beta = require_ema_rate(ema_rate, p0.dtype)
    ts = require_times(ts, p0.dtype)
    start = {"p0": p0, "s0": _not_negative("s0", s0, p0.dtype), "tau0": tau0}
    rates = {
        "augmentation_variance": 1 + _not_negative("augmentation_variance", augmentation_variance, p0.dtype),
        "predictor_rate": _not_negative("predictor_rate", predictor_rate, p0.dtype),
        "ema_rate": beta,
        "weight_decay": _not_negative("weight_decay", weight_decay, p0.dtype),
    }
    start, setting = _prepared(*_require_broadcast(**start, **rates))
    if options.get("solver") is None:
        options["solver"] = stiff_solver(elementwise=True) if is_stiff(beta, ts) else diffrax.Tsit5()
    whole = start.p.size <= _PIECE or jax.default_backend() != "cpu"
    solve = _at_once if whole else _in_pieces
    path = solve(start, ts, setting, options)
    return Trajectory(path.ts, _by_modes(path.ys, setting.by_weights), path.ok)


@jax.jit
def _prepared(*arrays):
    p, s, tau, *rates = jnp.broadcast_arrays(*arrays)
    instant = jnp.isinf(rates[2])
    setting = _Setting(*rates, by_weights=(p < 0) & ~instant)
    return _by_weights(Modes(p, s, jnp.where(instant, 1, tau)), setting.by_weights), setting


def _by_weights(modes: Modes, where: Array) -> Modes:
    """Modes with r = s^{1/2} and tau r in place of s and tau, where they may pass zero."""
    alive = where & (modes.s > 0)  # the root has no derivative at zero
    r = jnp.where(alive, jnp.sqrt(jnp.where(alive, modes.s, 1)), 0)
    return Modes(modes.p, jnp.where(where, r, modes.s), jnp.where(where, modes.tau * r, modes.tau))


@jax.jit
def _by_modes(state: Modes, where: Array) -> Modes:
    p, s, tau = state
    where = jnp.broadcast_to(where, p.shape)
    return Modes(p, jnp.where(where, s**2, s), jnp.where(where, tau / jnp.where(where, s, 1), tau))


def _at_once(start: Modes, ts: Array, setting: _Setting, options: dict[str, Any]) -> Trajectory:
    return integrate(_decoupled_field, start, ts, setting, **options)


# Elements whose states and stages fit into a processor's cache: pieces of a thousand to four thousand are
# solved three times as fast as ninety thousand at once. An accelerator wants all at once.
_PIECE = 2048


def _in_pieces(start: Modes, ts: Array, setting: _Setting, options: dict[str, Any]) -> Trajectory:
    """The flow of many modes, solved in pieces of one size, one after another by one program."""
    shape, size = start.p.shape, start.p.size

    def cut(array):
        flat = jnp.ravel(array)
        return jnp.concatenate([flat, jnp.broadcast_to(flat[-1:], (-size % _PIECE,))]).reshape(-1, _PIECE)

    pieces = jax.tree.map(cut, (start, setting))
    if is_traced(pieces, ts, options):
        path = _map_pieces(pieces, ts, options)
    else:
        pieces = jax.device_get(pieces)
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], pieces) for i in range(len(pieces[0].p))]
        paths = [_at_once(modes, ts, rates, options) for modes, rates in each]
        path = jax.tree.map(lambda *leaves: np.stack(leaves), *paths)

    def joined(leaf):
        return jnp.moveaxis(leaf, 0, 1).reshape(ts.size, -1)[:, :size].reshape(ts.size, *shape)

    ok = jnp.all(path.ok)
    return Trajectory(ts, jax.tree.map(joined, path.ys), ok)


@eqx.filter_jit
def _map_pieces(pieces, ts, options):
    return jax.lax.map(lambda piece: _at_once(piece[0], ts, piece[1], options), pieces)


def _decoupled_field(t, modes, setting):
    (p, s, tau), (spread, alpha_p, beta, eta, by_weights) = modes, setting
    instant = jnp.isinf(beta)
    beta = jnp.where(instant, 0, beta)
    e = tau - spread * p
    following = jnp.where(instant, 0, beta * (1 - tau) - tau * (p * e - eta))
    decoupled = Modes(alpha_p * s * e - eta * p, 2 * p * s * e - 2 * eta * s, following)
    r, a = s, tau
    M = a - spread * p * r
    weights = Modes(alpha_p * r * M - eta * p, p * M - eta * r, beta * (r - a))
    return jax.tree.map(lambda own, other: jnp.where(by_weights, own, other), weights, decoupled)


def _not_negative(name: str, value: Any, dtype: Any) -> Array:
    (array,) = require_arrays(**{name: value})
    return require_every(name, cast(array, dtype), lambda x: x >= 0, ">= 0")


def _require_broadcast(**arrays: Array) -> list[Array]:
    """The arrays, whose shapes have a common one."""
    try:
        jnp.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"starts and rates must broadcast to one shape, got {shapes}") from None
    return list(arrays.values())


def phase_velocity(
    p: ArrayLike,
    tau: ArrayLike,
    weight_decay: ArrayLike,
    augmentation_variance: ArrayLike,
    imbalance: ArrayLike = 0.0,
    predictor_rate: ArrayLike = 1.0,
) -> Float[Array, "..."]:
    r"""Speed dp/dt on the phase line of one mode, where s = p^2 / alpha_p + c.

        dp/dt = p (tau p - (1 + sigma^2) p^2 - eta) + alpha_p c (tau - (1 + sigma^2) p)

    The imbalance c decays like exp(-2 eta t); hand over what is left of it. At c = 0 the predictor's rate
    does not enter.

    Source: tian2021directpred, the talk's slides on why there is no collapse.

    Args:
        p: eigenvalue of the predictor; all arguments broadcast.
        tau: size of the target over that of the online network.
        weight_decay: eta >= 0.
        augmentation_variance: sigma^2 >= 0.
        imbalance: c, of any sign.
        predictor_rate: alpha_p >= 0.

    Returns:
        The speed, in the broadcast shape.

    Raises:
        ValueError: the shapes do not broadcast, or a number is out of range and can be looked at.

    Example:
        >>> phase_velocity([0.0, 0.5], 1.0, 0.125, 0.5).tolist()  # 0.5 (0.5 - 0.375 - 0.125)
        [0.0, 0.0]
    """
    (p,) = require_arrays(p=p)
    return _speed(
        *_require_broadcast(
            p=p,
            **_phase_arguments(p.dtype, tau, weight_decay, augmentation_variance, imbalance, predictor_rate),
        )
    )


@jax.jit
def _speed(p, tau, eta, spread, imbalance, alpha_p):
    return p * (tau * p - spread * p**2 - eta) + alpha_p * imbalance * (tau - spread * p)


def _phase_arguments(dtype, tau, weight_decay, augmentation_variance, imbalance, predictor_rate):
    tau, imbalance = (cast(array, dtype) for array in require_arrays(tau=tau, imbalance=imbalance))
    return {
        "tau": tau,
        "weight_decay": _not_negative("weight_decay", weight_decay, dtype),
        "augmentation_variance": 1 + _not_negative("augmentation_variance", augmentation_variance, dtype),
        "imbalance": imbalance,
        "predictor_rate": _not_negative("predictor_rate", predictor_rate, dtype),
    }


def fixed_points(tau: ArrayLike, weight_decay: ArrayLike, augmentation_variance: ArrayLike) -> FixedPoints:
    r"""Fixed points of the phase line at imbalance 0, besides the stable one at 0.

        p_plus  = [tau + (tau^2 - 4 eta (1 + sigma^2))^{1/2}] / (2 (1 + sigma^2))
        p_minus = 2 eta / [tau + (tau^2 - 4 eta (1 + sigma^2))^{1/2}]

    There are none where the weight decay is above tau^2 / (4 (1 + sigma^2)), at which they meet. A root of
    rounding counts as zero. For negative tau both are negative, and p_minus is stable.

    Source: tian2021directpred, the talk's slides on why there is no collapse.

    Args:
        tau: size of the target over that of the online network; all arguments broadcast.
        weight_decay: eta >= 0.
        augmentation_variance: sigma^2 >= 0.

    Returns:
        The `FixedPoints` in the broadcast shape. Their derivatives are not finite where they meet.

    Raises:
        ValueError: the shapes do not broadcast, or a number is out of range and can be looked at.

    Example:
        >>> [round(float(p), 6) for p in fixed_points(1.0, 0.04, 0.25)]
        [0.042229, 0.757771]
    """
    (tau,) = require_arrays(tau=tau)
    tau, eta, spread = _require_broadcast(
        tau=tau,
        weight_decay=_not_negative("weight_decay", weight_decay, tau.dtype),
        augmentation_variance=1 + _not_negative("augmentation_variance", augmentation_variance, tau.dtype),
    )
    return _fixed_points(tau, eta, spread)


@jax.jit
def _fixed_points(tau, eta, spread):
    # Over tau^2, which is beyond the range of numbers for a tau that is not.
    share = 1 - 4 * spread * (eta / jnp.where(tau == 0, 1, tau)) / jnp.where(tau == 0, 1, tau)
    discriminant = jnp.where((tau == 0) & (eta > 0), -1, share)
    meet = abs(discriminant) <= 8 * jnp.finfo(tau.dtype).eps
    root = abs(tau) * jnp.sqrt(jnp.where(meet, 0, discriminant))
    # The root of the larger magnitude has no cancellation, and tells the other one by their product.
    sum_of_both = tau + jnp.where(tau < 0, -root, root)
    larger = sum_of_both / (2 * spread)
    smaller = 2 * eta / jnp.where(sum_of_both == 0, 1, sum_of_both)
    positive = tau >= 0
    return FixedPoints(jnp.where(positive, smaller, larger), jnp.where(positive, larger, smaller))


def collapse_threshold(
    tau: ArrayLike,
    weight_decay: ArrayLike,
    augmentation_variance: ArrayLike,
    imbalance: ArrayLike = 0.0,
    predictor_rate: ArrayLike = 1.0,
    *,
    duration: ArrayLike = 1000.0,
) -> Float[Array, "..."]:
    r"""The start p(0) >= 0 below which a mode collapses, found by bisection of trajectories.

    Each trajectory follows the phase line with tau held and an imbalance c exp(-2 eta t), and has collapsed
    where it ends at or below p_minus, or where there is none at or below tau / (2 (1 + sigma^2)), where the
    fixed points met. At c = 0 the threshold is p_minus; c > 0 lowers it.

    Source: tian2021directpred, the talk's slides on why there is no collapse.

    Args:
        tau: size of the target over that of the online network, > 0; all arguments but the last broadcast.
        weight_decay: eta >= 0.
        augmentation_variance: sigma^2 >= 0.
        imbalance: c = s(0) - p(0)^2 / alpha_p, of any sign. Where it is negative p(0) is at least
            (-alpha_p c)^{1/2}, since s is not negative.
        predictor_rate: alpha_p >= 0.
        duration: time after which a mode is looked at, a number > 0.

    Returns:
        The threshold: 0, or (-alpha_p c)^{1/2}, where none collapses, and infinity where all do. Its
        derivatives are NaN. NaN everywhere where a trajectory could not be solved.

    Raises:
        ValueError: the shapes do not broadcast, or a number is out of range and can be looked at.

    Example:
        >>> collapse_threshold(1.0, 0.04, 0.25, [0.0, 0.002, 0.01]).round(4).tolist()
        [0.0422, 0.0247, 0.0]
    """
    (tau,) = require_arrays(tau=tau)
    tau = require_every("tau", tau, lambda x: x > 0, "> 0")
    duration = require_positive("duration", duration, tau.dtype)
    named = _phase_arguments(tau.dtype, tau, weight_decay, augmentation_variance, imbalance, predictor_rate)
    return _collapse_threshold(_require_broadcast(**named), duration)


# Halvings of a bracket that is a few units wide.
_HALVINGS = 30


@eqx.filter_jit
def _collapse_threshold(given, duration):
    tau, eta, spread, imbalance, alpha_p = line = jnp.broadcast_arrays(*jax.lax.stop_gradient(given))
    held = fixed_points(tau, eta, spread - 1).p_minus
    held = jnp.where(jnp.isnan(held), tau / (2 * spread), held)
    times = jnp.stack([jnp.zeros_like(duration), jax.lax.stop_gradient(duration)])

    def survives(p):
        path = integrate(_line_field, p, times, line, solver=diffrax.Tsit5(), throw=False)
        return path.ys[-1] > held, path.ok

    least = jnp.sqrt(jnp.maximum(-alpha_p * imbalance, 0))
    most = 2 * jnp.maximum(tau / spread, least)

    def halve(step, state):
        low, high, ok = state
        # The upper end is tried first, then the lower one, and then the middle. An upper end that does not
        # survive is tried each time, and what is found stays infinite.
        tried = jnp.where(jnp.isinf(high), most, (low + high) / 2)
        tried = jnp.where(step == 1, least, tried)
        above, solved = survives(tried)
        return jnp.where(above, low, tried), jnp.where(above, tried, high), ok & solved

    unknown = least, jnp.full_like(least, jnp.inf), jnp.array(True)
    _, found, ok = jax.lax.fori_loop(0, 2 + _HALVINGS, halve, unknown)
    return nan_derivatives(jnp.array(True), nan_unless(ok, found), (given, duration))


def _line_field(t, p, line):
    tau, eta, spread, imbalance, alpha_p = line
    return _speed(p, tau, eta, spread, imbalance * jnp.exp(-2 * eta * t), alpha_p)
