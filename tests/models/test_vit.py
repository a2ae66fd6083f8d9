"""The vision transformer: what its heads compute, how its start is scaled, and the products of its heads."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import head_products
from models.attention.products import thin_products
from models.data.images import digits
from models.functional import as_function
from models.vit import VisionTransformer, head_weights, scale_initial
from sims.incremental.vit import PRESETS, Config, build, optimizer, total_loss, train_lanes
from tests.helpers import count_compilations

SIZES = {"patch": (2, 3), "depth": 2, "heads": 3, "width": 8, "head_dim": 2, "mlp_width": 5}
NAMES = ("key", "query", "value", "output")


@cache
def make(*, pool):
    def start(key):
        model = VisionTransformer(key, (4, 6, 2), 4, pool=pool, **SIZES)
        predict, params = as_function(model)
        # Biases and gains that matter.
        leaves, tree = jax.tree.flatten(params)
        random = np.random.default_rng(0)
        noise = [0.3 * random.normal(size=leaf.shape) for leaf in leaves]
        return predict, jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])

    predict, params = jax.jit(start)(jax.random.key(0))
    return jax.jit(predict), params


def images(shape=(4, 6, 2)):
    return jnp.asarray(np.random.default_rng(2).normal(size=(5, *shape)))


def normed(x, norm):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
    return centred / deviation * norm["scale"] + norm["bias"]


def linear(x, layer):
    return x @ layer["kernel"] + layer["bias"]


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_the_network_is_what_its_formula_says(pool):
    """With heads from `head_products` alone: nothing else of attention's weights matters."""
    from scipy.special import erf, softmax

    predict, params = make(pool=pool)
    KQ, VO = map(np.asarray, head_products(head_weights(params)))
    plain = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    for image, logits in zip(np.asarray(images()), np.asarray(predict(params, images())), strict=True):
        cut = [image[top : top + 2, left : left + 3].ravel() for top in (0, 2) for left in (0, 3)]
        x = linear(np.stack(cut), plain["embedder"])
        x = x if pool == "mean" else np.vstack([plain["class_token"], x])
        x = x + plain["position"]
        for layer in range(2):
            block = plain["blocks"][layer]
            tokens = normed(x, block["attention_norm"])
            for head in range(3):
                attention = softmax(tokens @ KQ[layer, head].T @ tokens.T / np.sqrt(2), axis=1)
                x = x + attention @ tokens @ VO[layer, head]
            hidden = linear(normed(x, block["mlp_norm"]), block["expand"])
            x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, block["contract"])
        x = normed(x, plain["norm"])
        expected = linear(x.mean(axis=0) if pool == "mean" else x[0], plain["head"])
        np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-11)


def test_without_positions_the_order_of_the_patches_does_not_matter():
    predict, params = make(pool="class")
    same = params["position"][...].at[1:].set(params["position"][...][1])
    swapped = jnp.roll(images(), (2, 3), axis=(1, 2))
    without = type(params)({**params, "position": params["position"].replace(same)})
    np.testing.assert_allclose(predict(without, images()), predict(without, swapped), rtol=1e-12, atol=1e-13)
    assert float(jnp.max(jnp.abs(predict(params, images()) - predict(params, swapped)))) > 1e-3


@pytest.mark.parametrize(("scale", "gain_scale"), [(0.25, None), (0.5, 1.0)])
def test_the_scale_multiplies_everything_but_the_embedder(scale, gain_scale):
    sizes: Any = SIZES | {"depth": 1}
    model = VisionTransformer(jax.random.key(0), (4, 6, 2), 4, **sizes)
    _, params = as_function(model)
    # Of 32 numbers: 0.4 is three standard errors.
    assert float(jnp.std(params["position"][...])) == pytest.approx(0.02, rel=0.4)
    scaled = jax.jit(lambda s, g: scale_initial(params, s, gain_scale=g))(scale, gain_scale)
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (params, scaled))
    factors = []
    for path, leaf in before.items():
        name = jax.tree_util.keystr(path)
        gain = "norm" in name and "scale" in name
        factor = 1 if "embedder" in name else scale if gain_scale is None or not gain else gain_scale
        factors.append((gain, factor))
        np.testing.assert_array_equal(after[path], factor * leaf)
    assert len([factor for gain, factor in factors if gain]) == 3
    assert len([factor for _, factor in factors if factor == 1]) >= 2


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))


@settings(max_examples=12)
@given(shapes, st.integers(0, 2**32 - 1))
def test_thin_products_have_the_singular_values_of_the_products(shape, seed):
    d, k, heads = shape
    rng = np.random.default_rng(seed)
    weights, start = ({name: rng.normal(size=(heads, d, k)) for name in NAMES} for _ in range(2))
    changes = (new - old for new, old in zip(head_products(weights), head_products(start), strict=True))
    for full, thin in zip(
        (*head_products(weights), *changes),
        (*thin_products(weights), *thin_products(weights, start)),
        strict=True,
    ):
        values, small = (np.linalg.svd(matrix, compute_uv=False) for matrix in (full, thin))
        expected = np.zeros_like(small)
        count = min(values.shape[-1], small.shape[-1])
        expected[:, :count] = values[:, :count]
        np.testing.assert_allclose(small, expected, atol=1e-13 * max(1, d * k))
        np.testing.assert_allclose(values[:, count:], 0, atol=1e-13 * max(1, d * k))


