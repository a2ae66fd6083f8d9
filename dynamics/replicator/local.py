"""Local analysis on the simplex: linearization on the tangent space, conditioning, stationarity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from scipy.linalg import helmert

from dynamics.flow import ArrayLike, is_traced
from dynamics.replicator.population import require_simplex


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


def softmax_jacobian(x: Float[Array, " n"]) -> Float[Array, "n n"]:
    r"""J(x) = diag(x) - x x^T for a point of the simplex, every entry to full relative precision.

    The diagonal is x_i sum_{j != i} x_j: next to a vertex, 1 - x_i would lose all its digits.

    Example:
        >>> softmax_jacobian(jnp.array([0.5, 0.5])).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """
    off = x[:, None] * x[None, :] * (1 - jnp.eye(x.size, dtype=x.dtype))
    return jnp.diag(jnp.sum(off, axis=1)) - off


def attention_field(x: ArrayLike, gradient: ArrayLike, key_scale: ArrayLike = 1.0) -> Float[Array, " n"]:
    r"""Softmax flow of a prompt as a field on the simplex: dx/dt = -k J(x)^2 g.

    Its integral curves are those of `softmax_flow`, seen in x = softmax(z).

    Args:
        x: point of the simplex, shape (n,).
        gradient: gradient g of the loss at x, shape (n,).
        key_scale: k, squared length of the keys, a number.

    Returns:
        dx/dt, shape (n,); NaN where a traced x is not on the simplex.

    Raises:
        ValueError: `x` is not on the simplex, the gradient's shape does not fit, `key_scale` is no finite
            number.

    Source: softmax2025talk, theorem on local analysis, the flow that it linearizes.

    Example:
        >>> attention_field([0.5, 0.5], [1.0, 0.0]).tolist()
        [-0.125, 0.125]
    """
    x = require_simplex("x", x)
    gradient, key_scale = _require_gradient(gradient, x), jnp.asarray(key_scale, x.dtype)
    if key_scale.ndim != 0 or not (is_traced(key_scale) or bool(jnp.isfinite(key_scale))):
        raise ValueError(f"key_scale must be a finite number, got {key_scale}")
    jacobian = softmax_jacobian(x)
    return -key_scale * (jacobian @ (jacobian @ gradient))


def condition_number(x: ArrayLike, hessian: ArrayLike) -> Float[Array, ""]:
    r"""Condition number of the linearized softmax flow d(delta)/dt = -k J(x)^2 H delta on the tangent space.

    The eigenvalues of J^2 H there are those of J H J: real, and of the Hessian's sign. Their largest ratio
    is found from two largest singular values, one of them of the inverse, J^+ = P diag(1/x) P, so that
    ratios far beyond 1 / machine epsilon keep their digits.

    Args:
        x: point of the simplex, shape (n,), n >= 2.
        hessian: Hessian H of the loss in x, symmetric, shape (n, n).

    Returns:
        Scalar >= 1; inf where the Hessian is singular on the tangent space or an entry of x is zero, NaN
        where the Hessian is indefinite there.

    Raises:
        ValueError: `x` is not on the simplex, the Hessian's shape does not fit or it is not symmetric.

    Source: softmax2025talk, theorem on local analysis, part on the condition number.

    Example:
        >>> float(condition_number([0.998, 0.001, 0.001], jnp.eye(3))).__round__(6)  # 9 (1 - 2e-3)^2
        8.964036
    """
    x, tangent_hessian = _require_local(x, hessian)
    basis = tangent_basis(x.size, x.dtype)
    smallest, largest = _extremes(tangent_hessian)
    definite = smallest > 0
    sign = jnp.sign(jnp.trace(tangent_hessian))
    safe = jnp.where(definite, sign * tangent_hessian, jnp.eye(x.size - 1, dtype=x.dtype))
    factor = jnp.linalg.cholesky(safe)
    forward = factor.T @ (basis.T @ softmax_jacobian(x) @ basis)
    positive = jnp.all(x > 0)
    inverse = basis.T @ (basis / jnp.where(positive, x, 1)[:, None])
    backward = jax.scipy.linalg.solve_triangular(factor, inverse, lower=True)
    log_kappa = 2 * (jnp.log(_spectral_norm(forward)) + jnp.log(_spectral_norm(backward)))
    value = jnp.where(definite & positive, jnp.exp(log_kappa), jnp.inf)
    return jnp.where(jnp.isnan(largest) | jnp.any(jnp.isnan(x)), jnp.nan, value)


def condition_bounds(x: ArrayLike, hessian: ArrayLike) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Proved bounds (lower, upper) on `condition_number`.

    (mu/L) (max w / min w)^2 <= kappa <= (L/mu) (max x / min x)^2, with w = x (1 - x) and mu, L the extreme
    eigenvalues of the Hessian on the tangent space. Next to a vertex the lower one stays bounded, as kappa
    does: a small coordinate alone makes nothing ill-conditioned, two that are not small beside it do.

    Args:
        x: point of the simplex, shape (n,), n >= 2.
        hessian: symmetric, shape (n, n).

    Returns:
        Two scalars; (0, inf) where the Hessian is singular on the tangent space, NaN where it is indefinite.
        At a vertex, where every w is zero and kappa is inf, max w / min w is taken as 1.

    Raises:
        ValueError: `x` is not on the simplex, the Hessian's shape does not fit or it is not symmetric.

    Source: softmax2025talk, theorem on local analysis (the printed lower bound has max x / min x and is
        wrong; the bounds here are corrected ones).

    Example:
        >>> [float(bound) for bound in condition_bounds([0.5, 0.5], jnp.eye(2))]
        [1.0, 1.0]
    """
    x, tangent_hessian = _require_local(x, hessian)
    smallest, largest = _extremes(tangent_hessian)
    weights = jnp.diag(softmax_jacobian(x))
    lower = smallest / largest * _ratio(jnp.max(weights), jnp.min(weights)) ** 2
    upper = largest / smallest * (jnp.max(x) / jnp.min(x)) ** 2
    # A Hessian of zeros has 0 / 0 here.
    singular = smallest == 0
    return jnp.where(singular, 0, lower), jnp.where(singular, jnp.inf, upper)


