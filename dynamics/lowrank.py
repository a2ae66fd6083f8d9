"""Low-rank gradients: their linear dynamics, descent in a fixed subspace, sizes of optimizer states."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.flow import ArrayLike, all_finite, as_inexact, is_traced, require_number

Form = Literal["printed", "valid"]
Loss = Literal["squared", "softmax"]
Projection = Literal["std", "reverse_std", "left", "right", "full"]


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


class Memory(NamedTuple):
    """What one weight matrix and its Adam state take, in numbers.

    Attributes:
        weights: of the matrix, adaptors included.
        states: of both moments.
        projection: of the bases.
    """

    weights: int
    states: int
    projection: int

    @property
    def total(self) -> int:
        """Weights, states and projection together."""
        return self.weights + self.states + self.projection


# --- The gradient of a reversible network


def reversible_terms(J: ArrayLike, f: ArrayLike, y: ArrayLike, loss: Loss | str) -> GradientTerms:
    r"""Coefficients of the gradient of a layer W inside of a network without biases, output J_i W f_i.

        squared:  A_i = J_i^T y_i f_i^T,      B_i = J_i^T J_i,              C_i = f_i f_i^T
        softmax:  A_i = J_i^T P1 y_i f_i^T,   B_i = J_i^T P1 J_i / d,       P1 = I - 1 1^T / d

    Exact for half the squared error. For cross-entropy an approximation near zero logits, its relative error
    of second order in them. Printed for it is J P1 y, which does not have a shape that fits.

    Source: zhao2024galore, Theorem 3.2.

    Args:
        J: Jacobians of the outputs with respect to the layer's output, (N, d, m).
        f: inputs of the layer, (N, n).
        y: targets, (N, d); one-hot, or probabilities, for the softmax.
        loss: "squared" or "softmax".

    Returns:
        The terms of `reversible_gradient`.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or the loss is unknown.

    Example:
        >>> terms = reversible_terms([[[2.0]]], [[3.0]], [[5.0]], "squared")
        >>> reversible_gradient(*terms, [[1.0]]).tolist()  # (5 - 2 * 1 * 3) * 2 * 3
        [[-6.0]]
    """
    J, f, y = _require_arrays(J=J, f=f, y=y)
    if J.ndim != 3 or f.ndim != 2 or y.ndim != 2 or y.shape != J.shape[:2] or f.shape[0] != J.shape[0]:
        raise ValueError(
            "J, f and y must have shapes (N, d, m), (N, n) and (N, d), "
            f"got {J.shape}, {f.shape} and {y.shape}"
        )
    if loss not in get_args(Loss):
        raise ValueError(f"loss must be one of {get_args(Loss)}, got {loss!r}")
    return _terms(J, f, y, loss)


@eqx.filter_jit
def _terms(J, f, y, loss):
    seen, share = J, 1
    if loss == "softmax":
        seen, share = J - jnp.mean(J, axis=1, keepdims=True), J.shape[1]
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
    W, A, B, C = _require_arrays(W=W, A=A, B=B, C=C)
    _require_terms(B, C, W.shape)
    if A.shape != (B.shape[0], *W.shape):
        raise ValueError(f"A must have shape (N, m, n) = {(B.shape[0], *W.shape)}, got {A.shape}")
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
    B, C = _require_arrays(B=B, C=C)
    _require_terms(B, C, (B.shape[-1:] + C.shape[-1:]))
    return _operator(B, C)


@eqx.filter_jit
def _operator(B, C):
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
    return _iterates(*_require_linear(G0, S, learning_rate, steps))


@eqx.filter_jit
def _iterates(G0, S, learning_rate, steps):
    values, vectors = jnp.linalg.eigh(S)
    decay = _power(1 - learning_rate * _over_steps(values, steps), steps[..., None])
    weights = vectors.T @ _vec(G0)
    path = _matrices(jnp.einsum("kv,...v,v->...k", vectors, decay, weights), G0.shape)
    return jnp.where(_is_linear(G0, S, learning_rate), path, jnp.nan)


# --- The bound on the stable rank


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
    _require_form(form)
    G0, S, learning_rate, _ = _require_linear(G0, S, 0, 0)
    # Traced, so that one program has both forms.
    return _split(G0, S, learning_rate, jnp.asarray(form == "valid"))


@eqx.filter_jit
def _split(G0, S, learning_rate, valid):
    epsilon = jnp.finfo(S.dtype).eps
    values, vectors = jnp.linalg.eigh(S)
    peak = jnp.max(jnp.abs(G0))
    weights = vectors.T @ _vec(G0 / jnp.where(peak > 0, peak, 1))
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
        _matrices(vectors @ jnp.where(near, peak * weights, 0), G0.shape),
        _matrices(vectors @ jnp.where(above, peak * weights, 0), G0.shape),
    )
    good = _is_linear(G0, S, learning_rate) & jnp.any(excited)
    return SlowSplit(*(jnp.where(good, part, jnp.nan) for part in split))


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
    _require_form(form)
    return _bound(*_require_linear(G0, S, learning_rate, steps), jnp.asarray(form == "valid"))


@eqx.filter_jit
def _bound(G0, S, learning_rate, steps, valid):
    peak = jnp.max(jnp.abs(G0))
    G0 = G0 / jnp.where(peak > 0, peak, 1)
    split = _split(G0, S, learning_rate, valid)
    parts = jnp.stack([split.parallel, split.perpendicular])
    (whole, rest), (a, b) = jnp.sum(parts**2, axis=(1, 2)), jnp.linalg.norm(parts, ord=2, axis=(1, 2))
    alone = jnp.isnan(split.second)
    rho = (1 - learning_rate * split.second) / (1 - learning_rate * split.slowest)
    shrink = jnp.where(alone, 0, _power(rho, steps))
    holds = alone | (learning_rate * (split.second + split.largest) <= 2)
    room = jnp.where(valid, jnp.where(holds, jnp.maximum(a - shrink * b, 0), 0), a)
    bound = (whole + shrink**2 * rest) / room**2
    good = _is_linear(G0, S, learning_rate) & (steps >= 0) & (steps == jnp.round(steps))
    good = good & (valid | (a > jnp.sqrt(jnp.finfo(S.dtype).eps) * jnp.linalg.norm(G0)))
    return jnp.where(good, bound, jnp.nan)


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


# --- A fixed projection


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
    B, P = _require_arrays(B=B, P=P)
    if B.ndim < 2 or P.ndim != 2 or B.shape[-2:] != 2 * P.shape[:1]:
        raise ValueError(f"B and P must have shapes (..., m, m) and (m, r), got {B.shape} and {P.shape}")
    _require_orthonormal(P=P)
    return _compressed(B, P)


@eqx.filter_jit
def _compressed(B, P):
    return jnp.where(_is_orthonormal(P), jnp.einsum("mr,...mk,ks->...rs", P, B, P), jnp.nan)


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
    _require_form(form)
    B, C = _require_arrays(B_hat=B_hat, C_hat=C_hat)
    square = B.ndim >= 3 and B.ndim == C.ndim and all(X.shape[-1] == X.shape[-2] for X in (B, C))
    if not square or B.shape[:-2] != C.shape[:-2]:
        raise ValueError(
            "B_hat and C_hat must have shapes (*times, N, r, r) and (*times, N, s, s), "
            f"got {B.shape} and {C.shape}"
        )
    _require_symmetric("B_hat", B)
    _require_symmetric("C_hat", C)
    if len(lipschitz) != 3:
        raise ValueError(f"lipschitz must be three numbers L_A, L_B, L_C, got {lipschitz!r}")
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
        smallest = jnp.linalg.eigvalsh(B)[..., 0] * jnp.linalg.eigvalsh(C)[..., 0]
        slowest = jnp.min(smallest.reshape(-1, smallest.shape[-1]), axis=0)
        q = 1 - eta * (jnp.mean(slowest) - L_A - L_B * L_C * D**2)
    else:
        values = jnp.linalg.eigvalsh(_operator(B, C))
        q = jnp.max(jnp.abs(1 - eta * values)) + eta * (L_A + D * (L_B * sup_C + L_C * sup_B))
    good = all_finite((B, C, numbers)) & _is_symmetric(B) & _is_symmetric(C)
    good = good & jnp.all(jnp.stack(numbers) >= 0)
    return jnp.where(good, q, jnp.nan)


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
        ValueError: the shapes do not fit, a number is out of range, or columns are not orthonormal.

    Example:
        >>> eye = jnp.eye(2)[None]
        >>> path = projected_descent([[4.0, 0.0], [0.0, 3.0]], eye, eye, jnp.eye(2, 1), jnp.eye(2), 0.5, 2)
        >>> path.projected.tolist(), path.gradient.tolist()
        ([[1.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]])
    """
    G0, B, C, P, Q = _require_arrays(G0=G0, B=B, C=C, P=P, Q=Q)
    if G0.ndim != 2 or P.ndim != 2 or Q.ndim != 2 or (P.shape[0], Q.shape[0]) != G0.shape:
        raise ValueError(
            f"G0, P and Q must have shapes (m, n), (m, r) and (n, s), got {G0.shape}, {P.shape} and {Q.shape}"
        )
    _require_terms(B, C, G0.shape)
    _require_orthonormal(P=P, Q=Q)
    learning_rate, steps = _require_descent(learning_rate, steps, G0.dtype)
    return _projected(G0, B, C, P, Q, learning_rate, steps)


