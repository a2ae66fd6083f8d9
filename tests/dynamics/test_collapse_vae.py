"""The flow of the linear variational autoencoder, and its minimum with a fixed covariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.collapse import (
    Moments,
    VaeWeights,
    linear_vae_flow,
    linear_vae_loss,
    moments,
    vae_minimum,
    vae_modes,
)
from dynamics.collapse.vae import _flow
from tests.helpers import lowest

DEC, ENC, BETA = 0.8, 1.3, 0.2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)) @ np.array([[1.2, 0.5, 0.0], [0.0, 1.0, -0.4], [0.3, 0.0, 0.7]])
X -= X.mean(axis=0)
Y = X @ np.array([[1.0, -0.6], [0.5, 0.9], [0.2, 0.4]]) + 0.3 * RNG.normal(size=(40, 2))
Y -= Y.mean(axis=0)
DATA = moments(X, Y)
VALUES, VECTORS = np.linalg.eigh(DATA.A)
ROOT = VECTORS @ np.diag(VALUES**0.5) @ VECTORS.T
Z = np.asarray(DATA.c).T @ np.linalg.inv(ROOT)


def start(*shape):
    U, W = RNG.normal(size=(2, 2)), RNG.normal(size=(3, 2))
    return VaeWeights(U, W, 0.3 * RNG.normal(size=shape))


def test_field_is_minus_the_gradient_of_the_loss():
    """Of the loss in whitened coordinates, and as the equations that the docstring has."""
    U, W, logs = at = start(2)
    args = (DATA, jnp.asarray(DATA.c), BETA, DEC, ENC, 1.0)
    field = _flow(0.0, jax.tree.map(jnp.asarray, at), args)
    want = jax.grad(lambda w: linear_vae_loss(w[0], ROOT @ w[1], jnp.exp(w[2] / 2), Z, BETA, DEC, ENC))(
        jax.tree.map(jnp.asarray, at)
    )
    for part, other in zip(field, want, strict=True):
        np.testing.assert_allclose(part, -other, atol=1e-12)
    S, V = np.diag(np.exp(logs)), ROOT @ W
    prior = BETA * (DEC / ENC) ** 2 * np.eye(2)
    np.testing.assert_allclose(field.U, -((U @ V.T - Z) @ V + U @ S) / DEC**2, atol=1e-12)
    np.testing.assert_allclose(field.W, -(DATA.A @ W @ (U.T @ U + prior) - DATA.c @ U) / DEC**2, atol=1e-12)
    norms = np.sum(U**2, axis=0)
    np.testing.assert_allclose(
        field.log_variance,
        -np.exp(logs) * norms / (2 * DEC**2) - BETA / 2 * (np.exp(logs) / ENC**2 - 1),
        atol=1e-12,
    )


@pytest.mark.parametrize("covariance", ["diagonal", "fixed", "full"])
def test_flow_ends_at_the_minimum(covariance):
    first = start(*((2, 2) if covariance == "full" else (2,)))
    if covariance == "fixed":
        first = first._replace(log_variance=np.full(2, 2 * np.log(ENC)))
    path = linear_vae_flow(first, DATA, BETA, DEC, ENC, [0.0, 2000.0], fixed=covariance == "fixed")
    U, W, logs = (np.asarray(part[-1]) for part in path.ys)
    least = vae_minimum(Z, 2, BETA, DEC, ENC, covariance=covariance)
    np.testing.assert_allclose(np.linalg.svd(U, compute_uv=False), least.lam, atol=1e-7)
    np.testing.assert_allclose(np.linalg.svd(ROOT @ W, compute_uv=False), least.theta, atol=1e-7)
    if covariance == "full":
        L = np.tril(logs, -1) + np.diag(np.exp(np.diag(logs) / 2))
        variances = np.linalg.eigvalsh(L @ L.T)
        assert np.abs(logs[1, 0]) > 0.01
    else:
        variances = np.sort(np.exp(logs))
    np.testing.assert_allclose(variances, np.sort(least.sigma2), atol=1e-7)


def of_fixed(params, args):
    U, V = params
    Z, beta = args
    return linear_vae_loss(U, V, jnp.full(2, ENC), Z, beta, DEC, ENC)


@pytest.mark.parametrize("beta", [0.3, 2.0, 9.0])
def test_fixed_covariance_has_the_same_thresholds_and_other_sizes(beta):
    least, learned = (vae_minimum(Z, 2, beta, DEC, ENC, covariance=kind) for kind in ("fixed", "diagonal"))
    found = lowest(of_fixed, [(2, 2), (3, 2)], (jnp.asarray(Z), jnp.array(beta)))
    assert least.loss - 1e-12 <= found <= least.loss + 1e-6
    F, _, G = np.linalg.svd(Z, full_matrices=False)
    U, V = F * np.asarray(least.lam), G.T * np.asarray(least.theta)
    assert float(of_fixed((U, V), (Z, beta))) == pytest.approx(float(least.loss), abs=1e-13)
    assert ((least.lam > 0) == (learned.lam > 0)).all()
    alive = np.asarray(least.lam > 0)
    assert np.all(np.abs(least.lam - learned.lam)[alive] > 1e-3)
    assert least.loss >= learned.loss - 1e-14


def test_limits_of_the_fixed_covariance():
    free = vae_minimum(Z, 3, 0.0, DEC, ENC, covariance="fixed")
    assert (free.lam.tolist(), free.theta.tolist()) == ([0.0, 0.0, 0.0], [np.inf, np.inf, 0.0])
    assert float(free.loss) == pytest.approx(0, abs=1e-14)
    gradient = jax.grad(lambda beta: vae_minimum(Z, 3, beta, DEC, ENC, covariance="fixed").loss)
    zeta = vae_modes(X, Y)
    # By the envelope theorem the slope in beta is the divergence from the prior.
    least = vae_minimum(Z, 2, 0.5, DEC, ENC, covariance="fixed")
    assert float(gradient(0.5)) == pytest.approx(float(jnp.sum(least.theta**2)) / (2 * ENC**2))
    assert np.isfinite(gradient(float(zeta[0] / DEC) ** 2 * 2))
    with pytest.raises(ValueError, match="covariance must be one of"):
        vae_minimum(Z, 2, 0.5, DEC, ENC, covariance="isotropic")


def test_repeated_modes_and_constant_inputs_in_the_flow():
    """Equal modes end equal, more latents than modes leave the rest at the prior, dead inputs do not move."""
    A = np.diag([4.0, 4.0, 0.0])
    first = VaeWeights(RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4)), np.zeros(4))
    path = linear_vae_flow(first, Moments(A, A, 8.0), 1.0, 1.0, 1.0, [0.0, 200.0])
    np.testing.assert_allclose(np.linalg.svd(path.ys.U[-1], compute_uv=False), [3**0.5, 3**0.5, 0], atol=1e-6)
    np.testing.assert_allclose(path.ys.W[-1][2], first.W[2], atol=1e-12)
    # Which of the latents stay alive, the start decides.
    np.testing.assert_allclose(np.sort(np.linalg.norm(path.ys.U[-1], axis=0))[:2], 0, atol=1e-6)


@pytest.mark.parametrize("scale", [np.zeros(2), np.zeros((2, 2)), np.array([0.5, 0.0])])
def test_without_a_prior_latents_need_no_noise(scale):
    """The loss and its gradient are those of the map alone; with a prior such a loss is infinite."""
    first = start(2)
    V = ROOT @ first.W
    loss, gradient = jax.value_and_grad(linear_vae_loss, 2)(first.U, V, scale, Z, 0.0, DEC, ENC)
    noise = np.sum((first.U * scale) ** 2) if scale.ndim == 1 else 0
    assert float(loss) == pytest.approx((np.sum((first.U @ V.T - Z) ** 2) + noise) / (2 * DEC**2))
    assert np.all(np.isfinite(gradient))
    assert float(linear_vae_loss(first.U, V, scale, Z, 0.1, DEC, ENC)) == np.inf


@pytest.mark.parametrize("unit", [1.0, 1e6, 1e-6])
def test_modes_do_not_depend_on_the_units_of_inputs(unit):
    x = np.random.default_rng(0).normal(size=(400, 2))
    y = x[:, 1:] + 0.1 * np.random.default_rng(1).normal(size=(400, 1))
    scaled = vae_modes(x * np.array([unit, 1.0]), y)
    np.testing.assert_allclose(scaled, vae_modes(x, y), rtol=1e-9)
