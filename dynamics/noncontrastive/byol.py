"""Linear BYOL: an online network with a predictor on top, and a target that follows it."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    require_arrays,
    require_covariance,
    require_number,
    require_positive,
    require_shapes,
    require_times,
)
from dynamics.flow import Trajectory, all_finite, integrate
from dynamics.noncontrastive.target import is_stiff, require_ema_rate, stiff_solver


class ByolWeights(NamedTuple):
    """Weights of linear BYOL; along a trajectory each has a leading axis of time.

    Attributes:
        W: of the online network, (n2, n1).
        Wp: of the predictor, (n2, n2).
        Wa: of the target network, (n2, n1).
    """

    W: Any
    Wp: Any
    Wa: Any


class _Setting(NamedTuple):
    X: Array
    X_aug_cov: Array
    predictor_rate: Array
    ema_rate: Array
    weight_decay: Array


def byol_flow(
    W0: ArrayLike,
    Wp0: ArrayLike,
    Wa0: ArrayLike,
    X: ArrayLike,
    X_aug_cov: ArrayLike,
    ts: ArrayLike,
    *,
    predictor_rate: ArrayLike,
    ema_rate: ArrayLike,
    weight_decay: ArrayLike,
    **options: Any,
) -> Trajectory:
    r"""Gradient flow of linear BYOL, J = (1/2) E|W_p W x_1 - SG(W_a x_2)|^2 on two views of a sample.

        dW/dt   = W_p^T M - eta W,              M = W_a X - W_p W (X + X')
        dW_p/dt = alpha_p M W^T - eta W_p
        dW_a/dt = beta (W - W_a)

    with X = E[xbar xbar^T] of the means over augmentations, and X' = E[Cov(x | xbar)]. Nothing passes through
    the target (SG). A step of EMA with momentum m at a learning rate is beta = (1 - m) / learning rate.

    Source: tian2021directpred, the talk's slides on decoupled dynamics (there in the aligned case).

    Args:
        W0: the online network, (n2, n1).
        Wp0: the predictor, (n2, n2), of any symmetry.
        Wa0: the target, (n2, n1).
        X: covariance of means over augmentations, (n1, n1), positive semidefinite.
        X_aug_cov: X', mean covariance of augmentations, (n1, n1), positive semidefinite.
        ts: times, (T,).
        predictor_rate: alpha_p, the predictor's learning rate over that of the network, >= 0.
        ema_rate: beta >= 0, per unit of time. At infinity there is no average: W_a = W at every time, the
            first one included, and `Wa0` is ignored. A fast one is solved by Kvaerno5, with a dense system of
            all weights, unless it or `ts` is traced or weights are 32-bit: then a step takes some 1 / beta.
        weight_decay: eta >= 0.
        **options: those of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys` the `ByolWeights`.

    Raises:
        ValueError: the shapes do not fit, or a matrix or number is out of range and can be looked at.
        RuntimeError: the solve failed.

    Example:
        >>> one, half = [[1.0]], [[0.5]]
        >>> rates = {"predictor_rate": 1.0, "ema_rate": jnp.inf, "weight_decay": 0.0}
        >>> path = byol_flow(half, half, half, one, [[0.25]], [0.0, 100.0], **rates)
        >>> round(float(path.ys.Wp[-1, 0, 0]), 6)  # 1 / (1 + sigma^2)
        0.8
    """
    W0, Wp0, Wa0, X, X_aug_cov = require_arrays(W0=W0, Wp0=Wp0, Wa0=Wa0, X=X, X_aug_cov=X_aug_cov)
    require_shapes(
        W0=(W0, "n2 n1"),
        Wp0=(Wp0, "n2 n2"),
        Wa0=(Wa0, "n2 n1"),
        X=(X, "n1 n1"),
        X_aug_cov=(X_aug_cov, "n1 n1"),
    )
    dtype = W0.dtype
    beta = require_ema_rate(ema_rate, dtype)
    if beta.ndim != 0:
        raise ValueError(f"ema_rate must be one number, got shape {beta.shape}; jax.vmap maps over many")
    setting = _Setting(
        require_covariance("X", X),
        require_covariance("X_aug_cov", X_aug_cov),
        require_number("predictor_rate", predictor_rate, dtype, at_least=0),
        beta,
        require_number("weight_decay", weight_decay, dtype, at_least=0),
    )
    ts = require_times(ts, dtype)
    if options.get("solver") is None and is_stiff(beta, ts):
        options["solver"] = stiff_solver(elementwise=False)
    path = integrate(_byol_field, ByolWeights(W0, Wp0, Wa0), ts, setting, **options)
    W, Wp, Wa = path.ys
    return Trajectory(path.ts, ByolWeights(W, Wp, jnp.where(jnp.isinf(beta), W, Wa)), path.ok)


def _byol_field(t, weights, setting):
    (W, Wp, Wa), (X, X_aug_cov, alpha_p, beta, eta) = weights, setting
    instant = jnp.isinf(beta)
    beta = jnp.where(instant, 0, beta)
    Wa = jnp.where(instant, W, Wa)
    M = Wa @ X - Wp @ W @ (X + X_aug_cov)
    return ByolWeights(Wp.T @ M - eta * W, alpha_p * M @ W.T - eta * Wp, beta * (W - Wa))


def no_predictor_flow(
    W0: ArrayLike, X_aug_cov: ArrayLike, ts: ArrayLike, *, weight_decay: ArrayLike
) -> Trajectory:
    r"""Linear BYOL without predictor and moving average, which goes to zero, in closed form.

        dW/dt = -W (X' + eta I),   W(t) = W_0 exp(-(X' + eta I) (t - t_0))

    The talk has the matrix on the left of W, where it does not fit unless W is square. Directions in which X'
    is zero stay as they are without weight decay.

    Source: tian2021directpred, the talk's slide on what does not work.

    Args:
        W0: the network at ts[0], (n2, n1).
        X_aug_cov: X', mean covariance of augmentations, (n1, n1), positive semidefinite.
        ts: times, (T,).
        weight_decay: eta >= 0.

    Returns:
        A `Trajectory` of W, (T, n2, n1). Where the matrix times t - t_0 is above 10^10, in 32-bit 10^5, it is
        NaN and not `ok`: rounding of directions that are kept would be as large as they are.

    Raises:
        ValueError: the shapes do not fit, or a matrix or number is out of range and can be looked at.

    Example:
        >>> path = no_predictor_flow([[1.0]], [[0.5]], [0.0, 2.0], weight_decay=0.5)
        >>> round(float(path.ys[-1, 0, 0]), 6)  # exp(-2)
        0.135335
    """
    W0, X_aug_cov = require_arrays(W0=W0, X_aug_cov=X_aug_cov)
    require_shapes(W0=(W0, "n2 n1"), X_aug_cov=(X_aug_cov, "n1 n1"))
    eta = require_number("weight_decay", weight_decay, W0.dtype, at_least=0)
    return _decay(W0, require_covariance("X_aug_cov", X_aug_cov), eta, require_times(ts, W0.dtype))


@eqx.filter_jit
def _decay(W0, rates, eta, ts):
    """W0 exp(-(rates + eta I) (t - t_0)), rates a symmetric matrix."""
    # The exponential is squared once for every doubling of the time, and its rounding doubles.
    squarings = 32 if rates.dtype == jnp.float64 else 16
    grown = jax.vmap(lambda t: jax.scipy.linalg.expm(-t * rates, max_squarings=squarings))(ts - ts[0])
    ys = jnp.exp(-eta * (ts - ts[0]))[:, None, None] * (W0[None] @ grown)
    return Trajectory(ts, ys, all_finite(ys) & all_finite(ts))


def no_stop_gradient_flow(
    W0: ArrayLike,
    Wp: ArrayLike,
    X: ArrayLike,
    X_aug_cov: ArrayLike,
    ts: ArrayLike,
    *,
    weight_decay: ArrayLike,
) -> Trajectory:
    r"""Linear BYOL with a gradient through the target too, which goes to zero, in closed form.

        d vec(W)/dt = -[X' (x) (W_p^T W_p + I) + X (x) (W_p - I)^T (W_p - I) + eta I] vec(W)

    with the Kronecker product (x), vec stacking columns, and a predictor that is held. The matrix is positive
    semidefinite, and is zero without weight decay along directions that augmentation does not move and that
    the predictor keeps. It has n1 n2 rows, and is exponentiated densely.

    Source: tian2021directpred, the talk's slide on what does not work.

    Args:
        W0: the network at ts[0], (n2, n1).
        Wp: the predictor, (n2, n2), of any symmetry.
        X: covariance of means over augmentations, (n1, n1), positive semidefinite.
        X_aug_cov: X', mean covariance of augmentations, (n1, n1), positive semidefinite.
        ts: times, (T,).
        weight_decay: eta >= 0.

    Returns:
        A `Trajectory` of W, (T, n2, n1). Where the matrix times t - t_0 is above 10^10, in 32-bit 10^5, it is
        NaN and not `ok`: rounding of directions that are kept would be as large as they are.

    Raises:
        ValueError: the shapes do not fit, or a matrix or number is out of range and can be looked at.

    Example:
        >>> path = no_stop_gradient_flow([[1.0]], [[1.0]], [[1.0]], [[0.5]], [0.0, 2.0], weight_decay=0.0)
        >>> round(float(path.ys[-1, 0, 0]), 6)  # exp(-2)
        0.135335
    """
    W0, Wp, X, X_aug_cov = require_arrays(W0=W0, Wp=Wp, X=X, X_aug_cov=X_aug_cov)
    require_shapes(W0=(W0, "n2 n1"), Wp=(Wp, "n2 n2"), X=(X, "n1 n1"), X_aug_cov=(X_aug_cov, "n1 n1"))
    eta = require_number("weight_decay", weight_decay, W0.dtype, at_least=0)
    X, X_aug_cov = require_covariance("X", X), require_covariance("X_aug_cov", X_aug_cov)
    one = jnp.eye(len(Wp), dtype=Wp.dtype)
    matrix = jnp.kron(X_aug_cov, Wp.T @ Wp + one) + jnp.kron(X, (Wp - one).T @ (Wp - one))
    columns = W0.T.reshape(1, -1)
    path = _decay(columns, matrix, eta, require_times(ts, W0.dtype))
    return Trajectory(path.ts, path.ys.reshape(-1, *W0.T.shape).mT, path.ok)


def balance(W: ArrayLike, Wp: ArrayLike, predictor_rate: ArrayLike) -> Float[Array, "... n2 n2"]:
    r"""W W^T - W_p^T W_p / alpha_p, which decays like exp(-2 eta t) along `byol_flow`, whatever the data are.

    Source: tian2021directpred, Theorem 1 (its invariance is on the talk's slide on decoupled dynamics).

    Args:
        W: the online network, (..., n2, n1); leading axes, such as that of time, are kept.
        Wp: the predictor, (..., n2, n2).
        predictor_rate: alpha_p > 0.

    Returns:
        The matrices, (..., n2, n2).

    Raises:
        ValueError: the shapes do not fit, or a number is out of range and can be looked at.

    Example:
        >>> balance([[2.0]], [[1.0]], 0.5).tolist()
        [[2.0]]
    """
    W, Wp = require_arrays(W=W, Wp=Wp)
    require_shapes(W=(W, "... n2 n1"), Wp=(Wp, "... n2 n2"))
    alpha_p = require_positive("predictor_rate", predictor_rate, W.dtype)
    return W @ W.mT - Wp.mT @ Wp / alpha_p
