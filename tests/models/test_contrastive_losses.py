"""Contrastive losses: against their table by loops, and their gradients against that of one energy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.contrastive import contrastive_energy, min_player, pairwise_importance
from models.losses import alpha_cl_loss, contrastive_loss

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


@given(
    name=st.sampled_from(sorted(LOSSES)),
    n=st.sampled_from([2, 3, 64]),
    temperature=st.sampled_from([0.01, 0.1, 2.0]),
    seed=st.integers(0, 10**6),
    both=st.booleans(),
)
def test_a_loss_has_the_gradient_of_minus_half_its_energy(name, n, temperature, seed, both):
    f, f_aug = views(seed, n)
    hyper = {**LOSSES[name], **({"temperature": temperature} if "temperature" in LOSSES[name] else {})}
    negatives = "both" if both else "view"
    gradient = jax.grad(lambda *f: contrastive_loss(name, *f, negatives=negatives, **hyper), (0, 1))(f, f_aug)
    alpha = pairwise_importance(name, f, f_aug, negatives=negatives, **hyper)

    def energy(f, f_aug):
        if both:
            f, f_aug = jnp.concatenate([f, f_aug]), jnp.concatenate([f_aug, f])
        return contrastive_energy(alpha, f, f_aug)

    other = jax.grad(energy, (0, 1))(f, f_aug)
    scale = max(np.linalg.norm(part) for part in gradient)
    for ours, theirs in zip(gradient, other, strict=True):
        assert np.all(np.isfinite(ours))
        np.testing.assert_allclose(ours, -theirs / 2, atol=1e-12 * scale, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_features_have_finite_losses_and_gradients(name):
    f = np.ones((4, 2), np.float32)
    f[2:] = 7
    value, gradient = jax.value_and_grad(lambda f: contrastive_loss(name, f, f, **LOSSES[name]))(f)
    assert value.dtype == np.float32
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
