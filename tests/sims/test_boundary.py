"""Helpers of the simulation replicator.boundary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.attention import students
from models.optimizers import decaying, normalized_descent, one_of
from models.training import train
from sims.replicator.boundary import PRESETS, Config, _speeds


def loss(params):
    return jnp.sum(jnp.array([1.0, 10.0]) * params**2)


def test_lanes_with_different_optimizers_are_the_runs_of_each():
    optimizers = optax.sgd(0.01, momentum=0.5), optax.adam(0.1), optax.sign_sgd(0.1)
    start = jnp.array([1.0, -2.0])
    both = jax.vmap(lambda index: train(loss, start, one_of(index, optimizers), steps=7)[1].ys)
    for lane, optimizer in zip(both(jnp.arange(3)), optimizers, strict=True):
        np.testing.assert_allclose(lane, train(loss, start, optimizer, steps=7)[1].ys, rtol=1e-14)


@pytest.mark.parametrize("decay", [1.0, 1e-4])
def test_the_rate_decays_by_the_factor_over_the_run(decay):
    schedule = optax.chain(optax.scale_by_sign(), decaying(0.1, decay, 10))
    _, path = train(jnp.sum, jnp.zeros(1), schedule, steps=11)
    sizes = -np.diff(path.ys[:, 0])
    np.testing.assert_allclose(sizes, 0.1 * decay ** (np.arange(11) / 10), rtol=1e-10)


def test_a_normalized_step_is_as_long_however_small_the_gradient():
    optimizer, gradient = normalized_descent(0.1, 1.0, 10), jnp.array([3e-12, 4e-12])
    update: Any = optimizer.update(gradient, optimizer.init(gradient))[0]
    np.testing.assert_allclose(update, [-0.06, -0.08], rtol=1e-12)


def test_the_best_rate_reaches_the_target_first_or_else_ends_lowest():
    config = PRESETS["quick"]
    small = config.target / 2
    runs = [
        [[1.0, 1.0, small], [1.0, small, 1.0], [1.0, 1e-9, 1e-9]],
        [[1.0, np.nan, np.nan], [1.0, 1e-3, 1e-3], [1.0, 1e-6, 1e-2]],
    ]
    losses = np.array(runs).reshape(2, 1, 3, 3)
    rates = np.broadcast_to([1.0, 2.0, 3.0], (2, 1, 3))
    best = students.best_rate({"loss": losses, "rate": rates}, config.target, config.every)
    assert best["rate"].ravel().tolist() == [2.0, 2.0]
    assert best["iterations"].ravel().tolist() == [config.every, np.inf]
    np.testing.assert_array_equal(best["loss"][:, 0], [runs[0][1], runs[1][1]])


@pytest.mark.parametrize("start", ["", "_local"])
def test_adam_is_less_affected_only_where_its_own_slowdown_is_the_smaller_one_at_either_start(start):
    # Iterations at the small and at the large ratio, where Adam is ten times as fast either way.
    gd, adam, slow_adam = np.array([[[400.0, 1600.0]], [[80.0, 160.0]], [[20.0, 160.0]]])
    iterations = {f"iterations/gd{s}": gd for s in ("", "_local")}
    iterations |= {f"iterations/adam{s}": slow_adam if s == start else adam for s in ("", "_local")}
    _, claim = _speeds(PRESETS["quick"], iterations)
    for name, those in (("", claim.checks[:3]), ("_local", claim.checks[3:])):
        assert [check.holds for check in those] == [True, True, name != start]
        assert those[2].measured == pytest.approx(2.0 if name == start else 0.5)


@pytest.mark.parametrize(
    "wrong", [{"sign_rates": (1e-3,)}, {"sign_rates": (1e-3, 1e-3)}, {"wide_rates": (0.1, 0.2)}]
)
def test_a_configuration_that_cannot_run_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be .*, got \("):
        Config(**wrong)
