"""The placement on devices of states whose parameters are sharded."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .adam import Blocks
from .projection import Basis, Layout


def named_sharding(leaf: Array, layout: Layout | None) -> NamedSharding | None:
    """Return the sharding of a leaf's projected matrices: that of the leaf, but for the projected sides.

    It is None where nothing is known or there is nothing to do. Of merged axes only the first may be sharded;
    the others are gathered.
    """
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    if layout is None:
        return sharding
    axes = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    batch = [axes[axis] for axis in layout.batch]
    rows = None if layout.left else axes[layout.rows[0]]
    columns = None if layout.right else axes[layout.columns[0]]
    return NamedSharding(sharding.mesh, PartitionSpec(*batch, rows, columns))


def place_basis(basis: Basis, sharding: NamedSharding | None) -> Basis:
    """Put a basis on every device; its batch axes are sharded like the leaf."""
    if sharding is None:
        return basis

    def place(side: Array) -> Array:
        batch = sharding.spec[: side.ndim - 2]
        return jax.device_put(side, NamedSharding(sharding.mesh, PartitionSpec(*batch)))

    return jax.tree.map(place, basis)


def everywhere(basis: Basis) -> Basis:
    """Keep a basis on every device in a compiled program, where `jax.set_mesh` tells the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return basis

    def keep(side: Array) -> Array:
        batch = [PartitionSpec.UNCONSTRAINED] * (side.ndim - 2)
        return jax.lax.with_sharding_constraint(side, PartitionSpec(*batch, None, None))

    return jax.tree.map(keep, basis)


def place_inner(inner: optax.GradientTransformation, state: Any, like: Any) -> Any:
    """Give those arrays of an inner state that have the shapes in `like` the shardings there."""

    def place(array: Any, wanted: jax.ShapeDtypeStruct) -> Any:
        # Moments in blocks stay where they are: blocks do not follow axes.
        fits = not isinstance(array, Blocks) and array.shape == wanted.shape
        return jax.device_put(array, wanted.sharding) if fits and wanted.sharding is not None else array

    if all(wanted.sharding is None for wanted in jax.tree.leaves(like)):
        return state
    return optax.tree.map_params(inner, place, state, like, is_leaf=lambda node: isinstance(node, Blocks))
