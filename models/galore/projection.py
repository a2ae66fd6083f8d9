"""Which matrices a leaf holds, on which sides they are projected, and the projection itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

Projection = Literal["std", "reverse_std", "left", "right", "full"]


class Basis(NamedTuple):
    """Orthonormal columns for each projected side of the matrices of one leaf.

    Attributes:
        left: P, shape (*batch, m, r), or None where rows are not projected.
        right: Q, shape (*batch, n, r), or None where columns are not projected.
    """

    left: Array | None = None
    right: Array | None = None


class Layout(NamedTuple):
    """How one leaf is projected. Static: all of it follows from the leaf's shape and the options.

    Attributes:
        shape: of the leaf.
        rows: axes merged into the rows of the matrices.
        columns: axes merged into their columns.
        rank: the number of basis vectors, at most min(m, n).
        left: whether rows are projected.
        right: whether columns are projected.
        gap: steps between two refreshes.
        phase: the step, modulo gap, at which the leaf refreshes; all refresh at step 0.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rank: int
    left: bool
    right: bool
    gap: int
    phase: int

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes that are neither rows nor columns."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.rows + self.columns)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Lengths of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def m(self) -> int:
        """Rows of each matrix."""
        return math.prod(self.shape[axis] for axis in self.rows)

    @property
    def n(self) -> int:
        """Columns of each matrix."""
        return math.prod(self.shape[axis] for axis in self.columns)

    @property
    def projected_shape(self) -> tuple[int, int]:
        """Shape of each projected matrix."""
        return self.rank if self.left else self.m, self.rank if self.right else self.n


def plan(
    tree: Any,
    rank: Any,
    update_gap: Any,
    scale: Any,
    projection: str,
    matrix_axes: Any,
    stagger: bool,
) -> tuple[tuple[Layout | None, ...], list[Any]]:
    """Layouts and scales of all leaves in the order of the tree; None for those that are not projected."""
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    specs = [axes_of(name, leaf, matrix_axes) for name, leaf in named]
    count = sum(spec is not None for spec in specs)
    layouts: list[Layout | None] = []
    scales: list[Any] = []
    for (name, leaf), spec in zip(named, specs, strict=True):
        if spec is None:
            layouts.append(None)
            scales.append(None)
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params must be real floating arrays, got {leaf.dtype} for {name!r}")
        place = len([layout for layout in layouts if layout is not None])
        gap = require_count("update_gap", _option("update_gap", update_gap, name, leaf))
        whole = require_count("rank", _option("rank", rank, name, leaf))
        layout = Layout(leaf.shape, *spec, whole, True, True, gap, gap * place // count if stagger else 0)
        left, right = _sides(layout.m, layout.n, projection)
        layouts.append(layout._replace(rank=min(whole, layout.m, layout.n), left=left, right=right))
        scales.append(require_scale(_option("scale", scale, name, leaf)))
    return tuple(layouts), scales


def _sides(m: int, n: int, projection: str) -> tuple[bool, bool]:
    shorter_left = m <= n
    left = {"std": shorter_left, "reverse_std": not shorter_left, "left": True, "right": False, "full": True}
    return left[projection], projection == "full" or not left[projection]


def path_name(path: Any) -> str:
    """The keys of a path joined with "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def axes_of(name: str, leaf: Any, matrix_axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes of rows and of columns, not negative; None for a leaf that is not projected."""
    if matrix_axes is None:
        spec = (0, 1) if leaf.ndim == 2 else None
    elif callable(matrix_axes):
        spec = matrix_axes(name, leaf)
    else:
        spec = matrix_axes if leaf.ndim >= 2 else None
    if spec is None or leaf.size == 0:
        return None
    rows, columns = require_axes(spec)
    if not all(-leaf.ndim <= axis < leaf.ndim for axis in rows + columns):
        raise ValueError(f"matrix_axes must be axes of {name!r} of shape {leaf.shape}, got {spec!r}")
    rows, columns = (tuple(axis % leaf.ndim for axis in axes) for axes in (rows, columns))
    if len(set(rows + columns)) < len(rows + columns):
        raise ValueError(f"matrix_axes must name each axis of {name!r} at most once, got {spec!r}")
    return rows, columns


def require_axes(spec: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A spec as two tuples of axes, still as they were given."""
    try:
        rows, columns = (
            tuple(map(operator.index, axes)) if isinstance(axes, (tuple, list)) else (operator.index(axes),)
            for axes in spec
        )
    except (TypeError, ValueError):
        rows = columns = ()
    if not rows or not columns:
        raise ValueError(
            f"matrix_axes must be a pair (rows, columns) of axes or tuples of axes, got {spec!r}"
        )
    return rows, columns


def is_number(option: Any) -> bool:
    """Whether an option is one number for all leaves: neither a function nor a pytree."""
    return not callable(option) and jax.tree_util.all_leaves([option])


def _option(argument: str, option: Any, name: str, leaf: Any) -> Any:
    """The value of an option for one leaf."""
    if callable(option):
        return option(name, leaf)
    if is_number(option):
        return option
    values = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(option)}
    if name not in values:
        raise ValueError(f"{argument} must have a number for every projected leaf, got none for {name!r}")
    return values[name]


def require_count(argument: str, value: Any) -> int:
    """A positive integer."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{argument} must be a positive integer, got {value!r}")
    return count


def require_scale(value: Any) -> Any:
    """A finite number; a traced one is taken as it is."""
    if isinstance(value, Tracer) and value.ndim == 0:
        return value
    try:
        finite = math.isfinite(value)
    except TypeError:
        finite = False
    if not finite:
        raise ValueError(f"scale must be a finite number, got {value!r}")
    return value


def require_choice(argument: str, value: Any, choices: Any) -> None:
    """One of the names of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"{argument} must be one of {get_args(choices)}, got {value!r}")


def to_matrices(leaf: Array, layout: Layout) -> Array:
    """A leaf as its matrices, shape (*batch, m, n)."""
    order = layout.batch + layout.rows + layout.columns
    return leaf.transpose(order).reshape(*layout.batch_shape, layout.m, layout.n)


def from_matrices(matrices: Array, layout: Layout) -> Array:
    """The leaf whose `to_matrices` these are."""
    order = layout.batch + layout.rows + layout.columns
    unmerged = matrices.reshape([layout.shape[axis] for axis in order])
    return unmerged.transpose([order.index(axis) for axis in range(len(order))])


def project(matrices: Array, basis: Basis) -> Array:
    """P^T G, G Q or P^T G Q."""
    if basis.left is not None:
        matrices = basis.left.mT @ matrices
    return matrices if basis.right is None else matrices @ basis.right


def project_back(projected: Array, basis: Basis) -> Array:
    """P N, N Q^T or P N Q^T."""
    if basis.left is not None:
        projected = basis.left @ projected
    return projected if basis.right is None else projected @ basis.right.mT


def map_sides(function: Callable[..., Array], *bases: Basis) -> Basis:
    """Apply a function to the bases of each projected side."""
    return Basis(
        *(None if side[0] is None else function(*side) for side in zip(*bases, strict=True)),
    )
