"""Encoders that are trained by contrast: their losses on a batch of pairs, whose augmentations are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    cast,
    nan_unless,
    require_arrays,
    require_choice,
    require_dtype,
    require_finite,
    require_integer,
    require_number,
    require_positive,
    require_same_shape,
    require_shapes,
    require_sizes,
    require_symmetric,
    slack,
)
from dynamics.contrastive.family import half_squared_distances
from models.collapse import linear_layers
from models.draws import normal

Similarity = Literal["distance", "inner", "cosine"]


class Views(NamedTuple):
    """Two augmentations of every example of a batch.

    Attributes:
        first: one of them, (n, ...).
        second: the other, of the same shape.
    """

    first: Array
    second: Array


def infonce(
    first: ArrayLike,
    second: ArrayLike,
    attraction: ArrayLike = 1.0,
    *,
    similarity: Similarity | str = "distance",
    positive: bool = False,
    temperature: ArrayLike = 1.0,
) -> Float[Array, ""]:
    r"""InfoNCE of a batch of pairs (f_i, g_i), with the other examples' g_j for what is dissimilar.

        L = mean_i [ -attraction s_ii + log mean_{j != i} exp(s_ij) ],   s_ij = -|f_i - g_j|^2 / 2

    It is the loss of the slide, whose means over data are those over a batch, at attraction = 1. Other
    similarities are <f_i, g_j>, and that of unit vectors, <f_i, g_j> / (|f_i| |g_j|), where embeddings that
    are zero count as similar to none.

    `models.losses.contrastive_loss` has an "infonce" too, of another theory: summed over anchors, times the
    temperature, with negatives of the same view, f_j for f_i, and their sum besides epsilon. At temperature
    1, without epsilon, and with f_j for g_j, it is n (L + log(n - 1)).

    Source: ziyin2022talk, slide on InfoNCE (the weight of the attraction is 1 there).

    Args:
        first: embeddings f of one view of n examples, (n, k).
        second: those of the other view, g, (n, k).
        attraction: weight of the first term, a number >= 0.
        similarity: "distance", "inner" or "cosine".
        positive: whether the mean in the logarithm includes j = i, as common code has it.
        temperature: what the similarities are divided by, a positive number.

    Returns:
        L, a number.

    Raises:
        ValueError: the shapes do not fit, there is one example alone, or an argument is out of range.

    Example:
        >>> float(infonce([[0.0], [1.0]], [[0.0], [1.0]]))
        -0.5
    """
    f, g = _pairs(first, second)
    require_choice("similarity", similarity, get_args(Similarity))
    attraction = require_number("attraction", attraction, f.dtype, at_least=0)
    temperature = require_positive("temperature", temperature, f.dtype)
    if similarity == "cosine":
        f, g = _unit(f), _unit(g)
    distance = similarity == "distance"
    alike = -jnp.sum((f - g) ** 2, axis=1) / 2 if distance else jnp.sum(f * g, axis=1)
    across = -half_squared_distances(f, g) if distance else f @ g.T
    counted = jnp.full(across.shape, True) if positive else _others(len(f))
    scores = jnp.where(counted, across / temperature, -jnp.inf)
    # The logarithm of a mean, whose number of terms is that of every row.
    repulsion = jax.nn.logsumexp(scores, axis=1) - jnp.log(jnp.sum(counted, axis=1).astype(f.dtype))
    return jnp.mean(repulsion - attraction * alike / temperature)


def spectral_contrastive(first: ArrayLike, second: ArrayLike) -> Float[Array, ""]:
    r"""The spectral contrastive loss of a batch of pairs, -2 mean_i <f_i, g_i> + mean_{i != j} <f_i, g_j>^2.

    Args:
        first: embeddings f of one view of n examples, (n, k).
        second: those of the other view, g, (n, k).

    Raises:
        ValueError: the shapes do not fit, or there is one example alone.

    Example:
        >>> float(spectral_contrastive([[1.0], [1.0]], [[1.0], [1.0]]))
        -1.0
    """
    f, g = _pairs(first, second)
    return -2 * jnp.mean(jnp.sum(f * g, axis=1)) + jnp.mean((f @ g.T) ** 2, where=_others(len(f)))


def soft_triplet(first: ArrayLike, second: ArrayLike, attraction: ArrayLike = 1.0) -> Float[Array, ""]:
    r"""The soft triplet loss of a batch of pairs, over each with each other example.

        L = mean_{i != j} log(1 + exp(attraction |f_i - g_i|^2 / 2 - |f_i - g_j|^2 / 2))

    The "soft_triplet" of `models.losses.contrastive_loss` sums over negatives inside of the logarithm, has
    those of the same view, f_j for f_i, and a temperature; of two examples, at temperature 1 and with f_j for
    g_j, it is 2 L.

    Args:
        first: embeddings f of one view of n examples, (n, k).
        second: those of the other view, g, (n, k).
        attraction: weight of the first distance, a number >= 0.

    Raises:
        ValueError: the shapes do not fit, there is one example alone, or the weight is out of range.

    Example:
        >>> round(float(soft_triplet([[0.0], [0.0]], [[0.0], [0.0]])), 4)  # log 2
        0.6931
    """
    f, g = _pairs(first, second)
    attraction = require_number("attraction", attraction, f.dtype, at_least=0)
    alike = attraction * jnp.sum((f - g) ** 2, axis=1) / 2
    excess = alike[:, None] - half_squared_distances(f, g)
    return jnp.mean(jax.nn.softplus(excess), where=_others(len(f)))


def on_views(loss: Callable[[Array, Array], Array], predict: Callable[[PyTree, Any], Array]) -> Partial:
    """A loss of embeddings as a function of an encoder's parameters and `Views`, for `models.training.train`.

    Example:
        >>> x = jnp.array([[0.0], [1.0]])
        >>> float(on_views(infonce, lambda params, x: params * x)(2.0, Views(x, x)))
        -2.0
    """
    return Partial(_of_views, Partial(loss), Partial(predict))


def _of_views(loss, predict, params, views):
    first, second = (as_real(name, view) for name, view in zip(Views._fields, views, strict=True))
    if first.shape != second.shape or first.ndim == 0:
        raise ValueError(
            f"first and second must have one shape (n, ...), got {first.shape} and {second.shape}"
        )
    embeddings = predict(params, jnp.concatenate([first, second]))
    return loss(embeddings[: len(first)], embeddings[len(first) :])


def _pairs(first: ArrayLike, second: ArrayLike) -> list[Array]:
    f, g = require_arrays(first=first, second=second)
    require_same_shape("(n, k)", [2], first=f, second=g)
    if len(f) < 2:
        raise ValueError(f"first must hold embeddings of at least 2 examples, got {len(f)}")
    return [f, g]


def _others(n: int) -> Array:
    return ~jnp.eye(n, dtype=bool)


def _unit(f: Array) -> Array:
    """Rows of norm one; zero, with its derivatives, where a row is zero."""
    # Numbers of order one have squares that neither vanish nor overflow; what they are divided by cancels.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(f), axis=1, keepdims=True))
    f = f / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(f**2, axis=1, keepdims=True)
    return jnp.where(squares > 0, f / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


class Encoder(nnx.Module):
    r"""Layers without biases and ReLU in between, W_L relu(... relu(W_1 x)): a linear encoder for one matrix.

    Its layers are `flax.nnx.Linear`, whose kernels are the transposes of these matrices;
    `models.collapse.weights` gives the matrices of its parameters. `models.collapse.random_weights` draws
    some to start from.

    Source: ziyin2022talk, slides on landscapes of nonlinear networks.

    Args:
        matrices: the weights to start from, input side first: (d_1, d), (d_2, d_1), ..., (k, d_L).

    Raises:
        ValueError: a matrix does not fit the one before, or the inputs do not fit them.

    Example:
        >>> Encoder([[[1.0], [-1.0]], [[2.0, 3.0]]])(jnp.array([[1.0], [-1.0]])).tolist()
        [[2.0], [3.0]]
    """

    def __init__(self, matrices: Sequence[ArrayLike]):
        self.layers = nnx.List(linear_layers(matrices))

    def __call__(self, x: ArrayLike) -> Float[Array, "n k"]:
        """Embeddings (n, k) of inputs (n, ...), whose other axes are d numbers in all."""
        flat = as_real("x", x)
        inputs = self.layers[0].in_features
        if flat.ndim < 2 or flat.size != len(flat) * inputs:
            raise ValueError(f"x must have shape (n, {inputs}), got shape {flat.shape}")
        h, (*hidden, head) = flat.reshape(len(flat), inputs), self.layers
        for layer in hidden:
            h = nnx.relu(layer(h))
        return head(h)


class Nodes(nnx.Module):
    r"""One layer of nodes h(w_k . x), without biases.

    Source: tian2023nonlinear, one-layer networks.

    Args:
        weights: the nodes to start from, (K, d).
        activation: h, elementwise.

    Raises:
        ValueError: the weights are no finite matrix, or the inputs do not fit them.

    Example:
        >>> Nodes([[1.0, 0.0], [0.0, -1.0]], nnx.relu)(jnp.array([[2.0, 3.0]])).tolist()
        [[2.0, 0.0]]
    """

    def __init__(self, weights: ArrayLike, activation: Callable[[Array], Array]):
        (weights,) = require_arrays(weights=weights)
        require_shapes(weights=(weights, "K d"))
        (self.layer,), self.activation = linear_layers([weights]), activation

    def __call__(self, x: ArrayLike) -> Float[Array, "n K"]:
        """What the nodes say of inputs (n, d)."""
        inputs, d = as_real("x", x), self.layer.in_features
        if inputs.ndim != 2 or inputs.shape[1] != d:
            raise ValueError(f"x must have shape (n, {d}), got shape {inputs.shape}")
        return self.activation(self.layer(inputs))


class ConvEncoder(nnx.Module):
    """Convolutions 3 by 3 with stride 2, ReLU after each, and a linear layer; none has biases.

    Args:
        key: PRNG key of the weights to start from.
        shape: height and width of the images.
        outputs: size of the embeddings.
        channels: of the convolutions, one after the other.
        dtype: floating dtype; JAX's default where None.

    Raises:
        ValueError: a size is no positive integer, or the images do not fit.

    Example:
        >>> ConvEncoder(jax.random.key(0), (8, 8), 2)(jnp.ones((5, 8, 8))).shape
        (5, 2)
    """

    def __init__(
        self,
        key: Array,
        shape: tuple[int, int],
        outputs: int,
        channels: Sequence[int] = (8, 16),
        dtype: Any = None,
    ):
        height, width = shape
        require_sizes(height=height, width=width, outputs=outputs)
        require_sizes(**{f"channels[{index}]": count for index, count in enumerate(channels)})
        self.shape, dtype, rngs = (int(height), int(width)), require_dtype(dtype), nnx.Rngs(key)
        layers: list[nnx.Module] = []
        before = 1
        for count in channels:
            layers.append(
                nnx.Conv(
                    before,
                    count,
                    (3, 3),
                    strides=2,
                    use_bias=False,
                    dtype=dtype,
                    param_dtype=dtype,
                    kernel_init=_lecun_normal,
                    rngs=rngs,
                )
            )
            before, height, width = count, -(-height // 2), -(-width // 2)
        sizes, like = (before * height * width, outputs), {"dtype": dtype, "param_dtype": dtype}
        layers.append(nnx.Linear(*sizes, use_bias=False, **like, kernel_init=_lecun_normal, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, x: ArrayLike) -> Float[Array, "n k"]:
        """Embeddings (n, k) of images (n, height, width)."""
        images = as_real("x", x)
        if images.ndim != 3 or images.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (n, {self.shape[0]}, {self.shape[1]}), got {images.shape}")
        h, (*hidden, head) = images[..., None], self.layers
        for layer in hidden:
            h = nnx.relu(layer(h))
        return head(h.reshape(len(h), -1))


def _lecun_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Numbers of `jax.nn.initializers.lecun_normal`, drawn in one row as by `models.draws.normal`."""
    deviation = jnp.sqrt(jnp.array(1 / math.prod(shape[:-1]), dtype))
    drawn = jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype)
    # The last number is the standard deviation of a normal law that is cut off at -2 and 2.
    return drawn.reshape(shape) * (deviation / jnp.array(0.87962566103423978, dtype))


