"""Spectra: what is measured on weight matrices, attention rows and subspaces."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float

from dynamics.arguments import (
    as_concrete,
    as_real,
    brief,
    cast,
    nan_unless,
    one_hot,
    require_arrays,
    require_indices,
    require_number,
    require_same_shape,
    require_shape,
    require_shapes,
)
from dynamics.flow import ArrayLike


def stable_rank(A: ArrayLike) -> Float[Array, "*batch"]:
    r"""Stable rank |A|_F^2 / |A|_2^2: between 1 and the rank; 0 for a zero matrix. A is (..., m, n).

    Source: vershynin2018, section 7.6.

    Example:
        >>> float(stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))))
        1.5
    """
    # The values are scaled before they are squared: those of a collapsed matrix would underflow.
    return jnp.sum(jnp.square(_shares(_singular_values(A), jnp.max)), axis=-1)


def numerical_rank(A: ArrayLike, *, rtol: ArrayLike = 0.0, atol: ArrayLike = 0.0) -> Float[Array, "*batch"]:
    r"""Number of singular values above max(atol, rtol * the largest one). A is (..., m, n).

    It is a floating number, so that it can be NaN: for a matrix that is not finite, or a bad tolerance.

    Example:
        >>> A = jnp.diag(jnp.array([2.0, 0.5, 0.01]))
        >>> int(numerical_rank(A, atol=0.1)), int(numerical_rank(A, rtol=0.5))
        (2, 1)
    """
    values = _singular_values(A)
    rtol, atol = (
        require_number(name, tolerance, values.dtype, at_least=0)
        for name, tolerance in (("rtol", rtol), ("atol", atol))
    )
    threshold = jnp.maximum(atol, rtol * jnp.max(values, axis=-1, keepdims=True))
    count = jnp.sum(values > threshold, axis=-1).astype(values.dtype)
    # What is not finite compares as false, and would count as nothing.
    return nan_unless(jnp.all(jnp.isfinite(values) & jnp.isfinite(threshold), axis=-1), count)


def effective_rank(A: ArrayLike) -> Float[Array, "*batch"]:
    r"""Effective rank: exp of the entropy of the singular values scaled to sum to one; 0 for a zero matrix.

    A is (..., m, n).

    Source: roy2007, section 2.

    Example:
        >>> round(float(effective_rank(jnp.eye(3))), 6)
        3.0
    """
    values = _shares(_singular_values(A), jnp.max)
    zero = jnp.max(values, axis=-1) == 0
    return jnp.where(zero, 0, jnp.exp(entropy(_shares(values, jnp.sum))))


def _singular_values(A: ArrayLike) -> Array:
    A = as_real("A", A)
    require_shapes(A=(A, "... m n"))
    if A.size == 0:
        raise ValueError(f"A must not be empty, got shape {A.shape}")
    return jnp.linalg.svd(A, compute_uv=False)


def _shares(values: Array, measure: Callable[..., Array]) -> Array:
    """Numbers >= 0 over their largest, or over their sum; zeros stay zeros."""
    return _over(values, measure(values, axis=-1, keepdims=True))


def _over(x: Array, size: Array) -> Array:
    """Numbers over a size, zeros over zero.

    Compiled, a quotient by one size may be a product with its inverse, which vanishes where it is huge.
    """
    half = jnp.where(size > jnp.finfo(x.dtype).max / 16, 1 / 16, 1).astype(x.dtype)
    return (x * half) / jnp.where(size == 0, 1, size * half)


def entropy(p: ArrayLike, axis: int = -1) -> Float[Array, "..."]:
    r"""Shannon entropy -sum_i p_i log p_i in nats along an axis; 0 for a one-hot vector.

    It is minus infinity where a number is negative.

    Example:
        >>> round(float(entropy(jnp.full(4, 0.25))), 4)  # log 4
        1.3863
    """
    p = as_real("p", p)
    if p.ndim == 0 or p.size == 0:
        raise ValueError(f"p must have an axis and not be empty, got shape {p.shape}")
    return jnp.sum(entr(p), axis=axis)


def alignment(A: ArrayLike, B: ArrayLike) -> Float[Array, "*batch"]:
    r"""Cosine <A, B> / (|A| |B|) of two matrices under the Frobenius inner product; 0 if either is zero.

    Both are (..., m, n).

    Example:
        >>> float(alignment(jnp.eye(2), 3 * jnp.eye(2)))
        1.0
    """
    A, B = as_real("A", A), as_real("B", B)
    require_same_shape("(..., m, n)", range(2, 1 + max(2, A.ndim)), A=A, B=B)
    if A.size == 0:
        raise ValueError(f"A and B must not be empty, got shape {A.shape}")
    A, B = _scaled(A, (-2, -1))[0], _scaled(B, (-2, -1))[0]
    inner, squares = (jnp.sum(product, axis=(-2, -1)) for product in (A * B, jnp.stack([A, B]) ** 2))
    lengths = jnp.sqrt(squares[0] * squares[1])
    return inner / jnp.where(lengths == 0, 1, lengths)


def norm(x: ArrayLike, axis: SupportsIndex | tuple[SupportsIndex, ...] = -1) -> Float[Array, "..."]:
    r"""Euclidean norm along an axis, or several, without squares that vanish or overflow.

    Its gradient is zero where x is.

    Raises:
        ValueError: `axis` is neither an integer nor a tuple of some, or `x` has no such axis, or one that is
            empty.

    Example:
        >>> float(norm(jnp.array([3e-30, 4e-30], jnp.float32)) / 1e-30).__round__(5)
        5.0
    """
    x = as_real("x", x)
    axes = _require_axes(axis)
    if not all(-x.ndim <= a < x.ndim and x.shape[a] > 0 for a in axes):
        raise ValueError(f"x must have axis {brief(axis)}, which is not empty, got shape {x.shape}")
    x, largest = _scaled(x, axes)
    square = jnp.sum(x**2, axis=axes)
    # Where x is zero the second choice keeps the root's infinite slope out of the gradient.
    root = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
    return jnp.squeeze(largest, axis=axes) * root


def _require_axes(axis: Any) -> tuple[int, ...]:
    """The axis or axes as a tuple of Python integers."""
    try:
        axes = tuple(map(operator.index, axis if isinstance(axis, tuple) else (axis,)))
    except TypeError:
        axes = ()
    if not axes:
        raise ValueError(f"axis must be an integer or a tuple of integers, got {brief(axis)}")
    return axes


def _scaled(x: Array, axis: int | tuple[int, ...]) -> tuple[Array, Array]:
    """Numbers over the largest of them along some axes, so that their squares do not underflow; and it."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    return _over(x, largest), largest


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
    return _captured(require_orthonormal("P", P), G)


