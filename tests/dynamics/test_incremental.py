from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, nnls

from dynamics import incremental
from dynamics.incremental import greedy, log_flow, negative_gradient, raw_flow
from tests.helpers import count_compilations
from tests.public_calls import PATH

LOG10 = float(np.log(10))
POWERS = (8, 16, 32)  # of alpha


def quadratic(beta, S, c):
    # One function for all problems of a size: they share what is compiled.
    return 0.5 * jnp.vdot(beta, S @ beta) - jnp.vdot(c, beta)


def linear_problem(seed, samples=40, size=6):
    """A random linear problem with a teacher, and its negative gradient."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(samples, size)) @ (np.eye(size) + 0.6 * rng.normal(size=(size, size)) / size**0.5)
    teacher = rng.normal(size=size)
    S = X.T @ X / samples
    return X, teacher, negative_gradient(quadratic, jnp.asarray(S), jnp.asarray(S @ teacher))


def inverse_scale_space(X, y):
    """Jump times and final point for a square loss: s' = -grad, beta the best fit with the signs of s."""
    S, c = X.T @ X / len(y), X.T @ y / len(y)
    s, beta, time, times, g = np.zeros(len(c)), np.zeros(len(c)), 0.0, [], c
    while np.abs(g).max() > 1e-9 * np.abs(c).max():
        # Coordinates that are not fitted move on; those that sit at the bound and are fitted have g = 0.
        moving = np.abs(g) > 1e-9 * np.abs(c).max()
        target = np.where(g > 0, 1.0, -1.0)
        wait = np.where(moving, (target - s) / np.where(moving, g, 1.0), np.inf)
        time += wait.min()
        s = np.where(moving, s + wait.min() * g, s)
        s[np.argmin(wait)] = target[np.argmin(wait)]
        times.append(time)
        at_bound = np.flatnonzero(np.abs(np.abs(s) - 1) < 1e-9)
        signs = np.sign(s[at_bound])
        # min (1/2) x S x - c x over signed x >= 0, as a least squares problem.
        A, b = X[:, at_bound] * signs / len(y) ** 0.5, y / len(y) ** 0.5
        beta = np.zeros(len(c))
        beta[at_bound] = signs * nnls(A, b)[0]
        g = c - S @ beta
    return np.array(times), beta


def test_recorded_path_of_a_linear_problem():
    # Times and order were found with independent code; coordinate 0 leaves and returns with the other sign.
    _, teacher, g = linear_problem(0)
    path = greedy(g, 6)
    expected = [0.437568, 0.564612, 0.707724, 0.931173, 1.676586, 4.709827, 51.274265]
    np.testing.assert_allclose(path.times, expected, rtol=2e-6)
    assert path.order.tolist() == [0, 3, 1, 2, 5, 4, 0]
    assert np.count_nonzero(path.beta, axis=1).tolist() == [0, 1, 2, 3, 3, 4, 5, 6]
    assert path.beta[1, 0] * path.beta[-1, 0] < 0
    np.testing.assert_allclose(path.beta[-1], teacher, atol=1e-9)
    assert path.converged.all()
    assert not path.tied.any()
    assert path.complete


@pytest.mark.parametrize(("samples", "size"), [(40, 6), (4, 6)], ids=["over-determined", "under-determined"])
def test_agrees_with_inverse_scale_space(samples, size):
    for seed in range(1, 12):
        X, teacher, g = linear_problem(seed, samples, size)
        path = greedy(g, size)
        times, final = inverse_scale_space(X, X @ teacher)
        np.testing.assert_allclose(path.times, times, rtol=1e-6, err_msg=f"seed {seed}")
        np.testing.assert_allclose(path.beta[-1], final, atol=1e-7)
        if samples < size:  # it ends at the interpolant of least l1 norm
            least = linprog(np.ones(2 * size), A_eq=np.hstack([X, -X]), b_eq=X @ teacher).fun
            np.testing.assert_allclose(np.abs(path.beta[-1]).sum(), least, rtol=1e-7)


