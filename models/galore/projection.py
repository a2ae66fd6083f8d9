"""The matrices of a leaf, their bases, and the projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax import Array

Projection = Literal["std", "reverse_std", "left", "right", "full"]


class Basis(NamedTuple):
    """A basis holds orthonormal columns for each projected side of the matrices of one leaf.

    The state of an optimizer holds those of all leaves in one, whose sides are trees like the parameters.

    Attributes:
        left: P, shape (*batch, m, r), or None where rows are not projected.
        right: Q, shape (*batch, n, r), or None where columns are not projected.
    """

    left: Array | None = None
    right: Array | None = None

    @property
    def dtype(self) -> Any:
        """Return the dtype of the sides that there are."""
        return jax.tree.leaves(self)[0].dtype


def pack(bases: Sequence[Basis], treedef: Any) -> Basis:
    """Return the bases of all leaves as two trees of arrays, with Optax's placeholder where there is none.

    Arrays at the places of the parameters are what other libraries find in the states of Optax.
    """
    sides = ([optax.MaskedNode() if side is None else side for side in one] for one in _by_side(bases))
    return Basis(*map(treedef.unflatten, sides))


def unpack(packed: Basis, treedef: Any) -> list[Basis]:
    """Return the bases of the leaves one by one."""
    sides = (treedef.flatten_up_to(side) for side in packed)
    return [
        Basis(*(None if isinstance(side, optax.MaskedNode) else side for side in one))
        for one in zip(*sides, strict=True)
    ]


def _by_side(bases: Sequence[Basis]) -> Any:
    return [basis.left for basis in bases], [basis.right for basis in bases]


class Layout(NamedTuple):
    """A layout says how one leaf is projected, which follows from the leaf's shape and the options.

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
        """Return the axes that are neither rows nor columns."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.rows + self.columns)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Return the lengths of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def m(self) -> int:
        """Return the number of rows of each matrix."""
        return math.prod(self.shape[axis] for axis in self.rows)

    @property
    def n(self) -> int:
        """Return the number of columns of each matrix."""
        return math.prod(self.shape[axis] for axis in self.columns)

    @property
    def schedule(self) -> tuple[int, int]:
        """Return the gap and the phase; leaves for which these are the same refresh together."""
        return self.gap, self.phase

    @property
    def projected_shape(self) -> tuple[int, int]:
        """Return the shape of each projected matrix."""
        return self.rank if self.left else self.m, self.rank if self.right else self.n


def to_matrices(leaf: Array, layout: Layout) -> Array:
    """Arrange a leaf as its matrices, shape (*batch, m, n)."""
    order = layout.batch + layout.rows + layout.columns
    return leaf.transpose(order).reshape(*layout.batch_shape, layout.m, layout.n)


def from_matrices(matrices: Array, layout: Layout) -> Array:
    """Return the leaf whose `to_matrices` these are."""
    order = layout.batch + layout.rows + layout.columns
    unmerged = matrices.reshape([layout.shape[axis] for axis in order])
    return unmerged.transpose([order.index(axis) for axis in range(len(order))])


def project(matrices: Array, basis: Basis) -> Array:
    """Compute P^T G, G Q or P^T G Q, whichever sides the basis has."""
    if basis.left is not None:
        matrices = basis.left.mT @ matrices
    return matrices if basis.right is None else matrices @ basis.right


def project_back(projected: Array, basis: Basis) -> Array:
    """Compute P N, N Q^T or P N Q^T, whichever sides the basis has."""
    if basis.left is not None:
        projected = basis.left @ projected
    return projected if basis.right is None else projected @ basis.right.mT


def map_sides(function: Callable[..., Array], *bases: Basis) -> Basis:
    """Apply a function to the bases of each projected side."""
    return Basis(
        *(None if side[0] is None else function(*side) for side in zip(*bases, strict=True)),
    )
