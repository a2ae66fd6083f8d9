"""Where in one variable, the logarithm of a ridge, the linear map of a deep network is at its best."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynamics.collapse.moments import Moments, Spectrum, resolvent

# Two extrema are at least half an e-fold apart. The range has as many e-folds as the eigenvalues have, 32 in
# 64-bit at most, and at small gammas about as many as these have.
_GRID = 256
_CANDIDATES, _HALVINGS = 4, 60


class Powers(NamedTuple):
    """c^T (A + lambda)^{-k} c for k = 1, 2, 3: fit, squared norm of the map, and half the norm's fall."""

    fit: Array
    norm: Array
    fall: Array


# From z, the log of a ridge, and the powers there, to a number.
Rule = Callable[[Array, Powers], Array]


def best_ridge(
    crossing: Rule,
    score: Rule,
    within: tuple[Array, Array],
    moments: Moments,
    of: Spectrum,
    exists: Array | bool = True,
    below: float = jnp.inf,
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The z of lowest score where `crossing` goes from below zero to above, and whether there is one.

    The whole range `within` is searched. By the implicit function z has derivatives of any order in the
    moments and in what `crossing` closes over. There is none where `exists` is false, or no score is
    below `below`: z is a finite number there whose derivatives are zero.
    """
    low, high = map(jax.lax.stop_gradient, within)
    squares = jnp.square(of.vectors.T @ jax.lax.stop_gradient(moments.c))

    def at(rule, zs):
        def one(z):
            return rule(z, Powers(*(jnp.sum(squares / (of.values + jnp.exp(z)) ** k) for k in (1, 2, 3))))

        return jax.lax.stop_gradient(jax.vmap(one)(zs))

    grid = low + (high - low) * jnp.linspace(0, 1, _GRID, dtype=low.dtype)
    # Rounding may hide that the function begins below zero and ends above.
    under = (at(crossing, grid) < 0).at[0].set(True).at[-1].set(False)
    crosses, scores = under[:-1] & ~under[1:], at(score, grid)
    _, chosen = jax.lax.top_k(-jnp.where(crosses, jnp.minimum(scores[:-1], scores[1:]), jnp.inf), _CANDIDATES)

    def halve(_, ends):
        left, right = ends
        middle = (left + right) / 2
        under = at(crossing, middle) < 0
        return jnp.where(under, middle, left), jnp.where(under, right, middle)

    _, ends = jax.lax.fori_loop(0, _HALVINGS, halve, (grid[chosen], grid[chosen + 1]))
    scores = jnp.where(crosses[chosen], at(score, ends), jnp.inf)
    found, z = exists & (jnp.min(scores) < below), ends[jnp.argmin(scores)]

    def equation(unknown):
        return jnp.where(found, crossing(unknown, powers(unknown, moments, of)), unknown - z)

    root = jax.lax.custom_root(equation, z, lambda _, start: start, lambda g, y: y / g(jnp.ones_like(y)))
    return root, found


def powers(z: Array, moments: Moments, of: Spectrum) -> Powers:
    """The `Powers` with derivatives, also where eigenvalues of A are equal."""
    shift, one = jnp.exp(z), jnp.ones_like(z)
    w = resolvent(shift, one, moments.A, moments.c, of)
    return Powers(moments.c @ w, w @ w, w @ resolvent(shift, one, moments.A, w, of))
