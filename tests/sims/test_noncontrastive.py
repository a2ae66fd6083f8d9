"""Linear BYOL: what its simulations measure beside the theory, against closed forms."""

from typing import Any

import numpy as np

from sims.noncontrastive.ablations import _spread
from sims.noncontrastive.eigenvalues import Modes, _one_tau_field


def test_spread_is_that_of_directions():
    # Samples are the two axes: half of them have a one in each place, whatever their lengths are.
    still = np.zeros((2, 2))
    for W in (np.eye(2), np.diag([3.0, 0.1])):
        np.testing.assert_allclose(_spread(W, np.diag([1.0, 4.0]), still), 0.5, rtol=1e-12)
    # Three axes in one place, and none in the other.
    np.testing.assert_allclose(_spread(np.eye(3), np.eye(3), np.zeros((3, 3))), 2**0.5 / 3, rtol=1e-12)
    # All samples have one direction where the network has rank one.
    np.testing.assert_allclose(_spread(np.array([[2.0, 2.0], [1.0, 1.0]]), np.eye(2), still), 0, atol=1e-12)


def test_one_tau_has_the_sum_of_the_equations_of_all_modes():
    p, s, tau = np.array([0.2, 0.7, 0.3]), np.array([0.5, 0.1, 0.9]), 0.6
    rates: dict[str, Any] = {"spread": 1.25, "predictor_rate": 2.0, "ema_rate": 0.5, "weight_decay": 0.04}
    found = _one_tau_field(0.0, Modes(p, s, tau), rates)
    # W = U diag(r) V^T has s = r^2, and r' = p r (tau - 1.25 p) - eta r: a target tau W that follows it keeps
    # sum_j r_j (tau r_j)' = beta (1 - tau) sum_j s_j.
    r = np.sqrt(s)
    dr = p * r * (tau - 1.25 * p) - 0.04 * r
    np.testing.assert_allclose(found.s, 2 * r * dr, rtol=1e-12)
    np.testing.assert_allclose(found.p, 2.0 * s * (tau - 1.25 * p) - 0.04 * p, rtol=1e-12)
    kept = np.sum(r * (found.tau * r + tau * dr))
    np.testing.assert_allclose(kept, 0.5 * (1 - tau) * np.sum(s), rtol=1e-12)
