"""Checks of arguments, told before anything is traced."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dynamics.flow import ArrayLike, as_inexact, is_traced


def require_arrays(**arrays: ArrayLike) -> list[Array]:
    """The arguments as finite real arrays that are not empty, in the dtype of the first."""
    converted = [as_inexact(array) for array in arrays.values()]
    for name, array in zip(arrays, converted, strict=True):
        if jnp.iscomplexobj(array):
            raise ValueError(f"{name} must be real, got {array.dtype}")
        if array.size == 0:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")
        if not is_traced(array) and not np.all(np.isfinite(np.asarray(array))):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return [array.astype(converted[0].dtype) for array in converted]


def require_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got shape {array.shape}")


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse what is not one of the values of the `Literal` in `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


def require_sizes(**sizes: int) -> list[int]:
    """The arguments as Python integers, each at least one."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    return [int(size) for size in sizes.values()]


def require_symmetric(name: str, S: Array) -> None:
    """Refuse concrete matrices (..., n, n) that are not symmetric up to rounding."""
    if is_traced(S):
        return
    values = np.asarray(S, float)
    skew = float(np.max(np.abs(values - np.swapaxes(values, -1, -2))))
    if skew > np.sqrt(jnp.finfo(S.dtype).eps) * np.max(np.abs(values)):
        raise ValueError(f"{name} must be symmetric, got an asymmetry of {skew:.3g}")


def is_symmetric(S: Array) -> Array:
    """Whether matrices (..., n, n), which may be traced, are all symmetric up to rounding."""
    return jnp.max(jnp.abs(S - S.mT)) <= jnp.sqrt(jnp.finfo(S.dtype).eps) * jnp.max(jnp.abs(S))
