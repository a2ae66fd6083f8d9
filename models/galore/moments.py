"""Moments at a refresh: what becomes of the state of the inner transformation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .groups import Group, zeros
from .projection import Basis, Layout
from .refresh import is_due, when_due


def at_refresh(inner: optax.GradientTransformation, moments: str) -> Callable[..., Any]:
    """Return what `moments` says to do in each step: from the old state of a group to the one to use."""

    # This is one program, so that nothing is compiled again where `update` is called outside of `jit`.
    @partial(jax.jit, static_argnums=(2, 3, 4))
    def reset_when_due(state, count, group, structure, shapes):
        start = zeros(jax.tree.unflatten(structure, shapes), group.batch_shape)
        return when_due(is_due(count, group.schedule), lambda _: group.over_batch(inner.init)(start), state)

    def change(
        state: Any,
        count: Array,
        old: list[Basis],
        new: list[Basis],
        layouts: list[Layout | None],
        group: Group,
        shapes: Any,
    ) -> Any:
        if group.schedule is not None:
            leaves, structure = jax.tree.flatten(shapes)
            return reset_when_due(state, count, group, structure, tuple(leaves))
        if moments == "transport":
            return _transport(state, count, old, new, layouts, group)
        return state

    return change


def _transport(
    state: Any, count: Array, old: list[Basis], new: list[Basis], layouts: list[Layout | None], group: Group
) -> Any:
    """Map the moments of the leaves that are due from the old coordinates to the new."""

    def carry(adam: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        mu, treedef = jax.tree.flatten(adam.mu)
        nu = treedef.flatten_up_to(adam.nu)
        for place, i in enumerate(group.members):
            layout = layouts[i]
            if layout is not None:
                pair = mu[place], nu[place]
                mu[place], nu[place] = _move_when_due(pair, old[i], new[i], count, layout.schedule)
        return adam._replace(mu=treedef.unflatten(mu), nu=treedef.unflatten(nu))

    return jax.tree.map(lambda node: carry(node) if _is_adam(node) else node, state, is_leaf=_is_adam)


def require_moments(inner: optax.GradientTransformation, shapes: Any, moments: str) -> None:
    """Refuse an inner transformation without moments of Adam where these are transported."""
    if moments != "transport":
        return
    state = jax.eval_shape(inner.init, shapes)
    adams = [node for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node)]
    leaves = len(jax.tree.leaves(shapes))
    if not adams or any(len(jax.tree.leaves(adam.mu)) != leaves for adam in adams):
        raise ValueError(
            'moments must not be "transport" unless inner keeps the state of optax.scale_by_adam, got '
            f"{type(state).__name__}"
        )


@partial(jax.jit, static_argnums=4)
def _move_when_due(pair, old, new, count, schedule):
    return when_due(is_due(count, schedule), _move, pair, old, new)


def _move(pair: tuple[Array, Array], old: Basis, new: Basis) -> tuple[Array, Array]:
    """Map M to C M and V to (C * C) V, on each projected side with C = P_new^T P_old."""

    def turn(moment, turned, power):
        # A basis that was kept is not mapped: its C is the identity up to rounding only.
        same = jnp.ones((*moment.shape[:-2], 1, 1), bool)
        for side in ("left", "right"):
            before, after = getattr(old, side), getattr(new, side)
            if before is not None:
                same = same & jnp.all(before == after, axis=(-2, -1), keepdims=True)
                C = (after.mT @ before) ** power
                turned = C @ turned if side == "left" else turned @ C.mT
        return jnp.where(same, moment, turned.astype(moment.dtype))

    M, V = pair
    return turn(M, M, 1), turn(V, V, 2)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
