"""Images: readers of real images, and their cut into tokens."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamics.flow import ArrayLike, as_inexact


def digits(dtype: Any = None) -> tuple[Float[Array, "1797 8 8"], Int[Array, "1797"]]:
    """The handwritten digits that come with scikit-learn: 1797 images of 8 by 8 pixels, ten classes.

    Source: alpaydin1998.

    Args:
        dtype: floating dtype of the images; JAX's default where None.

    Returns:
        Images with pixels in [0, 1], shape (1797, 8, 8), and labels 0 to 9, shape (1797,).

    Example:
        >>> images, labels = digits()
        >>> images.shape, labels[:5].tolist()
        ((1797, 8, 8), [0, 1, 2, 3, 4])
    """
    from sklearn.datasets import load_digits  # takes a second to import

    pixels, labels = load_digits(return_X_y=True)
    images = jnp.asarray(pixels.reshape(-1, 8, 8) / 16, jnp.result_type(float) if dtype is None else dtype)
    return images, jnp.asarray(labels, jnp.int32)


def patches(images: ArrayLike, shape: tuple[int, int]) -> Array:
    """Images cut into patches, one token each: (..., H, W) to (..., H W / (h w), h w) for patches (h, w).

    The patches come row by row, and so do the pixels of each. Whole rows are patches (1, W).

    Raises:
        ValueError: the patches do not tile the images.

    Example:
        >>> patches([[1, 2, 3, 4], [5, 6, 7, 8]], (2, 2)).tolist()
        [[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]]
    """
    images = as_inexact(images)
    if images.ndim < 2:
        raise ValueError(f"images must have shape (..., H, W), got shape {images.shape}")
    *batch, height, width = images.shape
    h, w = shape
    if h < 1 or w < 1 or height % h or width % w:
        raise ValueError(f"shape must tile images of {height} by {width} pixels, got {h} by {w}")
    grid = images.reshape(*batch, height // h, h, width // w, w)
    return jnp.swapaxes(grid, -3, -2).reshape(*batch, -1, h * w)
