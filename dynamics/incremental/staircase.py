"""The staircase of the greedy algorithm, beside flows from tiny starts, which approach it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.flow import ArrayLike, as_inexact
from dynamics.incremental.greedy import GreedyPath


def staircase(path: GreedyPath, tau: ArrayLike) -> Array:
    r"""The greedy path as a function of rescaled time: beta[k] from T_k until T_(k+1).

    Source: boixadsera2023, Theorem 4.5: what the flow's products tend to as alpha goes to zero, at every
    tau that is no jump.

    Args:
        path: from `greedy`, not under `vmap`.
        tau: rescaled times t / log(1 / alpha), any shape.

    Returns:
        beta, tau.shape + (p,).

    Example:
        >>> from dynamics.incremental import greedy
        >>> path = greedy(jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, 0.0])), 2)
        >>> staircase(path, [0.4, 0.6])[:, 0].round(6).tolist()
        [0.0, 2.0]
    """
    return _staircase(path, as_inexact(tau))


@jax.jit
def _staircase(path, tau):
    return path.beta[jnp.searchsorted(path.times, tau.astype(path.times.dtype), side="right")]


def staircase_distance(path: GreedyPath, taus: ArrayLike, beta: ArrayLike) -> Float[Array, ""]:
    r"""Distance of a flow to the staircase, the integral over tau of sum_i |beta_i - staircase_i|.

    The trapezoidal rule on the given times, so these must resolve the jumps. The distance falls like
    1 / log(1 / alpha).

    Args:
        path: from `greedy`.
        taus: rescaled times, (T,), increasing.
        beta: products of a flow or of a trained network at these times, (T, p).

    Returns:
        The distance, a scalar.

    Example:
        >>> from dynamics.incremental import greedy
        >>> path = greedy(jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, 0.0])), 2)
        >>> beta = [[0.0, 0.0], [2.0, 0.0], [2.5, 0.0]]
        >>> round(float(staircase_distance(path, [0.0, 1.0, 2.0], beta)), 6)
        0.25
    """
    return _distance(path, as_inexact(taus), as_inexact(beta))


@jax.jit
def _distance(path, taus, beta):
    return jnp.trapezoid(jnp.sum(jnp.abs(beta - _staircase(path, taus)), axis=-1), taus)


def jump_times(path: GreedyPath, taus: ArrayLike, beta: ArrayLike) -> Float[Array, " S"]:
    r"""When a flow makes each jump of the path: the entering product passes half of what it settles to.

    Args:
        path: from `greedy`.
        taus: rescaled times, (T,), increasing.
        beta: products of a flow or of a trained network at these times, (T, p).

    Returns:
        Rescaled times, (S,), interpolated between the given ones; NaN where it does not pass.

    Example:
        >>> from dynamics.incremental import greedy
        >>> path = greedy(jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, 0.0])), 2)
        >>> jump_times(path, [0.0, 0.5, 1.0], [[0.0, 0.0], [0.5, 0.0], [1.5, 0.0]]).round(6).tolist()
        [0.75]
    """
    return _jumps(path, as_inexact(taus), as_inexact(beta))


@jax.jit
def _jumps(path, taus, beta):
    def one(coordinate, after, start):
        level = beta[:, coordinate] / jnp.where(after == 0, jnp.nan, after) - 0.5
        up = (level[:-1] < 0) & (level[1:] >= 0) & (taus[1:] > start)
        i = jnp.argmax(up)
        share = -level[i] / (level[i + 1] - level[i])
        return jnp.where(jnp.any(up), taus[i] + share * (taus[i + 1] - taus[i]), jnp.nan)

    after = jnp.take_along_axis(path.beta[1:], path.order[:, None], axis=1)[:, 0]
    starts = jnp.concatenate([jnp.zeros_like(path.times[:1]), path.times[:-1]])
    return jax.vmap(one)(path.order, after, starts)
