"""Linear BYOL: its flows against autodiff and SciPy, its invariants, its aligned modes, their phase line."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm

from dynamics.noncontrastive import (
    alignment_matrix,
    balance,
    byol_flow,
    collapse_threshold,
    decoupled_flow,
    fixed_points,
    isotropic_flow,
    no_predictor_flow,
    no_stop_gradient_flow,
    phase_velocity,
    predictor_measures,
)
from dynamics.noncontrastive.target import _Elementwise, is_stiff
from tests.helpers import count_compilations

RATES = {"predictor_rate": 2.0, "ema_rate": 0.5, "weight_decay": 0.04}
MODES = {**RATES, "augmentation_variance": 0.25}
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def setting(seed, n1=4, n2=3, rank=None):
    """Weights without any symmetry, and two covariances that do not commute, the first one of some rank."""
    random = np.random.default_rng(seed)
    W, Wa = random.normal(size=(2, n2, n1)) / 2
    Wp = random.normal(size=(n2, n2)) / 2
    A, B = random.normal(size=(n1, n1 if rank is None else rank)), random.normal(size=(n1, n1))
    return (W, Wp, Wa), A @ A.T / n1, B @ B.T / (3 * n1)


def loss(weights, target, X, X_aug_cov):
    """E|W_p W x_1 - V x_2|^2 / 2 over independent views x of one sample, by second moments."""
    W, Wp = weights
    moving, held = Wp @ W, target
    apart = moving - held
    by_mean = jnp.trace(apart @ X @ apart.T)
    return (by_mean + jnp.trace(moving @ X_aug_cov @ moving.T) + jnp.trace(held @ X_aug_cov @ held.T)) / 2


@pytest.mark.parametrize(("rank", "n1", "n2"), [(None, 4, 3), (2, 4, 3), (1, 2, 3)])
def test_the_flow_descends_the_loss_of_two_views(rank, n1, n2):
    (W, Wp, Wa), X, X_aug_cov = setting(0, n1, n2, rank)
    alpha_p, beta, eta = RATES.values()

    @jax.jit
    def field(t, flat):
        parts = jnp.split(flat, [W.size, W.size + Wp.size])
        own, predictor, target = (
            part.reshape(-1, size) for part, size in zip(parts, (n1, n2, n1), strict=True)
        )
        d_own, d_predictor = jax.grad(loss)((own, predictor), target, X, X_aug_cov)
        parts = -d_own - eta * own, -alpha_p * d_predictor - eta * predictor, beta * (own - target)
        return jnp.concatenate([jnp.ravel(part) for part in parts])

    ts = [0.0, 0.5, 2.0]
    start = np.concatenate([W.ravel(), Wp.ravel(), Wa.ravel()])
    expected = solve_ivp(field, (0, 2), start, t_eval=ts, rtol=1e-8, atol=1e-10).y.T
    path = byol_flow(W, Wp, Wa, X, X_aug_cov, ts, **RATES)
    found = np.concatenate([np.reshape(part, (3, -1)) for part in path.ys], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-7)


@given(seed=st.integers(0, 99), eta=st.floats(0, 0.3), alpha_p=st.floats(0.1, 4.0))
@settings(max_examples=10, deadline=None)
def test_the_balance_decays_with_the_weights(seed, eta, alpha_p):
    weights, X, X_aug_cov = setting(seed)
    rates = {"predictor_rate": alpha_p, "ema_rate": 0.5, "weight_decay": eta}
    path = byol_flow(*weights, X, X_aug_cov, [0.0, 1.0, 5.0], **rates, **TIGHT)
    found = balance(path.ys.W, path.ys.Wp, alpha_p)
    expected = np.exp(-2 * eta * np.array(path.ts))[:, None, None] * found[:1]
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(found[0]).max())


def test_without_an_average_the_target_is_the_online_network():
    weights, X, X_aug_cov = setting(1)
    ts = [0.0, 1.0, 5.0]
    path = byol_flow(*weights, X, X_aug_cov, ts, **RATES | {"ema_rate": jnp.inf})
    np.testing.assert_array_equal(path.ys.Wa, path.ys.W)
    gaps = []
    for rate in (1e2, 1e3, 1e4):
        start = weights[0], weights[1], weights[0]
        fast = byol_flow(*start, X, X_aug_cov, ts, **RATES | {"ema_rate": rate})
        gaps.append(np.max(np.abs(fast.ys.W - path.ys.W)))
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 10, rtol=0.05)
    # The target that stands still is the other end.
    still = byol_flow(*weights, X, X_aug_cov, ts, **RATES | {"ema_rate": 0.0})
    np.testing.assert_array_equal(still.ys.Wa, np.broadcast_to(weights[2], (3, 3, 4)))


def test_a_traced_ema_rate_is_solved_and_differentiated():
    weights, X, X_aug_cov = setting(2)

    def end(rate):
        return byol_flow(*weights, X, X_aug_cov, [0.0, 2.0], **RATES | {"ema_rate": rate}, throw=False).ys.W[
            -1
        ]

    lanes = jax.vmap(end)(jnp.array([0.5, jnp.inf, -1.0]))
    np.testing.assert_allclose(lanes[0], end(0.5), rtol=1e-9)
    np.testing.assert_allclose(lanes[1], end(jnp.inf), rtol=1e-7)
    assert np.all(np.isnan(lanes[2]))
    difference = (np.sum(end(0.501)) - np.sum(end(0.499))) / 0.002
    assert jax.grad(lambda rate: jnp.sum(end(rate)))(0.5) == pytest.approx(float(difference), rel=1e-4)


@given(seed=st.integers(0, 99), eta=st.floats(0, 0.5), t0=st.floats(-3, 3))
@settings(max_examples=10, deadline=None)
def test_closed_forms_without_predictor_or_stop_gradient(seed, eta, t0):
    (W, Wp, _), X, X_aug_cov = setting(seed, rank=2)
    ts, one = t0 + np.array([0.0, 0.7, 3.0]), np.eye(3)
    path = no_predictor_flow(W, X_aug_cov, ts, weight_decay=eta)
    expected = [W @ expm(-(X_aug_cov + eta * np.eye(4)) * (t - t0)) for t in ts]
    np.testing.assert_allclose(path.ys, expected, atol=1e-12)
    np.testing.assert_array_equal(path.ys[0], W)

    # Both sides of the loss are differentiated: by columns, as the gradient's matrix in vec(W).
    def column_loss(columns, predictor):
        W = columns.reshape(4, 3).T
        return loss((W, predictor), W, X, X_aug_cov)

    matrix = jax.hessian(column_loss)(W.T.ravel(), Wp) + eta * np.eye(12)
    path = no_stop_gradient_flow(W, Wp, X, X_aug_cov, ts, weight_decay=eta)
    expected = [(expm(-matrix * (t - t0)) @ W.T.ravel()).reshape(4, 3).T for t in ts]
    np.testing.assert_allclose(path.ys, expected, atol=1e-12)
    assert np.linalg.eigvalsh(matrix)[0] >= eta - 1e-12
    # A predictor that keeps everything, and directions that augmentation does not move: nothing decays.
    still = no_stop_gradient_flow(W, one, X, 0 * X, ts, weight_decay=0.0)
    np.testing.assert_allclose(still.ys, np.broadcast_to(W, (3, 3, 4)), atol=1e-14)


def test_closed_forms_long_after():
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    moved = Q @ np.diag([0.0, 1.0, 3.0]) @ Q.T  # nothing moves the first direction
    W, ts = np.ones((2, 3)), [0.0, 1e5, 1e6, 1e9]
    kept = np.broadcast_to(W @ np.outer(Q[:, 0], Q[:, 0]), (3, 2, 3))
    for path in (
        no_predictor_flow(W, moved, ts, weight_decay=0.0),
        no_stop_gradient_flow(W, np.eye(2), np.eye(3), moved, ts, weight_decay=0.0),
    ):
        np.testing.assert_allclose(path.ys[1:], kept, atol=1e-5)
    gone = no_predictor_flow([[1.0]], [[1.0]], ts, weight_decay=0.0)
    np.testing.assert_array_equal(np.ravel(gone.ys), [1, 0, 0, 0])
    assert not bool(no_predictor_flow([[1.0]], [[1.0]], [0.0, 1e12], weight_decay=0.0).ok)


def symmetric(seed, n=4):
    random = np.random.default_rng(seed)
    W, Wp = random.normal(size=(n, 2 * n)) / 2, random.normal(size=(n, n)) / 2
    return W @ W.T / n, (Wp + Wp.T) / 2


def test_measures_of_a_predictor():
    random = np.random.default_rng(4)
    W, Wp = random.normal(size=(2, 3, 5)), random.normal(size=(2, 3, 3))
    found = predictor_measures(W, Wp)
    for i, (one, own) in enumerate(zip(W, Wp, strict=True)):
        F, size = one @ one.T, np.linalg.norm(own)
        np.testing.assert_allclose(found.p[i], np.linalg.eigvalsh((own + own.T) / 2), rtol=1e-12)
        np.testing.assert_allclose(found.s[i], np.linalg.eigvalsh(F), rtol=1e-12)
        assert found.commutator[i] == pytest.approx(
            np.linalg.norm(F @ own - own @ F) / (np.linalg.norm(F) * size), rel=1e-12
        )
        assert found.asymmetry[i] == pytest.approx(np.linalg.norm(own - own.T) / size, rel=1e-12)
    # A network that has collapsed is as far from aligned, though products of its weights are no numbers.
    small = predictor_measures(np.float32(1e-25) * W.astype(np.float32), np.float32(1e-25) * Wp)
    np.testing.assert_allclose(small.commutator, found.commutator, rtol=1e-5)
    np.testing.assert_allclose(small.asymmetry, found.asymmetry, rtol=1e-5)
    zero = predictor_measures(0 * W[0], Wp[0])
    assert (float(zero.commutator), float(predictor_measures(W[0], 0 * Wp[0]).asymmetry)) == (0, 0)
    # Where all commute, it is zero.
    aligned = predictor_measures(W[0], W[0] @ W[0].T)
    assert aligned.commutator <= 1e-14


@given(seed=st.integers(0, 99), tau=st.floats(0.2, 2), eta=st.floats(0, 0.5), alpha_p=st.floats(0, 4))
@settings(max_examples=20, deadline=None)
def test_the_commutator_moves_by_the_alignment_matrix(seed, tau, eta, alpha_p):
    F, Wp = symmetric(seed)
    rates = {"augmentation_variance": 0.25, "predictor_rate": alpha_p, "weight_decay": eta}
    K = np.array(alignment_matrix(F, Wp, tau, **rates))
    # By the network itself: F = W W^T with W_a = tau W, and the predictor's gradient made symmetric.
    W = np.linalg.cholesky(F)
    one = np.eye(4)
    dW, dWp = (-part for part in jax.grad(loss)((W, Wp), tau * W, one, 0.25 * one))
    dF = (dW - eta * W) @ W.T
    dF, dWp = np.array(dF + dF.T), np.array(alpha_p * (dWp + dWp.T) / 2 - eta * Wp)
    L = F @ Wp - Wp @ F
    moved = dF @ Wp + F @ dWp - dWp @ F - Wp @ dF
    np.testing.assert_allclose(moved, -(L @ K + K @ L), atol=1e-12 * max(1, np.abs(moved).max()))
    # Along a trajectory, which is longer than a matrix here, it is that of each time.
    both = alignment_matrix(np.stack([F] * 5), np.stack([Wp] * 5), tau, **rates)
    np.testing.assert_allclose(both, np.stack([K] * 5), atol=1e-14)


def test_isotropic_flow_is_that_of_the_network_when_all_is_symmetric():
    # Where predictor and features are aligned the matrix flow keeps the predictor symmetric.
    random = np.random.default_rng(3)
    U = np.linalg.qr(random.normal(size=(4, 4)))[0]
    p0, s0 = np.array([0.6, 0.3, 0.1, 0.5]), np.array([0.3, 0.5, 0.2, 0.7])
    tau0 = np.array([1.0, 0.6, 1.3, 0.8])
    V = np.linalg.qr(random.normal(size=(6, 6)))[0][:4]
    W, Wp, Wa = U @ np.diag(np.sqrt(s0)) @ V, U @ np.diag(p0) @ U.T, U @ np.diag(tau0 * np.sqrt(s0)) @ V
    ts = np.linspace(0, 40, 9)
    whole = byol_flow(W, Wp, Wa, np.eye(6), 0.25 * np.eye(6), ts, **RATES, rtol=1e-9, atol=1e-11)
    modes = decoupled_flow(p0, s0, tau0, ts, **MODES, rtol=1e-9, atol=1e-11)
    p = np.einsum("im,tij,jm->tm", U, whole.ys.Wp, U)
    s = np.einsum("im,tij,jm->tm", U, whole.ys.W @ whole.ys.W.mT, U)
    following = np.einsum("im,tij,mj->tm", U, whole.ys.Wa, V) / np.sqrt(s)
    for found, expected in ((p, modes.ys.p), (s, modes.ys.s), (following, modes.ys.tau)):
        np.testing.assert_allclose(found, expected, atol=1e-7)
    # All of tau stays at one without an average: both reductions are the same modes.
    rates = {"augmentation_variance": 0.25, "predictor_rate": 2.0, "weight_decay": 0.04}
    features = isotropic_flow(U @ np.diag(s0) @ U.T, Wp, 1.0, ts, **rates, rtol=1e-9, atol=1e-11)
    modes = decoupled_flow(p0, s0, 7.0, ts, ema_rate=jnp.inf, **rates, rtol=1e-9, atol=1e-11)
    assert np.all(modes.ys.tau == 1)
    np.testing.assert_allclose(np.einsum("im,tij,jm->tm", U, features.ys.Wp, U), modes.ys.p, atol=1e-7)
    np.testing.assert_allclose(np.einsum("im,tij,jm->tm", U, features.ys.F, U), modes.ys.s, atol=1e-7)


def test_features_that_are_not_aligned_follow_the_symmetrized_network():
    F, Wp = symmetric(5)
    tau, eta, alpha_p = 0.7, 0.04, 2.0

    @jax.jit
    def field(t, state):
        F, Wp = jnp.reshape(state, (2, 4, 4))
        W, one = jnp.linalg.cholesky(F), jnp.eye(4)
        dW, dWp = jax.grad(loss)((W, Wp), tau * W, one, 0.25 * one)
        dF = (-dW - eta * W) @ W.T
        return jnp.ravel(jnp.stack([dF + dF.T, -alpha_p * (dWp + dWp.T) / 2 - eta * Wp]))

    start = np.ravel([F, Wp])
    expected = solve_ivp(field, (0, 4), start, t_eval=[0, 1, 4], rtol=1e-8, atol=1e-10).y.T
    rates = {"augmentation_variance": 0.25, "predictor_rate": alpha_p, "weight_decay": eta}
    path = isotropic_flow(F, Wp, tau, [0.0, 1.0, 4.0], **rates)
    found = np.stack(path.ys, axis=1)
    np.testing.assert_allclose(found, expected.reshape(3, 2, 4, 4), atol=1e-7)


GRID = {"p0": np.array([0.03, 0.2, 0.9])[:, None], "s0": np.array([0.01, 0.5])}


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0, 2e3])
def test_modes_against_scipy(beta):
    ts, alpha_p, eta, spread = np.array([0.0, 1.0, 8.0]), 2.0, 0.04, 1.25

    def field(t, y):
        p, s, r = y  # r is the target's own size, which the equations of the weights have
        tau = r / np.sqrt(s)
        e = tau - spread * p
        return alpha_p * s * e - eta * p, 2 * p * s * e - 2 * eta * s, beta * (np.sqrt(s) - r)

    path = decoupled_flow(**GRID, tau0=0.6, ts=ts, **MODES | {"ema_rate": beta}, **TIGHT)
    assert path.ys.p.shape == (3, 3, 2)
    for i, j in np.ndindex(3, 2):
        p0, s0 = GRID["p0"][i, 0], GRID["s0"][j]
        expected = solve_ivp(
            field, (0, 8), (p0, s0, 0.6 * np.sqrt(s0)), "LSODA", t_eval=ts, rtol=1e-10, atol=1e-12
        ).y
        np.testing.assert_allclose(path.ys.p[:, i, j], expected[0], atol=2e-7)
        np.testing.assert_allclose(path.ys.s[:, i, j], expected[1], atol=2e-7)
        np.testing.assert_allclose(path.ys.tau[:, i, j], expected[2] / np.sqrt(expected[1]), atol=2e-6)


def test_stiff_rates_close_in_on_no_average_and_mix_with_it():
    ts = [0.0, 20.0, 900.0]
    rates = {name: MODES[name] for name in ("augmentation_variance", "predictor_rate", "weight_decay")}
    ends = decoupled_flow(
        **{name: start[..., None] for name, start in GRID.items()},
        tau0=1.0,
        ts=ts,
        ema_rate=np.array([1e2, 1e3, 1e4, np.inf]),
        **rates,
    ).ys
    gaps = np.max(np.abs(ends.p[1] - ends.p[1, ..., -1:]), axis=(0, 1))
    np.testing.assert_allclose(gaps[:2] / gaps[1:3], 10, rtol=0.05)
    assert np.all(ends.tau[..., -1] == 1)
    plus = fixed_points(1.0, 0.04, 0.25).p_plus
    np.testing.assert_allclose(ends.p[-1, 1:], np.full((2, 2, 4), plus), atol=1e-7)
    alone = decoupled_flow(**GRID, tau0=3.0, ts=ts, ema_rate=jnp.inf, **rates).ys
    np.testing.assert_allclose(ends.p[..., -1], alone.p, atol=1e-7)


@pytest.mark.parametrize("start", [-10.0, 0.0, 1e4])
def test_what_is_fast_depends_on_durations_and_not_on_times(start):
    ts = start + jnp.array([0.0, 10.0])
    assert is_stiff(jnp.array([1e3, jnp.inf]), ts)
    assert not is_stiff(jnp.array([1.0, jnp.inf]), ts)


def test_a_fast_rate_in_32_bit():
    ts, rates = [0.0, 5.0], RATES | {"ema_rate": 2e3}
    path = decoupled_flow(np.float32(0.3), 0.2, 0.7, ts, augmentation_variance=0.25, **rates)
    exact = decoupled_flow(0.3, 0.2, 0.7, ts, augmentation_variance=0.25, **rates)
    for found, expected in zip(path.ys, exact.ys, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)  # a step may be wrong by 10^-6
    (W, Wp, Wa), X, X_aug_cov = setting(1)
    small = byol_flow(W.astype(np.float32), Wp, Wa, X, X_aug_cov, ts, **rates)
    large = byol_flow(W, Wp, Wa, X, X_aug_cov, ts, **rates)
    np.testing.assert_allclose(small.ys.W, large.ys.W, atol=2e-5)


@pytest.mark.slow
def test_what_is_solved_implicitly_has_derivatives():
    def end(s0, rate, **options):
        return decoupled_flow(0.3, s0, 1.0, [0.0, 10.0], **MODES | {"ema_rate": rate}, **options).ys.p[-1]

    forward = partial(end, rate=1e3, adjoint=diffrax.ForwardMode())
    _, slope = jax.jvp(forward, (0.4,), (1.0,))
    difference = (end(0.401, 1e3) - end(0.399, 1e3)) / 0.002
    assert slope == pytest.approx(float(difference), rel=1e-4)


def test_elimination_solves_every_element():
    random = np.random.default_rng(0)
    A, b = random.normal(size=(5, 3, 3)) + 3 * np.eye(3), random.normal(size=(5, 3))
    rows = [[jnp.asarray(A[:, i, j]) for j in range(3)] for i in range(3)]
    columns = tuple(jnp.asarray(b[:, i]) for i in range(3))
    found, _, _ = _Elementwise().compute(rows, columns, {})
    np.testing.assert_allclose(np.stack(found, -1), np.linalg.solve(A, b[..., None])[..., 0], rtol=1e-12)
    transposed, _ = _Elementwise().transpose(rows, {})
    found, _, _ = _Elementwise().compute(transposed, columns, {})
    expected = np.linalg.solve(np.swapaxes(A, 1, 2), b[..., None])[..., 0]
    np.testing.assert_allclose(np.stack(found, -1), expected, rtol=1e-12)


@given(eta=st.floats(0, 0.3), beta=st.sampled_from([0.0, 0.3, jnp.inf]))
@settings(max_examples=8, deadline=None)
def test_the_imbalance_of_a_mode_decays(eta, beta):
    ts = np.array([0.0, 5.0, 30.0])
    rates = MODES | {"weight_decay": eta, "ema_rate": beta}
    path = decoupled_flow(**GRID, tau0=0.8, ts=ts, **rates, **TIGHT)
    c = path.ys.s - path.ys.p**2 / 2
    np.testing.assert_allclose(c, np.exp(-2 * eta * ts)[:, None, None] * c[:1], atol=1e-8)


@pytest.mark.parametrize("beta", [0.02, 0.5, 2e3])
def test_networks_that_pass_zero_do_not_spoil_a_portrait(beta):
    ts, eta, spread = np.array([0.0, 3.0, 12.0]), 0.04, 1.25

    def field(t, y):
        p, r, a = y
        M = a - spread * p * r
        return r * M - eta * p, p * M - eta * r, beta * (r - a)

    p0, s0 = np.array([-0.5, -0.1, 0.5])[:, None], np.array([0.0, 0.01, 0.3])
    rates = {"augmentation_variance": 0.25, "predictor_rate": 1.0, "weight_decay": eta, "ema_rate": beta}
    path = decoupled_flow(p0, s0, 0.8, ts, **rates, **TIGHT)
    assert bool(path.ok)
    passed = []
    for i, j in np.ndindex(3, 3):
        y0 = p0[i, 0], s0[j] ** 0.5, 0.8 * s0[j] ** 0.5
        p, r, a = solve_ivp(field, (0, 12), y0, "LSODA", t_eval=ts, rtol=1e-11, atol=1e-13).y
        np.testing.assert_allclose(path.ys.p[:, i, j], p, atol=1e-7)
        np.testing.assert_allclose(path.ys.s[:, i, j], r**2, atol=1e-7)
        if s0[j] > 0:
            np.testing.assert_allclose(path.ys.tau[:, i, j] * r, a, atol=1e-7)
        passed.append(np.any(r < 0))
    assert any(passed) == (beta < 1)


def test_a_large_portrait_is_solved_in_pieces():
    p0, s0 = np.linspace(0, 1, 43)[:, None], np.linspace(0.01, 1, 51)  # 2193 elements: more than a piece
    ts = [0.0, 3.0, 20.0]
    whole = decoupled_flow(p0, s0, 0.8, ts, **MODES)
    assert whole.ys.p.shape == (3, 43, 51)
    assert bool(whole.ok)
    for rows in (slice(0, 3), slice(40, 43)):
        part = decoupled_flow(p0[rows], s0, 0.8, ts, **MODES)
        for large, small in zip(whole.ys, part.ys, strict=True):
            np.testing.assert_allclose(large[:, rows], small, atol=1e-7)
    # One piece that fails is enough, whichever it is: here modes whose predictor is too fast for these steps.
    for row in (0, 42):
        fast = MODES | {"predictor_rate": np.where(np.arange(43) == row, 2000.0, 2.0)[:, None]}
        with pytest.raises(RuntimeError, match="limit: 100 steps"):
            decoupled_flow(p0, s0, 0.8, ts, **fast, max_steps=100)
        failed = decoupled_flow(p0, s0, 0.8, ts, **fast, max_steps=100, throw=False)
        assert not bool(failed.ok)
    traced = jax.jit(lambda p0: decoupled_flow(p0, s0, 0.8, ts, **MODES, throw=False).ys.p)(p0)
    np.testing.assert_allclose(traced, whole.ys.p, atol=1e-9)
    # So do tolerances that are traced where starts are not.
    loose = jax.vmap(lambda rtol: decoupled_flow(p0, s0, 0.8, ts, **MODES, rtol=rtol, throw=False).ys.p)
    np.testing.assert_allclose(loose(jnp.array([1e-6]))[0], whole.ys.p, atol=1e-5)


def test_a_target_that_collapses_more_slowly_grows_in_proportion():
    # As s vanishes tau tends to beta / (beta - eta), which a division by s would lose in 32-bit.
    rates = {"augmentation_variance": 0.25, "predictor_rate": 1.0, "ema_rate": 0.5, "weight_decay": 0.4}
    p0, s0 = np.float32(0.01), np.float32(1e-4)
    path = decoupled_flow(p0, s0, np.float32(1), np.array([0, 400], np.float32), **rates)
    assert path.ys.tau.dtype == np.float32
    assert path.ys.tau[-1] == pytest.approx(5, rel=1e-4)
    # A mode that has collapsed entirely is one, too.
    gone = decoupled_flow(0.0, 0.0, 1.0, [0.0, 400.0], **rates)
    assert gone.ys.tau[-1] == pytest.approx(5, rel=1e-6)


@given(
    tau=st.floats(0.1, 3) | st.floats(-3, -0.1),
    share=st.floats(0, 1) | st.just(1e-14),
    variance=st.floats(0, 4),
)
@settings(max_examples=50, deadline=None)
def test_fixed_points_are_where_the_phase_line_stands_still(tau, share, variance):
    critical = tau**2 / (4 * (1 + variance))
    lower, upper = fixed_points(tau, share * critical, variance)
    for p in (lower, upper):
        assert abs(phase_velocity(p, tau, share * critical, variance)) <= 1e-14 * max(1, abs(tau) ** 3)
    assert lower <= upper
    # By their product, which a difference of close numbers would not have.
    assert lower * upper * (1 + variance) == pytest.approx(share * critical, rel=1e-12, abs=1e-300)
    assert np.all(np.isnan(fixed_points(tau, 1.001 * critical, variance)))


def test_where_fixed_points_meet_and_where_one_is_zero():
    lower, upper = fixed_points(1.0, np.array([0.2, 0.2 * (1 + 1e-15), 0.0]), 0.25)
    np.testing.assert_allclose(lower, [0.4, 0.4, 0], rtol=1e-12)
    np.testing.assert_allclose(upper, [0.4, 0.4, 0.8], rtol=1e-12)
    np.testing.assert_array_equal(fixed_points(0.0, 0.0, 0.25), np.zeros(2))
    assert np.all(np.isnan(fixed_points(0.0, 0.1, 0.25)))
    # The square of tau is no number of 32 bits, and weight decay may be as small as that.
    for tau in np.array([1e-25, 1e25], np.float32):
        np.testing.assert_allclose(fixed_points(tau, 0.0, 0.25), [0, tau / 1.25], rtol=1e-6)
    assert np.all(np.isnan(fixed_points(np.float32(1e-25), 1e-30, 0.25)))
    assert fixed_points(np.float32(1e25), 1.0, 0.25).p_minus == pytest.approx(1e-25, rel=1e-6)
    # Only rounding counts as meeting, on the scale of each tau.
    tau = np.array([1e-6, 1.0, 1e6])
    lower, upper = fixed_points(tau, tau**2 / 5 * (1 - 1e-12), 0.25)
    np.testing.assert_allclose((upper - lower) / tau, 0.8e-6, rtol=1e-3)
    assert np.all(np.isnan(fixed_points(tau, tau**2 / 5 * (1 + 1e-12), 0.25)))
    np.testing.assert_allclose(fixed_points(tau, tau**2 / 5 * (1 + 1e-15), 0.25), [0.4 * tau] * 2, rtol=1e-12)
    slopes = jax.vmap(jax.grad(phase_velocity), (0, None, None, None))(
        jnp.array([0.0422291, 0.7577709]), 1.0, 0.04, 0.25
    )
    np.testing.assert_allclose(slopes, [0.0377709, -0.6777709], atol=1e-6)


def test_the_threshold_of_collapse():
    # Bisected values of tian2021directpred's flow, made once by another integrator.
    etas, taus = np.array([0.01, 0.04, 0.1, 0.19, 0.21]), np.array([[1.0], [0.7]])
    found = collapse_threshold(taus, etas, 0.25)
    expected = [[0.010128, 0.042229, 0.117157, 0.310557, np.inf], [0.014670, 0.064593, *[np.inf] * 3]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[0, :4], fixed_points(1.0, etas[:4], 0.25).p_minus, atol=1e-6)
    imbalance = np.array([-0.001, 0.0005, 0.001, 0.002, 0.005])
    np.testing.assert_allclose(
        collapse_threshold(1.0, 0.04, 0.25, imbalance), [0.04996, 0.03812, 0.03384, 0.02466, 0], atol=2e-5
    )
    rates = np.array([0.25, 4.0, 10.0])
    np.testing.assert_allclose(
        collapse_threshold(1.0, 0.04, 0.25, 0.001, rates), [0.0402, 0.0031, 0], atol=1e-4
    )
    # Without weight decay no start collapses that s >= 0 allows.
    found = collapse_threshold(1.0, 0.0, 0.25, -0.01, rates)
    np.testing.assert_allclose(found, np.sqrt(0.01 * rates), atol=1e-12)
    # Beyond the critical weight decay a mode is lost when it passes the place where fixed points met.
    time, _ = quad(lambda p: 1 / (p * (1.25 * p**2 - p + 0.21)), 0.4, 0.5)
    found = collapse_threshold(1.0, 0.21, 0.25, 0.0, rates, duration=time)
    np.testing.assert_allclose(found, 0.5, atol=1e-6)
    # On balance p_minus parts all modes at every time, soon too.
    found = collapse_threshold(1.0, 0.04, 0.25, 0.0, rates, duration=3.0)
    np.testing.assert_allclose(found, fixed_points(1.0, 0.04, 0.25).p_minus, atol=1e-6)
    # A trajectory that overflows says nothing.
    assert np.all(np.isnan(collapse_threshold(1.0, 0.04, 0.25, 1e200, rates)))
    assert np.isnan(jax.grad(lambda eta: collapse_threshold(1.0, eta, 0.25))(0.04))


def test_starts_on_either_side_of_the_threshold_end_apart():
    minus, plus = fixed_points(1.0, 0.04, 0.25)
    p0 = float(minus) * np.array([0.999, 1.001])
    for beta in (0.02, 2.0, jnp.inf):
        ends = decoupled_flow(
            p0, p0**2, 1.0, [0.0, 1500.0], **MODES | {"predictor_rate": 1.0, "ema_rate": beta}
        )
        np.testing.assert_allclose(ends.ys.p[-1], [0, float(plus)], atol=1e-2 if beta < 1 else 1e-6)


def test_a_sweep_compiles_nothing():
    def sweep(eta, beta):
        return decoupled_flow(
            **GRID, tau0=1.0, ts=[0.0, 1.0], **MODES | {"weight_decay": eta, "ema_rate": beta}
        )

    sweep(0.1, 0.3)
    with count_compilations() as names:
        sweep(0.2, 0.7)
    assert names == []


@pytest.mark.parametrize("name", ["predictor_rate", "ema_rate", "weight_decay"])
def test_negative_rates_are_refused_by_name(name):
    weights, X, X_aug_cov = setting(0)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got -0.1"):
        byol_flow(*weights, X, X_aug_cov, [0.0, 1.0], **RATES | {name: -0.1})
    with pytest.raises(ValueError, match=rf"^{name} must be >= 0.*, got -0.1"):
        decoupled_flow(**GRID, tau0=1.0, ts=[0.0, 1.0], **MODES | {name: np.array([0.1, -0.1])})


def test_bad_arguments_are_refused_by_name():
    (W, Wp, Wa), X, X_aug_cov = setting(0)
    flow = partial(byol_flow, ts=[0.0, 1.0], **RATES)
    with pytest.raises(ValueError, match="X_aug_cov must be positive semidefinite"):
        flow(W, Wp, Wa, X, -X_aug_cov)
    with pytest.raises(ValueError, match="X must be symmetric"):
        flow(W, Wp, Wa, X + np.triu(np.ones((4, 4)), 1), X_aug_cov)
    with pytest.raises(ValueError, match=r"W0, Wp0, Wa0, X and X_aug_cov must have shapes \(n2, n1\)"):
        flow(W, Wp, Wa.T, X, X_aug_cov)
    with pytest.raises(ValueError, match=r"ema_rate must be one number, got shape \(2,\)"):
        byol_flow(W, Wp, Wa, X, X_aug_cov, [0.0, 1.0], **RATES | {"ema_rate": [0.1, 0.2]})
    with pytest.raises(ValueError, match="augmentation_variance must be >= 0, got -1"):
        decoupled_flow(0.1, 0.1, 1.0, [0.0, 1.0], **MODES | {"augmentation_variance": -1.0})
    with pytest.raises(ValueError, match="s0 must be >= 0"):
        decoupled_flow(0.1, -0.1, 1.0, [0.0, 1.0], **MODES)
    with pytest.raises(ValueError, match=r"must broadcast to one shape, got p0 \(2,\), s0 \(3,\)"):
        decoupled_flow(np.ones(2), np.ones(3), 1.0, [0.0, 1.0], **MODES)
    with pytest.raises(ValueError, match="ema_rate must be concrete"):
        jax.jit(lambda beta: decoupled_flow(0.1, 0.1, 1.0, [0.0, 1.0], **MODES | {"ema_rate": beta}))(0.5)
    with pytest.raises(ValueError, match=r"weight_decay must be >= 0, got -0\.1"):
        fixed_points(1.0, -0.1, 0.25)
    with pytest.raises(ValueError, match="tau must be > 0, got 0"):
        collapse_threshold(0.0, 0.1, 0.25)
    with pytest.raises(RuntimeError, match="limit: 3 steps"):
        decoupled_flow(0.1, 0.1, 1.0, [0.0, 100.0], **MODES, max_steps=3, solver=diffrax.Dopri5())
