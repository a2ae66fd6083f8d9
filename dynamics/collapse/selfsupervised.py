"""Linear encoders that are trained by contrast: the exact loss on Gaussian data, and its quartic form."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    cast,
    nan_unless,
    require_arrays,
    require_covariance,
    require_every,
    require_number,
    require_positive,
    require_shapes,
    require_sizes,
    require_symmetric,
    require_vector,
    slack,
)
from dynamics.collapse.moments import nan_unless_finite, spectrum


class LandauMinimum(NamedTuple):
    """A global minimum of the quartic form; rotations of its rows are minima as well.

    Attributes:
        loss: the form there.
        W: the encoder, (width, d), of rank min(width, number of positive eigenvalues of B).
    """

    loss: Array
    W: Array


class InfonceMinimum(NamedTuple):
    """A global minimum of the exact InfoNCE; rotations of its rows are minima as well.

    Attributes:
        loss: the loss there.
        W: the encoder, (width, d).
    """

    loss: Array
    W: Array


def infonce_loss(W: ArrayLike, A: ArrayLike, C: ArrayLike, attraction: ArrayLike) -> Float[Array, ""]:
    r"""InfoNCE of a linear encoder on Gaussian data with Gaussian augmentation, exactly.

        L = attraction tr(W C W^T) - (1/2) log det(I + T) - (1/2) tr(T (I + T)^{-1}),   T = W (A + C) W^T

    It is E[attraction |f(x) - f(x')|^2 / 2 + log E exp(-|f(x) - f(chi)|^2 / 2)], where x and x' are
    augmentations of one example and chi is one of another, with the mean over x outside of the logarithm. To
    fourth order it is -tr(W B W^T) + (3/4) tr(T^2), B = A - (attraction - 1) C.

    Source: ziyin2022talk, slide on InfoNCE (its expectation is derived here; attraction is 1 there).

    Args:
        W: encoder, (k, d).
        A: covariance of the data, (d, d), positive semidefinite.
        C: covariance of the augmentation, (d, d), positive semidefinite.
        attraction: weight of the first term, a number >= 0.

    Returns:
        L, a number.

    Raises:
        ValueError: the shapes do not fit, or a number is out of range and can be looked at.

    Example:
        >>> float(infonce_loss([[1.0]], [[1.0]], [[0.0]], 1.0)).__round__(4)  # -log(2) / 2 - 1 / 4
        -0.5966
    """
    W, A, C = require_arrays(W=W, A=A, C=C)
    require_shapes(W=(W, "k d"), A=(A, "d d"), C=(C, "d d"))
    A, C = require_covariance("A", A), require_covariance("C", C)
    attraction = require_number("attraction", attraction, W.dtype, at_least=0)
    T, one = W @ (A + C) @ W.T, jnp.eye(W.shape[0], dtype=W.dtype)
    repulsion = jnp.linalg.slogdet(one + T)[1] + jnp.trace(jnp.linalg.solve(one + T, T))
    return attraction * jnp.trace(W @ C @ W.T) - repulsion / 2


def infonce_minimum(
    variances: ArrayLike, augmentation_variance: ArrayLike, attraction: ArrayLike
) -> Float[Array, " d"]:
    r"""Eigenvalues of W^T W at the global minimum of `infonce_loss`, mode by mode, for A and C that commute.

        lambda = (1 / q - 1) / (a + c),   q = ((1 + 8 rho)^{1/2} - 1) / 2,   rho = attraction c / (a + c)

    and 0 where rho >= 1: a mode collapses where its variance a is at most (attraction - 1) times that of the
    augmentation, so that without a weight above one no isotropic augmentation makes any collapse.

    Source: ziyin2022talk, slide on its minima (the exact form is derived here).

    Args:
        variances: a, eigenvalues of A, (d,), >= 0; the encoder has at least d rows.
        augmentation_variance: c, those of C in the same order, (d,) or one number, >= 0.
        attraction: weight of the attraction, a number >= 0.

    Returns:
        lambda, (d,): 0 where the mode has collapsed or where both variances are 0; infinity where nothing
        holds it back, rho = 0.

    Raises:
        ValueError: the shapes do not fit, or a number is out of range and can be looked at.

    Example:
        >>> infonce_minimum([1.5, 0.3, 0.1], 0.2, 2.0).round(4).tolist()
        [1.0979, 0.3252, 0.0]
    """
    a = _require_variances("variances", require_vector("variances", variances, "d"))
    c = cast(as_real("augmentation_variance", augmentation_variance), a.dtype)
    if c.shape not in ((), a.shape):
        raise ValueError(f"augmentation_variance must be a number or of shape {a.shape}, got shape {c.shape}")
    c = _require_variances("augmentation_variance", c)
    attraction = require_number("attraction", attraction, a.dtype, at_least=0)
    return _infonce_minimum(a, jnp.broadcast_to(c, a.shape), attraction)


def _require_variances(name, values):
    return require_every(name, values, lambda v: (v >= 0) & (v < jnp.inf), "finite and >= 0")


@eqx.filter_jit
def _infonce_minimum(a, c, attraction):
    total = a + c
    seen = total > 0
    size = jnp.where(seen, total, 1)
    sizes = _sizes(attraction * (c / size), a / size - (attraction - 1) * (c / size))
    return nan_unless(jnp.isfinite(attraction) & jnp.isfinite(total), jnp.where(seen, sizes / size, 0))


def _sizes(rho, margin):
    """The eigenvalues t = 1 / q - 1 of T at the minimum: 0 where rho >= 1, infinity where rho = 0.

    The margin is 1 - rho, which whoever knows more than rho has without a difference of numbers close to one.
    """
    alive, held = margin > 0, rho > 0
    safe, margin = jnp.where(alive & held, rho, 0.5), jnp.where(alive & held, margin, 0.5)
    root = jnp.sqrt(1 + 8 * safe)
    # Likewise 1 - q and q.
    inverse = (4 * margin / (3 + root)) * (1 + root) / (4 * safe)
    return jnp.where(alive, jnp.where(held, inverse, jnp.inf), 0)


def infonce_encoder(A: ArrayLike, C: ArrayLike, width: int, attraction: ArrayLike) -> InfonceMinimum:
    r"""The global minimum of `infonce_loss` for an encoder of any width, and A and C that need not commute.

        Sigma^{1/2} W^T W Sigma^{1/2} = sum_i (1 / q_i - 1) v_i v_i^T,   q_i = ((1 + 8 rho_i)^{1/2} - 1) / 2

    over the `width` smallest eigenvalues rho_i < 1 of attraction Sigma^{-1/2} C Sigma^{-1/2}, Sigma = A + C,
    with eigenvectors v_i. All but the attraction depends on the eigenvalues of T alone, so that each of them
    goes where attraction costs least.

    Source: ziyin2022talk, slide on its minima (the exact form is derived here).

    Args:
        A: covariance of the data, (d, d), positive semidefinite.
        C: covariance of the augmentation, (d, d), positive semidefinite: positive wherever data vary.
        width: rows of the encoder; static.
        attraction: weight of the attraction, a positive number.

    Returns:
        An `InfonceMinimum`.

    Raises:
        ValueError: the shapes do not fit, there is no finite minimum, or an argument is out of range, and can
            be looked at.

    Example:
        >>> least = infonce_encoder([[1.5, 0.0], [0.0, 0.1]], [[0.2, 0.0], [0.0, 0.2]], 2, 2.0)
        >>> (least.W.T @ least.W).round(4).tolist()
        [[1.0979, 0.0], [0.0, 0.0]]
    """
    A, C = require_arrays(A=A, C=C)
    require_shapes(A=(A, "d d"), C=(C, "d d"))
    A, C = require_symmetric("A", A), require_symmetric("C", C)
    (width,) = require_sizes(width=width)
    attraction = require_positive("attraction", attraction, A.dtype)
    least, *good = _infonce_encoder(A, C, width, attraction)
    semidefinite = "positive semidefinite"
    rules = {"A": semidefinite, "C": f"{semidefinite}, and positive where data vary: no minimum is finite"}
    _require_rules(rules, good)
    return least


@eqx.filter_jit
def _infonce_encoder(A, C, width, attraction):
    root, seen, _ = _inverse_root(A + C)
    rounding, largest = slack(A), jnp.linalg.eigvalsh(A + C)[-1]
    semidefinite = [jnp.linalg.eigvalsh(M)[0] >= -rounding * largest for M in (A, C)]
    # A direction without any variance is none that an encoder could take.
    whitened = attraction * root.T @ C @ root
    rho, vectors = jnp.linalg.eigh(whitened + 2 * _only(~seen, A))
    rho, vectors = rho[:width], vectors[:, :width]
    held = rho[0] > rounding * jnp.linalg.norm(whitened)
    t = _sizes(jnp.where(held, rho, 1), jnp.where(held, 1 - rho, 0))
    loss = jnp.sum(rho * t - jnp.log1p(t) / 2 - t / (1 + t) / 2)
    least = InfonceMinimum(loss, _rows(t, root @ vectors, width))
    good = semidefinite[0], semidefinite[1] & held
    guard = nan_unless(good[0] & good[1], jnp.ones_like(attraction))
    return nan_unless_finite((A, C, attraction, guard), least), *good


def landau_loss(W: ArrayLike, B: ArrayLike, Sigma: ArrayLike, quartic: ArrayLike) -> Float[Array, ""]:
    r"""The quartic form of contrastive losses, -tr(W B W^T) + quartic tr((W Sigma W^T)^2).

    The slide has quartic = 1; the loss that it starts from has 3/4, and B = A - (attraction - 1) C.

    Source: ziyin2022talk, slide on InfoNCE.

    Example:
        >>> float(landau_loss([[0.5]], [[1.0]], [[1.0]], 1.0))
        -0.1875
    """
    W, B, Sigma = require_arrays(W=W, B=B, Sigma=Sigma)
    require_shapes(W=(W, "k d"), B=(B, "d d"), Sigma=(Sigma, "d d"))
    B, Sigma = require_symmetric("B", B), require_covariance("Sigma", Sigma)
    quartic = require_positive("quartic", quartic, W.dtype)
    return -jnp.trace(W @ B @ W.T) + quartic * jnp.sum((W @ Sigma @ W.T) ** 2)


def landau_minimum(B: ArrayLike, Sigma: ArrayLike, width: int, quartic: ArrayLike) -> LandauMinimum:
    r"""The global minimum of `landau_loss`.

        Sigma^{1/2} W^T W Sigma^{1/2} = [Sigma^{-1/2} B Sigma^{-1/2}]_+ / (2 quartic)
        L* = - sum_i b_i^2 / (4 quartic)

    over the largest `width` positive eigenvalues b_i of Sigma^{-1/2} B Sigma^{-1/2}, of which there are as
    many as B has.

    Source: ziyin2022talk, slide on its minima (general B, Sigma and width are derived here).

    Args:
        B: symmetric, (d, d), of any sign.
        Sigma: covariance of augmented data, (d, d). Where it is singular, as for constant pixels, B has to
            vanish there too: the form is unbounded otherwise.
        width: rows of the encoder; static.
        quartic: coefficient of the quartic term, positive.

    Returns:
        A `LandauMinimum`.

    Raises:
        ValueError: the shapes do not fit, or a matrix or number is out of range and can be looked at.

    Example:
        >>> least = landau_minimum([[2.0, 0.0], [0.0, -0.5]], [[1.0, 0.0], [0.0, 1.0]], 2, 1.0)
        >>> float(least.loss), abs(least.W).tolist()
        (-1.0, [[1.0, 0.0], [0.0, 0.0]])
    """
    B, Sigma = require_arrays(B=B, Sigma=Sigma)
    require_shapes(B=(B, "d d"), Sigma=(Sigma, "d d"))
    B, Sigma = require_symmetric("B", B), require_symmetric("Sigma", Sigma)
    (width,) = require_sizes(width=width)
    quartic = require_positive("quartic", quartic, B.dtype)
    least, *good = _landau_minimum(B, Sigma, width, quartic)
    _require_rules({"Sigma": "positive semidefinite", "B": "zero where Sigma is singular"}, good)
    return least


@eqx.filter_jit
def _landau_minimum(B, Sigma, width, quartic):
    root, _, null = _inverse_root(Sigma)
    raw, rounding = jnp.linalg.eigvalsh(Sigma), slack(Sigma)
    semidefinite = raw[0] >= -rounding * jnp.max(jnp.abs(raw))
    bounded = jnp.linalg.norm(B @ null) <= rounding**0.5 * jnp.linalg.norm(B)
    values, vectors = jnp.linalg.eigh(root.T @ B @ root)
    values, vectors = values[::-1][:width], vectors[:, ::-1][:, :width]
    kept = jnp.maximum(values, 0)
    W = _rows(kept / (2 * quartic), root @ vectors, width)
    least = LandauMinimum(-jnp.sum(kept**2) / (4 * quartic), W)
    good = nan_unless(semidefinite & bounded, jnp.ones_like(quartic))
    return nan_unless_finite((B, Sigma, quartic, good), least), semidefinite, bounded


def _inverse_root(Sigma):
    """A root of the inverse of a covariance on what is seen of its space, what is seen, and what is not.

    The columns of the root are orthogonal in Sigma. A factor that is the identity carries derivatives, which
    those of eigenvectors would not where eigenvalues are equal.
    """
    values, vectors = spectrum(Sigma)
    seen = values > 0
    root = vectors * jnp.where(seen, 1 / jnp.sqrt(jnp.where(seen, values, 1)), 0)[None]
    one = root.T @ Sigma @ root + _only(~seen, Sigma)
    factor = jnp.linalg.cholesky(one)
    root = jax.scipy.linalg.solve_triangular(factor, root.T, lower=True).T
    return root, seen, jnp.where(seen[None], 0, vectors)


def _only(which, like):
    return jnp.diag(which.astype(like.dtype))


def _rows(eigenvalues, vectors, width):
    """The encoder with these vectors in its rows, each as long as the root of its number, and zeros below."""
    alive = eigenvalues > 0  # the root has no derivative at zero
    scale = jnp.where(alive, jnp.sqrt(jnp.where(alive, eigenvalues, 1)), 0)
    return jnp.pad(scale[:, None] * vectors.T, ((0, max(width - len(scale), 0)), (0, 0)))


def _require_rules(rules, good):
    """Refuse what is not good by the names of the arguments, where that can be looked at."""
    for (name, rule), holds in zip(rules.items(), good, strict=True):
        looked_at = as_concrete(holds)
        if looked_at is not None and not looked_at:
            raise ValueError(f"{name} must be {rule}")
