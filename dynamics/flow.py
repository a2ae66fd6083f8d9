"""Flows: trajectories and their integration. With `dynamics.steps`, the only module that touches a solver."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from dynamics.arguments import ArrayLike as ArrayLike
from dynamics.arguments import as_real, brief, nan_unless, require_finite, require_sizes, require_times
from dynamics.arguments import is_traced as is_traced
from dynamics.arguments import require_number as require_number
from dynamics.derivatives import nan_derivatives, only_in_reverse
from dynamics.steps import guarded

VectorField = Callable[[Any, Any, Any], Any]
_ADJOINTS = diffrax.RecursiveCheckpointAdjoint, diffrax.DirectAdjoint, diffrax.ForwardMode
_DERIVED: Any = object()  # JAX makes trajectories of None and other things that stand for arrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """States along a curve, from a solver or from training.

    Attributes:
        ts: times, shape (T,). For trained networks the time is learning_rate * step.
        ys: the states: a pytree whose leaves have a leading axis T. NaN from where a solver gave up.
        ok: boolean scalar: the end was reached and everything that must be finite is finite. Where it is not
            given, such as for a recording of one's own, it says that all times and states are finite.

    Under `vmap` all three carry the mapped axes in front.

    Raises:
        ValueError: without `ok`, a leaf of `ys` has not the axes of `ts` in front.

    Example:
        >>> bool(Trajectory(np.arange(2.0), {"w": np.ones((2, 3))}).ok)
        True
    """

    # Arrays, except while JAX takes the pytree apart: a shape annotation would be checked then too.
    ts: Array | Any
    ys: PyTree
    ok: Array | Any = _DERIVED

    def __post_init__(self):
        if self.ok is _DERIVED:
            times = np.shape(self.ts)
            for leaf in jax.tree.leaves(self.ys):
                if np.shape(leaf)[: len(times)] != times:
                    raise ValueError(
                        f"ys must have the axes of ts, {times}, first, got shape {np.shape(leaf)}"
                    )
            lanes = max(len(times) - 1, 0)
            object.__setattr__(self, "ok", _finite_lanes((self.ts, self.ys), lanes))


def _finite_lanes(tree: PyTree, lanes: int) -> Any:
    """Whether all numbers are finite, for each lane of as many leading axes."""
    leaves = jax.tree.leaves(tree)
    xp: Any = jnp if is_traced(leaves) else np  # what is concrete stays so within a program
    finite = [xp.isfinite(xp.asarray(leaf)) for leaf in leaves]
    return functools.reduce(xp.logical_and, [xp.all(f, axis=tuple(range(lanes, f.ndim))) for f in finite])


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in a pytree is finite."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


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
        y0: state at ts[0], a pytree of numbers or arrays, float32 or float64, which is kept. A complex
            state is refused, since the solver's support of it is unfinished: hand over its real and its
            imaginary part.
        ts: times that increase strictly, shape (T,).
        args: pytree handed to `field`; may hold functions.
        solver: a diffrax solver with an error estimate, for a field that is one function: neither `Euler` nor
            `KenCarp4`. `diffrax.Dopri8()` where None; stiff flows want `diffrax.Kvaerno5()`.
        rtol: relative tolerance per step, at most 1; raised to 10 machine epsilons of the state's dtype
            where it is below, since a smaller one cannot be met.
        atol: absolute tolerance per step, at most 1, or the largest number of `y0` where that is above.
        max_steps: the most steps the solver may take.
        throw: raise when the solve fails. With False the failure is `ok=False`, per lane under `vmap`.
            To raise from inside of `jit`, the program calls the host, and JAX keeps no such program in
            its persistent cache: solve with False there and look at `ok` outside.
        adjoint: how diffrax differentiates through the solve: `diffrax.RecursiveCheckpointAdjoint()`, its
            default, where None; `diffrax.DirectAdjoint()`; or `diffrax.ForwardMode()`. Where a step is
            differentiated, it is computed twice, since its error tells whether it is kept.

    Returns:
        A `Trajectory`; `ys` is NaN at the times that were not reached, and everything is where a traced
        argument is bad. Where the solve failed, all derivatives of `ys` are NaN.

    Raises:
        ValueError: `ts`, `y0` or a tolerance is bad and can be looked at (is not traced); a derivative in
            forward mode is asked of a solve in reverse mode.
        RuntimeError: the solve failed and `throw` is true: the error tells a blow-up and a field that is not
            finite from too few steps. From the second call of a function under `jax.jit` on, JAX makes a
            ValueError of it; `equinox.filter_jit` does not. A derivative in reverse mode is asked of a solve
            in forward mode.

    Example:
        >>> decay = lambda t, y, rate: -rate * y
        >>> float(integrate(decay, 1.0, [0.0, 1.0], 2.0).ys[-1])  # doctest: +ELLIPSIS
        0.1353...
    """
    y0, ts, dtype = _require_state(y0, ts)
    rtol, atol = _require_tolerances(rtol, atol, y0, dtype)
    solver, adjoint = _require_methods(solver, adjoint)
    (max_steps,) = require_sizes(max_steps=max_steps)
    args = jax.tree.map(_trace_number, args)

    path, reached, end = _solve(field, y0, ts, args, solver, rtol, atol, max_steps, adjoint)

    if not throw:
        return path
    if is_traced(path.ok):
        return _raise_from_program(path, _cause(field, ts, args, end), max_steps)
    if not bool(path.ok):
        last, near = float(ts[max(int(reached) - 1, 0)]), float(end.last[0])
        messages = _why(f" after t = {last:g}", f" near t = {near:g}", max_steps)
        raise RuntimeError(messages[int(_cause(field, ts, args, end))])
    return path


