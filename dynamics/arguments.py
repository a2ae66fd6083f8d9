"""The guard of arguments: what numbers are served, and what becomes of those that are bad.

Shapes and dtypes are known while JAX traces, values are not. So the guard is in the value. Each function
here that checks numbers returns its argument, and only what is returned may be computed with: a bad number
that can be looked at raises `ValueError`, which names the argument, what it must be and what it was; a bad
number that is traced comes back as NaN, so that every formula after it is NaN, and a solve has `ok=False`.
Other lanes of a `vmap` are as they were.

Numbers are float32 or float64, the dtypes that the numerics serve, and nothing is cast silently: integers
become JAX's default float; float16, bfloat16, complex numbers, truth values and masked arrays are refused.

Concrete arrays are looked at in NumPy: under somebody's `jit` a jnp operation on them is traced too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

# What public functions take for an array: they convert and validate it themselves.
ArrayLike = jax.typing.ArrayLike | Sequence[Any]


def is_traced(*trees: PyTree) -> bool:
    """Whether any leaf is a JAX tracer, whose value cannot be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def as_concrete(array: Any) -> np.ndarray | None:
    """The array in NumPy, or None where it is traced and cannot be looked at."""
    return None if is_traced(array) else np.asarray(array)


@jax.jit
def nan_unless(good: Any, x: Any) -> Any:
    """The number or array where `good` holds, NaN elsewhere: in value and in every derivative.

    `jnp.where` would give the right value, but a derivative of zero, which looks converged.

    Example:
        >>> jax.grad(lambda x: nan_unless(x > 0, x))(-1.0).tolist()
        nan
    """
    x = jnp.asarray(x)
    return x * jnp.where(good, jnp.ones((), x.dtype), jnp.nan)


def as_real(name: str, value: Any) -> Array:
    """The argument as an array of float32 or float64; integers become JAX's default float.

    Example:
        >>> as_real("x", jnp.ones(2, jnp.bfloat16))
        Traceback (most recent call last):
        ValueError: x must be float32 or float64, got dtype bfloat16
    """
    array = _as_array(name, value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return cast(array, jnp.result_type(float))
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real, got dtype {array.dtype}")
    if array.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"{name} must be float32 or float64, got dtype {array.dtype}")
    return array


def require_dtype(dtype: Any) -> Any:
    """The dtype of numbers that are made: float32 or float64, and JAX's default float where None.

    Example:
        >>> require_dtype("int32")
        Traceback (most recent call last):
        ValueError: dtype must be float32 or float64, got int32
    """
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    return dtype


def _as_array(name: str, value: Any) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} must be an array without a mask, got a masked array")
    try:
        with jax.ensure_compile_time_eval():
            return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be an array of numbers, got {brief(value)}") from None


def brief(value: Any) -> str:
    """The value in a few words on one line."""
    line = " ".join(str(value).split())
    shown = line if len(line) <= 60 else f"{line[:57]}..."
    return repr(shown) if isinstance(value, str) else shown


def require_arrays(**arrays: Any) -> list[Array]:
    """The arguments as finite arrays that are not empty, in the dtype of the first."""
    converted = [as_real(name, array) for name, array in arrays.items()]
    for name, array in zip(arrays, converted, strict=True):
        if array.size == 0:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    finite = [require_finite(name, array) for name, array in zip(arrays, converted, strict=True)]
    return [cast(array, finite[0].dtype) for array in finite]


def require_concrete(name: str, value: Any) -> np.ndarray:
    """The argument as finite numbers of NumPy, for what is decided on the host and cannot be traced."""
    array = as_real(name, value)
    numbers = as_concrete(array)
    if numbers is None:
        raise ValueError(f"{name} must be concrete, since it is looked at on the host, got a traced array")
    require_finite(name, array)
    return numbers


