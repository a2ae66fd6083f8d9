"""The placement on devices of states whose parameters are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .projection import Basis, Layout


def named_sharding(leaf: Any, layout: Layout | None) -> NamedSharding | None:
    """Return the sharding of a leaf's projected matrices: that of the leaf, but for the projected sides.

    It is None where nothing is known or there is nothing to do. Of merged axes only the first may be sharded;
    the others are gathered.
    """
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding if explicit_mesh([leaf]) is not None else None
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    if layout is None:
        return sharding
    axes = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
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
        return _put(side, NamedSharding(sharding.mesh, PartitionSpec(*batch)))

    return jax.tree.map(place, basis)


def _put(array: Any, sharding: Any) -> Any:
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(array, sharding) if explicit else jax.device_put(array, sharding)


def explicit_mesh(leaves: list[Any]) -> Any:
    """Return the mesh with explicit axes that the types of arrays name, None if there is none."""
    for leaf in leaves:
        mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def automatic(update: Callable[..., Any]) -> Callable[..., Any]:
    """Return an update that leaves the placement of what is in between to the compiler.

    Where axes of a mesh are explicit, the type of every array says how it is placed. The new arrays get the
    types of the old ones: updates those of the gradients, and the state those of the state before.
    """

    def run(updates: Any, state: Any, params: Any = None) -> Any:
        typed = updates, state
        mesh = explicit_mesh(jax.tree.leaves(typed))
        if mesh is None:
            return update(updates, state, params)
        axes = tuple(
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        )
        same = jax.tree.map(lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), typed)
        placed: Any = jax.sharding.auto_axes(update, axes=axes, out_sharding=same)
        return placed(updates, state, params)

    return run


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
    """Give those arrays of an inner state that have the shapes in `like` the shardings there.

    Moments in 8 bits stay where they are, as their blocks do not follow axes.
    """

    def is_nothing(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def place(array: Any, wanted: Any) -> Any:
        if is_nothing(array) or is_nothing(wanted) or wanted.sharding is None:
            return array
        fits = array.shape == wanted.shape and array.dtype not in (jnp.int8, jnp.uint8)
        return _put(array, wanted.sharding) if fits else array

    if all(wanted.sharding is None for wanted in jax.tree.leaves(like)):
        return state
    return optax.tree.map_params(inner, place, state, like, is_leaf=is_nothing)
