"""Directions in which a gradient has nothing but rounding errors: they are found, and get no update.

Adam divides every number by its own size, so that rounding errors would move as far as the gradient does.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .projection import Basis, Layout

# Accelerators round float32 products to fewer bits by default, which the small singular values would feel.
product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Decompositions and products of orthonormal columns are off by about one unit of rounding, measured over
# shapes, ranks and spectra; this leaves an order of magnitude.
_UNITS = 16


def noise_level(layout: Layout, decomposed: Any, stored: Any) -> Any:
    """Bound rounding errors in a direction, as a share of the Frobenius norm of what is projected.

    A decomposition makes errors of some units of its own precision. Errors of entries, which are rounded to
    `stored`, do not add up along a vector of length m, but average out like 1 / sqrt(m).
    """
    return _UNITS * jnp.finfo(decomposed).eps + 2 * stored / math.sqrt(min(layout.m, layout.n))


def without_noise(low: Array, basis: Basis, layout: Layout, gradient: Any) -> Array:
    """Set rows of P^T G, columns of G Q, or entries of P^T G Q to zero that are rounding errors.

    What is not finite is left as it is.
    """
    wide = jnp.promote_types(low.dtype, jnp.float32)
    stored = max(float(jnp.finfo(dtype).eps) for dtype in (basis.dtype, gradient))
    level = noise_level(layout, wide, jnp.maximum(stored, _rounding_of_products(wide)).astype(wide))
    # Squares of tiny or huge numbers would leave the range of the dtype.
    size = jnp.abs(low.astype(wide))
    peak = jnp.max(size, axis=(-2, -1), keepdims=True)
    squares = jnp.square(over(size, peak))
    total = jnp.sum(squares, axis=(-2, -1), keepdims=True)
    if not (layout.left and layout.right):
        squares = jnp.sum(squares, axis=-1 if layout.left else -2, keepdims=True)
    return jnp.where(jnp.isfinite(peak) & (squares <= level**2 * total), jnp.zeros_like(low), low)


def over(x: Array, peak: Array) -> Array:
    """Divide numbers by the largest of them; zeros stay zeros.

    Compiled, this may be a product with the inverse of the peak, which vanishes where that is huge.
    """
    half = jnp.where(peak > jnp.finfo(x.dtype).max / 16, 1 / 16, 1).astype(x.dtype)
    return (x * half) / jnp.where(peak > 0, peak * half, 1)


def _rounding_of_products(dtype: Any) -> Any:
    """Return the unit of rounding of the factors of a product, which accelerators shorten in float32."""
    eps = jnp.finfo(dtype).eps
    precision = str(jax.config.jax_default_matmul_precision).lower()
    if dtype != jnp.float32 or precision in ("highest", "float32"):
        return eps
    # TensorFloat-32 has ten bits, bfloat16 has seven.
    shorter = {"cuda": 2.0**-10, "rocm": 2.0**-10, "tpu": 2.0**-7}
    branches = {name: partial(jnp.float32, unit) for name, unit in shorter.items()}
    return jax.lax.platform_dependent(default=partial(jnp.float32, eps), **branches)


def settle(A: Array, short: Array, fill: Array, level: Any) -> tuple[Array, Array]:
    """Return a basis of which no direction has both a signal and noise, and tell which have noise only.

    A is (m, n), `short` its leading left singular vectors P up to errors. With U S V^T the decomposition of
    P^T A, the columns of A V are such vectors within the column space of A, by falling size of the signal.
    Those without any are replaced by those of `fill`. Where all have a signal, P is kept.
    """
    B = product(short.mT, A)
    lengths = jnp.linalg.norm(B, axis=-1)
    # By the Gram matrix a vector is found up to an angle of eps (s_1 / s_k)^2, which lets so much through.
    suspicious = jnp.maximum(level, jnp.sqrt(jnp.finfo(A.dtype).eps)) * jnp.linalg.norm(lengths)

    def turn() -> tuple[Array, Array]:
        U, sizes, Vt = jnp.linalg.svd(B, full_matrices=False)
        quiet = sizes <= level * jnp.linalg.norm(sizes)
        return fill_quiet(product(A, Vt.mT * _signs(U)), quiet, fill, short), quiet

    def keep() -> tuple[Array, Array]:
        return short, lengths < 0  # none, in a type that varies over devices as that of `turn` does

    return jax.lax.cond(jnp.min(lengths) <= suspicious, turn, keep)


def settle_both(
    A: Array, bases: tuple[Array, Array], fills: tuple[Array, Array], level: Any
) -> tuple[Array, Array]:
    """Return bases P and Q of both sides for which P^T A Q is diagonal, by the decomposition of this product.

    Otherwise its other entries would be errors of the decomposition that P is from, which are larger than
    rounding errors. Directions without signal are replaced as by `settle`.
    """
    U, sizes, Vt = jnp.linalg.svd(product(bases[0].mT, product(A, bases[1])))
    quiet = sizes <= level * jnp.linalg.norm(sizes)
    left, right = product(bases[0], U * _signs(U)), product(bases[1], Vt.mT * _signs(U))
    return (
        fill_quiet(product(A, right), quiet, fills[0], left),
        fill_quiet(product(A.mT, left), quiet, fills[1], right),
    )


def fill_quiet(columns: Array, quiet: Array, fill: Array, unless: Array) -> Array:
    """Make orthonormal columns of those that are not quiet and of `fill`; `unless` is kept if none is quiet.

    Quiet columns come last, so that others are not made orthogonal to them.
    """

    def complete() -> Array:
        Q, R = jnp.linalg.qr(jnp.where(quiet[None, :], fill, columns))
        return Q * _signs(R)

    return jax.lax.cond(jnp.any(quiet), complete, lambda: unless)


def _signs(square: Array) -> Array:
    """Return the signs of the diagonal, as a row of 1 and -1."""
    return jnp.where(jnp.diagonal(square) < 0, -1, 1).astype(square.dtype)[None, :]
