"""Training layer by layer: the joint update, with the gradient of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .paths import absent


class Stack(NamedTuple):
    """A stack holds the parameters of equal layers and of what is around them, or their optimizer states.

    Attributes:
        outer: what is used before and after the layers, such as an embedding and a head.
        layers: the layers, every leaf with the layers in front, (L, ...).
    """

    outer: Any
    layers: Any


class Layerwise(NamedTuple):
    """The class holds the two pure functions that `layerwise` returns.

    Attributes:
        init: `init(params) -> state`, both a `Stack`.
        step: `step(params, state, batch) -> (params, state, loss)`.
    """

    init: Callable[[Stack], Stack]
    step: Callable[[Stack, Stack, Any], tuple[Stack, Stack, Array]]


def layerwise(
    optimizer: optax.GradientTransformation,
    embed: Callable[[Any, Any], Any],
    block: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any, Any], Array],
) -> Layerwise:
    r"""Make training steps of a stack that update each layer as soon as its gradient is known.

    The network is x_0 = embed(outer, batch), x_(l+1) = block(layers[l], x_l), and its loss
    loss(outer, x_L, batch). Forward, only the x_l are kept; backward, each layer is computed again, its
    gradient goes through the optimizer and into its parameters, and is forgotten. Numbers are those of the
    joint update, since all layers' gradients are taken at the old parameters. What is saved is the gradient
    of all layers but one, and what is kept within layers, for one more forward pass.

    With `galore` they are those of one optimizer of the whole `Stack`, whose `matrix_axes` leave the axis of
    the layers to itself, for all its options. The optimizer is given the whole tree, with `Absent` for what
    is updated elsewhere: a path begins with "outer" or "layers" and a leaf of the layers has the shape of one
    layer. Pytrees of labels, ranks, masks and the like are `Stack`s.

    Jit `step` with `donate_argnums=(0, 1)`: parameters and states are then updated in place. An optimizer
    that couples layers, such as one that clips by the global norm, does so within each layer only; 8-bit
    moments of what has no matrix are cut into blocks layer by layer.

    Source: derived here; compare zhao2024galore, section 4.3 (per-layer weight updates).

    Args:
        optimizer: any, such as `galore(1e-3, rank=128)`; every layer has a state of its own.
        embed: from the outer parameters and the batch to the first layer's input.
        block: a layer; its output is like its input.
        loss: scalar.

    Returns:
        The functions `init` and `step`.

    Example:
        >>> layers = {"kernel": 0.1 * jnp.ones((3, 2, 2))}
        >>> block = lambda layer, x: x + jnp.tanh(x @ layer["kernel"])
        >>> loss = lambda outer, x, batch: jnp.mean(jnp.square(x @ outer - batch))
        >>> train = layerwise(optax.sgd(0.1), lambda outer, batch: jnp.ones((4, 2)), block, loss)
        >>> params = Stack(jnp.ones((2, 1)), layers)
        >>> params, state, value = train.step(params, train.init(params), jnp.ones((4, 1)))
        >>> params.layers["kernel"].shape, round(float(value), 3)
        ((3, 2, 2), 5.869)
    """

    def init(params: Stack) -> Stack:
        around, one = absent(params.outer), absent(params.layers, axes=1)
        states = jax.vmap(lambda layer: optimizer.init(Stack(around, layer)))(params.layers)
        return Stack(optimizer.init(Stack(params.outer, one)), states)

    def step(params: Stack, state: Stack, batch: Any) -> tuple[Stack, Stack, Array]:
        around, one = absent(params.outer), absent(params.layers, axes=1)
        first, pull_embed = jax.vjp(lambda outer: embed(outer, batch), params.outer)
        last, inputs = jax.lax.scan(lambda x, layer: (block(layer, x), x), first, params.layers)
        value, pull_loss = jax.vjp(lambda outer, x: loss(outer, x, batch), params.outer, last)
        of_loss, cotangent = pull_loss(jnp.ones_like(value))

        def update_layer(cotangent, layer, layer_state, x):
            gradient, cotangent = jax.vjp(block, layer, x)[1](cotangent)
            moved: Any = optimizer.update(Stack(around, gradient), layer_state, Stack(around, layer))
            updates, layer_state = moved
            return cotangent, optax.apply_updates(layer, updates.layers), layer_state

        def backward(index, carried):
            # What is carried is updated in place, where the outputs of a scan are new arrays. The branch is
            # always taken: without it compilers merge reading a layer with writing it, and copy all layers.
            cotangent, layers, states = carried
            taken = (cotangent, _take(layers, index), _take(states, index))
            cotangent, layer, layer_state = jax.lax.cond(
                index >= 0, update_layer, lambda *taken: taken[:3], *taken, _take(inputs, index)
            )
            return cotangent, _put(layers, layer, index), _put(states, layer_state, index)

        depth = jax.tree.leaves(params.layers)[0].shape[0]
        cotangent, layers, states = jax.lax.fori_loop(
            0,
            depth,
            lambda i, carried: backward(depth - 1 - i, carried),
            (cotangent, params.layers, state.layers),
        )
        gradient = jax.tree.map(jnp.add, of_loss, pull_embed(cotangent)[0])
        moved: Any = optimizer.update(Stack(gradient, one), state.outer, Stack(params.outer, one))
        updates, outer_state = moved
        outer = optax.apply_updates(params.outer, updates.outer)
        return Stack(outer, layers), Stack(outer_state, states), value

    return Layerwise(init, step)


def _take(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def _put(tree: Any, part: Any, index: Any) -> Any:
    return jax.tree.map(
        lambda leaf, value: jax.lax.dynamic_update_index_in_dim(leaf, value, index, 0), tree, part
    )
