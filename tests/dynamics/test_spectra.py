"""Spectral measures: invariances, bounds and cases known in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.spectra import alignment, effective_rank, entropy, stable_rank

SHAPES = [(1, 1), (3, 2), (2, 5), (4, 4)]
matrices = st.builds(
    lambda seed, shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape)),
    st.integers(0, 2**16),
    st.sampled_from(SHAPES),
)


def rotation(random, n):
    return jnp.asarray(np.linalg.qr(random.normal(size=(n, n)))[0])


@given(matrices, st.floats(1e-6, 1e6), st.integers(0, 2**16))
def test_ranks_are_bounded_and_see_neither_scale_nor_basis(A, scale, seed):
    random = np.random.default_rng(seed)
    m, n = A.shape
    turned = scale * rotation(random, m) @ A @ rotation(random, n)
    rank = np.linalg.matrix_rank(A)
    for measure in (stable_rank, effective_rank):
        value = float(measure(A))
        assert 1 - 1e-12 <= value <= rank * (1 + 1e-12)
        np.testing.assert_allclose(measure(turned), value, rtol=1e-12)
    assert stable_rank(A) <= effective_rank(A) ** 2 * (1 + 1e-12)


@given(matrices, st.integers(0, 2**16))
def test_alignment_is_a_cosine(A, seed):
    random = np.random.default_rng(seed)
    B = jnp.asarray(random.normal(size=A.shape))
    m, n = A.shape
    value = float(alignment(A, B))
    assert abs(value) <= 1 + 1e-12
    np.testing.assert_allclose(value, np.vdot(A, B) / np.sqrt(np.vdot(A, A) * np.vdot(B, B)), rtol=1e-12)
    left, right = rotation(random, m), rotation(random, n)
    np.testing.assert_allclose(alignment(left @ A @ right, -7 * left @ B @ right), -value, atol=1e-13)
    np.testing.assert_allclose(alignment(A, 3 * A), 1, rtol=1e-12)


@given(st.sampled_from([1, 2, 7]), st.integers(0, 2**16))
def test_entropy(n, seed):
    p = jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(n)))
    value = float(entropy(p))
    assert -1e-15 <= value <= np.log(n) + 1e-12
    np.testing.assert_allclose(value, -np.sum(p * np.log(p)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(entropy(jnp.full(n, 1 / n)), np.log(n), atol=1e-14)
    one_hot = jnp.asarray(np.eye(n))
    np.testing.assert_array_equal(entropy(one_hot), np.zeros(n))
    np.testing.assert_array_equal(entropy(one_hot, axis=0), np.zeros(n))


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_known_in_closed_form(shape):
    m, n = shape
    zero = np.zeros(shape)
    rank_one = np.outer(np.arange(1.0, m + 1), np.arange(1.0, n + 1))
    flat = np.eye(m, n)
    stack = jnp.stack([zero, rank_one, flat])
    np.testing.assert_allclose(stable_rank(stack), [0, 1, min(shape)], rtol=1e-12)
    np.testing.assert_allclose(effective_rank(stack), [0, 1, min(shape)], rtol=1e-9)
    np.testing.assert_allclose(alignment(stack, stack), [0, 1, 1], rtol=1e-12)


def test_two_singular_values():
    A = jnp.diag(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(stable_rank(A), 10 / 9, rtol=1e-14)
    np.testing.assert_allclose(effective_rank(A), 4 / 3**0.75, rtol=1e-14)


def test_float32_is_kept_however_small():
    A = jnp.asarray([[3.0, 0.0], [0.0, 1.0]], jnp.float32)
    for value in (stable_rank(A), effective_rank(A), entropy(A), alignment(A, A)):
        assert value.dtype == jnp.float32
    np.testing.assert_allclose(stable_rank(1e-30 * A), 10 / 9, rtol=1e-6)


def test_nan_is_told():
    A = jnp.full((2, 2), jnp.nan)
    for value in (stable_rank(A), effective_rank(A), alignment(A, jnp.eye(2))):
        assert jnp.isnan(value)
