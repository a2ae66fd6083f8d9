"""The network with drawn noise has the loss that its theory integrates, and trains to its minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamics.collapse import deep_minimum, moments, stochastic_linear_loss
from models.collapse import (
    Noisy,
    StochasticLinear,
    multiplicative_noise,
    noisy_batch,
    random_weights,
    weights,
)
from models.functional import as_function
from models.losses import mean_squared_error
from models.training import train

X = jax.random.normal(jax.random.key(0), (40, 3)) * jnp.array([1.5, 1.0, 0.5])[None]
Y = X @ jnp.array([[0.8], [-0.5], [0.4]]) + 0.2 * jax.random.normal(jax.random.key(1), (40, 1))


@pytest.mark.parametrize("sizes", [(3, 1), (3, 4, 1), (3, 2, 5, 1)])
def test_without_noise_the_loss_is_that_of_the_moments(sizes):
    matrices = random_weights(jax.random.key(2), sizes, 0.7)
    predict, params = as_function(StochasticLinear(matrices))
    for W, matrix in zip(weights(params), matrices, strict=True):
        np.testing.assert_array_equal(W, matrix)
    exact = stochastic_linear_loss(matrices, moments(X, Y), 0.0, np.zeros(len(sizes) - 1))
    assert 2 * float(mean_squared_error(params, (predict, Noisy(X), Y))) == pytest.approx(
        float(exact), abs=1e-13
    )


@pytest.mark.parametrize("law", ["dropout", "normal"])
def test_with_noise_the_mean_loss_is_the_exact_one(law):
    matrices = random_weights(jax.random.key(2), (3, 4, 2, 1), 0.7)
    predict, params = as_function(StochasticLinear(matrices))

    @jax.jit
    def losses(key):
        batch = noisy_batch(key, X, Y, 400_000, (4, 2), 0.5, law)
        return jnp.sum((predict(params, batch[0]) - batch[1]) ** 2, axis=-1)

    drawn = losses(jax.random.key(3))
    exact = float(stochastic_linear_loss(matrices, moments(X, Y), 0.5, np.zeros(3)))
    assert abs(float(jnp.mean(drawn)) - exact) < 4 * float(jnp.std(drawn)) / drawn.size**0.5


@pytest.mark.parametrize("law", ["dropout", "normal"])
def test_noise_has_mean_one_and_its_variance(law):
    noise = multiplicative_noise(jax.random.key(0), (200_000,), 0.25, law)
    assert float(jnp.mean(noise)) == pytest.approx(1, abs=5e-3)
    assert float(jnp.var(noise)) == pytest.approx(0.25, rel=2e-2)
    # Dropout at rate p has the variance p / (1 - p): here a fifth is dropped.
    if law == "dropout":
        assert float(jnp.mean(noise == 0)) == pytest.approx(0.2, abs=5e-3)


@pytest.mark.parametrize("law", ["dropout", "normal"])
def test_batches_draw_every_example_and_noise_that_is_independent(law):
    x = jnp.arange(5.0)[:, None]
    inputs, y = noisy_batch(jax.random.key(0), x, 2 * x, 20_000, (2, 2), 0.25, law)
    np.testing.assert_array_equal(y, 2 * inputs.x)
    np.testing.assert_allclose(jnp.mean(inputs.x == x.T, axis=0), 0.2, atol=0.015)
    drawn = jnp.concatenate([inputs.x, *inputs.noise], axis=1)
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(5), atol=0.04)
    assert (len(np.unique(drawn[:, 1:])) == 2) == (law == "dropout")


def test_random_weights_have_their_scale_and_are_independent():
    first, second = random_weights(jax.random.key(0), (50, 50, 50), 0.3)
    np.testing.assert_allclose(np.cov(first.ravel(), second.ravel()), 0.09 * np.eye(2), atol=0.01)


def test_descent_with_decay_and_drawn_noise_ends_near_the_minimum():
    gamma, noise, widths = 0.1, 0.3, (4,)
    predict, params = as_function(StochasticLinear(random_weights(jax.random.key(5), (3, 4, 1), 0.5)))
    # Decay that is added to the gradient is the regularization gamma = decay / 2.
    optimizer = optax.chain(optax.add_decayed_weights(2 * gamma), optax.sgd(0.005))
    _, path = train(
        lambda params, batch: 2 * mean_squared_error(params, (predict, *batch)),
        params,
        optimizer,
        steps=6000,
        every=60,
        observe=weights,
        batches=lambda key: noisy_batch(key, X, Y, 32, widths, noise),
        key=jax.random.key(6),
    )
    least = deep_minimum(moments(X, Y[:, 0]), [gamma, gamma], noise, widths)
    norms = [float(jnp.mean(jnp.linalg.norm(W[50:], axis=(1, 2)))) for W in path.ys]
    np.testing.assert_allclose(norms, least.norms, rtol=0.02)


def test_matrices_must_follow_each_other():
    with pytest.raises(ValueError, match="matrices must follow each other"):
        StochasticLinear([jnp.ones((2, 3)), jnp.ones((1, 3))])


def test_noise_must_have_the_shape_of_the_layers():
    network = StochasticLinear([jnp.ones((4, 3)), jnp.ones((1, 4))])
    for noise in ([jnp.ones((2, 1))], [jnp.ones(4)], [jnp.ones((2, 4))] * 2):
        with pytest.raises(ValueError, match="noise must be arrays of shapes"):
            network(Noisy(jnp.ones((2, 3)), noise))
