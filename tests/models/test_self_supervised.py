"""Losses of pairs agree with their theory on drawn data, and have the symmetries that it builds on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamics.collapse import infonce_loss
from models.collapse import random_weights, weights
from models.functional import as_function
from models.locations import LocalNet
from models.self_supervised import (
    ConvEncoder,
    Encoder,
    Views,
    batch_of_views,
    infonce,
    on_views,
    scale_embedding,
    soft_triplet,
    spectral_contrastive,
    two_views,
)
from models.vae import AmortizedVae

A = np.diag([1.0, 0.5])
C = np.array([[0.3, 0.1], [0.1, 0.2]])
W = jnp.array([[0.8, 0.1], [-0.3, 0.6]])
LOSSES = {
    "distance": infonce,
    "weighted": partial(infonce, attraction=2.0),
    "with the positive": partial(infonce, positive=True),
    "inner": partial(infonce, similarity="inner"),
    "cosine": partial(infonce, similarity="cosine", temperature=0.5),
    "spectral": spectral_contrastive,
    "triplet": partial(soft_triplet, attraction=1.5),
}
PAIR = two_views(jax.random.key(9), jax.random.normal(jax.random.key(8), (6, 3)), 0.2)


def drawn_losses(loss, size, batches):
    """The loss of many batches of Gaussian data, on a linear encoder."""
    predict, params = as_function(Encoder([W]))

    @jax.jit
    def of_batch(key):
        data, noise = jax.random.split(key)
        x = jax.random.normal(data, (size, 2)) * jnp.sqrt(jnp.diag(jnp.asarray(A)))[None]
        return on_views(loss, predict)(params, two_views(noise, x, C))

    return np.asarray(jax.lax.map(of_batch, jax.random.split(jax.random.key(0), batches)))


def within_four_errors(drawn, exact):
    return abs(drawn.mean() - exact) < 4 * drawn.std(ddof=1) / len(drawn) ** 0.5


def test_infonce_of_drawn_batches_is_the_exact_one():
    drawn = drawn_losses(partial(infonce, attraction=1.5), 1000, 40)
    assert within_four_errors(drawn, float(infonce_loss(W, A, C, 1.5)))
    # The same numbers tell the wrong covariance, and the wrong weight.
    for wrong in (infonce_loss(W, A, np.diag(np.diag(C)) * 0.8, 1.5), infonce_loss(W, A, C, 1.3)):
        assert not within_four_errors(drawn, float(wrong))


def test_other_losses_of_drawn_batches_have_their_means():
    T, M = np.asarray(W @ (A + C) @ W.T), np.asarray(W @ A @ W.T)
    # <f, g> has mean tr(W A W^T), and its square over independent pairs tr(T^2).
    spectral = -2 * np.trace(M) + np.trace(T @ T)
    assert within_four_errors(drawn_losses(spectral_contrastive, 300, 50), spectral)
    # Of <f, x> with x normal of covariance S the mean exponential is exp(f^T S f / 2).
    inner = -np.trace(M) + np.trace(T @ T) / 2
    assert within_four_errors(drawn_losses(partial(infonce, similarity="inner"), 1000, 40), inner)


@pytest.mark.parametrize("n", [2, 4])
def test_losses_are_their_sums(n):
    f, g = (np.asarray(view)[:n] for view in PAIR)
    distance = np.array([[np.sum((a - b) ** 2) / 2 for b in g] for a in f])
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def contrast(s, attraction, positive):
        rows = [[s[i, j] for j in range(n) if positive or j != i] for i in range(n)]
        return np.mean([np.log(np.mean(np.exp(row))) - attraction * s[i, i] for i, row in enumerate(rows)])

    cosine = f @ g.T / np.linalg.norm(f, axis=1)[:, None] / np.linalg.norm(g, axis=1)[None]
    expected = {
        "distance": contrast(-distance, 1, False),
        "weighted": contrast(-distance, 2, False),
        "with the positive": contrast(-distance, 1, True),
        "inner": contrast(f @ g.T, 1, False),
        "cosine": contrast(cosine / 0.5, 1, False),
        "spectral": -2 * np.mean(np.sum(f * g, axis=1)) + np.mean([(f[i] @ g[j]) ** 2 for i, j in pairs]),
        "triplet": np.mean([np.log1p(np.exp(1.5 * distance[i, i] - distance[i, j])) for i, j in pairs]),
    }
    for name, loss in LOSSES.items():
        assert float(loss(f, g)) == pytest.approx(expected[name], abs=1e-13), name


@pytest.mark.parametrize("name", LOSSES)
def test_rotations_and_the_order_of_examples_change_nothing(name):
    loss, (f, g) = LOSSES[name], PAIR
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    order = jnp.array([3, 0, 5, 1, 2, 4])
    before = float(loss(f, g))
    for after in (loss(f @ rotation, g @ rotation), loss(-f, -g), loss(f[order], g[order])):
        assert float(after) == pytest.approx(before, abs=1e-13)
    assert abs(float(loss(f[order], g)) - before) > 1e-3  # pairs count


def test_only_the_cosine_is_constant_along_rays_and_only_distances_forget_where_zero_is():
    f, g = PAIR
    for name, loss in LOSSES.items():
        before = float(loss(f, g))
        assert (abs(float(loss(3 * f, 3 * g)) - before) < 1e-13) == (name == "cosine"), name
        moved = abs(float(loss(f + 1, g + 1)) - before)
        assert (moved < 1e-12) == (name in ("distance", "weighted", "with the positive", "triplet")), name


def test_an_embedding_of_zero_is_alike_to_none():
    f = jnp.concatenate([jnp.zeros((1, 3)), PAIR.first[1:]])
    value, gradient = jax.value_and_grad(LOSSES["cosine"])(f, PAIR.second)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_large_embeddings_do_not_overflow():
    f, g = (1e3 * view for view in PAIR)
    for name, loss in LOSSES.items():
        assert np.all(np.isfinite(jax.grad(loss)(f, g))), name


@pytest.mark.parametrize("name", ["distance", "weighted", "with the positive", "triplet"])
def test_a_common_shift_takes_no_digits_of_distances(name):
    loss, (f, g) = LOSSES[name], (np.round(np.asarray(view) * 256) / 256 for view in PAIR)
    # These numbers are multiples of 1/256, which single precision holds beside 1e4 as well.
    shifted = [jnp.asarray(view + 1e4, jnp.float32) for view in (f, g)]
    assert float(loss(*shifted)) == pytest.approx(float(loss(f, g)), abs=1e-5)


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_the_cosine_forgets_any_size_in_single_precision(size):
    f, g = (jnp.asarray(size * np.asarray(view), jnp.float32) for view in PAIR)
    value, gradient = jax.value_and_grad(LOSSES["cosine"])(f, g)
    expected, slopes = jax.value_and_grad(LOSSES["cosine"])(*PAIR)
    assert float(value) == pytest.approx(float(expected), abs=1e-6)
    np.testing.assert_allclose(size * np.asarray(gradient, float), slopes, atol=1e-6)


def test_a_loss_of_views_is_given_the_first_one_first():
    value = on_views(infonce, jnp.multiply)(0.5, PAIR)
    f, g = (0.5 * view for view in PAIR)
    assert float(value) == pytest.approx(float(infonce(f, g)), abs=1e-13)
    assert abs(float(infonce(g, f) - value)) > 1e-3  # the order counts


def test_encoders_have_their_layers():
    first, second = random_weights(jax.random.key(2), (3, 5, 2), 0.7)
    x = np.asarray(PAIR.first)
    predict, params = as_function(Encoder([first, second]))
    np.testing.assert_allclose(predict(params, x), np.maximum(x @ first.T, 0) @ second.T, rtol=1e-13)
    for matrix, given in zip(weights(params), (first, second), strict=True):
        np.testing.assert_array_equal(matrix, given)
    # Images are looked at pixel by pixel.
    images = jax.random.normal(jax.random.key(3), (4, 3, 5))
    flat = Encoder(random_weights(jax.random.key(4), (15, 2), 1.0))
    np.testing.assert_array_equal(flat(images), flat(images.reshape(4, 15)))
    with pytest.raises(ValueError, match=r"x must have shape \(n, 15\)"):
        flat(images[:, 1:])


def test_convolutions_look_at_images():
    predict, params = as_function(ConvEncoder(jax.random.key(0), (7, 5), 2, (3, 4)))
    images = jax.random.normal(jax.random.key(1), (4, 7, 5))
    embeddings = predict(params, images)
    assert embeddings.shape == (4, 2)
    # There are no biases: the encoder is homogeneous, yet for its ReLU not odd.
    np.testing.assert_allclose(predict(params, 2 * images), 2 * embeddings, rtol=1e-12)
    assert np.max(np.abs(predict(params, -images) + embeddings)) > 0.1 * np.max(np.abs(embeddings))
    # The corners are seen, and each image for itself.
    corner = images.at[:2, -1, -1].add(1.0)
    assert np.any(predict(params, corner) != embeddings, axis=1).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="x must have shape"):
        predict(params, images[:, 1:])


@pytest.mark.parametrize("encoder", [Encoder([W]), ConvEncoder(jax.random.key(0), (4, 4), 2, (2,))])
def test_rescaling_the_last_layer_rescales_the_embedding(encoder):
    predict, params = as_function(encoder)
    x = jax.random.normal(jax.random.key(1), (3, 2) if encoder.layers[0].in_features == 2 else (3, 4, 4))
    for scales in (0.5, [2.0, -1.0]):
        rescaled = predict(scale_embedding(params, scales), x)
        np.testing.assert_allclose(rescaled, predict(params, x) * np.reshape(scales, (1, -1)), rtol=1e-13)


def test_the_embedding_of_another_network_is_not_rescaled():
    _, params = as_function(AmortizedVae(jax.random.key(0), 2, 3, 1, 2))
    with pytest.raises(ValueError, match="params must be those of an Encoder or a ConvEncoder"):
        scale_embedding(params, 0.0)


@pytest.mark.parametrize(("augmentation", "covariance"), [(0.3, 0.3 * np.eye(2)), (C, C)])
def test_views_have_noise_of_their_own(augmentation, covariance):
    x = jnp.full((100_000, 2), 5.0)
    views = two_views(jax.random.key(0), x, augmentation)
    noise = np.concatenate([views.first - x, views.second - x], axis=1)
    expected = np.kron(np.eye(2), covariance)
    np.testing.assert_allclose(np.cov(noise.T), expected, atol=6e-3)
    np.testing.assert_array_equal(two_views(jax.random.key(0), x, 0.0).first, x)


def test_batches_draw_examples_whose_views_belong_together():
    x = 100.0 * jnp.arange(5)[:, None]
    views = batch_of_views(jax.random.key(0), x, 20_000, 1.0)
    first, second = (np.round(np.asarray(view) / 100) for view in views)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(np.mean(first == np.arange(5), axis=0), 0.2, atol=0.015)
    assert np.corrcoef(views.first[:, 0] % 100, views.second[:, 0] % 100)[0, 1] < 0.9


def test_views_are_drawn_by_a_key_of_their_own():
    with jax.debug_key_reuse(True):
        batch_of_views(jax.random.key(0), PAIR.first, 4, 0.1)


def test_what_makes_no_batch_is_refused():
    with pytest.raises(ValueError, match="first must hold embeddings of at least 2 examples"):
        infonce(jnp.ones((1, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="similarity must be one of"):
        infonce(*PAIR, similarity="euclid")
    # A negative eigenvalue may be small, unless it is rounding.
    draw = partial(two_views, jax.random.key(0), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="augmentation must be positive semidefinite"):
        draw(jnp.diag(jnp.array([1.0, -1e-6])))
    assert np.all(np.isfinite(draw(jnp.diag(jnp.array([1.0, -1e-16]))).first))
    with pytest.raises(ValueError, match="first and second must have one shape"):
        on_views(infonce, lambda params, x: x)(None, Views(jnp.ones((2, 1)), jnp.ones((3, 1))))


def test_one_input_alone_is_not_normalized():
    arguments = np.ones((2, 1, 1)), np.ones((1, 2)), nnx.relu
    one = np.full((1, 2, 1), 3.0)
    np.testing.assert_array_equal(LocalNet(*arguments, normalized=False)(one), [[6.0]])
    with pytest.raises(ValueError, match="x must hold at least 2 inputs"):
        LocalNet(*arguments)(one)
