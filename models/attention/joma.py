"""The block of JoMA: attention over context tokens, a residual, and a hidden layer below anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    require_choice,
    require_dtype,
    require_indices,
    require_number,
    require_positive,
    require_shapes,
    require_sizes,
    rows,
)
from dynamics.joma import Kind, attend
from models.draws import normal
from models.functional import Frozen


class JomaInputs(NamedTuple):
    """Inputs of a `JomaBlock`.

    Attributes:
        x: how often each context token occurs, shape (B, M), not negative.
        query: which query each sample has, integers in 0, ..., Q - 1, shape (B,).
    """

    x: Array
    query: Array


class JomaState(NamedTuple):
    """A `JomaBlock` in the theory's coordinates.

    Attributes:
        V: hidden weights seen through the embeddings of the context tokens, U_C^T W, shape (M, K).
        z: attention logits [query, context token], shape (Q, M).
    """

    V: Array
    z: Array


class JomaBlock(nnx.Module):
    r"""One attention layer, a residual, a hidden layer: h = phi(W^T (U_C b + u_q)), b = attend(z_q, x).

    Trained are the hidden weights W, the attention logits z, and whatever the layers above hold; the
    embeddings are frozen.

    Source: tian2024joma, section 3.

    Attributes:
        embedding: U_C, embeddings of the context tokens, shape (d, M), `Frozen`.
        query_embedding: u_q of every query, shape (d, Q), `Frozen`.
        W: hidden weights, shape (d, K), trained.
        z: attention logits [query, context token], shape (Q, M), trained.
        head: the layers above, a function of h (B, K), trained where it is a module; None for h itself.

    Example:
        >>> U = jnp.eye(3)
        >>> block = JomaBlock(U[:, :2], U[:, 2:], jnp.ones((3, 1)), jnp.zeros((1, 2)), kind="softmax")
        >>> block(JomaInputs(jnp.array([[1.0, 3.0]]), jnp.array([0]))).tolist()
        [[2.0]]
    """

    def __init__(
        self,
        embedding: ArrayLike,
        query_embedding: ArrayLike,
        W: ArrayLike,
        z: ArrayLike,
        *,
        kind: Kind | str | Callable[[Array, Array], Array],
        activation: Callable[[Array], Array] = jax.nn.relu,
        temperature: int | float = 1.0,
        head: Callable[[Array], Array] | None = None,
    ):
        """Build the block from its arrays.

        Args:
            embedding: U_C, shape (d, M).
            query_embedding: u_q of every query, shape (d, Q).
            W: hidden weights, shape (d, K).
            z: attention logits, shape (Q, M).
            kind: "linear", "exp" or "softmax", or attention as a function of logits and x, (B, M) each.
            activation: phi, elementwise.
            temperature: divides z.
            head: the layers above, such as an nnx.Linear or nnx.Sequential.

        Raises:
            ValueError: the shapes do not fit, the kind is unknown, or the temperature is not positive; or
                attention is linear and the logits of a query are all zero: it sees nothing and, from zero
                hidden weights, never learns.
        """
        given = {"embedding": embedding, "query_embedding": query_embedding, "W": W, "z": z}
        embedding, query_embedding, W, z = (as_real(name, array) for name, array in given.items())
        embeddings = {"embedding": (embedding, "d M"), "query_embedding": (query_embedding, "d Q")}
        require_shapes(**embeddings, W=(W, "d K"), z=(z, "Q M"))
        require_positive("temperature", temperature, z.dtype)
        if not callable(kind):
            require_choice("kind", kind, get_args(Kind))
        seen = as_concrete(z)
        if kind == "linear" and seen is not None and not np.all(np.any(seen != 0, axis=1)):
            raise ValueError(
                "z must not be zero for linear attention: no token is seen, and from zero hidden weights, a "
                "dead saddle, nothing is ever learned; start from one"
            )
        self.embedding, self.query_embedding = Frozen(embedding), Frozen(query_embedding)
        self.W, self.z = nnx.Param(W), nnx.Param(z)
        self.kind, self.activation, self.temperature, self.head = kind, activation, temperature, head

    @classmethod
    def standard(
        cls,
        key: Array,
        tokens: int,
        hidden: int,
        *,
        kind: Kind | str,
        queries: int = 1,
        dim: int | None = None,
        scale: float = 0.01,
        activation: Callable[[Array], Array] = jax.nn.relu,
        temperature: int | float = 1.0,
        head: Callable[[Array], Array] | None = None,
        dtype: Any = None,
    ) -> JomaBlock:
        """Orthonormal embeddings, hidden weights N(0, scale^2), logits zero, or one for linear attention.

        Args:
            key: PRNG key.
            tokens: number of context tokens M.
            hidden: number of hidden nodes K.
            kind: "linear", "exp" or "softmax".
            queries: number of queries Q.
            dim: embedding dimension d, at least M + Q; that where None.
            scale: standard deviation of the hidden weights; zero gives the theory's zero start.
            activation: phi, elementwise.
            temperature: divides the logits.
            head: the layers above.
            dtype: floating dtype; JAX's default where None.

        Returns:
            The block.

        Raises:
            ValueError: a size is not a positive integer, `scale` is negative, or `dim` is too small for
                orthonormal embeddings.

        Example:
            >>> block = JomaBlock.standard(jax.random.key(0), tokens=3, hidden=2, kind="exp")
            >>> block.embedding.shape, block.W.shape, block.z.shape
            ((4, 3), (4, 2), (1, 3))
        """
        require_sizes(tokens=tokens, hidden=hidden, queries=queries)
        dim = tokens + queries if dim is None else require_sizes(dim=dim)[0]
        if dim < tokens + queries:
            raise ValueError(f"dim must be at least tokens + queries = {tokens + queries}, got {dim}")
        key_embedding, key_weights = jax.random.split(key)
        U = jax.random.orthogonal(key_embedding, dim, dtype=require_dtype(dtype))
        W = require_number("scale", scale, U.dtype, at_least=0) * normal(key_weights, (dim, hidden), U.dtype)
        z = jnp.full((queries, tokens), float(kind == "linear"), U.dtype)
        return cls(
            U[:, :tokens],
            U[:, tokens : tokens + queries],
            W,
            z,
            kind=kind,
            activation=activation,
            temperature=temperature,
            head=head,
        )

    def attention(self, inputs: JomaInputs) -> Array:
        """Attention b, shape (B, M); NaN where a traced query does not exist."""
        z = rows(self.z[...], self._query(inputs))
        if callable(self.kind):
            return self.kind(z / require_positive("temperature", self.temperature, z.dtype), inputs.x)
        return attend(z, inputs.x, self.kind, self.temperature)

    def hidden(self, inputs: JomaInputs) -> Array:
        """Hidden activations h = phi(W^T (U_C b + u_q)), shape (B, K)."""
        # A query that does not exist has made its attention NaN.
        features = self.attention(inputs) @ self.embedding[...].T + self.query_embedding[...].T[inputs.query]
        return self.activation(features @ self.W[...])

    def _query(self, inputs: JomaInputs) -> Array:
        query = require_indices("query", inputs.query, len(self.z[...]))
        if np.shape(inputs.x) != (*query.shape, self.z.shape[-1]):
            shapes = f"{np.shape(inputs.x)} and {query.shape}"
            raise ValueError(
                f"x and query must have shapes (..., {self.z.shape[-1]}) and (...), got {shapes}"
            )
        return query

    def __call__(self, inputs: JomaInputs) -> Array:
        """What the layers above make of h; h itself where there are none."""
        hidden = self.hidden(inputs)
        return hidden if self.head is None else self.head(hidden)


def joma_observer(block: JomaBlock) -> Callable[[PyTree], JomaState]:
    """A function that brings the block's trained parameters into the theory's coordinates, for `observe`.

    Example:
        >>> block = JomaBlock.standard(jax.random.key(0), tokens=3, hidden=2, kind="exp")
        >>> joma_observer(block)(nnx.split(block, nnx.Param, ...)[1]).V.shape
        (3, 2)
    """
    return jax.tree_util.Partial(_observe, block.embedding[...])


def _observe(embedding: Array, params: PyTree) -> JomaState:
    return JomaState(embedding.T @ params["W"][...], params["z"][...])
