"""Steps of a solver, of which only those that are kept have a derivative.

A solver tries steps, and throws away those whose error is too large. Such a step may leave the range of the
field: exp(v^2 / 2) overflows far outside of the solution. Nothing depends on it, so its part in a derivative
is zero times what its own derivative is, and that is NaN where the step is not finite. It would spoil the
derivative of a solve that succeeded, and an implicit solver, which solves a linear system with it, would
raise, for all lanes of a `vmap`.

The stages of a step that is kept count all the same: one where the field has no derivative spoils it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def guarded(
    field: Any, args: PyTree, solver: diffrax.AbstractSolver, controller: diffrax.PIDController
) -> dict[str, Any]:
    """What `diffrax.diffeqsolve` is given, so that only steps which are kept have a derivative.

    Traced numbers of the field must be leaves of it, as `equinox.filter_closure_convert` makes them: a step
    has a derivative in its arguments alone.

    Example:
        >>> def field(t, y, args):
        ...     return -jnp.sinh(y)
        >>> def last(y0, guard):
        ...     pieces = {"terms": diffrax.ODETerm(field), "solver": diffrax.Tsit5()}
        ...     controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        ...     if guard:
        ...         pieces = guarded(field, None, diffrax.Tsit5(), controller)
        ...     times = {"t0": 0.0, "t1": 1.0, "dt0": None}
        ...     return diffrax.diffeqsolve(**pieces, **times, y0=y0, stepsize_controller=controller).ys[-1]
        >>> [bool(jnp.isfinite(jax.grad(last)(100.0, guard))) for guard in (False, True)]
        [False, True]
    """
    return {
        "terms": diffrax.ODETerm(_field),
        "args": _Numbers(field, args),
        "solver": _Guarded(solver, controller),
    }


class _Numbers(NamedTuple):
    """What the guarded field is handed: the field with its own arguments, and where it is taken for zero."""

    field: Any
    args: PyTree
    lost: Array | None = None


def _field(t: Any, y: PyTree, numbers: _Numbers) -> PyTree:
    """The field; where it is lost it is zero, whatever its derivative is."""
    field, own, lost = numbers
    if lost is None:
        return field(t, y, own)
    return _zero_where(lost, jax.tree.map(jnp.asarray, field(t, _zero_where(lost, y), own)))


def _zero_where(condition: Array, tree: PyTree) -> PyTree:
    def of_leaf(leaf):
        return jnp.where(condition, jnp.zeros_like(leaf), leaf) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(of_leaf, tree)


class _Guarded(diffrax.AbstractWrappedSolver):
    """A solver, whose steps have the derivative zero where the controller is sure to throw them away."""

    solver: diffrax.AbstractSolver  # pyright: ignore[reportIncompatibleVariableOverride]
    controller: diffrax.PIDController

    term_structure = property(lambda self: self.solver.term_structure)
    term_compatible_contr_kwargs = property(lambda self: self.solver.term_compatible_contr_kwargs)
    # What diffrax asks of Runge-Kutta methods and of implicit ones.
    scan_kind = property(lambda self: self.solver.scan_kind)
    root_finder = property(lambda self: self.solver.root_finder)
    root_find_max_steps = property(lambda self: self.solver.root_find_max_steps)

    @property
    def interpolation_cls(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return functools.partial(_within_step, self.solver.interpolation_cls)

    def order(self, terms):
        return self.solver.order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, *rest = _step(self, terms, t0, t1, y0, args, solver_state, made_jump)
        # The controller makes the next step shorter after a state that is NaN, not after an infinite one.
        finite = _finite(y1)
        y1 = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), y1)
        return y1, jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.inf), error), *rest


def _within_step(interpolation: Any, *, t0: Any, t1: Any, **pieces: Any) -> Any:
    return _Within(interpolation(t0=t0, t1=t1, **pieces), t0, t1)


class _Within(diffrax.AbstractLocalInterpolation):
    """The states within a step. Under `vmap` they are asked for far beyond it too, by the other lanes.

    A polynomial of degree seven at a million steps ahead is beyond float32, and no lane uses that value.
    """

    inside: diffrax.AbstractLocalInterpolation
    t0: Any
    t1: Any

    def evaluate(self, t0, t1=None, left=True):
        t0, t1 = (
            None if t is None else jnp.where((t < self.t0) | (t > self.t1), self.t1, t) for t in (t0, t1)
        )
        return self.inside.evaluate(t0, t1, left)


@eqx.filter_custom_jvp
def _step(guard, terms, t0, t1, y0, args, state, made_jump):
    return guard.solver.step(terms, t0, t1, y0, args, state, made_jump)


@_step.def_jvp
def _(primals, tangents):
    guard, terms, t0, t1, y0, (field, own, _), state, made_jump = primals
    y1, error, *more = _step(*primals)
    left_out = ~_may_be_kept(guard.controller, y0, y1, error)
    # The step that is differentiated there has no length: it sees the field where the solution is.
    t1 = jnp.where(left_out, t0, t1)
    # Where the field is not finite there, the solve fails: that step is one from zero, with a field of zero.
    lost = left_out & ~_finite(field(t0, y0, own))
    y0, own, state = _zero_where(lost, (y0, own, state))
    solver = _differentiable(guard.solver)
    primals = solver, terms, t0, t1, y0, _Numbers(field, own, lost), state, made_jump
    unmoved = jax.tree.map(lambda _: None, solver)
    _, moved = eqx.filter_jvp(_own_step, primals, (unmoved, *_zero_where(left_out, tangents[1:])))
    return (y1, error, *more), _zero_where(left_out, moved)


def _finite(tree: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _own_step(solver, *arguments):
    return solver.step(*arguments)


def _may_be_kept(controller: diffrax.PIDController, y0: PyTree, y1: PyTree, error: PyTree) -> Array:
    """Whether a step is finite, with an error that the controller lets pass, up to rounding."""

    def scaled(y0, y1, error):
        return error / (controller.atol + controller.rtol * jnp.maximum(abs(y0), abs(y1)))

    size = controller.norm(jax.tree.map(scaled, y0, y1, error))
    return _finite(y1) & (size < 1 + 1e-3)


def _differentiable(solver: Any) -> Any:
    """The solver with a loop over its stages that has a derivative in both modes."""
    if isinstance(solver, diffrax.HalfSolver):
        return eqx.tree_at(lambda s: s.solver, solver, _differentiable(solver.solver))
    if not hasattr(solver, "scan_kind"):
        return solver
    return eqx.tree_at(lambda s: s.scan_kind, solver, "bounded", is_leaf=lambda leaf: leaf is None)
