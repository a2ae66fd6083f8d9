"""The origin of ReLU networks, against every direction of the plane and the loss of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.collapse import relu_critical_gamma
from models.data.images import digits

KEY = jax.random.key(0)


def drawn(seed, outputs, dim=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(12, dim)), rng.normal(size=(12, outputs))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("outputs", "classes", "within"), [(1, False, 1e-5), (3, False, 1e-5), (3, True, 1e-9)]
)
def test_the_ascent_finds_the_best_angle_and_other_maxima(seed, outputs, classes, within):
    x, y = drawn(seed, outputs)
    y = np.abs(y) if classes else y
    # Where an input comes in or goes out there is a kink, which may be a maximum.
    kinks = np.arctan2(x[:, 1], x[:, 0])[:, None] + np.array([0.5, 1.5]) * np.pi
    angles = np.sort(np.concatenate([np.linspace(0, 2 * np.pi, 200_000), kinks.ravel() % (2 * np.pi)]))
    W = np.stack([np.cos(angles), np.sin(angles)])
    heights = np.linalg.norm(y.T @ np.maximum(x @ W, 0), axis=0) / len(x)
    around = [np.roll(heights[:-1], shift) for shift in (-1, 1)]
    peaks = heights[:-1][(heights[:-1] > around[0]) & (heights[:-1] > around[1])]
    found = relu_critical_gamma(x, y, KEY)
    assert float(found.gamma) == pytest.approx(heights.max(), rel=within)
    assert np.max(np.min(np.abs(np.asarray(found.maxima)[:, None] - peaks), axis=1)) < within
    at = angles[np.argmax(heights)]
    assert np.asarray(found.w) == pytest.approx([np.cos(at), np.sin(at)], abs=1e-3)
    signal = y.T @ np.maximum(x @ np.asarray(found.w), 0) / len(x)
    assert np.asarray(found.u) == pytest.approx(signal / np.linalg.norm(signal), abs=1e-12)


@pytest.mark.parametrize("share", [0.98, 1.02])
def test_the_origin_is_a_saddle_below_the_critical_strength_alone(share):
    x, y = (jnp.asarray(part) for part in drawn(0, 3, 4))
    found = relu_critical_gamma(x, y, KEY)
    gamma_u, gamma_w = share * found.gamma * jnp.array([2.0, 0.5])

    def loss(size, U, W):
        U, W = size * U, size * W
        outputs = jax.nn.relu(x @ W.T) @ U.T
        penalty = gamma_u * jnp.sum(U**2) + gamma_w * jnp.sum(W**2)
        return jnp.mean(jnp.sum((outputs - y) ** 2, axis=1)) + penalty

    def growth(U, W):
        return (loss(1e-3, U, W) - loss(0.0, U, W)) / 1e-6

    # The neuron that gains most shares its norm so that both penalties are equal.
    best = growth(found.u[:, None] / 2**0.5, found.w[None] * 2**0.5)
    assert float(best) == pytest.approx(2 * (share - 1) * float(found.gamma), abs=2e-5)
    keys = jax.random.split(KEY, 500)
    others = jax.vmap(
        lambda key: growth(
            jax.random.normal(key, (3, 5)), jax.random.normal(jax.random.fold_in(key, 1), (5, 4))
        )
    )(keys)
    assert (share < 1) or float(jnp.min(others)) > 0


def test_the_critical_strength_of_digits():
    images, labels = (np.asarray(part) for part in digits())
    x = images.reshape(len(images), -1)
    found = relu_critical_gamma(x - x.mean(axis=0), np.eye(10)[labels], KEY, starts=16)
    assert float(found.gamma) == pytest.approx(0.19296, abs=5e-6)
    assert float(found.maxima[-1]) == pytest.approx(0.17008, abs=5e-6)


def test_units_do_not_matter_and_derivatives_are_right():
    x, y = drawn(1, 2, 3)
    y = np.abs(y)  # then maxima are in no kink
    with jax.numpy_dtype_promotion("standard"):
        plain, scaled = (
            relu_critical_gamma(np.float32(unit) * x.astype(np.float32), y, KEY).gamma for unit in (1, 1e-30)
        )
        assert float(scaled) / 1e-30 == pytest.approx(float(plain), rel=1e-5)

    def shifted(by):
        return relu_critical_gamma(x + by, y, KEY).gamma

    ends = [float(shifted(h)) for h in (-1e-5, 1e-5)]
    assert float(jax.grad(shifted)(0.0)) == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-6)


def test_what_never_varies_has_no_critical_strength():
    found = relu_critical_gamma(np.zeros((3, 2)), np.ones(3), KEY, starts=2)
    assert float(found.gamma) == 0
    assert np.asarray(found.maxima).tolist() == [0, 0]
