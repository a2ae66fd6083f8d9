"""Second moments of data, which are all that a linear network with squared error sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    brief,
    is_traced,
    nan_unless,
    require_arrays,
    require_number,
    require_shapes,
    require_sizes,
    require_symmetric,
    slack,
)
from dynamics.flow import all_finite


class Moments(NamedTuple):
    """Second moments of inputs x and targets y.

    Attributes:
        A: E[x x^T], shape (d, d).
        c: E[x y], shape (d,); for targets of k numbers E[x y^T], shape (d, k).
        y2: E[|y|^2], a number.
    """

    A: Any
    c: Any
    y2: Any


def moments(x: ArrayLike, y: ArrayLike) -> Moments:
    r"""Moments of a data set: the means of x x^T, x y^T and |y|^2 over its examples.

    Nothing is centered: where that is wanted, as for networks without biases, it is done before.

    Args:
        x: inputs, shape (n, d).
        y: targets, shape (n,) or (n, k).

    Returns:
        The `Moments`, in the dtype of `x`.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.

    Example:
        >>> [part.tolist() for part in moments([[1.0], [3.0]], [2.0, 0.0])]
        [[[5.0]], [1.0], 2.0]
    """
    x, y = require_arrays(x=x, y=y)
    require_shapes(x=(x, "n d"), y=(y, "n k" if y.ndim == 2 else "n"))
    n = x.shape[0]
    return Moments(x.T @ x / n, x.T @ y / n, jnp.sum(y**2) / n)


def require_moments(moments: Any, *, outputs: bool = False) -> Moments:
    """Moments that some data can have, in one dtype; `outputs` allows for targets of several numbers.

    A has to be symmetric and positive semidefinite, and c in its range, up to rounding: without that the
    losses have no minimum. Eigenvalues of A that are rounding count as zero, and what c has there is dropped.
    y2 only adds to the loss: whether any data with such A and c have it is not looked at.
    """
    if not isinstance(moments, tuple) or len(moments) != 3:
        raise ValueError(f"moments must be a dynamics.collapse.Moments, got {type(moments).__name__}")
    A, c = require_arrays(A=moments[0], c=moments[1])
    if c.ndim != 1 and not outputs:
        raise ValueError(f"c must have shape (d,), since the network has one output, got shape {c.shape}")
    require_shapes(A=(A, "d d"), c=(c, "d k" if c.ndim == 2 else "d"))
    A, y2 = require_symmetric("A", A), require_number("y2", moments[2], A.dtype, at_least=0)
    known = as_concrete(A)
    numpy = jnp if known is None else np
    values, vectors = numpy.linalg.eigh(jax.lax.stop_gradient(A) if known is None else known)
    rounding = slack(A)
    largest = numpy.max(numpy.abs(values))
    semidefinite, null = values[0] >= -rounding * largest, values <= rounding * largest
    if known is not None and not semidefinite:
        raise ValueError(f"A must be positive semidefinite, got {values[0]}")

    numpy = jnp if is_traced(A, c) else np
    parts = vectors.T @ _columns(c if numpy is jnp else np.asarray(c))
    outside = numpy.where(null[:, None], parts, 0)
    in_range = numpy.linalg.norm(outside) <= rounding**0.5 * numpy.linalg.norm(parts)
    if numpy is jnp:
        left = c - (vectors @ outside).reshape(c.shape)
        good = nan_unless(semidefinite & in_range, y2)
        return nan_unless_finite((A, c, good), Moments(A, left, y2))
    if not in_range:
        raise ValueError(
            "c must be in the range of A, which E[x y] is for any data, got a part outside of it"
        )
    return Moments(A, as_real("c", np.asarray(c) - (vectors @ outside).reshape(c.shape)), y2)


def require_widths(widths: Any) -> tuple[int, ...]:
    """The widths of hidden layers as a tuple of positive integers."""
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Sequence):
        raise ValueError(f"widths must be a sequence of positive integers, got {brief(widths)}")
    return tuple(require_sizes(**{f"widths[{index}]": width for index, width in enumerate(widths)}))


def _columns(c: Any) -> Any:
    return c.reshape(c.shape[0], -1)


class Spectrum(NamedTuple):
    """Eigenvalues of A, zero where they are rounding, and eigenvectors; constants to derivatives.

    Derivatives of eigenvectors do not exist where eigenvalues are equal. Those of what is solved for here do:
    they come from the equations, by `resolvent`.
    """

    values: Float[Array, " d"]
    vectors: Float[Array, "d d"]


def spectrum(A: Float[Array, "d d"]) -> Spectrum:
    """The `Spectrum` of a positive semidefinite matrix."""
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(A))
    return Spectrum(jnp.where(values > slack(A) * values[-1], values, 0), vectors)


def resolvent(shift: Array, scale: Array, A: Float[Array, "d d"], c: Array, of: Spectrum) -> Array:
    """(shift I + scale A)^+ c for shift, scale >= 0, with derivatives of any order; c is (d,) or (d, k)."""
    values, vectors = of
    total = jax.lax.stop_gradient(shift) + jax.lax.stop_gradient(scale) * values
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)

    def solve(_, right):
        return (vectors * inverse[None]) @ (vectors.T @ right)

    return jax.lax.custom_linear_solve(lambda v: shift * v + scale * (A @ v), c, solve, symmetric=True)


class Scaled(NamedTuple):
    """Moments whose A and c are of size one, and the logs of what they were divided by.

    Squares of small numbers vanish otherwise. The sizes are constants to derivatives.
    """

    moments: Moments
    log_A: Array
    log_c: Array


def scaled(moments: Moments) -> Scaled:
    """The moments in units of the largest entries of A and c; zeros are divided by one."""
    sizes = [jnp.max(jnp.abs(jax.lax.stop_gradient(part))) for part in (moments.A, moments.c)]
    a, c = (jnp.where(size > 0, size, 1) for size in sizes)
    return Scaled(Moments(moments.A / a, moments.c / c, moments.y2), jnp.log(a), jnp.log(c))


def log_volume(noise_variance: Array, widths: tuple[int, ...]) -> Array:
    """The log of rho = prod_k d_k / (d_k + s), what noise in hidden layers leaves of the network's map."""
    return -sum((jnp.log1p(noise_variance / width) for width in widths), jnp.zeros_like(noise_variance))


def nan_unless_finite(inputs: Any, outputs: Any) -> Any:
    """The outputs, NaN where an input was bad: comparisons with NaN, which choose lanes, are false."""
    good = all_finite(inputs)
    return jax.tree.map(lambda leaf: nan_unless(good, leaf), outputs)
