"""What every transformation of Optax does, asked of GaLore: it minimizes, and takes wrappers of others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.galore import galore, scale_by_galore
from tests.helpers import compiled

TARGET = {"kernel": np.array([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]]), "bias": np.array([0.5, -1.0, 2.0])}


def parabola(params):
    return sum(jnp.sum((leaf - TARGET[name].astype(leaf.dtype)) ** 2) for name, leaf in params.items())


def rosenbrock(params):
    x, y = params["kernel"][0], params["kernel"][1]
    return jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2) + jnp.sum(params["bias"] ** 2)


MAKERS = {
    "galore": lambda rate: galore(rate, 2, scale=1.0, update_gap=10),
    "chained": lambda rate: optax.chain(
        optax.clip_by_global_norm(10.0), scale_by_galore(2, scale=1.0), optax.scale_by_learning_rate(rate)
    ),
    "injected": lambda rate: optax.inject_hyperparams(
        lambda learning_rate: galore(learning_rate, 2, scale=1.0, update_gap=10)
    )(learning_rate=rate),
    "if finite": lambda rate: optax.apply_if_finite(galore(rate, 2, scale=1.0, update_gap=10), 3),
    "with extra arguments": lambda rate: optax.with_extra_args_support(galore(rate, 2, scale=1.0)),
}


def zeros(dtype):
    return {name: jnp.zeros(leaf.shape, dtype) for name, leaf in TARGET.items()}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("loss", "dtype"), [(parabola, "float32"), (rosenbrock, "float64")])
def test_it_minimizes(name, loss, dtype):
    """By a schedule that ends at zero, so that Adam settles."""
    optimizer, params = MAKERS[name](optax.cosine_decay_schedule(0.1, 1000)), zeros(dtype)

    @compiled
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=1000)[0]

    params, state = run(params, optimizer.init(params))
    assert float(loss(params)) < 1e-2
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(params))


def test_frozen_and_masked_parameters_stay():
    params = zeros("float64")
    gradient = jax.grad(parabola)(params)
    frozen: Any = optax.multi_transform(
        {"train": galore(0.1, 2), "freeze": optax.set_to_zero()}, {"kernel": "train", "bias": "freeze"}
    )
    updates, _ = frozen.update(gradient, frozen.init(params), params)
    assert not np.any(updates["bias"])
    assert np.all(updates["kernel"][0] != 0)
    masked: Any = optax.masked(galore(0.1, 2), {"kernel": True, "bias": False})
    updates, _ = masked.update(gradient, masked.init(params), params)
    np.testing.assert_array_equal(updates["bias"], gradient["bias"])


def test_a_step_that_is_not_finite_is_passed_over():
    optimizer: Any = optax.apply_if_finite(galore(0.1, 2), 3)
    params = zeros("float64")
    good, bad = jax.grad(parabola)(params), jax.tree.map(lambda leaf: leaf + np.nan, params)
    _, before = optimizer.update(good, optimizer.init(params), params)
    updates, after = optimizer.update(bad, before, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)
