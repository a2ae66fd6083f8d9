"""A multilayer perceptron that classifies, for experiments with optimizers."""

from __future__ import annotations

from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array


class Classifier(nnx.Module):
    """Two hidden layers with ReLU and a head, with biases.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> Classifier(jax.random.key(0), 64, 8, jnp.float32)(jnp.zeros((5, 64))).shape
        (5, 10)
    """

    def __init__(self, key: Array, inputs: int, width: int, dtype: Any, classes: int = 10):
        linear = partial(nnx.Linear, rngs=nnx.Rngs(key), dtype=dtype, param_dtype=dtype)
        self.hidden = nnx.List([linear(inputs, width), linear(width, width)])
        self.head = linear(width, classes)

    def __call__(self, images: Array) -> Array:
        """Logits (N, classes) of flat images (N, inputs)."""
        return self.head(self.features(images))

    def features(self, images: Array) -> Array:
        """What the head sees of flat images (N, inputs): features (N, width)."""
        for layer in self.hidden:
            images = nnx.relu(layer(images))
        return images


def is_hidden(path: str, leaf: Any) -> bool:
    """Whether a parameter of a `Classifier` is a matrix of a hidden layer.

    Example:
        >>> import jax.numpy as jnp
        >>> is_hidden("hidden/0/kernel", jnp.ones((3, 4))), is_hidden("head/kernel", jnp.ones((4, 10)))
        (True, False)
    """
    return path.startswith("hidden") and leaf.ndim == 2