def scale_embedding(params: PyTree, scales: ArrayLike) -> PyTree:
    r"""The parameters of an encoder whose last layer is rescaled, by a number or each of its rows by its own.

    The embeddings are multiplied by these numbers: it is the rescaling W -> a W, or of two rows by r_1 and
    r_2, that shows the landscape.

    Source: ziyin2022talk, slides on landscapes of nonlinear networks.

    Args:
        params: parameters of an `Encoder` or a `ConvEncoder`, as `models.functional.as_function` gives them.
        scales: a number, or one for each of the k rows, (k,).

    Raises:
        ValueError: the parameters are those of another network, or the scales do not fit, or are not finite
            and can be looked at.

    Example:
        >>> from models.functional import as_function
        >>> predict, params = as_function(Encoder([[[1.0], [2.0]]]))
        >>> predict(scale_embedding(params, [3.0, 0.5]), jnp.ones((1, 1))).tolist()
        [[3.0, 1.0]]
    """
    leaves, structure = jax.tree.flatten(params)
    if not isinstance(params, Mapping) or set(params) != {"layers"}:
        raise ValueError(f"params must be those of an Encoder or a ConvEncoder, got {type(params).__name__}")
    *others, kernel = leaves
    scales = require_finite("scales", cast(as_real("scales", scales), kernel.dtype))
    if scales.shape not in ((), kernel.shape[-1:]):
        raise ValueError(f"scales must be a number or of shape {kernel.shape[-1:]}, got shape {scales.shape}")
    return structure.unflatten([*others, kernel * jnp.broadcast_to(scales, (1, kernel.shape[-1]))])


