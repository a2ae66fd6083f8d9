"""The network of Scan and Snap: softmax attention with the last token as query, normalization, a decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_real,
    one_hot,
    require_dtype,
    require_every,
    require_indices,
    require_shapes,
    require_sizes,
    rows,
)
from dynamics.scan_snap import SequenceClasses, Weights
from models.data.tokens import Contexts, population_contexts, require_sequences
from models.draws import uniform
from models.functional import as_function
from models.losses import bind, cross_entropy


class ScanSnapAttention(nnx.Module):
    r"""One attention layer over the context, queried by the last token, and a decoder of the next token.

    With attention a_t = softmax_t(Z[x_T, x_t]) over the context t < T, the last token itself left out,

        b = sum_t a_t onehot(x_t),   f = b / |b|,   logits = Y^T f.

    Source: tian2023scan, section 2.

    Attributes:
        Y: decoder [context token, next token], shape (M, M), trained.
        Z: attention logits [query, context token], shape (M, M), trained.

    Example:
        >>> model = ScanSnapAttention(2 * jnp.eye(3), jnp.zeros((3, 3)))
        >>> model.of_tokens([[0, 0, 2]]).tolist()
        [[2.0, 0.0, 0.0]]
    """

    def __init__(self, Y: ArrayLike, Z: ArrayLike):
        """Build the model from its weights.

        Raises:
            ValueError: the weights are not two square matrices of one size.
        """
        Y, Z = as_real("Y", Y), as_real("Z", Z)
        require_shapes(Y=(Y, "M M"), Z=(Z, "M M"))
        self.Y, self.Z = nnx.Param(Y), nnx.Param(Z)

    @classmethod
    def zeros(cls, vocab_size: int, dtype: Any = None) -> ScanSnapAttention:
        """The model of zero weights, from which the theory starts.

        Example:
            >>> ScanSnapAttention.zeros(3).of_tokens([[0, 1, 2]]).tolist()
            [[0.0, 0.0, 0.0]]
        """
        (M,) = require_sizes(vocab_size=vocab_size)
        return cls(jnp.zeros((M, M), dtype), jnp.zeros((M, M), dtype))

    @classmethod
    def uniform(cls, key: Array, vocab_size: int, dtype: Any = None) -> ScanSnapAttention:
        """Weights independent and uniform in [-1, 1] / sqrt(M), as the source's Figure 6 starts.

        Example:
            >>> bool(jnp.max(jnp.abs(ScanSnapAttention.uniform(jax.random.key(0), 4).Y[...])) < 0.5)
            True
        """
        (M,) = require_sizes(vocab_size=vocab_size)
        return cls(*uniform(key, (2, M, M), require_dtype(dtype), -(M**-0.5), M**-0.5))

    def __call__(self, contexts: Contexts) -> Array:
        """Logits (..., M) of the next token from counts: what occurs N times gets N shares.

        They are NaN where a traced query or count is out of range.

        Raises:
            ValueError: the shapes do not fit; a query lies outside of the vocabulary, or a count is negative,
                and can be looked at.
        """
        Z = self.Z[...]
        query, counts = require_indices("query", contexts.query, len(Z)), as_real("counts", contexts.counts)
        if counts.shape != (*query.shape, len(Z)):
            shapes = f"{counts.shape} and {query.shape}"
            raise ValueError(f"counts and query must have shapes (..., {len(Z)}) and (...), got {shapes}")
        counts, z = require_every("counts", counts, lambda n: n >= 0, ">= 0"), rows(Z, query)
        # Only tokens that occur set the scale: it cancels, and without it those that occur may underflow.
        occurs = counts != 0
        top = jnp.max(z, axis=-1, keepdims=True, where=occurs, initial=-jnp.inf)
        return self._decode(counts * jnp.exp(jnp.where(occurs, z - jax.lax.stop_gradient(top), 0)))

    def of_tokens(self, tokens: ArrayLike) -> Array:
        """Logits (B, M) of the next token, position by position, for sequences (B, T) with T >= 2.

        They are NaN where a traced token lies outside of the vocabulary.

        Raises:
            ValueError: the shape does not fit; a token lies outside of the vocabulary and can be looked at.
        """
        Z = self.Z[...]
        tokens = require_sequences(tokens, len(Z))
        context, query = tokens[:, :-1], tokens[:, -1]
        logits = jnp.take_along_axis(rows(Z, query), context, axis=-1, mode="clip")
        shares = one_hot(context, len(Z), logits.dtype)
        return self._decode(jnp.einsum("bt,btl->bl", jax.nn.softmax(logits, axis=-1), shares))

    def _decode(self, b: Array) -> Array:
        # Attention is scaled before it is squared: counts may be small probabilities.
        peak = jax.lax.stop_gradient(jnp.max(b, axis=-1, keepdims=True))
        b = b / jnp.where(peak == 0, 1, peak)
        square = jnp.sum(b**2, axis=-1, keepdims=True)
        # Nothing to attend to gives zero logits, and a gradient of zero.
        f = jnp.where(square == 0, 0, b / jnp.sqrt(jnp.where(square == 0, 1, square)))
        return f @ self.Y[...]


def observe_weights(params: PyTree) -> Weights:
    """The trained parameters of a `ScanSnapAttention` in the theory's coordinates, for `observe`."""
    return Weights(params["Y"][...], params["Z"][...])


def population_loss(classes: SequenceClasses) -> tuple[Partial, PyTree]:
    """The loss on infinitely long contexts as a function of the parameters, and the zero parameters.

    Example:
        >>> loss, params = population_loss(SequenceClasses([[0.5, 0.5]], query=[0], next_token=[1]))
        >>> round(float(loss(params)), 6)  # ln 2
        0.693147
    """
    predict, params = as_function(ScanSnapAttention.zeros(classes.vocab_size))
    return bind(cross_entropy, (predict, *population_contexts(classes))), params
