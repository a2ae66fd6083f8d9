"""Checks of arguments; each error names the argument, what it must be and what it was.

Shapes and dtypes are known while JAX traces, values are not: a check of values passes over traced arrays. It
looks at the others in NumPy, because under somebody's `jit` a jnp operation on a concrete array is traced
too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dynamics.flow import ArrayLike, as_inexact, is_traced, require_number


def require_arrays(**arrays: ArrayLike) -> list[Array]:
    """The arguments as finite real arrays that are not empty, in the dtype of the first."""
    converted = [as_inexact(array) for array in arrays.values()]
    for name, array in zip(arrays, converted, strict=True):
        require_real(name, array)
        if array.size == 0:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")
        require_finite(name, array)
    return [array.astype(converted[0].dtype) for array in converted]


def require_vector(name: str, value: ArrayLike, axis: str = "n") -> Array:
    """The argument as a real array with one axis, which has the given letter in the error and is not empty.

    Example:
        >>> require_vector("x", [[1.0]])
        Traceback (most recent call last):
        ValueError: x must have shape (n,), got shape (1, 1)
    """
    array = as_inexact(value)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must have shape ({axis},), got shape {array.shape}")
    require_real(name, array)
    return array


def require_real(name: str, array: Array) -> None:
    """Refuse an array of complex numbers."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be real, got dtype {array.dtype}")


def require_finite(name: str, array: Array) -> None:
    """Refuse a concrete array that holds NaN or infinity."""
    if not is_traced(array) and not np.all(np.isfinite(np.asarray(array))):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def require_every(name: str, array: Array, holds: Callable[[np.ndarray], np.ndarray], rule: str) -> None:
    """Refuse a concrete array in which a condition fails somewhere, and tell the first number there.

    Example:
        >>> require_every("t", jnp.array([1.0, -2.0]), lambda t: t >= 0, ">= 0")
        Traceback (most recent call last):
        ValueError: t must be >= 0, got -2.0
    """
    if not is_traced(array):
        values = np.asarray(array)
        bad = values[~holds(values)]
        if bad.size:
            raise ValueError(f"{name} must be {rule}, got {bad[0]}")


def require_shape(name: str, array: Array | np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got shape {array.shape}")


def require_shapes(**arrays: tuple[Array, str]) -> None:
    """Refuse arrays whose shapes do not fit together: an axis of one letter has one length in all of them.

    Axes are letters with spaces in between; a leading "..." stands for any number of axes.

    Example:
        >>> require_shapes(B=(jnp.ones((2, 3, 3)), "... m m"), P=(jnp.ones((4, 1)), "m r"))
        Traceback (most recent call last):
        ValueError: B and P must have shapes (..., m, m) and (m, r), got (2, 3, 3) and (4, 1)
    """
    lengths: dict[str, Any] = {}

    def fits(shape: tuple[int, ...], letters: list[str]) -> bool:
        own: Sequence[Any] = shape
        if letters[0] == "..." and len(shape) >= len(letters) - 1:
            batch = len(shape) - len(letters) + 1
            own = [shape[:batch], *shape[batch:]]
        if len(own) != len(letters):
            return False
        return all(lengths.setdefault(name, size) == size for name, size in zip(letters, own, strict=True))

    axes = [letters.split() for _, letters in arrays.values()]
    shapes = [array.shape for array, _ in arrays.values()]
    if not all(map(fits, shapes, axes)):
        wanted = [f"({', '.join(letters)}{',' * (len(letters) == 1)})" for letters in axes]
        word = "shape" if len(arrays) == 1 else "shapes"
        raise ValueError(f"{_listed(arrays)} must have {word} {_listed(wanted)}, got {_listed(shapes)}")


def require_same_shape(axes: str, dims: Sequence[int], **arrays: Array) -> None:
    """Refuse arrays of different shapes, or with another number of axes than `dims` has.

    The error tells `axes`.

    Example:
        >>> require_same_shape("(p,)", [1], u=jnp.ones(2), v=jnp.ones(3))
        Traceback (most recent call last):
        ValueError: u and v must have one shape (p,), got (2,) and (3,)
    """
    shapes = [array.shape for array in arrays.values()]
    if len(set(shapes)) != 1 or len(shapes[0]) not in dims:
        raise ValueError(f"{_listed(arrays)} must have one shape {axes}, got {_listed(shapes)}")


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def require_integer(name: str, value: Any, *, at_least: int) -> int:
    """The argument as a Python integer with a least value."""
    if not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}")
    return int(value)


def require_sizes(**sizes: Any) -> list[int]:
    """The arguments as Python integers, each at least one; a truth value is no size."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    return [int(size) for size in sizes.values()]


def require_positive(name: str, value: Any, dtype: Any) -> Array:
    """The argument as one finite number of a dtype, above zero unless it is traced."""
    number = require_number(name, value, dtype)
    if not is_traced(number) and not float(number) > 0:
        raise ValueError(f"{name} must be a positive number, got {value}")
    return number


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


def _listed(parts: Any) -> str:
    """Words for a sentence: "a, b and c"."""
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last