def two_views(key: Array, x: ArrayLike, augmentation: ArrayLike) -> Views:
    r"""Two augmentations of every example, x + e and x + e', with Gaussian noise of its own each.

    Args:
        key: PRNG key.
        x: examples, (n, ...).
        augmentation: the covariance C of the noise: its variance, or for x of shape (n, d) a
            matrix (d, d), positive semidefinite.

    Returns:
        `Views` of the shape of x.

    Raises:
        ValueError: the shapes do not fit, or the covariance is out of range and can be looked at.

    Example:
        >>> views = two_views(jax.random.key(0), jnp.ones((4, 2)), [[1.0, 0.0], [0.0, 0.0]])
        >>> views.second.shape, views.first[:, 1].tolist()
        ((4, 2), [1.0, 1.0, 1.0, 1.0])
    """
    (x,) = require_arrays(x=x)
    if x.ndim == 0:
        raise ValueError("x must have shape (n, ...), got shape ()")
    root = _root(cast(as_real("augmentation", augmentation), x.dtype), x)
    noise = normal(key, (2, *x.shape), x.dtype)
    noise = root * noise if root.ndim == 0 else noise @ root
    return Views(x + noise[0], x + noise[1])


def _root(C: Array, x: Array) -> Array:
    """The root of the covariance of an augmentation of x."""
    if C.ndim == 0:
        return jnp.sqrt(require_number("augmentation", C, x.dtype, at_least=0))
    if x.ndim != 2 or C.shape != (x.shape[1], x.shape[1]):
        raise ValueError(f"augmentation must be a number or of shape (d, d) for x (n, d), got {C.shape}")
    return covariance_root("augmentation", C)


