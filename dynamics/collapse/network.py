"""Linear networks with multiplicative noise on their hidden units: the loss, its flow, and sweeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    require_every,
    require_finite,
    require_number,
    require_positive,
    require_shape,
)
from dynamics.collapse.moments import Moments, require_moments
from dynamics.flow import Trajectory, gradient_flow, integrate

Params = Sequence[ArrayLike]


def stochastic_linear_loss(
    params: Params, moments: Moments, noise_variance: ArrayLike, gammas: ArrayLike
) -> Float[Array, ""]:
    r"""Loss of a linear network whose hidden units are multiplied by noise, which is integrated exactly.

        L = E |U diag(e_D) W_D ... diag(e_1) W_1 x - y|^2 + sum_k gamma_k |W_k|_F^2,   W_{D+1} = U

    where the noise e_k has independent entries of mean 1 and variance s. Only these two enter: the mean of
    W_1 x and its second moment S go up layer by layer, S <- W S W^T, then S <- S + s diag(S). Dropout at rate
    p, which divides what it keeps by 1 - p, has s = p / (1 - p). Neither term has a factor 1/2, so that a
    weight decay that is added to the gradient is 2 gamma.

    Source: ziyin2022talk, Equations 2 and 9.

    Args:
        params: the D + 1 weight matrices, input side first: (d_1, d), (d_2, d_1), ..., (k, d_D); k = 1 for
            one output. One matrix alone, (k, d), is ridge regression.
        moments: `Moments` of the data.
        noise_variance: s, a number >= 0.
        gammas: strengths of regularization, >= 0, in the order of `params`, shape (D + 1,).

    Returns:
        L, a number; NaN where a traced argument is out of range.

    Raises:
        ValueError: an argument has another shape, or is out of range and can be looked at.

    Example:
        >>> data = Moments([[1.0]], [1.0], 1.0)
        >>> float(stochastic_linear_loss([[[1.0]], [[1.0]]], data, 0.5, [0.1, 0.1])).__round__(6)
        0.7
    """
    return _loss(*_require(params, moments, noise_variance, gammas))


def stochastic_linear_flow(
    params: Params,
    moments: Moments,
    noise_variance: ArrayLike,
    gammas: ArrayLike,
    ts: ArrayLike,
    **options: Any,
) -> Trajectory:
    r"""Gradient flow dW_k/dt = -dL/dW_k of `stochastic_linear_loss`, of any depth.

    Where all gammas are equal, the imbalance of every hidden unit decays as exp(-4 gamma t), see `imbalance`.

    Source: ziyin2022talk, Equations 2 and 9.

    Args:
        params: weights at ts[0], as in `stochastic_linear_loss`.
        moments: `Moments` of the data.
        noise_variance: s, a number >= 0.
        gammas: strengths of regularization, shape (D + 1,).
        ts: times that increase strictly, shape (T,).
        **options: options of `dynamics.flow.integrate`. Close to a transition the flow slows down: solve long
            horizons with `solver=diffrax.Kvaerno5()`.

    Returns:
        A `Trajectory` whose `ys` are the weights, a list with leading axis T.

    Raises:
        ValueError: an argument has another shape, or is out of range and can be looked at.
        RuntimeError: the solve failed.

    Example:
        >>> path = stochastic_linear_flow([[[0.0]]], Moments([[1.0]], [1.0], 1.0), 0.0, [1.0], [0.0, 9.0])
        >>> path.ys[0][-1].round(6).tolist()  # ridge: c / (A + gamma)
        [[0.5]]
    """
    weights, *args = _require(params, moments, noise_variance, gammas)
    return integrate(_flow, weights, ts, tuple(args), **options)


def imbalance(params: Params) -> list[Array]:
    r"""|outgoing weights|^2 - |incoming weights|^2 of every hidden unit, an array (d_k,) per hidden layer.

    Along the flow of the loss it obeys d/dt = -4 gamma_{k+1} |outgoing|^2 + 4 gamma_k |incoming|^2, whatever
    the noise. At a stationary point gamma_{k+1} |outgoing|^2 = gamma_k |incoming|^2.

    Source: ziyin2022talk, Theorem 2 (deep linear networks), Equation 11 (its dynamics is derived here).

    Args:
        params: as in `stochastic_linear_loss`; leading axes, such as that of time, are kept.

    Returns:
        The imbalances, (..., d_k).

    Raises:
        ValueError: a matrix does not fit the one before.

    Example:
        >>> [part.tolist() for part in imbalance([[[1.0], [2.0]], [[3.0, 1.0]]])]
        [[8.0, -3.0]]
    """
    weights = [require_finite("params", as_real("params", W)) for W in params]
    for W, after in itertools.pairwise(weights):
        if min(W.ndim, after.ndim) < 2 or after.shape[-1] != W.shape[-2] or not W.size:
            raise ValueError(f"params must be matrices that follow each other, got {W.shape}, {after.shape}")
    return [jnp.sum(after**2, axis=-2) - jnp.sum(W**2, axis=-1) for W, after in itertools.pairwise(weights)]


class Sweep(NamedTuple):
    """What is left of a network at each of many strengths of regularization, one after the other.

    Attributes:
        params: the weights, a list with leading axis K.
        ok: whether the flow reached the horizon, (K,).
    """

    params: list[Array]
    ok: Array


def hysteresis_sweep(
    params: Params,
    moments: Moments,
    noise_variance: ArrayLike,
    path: ArrayLike,
    key: Array,
    *,
    kick: ArrayLike = 1e-3,
    horizon: ArrayLike = 100.0,
) -> Sweep:
    r"""Follow the gradient flow while the regularization changes in steps, from where the last step ended.

    Before every step noise is added to all weights. A network that has collapsed is otherwise closer to zero
    than any disturbance that training has, and stays there long after zero has become unstable: what would
    look like hysteresis.

    Source: ziyin2022talk, slide on escaping (the sweep is this project's own).

    Args:
        params: weights at the first step, as in `stochastic_linear_loss`.
        moments: `Moments` of the data.
        noise_variance: s, a number >= 0.
        path: the strengths, (K, D + 1), or (K,) where those of all layers are equal.
        key: of the noise.
        kick: standard deviation of the noise, a number >= 0; large ones carry deep networks out of zero.
        horizon: the time spent at each step, a positive number.

    Returns:
        A `Sweep`.

    Raises:
        ValueError: an argument has another shape, or is out of range and can be looked at.

    Example:
        >>> data, path = Moments([[1.0]], [1.0], 1.0), [0.5, 2.0]
        >>> swept = hysteresis_sweep([[[0.5]], [[0.5]]], data, 0.0, path, jax.random.key(0))
        >>> abs(swept.params[0][:, 0, 0]).round(3).tolist()  # collapsed above gamma = |c| = 1
        [0.707, 0.0]
    """
    _require_list(params)
    path = as_real("path", path)
    if path.ndim == 1:
        path = jnp.broadcast_to(path[:, None], (path.size, len(params)))
    if path.ndim != 2 or path.shape[1] != len(params) or path.size == 0:
        raise ValueError(f"path must have shape (K,) or (K, {len(params)}), got shape {path.shape}")
    path = _require_strengths("path", path)
    weights, moments, noise_variance, _ = _require(params, moments, noise_variance, jnp.zeros(len(params)))
    dtype = weights[0].dtype
    kick = require_number("kick", kick, dtype, at_least=0)
    horizon = require_positive("horizon", horizon, dtype)
    return _swept(weights, moments, noise_variance, cast(path, dtype), key, kick, horizon)


@eqx.filter_jit
def _swept(params, moments, noise_variance, path, key, kick, horizon):
    ts = horizon * jnp.arange(2, dtype=horizon.dtype)

    def step(params, now):
        gammas, key = now
        keys = jax.random.split(key, len(params))
        start = [W + kick * jax.random.normal(k, W.shape, W.dtype) for W, k in zip(params, keys, strict=True)]
        args = (moments, noise_variance, gammas)
        flow = integrate(_flow, start, ts, args, throw=False)
        end = jax.tree.map(lambda leaf: leaf[-1], flow.ys)
        return end, Sweep(end, flow.ok)

    return jax.lax.scan(step, params, (path, jax.random.split(key, path.shape[0])))[1]


def _loss(params, moments, noise_variance, gammas):
    *hidden, U = params
    S, m = moments.A, moments.c.reshape(moments.c.shape[0], -1)
    for W in hidden:
        S, m = W @ S @ W.T, W @ m
        S = S + noise_variance * jnp.diag(jnp.diag(S))
    error = jnp.trace(U @ S @ U.T) - 2 * jnp.trace(U @ m) + moments.y2
    return error + sum(gamma * jnp.sum(W**2) for gamma, W in zip(gammas, params, strict=True))


_flow = gradient_flow(lambda params, args: _loss(params, *args))


def _require(params, moments, noise_variance, gammas):
    """The arguments of the loss as arrays of one dtype, with shapes that fit."""
    moments = require_moments(moments, outputs=True)
    dtype = moments.A.dtype
    _require_list(params)
    weights = [cast(require_finite("params", as_real("params", W)), dtype) for W in params]
    outputs = moments.c.reshape(moments.c.shape[0], -1).shape[1]
    width = moments.A.shape[0]
    for W in weights:
        if W.ndim != 2 or W.shape[1] != width or W.shape[0] == 0:
            raise ValueError(f"params must be matrices, the next one (m, {width}), got shape {W.shape}")
        width = W.shape[0]
    if width != outputs:
        raise ValueError(f"params must end in a matrix of {outputs} rows, one per output, got {width}")
    gammas = cast(as_real("gammas", gammas), dtype)
    require_shape("gammas", gammas, (len(weights),))
    noise_variance = require_number("noise_variance", noise_variance, dtype, at_least=0)
    return weights, moments, noise_variance, _require_strengths("gammas", gammas)


def _require_list(params):
    if isinstance(params, (str, bytes)) or not isinstance(params, Sequence) or not len(params):
        raise ValueError(f"params must be a list of matrices, got {type(params).__name__}")


def _require_strengths(name: str, gammas: Array) -> Array:
    return require_every(name, gammas, lambda g: (g >= 0) & (g < jnp.inf), "finite and >= 0")
