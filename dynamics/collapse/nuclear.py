"""Two linear layers with several outputs: regression with the nuclear norm for a penalty."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array

from dynamics.arguments import ArrayLike, nan_unless, require_number
from dynamics.collapse.moments import (
    Moments,
    nan_unless_finite,
    require_moments,
    resolvent,
    scaled,
    spectrum,
)
from dynamics.derivatives import nan_derivatives


class NuclearMinimum(NamedTuple):
    """The minimum of a network with two layers and several outputs.

    Attributes:
        loss: the loss there.
        B: the linear map that the network computes, (k, d). Modes that have collapsed are zero to rounding,
            and B is exactly zero where all have.
    """

    loss: Array
    B: Array


def nuclear_minimum(moments: Moments, gamma_u: ArrayLike, gamma_w: ArrayLike) -> NuclearMinimum:
    r"""The global minimum of E|U W x - y|^2 + gamma_u |U|^2 + gamma_w |W|^2, without noise, by B = U W.

        L* = min_B E|B x - y|^2 + 2 lambda |B|_*,   lambda = (gamma_u gamma_w)^{1/2}

    for at least min(k, d) hidden units; |B|_* is the sum of the singular values. The certificate is that
    R = E[y x^T] - B A has spectral norm <= lambda, and is lambda on the singular vectors of B. So B = 0 where
    lambda >= |E[y x^T]|_2, and modes go one by one below that; for A = I their singular values are those of
    E[y x^T] less lambda.

    Source: ziyin2022talk, Theorem 1 (for several outputs derived here).

    Args:
        moments: `Moments` of data with any number of outputs.
        gamma_u: strength of regularization of the output layer, >= 0.
        gamma_w: that of the hidden layer. Where one of the two is 0, B is the solution of least norm, and the
            loss an infimum that no finite weights reach unless both are.

    Returns:
        A `NuclearMinimum`, with derivatives in all numbers away from transitions; NaN where the search does
        not come to the certificate, which 32-bit does to a thousandth at best: turn on 64-bit. It takes a
        decomposition of a matrix of k min(k, d) rows: seconds for ten outputs, minutes for more than fifty.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> data = Moments(jnp.eye(2), jnp.diag(jnp.array([1.0, 0.3])), 1.09)
        >>> nuclear_minimum(data, 0.5, 0.5).B.round(6).tolist()  # one mode of two is left
        [[0.5, 0.0], [0.0, 0.0]]
    """
    moments = require_moments(moments, outputs=True)
    given = {"gamma_u": gamma_u, "gamma_w": gamma_w}
    u, w = (require_number(name, gamma, moments.A.dtype, at_least=0) for name, gamma in given.items())
    return _nuclear(moments, u, w)


@eqx.filter_jit
def _nuclear(moments, gamma_u, gamma_w):
    positive = (gamma_u > 0) & (gamma_w > 0)
    unit, log_A, log_c = scaled(moments)
    strength = jnp.sqrt(jnp.where(positive, gamma_u, 1)) * jnp.sqrt(jnp.where(positive, gamma_w, 1))
    strength = strength / jnp.exp(log_c)
    C, of = unit.c.reshape(unit.c.shape[0], -1).T, spectrum(unit.A)
    data = (unit.A, C, strength)
    U = _output_layer(data, of)
    B = U @ _hidden_layer(U, data, of)
    # The last step is one of proximal descent, which makes modes that have collapsed zero to rounding.
    B = B + jax.lax.stop_gradient(_proximal(B, data) - B)
    alive = strength < jnp.linalg.norm(jax.lax.stop_gradient(C), 2)
    gain = jnp.where(alive, jnp.sum(B * C) - strength * jnp.sum(U**2), 0)
    free = resolvent(jnp.zeros_like(strength), jnp.ones_like(strength), unit.A, C.T, of).T
    B = jnp.where(positive, jnp.where(alive, B, 0), free)
    # The value is that of the map itself; derivatives are those of the layers, which need no singular values.
    gain = gain + jax.lax.stop_gradient(jnp.where(alive, _gain(B, data), 0) - gain)
    certified = ~positive | ~alive | _is_certified(jax.lax.stop_gradient(B), data)
    loss = moments.y2 - jnp.exp(2 * log_c - log_A) * jnp.where(positive, gain, jnp.sum(free * C))
    # Close to zero the loss grows with the root of a strength.
    least = nan_derivatives(~positive, (loss, jnp.exp(log_c - log_A) * B), (gamma_u, gamma_w))
    certified = nan_unless(certified, jnp.ones_like(loss))
    return NuclearMinimum(*nan_unless_finite((moments, gamma_u, gamma_w, certified), least))


def _gain(B, data):
    """What the map gains over zero: 2 <B, C> - tr(B A B^T) - 2 lambda |B|_*."""
    A, C, strength = data
    penalty = jnp.sum(jnp.linalg.svd(B, compute_uv=False))
    return 2 * jnp.sum(B * C) - jnp.sum((B @ A) * B) - 2 * strength * penalty


def _is_certified(B, data):
    """Whether the rest has spectral norm lambda, and is lambda on the modes of the map."""
    A, C, strength = data
    rest, penalty = C - B @ A, jnp.sum(jnp.linalg.svd(B, compute_uv=False))
    slack = float(jnp.finfo(B.dtype).eps) ** 0.4
    feasible = jnp.linalg.norm(rest, 2) <= strength * (1 + slack)
    return feasible & (strength * penalty - jnp.sum(rest * B) <= slack * strength * penalty)


def _hidden_layer(U, data, of):
    """The best W for an output layer U: U^T U W A + lambda W = U^T C."""
    A, C, strength = data
    gram = U.T @ U
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    shifted = jnp.outer(jnp.maximum(values, 0), of.values) + jax.lax.stop_gradient(strength)

    def solve(_, right):
        return vectors @ (vectors.T @ right @ of.vectors / shifted) @ of.vectors.T

    return jax.lax.custom_linear_solve(lambda W: gram @ W @ A + strength * W, U.T @ C, solve, symmetric=True)


def _output_layer(data, of):
    """The best U where W is the best for it; rotations of the hidden units leave the loss as it is."""

    def loss(U, data):
        _, C, strength = data
        return strength * jnp.sum(U**2) - jnp.sum((U.T @ C) * _hidden_layer(U, data, of))

    fixed = jax.lax.stop_gradient(data)
    left, values, _ = jnp.linalg.svd(fixed[1], full_matrices=False)
    start = left * jnp.sqrt(values)[None]
    tolerance = 100 * float(jnp.finfo(start.dtype).eps)
    rounding = float(jnp.finfo(start.dtype).eps) ** 0.5
    found = optimistix.minimise(
        loss, optimistix.BFGS(rtol=tolerance, atol=tolerance), start, args=fixed, max_steps=2000, throw=False
    ).value

    def newton(linear, y):
        """Newton's step, of the least norm: it does not rotate."""
        hessian = jax.vmap(linear)(jnp.eye(y.size, dtype=y.dtype).reshape(-1, *y.shape)).reshape(y.size, -1)
        return (jnp.linalg.pinv(hessian, rtol=rounding, hermitian=True) @ y.reshape(-1)).reshape(y.shape)

    def polish(gradient, U):
        for _ in range(2):
            value, linear = jax.linearize(gradient, U)
            U = U - newton(linear, value)
        return U

    return jax.lax.custom_root(lambda U: jax.grad(loss)(U, data), found, polish, newton)


def _proximal(B, data):
    A, C, strength = data
    step = 1 / jnp.linalg.norm(A, 2)
    left, values, right = jnp.linalg.svd(B - step * (B @ A - C), full_matrices=False)
    return left * jnp.maximum(values - step * strength, 0)[None] @ right
