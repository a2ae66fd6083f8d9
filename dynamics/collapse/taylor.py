"""The loss as a power series along the way to collapse, on which its stability and symmetry are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_real,
    require_finite,
    require_integer,
    require_number,
)
from dynamics.collapse.landscape import require_scalar


def taylor_coefficients(
    loss: Callable[[Any], Array], params: PyTree, order: int, *, at: ArrayLike = 0.0
) -> Float[Array, " orders"]:
    r"""Coefficients c_n of loss(a params) = sum_n c_n (a - at)^n, of the loss along a ray, by derivatives.

    Around at = 0, where the network has collapsed, odd ones vanish for a loss without a sign to prefer, and
    a second one below zero makes the origin unstable along this ray. They are nested derivatives in forward
    mode, exact to rounding, for whatever JAX can differentiate; an order doubles what the one before takes.

    Networks with ReLU have a kink where all of their weights are zero, which no series describes: take the
    weights of their last layer for `params`, in which they are linear, and leave the others to `loss`.

    Source: ziyin2022talk, slide on InfoNCE.

    Args:
        loss: scalar function of the parameters, differentiable at `at` times them.
        params: a pytree of floating arrays: where the ray passes at a = 1.
        order: the highest order, >= 0; static.
        at: where the series is around, a number.

    Returns:
        c_0, ..., c_order.

    Raises:
        ValueError: the parameters are no finite numbers, there are none, an argument is out of range, or the
            loss is no number.

    Example:
        >>> taylor_coefficients(lambda w: jnp.sum(w**4 - 3 * w**2) + 5, jnp.array([1.0, -1.0]), 4).tolist()
        [5.0, 0.0, -6.0, 0.0, 2.0]
    """
    params = jax.tree.map(lambda leaf: require_finite("params", as_real("params", leaf)), params)
    leaves = jax.tree.leaves(params)
    if not leaves or not all(leaf.size for leaf in leaves):
        raise ValueError("params must hold numbers, and no array that is empty")
    order = require_integer("order", order, at_least=0)
    at = require_number("at", at, jnp.result_type(*leaves))
    require_scalar(loss, params)

    def along(a):
        return (loss(jax.tree.map(lambda leaf: a.astype(leaf.dtype) * leaf, params)),)

    terms = along
    for n in range(1, order + 1):
        terms = _with_next(terms, n)
    return jnp.stack(terms(at))


def _with_next(terms: Callable[[Array], tuple[Array, ...]], n: int) -> Callable[[Array], tuple[Array, ...]]:
    """The coefficients up to order n, where the last of those before has n times it for a slope."""

    def longer(a):
        values, slopes = jax.jvp(terms, (a,), (jnp.ones_like(a),))
        return *values, slopes[-1] / n

    return longer
