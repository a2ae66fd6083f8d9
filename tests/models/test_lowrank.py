"""Low-rank weights: against dense weights and Flax's own layer; what restarts keep and what they drop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.functional import as_function
from models.galore import state_bytes
from models.losses import bind, mean_squared_error
from models.lowrank import (
    Factors,
    LoraParams,
    lora_params,
    low_rank_params,
    merge,
    on_factors,
    on_trained,
    relora,
)
from models.memory import galore_memory, lora_memory
from models.training import train
from tests.helpers import assert_bad_lanes_are_nan

KEY = jax.random.key(0)
M, N, RANK, SCALE = 5, 4, 2, 0.5


def draw(seed=0):
    """A dense start and a linear regression whose solution has full rank."""
    random = np.random.default_rng(seed)
    W, target = random.normal(size=(2, M, N))
    x = random.normal(size=(12, M))
    return {"kernel": jnp.asarray(W), "bias": jnp.zeros(N)}, (jnp.asarray(x), jnp.asarray(x @ target))


def predict(params, x):
    return x @ params["kernel"] + params["bias"][None, :]


def loss_of(data, scale=1.0):
    return bind(mean_squared_error, (on_factors(predict, scale), *data))


def sizes(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def test_adaptors_do_nothing_at_first_and_their_gradients_follow_the_chain_rule():
    params, data = draw()
    start = lora_params(params, RANK, KEY)
    np.testing.assert_array_equal(merge(start, SCALE)["kernel"], params["kernel"])
    assert start.trained["bias"] is params["bias"]

    B = jnp.asarray(np.random.default_rng(1).normal(size=(RANK, N)))
    A = start.trained["kernel"].A
    moved = LoraParams({**start.trained, "kernel": Factors(A, B)}, start.frozen)
    dense = {**params, "kernel": params["kernel"] + SCALE * A @ B}
    np.testing.assert_allclose(merge(moved, SCALE)["kernel"], dense["kernel"], rtol=1e-15)
    G = jax.grad(bind(mean_squared_error, (predict, *data)))(dense)
    gradient = jax.grad(loss_of(data, SCALE))(moved)
    np.testing.assert_allclose(gradient.trained["kernel"].A, SCALE * G["kernel"] @ B.T, rtol=1e-12)
    np.testing.assert_allclose(gradient.trained["kernel"].B, SCALE * A.T @ G["kernel"], rtol=1e-12)
    np.testing.assert_allclose(gradient.trained["bias"], G["bias"], rtol=1e-12)
    np.testing.assert_array_equal(gradient.frozen["kernel"], np.zeros((M, N)))


def test_a_flax_model_computes_what_its_own_lora_layer_does():
    linear = nnx.Linear(M, N, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    model_predict, params = as_function(linear)
    start = lora_params(params, RANK, KEY)
    (W,) = jax.tree.leaves(start.frozen)
    assert W is params["kernel"][...]
    random = np.random.default_rng(1)
    trained = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), start.trained)
    layer = nnx.LoRA(M, RANK, N, base_module=linear, rngs=nnx.Rngs(1), param_dtype=jnp.float64)
    bias, A, B = jax.tree.leaves(trained)
    layer.lora_a[...], layer.lora_b[...] = A, B
    linear.bias.set_value(bias)
    x = jnp.asarray(random.normal(size=(3, M)))
    ours = on_factors(model_predict)(LoraParams(trained, start.frozen), x)
    np.testing.assert_allclose(ours, layer(x), rtol=1e-12)


def test_the_spectral_start_is_the_best_approximation_and_full_rank_is_exact():
    params, _ = draw()
    U, s, Vh = np.linalg.svd(params["kernel"], full_matrices=False)
    for rank in (1, RANK, 10):
        factors = low_rank_params(params, rank)["kernel"]
        best = U[:, :rank] * s[:rank] @ Vh[:rank]
        np.testing.assert_allclose(factors.A @ factors.B, best, atol=1e-14)
        # Balanced, as descent keeps it.
        np.testing.assert_allclose(factors.A.T @ factors.A, factors.B @ factors.B.T, atol=1e-14)


def test_only_what_is_trained_moves_and_has_a_state():
    params, data = draw()
    dense = optax.adam(1e-2).init(params)
    for start, optimizer, frozen in (
        (lora_params(params, RANK, KEY), on_trained(optax.adam(1e-2)), True),
        (low_rank_params(params, RANK), optax.adam(1e-2), False),
    ):
        memory = lora_memory(M, N, RANK, frozen=frozen)
        state = optimizer.init(start)
        assert sizes(state) == memory.states + 2 * N + 1  # the bias, and a count
        assert sizes(start) == memory.weights + N
        last, path = train(loss_of(data), start, optimizer, steps=30, observe=merge)
        assert bool(path.ok)
        change = np.linalg.svd(path.ys["kernel"][-1] - path.ys["kernel"][0] * frozen)[1]
        assert np.sum(change > 1e-10) == RANK
        assert float(loss_of(data)(last)) < 0.95 * float(loss_of(data)(start))
        if isinstance(start, LoraParams):
            np.testing.assert_array_equal(last.frozen["kernel"], params["kernel"])
    assert sizes(dense) == 2 * M * N + 2 * N + 1
    # GaLore's own count of bytes: float64, two counts of four bytes.
    shape = {"kernel": jax.ShapeDtypeStruct((M, N), jnp.float64)}
    memory = galore_memory(M, N, RANK)
    assert state_bytes(shape, RANK) == 8 * (memory.states + memory.projection) + 8


def test_gradients_of_what_is_frozen_move_nothing():
    start = lora_params(draw()[0], RANK, KEY)
    optimizer = on_trained(optax.sgd(1.0))
    ones: Any = jax.tree.map(jnp.ones_like, start)
    updates: Any = optimizer.update(ones, optimizer.init(start), start)[0]
    assert all(np.all(leaf == -1) for leaf in jax.tree.leaves(updates.trained))
    np.testing.assert_array_equal(updates.frozen["kernel"], np.zeros((M, N)))


def test_restarts_let_the_rank_grow_and_keep_the_model():
    params, data = draw()
    start, every = lora_params(params, 1, KEY), 4
    run = {"steps": 3 * every, "observe": lambda params: (merge(params, SCALE), params)}
    _, restarted = train(
        loss_of(data, SCALE), start, relora(optax.adam(1e-2), every, KEY, scale=SCALE), **run
    )
    _, plain = train(loss_of(data, SCALE), start, on_trained(optax.adam(1e-2)), **run)
    dense, (trained, frozen) = restarted.ys
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[:every], b[:every], atol=1e-15), restarted.ys, plain.ys
    )
    # A restart changes the factors, not the model.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[every], b[every], atol=1e-15), dense, plain.ys[0])
    A, B = map(np.asarray, trained["kernel"])
    np.testing.assert_array_equal(B[every::every], np.zeros((3, 1, N)))
    assert np.all(np.any(B[1:every] != 0, axis=(1, 2)))
    for k in (1, 2, 3):
        change = np.linalg.svd(frozen["kernel"][k * every] - frozen["kernel"][0])[1]
        assert np.sum(change > 1e-9) == k
        assert np.all(np.abs(A[k * every] - A[k * every - 1]) > 1e-6)
    assert np.all(np.abs(np.diff(A[every::every], axis=0)) > 1e-6)  # each restart has a draw of its own
    np.testing.assert_array_equal(frozen["kernel"][every], frozen["kernel"][2 * every - 1])


def test_a_restart_forgets_moments_of_factors_only():
    params, data = draw()
    optimizer = relora(optax.adam(1e-2), 2, KEY)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_of(data))(params), state, params)
        return optax.apply_updates(params, updates), state

    params = lora_params(params, RANK, KEY)
    state = optimizer.init(params)
    before = params
    for count in range(1, 4):
        before = params
        params, state = step(params, state)
        adam = state.inner[0]
        forgotten = [
            bool(np.all(leaf == 0)) for leaf in jax.tree.leaves((adam.mu["kernel"], adam.nu["kernel"]))
        ]
        # At the first step, with B = 0, A has no gradient; after the restart neither.
        assert forgotten == [[True, False, True, False], [True] * 4, [True, False, True, False]][count - 1]
        assert np.all(adam.nu["bias"] > 0)
        assert adam.count == state.count == count
    # Adam's correction does not know of the restart: the first step is longer.
    moved = params.trained["kernel"].B - before.trained["kernel"].B
    expected = 1e-2 * (0.1 / (1 - 0.9**3)) / np.sqrt(0.001 / (1 - 0.999**3))
    np.testing.assert_allclose(np.abs(moved), expected, rtol=1e-5)


def test_ranks_by_path_and_batch_axes():
    params = {"a": jnp.ones((3, 4)), "stack": jnp.ones((2, 3, 4)), "bias": jnp.ones(4)}
    start = lora_params(params, lambda path, leaf: 2 if path == "stack" else None, KEY)
    assert start.trained["a"] is params["a"]
    assert [leaf.shape for leaf in start.trained["stack"]] == [(2, 3, 2), (2, 2, 4)]
    np.testing.assert_array_equal(merge(start)["stack"], params["stack"])
    wide = lora_params({"w": jnp.zeros((10_000, 3))}, 2, KEY).trained["w"].A
    np.testing.assert_allclose(np.std(wide), 0.01, rtol=0.05)
    assert lora_params({"w": jnp.zeros((3, 4), jnp.float32)}, 9, KEY).trained["w"].A.shape == (3, 3)


def test_matrices_are_told_apart_by_their_places_and_not_by_their_names():
    params = {"a/b": jnp.eye(2), "a": {"b": 2 * jnp.eye(2)}, "c": [jnp.zeros(2)]}
    start = lora_params(params, 1, KEY)
    for leaf, same in zip(jax.tree.leaves(merge(start)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, same)
    assert np.any(start.trained["a/b"].A != start.trained["a"]["b"].A)
    optimizer = relora(optax.sgd(0.1), 1, KEY)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, start), optimizer.init(start), start)
    restarted = optax.apply_updates(start, updates)
    np.testing.assert_allclose(merge(restarted)["a/b"], jnp.eye(2), atol=1e-15)
    np.testing.assert_allclose(merge(restarted)["a"]["b"], 2 * jnp.eye(2), atol=1e-15)


def test_half_precision_has_its_best_approximation():
    W = jnp.asarray(draw()[0]["kernel"], jnp.bfloat16)
    factors = low_rank_params({"w": W}, RANK)["w"]
    assert factors.A.dtype == factors.B.dtype == jnp.bfloat16
    exact = low_rank_params({"w": W.astype(float)}, RANK)["w"]
    np.testing.assert_allclose(factors.A @ factors.B, exact.A @ exact.B, rtol=0.03, atol=0.03)


def test_a_bad_traced_scale_gives_nan():
    start = lora_params(draw()[0], RANK, KEY)
    assert_bad_lanes_are_nan(lambda scale: merge(start, scale)["kernel"], 0.5, jnp.nan, jnp.inf)


def test_bad_input_is_refused():
    params, _ = draw()
    with pytest.raises(ValueError, match=r"rank of .* must be a positive integer, got 0"):
        lora_params(params, 0, KEY)
    with pytest.raises(ValueError, match="rank must be None for what is no real matrix"):
        low_rank_params(params, lambda path, leaf: 1)
    with pytest.raises(ValueError, match="params must hold a matrix"):
        low_rank_params({"bias": jnp.zeros(3)}, 1)
    with pytest.raises(ValueError, match="restart_every must be a positive integer, got 0"):
        relora(optax.sgd(0.1), 0, KEY)
    for bad in (jnp.array(0), jnp.ones(3), jax.random.split(KEY, 2)):
        with pytest.raises(ValueError, match="key must be a PRNG key, got"):
            relora(optax.sgd(0.1), 1, bad)
    for call in (
        lambda: relora(optax.sgd(0.1), 1, KEY, scale=jnp.inf),
        lambda: merge(lora_params(params, 1, KEY), "half"),
    ):
        with pytest.raises(ValueError, match="scale must be a finite number, got"):
            call()
    lora = on_trained(optax.sgd(0.1))
    for call in (
        lambda: lora.update(params, lora.init(lora_params(params, 1, KEY))),
        lambda: relora(optax.sgd(0.1), 1, KEY).init(params),
        lambda: on_trained(optax.sgd(0.1)).init(params),
    ):
        with pytest.raises(ValueError, match="params must be LoraParams"):
            call()