def covariance_root(name: str, C: ArrayLike) -> Array:
    """The symmetric root of a covariance, (d, d); the error tells the name of one that is none.

    Raises:
        ValueError: C is not symmetric, not finite, or has a negative eigenvalue, and can be looked at.

    Example:
        >>> covariance_root("C", jnp.array([[4.0, 0.0], [0.0, 0.0]])).tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    (C,) = require_arrays(**{name: C})
    require_shapes(**{name: (C, "d d")})
    C = require_symmetric(name, C)
    values, vectors = jnp.linalg.eigh(C)
    semidefinite = values[0] >= -slack(C) * jnp.max(jnp.abs(values))
    looked_at = as_concrete(semidefinite)
    if looked_at is not None and not looked_at:
        raise ValueError(f"{name} must be positive semidefinite, got an eigenvalue of {values[0]:.3g}")
    return nan_unless(semidefinite, (vectors * jnp.sqrt(jnp.maximum(values, 0))[None]) @ vectors.T)


def batch_of_views(key: Array, x: ArrayLike, size: int, augmentation: ArrayLike) -> Views:
    """A batch of examples, drawn with replacement, and `two_views` of each.

    Args:
        key: PRNG key.
        x: examples, (n, ...).
        size: examples in the batch.
        augmentation: covariance of the noise, see `two_views`.

    Returns:
        `Views` of shape (size, ...).

    Raises:
        ValueError: the shapes do not fit, or an argument is out of range.

    Example:
        >>> batch_of_views(jax.random.key(0), jnp.ones((9, 8, 8)), 4, 0.1).first.shape
        (4, 8, 8)
    """
    (x,) = require_arrays(x=x)
    if x.ndim == 0:
        raise ValueError("x must have shape (n, ...), got shape ()")
    size = require_integer("size", size, at_least=1)
    examples, noise = jax.random.split(key)
    return two_views(noise, x[jax.random.randint(examples, (size,), 0, len(x))], augmentation)