@eqx.filter_jit
def _projected(G0, B, C, P, Q, learning_rate, steps):
    R0 = P.T @ G0 @ Q
    S = _operator(_compressed(B, P), _compressed(C, Q))
    values, vectors = jnp.linalg.eigh(S)
    weights = vectors.T @ _vec(R0)
    x, t = learning_rate * _over_steps(values, steps), steps[..., None]
    # eta (1 + q + ... + q^{t-1}), q = 1 - x: (1 - q^t) / lambda would cancel where x is small.
    small = jnp.abs(x) < 0.5
    close = -jnp.expm1(t * jnp.log1p(-jnp.where(small, x, 0)))
    taken = jnp.where(small, close, 1 - _power(1 - x, t)) / jnp.where(x == 0, 1, x)
    taken = learning_rate * jnp.where(x == 0, t, taken)

    def path(factors):
        return _matrices(jnp.einsum("kv,...v,v->...k", vectors, factors, weights), R0.shape)

    change = P @ path(taken) @ Q.T
    taken_from = jnp.einsum("aik,...kl,alj->...ij", B, change, C) / len(B)
    gradient = jnp.broadcast_to(G0, taken_from.shape) - taken_from
    good = _is_linear(R0, S, learning_rate) & all_finite(G0)
    descent = ProjectedDescent(path(_power(1 - x, t)), gradient, change)
    return ProjectedDescent(*(jnp.where(good, part, jnp.nan) for part in descent))


