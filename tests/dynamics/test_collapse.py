"""Minima, landscapes and transitions of regularized linear networks, against optimizers and closed forms."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.collapse import (
    Moments,
    critical_gamma,
    deep_minimum,
    effective_landscape,
    hysteresis_sweep,
    imbalance,
    metastable_gamma,
    moments,
    nuclear_minimum,
    ridge_minimum,
    stochastic_linear_flow,
    stochastic_linear_loss,
    transition_order,
    two_layer_minimum,
)
from tests.helpers import lowest

ROUND = Moments(jnp.eye(4), jnp.array([0.5, -0.5, 0.5, 0.5]), jnp.array(1.0))
# Its minima jump from one to another at 0.261, and to zero at 0.419, with two hidden layers of one unit.
SPREAD = Moments(jnp.diag(jnp.array([1.0, 0.01])), jnp.array([1.0, 0.2]), jnp.array(6.0))


def data(seed, d=3, k=None, n=20):
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(n, d)) * np.geomspace(1.5, 0.4, d), rng.normal(size=(n, k or 1))
    y = x @ rng.normal(size=(d, k or 1)) + 0.3 * noise
    return moments(x, y if k else y[:, 0])


RANDOM = data(0)


def value_and_norm(case, noise, widths):
    """The least loss and the squared norm there, as functions of a gamma that all layers share."""

    def at(gamma):
        least = deep_minimum(case, jnp.full(len(widths) + 1, gamma), noise, widths)
        return least.loss, jnp.sum(least.norms**2)

    return at


def network_loss(params, args):
    return stochastic_linear_loss(params, *args)


def test_moments_are_means_over_examples():
    x, y = np.random.default_rng(0).normal(size=(7, 3)), np.random.default_rng(1).normal(size=(7, 2))
    got = moments(x, y)
    np.testing.assert_allclose(got.A, np.mean(x[:, :, None] * x[:, None], axis=0), atol=1e-15)
    np.testing.assert_allclose(got.c, np.mean(x[:, :, None] * y[:, None], axis=0), atol=1e-15)
    assert float(got.y2) == pytest.approx(np.mean(np.sum(y**2, axis=1)), abs=1e-15)


@given(st.integers(1, 4), st.integers(1, 4), st.floats(0, 2), st.integers(0, 99))
def test_one_hidden_layer_is_an_instance_of_any_depth(width, d, noise, seed):
    case, (gw, gu) = data(seed, d), (0.3, 0.2)
    W, U = (
        np.random.default_rng(seed).normal(size=(width, d)),
        np.random.default_rng(5).normal(size=(1, width)),
    )
    A, c, u = np.asarray(case.A), np.asarray(case.c), U[0]
    printed = u @ W @ A @ W.T @ u + noise * sum(u[j] ** 2 * W[j] @ A @ W[j] for j in range(width))
    printed += case.y2 - 2 * u @ W @ c + gw * np.sum(W**2) + gu * np.sum(u**2)
    assert stochastic_linear_loss([W, U], case, noise, [gw, gu]) == pytest.approx(float(printed), abs=1e-13)


def test_noise_is_integrated_as_sampling_says():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    params = [rng.normal(size=s) for s in ((3, 2), (4, 3), (2, 4))]
    noise = rng.choice([0.0, 1.5], p=[1 / 3, 2 / 3], size=(200_000, 7))  # dropout at 1 / 3 has variance 1 / 2
    h = np.einsum("sh,nh->snh", noise[:, :3], x @ params[0].T) @ params[1].T
    errors = np.sum(((h * noise[:, None, 3:]) @ params[2].T - y) ** 2, axis=-1).mean(axis=1)
    exact = float(stochastic_linear_loss(params, moments(x, y), 0.5, np.zeros(3)))
    assert abs(errors.mean() - exact) < 4 * errors.std() / errors.size**0.5


@pytest.mark.parametrize(
    ("gammas", "noise", "widths"),
    [
        ([0.3, 0.2], 0.7, (3,)),
        ([0.02, 0.1], 0.0, (1,)),
        ([0.1, 0.05, 0.2], 0.5, (5, 3)),
        ([0.02, 0.05, 0.03, 0.04], 0.3, (2, 3, 2)),
    ],
)
def test_minima_are_the_best_of_64_starts(gammas, noise, widths):
    case, gammas, sizes = RANDOM, jnp.array(gammas), (3, *widths, 1)
    least = deep_minimum(case, gammas, noise, widths)
    assert least.norms[0] > 0.1
    found = lowest(network_loss, zip(sizes[1:], sizes, strict=False), (case, noise, gammas))
    assert found == pytest.approx(float(least.loss), abs=1e-9)
    # The weights reach the loss, and are stationary.
    loss, slope = jax.value_and_grad(network_loss)(least.weights, (case, noise, gammas))
    assert float(loss) == pytest.approx(float(least.loss), abs=1e-12)
    assert max(float(jnp.max(jnp.abs(part))) for part in slope) < 1e-10
    np.testing.assert_allclose([jnp.linalg.norm(W) for W in least.weights], least.norms, rtol=1e-12)


def test_two_layers_are_those_of_the_theorem():
    gu, gw, noise, width = 0.3, 0.1, 0.7, 3
    least = two_layer_minimum(RANDOM, gu, gw, noise, width)
    A, c, b = np.asarray(RANDOM.A), np.asarray(RANDOM.c), float(least.b)
    direction = np.linalg.solve(b**2 * (noise + width) * A + gw * np.eye(3), c)
    assert np.sum(direction**2) == pytest.approx(gu / gw, rel=1e-12)
    np.testing.assert_allclose(least.U, np.full(width, b), rtol=1e-14)
    np.testing.assert_allclose(least.W, np.tile(b * direction, (width, 1)), rtol=1e-11)
    at_minimum = stochastic_linear_loss([least.W, least.U[None]], RANDOM, noise, [gw, gu])
    assert float(at_minimum) == pytest.approx(float(least.loss), abs=1e-13)


@pytest.mark.parametrize("share", [1.0, 1.2])
def test_two_layers_collapse_exactly(share):
    gamma_u = share * jnp.sum(ROUND.c**2) / 0.5
    least = two_layer_minimum(ROUND, gamma_u, 0.5, 0.3, 2)
    assert float(least.b) == 0
    assert not np.any(least.W)
    assert float(least.loss) == 1.0


def test_order_parameter_grows_as_the_root_of_the_distance():
    width, noise, case = 3, 0.7, RANDOM
    t = jnp.geomspace(1e-6, 1e-3, 8) * jnp.sum(case.c**2)
    gu = (jnp.sum(case.c**2) - t) / 0.4
    b = jax.vmap(lambda gu: two_layer_minimum(case, gu, 0.4, noise, width).b)(gu)
    slope = np.polyfit(np.log(t), np.log(b), 1)[0]
    amplitude = np.sqrt(0.4 * t / (2 * (noise + width) * case.c @ case.A @ case.c))
    assert slope == pytest.approx(0.5, abs=1e-3)
    np.testing.assert_allclose(b, amplitude, rtol=2e-3)


@partial(jax.jit, static_argnums=3)
def curve(case, noise, gammas, widths):
    return jax.vmap(value_and_norm(case, noise, widths))(gammas)


@pytest.mark.parametrize("widths", [(), (2,), (2, 3), (2, 3, 1)])
@given(st.floats(0, 1), st.integers(0, 99))
def test_least_loss_is_concave_with_the_squared_norm_for_derivative(widths, noise, seed):
    gamma = np.linspace(0.01, 0.8, 40)
    loss, norm = map(np.asarray, curve(data(seed), noise, gamma, widths))
    assert np.all(np.diff(loss, 2) < 1e-12)
    assert np.all(np.diff(norm) < 1e-9)
    # A concave function lies between its tangents.
    rise, step = np.diff(loss), np.diff(gamma)
    assert np.all(rise <= norm[:-1] * step + 1e-12)
    assert np.all(rise >= norm[1:] * step - 1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_critical_gammas_of_round_data(depth):
    widths, noise, w = (4,) * depth, 0.5, 4
    B = w**depth * (noise + w) ** depth
    height = w ** (2 * depth - 2) * ((depth - 1) / B) ** ((depth - 1) / depth) / depth**2
    critical = critical_gamma(ROUND, noise, widths)
    assert float(critical) == pytest.approx(height ** (depth / (depth + 1)), rel=1e-12)
    ratio = metastable_gamma(ROUND, noise, widths) / critical
    assert float(ratio) == pytest.approx((depth + 1) / 4 ** (depth / (depth + 1)), rel=1e-12)


def test_critical_gammas_are_the_highest_over_all_ridges():
    # The signal is in directions of large variance, of small, and of both.
    a, cs = np.array([1.0, 0.01]), np.array([[1.0, 0.01], [0.02, 0.3], [0.6, 0.2]])
    lam = np.geomspace(1e-4, 1e2, 100_001)[:, None]
    noise, widths, depth = 0.5, (3, 2, 4), 3
    rho = np.prod([w / (w + noise) for w in widths])
    fits, norms = (np.stack([np.sum(c**2 / (a + lam) ** k, axis=1) for c in cs]) for k in (1, 2))
    critical = rho ** (1 - 1 / depth) / depth * np.max(lam.T ** (1 / depth) * fits, axis=1)
    metastable = rho ** (1 - 1 / depth) * np.max(lam.T ** (1 + 1 / depth) * norms, axis=1)
    for function, power in ((critical_gamma, critical), (metastable_gamma, metastable)):
        got = jax.vmap(lambda c, of=function: of(Moments(jnp.diag(a), c, 9.0), noise, widths))(cs)
        np.testing.assert_allclose(got, power ** (depth / (depth + 1)), rtol=1e-7)


@pytest.mark.parametrize("widths", [(2,), (2, 2)])
@pytest.mark.parametrize("function", [critical_gamma, metastable_gamma])
def test_critical_gammas_of_bad_noise_are_nan(function, widths):
    got = jax.vmap(lambda noise: function(ROUND, noise, widths))(jnp.array([0.3, jnp.nan, -0.1]))
    assert np.isfinite(got).tolist() == [True, False, False]


@pytest.mark.parametrize(("case", "widths"), [(SPREAD, (1, 1)), (RANDOM, (2, 3, 2)), (RANDOM, (2,))])
def test_collapse_is_complete_from_the_critical_gamma_on(case, widths):
    at, critical = value_and_norm(case, 0.2, widths), critical_gamma(case, 0.2, widths)
    loss, norm = jax.vmap(at)(critical * jnp.array([1 - 1e-6, 1 + 1e-6]))
    assert loss[0] < case.y2
    assert norm[0] > 0
    assert loss[1] == case.y2
    assert norm[1] == 0


@pytest.mark.parametrize("widths", [(2,), (2, 2)])
def test_a_phase_diagram_is_one_call_with_the_critical_gammas_for_boundary(widths):
    noises, shares = jnp.array([0.0, 0.3, 1.0, 3.0]), jnp.array([0.3, 0.9, 0.999, 1.001, 1.5])
    traced = []

    @jax.jit
    def diagram(noises, shares):
        def at(noise, share):
            traced.append(0)
            gamma = share * critical_gamma(SPREAD, noise, widths)
            return jnp.sum(deep_minimum(SPREAD, [gamma] * (len(widths) + 1), noise, widths).norms)

        return jax.vmap(jax.vmap(at, (None, 0)), (0, None))(noises, shares)

    assert np.array_equal(diagram(noises, shares) > 0, np.tile(shares < 1, (4, 1)))
    diagram(noises + 0.1, shares)
    assert len(traced) == 1


def test_several_minima_are_told_apart():
    # The whole landscape in one variable, on a grid that is finer than any search.
    z, gammas = np.linspace(-12, 6, 400_001), np.linspace(0.2, 0.45, 26)
    lam = np.exp(z)[:, None]
    fit = np.sum(np.array([1.0, 0.04]) / (np.array([1.0, 0.01]) + lam), axis=1)
    brute = [min(6.0, np.min(6 + 2 * (g**3 / lam[:, 0]) ** 0.5 - fit)) for g in gammas]
    loss, norm = jax.vmap(value_and_norm(SPREAD, 0.0, (1, 1)))(jnp.array(gammas))
    np.testing.assert_allclose(loss, brute, atol=1e-9)
    jumps = gammas[:-1][np.abs(np.diff(norm)) > 2.0]
    np.testing.assert_allclose(jumps, [0.26, 0.41], atol=1e-12)
    # At a jump two minima are as good as each other; a concave loss says that the better one is taken.
    wide = Moments(jnp.diag(jnp.array([1.0, 1e-4])), jnp.array([1.0, 0.02]), jnp.array(6.0))
    near = 0.048555196 * jnp.linspace(1 - 5e-5, 1 + 5e-5, 26)
    loss, norm = jax.vmap(value_and_norm(wide, 0.0, (1, 1)))(near)
    assert norm[0] - norm[-1] > 50
    assert np.all(np.diff(loss, 2) < 1e-12)


@pytest.mark.parametrize("widths", [(), (3,), (2, 2), (2, 3, 2)])
def test_order_of_the_transition(widths):
    at = jax.jit(value_and_norm(RANDOM, 0.3, widths))
    critical = critical_gamma(RANDOM, 0.3, widths)
    order = {0: 0, 1: 2}.get(len(widths), 1)
    assert transition_order(lambda gamma: float(at(gamma)[1]), float(critical)) == order
    if not widths:
        assert transition_order(lambda gamma: float(at(gamma)[1]), 0.7) == 0
        # Second differences of a straight line are rounding alone.
        assert transition_order(lambda gamma: 3.0 - gamma, 0.7) == 0


def test_metastable_minimum_ends_where_the_flow_leaves_it():
    widths, critical = (4, 4), critical_gamma(ROUND, 0.5, (4, 4))
    start = deep_minimum(ROUND, jnp.full(3, 0.9 * critical), 0.5, widths).weights
    sweep = partial(hysteresis_sweep, moments=ROUND, noise_variance=0.5, key=jax.random.key(0), horizon=300.0)
    up, down = critical * jnp.array([1.05, 1.15, 1.2]), critical * jnp.array([1.2, 0.8, 0.5])
    # The ratio of the two strengths is 1.1906.
    left = jnp.sum(sweep(start, path=up).params[0] ** 2, axis=(1, 2))
    assert left[1] > 0.3
    assert left[2] < 1e-4
    assert jnp.all(jnp.sum(sweep(start, path=down).params[0] ** 2, axis=(1, 2)) < 1e-4)


def test_sweep_of_one_hidden_layer_comes_back():
    path = jnp.array([0.5, 1.5, 0.5])[:, None] * jnp.array([0.5, 2.0])[None]
    swept = hysteresis_sweep(
        [jnp.full((2, 4), 0.3), jnp.full((1, 2), 0.3)], ROUND, 0.2, path, jax.random.key(1)
    )
    norms = jnp.sum(swept.params[1] ** 2, axis=(1, 2))
    assert bool(jnp.all(swept.ok))
    assert norms[1] < 1e-4
    expected = 2 * two_layer_minimum(ROUND, 1.0, 0.25, 0.2, 2).b ** 2
    np.testing.assert_allclose(norms[jnp.array([0, 2])], expected, rtol=1e-6)


def test_sweep_kicks_and_flows_at_every_step():
    # Without a signal all weights fall by the same share from where they have been kicked to.
    start, path, horizon = jnp.ones((40, 40)), jnp.array([0.5, 0.2]), 0.3
    dark = Moments(jnp.eye(40), jnp.zeros((40, 40)), 1.0)
    (ends,), _ = hysteresis_sweep([start], dark, 0.0, path, jax.random.key(0), kick=0.1, horizon=horizon)
    kicked = ends * jnp.exp(2 * (1 + path) * horizon)[:, None, None]
    first, second = kicked[0] - start, kicked[1] - ends[0]
    np.testing.assert_allclose(np.cov(first.ravel(), second.ravel()), 0.01 * np.eye(2), atol=1e-3)
    np.testing.assert_allclose([jnp.mean(first), jnp.mean(second)], 0, atol=0.01)


def test_imbalance_decays_whatever_the_noise():
    rng, ts = np.random.default_rng(0), np.array([0.0, 0.4, 1.0])
    params = [rng.normal(size=s) / 2 for s in ((3, 4), (2, 3), (1, 2))]
    path = stochastic_linear_flow(params, ROUND, 0.7, [0.15, 0.15, 0.15], ts)
    for part, W, after in zip(imbalance(path.ys), params, params[1:], strict=False):
        np.testing.assert_allclose(part[0], np.sum(after**2, axis=0) - np.sum(W**2, axis=1), rtol=1e-12)
        np.testing.assert_allclose(part, np.exp(-0.6 * ts)[:, None] * np.asarray(part[0]), rtol=1e-7)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_landscape_has_the_minimum(depth):
    gamma, b = 0.15, jnp.linspace(0, 1.5, 20_001)
    landscape = effective_landscape(b, RANDOM, gamma, 0.4, 2, depth)
    least = deep_minimum(RANDOM, jnp.full(depth + 1, gamma), 0.4, (2,) * depth)
    assert float(landscape[0]) == float(RANDOM.y2)
    assert float(jnp.min(landscape)) == pytest.approx(float(least.loss), abs=1e-7)
    amplitude = jnp.abs(least.weights[-1][0, 0]) / 2**0.5
    assert float(b[jnp.argmin(landscape)]) == pytest.approx(float(amplitude), abs=1e-3)


def least_of(depth, vector):
    """Scalars of the minimum as a function of all numbers at once."""
    A, c, y2, noise, gammas = vector
    if depth == 1:
        least = two_layer_minimum(Moments((A + A.T) / 2, c, y2), gammas[0], gammas[1], noise, 2)
        return jnp.stack([least.b, least.loss, least.W[0, 0]])
    least = deep_minimum(Moments((A + A.T) / 2, c, y2), gammas[: depth + 1], noise, (2, 3)[:depth])
    return jnp.stack([least.loss, least.norms[-1], least.weights[0][0, 0]])


@pytest.mark.parametrize(("depth", "mode"), [(0, jax.jacfwd), (1, jax.jacfwd), (2, jax.jacrev)])
def test_derivatives_agree_with_differences_on_both_sides_of_the_transition(depth, mode):
    # One of the two has equal eigenvalues, whose eigenvectors have no derivatives.
    cases = jax.tree.map(lambda *leaves: jnp.stack(leaves), ROUND, data(0, d=4))
    point = (ROUND.A, ROUND.c, ROUND.y2, jnp.array(0.3), jnp.full(3, 1.0))
    turn = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), point)

    def along(share, case, step):
        critical = critical_gamma(case, 0.3, (2, 3)[: max(depth, 1)])
        point = (*case, jnp.array(0.3), jnp.full(3, share * critical))
        return least_of(depth, jax.tree.map(lambda x, d: x + step * d, point, turn))

    every = jax.vmap(jax.vmap(along, (0, None, None)), (None, 0, None))
    shares, h = jnp.array([0.5, 0.8, 1.5, 2.0]), 1e-5
    differences = (every(shares, cases, h) - every(shares, cases, -h)) / (2 * h)
    slopes = jax.vmap(jax.vmap(mode(along, 2), (0, None, None)), (None, 0, None))(shares, cases, 0.0)
    assert np.any(slopes[:, 2:, -1]) == (depth == 0)
    np.testing.assert_allclose(slopes, differences, rtol=1e-6, atol=1e-7)


def test_second_derivatives_follow_the_root():
    def critical(c):
        return critical_gamma(Moments(jnp.diag(jnp.array([1.0, 0.3])), c, 1.0), 0.2, (2, 2))

    c, h, v = jnp.array([0.6, 0.5]), 1e-4, jnp.array([0.3, -1.0])
    second = (critical(c + h * v) - 2 * critical(c) + critical(c - h * v)) / h**2
    assert float(v @ jax.hessian(critical)(c) @ v) == pytest.approx(float(second), rel=1e-5)


@pytest.mark.parametrize("widths", [(2,), (2, 3)])
def test_no_regularization_is_a_limit(widths):
    zero = deep_minimum(RANDOM, jnp.zeros(len(widths) + 1), 0.4, widths)
    tiny = deep_minimum(RANDOM, jnp.full(len(widths) + 1, 1e-9), 0.4, widths)
    assert float(zero.loss) == pytest.approx(float(tiny.loss), abs=1e-7)
    for W, near in zip(zero.weights, tiny.weights, strict=True):
        np.testing.assert_allclose(W, near, atol=1e-6)
    some = deep_minimum(RANDOM, jnp.zeros(len(widths) + 1).at[0].set(0.3), 0.4, widths)
    assert float(some.loss) == float(zero.loss)
    assert all(np.all(np.isnan(W)) for W in some.weights)
    assert np.all(np.isnan(some.norms))
    slope = jax.grad(lambda g: deep_minimum(RANDOM, g, 0.4, widths).loss)(jnp.zeros(len(widths) + 1))
    assert np.all(np.isnan(slope))


@pytest.mark.parametrize("widths", [(), (1,), (3, 2)])
def test_singular_data_and_no_signal(widths):
    A, gammas = jnp.diag(jnp.array([1.0, 0.5, 0.0])), jnp.full(len(widths) + 1, 0.2)
    inner = deep_minimum(Moments(A[:2, :2], jnp.array([1.0, 0.4]), 2.0), gammas, 0.3, widths)
    outer = deep_minimum(Moments(A, jnp.array([1.0, 0.4, 0.0]), 2.0), gammas, 0.3, widths)
    assert float(inner.loss) == pytest.approx(float(outer.loss), abs=1e-14)
    np.testing.assert_allclose(outer.weights[0][:, 2], 0)
    for dark, strengths in itertools.product((A, jnp.zeros((3, 3))), (gammas, 0 * gammas)):
        nothing = deep_minimum(Moments(dark, jnp.zeros(3), 2.0), strengths, 0.3, widths)
        assert float(nothing.loss) == 2.0
        assert not np.any(nothing.norms)
    if widths:
        silent = Moments(A, jnp.zeros(3), 2.0)
        assert float(critical_gamma(silent, 0.3, widths)) == float(metastable_gamma(silent, 0.3, widths)) == 0


@pytest.mark.parametrize("widths", [(), (1,), (3, 2)])
def test_bad_lanes_are_nan_and_leave_others_alone(widths):
    def loss(A, c, gamma):
        gammas = jnp.full(len(widths) + 1, gamma)
        return deep_minimum(Moments(A, c, 1.0), gammas, 0.3, widths).loss

    eye, c = jnp.eye(2), jnp.array([0.6, 0.2])
    lanes = [(eye, c, 0.1), (eye, c, jnp.nan), (eye, c, -0.1), (-eye, c, 0.1), (jnp.diag(eye[0]), c, 0.1)]
    lanes.append((jnp.array([[1.0, 0.5], [0.0, 1.0]]), c, 0.1))
    A, c, gamma = map(jnp.stack, zip(*[map(jnp.asarray, lane) for lane in lanes], strict=True))
    losses, slopes = jax.vmap(jax.value_and_grad(loss, 2))(A, c, gamma)
    assert np.isfinite(losses).tolist() == [True] + 5 * [False]
    assert np.isfinite(slopes).tolist() == [True] + 5 * [False]
    with pytest.raises(ValueError, match="c must be in the range of A"):
        deep_minimum(Moments(jnp.diag(eye[0]), c[0], 1.0), jnp.full(len(widths) + 1, 0.1), 0.3, widths)


@pytest.mark.parametrize("single", [(3,), (2, 2)])
def test_32_bit_agrees(single):
    gammas = jnp.full(len(single) + 1, 0.2)
    low = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), (RANDOM, gammas, jnp.array(0.3)))
    got, exact = deep_minimum(low[0], low[1], low[2], single), deep_minimum(RANDOM, gammas, 0.3, single)
    assert got.loss.dtype == jnp.float32
    np.testing.assert_allclose(got.norms, exact.norms, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.9])
def test_several_outputs_are_the_best_of_64_starts(gamma):
    case = data(4, d=4, k=3)
    gu, gw = 2 * gamma, gamma / 2
    least = nuclear_minimum(case, gu, gw)
    found = lowest(network_loss, [(4, 4), (3, 4)], (case, 0.0, jnp.array([gw, gu])))
    assert found == pytest.approx(float(least.loss), abs=1e-9)
    R, norm = np.asarray(case.c.T - least.B @ case.A), np.linalg.norm(least.B, "nuc")
    assert np.linalg.norm(R, 2) <= gamma * (1 + 1e-12)
    assert np.sum(R * least.B) == pytest.approx(gamma * norm, abs=1e-12)
    objective = np.trace(least.B @ case.A @ least.B.T) - 2 * np.sum(least.B * case.c.T) + case.y2
    assert float(objective) + 2 * gamma * norm == pytest.approx(float(least.loss), abs=1e-12)


def test_one_output_of_several_is_the_network_without_noise():
    single = two_layer_minimum(RANDOM, 0.2, 0.3, 0.0, 1)
    nuclear = nuclear_minimum(RANDOM._replace(c=RANDOM.c[:, None]), 0.2, 0.3)
    assert float(nuclear.loss) == pytest.approx(float(single.loss), abs=1e-13)
    np.testing.assert_allclose(nuclear.B, single.U[None] @ single.W, rtol=1e-10)


def test_modes_go_exactly_and_derivatives_are_right():
    case = data(4, d=4, k=3)
    top = np.linalg.norm(case.c, 2)
    shares = jnp.array([0.01, 0.4, 0.9, 1.1, 0.0, jnp.nan])
    B = jax.vmap(lambda share: nuclear_minimum(case, share * top, share * top).B)(shares)
    ranks = [np.linalg.matrix_rank(part, tol=1e-13) for part in B[:4]]
    assert ranks[0] == 3
    assert 0 < ranks[2] < 3
    assert not np.any(B[3])
    assert np.all(np.isfinite(B[4]))
    assert np.all(np.isnan(B[5]))

    def loss_and_entry(A, c, gamma):
        least = nuclear_minimum(Moments((A + A.T) / 2, c, 9.0), gamma, gamma)
        return jnp.stack([least.loss, least.B[1, 2]])

    direction = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape), (case.A, case.c, jnp.array(0.2))
    )

    def along(share, step):
        A, c = (x + step * d for x, d in zip((case.A, case.c), direction[:2], strict=True))
        return loss_and_entry(A, c, share * top + step * direction[2])

    slopes = jax.vmap(jax.jacrev(along, 1), (0, None))(shares, 0.0)
    h = 1e-5
    differences = jax.vmap(lambda share: (along(share, h) - along(share, -h)) / (2 * h))(shares)
    np.testing.assert_allclose(slopes, differences, rtol=1e-5, atol=1e-7)
    # Close to zero the loss grows with the root of either strength.
    assert np.isnan(slopes).all(axis=-1).tolist() == 4 * [False] + 2 * [True]


def test_nuclear_minimum_without_regularization_is_least_squares():
    case = data(4, d=4, k=3)
    free = nuclear_minimum(case, 0.0, 0.0)
    np.testing.assert_allclose(free.B, np.linalg.solve(case.A, case.c).T, rtol=1e-9)
    assert float(nuclear_minimum(case, 0.0, 0.3).loss) == float(free.loss)


def test_ridge_keeps_its_rank():
    case = data(4, d=4, k=3)
    for gamma in (1e-3, 1.0, 1e3):
        ridge = ridge_minimum(case, gamma)
        assert np.linalg.matrix_rank(ridge.W, tol=1e-6 * np.linalg.norm(ridge.W, 2)) == 3
        np.testing.assert_allclose(ridge.W, np.linalg.solve(case.A + gamma * np.eye(4), case.c).T, rtol=1e-10)


@pytest.mark.parametrize("widths", [(3,), (2, 3)])
@pytest.mark.parametrize("unit", [1e-150, 1e-8, 1e8])
def test_units_of_the_data_do_not_matter(widths, unit):
    # x in other units: A in their square, c in them, and weights of the first layer in their inverse.
    A, c, y2 = RANDOM
    other = Moments(A, c * unit, y2)
    ratio = critical_gamma(other, 0.3, widths) / critical_gamma(RANDOM, 0.3, widths)
    depth = len(widths)
    assert float(jnp.log(ratio)) == pytest.approx(2 * depth / (depth + 1) * np.log(unit), rel=1e-12)
    share = 0.5 * critical_gamma(RANDOM, 0.3, widths)
    before = deep_minimum(RANDOM, jnp.full(depth + 1, share), 0.3, widths)
    after = deep_minimum(other, jnp.full(depth + 1, share * ratio), 0.3, widths)
    # gamma |W|^2 is a loss, in the unit of c^2 / A.
    np.testing.assert_allclose(after.norms**2 * ratio, before.norms**2 * unit**2, rtol=1e-9)


def test_the_order_parameter_is_exactly_zero_at_the_transition():
    rng = np.random.default_rng(0)
    c, gamma_u = rng.normal(size=(1000, 3)), rng.uniform(0.1, 2, size=1000)
    gamma_w = np.sum(c**2, axis=1) / gamma_u

    @jax.jit
    @jax.vmap
    def b(c, u, w):
        return two_layer_minimum(Moments(jnp.eye(3), c, 9.0), u, w, 0.3, 2).b

    assert not np.any(b(c, gamma_u, gamma_w))
    assert np.all(b(c, gamma_u, gamma_w * (1 - 1e-12)) > 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_loss_is_one_that_the_weights_reach_on_nearly_singular_data(dtype):
    tiny = 0.5 * float(jnp.finfo(dtype).eps)
    part = dtype(tiny**0.5 / 4)
    case = Moments(jnp.diag(jnp.array([1, tiny], dtype)), jnp.array([1, part], dtype), jnp.array(1.1, dtype))
    least = two_layer_minimum(case, 1e-8, 1e-8, 0.0, 2)
    reached = stochastic_linear_loss([least.W, least.U[None]], case, 0.0, jnp.full(2, 1e-8, dtype))
    assert float(least.loss) == pytest.approx(float(reached), abs=1e-6)
    ridge = ridge_minimum(case, 1e-8)
    assert float(ridge.loss) == pytest.approx(0.1, abs=1e-3)


def test_order_is_told_at_steps_of_any_size():
    # A direction of small variance has most of the signal: the kink shows at steps of 1e-5 alone.
    case = Moments(jnp.diag(jnp.array([1e-4, 10.0])), jnp.array([0.01, 0.001]), 2.0)
    at = jax.jit(lambda gamma: 2 * two_layer_minimum(case, gamma, gamma, 0.0, 1).b ** 2)
    assert transition_order(lambda gamma: float(at(gamma)), critical_gamma(case, 0.0, (1,))) == 2
    low = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), ROUND)
    norm = jax.jit(lambda gamma: jnp.sum(ridge_minimum(low, gamma).W ** 2))
    for gamma_c in (1e-3, 0.03, 1.0):
        assert transition_order(lambda gamma: float(norm(jnp.float32(gamma))), gamma_c) == 0


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_the_map_of_several_outputs_is_certified_in_any_units(unit):
    A, C, strength = jnp.array([[1, 0.9], [0.9, 1]]), unit * jnp.array([[1, 0.3], [0.2, 0.5]]), 0.3 * unit
    B = nuclear_minimum(Moments(A, C, 9.0), strength, strength).B
    assert np.linalg.norm(C.T - B @ A, 2) / strength == pytest.approx(1, abs=1e-9)
