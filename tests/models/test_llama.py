"""LLaMA networks: their size, causality, and the loss that both kinds of step see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.galore import Stack, layerwise
from models.llama import SHAPES, Shape, block, embed, joint_step, next_token_loss, param_shapes
from tests.helpers import assert_bad_lanes_are_nan

SMALL = Shape(hidden=8, intermediate=12, layers=2, heads=2, rank=2)


def small_params():
    """A network with few words; everything Gaussian."""
    shapes = param_shapes(SMALL, jnp.float64)
    shapes.outer["embedding"] = jax.ShapeDtypeStruct((11, 8), jnp.float64)
    shapes.outer["head"] = jax.ShapeDtypeStruct((8, 11), jnp.float64)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.asarray(0.5 * rng.normal(size=leaf.shape)) for leaf in leaves])


def test_seven_billion_parameters_are_those_of_the_published_model():
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(SHAPES["7B"]))) == 6_738_415_616


def test_a_token_changes_nothing_before_it():
    layer = jax.tree.map(lambda leaf: leaf[0], small_params().layers)
    x = jax.random.normal(jax.random.key(1), (5, 8))
    before, after = (block(layer, path, heads=2) for path in (x, x.at[3].add(1.0)))
    np.testing.assert_array_equal(before[:3], after[:3])
    assert np.all(np.any(before[3:] != after[3:], axis=1))


def test_tokens_outside_of_the_vocabulary_are_neither_clamped_nor_counted_from_the_end():
    outer, x = small_params().outer, jax.random.normal(jax.random.key(1), (2, 8))
    for call in (lambda tokens: embed(outer, tokens), lambda tokens: next_token_loss(outer, x, tokens)):
        bad = [11, -1, 5], [1, 11, -2]
        assert_bad_lanes_are_nan(call, [3, 1, 4], *bad)
        for tokens in bad:
            with pytest.raises(ValueError, match=r"^tokens must be integers from 0 to 10, got"):
                call(jnp.array(tokens))


def test_both_kinds_of_step_are_one():
    params, tokens = small_params(), jnp.array([3, 1, 4, 1, 5, 9])
    optimizer = optax.sgd(0.1)
    by_layer = layerwise(optimizer, embed, lambda layer, x: block(layer, x, heads=2), next_token_loss)
    joint, _, value = jax.jit(joint_step(optimizer, heads=2))(params, optimizer.init(params), tokens)
    other, _, same = jax.jit(by_layer.step)(params, by_layer.init(params), tokens)
    assert isinstance(other, Stack)
    np.testing.assert_allclose(value, same, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), joint, other)