# --- Subspaces


def captured_energy(P: ArrayLike, G: ArrayLike) -> Float[Array, "*batch"]:
    r"""Share of a gradient inside a subspace, |P^T G|_F^2 / |G|_F^2, in [0, 1]; 0 for a zero gradient.

    For the other side, hand over G^T.

    Args:
        P: orthonormal columns, (..., m, r).
        G: (..., m, n).

    Returns:
        The share, in the shape of the batch axes. NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or columns are not orthonormal.

    Example:
        >>> round(float(captured_energy([[1.0], [0.0]], [[3.0], [4.0]])), 6)
        0.36
    """
    G, P = _require_arrays(G=G, P=P)
    if P.ndim < 2 or P.ndim != G.ndim or P.shape[:-1] != G.shape[:-1]:
        raise ValueError(f"P and G must have shapes (..., m, r) and (..., m, n), got {P.shape} and {G.shape}")
    _require_orthonormal(P=P)
    return _captured(P, G)


@eqx.filter_jit
def _captured(P, G):
    # Scaled before it is squared: a tiny gradient would underflow.
    peak = jnp.max(jnp.abs(G), axis=(-2, -1), keepdims=True)
    G = G / jnp.where(peak == 0, 1, peak)
    whole = jnp.sum(G**2, axis=(-2, -1))
    inside = jnp.sum((P.mT @ G) ** 2, axis=(-2, -1))
    share = jnp.minimum(inside / jnp.where(whole == 0, 1, whole), 1)
    return jnp.where(_is_orthonormal(P), share, jnp.nan)


