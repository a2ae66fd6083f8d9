"""What is observed of a predictor and of the network below it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynamics.arguments import ArrayLike, nan_unless, require_arrays, require_shapes
from dynamics.flow import all_finite
from dynamics.spectra import norm


class PredictorMeasures(NamedTuple):
    """Measures of a predictor W_p and of F = W W^T, each with the leading axes of both.

    Attributes:
        p: eigenvalues of the symmetric part of W_p, ascending, (..., n).
        s: eigenvalues of F, ascending, (..., n).
        commutator: |F W_p - W_p F| / (|F| |W_p|), Frobenius norms: 0 where eigenspaces are aligned.
        asymmetry: |W_p - W_p^T| / |W_p|.
    """

    p: Any
    s: Any
    commutator: Any
    asymmetry: Any


def predictor_measures(W: ArrayLike, Wp: ArrayLike) -> PredictorMeasures:
    r"""Eigenvalues of predictor and features, how far they are from aligned, and W_p from symmetric.

    Source: tian2021directpred, Theorem 3 and the talk's slide on decoupled dynamics.

    Args:
        W: the online network, (..., n2, n1); leading axes, such as that of time, are kept.
        Wp: the predictor, (..., n2, n2).

    Returns:
        The `PredictorMeasures`; 0 is what the last two are of matrices that are zero.

    Raises:
        ValueError: the shapes do not fit, or numbers are not finite.

    Example:
        >>> found = predictor_measures([[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]])
        >>> found.s.tolist(), round(float(found.commutator), 4), float(found.asymmetry)
        ([1.0, 4.0], 0.7276, 0.0)
    """
    W, Wp = require_arrays(W=W, Wp=Wp)
    require_shapes(W=(W, "... n2 n1"), Wp=(Wp, "... n2 n2"))
    # What has collapsed is small: products of its parts would vanish, and look aligned.
    V, P = _of_size_one(W), _of_size_one(Wp)
    F = V @ V.mT
    found = PredictorMeasures(
        jnp.linalg.eigvalsh((Wp + Wp.mT) / 2),
        jnp.linalg.eigvalsh(W @ W.mT),
        _norm(_of_size_one(F) @ P - P @ _of_size_one(F)),
        _norm(P - P.mT),
    )
    good = all_finite((W, Wp))  # eigenvalues may be numbers where an entry is none
    return jax.tree.map(lambda leaf: nan_unless(good, leaf), found)


def _norm(A):
    return norm(A, axis=(-2, -1))


def _of_size_one(A):
    """The matrices over their norms; zero where they are zero."""
    size = _norm(A)[..., None, None]
    return A / jnp.where(size == 0, 1, size)
