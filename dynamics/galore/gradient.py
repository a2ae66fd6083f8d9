"""Gradient of a layer of a reversible network, and its linear dynamics under gradient descent."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    as_real,
    cast,
    nan_unless,
    require_arrays,
    require_choice,
    require_every,
    require_number,
    require_positive,
    require_shapes,
    require_symmetric,
)
from dynamics.flow import ArrayLike

Loss = Literal["squared", "softmax"]


class GradientTerms(NamedTuple):
    """Coefficients of a gradient that is affine in the weights, one of each per sample.

    Attributes:
        A: (N, m, n).
        B: (N, m, m), positive semidefinite.
        C: (N, n, n), positive semidefinite.
    """

    A: Array
    B: Array
    C: Array


def reversible_terms(
    J: ArrayLike, f: ArrayLike, y: ArrayLike, loss: Loss | str, *, degree: ArrayLike = 1.0
) -> GradientTerms:
    r"""Coefficients of the gradient of a layer W inside of a network without biases, output J_i W f_i / k.

        squared:  A_i = J_i^T y_i f_i^T,      B_i = J_i^T J_i / k,          C_i = f_i f_i^T
        softmax:  A_i = J_i^T P1 y_i f_i^T,   B_i = J_i^T P1 J_i / (d k),   P1 = I - 1 1^T / d

    The degree k is one behind linear layers and rectifiers. Monomials x^p multiply it by p each, by Euler's
    theorem on homogeneous functions: then K forward and K^T backward, as printed, are off by that factor.

    The form is exact for half the squared error. For cross-entropy it is an approximation near zero logits,
    whose relative error is of second order in them; the J P1 y that is printed for it has a shape that does
    not fit.

    Source: zhao2024galore, Theorem 3.2.

    Args:
        J: Jacobians of the outputs with respect to the layer's output, (N, d, m).
        f: inputs of the layer, (N, n).
        y: targets, (N, d); one-hot, or probabilities, for the softmax.
        loss: "squared" or "softmax".
        degree: k, positive, of what lies behind the layer as a homogeneous function.

    Returns:
        The terms of `reversible_gradient`.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, the degree is not positive, or the loss is
            unknown.

    Example:
        >>> terms = reversible_terms([[[2.0]]], [[3.0]], [[5.0]], "squared")
        >>> reversible_gradient(*terms, [[1.0]]).tolist()  # (5 - 2 * 1 * 3) * 2 * 3
        [[-6.0]]
    """
    J, f, y = require_arrays(J=J, f=f, y=y)
    require_shapes(J=(J, "N d m"), f=(f, "N n"), y=(y, "N d"))
    require_choice("loss", loss, get_args(Loss))
    return _terms(J, f, y, loss, require_positive("degree", degree, J.dtype))


@eqx.filter_jit
def _terms(J, f, y, loss, degree):
    seen, share = J, degree
    if loss == "softmax":
        seen, share = J - jnp.mean(J, axis=1, keepdims=True), J.shape[1] * degree
    A = jnp.einsum("adm,ad,an->amn", seen, y, f)
    B = jnp.einsum("adm,adk->amk", seen, J) / share
    return GradientTerms(A, B, f[:, :, None] * f[:, None, :])


def reversible_gradient(A: ArrayLike, B: ArrayLike, C: ArrayLike, W: ArrayLike) -> Float[Array, "m n"]:
    r"""Negative gradient of a layer: G = (1/N) sum_i (A_i - B_i W C_i); descent is W <- W + eta G.

    Source: zhao2024galore, Theorem 3.2 and Equation 6.

    Args:
        A: (N, m, n).
        B: (N, m, m).
        C: (N, n, n).
        W: weights, (m, n).

    Returns:
        G, (m, n).

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.

    Example:
        >>> reversible_gradient([[[5.0]]], [[[2.0]]], [[[3.0]]], [[0.5]]).tolist()
        [[2.0]]
    """
    W, A, B, C = require_arrays(W=W, A=A, B=B, C=C)
    require_shapes(W=(W, "m n"), A=(A, "N m n"), B=(B, "N m m"), C=(C, "N n n"))
    return _gradient(A, B, C, W)


@eqx.filter_jit
def _gradient(A, B, C, W):
    return jnp.mean(A - B @ W @ C, axis=0)


def gradient_operator(B: ArrayLike, C: ArrayLike) -> Float[Array, "mn mn"]:
    r"""S = (1/N) sum_i C_i (x) B_i: what one step of descent takes from the gradient.

    While A_i, B_i and C_i stay as they are, vec(G_{t+1}) = (I - eta S) vec(G_t), where vec stacks columns.

    Source: zhao2024galore, Lemma 3.3.

    Args:
        B: symmetric, (N, m, m).
        C: symmetric, (N, n, n).

    Returns:
        S, (mn, mn).

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.

    Example:
        >>> gradient_operator(jnp.diag(jnp.array([1.0, 2.0]))[None], 3 * jnp.eye(1)[None]).tolist()
        [[3.0, 0.0], [0.0, 6.0]]
    """
    B, C = require_arrays(B=B, C=C)
    require_shapes(B=(B, "N m m"), C=(C, "N n n"))
    return kronecker_mean(B, C)


@eqx.filter_jit
def kronecker_mean(B: Array, C: Array) -> Array:
    """(1/N) sum_i C_i (x) B_i, (..., mn, mn), of factors (..., N, m, m) and (..., N, n, n)."""
    # Entry (i, j) of a matrix is number j m + i of its vec.
    S = jnp.einsum("...aik,...alj->...jilk", B, C) / B.shape[-3]
    size = B.shape[-1] * C.shape[-1]
    return S.reshape(*B.shape[:-3], size, size)


def gradient_iterates(
    G0: ArrayLike, S: ArrayLike, learning_rate: ArrayLike, steps: ArrayLike
) -> Float[Array, "*steps m n"]:
    r"""Gradients under descent with constant coefficients: vec(G_t) = (I - eta S)^t vec(G_0).

    Source: zhao2024galore, Lemma 3.3.

    Args:
        G0: gradient at step 0, (m, n).
        S: symmetric, (mn, mn), for instance from `gradient_operator`.
        learning_rate: eta, at least 0.
        steps: t, integers >= 0 of any shape.

    Returns:
        G_t, shape (*steps.shape, m, n). NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, S is not symmetric, or a number is out of range.

    Example:
        >>> gradient_iterates([[1.0], [1.0]], jnp.diag(jnp.array([1.0, 0.5])), 0.5, 2)[:, 0].tolist()
        [0.25, 0.5625]
    """
    return _iterates(*require_linear(G0, S, learning_rate, steps))


@eqx.filter_jit
def _iterates(G0, S, learning_rate, steps):
    values, vectors = jnp.linalg.eigh(S)
    decay = power(1 - learning_rate * over_steps(values, steps), steps[..., None])
    weights = vectors.T @ vec(G0)
    return matrices(jnp.einsum("kv,...v,v->...k", vectors, decay, weights), G0.shape)


def vec(G: Array) -> Array:
    """The columns of a matrix, one after the other."""
    return G.T.reshape(-1)


def matrices(vecs: Array, shape: tuple[int, ...]) -> Array:
    """Matrices (..., m, n) from their `vec`."""
    return vecs.reshape(*vecs.shape[:-1], *shape[::-1]).mT


def power(base: Array, t: Array) -> Array:
    """base^t for whole t >= 0, the base of any sign; NaN^0 and 1^NaN are NaN."""
    return nan_unless(~(jnp.isnan(base) | jnp.isnan(t)), base**t)


def over_steps(values: Array, steps: Array) -> Array:
    """Values (k,) beside steps, so that both broadcast to (*steps, k)."""
    return values.reshape((1,) * steps.ndim + values.shape)


def require_linear(
    G0: ArrayLike, S: ArrayLike, learning_rate: ArrayLike, steps: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """The arguments of linear dynamics, checked, in the dtype of G0."""
    G0, S = require_arrays(G0=G0, S=S)
    if G0.ndim != 2 or S.shape != 2 * (G0.size,):
        raise ValueError(f"G0 and S must have shapes (m, n) and (mn, mn), got {G0.shape} and {S.shape}")
    return G0, require_symmetric("S", S), *require_descent(learning_rate, steps, G0.dtype)


def require_descent(learning_rate: ArrayLike, steps: ArrayLike, dtype: Any) -> tuple[Array, Array]:
    """A learning rate >= 0 and whole steps >= 0 as arrays of a dtype."""
    learning_rate, rule = require_number("learning_rate", learning_rate, dtype, at_least=0), "integers >= 0"
    steps = require_every(
        "steps", cast(as_real("steps", steps), dtype), lambda t: (t >= 0) & (t < np.inf), rule
    )
    return learning_rate, require_every("steps", steps, lambda t: t % 1 == 0, rule)