def cast(array: Array, dtype: Any) -> Array:
    """The array in another dtype; a concrete one stays concrete, also under somebody's `jit`."""
    if is_traced(array) or (array.dtype == dtype and not array.weak_type):
        return array.astype(dtype)
    with jax.ensure_compile_time_eval():
        return jnp.asarray(np.asarray(array, dtype), dtype)


def require_vector(name: str, value: Any, axis: str = "n") -> Array:
    """The argument as an array with one axis, which has the given letter in the error and is not empty.

    Example:
        >>> require_vector("x", [[1.0]])
        Traceback (most recent call last):
        ValueError: x must have shape (n,), got shape (1, 1)
    """
    array = as_real(name, value)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must have shape ({axis},), got shape {array.shape}")
    return array


def require_real(name: str, array: Array) -> None:
    """Refuse an array of complex numbers."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be real, got dtype {array.dtype}")


def require_finite(name: str, array: Array) -> Array:
    """The array, in which no number is NaN or infinite."""
    values = as_concrete(array)
    if values is None:
        return nan_unless(jnp.isfinite(array), array)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return array


def require_every(name: str, array: Array, holds: Callable[[Any], Any], rule: str) -> Array:
    """The array, in which a condition holds everywhere; the error tells the first number where it fails.

    The condition is made of comparisons, since it sees NumPy's arrays and traced ones.

    Example:
        >>> require_every("t", jnp.array([1.0, -2.0]), lambda t: t >= 0, ">= 0")
        Traceback (most recent call last):
        ValueError: t must be >= 0, got -2.0
    """
    values = as_concrete(array)
    if values is None:
        return nan_unless(holds(array), array)
    bad = values[~holds(values)]
    if bad.size:
        raise ValueError(f"{name} must be {rule}, got {bad[0]}")
    return array


def require_number(
    name: str,
    value: Any,
    dtype: Any,
    *,
    at_least: int | float | None = None,
    at_most: int | float | None = None,
) -> Array:
    """One finite number as an array of the given dtype, with a bound below, or two, where there are some."""
    rule = "a finite number" if at_least is None else f"a finite number >= {at_least:g}"
    rule += "" if at_most is None else f" and <= {at_most:g}"
    least = -np.inf if at_least is None else at_least
    most = np.inf if at_most is None else at_most
    return _require_number(name, value, dtype, lambda x: (x >= least) & (x <= most) & (abs(x) < np.inf), rule)


def require_positive(name: str, value: Any, dtype: Any) -> Array:
    """One finite number above zero as an array of the given dtype."""
    return _require_number(name, value, dtype, lambda x: (x > 0) & (x < np.inf), "a positive number")


def _require_number(name: str, value: Any, dtype: Any, holds: Callable[[Any], Any], rule: str) -> Array:
    try:
        number = cast(as_real(name, value), dtype)
    except ValueError:
        number = None
    if number is None or number.ndim != 0:
        many = "" if number is None else "; jax.vmap maps over many"
        raise ValueError(f"{name} must be {rule}, got {brief(value)}{many}")
    looked_at = as_concrete(number)
    if looked_at is None:
        return nan_unless(holds(number), number)
    if not holds(looked_at):
        raise ValueError(f"{name} must be {rule}, got {brief(value)}")
    return number


def require_times(ts: Any, dtype: Any, name: str = "ts") -> Float[Array, " T"]:
    """Times as an array of a dtype that are finite and increase strictly; NaN if traced ones do not."""
    times = cast(as_real(name, ts), dtype)
    if times.ndim != 1 or times.size == 0:
        raise ValueError(f"{name} must have shape (T,) with T >= 1, got shape {times.shape}")
    values = as_concrete(times)
    if values is None:
        return nan_unless(jnp.all(jnp.isfinite(times)) & jnp.all(jnp.diff(times) > 0), times)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if np.any(np.diff(values) <= 0):
        raise ValueError(f"{name} must increase strictly (in {times.dtype}), got {brief(values)}")
    return times


def require_indices(name: str, values: Any, size: int, least: int = 0) -> Int[Array, "..."]:
    """Integers from `least` to size - 1. Traced ones come back as they are, for `rows` and `one_hot` to see.

    Example:
        >>> require_indices("token", [0, 3], 3)
        Traceback (most recent call last):
        ValueError: token must be integers from 0 to 2, got 3
    """
    indices = _as_array(name, values)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, got dtype {indices.dtype}")
    looked_at = as_concrete(indices)
    if looked_at is not None:
        outside = looked_at[(looked_at < least) | (looked_at >= size)]
        if outside.size:
            raise ValueError(f"{name} must be integers from {least} to {size - 1}, got {outside[0]}")
    return indices


def rows(array: Array, indices: Array) -> Array:
    """The rows of an array at some indices; NaN, with its derivatives, at an index that is out of range.

    Example:
        >>> rows(jnp.array([1.0, 2.0]), jnp.array([1, -1, 2])).tolist()
        [2.0, nan, nan]
    """
    inside = (indices >= 0) & (indices < len(array))
    found = array[jnp.clip(indices, 0, len(array) - 1)]
    return nan_unless(jnp.expand_dims(inside, range(indices.ndim, found.ndim)), found)


def one_hot(indices: Array, size: int, dtype: Any) -> Array:
    """One-hot rows; a row of NaN at an index that is out of range.

    Example:
        >>> one_hot(jnp.array([1, -1]), 2, float).tolist()
        [[0.0, 1.0], [nan, nan]]
    """
    return rows(jnp.eye(size, dtype=dtype), indices)


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
    for name, (array, _) in arrays.items():
        if array.size == 0:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")


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
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {brief(value)}")


def require_integer(name: str, value: Any, *, at_least: int) -> int:
    """The argument as a Python integer with a least value; a truth value is no integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {brief(value)}")
    return int(value)


