"""Bounds on the stable rank of a gradient under gradient descent, printed and valid."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import nan_unless, require_choice
from dynamics.flow import ArrayLike, all_finite
from dynamics.galore.gradient import matrices, power, require_linear, vec

Form = Literal["printed", "valid"]


class SlowSplit(NamedTuple):
    """A gradient split at the smallest eigenvalue of its linear dynamics.

    Attributes:
        slowest: the smallest eigenvalue, lambda_1.
        second: the smallest one above it, lambda_2; NaN where there is none.
        largest: the largest one.
        parallel: the part of the gradient in the eigenspace of `slowest`, (m, n).
        perpendicular: the part that belongs to larger eigenvalues, (m, n).
    """

    slowest: Array
    second: Array
    largest: Array
    parallel: Array
    perpendicular: Array


def slow_split(G0: ArrayLike, S: ArrayLike, form: Form | str) -> SlowSplit:
    r"""The gradient's part in the slowest eigenspace of S, and the rest.

    Under descent the slowest part is what is left in the end, so that the stable rank of G_t tends to that of
    `parallel`, for "valid" whenever no step overshoots.

    Source: zhao2024galore, Lemma 3.3. Printed are the two smallest distinct eigenvalues of S. Where these are
    not excited - always so in its Corollary 3.4 with A_i = a_i f_i^T, where the null space of S is free of
    gradient - nothing is left of G0 in the eigenspace.

    Args:
        G0: gradient at step 0, (m, n).
        S: symmetric, (mn, mn).
        form: "printed" takes eigenvalues of S, "valid" those that G0 excites. Components below 1.5e-8,
            relative to G0, and such as rounding makes (in 32-bit), count as none.

    Returns:
        The split. NaN where a traced input is bad, or where "valid" is asked for and G0 is zero.

    Raises:
        ValueError: the shapes do not fit, S is not symmetric, a number is not finite, or the form is unknown.

    Example:
        >>> S = jnp.diag(jnp.array([0.0, 1.0, 2.0]))
        >>> split = slow_split([[0.0], [3.0], [4.0]], S, "valid")
        >>> float(split.slowest), float(split.second), split.parallel[:, 0].tolist()
        (1.0, 2.0, [0.0, 3.0, 0.0])
    """
    require_choice("form", form, get_args(Form))
    G0, S, learning_rate, _ = require_linear(G0, S, 0, 0)
    # The form is traced, so that one program has both.
    return _split(G0, S, learning_rate, jnp.asarray(form == "valid"))


@eqx.filter_jit
def _split(G0, S, learning_rate, valid):
    epsilon = jnp.finfo(S.dtype).eps
    values, vectors = jnp.linalg.eigh(S)
    peak = jnp.max(jnp.abs(G0))
    weights = vectors.T @ vec(G0 / jnp.where(peak > 0, peak, 1))
    floor = max(1.5e-8, 10 * values.size * float(epsilon)) * jnp.linalg.norm(weights)
    excited = (jnp.abs(weights) > floor) | jnp.logical_not(valid)
    # Eigenvalues that rounding alone tells apart are one.
    width = 10 * values.size * epsilon * jnp.max(jnp.abs(values))
    slowest = jnp.min(jnp.where(excited, values, jnp.inf))
    near, above = jnp.abs(values - slowest) <= width, values > slowest + width
    second = jnp.min(jnp.where(excited & above, values, jnp.inf))
    split = SlowSplit(
        slowest,
        jnp.where(jnp.isfinite(second), second, jnp.nan),
        jnp.max(jnp.where(excited, values, -jnp.inf)),
        matrices(vectors @ jnp.where(near, peak * weights, 0), G0.shape),
        matrices(vectors @ jnp.where(above, peak * weights, 0), G0.shape),
    )
    good = jnp.any(excited) & all_finite((G0, S, learning_rate))
    return SlowSplit(*(nan_unless(good, part) for part in split))


def stable_rank_bound(
    G0: ArrayLike, S: ArrayLike, learning_rate: ArrayLike, steps: ArrayLike, form: Form | str
) -> Float[Array, "*steps"]:
    r"""Upper bound on the stable rank of G_t under vec(G_{t+1}) = (I - eta S) vec(G_t).

    With rho = (1 - eta lambda_2) / (1 - eta lambda_1) and G_0 = G_par + G_perp (`slow_split`)

        printed:  sr(G_par) + rho^{2t} |G_perp|_F^2 / |G_par|_2^2
        valid:    (|G_par|_F^2 + rho^{2t} |G_perp|_F^2) / (|G_par|_2 - rho^t |G_perp|_2)^2

    The printed one takes it that every pair of singular vectors of G_par spans a matrix in the eigenspace of
    lambda_1, which only their weighted sum does: it can fail at every step (`bound_counterexample`), and the
    excess over sr(G_par) then falls like rho^t, not rho^{2t}. To first order that excess is
    -2 sr(G_par) u^T X v / |G_par|_2, for the rest X relative to G_par and its leading singular vectors u, v:
    where it is positive, for about half of all random networks, the bound fails from some step on. It holds
    where the eigenspace is a product, such as the slowest one of a single C (x) B. The valid one holds where
    eta (lambda_2 + lambda_max) <= 2, and says nothing before rho^t |G_perp|_2 < |G_par|_2.

    Source: zhao2024galore, Lemma 3.3; the valid form is derived here.

    Args:
        G0: gradient at step 0, (m, n).
        S: symmetric, (mn, mn), on vec(G0), which stacks columns.
        learning_rate: eta, at least 0.
        steps: t, integers >= 0 of any shape.
        form: "printed" takes the two smallest distinct eigenvalues of S, "valid" those that G0 excites.

    Returns:
        The bound, in the shape of `steps`. "valid" is infinite where it bounds nothing; "printed" is NaN
        where G_par is zero, up to the square root of the machine epsilon. NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, S is not symmetric, a number is out of range, or the form is
            unknown.

    Example:
        >>> S, G0 = jnp.diag(jnp.array([0.0, 1.0, 1.0, 1.0])), jnp.array([[2.0, 0.0], [0.0, 1.0]])
        >>> stable_rank_bound(G0, S, 0.5, [0, 1, 9], "valid").round(3).tolist()
        [5.0, 1.889, 1.002]
    """
    require_choice("form", form, get_args(Form))
    return _bound(*require_linear(G0, S, learning_rate, steps), jnp.asarray(form == "valid"))


@eqx.filter_jit
def _bound(G0, S, learning_rate, steps, valid):
    peak = jnp.max(jnp.abs(G0))
    G0 = G0 / jnp.where(peak > 0, peak, 1)
    split = _split(G0, S, learning_rate, valid)
    parts = jnp.stack([split.parallel, split.perpendicular])
    (whole, rest), (a, b) = jnp.sum(parts**2, axis=(1, 2)), jnp.linalg.norm(parts, ord=2, axis=(1, 2))
    alone = jnp.isnan(split.second)
    rho = (1 - learning_rate * split.second) / (1 - learning_rate * split.slowest)
    shrink = jnp.where(alone, 0, power(rho, steps))
    holds = alone | (learning_rate * (split.second + split.largest) <= 2)
    room = jnp.where(valid, jnp.where(holds, jnp.maximum(a - shrink * b, 0), 0), a)
    bound = (whole + shrink**2 * rest) / room**2
    good = valid | (a > jnp.sqrt(jnp.finfo(S.dtype).eps) * jnp.linalg.norm(G0))
    good = good & all_finite((G0, S, learning_rate)) & jnp.isfinite(steps)
    return nan_unless(good, bound)


def bound_counterexample(dtype: Any = None) -> tuple[Array, Array, Array]:
    r"""A gradient and six pairs of matrices for which the printed `stable_rank_bound` fails at every step.

    The operator has eigenvalues 0.1, 0.5, 1, 1.32, the first two with diag(2, 1) and diag(-1, 2), and the
    gradient is diag(2, 1) + diag(-1, 2) / 5. The matrix diag(2, 1) is a sum of two dyads, neither of them in
    its eigenspace: the second eigenvector lowers the largest singular value at first order.

    Source: derived here, for zhao2024galore, Lemma 3.3.

    Args:
        dtype: floating dtype; JAX's default where None.

    Returns:
        G0 (2, 2), and B and C (6, 2, 2), positive semidefinite, for `gradient_operator`.

    Example:
        >>> from dynamics.galore import gradient_operator
        >>> from dynamics.spectra import stable_rank
        >>> G0, B, C = bound_counterexample()
        >>> bound = stable_rank_bound(G0, gradient_operator(B, C), 0.5, 0, "printed")
        >>> bool(stable_rank(G0) > 1.2 * bound)
        True
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    # Equal shares of two sign patterns leave C_12 B_12 < 0 and no other coupling.
    same, opposite = np.array([[1, 1], [1, 1]]), np.array([[1, -1], [-1, 1]])
    corners = np.eye(2)[:, :, None] * np.eye(2)[:, None, :]
    rest = np.array([[0.02, 1.0], [1.0, 0.26]])  # of entry (i, j) of the matrix
    pairs = [(0.08 * same, opposite), (0.08 * opposite, same)]
    pairs += [(rest[i, j] * corners[i], corners[j]) for i in range(2) for j in range(2)]
    B, C = (np.stack(side) for side in zip(*pairs, strict=True))
    return (
        jnp.asarray([[1.8, 0.0], [0.0, 1.4]], dtype),
        jnp.asarray(len(pairs) * B, dtype),
        jnp.asarray(C, dtype),
    )
