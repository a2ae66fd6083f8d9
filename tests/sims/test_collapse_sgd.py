"""SGD near a saddle: what its batches are, and that a chain that diverges is counted and spoils no other."""

import jax
import numpy as np
import pytest
from scipy.stats import binom

from sims.collapse import sgd


@pytest.mark.parametrize("batch", sgd.BATCHES)
def test_uniform_numbers_draw_labels_by_their_law(batch):
    (lane,) = zip(*sgd.lanes_of([0.1], [batch], 2.0), strict=True)
    even = (np.arange(20_000) + 0.5) / 20_000
    shares = np.asarray(jax.vmap(lambda u: sgd.drawn_share(u, sgd.Lanes(*lane)))(even))
    frequency = np.bincount(np.round(shares * batch).astype(int), minlength=batch + 1) / even.size
    assert frequency == pytest.approx(binom.pmf(np.arange(batch + 1), batch, sgd.POSITIVE), abs=1e-4)


def test_chains_take_the_steps_of_labels_written_out_and_do_not_mix():
    rates, batches, steps = [0.05, 3.0], [4, 1], 100
    u = np.random.default_rng(0).uniform(size=(2, steps))
    starts = np.array([[0.3, 0.8], [-0.6, 0.9]])
    one, other = sgd._trained(sgd._network_loss, 10, tuple(starts), u, sgd.lanes_of(rates, batches, 2.0))
    for chain in range(2):
        w = starts[:, chain]
        for positive in binom.ppf(u[chain], 4, sgd.POSITIVE).astype(int):
            labels = np.where(np.arange(4) < positive, 2.0, -2.0)
            w = w - 0.05 * np.mean(2 * (w[0] * w[1] - labels)) * w[::-1]
        assert [one[chain, 0, -1], other[chain, 0, -1]] == pytest.approx(w, rel=1e-9)
    assert not np.isfinite(one[:, 1, -1]).any()
    paths = np.swapaxes(np.stack([one, other], axis=-1), 0, 1)
    mixed = np.concatenate([paths, np.stack([paths[0, :1], paths[1, :1]], axis=1)])
    found = sgd._losses(np.repeat(mixed, 10, axis=2))
    assert found["diverged"][1].tolist() == [0, 1, 0.5]
    assert np.isfinite(found["loss"][1]).tolist() == [True, False, True]
