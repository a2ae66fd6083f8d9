"""Linear BYOL as a network: its training is the flow, its views have their moments, and DirectPred is set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

from dynamics.noncontrastive import ByolWeights, byol_flow, no_predictor_flow, no_stop_gradient_flow
from models.byol import LinearByol, byol_loss, byol_weights, exact_views, flow_gradient, with_average
from models.functional import as_function
from models.predictors import directpred, running_correlation
from models.self_supervised import Views
from models.training import Descent, train
from sims.compare import convergence_order, lane_gaps

RATES = {"predictor_rate": 2.0, "ema_rate": 0.5, "weight_decay": 0.04}


def setting(seed=0, n1=3, n2=2):
    random = np.random.default_rng(seed)
    W, Wa = random.normal(size=(2, n2, n1)) / 2
    A, B = random.normal(size=(n1, 2)), random.normal(size=(n1, n1)) / 2
    return ByolWeights(W, random.normal(size=(n2, n2)) / 2, Wa), A @ A.T / n1, B @ B.T / n1


@given(seed=st.integers(0, 999), n=st.integers(1, 5), rank=st.integers(0, 5))
def test_views_have_their_moments(seed, n, rank):
    A, B = np.random.default_rng(seed).normal(size=(2, n, n))
    A[:, rank:] = 0
    X, X_aug_cov = A @ A.T, B @ B.T
    first, second = (np.asarray(view) for view in exact_views(X, X_aug_cov))
    assert first.shape == (4 * n * n, n)
    scale = 1e-12 * max(1, np.abs(X).max(), np.abs(X_aug_cov).max())
    for one, other, expected in (
        (first, first, X + X_aug_cov),
        (second, second, X + X_aug_cov),
        (first, second, X),
    ):
        np.testing.assert_allclose(one.T @ other / len(one), expected, atol=scale)


def train_beside(net, flow, **rates):
    """Gaps to a flow by learning rate, of a network on views with exact moments."""
    _, X, X_aug_cov = setting()
    predict, params = as_function(net)
    loss = Partial(byol_loss, predict, views=exact_views(X, X_aug_cov))
    descent = Descent(horizon=4.0, points=8, substeps=(5, 20, 80))
    gradient = flow_gradient(**rates)

    def observe(params):
        found = byol_weights(params)
        return [part for part in found if part is not None]

    lr, trained = descent.train(Partial(lambda views, params: loss(params), None), params, observe, gradient)
    return lr, lane_gaps(flow, trained)


def test_training_is_the_flow_at_first_order():
    weights, X, X_aug_cov = setting()
    ts = Descent(4.0, 8, (5, 20)).times
    for given_weights, beta in ((weights, 0.5), (weights._replace(Wa=None), jnp.inf)):
        rates = RATES | {"ema_rate": beta}
        path = byol_flow(*weights, X, X_aug_cov, ts, **rates)
        kept = [part for part, own in zip(path.ys, given_weights, strict=True) if own is not None]
        path = type(path)(path.ts, kept, path.ok)
        used = RATES | {"ema_rate": 0.0 if given_weights.Wa is None else beta}
        order = convergence_order(*train_beside(LinearByol(given_weights), path, **used)).slope
        assert order == pytest.approx(1, abs=0.06)


def test_ablations_are_their_closed_forms_at_first_order():
    (W, Wp, _), X, X_aug_cov = setting()
    ts = Descent(4.0, 8, (5, 20)).times
    nets = {
        LinearByol(ByolWeights(W, None, None)): no_predictor_flow(W, X_aug_cov, ts, weight_decay=0.04),
        LinearByol(ByolWeights(W, Wp, None), stop_gradient=False, train_predictor=False): (
            no_stop_gradient_flow(W, Wp, X, X_aug_cov, ts, weight_decay=0.04)
        ),
    }
    for net, path in nets.items():
        listed = type(path)(path.ts, [path.ys], path.ok)
        assert convergence_order(*train_beside(net, listed, weight_decay=0.04)).slope == pytest.approx(
            1, abs=0.06
        )


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.01)])
def test_any_optimizer_trains_beside_an_average(optimizer):
    weights, X, X_aug_cov = setting()
    predict, params = as_function(LinearByol(weights))
    loss = Partial(byol_loss, predict, views=exact_views(X, X_aug_cov))
    _, path = train(loss, params, with_average(optimizer, 0.9), steps=5, observe=byol_weights)
    W, _, Wa = path.ys
    np.testing.assert_allclose(Wa[1:], 0.9 * Wa[:-1] + 0.1 * W[1:], rtol=1e-12)
    assert np.all(np.abs(np.diff(W, axis=0)).max(axis=(1, 2)) > 1e-4)
    with pytest.raises(ValueError, match="params must be given"):
        with_average(optimizer, 0.9).update(params, with_average(optimizer, 0.9).init(params))


def test_an_optimizer_beside_an_average_is_given_what_it_asks_for():
    def scale(updates, state, params=None, **extra):
        return jax.tree.map(lambda leaf: extra["value"] * leaf, updates), state

    optimizer: Any = with_average(optax.GradientTransformationExtraArgs(lambda params: (), scale), 0.5)
    params = {"online": jnp.array(2.0), "target": jnp.array(4.0)}
    updates, _ = optimizer.update(params, optimizer.init(params), params, value=-0.25)
    assert jax.tree.map(float, updates) == {"online": -0.5, "target": -1.25}  # 4 to (4 + 1.5) / 2


def test_no_gradient_passes_through_the_target():
    weights, X, X_aug_cov = setting()
    views = exact_views(X, X_aug_cov)
    predict, params = as_function(LinearByol(weights))
    assert not np.any(byol_weights(jax.grad(byol_loss, 1)(predict, params, views)).Wa)
    through, params = as_function(LinearByol(weights, stop_gradient=False))
    assert np.any(byol_weights(jax.grad(byol_loss, 1)(through, params, views)).Wa)


def symmetric(seed, d=5, floor=0.0):
    random = np.random.default_rng(seed)
    Q = np.linalg.qr(random.normal(size=(d, d)))[0]
    s = floor + random.uniform(0, 3, d)
    F = Q @ np.diag(s) @ Q.T
    return (F + F.T) / 2, Q, s


@given(seed=st.integers(0, 999), epsilon=st.floats(0, 1), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_directpred_has_the_eigenspaces_of_the_correlation(seed, epsilon, scale):
    F, Q, s = symmetric(seed)
    root, largest = np.sqrt(s), s.max()
    paper, scaled = directpred(F, epsilon), directpred(scale * F, epsilon, form="scaled")
    expected = {"paper": root + epsilon * largest, "scaled": np.maximum(root / largest**0.5 + epsilon, 1e-4)}
    np.testing.assert_allclose(paper, Q @ np.diag(expected["paper"]) @ Q.T, atol=1e-10)
    np.testing.assert_allclose(scaled, Q @ np.diag(expected["scaled"]) @ Q.T, atol=1e-10)
    for Wp in (paper, scaled):
        assert np.linalg.norm(F @ Wp - Wp @ F) <= 1e-12 * np.linalg.norm(F) * np.linalg.norm(Wp)
        np.testing.assert_array_equal(Wp, Wp.T)


def test_directpred_where_the_correlation_is_degenerate():
    np.testing.assert_allclose(directpred(np.zeros((3, 3)), 0.5), np.zeros((3, 3)), atol=0)
    np.testing.assert_allclose(directpred(np.zeros((3, 3)), 0.5, form="scaled"), 0.5 * np.eye(3), atol=1e-15)
    np.testing.assert_allclose(directpred(np.zeros((3, 3)), 0.0, form="scaled"), 1e-4 * np.eye(3), atol=1e-15)
    # An estimate may have a negative eigenvalue by rounding.
    np.testing.assert_allclose(directpred(np.diag([1.0, -1e-17]), 0.25), np.diag([1.25, 0.25]), atol=1e-15)
    slope = jax.grad(lambda F: jnp.sum(directpred(F, 0.5)))(jnp.eye(3))
    np.testing.assert_array_equal(slope, np.zeros((3, 3)))
    small = directpred(np.eye(2, dtype=np.float32), 0.5)
    assert small.dtype == np.float32
    with pytest.raises(ValueError, match=r"form must be one of \('paper', 'scaled'\), got 'code'"):
        directpred(np.eye(2), 0.5, form="code")


def test_a_running_correlation_comes_to_that_of_its_batches():
    z = np.random.default_rng(0).normal(size=(7, 3))
    F = np.zeros((3, 3))
    for _ in range(60):
        F = running_correlation(F, z, 0.5)
    np.testing.assert_allclose(F, z.T @ z / 7, rtol=1e-12)
    # The rate is the part that is kept.
    kept = running_correlation(np.diag([1.0, 2.0, 3.0]), z, 0.9)
    np.testing.assert_allclose(kept, 0.9 * np.diag([1.0, 2.0, 3.0]) + 0.1 * F, rtol=1e-12)
    np.testing.assert_array_equal(running_correlation(np.eye(3), z, 1.0), np.eye(3))


def test_bad_arguments_are_refused_by_name():
    (W, Wp, Wa), X, _ = setting()
    with pytest.raises(ValueError, match=r"weights.W, weights.Wp and weights.Wa must have shapes \(n2, n1\)"):
        LinearByol(ByolWeights(W, Wp, Wa.T))
    with pytest.raises(ValueError, match=r"first and second must have shapes \(n, d\)"):
        LinearByol(ByolWeights(W, Wp, Wa))(Views(jnp.ones((4, 3)), jnp.ones((5, 2))))
    with pytest.raises(ValueError, match="X_aug_cov must be positive semidefinite"):
        exact_views(X, -X)
    with pytest.raises(ValueError, match="F must be symmetric"):
        directpred(W @ W.T @ Wp, 0.1)
