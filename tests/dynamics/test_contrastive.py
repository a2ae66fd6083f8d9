"""Contrastive learning: energies, importances and min players against double sums and brute force."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from dynamics.contrastive import contrastive_covariance, contrastive_energy, min_player, pairwise_importance


def views(seed, n=6, o=3, dtype: Any = np.float64):
    random = np.random.default_rng(seed)
    f = random.normal(size=(n, o))
    return f.astype(dtype), (f + 0.4 * random.normal(size=(n, o))).astype(dtype)


def test_energy_and_covariance_are_their_double_sums():
    f, f_aug = views(1)
    y, y_aug = views(2, o=2)
    alpha = np.random.default_rng(3).uniform(size=(6, 6))
    wanted, energy = np.zeros((3, 2)), 0.0
    for i in range(6):
        for j in range(6):
            if i != j:
                wanted += alpha[i, j] * np.outer(f[i] - f[j], y[i] - y[j])
                wanted -= alpha[i, j] * np.outer(f[i] - f_aug[i], y[i] - y_aug[i])
                energy += alpha[i, j] * (np.sum((f[i] - f[j]) ** 2) - np.sum((f[i] - f_aug[i]) ** 2))
    shift = 1e6  # which all samples share
    found = contrastive_covariance(alpha, f + shift, f_aug + shift, y, y_aug)
    np.testing.assert_allclose(found, wanted, rtol=1e-8)
    assert contrastive_energy(alpha, f, f_aug) == pytest.approx(energy, rel=1e-12)
    assert contrastive_energy(alpha, f + shift, f_aug + shift) == pytest.approx(energy, rel=1e-8)
    assert jnp.trace(contrastive_covariance(alpha, f, f_aug)) == pytest.approx(energy, rel=1e-12)
    with pytest.raises(ValueError, match="y and y_aug must be given together"):
        contrastive_covariance(alpha, f, f_aug, y)


def by_constrained_search(cost, row_sum):
    """The least of a sum of costs of numbers >= 0 with a given sum, by SciPy, from exact gradients.

    Args:
        cost: of each of the three numbers, as a function of all.
        row_sum: their sum.
    """
    search = jax.jit(jax.value_and_grad(lambda a: jnp.sum(cost(a))))
    found = minimize(
        search,
        np.full(3, row_sum / 3),
        jac=True,
        method="SLSQP",
        bounds=[(1e-12, row_sum)] * 3,
        constraints={"type": "eq", "fun": lambda a: np.sum(a) - row_sum, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return found.x, found.fun


def off(alpha):
    return alpha[~np.eye(len(alpha), dtype=bool)]


REGULARIZERS = {
    "entropy": ({}, lambda a, t: -2 * t * a * jnp.log(a)),
    "inverse": ({"gamma": 3.0}, lambda a, t: 2 * t * a**-2 / -2),
    "square": ({}, lambda a, t: -t * a**2 / 2),
}


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_min_players_are_the_minima(name, temperature):
    f, f_aug = views(4, n=4)
    hyper, regularizer = REGULARIZERS[name]
    sums = np.array([0.3, 1.0, 1.7, 0.9]) if name == "entropy" else np.ones(4)
    alpha = np.asarray(min_player(name, f, f_aug, temperature=temperature, row_sums=sums, **hyper))
    np.testing.assert_allclose(alpha.sum(axis=1), sums, rtol=1e-12)
    assert np.all(np.diag(alpha) == 0)
    for i, row in enumerate(alpha):
        others = np.arange(4) != i
        squares = np.sum((f[i] - f[others]) ** 2, axis=1)

        def cost(a, squares=squares):
            return a * squares - regularizer(a, temperature)

        wanted, least = by_constrained_search(cost, sums[i])
        np.testing.assert_allclose(row[others], wanted, atol=2e-5)
        reached = float(jnp.sum(cost(row[others])))
        assert reached <= least + 1e-9 * abs(least)


def test_the_min_player_of_entropy_is_the_importance_of_losses_with_exponentials():
    f, f_aug = views(5)
    exponential = {
        "infonce": {"temperature": 0.3, "epsilon": 0.7},
        "mine": {},
        "soft_triplet": {"temperature": 0.3, "epsilon": 0.2},
        "n_plus_1_tuplet": {},
        "lifted": {"epsilon": 0.4},
    }
    for name, hyper in exponential.items():
        alpha = pairwise_importance(name, f, f_aug, **hyper)
        temperature = hyper.get("temperature", 1.0)
        found = min_player("entropy", f, f_aug, temperature=temperature, row_sums=alpha.sum(axis=1))
        np.testing.assert_allclose(found, alpha, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_importance_is_the_formula_of_raw_differences(temperature):
    f, f_aug = views(9, n=8)
    near = np.sum((f[:, None] - f[None]) ** 2, axis=-1) / 2
    own = np.sum((f - f_aug) ** 2, axis=-1) / 2
    gibbs = np.exp(-near / temperature) * (1 - np.eye(8))
    softmax = gibbs / gibbs.sum(axis=1, keepdims=True)
    tight: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-300}
    without = pairwise_importance("infonce", f, f_aug, temperature=temperature, epsilon=0.0)
    np.testing.assert_allclose(without, softmax, **tight)
    np.testing.assert_allclose(min_player("entropy", f, f_aug, temperature=temperature), softmax, **tight)
    for epsilon in (0.0, 0.7):
        alpha = pairwise_importance("infonce", f, f_aug, temperature=temperature, epsilon=epsilon)
        xi = np.sum(np.exp((own[:, None] - near) / temperature) * (1 - np.eye(8)), axis=1)
        np.testing.assert_allclose(alpha.sum(axis=1), xi / (epsilon + xi), **tight)
        for i in range(8):
            j, k = np.array([(j, k) for j in range(8) for k in range(8) if i not in (j, k)]).T
            ratio = np.exp((near[i, k] - near[i, j]) / temperature)
            np.testing.assert_allclose(alpha[i, j] / alpha[i, k], ratio, **tight)
            rest = np.delete(np.arange(8), i)
            nearer = rest[np.argsort(near[i, rest])]
            assert np.all(np.diff(alpha[i, nearer]) < 0)  # near pairs count more


@pytest.mark.parametrize("name", ["triplet", "ji", "coria", "lifted"])
def test_traced_features_that_are_no_numbers_give_no_importance(name):
    f, f_aug = views(1, n=3)
    alpha = jax.jit(lambda f, f_aug: pairwise_importance(name, f, f_aug))
    np.testing.assert_allclose(alpha(f, f_aug), pairwise_importance(name, f, f_aug), rtol=1e-12)
    for bad in (np.nan, np.inf):
        spoilt = f_aug.copy()
        spoilt[2, 1] = bad
        assert np.all(np.isnan(alpha(f, spoilt)))


@pytest.mark.parametrize("regularizer", ["entropy", "inverse", "square", "direct"])
def test_extreme_and_equal_distances(regularizer):
    f, f_aug = views(6, n=5)
    for scale, temperature in ((1e3, 1e-2), (1.0, 1e4), (0.0, 1.0)):
        alpha = min_player(regularizer, scale * f, f_aug, temperature=temperature)
        np.testing.assert_allclose(alpha.sum(axis=1), np.ones(5), rtol=1e-9)
        assert np.all(alpha >= 0)
    np.testing.assert_allclose(off(np.asarray(alpha)), 0.25, rtol=1e-9)  # all features are equal


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gamma", [1.01, 2.0, 50.0])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.5, 1e6])
def test_rows_of_the_inverse_regularizer_sum_to_one_in_either_precision(dtype, gamma, temperature):
    f, _ = views(3, n=64, dtype=dtype)
    f[32:] = f[:32]  # duplicates are at no distance

    def player(f):
        return min_player("inverse", f, f, temperature=temperature, gamma=gamma)

    alpha = player(f)
    assert alpha.dtype == dtype
    np.testing.assert_allclose(alpha.sum(axis=1), 1, atol=2e-5 if dtype == "float32" else 1e-12)
    assert np.all(np.isfinite(jax.grad(lambda f: jnp.sum(player(f) ** 2))(f)))


def test_the_inverse_min_player_is_differentiated_through_its_root():
    f, _ = views(3, n=5)
    direction = views(4, n=5)[0]

    def value(f):
        return jnp.sum(min_player("inverse", f, f) ** 3)

    near = [value(f + step * direction) for step in (1e-5, -1e-5)]
    slope = float(jnp.sum(jax.grad(value)(f) * direction))
    assert slope == pytest.approx(float(near[0] - near[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("regularizer", "defaults"),
    [
        ("entropy", {"temperature": 0.5, "row_sums": 1.0}),
        ("inverse", {"temperature": 0.5, "gamma": 2.0}),
        ("square", {"temperature": 0.5}),
        ("direct", {"temperature": 0.5, "power": 4.0}),
    ],
)
def test_min_players_have_the_defaults_that_are_written(regularizer, defaults):
    f, f_aug = (0.3 * view for view in views(2))
    alpha = min_player(regularizer, f, f_aug)
    np.testing.assert_array_equal(alpha, min_player(regularizer, f, f_aug, **defaults))


@pytest.mark.parametrize("regularizer", ["entropy", "inverse", "square", "direct"])
def test_min_players_are_differentiated_in_the_temperature_and_in_features(regularizer):
    f, f_aug = (0.5 * view for view in views(4, n=5))
    direction = views(5, n=5)[0]

    def value(temperature, step):
        return jnp.sum(min_player(regularizer, f + step * direction, f_aug, temperature=temperature) ** 3)

    slopes = jax.jit(jax.grad(value, (0, 1)))(0.7, 0.0)
    h = 1e-5
    assert slopes[0] == pytest.approx(float(value(0.7 + h, 0.0) - value(0.7 - h, 0.0)) / (2 * h), rel=1e-6)
    assert slopes[1] == pytest.approx(float(value(0.7, h) - value(0.7, -h)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("regularizer", ["inverse", "square", "direct"])
def test_row_sums_that_are_one_are_taken_in_any_form(regularizer):
    f, f_aug = views(2, n=3)
    wanted = min_player(regularizer, f, f_aug)
    for ones in (np.float32(1), jnp.ones(()), np.ones(3), [1, 1, 1]):
        np.testing.assert_array_equal(min_player(regularizer, f, f_aug, row_sums=ones), wanted)
    player = jax.jit(lambda sums: min_player(regularizer, f, f_aug, row_sums=sums))
    np.testing.assert_allclose(player(np.ones(3)), wanted, rtol=1e-12)
    assert np.all(np.isnan(player(np.array([1.0, 1.0, 0.9]))[2]))
    with pytest.raises(ValueError, match=f"row_sums must be 1 for {regularizer}"):
        min_player(regularizer, f, f_aug, row_sums=[1.0, 1.0, 0.9])


def test_weights_that_are_set_directly_fall_with_a_power_of_the_distance():
    f = np.array([[0.0], [1.0], [2.0]])
    first = min_player("direct", f, f, temperature=0.7, power=3.0)[0]
    distances = np.array([0.5, 2.0]) ** 0.5
    wanted = np.exp(-(distances**3) / 0.7)
    np.testing.assert_allclose(first, [0, *(wanted / wanted.sum())], rtol=1e-12)


def test_sparse_weights_of_the_square_regularizer_are_counted():
    # Half squared distances 0.5, 4.5 and 12.5 of the first: levels 1 + t, dry from 2 (4.5 - 0.5) = 8 on.
    f = np.array([[0.0], [1.0], [3.0], [5.0]])
    alpha = min_player("square", f, f, temperature=10.0)
    np.testing.assert_allclose(alpha[0], [0, 0.9, 0.1, 0], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: pairwise_importance("coria", f, f, epsilon=1.0), "which takes scale"),
        (lambda f: min_player("inverse", f, f, gamma=1.0), "gamma must be above 1"),
        (lambda f: min_player("square", f, f, row_sums=2.0), "row_sums must be 1 for square"),
        (lambda f: min_player("entropy", f, f, row_sums=[1.0, 2.0]), r"a number or of shape \(3,\)"),
        (lambda f: min_player("entropy", f, f, temperature=1e-320), "temperature must be at least 2.23e-308"),
        (lambda f: pairwise_importance("coria", f, f, scale=1e-320), "scale must be at least 2.23e-308"),
        (
            lambda f: min_player("square", f.astype("float32"), f, temperature=1e-40),
            "temperature must be at least 1.18e-38, the smallest normal number of float32",
        ),
        (lambda f: min_player("direct", f, f, gamma=2.0), "gamma is no hyperparameter of direct"),
        (lambda f: contrastive_energy(np.ones((2, 3)), f, f), r"alpha must have shape \(3, 3\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(6.0).reshape(3, 2))
