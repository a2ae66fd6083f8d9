"""Tokens: sequence classes with common and distinct tokens, and sequences sampled from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dynamics.arguments import (
    ArrayLike,
    brief,
    is_traced,
    nan_unless,
    require_concrete,
    require_dtype,
    require_indices,
    require_integer,
    require_number,
)
from dynamics.scan_snap import SequenceClasses
from models.draws import uniform


class Contexts(NamedTuple):
    """What one attention layer sees of sequences when positions do not matter.

    Attributes:
        counts: how often each token occurs before the last one, shape (..., M); floating, and probabilities
            where contexts are infinitely long.
        query: the last token, shape (...).
    """

    counts: Array
    query: Array


def synthetic_classes(
    num_queries: int,
    next_per_query: int = 1,
    *,
    num_common: int = 10,
    num_distinct: int = 10,
    common_weight: int | float = 1.0,
    distinct_weights: tuple[int | float, int | float] = (0.1, 1.0),
    vocab_size: int | None = None,
    dtype: Any = None,
) -> SequenceClasses:
    r"""Classes with tokens common to all and tokens of their own: K = num_queries * next_per_query of them.

    Before normalization a common token has probability `common_weight`, and the distinct tokens of a class
    have weights that are equally spaced between the two `distinct_weights`. Tokens are numbered: common
    ones, distinct ones class by class, queries, next tokens, and then such that never occur.

    Source: tian2023scan, Figures 4 and 6: `synthetic_classes(2)` and `synthetic_classes(num_queries, 2)`.

    Args:
        num_queries: number of last tokens.
        next_per_query: next tokens, and so classes, per last token.
        num_common: tokens that occur in all classes.
        num_distinct: tokens that occur in one class alone, for each class.
        common_weight: weight of a common token, positive.
        distinct_weights: smallest and largest weight of the distinct tokens, positive.
        vocab_size: size of the vocabulary; no more than is needed where None.
        dtype: floating dtype; JAX's default where None.

    Returns:
        The classes.

    Raises:
        ValueError: a size or weight is out of range, or the vocabulary is too small.

    Example:
        >>> classes = synthetic_classes(2)
        >>> classes.P.shape, classes.query.tolist(), classes.next_token.tolist()
        ((2, 34), [30, 31], [32, 33])
    """
    sizes = {"num_queries": (num_queries, 1), "next_per_query": (next_per_query, 1)}
    sizes |= {"num_common": (num_common, 0), "num_distinct": (num_distinct, 0)}
    for name, (size, least) in sizes.items():
        require_integer(name, size, at_least=least)
    if num_common + num_distinct == 0:
        raise ValueError("num_distinct must be positive where num_common is 0, got 0")
    for name, weights in (("common_weight", common_weight), ("distinct_weights", distinct_weights)):
        if not np.all(require_concrete(name, weights) > 0):
            raise ValueError(f"{name} must be positive and finite, got {brief(weights)}")
    K = num_queries * next_per_query
    first_query = num_common + K * num_distinct
    needed = first_query + num_queries + K
    M = needed if vocab_size is None else require_integer("vocab_size", vocab_size, at_least=needed)
    P = np.zeros((K, M))
    P[:, :num_common] = common_weight
    for n in range(K):
        own = num_common + n * num_distinct
        P[n, own : own + num_distinct] = np.linspace(*distinct_weights, num_distinct)
    P /= P.sum(axis=1, keepdims=True)
    query = first_query + np.arange(K) // next_per_query
    next_token = first_query + num_queries + np.arange(K)
    return SequenceClasses(P.astype(require_dtype(dtype)), query, next_token)


def one_common_token(
    overlap: float, num_classes: int = 2, *, num_distinct: int = 10, vocab_size: int | None = None
) -> SequenceClasses:
    r"""Classes with one common token, of a weight that gives any two classes the cosine `overlap`.

    With w the weight of the common token and d those of a class's own tokens, the cosine of two rows of P is
    w^2 / (w^2 + |d|^2).

    Args:
        overlap: the cosine, above 0 and below 1.
        num_classes: K, each with a query of its own.
        num_distinct: tokens of each class alone, with the weights of `synthetic_classes`.
        vocab_size: M; by default just large enough.

    Raises:
        ValueError: the overlap or a size is out of range.

    Example:
        >>> P = one_common_token(0.36).P
        >>> round(float(P[0] @ P[1] / (P[0] @ P[0])), 6)
        0.36
    """
    overlap = float(require_concrete("overlap", require_number("overlap", overlap, float)))
    if not 0 < overlap < 1:
        raise ValueError(f"overlap must be above 0 and below 1, got {overlap}")
    own = np.linalg.norm(np.linspace(0.1, 1.0, num_distinct))
    weight = float(own * np.sqrt(overlap / (1 - overlap)))
    return synthetic_classes(
        num_classes, num_common=1, num_distinct=num_distinct, common_weight=weight, vocab_size=vocab_size
    )


def sample_tokens(
    key: Array, classes: SequenceClasses, length: int, batch: int
) -> tuple[Int[Array, "batch length"], Int[Array, " batch"]]:
    """Sequences of a given length and their next tokens; every class is equally likely.

    Context tokens are -1 where traced classes are bad, and networks give NaN for them.

    Args:
        key: PRNG key.
        classes: the sequence classes.
        length: tokens per sequence T, at least 2: T - 1 of the context, and the query as the last one.
        batch: number of sequences B.

    Returns:
        The tokens, shape (B, T), and the next tokens, shape (B,).

    Raises:
        ValueError: `length` or `batch` is too small.

    Example:
        >>> tokens, next_token = sample_tokens(jax.random.key(0), synthetic_classes(2), length=5, batch=3)
        >>> tokens.shape, next_token.shape
        ((3, 5), (3,))
    """
    _require_sizes(length, batch)
    which, context = _sample_context(key, classes, length, batch)
    tokens = jnp.concatenate([context, classes.query[which].astype(context.dtype)[:, None]], axis=1)
    return tokens, classes.next_token[which]


def sample_contexts(
    key: Array, classes: SequenceClasses, length: int, batch: int
) -> tuple[Contexts, Int[Array, " batch"]]:
    """What `sample_tokens` draws for the same key, as `Contexts`: all that the network needs.

    Args:
        key: PRNG key.
        classes: the sequence classes.
        length: tokens per sequence T, at least 2.
        batch: number of sequences B.

    Returns:
        The contexts, with counts of shape (B, M), and the next tokens, shape (B,).

    Raises:
        ValueError: `length` or `batch` is too small.

    Example:
        >>> contexts, _ = sample_contexts(jax.random.key(0), synthetic_classes(2), length=5, batch=3)
        >>> contexts.counts.sum(axis=1).tolist()
        [4.0, 4.0, 4.0]
    """
    _require_sizes(length, batch)
    which, context = _sample_context(key, classes, length, batch)
    counts = _count(context, classes.vocab_size, classes.P.dtype)
    return Contexts(nan_unless(context[:, :1] >= 0, counts), classes.query[which]), classes.next_token[which]


def sample_long_contexts(
    key: Array, classes: SequenceClasses, length: ArrayLike, batch: int
) -> tuple[Contexts, Int[Array, " batch"]]:
    """`sample_contexts` by the multinomial law of the counts: other draws, and no cost in the length.

    It is the faster one from about a thousand tokens on, and the length may be traced: several of them
    are one `vmap`.

    Args:
        key: PRNG key.
        classes: the sequence classes.
        length: tokens per sequence T, at least 2; an integer.
        batch: number of sequences B.

    Returns:
        The contexts, with counts of shape (B, M), and the next tokens, shape (B,). Counts are NaN where a
        traced length is too small.

    Raises:
        ValueError: `length` or `batch` is too small, and can be looked at.

    Example:
        >>> contexts, _ = sample_long_contexts(jax.random.key(0), synthetic_classes(2), 1_000_001, batch=2)
        >>> contexts.counts.sum(axis=1).tolist()
        [1000000.0, 1000000.0]
    """
    _require_sizes(2 if is_traced(length) else length, batch)
    key_class, key_count = jax.random.split(key)
    which = jax.random.randint(key_class, (batch,), 0, classes.num_classes)
    dtype = classes.P.dtype
    drawn = jnp.broadcast_to(jnp.asarray(length, dtype) - 1, (batch,))
    counts = jax.random.multinomial(key_count, drawn, classes.P[which], dtype=dtype)
    good = (drawn >= 1)[:, None] & jnp.all(jnp.isfinite(classes.P[which]), axis=1, keepdims=True)
    counts = nan_unless(good, counts)
    return Contexts(counts, classes.query[which]), classes.next_token[which]


def count_tokens(tokens: ArrayLike, vocab_size: int, dtype: Any = None) -> Contexts:
    """Sequences as `Contexts`: the last token is the query, those before it are counted.

    Args:
        tokens: integers in 0, ..., vocab_size - 1, shape (B, T) with T >= 2.
        vocab_size: size of the vocabulary M.
        dtype: floating dtype of the counts; JAX's default where None.

    Returns:
        The contexts, with counts of shape (B, M); NaN where a traced token lies outside of the vocabulary.

    Raises:
        ValueError: the shape does not fit, or a token lies outside of the vocabulary and can be looked at.

    Example:
        >>> count_tokens([[0, 1, 1, 2]], vocab_size=3).counts.tolist()
        [[1.0, 2.0, 0.0]]
    """
    tokens = require_sequences(tokens, vocab_size)
    dtype = require_dtype(dtype)
    context = tokens[:, :-1]
    known = jnp.all((context >= 0) & (context < vocab_size), axis=1, keepdims=True)
    return Contexts(nan_unless(known, _count(context, vocab_size, dtype)), tokens[:, -1])


def require_sequences(tokens: ArrayLike, vocab_size: int) -> Int[Array, "B T"]:
    """Sequences as an array, or `ValueError` unless they are tokens of the vocabulary (B, T) with T >= 2."""
    tokens = require_indices("tokens", tokens, vocab_size)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must have shape (B, T) with T >= 2, got shape {tokens.shape}")
    return tokens


def population_contexts(classes: SequenceClasses) -> tuple[Contexts, Int[Array, " K"]]:
    """One infinitely long sequence of each class: probabilities in place of counts.

    Example:
        >>> contexts, next_token = population_contexts(synthetic_classes(2))
        >>> contexts.counts.shape, next_token.tolist()
        ((2, 34), [32, 33])
    """
    return Contexts(classes.P, classes.query), classes.next_token


def _require_sizes(length: Any, batch: int) -> None:
    for name, size, least in (("length", length, 2), ("batch", batch, 1)):
        whole = np.ndim(size) == 0 and np.issubdtype(np.asarray(size).dtype, np.integer)
        if not whole or np.asarray(size) < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {size!r}")


def _sample_context(key: Array, classes: SequenceClasses, length: int, batch: int) -> tuple[Array, Array]:
    """Classes (B,) and context tokens (B, T - 1), by the inverse CDF: a categorical sampler is far slower."""
    key_class, key_token = jax.random.split(key)
    which = jax.random.randint(key_class, (batch,), 0, classes.num_classes)
    cdf = jnp.cumsum(classes.P, axis=1)
    # The last entry is exactly one and uniforms are below it: a token of probability zero is never drawn.
    cdf = (cdf / cdf[:, -1:])[which]
    drawn = uniform(key_token, (batch, length - 1), cdf.dtype)
    tokens = jax.vmap(lambda row, u: jnp.searchsorted(row, u, side="right"))(cdf, drawn)
    return which, jnp.where(jnp.isfinite(cdf[:, -1:]), tokens, -1)


def _count(tokens: Array, vocab_size: int, dtype: Any) -> Array:
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocab_size), dtype).at[rows, tokens].add(1)
