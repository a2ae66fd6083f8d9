"""Attention heads with trained weights, alone and stacked, and the same as functions of their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dynamics.arguments import (
    ArrayLike,
    as_real,
    require_same_shape,
    require_shape,
    require_shapes,
    require_sizes,
)
from models.attention.products import HEAD_WEIGHTS, require_weights
from models.functional import Frozen
from models.losses import mean_squared_error


class Feedforward(NamedTuple):
    """Frozen feed-forward weights of a stack: Z -> Z + phi(Z W_A) W_B^T in every layer.

    Attributes:
        up: W_A, (layers, d, m).
        down: W_B, (layers, d, m).
    """

    up: Array
    down: Array


def diagonal_head(kq: ArrayLike, vo: ArrayLike, X: ArrayLike) -> Array:
    r"""A head with diagonal weights as a function of its products: softmax(X diag(kq) X^T) X diag(vo).

    Source: boixadsera2023, Equation 1 and Example 3.2.

    Args:
        kq: diagonal of W_K W_Q^T, (d,).
        vo: diagonal of W_V W_O^T, (d,).
        X: tokens, (..., n, d).

    Returns:
        Outputs, (..., n, d).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> diagonal_head([0.0], [2.0], [[1.0], [3.0]]).tolist()  # no logits: the mean, doubled
        [[4.0], [4.0]]
    """
    kq, vo, X = as_real("kq", kq), as_real("vo", vo), as_real("X", X)
    require_shapes(kq=(kq, "d"), vo=(vo, "d"), X=(X, "... n d"))
    logits = jnp.einsum("...ad,d,...bd->...ab", X, kq, X)
    return jnp.einsum("...ab,...bd,d->...ad", _softmax(logits), X, vo)


def diagonal_head_loss(beta: ArrayLike, X: ArrayLike, Y: ArrayLike) -> Array:
    r"""Half the squared error of a sample, (1/2N) sum_i |f(X_i) - Y_i|^2, of `diagonal_head` on its products.

    Args:
        beta: the products in the order of `split_products`, kq and then vo, (2 d,).
        X: tokens, (N, n, d).
        Y: targets, alike.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> float(diagonal_head_loss([0.0, 2.0], [[[1.0], [3.0]]], [[[4.0], [6.0]]]))
        2.0
    """
    X, Y = as_real("X", X), as_real("Y", Y)
    require_same_shape("(N, n, d)", [3], X=X, Y=Y)
    return mean_squared_error(beta, (_diagonal_head, X, Y))


def _diagonal_head(beta: ArrayLike, X: Array) -> Array:
    kq, vo = split_products(beta, X.shape[-1])
    return diagonal_head(kq[0, 0], vo[0, 0], X)


def diagonal_stack(
    kq: ArrayLike,
    vo: ArrayLike,
    X: ArrayLike,
    feedforward: Feedforward | None = None,
    activation: Callable[[Array], Array] = jax.nn.gelu,
) -> Array:
    r"""Layers of several diagonal heads with residuals, as a function of their products.

        Z <- Z + sum_h head(Z; kq_h, vo_h),   then   Z <- Z + phi(Z W_A) W_B^T.

    Source: boixadsera2023, Example 3.2.

    Args:
        kq: diagonals of W_K W_Q^T, (layers, heads, d).
        vo: diagonals of W_V W_O^T, (layers, heads, d).
        X: tokens, (..., n, d).
        feedforward: the frozen weights between the layers; no such layers where None.
        activation: phi, smooth.

    Returns:
        Outputs Z, (..., n, d).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> diagonal_stack(jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1)), [[1.0], [3.0]]).tolist()
        [[5.0], [7.0]]
    """
    kq, vo, Z = as_real("kq", kq), as_real("vo", vo), as_real("X", X)
    require_shapes(kq=(kq, "layers heads d"), vo=(vo, "layers heads d"), X=(Z, "... n d"))
    if feedforward is not None:
        feedforward = _require_feedforward(feedforward, kq.shape[0], kq.shape[2])
    for layer in range(kq.shape[0]):
        heads = jax.vmap(diagonal_head, in_axes=(0, 0, None))(kq[layer], vo[layer], Z)
        Z = Z + jnp.sum(heads, axis=0)
        if feedforward is not None:
            Z = Z + activation(Z @ feedforward.up[layer]) @ feedforward.down[layer].T
    return Z


class AttentionHead(nnx.Module):
    r"""One attention head, softmax(X W_K W_Q^T X^T) X W_V W_O^T, with no scaling of the logits.

    Source: boixadsera2023, Equation 1.

    Attributes:
        key: W_K, (d, d'), or its diagonal, (d,); trained, as are the others.
        query: W_Q.
        value: W_V.
        output: W_O.

    Example:
        >>> head = AttentionHead(*jnp.ones((4, 3)))  # diagonal
        >>> head(jnp.eye(3)).shape
        (3, 3)
    """

    def __init__(self, key: ArrayLike, query: ArrayLike, value: ArrayLike, output: ArrayLike):
        """Build the head from its weights.

        Raises:
            ValueError: the weights do not have one shape (d,) or (d, d').
        """
        weights = _require_alike("(d,) or (d, d')", [1, 2], key, query, value, output)
        self.key, self.query, self.value, self.output = map(nnx.Param, weights)

    def __call__(self, X: ArrayLike) -> Array:
        """Outputs for tokens X (..., n, d): the same shape."""
        weights = [getattr(self, name)[...] for name in HEAD_WEIGHTS]
        return _head(weights, _require_inputs(X, weights[0].shape[0]))


class AttentionStack(nnx.Module):
    r"""Layers of several heads with residuals, and frozen feed-forward layers between them.

        Z <- Z + sum_h head_h(Z),   then   Z <- Z + phi(Z W_A) W_B^T.

    Source: boixadsera2023, Example 3.2.

    Attributes:
        key: W_K of every head, (layers, heads, d) where diagonal, else (layers, heads, d, d'); trained, as
            are the others.
        query: W_Q.
        value: W_V.
        output: W_O.
        up: W_A of every layer, (layers, d, m), `Frozen`; None where there are no feed-forward layers.
        down: W_B, alike.

    Example:
        >>> AttentionStack(*jnp.zeros((4, 1, 2, 3)))(jnp.eye(3)).tolist() == jnp.eye(3).tolist()
        True
    """

    def __init__(
        self,
        key: ArrayLike,
        query: ArrayLike,
        value: ArrayLike,
        output: ArrayLike,
        feedforward: Feedforward | None = None,
        activation: Callable[[Array], Array] = jax.nn.gelu,
    ):
        """Build the stack from its weights.

        Raises:
            ValueError: the shapes do not fit.
        """
        axes = "(layers, heads, d) or (layers, heads, d, d')"
        weights = _require_alike(axes, [3, 4], key, query, value, output)
        layers, _, dim = weights[0].shape[:3]
        if feedforward is not None:
            up, down = _require_feedforward(feedforward, layers, dim)
            self.up, self.down = Frozen(up), Frozen(down)
        else:
            self.up = self.down = None
        self.key, self.query, self.value, self.output = map(nnx.Param, weights)
        self.activation = activation

    def __call__(self, X: ArrayLike) -> Array:
        """Outputs for tokens X (..., n, d): the same shape."""
        weights = [getattr(self, name)[...] for name in HEAD_WEIGHTS]
        Z = _require_inputs(X, weights[0].shape[2])
        for layer in range(weights[0].shape[0]):
            heads = jax.vmap(_head, in_axes=(0, None))([weight[layer] for weight in weights], Z)
            Z = Z + jnp.sum(heads, axis=0)
            if self.up is not None and self.down is not None:
                Z = Z + self.activation(Z @ self.up[...][layer]) @ self.down[...][layer].T
        return Z


def product_coordinates(params: Any) -> tuple[Array, Array]:
    """The factors (u, v) of all products of diagonal weights, (p,) each, in the order of `split_products`.

    Args:
        params: a mapping with `key`, `query`, `value` and `output`, each (..., d): a head or a stack.

    Raises:
        ValueError: a name is missing, or the shapes differ.

    Example:
        >>> weights = {"key": [1.0], "query": [2.0], "value": [3.0], "output": [4.0]}
        >>> [x.tolist() for x in product_coordinates(weights)]
        [[1.0, 3.0], [2.0, 4.0]]
    """
    key, query, value, output = (weights := require_weights(params)).values()
    require_same_shape("(..., d)", range(1, key.ndim + 1), **weights)
    u, v = jnp.stack([key, value], axis=-2), jnp.stack([query, output], axis=-2)
    return u.ravel(), v.ravel()


def observe_products(params: Any) -> Array:
    """The products beta = u v of diagonal weights, (p,), for `observe`.

    Example:
        >>> weights = {"key": [1.0], "query": [2.0], "value": [3.0], "output": [4.0]}
        >>> observe_products({name: jnp.array(weight) for name, weight in weights.items()}).tolist()
        [2.0, 12.0]
    """
    u, v = product_coordinates(params)
    return u * v


def split_products(beta: ArrayLike, dim: int, layers: int = 1, heads: int = 1) -> tuple[Array, Array]:
    """The diagonals (kq, vo), (layers, heads, d) each, of products in one vector (p,), p = 2 d layers heads.

    Coordinates run over layers, heads, the two kinds (KQ first), and d.

    Raises:
        ValueError: a size is not a positive integer, or `beta` has another shape.

    Example:
        >>> [x.ravel().tolist() for x in split_products([1.0, 2.0, 3.0, 4.0], 2)]
        [[1.0, 2.0], [3.0, 4.0]]
    """
    dim, layers, heads = require_sizes(dim=dim, layers=layers, heads=heads)
    beta = as_real("beta", beta)
    require_shape("beta", beta, (2 * dim * layers * heads,))
    parts = beta.reshape(layers, heads, 2, dim)
    return parts[:, :, 0], parts[:, :, 1]


def _require_alike(axes: str, dims: list[int], *weights: ArrayLike) -> list[Array]:
    arrays = {name: as_real(name, weight) for name, weight in zip(HEAD_WEIGHTS, weights, strict=True)}
    require_same_shape(axes, dims, **arrays)
    return list(arrays.values())


def _require_feedforward(feedforward: Feedforward, layers: int, dim: int) -> Feedforward:
    up, down = (as_real("feedforward", weight) for weight in feedforward)
    if up.shape != down.shape or up.shape[:-1] != (layers, dim):
        raise ValueError(
            f"feedforward must hold two arrays ({layers}, {dim}, m), got {up.shape} and {down.shape}"
        )
    return Feedforward(up, down)


def _require_inputs(X: ArrayLike, dim: int) -> Array:
    X = as_real("X", X)
    if X.ndim < 2 or X.shape[-1] != dim:
        raise ValueError(f"X must have shape (..., n, {dim}), got shape {X.shape}")
    return X


def _head(weights: list[Array], X: Array) -> Array:
    """One head from its weights."""
    key, query, value, output = weights
    K, Q, V = (_times(X, weight) for weight in (key, query, value))
    mixed = _softmax(K @ jnp.swapaxes(Q, -1, -2)) @ V
    return _times(mixed, output if output.ndim == 1 else output.T)


def _times(X: Array, weight: Array) -> Array:
    """X W, for W (d, d'), or for the diagonal of W."""
    return jnp.einsum("...d,d->...d", X, weight) if weight.ndim == 1 else X @ weight


def _softmax(logits: Array) -> Array:
    # Fused softmax kernels carry an error of 2e-7, in float64 as well.
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)
