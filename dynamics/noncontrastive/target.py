"""The moving average that makes the target network: its rate, and how flows with a fast one are solved."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
from jaxtyping import Array

from dynamics.arguments import as_concrete, as_real, cast, require_every

# Rate times duration from which an explicit solver, held back by its stability, takes longer than an implicit
# one, which costs more per step.
_STIFF = 5000.0


def require_ema_rate(ema_rate: Any, dtype: Any) -> Array:
    """Rates from 0, where the target stands still, to infinity, where it is the online network.

    Example:
        >>> require_ema_rate(-1.0, float)
        Traceback (most recent call last):
        ValueError: ema_rate must be >= 0 (infinity where the target is the online network), got -1.0
    """
    rates = cast(as_real("ema_rate", ema_rate), dtype)
    rule = ">= 0 (infinity where the target is the online network)"
    return require_every("ema_rate", rates, lambda rate: rate >= 0, rule)


def is_stiff(ema_rate: Array, ts: Array) -> bool:
    """Whether a finite rate is known to be fast for the times of a solve that an implicit solver can make.

    In 32-bit it cannot: the rounding of a fast field, over a step, is more than its Newton steps may leave.

    Example:
        >>> rates = np.array([1e4, np.inf])
        >>> [is_stiff(jnp.asarray(rates, dtype), jnp.array([0.0, 9.0])) for dtype in ("float32", "float64")]
        [False, True]
    """
    rates, times = as_concrete(ema_rate), as_concrete(ts)
    if rates is None or times is None or rates.dtype != np.float64:
        return False
    finite = rates[np.isfinite(rates)]
    return bool(np.max(finite, initial=0) * (times[-1] - times[0]) > _STIFF)


class _Elementwise(lineax.AbstractLinearSolver):
    """Linear systems that are one small system for each element: elimination without pivots, all at once.

    The unknowns are a pytree of arrays of one shape. An entry of one array depends on the entries at the same
    place of all arrays, and on no other, so that as many products as there are arrays tell the operator.

    Example:
        >>> def apply(x):
        ...     return {"a": 2 * x["a"] + x["b"], "b": x["a"] - x["b"]}
        >>> b = {"a": jnp.array([3.0, 5.0]), "b": jnp.array([0.0, 1.0])}
        >>> operator = lineax.FunctionLinearOperator(apply, jax.eval_shape(lambda: b))
        >>> lineax.linear_solve(operator, b, _Elementwise()).value["a"].tolist()
        [1.0, 2.0]
    """

    def init(self, operator, options):
        structure = operator.in_structure()
        leaves, tree = jax.tree.flatten(structure)
        columns = []
        for index in range(len(leaves)):
            unit = [jnp.full(leaf.shape, i == index, leaf.dtype) for i, leaf in enumerate(leaves)]
            columns.append(jax.tree.leaves(operator.mv(tree.unflatten(unit))))
        return [list(row) for row in zip(*columns, strict=True)]

    def compute(self, state, vector, options):
        values, tree = jax.tree.flatten(vector)
        return tree.unflatten(_eliminate(state, values)), lineax.RESULTS.successful, {}

    def transpose(self, state, options):
        return [list(row) for row in zip(*state, strict=True)], {}

    def conj(self, state, options):
        return state, {}

    def assume_full_rank(self):
        return True


def _eliminate(rows: list[list[Array]], values: list[Array]) -> list[Array]:
    """Gauss's elimination, entries being arrays."""
    if len(values) == 1:
        return [values[0] / rows[0][0]]
    (first, *rest), b = rows[0], values[0]
    factors = [row[0] / first for row in rows[1:]]
    smaller = [
        [entry - factor * of_first for entry, of_first in zip(row[1:], rest, strict=True)]
        for row, factor in zip(rows[1:], factors, strict=True)
    ]
    below = _eliminate(smaller, [v - f * b for v, f in zip(values[1:], factors, strict=True)])
    return [(b - sum(r * x for r, x in zip(rest, below, strict=True))) / first, *below]


def stiff_solver(elementwise: bool) -> diffrax.AbstractSolver:
    """Kvaerno5; for a field that acts on each element by itself with elimination in each element.

    Example:
        >>> type(stiff_solver(elementwise=True)).__name__
        'Kvaerno5'
    """
    if not elementwise:
        return diffrax.Kvaerno5()
    newton = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)(linear_solver=_Elementwise())
    return diffrax.Kvaerno5(root_finder=newton)