def principal_angles(P: ArrayLike, Q: ArrayLike) -> Float[Array, "*batch k"]:
    r"""Angles between two subspaces in radians, in ascending order, k = min(r, s) of them, in [0, pi/2].

    cos from the singular values of P^T Q, sin from those of (I - P P^T) Q: neither is accurate alone. With
    a flat tail of singular values the last angles between gradients' subspaces tell nothing, unlike
    `captured_energy`.

    Args:
        P: orthonormal columns, (..., m, r).
        Q: orthonormal columns, (..., m, s).

    Returns:
        The angles, (..., k). NaN where a traced input is bad.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, or columns are not orthonormal.

    Example:
        >>> principal_angles([[1.0], [0.0]], [[0.6], [0.8]]).round(6).tolist()  # arctan(4/3)
        [0.927295]
    """
    P, Q = _require_arrays(P=P, Q=Q)
    if P.ndim < 2 or P.ndim != Q.ndim or P.shape[:-1] != Q.shape[:-1]:
        raise ValueError(f"P and Q must have shapes (..., m, r) and (..., m, s), got {P.shape} and {Q.shape}")
    _require_orthonormal(P=P, Q=Q)
    return _angles(P, Q) if P.shape[-1] >= Q.shape[-1] else _angles(Q, P)


@eqx.filter_jit
def _angles(P, Q):
    cosines = jnp.linalg.svd(P.mT @ Q, compute_uv=False)
    sines = jnp.linalg.svd(Q - P @ (P.mT @ Q), compute_uv=False)
    angles = jnp.arctan2(sines[..., ::-1], cosines)
    return jnp.where(_is_orthonormal(P) & _is_orthonormal(Q), angles, jnp.nan)


# --- Sizes


def full_rank_memory(m: int, n: int) -> Memory:
    """Adam on the whole matrix: m n weights, 2 m n of state.

    Source: zhao2024galore, Table 1.

    Example:
        >>> full_rank_memory(4, 6).total
        72
    """
    m, n = _require_sizes(m=m, n=n)
    return Memory(m * n, 2 * m * n, 0)


def lora_memory(m: int, n: int, rank: int, *, frozen: bool = True) -> Memory:
    """Adam on the factors of W_0 + B A: m n + m r + n r weights, 2 (m r + n r) of state.

    Source: zhao2024galore, Table 1.

    Args:
        m: rows.
        n: columns.
        rank: r, at most min(m, n) of which counts.
        frozen: whether W_0 is kept; without it, W = B A.

    Example:
        >>> lora_memory(4, 6, 2).total  # m n + 3 (m r + n r)
        84
    """
    m, n, rank = _require_sizes(m=m, n=n, rank=rank)
    factors = (m + n) * min(rank, m, n)
    return Memory(m * n * frozen + factors, 2 * factors, 0)


def galore_memory(m: int, n: int, rank: int, projection: Projection | str = "std") -> Memory:
    """Adam on the projected gradient: for m <= n and "std", m r for the basis and 2 n r of state.

    Source: zhao2024galore, Table 1, for m <= n; the other sides follow.

    Args:
        m: rows.
        n: columns.
        rank: r, at most min(m, n) of which counts.
        projection: "std" projects the short side, "reverse_std" the long one, "left" rows, "right" columns,
            "full" both.

    Example:
        >>> galore_memory(4, 6, 2).total, galore_memory(6, 4, 2).total  # m n + m r + 2 n r, m <= n
        (56, 56)
    """
    m, n, rank = _require_sizes(m=m, n=n, rank=rank)
    if projection not in get_args(Projection):
        raise ValueError(f"projection must be one of {get_args(Projection)}, got {projection!r}")
    rank = min(rank, m, n)
    if projection == "full":
        return Memory(m * n, 2 * rank**2, (m + n) * rank)
    short = {"std": min(m, n), "reverse_std": max(m, n), "left": m, "right": n}[projection]
    return Memory(m * n, 2 * (m + n - short) * rank, short * rank)


# --- What is shared


def _vec(G: Array) -> Array:
    """The columns of a matrix, one after the other."""
    return G.T.reshape(-1)


def _matrices(vecs: Array, shape: tuple[int, ...]) -> Array:
    """Matrices (..., m, n) from their `_vec`."""
    return vecs.reshape(*vecs.shape[:-1], *shape[::-1]).mT


