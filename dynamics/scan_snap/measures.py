"""Measures of what attention has learned: its error against a theory, its growth, and its order."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynamics.flow import ArrayLike


def attention_error(Z: ArrayLike, theory: ArrayLike) -> np.ndarray:
    r"""Relative error |Z - Z'| / |Z'| of attention logits Z against those of a theory, Z'.

    Args:
        Z: attention logits, shape (..., M, M), or some rows or columns of them.
        theory: what they should be, of a shape that broadcasts against that of `Z`.

    Returns:
        Errors in the Euclidean norm over the last two axes, shape (...); |Z| where the theory is zero.

    Example:
        >>> float(attention_error([[3.0, 0.0]], [[3.0, 4.0]]))
        0.8
    """
    Z, theory = np.asarray(Z), np.asarray(theory)
    size = np.linalg.norm(theory, axis=(-2, -1))
    return np.asarray(np.linalg.norm(Z - theory, axis=(-2, -1)) / np.where(size == 0, 1, size))


def growth_along(growth_rate: ArrayLike, ts: ArrayLike, learning_rate_Z: ArrayLike) -> np.ndarray:
    r"""Growth of attention along a path, B_n(t) = learning_rate_Z * integral of xi_n, by Simpson's rule.

    Source: tian2023scan, Theorem 3.

    Args:
        growth_rate: xi at the times, as `dynamics.scan_snap.growth_rate` gives it, shape (..., T, K).
        ts: the times, shape (T,).
        learning_rate_Z: learning rate of attention, of a shape that broadcasts against `growth_rate`.

    Returns:
        B, shape (..., T, K), zero at the first time.

    Example:
        >>> growth_along([[0.0], [2.0], [4.0]], [0.0, 1.0, 2.0], 0.5).round(6).tolist()
        [[0.0], [0.5], [2.0]]
    """
    from scipy.integrate import cumulative_simpson  # it takes long to import

    xi, ts = np.asarray(growth_rate), np.asarray(ts)
    return np.asarray(learning_rate_Z) * cumulative_simpson(xi, x=ts, axis=-2, initial=0)


def rank_correlation(z: ArrayLike, score: ArrayLike) -> float:
    """Spearman's rank correlation of attention logits with a score of their tokens.

    Args:
        z: attention logits, any shape.
        score: scores of the same shape; pairs whose score is NaN are left out.

    Returns:
        The correlation; NaN for fewer than three pairs, or where either does not vary.

    Example:
        >>> rank_correlation([1.0, 2.0, 9.0, 3.0], [0.1, 0.2, 0.3, float("nan")])
        1.0
    """
    from scipy.stats import spearmanr  # it takes long to import

    z, score = np.asarray(z), np.asarray(score)
    pairs = np.isfinite(score)
    if np.count_nonzero(pairs) < 3:
        return float("nan")
    found: Any = spearmanr(z[pairs], score[pairs])
    return float(found.statistic)
