"""Spectral measures: invariances, bounds and cases known in closed form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from dynamics.spectra import (
    _require_axes,
    alignment,
    captured_energy,
    effective_rank,
    entropy,
    neural_collapse,
    norm,
    numerical_rank,
    principal_angles,
    stable_rank,
)

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


def test_each_matrix_of_a_batch_has_a_threshold_of_its_own():
    A = np.diag([3.0, 1.0, 0.2]) * np.array([1.0, 0.01])[:, None, None]
    np.testing.assert_array_equal(numerical_rank(A, rtol=0.1), [2, 2])
    np.testing.assert_array_equal(numerical_rank(A, atol=0.1), [3, 0])
    np.testing.assert_array_equal(numerical_rank(A, rtol=0.1, atol=0.02), [2, 1])


def test_float32_is_kept_however_small():
    A = jnp.asarray([[3.0, 0.0], [0.0, 1.0]], jnp.float32)
    for value in (stable_rank(A), effective_rank(A), entropy(A), alignment(A, A)):
        assert value.dtype == jnp.float32
    np.testing.assert_allclose(stable_rank(1e-30 * A), 10 / 9, rtol=1e-6)


def test_nan_is_told():
    A = jnp.full((2, 2), jnp.nan)
    for value in (stable_rank(A), effective_rank(A), alignment(A, jnp.eye(2))):
        assert jnp.isnan(value)


def orthonormal(random, m, r):
    return np.linalg.qr(random.normal(size=(m, r)))[0]


@given(st.integers(0, 2**16))
def test_angles_agree_with_scipy(seed):
    m, r, s = 5, 2, 3
    random = np.random.default_rng(seed)
    P, Q = orthonormal(random, m, r), orthonormal(random, m, s)
    angles = np.asarray(principal_angles(P, Q))
    # SciPy takes the arccos of a cosine near one where another angle is large.
    np.testing.assert_allclose(angles, scipy.linalg.subspace_angles(P, Q)[::-1], atol=1e-7)
    np.testing.assert_allclose(np.cos(angles), np.linalg.svd(P.T @ Q)[1], atol=1e-14)
    np.testing.assert_allclose(angles, principal_angles(Q, P), atol=1e-14)
    # Energy of a basis inside of another subspace: the mean squared cosine.
    energy = np.sum(np.cos(angles) ** 2) / s
    np.testing.assert_allclose(captured_energy(P, Q), energy, rtol=1e-12, atol=1e-14)


@given(st.integers(0, 2**16), st.floats(-12, -1))
def test_angles_are_recovered_however_small(seed, exponent):
    expected = np.array([10**exponent, 1.0])
    turn = orthonormal(np.random.default_rng(seed), 4, 4)
    P, Q = turn[:, :2], turn[:, :2] * np.cos(expected) + turn[:, 2:] * np.sin(expected)
    np.testing.assert_allclose(principal_angles(P, Q), expected, rtol=1e-13, atol=2e-15)


@given(st.integers(0, 2**16))
def test_captured_energy_is_a_share_and_largest_for_singular_vectors(seed):
    random = np.random.default_rng(seed)
    G, r = random.normal(size=(5, 3)), 2
    U, values, _ = np.linalg.svd(G)
    largest = np.sum(values[:r] ** 2) / np.sum(values**2)
    np.testing.assert_allclose(captured_energy(U[:, :r], G), largest, rtol=1e-13)
    other = orthonormal(random, 5, r)
    energy = float(captured_energy(other, G))
    assert 0 <= energy <= largest * (1 + 1e-13)
    np.testing.assert_allclose(energy, np.linalg.norm(other.T @ G) ** 2 / np.linalg.norm(G) ** 2, rtol=1e-12)
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(captured_energy(other, scale * G), energy, rtol=1e-12)
    whole = captured_energy(orthonormal(random, 5, 5)[None], np.stack([G, 0 * G])[:1])
    assert whole.shape == (1,)
    assert 1 - 1e-14 <= float(whole[0]) <= 1


def test_energy_of_zero_and_tiny_gradients_and_of_bad_traced_bases():
    G = np.array([[1.8, 0.0], [0.0, 1.4]])
    energy = captured_energy(jnp.eye(2, 1, dtype=jnp.float32), jnp.asarray(1e-30 * G, jnp.float32))
    assert energy.dtype == jnp.float32
    np.testing.assert_allclose(energy, 1.8**2 / (1.8**2 + 1.4**2), rtol=1e-6)
    assert captured_energy(np.eye(5, 2), np.zeros((5, 3))) == 0
    energies = jax.jit(jax.vmap(lambda scale: captured_energy(scale * jnp.eye(2), G)))(
        jnp.array([1.0, -1.0, 3.0])
    )
    np.testing.assert_allclose(energies, [1, 1, np.nan], rtol=1e-15)


def test_bad_subspaces_are_refused():
    P, G = np.eye(2, 1), np.eye(2)
    for match, call in {
        "P must have orthonormal": lambda: captured_energy(2 * P, G),
        r"P must have .*, got P\^T P - I up to 0\.0201": lambda: captured_energy(1.01 * P, G),
        "P and G must have shapes": lambda: captured_energy(P[:1], G),
        "Q must have orthonormal": lambda: principal_angles(P, 0 * P),
        "P and Q must have shapes": lambda: principal_angles(P, P[:1]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_decompositions_of_one_function_wait_for_each_other():
    """The second one takes what it decomposes from the first: the compiled program says so."""
    P, Q = jnp.eye(4)[None, :, :2].repeat(3, 0), jnp.eye(4)[None, :, 1:3].repeat(3, 0)
    lines = jax.jit(principal_angles).lower(P, Q).compile().as_text().splitlines()
    made = {line.split("=")[0].strip().removeprefix("ROOT "): line for line in lines if " = " in line}

    def above(name, seen=()):
        inputs = [word for word in re.findall(r"%[\w.\-]+", made.get(name, "")) if word != name]
        return {name}.union(*(above(each, (*seen, name)) for each in inputs if each not in seen))

    calls = [name for name, line in made.items() if "gesdd" in line or "gesvd" in line]
    assert len(calls) == 2
    assert any(first in above(second) - {second} for first in calls for second in calls)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_numbers_have_sizes(dtype):
    """Where the inverse of a size would vanish."""
    huge = 0.3 * float(np.finfo(dtype).max)
    x = jnp.array([1.0, 0.5], dtype)
    np.testing.assert_allclose(norm(huge * x) / np.asarray(huge, dtype), 1.25**0.5, rtol=1e-6)
    A = jnp.diag(jnp.array([2.0, 1.0], dtype))
    np.testing.assert_allclose(stable_rank(0.5 * huge * A), 1.25, rtol=1e-6)
    np.testing.assert_allclose(effective_rank(0.5 * huge * A), effective_rank(A), rtol=1e-6)
    np.testing.assert_allclose(alignment(0.5 * huge * A, A), 1.0, rtol=1e-6)
    np.testing.assert_allclose(captured_energy(jnp.eye(2, 1, dtype=dtype), 0.5 * huge * A), 0.8, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, (), 1.0, (0, None), "0"])
def test_a_norm_is_along_axes(axis):
    with pytest.raises(ValueError, match=r"^axis must be an integer or a tuple of integers, got "):
        _require_axes(axis)


def test_axes_of_a_norm_may_be_any_integers_and_other_axes_empty():
    np.testing.assert_allclose(norm(np.ones((2, 3)), np.int64(1)), [3**0.5] * 2, rtol=1e-15)
    np.testing.assert_allclose(norm(np.ones((2, 3)), (np.int64(0), 1)), 6**0.5, rtol=1e-15)
    assert norm(np.ones((0, 3))).shape == (0,)
    for axis in (0, (0, 1), 2):
        with pytest.raises(
            ValueError, match=r"^x must have axis .*, which is not empty, got shape \(0, 3\)$"
        ):
            norm(np.ones((0, 3)), axis)


def classes_of(random, K=4, per_class=7, d=6):
    labels = random.permutation(np.repeat(np.arange(K), per_class))
    return random.normal(size=(K * per_class, d)), labels, random.normal(size=(K, d)), random.normal(size=K)


def reference_collapse(h, labels, W, b):
    """The measures as they are written, in NumPy."""
    K = len(W)
    means = np.stack([h[labels == k].mean(axis=0) for k in range(K)])
    M = means - means.mean(axis=0)
    within = h - means[labels]
    S_W, S_B = within.T @ within / len(h), M.T @ M / K
    gram, simplex = M @ M.T, (np.eye(K) - 1 / K) / np.sqrt(K - 1)
    nearest = np.argmin(np.linalg.norm(h[:, None] - means, axis=2), axis=1)
    return (
        np.trace(S_W @ np.linalg.pinv(S_B, rcond=1e-6)) / K,
        np.trace(S_W) / np.trace(S_B),
        np.linalg.norm(gram / np.linalg.norm(gram) - simplex),
        np.linalg.norm(W / np.linalg.norm(W) - M / np.linalg.norm(M)),
        np.mean(np.argmax(h @ W.T + b, axis=1) != nearest),
    )


@pytest.mark.parametrize("seed", range(4))
def test_neural_collapse_is_what_is_written(seed):
    random = np.random.default_rng(seed)
    for d in (2, 3, 6):  # fewer directions than classes, as many as they span, more
        h, labels, W, b = classes_of(random, d=d)
        found = neural_collapse(h, labels, W, b)
        assert found == pytest.approx(reference_collapse(h, labels, W, b), rel=1e-10, abs=1e-12)
        few = slice(5, None)  # classes of unequal sizes, whose means count alike
        assert neural_collapse(h[few], labels[few], W, b) == pytest.approx(
            reference_collapse(h[few], labels[few], W, b), rel=1e-10, abs=1e-12
        )
        h[:, 0] *= 1e-5  # class means differ too little there for a direction of theirs
        assert neural_collapse(h, labels, W)[0] == pytest.approx(
            reference_collapse(h, labels, W, b)[0], rel=1e-10
        )
        scaled = neural_collapse(1e-200 * h, labels, W)
        assert scaled == pytest.approx(reference_collapse(h, labels, W, 0), rel=1e-10, abs=1e-12)


def test_neural_collapse_vanishes_where_it_is_complete():
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(4), 5))
    directions = 3 * np.linalg.qr(random.normal(size=(7, 7)))[0][:4]
    simplex = directions - directions.mean(axis=0)
    found = neural_collapse(simplex[labels] + 0.7, labels, 2 * simplex)
    assert found == pytest.approx((0, 0, 0, 0, 0), abs=1e-12)
    # Collapsed features whose means form no simplex, and a classifier of its own.
    means = random.normal(size=(4, 7))
    found = neural_collapse(means[labels], labels, random.normal(size=(4, 7)))
    assert found[:2] == pytest.approx((0, 0), abs=1e-12)
    assert min(found[2:4]) > 0.1


def test_neural_collapse_of_many_networks_and_of_nothing():
    random = np.random.default_rng(1)
    h, labels, W, b = classes_of(random)
    many = jax.vmap(neural_collapse, (0, None, 0, 0))(
        np.stack([h, 2 * h]), labels, np.stack([W, W]), np.stack([b, 2 * b])
    )
    assert np.asarray(many)[:, 0] == pytest.approx(np.asarray(many)[:, 1], abs=1e-12)
    assert np.all(np.isnan(neural_collapse(np.ones((4, 2)), [0, 0, 1, 1], W[:2, :2])))
    with pytest.raises(ValueError, match="labels must name each of the 4 classes, got 3"):
        neural_collapse(h, np.where(labels == 2, 1, labels), W)
    assert np.all(np.isnan(jax.jit(neural_collapse)(h, np.where(labels == 2, 1, labels), W)))
