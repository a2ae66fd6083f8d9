"""Optimizers, whose numbers may be traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.optimizers import adam, decaying, descent, langevin, normalized_descent, sign_descent
from models.training import train
from tests.helpers import compiled


def test_a_traced_number_is_taken_as_it_is():
    """The update has the dtype of the parameters, and none of a rate's digits are lost."""
    makers = (descent, adam, normalized_descent, sign_descent, decaying)

    def updates(*rates) -> Any:
        for rate in rates:
            for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
                gradient = jnp.array([0.5, -0.25], dtype)
                for make in makers:
                    optimizer = make(rate, 0.9, 5)
                    yield optimizer.update(gradient, optimizer.init(gradient))[0]

    rates = (1e-8, 1e5, 0.3)
    traced: Any = compiled(lambda *rates: list(updates(*rates)))(*rates)
    for found, eager in zip(traced, updates(*rates), strict=True):
        assert found.dtype == eager.dtype
        rtol = float(jnp.finfo(eager.dtype).eps)
        np.testing.assert_allclose(found.astype(float), eager.astype(float), rtol=rtol)


def test_langevin_comes_to_rest_at_its_temperature():
    """On a parabola Euler's steps have the variance T / (1 - dt / 2), in lanes of one program."""
    lanes = jnp.array([[0.1, 0.5], [0.5, 0.5], [0.5, 2.0]])

    def variance(lane, key):
        step, temperature = lane
        optimizer = langevin(step, temperature, key)
        last, path = train(lambda w: jnp.sum(w**2) / 2, jnp.zeros(4000), optimizer, steps=80, every=40)
        return jnp.mean(last**2), jnp.mean(last * path.ys[1]), last[0]

    found, later, first = jax.jit(jax.vmap(variance))(lanes, jax.random.split(jax.random.key(0), 3))
    expected = np.asarray(lanes[:, 1] / (1 - lanes[:, 0] / 2))
    assert found == pytest.approx(expected, rel=4 * (2 / 4000) ** 0.5)
    assert np.all(np.abs(later) < 0.1 * expected)  # noise is drawn anew at each step
    assert len(set(first.tolist())) == 3
