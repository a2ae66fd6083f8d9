"""Linear BYOL on isotropic data, by the correlation of its features and a symmetric predictor."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    require_arrays,
    require_number,
    require_shapes,
    require_symmetric,
)
from dynamics.flow import Trajectory, integrate


class Correlation(NamedTuple):
    """State of the isotropic flow; along a trajectory each has a leading axis of time.

    Attributes:
        F: W W^T, (n, n): the correlation of features of samples without augmentation.
        Wp: the predictor, (n, n), symmetric.
    """

    F: Any
    Wp: Any


class _Setting(NamedTuple):
    tau: Array
    spread: Array
    predictor_rate: Array
    weight_decay: Array


def isotropic_flow(
    F0: ArrayLike,
    Wp0: ArrayLike,
    tau: ArrayLike,
    ts: ArrayLike,
    *,
    augmentation_variance: ArrayLike,
    predictor_rate: ArrayLike,
    weight_decay: ArrayLike,
    **options: Any,
) -> Trajectory:
    r"""Linear BYOL on data with X = I, X' = sigma^2 I, for a target W_a = tau W and a symmetric predictor.

        dW_p/dt = -(alpha_p / 2) (1 + sigma^2) {W_p, F} + alpha_p tau F - eta W_p
        dF/dt   = -(1 + sigma^2) {W_p^2, F} + tau {W_p, F} - 2 eta F

    with {A, B} = A B + B A and F = W W^T. F is not the correlation of what the predictor is given, which
    contains the augmentation too and is (1 + sigma^2) F. The predictor's gradient is symmetrized.

    Source: tian2021directpred, Theorem 3 (its dynamics).

    Args:
        F0: correlation of features, (n, n), symmetric.
        Wp0: the predictor, (n, n), symmetric.
        tau: size of the target over that of the online network, a number that is held.
        ts: times, (T,).
        augmentation_variance: sigma^2 >= 0.
        predictor_rate: alpha_p >= 0.
        weight_decay: eta >= 0.
        **options: those of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys` the `Correlation`.

    Raises:
        ValueError: the shapes do not fit, or a matrix or number is out of range and can be looked at.
        RuntimeError: the solve failed.

    Example:
        >>> rates = {"augmentation_variance": 0.25, "predictor_rate": 1.0, "weight_decay": 0.0}
        >>> path = isotropic_flow([[0.3]], [[0.5]], 1.0, [0.0, 100.0], **rates)
        >>> round(float(path.ys.Wp[-1, 0, 0]), 6)  # 1 / (1 + sigma^2)
        0.8
    """
    state = _require_state("F0", F0, "Wp0", Wp0, "n n")
    rates = augmentation_variance, predictor_rate, weight_decay
    setting = _require_setting(state.F.dtype, tau, *rates)
    return integrate(_isotropic_field, state, ts, setting, **options)


def _isotropic_field(t, state, setting):
    (F, Wp), (tau, spread, alpha_p, eta) = state, setting
    dWp = -alpha_p / 2 * spread * _anticommutator(Wp, F) + alpha_p * tau * F - eta * Wp
    dF = -spread * _anticommutator(Wp @ Wp, F) + tau * _anticommutator(Wp, F) - 2 * eta * F
    return Correlation(dF, dWp)


def _anticommutator(A, B):
    return A @ B + B @ A


def alignment_matrix(
    F: ArrayLike,
    Wp: ArrayLike,
    tau: ArrayLike,
    *,
    augmentation_variance: ArrayLike,
    predictor_rate: ArrayLike,
    weight_decay: ArrayLike,
) -> Float[Array, "... n n"]:
    r"""The matrix K by which eigenspaces of predictor and features align along `isotropic_flow`.

        K = (1 + sigma^2) (alpha_p F / 2 + W_p^2) - tau W_p + (3/2) eta I
        d[F, W_p]/dt = -([F, W_p] K + K [F, W_p])

    so that |[F, W_p]|_F falls at least like exp(-2 lambda t) where no eigenvalue of K is ever below lambda.
    That lambda is positive is sufficient for alignment, and not necessary.

    Source: tian2021directpred, Theorem 3.

    Args:
        F: W W^T, (..., n, n), symmetric; leading axes, such as that of time, are kept.
        Wp: the predictor, (..., n, n), symmetric.
        tau: size of the target over that of the online network, a number.
        augmentation_variance: sigma^2 >= 0.
        predictor_rate: alpha_p >= 0.
        weight_decay: eta >= 0.

    Returns:
        The matrices, (..., n, n).

    Raises:
        ValueError: the shapes do not fit, or a matrix or number is out of range and can be looked at.

    Example:
        >>> rates = {"augmentation_variance": 1.0, "predictor_rate": 1.0, "weight_decay": 0.5}
        >>> alignment_matrix([[1.0]], [[0.5]], 1.0, **rates).tolist()  # 2 (1/2 + 1/4) - 1/2 + 3/4
        [[1.75]]
    """
    state = _require_state("F", F, "Wp", Wp, "... n n")
    rates = augmentation_variance, predictor_rate, weight_decay
    setting = _require_setting(state.F.dtype, tau, *rates)
    return _alignment(*state, *setting)


def _alignment(F, Wp, tau, spread, alpha_p, eta):
    one = jnp.broadcast_to(jnp.eye(F.shape[-1], dtype=F.dtype), F.shape)
    return spread * (alpha_p * F / 2 + Wp @ Wp) - tau * Wp + 1.5 * eta * one


def _require_state(F_name: str, F: ArrayLike, Wp_name: str, Wp: ArrayLike, axes: str) -> Correlation:
    first, second = require_arrays(**{F_name: F, Wp_name: Wp})
    require_shapes(**{F_name: (first, axes), Wp_name: (second, axes)})
    return Correlation(require_symmetric(F_name, first), require_symmetric(Wp_name, second))


def _require_setting(dtype: Any, tau, augmentation_variance, predictor_rate, weight_decay) -> _Setting:
    return _Setting(
        require_number("tau", tau, dtype),
        1 + require_number("augmentation_variance", augmentation_variance, dtype, at_least=0),
        require_number("predictor_rate", predictor_rate, dtype, at_least=0),
        require_number("weight_decay", weight_decay, dtype, at_least=0),
    )
