"""Directions in which a gradient has rounding errors only get no update, and all others are as they were."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.galore import scale_by_galore
from tests.helpers import advance

SHAPES = {"tall": (9, 5), "wide": (8, 12)}
TRUE_RANK, RANK = 2, 4


def run(transform, gradients) -> Any:
    """Updates of all steps, from the start."""
    start = transform.init(jax.tree.map(lambda G: jnp.zeros(G.shape[1:], G.dtype), gradients))
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), advance(transform, start, gradients)[1])


def of_low_rank(dtype, steps, ratio, seed=0):
    """Gradients of one column and row space, whose two singular values change, the second being smaller."""
    rng = np.random.default_rng(seed)
    gradients, spaces = {}, {}
    for name, shape in SHAPES.items():
        U, V = (np.linalg.qr(rng.normal(size=(k, TRUE_RANK)))[0] for k in shape)
        sizes = np.array([1.0, ratio]) * rng.uniform(0.5, 1, size=(steps, TRUE_RANK))
        gradients[name] = jnp.asarray(U * sizes[:, None] @ V.T, dtype)
        spaces[name] = U, V
    return gradients, spaces


def share_outside(update, space):
    """Share of an update outside of a column space."""
    return np.linalg.norm(update - space @ (space.T @ update)) / np.linalg.norm(update)


# By the Gram matrix the vector of the smaller singular value would be off by eps / ratio^2, and what is
# orthogonal to it would have a share of the signal; entries of bfloat16 are off by a 256th.
CASES = [
    ("std", "eigh", "float64", 1e-2, 1e-13, True),
    ("reverse_std", "svd", "float32", 0.1, 1e-5, True),
    ("full", "warm", "float64", 1e-3, 1e-12, True),
    ("std", "randomized", "bfloat16", 1.0, 0.01, True),
    ("std", "eigh", "float64", 1e-2, 1e-13, False),
]


@pytest.mark.parametrize(("projection", "refresh", "dtype", "ratio", "tolerance", "drop_noise"), CASES)
def test_updates_stay_in_the_spaces_of_a_gradient_of_lower_rank(
    projection, refresh, dtype, ratio, tolerance, drop_noise
):
    gradients, spaces = of_low_rank(dtype, 5, ratio)
    transform: Any = scale_by_galore(
        RANK, projection=projection, refresh=refresh, update_gap=3, drop_noise=drop_noise, eps=1e-30
    )
    worst = 0.0
    for name, updates in run(transform, gradients).items():
        m, n = SHAPES[name]
        on_left = (m <= n) == (projection == "std")
        for step in updates:
            if on_left or projection == "full":
                worst = max(worst, share_outside(step, spaces[name][0]))
            if not on_left or projection == "full":
                worst = max(worst, share_outside(step.T, spaces[name][1]))
    # As published, noise moves as far as the gradient does.
    assert worst < tolerance if drop_noise else worst > 0.5


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_a_constant_matrix_moves_along_itself(shape):
    transform: Any = scale_by_galore(2, scale=1.0)
    gradient = jnp.ones(shape, jnp.float32)
    update = transform.update(gradient, transform.init(gradient))[0]
    np.testing.assert_allclose(update, update[0, 0] * np.ones(shape), rtol=1e-5)
    assert float(update[0, 0]) == pytest.approx(min(shape) ** -0.5, rel=1e-5)


def test_with_both_sides_projected_the_first_update_is_along_the_singular_vectors():
    # Between different vectors there is nothing but rounding, here of an ill-conditioned matrix.
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(k, 5)))[0] for k in (5, 8))
    gradient = U * 10.0 ** -np.arange(5) @ V.T
    transform: Any = scale_by_galore(4, projection="full", scale=1.0)
    update = run(transform, gradient[None])[0]
    np.testing.assert_allclose(np.abs(U.T @ update @ V), np.diag([1.0, 1, 1, 1, 0]), atol=1e-4)


def test_a_direction_without_signal_stays_where_it_was_and_moves_when_there_is_one():
    # The first gradient has rank four, the second two: the other two directions are those before, up to what
    # the new ones take of them; and what is along them in later steps moves again.
    rng = np.random.default_rng(0)
    first, later = rng.normal(size=(2, 6, 9))
    low, _ = of_low_rank("float64", 1, 0.5)
    second = np.asarray(low["wide"][0])[:6, :9]
    transform: Any = scale_by_galore(RANK, update_gap=1, moments="carry")
    state = transform.init(first)
    _, before = transform.update(first, state)
    update, after = transform.update(second, before)
    old, new = (np.asarray(s.bases.left) for s in (before, after))
    np.testing.assert_allclose(new.T @ new, np.eye(RANK), atol=1e-13)
    signal = new[:, :TRUE_RANK]
    kept = old[:, TRUE_RANK:] - signal @ (signal.T @ old[:, TRUE_RANK:])
    np.testing.assert_allclose(new[:, TRUE_RANK:] @ (new[:, TRUE_RANK:].T @ kept), kept, atol=1e-12)
    assert np.all(np.sum(new[:, TRUE_RANK:] * kept, axis=0) > 0)
    gap: Any = scale_by_galore(RANK, update_gap=9)
    state = gap.init(second)
    _, state = gap.update(second, state)
    update, _ = gap.update(later, state)
    assert np.linalg.matrix_rank(update) == RANK


@pytest.mark.parametrize(("share", "moves"), [(1e-4, True), (1e-5, True), (1e-7, False)])
def test_what_is_above_the_rounding_of_float32_is_signal(share, moves):
    gradient = jnp.eye(2, 3, dtype=jnp.float32) * jnp.array([[1.0], [share]], jnp.float32)
    transform: Any = scale_by_galore(2, scale=1.0, eps=1e-30)
    update = transform.update(gradient, transform.init(gradient))[0]
    np.testing.assert_allclose(update, [[1, 0, 0], [0, moves, 0]], atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_what_is_noise_does_not_depend_on_the_size_of_the_gradient(size):
    gradients, _ = of_low_rank("float32", 2, 0.1)
    scaled = jax.tree.map(lambda G: G * jnp.float32(size), gradients)
    transform: Any = scale_by_galore(RANK, scale=1.0, inner=optax.identity())
    updates, of_scaled = run(transform, gradients), run(transform, scaled)
    for name, G in gradients.items():
        np.testing.assert_allclose(updates[name], G, atol=1e-6)
        np.testing.assert_allclose(of_scaled[name] / size, updates[name], atol=1e-6)


def test_gradients_of_full_rank_are_treated_as_without_the_option():
    rng = np.random.default_rng(0)
    gradients = {name: rng.normal(size=(4, *shape)) for name, shape in SHAPES.items()}
    kept, dropped = (
        run(scale_by_galore(RANK, update_gap=2, drop_noise=drop), gradients) for drop in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, kept, dropped)


def test_huge_gradients_have_bases():
    """The inverse of the largest number would vanish."""
    gradient = np.float32(3e37) * np.asarray(np.random.default_rng(0).normal(size=(6, 4)), np.float32)
    transform: Any = scale_by_galore(2, inner=optax.identity(), scale=1.0)
    update = jax.jit(transform.update)(gradient, transform.init(gradient))[0]
    U, s, Vt = np.linalg.svd(gradient.astype(float), full_matrices=False)
    best = (U[:, :2] * s[:2]) @ Vt[:2]
    np.testing.assert_allclose(np.asarray(update, float) / s[0], best / s[0], atol=1e-5)
