"""Replicator theory against the network."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.tree_util import Partial

from dynamics import replicator
from dynamics.flow import Trajectory
from models.attention import PromptAttention
from models.data.teachers import orthogonal_keys
from models.functional import as_function
from models.training import Descent
from sims.compare import convergence_order, lane_gaps


@pytest.mark.parametrize(("factor", "converges"), [(1.0, True), (1.02, False), (0.5, False)])
def test_network_approaches_the_flow_at_first_order_and_a_wrong_factor_does_not(factor, converges):
    keys = jax.random.split(jax.random.key(1), 4)
    samples, tokens, scale = 2, 3, 2.0
    descent = Descent(horizon=10.0, points=10, substeps=(10, 30, 100, 300, 1000))
    X = orthogonal_keys(keys[0], samples, tokens, 8, scale)
    prompt, value = jax.random.normal(keys[1], (8,)), jax.random.normal(keys[2], (8,))
    targets = jax.random.normal(keys[3], (samples,))
    predict, params = as_function(PromptAttention(prompt, value, train_value=False))

    def loss(params):
        return jnp.sum(optax.losses.l2_loss(predict(params, X), targets))

    rates, trained = descent.train(
        loss, params, observe=lambda params: jax.nn.softmax(X @ params["prompt"][...], axis=-1)
    )
    ts = trained.ts[0]
    flows = jax.vmap(
        lambda u, y, z: (
            replicator.softmax_flow(
                Partial(replicator.squared_error_gradient, u, y), z, ts, factor * scale
            ).ys
        )
    )(X @ value, targets, X @ prompt)
    theory = Trajectory(ts, jnp.moveaxis(jax.nn.softmax(flows, axis=-1), 0, 1), jnp.asarray(True))
    order = convergence_order(rates, lane_gaps(theory, trained)).slope
    assert rates[0] / rates[-1] == pytest.approx(100)
    if converges:
        assert order == pytest.approx(1.0, abs=0.05)
    else:
        assert order < 0.6
