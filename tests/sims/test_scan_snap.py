"""Scan and Snap: theory against the network, and programs that compile once."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynamics import scan_snap
from dynamics.flow import Trajectory
from models.attention import observe_weights, population_loss
from models.data.recorded import FIGURE_4_LOSSES, figure_6
from models.data.tokens import synthetic_classes
from models.training import Descent, scale_by_name
from sims.compare import convergence_order, lane_gaps
from sims.ranges import check_ranges
from sims.results import Context
from sims.scan_snap import learning_rates
from tests.helpers import count_compilations


@pytest.mark.parametrize(
    ("factor_Y", "factor_Z", "converges"), [(1, 1, True), (1, 1.02, False), (1.02, 1, False), (1, 0.5, False)]
)
def test_network_approaches_the_flow_at_first_order_and_a_wrong_factor_does_not(
    factor_Y, factor_Z, converges
):
    classes = synthetic_classes(1, 2, num_common=1, num_distinct=1)
    loss, params = population_loss(classes)
    descent = Descent(horizon=20.0, points=4, substeps=(10, 30, 100, 300, 1000))
    rates, trained = descent.train(loss, params, observe_weights, scale_by_name(Y=1.0, Z=2.0))
    theory = scan_snap.population_flow(
        classes, trained.ts[0], learning_rate_Y=factor_Y, learning_rate_Z=2.0 * factor_Z
    )
    # Attention alone: where its rate is wrong, the decoder hardly shows it.
    only_Z = [Trajectory(path.ts, path.ys.Z, path.ok) for path in (theory, trained)]
    order = convergence_order(rates, lane_gaps(*only_Z)).slope
    assert rates[0] / rates[-1] == pytest.approx(100)
    assert float(jnp.max(theory.ys.Z)) > 0.1
    if converges:
        assert order == pytest.approx(1.0, abs=0.05)
    else:
        assert order < 0.6


def test_a_vocabulary_of_the_grid_is_one_program():
    config = learning_rates.Config(queries=(1,), seeds=2, steps=1, length=3, batch=2)
    with count_compilations() as names:
        learning_rates.run(config, Context(seed=0))
    assert sum("_trained" in name for name in names) == 1
    with count_compilations() as names:
        learning_rates.run(config, Context(seed=1))
    assert not names, names


def test_recorded_numbers():
    mean, std = figure_6((5, 1))
    assert mean.shape == std.shape == (2, 4, 4)
    # Numbers of the recorded table: five queries at rate 3 and ratio 2; one query at rate .5 and ratio 1.
    assert (mean[0, 3, 1], std[0, 3, 1], mean[1, 0, 0]) == (1.718, 0.032, 1.971)
    assert len(FIGURE_4_LOSSES) == 50
    assert FIGURE_4_LOSSES[0] == pytest.approx(np.log(34), rel=1e-4)


@pytest.mark.parametrize("queries", [(), (2,), (1, 4)])
def test_vocabularies_that_were_not_recorded_are_refused(queries):
    with pytest.raises(ValueError, match="queries must be"):
        check_ranges(learning_rates.Config(queries=queries))