def test_one_compilation_per_shape_and_vmap():
    data = [linear_problem(seed) for seed in (0, 1)]
    alone = [greedy(g, 6, max_stages=14) for _, _, g in data]
    with count_compilations() as names:
        greedy(linear_problem(2)[2], 6, max_stages=14)
    assert names == []
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(g for _, _, g in data))
    both = jax.vmap(lambda g: greedy(g, 6, max_stages=3))(stacked)
    assert not both.complete.any()
    for lane, path in enumerate(alone):
        np.testing.assert_allclose(both.times[lane], path.times[:3], rtol=1e-9)
        np.testing.assert_allclose(both.beta[lane], path.beta[:4], atol=1e-8)
    with pytest.raises(ValueError, match="max_stages must be given"):
        jax.vmap(lambda g: greedy(g, 6))(stacked)


def test_rows_beyond_the_end():
    g = linear_problem(0)[2]
    path = greedy(g, 6, max_stages=14)
    assert np.isinf(path.times[7:]).all()
    assert (path.order[7:] == -1).all()
    np.testing.assert_array_equal(path.beta[8:], np.tile(path.beta[7], (7, 1)))
    assert path.complete


def test_coordinates_that_are_due_a_little_apart_are_no_tie():
    path = greedy(jax.tree_util.Partial(jnp.subtract, jnp.array([2.0, 2.001])), 2, max_stages=2)
    assert path.order.tolist() == [1, 0]
    assert not np.any(path.tied)
    np.testing.assert_allclose(path.times, [1 / 2.001, 1 / 2], rtol=1e-12)


