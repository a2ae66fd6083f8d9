"""The staircase of the greedy algorithm, beside flows from tiny starts, which approach it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    brief,
    cast,
    is_traced,
    nan_unless,
    require_every,
    require_shapes,
)
from dynamics.incremental.greedy import GreedyPath


def staircase(path: GreedyPath, tau: ArrayLike) -> Array:
    r"""The greedy path as a function of rescaled time: beta[k] from T_k until T_(k+1).

    Source: boixadsera2023, Theorem 4.5: what the flow's products tend to as alpha goes to zero, at every
    tau that is no jump.

    Args:
        path: from `greedy`, not under `vmap`.
        tau: rescaled times t / log(1 / alpha) >= 0, any shape.

    Returns:
        beta, tau.shape + (p,); NaN where a traced time is bad.

    Raises:
        ValueError: `path` is none, or a time is negative or not finite.

    Example:
        >>> from dynamics.incremental import greedy
        >>> path = greedy(jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, 0.0])), 2)
        >>> staircase(path, [0.4, 0.6])[:, 0].round(6).tolist()
        [0.0, 2.0]
    """
    _require_path(path)
    return _staircase(path, _require_tau("tau", as_real("tau", tau)))


@jax.jit
def _staircase(path, tau):
    tau = tau.astype(path.times.dtype)
    # A stage does not depend on the time in it, except that there is none at a time that is NaN.
    return path.beta[jnp.searchsorted(path.times, tau, side="right")] + 0 * tau[..., None]


def staircase_distance(path: GreedyPath, taus: ArrayLike, beta: ArrayLike) -> Float[Array, ""]:
    r"""Distance of a flow to the staircase, the integral over tau of sum_i |beta_i - staircase_i|.

    The trapezoidal rule on the given times, so these must resolve the jumps. The distance falls like
    1 / log(1 / alpha).

    Args:
        path: from `greedy`.
        taus: rescaled times >= 0, (T,), that do not decrease.
        beta: products of a flow or of a trained network at these times, (T, p).

    Returns:
        The distance, a scalar; NaN where a product, or a traced time, is bad.

    Raises:
        ValueError: the shapes do not fit, or the times are negative or decrease.

    Example:
        >>> from dynamics.incremental import greedy
        >>> path = greedy(jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, 0.0])), 2)
        >>> beta = [[0.0, 0.0], [2.0, 0.0], [2.5, 0.0]]
        >>> round(float(staircase_distance(path, [0.0, 1.0, 2.0], beta)), 6)
        0.25
    """
    return _distance(path, *_require_flow(path, taus, beta))


def _require_path(path: GreedyPath) -> None:
    if not isinstance(path, GreedyPath):
        raise ValueError(f"path must be a path of greedy, got {type(path).__name__}")
    if jnp.ndim(path.times) != 1:
        raise ValueError(f"path must be a single one, not under vmap, got times {jnp.shape(path.times)}")


def _require_tau(name: str, tau: Array) -> Array:
    return require_every(name, tau, lambda tau: (tau >= 0) & (tau < np.inf), ">= 0 and finite")


def _require_flow(path: GreedyPath, taus: ArrayLike, beta: ArrayLike) -> tuple[Array, Array]:
    """Times and products of a flow, in one dtype."""
    _require_path(path)
    times, products = as_real("taus", taus), as_real("beta", beta)
    dtype = jnp.result_type(times.dtype, products.dtype, path.beta.dtype)
    times = _require_tau("taus", cast(times, dtype))
    require_shapes(taus=(times, "T"), beta=(products, "T p"))
    if times.size < 2:
        raise ValueError(f"taus must hold at least two times, got {times.size}")
    # Times may be equal: what lies between them adds nothing.
    if is_traced(times):
        times = nan_unless(jnp.all(jnp.diff(times) >= 0), times)
    elif np.any(np.diff(np.asarray(times)) < 0):
        raise ValueError(f"taus must not decrease, got {brief(times)}")
    if products.shape[1] != path.beta.shape[1]:
        size = path.beta.shape[1]
        raise ValueError(f"beta must have {size} products, as path has, got {products.shape[1]}")
    return times, cast(products, dtype)


@jax.jit
def _distance(path, taus, beta):
    stairs = _staircase(path, taus).astype(beta.dtype)
    return jnp.trapezoid(jnp.sum(jnp.abs(beta - stairs), axis=-1), taus)


def jump_times(path: GreedyPath, taus: ArrayLike, beta: ArrayLike) -> Float[Array, " S"]:
    r"""When a flow makes each jump of the path: the entering product passes half of what it settles to.

    Args:
        path: from `greedy`.
        taus: rescaled times >= 0, (T,), that do not decrease.
        beta: products of a flow or of a trained network at these times, (T, p).

    Returns:
        Rescaled times, (S,), interpolated between the given ones; NaN where it does not pass, beyond the end
        of the path, and where a number is bad.

    Raises:
        ValueError: the shapes do not fit, or the times are negative or decrease.

    Example:
        >>> from dynamics.incremental import greedy
        >>> path = greedy(jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, 0.0])), 2)
        >>> jump_times(path, [0.0, 0.5, 1.0], [[0.0, 0.0], [0.5, 0.0], [1.5, 0.0]]).round(6).tolist()
        [0.75]
    """
    return _jumps(path, *_require_flow(path, taus, beta))


@jax.jit
def _jumps(path, taus, beta):
    def one(coordinate, after, start):
        level = beta[:, coordinate] / jnp.where(after == 0, jnp.nan, after) - 0.5
        up = (level[:-1] < 0) & (level[1:] >= 0) & (taus[1:] > start)
        i = jnp.argmax(up)
        share = -level[i] / (level[i + 1] - level[i])
        passes = jnp.any(up) & jnp.all(jnp.isfinite(level)) & (coordinate >= 0)
        return nan_unless(passes, taus[i] + share * (taus[i + 1] - taus[i]))

    after = jnp.take_along_axis(path.beta[1:], path.order[:, None], axis=1)[:, 0]
    starts = jnp.concatenate([jnp.zeros_like(path.times[:1]), path.times[:-1]])
    return jax.vmap(one)(path.order, after.astype(beta.dtype), starts.astype(beta.dtype))
