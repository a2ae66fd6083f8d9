"""Condition numbers of the softmax flow: digits, bounds, limits."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.replicator import (
    condition_bounds,
    condition_number,
    corollary_bound,
    linearize,
    local_matrix,
    random_minima,
    softmax_jacobian_product,
    tangent_basis,
)

close = partial(np.testing.assert_allclose, rtol=0)
seeds = st.integers(0, 2**31)


@jax.jit
def conditioning(x, hessian):
    """The condition number and its bounds (lower, upper)."""
    return condition_number(x, hessian), *condition_bounds(x, hessian)


def instance(seed, n, log10_ratio=3.0, log10_spread=1.0):
    """An interior point and a positive definite Hessian with extreme eigenvalues 1 and 10^spread."""
    rng = np.random.default_rng(seed)
    x = 10 ** (log10_ratio * rng.uniform(-1, 0, n))
    x[0], x[1] = 1, 10.0**-log10_ratio
    x = rng.permutation(x)
    rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = 10 ** (log10_spread * np.append(rng.uniform(0, 1, n - 2), [0, 1]))
    return x / x.sum(), (rotation * values) @ rotation.T


def condition_by_mpmath(x, hessian):
    """Largest over smallest eigenvalue of J H J on the tangent space, by eigenvalues with 160 digits."""
    n = len(x)
    with mpmath.workdps(160):  # eigenvalues are accurate relative to the largest, and ratios reach 1e100
        x = mpmath.matrix([mpmath.mpf(float(entry)) for entry in x])
        x /= mpmath.fsum(x)
        jacobian = mpmath.diag(list(x)) - x * x.T
        # The differences of neighbours, made orthonormal: another basis than the tested one.
        differences = mpmath.matrix(n, n - 1)
        for column in range(n - 1):
            differences[column, column], differences[column + 1, column] = 1, -1
        basis = mpmath.qr(differences)[0][:, : n - 1]
        product = basis.T * jacobian * mpmath.matrix(hessian.tolist()) * jacobian * basis
        values = mpmath.eigsy((product + product.T) / 2, eigvals_only=True)
        return float(max(values) / min(values))


@pytest.mark.parametrize("log10_ratio", [1, 5, 12, 25])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_condition_numbers_keep_their_digits(n, log10_ratio):
    for seed in range(2):
        x, hessian = instance(seed, n, log10_ratio, 2.0)
        kappa = float(conditioning(x, hessian)[0])
        assert kappa == pytest.approx(condition_by_mpmath(x, hessian), rel=1e-13)


def near_vertex(n, e):
    return np.array([1 - (n - 1) * e, *[e] * (n - 1)])


def geometric(n, ratio):
    x = ratio ** -np.linspace(0, 1, n)
    return x / x.sum()


@pytest.mark.parametrize(
    ("x", "kappa"),
    [
        (near_vertex(3, 1e-3), 8.964036),
        (near_vertex(5, 1e-4), 24.98000),
        (near_vertex(20, 1e-6), 399.98480),
        (near_vertex(2, 1e-9), 1.0),
        (geometric(4, 1e3), 1.99326e4),
        (geometric(4, 1e5), 1.01633e7),
        (geometric(5, 1e25), 8.09542e37),
    ],
)
def test_reference_values_without_curvature(x, kappa):
    assert float(conditioning(x, np.eye(len(x)))[0]) == pytest.approx(kappa, rel=3e-6)  # the printed digits


def test_the_geometric_bounds_and_single_precision():
    x = geometric(4, 1e5)
    _, lower, upper = conditioning(x, np.eye(4))
    assert float(lower) == pytest.approx(4.64e6, rel=1e-3)
    assert float(upper) == pytest.approx(1e10, rel=1e-14)
    x = jnp.asarray(geometric(5, 1e25), jnp.float32)
    kappa = conditioning(x, jnp.eye(5, dtype=jnp.float32))[0]
    assert kappa.dtype == jnp.float32
    assert float(kappa) == pytest.approx(8.09542e37, rel=1e-5)


def test_next_to_a_vertex_the_condition_number_stays_bounded():
    for n in (2, 3, 6):
        for e in (1e-2, 1e-5, 1e-9):
            x = near_vertex(n, e)
            kappa, lower, _ = conditioning(x, np.eye(n))
            exact = n**2 * (1 - (n - 1) * e) ** 2 if n > 2 else 1.0
            assert float(kappa) == pytest.approx(exact, rel=1e-13)
            assert float(lower) <= exact < (x.max() / x.min()) ** 2  # the last is the printed lower bound


@given(n=st.integers(2, 8), seed=seeds, log10_ratio=st.floats(0.1, 8), log10_spread=st.floats(0, 3))
def test_the_proved_bounds_hold_and_are_attained(n, seed, log10_ratio, log10_spread):
    x, hessian = instance(seed, n, log10_ratio, log10_spread)
    kappa, lower, upper = map(float, conditioning(x, hessian))
    assert kappa >= lower * (1 - 1e-8)
    assert kappa <= upper * (1 + 1e-8)
    assert kappa >= 1 - 1e-12
    basis = np.asarray(tangent_basis(n))
    values = np.linalg.eigvalsh(basis.T @ hessian @ basis)
    weights = x * [np.delete(x, i).sum() for i in range(n)]  # x (1 - x)
    expected = (values[0] / values[-1]) * (weights.max() / weights.min()) ** 2
    # Eigenvalues round by n units of the largest one, which is more of the least.
    rounding = 4 * n * np.finfo(float).eps * values[-1] / values[0]
    assert lower == pytest.approx(expected, rel=rounding)
    assert upper == pytest.approx((values[-1] / values[0]) * (x.max() / x.min()) ** 2, rel=rounding)
    # Both are attained at the centre, where all weights are equal, when the Hessian is round.
    centre = np.full(n, 1 / n)
    close(np.array(conditioning(centre, 3 * np.eye(n))), 1, atol=1e-13)


def test_only_the_tangent_part_of_the_hessian_matters_and_not_its_sign():
    x, hessian = instance(0, 4)
    kappa = conditioning(x, hessian)
    rng = np.random.default_rng(1)
    normal = np.outer(rng.normal(size=4), np.ones(4))
    for same in (-hessian, 7 * hessian, hessian - 50 * np.ones((4, 4)), hessian + normal + normal.T):
        close(np.array(conditioning(x, same)) / np.array(kappa), 1, atol=3e-14)


def test_singular_and_indefinite_hessians():
    x = np.array([0.5, 0.3, 0.2])
    flat = np.diag([1.0, -1.0, -1.0]) + np.ones((3, 3))  # on the tangent space: one positive, one negative
    rank_one = np.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    assert [float(value) for value in conditioning(x, rank_one)] == [np.inf, 0.0, np.inf]
    assert [float(value) for value in conditioning(x, np.zeros((3, 3)))] == [np.inf, 0.0, np.inf]
    assert all(np.isnan(conditioning(x, flat)))
    assert all(np.isnan(conditioning(np.array([0.5, 0.3, 0.3]), np.eye(3))))  # off the simplex, traced
    assert all(np.isnan(conditioning(x, np.triu(np.ones((3, 3))))))  # not symmetric, traced
    assert float(conditioning(np.array([0.5, 0.5, 0.0]), np.eye(3))[0]) == np.inf


@jax.jit
def linearized_softmax_flow(x, hessian, key_scale):
    """By automatic differentiation, for a quadratic loss with its minimum at x and a multiplier of 0.3."""

    def field(y):
        gradient = hessian @ (y - x) + 0.3
        return -key_scale * softmax_jacobian_product(y, softmax_jacobian_product(y, gradient))

    return linearize(field, x)


def test_the_softmax_flow_is_linearized_with_two_jacobians():
    basis, key_scale = np.asarray(tangent_basis(4)), 1.7
    for seed in range(3):
        x, hessian = instance(seed, 4, 1.0)
        matrix = linearized_softmax_flow(x, hessian, key_scale)
        close(matrix, key_scale * local_matrix(x, hessian), atol=1e-15)
        jacobian = np.diag(x) - np.outer(x, x)
        close(matrix, -key_scale * basis.T @ jacobian @ jacobian @ hessian @ basis, atol=1e-15)
        values = np.linalg.eigvals(matrix)
        assert np.all(np.imag(values) == 0)
        assert np.all(np.real(values) < 0)
        ratio = np.real(values).min() / np.real(values).max()
        assert float(conditioning(x, hessian)[0]) == pytest.approx(ratio, rel=5e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: condition_number([0.5, 0.5001], np.eye(2)), r"x must be a point of the simplex"),
        (lambda: condition_number([0.5, 0.5], np.eye(3)), r"hessian must have shape \(2, 2\), got shape \(3"),
        (
            lambda: condition_bounds([0.5, 0.5], [[1, 2], [0, 1]]),
            "hessian must be symmetric, got an asymmetry of 2",
        ),
        (lambda: condition_bounds([0.5, 0.5], np.full((2, 2), np.nan)), "hessian must be finite, got NaN"),
        (lambda: condition_number([1.0], [[1.0]]), r"x must have shape \(n,\) with n >= 2, got shape \(1,\)"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_the_corollary_bounds_from_below():
    hessian = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
    for point in ([0.5, 0.5 - 1e-4, 1e-4], [0.9, 0.1 - 1e-6, 1e-6], [1 / 3, 1 / 3, 1 / 3]):
        assert corollary_bound(point, hessian) <= condition_number(point, hessian)
    e, round_hessian = 1e-4, jnp.eye(3)
    # Beside an edge d (1 - d) = 1/4 is above the cap of 2/9; next to a vertex it is below.
    for point, large in (([0.5, 0.5 - e, e], 2 / 9), ([0.9, 0.1 - e, e], 0.09)):
        expected = (large / (e * (1 - e))) ** 2
        np.testing.assert_allclose(corollary_bound(point, round_hessian), expected, rtol=1e-11)


def test_random_minima_spread_over_the_decades_that_were_asked_for():
    x, hessians = random_minima(np.random.default_rng(0), 3, 400, 4.0, 2.0)
    ratios, values = np.log10(x.max(axis=1) / x.min(axis=1)), np.log10(np.linalg.eigvalsh(hessians))
    for decades, most in ((ratios, 4), (values, 2)):
        assert decades.min() >= -1e-12
        assert 0.8 * most < decades.max() <= most + 1e-12


def test_at_a_vertex_the_condition_number_is_infinite_and_the_bounds_are_no_nan():
    lower, upper = condition_bounds([1.0, 0.0], jnp.eye(2))
    assert (lower, upper, condition_number([1.0, 0.0], jnp.eye(2))) == (1, np.inf, np.inf)
