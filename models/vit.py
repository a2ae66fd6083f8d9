"""A vision transformer whose initialization scale can be swept."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import ArrayLike, as_real, require_choice, require_integer, require_number
from models.data.images import patches

EMBEDDER = "embedder"


class Block(nnx.Module):
    r"""A layer: x + attention(norm(x)), and then x + mlp(norm(x)).

    Attention has no biases: its logits are those of W_K W_Q^T alone, over the root of the head dimension.
    """

    def __init__(self, width: int, heads: int, head_dim: int, mlp_width: int, *, dtype: Any, rngs: nnx.Rngs):
        """Build the layer with Flax's initial values: LeCun normal weights, biases 0, gains 1."""
        self.attention_norm = nnx.LayerNorm(width, param_dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads,
            width,
            qkv_features=heads * head_dim,
            use_bias=False,
            decode=False,
            attention_fn=_attend,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(width, param_dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(width, mlp_width, param_dtype=dtype, rngs=rngs)
        self.contract = nnx.Linear(mlp_width, width, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        """The tokens after the layer."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.contract(jax.nn.gelu(self.expand(self.mlp_norm(x)), approximate=False))


def _attend(query: Array, key: Array, value: Array, **_: Any) -> Array:
    """Softmax attention, arrays (B, n, heads, head_dim); a fused kernel computes it in 32-bit."""
    query, key, value = (jnp.moveaxis(part, -2, -3) for part in (query, key, value))
    logits = query @ jnp.swapaxes(key, -1, -2) / query.shape[-1] ** 0.5
    return jnp.moveaxis(jax.nn.softmax(logits, axis=-1) @ value, -3, -2)


class VisionTransformer(nnx.Module):
    """A vision transformer: patches become tokens, tokens go through layers, one token through a linear head.

    Source: dosovitskiy2021; the width of the heads is free, as in boixadsera2023, section 5.

    Attributes:
        embedder: the linear map of a patch to its token.
        position: embedding of the positions, shape (n, width), or (n + 1, width) with a class token.
        class_token: the token that the head reads, shape (width,), or None where it reads their mean.
        blocks: the layers.
        norm: the norm after the last layer.
        head: the linear map to the logits.

    Example:
        >>> sizes = dict(depth=2, heads=4, width=32, head_dim=8, mlp_width=64)
        >>> model = VisionTransformer(jax.random.key(0), (8, 8), 10, patch=(2, 2), **sizes)
        >>> model(jnp.zeros((3, 8, 8))).shape
        (3, 10)
    """

    def __init__(
        self,
        key: Array,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        patch: tuple[int, int],
        depth: int,
        heads: int,
        width: int,
        head_dim: int,
        mlp_width: int,
        pool: Literal["mean", "class"] | str = "mean",
        dtype: Any = None,
    ):
        """Build the network with its usual initial values; `scale_initial` sweeps their scale.

        Args:
            key: PRNG key.
            image_shape: (H, W), or (H, W, C) for colour images.
            classes: number of classes.
            patch: height and width of a patch.
            depth: number of layers.
            heads: heads per layer.
            width: dimension of a token.
            head_dim: dimension of a head's queries, keys and values; heads * head_dim need not be the width.
            mlp_width: hidden nodes of the part that acts on each token.
            pool: what the head reads: the mean of the tokens, or a class token.
            dtype: floating dtype; JAX's default where None.

        Raises:
            ValueError: a size is not positive, the patches do not tile the images, or the pool is unknown.
        """
        if len(image_shape) not in (2, 3):
            raise ValueError(f"image_shape must be (H, W) or (H, W, C), got {image_shape}")
        sizes = {"classes": classes, "depth": depth, "heads": heads, "width": width}
        for name, size in (sizes | {"head_dim": head_dim, "mlp_width": mlp_width}).items():
            require_integer(name, size, at_least=1)
        require_choice("pool", pool, ("mean", "class"))
        dtype = jnp.result_type(float) if dtype is None else dtype
        rngs = nnx.Rngs(key)
        self.image_shape, self.patch, self.colour = tuple(image_shape), patch, len(image_shape) == 3
        cut = jax.eval_shape(lambda image: patches(image, patch, colour=self.colour), jnp.zeros(image_shape))
        count, pixels = cut.shape
        self.embedder = nnx.Linear(pixels, width, param_dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros(width, dtype)) if pool == "class" else None
        count += pool == "class"
        self.position = nnx.Param(0.02 * jax.random.normal(rngs(), (count, width), dtype))
        self.blocks = nnx.List(
            Block(width, heads, head_dim, mlp_width, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(width, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, classes, param_dtype=dtype, rngs=rngs)

    def __call__(self, images: ArrayLike) -> Float[Array, "B classes"]:
        """Logits of the classes for images (B, H, W) or (B, H, W, C).

        Raises:
            ValueError: the images have another shape.
        """
        images = as_real("images", images)
        if images.ndim == 0 or images.shape[1:] != self.image_shape:
            sizes = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape (B, {sizes}), got shape {images.shape}")
        x = self.embedder(patches(images, self.patch, colour=self.colour))
        if self.class_token is not None:
            first = jnp.broadcast_to(self.class_token[...][None, None], (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.position[...][None]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.class_token is not None else jnp.mean(x, axis=1))


def scale_initial(params: PyTree, scale: ArrayLike, *, gain_scale: ArrayLike | None = None) -> PyTree:
    """Initial values times a scale, all but those of the token embedder.

    Both scales may be traced: scales and seeds are one `vmap`.

    All values means the gains of the norms too. What a layer does then is smaller by the scale once more for
    each of its inputs, attention's logits by the fourth power of the scale and not by the second, and the
    start is left later. `gain_scale=1` scales the weights alone.

    Source: boixadsera2023, section 5 (the initial token mapper keeps its scale).

    Args:
        params: parameters of a `VisionTransformer`, by name, such as `models.attention.as_function` returns.
        scale: one number >= 0.
        gain_scale: the scale of the norms' gains, one number >= 0; `scale` where None.

    Returns:
        The parameters, scaled.

    Raises:
        ValueError: a scale is not one number >= 0; the parameters have no token embedder.

    Example:
        >>> start = {"embedder": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
        >>> scaled = scale_initial(start, 0.5)
        >>> scaled["embedder"]["kernel"].tolist(), scaled["head"]["kernel"].tolist()
        ([1.0, 1.0], [0.5, 0.5])
    """
    if EMBEDDER not in params:
        raise ValueError(f"params must hold {EMBEDDER}, got {sorted(params)}")
    dtype = jnp.result_type(*jax.tree.leaves(params))
    scale = require_number("scale", scale, dtype, at_least=0)
    gain_scale = scale if gain_scale is None else require_number("gain_scale", gain_scale, dtype, at_least=0)

    def scaled(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if names[0] == EMBEDDER:
            return leaf
        return leaf * (gain_scale if names[-1] == "scale" else scale).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(scaled, params)


def head_weights(params: PyTree) -> dict[str, Float[Array, "layers heads d k"]]:
    """Weights of all heads of a `VisionTransformer`, as `models.attention.head_products` takes them.

    A head adds softmax_row(X W_Q W_K^T X^T / sqrt(d')) X W_V W_O^T, where X holds the tokens behind the
    layer's norm. The first product is the transpose of the one that `head_products` gives: the singular
    values are the same.

    Args:
        params: parameters of a `VisionTransformer`.

    Returns:
        `key`, `query`, `value` and `output`, each (layers, heads, width, head_dim).

    Example:
        >>> from models.attention import head_products
        >>> from models.functional import as_function
        >>> sizes = dict(depth=2, heads=4, width=32, head_dim=8, mlp_width=64)
        >>> model = VisionTransformer(jax.random.key(0), (8, 8), 10, patch=(2, 2), **sizes)
        >>> head_products(head_weights(as_function(model)[1]))[0].shape
        (2, 4, 32, 32)
    """
    layers = [params["blocks"][layer]["attention"] for layer in sorted(params["blocks"])]

    def stacked(name):
        return jnp.stack([layer[name]["kernel"][...] for layer in layers])

    # Kernels are (width, heads, head_dim), and that of the output (heads, head_dim, width).
    weights = {name: jnp.moveaxis(stacked(name), 1, 2) for name in ("key", "query", "value")}
    return {**weights, "output": jnp.swapaxes(stacked("out"), -1, -2)}
