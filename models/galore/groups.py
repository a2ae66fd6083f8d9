"""Groups of leaves that go through the inner transformation together, and what that may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal as Constant

from .projection import Layout


class Group(NamedTuple):
    """A group holds the places of the leaves that share a state of the inner transformation.

    Attributes:
        members: places of the leaves in the order of the tree.
        batch_shape: lengths of their batch axes, over which the inner transformation is mapped.
        schedule: gap and phase of their refreshes where these reset the state, else None.
    """

    members: tuple[int, ...]
    batch_shape: tuple[int, ...]
    schedule: tuple[int, int] | None

    def tree(self, leaves: Any, treedef: Any) -> Any:
        """Return the tree with the leaves of the group, and Optax's placeholder for all others."""
        kept = [leaves[i] if i in self.members else optax.MaskedNode() for i in range(treedef.num_leaves)]
        return treedef.unflatten(kept)

    def shapes(self, like: list[Any], layouts: list[Layout | None], treedef: Any) -> Any:
        """Return shapes and dtypes as the inner transformation sees them, without batch axes."""
        found = {}
        for i in self.members:
            layout = layouts[i]
            shape = like[i].shape if layout is None else layout.projected_shape
            found[i] = jax.ShapeDtypeStruct(shape, like[i].dtype)
        return self.tree(found, treedef)

    def over_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Map a function over all batch axes."""
        for _ in self.batch_shape:
            function = jax.vmap(function)
        return function


def groups_of(layouts: list[Layout | None], moments: str) -> list[Group]:
    """Return the groups; a tree without leaves has an empty one, whose state may hold a count."""
    members: dict[Any, list[int]] = {}
    for i, layout in enumerate(layouts):
        batch_shape = () if layout is None else layout.batch_shape
        schedule = None if layout is None or moments != "reset" else layout.schedule
        members.setdefault((batch_shape, schedule), []).append(i)
    return [Group(tuple(places), *shared) for shared, places in members.items()] or [Group((), (), None)]


def zeros(shapes: Any, batch_shape: tuple[int, ...] = ()) -> Any:
    """Return arrays of zeros, with batch axes in front."""
    return jax.tree.map(lambda leaf: jnp.zeros((*batch_shape, *leaf.shape), leaf.dtype), shapes)


def require_no_values(inner: optax.GradientTransformation, shapes: Any) -> None:
    """Refuse an inner transformation whose updates depend on the values of parameters."""
    state = jax.eval_shape(inner.init, shapes)
    traced = jax.make_jaxpr(lambda params, g, s: inner.update(g, s, params))(shapes, shapes, state)
    parameters = len(jax.tree.leaves(shapes))
    if any(_reaches(traced.jaxpr, [i < parameters for i in range(len(traced.jaxpr.invars))])):
        raise ValueError(
            "inner must not read the values of parameters (weight decay, trust ratios and parameter scales "
            "go after scale_by_galore), got one that does"
        )


def _reaches(jaxpr: Any, marked: list[bool]) -> list[bool]:
    """Tell which outputs of a traced program depend on the marked inputs."""
    reached = {var for var, mark in zip(jaxpr.invars, marked, strict=True) if mark}

    def is_reached(var):
        return not isinstance(var, Constant) and var in reached

    for equation in jaxpr.eqns:
        inputs = [is_reached(var) for var in equation.invars]
        called = equation.params.get("jaxpr")
        if called is not None and equation.primitive.name in ("jit", "pjit"):
            outputs = _reaches(called.jaxpr, inputs)
        elif equation.primitive.name == "cond" and not inputs[0]:
            branches = [_reaches(branch.jaxpr, inputs[1:]) for branch in equation.params["branches"]]
            outputs = [any(of_branches) for of_branches in zip(*branches, strict=True)]
        else:
            outputs = [any(inputs)] * len(equation.outvars)
        reached |= {var for var, mark in zip(equation.outvars, outputs, strict=True) if mark}
    return [is_reached(var) for var in jaxpr.outvars]
