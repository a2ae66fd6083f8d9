"""The linear variational autoencoder: its loss, its global minimum, and where modes collapse."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    cast,
    require_arrays,
    require_choice,
    require_number,
    require_positive,
    require_shapes,
    require_sizes,
)
from dynamics.collapse.moments import Moments, nan_unless_finite, require_moments
from dynamics.flow import Trajectory, gradient_flow, integrate

# A learned covariance may have every entry, or variances alone; one that is fixed is that of the prior.
Covariance = Literal["full", "diagonal", "fixed"]


class VaeWeights(NamedTuple):
    """Weights of a linear variational autoencoder.

    Attributes:
        U: decoder, (dy, k).
        W: encoder, (dx, k); the latents of x have the mean W^T x.
        log_variance: logs of the variances of the latents' noise, (k,); or, for a full covariance L L^T, a
            matrix (k, k) with twice the logs of the diagonal of L, and with L below it.
    """

    U: Any
    W: Any
    log_variance: Any


class VaeMinimum(NamedTuple):
    """The global minimum of a linear variational autoencoder, latent by latent, the largest mode first.

    Attributes:
        lam: singular values of the decoder U, (latents,); 0 where the latent has collapsed.
        theta: singular values of the encoder A^{1/2} W, (latents,); 0 there as well.
        sigma2: learned variances of the latents, (latents,); eta_enc^2, that of the prior, there.
        loss: the loss there.
    """

    lam: Array
    theta: Array
    sigma2: Array
    loss: Array


def linear_vae_loss(
    U: ArrayLike,
    V: ArrayLike,
    scale: ArrayLike,
    Z: ArrayLike,
    beta: ArrayLike,
    eta_dec: ArrayLike,
    eta_enc: ArrayLike,
) -> Float[Array, ""]:
    r"""Loss of a linear variational autoencoder, with latents and data integrated.

        L = (|U V^T - Z|^2 + tr(U S U^T) + beta (eta_dec / eta_enc)^2 |V|^2) / (2 eta_dec^2)
            + (beta / 2) (tr(S) / eta_enc^2 - k - log det(S / eta_enc^2))

    for a decoder U, an encoder W with V = A^{1/2} W, A = E[x x^T], latents W^T x + noise of covariance S, and
    Z = E[y x^T] A^{-1/2}. What no linear map of x can tell of y adds (E|y|^2 - |Z|^2) / (2 eta_dec^2).

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (its loss; the expectation is derived).

    Args:
        U: decoder, (dy, k).
        V: encoder, (dx, k).
        scale: what the noise of the latents is multiplied by: standard deviations (k,), or a matrix (k, k)
            whose product with its transpose is S.
        Z: what is to be learned, (dy, dx).
        beta: weight of the prior, a number >= 0.
        eta_dec: standard deviation of the decoder's noise, positive.
        eta_enc: that of the prior, positive.

    Returns:
        L, a number; infinite where S is singular and beta positive.

    Raises:
        ValueError: the shapes do not fit, or a number is out of range and can be looked at.

    Example:
        >>> float(linear_vae_loss([[1.0]], [[0.5]], [0.5], [[1.0]], 1.0, 1.0, 1.0)).__round__(4)
        0.6931
    """
    U, V, scale, Z = require_arrays(U=U, V=V, scale=scale, Z=Z)
    axes = "k k" if scale.ndim == 2 else "k"
    require_shapes(U=(U, "dy k"), V=(V, "dx k"), scale=(scale, axes), Z=(Z, "dy dx"))
    beta = require_number("beta", beta, Z.dtype, at_least=0)
    dec, enc = (
        require_positive(name, eta, Z.dtype) ** 2
        for name, eta in (("eta_dec", eta_dec), ("eta_enc", eta_enc))
    )
    noise = U @ scale if scale.ndim == 2 else U * scale[None]
    error = jnp.sum((U @ V.T - Z) ** 2) + jnp.sum(noise**2) + beta * dec / enc * jnp.sum(V**2)
    # Without a prior a latent may have no noise at all.
    kept = jnp.where(
        beta > 0, scale, jnp.eye(len(scale), dtype=scale.dtype) if scale.ndim == 2 else jnp.ones_like(scale)
    )
    log_det = 2 * (jnp.linalg.slogdet(kept)[1] if scale.ndim == 2 else jnp.sum(jnp.log(jnp.abs(kept))))
    prior = jnp.sum(kept**2) / enc - len(scale) - (log_det - len(scale) * jnp.log(enc))
    return error / (2 * dec) + beta / 2 * prior


def linear_vae_flow(
    weights: VaeWeights,
    moments: Moments,
    beta: ArrayLike,
    eta_dec: ArrayLike,
    eta_enc: ArrayLike,
    ts: ArrayLike,
    *,
    fixed: bool = False,
    **options: Any,
) -> Trajectory:
    r"""Gradient flow of a linear variational autoencoder in its weights, latents and data integrated.

        dU/dt = -[(U V^T - Z) V + U S] / eta_dec^2,   V = A^{1/2} W
        dW/dt = -[A W (U^T U + beta (eta_dec / eta_enc)^2 I) - E[x y^T] U] / eta_dec^2
        d(log s_i^2)/dt = -s_i^2 |u_i|^2 / (2 eta_dec^2) - (beta / 2) (s_i^2 / eta_enc^2 - 1)

    the last for variances S = diag(s_i^2). This is the loss of `linear_vae_loss`, in the coordinates of the
    network. Directions in which inputs do not vary keep their weights in W.

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (the flow of its loss is derived).

    Args:
        weights: `VaeWeights` at ts[0].
        moments: `Moments` of inputs and targets, c of shape (dx, dy).
        beta: weight of the prior, a number >= 0.
        eta_dec: standard deviation of the decoder's noise, positive.
        eta_enc: that of the prior, positive.
        ts: times that increase strictly, shape (T,).
        fixed: whether the noise of the latents stays as it is.
        **options: options of `dynamics.flow.integrate`. Close to a threshold the flow slows down: solve long
            horizons with `solver=diffrax.Kvaerno5()`.

    Returns:
        A `Trajectory` whose `ys` are `VaeWeights` with leading axis T.

    Raises:
        ValueError: the shapes do not fit, or a number is out of range and can be looked at.
        RuntimeError: the solve failed.

    Example:
        >>> start, data = VaeWeights([[0.5]], [[0.5]], [0.0]), Moments([[4.0]], [[4.0]], 4.0)
        >>> end = linear_vae_flow(start, data, 1.0, 1.0, 1.0, [0.0, 99.0]).ys
        >>> end.U[-1].round(4).tolist(), jnp.exp(end.log_variance[-1]).round(4).tolist()
        ([[1.7321]], [0.25])
    """
    moments = require_moments(moments, outputs=True)
    U, W, log_variance = require_arrays(U=weights[0], W=weights[1], log_variance=weights[2])
    c = moments.c.reshape(moments.c.shape[0], -1)
    U, W, log_variance = (cast(part, c.dtype) for part in (U, W, log_variance))
    axes = "k k" if log_variance.ndim == 2 else "k"
    require_shapes(U=(U, "dy k"), W=(W, "dx k"), log_variance=(log_variance, axes), c=(c, "dx dy"))
    beta = require_number("beta", beta, c.dtype, at_least=0)
    etas = (
        require_positive(name, eta, c.dtype) for name, eta in (("eta_dec", eta_dec), ("eta_enc", eta_enc))
    )
    moved = jnp.asarray(not fixed, c.dtype)
    return integrate(_flow, VaeWeights(U, W, log_variance), ts, (moments, c, beta, *etas, moved), **options)


def _loss_of_weights(weights, args):
    """The loss from moments, E|y|^2 included; its last argument is 0 where the noise is held."""
    U, W, logs = weights
    moments, c, beta, eta_dec, eta_enc, moved = args
    logs = moved * logs + (1 - moved) * jax.lax.stop_gradient(logs)
    own = jnp.diag(logs) if logs.ndim == 2 else logs
    L = jnp.diag(jnp.exp(own / 2)) + (jnp.tril(logs, -1) if logs.ndim == 2 else 0)
    dec, enc, S, G = eta_dec**2, eta_enc**2, L @ L.T, W.T @ moments.A @ W
    error = jnp.sum((U.T @ U) * (G + S)) - 2 * jnp.sum(U.T * (W.T @ c)) + moments.y2
    prior = (jnp.trace(G) + jnp.trace(S)) / enc - jnp.sum(1 + own - jnp.log(enc))
    return error / (2 * dec) + beta / 2 * prior


_flow = gradient_flow(_loss_of_weights)


def vae_minimum(
    Z: ArrayLike,
    latents: int,
    beta: ArrayLike,
    eta_dec: ArrayLike,
    eta_enc: ArrayLike,
    *,
    covariance: Covariance | str = "diagonal",
) -> VaeMinimum:
    r"""The global minimum of `linear_vae_loss`, by default with a variance of its own for each latent.

        lambda_i = (zeta_i^2 - beta eta_dec^2)_+^{1/2} / eta_enc,   theta_i = eta_enc^2 lambda_i / zeta_i
        sigma_i^2 = beta (eta_dec eta_enc / zeta_i)^2,   eta_enc^2 where the latent has collapsed
        L* = (|Z|^2 + sum_i [t (1 + log(zeta_i^2 / t)) - zeta_i^2]) / (2 eta_dec^2),   t = beta eta_dec^2

    where zeta_i are the largest singular values of Z and the sum is over those with zeta_i^2 > beta
    eta_dec^2. A mode collapses at beta = zeta_i^2 / eta_dec^2, each by a transition of second order. U = F
    diag(lambda) and V = G diag(theta) with the singular vectors F and G of Z, up to signs and the order of
    latents alone: the rotation that the source allows for costs something, where the zeta_i differ. A full
    covariance, rotated as well, has the same least loss. So the thresholds are those of the `latents` largest
    zeta_i, as many as there are different ones among them.

    With the covariance fixed at eta_enc^2 I the thresholds are the same, and the sizes are others:

        lambda_i theta_i = (zeta_i - beta^{1/2} eta_dec)_+,   eta_enc^2 lambda_i = beta^{1/2} eta_dec theta_i
        L* = (|Z|^2 - sum_i (zeta_i - beta^{1/2} eta_dec)_+^2) / (2 eta_dec^2)

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (sigma^2, L* and the fixed covariance are
    derived here).

    Args:
        Z: E[y x^T] A^{-1/2}, (dy, dx), with E|y|^2 = |Z|^2.
        latents: number of latents; those beyond the modes of Z collapse. Static.
        beta: weight of the prior, a number >= 0; at 0 the result is a limit, in which the encoder is infinite
            where the covariance is fixed.
        eta_dec: standard deviation of the decoder's noise, positive.
        eta_enc: that of the prior, positive.
        covariance: "diagonal" or "full", the same here, or "fixed" at that of the prior. Static.

    Returns:
        A `VaeMinimum`.

    Raises:
        ValueError: `Z` has another shape, the covariance is unknown, or a number is out of range and can be
            looked at.

    Example:
        >>> least = vae_minimum([[2.0, 0.0], [0.0, 0.5]], 2, 1.0, 1.0, 1.0)
        >>> [round(float(size), 4) for size in least.lam], least.sigma2.tolist()
        ([1.7321, 0.0], [0.25, 1.0])
    """
    (Z,) = require_arrays(Z=Z)
    require_shapes(Z=(Z, "dy dx"))
    (latents,) = require_sizes(latents=latents)
    beta = require_number("beta", beta, Z.dtype, at_least=0)
    eta_dec, eta_enc = (
        require_positive(name, eta, Z.dtype) for name, eta in (("eta_dec", eta_dec), ("eta_enc", eta_enc))
    )
    require_choice("covariance", covariance, get_args(Covariance))
    return _minimum(Z, latents, beta, eta_dec, eta_enc, covariance == "fixed")


@eqx.filter_jit
def _minimum(Z, latents, beta, eta_dec, eta_enc, fixed):
    every = jnp.linalg.svd(Z, compute_uv=False)
    zeta = jnp.pad(every, (0, max(latents - every.size, 0)))[:latents]
    # Without a prior all modes are active, but for those that are rounding.
    seen = zeta > max(Z.shape) * float(jnp.finfo(Z.dtype).eps) * every[0]
    ratio = jnp.where(seen, zeta, 1) / eta_dec
    active = seen & (jnp.sqrt(beta) < ratio)
    least = (_of_fixed if fixed else _of_learned)(jnp.where(active, ratio, 1), active, beta, eta_dec, eta_enc)
    least = least._replace(loss=(jnp.sum((every / eta_dec) ** 2) + least.loss) / 2)
    return nan_unless_finite((Z, beta, eta_dec, eta_enc), least)


def _of_learned(ratio, active, beta, eta_dec, eta_enc):
    """The minimum by the ratios of zeta to eta_dec; its loss is twice that less that of zero."""
    share = jnp.where(active, beta / ratio**2, 0)  # of the mode that the prior takes
    root = jnp.where(active, jnp.sqrt(jnp.where(active, 1 - share, 1)), 0)
    sigma2 = jnp.where(active, share, 1) * eta_enc**2
    # beta log(1 / beta) vanishes at beta = 0.
    gained = beta * (1 + 2 * jnp.log(ratio)) - xlogy(beta, beta) - ratio**2
    lam = ratio * (eta_dec / eta_enc) * root
    return VaeMinimum(lam, eta_enc * root, sigma2, jnp.sum(jnp.where(active, gained, 0)))


def _of_fixed(ratio, active, beta, eta_dec, eta_enc):
    """The same for a covariance that stays that of the prior."""
    positive = beta > 0
    shrunk = jnp.where(positive, jnp.sqrt(jnp.where(positive, beta, 1)), 0)
    product = jnp.where(active, ratio - shrunk, 0)
    decoder = jnp.sqrt(jnp.where(active & positive, product * shrunk, 1)) * (eta_dec / eta_enc)
    # Without a prior the decoder is as small, and the encoder as large, as one likes.
    lam = jnp.where(active & positive, decoder, 0)
    encoder = product * eta_dec / jnp.where(lam > 0, lam, 1)
    theta = jnp.where(active, jnp.where(positive, encoder, jnp.inf), 0)
    return VaeMinimum(lam, theta, jnp.full_like(ratio, 1) * eta_enc**2, -jnp.sum(product**2))


def vae_modes(x: ArrayLike, y: ArrayLike | None = None) -> Float[Array, " modes"]:
    r"""The singular values zeta of Z = E[y x^T] A^{-1/2} that decide which modes of an autoencoder collapse.

    Those of E[y x^T], without whitening, do not, unless A = E[x x^T] is a multiple of the identity. For y = x
    they are the roots of the eigenvalues of the covariance.

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (the slide before lacks A^{-1/2}).

    Args:
        x: inputs, (N, dx); centered here. Directions in which they do not vary, such as constant pixels, are
            left out: eigenvalues below 1e-10 of the largest, of columns in units of their own, or what
            rounding leaves.
        y: targets, (N, dy), centered here; x where None.

    Returns:
        zeta, descending, (min(dx, dy),).

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.

    Example:
        >>> x = [[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]
        >>> [round(float(zeta), 4) for zeta in vae_modes(x)]
        [1.4142, 0.7071]
    """
    x, y = require_arrays(x=x, y=x if y is None else y)
    require_shapes(x=(x, "N dx"), y=(y, "N dy"))
    return nan_unless_finite((x, y), _modes(x, y))


@jax.custom_jvp
@jax.jit
def _modes(x, y):
    inputs, targets = _scaled(_centered(x)), _centered(y)
    left, values, _ = jnp.linalg.svd(inputs, full_matrices=False)
    whitened = jnp.where((values > _noise(x) * values[0])[None], left, 0)
    zeta = jnp.linalg.svd(targets.T @ whitened, compute_uv=False) / x.shape[0] ** 0.5
    return jnp.pad(zeta, (0, min(x.shape[1], y.shape[1]) - zeta.size))


@_modes.defjvp
def _modes_jvp(at, along):
    """Derivatives go by the projector on what the inputs span: those of single directions need not exist."""

    def by_projector(x, y):
        inputs, targets = _scaled(_centered(x)), _centered(y)
        seen = inputs @ (jnp.linalg.pinv(inputs, rtol=_noise(x)) @ targets)
        zeta = jnp.linalg.svd(seen, compute_uv=False) / x.shape[0] ** 0.5
        count = min(x.shape[1], y.shape[1])
        return jnp.pad(zeta, (0, max(count - zeta.size, 0)))[:count]

    return _modes(*at), jax.jvp(by_projector, at, along)[1]


def _scaled(x):
    """Columns of one size, whatever their units: what the inputs span does not depend on these."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=0, keepdims=True))
    return x / jnp.where(size > 0, size, 1)


def _noise(x):
    """The least singular value of data that is more than rounding, over the largest."""
    return max(1e-10, max(x.shape) * float(jnp.finfo(x.dtype).eps) ** 2) ** 0.5


def _centered(x):
    # The mean of a constant is not that constant, to rounding, which is all that some columns vary by.
    high, low = jnp.max(x, axis=0, keepdims=True), jnp.min(x, axis=0, keepdims=True)
    rounding = 8 * float(jnp.finfo(x.dtype).eps) * jnp.maximum(jnp.abs(high), jnp.abs(low))
    return jnp.where(high - low > rounding, x - jnp.mean(x, axis=0, keepdims=True), 0)