@eqx.filter_jit
def _captured(P, G):
    G, _ = _scaled(G, (-2, -1))
    whole = jnp.sum(G**2, axis=(-2, -1))
    inside = jnp.sum((P.mT @ G) ** 2, axis=(-2, -1))
    return jnp.minimum(inside / jnp.where(whole == 0, 1, whole), 1)


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
    P, Q = require_orthonormal("P", P), require_orthonormal("Q", Q)
    return _angles(P, Q) if P.shape[-1] >= Q.shape[-1] else _angles(Q, P)


@eqx.filter_jit
def _angles(P, Q):
    cosines = jnp.linalg.svd(P.mT @ Q, compute_uv=False)
    sines = jnp.linalg.svd(after(cosines, Q - P @ (P.mT @ Q)), compute_uv=False)
    return jnp.arctan2(sines[..., ::-1], cosines)


def after(done: Array, x: Array) -> Array:
    """`x`, which is not known before `done` is.

    Batches of decompositions that may run side by side share XLA's threads on a CPU, where jaxlib below 0.11
    lets them wait for each other for ever.

    Example:
        >>> after(jnp.ones(3), jnp.arange(2)).tolist()
        [0, 1]
    """
    total = jnp.sum(jax.lax.stop_gradient(done))
    # Zero, which no compiler may take for granted: the product would be NaN if the sum were infinite.
    return x + jnp.where(jnp.isfinite(total), 0 * total, 0).astype(x.dtype)


