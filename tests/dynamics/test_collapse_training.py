"""What training does at the origin, and the unconstrained-features model, against sums and networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from dynamics.collapse import features_minimum, sampled_sgd_lyapunov, sgd_collapse_windows, sgd_lyapunov

COIN = [2.0, -2.0], [0.6, 0.4]


@given(
    values=st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    batch_size=st.integers(1, 4),
    rate=st.floats(0, 1),
)
def test_the_exponent_is_the_mean_over_all_batches(values, batch_size, rate):
    p = np.arange(1, len(values) + 1) / sum(range(1, len(values) + 1))
    sign = -1 if p @ values < 0 else 1
    expected = 0.0
    for batch in itertools.product(range(len(values)), repeat=batch_size):
        factor = abs(1 + 2 * sign * rate * np.mean([values[i] for i in batch]))
        if factor < 1e-6:  # close to a pole the sums differ by rounding over that
            return
        expected += np.prod(p[list(batch)]) * np.log(factor)
    found = float(sgd_lyapunov(rate, values, p, batch_size))
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_exponent_of_a_coin_in_closed_form():
    for rate in 0.05, 0.1, 0.4:
        expected = 0.6 * np.log(1 + 4 * rate) + 0.4 * np.log(abs(1 - 4 * rate))
        assert float(sgd_lyapunov(rate, *COIN, 1)) == pytest.approx(expected, abs=1e-15)
        # The direction that grows is the other one where the mean is negative.
        assert float(sgd_lyapunov(rate, [-2.0, 2.0], COIN[1], 1)) == pytest.approx(expected, abs=1e-15)
    assert float(sgd_lyapunov(0.25, *COIN, 1)) == -np.inf
    assert float(sgd_lyapunov(0.25, COIN[0], [1.0, 0.0], 1)) == pytest.approx(np.log(2), abs=1e-15)
    derivative = jax.grad(lambda rate: sgd_lyapunov(rate, *COIN, 2))(0.1)
    ends = [float(sgd_lyapunov(0.1 + h, *COIN, 2)) for h in (-1e-6, 1e-6)]
    assert float(derivative) == pytest.approx(np.diff(ends)[0] / 2e-6, rel=1e-7)


def test_the_exponent_is_that_of_the_networks_own_steps():
    def loss(w, z):  # x = 1
        return jnp.mean((w[0] * w[1] - z) ** 2)

    z = jnp.asarray(np.random.default_rng(0).choice(COIN[0], p=COIN[1], size=(100_000, 2)))
    growth = jax.vmap(lambda z: 1e-7 * jnp.ones(2) - 0.1 * jax.grad(loss)(1e-7 * jnp.ones(2), z))(z)
    logs = np.log(np.abs(np.asarray(growth).sum(axis=1) / 2e-7))
    error = logs.std() / len(logs) ** 0.5
    assert abs(logs.mean() - float(sgd_lyapunov(0.1, *COIN, 2))) < 4 * error
    assert error < 1e-3


def test_sampled_exponents_agree_with_the_sum():
    law = [2.0, -1.0, 0.3], [0.5, 0.3, 0.2]
    found = sampled_sgd_lyapunov(0.4, *law, 5, jax.random.key(0), samples=200_000)
    assert abs(found.mean - sgd_lyapunov(0.4, *law, 5)) < 4 * found.error
    assert 0 < found.error < 0.003


@pytest.mark.parametrize(
    ("batch_size", "windows"),
    [
        (1, [[0.09735, 0.32220]]),
        (2, [[0.17373, 0.29355]]),
        (4, [[0.24797, 0.25199], [0.44824, 0.53609]]),
    ],
)
def test_windows_end_where_an_exponent_is_zero(batch_size, windows):
    found = sgd_collapse_windows(*COIN, batch_size, largest=0.9)
    assert found == pytest.approx(np.array(windows), abs=1e-5)
    mirrored = sgd_collapse_windows(COIN[0][::-1], COIN[1], batch_size, largest=0.9)
    assert mirrored == pytest.approx(found, rel=1e-12)

    batches = [np.array(batch) for batch in itertools.product(COIN[0], repeat=batch_size)]
    means = np.array([batch.mean() for batch in batches])
    weights = np.array([np.prod(np.where(batch > 0, *COIN[1])) for batch in batches])

    def exponents(rate):
        return max(weights @ np.log(abs(1 + sign * 2 * rate * means)) for sign in (1, -1))

    for low, high in found:
        inside, outside = [low + 1e-7, high - 1e-7], [low - 1e-7, high + 1e-7]
        assert max(map(exponents, inside)) < 0 < min(map(exponents, outside))


def test_windows_are_those_of_64_bit_whatever_the_caller_has():
    with jax.enable_x64(False):
        found = sgd_collapse_windows(*COIN, 2)
    assert np.array_equal(found, sgd_collapse_windows(*COIN, 2))


def test_laws_that_never_collapse_have_no_windows():
    for law in ([0.0], [1.0]), ([2.0], [1.0]), ([1.0, 0.0], [0.5, 0.5]):
        assert sgd_collapse_windows(*law, 3).shape == (0, 2)


def test_too_many_batches_name_what_draws_them():
    with pytest.raises(ValueError, match=r"batch_size .* sampled_sgd_lyapunov"):
        sgd_lyapunov(0.1, np.arange(10.0), np.full(10, 0.1), 50)
    with pytest.raises(ValueError, match="probabilities must sum to 1"):
        sgd_lyapunov(0.1, [1.0, 2.0], [0.5, 0.6], 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gammas", [(0.02, 0.01), (0.3, 0.001), (0.5, 0.5)])
def test_features_minimum_is_that_of_the_model(gammas, bias):
    K, n, d = 3, 2, 4
    Y = np.kron(np.eye(K), np.ones(n))
    sizes = np.cumsum([K * d, d * K * n, K])

    def split(flat):
        W, H, b = np.split(np.arange(sizes[2]), sizes[:2])
        return flat[W].reshape(K, d), flat[H].reshape(d, K * n), flat[b]

    @jax.jit
    @jax.value_and_grad
    def loss(flat):
        W, H, b = split(flat)
        error = jnp.sum((W @ H + float(bias) * b[:, None] - Y) ** 2) / (2 * K * n)
        return error + gammas[0] / 2 * jnp.sum(W**2) + gammas[1] / 2 * jnp.sum(H**2)

    start = np.random.default_rng(1).normal(size=sizes[2])
    end = minimize(lambda flat: tuple(map(np.asarray, loss(flat))), start, jac=True, tol=1e-12)
    W, H, _ = split(end.x)
    found = np.linalg.svd(W @ H, compute_uv=False)[:K]
    assert found == pytest.approx(np.asarray(features_minimum(K, n, *gammas, bias=bias)), abs=1e-4)


def test_features_collapse_where_weight_decay_says():
    values = [features_minimum(4, 10, gamma, 0.02) for gamma in (0.312, 0.313)]
    assert [bool(value[0] > 0) for value in values] == [True, False]  # at 1 / (16 * 10 * 0.02) = 0.3125
    assert features_minimum(3, 2, 0.0, 0.1).tolist() == pytest.approx([2**0.5] * 3)


def test_a_mean_of_zero_takes_the_plus_direction_whatever_rounding_says():
    law = [0.3, -0.1], [0.25, 0.75]
    wanted = 0.25 * np.log(abs(1 + 2 * 0.3)) + 0.75 * np.log(abs(1 - 2 * 0.1))
    assert sgd_lyapunov(1.0, *law, 1) == pytest.approx(wanted, rel=1e-12)


def test_sampled_exponents_follow_a_negative_mean():
    law = [-2.0, 1.0], [0.7, 0.3]
    found = sampled_sgd_lyapunov(0.1, *law, 3, jax.random.key(1), samples=20_000)
    assert abs(found.mean - sgd_lyapunov(0.1, *law, 3)) < 4 * found.error


def test_tiny_decays_of_free_features_do_not_vanish_in_their_product():
    value = features_minimum(2, 4, 1e-200, 1e-200)[0]
    assert 2 - value == pytest.approx(0, abs=1e-15)
    assert features_minimum(2, 4, 1e300, 1e-300)[0] == 0
    assert features_minimum(2, 4, 1e-300, 1e300)[0] == 0
