"""A layer inside of a network: the gradient that its surroundings give it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.galore import bound_counterexample, gradient_operator, reversible_terms
from models.layer import counterexample_network, layer_outputs, mlp_outputs
from models.losses import mean_squared_error


def test_outputs_of_several_inputs_are_those_of_each():
    rng = np.random.default_rng(0)
    W, J, F = (jnp.asarray(rng.normal(size=size)) for size in ((3, 4), (5, 2, 3), (5, 4, 6)))
    together = layer_outputs(W, (J, F))
    for index in range(6):
        np.testing.assert_allclose(together[..., index], layer_outputs(W, (J, F[..., index])), rtol=1e-12)


def test_the_counterexample_is_a_corner_of_the_layer():
    G0, B, C = bound_counterexample()
    J, f, y = (jnp.asarray(part) for part in counterexample_network(4, 3, 12))
    gradient = jax.grad(mean_squared_error)(jnp.zeros((4, 3)), (layer_outputs, (J, f), y))
    np.testing.assert_allclose(-gradient[:2, :2], G0, rtol=1e-12, atol=1e-12)
    terms = reversible_terms(J, f, y, "squared")
    values = jnp.linalg.eigvalsh(gradient_operator(terms.B, terms.C))
    corner = jnp.linalg.eigvalsh(gradient_operator(B, C))
    expected = np.sort(np.concatenate([corner, np.ones(4 * 3 - 4)]))
    np.testing.assert_allclose(values, expected, rtol=1e-10)


def test_shapes_are_not_stretched():
    W, J, f = jnp.ones((3, 4)), jnp.ones((5, 2, 3)), jnp.ones((5, 4))
    tail = (jnp.ones((6, 3)), jnp.ones((2, 6)), jnp.ones(6))
    for call, message in (
        (lambda: layer_outputs(W, (J[:1], f)), "W, J and F must have shapes"),
        (lambda: layer_outputs(W[:, :1], (J, f)), "W, J and F must have shapes"),
        (lambda: layer_outputs(1j * W, (J, f)), "W must be real"),
        (lambda: mlp_outputs(W, (f[:, :1], tail, 0.1)), "W and f must have shapes"),
        (lambda: mlp_outputs(W, (f, (*tail[:2], tail[2][:1]), 0.1)), "z, V, U and bias must have shapes"),
        (lambda: counterexample_network(1, 3, 9), "m must be an integer >= 2, got 1"),
        (lambda: counterexample_network(2, 3, 8), "samples must be an integer >= 9, got 8"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_a_network_without_biases_is_homogeneous():
    rng = np.random.default_rng(0)
    W, f, V, U, b = (jnp.asarray(rng.normal(size=size)) for size in ((3, 4), (5, 4), (6, 3), (2, 6), 6))
    without, biased = ((f, (V, U, bias), 0.2) for bias in (0 * b, b))
    np.testing.assert_allclose(mlp_outputs(3 * W, without), 3 * mlp_outputs(W, without), rtol=1e-12)
    assert not np.allclose(mlp_outputs(3 * W, biased), 3 * mlp_outputs(W, biased))
