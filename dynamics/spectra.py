"""Spectra: what is measured on weight matrices, attention rows and subspaces."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, Int

from dynamics.arguments import require_arrays, require_shapes
from dynamics.flow import ArrayLike, as_inexact, is_traced


def stable_rank(A: ArrayLike) -> Float[Array, "*batch"]:
    r"""Stable rank |A|_F^2 / |A|_2^2: between 1 and the rank; 0 for a zero matrix. A is (..., m, n).

    Source: vershynin2018, section 7.6.

    Example:
        >>> float(stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))))
        1.5
    """
    values = jnp.linalg.svd(as_inexact(A), compute_uv=False)
    largest = jnp.max(values, axis=-1, keepdims=True)
    # The values are scaled before they are squared: those of a collapsed matrix would underflow.
    return jnp.sum(jnp.square(values / jnp.where(largest > 0, largest, 1)), axis=-1)


def numerical_rank(A: ArrayLike, *, rtol: ArrayLike = 0.0, atol: ArrayLike = 0.0) -> Int[Array, "*batch"]:
    r"""Number of singular values above max(atol, rtol * the largest one). A is (..., m, n).

    Example:
        >>> A = jnp.diag(jnp.array([2.0, 0.5, 0.01]))
        >>> int(numerical_rank(A, atol=0.1)), int(numerical_rank(A, rtol=0.5))
        (2, 1)
    """
    values = jnp.linalg.svd(as_inexact(A), compute_uv=False)
    threshold = jnp.maximum(jnp.asarray(atol), jnp.asarray(rtol) * jnp.max(values, axis=-1, keepdims=True))
    return jnp.sum(values > threshold, axis=-1)


def effective_rank(A: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    r"""Effective rank: exp of the entropy of the singular values scaled to sum to one; 0 for a zero matrix.

    Source: roy2007, section 2.

    Example:
        >>> round(float(effective_rank(jnp.eye(3))), 6)
        3.0
    """
    values = jnp.linalg.svd(A, compute_uv=False)
    total = jnp.sum(values, axis=-1)
    shares = values / jnp.where(total > 0, total, 1)[..., None]
    return jnp.where(total == 0, 0, jnp.exp(entropy(shares)))


def entropy(p: ArrayLike, axis: int = -1) -> Float[Array, "..."]:
    r"""Shannon entropy -sum_i p_i log p_i in nats along an axis; 0 for a one-hot vector.

    Example:
        >>> round(float(entropy(jnp.full(4, 0.25))), 4)  # log 4
        1.3863
    """
    return jnp.sum(entr(as_inexact(p)), axis=axis)


def alignment(A: Float[Array, "*batch m n"], B: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    r"""Cosine <A, B> / (|A| |B|) of two matrices under the Frobenius inner product; 0 if either is zero.

    Example:
        >>> float(alignment(jnp.eye(2), 3 * jnp.eye(2)))
        1.0
    """
    inner = jnp.sum(A * B, axis=(-2, -1))
    norms = jnp.linalg.norm(A, axis=(-2, -1)) * jnp.linalg.norm(B, axis=(-2, -1))
    return inner / jnp.where(norms > 0, norms, 1)


def captured_energy(P: ArrayLike, G: ArrayLike) -> Float[Array, "*batch"]:
    r"""Share of a gradient inside a subspace, |P^T G|_F^2 / |G|_F^2, in [0, 1]; 0 for a zero gradient.

    For the other side, hand over G^T.

    Args:
        P: orthonormal columns, (..., m, r).
        G: (..., m, n).

    Returns:
        The share, in the shape of the batch axes. NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or columns are not orthonormal.

    Example:
        >>> round(float(captured_energy([[1.0], [0.0]], [[3.0], [4.0]])), 6)
        0.36
    """
    G, P = require_arrays(G=G, P=P)
    require_shapes(P=(P, "... m r"), G=(G, "... m n"))
    require_orthonormal(P=P)
    return _captured(P, G)


@eqx.filter_jit
def _captured(P, G):
    # The gradient is scaled before it is squared: a tiny one would underflow.
    peak = jnp.max(jnp.abs(G), axis=(-2, -1), keepdims=True)
    G = G / jnp.where(peak == 0, 1, peak)
    whole = jnp.sum(G**2, axis=(-2, -1))
    inside = jnp.sum((P.mT @ G) ** 2, axis=(-2, -1))
    share = jnp.minimum(inside / jnp.where(whole == 0, 1, whole), 1)
    return jnp.where(is_orthonormal(P), share, jnp.nan)


def principal_angles(P: ArrayLike, Q: ArrayLike) -> Float[Array, "*batch k"]:
    r"""Angles between two subspaces in radians, in ascending order, k = min(r, s) of them, in [0, pi/2].

    The cosines are the singular values of P^T Q, the sines those of (I - P P^T) Q: neither alone is
    accurate. With a flat tail of singular values the last angles between gradients' subspaces tell nothing,
    unlike `captured_energy`.

    Args:
        P: orthonormal columns, (..., m, r).
        Q: orthonormal columns, (..., m, s).

    Returns:
        The angles, (..., k). NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or columns are not orthonormal.

    Example:
        >>> principal_angles([[1.0], [0.0]], [[0.6], [0.8]]).round(6).tolist()  # arctan(4/3)
        [0.927295]
    """
    P, Q = require_arrays(P=P, Q=Q)
    require_shapes(P=(P, "... m r"), Q=(Q, "... m s"))
    require_orthonormal(P=P, Q=Q)
    return _angles(P, Q) if P.shape[-1] >= Q.shape[-1] else _angles(Q, P)


@eqx.filter_jit
def _angles(P, Q):
    cosines = jnp.linalg.svd(P.mT @ Q, compute_uv=False)
    sines = jnp.linalg.svd(Q - P @ (P.mT @ Q), compute_uv=False)
    angles = jnp.arctan2(sines[..., ::-1], cosines)
    return jnp.where(is_orthonormal(P) & is_orthonormal(Q), angles, jnp.nan)


# A basis that was made orthonormal in half precision still meets this.
_ORTHONORMAL = 1e-2


def require_orthonormal(**bases: Array) -> None:
    """Refuse concrete bases (..., m, r) whose columns are not orthonormal."""
    for name, P in bases.items():
        if not is_traced(P):
            values = np.asarray(P, float)
            error = float(np.max(np.abs(np.swapaxes(values, -1, -2) @ values - np.eye(P.shape[-1]))))
            if error > _ORTHONORMAL:
                raise ValueError(f"{name} must have orthonormal columns, got P^T P - I up to {error:.3g}")


def is_orthonormal(P: Array) -> Array:
    """Whether bases (..., m, r), which may be traced, all have orthonormal columns."""
    gram = P.mT @ P
    identity = jnp.broadcast_to(jnp.eye(P.shape[-1], dtype=P.dtype), gram.shape)
    return jnp.max(jnp.abs(gram - identity)) <= _ORTHONORMAL
