"""Updates layer by layer are the joint update, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.galore import Stack, galore, layerwise

WIDTH, HIDDEN, TOKENS = 16, 24, 20


def embed(outer, batch):
    return outer["embed"][batch[0]]


def block(layer, x):
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"]


def loss(outer, x, batch):
    logits = x @ outer["head"]
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def joint_step(optimizer):
    """The same step with the gradient of all layers at once."""

    def total(params, batch):
        x, _ = jax.lax.scan(
            lambda x, layer: (block(layer, x), None), embed(params.outer, batch), params.layers
        )
        return loss(params.outer, x, batch)

    def step(params, state, batch):
        value, gradient = jax.value_and_grad(total)(params, batch)
        outer, outer_state = optimizer.update(gradient.outer, state.outer, params.outer)
        layers, layer_states = jax.vmap(optimizer.update)(gradient.layers, state.layers, params.layers)
        return optax.apply_updates(params, Stack(outer, layers)), Stack(outer_state, layer_states), value

    return step


def problem(depth):
    rng = np.random.default_rng(0)
    outer = {"embed": rng.normal(size=(9, WIDTH)), "head": rng.normal(size=(WIDTH, 9)) / WIDTH**0.5}
    layers = {
        "up": rng.normal(size=(depth, WIDTH, HIDDEN)) / WIDTH**0.5,
        "down": rng.normal(size=(depth, HIDDEN, WIDTH)) / HIDDEN**0.5,
    }
    batch = (jnp.arange(TOKENS) % 9, (2 * jnp.arange(TOKENS)) % 9)
    return jax.tree.map(jnp.asarray, Stack(outer, layers)), batch


def test_it_is_the_joint_update_before_and_after_refreshes():
    optimizer = galore(1e-2, 3, update_gap=2, weight_decay=0.1)
    params, batch = problem(3)
    train = layerwise(optimizer, embed, block, loss)
    state = train.init(params)
    by_layer, at_once = jax.jit(train.step), jax.jit(joint_step(optimizer))
    one, all_ = (params, state), (params, state)
    losses = []
    for _ in range(4):
        *one, value = by_layer(*one, batch)
        *all_, expected = at_once(*all_, batch)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        losses.append(float(value))
    for got, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(all_), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9)
    assert losses[-1] < losses[0]


def test_its_memory_grows_with_depth_by_activations_alone():
    optimizer = optax.adam(1e-2)

    def temporaries(make_step, depth):
        params, batch = problem(depth)
        state = layerwise(optimizer, embed, block, loss).init(params)
        step = jax.jit(make_step(optimizer), donate_argnums=(0, 1))
        memory = step.lower(params, state, batch).compile().memory_analysis()
        both = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
        assert memory.alias_size_in_bytes == both  # in place
        return memory.temp_size_in_bytes

    by_layer, at_once = (
        temporaries(make_step, 10) - temporaries(make_step, 2)
        for make_step in (lambda optimizer: layerwise(optimizer, embed, block, loss).step, joint_step)
    )
    activations, gradients = (8 * 8 * size for size in (TOKENS * WIDTH, 2 * WIDTH * HIDDEN))
    assert by_layer < 1.5 * activations
    assert at_once > gradients + activations
