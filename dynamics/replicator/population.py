"""Replicator flows of populations, in log coordinates, where they neither leave the simplex nor underflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    brief,
    cast,
    is_traced,
    nan_unless,
    require_finite,
    require_integer,
    require_number,
    require_shape,
    require_shapes,
)
from dynamics.derivatives import nan_derivatives
from dynamics.flow import Trajectory, all_finite, integrate
from dynamics.replicator.simplex import (
    guarded_start,
    require_fit,
    require_simplex,
    require_values,
    simplex_slack,
)

# Fitness is given by a payoff matrix (n, n), as payoff @ x, or by any function of x with values (n,).
Fitness = ArrayLike | Callable[[Array], Array]


def simulate(fitness: Fitness, x0: ArrayLike, ts: ArrayLike, **options: Any) -> Trajectory:
    r"""Replicator flow dx_i/dt = x_i (F_i(x) - <x, F(x)>) on the simplex.

    It is integrated as d log x / dt = F - <x, F>, which stays on the simplex and follows coordinates far
    below the smallest float: the heteroclinic cycle of rock-paper-scissors reaches 1e-200 and returns.

    Args:
        fitness: payoff matrix (n, n), F(x) = payoff @ x, or a function from x (n,) to F (n,).
            A function is static: hand in the same object (or a `jax.tree_util.Partial` with its data)
            to compile once.
        x0: start on the simplex, shape (n,); strategies at zero stay at zero.
        ts: times that increase strictly, shape (T,).
        **options: options of `dynamics.flow.integrate`, such as `rtol`, `solver`, `throw`.

    Returns:
        A `Trajectory` with `ys` = log x, shape (T, n): -inf where x is zero.

    Raises:
        ValueError: `x0` is not on the simplex, the payoff is not square or not finite.
        RuntimeError: the solve failed.

    Source: hofbauer1998, section 7.1.

    Example:
        >>> path = simulate(jnp.eye(2), [0.6, 0.4], [0.0, 20.0])
        >>> jnp.exp(path.ys[-1]).round(6).tolist()
        [1.0, 0.0]
    """
    x0 = require_simplex("x0", x0)
    fitness = _require_fitness(fitness, x0.size, x0.dtype)
    start, support = _log_start(_guarded(x0, fitness))
    path = integrate(_log_field, start, ts, (fitness, support), **options)
    return Trajectory(path.ts, _log_shares(path.ys, support, path.ts), path.ok)


def replicator_field(x: ArrayLike, fitness: ArrayLike) -> Float[Array, " n"]:
    r"""The replicator equation's right-hand side J(x) F = x * (F - <x, F>), J(x) = diag(x) - x x^T.

    Args:
        x: the point, shape (n,); what is off the simplex is taken as it is.
        fitness: F, shape (n,).

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> replicator_field([0.5, 0.5], [1.0, 0.0]).tolist()
        [0.25, -0.25]
    """
    x, fitness = as_real("x", x), as_real("fitness", fitness)
    require_shapes(x=(x, "n"), fitness=(fitness, "n"))
    dtype = jnp.result_type(x, fitness)
    x, fitness = cast(x, dtype), cast(fitness, dtype)
    return x * (fitness - jnp.sum(x * fitness))


def simulate_two_populations(
    row_payoff: ArrayLike,
    column_payoff: ArrayLike,
    x0: ArrayLike,
    y0: ArrayLike,
    ts: ArrayLike,
    **options: Any,
) -> Trajectory:
    r"""Replicator flow of a bimatrix game: x against A y, y against B^T x.

    dx_i/dt = x_i ((A y)_i - x^T A y) and dy_j/dt = y_j ((B^T x)_j - x^T B y).

    Args:
        row_payoff: A, shape (n, m): what the first population gets.
        column_payoff: B, shape (n, m): what the second population gets.
        x0: start of the first population, shape (n,).
        y0: start of the second population, shape (m,).
        ts: times, shape (T,).
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys` = (log x, log y), shapes (T, n) and (T, m).

    Raises:
        ValueError: a start is not on the simplex, a payoff has the wrong shape.
        RuntimeError: the solve failed.

    Source: hofbauer1998, section 10.3.

    Example:
        >>> path = simulate_two_populations(jnp.eye(2), -jnp.eye(2), [0.7, 0.3], [0.5, 0.5], [0.0, 1.0])
        >>> path.ys[0].shape
        (2, 2)
    """
    x0, y0 = require_simplex("x0", x0), require_simplex("y0", y0)
    dtype = jnp.result_type(x0, y0)
    shape = (x0.size, y0.size)
    payoffs = [
        _require_matrix(name, payoff, shape, dtype)
        for name, payoff in (("row_payoff", row_payoff), ("column_payoff", column_payoff))
    ]
    starts = guarded_start([cast(x0, dtype), cast(y0, dtype)], *payoffs)
    (u0, support_x), (v0, support_y) = map(_log_start, starts)
    path = integrate(_two_population_field, (u0, v0), ts, (*payoffs, support_x, support_y), **options)
    u, v = path.ys
    logs = (_log_shares(u, support_x, path.ts), _log_shares(v, support_y, path.ts))
    return Trajectory(path.ts, logs, path.ok)


def simulate_mutator(
    fitness: Fitness, mutation: ArrayLike, x0: ArrayLike, ts: ArrayLike, **options: Any
) -> Trajectory:
    r"""Replicator-mutator flow dx_j/dt = sum_i x_i F_i(x) Q_ij - x_j <x, F(x)>.

    With the births b = (x * F) Q it is dx/dt = b - x sum(b) / sum(x), which conserves sum(x) for fitness of
    either sign. Mutation fills empty strategies, so this one is integrated in x itself: log coordinates have
    no finite speed at zero. Negative fitness makes negative births: where mutation carries them to an empty
    strategy the state leaves the simplex, and there is no flow from then on.

    Args:
        fitness: payoff matrix (n, n) or a function from x (n,) to F (n,).
        mutation: Q, shape (n, n): the share of offspring of i that are j; rows sum to one.
        x0: start on the simplex, shape (n,); may have zeros.
        ts: times, shape (T,).
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys` = log x, shape (T, n): -inf, with a derivative of zero, where x is zero or a
        rounding error below. Where a share falls below zero by more than a millionth the solve fails: `ys` is
        NaN from there on.

    Raises:
        ValueError: `x0` is not on the simplex, `mutation` is not row-stochastic, the payoff is bad.
        RuntimeError: the solve failed, or the state leaves the simplex.

    Source: hofbauer1998, section 20.1.

    Example:
        >>> mutation = jnp.array([[0.9, 0.1], [0.1, 0.9]])
        >>> path = simulate_mutator(jnp.ones((2, 2)), mutation, [1.0, 0.0], [0.0, 100.0])
        >>> jnp.exp(path.ys[-1]).round(6).tolist()
        [0.5, 0.5]
    """
    x0 = require_simplex("x0", x0)
    fitness = _require_fitness(fitness, x0.size, x0.dtype)
    mutation = _require_stochastic(_require_matrix("mutation", mutation, (x0.size, x0.size), x0.dtype))
    start = guarded_start(_guarded(x0, fitness), mutation)
    try:
        path = integrate(_mutator_field, start / jnp.sum(start), ts, (fitness, mutation), **options)
    except RuntimeError as error:
        if "max_steps" in str(error):
            raise
        raise RuntimeError(
            "simulate_mutator: negative fitness with mutation may take the state off the simplex, where no "
            f"step can be taken ({error})"
        ) from None
    # Where mutation is absent a coordinate may end a rounding error below zero. NaN counts as present.
    present = ~(path.ys <= 0)
    logs = jnp.where(present, jnp.log(jnp.where(present, path.ys, 1)), -jnp.inf)
    total = jnp.sum(path.ys, axis=1, keepdims=True, where=present)
    return Trajectory(path.ts, logs - jnp.log(total), path.ok)


def simulate_discrete(
    fitness: Fitness, x0: ArrayLike, steps: int, *, background: ArrayLike = 0.0, throw: bool = True
) -> Trajectory:
    r"""Discrete replicator map x_i <- x_i (F_i(x) + c) / (<x, F(x)> + c), one generation per step.

    Args:
        fitness: payoff matrix (n, n) or a function from x (n,) to F (n,); F + c must be positive.
        x0: start on the simplex, shape (n,).
        steps: number of generations.
        background: c, background fitness; large values approach the flow, with time step 1/c.
        throw: raise when F + c is not positive. With False the failure is `ok=False`, per lane under `vmap`.

    Returns:
        A `Trajectory` with `ts` = 0, 1, ..., steps and `ys` = log x, NaN from where F + c was not positive.

    Raises:
        ValueError: `x0` is not on the simplex, the payoff or `background` is bad, `steps` is negative.
        RuntimeError: F + c is not positive for a strategy that is present, or a number is not finite.

    Source: hofbauer1998, section 7.1.

    Example:
        >>> path = simulate_discrete(jnp.array([[3.0, 3.0], [1.0, 1.0]]), [0.5, 0.5], steps=1)
        >>> jnp.exp(path.ys[-1]).round(6).tolist()
        [0.75, 0.25]
    """
    x0, fitness, steps = _require_map(fitness, x0, steps)
    background = require_number("background", background, x0.dtype)
    path = _scan(_discrete_step, fitness, x0, steps, background, jnp.ones((), x0.dtype))
    return _told(path, throw, "simulate_discrete: fitness plus background must stay positive and finite")


def exponentiated_gradient(
    fitness: Fitness, x0: ArrayLike, steps: int, learning_rate: ArrayLike, *, throw: bool = True
) -> Trajectory:
    r"""Exponentiated gradient x <- softmax(log x + learning_rate F(x)): the replicator flow to first order.

    To minimize a function of x, hand in the negative of its gradient as the fitness.

    Args:
        fitness: payoff matrix (n, n) or a function from x (n,) to F (n,).
        x0: start on the simplex, shape (n,).
        steps: number of steps.
        learning_rate: step size, the time of one step.
        throw: raise when a number is not finite. With False the failure is `ok=False`, per lane under `vmap`.

    Returns:
        A `Trajectory` with `ts` = learning_rate * step and `ys` = log x.

    Raises:
        ValueError: `x0` is not on the simplex, the payoff or `learning_rate` is bad, `steps` is negative.
        RuntimeError: a number is not finite, such as a fitness of the function's.

    Source: kivinen1997, section 3.

    Example:
        >>> path = exponentiated_gradient(lambda x: jnp.array([1.0, 0.0]), [0.5, 0.5], 10, 0.1)
        >>> float(path.ys[-1, 0] - path.ys[-1, 1]).__round__(6)
        1.0
    """
    x0, fitness, steps = _require_map(fitness, x0, steps)
    learning_rate = require_number("learning_rate", learning_rate, x0.dtype, at_least=0)
    path = _scan(_exponentiated_step, fitness, x0, steps, learning_rate, learning_rate)
    return _told(path, throw, "exponentiated_gradient: the steps must stay finite; lower learning_rate")


def constant_fitness_solution(fitness: ArrayLike, x0: ArrayLike, ts: ArrayLike) -> Float[Array, "T n"]:
    r"""Closed form for constant fitness: log x(t) = log_softmax(log x0 + F t), shape (T, n).

    Args:
        fitness: F, shape (n,).
        x0: start on the simplex, shape (n,).
        ts: times, shape (T,), in any order.

    Raises:
        ValueError: `x0` is not on the simplex, a shape does not fit, or a number is not finite.

    Source: hofbauer1998, section 7.1.

    Example:
        >>> constant_fitness_solution([1.0, 0.0], [0.5, 0.5], [0.0]).shape
        (1, 2)
    """
    x0 = require_simplex("x0", x0)
    fitness = require_fit("fitness", fitness, x0)
    ts = cast(as_real("ts", ts), x0.dtype)
    if ts.ndim != 1:
        raise ValueError(f"ts must have shape (T,), got shape {ts.shape}")
    ts = require_finite("ts", ts)
    return jax.nn.log_softmax(jnp.log(x0)[None, :] + ts[:, None] * fitness[None, :], axis=1)


def _require_matrix(name: str, matrix: Any, shape: tuple[int, int], dtype: Any) -> Array:
    matrix = cast(as_real(name, matrix), dtype)
    require_shape(name, matrix, shape)
    return require_finite(name, matrix)


def _require_stochastic(mutation: Array) -> Array:
    slack = simplex_slack(mutation.dtype)
    values = as_concrete(mutation)
    if values is None:
        sums = jnp.sum(mutation, axis=1)
        return nan_unless(jnp.all(mutation >= 0) & jnp.all(jnp.abs(sums - 1) <= slack), mutation)
    if not (np.all(values >= 0) and np.all(np.abs(np.sum(values, axis=1, dtype=float) - 1) <= slack)):
        raise ValueError(f"mutation must have non-negative rows that sum to one, got {brief(values)}")
    return mutation


def _require_fitness(fitness: Fitness, size: int, dtype: Any) -> Any:
    if not callable(fitness):
        return _require_matrix("fitness", fitness, (size, size), dtype)
    require_values("fitness", fitness, jax.ShapeDtypeStruct((size,), dtype))
    return fitness


def _guarded(x0: Array, fitness: Any) -> Array:
    """The start, which is NaN where a traced payoff is bad; what a function returns is seen as it is used."""
    return x0 if callable(fitness) else guarded_start(x0, fitness)


def _payoffs(fitness: Any, x: Array) -> Any:
    return jnp.asarray(fitness(x), x.dtype) if callable(fitness) else fitness @ x


def _log_start(x0: Array) -> tuple[Array, Array]:
    """Logits of a start, zero where the strategy is absent, and the support."""
    support = ~(x0 == 0)  # NaN, a bad traced start, stays in the support and fails the lane
    return jnp.where(support, jnp.log(jnp.where(support, x0, 1)), 0), support


def _log_shares(logits: Array, support: Array, ts: Array) -> Array:
    """Log x from logits (T, n), -inf for absent strategies; NaN where the solver gave up."""
    logs = jax.nn.log_softmax(logits, axis=1, where=support[None, :])
    reached = jnp.all(jnp.isfinite(logits), axis=1, keepdims=True)
    return nan_unless(reached, logs)


def _masked_speed(fitness: Array, x: Array, support: Array) -> Array:
    """F - <x, F> on the support; fitness of absent strategies is not looked at."""
    fitness = jnp.where(support, fitness, 0)
    return jnp.where(support, fitness - jnp.sum(x * fitness), 0)


def _log_field(t, z, args):
    fitness, support = args
    x = jax.nn.softmax(z, where=support)
    return _masked_speed(_payoffs(fitness, x), x, support)


def _two_population_field(t, state, args):
    (u, v), (row_payoff, column_payoff, support_x, support_y) = state, args
    x, y = jax.nn.softmax(u, where=support_x), jax.nn.softmax(v, where=support_y)
    return _masked_speed(row_payoff @ y, x, support_x), _masked_speed(column_payoff.T @ x, y, support_y)


# How far a share may be below zero, in a solver's stages too.
_SLACK = 1e-6


def _mutator_field(t, x, args):
    fitness, mutation = args
    # Off the simplex there is no field: the solver ends there, also where the state would come back. NaN does
    # not go through the equation, since steps that were tried and rejected would pass it on to derivatives.
    inside = jnp.all(x >= -_SLACK)
    x = jnp.where(inside, x, 1 / x.size)
    births = (x * _payoffs(fitness, x)) @ mutation
    return jnp.where(inside, births - x * (jnp.sum(births) / jnp.sum(x)), jnp.nan)


def _discrete_step(log_x, fitness, background):
    # Fitness of absent strategies is not looked at: it may be negative.
    growth = jnp.where(jnp.isneginf(log_x), 1, fitness + background)
    return jax.nn.log_softmax(log_x + jnp.log(nan_unless(growth > 0, growth)))


def _exponentiated_step(log_x, fitness, learning_rate):
    return jax.nn.log_softmax(log_x + learning_rate * fitness)


def _require_map(fitness: Fitness, x0: ArrayLike, steps: int) -> tuple[Array, Any, int]:
    x0 = require_simplex("x0", x0)
    fitness = _require_fitness(fitness, x0.size, x0.dtype)
    return _guarded(x0, fitness), fitness, require_integer("steps", steps, at_least=0)


@eqx.filter_jit
def _scan(step, fitness, x0, steps, rate, time_step):
    def body(log_x, _):
        new = step(log_x, _payoffs(fitness, jnp.exp(log_x)), rate)
        return new, new

    start = jnp.log(x0)
    _, rest = jax.lax.scan(body, start, length=steps)
    logs = jnp.concatenate([start[None, :], rest])
    ok = all_finite((jnp.exp(logs), rate))
    ts = jnp.arange(steps + 1, dtype=x0.dtype) * time_step
    return Trajectory(ts, nan_derivatives(~ok, logs, (fitness, x0, rate)), ok)


def _told(path: Trajectory, throw: bool, message: str) -> Trajectory:
    """The path, or a `RuntimeError` where it failed and that is to be told, from inside of `jit` too."""
    if not throw:
        return path
    if is_traced(path.ok):
        ok = eqx.error_if(path.ok, ~path.ok, message, on_error="raise")
        return Trajectory(path.ts, nan_unless(ok, path.ys), ok)
    if not bool(path.ok):
        raise RuntimeError(message)
    return path
