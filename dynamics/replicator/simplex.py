"""The simplex: its points, its tangent space, and what is stationary on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import helmert

from dynamics.arguments import require_shape, require_vector
from dynamics.flow import ArrayLike, is_traced


def require_simplex(name: str, x: ArrayLike) -> Float[Array, " n"]:
    """A point of the simplex as an array; `ValueError` if it is not one and can be looked at.

    A traced point that is off the simplex becomes NaN, which makes the lane's `ok` false.
    """
    x = require_vector(name, x)
    slack = simplex_slack(x.dtype)
    if not is_traced(x):
        values = np.asarray(x, float)
        if not (np.all(values >= 0) and abs(np.sum(values) - 1) <= slack):
            rule = "a point of the simplex (no negative entry, sum one)"
            raise ValueError(f"{name} must be {rule}, got {values.tolist()}")
    good = jnp.all(x >= 0) & (jnp.abs(jnp.sum(x) - 1) <= slack)
    return jnp.where(good, x, jnp.nan)


def tangent_basis(n: int, dtype: Any = float) -> Float[Array, "n m"]:
    """Orthonormal basis of the tangent space, the vectors of sum zero: Helmert's columns, (n, n - 1).

    Example:
        >>> (2**0.5 * tangent_basis(2)).round(6).tolist()
        [[1.0], [-1.0]]
    """
    if n < 2:
        raise ValueError(f"n must be >= 2, got {n}")
    return jnp.asarray(helmert(n).T, dtype=dtype)


def linearize(field: Callable[[Array], Array], x: ArrayLike) -> Float[Array, "m m"]:
    r"""Jacobian of a field on the simplex at x in the tangent basis: Q^T Df(x) Q, shape (n - 1, n - 1).

    The Jacobian on R^n has one more eigenvalue, of the direction that leaves the simplex; it says nothing
    about stability.

    Args:
        field: from x (n,) to dx/dt (n,).
        x: point of the simplex, shape (n,).

    Raises:
        ValueError: `x` is not on the simplex.

    Example:
        >>> from dynamics.replicator import replicator_field
        >>> linearize(lambda x: replicator_field(x, x), [0.5, 0.5]).round(6).tolist()
        [[0.5]]
    """
    x = require_simplex("x", x)
    basis = tangent_basis(x.size, x.dtype)
    return basis.T @ jax.jacfwd(field)(x) @ basis


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
        support_above: coordinates above this number count as support.

    Returns:
        (stationarity, dual violation), two scalars >= 0; the second is 0 in the interior.

    Raises:
        ValueError: `x` is not on the simplex, the gradient's shape does not fit.

    Source: softmax2025talk, theorem on local analysis, part on KKT points.

    Example:
        >>> [float(part) for part in kkt_residual([1.0, 0.0], [0.0, -1.0])]  # a stationary vertex, no minimum
        [0.0, 1.0]
    """
    x = require_simplex("x", x)
    gradient = jnp.asarray(gradient, x.dtype)
    require_shape("gradient", gradient, x.shape)
    support = ~(x <= jnp.asarray(support_above, x.dtype))
    mean = jnp.sum(x * gradient)
    stationarity = jnp.max(jnp.where(support, jnp.abs(gradient - mean), 0))
    violation = jnp.max(jnp.where(support, 0, jnp.maximum(mean - gradient, 0)))
    return stationarity, violation


def simplex_slack(dtype: Any) -> float:
    """How far a sum of shares may be from one."""
    return max(1e-6, float(jnp.finfo(dtype).eps) ** 0.5)
