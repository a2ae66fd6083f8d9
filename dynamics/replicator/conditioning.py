"""Condition number of the softmax flow next to a minimum, and proved bounds on it."""

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
    nan_unless,
    require_concrete,
    require_finite,
    require_shape,
    require_sizes,
    require_symmetric,
)
from dynamics.replicator.attention import softmax_jacobian
from dynamics.replicator.simplex import require_tangent, tangent_basis


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
        where the Hessian is indefinite there, or a traced argument is bad.

    Raises:
        ValueError: `x` is not on the simplex, the Hessian has another shape or is not finite and symmetric.

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
    norms = jnp.linalg.svd(jnp.stack([forward, backward]), compute_uv=False)[:, 0]
    log_kappa = 2 * jnp.sum(jnp.log(norms))
    value = jnp.where(definite & positive, jnp.exp(log_kappa), jnp.inf)
    return nan_unless(_known(x, largest), value)


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
        ValueError: `x` is not on the simplex, the Hessian has another shape or is not finite and symmetric.

    Source: softmax2025talk, theorem on local analysis (the printed lower bound has max x / min x and is
        wrong; the bounds here are corrected ones).

    Example:
        >>> [float(bound) for bound in condition_bounds([0.5, 0.5], jnp.eye(2))]
        [1.0, 1.0]
    """
    x, tangent_hessian = _require_local(x, hessian)
    smallest, largest = _extremes(tangent_hessian)
    weights = jnp.diag(softmax_jacobian(x))
    # The square of a ratio may overflow where the lower bound does not.
    ratio = _ratio(jnp.max(weights), jnp.min(weights))
    lower = smallest / largest * ratio * ratio
    upper = largest / smallest * (jnp.max(x) / jnp.min(x)) ** 2
    # A Hessian of zeros has 0 / 0 here.
    singular, known = smallest == 0, _known(x, largest)
    bounds = jnp.where(singular, 0, lower), jnp.where(singular, jnp.inf, upper)
    return nan_unless(known, bounds[0]), nan_unless(known, bounds[1])


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
        ValueError: `x` is not on the simplex, the Hessian has another shape or is not finite and symmetric.

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
    ratio = _ratio(large, weights[jnp.argmin(x)])
    bound = smallest / largest * ratio * ratio
    return nan_unless(_known(x, largest), jnp.where(smallest == 0, 0, bound))


def local_matrix(x: ArrayLike, hessian: ArrayLike) -> Float[Array, "m m"]:
    r"""The softmax flow next to a minimum, d(delta)/dt = -J(x)^2 H delta, in the tangent basis.

    It is what `linearize` makes of `attention_field` with unit keys; for others it is k times as large.

    Args:
        x: point of the simplex, shape (n,), n >= 2.
        hessian: Hessian H of the loss in x, symmetric, shape (n, n).

    Returns:
        -Q^T J^2 H Q with Q of `tangent_basis`, shape (n - 1, n - 1).

    Raises:
        ValueError: `x` is not on the simplex, the Hessian has another shape or is not finite and symmetric.

    Source: softmax2025talk, theorem on local analysis.

    Example:
        >>> local_matrix([0.5, 0.5], jnp.eye(2)).round(6).tolist()
        [[-0.25]]
    """
    x = require_tangent("x", x)
    hessian = _require_hessian(hessian, x)
    basis, jacobian = tangent_basis(x.size, x.dtype), softmax_jacobian(x)
    return -basis.T @ jacobian @ jacobian @ hessian @ basis


def random_minima(
    rng: np.random.Generator, n: int, count: int, log10_ratio: float, log10_spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Random instances of the local analysis: interior points and positive definite Hessians.

    Entries of a point and eigenvalues of a Hessian are log-uniform over a random number of decades.

    Args:
        rng: NumPy's generator.
        n: coordinates of a point.
        count: number of instances.
        log10_ratio: decades over which the entries of a point spread, at most: a number from 0 to 300.
        log10_spread: decades over which the eigenvalues of a Hessian spread, at most, from 0 to 300; they are
            at least one.

    Returns:
        Points (count, n) and Hessians (count, n, n).

    Raises:
        ValueError: an argument is out of range, or traced.

    Example:
        >>> x, hessian = random_minima(np.random.default_rng(0), 3, 10, 2.0, 1.0)
        >>> x.sum(axis=1).round(12).tolist() == [1.0] * 10, hessian.shape
        (True, (10, 3, 3))
    """
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
    n, count = require_sizes(n=n, count=count)
    log10_ratio = _require_decades("log10_ratio", log10_ratio)
    log10_spread = _require_decades("log10_spread", log10_spread)
    x = 10 ** (-log10_ratio * rng.uniform(size=(count, 1)) * rng.uniform(size=(count, n)))
    values = 10 ** (log10_spread * rng.uniform(size=(count, 1)) * rng.uniform(size=(count, n)))
    rotation = np.linalg.qr(rng.normal(size=(count, n, n)))[0]
    hessian = (rotation * values[:, None, :]) @ np.swapaxes(rotation, 1, 2)
    return x / x.sum(axis=1, keepdims=True), (hessian + np.swapaxes(hessian, 1, 2)) / 2


def _require_decades(name: str, decades: float) -> float:
    array = require_concrete(name, decades)
    if array.ndim != 0 or not 0 <= array <= 300:
        raise ValueError(f"{name} must be a number from 0 to 300, got {brief(decades)}")
    return float(decades)


def _require_hessian(hessian: ArrayLike, x: Array) -> Array:
    hessian = cast(as_real("hessian", hessian), x.dtype)
    require_shape("hessian", hessian, (x.size, x.size))
    return require_symmetric("hessian", require_finite("hessian", hessian))


def _require_local(x: ArrayLike, hessian: ArrayLike) -> tuple[Array, Array]:
    """x, and the Hessian in the tangent basis, in units of its largest entry: only ratios are asked for."""
    x = require_tangent("x", x)
    hessian = _require_hessian(hessian, x)
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(hessian)))
    hessian = hessian / jnp.where(unit == 0, 1, unit)
    basis = tangent_basis(x.size, x.dtype)
    return x, basis.T @ ((hessian + hessian.T) / 2) @ basis


def _extremes(tangent_hessian: Array) -> tuple[Array, Array]:
    """Extreme sizes of the eigenvalues; the smaller is 0 where singular, both are NaN where indefinite."""
    values = jnp.linalg.eigvalsh(tangent_hessian)
    sizes = jnp.abs(values)
    largest = jnp.max(sizes)
    slack = 8 * values.size * jnp.finfo(values.dtype).eps * largest
    smallest = jnp.where(jnp.min(sizes) <= slack, 0, jnp.min(sizes))  # NaN stays
    definite = ~((values[0] < -slack) & (values[-1] > slack))
    return nan_unless(definite, smallest), nan_unless(definite, largest)


def _known(x: Array, largest: Array) -> Array:
    """Whether neither the point nor the curvature is NaN."""
    return jnp.all(jnp.isfinite(x)) & jnp.isfinite(largest)


def _ratio(large: Array, small: Array) -> Array:
    """The quotient; 1 where both are zero."""
    return jnp.where((large == 0) & (small == 0), 1, large / small)
