"""Measures of what attention has learned: its error against a theory, its growth, and its order.

They are for records, which they look at in NumPy and in 64-bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynamics.arguments import ArrayLike, as_real, is_traced, require_every, require_times


def attention_error(Z: ArrayLike, theory: ArrayLike) -> np.ndarray:
    r"""Relative error |Z - Z'| / |Z'| of attention logits Z against those of a theory, Z'.

    Args:
        Z: attention logits, shape (..., M, M), or some rows or columns of them.
        theory: what they should be, of a shape that broadcasts against that of `Z`.

    Returns:
        Errors in the Euclidean norm over the last two axes, shape (...); |Z| where the theory is zero.

    Raises:
        ValueError: an array has less than two axes, or the shapes do not broadcast.

    Example:
        >>> float(attention_error([[3.0, 0.0]], [[3.0, 4.0]]))
        0.8
    """
    Z, theory = _record("Z", Z), _record("theory", theory)
    if min(Z.ndim, theory.ndim) < 2 or Z.shape[-2:] != theory.shape[-2:] or 0 in (Z.size, theory.size):
        raise ValueError(f"Z and theory must have shapes (..., M, M), got {Z.shape} and {theory.shape}")
    size = np.linalg.norm(theory, axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.linalg.norm(Z - theory, axis=(-2, -1)) / np.where(size == 0, 1, size))


def growth_along(growth_rate: ArrayLike, ts: ArrayLike, learning_rate_Z: ArrayLike) -> np.ndarray:
    r"""Growth of attention along a path, B_n(t) = learning_rate_Z * integral of xi_n, by Simpson's rule.

    Source: tian2023scan, Theorem 3.

    Args:
        growth_rate: xi at the times, as `dynamics.scan_snap.growth_rate` gives it, shape (..., T, K).
        ts: the times, which increase strictly, shape (T,).
        learning_rate_Z: learning rate of attention, >= 0, of a shape that broadcasts against `growth_rate`.

    Returns:
        B, shape (..., T, K), zero at the first time.

    Raises:
        ValueError: a learning rate is negative, or the times do not increase or are not as many as the rates.

    Example:
        >>> growth_along([[0.0], [2.0], [4.0]], [0.0, 1.0, 2.0], 0.5).round(6).tolist()
        [[0.0], [0.5], [2.0]]
    """
    from scipy.integrate import cumulative_simpson  # it takes long to import

    require_every("learning_rate_Z", as_real("learning_rate_Z", learning_rate_Z), lambda x: x >= 0, ">= 0")
    count = require_times(ts, float).size
    xi, rate = _record("growth_rate", growth_rate), _record("learning_rate_Z", learning_rate_Z)
    if xi.ndim < 2 or xi.shape[-2] != count or xi.size == 0:
        raise ValueError(f"growth_rate must have shape (..., {count}, K), as ts has, got shape {xi.shape}")
    if any(size not in (1, own) for size, own in zip(rate.shape[:-3:-1], xi.shape[::-1], strict=False)):
        raise ValueError(f"learning_rate_Z must broadcast against {xi.shape}, got shape {rate.shape}")
    with np.errstate(invalid="ignore"):
        return rate * cumulative_simpson(xi, x=_record("ts", ts), axis=-2, initial=0)


def rank_correlation(z: ArrayLike, score: ArrayLike) -> float:
    """Spearman's rank correlation of attention logits with a score of their tokens.

    Args:
        z: attention logits, any shape.
        score: scores of the same shape; pairs whose score is NaN are left out.

    Returns:
        The correlation; NaN for fewer than three pairs, where either does not vary, or where a logit is NaN.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> rank_correlation([1.0, 2.0, 9.0, 3.0], [0.1, 0.2, 0.3, float("nan")])
        1.0
    """
    from scipy.stats import spearmanr  # it takes long to import

    z, score = _record("z", z), _record("score", score)
    if z.shape != score.shape:
        raise ValueError(f"z and score must have one shape, got {z.shape} and {score.shape}")
    pairs = ~np.isnan(score)
    z, score = z[pairs], score[pairs]
    if z.size < 3 or np.all(z == z[0]) or np.all(score == score[0]):
        return float("nan")
    found: Any = spearmanr(z, score)
    return float(found.statistic)


def _record(name: str, value: ArrayLike) -> np.ndarray:
    """A recorded array in NumPy: JAX would take it down to its own default precision."""
    if is_traced(as_real(name, value)):
        raise ValueError(f"{name} must be concrete, since it is looked at on the host, got a traced array")
    return np.asarray(value, float)