def _require_state(y0: PyTree, ts: ArrayLike) -> tuple[PyTree, Array, Any]:
    """The start and the times as arrays, and the dtype of the solve."""
    y0 = jax.tree.map(lambda leaf: as_real("y0", leaf), y0)
    leaves = jax.tree.leaves(y0)
    if not any(leaf.size for leaf in leaves):
        raise ValueError("y0 must hold at least one number, got none")
    dtype = jnp.finfo(jnp.result_type(*leaves)).dtype
    ts = require_times(ts, dtype)
    return jax.tree.map(lambda leaf: require_finite("y0", leaf), y0), ts, dtype


def _require_tolerances(rtol: ArrayLike, atol: ArrayLike, y0: PyTree, dtype: Any) -> tuple[Array, Array]:
    """The tolerances as arrays; larger ones would accept any step."""
    rtol = require_number("rtol", rtol, dtype, at_least=0, at_most=1)
    atol = require_number("atol", atol, dtype, at_least=0)
    if not is_traced(atol, y0) and np.asarray(atol) > _largest_atol(np, y0):
        raise ValueError(
            f"atol must be at most 1, or the largest number of y0 where that is above, got {float(atol):g}"
        )
    return rtol, atol


def _require_methods(solver: Any, adjoint: Any) -> tuple[diffrax.AbstractSolver, diffrax.AbstractAdjoint]:
    """The solver and the adjoint, or their defaults."""
    if not (adjoint is None or isinstance(adjoint, _ADJOINTS)):
        names = ", ".join(f"diffrax.{kind.__name__}()" for kind in _ADJOINTS)
        raise ValueError(f"adjoint must be one of {names}, got {brief(adjoint)}")
    if not (solver is None or isinstance(solver, diffrax.AbstractSolver)):
        raise ValueError(f"solver must be a diffrax solver, such as diffrax.Kvaerno5(), got {brief(solver)}")
    # A solver of another kind has no error estimate, or wants its field in parts.
    if solver is not None and not (
        isinstance(solver, diffrax.AbstractAdaptiveSolver) and solver.term_structure is diffrax.AbstractTerm
    ):
        raise ValueError(
            "solver must estimate its error and take a field that is one function, such as diffrax.Dopri8(), "
            f"diffrax.Tsit5() and diffrax.Kvaerno5(), got {brief(solver)}"
        )
    return (
        diffrax.Dopri8() if solver is None else solver,
        diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
    )


