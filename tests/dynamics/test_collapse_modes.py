"""Modes of linear variational autoencoders and of contrastive encoders, against optimizers and sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import fminbound

from dynamics.collapse import (
    hessian_index,
    infonce_encoder,
    infonce_loss,
    infonce_minimum,
    landau_loss,
    landau_minimum,
    linear_vae_loss,
    rescaled_curvature,
    rescaled_loss,
    taylor_coefficients,
    vae_minimum,
    vae_modes,
)
from tests.helpers import lowest

Z = jnp.array([[1.2, 0.3, -0.5], [0.1, 0.9, 0.4]])
DEC, ENC = 0.8, 1.3


def of_vae(params, beta):
    U, V, log_scale = params
    return linear_vae_loss(U, V, jnp.exp(log_scale), Z, beta, DEC, ENC)


@pytest.mark.parametrize(("latents", "beta"), [(2, 0.5), (2, 1.8), (1, 0.5), (3, 0.2), (2, 9.0)])
def test_vae_minimum_is_the_best_of_64_starts(latents, beta):
    least = vae_minimum(Z, latents, beta, DEC, ENC)
    found = lowest(of_vae, [(2, latents), (3, latents), (latents,)], jnp.array(beta))
    assert least.loss - 1e-12 <= found <= least.loss + 1e-6
    # The weights that it stands for reach the loss.
    F, _, G = np.linalg.svd(Z, full_matrices=False)
    pad = ((0, 0), (0, max(latents - 2, 0)))
    U = np.pad(F, pad)[:, :latents] * np.asarray(least.lam)
    V = np.pad(G.T, pad)[:, :latents] * np.asarray(least.theta)
    assert float(linear_vae_loss(U, V, np.sqrt(least.sigma2), Z, beta, DEC, ENC)) == pytest.approx(
        float(least.loss), abs=1e-13
    )


def test_a_full_covariance_has_the_same_least_loss_from_64_starts():
    def loss(params, beta):
        U, V, raw = params
        scale = jnp.tril(raw, -1) + jnp.diag(jnp.exp(jnp.diag(raw)))
        return linear_vae_loss(U, V, scale, Z, beta, DEC, ENC)

    least = vae_minimum(Z, 2, 0.5, DEC, ENC, covariance="full").loss
    assert least - 1e-12 <= lowest(loss, [(2, 2), (3, 2), (2, 2)], jnp.array(0.5)) <= least + 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_modes_of_a_singular_signal_are_no_rounding(dtype):
    rng = np.random.default_rng(0)
    one = jnp.asarray(np.outer(rng.normal(size=4), rng.normal(size=5)), dtype)  # of rank one
    for covariance, theta in ("diagonal", 1.5), ("fixed", np.inf):
        least = vae_minimum(one, 3, 0.0, 1.0, 1.5, covariance=covariance)
        assert least.theta.tolist() == [theta, 0.0, 0.0]
        assert least.lam.tolist()[1:] == [0.0, 0.0]
        assert least.sigma2.tolist()[1:] == [2.25, 2.25]
    assert vae_minimum(one, 3, 0.0, 1.0, 1.5).sigma2[0] == 0
    # A small mode that is more than rounding is one.
    share = 0.1 * jnp.finfo(dtype).eps ** 0.5
    small = vae_minimum(jnp.diag(jnp.array([1.0, share], dtype)), 2, 0.0, 1.0, 1.5)
    assert small.theta.tolist() == [1.5, 1.5]
    assert small.sigma2.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("unit", [1e-23, 1e20])
def test_units_of_the_signal_do_not_matter(unit):
    with jax.numpy_dtype_promotion("standard"):
        for covariance in ("diagonal", "fixed"):
            plain = vae_minimum(jnp.eye(2, dtype=jnp.float32), 2, 0.25, 1.0, 1.0, covariance=covariance)
            scaled = vae_minimum(
                unit * jnp.eye(2, dtype=jnp.float32), 2, 0.25, unit, 1.0, covariance=covariance
            )
            assert scaled.lam / unit == pytest.approx(np.asarray(plain.lam), rel=1e-6)
            assert scaled.theta == pytest.approx(np.asarray(plain.theta), rel=1e-6)
            assert scaled.loss == pytest.approx(float(plain.loss), rel=1e-6)
        x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        assert vae_modes(np.float32(unit) * x) / unit == pytest.approx(np.asarray(vae_modes(x)), rel=1e-5)


@pytest.mark.parametrize("own", [True, False], ids=["autoencoder", "targets"])
def test_modes_have_derivatives_beside_constant_columns(own):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 5)), random.normal(size=(12, 3))
    x[:, 1:3] = 7.0
    step = random.normal(size=x.shape) * np.array([1.0, 0, 0, 1, 1])

    def total(x):
        return jnp.sum(jnp.arange(1.0, 4.0) * vae_modes(x, None if own else y)[:3])

    slope = jnp.vdot(jax.grad(total)(x), step)
    around = (total(x + 1e-6 * step) - total(x - 1e-6 * step)) / 2e-6
    assert slope == pytest.approx(float(around), rel=1e-7)


@pytest.mark.parametrize("constant", [1e5 / 3, 0.1])  # whose means are others, in 32-bit
def test_constant_columns_have_no_mode_in_32_bit(constant):
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32) * np.float32(0.01)
    x[:, 2] = constant
    modes = vae_modes(x)
    assert modes[3] == 0
    assert modes[:3] == pytest.approx(np.asarray(vae_modes(np.delete(x, 2, axis=1))), rel=1e-5)


def test_vae_loss_is_the_mean_over_latents_and_data():
    rng = np.random.default_rng(0)
    U, V, scale = rng.normal(size=(2, 2)), rng.normal(size=(3, 2)), rng.uniform(0.3, 1, size=2)
    n = 400_000
    # In whitened inputs A is the identity; targets are a linear map of them, so that nothing is left over.
    x, noise = rng.normal(size=(n, 3)), rng.normal(size=(n, 2))
    mean = x @ V
    error = np.sum(((mean + noise * scale) @ U.T - x @ np.asarray(Z).T) ** 2, axis=1) / (2 * DEC**2)
    divergence = np.sum(mean**2 + scale**2, axis=1) / ENC**2 - 2 - np.sum(np.log(scale**2 / ENC**2))
    drawn = error + 0.7 * divergence / 2
    exact = float(linear_vae_loss(U, V, scale, Z, 0.7, DEC, ENC))
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / n**0.5


def test_rotated_latents_cost_hadamards_gap_with_variances_of_their_own():
    beta, angle = 0.5, 0.6
    least = vae_minimum(Z, 2, beta, DEC, ENC)
    F, _, G = np.linalg.svd(Z, full_matrices=False)
    P = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    U, V = (factor * np.asarray(size) @ P for factor, size in ((F, least.lam), (G.T, least.theta)))
    M = np.eye(2) + ENC**2 / (beta * DEC**2) * U.T @ U
    variances = ENC**2 / np.diag(M)  # the best for this decoder
    excess = float(linear_vae_loss(U, V, np.sqrt(variances), Z, beta, DEC, ENC) - least.loss)
    gap = beta / 2 * (np.sum(np.log(np.diag(M))) - np.linalg.slogdet(M)[1])
    assert gap > 0.01
    assert excess == pytest.approx(gap, abs=1e-13)
    # With a full covariance, rotated as well, nothing is lost.
    full = P.T @ np.diag(np.sqrt(least.sigma2))
    assert float(linear_vae_loss(U, V, full, Z, beta, DEC, ENC)) == pytest.approx(
        float(least.loss), abs=1e-13
    )


def test_modes_of_an_autoencoder_collapse_one_by_one():
    zeta = np.linalg.svd(Z, compute_uv=False)
    threshold = zeta**2 / DEC**2
    beta = jnp.asarray(np.concatenate([threshold * 0.999, threshold * 1.001]))
    lam = jax.vmap(lambda beta: vae_minimum(Z, 2, beta, DEC, ENC).lam)(beta)
    assert np.sum(lam > 0, axis=1).tolist() == [1, 2, 0, 1]
    # The second derivative of the least loss jumps by 1 / (2 beta) at each threshold.
    for critical in threshold:
        second = [
            float(
                jax.grad(jax.grad(lambda beta: vae_minimum(Z, 2, beta, DEC, ENC).loss))(
                    critical * (1 + s * 1e-6)
                )
            )
            for s in (-1, 1)
        ]
        assert second[1] - second[0] == pytest.approx(1 / (2 * critical), rel=1e-4)


def test_vae_limits():
    zeta = np.linalg.svd(Z, compute_uv=False)
    free = vae_minimum(Z, 3, 0.0, DEC, ENC)
    np.testing.assert_allclose(free.lam, [*(zeta / ENC), 0], rtol=1e-14)
    np.testing.assert_allclose(free.theta, [ENC, ENC, 0], rtol=1e-14)
    np.testing.assert_allclose(free.sigma2, [0, 0, ENC**2])
    assert float(free.loss) == pytest.approx(0, abs=1e-14)
    # Equal modes go together.
    equal = vae_minimum(2 * jnp.eye(3), 2, 1.0, 1.0, 1.0)
    assert equal.lam[0] == equal.lam[1] > 0
    assert np.all(np.isfinite(jax.grad(lambda Z: vae_minimum(Z, 2, 1.0, 1.0, 1.0).loss)(2 * jnp.eye(3))))
    lanes = jax.vmap(lambda beta: vae_minimum(Z, 2, beta, DEC, ENC).loss)(jnp.array([0.5, -0.5, jnp.nan]))
    assert np.isfinite(lanes).tolist() == [True, False, False]


def test_vae_modes_are_those_of_whitened_data():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + 1.0
    y = x @ rng.normal(size=(3, 2)) + rng.normal(size=(50, 2))
    A = np.cov(x.T, bias=True)
    values, vectors = np.linalg.eigh(A)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    cross = (y - y.mean(0)).T @ (x - x.mean(0)) / 50
    np.testing.assert_allclose(vae_modes(x, y), np.linalg.svd(cross @ root, compute_uv=False), rtol=1e-12)
    np.testing.assert_allclose(vae_modes(x) ** 2, values[::-1], rtol=1e-12)
    # A constant input changes nothing, fewer examples than inputs leave modes at zero.
    constant = np.concatenate([x, np.full((50, 1), 7.0)], axis=1)
    np.testing.assert_allclose(vae_modes(constant, y), vae_modes(x, y), rtol=1e-12)
    few = vae_modes(x[:2])
    assert few.shape == (3,)
    assert np.sum(few > 1e-12) == 1


A = jnp.diag(jnp.array([1.5, 1.0, 0.6, 0.3]))


def of_infonce(params, args):
    return infonce_loss(params[0], *args)


@pytest.mark.parametrize("attraction", [1.0, 2.0, 5.0])
def test_infonce_minimum_is_the_best_of_64_starts(attraction):
    C = 0.2 * jnp.eye(4)
    eigenvalues = infonce_minimum(jnp.diag(A), 0.2, attraction)
    loss = float(infonce_loss(jnp.diag(jnp.sqrt(eigenvalues)), A, C, attraction))
    found = lowest(of_infonce, [(4, 4)], (A, C, jnp.array(attraction)))
    assert loss - 1e-12 <= found <= loss + 1e-6
    assert np.sum(eigenvalues > 0) == np.sum(np.diag(A) > (attraction - 1) * 0.2)


def test_infonce_loss_is_that_of_sampled_augmentations():
    rng = np.random.default_rng(1)
    W = np.array([[0.8, 0.1], [-0.3, 0.6]])
    a, c, n = np.array([1.0, 0.5]), np.array([0.3, 0.2]), 4000
    x, others = rng.normal(size=(n, 2)) * np.sqrt(a), rng.normal(size=(n, 2)) * np.sqrt(a + c)
    one, two = (x + rng.normal(size=(n, 2)) * np.sqrt(c) for _ in range(2))
    f, g, h = (points @ W.T for points in (one, two, others))
    attracted = np.sum((f - g) ** 2, axis=1) / 2
    distances = np.sum(f**2, axis=1)[:, None] + np.sum(h**2, axis=1) - 2 * f @ h.T
    drawn = 1.5 * attracted + np.log(np.mean(np.exp(-distances / 2), axis=1))
    exact = float(infonce_loss(W, np.diag(a), np.diag(c), 1.5))
    assert abs(drawn.mean() - exact) < 5 * drawn.std() / n**0.5


@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.floats(0.01, 10))
def test_a_mode_of_infonce_is_at_its_minimum(a, c, attraction):
    (eigenvalue,) = infonce_minimum([a], c, attraction)
    rho = attraction * c / (a + c)

    def loss(log_t):  # of t = lambda (a + c)
        t = np.exp(log_t)
        return rho * t - np.log1p(t) / 2 - t / (1 + t) / 2

    if rho >= 1:
        assert float(eigenvalue) == 0
    else:
        best = fminbound(loss, -40, 40, xtol=1e-12)
        assert loss(np.log(float(eigenvalue) * (a + c))) <= loss(best) + 1e-12


def test_infonce_close_to_the_threshold_and_far_above():
    tiny = infonce_minimum(jnp.array([1e-6, 1e-10], jnp.float32), jnp.float32(1.0), 1.0)
    assert tiny == pytest.approx([2e-6 / 3, 2e-10 / 3], rel=1e-5)  # 2 (1 - rho) / (3 (a + c))
    assert infonce_minimum([1.0], 1e10, 1e300).tolist() == [0.0]
    # At small augmentation the encoder is large, and known.
    least = infonce_encoder(jnp.eye(2, dtype=jnp.float32), 1e-7 * jnp.eye(2, dtype=jnp.float32), 2, 1.0)
    expected = infonce_minimum(jnp.ones(2, jnp.float32), jnp.float32(1e-7), 1.0)
    assert jnp.sum(least.W**2, axis=0) == pytest.approx(np.asarray(expected), rel=1e-5)


def test_losses_refuse_what_is_no_covariance():
    # What is negative is small, and more than rounding.
    one, indefinite = np.eye(2), np.diag([1.0, -1e-6])
    for loss, args, name in (
        (infonce_loss, (one, one, indefinite, 1.0), "C"),
        (infonce_loss, (one, indefinite, one, 1.0), "A"),
        (landau_loss, (one, one, indefinite, 1.0), "Sigma"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be positive semidefinite"):
            loss(*args)
        assert jnp.isnan(jax.jit(loss)(*map(jnp.asarray, args)))


@pytest.mark.parametrize(
    "call",
    [
        lambda loss: hessian_index(loss, jnp.zeros(2)),
        lambda loss: rescaled_loss(loss, jnp.ones(2), 1.0),
        lambda loss: rescaled_curvature(loss, jnp.ones(2)),
        lambda loss: taylor_coefficients(loss, jnp.ones(2), 2),
    ],
)
def test_a_loss_is_a_number(call):
    with pytest.raises(ValueError, match=r"loss must return a number, got \(2,\)"):
        call(lambda w: w**2)


def test_curvature_of_a_rescaling_is_a_second_difference():
    curvature = rescaled_curvature(
        lambda w: jnp.sum(3 * w["a"] ** 2 - w["b"] ** 4), {"a": 2.0, "b": 1.0}, 0.1
    )
    assert float(curvature) == pytest.approx(24 - 0.02, abs=1e-10)
    assert float(rescaled_curvature(lambda w: 7 + jnp.abs(w), 1.0, 0.1)) == pytest.approx(20)


def test_infonce_limits():
    got = infonce_minimum([1.0, 0.0, 0.0], [0.0, 0.0, 0.5], 1.0)
    assert got.tolist() == [np.inf, 0.0, 0.0]
    assert infonce_minimum([1.0], 0.5, 0.0).tolist() == [np.inf]
    # Any augmentation holds a mode back: lambda tends to 1 / (2 rho) at a = 1.
    assert float(infonce_minimum([1.0], 1e-12, 1.0)[0]) == pytest.approx(5e11, rel=1e-9)
    # The root law close to the threshold a = c, at weight 2: lambda tends to (a - c) / 6 at a = 1.
    assert float(infonce_minimum([1.0], 0.9999, 2.0)[0]) / 1e-4 == pytest.approx(1 / 6, rel=1e-3)
    lanes = jax.vmap(lambda c: infonce_minimum(jnp.array([1.0]), c, 2.0)[0])(jnp.array([0.5, -0.5, jnp.nan]))
    assert np.isfinite(lanes).tolist() == [True, False, False]


COUPLED = jnp.array([[0.3, 0.1, 0, 0], [0.1, 0.2, 0, 0.05], [0, 0, 0.1, 0], [0, 0.05, 0, 0.2]])


@pytest.mark.parametrize("width", [1, 2, 5])
def test_infonce_encoder_is_the_best_of_64_starts(width):
    least = infonce_encoder(A, COUPLED, width, 2.5)
    found = lowest(of_infonce, [(width, 4)], (A, COUPLED, jnp.array(2.5)))
    assert least.loss - 1e-12 <= found <= least.loss + 1e-6
    assert float(infonce_loss(least.W, A, COUPLED, 2.5)) == pytest.approx(float(least.loss), abs=1e-13)
    assert least.W.shape == (width, 4)
    rank = min(width, int(np.sum(np.linalg.eigvalsh(A - 1.5 * COUPLED) > 0)))
    assert np.linalg.matrix_rank(least.W, tol=1e-9) == rank


@pytest.mark.parametrize("width", [2, 4, 6])
def test_where_covariances_commute_the_modes_are_those_of_the_closed_form(width):
    least = infonce_encoder(A, 0.2 * jnp.eye(4), width, 2.0)
    expected = np.array(infonce_minimum(jnp.diag(A), 0.2, 2.0))
    expected[width:] = 0  # the largest variances go first
    np.testing.assert_allclose(least.W.T @ least.W, np.diag(expected), atol=1e-13)


def test_an_encoder_of_singular_data_sees_what_varies():
    wide = [jnp.pad(M, ((0, 1), (0, 1))) for M in (A, COUPLED)]
    least, inner = infonce_encoder(wide[0], wide[1], 3, 0.7), infonce_encoder(A, COUPLED, 3, 0.7)
    assert float(least.loss) == pytest.approx(float(inner.loss), rel=1e-12)
    np.testing.assert_allclose(least.W[:, 4], 0, atol=1e-15)
    without_one = COUPLED.at[2, 2].set(0)  # nothing holds this direction back, and something the others
    for C in (0 * COUPLED, without_one):
        with pytest.raises(ValueError, match="C must be positive semidefinite, and positive where data vary"):
            infonce_encoder(A, C, 2, 1.0)
    with pytest.raises(ValueError, match="A must be positive semidefinite"):
        infonce_encoder(A - jnp.eye(4), COUPLED + 2 * jnp.eye(4), 2, 1.0)
    augmentations = jnp.stack([COUPLED, 0 * COUPLED, without_one])
    lanes = jax.vmap(lambda C: infonce_encoder(A, C, 2, 1.0).loss)(augmentations)
    assert np.isfinite(lanes).tolist() == [True, False, False]


@pytest.mark.parametrize("equal", [False, True])
def test_the_least_losses_have_their_derivatives(equal):
    """They are those of the loss with its weights held, also where eigenvalues are equal."""
    one = jnp.eye(2)
    data, noise = (one, 0.2 * one) if equal else (A[:2, :2], COUPLED[:2, :2])
    for least, loss, first, second in (
        (
            partial(infonce_encoder, width=2, attraction=1.5),
            partial(infonce_loss, attraction=1.5),
            data,
            noise,
        ),
        (
            partial(landau_minimum, width=2, quartic=0.75),
            partial(landau_loss, quartic=0.75),
            data - noise,
            data + noise,
        ),
    ):
        found = jax.grad(lambda *of, f=least: f(*of).loss, argnums=(0, 1))(first, second)
        expected = jax.grad(loss, argnums=(1, 2))(least(first, second).W, first, second)
        for derivative, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(derivative, right, atol=1e-12)
            assert np.any(np.abs(right) > 1e-3)


def random_form(seed, d=4):
    rng = np.random.default_rng(seed)
    S, B = rng.normal(size=(2, d, d))
    return jnp.asarray((B + B.T) / 2), jnp.asarray(S @ S.T + 0.3 * np.eye(d))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_landau_minimum_is_the_best_of_64_starts(width):
    B, Sigma = random_form(3)
    least = landau_minimum(B, Sigma, width, 0.75)
    found = lowest(
        lambda params, args: landau_loss(params[0], *args), [(width, 4)], (B, Sigma, jnp.array(0.75))
    )
    assert least.loss - 1e-12 <= found <= least.loss + 1e-6
    assert float(landau_loss(least.W, B, Sigma, 0.75)) == pytest.approx(float(least.loss), abs=1e-13)
    rank = min(width, int(np.sum(np.linalg.eigvalsh(B) > 0)))
    assert least.W.shape == (width, 4)
    assert np.linalg.matrix_rank(least.W, tol=1e-9) == rank


def test_landau_form_is_the_expansion_of_infonce():
    W = np.array([[0.7, -0.2], [0.1, 0.5]])
    A, C, attraction = np.diag([1.0, 0.4]), np.diag([0.2, 0.3]), 1.7
    scale = 1e-2
    exact = float(infonce_loss(scale * W, A, C, attraction))
    B = A - (attraction - 1) * C
    quartic = [float(landau_loss(scale * W, B, A + C, q)) for q in (0.75, 1.0)]
    assert abs(exact - quartic[0]) < 1e-3 * abs(exact - quartic[1])


def test_landau_form_of_singular_data():
    B, Sigma = random_form(5, d=3)
    wide = [jnp.pad(M, ((0, 1), (0, 1))) for M in (B, Sigma)]
    least, inner = landau_minimum(wide[0], wide[1], 3, 1.0), landau_minimum(B, Sigma, 3, 1.0)
    assert float(least.loss) == pytest.approx(float(inner.loss), rel=1e-12)
    np.testing.assert_allclose(least.W[:, 3], 0, atol=1e-15)
    # A little outside of what is seen is enough, alone or along with what is seen.
    unbounded = [wide[0].at[at, at[::-1]].set(1e-3) for at in (jnp.array([3]), jnp.array([0, 3]))]
    for outside in unbounded:
        with pytest.raises(ValueError, match="B must be zero where Sigma is singular"):
            landau_minimum(outside, wide[1], 3, 1.0)
    with pytest.raises(ValueError, match="Sigma must be positive semidefinite"):
        landau_minimum(B, -Sigma, 3, 1.0)
    lanes = jax.vmap(lambda B: landau_minimum(B, wide[1], 3, 1.0).loss)(jnp.stack([wide[0], *unbounded]))
    assert np.isfinite(lanes).tolist() == [True, False, False]


def test_saddles_of_the_rank_of_the_minima_have_a_way_down():
    # One row on the second mode: the rank of the global minimum, and no minimum.
    B, Sigma = jnp.diag(jnp.array([1.0, 0.6])), jnp.eye(2)
    loss = partial(landau_loss, B=B, Sigma=Sigma, quartic=1.0)
    saddle, least = jnp.array([[0.0, np.sqrt(0.3)]]), landau_minimum(B, Sigma, 1, 1.0).W
    np.testing.assert_allclose(jax.grad(loss)(saddle), 0, atol=1e-15)
    assert float(hessian_index(loss, saddle)) == 1
    assert float(hessian_index(loss, least)) == 0


def test_hessian_index_counts_against_the_largest_curvature():
    curvatures = jnp.array([4.0, -1e-3, -1e-9, 0.0, 2.0])

    def loss(params):
        return jnp.sum(curvatures * params["w"] ** 2) / 2

    point = {"w": jnp.zeros(5)}
    assert float(hessian_index(loss, point)) == 1
    assert float(hessian_index(loss, point, rtol=1e-10)) == 2
    assert float(hessian_index(loss, point, rtol=1e-3)) == 0
    low = {"w": jnp.zeros(5, jnp.float32)}
    assert float(hessian_index(lambda p: loss({"w": p["w"].astype(float)}).astype(jnp.float32), low)) == 1
    assert np.isnan(hessian_index(lambda p: jnp.sum(jnp.sqrt(p["w"])), point))
    with pytest.raises(ValueError, match="rtol must be"):
        hessian_index(loss, point, rtol=-1.0)


@pytest.mark.parametrize("largest", [1.0, -1.0])
@pytest.mark.parametrize(("dtype", "share"), [(jnp.float64, 1e-8), (jnp.float32, 1e-4)])
def test_by_default_curvatures_lead_down_from_a_share_of_the_largest_in_size(largest, dtype, share):
    curvatures = jnp.array([largest, -1.5 * share, -share / 1.5, 0.0, 0.5], dtype)
    count = hessian_index(lambda w: jnp.sum(curvatures * w**2) / 2, jnp.zeros(5, dtype))
    assert float(count) == (2 if largest < 0 else 1)


def test_rescaling_shows_the_landscape():
    loss = partial(landau_loss, B=jnp.eye(2), Sigma=jnp.eye(2), quartic=1.0)
    W = landau_minimum(jnp.eye(2), jnp.eye(2), 2, 1.0).W
    a = np.linspace(0, 1.5, 31)
    np.testing.assert_allclose(rescaled_loss(loss, W, a), a**4 / 2 - a**2, atol=1e-14)