def require_sizes(**sizes: Any) -> list[int]:
    """The arguments as Python integers, each at least one; a truth value is no size."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {brief(size)}")
    return [int(size) for size in sizes.values()]


def require_symmetric(name: str, S: Array) -> Array:
    """Matrices (..., n, n) that are symmetric up to rounding."""
    values = as_concrete(S)
    if values is None:
        return nan_unless(is_symmetric(S), S)
    if not np.all(is_symmetric(values)):
        skew = float(np.max(np.abs(values - np.swapaxes(values, -1, -2))))
        raise ValueError(f"{name} must be symmetric, got an asymmetry of {skew:.3g}")
    return S


def require_covariance(name: str, M: Array) -> Array:
    """A symmetric matrix without negative eigenvalues; of a traced one the diagonal is looked at alone."""
    M = require_symmetric(name, M)
    values = as_concrete(M)
    if values is None:
        return nan_unless(jnp.all(jnp.diag(M) >= 0), M)
    eigenvalues = np.linalg.eigvalsh(values)
    if eigenvalues[0] < -slack(M) * np.max(np.abs(eigenvalues)):
        raise ValueError(f"{name} must be positive semidefinite, got an eigenvalue of {eigenvalues[0]:.3g}")
    return M


def slack(A: Any) -> float:
    """What an eigenvalue of a matrix can be off by, as a share of the largest."""
    return A.shape[0] * float(jnp.finfo(A.dtype).eps)


def is_symmetric(S: Any) -> Any:
    """Which of the matrices (..., n, n) are symmetric up to the rounding of the largest one: (..., 1, 1)."""
    numpy = np if isinstance(S, np.ndarray) else jnp
    skew = numpy.abs(S - numpy.swapaxes(S, -1, -2))
    slack = float(jnp.finfo(S.dtype).eps) ** 0.5 * numpy.max(numpy.abs(S))
    return numpy.max(skew, axis=(-2, -1), keepdims=True) <= slack


def _listed(parts: Any) -> str:
    """Words for a sentence: "a, b and c"."""
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last