def test_ties_enter_together_in_the_proportions_of_their_starts():
    # Two heads that do the same: only their sum is seen.
    g = negative_gradient(quadratic, jnp.ones((2, 2)), 2 * jnp.ones(2))
    path = greedy(g, 2, u0=[1.0, 0.5], v0=[0.5, 0.1])
    assert path.tied.tolist() == [True]
    np.testing.assert_allclose(path.times, [0.5])
    # d log beta / dt is the same for both, so the ratio is that of the squares of w.
    np.testing.assert_allclose(path.beta[1, 0] / path.beta[1, 1], (1.5 / 0.6) ** 2)
    np.testing.assert_allclose(path.beta[1].sum(), 2.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_loss_without_minimum_is_flagged(dtype):
    # Logistic loss on separable data: weights grow for ever.
    path = greedy(jax.nn.sigmoid, 1, dtype=dtype)
    assert path.beta.dtype == dtype
    assert path.converged.tolist() == [False]
    assert not path.complete


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_that_leave_for_good(dtype):
    # What the teacher lacks is learned for a while, and leaves like 1 / t: its gradient vanishes with it.
    left = 0
    for seed in range(12):
        A = np.random.default_rng(seed).normal(size=(5, 3))
        teacher = np.array([2.0, 0.0, -1.0])
        g = negative_gradient(quadratic, jnp.asarray(A.T @ A, dtype), jnp.asarray(A.T @ A @ teacher, dtype))
        path = greedy(g, 3, dtype=dtype)
        assert path.converged.all(), seed
        assert path.complete, seed
        np.testing.assert_allclose(path.beta[-1], teacher, atol=1e-7 if dtype == "float64" else 2e-3)
        left += bool(np.any(path.order == 1))
    assert left >= 3


def test_a_gradient_that_ceases_to_be_finite():
    def g(beta):
        return jnp.stack([2 - beta[0], jnp.where(jnp.abs(beta[0]) > 1, jnp.nan, 0.5)])

    path = greedy(g, 2, max_stages=6)
    np.testing.assert_array_equal(path.times, [0.5] + 5 * [np.inf])
    assert not path.complete
    assert not path.converged.all()
    with pytest.raises(RuntimeError, match="neg_gradient is not finite after 1 stages"):
        greedy(g, 2)


def test_nothing_to_learn():
    path = greedy(negative_gradient(quadratic, jnp.eye(2), jnp.zeros(2)), 2)
    assert path.times.shape == (0,)
    assert path.beta.tolist() == [[0.0, 0.0]]
    assert path.complete


def test_time_until_active_is_the_time_to_the_bound():
    np.testing.assert_array_equal(
        incremental.time_until_active([1.0, 0.5, 2.0, 0.3], [2.0, -3.0, -1.0, 0.0]), [0.5, 0.5, 0.0, np.inf]
    )


def test_distance_to_the_staircase_halves_per_squaring_of_alpha():
    g = linear_problem(0)[2]
    path = greedy(g, 6, max_stages=14)
    taus = jnp.linspace(0.0, 8.0, 4001)
    flows = [log_flow(g, np.ones(6), np.full(6, 0.5), jnp.asarray(power * LOG10), taus) for power in POWERS]
    distance = np.array([incremental.staircase_distance(path, taus, flow.ys.beta) for flow in flows])
    np.testing.assert_allclose(distance, [0.70, 0.35, 0.18], rtol=0.03)
    np.testing.assert_allclose(distance[1:] / distance[:-1], 0.5, atol=0.02)


def test_flow_of_one_product_is_logistic():
    # From equal factors x0 = u v: beta = s e^{2 s t} / (e^{2 s t} - 1 + s / x0); here all but equal ones.
    lam, s = 8 * LOG10, np.array([2.0, 1.0, 4.0])
    taus = jnp.array([0.2, 0.25, 0.5, 0.51, 1.0])
    g = negative_gradient(quadratic, jnp.eye(3), jnp.asarray(s))
    flow = log_flow(g, np.ones(3), np.full(3, 1 - 1e-9), lam, taus, rtol=1e-9, atol=1e-11)
    growth = np.exp(2 * s * lam * np.asarray(taus)[:, None])
    expected = s * growth / (growth - 1 + s * np.exp(2 * lam))
    assert np.any((expected > 0.1) & (expected < 0.9 * s))  # on its way as well
    np.testing.assert_allclose(flow.ys.beta, expected, atol=1e-6)


@given(st.integers(0, 2**31), st.floats(0.5, 3.0))
def test_both_flows_agree_and_conserve(seed, lam):
    rng = np.random.default_rng(seed)
    u0, v0 = rng.choice([-1.0, 1.0], (2, 3)) * rng.permuted([[1.0, 0.6, 1.4], [0.3, 1.1, 0.8]], axis=0)
    target = rng.normal(size=3)
    g = negative_gradient(quadratic, jnp.eye(3), jnp.asarray(target))
    taus = jnp.linspace(0.1, 2.0, 5)
    small = np.exp(-lam)
    logs = log_flow(g, u0, v0, lam, taus, rtol=1e-9, atol=1e-11)
    raw = raw_flow(g, small * u0, small * v0, jnp.concatenate([jnp.zeros(1), lam * taus]))
    np.testing.assert_allclose(raw.ys.u[1:] * raw.ys.v[1:], logs.ys.beta, atol=1e-6)
    drift = np.asarray(incremental.conserved_quantity(raw.ys.u, raw.ys.v)) - small**2 * (u0**2 - v0**2)
    assert np.abs(drift).max() < 1e-6


def test_a_product_that_returns_with_the_other_sign():
    # The flow of both factors loses this at alpha = 1e-12: in log coordinates the second product comes back.
    # Padded with products that do not move, to the size of the other problems.
    S, c = np.eye(6), np.zeros(6)
    S[:2, :2], c[:2] = [[1.0, -0.95], [-0.95, 1.2]], [1.0, -0.7]
    g = negative_gradient(quadratic, jnp.asarray(S), jnp.asarray(c))
    path = greedy(g, 6)
    np.testing.assert_allclose(path.times, [1.0, 7.8], rtol=1e-6)
    taus = jnp.linspace(0.0, 9.0, 4001)
    lag = []
    for power in POWERS:
        flow = log_flow(g, np.ones(6), np.full(6, 0.5), jnp.asarray(power * LOG10), taus)
        lag.append(power * abs(incremental.jump_times(path, taus, flow.ys.beta)[1] - 7.8))
    np.testing.assert_allclose(lag, lag[-1], rtol=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 1.0], [0.5, -1.0], 5.0, [0.0, 1.0]), "u0 and v0 must differ in magnitude.*coordinate 1"),
        (
            ([1.0], [0.5, 0.5], 5.0, [0.0, 1.0]),
            r"u0 and v0 must have shapes \(p,\) and \(p,\), got \(1,\) and \(2,\)",
        ),
        (([1.0, 1.0], [0.5, 0.5], 0.0, [0.0, 1.0]), "log_inv_alpha must be a positive number, got 0.0"),
        (([1.0, 1.0], [0.5, 0.5], 5.0, [-1.0, 1.0]), "taus must be >= 0, got -1.0"),
        (([1.0, np.nan], [0.5, 0.5], 5.0, [0.0, 1.0]), "u0 must be finite"),
    ],
)
def test_bad_input_of_the_flow(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_flow(lambda beta: 1.0 - beta, *arguments)


def test_bad_input_of_the_algorithm():
    with pytest.raises(ValueError, match="size must be a positive integer"):
        greedy(lambda beta: -beta, 0)
    with pytest.raises(ValueError, match="max_stages must be an integer >= 1, got 0"):
        greedy(lambda beta: -beta, 2, max_stages=0)
    with pytest.raises(ValueError, match="u0 and v0 must differ in magnitude"):
        greedy(lambda beta: -beta, 2, u0=[1.0, 1.0], v0=[0.5, -1.0])
    with pytest.raises(ValueError, match="neg_gradient must map"):
        greedy(lambda beta: jnp.sum(beta), 2)
    with pytest.raises(ValueError, match="neg_gradient must be finite"):
        greedy(negative_gradient(quadratic, jnp.full((2, 2), jnp.nan), jnp.ones(2)), 2)
    with pytest.raises(ValueError, match="max_stages must be given where greedy is traced"):
        jax.jit(lambda u0: greedy(lambda beta: -beta, 2, u0=u0, v0=[0.5, 0.1]))(jnp.ones(2))


def spring(target, stiffness, beta):
    """With stiffness zero there is no minimum."""
    return target - stiffness * beta


def flow_of_spring(stiffness, u0=(1.0, 1.0), log_inv_alpha=5.0, taus=(0.5, 3.0), **options):
    def g(beta):  # what it closes over may be traced
        return spring(jnp.array([2.0, -1.0]), stiffness, beta)

    return log_flow(g, u0, [0.5, -0.5], log_inv_alpha, taus, **options)


def test_the_flow_raises_exactly_where_it_is_not_ok():
    raising = eqx.filter_jit(flow_of_spring)
    quiet = jax.jit(lambda stiffness: flow_of_spring(stiffness, throw=False))
    assert quiet(1.0).ok
    np.testing.assert_array_equal(raising(1.0).ys.beta, quiet(1.0).ys.beta)
    for stiffness, message in ((0.0, "a product grew above 1e8"), (np.nan, r"integrate: .*")):
        assert not quiet(stiffness).ok
        for call in (flow_of_spring, raising):
            with pytest.raises(RuntimeError, match=message):
                call(jnp.asarray(stiffness))


def test_derivatives_of_a_failed_flow_are_nan():
    good = (1.0, [1.0, 1.0], 5.0, [0.5, 3.0])
    bad = [
        (0.0, *good[1:]),
        (1.0, [0.5, 1.0], *good[2:]),
        (*good[:2], -5.0, good[3]),
        (*good[:3], [-0.5, 3.0]),
    ]

    @jax.jit
    @jax.vmap
    @partial(jax.grad, argnums=(0, 1, 2, 3))
    def slopes(*arguments):
        return jnp.sum(flow_of_spring(*arguments, throw=False).ys.beta[-1])

    found = slopes(*(jnp.asarray(lanes) for lanes in zip(good, *bad, strict=True)))
    # The minimum is at (2, -1) / stiffness.
    for slope, expected in zip(found, (-1.0, [0.0, 0.0], 0.0, [0.0, 0.0]), strict=True):
        np.testing.assert_allclose(slope[0], expected, atol=1e-6)
        assert np.isnan(slope[1:]).all()


def test_derivatives_of_the_path_and_its_bad_lanes():
    @jax.jit
    @jax.vmap
    @partial(jax.jacrev, argnums=(1, 2), has_aux=True)
    def slopes(S, c, u0):
        path = greedy(negative_gradient(quadratic, S, c), 2, max_stages=2, u0=u0, v0=jnp.array([0.5, 0.1]))
        return (path.times, path.beta[-1]), path

    S, c, u0 = np.array([[1.0, 0.3], [0.3, 2.0]]), np.array([2.0, -1.0]), np.array([1.0, 0.5])
    lanes = [
        (S, c, u0),
        (np.ones((2, 2)), np.full(2, 2.0), u0),  # both enter together
        (np.zeros((2, 2)), c, u0),  # no minimum
        (S, c, np.array([0.5, 0.5])),
        (S, np.array([np.nan, -1.0]), u0),
    ]
    ((times_c, times_u0), (beta_c, beta_u0)), path = slopes(*map(np.stack, zip(*lanes, strict=True)))
    # T_1 = 1 / c_0, and then the second product waits with g = c_1 - S_10 c_0 / S_00.
    np.testing.assert_allclose(times_c[0], [[-0.25, 0.0], [-0.15234375, 0.5078125]], atol=1e-8)
    np.testing.assert_allclose(beta_c[0], np.linalg.inv(S), atol=1e-8)
    # The shares of two that enter together: 2 w_i^2 / (w_0^2 + w_1^2).
    w = np.array([1.5, 0.6])
    expected = 4 * w * w[::-1] ** 2 * np.array([[1.0, -1.0], [-1.0, 1.0]]) / np.sum(w**2) ** 2
    np.testing.assert_allclose(beta_u0[1], expected, rtol=1e-6)
    for slope in (times_c, times_u0, beta_c, beta_u0):
        assert np.isnan(slope[2:]).all()
    assert path.converged.all(axis=1).tolist() == [True, True, False, False, False]
    for values in (path.times, path.beta, path.log_scale):
        assert np.isnan(values).all(axis=tuple(range(1, values.ndim))).tolist() == [False] * 3 + [True] * 2


def test_the_staircase_has_no_stage_at_a_bad_time():
    for tau in (np.nan, -0.1, np.inf):
        with pytest.raises(ValueError, match="tau must be >= 0 and finite, got"):
            incremental.staircase(PATH, tau)
    found, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda tau: incremental.staircase(PATH, tau)[0])))(
        jnp.array([0.6, np.nan, -0.1, 2.0])
    )
    np.testing.assert_array_equal(found, [2.0, np.nan, np.nan, 2.0])
    np.testing.assert_array_equal(slope, [0.0, np.nan, np.nan, 0.0])
    with pytest.raises(ValueError, match="path must be a single one"):
        incremental.staircase(jax.tree.map(lambda leaf: leaf[None], PATH), 1.0)


def test_there_is_no_jump_beyond_the_end():
    # The flow is late: its product passes half of what it settles to after the last jump.
    path = replace(PATH, times=np.array([0.5, np.inf]), order=np.array([1, -1]), beta=PATH.beta[[0, 2, 2]])
    times = incremental.jump_times(path, [0.0, 0.5, 1.0], [[0.0, 0.0], [0.0, -0.25], [0.0, -0.75]])
    np.testing.assert_allclose(times, [0.75, np.nan])


def test_equal_times_add_nothing_to_the_distance():
    taus, beta = np.array([0.0, 0.6, 1.2]), np.array([[0.0, 0.0], [1.5, 0.1], [2.0, -0.9]])
    cut = float(incremental.staircase_distance(PATH, taus[:2], beta[:2]))
    distance = jax.jit(lambda taus: incremental.staircase_distance(PATH, taus, beta))
    np.testing.assert_allclose([distance(np.minimum(taus, 0.6)), distance(taus[::-1])], [cut, np.nan])
    np.testing.assert_allclose(incremental.staircase_distance(PATH, np.minimum(taus, 0.6), beta), cut)
