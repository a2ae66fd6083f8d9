"""Refreshes of bases: the decompositions of gradients, and the steps in which they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from .noise import fill_quiet, noise_level, over, product, settle, settle_both
from .placement import everywhere
from .projection import Basis, Layout, map_sides

Refresh = Literal["eigh", "svd", "randomized", "warm"]

# Subspace iteration has random columns beyond the rank. Where the start is random, as it is in the very first
# refresh of a warm one too, it takes further rounds of two applications of G G^T.
_OVERSAMPLING, _WARM_OVERSAMPLING = 16, 8
_ROUNDS, _FIRST_ROUNDS = 1, 3


def initial_basis(layout: Layout, dtype: Any) -> Basis:
    """Draw orthonormal columns, the same for all batch entries and leaves of one shape.

    A leaf whose first gradient is zero keeps them: unlike coordinate axes, they miss no direction.
    """

    def draw(length: int) -> Array:
        basis = _random_columns(length, layout.rank, jnp.dtype(dtype))
        return jnp.broadcast_to(basis, (*layout.batch_shape, *basis.shape))

    return Basis(draw(layout.m) if layout.left else None, draw(layout.n) if layout.right else None)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _random_columns(length: int, rank: int, dtype: Any) -> Array:
    return jnp.linalg.qr(jax.random.normal(jax.random.key(0), (length, rank), jnp.float32))[0].astype(dtype)


def is_due(count: Array, schedule: tuple[int, int]) -> Array:
    """Tell whether the leaves of a schedule (gap, phase) refresh at this step."""
    gap, phase = schedule
    return (count == 0) | (count % gap == phase)


def when_due(due: Array, renew: Callable[..., Any], old: Any, *operands: Any) -> Any:
    """Return `renew(old, *operands)` where `due`, else `old`; a step where none is due computes nothing.

    Under `vmap` a `cond` whose predicate is mapped computes both branches in every step. Here the predicate
    is whether any lane is due, which is not mapped; lanes that are not keep what they have.
    """

    def renewed(old, *operands):
        new = renew(old, *operands)
        return jax.tree.map(lambda new, old: jnp.where(due, new, old).astype(old.dtype), new, old)

    return jax.lax.cond(_in_any_lane(due), renewed, lambda old, *_: old, old, *operands)


@custom_vmap
def _in_any_lane(flag):
    return flag


@_in_any_lane.def_vmap
def _reduce_lanes(_size, _mapped, flags):
    return _in_any_lane(jnp.any(flags, axis=0)), False


class Method(NamedTuple):
    """How bases are renewed: the decomposition, whether signs are aligned, and whether noise is dropped."""

    refresh: str
    align: bool
    drop_noise: bool


@partial(jax.jit, static_argnames=("layouts", "method"))
def refresh_bases(
    matrices: list[Array],
    bases: list[Basis],
    count: Array,
    *,
    layouts: tuple[Layout, ...],
    method: Method,
) -> list[Basis]:
    """Return the bases for this step, renewed where due; one `cond` serves all leaves of one schedule."""
    bases = list(bases)
    for schedule in dict.fromkeys(layout.schedule for layout in layouts):
        members = [i for i, layout in enumerate(layouts) if layout.schedule == schedule]

        def renew(old, gradients, count, members=members):
            # Here too, and not after the branch alone: each step would gather a basis that is left sharded.
            return [
                everywhere(_renew_each(basis, gradient, count, layouts[i], method))
                for i, basis, gradient in zip(members, old, gradients, strict=True)
            ]

        gradients = [jax.lax.stop_gradient(matrices[i]) for i in members]
        old = [bases[i] for i in members]
        renewed = when_due(is_due(count, schedule), renew, old, gradients, count)
        for i, basis in zip(members, renewed, strict=True):
            bases[i] = basis
    return bases


def _renew_each(old: Basis, gradient: Array, count: Array, layout: Layout, method: Method) -> Basis:
    """Renew the bases of a leaf, one matrix after the other: all at once take the workspace of all."""
    batch = layout.batch_shape
    if not batch:
        return _renew(old, gradient, count, layout, method)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), (old, gradient))
    new = jax.lax.map(lambda one: _renew(one[0], one[1], count, layout, method), flat)
    return map_sides(lambda side: side.reshape(*batch, *side.shape[-2:]), new)


def _renew(old: Basis, gradient: Array, count: Array, layout: Layout, method: Method) -> Basis:
    """Return the leading singular vectors of a gradient, or the old basis where it is zero or not finite."""
    dtype, stored = jnp.promote_types(gradient.dtype, jnp.float32), float(jnp.finfo(gradient.dtype).eps)
    gradient = gradient.astype(dtype)
    # Squares of a tiny gradient would underflow.
    peak = jnp.max(jnp.abs(gradient), axis=(-2, -1), keepdims=True)
    good = jnp.isfinite(peak) & (peak > 0)
    unit = jnp.where(good, over(gradient, peak), 0)
    start = map_sides(lambda side: side.astype(dtype), old)
    level = noise_level(layout, dtype, stored) if method.drop_noise else None
    new = leading_bases(unit, start, count, layout, method.refresh, level)
    if method.align:
        new = map_sides(_aligned, new, start)
    return map_sides(lambda side, before: jnp.where(good, side.astype(before.dtype), before), new, old)


def _aligned(new: Array, old: Array) -> Array:
    agreement = jnp.sum(new * old, axis=-2, keepdims=True)
    return jnp.where(agreement < 0, -new, new)


def leading_bases(
    gradient: Array, start: Basis, count: Array, layout: Layout, refresh: str, level: Any = None
) -> Basis:
    """Compute the leading singular vectors of (m, n) on the projected sides by one of the methods.

    All but the full decomposition find those of the short side first; A is the gradient or its transpose,
    with no more rows than columns. The long side follows from them: A^T W has orthogonal columns. Where a
    level of noise is given, directions below it stay as they were at the start.
    """
    tall = layout.m > layout.n
    A = gradient.mT if tall else gradient
    short_side, long_side = (layout.right, layout.left) if tall else (layout.left, layout.right)
    before: Any = reversed(start) if tall else start
    short_start, long_start = before
    short: Any
    long: Any
    if refresh == "svd":
        U, _, Vt = jnp.linalg.svd(gradient, full_matrices=False)
        left, right = U[:, : layout.rank], Vt[: layout.rank].mT
        short, long = (right, left) if tall else (left, right)
    else:
        short = _short_vectors(A, short_start, long_start, count, layout.rank, refresh)
        long = jnp.linalg.qr(product(A.mT, short))[0] if long_side else None
    if level is not None and short_side and long_side:
        short, long = settle_both(A, (short, long), (short_start, long_start), level)
    elif level is not None and short_side:
        short, _ = settle(A, short, short_start, level)
    elif level is not None:
        settled, quiet = settle(A, short, short, level)
        long = fill_quiet(product(A.mT, settled), quiet, long_start, long)
    short, long = short if short_side else None, long if long_side else None
    return Basis(long, short) if tall else Basis(short, long)


def _short_vectors(A: Array, short_start: Any, long_start: Any, count: Array, rank: int, refresh: str) -> Any:
    """Compute the leading left singular vectors of A."""
    if refresh == "eigh":
        return _leading_eigenvectors(product(A, A.mT), rank)
    if refresh == "randomized":
        return _subspace_iteration(A, None, count, rank)
    return _subspace_iteration(A, product(A, long_start) if short_start is None else short_start, count, rank)


def _leading_eigenvectors(symmetric: Array, rank: int) -> Array:
    return jnp.linalg.eigh(symmetric)[1][..., ::-1][..., :rank]


def _subspace_iteration(A: Array, start: Array | None, count: Array, rank: int) -> Array:
    """Compute leading left singular vectors of A from a random start, or a warm one and some random columns.

    Adam in the subspace depends on the basis and not on the subspace alone: without the rotation at the end
    (Rayleigh-Ritz) the update would be another one.
    """
    rows = A.shape[-2]
    drawn = min(rank + _OVERSAMPLING, rows) if start is None else min(_WARM_OVERSAMPLING, rows - rank)
    random = jax.random.normal(jax.random.fold_in(jax.random.key(1), count), (rows, drawn), A.dtype)
    X = random + 0 * A[..., :1]  # the sum varies over devices as A does, where `shard_map` wants that told
    rounds = _ROUNDS
    if start is not None:
        X = jnp.concatenate([start, X], axis=-1)
        rounds = jnp.where(count == 0, _FIRST_ROUNDS, 0)

    def apply(X):
        return product(A, product(A.mT, X))

    def orthonormal(X):
        return jnp.linalg.qr(X)[0]

    X = jax.lax.fori_loop(0, rounds, lambda _, X: orthonormal(apply(apply(X))), X)
    X = orthonormal(apply(orthonormal(apply(apply(X)))))
    small = product(A.mT, X)
    return product(X, _leading_eigenvectors(product(small.mT, small), rank))
