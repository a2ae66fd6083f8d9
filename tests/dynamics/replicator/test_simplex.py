"""The simplex: tangent space, linearization, stationary points."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.replicator import (
    kkt_residual,
    linearize,
    replicator_field,
    softmax_jacobian_product,
    tangent_basis,
)

close = partial(np.testing.assert_allclose, rtol=0)
seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("n", [2, 5])
def test_the_tangent_basis_is_orthonormal(n):
    basis = np.asarray(tangent_basis(n))
    assert basis.shape == (n, n - 1)
    close(basis.T @ basis, np.eye(n - 1), atol=1e-15)
    close(basis.sum(axis=0), 0, atol=1e-15)


def test_the_eigenvalue_off_the_tangent_space_is_spurious():
    payoff = np.array([[0.0, -1.0, 2.0], [2.0, 0.0, -1.0], [-1.0, 2.0, 0.0]])
    centre = np.full(3, 1 / 3)
    tangent = np.array([-1 / 6 - 1j * np.sqrt(3) / 2, -1 / 6 + 1j * np.sqrt(3) / 2])
    for shift in (0.0, -5.0):  # the same dynamics on the simplex

        def field(x, shift=shift):
            return replicator_field(x, (payoff + shift) @ x)

        on_simplex = np.linalg.eigvals(linearize(field, centre))
        close(on_simplex[np.argsort(np.imag(on_simplex))], tangent, atol=1e-14)
        everywhere = np.linalg.eigvals(jax.jacfwd(field)(jnp.asarray(centre)))
        extra = everywhere[np.argmin(np.abs(np.imag(everywhere)))]
        assert extra == pytest.approx(-centre @ (payoff + shift) @ centre, abs=1e-14)


def nearest_on_simplex(point):
    """The minimizer of |x - point|^2 / 2 over the simplex."""
    ranked = np.sort(point)[::-1]
    levels = (np.cumsum(ranked) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - levels[np.nonzero(ranked > levels)[0][-1]], 0)


@given(n=st.integers(2, 5), seed=seeds)
def test_minimizers_over_the_simplex_are_kkt_points(n, seed):
    point = np.random.default_rng(seed).normal(size=n)
    x = nearest_on_simplex(point)
    x /= x.sum()
    close(np.array(jax.jit(kkt_residual)(x, x - point)), 0, atol=1e-14)


def test_stationary_points_and_vertices():
    x, hessian = np.array([0.4, 0.3, 0.2, 0.1]), np.diag([1.0, 2.0, 4.0, 8.0])
    close(np.array(kkt_residual(x, np.full(4, 0.3))), 0, atol=1e-15)
    other = np.array([0.1, 0.2, 0.3, 0.4])
    gradient = hessian @ other
    mean = other @ gradient
    stationarity, violation = kkt_residual(other, gradient)
    assert float(stationarity) == pytest.approx(np.max(np.abs(gradient - mean)), rel=1e-14)
    assert float(violation) == 0
    for vertex in np.eye(4):
        # The interior x is the minimizer, so that each vertex is stationary for the flow and no minimum.
        gradient = hessian @ (vertex - x)
        assert not np.any(softmax_jacobian_product(jnp.asarray(vertex), jnp.asarray(gradient)))
        stationarity, violation = kkt_residual(vertex, gradient)
        assert float(stationarity) == 0
        assert float(violation) == pytest.approx(vertex @ gradient - gradient.min(), rel=1e-14)
        assert float(violation) > 0.1
    small = np.array([1 - 1e-9, 1e-9])
    assert [float(part) for part in kkt_residual(small, [0.0, -1.0])] == pytest.approx([1, 0], abs=1e-8)
    below = [float(part) for part in kkt_residual(small, [0.0, -1.0], support_above=1e-6)]
    assert below == pytest.approx([0, 1], abs=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kkt_residual([0.5, 0.5], [1.0]), r"gradient must have shape \(2,\), got shape \(1,\)"),
        (lambda: kkt_residual([0.5, -0.5], [1.0, 1.0]), r"x must be a point of the simplex"),
        (lambda: linearize(lambda x: x, [0.5, 0.6]), r"x must be a point of the simplex"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