def _raise_from_program(path: Trajectory, cause: Array, max_steps: int) -> Trajectory:
    """The path, in a program that calls the host to raise where it failed."""
    messages = [f"{why}; throw=False tells where" for why in _why("", "", max_steps)]
    # Raising is asked for by name: EQX_ON_ERROR may tell other checks to be silent.
    ok = eqx.branched_error_if(path.ok, ~path.ok, cause, messages, on_error="raise")
    # Derivatives need the states no more, but this choice, so that their failure is told too.
    return Trajectory(path.ts, jax.tree.map(lambda leaf: nan_unless(ok, leaf), path.ys), ok)


def _trace_number(leaf: Any) -> Any:
    """Python numbers become arrays, so that their values are not compiled into the program."""
    if isinstance(leaf, np.ma.MaskedArray):
        raise ValueError("args must hold arrays without a mask, got a masked array")
    is_number = isinstance(leaf, (int, float, complex, np.ndarray, np.generic)) and not isinstance(leaf, bool)
    return jnp.asarray(leaf) if is_number else leaf


@eqx.filter_jit
def _solve(field, y0, ts, args, solver, rtol, atol, max_steps, adjoint):
    field = _with_its_numbers(field, ts[0], y0, args)
    _require_field(field, y0, ts, args)
    if isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint):
        field, y0, ts, args = only_in_reverse((field, y0, ts, args), _ONLY_REVERSE)
    # A start with NaN would be retried with ever smaller steps: such a lane starts from zero and is
    # flagged afterwards, so that it does not hold up the others. So do bad times and tolerances.
    good = all_finite(y0) & all_finite(ts) & jnp.all(jnp.diff(ts) > 0)
    good &= (rtol >= 0) & (rtol <= 1) & (atol >= 0) & (atol <= _largest_atol(jnp, y0))
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
        **guarded(field, args, solver, controller),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=start,
        # The last state tells why a solve ended early.
        saveat=diffrax.SaveAt(subs=[diffrax.SubSaveAt(ts=times), diffrax.SubSaveAt(t1=True)]),
        stepsize_controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
        throw=False,
    )
    solved: Any = (solution.ts, solution.ys)
    (solved_ts, last_t), (solved_ys, last_y) = solved
    ended = diffrax.is_okay(solution.result) & good
    # Entries that were never saved hold infinity, which looks like data.
    saved = jnp.isfinite(jnp.asarray(solved_ts)) & good
    ys = jax.tree.map(
        lambda leaf: jnp.where(jnp.expand_dims(saved, range(1, leaf.ndim)), leaf, jnp.nan), solved_ys
    )
    exhausted = solution.result == diffrax.RESULTS.max_steps_reached
    ok = ended & all_finite(ys)
    ys = nan_derivatives(~ok, ys, (field, y0, ts, args))
    if isinstance(adjoint, diffrax.ForwardMode):
        ys = eqxi.nondifferentiable_backward(ys, msg=_ONLY_FORWARD)
    start, last = (times[0], start), jax.tree.map(lambda leaf: leaf[0], (last_t, last_y))
    end = jax.lax.stop_gradient(_End(start, last, good, ended, exhausted))
    return Trajectory(ts, ys, ok), jnp.sum(saved), end


def _largest_atol(xp: Any, y0: PyTree) -> Any:
    """The largest absolute tolerance that says something about such a state, in NumPy or its like."""
    largest = [xp.max(xp.abs(xp.asarray(leaf)), initial=1) for leaf in jax.tree.leaves(y0)]
    return functools.reduce(xp.maximum, largest)


class _End(NamedTuple):
    """How a solve ended: the first and the last time with their states, and what became of it."""

    start: tuple[Array, PyTree]
    last: tuple[Array, PyTree]
    good: Array
    ended: Array
    exhausted: Array


