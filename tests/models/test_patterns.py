"""Patterns have the tokens that they may have, views share them, and the network is what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from models.data.patterns import located_patterns, pattern_views, tokens_of_patterns
from models.functional import as_function
from models.locations import LocalNet, token_overlaps

SIZES = {"fixed": 3, "vocabulary": 7, "per_location": 2}


@given(seed=st.integers(0, 2**31))
def test_patterns_have_few_tokens_at_a_location_and_views_share_them(seed):
    of_patterns, of_views = jax.random.split(jax.random.key(seed))
    patterns = np.asarray(located_patterns(of_patterns, 9, 5, **SIZES))
    assert patterns.shape == (9, 5)
    assert np.all((patterns >= -1) & (patterns < 7))
    assert np.all(np.sum(patterns >= 0, axis=1) == 3)
    present = np.asarray(tokens_of_patterns(patterns, 7))
    for location, row in enumerate(present):
        assert set(np.flatnonzero(row)) == set(patterns[:, location]) - {-1}
    assert np.all(np.sum(present, axis=1) <= 2)

    one, other = (np.asarray(view) for view in pattern_views(of_views, patterns, 64, 7))
    assert np.all((one >= 0) & (one < 7) & (other >= 0) & (other < 7))
    fits = np.all((patterns[None] == -1) | (patterns[None] == one[:, None]), axis=2)
    fits &= np.all((patterns[None] == -1) | (patterns[None] == other[:, None]), axis=2)
    assert np.all(fits.any(axis=1))


def test_patterns_are_equally_likely_and_free_locations_show_any_token_in_each_view_anew():
    one, other = (np.asarray(view) for view in pattern_views(jax.random.key(0), [[2, -1], [0, -1]], 6000, 4))
    assert np.all(one[:, 0] == other[:, 0])
    assert set(one[:, 0]) == {0, 2}
    assert abs(np.mean(one[:, 0] == 2) - 0.5) < 5 * 0.5 / 6000**0.5
    joint = np.histogram2d(one[:, 1], other[:, 1], bins=np.arange(5) - 0.5)[0] / 6000
    assert np.max(np.abs(joint - 1 / 16)) < 5 * (1 / 16 / 6000) ** 0.5


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: located_patterns(jax.random.key(0), 2, 3, fixed=4, vocabulary=5, per_location=2), "fixed"),
        (lambda: located_patterns(jax.random.key(0), 2, 3, fixed=2, vocabulary=5, per_location=6), "per_loc"),
        (lambda: located_patterns(jax.random.key(0), 0, 3, fixed=2, vocabulary=5, per_location=2), "count"),
        (lambda: pattern_views(jax.random.key(0), [[3]], 2, 3), "patterns"),
        (lambda: pattern_views(jax.random.key(0), [[0]], 0, 3), "size"),
        (lambda: tokens_of_patterns([[-2]], 3), "patterns"),
        (lambda: tokens_of_patterns([0], 3), "patterns"),
        (lambda: LocalNet(jnp.ones((2, 3, 4)), jnp.ones((1, 5)), nnx.relu), "head"),
        (lambda: LocalNet(jnp.ones((2, 3, 4)), jnp.ones((1, 6)), nnx.relu)(jnp.ones((2, 3, 4))), "x must"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        call()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_local_net_is_what_is_written(normalized, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    filters, head, x = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, [(2, 3, 4), (5, 6), (8, 2, 4)], strict=True)
    )
    predict, params = as_function(LocalNet(filters, head, nnx.relu, normalized))
    hidden = np.concatenate(
        [np.maximum(np.asarray(x)[:, k] @ np.asarray(filters)[k].T, 0) for k in (0, 1)], 1
    )
    if normalized:
        hidden = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-5)
    out = predict(params, x)
    assert out.dtype == dtype
    assert len(jax.tree.leaves(params)) == 2
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(out, hidden @ np.asarray(head).T, rtol=10 * tolerance, atol=tolerance)


def test_gradients_pass_through_the_mean_and_the_variance_of_the_batch():
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = [(2, 3, 4), (5, 6), (8, 2, 4)]
    filters, head, x = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    predict, params = as_function(LocalNet(filters, head, nnx.relu))

    def written(filters):
        hidden = nnx.relu(jnp.einsum("nkd,kmd->nkm", x, filters)).reshape(len(x), -1)
        mean, variance = jnp.mean(hidden, axis=0, keepdims=True), jnp.var(hidden, axis=0, keepdims=True)
        return jnp.sum(((hidden - mean) / jnp.sqrt(variance + 1e-5) @ head.T) ** 3)

    found = jax.grad(lambda params: jnp.sum(predict(params, x) ** 3))(params)
    np.testing.assert_allclose(found["filters"]["kernel"][...], jax.grad(written)(filters), rtol=1e-10)


def test_overlaps_are_cosines_of_the_closest_nodes():
    filters = np.random.default_rng(0).normal(size=(3, 4, 5))
    filters[0, 0] = 0  # a node that is close to none
    filters[1] = -np.abs(filters[1])
    norms = np.linalg.norm(filters, axis=2, keepdims=True)
    cosines = filters / np.where(norms == 0, 1, norms)
    np.testing.assert_allclose(token_overlaps(filters), cosines.max(axis=1), rtol=1e-12)
    unsigned = token_overlaps(filters, signed=False)
    np.testing.assert_allclose(unsigned, np.abs(cosines).max(axis=1), rtol=1e-12)
    assert np.all(token_overlaps(filters)[1] < 0)
