"""Attention maps of JoMA and what joint training of MLP and attention conserves."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    require_choice,
    require_every,
    require_number,
    require_positive,
    require_shape,
    require_shapes,
)

Kind = Literal["linear", "exp", "softmax"]


def attend(z: ArrayLike, x: ArrayLike, kind: Kind | str, temperature: ArrayLike = 1.0) -> Array:
    r"""Attention b over the tokens of a context x with logits z.

    linear: b = x * z / temperature; exp: b = x * exp(z / temperature); softmax: that over its sum.

    Source: tian2024joma, section 3.

    Args:
        z: attention logits, shape (M,) or the shape of `x`.
        x: how often each token occurs, shape (..., M), not negative.
        kind: "linear", "exp" or "softmax".
        temperature: a positive number.

    Returns:
        b, the shape of `x`. Softmax is over the tokens that occur, and zero where none does. NaN where a
        traced count or temperature is out of range.

    Raises:
        ValueError: the kind is unknown, the shapes do not fit, or the temperature is not positive or `x` is
            negative and can be looked at.

    Example:
        >>> attend([1000.0, 1000.0, 9999.0], [1.0, 3.0, 0.0], "softmax").tolist()
        [0.25, 0.75, 0.0]
    """
    z, x = as_real("z", z), as_real("x", x)
    require_choice("kind", kind, get_args(Kind))
    if x.ndim < 1 or x.size == 0 or z.shape not in (x.shape[-1:], x.shape):
        raise ValueError(
            f"z and x must have shapes (M,) or (..., M), and (..., M), got {z.shape} and {x.shape}"
        )
    dtype = jnp.promote_types(z.dtype, x.dtype)
    temperature = require_positive("temperature", temperature, dtype)
    x = require_every("x", x, lambda x: x >= 0, ">= 0").astype(dtype)
    z = jnp.broadcast_to(z.astype(dtype), x.shape) / temperature
    if kind == "linear":
        return x * z
    occurs = x != 0
    if kind == "exp":
        return x * jnp.exp(jnp.where(occurs, z, 0))
    # Tokens that do not occur have no say in the scale: what occurs must not underflow beside them.
    top = jnp.max(z, axis=-1, keepdims=True, where=occurs, initial=-jnp.inf)
    weights = x * jnp.exp(jnp.where(occurs, z - jax.lax.stop_gradient(top), 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def invariant(
    V: ArrayLike,
    z: ArrayLike,
    kind: Kind | str,
    *,
    learning_rate_w: ArrayLike = 1.0,
    learning_rate_z: ArrayLike = 1.0,
    mean_attention: ArrayLike | None = None,
) -> Float[Array, " M"]:
    r"""What training of hidden weights V and attention logits z leaves constant, token by token.

        linear:  z^2 / learning_rate_z - sum_k v_k^2 / learning_rate_w
        exp:     z / learning_rate_z - (1/2) sum_k v_k^2 / learning_rate_w
        softmax: the same + (1/2) |V|^2 mean_attention / learning_rate_w

    The first two are exact along the gradient flow, for any data, activation, loss and upper layers; gradient
    descent breaks them at first order in the learning rate. The third also needs that attention does not
    correlate with the upstream gradient, and that its mean stays; elsewhere it gives the direction of z, not
    its size. The printed forms have equal learning rates.

    Source: tian2024joma, Theorem 1, weighted by the learning rates.

    Args:
        V: hidden weights seen through the embeddings, V = U_C^T W, shape (M, K).
        z: attention logits of the query, shape (M,).
        kind: "linear", "exp" or "softmax".
        learning_rate_w: learning rate of the hidden weights, positive.
        learning_rate_z: learning rate of the attention logits, positive.
        mean_attention: mean of b over the query's samples, shape (M,); for "softmax" only.

    Returns:
        The conserved vector, shape (M,); NaN where a traced rate is not positive.

    Raises:
        ValueError: the kind is unknown, the shapes do not fit, a rate is not positive, or `mean_attention` is
            missing for "softmax" or given elsewhere.

    Example:
        >>> invariant([[2.0], [0.0]], [2.0, 1.0], "exp").tolist()
        [0.0, 1.0]
    """
    V, z = as_real("V", V), as_real("z", z)
    require_choice("kind", kind, get_args(Kind))
    require_shapes(V=(V, "M K"), z=(z, "M"))
    if (mean_attention is None) == (kind == "softmax"):
        raise ValueError("mean_attention must be given for softmax attention, and only there")
    dtype = jnp.promote_types(V.dtype, z.dtype)
    rate_w = require_positive("learning_rate_w", learning_rate_w, dtype)
    rate_z = require_positive("learning_rate_z", learning_rate_z, dtype)
    square = jnp.sum(V.astype(dtype) ** 2, axis=-1)
    z = z.astype(dtype)
    if kind == "linear":
        return z**2 / rate_z - square / rate_w
    conserved = z / rate_z - square / (2 * rate_w)
    if mean_attention is None:
        return conserved
    mean_attention = as_real("mean_attention", mean_attention).astype(dtype)
    require_shape("mean_attention", mean_attention, z.shape)
    return conserved + jnp.sum(square) * mean_attention / (2 * rate_w)


def softmax_logits(
    V: ArrayLike, mean_attention: ArrayLike, z0: ArrayLike, rate_ratio: ArrayLike = 1.0
) -> Float[Array, "T M"]:
    r"""Softmax attention logits from the hidden weights alone, with a mean attention that moves.

        z' = (learning_rate_z / learning_rate_w) sum_k (v_k * v_k' - mean_attention(t) <v_k, v_k'>)

    summed along a recorded path by the trapezoidal rule. With a constant mean it is `invariant`. It is exact
    where every sample of the query has the same attention.

    Source: tian2024joma, proof of Theorem 1 (before the mean attention is taken to be constant).

    Args:
        V: hidden weights along the path, shape (T, M, K).
        mean_attention: mean of b over the query's samples along the path, shape (T, M).
        z0: logits at its start, shape (M,).
        rate_ratio: learning_rate_z / learning_rate_w, a number >= 0.

    Returns:
        Logits along the path, shape (T, M); NaN where a traced `rate_ratio` is negative.

    Raises:
        ValueError: the shapes do not fit, or `rate_ratio` is negative and can be looked at.

    Example:
        >>> V = jnp.array([[[0.0], [0.0]], [[2.0], [0.0]]])
        >>> softmax_logits(V, jnp.full((2, 2), 0.5), jnp.zeros(2))[-1].tolist()
        [1.0, -1.0]
    """
    V, mean, z0 = as_real("V", V), as_real("mean_attention", mean_attention), as_real("z0", z0)
    require_shapes(V=(V, "T M K"), mean_attention=(mean, "T M"), z0=(z0, "M"))
    rate_ratio = require_number("rate_ratio", rate_ratio, V.dtype, at_least=0)
    half_square = jnp.sum(V**2, axis=-1) / 2
    grown = jnp.diff(half_square, axis=0)
    midway = (mean[1:] + mean[:-1]) / 2
    steps = rate_ratio * (grown - midway * jnp.sum(grown, axis=1, keepdims=True))
    return jnp.concatenate([z0[None], z0[None] + jnp.cumsum(steps, axis=0)])


def saliency(gradient: ArrayLike, x: ArrayLike) -> Array:
    r"""Saliency Delta_l = E[g x_l] of every token: what drives its hidden weight before attention acts.

    For one-hot averaged x it is E[g | l, m] P[l | m]: discriminative times frequent. Common tokens, whose
    upstream gradients cancel, have none.

    Source: tian2024joma, section 4.

    Args:
        gradient: upstream gradient (of the negative loss) of each sample, shape (S,), or (S, K) for K hidden
            nodes.
        x: contexts of the samples, shape (S, M).

    Returns:
        Delta, shape (M,) or (M, K).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> saliency([1.0, -1.0], [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]).tolist()
        [0.0, 0.25, -0.25]
    """
    gradient, x = as_real("gradient", gradient), as_real("x", x)
    if x.ndim != 2 or gradient.ndim not in (1, 2) or len(gradient) != len(x) or 0 in (x.size, gradient.size):
        raise ValueError(
            f"gradient and x must have shapes (S,) or (S, K), and (S, M), got {gradient.shape} and {x.shape}"
        )
    dtype = jnp.promote_types(gradient.dtype, x.dtype)
    return x.astype(dtype).T @ gradient.astype(dtype) / len(x)
