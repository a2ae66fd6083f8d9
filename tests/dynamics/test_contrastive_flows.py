"""Networks that ascend the contrastive energy: principal components, patterns, and collapse of dimensions."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from dynamics.contrastive import (
    aligned_flow,
    balance,
    contrastive_covariance,
    contrastive_energy,
    deep_linear_energy,
    deep_linear_flow,
    deep_linear_maximum,
    encoder_flow,
    gated_covariance,
    homogeneous_activation,
    pattern_coverage,
    power_flow,
)
from tests.helpers import count_compilations

SPECTRUM = np.array([1.0, 0.8, 0.3, -0.2])


def rotated(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    X = Q @ np.diag(values) @ Q.T
    return (X + X.T) / 2, Q


def random_weights(seed, sizes):
    random = np.random.default_rng(seed)
    weights = [random.normal(size=(m, n)) for n, m in itertools.pairwise(sizes)]
    return [W / np.linalg.norm(W) for W in weights]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deep_linear_networks_end_at_the_principal_component(depth):
    X, Q = rotated(SPECTRUM)
    path = deep_linear_flow(random_weights(depth, [4, *[5] * depth]), X, [0.0, 10.0, 400.0])
    end = [W[-1] for W in path.ys]
    best = deep_linear_maximum(X)
    assert best.energy == pytest.approx(1, rel=1e-12)
    assert abs(best.direction @ Q[:, 0]) == pytest.approx(1, rel=1e-12)
    assert deep_linear_energy(end, X) == pytest.approx(1, rel=1e-9)
    for W in end:
        values = np.linalg.svd(W, compute_uv=False)
        assert values[0] == pytest.approx(1, rel=1e-9)
        assert values[1] < 1e-6
    assert abs(np.linalg.svd(end[0])[2][0] @ Q[:, 0]) == pytest.approx(1, rel=1e-9)
    for W in path.ys:
        np.testing.assert_allclose(np.linalg.norm(W, axis=(1, 2)), 1, rtol=1e-7)


def test_negative_energies_end_at_a_vanishing_product():
    X = rotated(-np.abs(SPECTRUM))[0]
    end = [W[-1] for W in deep_linear_flow(random_weights(3, [4, 5, 5]), X, [0.0, 3000.0]).ys]
    assert -1e-4 < deep_linear_energy(end, X) <= 0
    np.testing.assert_allclose([np.linalg.norm(W) for W in end], 1, rtol=1e-6)
    assert deep_linear_maximum(X).energy == 0


@pytest.mark.parametrize("hidden", [(), (1,), (1, 1), (2,), (1, 3), (3, 1)])
def test_the_maximum_of_negative_energies_depends_on_hidden_widths(hidden):
    X, Q = rotated(np.array([-0.2, -0.5, -1.0]))
    best = deep_linear_maximum(X, hidden)
    vanishing = max(hidden, default=1) > 1
    assert best.energy == pytest.approx(0 if vanishing else -0.2, rel=1e-12)
    # None of many does better, and one reaches it: along v_0, or with two matrices whose product is zero.
    sizes = [3, *hidden, 4]
    energies = [float(deep_linear_energy(random_weights(seed, sizes), X)) for seed in range(50)]
    assert max(energies) <= best.energy + 1e-12
    reached = [np.zeros((m, n)) for n, m in itertools.pairwise(sizes)]
    for W in reached:
        W[0, 0] = 1
    reached[0][0] = Q[:, 0]
    if vanishing:
        wide = hidden.index(max(hidden))
        reached[wide + 1] = np.roll(reached[wide + 1], 1, axis=1)
    assert deep_linear_energy(reached, X) == pytest.approx(float(best.energy), abs=1e-15)
    positive = deep_linear_maximum(-X, hidden)
    assert positive.energy == pytest.approx(1, rel=1e-12)
    assert abs(positive.direction @ Q[:, 2]) == pytest.approx(1, rel=1e-12)


def test_a_repeated_largest_eigenvalue_leaves_the_direction_open():
    X, Q = rotated(np.array([1.0, 1.0, 0.3, -0.2]))
    end = [W[-1] for W in deep_linear_flow(random_weights(4, [4, 5, 5]), X, [0.0, 400.0]).ys]
    assert deep_linear_energy(end, X) == pytest.approx(1, rel=1e-9)
    top = np.linalg.svd(end[0])[2][0]
    assert np.linalg.norm(top @ Q[:, :2]) == pytest.approx(1, rel=1e-9)


def views(seed, n=7, d=3):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d))
    return x, x + 0.3 * random.normal(size=(n, d)), random.uniform(size=(n, n))


KINDS = {"linear": {}, "relu": {}, "leaky_relu": {"slope": 0.3}, "monomial": {"power": 3}}


@pytest.mark.parametrize("kind", KINDS)
def test_gated_covariances_give_energies_of_nodes_and_their_gradients(kind):
    x, x_aug, alpha = views(0)
    h, w = homogeneous_activation(kind, **KINDS[kind]), np.array([0.6, -0.3, 0.5])
    p = KINDS[kind].get("power", 1)

    def energy(w):
        return contrastive_energy(alpha, h(x @ w)[:, None], h(x_aug @ w)[:, None])

    A = gated_covariance(w, x, x_aug, alpha, h)
    assert energy(w) == pytest.approx(float(w @ A @ w) / p**2, rel=1e-12)
    np.testing.assert_allclose(jax.grad(energy)(w), 2 / p * A @ w, rtol=1e-12)
    if kind == "linear":
        np.testing.assert_allclose(A, contrastive_covariance(alpha, x, x_aug), rtol=1e-12)


@pytest.mark.parametrize("number", [-3, -3.0, np.float32(-3), np.array([-3.0, 2.0])])
def test_activations_take_plain_numbers(number):
    negative = {"linear": -3, "relu": 0, "leaky_relu": -0.9, "monomial": -9}
    for kind, hyper in KINDS.items():
        found = jnp.atleast_1d(homogeneous_activation(kind, **hyper)(number))
        assert found[0] == pytest.approx(negative[kind], rel=1e-6)


def tokens(count=4, d=5):
    """Orthonormal patterns, one per sample, whose views agree."""
    Q = np.linalg.qr(np.random.default_rng(5).normal(size=(d, d)))[0]
    x = np.repeat(Q[:count], [4, 3, 2, 2], axis=0)
    return Q[:count], x, (1 - np.eye(len(x))) / len(x)


def test_relu_nodes_end_at_patterns_and_linear_ones_at_one_direction():
    patterns, x, alpha = tokens()
    w0 = np.random.default_rng(6).normal(size=(24, 5))
    w0 /= np.linalg.norm(w0, axis=1, keepdims=True)
    linear = power_flow(w0, x, x, alpha, homogeneous_activation("linear"), [0.0, 100.0])
    assert bool(linear.ok)
    ends = np.asarray(linear.ys[-1])
    assert np.min(np.abs(ends @ ends[0])) > 0.999
    relu = power_flow(w0, x, x, alpha, jax.nn.relu, np.linspace(0, 100, 5))
    ends = np.asarray(relu.ys[-1])
    overlap = ends @ patterns.T
    moved = np.any(w0 @ patterns.T > 0, axis=1)
    assert np.all(np.max(overlap[moved], axis=1) > 0.999)
    assert len(set(np.argmax(overlap[moved], axis=1))) == 4
    np.testing.assert_allclose(ends[~moved], w0[~moved], rtol=1e-12)


def test_energies_rise_but_for_steps_across_gates():
    _, x, alpha = tokens()
    w0 = np.random.default_rng(6).normal(size=(24, 5))
    w0 /= np.linalg.norm(w0, axis=1, keepdims=True)

    @jax.jit
    @jax.vmap
    @jax.vmap
    def energy(w):
        out = jax.nn.relu(x @ w)[:, None]
        return contrastive_energy(alpha, out, out)

    # How far steps across gates go too far depends on rounding, by a factor of some tens, so that bounds are
    # shares of the largest energy.
    largest = np.linalg.eigvalsh(contrastive_covariance(alpha, x, x))[-1]
    for steps, share in ((4000, 2e-3), (32_000, 2e-4)):
        path = power_flow(w0, x, x, alpha, jax.nn.relu, np.linspace(0, 100, 5), steps=steps)
        assert -np.min(np.diff(energy(path.ys), axis=0)) < share * largest


def test_steps_are_of_order_four_and_too_long_ones_are_told():
    x, x_aug, alpha = views(1)
    w0, h = np.array([0.6, 0.0, 0.8]), homogeneous_activation("linear")
    ends = [power_flow(w0, x, x_aug, alpha, h, [0.0, 0.2], steps=n).ys[-1] for n in (25, 50, 100, 3200)]
    errors = [np.linalg.norm(end - ends[-1]) for end in ends[:-1]]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.4)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(4, abs=0.4)
    assert not bool(power_flow(w0, x, x_aug, alpha, h, [0.0, 0.2], steps=2).ok)
    assert power_flow(w0, x, x_aug, alpha, h, [0.0, 0.1, 0.2]).ys.shape == (3, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_start_along_the_field_that_is_written(kind):
    x, x_aug, alpha = views(3)
    alpha = alpha / 1000  # a field of order one, along which a step of 1e-6 is straight
    x_aug = x_aug + np.random.default_rng(4).normal(size=x.shape)  # gates of both views differ
    h, w = homogeneous_activation(kind, **KINDS[kind]), np.array([0.6, 0.0, 0.8])
    assert np.any((x @ w > 0) != (x_aug @ w > 0))
    ascent = gated_covariance(w, x, x_aug, alpha, h) @ w
    path = power_flow(w, x, x_aug, alpha, h, [0.0, 1e-6], steps=1)
    np.testing.assert_allclose((path.ys[1] - w) / 1e-6, ascent - (w @ ascent) * w, rtol=1e-4, atol=1e-5)


def test_nodes_keep_unit_norm_and_the_fastest_tells_whether_steps_are_too_long():
    _, x, alpha = tokens()
    slow = -np.sum(tokens()[0], axis=0) / 2  # all of its gates are closed
    nodes = np.stack([slow, np.sqrt([0.4, 0.3, 0.2, 0.1]) @ tokens()[0]])
    short, long = (power_flow(nodes, x, x, alpha, jax.nn.relu, [0.0, 1.0], steps=n) for n in (40, 2))
    assert bool(short.ok)
    assert not bool(long.ok)
    assert bool(power_flow(slow, x, x, alpha, jax.nn.relu, [0.0, 1.0], steps=2).ok)
    for path in (short, long):
        np.testing.assert_allclose(np.linalg.norm(path.ys, axis=-1), 1, rtol=1e-14)


def test_another_call_with_an_activation_by_name_compiles_nothing():
    x, x_aug, alpha = views(2)

    def flow(kind, scale):
        h = homogeneous_activation(kind, **KINDS[kind])
        return power_flow([1.0, 0.0, 0.0], scale * x, x_aug, alpha, h, [0.0, 0.1], steps=40)

    for kind in KINDS:
        flow(kind, 0.2)
        with count_compilations() as compiled:
            flow(kind, 0.3)
        assert not compiled


def test_coverage_is_that_of_independent_draws():
    shares = np.array([0.5, 0.3, 0.2])
    draws = np.random.default_rng(0).choice(3, size=(100_000, 4), p=shares)
    mean = np.mean([len(set(row)) for row in draws])
    assert pattern_coverage(shares, 4) == pytest.approx(mean, abs=0.01)


def test_one_layer_is_an_exponential_and_two_conserve_their_balance():
    X = rotated(SPECTRUM)[0]
    W = np.random.default_rng(1).normal(size=(3, 4))
    path = encoder_flow([W], X, [0.0, 1.5])
    np.testing.assert_allclose(path.ys[0][-1], W @ expm(1.5 * X), rtol=1e-7)
    pair = [0.4 * part for part in random_weights(2, [4, 3, 5])]
    path = encoder_flow(pair, X, [0.0, 2.0, 8.0])
    (kept,) = balance(path.ys)
    np.testing.assert_allclose(kept, np.broadcast_to(kept[0], kept.shape), atol=1e-8)
    assert np.linalg.norm(path.ys[0][-1]) > 2 * np.linalg.norm(pair[0])


def test_aligned_layers_stay_aligned():
    X, Q = rotated(SPECTRUM)
    values = np.array([[0.3, 0.2, 0.5], [0.4, 0.1, 0.2]])
    random = np.random.default_rng(3)
    U1, U2 = (np.linalg.qr(random.normal(size=(n, 3)))[0] for n in (3, 6))
    start = [U1 @ np.diag(values[0]) @ Q[:, :3].T, U2 @ np.diag(values[1]) @ U1.T]
    ts = [0.0, 1.0, 3.0]
    found = aligned_flow(values, SPECTRUM[:3], ts, solver=diffrax.Tsit5())
    path = encoder_flow(start, X, ts)
    for t in range(3):
        first = U1 @ np.diag(found.ys[t, 0]) @ Q[:, :3].T
        second = U2 @ np.diag(found.ys[t, 1]) @ U1.T
        np.testing.assert_allclose(path.ys[0][t], first, atol=1e-7)
        np.testing.assert_allclose(path.ys[1][t], second, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X: deep_linear_flow([np.eye(2)], X, [0.0, 1.0]), r"weights\[0\] must be of unit Frobenius"),
        (lambda X: deep_linear_flow([], X, [0.0, 1.0]), "weights must be a list of matrices"),
        (lambda X: deep_linear_energy([np.ones((2, 3))], X), r"weights\[0\] must have shape \(m, 2\)"),
        (lambda X: deep_linear_maximum([[0.0, 1.0], [2.0, 0.0]]), "X must be symmetric"),
        (lambda X: power_flow([1.0, 1.0], X, X, X, jax.nn.relu, [0.0, 1.0]), "w0 must be of unit norm"),
        (
            lambda X: power_flow([1.0], X, X, X, jax.nn.relu, [0.0, 1.0]),
            r"w0 must have shape \(2,\) or \(K, 2\)",
        ),
        (lambda X: homogeneous_activation("gelu"), "kind must be one of"),
        (lambda X: homogeneous_activation("relu", power=2), "power is no hyperparameter of relu"),
        (lambda X: homogeneous_activation("leaky_relu", 3), "power is no hyperparameter of leaky_relu"),
        (lambda X: homogeneous_activation("monomial", slope=0.1), "slope is no hyperparameter of monomial"),
        (lambda X: homogeneous_activation("monomial", power=0), "power must be an integer >= 1"),
        (lambda X: homogeneous_activation("leaky_relu", slope=-0.1), "slope must be a finite number >= 0"),
        (lambda X: pattern_coverage([1.5], 2), r"shares must be in \[0, 1\]"),
        (lambda X: pattern_coverage([-0.5], 2), r"shares must be in \[0, 1\]"),
        (lambda X: aligned_flow([[1.0]], [1.0], [0.0, 1.0]), r"shapes \(2, r\) and \(r,\)"),
        (lambda X: balance([X, np.ones((2, 3))]), "weights must be matrices that follow each other"),
        (lambda X: balance([X, X[None]]), "with the same leading axes"),
        (lambda X: balance([np.stack([X, X]), np.stack([X, X, X])]), "with the same leading axes"),
        (lambda X: balance([]), "weights must be a list of matrices"),
        (lambda X: deep_linear_maximum(X, [2, 0]), r"hidden\[1\] must be a positive integer"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.eye(2))