# A basis that was made orthonormal in half precision still meets this.
_ORTHONORMAL = 1e-2


def require_orthonormal(name: str, P: Array) -> Array:
    """Bases (..., m, r) whose columns are orthonormal."""
    values = as_concrete(P)
    if values is None:
        return nan_unless(_gram_error(P) <= _ORTHONORMAL, P)
    error = np.max(_gram_error(values))
    if not error <= _ORTHONORMAL:
        raise ValueError(f"{name} must have orthonormal columns, got P^T P - I up to {error:.3g}")
    return P


def _gram_error(P: Any) -> Any:
    """How far bases (..., m, r) are from orthonormal, (..., 1, 1): largest entry of P^T P - I."""
    numpy = np if isinstance(P, np.ndarray) else jnp
    gram = numpy.swapaxes(P, -1, -2) @ P
    identity = numpy.broadcast_to(numpy.eye(P.shape[-1], dtype=P.dtype), gram.shape)
    return numpy.max(numpy.abs(gram - identity), axis=(-2, -1), keepdims=True)


class NeuralCollapse(NamedTuple):
    """How far features, class means and classifier are from neural collapse: all zero where it is complete.

    Attributes:
        nc1: spread within classes over that between them, tr(S_W pinv(S_B)) / K.
        nc1_trace: the same as a quotient of traces, tr S_W / tr S_B.
        nc2: distance of the class means' Gram matrix from that of a simplex, both of norm one.
        nc3: distance of the classifier's weights from the class means, both of norm one.
        nc4: share of samples for which the classifier and the nearest class mean differ.
    """

    nc1: Array
    nc1_trace: Array
    nc2: Array
    nc3: Array
    nc4: Array


# Of the largest eigenvalue of S_B: directions in which class means differ less are none. With features that
# have collapsed they hold rounding alone, which the pseudo-inverse would blow up.
_BETWEEN = 1e-6


