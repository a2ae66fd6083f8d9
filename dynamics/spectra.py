"""Spectra: what is measured on weight matrices and attention rows."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Float, Int

from dynamics.flow import ArrayLike, as_inexact


def stable_rank(A: ArrayLike) -> Float[Array, "*batch"]:
    r"""Stable rank |A|_F^2 / |A|_2^2: between 1 and the rank; 0 for a zero matrix. A is (..., m, n).

    Source: vershynin2018, section 7.6.

    Example:
        >>> float(stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))))
        1.5
    """
    values = jnp.linalg.svd(as_inexact(A), compute_uv=False)
    largest = jnp.max(values, axis=-1, keepdims=True)
    # Scaled before it is squared: a collapsed matrix would underflow.
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
