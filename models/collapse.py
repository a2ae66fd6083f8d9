"""Linear networks whose hidden units are multiplied by noise, which is really drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    require_choice,
    require_integer,
    require_number,
    require_shapes,
    require_sizes,
)
from models.draws import normal, uniform

Law = Literal["dropout", "normal"]


class Noisy(NamedTuple):
    """Inputs of a `StochasticLinear`, with what its hidden units are multiplied by.

    Attributes:
        x: inputs, (n, d).
        noise: multipliers of the hidden layers, input side first, (n, d_k) each; empty for the mean network.
    """

    x: Array
    noise: Sequence[Array] = ()


class StochasticLinear(nnx.Module):
    r"""A linear network without biases, U diag(e_D) W_D ... diag(e_1) W_1 x, of any depth.

    Its layers are `flax.nnx.Linear`, whose kernels are the transposes of these matrices; `weights` gives the
    matrices of its parameters, the coordinates of `dynamics.collapse`.

    Source: ziyin2022talk, Equations 2 and 9.

    Args:
        matrices: the weights to start from, input side first: (d_1, d), (d_2, d_1), ..., (k, d_D).

    Raises:
        ValueError: a matrix does not fit the one before, or the inputs or the noise do not fit them.

    Example:
        >>> StochasticLinear([[[2.0]], [[3.0]]])(Noisy(jnp.ones((1, 1)), [jnp.full((1, 1), 0.5)])).tolist()
        [[3.0]]
    """

    def __init__(self, matrices: Sequence[ArrayLike]):
        self.layers = nnx.List(linear_layers(matrices))

    def __call__(self, inputs: Noisy) -> Float[Array, "n k"]:
        """Outputs (n, k), of the mean network where no noise is given."""
        *hidden, output = self.layers
        h = as_real("x", inputs.x)
        if h.ndim != 2 or h.shape[1] != self.layers[0].in_features:
            raise ValueError(f"x must have shape (n, {self.layers[0].in_features}), got shape {h.shape}")
        shapes = [(h.shape[0], layer.out_features) for layer in hidden]
        given = [np.shape(e) for e in inputs.noise]
        if given and given != shapes:
            raise ValueError(f"noise must be arrays of shapes {shapes}, one per hidden layer, got {given}")
        for index, layer in enumerate(hidden):
            h = layer(h)
            h = h * inputs.noise[index] if given else h
        return output(h)


def linear_layers(matrices: Sequence[ArrayLike]) -> list[nnx.Linear]:
    """Layers `flax.nnx.Linear` without biases, of the matrices of a network, input side first.

    Raises:
        ValueError: there is no matrix, or one does not fit the one before.

    Example:
        >>> [layer.kernel.shape for layer in linear_layers([[[2.0, 1.0]], [[3.0]]])]
        [(2, 1), (1, 1)]
    """
    arrays = [as_real("matrices", matrix) for matrix in matrices]
    if not arrays:
        raise ValueError("matrices must hold at least one matrix, got none")
    for W, before in zip(arrays, [arrays[0].T, *arrays], strict=False):
        if W.ndim != 2 or W.shape[1] != before.shape[0] or not W.size:
            raise ValueError(f"matrices must follow each other, got {before.shape}, then {W.shape}")
    return [_linear(W) for W in arrays]


def _linear(W: Array) -> nnx.Linear:
    def kernel(key, shape, dtype):
        return W.T.astype(dtype)

    sizes = W.shape[1], W.shape[0]
    return nnx.Linear(*sizes, use_bias=False, param_dtype=W.dtype, kernel_init=kernel, rngs=nnx.Rngs(0))


def weights(params: PyTree) -> list[Array]:
    """The matrices, input side first, of the parameters of a `StochasticLinear`: what a theory looks at.

    Example:
        >>> from models.functional import as_function
        >>> [W.shape for W in weights(as_function(StochasticLinear([[[2.0, 1.0]], [[3.0]]]))[1])]
        [(1, 2), (1, 1)]
    """
    return [jnp.swapaxes(kernel, -1, -2) for kernel in jax.tree.leaves(params)]


def random_weights(key: Array, sizes: Sequence[int], scale: ArrayLike) -> list[Array]:
    """Normal matrices to start from, of standard deviation `scale`, which may be traced.

    Args:
        key: PRNG key.
        sizes: numbers of units (d, d_1, ..., d_D, k), inputs first.
        scale: standard deviation of all entries, >= 0.

    Raises:
        ValueError: there are less than two sizes, or a number is out of range and can be looked at.

    Example:
        >>> [W.shape for W in random_weights(jax.random.key(0), (3, 2, 1), 0.1)]
        [(2, 3), (1, 2)]
    """
    require_sizes(**{f"sizes[{index}]": size for index, size in enumerate(sizes)})
    if len(sizes) < 2:
        raise ValueError(f"sizes must hold those of inputs and outputs at least, got {tuple(sizes)}")
    scale = require_number("scale", scale, jnp.result_type(float), at_least=0)
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(sizes[1:], sizes, strict=False)
    return [scale * normal(key, shape, scale.dtype) for key, shape in zip(keys, shapes, strict=True)]


def multiplicative_noise(
    key: Array, shape: tuple[int, ...], variance: ArrayLike, law: Law | str = "dropout"
) -> Array:
    r"""Independent noise of mean 1: `dropout` is 1 + s with probability 1 / (1 + s) and else 0, or `normal`.

    Dropout that drops with probability p and divides what it keeps by 1 - p has the variance s = p / (1 - p).
    The mean loss of a linear network depends on the variance alone.

    Args:
        key: PRNG key.
        shape: of the array.
        variance: s, a number >= 0.
        law: "dropout" or "normal".

    Raises:
        ValueError: the law is unknown, or the variance is out of range and can be looked at.

    Example:
        >>> sorted(set(multiplicative_noise(jax.random.key(0), (99,), 1.0).tolist()))
        [0.0, 2.0]
    """
    require_choice("law", law, get_args(Law))
    variance = require_number("variance", variance, jnp.result_type(float), at_least=0)
    if law == "normal":
        return 1 + jnp.sqrt(variance) * normal(key, shape, variance.dtype)
    kept = uniform(key, shape, variance.dtype) * (1 + variance) < 1
    return jnp.where(kept, 1 + variance, 0 * variance)


def noisy_batch(
    key: Array,
    x: ArrayLike,
    y: ArrayLike,
    size: int,
    widths: Sequence[int],
    variance: ArrayLike,
    law: Law | str = "dropout",
) -> tuple[Noisy, Array]:
    """A batch of examples, drawn with replacement, and noise of its own for every one of them.

    Args:
        key: PRNG key.
        x: inputs, (n, d).
        y: targets, (n, k).
        size: examples in the batch.
        widths: hidden units of the layers, input side first.
        variance: of the noise, a number >= 0.
        law: of the noise, see `multiplicative_noise`.

    Returns:
        The inputs with their noise, and the targets (size, k).

    Raises:
        ValueError: the shapes do not fit, or an argument is out of range.

    Example:
        >>> inputs, y = noisy_batch(jax.random.key(0), jnp.ones((5, 2)), jnp.ones((5, 1)), 3, (4,), 0.5)
        >>> inputs.x.shape, [e.shape for e in inputs.noise], y.shape
        ((3, 2), [(3, 4)], (3, 1))
    """
    x, y = as_real("x", x), as_real("y", y)
    require_shapes(x=(x, "n d"), y=(y, "n k"))
    size, y = require_integer("size", size, at_least=1), cast(y, x.dtype)
    require_sizes(**{f"widths[{index}]": width for index, width in enumerate(widths)})
    examples, *keys = jax.random.split(key, 1 + len(widths))
    chosen = jax.random.randint(examples, (size,), 0, x.shape[0])
    noise = [multiplicative_noise(k, (size, m), variance, law) for k, m in zip(keys, widths, strict=True)]
    return Noisy(x[chosen], [cast(e, x.dtype) for e in noise]), y[chosen]