def neural_collapse(
    features: ArrayLike, labels: ArrayLike, weights: ArrayLike, bias: ArrayLike | None = None
) -> NeuralCollapse:
    r"""Measures of neural collapse of the last layer's features h and of the classifier W h + b.

    With the class means mu_k, their mean mu, M the rows mu_k - mu, S_B = M^T M / K and S_W the mean of
    (h - mu_k) (h - mu_k)^T:

        nc1 = tr(S_W pinv(S_B)) / K,   nc1_trace = tr S_W / tr S_B
        nc2 = |M M^T / |M M^T| - (I - 1 1^T / K) / (K - 1)^{1/2}|
        nc3 = |W / |W| - M / |M||,     nc4 = P(argmax W h + b is not the class of the nearest mean)

    Source: papyan2020, properties NC1 to NC4; tirer2022 (the quotient of traces).

    Args:
        features: h, (N, d).
        labels: the classes, integers from 0 to K - 1, (N,); each of them occurs.
        weights: W, (K, d), with K >= 2.
        bias: b, (K,); it enters nc4 alone.

    Returns:
        A `NeuralCollapse` of numbers; NaN where all class means are equal, so that there is nothing to divide
        by, nc3 also where W is zero, and everything where a traced argument is bad or a class has no sample.

    Raises:
        ValueError: the shapes do not fit, a label is out of range, or a class has no sample.

    Example:
        >>> h = [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]
        >>> [round(float(measure), 6) for measure in neural_collapse(h, [0, 0, 1], [[2.0, 0.0], [-2.0, 0.0]])]
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    features, weights = require_arrays(features=features, weights=weights)
    require_shapes(features=(features, "N d"), weights=(weights, "K d"))
    classes = weights.shape[0]
    if classes < 2:
        raise ValueError(f"weights must have a row for each of at least two classes, got {classes}")
    labels = require_indices("labels", labels, classes)
    require_shape("labels", labels, features.shape[:1])
    (bias,) = require_arrays(bias=jnp.zeros(classes, weights.dtype) if bias is None else bias)
    require_shape("bias", bias, (classes,))
    looked_at = as_concrete(labels)
    if looked_at is not None and np.unique(looked_at).size < classes:
        raise ValueError(f"labels must name each of the {classes} classes, got {np.unique(looked_at).size}")
    return _neural_collapse(features, labels, weights, cast(bias, weights.dtype))


@eqx.filter_jit
def _neural_collapse(features, labels, weights, bias):
    members = one_hot(labels, weights.shape[0], features.dtype)
    h, _ = _scaled(features, (0, 1))
    sizes = jnp.sum(members, axis=0)[:, None]
    means = members.T @ h / sizes  # NaN where a class has no sample
    M = means - jnp.mean(means, axis=0, keepdims=True)
    within = h - members @ means
    _, values, directions = jnp.linalg.svd(M, full_matrices=False)
    # S_B has the eigenvalues values^2 / K; so the K of nc1 cancels.
    seen = values**2 > _BETWEEN * values[0] ** 2
    spread = jnp.mean((within @ directions.T) ** 2, axis=0)
    nc1 = jnp.sum(jnp.where(seen, spread / jnp.where(seen, values**2, 1), 0))
    nc1_trace = jnp.mean(jnp.sum(within**2, axis=1)) / jnp.mean(jnp.sum(M**2, axis=1))
    K = weights.shape[0]
    simplex = (jnp.eye(K, dtype=M.dtype) - 1 / K) / (K - 1) ** 0.5
    nc2 = jnp.linalg.norm(_unit(M @ M.T) - simplex)
    nc3 = jnp.linalg.norm(_unit(weights) - _unit(M))
    # |h - mu_k|^2 - |h - mu|^2, which has the same order over k.
    centered = h - jnp.mean(means, axis=0, keepdims=True)
    squares = jnp.sum(M**2, axis=1)[None] - 2 * centered @ M.T
    chosen = jnp.argmax(features @ weights.T + bias[None], axis=1)
    nc4 = jnp.mean((chosen != jnp.argmin(squares, axis=1)).astype(M.dtype))
    apart = (values[0] > 0) & jnp.all(jnp.isfinite(weights)) & jnp.all(jnp.isfinite(bias))
    return NeuralCollapse(*(nan_unless(apart, measure) for measure in (nc1, nc1_trace, nc2, nc3, nc4)))


def _unit(A: Array) -> Array:
    """A matrix over its norm."""
    A, _ = _scaled(A, (0, 1))
    return A / jnp.linalg.norm(A)


def active_units(mean: ArrayLike, threshold: ArrayLike = 1e-2) -> Float[Array, ""]:
    r"""The number of latents whose posterior mean varies over the data: Var(m_i) > threshold.

    At the minimum Var(m_i) = theta_i^2 = eta_enc^2 (1 - beta / beta_i), with beta_i the threshold of the
    mode. So latents that are alive count as dead within one percent of beta_i, at `eta_enc` = 1. Training is
    slow there, and keeps dead ones alive: within some ten percent of a threshold the count may be one off.

    Source: burda2016 (its threshold).

    Args:
        mean: means of the latents, (n, k).
        threshold: a number >= 0.

    Raises:
        ValueError: the means have another shape, or a number is out of range and can be looked at.

    Example:
        >>> float(active_units([[1.0, 0.1, 2.0], [-1.0, 0.1, 2.1]]))
        1.0
    """
    (mean,) = require_arrays(mean=mean)
    require_shapes(mean=(mean, "n k"))
    threshold = require_number("threshold", threshold, mean.dtype, at_least=0)
    variances = jnp.var(mean, axis=0)
    count = jnp.sum(variances > threshold).astype(mean.dtype)
    return nan_unless(jnp.all(jnp.isfinite(variances)) & jnp.isfinite(threshold), count)