def _cause(field: VectorField, ts: Array, args: PyTree, end: _End) -> Array:
    """Which of the messages of `_why` tells why a solve failed."""
    (t0, y0), (t, y) = end.start, end.last
    field = _with_its_numbers(field, t, y, args)
    field, args = jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, (field, args)
    )
    limits = jnp.finfo(t.dtype)
    # Steps that are stopped by a field which is not finite end this close to where it is.
    ahead = 1e3 * limits.eps * jnp.maximum(abs(t), ts[-1] - ts[0])
    speed = field(t, y, args)
    beyond = field(t + ahead, jax.tree.map(lambda y, v: y + ahead * v, y, speed), args)
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(y)])
    # The present speed over the mean speed, along the way so far: the rate times the time in exponential
    # growth, which overflows at some hundreds, and near 1 / epsilon where there is a singularity ahead.
    way = jax.tree.map(lambda y, y0: (y - y0) / largest, y, y0)
    along = [jnp.sum(w * (v / largest)) for w, v in zip(*map(jax.tree.leaves, (way, speed)), strict=True)]
    squares = [jnp.sum(w * w) for w in jax.tree.leaves(way)]
    quickened = (t - t0) * sum(along) / sum(squares)
    finite = all_finite((speed, beyond))
    most = jnp.where(finite, 1e-3 / limits.eps, jnp.log(limits.max))
    blows_up = (quickened > most) | (largest > 1e-6 * limits.max)
    reasons = [~end.good, end.ended, blows_up, ~finite, end.exhausted]
    return jnp.select(reasons, list(range(len(reasons))), len(reasons))


def _why(last: str, near: str, max_steps: Any) -> list[str]:
    """The causes of a failure, with what to do about each; from after `last`, near the time `near`."""
    knobs = "raise max_steps, loosen rtol and atol, or pass a stiff solver such as diffrax.Kvaerno5()"
    return [
        "integrate: y0, ts, rtol or atol is bad",
        f"integrate: the solution is not finite{last}",
        f"integrate: the solution blows up{near}, leaving every bound: let ts end before that",
        f"integrate: the field is not finite{near}: let ts end before that, or mend the field there",
        f"integrate: the solver gave up{last} (limit: {max_steps} steps); {knobs}",
        f"integrate: no step is small enough{last}: the field jumps{near}, or rtol and atol are too small",
    ]


_ONLY_FORWARD = (
    "integrate: a solve with adjoint=diffrax.ForwardMode() has no derivative in reverse mode (jax.grad, "
    "jax.jacrev): leave adjoint out, or differentiate with jax.jvp or jax.jacfwd"
)
_ONLY_REVERSE = (
    "integrate: a solve has no derivative in forward mode (jax.jvp, jax.jacfwd, jax.hessian) unless it is "
    "asked for: pass adjoint=diffrax.ForwardMode()"
)


def _with_its_numbers(field: VectorField, t: Array, y: PyTree, args: PyTree) -> VectorField:
    """The field as a pytree, whose leaves are the arrays that it closes over, traced ones among them.

    Steps have a derivative in their arguments alone, and those of a failed solve are made NaN there.
    """
    if not callable(field):
        raise ValueError(f"field must be a function of t, y and args, got {brief(field)}")

    # Equinox takes a function without a closure for one that holds no numbers.
    def opened(t, y, args):
        return field(t, y, args)

    return eqx.filter_closure_convert(opened, t, y, args)


def _require_field(field, y0, ts, args):
    """`ValueError` unless the field has the structure, the shapes and the precision of the state."""
    speed = eqx.filter_eval_shape(field, ts[0], y0, args)
    if jax.tree.structure(speed) != jax.tree.structure(y0):
        raise ValueError(
            f"field must return a pytree like y0, {jax.tree.structure(y0)}, got {jax.tree.structure(speed)}"
        )
    for leaf, state in zip(jax.tree.leaves(speed), jax.tree.leaves(y0), strict=True):
        leaf = jax.eval_shape(jnp.asarray, leaf)
        if leaf.shape not in ((), state.shape):
            raise ValueError(f"field must return the shape of y0, {state.shape}, got {leaf.shape}")
        # Diffrax casts: a speed in half precision would be taken for an exact one.
        if leaf.dtype != state.dtype and not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(f"field must return the dtype of y0, {state.dtype}, got {leaf.dtype}")


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
    controller = diffrax.PIDController(rtol=rtol, atol=atol)
    t0 = jnp.zeros((), dtype)
    solution = diffrax.diffeqsolve(
        **guarded(_with_its_numbers(field, t0, y0, args), args, solver, controller),
        t0=t0,
        t1=jnp.asarray(horizon, dtype),
        dt0=None,
        y0=y0,
        stepsize_controller=controller,
        max_steps=max_steps,
        event=diffrax.Event(lambda t, y, args, **_: stop(t, y, args.args)),
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
