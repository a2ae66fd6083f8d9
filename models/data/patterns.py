"""Patterns of tokens on disjoint locations, some of which a pattern leaves free, and views of samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dynamics.arguments import ArrayLike, require_indices, require_shapes, require_sizes
from models.draws import uniform

FREE = -1
"""What a pattern has at a location where it says nothing."""


def located_patterns(
    key: Array, count: int, locations: int, *, fixed: int, vocabulary: int, per_location: int
) -> Int[Array, "count locations"]:
    r"""Random patterns: each has tokens at some of the locations, and leaves the others free.

    At each location patterns have tokens of a subset of the vocabulary alone, which is drawn for it.

    Source: tian2023nonlinear, Section 5 and its public code.

    Args:
        key: PRNG key.
        count: number of patterns.
        locations: K.
        fixed: locations at which a pattern has a token, at most K.
        vocabulary: number of tokens V.
        per_location: tokens that patterns may have at one location, at most V.

    Returns:
        The tokens, (count, K), and -1 where a pattern is free.

    Raises:
        ValueError: a size is no positive integer or is too large.

    Example:
        >>> patterns = located_patterns(jax.random.key(0), 4, 3, fixed=2, vocabulary=5, per_location=2)
        >>> jnp.sum(patterns >= 0, axis=1).tolist()
        [2, 2, 2, 2]
    """
    count, locations = require_sizes(count=count, locations=locations)
    fixed, vocabulary, per_location = require_sizes(
        fixed=fixed, vocabulary=vocabulary, per_location=per_location
    )
    if fixed > locations:
        raise ValueError(f"fixed must be at most the {locations} locations, got {fixed}")
    if per_location > vocabulary:
        raise ValueError(f"per_location must be at most the vocabulary of {vocabulary}, got {per_location}")
    of_subset, of_place, of_token = jax.random.split(key, 3)
    subsets = _orders(of_subset, locations, vocabulary)[:, :per_location]
    # Tokens are drawn in one row: to draw them as they are compiles for seconds.
    which = jax.random.randint(of_token, (count * locations,), 0, per_location).reshape(count, locations)
    tokens = subsets[jnp.arange(locations)[None], which]
    return jnp.where(_orders(of_place, count, locations) < fixed, tokens, FREE)


def _orders(key: Array, count: int, size: int) -> Array:
    """Random permutations, (count, size); one sort compiles in less time than those of `jax.random`."""
    return jnp.argsort(uniform(key, (count, size)), axis=1)


def pattern_views(
    key: Array, patterns: ArrayLike, size: int, vocabulary: int
) -> tuple[Int[Array, "size K"], Int[Array, "size K"]]:
    r"""Two views of samples of patterns: both have the pattern's tokens, and any others where it is free.

    Every pattern is equally likely; tokens at free locations are drawn from the whole vocabulary, for each
    view anew.

    Source: tian2023nonlinear, Section 5 and its public code.

    Args:
        key: PRNG key.
        patterns: tokens, (G, K), and -1 where a pattern is free.
        size: number of samples.
        vocabulary: number of tokens V.

    Returns:
        The tokens of one view and of the other, (size, K) each.

    Raises:
        ValueError: the patterns are no integers (G, K) from -1 to V - 1, as far as can be looked at, or a
            size is no positive integer.

    Example:
        >>> first, second = pattern_views(jax.random.key(0), [[3, -1]], 2, vocabulary=4)
        >>> first[:, 0].tolist(), second[:, 0].tolist(), first.shape
        ([3, 3], [3, 3], (2, 2))
    """
    size, vocabulary = require_sizes(size=size, vocabulary=vocabulary)
    known = _require_patterns(patterns, vocabulary)
    locations = known.shape[1]
    of_pattern, of_token = jax.random.split(key)
    shown = known[jax.random.randint(of_pattern, (size,), 0, len(known))]
    drawn = jax.random.randint(of_token, (2 * size * locations,), 0, vocabulary)
    one, other = drawn.reshape(2, size, locations)
    return jnp.where(shown == FREE, one, shown), jnp.where(shown == FREE, other, shown)


def tokens_of_patterns(patterns: ArrayLike, vocabulary: int) -> Bool[Array, "K V"]:
    """Whether some pattern has a token at a location.

    Args:
        patterns: tokens, (G, K), and -1 where a pattern is free.
        vocabulary: number of tokens V.

    Raises:
        ValueError: the patterns are no integers (G, K) from -1 to V - 1, as far as can be looked at, or the
            vocabulary is no positive integer.

    Example:
        >>> tokens_of_patterns([[0, -1], [1, -1]], 2).tolist()
        [[True, True], [False, False]]
    """
    (vocabulary,) = require_sizes(vocabulary=vocabulary)
    known = _require_patterns(patterns, vocabulary)
    return jnp.any(known[:, :, None] == jnp.arange(vocabulary)[None, None], axis=0)


def _require_patterns(patterns: ArrayLike, vocabulary: int) -> Array:
    known = require_indices("patterns", patterns, vocabulary, least=FREE)
    require_shapes(patterns=(known, "G K"))
    return known