def _power(base: Array, t: Array) -> Array:
    """base^t for whole t >= 0, the base of any sign; else NaN."""
    return base ** jnp.where((t >= 0) & (t == jnp.round(t)), t, jnp.nan)


def _over_steps(values: Array, steps: Array) -> Array:
    """Values (k,) beside steps, so that both broadcast to (*steps, k)."""
    return values.reshape((1,) * steps.ndim + values.shape)


def _is_linear(G0: Array, S: Array, learning_rate: Array) -> Array:
    """Whether the traced inputs of linear dynamics are as `_require_linear` wants them."""
    return all_finite((G0, S, learning_rate)) & _is_symmetric(S) & (learning_rate >= 0)


def _is_symmetric(S: Array) -> Array:
    return jnp.max(jnp.abs(S - S.mT)) <= jnp.sqrt(jnp.finfo(S.dtype).eps) * jnp.max(jnp.abs(S))


def _require_symmetric(name: str, S: Array) -> None:
    if is_traced(S):
        return
    values = np.asarray(S, float)
    skew = float(np.max(np.abs(values - np.swapaxes(values, -1, -2))))
    if skew > np.sqrt(jnp.finfo(S.dtype).eps) * np.max(np.abs(values)):
        raise ValueError(f"{name} must be symmetric, got an asymmetry of {skew:.3g}")


def _require_linear(
    G0: ArrayLike, S: ArrayLike, learning_rate: ArrayLike, steps: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    G0, S = _require_arrays(G0=G0, S=S)
    if G0.ndim != 2 or S.shape != 2 * (G0.size,):
        raise ValueError(f"G0 and S must have shapes (m, n) and (mn, mn), got {G0.shape} and {S.shape}")
    _require_symmetric("S", S)
    return G0, S, *_require_descent(learning_rate, steps, G0.dtype)


def _require_descent(learning_rate: ArrayLike, steps: ArrayLike, dtype: Any) -> tuple[Array, Array]:
    learning_rate = require_number("learning_rate", learning_rate, dtype, at_least=0)
    whole = as_inexact(steps)
    if not is_traced(whole):
        values = np.asarray(whole)
        if np.iscomplexobj(values) or not np.all((values >= 0) & (values == np.round(values))):
            raise ValueError(f"steps must be integers >= 0, got {steps}")
    return learning_rate, whole.astype(dtype)


def _require_arrays(**arrays: ArrayLike) -> list[Array]:
    """Finite real arrays that are not empty, in the dtype of the first."""
    converted = [as_inexact(array) for array in arrays.values()]
    for name, array in zip(arrays, converted, strict=True):
        if jnp.iscomplexobj(array):
            raise ValueError(f"{name} must be real, got {array.dtype}")
        if array.size == 0:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")
        if not is_traced(array) and not np.all(np.isfinite(np.asarray(array))):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return [array.astype(converted[0].dtype) for array in converted]


def _require_terms(B: Array, C: Array, shape: tuple[int, ...]) -> None:
    m, n = shape if len(shape) == 2 else (-1, -1)
    if B.ndim != 3 or C.ndim != 3 or B.shape != (len(B), m, m) or C.shape != (len(B), n, n):
        raise ValueError(
            "B and C must have shapes (N, m, m) and (N, n, n), those of a matrix (m, n), "
            f"got {B.shape} and {C.shape}"
        )


# What a basis in half precision still meets.
_ORTHONORMAL = 1e-2


def _require_orthonormal(**bases: Array) -> None:
    for name, P in bases.items():
        if not is_traced(P):
            values = np.asarray(P, float)
            error = float(np.max(np.abs(np.swapaxes(values, -1, -2) @ values - np.eye(P.shape[-1]))))
            if error > _ORTHONORMAL:
                raise ValueError(f"{name} must have orthonormal columns, got P^T P - I up to {error:.3g}")


def _is_orthonormal(P: Array) -> Array:
    gram = P.mT @ P
    identity = jnp.broadcast_to(jnp.eye(P.shape[-1], dtype=P.dtype), gram.shape)
    return jnp.max(jnp.abs(gram - identity)) <= _ORTHONORMAL


def _require_form(form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")


def _require_sizes(**sizes: int) -> list[int]:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    return [int(size) for size in sizes.values()]
