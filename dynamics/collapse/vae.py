"""The linear variational autoencoder: its loss, its global minimum, and where modes collapse."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    require_arrays,
    require_number,
    require_positive,
    require_shapes,
    require_sizes,
)
from dynamics.collapse.moments import nan_unless_finite


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
    S = scale @ scale.T if scale.ndim == 2 else jnp.diag(scale**2)
    error = jnp.sum((U @ V.T - Z) ** 2) + jnp.trace(U @ S @ U.T) + beta * dec / enc * jnp.sum(V**2)
    prior = jnp.trace(S) / enc - len(S) - (jnp.linalg.slogdet(S)[1] - len(S) * jnp.log(enc))
    # Without a prior a latent may have no noise at all.
    return error / (2 * dec) + jnp.where(beta > 0, beta / 2 * jnp.where(beta > 0, prior, 0), 0)


def vae_minimum(
    Z: ArrayLike, latents: int, beta: ArrayLike, eta_dec: ArrayLike, eta_enc: ArrayLike
) -> VaeMinimum:
    r"""The global minimum of `linear_vae_loss` with a variance of its own for each latent.

        lambda_i = (zeta_i^2 - beta eta_dec^2)_+^{1/2} / eta_enc,   theta_i = eta_enc^2 lambda_i / zeta_i
        sigma_i^2 = beta (eta_dec eta_enc / zeta_i)^2,   eta_enc^2 where the latent has collapsed
        L* = (|Z|^2 + sum_i [t (1 + log(zeta_i^2 / t)) - zeta_i^2]) / (2 eta_dec^2),   t = beta eta_dec^2

    where zeta_i are the largest singular values of Z and the sum is over those with zeta_i^2 > beta
    eta_dec^2. A mode collapses at beta = zeta_i^2 / eta_dec^2, each by a transition of second order. U = F
    diag(lambda) and V = G diag(theta) with the singular vectors F and G of Z, up to signs and the order of
    latents alone: the rotation that the source allows for costs something, where the zeta_i differ.

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (sigma^2 and L* are derived here).

    Args:
        Z: E[y x^T] A^{-1/2}, (dy, dx), with E|y|^2 = |Z|^2.
        latents: number of latents; those beyond the modes of Z collapse. Static.
        beta: weight of the prior, a number >= 0; at 0 the result is a limit.
        eta_dec: standard deviation of the decoder's noise, positive.
        eta_enc: that of the prior, positive.

    Returns:
        A `VaeMinimum`.

    Raises:
        ValueError: `Z` has another shape, or a number is out of range and can be looked at.

    Example:
        >>> least = vae_minimum([[2.0, 0.0], [0.0, 0.5]], 2, 1.0, 1.0, 1.0)
        >>> [round(float(size), 4) for size in least.lam], least.sigma2.tolist()
        ([1.7321, 0.0], [0.25, 1.0])
    """
    (Z,) = require_arrays(Z=Z)
    require_shapes(Z=(Z, "dy dx"))
    (latents,) = require_sizes(latents=latents)
    beta = require_number("beta", beta, Z.dtype, at_least=0)
    etas = (
        require_positive(name, eta, Z.dtype) for name, eta in (("eta_dec", eta_dec), ("eta_enc", eta_enc))
    )
    return _minimum(Z, latents, beta, *etas)


@eqx.filter_jit
def _minimum(Z, latents, beta, eta_dec, eta_enc):
    every = jnp.linalg.svd(Z, compute_uv=False)
    zeta = jnp.pad(every, (0, max(latents - every.size, 0)))[:latents]
    threshold = beta * eta_dec**2
    active = (zeta**2 > threshold) & (zeta > 0)
    size = jnp.where(active, zeta, 1)
    root = jnp.where(active, jnp.sqrt(jnp.where(active, zeta**2 - threshold, 1)), 0)
    sigma2 = jnp.where(active, threshold * (eta_enc / size) ** 2, eta_enc**2)
    # beta log(1 / beta) vanishes at beta = 0.
    kept = threshold * (1 + jnp.log(size**2)) - xlogy(threshold, threshold) - zeta**2
    loss = (jnp.sum(every**2) + jnp.sum(jnp.where(active, kept, 0))) / (2 * eta_dec**2)
    least = VaeMinimum(root / eta_enc, eta_enc / size * root, sigma2, loss)
    return nan_unless_finite((Z, beta, eta_dec, eta_enc), least)


def vae_modes(x: ArrayLike, y: ArrayLike | None = None) -> Float[Array, " modes"]:
    r"""The singular values zeta of Z = E[y x^T] A^{-1/2} that decide which modes of an autoencoder collapse.

    Those of E[y x^T], without whitening, do not, unless A = E[x x^T] is a multiple of the identity. For y = x
    they are the roots of the eigenvalues of the covariance.

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (the slide before lacks A^{-1/2}).

    Args:
        x: inputs, (N, dx); centered here. Directions in which they do not vary, such as constant pixels, are
            left out: eigenvalues of A below 1e-10 of the largest, or what rounding leaves.
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


@eqx.filter_jit
def _modes(x, y):
    centered, targets = (part - jnp.mean(part, axis=0, keepdims=True) for part in (x, y))
    left, values, _ = jnp.linalg.svd(centered, full_matrices=False)
    noise = max(1e-10, max(x.shape) * float(jnp.finfo(x.dtype).eps) ** 2)
    seen = values**2 > noise * values[0] ** 2
    whitened = jnp.where(seen[None], left, 0)
    zeta = jnp.linalg.svd(targets.T @ whitened, compute_uv=False) / x.shape[0] ** 0.5
    return jnp.pad(zeta, (0, min(x.shape[1], y.shape[1]) - zeta.size))
