"""LLaMA networks: their sizes, the shapes of their parameters, and their parts as functions.

Rotary positions, which keep no memory of their own, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dynamics.arguments import nan_unless, require_indices, rows
from models.galore import Stack

Size = Literal["60M", "130M", "350M", "1B", "7B"]
VOCABULARY = 32000


class Shape(NamedTuple):
    """A LLaMA model: sizes, and the rank that its gradients are projected to."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    rank: int


# Source: zhao2024galore, Table 2 and appendix C, where heads and layers of 1B are exchanged.
SHAPES: dict[Size, Shape] = {
    "60M": Shape(512, 1376, 8, 8, 128),
    "130M": Shape(768, 2048, 12, 12, 256),
    "350M": Shape(1024, 2736, 24, 16, 256),
    "1B": Shape(2048, 5461, 24, 32, 512),
    "7B": Shape(4096, 11008, 32, 32, 1024),
}


def param_shapes(shape: Shape, dtype: Any = jnp.bfloat16) -> Stack:
    """Shapes and dtypes of all parameters, the layers stacked; nothing is allocated.

    Example:
        >>> param_shapes(SHAPES["60M"]).layers["gate"].shape
        (8, 512, 1376)
    """
    d, f, depth = shape.hidden, shape.intermediate, shape.layers

    def array(*sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    layers = {
        "attention_norm": array(depth, d),
        **{name: array(depth, d, d) for name in ("query", "key", "value", "output")},
        "mlp_norm": array(depth, d),
        "gate": array(depth, d, f),
        "up": array(depth, d, f),
        "down": array(depth, f, d),
    }
    outer = {"embedding": array(VOCABULARY, d), "norm": array(d), "head": array(d, VOCABULARY)}
    return Stack(outer, layers)


def embed(outer: dict[str, Any], tokens: Int[Array, " T"]) -> Float[Array, "seen d"]:
    """Embeddings of all tokens of a sequence but the last: those that the next one is predicted from.

    They are NaN where a traced token lies outside of the vocabulary.

    Raises:
        ValueError: a token lies outside of the vocabulary and can be looked at.
    """
    embedding = outer["embedding"]
    return rows(embedding, require_indices("tokens", tokens, len(embedding))[:-1])


def block(layer: dict[str, Any], x: Float[Array, "T d"], heads: int) -> Float[Array, "T d"]:
    """A layer on one sequence: causal attention, and a gated perceptron.

    Example:
        >>> shapes = param_shapes(SHAPES["60M"]).layers
        >>> layer = {name: jnp.zeros(leaf.shape[1:]) for name, leaf in shapes.items()}
        >>> block(layer, jnp.ones((3, 512)), heads=8).shape
        (3, 512)
    """
    length = len(x)
    seen = _norm(x, layer["attention_norm"])
    query, key, value = (
        (seen @ layer[name]).reshape(length, heads, -1) for name in ("query", "key", "value")
    )
    logits = jnp.einsum("qhc,khc->hqk", query, key) / math.sqrt(query.shape[-1])
    past = jnp.tril(jnp.ones((length, length), bool))[None]
    attention = jax.nn.softmax(jnp.where(past, logits, jnp.finfo(logits.dtype).min), axis=-1)
    x = x + jnp.einsum("hqk,khc->qhc", attention, value).reshape(length, -1) @ layer["output"]
    seen = _norm(x, layer["mlp_norm"])
    return x + (jax.nn.silu(seen @ layer["gate"]) * (seen @ layer["up"])) @ layer["down"]


def next_token_loss(outer: dict[str, Any], x: Float[Array, "seen d"], tokens: Int[Array, " T"]) -> Array:
    """Mean cross-entropy of every next token, from the output of the last layer.

    It is NaN where a traced token lies outside of the vocabulary.

    Raises:
        ValueError: a token lies outside of the vocabulary and can be looked at.
    """
    logits = _norm(x, outer["norm"]) @ outer["head"]
    labels = require_indices("tokens", tokens, logits.shape[-1])[1:]
    loss = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
    # A negative label would be counted from the end, and derivatives do not see one beyond it.
    return nan_unless(jnp.all((labels >= 0) & (labels < logits.shape[-1])), loss)


def joint_step(optimizer: optax.GradientTransformation, heads: int) -> Callable[..., tuple[Any, Any, Array]]:
    """The ordinary training step `(params, state, tokens)`; within layers, activations are computed again."""
    recomputed = jax.checkpoint(partial(block, heads=heads))

    def loss(params, tokens):
        start = embed(params.outer, tokens)
        x, _ = jax.lax.scan(lambda x, layer: (recomputed(layer, x), None), start, params.layers)
        return next_token_loss(params.outer, x, tokens)

    def step(params, state, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def _norm(x: Array, gain: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * gain[None, :]
