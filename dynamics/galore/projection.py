"""Gradient descent inside a fixed subspace: its closed form, and how fast the gradient contracts there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    brief,
    require_arrays,
    require_choice,
    require_number,
    require_shapes,
    require_symmetric,
)
from dynamics.flow import ArrayLike
from dynamics.galore.gradient import (
    kronecker_mean,
    matrices,
    over_steps,
    power,
    require_descent,
    vec,
)
from dynamics.galore.stable_rank import Form
from dynamics.spectra import after, require_orthonormal


class ProjectedDescent(NamedTuple):
    """Gradient descent inside a fixed subspace, at the steps asked for.

    Attributes:
        projected: R_t = P^T G_t Q, (*steps, r, s).
        gradient: G_t, (*steps, m, n).
        change: W_t - W_0, (*steps, m, n).
    """

    projected: Array
    gradient: Array
    change: Array


def projected_coefficients(B: ArrayLike, P: ArrayLike) -> Float[Array, "*batch r r"]:
    r"""Coefficients seen inside a subspace, P^T B_i P; likewise Q^T C_i Q.

    Source: zhao2024galore, Theorem 3.8.

    Args:
        B: (..., m, m).
        P: orthonormal columns, (m, r).

    Returns:
        (..., r, r).

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or the columns are not orthonormal.

    Example:
        >>> projected_coefficients(jnp.diag(jnp.array([1.0, 2.0]))[None], [[0.0], [1.0]]).tolist()
        [[[2.0]]]
    """
    B, P = require_arrays(B=B, P=P)
    require_shapes(B=(B, "... m m"), P=(P, "m r"))
    return _compressed(B, require_orthonormal("P", P))


@eqx.filter_jit
def _compressed(B, P):
    return jnp.einsum("mr,...mk,ks->...rs", P, B, P)


def contraction_factor(
    B_hat: ArrayLike,
    C_hat: ArrayLike,
    learning_rate: ArrayLike,
    form: Form | str,
    *,
    lipschitz: tuple[ArrayLike, ...] = (0, 0, 0),
    weight_bound: ArrayLike = 0,
    sup_B: ArrayLike = 0,
    sup_C: ArrayLike = 0,
) -> Float[Array, ""]:
    r"""Factor q of |R_t|_F <= q |R_{t-1}|_F for R = P^T G Q under W <- W + eta P R Q^T, with P and Q fixed.

        printed:  1 - eta ((1/N) sum_i min_t lmin(B_i) lmin(C_i) - L_A - L_B L_C D^2)
        valid:    max_t |I - eta S|_2 + eta (L_A + D (L_B sup|C| + L_C sup|B|)),   S = (1/N) sum_i C_i (x) B_i

    with B_i, C_i for P^T B_i P, Q^T C_i Q. The printed product of the constants does not bound
    how much a change of B moves B W C: with L_C = 0 it sees no such change. It also forgets that a step
    can overshoot: |I - eta S|_2 is 1 - eta lmin(S) up to eta = 2 / (lmin(S) + lmax(S)) only, and exceeds one
    from 2 / lmax(S) on.

    Source: zhao2024galore, Theorem 3.8; the valid form is derived here.

    Args:
        B_hat: P^T B_i P, (*times, N, r, r), symmetric, positive semidefinite; leading axes are times.
        C_hat: Q^T C_i Q, (*times, N, s, s).
        learning_rate: eta, at least 0.
        form: "printed" or "valid".
        lipschitz: L_A, L_B, L_C: of A, B and C as functions of the weights, averages over the samples.
        weight_bound: D, at least |W_t|_2.
        sup_B: at least |B_i|_2, before the projection; only "valid" has it.
        sup_C: at least |C_i|_2.

    Returns:
        q, a scalar; NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, or a number is out of range.

    Example:
        >>> B_hat, C_hat = jnp.array([[[1.0]], [[3.0]]]), jnp.ones((2, 1, 1))
        >>> [float(contraction_factor(B_hat, C_hat, 0.25, form)) for form in ("printed", "valid")]
        [0.5, 0.5]
    """
    require_choice("form", form, get_args(Form))
    B, C = require_arrays(B_hat=B_hat, C_hat=C_hat)
    require_shapes(B_hat=(B, "... N r r"), C_hat=(C, "... N s s"))
    B, C = require_symmetric("B_hat", B), require_symmetric("C_hat", C)
    if not isinstance(lipschitz, Sequence) or len(lipschitz) != 3:
        raise ValueError(f"lipschitz must be three numbers L_A, L_B, L_C, got {brief(lipschitz)}")
    named = {
        "learning_rate": learning_rate,
        **{f"lipschitz[{i}]": constant for i, constant in enumerate(lipschitz)},
        "weight_bound": weight_bound,
        "sup_B": sup_B,
        "sup_C": sup_C,
    }
    numbers = [require_number(name, value, B.dtype, at_least=0) for name, value in named.items()]
    return _contraction(B, C, numbers, form)


@eqx.filter_jit
def _contraction(B, C, numbers, form):
    eta, L_A, L_B, L_C, D, sup_B, sup_C = numbers
    if form == "printed":
        of_B = jnp.linalg.eigvalsh(B)[..., 0]
        smallest = of_B * jnp.linalg.eigvalsh(after(of_B, C))[..., 0]
        slowest = jnp.min(smallest.reshape(-1, smallest.shape[-1]), axis=0)
        return 1 - eta * (jnp.mean(slowest) - L_A - L_B * L_C * D**2)
    values = jnp.linalg.eigvalsh(kronecker_mean(B, C))
    return jnp.max(jnp.abs(1 - eta * values)) + eta * (L_A + D * (L_B * sup_C + L_C * sup_B))


def projected_descent(
    G0: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    P: ArrayLike,
    Q: ArrayLike,
    learning_rate: ArrayLike,
    steps: ArrayLike,
) -> ProjectedDescent:
    r"""Descent W <- W + eta P P^T G Q Q^T inside a fixed subspace, with constant B_i and C_i, in closed form.

        vec(R_t) = (I - eta S)^t vec(R_0),   W_t - W_0 = eta P (R_0 + ... + R_{t-1}) Q^T
        G_t = G_0 - (1/N) sum_i B_i (W_t - W_0) C_i

    with S the `gradient_operator` of P^T B_i P and Q^T C_i Q. Where S is positive definite R_t goes to zero;
    the gradient outside of the subspace stays.

    Source: zhao2024galore, Theorem 3.8 and the remark after it.

    Args:
        G0: negative gradient at step 0, (m, n).
        B: symmetric, (N, m, m).
        C: symmetric, (N, n, n).
        P: orthonormal columns, (m, r); the identity projects nothing.
        Q: orthonormal columns, (n, s).
        learning_rate: eta, at least 0.
        steps: t, integers >= 0 of any shape.

    Returns:
        R_t, G_t and W_t - W_0 at these steps. NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, a number is out of range, B or C is not symmetric, or columns are
            not orthonormal.

    Example:
        >>> eye = jnp.eye(2)[None]
        >>> path = projected_descent([[4.0, 0.0], [0.0, 3.0]], eye, eye, jnp.eye(2, 1), jnp.eye(2), 0.5, 2)
        >>> path.projected.tolist(), path.gradient.tolist()
        ([[1.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]])
    """
    G0, B, C, P, Q = require_arrays(G0=G0, B=B, C=C, P=P, Q=Q)
    axes = {"G0": (G0, "m n"), "B": (B, "N m m"), "C": (C, "N n n"), "P": (P, "m r"), "Q": (Q, "n s")}
    require_shapes(**axes)
    B, C = require_symmetric("B", B), require_symmetric("C", C)
    P, Q = require_orthonormal("P", P), require_orthonormal("Q", Q)
    learning_rate, steps = require_descent(learning_rate, steps, G0.dtype)
    return _projected(G0, B, C, P, Q, learning_rate, steps)


@eqx.filter_jit
def _projected(G0, B, C, P, Q, learning_rate, steps):
    R0 = P.T @ G0 @ Q
    S = kronecker_mean(_compressed(B, P), _compressed(C, Q))
    values, vectors = jnp.linalg.eigh(S)
    weights = vectors.T @ vec(R0)
    x, t = learning_rate * over_steps(values, steps), steps[..., None]
    # eta (1 + q + ... + q^{t-1}), q = 1 - x: (1 - q^t) / lambda would cancel where x is small.
    small = jnp.abs(x) < 0.5
    close = -jnp.expm1(t * jnp.log1p(-jnp.where(small, x, 0)))
    taken = jnp.where(small, close, 1 - power(1 - x, t)) / jnp.where(x == 0, 1, x)
    taken = learning_rate * jnp.where(x == 0, t, taken)

    def path(factors):
        return matrices(jnp.einsum("kv,...v,v->...k", vectors, factors, weights), R0.shape)

    change = P @ path(taken) @ Q.T
    taken_from = jnp.einsum("aik,...kl,alj->...ij", B, change, C) / len(B)
    gradient = jnp.broadcast_to(G0, taken_from.shape) - taken_from
    return ProjectedDescent(path(power(1 - x, t)), gradient, change)
