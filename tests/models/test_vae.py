"""Autoencoders with drawn latents have the loss that theory integrates, follow its flow, reach its end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamics.collapse import (
    VaeWeights,
    linear_vae_flow,
    linear_vae_loss,
    moments,
    vae_minimum,
    vae_modes,
)
from dynamics.spectra import active_units
from models.functional import as_function
from models.self_supervised import Encoder
from models.training import Descent, train
from models.vae import (
    AmortizedVae,
    LinearVae,
    VaeInputs,
    negative_elbo,
    vae_batch,
    vae_weights,
)

RNG = np.random.default_rng(1)
X = RNG.normal(size=(30, 4)) * np.array([1.6, 1.1, 0.6, 0.0])  # the last input is constant
X -= X.mean(axis=0)
Y = X @ RNG.normal(size=(4, 3)) + 0.2 * RNG.normal(size=(30, 3))
Y -= Y.mean(axis=0)
NUMBERS = (0.4, 0.8, 1.3)
START = VaeWeights(RNG.normal(size=(3, 2)), RNG.normal(size=(4, 2)), 0.4 * RNG.normal(size=2))


def whitened(x, y):
    """A^{1/2} and Z = E[y x^T] A^{-1/2}."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    seen = values > 1e-10 * values[-1]
    inverse = np.where(seen, 1 / np.sqrt(np.where(seen, values, 1)), 0)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root, y.T @ x / len(x) @ (vectors * inverse) @ vectors.T


def exact_noise(x, y, latents):
    """Every example with noise of mean zero and unit covariance, which gives means of squares exactly."""
    points = np.concatenate([np.eye(latents), -np.eye(latents)]) * latents**0.5
    return VaeInputs(np.repeat(x, len(points), axis=0), np.tile(points, (len(x), 1))), np.repeat(
        y, len(points), axis=0
    )


def integrated(weights, numbers=NUMBERS):
    root, Z = whitened(X, Y)
    loss = linear_vae_loss(weights.U, root @ weights.W, np.exp(weights.log_variance / 2), Z, *numbers)
    return float(loss) + (np.sum(Y**2) / len(Y) - np.sum(Z**2)) / (2 * numbers[1] ** 2)


def test_the_mean_loss_is_the_integrated_one():
    predict, params = as_function(LinearVae(START))
    for part, other in zip(vae_weights(params), START, strict=True):
        np.testing.assert_array_equal(part, other)
    inputs, y = exact_noise(X, Y, 2)
    exact = integrated(START)
    for numbers in (NUMBERS, (0.0, *NUMBERS[1:])):
        loss = float(negative_elbo(params, (predict, inputs, y, numbers)))
        assert loss == pytest.approx(integrated(START, numbers), abs=1e-12)
    # Without noise the decoder's share of it is missing.
    without = float(negative_elbo(params, (predict, VaeInputs(X), Y, NUMBERS)))
    share = np.sum(np.exp(START.log_variance) * np.sum(START.U**2, axis=0)) / (2 * NUMBERS[1] ** 2)
    assert without + share == pytest.approx(exact, abs=1e-12)


def test_drawn_latents_have_the_integrated_loss_on_average():
    predict, params = as_function(LinearVae(START))

    @jax.jit
    def drawn(key):
        inputs, y = vae_batch(key, X, Y, 400_000, 2)
        alone = jax.vmap(lambda x, e, y: negative_elbo(params, (predict, VaeInputs(x, e), y, NUMBERS)))
        return alone(inputs.x[:, None], inputs.noise[:, None], y[:, None])

    losses = drawn(jax.random.key(0))
    assert abs(float(jnp.mean(losses)) - integrated(START)) < 4 * float(jnp.std(losses)) / losses.size**0.5


def test_noise_is_drawn_by_a_key_of_its_own():
    with jax.debug_key_reuse(True):
        vae_batch(jax.random.key(0), X, Y, 3, 2)


def test_first_weights_keep_the_size_of_what_they_are_given():
    network = AmortizedVae(jax.random.key(0), 4, 100, 9, 50)
    for layer in (network.hidden, network.mean, network.decoder):
        kernel = np.asarray(layer.kernel[...])
        assert np.std(kernel) * len(kernel) ** 0.5 == pytest.approx(1, abs=4 / (2 * kernel.size) ** 0.5)


def test_an_encoder_with_relu_can_stand_for_a_linear_one():
    """ReLU of h and of -h give h; the loss on the same noise is that of the linear network."""
    network = AmortizedVae(jax.random.key(0), 4, 4, 2, 3)
    eye = np.eye(2)
    network.hidden.kernel[...] = START.W @ np.concatenate([eye, -eye], axis=1)
    network.mean.kernel[...] = np.concatenate([eye, -eye])
    assert network.log_variance.bias is not None
    network.log_variance.bias[...] = START.log_variance
    network.decoder.kernel[...] = START.U.T
    inputs, y = exact_noise(X, Y, 2)
    predict, params = as_function(network)
    loss = float(negative_elbo(params, (predict, inputs, y, NUMBERS)))
    assert loss == pytest.approx(integrated(START), abs=1e-12)


