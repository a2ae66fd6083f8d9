"""Sequence classes: which tokens go before a next token, and what attention makes of them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dynamics.arguments import require_real, require_shape
from dynamics.flow import ArrayLike, as_inexact, is_traced


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

    Example:
        >>> SequenceClasses(P=[[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], query=[1, 2], next_token=[1, 2]).vocab_size
        3
    """

    # The fields are arrays, except while JAX takes the pytree apart.
    P: Array | Any = eqx.field(converter=as_inexact)
    query: Array | Any = eqx.field(converter=jnp.asarray)
    next_token: Array | Any = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        P = self.P
        require_real("P", P)
        if P.ndim != 2 or P.shape[0] < 1 or P.shape[1] < 2:
            raise ValueError(f"P must have shape (K, M) with K >= 1 and M >= 2, got shape {P.shape}")
        if not is_traced(P):
            values = np.asarray(P, float)
            if not np.all(np.isfinite(values) & (values >= 0)):
                raise ValueError("P must hold finite numbers >= 0, got a negative or infinite one or NaN")
            # The tolerance allows rounding of M numbers, and probabilities written down with few digits.
            deviation = np.abs(values.sum(axis=1) - 1)
            if np.any(deviation > _sum_tolerance(P)):
                row = int(np.argmax(deviation))
                raise ValueError(f"P must have rows that sum to 1, got {values[row].sum():.6g} in row {row}")
        for name, tokens in (("query", self.query), ("next_token", self.next_token)):
            require_shape(name, tokens, P.shape[:1])
            require_tokens(name, tokens, P.shape[1])

    def are_valid(self) -> Bool[Array, ""]:
        """Whether the values are what is required: for classes that were traced when they were made."""
        sums = jnp.abs(jnp.sum(self.P, axis=1) - 1) <= _sum_tolerance(self.P)
        inside = [(tokens >= 0) & (tokens < self.vocab_size) for tokens in (self.query, self.next_token)]
        return jnp.all(self.P >= 0) & jnp.all(sums) & jnp.all(inside[0] & inside[1])

    @property
    def num_classes(self) -> int:
        """Number of sequence classes K."""
        return self.P.shape[-2]

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary M."""
        return self.P.shape[-1]


def _sum_tolerance(P: Array) -> float:
    return 1e-6 + P.shape[1] * float(jnp.finfo(P.dtype).eps)


def require_tokens(name: str, tokens: ArrayLike, vocab_size: int) -> Int[Array, "..."]:
    """Tokens as an array of integers, or `ValueError` unless they are 0 to vocab_size - 1 (if not traced)."""
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, got dtype {tokens.dtype}")
    if not is_traced(tokens):
        values = np.asarray(tokens)
        outside = values[(values < 0) | (values >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name} must hold tokens 0 to {vocab_size - 1}, got {outside[0]}")
    return tokens


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
    Z, M = as_inexact(Z), classes.vocab_size
    require_shape("Z", Z, (M, M))
    dtype = jnp.promote_types(Z.dtype, classes.P.dtype)
    return log_counts(classes.P).astype(dtype) + Z[classes.query].astype(dtype)


def log_counts(counts: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logarithm of numbers >= 0 with a gradient of zero, rather than NaN, where they are zero."""
    occurs = counts > 0
    return jnp.where(occurs, jnp.log(jnp.where(occurs, counts, 1)), -jnp.inf)


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
    return jnp.where(has_distinct[:, 0], entropy, 0)
