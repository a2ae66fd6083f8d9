"""Random arrays whose drawing compiles quickly."""

from __future__ import annotations

import math
from typing import Any

import jax
from jaxtyping import Array


def normal(key: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """Draw the standard normal numbers of `jax.random.normal`, in one row that is then folded.

    The compiler of a CPU unrolls short axes: to draw them as they are compiles for seconds.

    Example:
        >>> key = jax.random.key(0)
        >>> bool((normal(key, (4, 3)) == jax.random.normal(key, (4, 3))).all())
        True
    """
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def uniform(
    key: Array,
    shape: tuple[int, ...],
    dtype: Any = None,
    minval: float | Array = 0.0,
    maxval: float | Array = 1.0,
) -> Array:
    """Draw the uniform numbers of `jax.random.uniform`, in one row as `normal` does.

    Example:
        >>> key = jax.random.key(0)
        >>> bool((uniform(key, (4, 3)) == jax.random.uniform(key, (4, 3))).all())
        True
    """
    return jax.random.uniform(key, (math.prod(shape),), dtype, minval, maxval).reshape(shape)
