"""Updates layer by layer are the joint update, in less memory."""

import functools
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.galore import Stack, galore, layerwise, scale_by_adam_8bit
from models.galore.options import GaloreOptions

# The arrays are tiny: what takes the time is compiling.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

WIDTH, HIDDEN, TOKENS = 16, 24, 20


def embed(outer, batch):
    return outer["embed"][batch[0]]


def block(layer, x):
    return x + jnp.tanh(x @ layer["up"] + layer["shift"]["bias"][None]) @ layer["down"]


def loss(outer, x, batch):
    logits = x @ outer["head"]
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def joint_step(optimizer):
    """The same step with the gradient of all layers at once, and one state."""

    def total(params, batch):
        x, _ = jax.lax.scan(
            lambda x, layer: (block(layer, x), None), embed(params.outer, batch), params.layers
        )
        return loss(params.outer, x, batch)

    def step(params, state, batch):
        value, gradient = jax.value_and_grad(total)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def problem(depth):
    rng = np.random.default_rng(0)
    outer = {"embed": rng.normal(size=(9, WIDTH)), "head": rng.normal(size=(WIDTH, 9)) / WIDTH**0.5}
    layers = {
        "up": rng.normal(size=(depth, WIDTH, HIDDEN)) / WIDTH**0.5,
        "down": rng.normal(size=(depth, HIDDEN, WIDTH)) / HIDDEN**0.5,
        "shift": {"bias": rng.normal(size=(depth, HIDDEN))},
    }
    batch = (jnp.arange(TOKENS) % 9, (2 * jnp.arange(TOKENS)) % 9)
    return jax.tree.map(jnp.asarray, Stack(outer, layers)), batch


def of_stack(embed, head, up, down, bias):
    """A pytree of options like the parameters."""
    return Stack({"embed": embed, "head": head}, {"up": up, "down": down, "shift": {"bias": bias}})


def is_down(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "down" in jax.tree_util.keystr(path), params)


# Each option of `galore` is in one of these.
CASES: dict[str, dict[str, Any]] = {
    "staggered": {
        "learning_rate": lambda count: 1e-2 * 0.5 ** count.astype(float),
        "rank": lambda path, leaf: {"layers/up": 3, "layers/down": 2}[path],
        "update_gap": of_stack(9, 9, 3, 2, 9),
        "stagger": True,
        "moments": "reset",
        "weight_decay": 0.1,
        "mask": of_stack(True, False, True, False, True),
    },
    "labelled": {
        "learning_rate": 1e-2,
        "rank": 3,
        "update_gap": 3,
        "labels": of_stack("galore", "adam", "galore", "galore", "adam"),
        "scale": lambda path, leaf: {"outer/embed": 1.0, "layers/up": 0.5, "layers/down": 2.0}[path],
        "projection": of_stack("left", "left", "full", "right", "left"),
        "refresh": "svd",
        "moments": "transport",
        "stagger": True,
        "weight_decay": 0.1,
        "mask": is_down,
        "b1": 0.8,
        "b2": 0.99,
        "eps": 1e-6,
        "eps_convention": "uncorrected",
    },
    "inner": {
        "learning_rate": 1e-2,
        "rank": of_stack(1, 1, 3, 2, 1),
        "update_gap": 3,
        "labels": lambda path, leaf: "galore" if path.startswith("layers") else "adam",
        "inner": scale_by_adam_8bit(block=8, min_size=0),
        "plain": optax.scale_by_lion(),
        "refresh": "warm",
        "drop_noise": False,
        "stagger": True,
    },
}


def matrices(path, leaf):
    """The two last axes of what is a matrix, alone or in a stack."""
    return None if path.endswith("bias") else (-2, -1)


def test_every_option_is_tried():
    assert set().union(*CASES.values(), {"matrix_axes"}) == {field.name for field in fields(GaloreOptions)}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_joint_update_before_and_after_refreshes(case):
    optimizer = galore(**CASES[case], matrix_axes=matrices)
    params, batch = problem(3)
    train = layerwise(optimizer, embed, block, loss)
    by_layer, at_once = (compiled(step) for step in (train.step, joint_step(optimizer)))
    one, all_ = (params, train.init(params)), (params, optimizer.init(params))
    losses = []
    for _ in range(7):
        *one, value = by_layer(*one, batch)
        *all_, expected = at_once(*all_, batch)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        losses.append(float(value))
    for got, wanted in zip(jax.tree.leaves(one[0]), jax.tree.leaves(all_[0]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9)
    assert losses[-1] < losses[0]


def test_its_memory_grows_with_depth_by_activations_alone():
    optimizer = optax.adam(1e-2)

    by_layer = layerwise(optimizer, embed, block, loss)
    ways = (by_layer.init, by_layer.step), (optimizer.init, joint_step(optimizer))

    def temporaries(init, step, depth):
        params, batch = problem(depth)
        state = init(params)
        step = jax.jit(step, donate_argnums=(0, 1))
        memory = step.lower(params, state, batch).compile().memory_analysis()
        both = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
        assert memory.alias_size_in_bytes == both  # in place
        return memory.temp_size_in_bytes

    grows, joint = (temporaries(*way, 10) - temporaries(*way, 2) for way in ways)
    activations, gradients = (8 * 8 * size for size in (TOKENS * WIDTH, 2 * WIDTH * HIDDEN))
    assert grows < 1.5 * activations
    assert joint > gradients + activations
