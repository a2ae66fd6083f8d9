"""Linear networks that ascend the contrastive energy: principal components, collapse of dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    brief,
    cast,
    require_arrays,
    require_every,
    require_shapes,
    require_sizes,
    require_symmetric,
)
from dynamics.flow import Trajectory, integrate

Weights = Sequence[ArrayLike]


class PrincipalComponent(NamedTuple):
    """The best that a deep linear network of unit weights can do.

    Attributes:
        energy: its energy, the largest eigenvalue, or 0 where that is negative and the product can vanish.
        direction: the eigenvector v_0 of that eigenvalue, (d,), up to its sign; one of many where it is
            repeated. Weights whose energy is 0 need not be along it.
    """

    energy: Array
    direction: Array


def deep_linear_energy(weights: Weights, X: ArrayLike) -> Float[Array, ""]:
    r"""Energy of a deep linear network, tr(W_L ... W_1 X W_1^T ... W_L^T), with X = C_alpha[x, x].

    Source: tian2022contrastive, the talk's slide on feature collapsing.

    Args:
        weights: matrices that follow each other, input side first: (d_1, d), (d_2, d_1), ...
        X: a symmetric matrix, (d, d).

    Returns:
        The energy, a number.

    Raises:
        ValueError: a shape does not fit, `X` is not symmetric, or numbers are not finite.

    Example:
        >>> float(deep_linear_energy([[[1.0, 0.0]], [[2.0]]], [[3.0, 0.0], [0.0, 1.0]]))
        12.0
    """
    return _energy(*_require(weights, X))


def deep_linear_maximum(X: ArrayLike, hidden: Sequence[int] = (2,)) -> PrincipalComponent:
    r"""The global maximum of `deep_linear_energy` over weights of unit Frobenius norm.

    Where the largest eigenvalue lambda of X is positive it is E* = lambda, with W_l = v_l v_{l-1}^T for unit
    vectors v_l, where v_0 is its eigenvector: the output has rank one, whatever depth and widths are.
    Where it is negative they count. A hidden layer of two units and more lets the matrices around it have
    the product zero, which is the maximum then; one matrix alone, or hidden layers of one unit each, have
    products of unit norm, and E* = lambda.

    Source: tian2022contrastive, Theorem 3 (what holds for lambda < 0 is derived here).

    Args:
        X: a symmetric matrix, (d, d).
        hidden: widths d_1, ..., d_{L-1} of the hidden layers; () for one matrix.

    Returns:
        A `PrincipalComponent`.

    Raises:
        ValueError: `X` has another shape, or is not symmetric, or not finite, or a width is no positive
            integer.

    Example:
        >>> float(deep_linear_maximum([[3.0, 0.0], [0.0, 1.0]]).energy)
        3.0
        >>> [float(deep_linear_maximum([[-2.0]], hidden).energy) for hidden in ((), (1,), (2,))]
        [-2.0, -2.0, 0.0]
    """
    values, vectors = jnp.linalg.eigh(_require_square(X))
    if isinstance(hidden, (str, bytes)) or not isinstance(hidden, Sequence):
        raise ValueError(f"hidden must be a list of widths, got {brief(hidden)}")
    widths = require_sizes(**{f"hidden[{index}]": width for index, width in enumerate(hidden)})
    vanishes = max(widths, default=1) > 1
    return PrincipalComponent(jnp.maximum(values[-1], 0) if vanishes else values[-1], vectors[:, -1])


def deep_linear_flow(weights: Weights, X: ArrayLike, ts: ArrayLike, **options: Any) -> Trajectory:
    r"""Ascent of `deep_linear_energy` on spheres, where each matrix has unit Frobenius norm.

        dW_l/dt = G_l - (<G_l, W_l> / <W_l, W_l>) W_l,   G_l = dE/dW_l

    With many layers random weights start close to a flat saddle: six take until t = 10^4.

    Source: tian2022contrastive, Theorem 3 (its dynamics).

    Args:
        weights: matrices that follow each other, input side first, of unit Frobenius norm.
        X: C_alpha[x, x], symmetric, (d, d).
        ts: times, (T,).
        **options: those of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` whose `ys` are the list of weights, each with leading axis T.

    Raises:
        ValueError: a shape does not fit, a norm is not one, `X` is not symmetric, or numbers are not finite.
        RuntimeError: the solve failed.

    Example:
        >>> path = deep_linear_flow([[[0.6, 0.8]]], [[3.0, 0.0], [0.0, 1.0]], [0.0, 20.0])
        >>> path.ys[0][-1].round(6).tolist()
        [[1.0, 0.0]]
    """
    matrices, X = _require(weights, X)
    slack = 100 * float(jnp.finfo(X.dtype).eps)
    for index, W in enumerate(matrices):
        norm = jnp.linalg.norm(W)
        one = require_every(f"weights[{index}]", norm, lambda n: abs(n - 1) < slack, "of unit Frobenius norm")
        matrices[index] = W * (one / norm)  # NaN where it is traced and bad
    return integrate(_sphere_field, matrices, ts, X, **options)


def _energy(weights, X):
    product = weights[0]
    for W in weights[1:]:
        product = W @ product
    return jnp.sum((product @ X) * product)


def _sphere_field(t, weights, X):
    def tangent(W, G):
        return G - (jnp.sum(G * W) / jnp.sum(W * W)) * W

    return jax.tree.map(tangent, weights, jax.grad(_energy)(weights, X))


def _require(weights: Weights, X: ArrayLike) -> tuple[list[Array], Array]:
    X = _require_square(X)
    named = _require_list(weights)
    matrices = [cast(W, X.dtype) for W in require_arrays(**named)]
    width = len(X)
    for name, W in zip(named, matrices, strict=True):
        if W.ndim != 2 or W.shape[1] != width:
            raise ValueError(f"{name} must have shape (m, {width}), got shape {W.shape}")
        width = W.shape[0]
    return matrices, X


def _require_list(weights: Weights) -> dict[str, ArrayLike]:
    """The weights by name, one at least."""
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence) or not len(weights):
        raise ValueError(f"weights must be a list of matrices, got {brief(weights)}")
    return {f"weights[{index}]": W for index, W in enumerate(weights)}


def _require_square(X: ArrayLike) -> Array:
    (X,) = require_arrays(X=X)
    require_shapes(X=(X, "d d"))
    return require_symmetric("X", X)


def encoder_flow(weights: Weights, X: ArrayLike, ts: ArrayLike, **options: Any) -> Trajectory:
    r"""Contrastive training of a linear encoder with a fixed covariance: which dimensions collapse.

        dW_l/dt = (1/2) dE/dW_l:   dW/dt = W X,   or   dW_1/dt = W_2^T W_2 W_1 X,  dW_2/dt = W_2 W_1 X W_1^T

    It is descent of the loss, whose gradient is -dE/dW / 2 where X = C_alpha[x, x] is held. A single layer
    shrinks along directions of X with negative eigenvalues, which strong augmentation makes, and two layers
    grow along few of them from small weights; W_{l+1}^T W_{l+1} - W_l W_l^T is conserved.

    Source: jing2022, the talk's slide on representation collapse (this flow is derived here).

    Args:
        weights: matrices that follow each other, input side first.
        X: C_alpha[x, x], symmetric, (d, d).
        ts: times, (T,).
        **options: those of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` whose `ys` are the list of weights, each with leading axis T.

    Raises:
        ValueError: a shape does not fit, `X` is not symmetric, or numbers are not finite.
        RuntimeError: the solve failed.

    Example:
        >>> path = encoder_flow([[[1.0]]], [[-2.0]], [0.0, 1.0])  # exp(-2)
        >>> round(float(path.ys[0][-1, 0, 0]), 6)
        0.135335
    """
    matrices, X = _require(weights, X)
    return integrate(_encoder_field, matrices, ts, X, **options)


def _encoder_field(t, weights, X):
    return jax.tree.map(lambda G: G / 2, jax.grad(_energy)(weights, X))


def balance(weights: Weights) -> list[Float[Array, "... m m"]]:
    r"""W_{l+1}^T W_{l+1} - W_l W_l^T of all neighbours: what `encoder_flow` conserves.

    Source: jing2022, the talk's slide on representation collapse (this is derived here).

    Args:
        weights: matrices that follow each other, input side first; leading axes, such as that of time, are
            kept.

    Returns:
        The matrices, (..., d_l, d_l), one less than there are weights.

    Raises:
        ValueError: there are no matrices, one does not fit the one before or has other leading axes, or
            numbers are not finite.

    Example:
        >>> [part.tolist() for part in balance([[[1.0], [2.0]], [[3.0, 1.0]]])]
        [[[8.0, 1.0], [1.0, -3.0]]]
    """
    named = _require_list(weights)
    matrices = require_arrays(**named)
    for W, after in itertools.pairwise(matrices):
        if min(W.ndim, after.ndim) < 2 or (*after.shape[:-2], after.shape[-1]) != W.shape[:-1]:
            raise ValueError(
                "weights must be matrices that follow each other, with the same leading axes, got "
                f"{W.shape}, {after.shape}"
            )
    return [
        jnp.swapaxes(after, -1, -2) @ after - W @ jnp.swapaxes(W, -1, -2)
        for W, after in itertools.pairwise(matrices)
    ]


def aligned_flow(values: ArrayLike, gain: ArrayLike, ts: ArrayLike, **options: Any) -> Trajectory:
    r"""Two aligned layers by their singular values, a pair for each direction v of X with gain v^T X v.

        ds_1/dt = s_1 s_2^2 v^T X v,   ds_2/dt = s_2 s_1^2 v^T X v

    Source: jing2022, the talk's slide on representation collapse (this flow is derived here).

    Args:
        values: singular values of both layers, (2, r).
        gain: v^T X v of each direction, (r,).
        ts: times, (T,).
        **options: those of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` of the values, (T, 2, r).

    Raises:
        ValueError: a shape does not fit, or numbers are not finite.
        RuntimeError: the solve failed.

    Example:
        >>> path = aligned_flow([[1.0], [1.0]], [-0.5], [0.0, 2.0])
        >>> [round(float(value), 5) for value in path.ys[-1, :, 0]]  # 1 / sqrt(1 + t)
        [0.57735, 0.57735]
    """
    values, gain = require_arrays(values=values, gain=gain)
    if values.ndim != 2 or values.shape[0] != 2 or gain.shape != values.shape[1:]:
        raise ValueError(
            f"values and gain must have shapes (2, r) and (r,), got {values.shape}, {gain.shape}"
        )
    return integrate(_aligned_field, values, ts, gain, **options)


def _aligned_field(t, s, gain):
    return s * s[::-1] ** 2 * gain[None]