def test_descent_on_drawn_latents_follows_the_flow():
    """At first order in the rate, with noise that integrates exactly."""
    predict, params = as_function(LinearVae(START))
    inputs, y = exact_noise(X, Y, 2)
    ts = [0.0, 0.5, 1.0]
    flow = linear_vae_flow(START, moments(X, Y), *NUMBERS, ts)

    _, paths = Descent(1.0, 2, (100, 1000)).train(
        lambda params: negative_elbo(params, (predict, inputs, y, NUMBERS)), params, vae_weights
    )
    pairs = zip(jax.tree.leaves(paths.ys), jax.tree.leaves(flow.ys), strict=True)
    coarse, fine = np.max(
        [np.abs(one - other[None]).reshape(2, -1).max(axis=1) for one, other in pairs], axis=0
    )
    assert coarse < 0.05
    assert coarse / fine == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("kind", ["linear", "amortized"])
def test_training_on_drawn_latents_ends_at_the_minimum(kind):
    """More latents than modes, one of the inputs constant; two of three modes stay alive."""
    latents, numbers = 4, (0.5, 0.8, 1.0)
    if kind == "linear":
        keys = jax.random.split(jax.random.key(0))
        U, W = (0.3 * jax.random.normal(k, (4, latents)) for k in keys)
        network = LinearVae(VaeWeights(U, W, jnp.zeros(latents)))
    else:
        network = AmortizedVae(jax.random.key(0), 4, 16, latents, 4)
    predict, params = as_function(network)
    end, path = train(
        lambda params, batch: negative_elbo(params, (predict, *batch, numbers)),
        params,
        optax.adam(optax.exponential_decay(0.03, 2000, 1e-2)),
        steps=2000,
        every=2000,
        batches=lambda key: vae_batch(key, X, X, 64, latents),
        key=jax.random.key(1),
    )
    assert bool(path.ok)
    zeta = vae_modes(X)
    least = vae_minimum(jnp.diag(zeta), latents, *numbers)
    outputs = predict(end, VaeInputs(jnp.asarray(X)))
    assert float(active_units(outputs.mean)) == np.sum(least.lam > 0) == 2
    variances = np.sort(np.exp(np.mean(outputs.log_variance, axis=0)))
    np.testing.assert_allclose(variances, np.sort(least.sigma2), atol=0.04)


def test_active_units_misfire_close_to_a_threshold():
    """Half a percent below its threshold a mode is alive, and the variance of its mean too small to count."""
    zeta = vae_modes(X)
    for below, count in ((0.95, 1), (0.995, 0)):
        least = vae_minimum(jnp.diag(zeta), 1, below * float(zeta[0]) ** 2, 1.0, 1.0)
        assert float(least.lam[0]) > 0
        mean = X @ np.linalg.eigh(X.T @ X)[1][:, -1:] / float(zeta[0]) * float(least.theta[0])
        assert float(active_units(mean)) == count


@pytest.mark.parametrize(("last", "threshold"), [(np.nan, 0.1), (np.inf, 0.1), (1.0, np.nan)])
def test_active_units_of_no_numbers_are_none_that_one_could_count(last, threshold):
    assert np.isnan(jax.jit(active_units)(jnp.array([[1.0, 0.0], [2.0, last]]), threshold))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="U, W and log_variance must have shapes"):
        LinearVae(VaeWeights(jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.ones(2)))
    predict, params = as_function(LinearVae(START))
    with pytest.raises(ValueError, match=r"noise must have shape \(30, 2\)"):
        predict(params, VaeInputs(X, np.ones((30, 1))))
    with pytest.raises(ValueError, match=r"targets must have shape \(30, 3\)"):
        negative_elbo(params, (predict, VaeInputs(X), Y[:, :2], NUMBERS))
    # Three matrices of another network are no weights of an autoencoder, whatever their shapes.
    other = as_function(Encoder([np.ones((2, 4)), np.ones((2, 2)), np.ones((3, 2))]))[1]
    assert len(jax.tree.leaves(other)) == 3
    with pytest.raises(ValueError, match="params must be those of a LinearVae, decoder/kernel, enc"):
        vae_weights(other)
    bad = np.where(np.arange(4) == 1, np.nan, X)
    with pytest.raises(ValueError, match="x must be finite"):
        vae_batch(jax.random.key(0), bad, Y, 3, 2)
