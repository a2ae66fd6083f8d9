"""Sequence classes: which tokens go before a next token, and what attention makes of them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    is_traced,
    nan_unless,
    require_every,
    require_indices,
    require_shape,
)


class SequenceClasses(eqx.Module):
    r"""K classes of sequences: a last token, a next token, and the law of the tokens in between.

    A sequence of class n holds context tokens l drawn independently from P(l | n), ends with the last token
    (the query) m = psi(n), and is followed by the next token. All classes are equally likely. Several
    classes may share a query. It is a pytree: it jits, vmaps and differentiates.

    Source: tian2023scan, section 2.

    Attributes:
        P: P(l | n), shape (K, M): probabilities of the M tokens of the vocabulary; each row sums to one.
        query: last token of each class, shape (K,), integers in 0, ..., M - 1.
        next_token: next token of each class, shape (K,), integers in 0, ..., M - 1.

    Raises:
        ValueError: a shape does not fit, a row of P is no distribution, a token is not in the vocabulary.
            Where that is traced, P of the class is NaN.

    Example:
        >>> SequenceClasses(P=[[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], query=[1, 2], next_token=[1, 2]).vocab_size
        3
    """

    # The fields are arrays, except while JAX takes the pytree apart.
    P: Array | Any
    query: Array | Any
    next_token: Array | Any

    def __init__(self, P: ArrayLike, query: ArrayLike, next_token: ArrayLike):
        """Build the classes from their arrays."""
        law = as_real("P", P)
        if law.ndim != 2 or law.shape[0] < 1 or law.shape[1] < 2:
            raise ValueError(f"P must have shape (K, M) with K >= 1 and M >= 2, got shape {law.shape}")
        K, M = law.shape
        law = require_every("P", law, lambda p: (p >= 0) & (p < np.inf), "finite and >= 0")
        law = _require_sums(law)
        for name, tokens in (("query", query), ("next_token", next_token)):
            tokens = require_indices(name, tokens, M)
            require_shape(name, tokens, (K,))
            if is_traced(tokens):
                law = nan_unless(((tokens >= 0) & (tokens < M))[:, None], law)
            setattr(self, name, tokens)
        self.P = law

    @property
    def num_classes(self) -> int:
        """Number of sequence classes K."""
        return self.P.shape[-2]

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary M."""
        return self.P.shape[-1]


def _require_sums(P: Array) -> Array:
    """P, whose rows sum to one up to rounding of M numbers, or of probabilities with few digits."""
    tolerance = 1e-6 + P.shape[1] * float(jnp.finfo(P.dtype).eps)
    values = as_concrete(P)
    if values is None:
        return nan_unless(jnp.abs(jnp.sum(P, axis=1, keepdims=True) - 1) <= tolerance, P)
    sums = values.sum(axis=1, dtype=float)
    row = int(np.argmax(np.abs(sums - 1)))
    if abs(sums[row] - 1) > tolerance:
        raise ValueError(f"P must have rows that sum to 1, got {sums[row]:.6g} in row {row}")
    return P


@jax.jit
def distinct_tokens(classes: SequenceClasses) -> Bool[Array, "K M"]:
    r"""Which tokens are distinct for a class: P(l | n) > 0 for it and for no other class.

    Source: tian2023scan, section 3.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], [1, 2], [1, 2])
        >>> distinct_tokens(classes).astype(int).tolist()
        [[0, 1, 0], [0, 0, 1]]
    """
    occurs = classes.P > 0
    return occurs & (jnp.sum(occurs, axis=0, keepdims=True) == 1)


@jax.jit
def common_tokens(classes: SequenceClasses) -> Bool[Array, " M"]:
    r"""Which tokens are common: P(l | n) > 0 for several classes n.

    Source: tian2023scan, section 3.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], [1, 2], [1, 2])
        >>> common_tokens(classes).tolist()
        [True, False, False]
    """
    return jnp.sum(classes.P > 0, axis=0) > 1


def context_distribution(Z: ArrayLike, classes: SequenceClasses) -> Float[Array, "K M"]:
    r"""Attention over a class's tokens, infinitely long contexts: c_n = softmax(log P(. | n) + z_psi(n)).

    Tokens that do not occur in a class get exactly zero.

    Source: tian2023scan, Lemma 2.

    Args:
        Z: attention logits [query, context token], shape (M, M).
        classes: the sequence classes.

    Returns:
        c, shape (K, M), each row of sum one.

    Raises:
        ValueError: `Z` has the wrong shape.

    Example:
        >>> classes = SequenceClasses([[0.75, 0.25]], query=[0], next_token=[1])
        >>> context_distribution(jnp.zeros((2, 2)), classes).round(6).tolist()
        [[0.75, 0.25]]
    """
    return jax.nn.softmax(log_context_weights(Z, classes), axis=-1)


def log_context_weights(Z: ArrayLike, classes: SequenceClasses) -> Float[Array, "K M"]:
    r"""Unnormalized attention log P(l | n) + z_ml, m = psi(n); minus infinity where a token does not occur.

    Source: tian2023scan, section 4 (the logarithm of its c tilde, which underflows for suppressed tokens).

    Args:
        Z: attention logits [query, context token], shape (M, M).
        classes: the sequence classes.

    Returns:
        Logarithms, shape (K, M).

    Raises:
        ValueError: `Z` has the wrong shape.

    Example:
        >>> classes = SequenceClasses([[1.0, 0.0]], query=[0], next_token=[1])
        >>> log_context_weights(jnp.ones((2, 2)), classes).tolist()
        [[1.0, -inf]]
    """
    Z, M = as_real("Z", Z), classes.vocab_size
    require_shape("Z", Z, (M, M))
    dtype = jnp.promote_types(Z.dtype, classes.P.dtype)
    return log_counts(classes.P).astype(dtype) + Z[classes.query].astype(dtype)


def log_counts(counts: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logarithm of numbers >= 0 with a gradient of zero, rather than NaN, where they are zero; else NaN."""
    absent = counts == 0
    return jnp.where(absent, -jnp.inf, jnp.log(jnp.where(absent, 1, counts)))


def distinct_entropy(Z: ArrayLike, classes: SequenceClasses) -> Float[Array, " K"]:
    r"""Entropy of attention over the distinct tokens of each class alone, renormalized, in nats.

    It is what Figure 6 of the source shows, where "entropy of c_n" would suggest all tokens.

    Source: tian2023scan, Figure 6 (it does not say which tokens are meant; with these one gets its numbers).

    Args:
        Z: attention logits [query, context token], shape (M, M).
        classes: the sequence classes.

    Returns:
        Entropies, shape (K,); 0 for a class that has no distinct token.

    Raises:
        ValueError: `Z` has the wrong shape.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], [1, 2], [1, 2])
        >>> distinct_entropy(jnp.zeros((3, 3)), classes).tolist()
        [0.0, 0.0]
    """
    distinct = distinct_tokens(classes)
    has_distinct = jnp.any(distinct, axis=-1, keepdims=True)
    # A class without distinct tokens gets others: their entropy is thrown away, but must not be NaN.
    kept = (classes.P > 0) & (distinct | ~has_distinct)
    log_share = jax.nn.log_softmax(jnp.where(kept, log_context_weights(Z, classes), 0), axis=-1, where=kept)
    log_share = jnp.where(kept, log_share, 0)
    entropy = 0 - jnp.sum(jnp.exp(log_share) * log_share, axis=-1)
    # What is distinct for a class depends on all of them.
    return nan_unless(jnp.all(jnp.isfinite(classes.P)), jnp.where(has_distinct[:, 0], entropy, 0))
