"""The simplex: its points, its tangent space, and what is stationary on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from scipy.linalg import helmert

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    brief,
    cast,
    is_traced,
    nan_unless,
    require_dtype,
    require_finite,
    require_integer,
    require_number,
    require_shape,
    require_vector,
)
from dynamics.flow import all_finite


def require_simplex(name: str, x: ArrayLike) -> Float[Array, " n"]:
    """A point of the simplex as an array; `ValueError` if it is not one and can be looked at.

    A traced point that is off the simplex becomes NaN, which makes the lane's `ok` false.
    """
    x = require_vector(name, x)
    slack = simplex_slack(x.dtype)
    values = as_concrete(x)
    if values is None:
        return nan_unless(jnp.all(x >= 0) & (jnp.abs(jnp.sum(x) - 1) <= slack), x)
    if not (np.all(values >= 0) and abs(np.sum(values, dtype=float) - 1) <= slack):
        rule = "a point of the simplex (no negative entry, sum one)"
        raise ValueError(f"{name} must be {rule}, got {brief(values)}")
    return x


def require_fit(name: str, vector: Any, x: Array) -> Array:
    """Finite numbers, one for each coordinate of x, in its dtype."""
    array = cast(as_real(name, vector), x.dtype)
    require_shape(name, array, x.shape)
    return require_finite(name, array)


def require_values(name: str, function: Any, like: Any) -> None:
    """`ValueError` unless the argument is a function that returns real numbers of the shape of its own."""
    if not callable(function):
        raise ValueError(f"{name} must be a function of the shares, got {brief(function)}")
    returned = jax.eval_shape(lambda x: as_real(f"{name}(x)", function(x)), like)
    if returned.shape != like.shape:
        raise ValueError(f"{name} must return shape {like.shape}, got shape {returned.shape}")


def guarded_start(start: PyTree, *numbers: PyTree) -> PyTree:
    """The start of a solve, which is NaN where another number is: `integrate` tells of it by `ok`."""
    if not is_traced(numbers):  # they have been looked at
        return start
    good = all_finite(numbers)
    return jax.tree.map(lambda leaf: nan_unless(good, leaf), start)


def tangent_basis(n: int, dtype: Any = float) -> Float[Array, "n m"]:
    """Orthonormal basis of the tangent space, the vectors of sum zero: Helmert's columns, (n, n - 1).

    Example:
        >>> (2**0.5 * tangent_basis(2)).round(6).tolist()
        [[1.0], [-1.0]]
    """
    n = require_integer("n", n, at_least=2)
    return jnp.asarray(helmert(n).T, require_dtype(None if dtype is float else dtype))


def linearize(field: Callable[[Array], Array], x: ArrayLike) -> Float[Array, "m m"]:
    r"""Jacobian of a field on the simplex at x in the tangent basis: Q^T Df(x) Q, shape (n - 1, n - 1).

    The Jacobian on R^n has one more eigenvalue, of the direction that leaves the simplex; it says nothing
    about stability.

    Args:
        field: from x (n,) to dx/dt (n,).
        x: point of the simplex, shape (n,).

    Returns:
        The matrix; NaN where a traced x is not on the simplex.

    Raises:
        ValueError: `x` is not on the simplex or has one entry only, `field` returns another shape.

    Example:
        >>> from dynamics.replicator import replicator_field
        >>> linearize(lambda x: replicator_field(x, x), [0.5, 0.5]).round(6).tolist()
        [[0.5]]
    """
    x = require_tangent("x", x)
    require_values("field", field, jax.ShapeDtypeStruct(x.shape, x.dtype))
    basis = tangent_basis(x.size, x.dtype)
    return basis.T @ jax.jacfwd(field)(x) @ basis


def require_tangent(name: str, x: ArrayLike) -> Float[Array, " n"]:
    """A point of a simplex that has a tangent space."""
    x = require_simplex(name, x)
    if x.size < 2:
        raise ValueError(f"{name} must have shape (n,) with n >= 2, got shape {x.shape}")
    return x


def kkt_residual(
    x: ArrayLike, gradient: ArrayLike, *, support_above: ArrayLike = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""How far x is from the KKT conditions of minimizing a loss over the simplex.

    With c = <x, g>: stationarity on the support, max_{x_i > 0} |g_i - c|, and dual violation off it,
    max(0, c - min_{x_j = 0} g_j). Every vertex is stationary for the flow; the second number tells the
    minima among them.

    Args:
        x: point of the simplex, shape (n,).
        gradient: gradient of the loss at x, shape (n,).
        support_above: coordinates above this number count as support, a number >= 0.

    Returns:
        (stationarity, dual violation), two scalars >= 0; the second is 0 in the interior. Both are NaN where
        no coordinate counts as support, or a traced argument is bad.

    Raises:
        ValueError: `x` is not on the simplex, the gradient's shape does not fit, a number is not finite.

    Source: softmax2025talk, theorem on local analysis, part on KKT points.

    Example:
        >>> [float(part) for part in kkt_residual([1.0, 0.0], [0.0, -1.0])]  # a stationary vertex, no minimum
        [0.0, 1.0]
    """
    x = require_simplex("x", x)
    gradient = require_fit("gradient", gradient, x)
    support_above = require_number("support_above", support_above, x.dtype, at_least=0)
    support = x > support_above
    mean = jnp.sum(x * gradient)
    stationarity = jnp.max(jnp.where(support, jnp.abs(gradient - mean), 0))
    violation = jnp.max(jnp.where(support, 0, jnp.maximum(mean - gradient, 0)))
    # What is NaN compares as false, and leaves no support.
    found = jnp.any(support)
    return nan_unless(found, stationarity), nan_unless(found, violation)


def simplex_slack(dtype: Any) -> float:
    """How far a sum of shares may be from one."""
    return max(1e-6, float(jnp.finfo(dtype).eps) ** 0.5)
