"""The network of Scan and Snap: softmax attention with the last token as query, normalization, a decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from dynamics.arguments import require_shapes
from dynamics.flow import ArrayLike, as_inexact
from dynamics.scan_snap import SequenceClasses, Weights, require_tokens
from models.data.tokens import Contexts, population_contexts, require_sequences
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
        Y, Z = as_inexact(Y), as_inexact(Z)
        require_shapes(Y=(Y, "M M"), Z=(Z, "M M"))
        self.Y, self.Z = nnx.Param(Y), nnx.Param(Z)

    @classmethod
    def zeros(cls, vocab_size: int, dtype: Any = None) -> ScanSnapAttention:
        """The model of zero weights, from which the theory starts.

        Example:
            >>> ScanSnapAttention.zeros(3).of_tokens([[0, 1, 2]]).tolist()
            [[0.0, 0.0, 0.0]]
        """
        return cls(jnp.zeros((vocab_size, vocab_size), dtype), jnp.zeros((vocab_size, vocab_size), dtype))

    @classmethod
    def uniform(cls, key: Array, vocab_size: int, dtype: Any = None) -> ScanSnapAttention:
        """Weights independent and uniform in [-1, 1] / sqrt(M), as the source's Figure 6 starts.

        Example:
            >>> bool(jnp.max(jnp.abs(ScanSnapAttention.uniform(jax.random.key(0), 4).Y[...])) < 0.5)
            True
        """
        bound = vocab_size**-0.5
        dtype = jnp.result_type(float) if dtype is None else dtype
        Y, Z = jax.random.uniform(key, (2, vocab_size, vocab_size), dtype, -bound, bound)
        return cls(Y, Z)

    def __call__(self, contexts: Contexts) -> Array:
        """Logits (..., M) of the next token from counts: what occurs N times gets N shares.

        Raises:
            ValueError: the shapes do not fit, or a query lies outside of the vocabulary.
        """
        Z = self.Z[...]
        query = require_tokens("query", contexts.query, len(Z))
        if jnp.shape(contexts.counts) != (*query.shape, len(Z)):
            shapes = f"{jnp.shape(contexts.counts)} and {query.shape}"
            raise ValueError(f"counts and query must have shapes (..., {len(Z)}) and (...), got {shapes}")
        z = Z[query]
        # Only tokens that occur set the scale: it cancels, and without it those that occur may underflow.
        occurs = contexts.counts > 0
        top = jnp.max(z, axis=-1, keepdims=True, where=occurs, initial=-jnp.inf)
        return self._decode(contexts.counts * jnp.exp(jnp.where(occurs, z - jax.lax.stop_gradient(top), 0)))

    def of_tokens(self, tokens: ArrayLike) -> Array:
        """Logits (B, M) of the next token, position by position, for sequences (B, T) with T >= 2.

        Raises:
            ValueError: the shape does not fit, or a token lies outside of the vocabulary.
        """
        tokens = require_sequences(tokens, len(self.Z[...]))
        context, query = tokens[:, :-1], tokens[:, -1:]
        attention = jax.nn.softmax(self.Z[...][query, context], axis=-1)
        one_hot = jax.nn.one_hot(context, len(self.Y[...]), dtype=attention.dtype)
        return self._decode(jnp.einsum("bt,btl->bl", attention, one_hot))

    def _decode(self, b: Array) -> Array:
        square = jnp.sum(b**2, axis=-1, keepdims=True)
        # Nothing to attend to gives zero logits; the second `where` keeps its gradient from being NaN.
        f = jnp.where(square > 0, b / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
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