def test_a_small_change_is_not_lost_in_float32():
    rng = np.random.default_rng(0)
    start = {name: jnp.asarray(rng.normal(size=(6, 2)), jnp.float32) for name in NAMES}
    assert all(float(jnp.max(jnp.abs(thin))) == 0 for thin in thin_products(start, start))
    moved = {**start, "key": start["key"].at[0, 0].add(1e-5)}
    exact = {name: np.asarray(array, float) for name, array in moved.items()}
    change = (exact["key"] - np.asarray(start["key"], float)) @ exact["query"].T
    thin, _ = thin_products(moved, start)
    assert thin.dtype == jnp.float32
    assert float(jnp.linalg.norm(thin)) == pytest.approx(np.linalg.norm(change), rel=1e-5)


def test_an_infinite_weight_has_no_products():
    rng = np.random.default_rng(0)
    weights = {name: jnp.asarray(rng.normal(size=(2, 3, 2))) for name in NAMES}
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        KQ, VO = thin_products({**weights, "output": weights["output"].at[0, 0, 0].set(bad)})
        assert np.all(np.isfinite(KQ))
        assert np.isnan(VO).all(axis=(1, 2)).tolist() == [True, False]


def test_bad_input_is_refused():
    def build(**changes):
        options = {"image_shape": (4, 6), "classes": 2, **SIZES, **changes}
        return VisionTransformer(jax.random.key(0), **options)

    with pytest.raises(ValueError, match="image_shape must be"):
        build(image_shape=(4,))
    with pytest.raises(ValueError, match="heads must be an integer >= 1, got 0"):
        build(heads=0)
    with pytest.raises(ValueError, match="shape must tile images of 4 by 6 pixels, got 3 by 3"):
        build(patch=(3, 3))
    # One patch alone would be added to all positions.
    predict, params = make(pool="mean")  # arguments by name: this is what the cache goes by
    for shape in ((2, 3, 2), (4, 6, 1), (4, 6)):
        with pytest.raises(ValueError, match=r"images must have shape \(B, 4, 6, 2\), got shape \(5, "):
            predict(params, images(shape))
    for scale in (-1.0, jnp.inf, [1.0]):
        with pytest.raises(ValueError, match="scale must be a finite number >= 0"):
            scale_initial(params, scale)
    with pytest.raises(ValueError, match="params must hold embedder, got"):
        scale_initial({"head": jnp.ones(2)}, 1.0)

    weights = {name: jnp.ones((2, 3, 1)) for name in NAMES}
    with pytest.raises(ValueError, match="params must hold key, query, value, output, got no query, output"):
        head_products({"key": weights["key"], "value": weights["value"]})
    for name, shape, message in (
        ("query", (2, 3, 2), "key and query must have one shape"),
        ("output", (3, 1), "value and output must have one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            head_products({**weights, name: jnp.ones(shape)})
    with pytest.raises(ValueError, match="key and value must agree but for the last axis"):
        thin_products({**weights, "value": jnp.ones((3, 1)), "output": jnp.ones((3, 1))})
    with pytest.raises(ValueError, match="initial and params must have the same shapes"):
        thin_products(weights, {name: jnp.ones((1, 3, 1)) for name in NAMES})


def test_one_program_trains_all_scales_and_seeds_and_none_acts_on_another():
    small = Config(depth=1, heads=2, head_dim=2, width=4, mlp_width=4)
    config = replace(small, seeds=2, batch=3, steps=4, every=2, calls=1)
    pixels, labels = digits("float32")
    few = (pixels[:6], labels[:6])
    lanes = [(1.0, 1.0), (0.3, 0.3), (0.1, 1.0)]
    with count_compilations() as compiled:
        _, path = train_lanes(config, lanes, jax.random.key(0), few, few)
        _, other = train_lanes(config, [lanes[1], lanes[1], lanes[0]], jax.random.key(0), few, few)
    assert compiled.count("jit(_advance)") == 1
    assert path.ys.KQ.stable_rank.shape == (3, 3, 2, 1, 2)
    for first, second in zip(jax.tree.leaves(path.ys), jax.tree.leaves(other.ys), strict=True):
        np.testing.assert_allclose(first[:, [1, 1, 0]], second, rtol=1e-3, atol=1e-5)


def test_the_papers_network_traces():
    config = PRESETS["paper"]
    lanes = jax.ShapeDtypeStruct((len(config.scales), 2), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.seeds))
    predict, starts = jax.eval_shape(lambda lanes, keys: build(config, (32, 32, 3), lanes, keys), lanes, keys)
    count = sum(leaf.size for leaf in jax.tree.leaves(starts)) / len(config.scales)
    # By hand: depth 6, width 512, 8 heads of 128, patches of 4 * 4 * 3 numbers, 64 of them.
    block = 4 * 512 * 8 * 128 + 2 * (512 * 512 + 512) + 4 * 512
    assert count == 6 * block + (48 + 1) * 512 + 64 * 512 + 2 * 512 + (512 + 1) * 10
    batch = (
        jax.ShapeDtypeStruct((config.seeds, config.batch, 32, 32, 3), jnp.float32),
        jax.ShapeDtypeStruct((config.seeds, config.batch), jnp.int32),
    )
    gradient = jax.eval_shape(
        lambda params, batch: jax.grad(total_loss, 1)(predict, params, batch), starts, batch
    )
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, starts)
    state = jax.eval_shape(optimizer(config).init, starts)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) > 2 * count
