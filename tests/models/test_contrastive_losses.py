"""Contrastive losses: against their table by loops, and their gradients against that of one energy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dynamics.contrastive import contrastive_energy, min_player, pairwise_importance
from models.losses import alpha_cl_loss, contrastive_loss
from models.self_supervised import infonce, soft_triplet
from tests.helpers import compiled

LOSSES = {
    "infonce": {"temperature": 0.3, "epsilon": 0.7},
    "mine": {},
    "triplet": {"epsilon": 0.3},
    "soft_triplet": {"temperature": 0.3, "epsilon": 0.2},
    "n_plus_1_tuplet": {},
    "lifted": {"epsilon": 0.4},
    "coria": {"scale": 1.5},
    "ji": {},
}
# phi and psi as the table has them, for numbers that do not overflow.
TABLE = {
    "infonce": (lambda x, t, e: t * np.log(e + x), lambda u, t, e: np.exp(u / t)),
    "mine": (np.log, np.exp),
    "triplet": (lambda x, e: x, lambda u, e: np.maximum(u + e, 0)),
    "soft_triplet": (lambda x, t, e: t * np.log(1 + x), lambda u, t, e: np.exp(u / t + e)),
    "n_plus_1_tuplet": (np.log1p, np.exp),
    "lifted": (lambda x, e: np.maximum(np.log(x), 0) ** 2, lambda u, e: np.exp(u + e)),
    "coria": (lambda x, c: x, lambda u, c: 1 / (1 + np.exp(-c * u))),
    "ji": (lambda x: x, lambda u: u),
}


def views(seed, n=6, o=3, dtype: Any = np.float64):
    random = np.random.default_rng(seed)
    f = random.normal(size=(n, o))
    return f.astype(dtype), (f + 0.4 * random.normal(size=(n, o))).astype(dtype)


def reference_loss(name, f, f_aug, both=False):
    """The table by loops over anchors and their negatives."""
    phi, psi = TABLE[name]
    hyper = LOSSES[name].values()
    anchors, others = (np.concatenate([f, f_aug]), np.concatenate([f_aug, f])) if both else (f, f_aug)
    total = 0.0
    for i, (anchor, other) in enumerate(zip(anchors, others, strict=True)):
        negatives = [x for j, x in enumerate(anchors) if j % len(f) != i % len(f)]
        u = [np.sum((anchor - other) ** 2) / 2 - np.sum((anchor - x) ** 2) / 2 for x in negatives]
        total += phi(sum(psi(value, *hyper) for value in u), *hyper)
    return total


@pytest.mark.parametrize("negatives", ["view", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_table(name, negatives):
    f, f_aug = views(0)
    found = contrastive_loss(name, f, f_aug, negatives=negatives, **LOSSES[name])
    assert found == pytest.approx(reference_loss(name, f, f_aug, negatives == "both"), rel=1e-12)


DEFAULTS: dict[str, dict[str, Any]] = {
    "infonce": {"temperature": 0.5, "epsilon": 1.0},
    "triplet": {"epsilon": 1.0},
    "soft_triplet": {"temperature": 0.5, "epsilon": 0.0},
    "lifted": {"epsilon": 1.0},
    "coria": {"scale": 1.0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_losses_have_the_defaults_that_are_written(name):
    f, f_aug = views(0)
    assert contrastive_loss(name, f, f_aug) == contrastive_loss(name, f, f_aug, **DEFAULTS[name])
    for key, value in DEFAULTS[name].items():
        other: dict[str, Any] = {key: value + 0.1}
        assert contrastive_loss(name, f, f_aug) != contrastive_loss(name, f, f_aug, **other)


@partial(compiled, static_argnames=("name", "negatives"))
def gradient_and_importance(name, negatives, f, f_aug, hyper):
    gradient = jax.grad(lambda *f: contrastive_loss(name, *f, negatives=negatives, **hyper), (0, 1))
    return gradient(f, f_aug), pairwise_importance(name, f, f_aug, negatives=negatives, **hyper)


def slopes_of_the_energy(alpha, f, f_aug):
    """Those of sum_ij alpha_ij (|f_i - f_j|^2 - |f_i - f'_i|^2) in f and in f', from differences."""
    between = np.einsum("ij,ijk->ik", alpha + alpha.T, f[:, None] - f[None])
    within = alpha.sum(axis=1)[:, None] * (f - f_aug)
    return 2 * (between - within), 2 * within


@given(
    name=st.sampled_from(sorted(LOSSES)),
    both=st.booleans(),
    n=st.integers(2, 64),
    width=st.integers(1, 8),
    scale=st.floats(0.05, 5),
    temperature=st.floats(0.01, 2),
    distinct=st.integers(2, 64),
    seed=st.integers(0, 10**6),
)
@example("infonce", True, 64, 3, 1.0, 0.01, 64, 0)
@example("infonce", False, 2, 1, 1.0, 2.0, 64, 0)
@example("soft_triplet", False, 8, 2, 5.0, 0.01, 3, 1)
def test_a_loss_has_the_gradient_of_minus_half_its_energy(
    name, both, n, width, scale, temperature, distinct, seed
):
    """Samples are duplicates where fewer of them are distinct than there are."""
    distinct = min(distinct, n)
    f, f_aug = (scale * view[np.arange(n) % distinct] for view in views(seed, distinct, width))
    anchors, others = (np.concatenate([f, f_aug]), np.concatenate([f_aug, f])) if both else (f, f_aug)
    hyper = LOSSES[name] | ({"temperature": temperature} if "temperature" in LOSSES[name] else {})
    if name == "triplet":  # its kinks have no gradient
        near = np.sum((anchors[:, None] - anchors[None]) ** 2, axis=-1) / 2
        u = np.sum((anchors - others) ** 2, axis=1)[:, None] / 2 - near
        assume(np.min(np.abs(u + hyper["epsilon"])) > 1e-6)
    gradient, alpha = gradient_and_importance(name, "both" if both else "view", f, f_aug, hyper)
    of_first, of_second = slopes_of_the_energy(np.asarray(alpha), anchors, others)
    if both:
        of_first, of_second = of_first[:n] + of_second[n:], of_second[:n] + of_first[n:]
    size = max(np.linalg.norm(part) for part in gradient)
    for ours, energy in zip(gradient, (of_first, of_second), strict=True):
        assert np.all(np.isfinite(ours))
        np.testing.assert_allclose(ours, -energy / 2, atol=1e-12 * size, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_features_have_finite_losses_and_gradients(name):
    f = np.ones((4, 2), np.float32)
    f[2:] = 7
    value, gradient = jax.value_and_grad(lambda f: contrastive_loss(name, f, f, **LOSSES[name]))(f)
    assert value.dtype == np.float32
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_infonce_has_slopes_in_epsilon_where_that_is_zero(temperature):
    f, f_aug = views(6)

    @jax.jit
    def values(epsilon):
        hyper = {"temperature": temperature, "epsilon": epsilon}
        alpha = pairwise_importance("infonce", f, f_aug, **hyper)
        return contrastive_loss("infonce", f, f_aug, **hyper), jnp.sum(alpha**2)

    # One-sided differences of order three, as none is below zero; steps are small beside every xi.
    u = np.sum((f - f_aug) ** 2, axis=1)[:, None] / 2 - np.sum((f[:, None] - f[None]) ** 2, axis=-1) / 2
    xi = np.sum(np.exp(u / temperature) * (1 - np.eye(len(f))), axis=1)
    h = 1e-4 * np.min(xi)
    near = np.array([values(step * h) for step in range(4)])
    differences = np.array([-11, 18, -9, 2]) @ near / (6 * h)
    slopes = jax.jit(jax.jacfwd(values))(0.0)
    np.testing.assert_allclose(slopes, differences, rtol=1e-7)
    assert slopes[0] == pytest.approx(temperature * np.sum(1 / xi), rel=1e-12)
    # From above they tend to the same, and lose no digits on the way.
    np.testing.assert_allclose(jax.jit(jax.jacfwd(values))(1e-13 * np.min(xi)), slopes, rtol=1e-11)
    curvature = jax.jit(jax.hessian(lambda e: values(e)[0]))(0.0)
    assert curvature == pytest.approx(-temperature * np.sum(1 / xi**2), rel=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_negatives_leave_values_and_slopes_in_epsilon_finite(dtype):
    f = np.array([[0.0], [100.0]], dtype)

    def values(epsilon):
        hyper = {"temperature": 0.01, "epsilon": epsilon}
        alpha = pairwise_importance("infonce", f, f, **hyper)
        return contrastive_loss("infonce", f, f, **hyper), jnp.sum(alpha)

    np.testing.assert_allclose(values(0.0), [-10_000, 2], rtol=1e-6)
    np.testing.assert_allclose(values(1.0), [0, 0], atol=1e-30)
    assert np.all(np.isfinite(jax.jacfwd(values)(0.0)))


@pytest.mark.parametrize("name", ["ji", "n_plus_1_tuplet", "infonce"])
def test_curvature_is_that_of_the_squares_also_where_features_are_equal(name):
    f = np.zeros((3, 1))
    # There u and its slopes are zero, so that the loss has the curvature of sum_ij alpha_ij u_ij.
    alpha = np.asarray(pairwise_importance(name, f, f))
    found = jax.hessian(lambda f: contrastive_loss(name, f, f))(f)[:, 0, :, 0]
    both = alpha + alpha.T
    np.testing.assert_allclose(found, both - np.diag(both.sum(axis=1)), atol=1e-14)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_cold_losses_are_safe_in_32_bit(epsilon):
    f, f_aug = views(7, n=8, dtype=np.float32)

    def loss(f, f_aug):
        return contrastive_loss("infonce", f, f_aug, temperature=0.01, epsilon=epsilon)

    assert loss(f, f_aug) == pytest.approx(float(loss(f.astype(float), f_aug.astype(float))), rel=1e-5)
    assert np.all(np.isfinite(jax.grad(loss)(f, f_aug)))


def test_the_surrogate_is_minus_half_the_energy_and_may_stop_gradients():
    f, f_aug = views(8)

    def surrogate(f, stop):
        alpha = min_player("entropy", f, f_aug, temperature=0.3)
        return alpha_cl_loss(alpha, f, f_aug, stop_gradient=stop)

    held = min_player("entropy", f, f_aug, temperature=0.3)
    wanted = -contrastive_energy(held, f, f_aug) / 2
    gradient = jax.grad(lambda f: -contrastive_energy(held, f, f_aug) / 2)(f)
    assert surrogate(f, True) == pytest.approx(float(wanted), rel=1e-12)
    np.testing.assert_allclose(jax.grad(surrogate)(f, True), gradient, rtol=1e-12)
    assert np.max(np.abs(jax.grad(surrogate)(f, False) - gradient)) > 0.01
    loss = jax.grad(lambda f: contrastive_loss("infonce", f, f_aug, temperature=0.3, epsilon=0.0))(f)
    np.testing.assert_allclose(gradient, loss, rtol=1e-10, atol=1e-13)


def test_the_surrogate_of_both_views_has_the_gradient_of_their_loss():
    f, f_aug = views(8, n=4)
    alpha = pairwise_importance("infonce", f, f_aug, negatives="both", temperature=0.3)

    def surrogate(f, f_aug):
        return alpha_cl_loss(alpha, jnp.concatenate([f, f_aug]), jnp.concatenate([f_aug, f]))

    def loss(f, f_aug):
        return contrastive_loss("infonce", f, f_aug, negatives="both", temperature=0.3)

    found, wanted = (jax.grad(function, (0, 1))(f, f_aug) for function in (surrogate, loss))
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("value", ["no", None, 0])
def test_whether_gradients_stop_is_a_truth_value(value):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="stop_gradient must be True or False"):
            alpha_cl_loss(np.ones((2, 2)), [[1.0], [2.0]], [[1.0], [2.0]], stop_gradient=value)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_losses_of_the_same_name_differ_as_is_written():
    f = views(3, n=5)[0]
    ours = contrastive_loss("infonce", f, f, temperature=1.0, epsilon=0.0)
    assert ours == pytest.approx(5 * (float(infonce(f, f)) + np.log(4)), rel=1e-13)
    assert contrastive_loss("soft_triplet", f[:2], f[:2], temperature=1.0) == pytest.approx(
        2 * float(soft_triplet(f[:2], f[:2])), rel=1e-13
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: contrastive_loss("infonce", f, f, temperature=1e-320),
            "temperature must be at least 2.23e-308",
        ),
        (lambda f: contrastive_loss("nce", f, f), "name must be one of .*'soft_triplet'"),
        (lambda f: contrastive_loss("infonce", f[:1], f[:1]), "f must hold at least 2 samples"),
        (lambda f: contrastive_loss("infonce", f, f[:2]), r"must have one shape \(N, o\)"),
        (
            lambda f: contrastive_loss("infonce", f, f, temperature=0.0),
            "temperature must be a positive number",
        ),
        (
            lambda f: contrastive_loss("mine", f, f, temperature=1.0),
            "temperature is no hyperparameter of mine",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(6.0).reshape(3, 2))