def corollary_bound(x: ArrayLike, hessian: ArrayLike) -> Float[Array, ""]:
    r"""Proved lower bound on `condition_number` in the extreme coordinates of x alone.

    With e = min x and d = 1 - max x it is (mu/L) [min(d (1 - d), (n - 1) / n^2) / (e (1 - e))]^2, with mu, L
    the extreme eigenvalues of the Hessian on the tangent space. It never exceeds the lower one of
    `condition_bounds`. It goes to infinity as e goes to 0 where d stays away from 0, and not next to a
    vertex, where d <= (n - 1) e.

    Args:
        x: point of the simplex, shape (n,), n >= 2.
        hessian: symmetric, shape (n, n).

    Returns:
        Scalar; 0 where the Hessian is singular on the tangent space, NaN where it is indefinite. At a
        vertex, where d = e = 0 and the condition number is inf, the bracket is taken as 1.

    Raises:
        ValueError: `x` is not on the simplex, the Hessian's shape does not fit or it is not symmetric.

    Source: softmax2025talk, corollary of the theorem on local analysis (the printed bound lacks d and is
        wrong next to a vertex; the bound here is a corrected one).

    Example:
        >>> float(corollary_bound([0.8, 0.2], jnp.eye(2))).__round__(6)
        1.0
    """
    x, tangent_hessian = _require_local(x, hessian)
    smallest, largest = _extremes(tangent_hessian)
    n, weights = x.size, jnp.diag(softmax_jacobian(x))
    # x (1 - x) at the largest coordinate is d (1 - d), at the smallest e (1 - e).
    large = jnp.minimum(weights[jnp.argmax(x)], (n - 1) / n**2)
    bound = smallest / largest * _ratio(large, weights[jnp.argmin(x)]) ** 2
    return jnp.where(smallest == 0, 0, bound)


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
    gradient = _require_gradient(gradient, x)
    support = ~(x <= jnp.asarray(support_above, x.dtype))
    mean = jnp.sum(x * gradient)
    stationarity = jnp.max(jnp.where(support, jnp.abs(gradient - mean), 0))
    violation = jnp.max(jnp.where(support, 0, jnp.maximum(mean - gradient, 0)))
    return stationarity, violation


def _require_gradient(gradient: ArrayLike, x: Array) -> Array:
    gradient = jnp.asarray(gradient, x.dtype)
    if gradient.shape != x.shape:
        raise ValueError(f"gradient must have shape {x.shape}, got shape {gradient.shape}")
    return gradient


def _require_local(x: ArrayLike, hessian: ArrayLike) -> tuple[Array, Array]:
    """x, and the Hessian in the tangent basis."""
    x = require_simplex("x", x)
    hessian = jnp.asarray(hessian, x.dtype)
    if hessian.shape != (x.size, x.size):
        raise ValueError(f"hessian must have shape {(x.size, x.size)}, got shape {hessian.shape}")
    slack = float(jnp.finfo(x.dtype).eps) ** 0.5
    good = jnp.all(jnp.abs(hessian - hessian.T) <= slack * jnp.max(jnp.abs(hessian)))
    if not is_traced(hessian) and not bool(good):
        raise ValueError(f"hessian must be finite and symmetric, got {hessian.tolist()}")
    hessian = jnp.where(good, (hessian + hessian.T) / 2, jnp.nan)
    basis = tangent_basis(x.size, x.dtype)
    return x, basis.T @ hessian @ basis


def _extremes(tangent_hessian: Array) -> tuple[Array, Array]:
    """Extreme sizes of the eigenvalues; the smaller is 0 where singular, both are NaN where indefinite."""
    values = jnp.linalg.eigvalsh(tangent_hessian)
    sizes = jnp.abs(values)
    largest = jnp.max(sizes)
    slack = 8 * values.size * jnp.finfo(values.dtype).eps * largest
    smallest = jnp.where(jnp.min(sizes) <= slack, 0, jnp.min(sizes))  # NaN stays
    indefinite = (values[0] < -slack) & (values[-1] > slack)
    return jnp.where(indefinite, jnp.nan, smallest), jnp.where(indefinite, jnp.nan, largest)


def _ratio(large: Array, small: Array) -> Array:
    """The quotient; 1 where both are zero."""
    return jnp.where((large == 0) & (small == 0), 1, large / small)


def _spectral_norm(matrix: Array) -> Array:
    return jnp.max(jnp.linalg.svd(matrix, compute_uv=False))
