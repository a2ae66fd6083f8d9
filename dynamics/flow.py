"""Flows: trajectories and their integration. The only module that touches a solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

VectorField = Callable[[Any, Any, Any], Any]
# What public functions take for an array: they convert and validate it themselves.
ArrayLike = jax.typing.ArrayLike | Sequence[Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """States along a curve, from a solver or from training.

    Attributes:
        ts: times, shape (T,). For trained networks the time is learning_rate * step.
        ys: the states: a pytree whose leaves have a leading axis T. NaN from where a solver gave up.
        ok: boolean scalar: the end was reached and everything that must be finite is finite.

    Under `vmap` all three carry the mapped axes in front.
    """

    # Arrays, except while JAX takes the pytree apart: a shape annotation would be checked then too.
    ts: Array | Any
    ys: PyTree
    ok: Array | Any


def is_traced(*trees: PyTree) -> bool:
    """Whether any leaf is a JAX tracer, whose value cannot be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in a pytree is finite."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def as_inexact(x: ArrayLike) -> Array:
    """An array of floating (or complex) numbers; floating dtypes are kept."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


def require_times(ts: ArrayLike, dtype: Any) -> Float[Array, " T"]:
    """Times as an array of the given dtype, or `ValueError` unless they are finite and increase strictly."""
    shape = np.shape(ts)
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"ts must have shape (T,) with T >= 1, got shape {shape}")
    times = jnp.asarray(ts).astype(dtype)
    if not is_traced(times):
        values = np.asarray(times, dtype=float)
        if not np.all(np.isfinite(values)):
            raise ValueError("ts must be finite, got NaN or infinity")
        if np.any(np.diff(values) <= 0):
            raise ValueError(f"ts must increase strictly (in {times.dtype}), got {_brief(values)}")
    return times


def require_number(name: str, value: Any, dtype: Any, *, at_least: int | float | None = None) -> Array:
    """One finite number as an array of the given dtype, or `ValueError`; a bound is checked as well.

    A traced value cannot be looked at: the caller sees to it that a bad one gives `ok=False` or NaN.
    """
    bound = "" if at_least is None else f" >= {at_least:g}"
    real = isinstance(value, (int, float, np.ndarray, np.generic, jax.Array, Sequence))
    if not real or jnp.iscomplexobj(value) or isinstance(value, str):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    number = jnp.asarray(value, dtype)
    bad = number.ndim != 0
    if not bad and not is_traced(number):
        bad = not np.isfinite(float(number)) or (at_least is not None and float(number) < at_least)
    if bad:
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")
    return number


def _brief(values: np.ndarray) -> str:
    return np.array2string(values, threshold=6, edgeitems=3, precision=4)


def integrate(
    field: VectorField,
    y0: PyTree,
    ts: ArrayLike,
    args: PyTree = None,
    *,
    solver: diffrax.AbstractSolver | None = None,
    rtol: ArrayLike = 1e-8,
    atol: ArrayLike = 1e-10,
    max_steps: int = 100_000,
    throw: bool = True,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Trajectory:
    r"""Integrate dy/dt = field(t, y, args) from y(ts[0]) = y0 and return y at the times ts.

    The solve is one compiled program. `field`, `solver`, `max_steps` and the functions inside `args` are
    static; all numbers, also Python numbers in `y0` and `args`, are traced, so that another call with
    other numbers compiles nothing, provided the very same `field` object is used. It differentiates
    (in reverse mode; pass `adjoint=diffrax.ForwardMode()` for forward mode), jits and vmaps. Where nothing
    is differentiated in reverse, that adjoint gives the same numbers and takes a quarter off the tracing.

    Args:
        field: function `(t, y, args) -> dy/dt` on pytrees: diffrax's own convention.
        y0: state at ts[0], a pytree of numbers or arrays. Its floating dtype is kept.
        ts: times that increase strictly, shape (T,).
        args: pytree handed to `field`; may hold functions.
        solver: a diffrax solver; `diffrax.Dopri8()` where None. Stiff flows want `diffrax.Kvaerno5()`.
        rtol: relative tolerance per step; raised to 10 machine epsilons of the state's dtype where it is
            below, since a smaller one cannot be met.
        atol: absolute tolerance per step.
        max_steps: the most steps the solver may take.
        throw: raise when the solve fails. With False the failure is `ok=False`, per lane under `vmap`.
            To raise from inside of `jit`, the program calls the host, and JAX keeps no such program in
            its persistent cache: solve with False there and look at `ok` outside.
        adjoint: how diffrax differentiates through the solve; its default where None.

    Returns:
        A `Trajectory`; `ys` is NaN at the times that were not reached.

    Raises:
        ValueError: `ts`, `y0` or a tolerance is bad and can be looked at (is not traced).
        RuntimeError: the solve failed and `throw` is true. From the second call of a function under
            `jax.jit` on, JAX makes a ValueError of it; `equinox.filter_jit` does not.

    Example:
        >>> decay = lambda t, y, rate: -rate * y
        >>> float(integrate(decay, 1.0, [0.0, 1.0], 2.0).ys[-1])  # doctest: +ELLIPSIS
        0.1353...
    """
    y0 = jax.tree.map(as_inexact, y0)
    leaves = jax.tree.leaves(y0)
    if not any(leaf.size for leaf in leaves):
        raise ValueError("y0 must hold at least one number, got none")
    dtype = jnp.finfo(jnp.result_type(*leaves)).dtype
    ts = require_times(ts, dtype)
    if not is_traced(y0) and not all(np.all(np.isfinite(np.asarray(leaf))) for leaf in leaves):
        raise ValueError("y0 must be finite, got NaN or infinity")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if np.shape(tolerance) or not (is_traced(tolerance) or float(np.asarray(tolerance)) >= 0):
            raise ValueError(f"{name} must be a number >= 0, got {tolerance}")
    if not (solver is None or isinstance(solver, diffrax.AbstractSolver)):
        raise ValueError(f"solver must be a diffrax solver, such as diffrax.Kvaerno5(), got {solver!r}")
    if not isinstance(max_steps, (int, np.integer)) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}")

    args = jax.tree.map(_trace_number, args)
    rtol, atol = (jnp.asarray(tolerance, dtype) for tolerance in (rtol, atol))
    solver = diffrax.Dopri8() if solver is None else solver
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    trajectory, ended, reached, exhausted = _solve(
        field, y0, ts, args, solver, rtol, atol, int(max_steps), adjoint
    )

    if not throw:
        return trajectory
    knobs = "raise max_steps, loosen rtol and atol, or pass a stiff solver such as diffrax.Kvaerno5()"
    if is_traced(trajectory.ok):
        message = f"integrate: a bad start, or the solver gave up; throw=False tells where, or {knobs}"
        # Raising is asked for by name: EQX_ON_ERROR may tell other checks to be silent.
        ok = eqx.error_if(trajectory.ok, ~trajectory.ok, message, on_error="raise")
        # Derivatives need the states no more, but this choice, so that their failure is told too.
        ys = jax.tree.map(lambda leaf: jnp.where(ok, leaf, jnp.nan), trajectory.ys)
        return Trajectory(trajectory.ts, ys, ok)
    if not bool(trajectory.ok):
        last = float(ts[max(int(reached) - 1, 0)])
        if bool(exhausted):
            cause = f"the solver gave up after t = {last:g} (limit: {max_steps} steps); {knobs}"
        elif not bool(ended):
            cause = (
                f"no step can be taken after t = {last:g}: the field is not finite, or the solution blows up"
            )
        else:
            cause = f"the solution is not finite after t = {last:g}"
        raise RuntimeError(f"integrate: {cause}")
    return trajectory


def _trace_number(leaf: Any) -> Any:
    """Python numbers become arrays, so that their values are not compiled into the program."""
    is_number = isinstance(leaf, (int, float, complex, np.ndarray, np.generic)) and not isinstance(leaf, bool)
    return jnp.asarray(leaf) if is_number else leaf


@eqx.filter_jit
def _solve(field, y0, ts, args, solver, rtol, atol, max_steps, adjoint):
    # A start with NaN would be retried with ever smaller steps: such a lane starts from zero and is
    # flagged afterwards, so that it does not hold up the others. So do bad times and tolerances.
    good = all_finite(y0) & all_finite(ts) & jnp.all(jnp.diff(ts) > 0) & (rtol >= 0) & (atol >= 0)
    start = jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.zeros_like(leaf)), y0)
    times = jnp.where(good, ts, jnp.arange(ts.size, dtype=ts.dtype))
    epsilon = jnp.finfo(ts.dtype).eps
    controller = diffrax.PIDController(
        rtol=jnp.where(good, jnp.maximum(rtol, 10 * epsilon), 1),
        atol=jnp.where(good, atol, 1),
        # Where the field is NaN the controller shrinks the step for ever; this ends it. It is far below
        # any step that a finite field asks for.
        dtmin=1e4 * float(jnp.finfo(ts.dtype).tiny),
        force_dtmin=False,
    )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=start,
        args=args,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
        throw=False,
    )
    ended = diffrax.is_okay(solution.result) & good
    # Entries that were never saved hold infinity, which looks like data.
    saved = jnp.isfinite(jnp.asarray(solution.ts)) & good
    ys = jax.tree.map(
        lambda leaf: jnp.where(jnp.expand_dims(saved, range(1, leaf.ndim)), leaf, jnp.nan), solution.ys
    )
    exhausted = solution.result == diffrax.RESULTS.max_steps_reached
    return Trajectory(ts, ys, ended & all_finite(ys)), ended, jnp.sum(saved), exhausted


def integrate_until(
    field: VectorField,
    y0: PyTree,
    horizon: ArrayLike,
    args: PyTree,
    stop: Callable[[Any, Any, Any], Bool[Array, ""]],
    *,
    solver: diffrax.AbstractSolver,
    rtol: float,
    atol: float,
    max_steps: int = 10_000,
) -> tuple[PyTree, Bool[Array, ""]]:
    """Integrate dy/dt = field(t, y, args) from t = 0 until `stop(t, y, args)` holds after a step.

    For use inside of compiled programs: nothing is checked, nothing is raised.

    Returns:
        The last state, and whether `stop` holds there: not where the horizon, or the most steps, came first.

    Example:
        >>> decay, small = lambda t, y, rate: -rate * y, lambda t, y, rate: y < 1e-3
        >>> options = {"solver": diffrax.Tsit5(), "rtol": 1e-6, "atol": 1e-9}
        >>> y, stopped = integrate_until(decay, jnp.array(1.0), 100.0, jnp.array(1.0), small, **options)
        >>> bool(stopped), bool(y < 1e-3)
        (True, True)
    """
    dtype = jnp.finfo(jnp.result_type(*jax.tree.leaves(y0))).dtype
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=jnp.zeros((), dtype),
        t1=jnp.asarray(horizon, dtype),
        dt0=None,
        y0=y0,
        args=args,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
        event=diffrax.Event(lambda t, y, args, **_: stop(t, y, args)),
        adjoint=diffrax.ForwardMode(),
        throw=False,
    )
    ys = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    return ys, diffrax.is_event(solution.result) & all_finite(ys)


def gradient_flow(loss: Callable[..., Array]) -> VectorField:
    r"""The vector field of gradient flow, dy/dt = -grad loss(y).

    Args:
        loss: scalar function of the pytree y; called as `loss(y, args)` where args are given to
            `integrate`, so that its data can be traced.

    Returns:
        A field for `integrate`. Keep the object and use it again: a new one compiles anew.

    Example:
        >>> field = gradient_flow(lambda y: 0.5 * y**2)
        >>> float(integrate(field, 1.0, [0.0, 1.0]).ys[-1])  # doctest: +ELLIPSIS
        0.3678...
    """

    def field(t, y, args):
        gradient = jax.grad(loss)(y) if args is None else jax.grad(loss)(y, args)
        return jax.tree.map(jnp.negative, gradient)

    return field
