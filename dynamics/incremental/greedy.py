"""The greedy algorithm: incremental learning in the limit of tiny starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    is_traced,
    nan_unless,
    require_dtype,
    require_every,
    require_finite,
    require_integer,
    require_shapes,
    require_sizes,
)
from dynamics.derivatives import nan_derivatives
from dynamics.flow import integrate_until
from dynamics.incremental.flows import NegGradient, require_gradient, require_start

# A coordinate that enters starts its stage at this product.
_ENTRY = 1e-10
# A coordinate that still falls at the end of a stage, below this share of the largest, leaves.
_SMALL = 1e-2
# Coordinates due within this share of the time are due together.
_TIE = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GreedyPath:
    """What the greedy algorithm visits: stationary points with more and more products active.

    Attributes:
        times: T_1, T_2, ..., the rescaled times of the jumps, (S,); infinite beyond the end.
        beta: the products, (S + 1, p): beta[0] = 0, beta[k] from T_k on.
        order: the coordinate that enters at each jump, (S,); -1 beyond the end.
        log_scale: b, the logarithms of u + v over log alpha, (S + 1, p); ones at first.
        tied: another coordinate was due at the same time and entered as well, (S,).
        converged: the flow on the active coordinates reached a stationary point, (S,); where it did not, its
            last state is in `beta` and the path ends.
        complete: no coordinate is left that would ever become active, a boolean.
    """

    times: Array | Any
    beta: Array | Any
    order: Array | Any
    log_scale: Array | Any
    tied: Array | Any
    converged: Array | Any
    complete: Array | Any


class _State(NamedTuple):
    """Where the algorithm stands after a stage."""

    time: Any
    beta: Any
    b: Any
    complete: Any  # all remaining waits are infinite
    stuck: Any  # the last stage reached no stationary point, or there is no gradient at it


def time_until_active(b: ArrayLike, gradient: ArrayLike) -> Float[Array, " p"]:
    r"""Rescaled time until each product becomes active while the gradient stays as it is.

    b_i / g_i where g_i > 0, (2 - b_i) / |g_i| where g_i < 0, infinite where g_i = 0.

    Source: boixadsera2023, Equation 8.

    Args:
        b: log scale -log(u + v) / log(1 / alpha), (p,), between 0 and 2.
        gradient: the negative loss gradient g with respect to the products, (p,).

    Returns:
        Times, (p,); NaN where a traced number is bad.

    Raises:
        ValueError: the shapes are not one shape (p,), or a number is not finite or out of range.

    Example:
        >>> time_until_active([1.0, 0.5, 1.0], [2.0, -3.0, 0.0]).tolist()
        [0.5, 0.5, inf]
    """
    b, g = as_real("b", b), as_real("gradient", gradient)
    require_shapes(b=(b, "p"), gradient=(g, "p"))
    dtype = jnp.promote_types(b.dtype, g.dtype)
    slack = float(jnp.finfo(dtype).eps) ** 0.5
    b = require_every("b", b, lambda b: (b >= -slack) & (b <= 2 + slack), "between 0 and 2")
    times = _time_until_active(cast(b, dtype), cast(require_finite("gradient", g), dtype))
    return nan_unless(~jnp.isnan(b), times)


@jax.jit
def _time_until_active(b: Array, g: Array) -> Array:
    distance = jnp.where(g > 0, b, 2 - b)
    return jnp.where(g == 0, jnp.inf, distance / jnp.where(g == 0, jnp.ones_like(g), jnp.abs(g)))


def greedy(
    neg_gradient: NegGradient,
    size: int,
    *,
    max_stages: int | None = None,
    u0: ArrayLike | None = None,
    v0: ArrayLike | None = None,
    dtype: Any = None,
) -> GreedyPath:
    r"""Incremental learning in the limit of tiny starts: which products become active, when, and to what.

    From a stationary point beta with log scale b (zero and one at first) each stage
    - waits: coordinate i is active after `time_until_active`, and the first one enters, with the sign of
      g_i(beta); all others move on the log scale by b <- b - g(beta) dT;
    - settles: from beta plus a tiny product in that coordinate, the flow d beta/dt = 2 |beta| g(beta) of
      balanced factors runs to a stationary point. Signs stay; a coordinate may leave, and come back with
      the other sign after b has gone all the way.
    It ends when every remaining time is infinite: where |g| <= 1e-9 max |g(0)| (1e-4 in 32-bit). Products
    are taken to be of order one, from 1e-6 to 1e6 or so: scale the problem where they are not.

    Coordinates that are due at the same time, to one part in a million, enter together and are flagged: the
    theorem excludes this case. What they settle to may depend on the proportions of their starts, which
    `u0` and `v0` give.

    One program is compiled per shape; it jits, vmaps and differentiates where `max_stages` is given. Loops of
    unknown length run forwards only: derivatives of either mode take one run, in parallel, for each number
    that is differentiated.

    Source: boixadsera2023, Algorithm 1, Equations 8 to 11.

    Args:
        neg_gradient: g, a function of beta (p,), for instance from `negative_gradient`. Data that change
            belong into it as `jax.tree_util.Partial` arguments, so that nothing is compiled anew.
        size: the number p of products.
        max_stages: how many stages are returned; as many as there are where None.
        u0: first factors over alpha, (p,); used for coordinates that enter together, and equal there if None.
        v0: second factors over alpha, (p,), of other magnitudes.
        dtype: floating dtype; that of u0, or JAX's default, where None.

    Returns:
        A `GreedyPath` with S = max_stages, or as many stages as there are. Where a traced argument is bad, or
        the gradient at zero is not finite, its numbers are NaN. Where a stage has not `converged`, all
        derivatives are NaN.

    Raises:
        ValueError: an argument is bad, or the gradient at zero is not finite; or max_stages is missing where
            the call is traced.
        RuntimeError: max_stages being None, the path goes on without end, or the gradient ceases to be
            finite. Otherwise the path ends there, with `converged` and `complete` false.

    Example:
        >>> g = jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, -4.0]))  # of |beta - (2, -4)|^2 / 2
        >>> path = greedy(g, 2)
        >>> path.times.round(6).tolist(), path.order.tolist(), path.beta[-1].round(6).tolist()
        ([0.25, 0.5], [1, 0], [2.0, -4.0])
    """
    (size,) = require_sizes(size=size)
    count = 2 * size + 2 if max_stages is None else require_integer("max_stages", max_stages, at_least=1)
    w0, z0 = _require_start(size, u0, v0, dtype)
    neg_gradient = require_gradient(neg_gradient, size, w0.dtype)
    state, path, good = _stages(neg_gradient, _at_zero(size, w0.dtype), w0, z0, count)
    if not is_traced(good) and not bool(good):
        raise ValueError("neg_gradient must be finite at beta = 0, got NaN or infinity")
    if max_stages is not None:
        return path
    if is_traced(good):
        raise ValueError("max_stages must be given where greedy is traced, as in jit or grad, got None")
    return _to_the_end(neg_gradient, state, path, w0, z0)


def _to_the_end(neg_gradient, state, path, w0, z0) -> GreedyPath:
    """The whole path, of which a first piece is known: the same program again until there is nothing left."""
    pieces, count = [path], len(path.times)
    while not bool(state.complete | state.stuck):
        before = float(state.time)
        state, piece, _ = _stages(neg_gradient, state, w0, z0, count)
        pieces.append(piece)
        if not float(state.time) > before and not bool(state.complete | state.stuck):
            raise RuntimeError(f"greedy: {count} stages at the same time {before:g}; give max_stages")
    pieces = jax.tree.map(np.asarray, pieces)
    path, last = _joined(pieces), pieces[-1]
    # A stage without an end and without a time had no gradient to tell them.
    if np.any(~last.converged & ~np.isfinite(last.times)):
        stages = len(path.times)
        raise RuntimeError(f"greedy: neg_gradient is not finite after {stages} stages; give max_stages")
    return path


def _require_start(size: int, u0: ArrayLike | None, v0: ArrayLike | None, dtype: Any) -> tuple[Array, Array]:
    """The sum and the difference of the factors over alpha: given ones, checked, or ones."""
    if (u0 is None) != (v0 is None):
        raise ValueError("u0 and v0 must be given together")
    if u0 is None or v0 is None:
        ones = jnp.ones(size, require_dtype(dtype))
        return ones, ones
    w0, z0 = require_start(u0, v0)
    if w0.shape != (size,):
        raise ValueError(f"u0 and v0 must have shape ({size},), got {w0.shape}")
    dtype = w0.dtype if dtype is None else require_dtype(dtype)
    return w0.astype(dtype), z0.astype(dtype)


def _at_zero(size: int, dtype: Any) -> _State:
    """Where the algorithm starts: no product is active, and none has moved on the log scale."""
    none = np.zeros((), bool)
    return _State(np.zeros((), dtype), np.zeros(size, dtype), np.ones(size, dtype), none, none)


def _joined(pieces: list[GreedyPath]) -> GreedyPath:
    """Consecutive pieces of a path as one, without the rows beyond its end."""
    count = sum(int(np.sum(np.isfinite(piece.times))) for piece in pieces)

    def stages(name: str) -> Array:
        return jnp.asarray(np.concatenate([getattr(piece, name) for piece in pieces])[:count])

    def states(name: str) -> Array:
        # Each piece begins with the state that the one before it ended with.
        first, *later = (getattr(piece, name) for piece in pieces)
        return jnp.asarray(np.concatenate([first, *(rows[1:] for rows in later)])[: count + 1])

    return GreedyPath(
        times=stages("times"),
        beta=states("beta"),
        order=stages("order"),
        log_scale=states("log_scale"),
        tied=stages("tied"),
        converged=stages("converged"),
        complete=jnp.asarray(pieces[-1].complete),
    )


@eqx.filter_jit
def _stages(neg_gradient, state, w0, z0, count):
    """Up to `count` stages from a state: the state after them, the path, and whether the problem is good."""
    scale = jnp.max(jnp.abs(neg_gradient(jnp.zeros_like(w0))))
    good = jnp.isfinite(scale) & jnp.all(jnp.isfinite(w0) & jnp.isfinite(z0))
    # A lane that is bad does not hold up the others, nor has it NaN inside of solvers, which differentiate
    # all lanes alike.
    state = jax.tree.map(jnp.asarray, state)._replace(stuck=state.stuck | ~good)
    starts = (jnp.where(good, factors, jnp.ones_like(factors)) for factors in (w0, z0))
    state, path = _run(neg_gradient, state, *starts, jax.lax.stop_gradient(scale), count)
    path = eqx.tree_at(lambda path: path.converged, path, path.converged & good)
    numbers, others = eqx.partition(path, eqx.is_inexact_array)
    numbers = jax.tree.map(partial(nan_unless, good), numbers)
    numbers = nan_derivatives(~jnp.all(path.converged), numbers, (neg_gradient, w0, z0))
    return state, eqx.combine(numbers, others), good


def _loop(neg_gradient, state, w0, z0, scale, count):
    """Up to `count` stages from a state: the state after them, and the path."""
    path = GreedyPath(
        times=jnp.full(count, jnp.inf, w0.dtype),
        beta=jnp.broadcast_to(state.beta[None], (count + 1, w0.size)),
        order=jnp.full(count, -1, int),
        log_scale=jnp.broadcast_to(state.b[None], (count + 1, w0.size)),
        tied=jnp.zeros(count, bool),
        converged=jnp.ones(count, bool),
        complete=state.complete,
    )

    def go_on(carry):
        k, state, _ = carry
        return (k < count) & ~state.complete & ~state.stuck

    def stage(carry):
        k, before, path = carry
        after, order, tied = _stage(neg_gradient, before, w0, z0, scale)
        # Where nothing is left to enter, all stays as it was.
        entered = jnp.isfinite(after.time)
        kept = before._replace(complete=after.complete, stuck=after.stuck)
        state = jax.tree.map(lambda new, old: jnp.where(entered, new, old), after, kept)
        # Rows from here to the end hold the last stage.
        later = jnp.arange(count + 1) > k
        path = GreedyPath(
            times=path.times.at[k].set(after.time),
            beta=jnp.where(later[:, None], state.beta[None], path.beta),
            order=path.order.at[k].set(jnp.where(entered, order, -1)),
            log_scale=jnp.where(later[:, None], state.b[None], path.log_scale),
            tied=path.tied.at[k].set(tied),
            converged=path.converged.at[k].set(~state.stuck),
            complete=state.complete,
        )
        return k + 1, state, path

    _, state, path = jax.lax.while_loop(go_on, stage, (0, state, path))
    # One stage fewer than there is room for: whether anything is left has to be asked.
    waits, _ = _waits(neg_gradient, state, scale)
    state = state._replace(complete=jnp.all(jnp.isinf(waits)) & ~state.stuck)
    return state, eqx.tree_at(lambda p: p.complete, path, state.complete)


_run = eqx.filter_custom_jvp(_loop)


@_run.def_jvp
def _(primals, tangents):
    """The Jacobian, found forwards, times the tangent: that can be transposed."""
    moves = jax.tree.map(lambda tangent: tangent is not None, tangents, is_leaf=lambda x: x is None)
    moving, fixed = eqx.partition(primals, moves)
    point, unravel = ravel_pytree(moving)

    def run(point):
        out = _loop(*eqx.combine(unravel(point), fixed))
        return eqx.filter(out, eqx.is_inexact_array), out

    jacobian, out = jax.jacfwd(run, has_aux=True)(point)
    direction, _ = ravel_pytree(tangents)
    return out, jax.tree.map(lambda J: J @ direction.astype(J.dtype), jacobian)


def _waits(neg_gradient, state, scale):
    """Times until active, and the gradient with zeros where it counts as zero."""
    g = neg_gradient(state.beta)
    g = jnp.where((state.beta != 0) | (jnp.abs(g) <= _tiny(scale) * scale), jnp.zeros_like(g), g)
    return time_until_active(state.b, g), g


def _tiny(scale):
    """The share of the largest gradient at zero up to which a gradient counts as zero."""
    return 1e-9 if jnp.finfo(scale.dtype).bits >= 64 else 1e-4


def _stage(neg_gradient, state, w0, z0, scale):
    """The next jump: its state, the coordinate that enters, and whether others do so too."""
    waits, g = _waits(neg_gradient, state, scale)
    wait = jnp.min(waits)
    complete, lost = jnp.isinf(wait), jnp.isnan(wait)
    time = state.time + jnp.where(lost, jnp.inf, wait)
    due = (waits <= wait + _TIE * time) & ~complete
    b = jnp.where(due, jnp.where(g > 0, jnp.zeros_like(g), 2 * jnp.ones_like(g)), state.b - g * wait)
    # Factors that enter together keep the proportions of their starts: those of w = u + v where both get
    # the same sign, those of z = u - v where they get different ones.
    share = jnp.where(g > 0, w0, z0)
    share = share / jnp.max(jnp.where(due, share, jnp.zeros_like(share)))
    entry = jnp.where(due, jnp.sign(g) * _ENTRY * share**2, state.beta)
    beta, settled = _settle(neg_gradient, entry, scale)
    after = _State(time, beta, b, complete, lost | (~settled & ~complete))
    return after, jnp.argmin(waits), jnp.sum(due) > 1


def _settle(neg_gradient, start, scale):
    """The stationary point that balanced factors reach from beta = start, and whether they do."""
    tiny = _tiny(scale)

    def slow(beta):
        return (beta != 0) & (jnp.abs(beta) <= _SMALL * jnp.max(jnp.abs(beta)))

    def go_on(carry):
        count, beta, settled = carry
        return (count == 0) | ((count == 1) & ~settled & jnp.any(slow(beta)))

    def flow(carry):
        # The second time without what was on its way out: a coordinate whose gradient vanishes with it leaves
        # like 1 / t.
        count, beta, _ = carry
        beta = jnp.where((count == 1) & slow(beta), jnp.zeros_like(beta), beta)
        return count + 1, *_flow_to_rest(neg_gradient, beta, scale)

    _, beta, settled = jax.lax.while_loop(go_on, flow, (0, start, jnp.zeros((), bool)))
    # What has left must not be on its way back.
    pull = jnp.where((start != 0) & (beta == 0), jnp.sign(start) * neg_gradient(beta), jnp.zeros_like(beta))
    return beta, settled & jnp.all(pull <= tiny * scale)


def _flow_to_rest(neg_gradient, start, scale):
    """The state in which the flow of balanced factors comes to rest, and whether it does.

    In y = log |beta| of the active coordinates, dy/dt = 2 sign(beta) g(beta): signs cannot change, and a
    coordinate that leaves goes to minus infinity at a steady rate.
    """
    double = jnp.finfo(start.dtype).bits >= 64
    rest, gone = (1e-10, 1e-14) if double else (1e-5, 1e-9)
    active, sign = start != 0, jnp.sign(start)
    # The flow moves at the rate of the coordinate that enters: a minimum is approached exponentially, while
    # a loss without one keeps falling, for ever more slowly.
    push = jnp.max(jnp.abs(jnp.where(active, neg_gradient(start), jnp.zeros_like(start))))
    horizon = 1e6 / jnp.where(push > 0, push, jnp.ones_like(push))

    def products(y, args):
        return jnp.where(active, sign * jnp.exp(jnp.minimum(y, 0.25 * math.log(jnp.finfo(y.dtype).max))), 0)

    def field(t, y, neg_gradient):
        return jnp.where(active, 2 * sign * neg_gradient(products(y, None)), jnp.zeros_like(y))

    def at_rest(t, y, neg_gradient):
        rate = field(t, y, neg_gradient)
        leaving = (rate < 0) & (y < math.log(gone))
        # Nothing is at rest that moves like a power or the logarithm of time, however slowly.
        return jnp.all(leaving | ((jnp.abs(rate) <= rest * scale) & (t * jnp.abs(rate) <= 1e-2)))

    y0 = jnp.where(active, jnp.log(jnp.where(active, jnp.abs(start), jnp.ones_like(start))), 0)
    y, settled = integrate_until(
        field,
        y0,
        horizon,
        neg_gradient,
        at_rest,
        solver=diffrax.Kvaerno3() if double else diffrax.Dopri8(),
        rtol=1e-4,
        atol=1e-5,
    )
    beta = products(y, None)
    return jnp.where(active & (y >= math.log(gone)), beta, jnp.zeros_like(beta)), settled
