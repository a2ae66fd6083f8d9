"""Equilibria and rest points of games, and what the replicator flow does next to them.

Payoff matrices have shape (n, n): entry (i, j) is what strategy i gets against j. The decisions (`is_nash`,
`is_ess`, `rest_points`, `stability`) are made on the host and cannot be traced. They look at a game through
its differences of payoffs within a column, in units of the largest one, so that neither a constant added to a
column nor a positive factor, which change nothing in the flow but its speed, changes an answer.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.linalg import helmert
from scipy.optimize import linprog

from dynamics.arguments import ArrayLike, brief, require_concrete, require_number, require_shape

Stability = Literal["attracting", "repelling", "saddle", "centre", "degenerate"]


def is_nash(payoff: ArrayLike, x: ArrayLike, *, atol: float | None = None) -> bool:
    r"""Whether x is a symmetric Nash equilibrium: max_i (A x)_i <= x^T A x.

    Args:
        payoff: payoff matrix A, shape (n, n).
        x: point of the simplex, shape (n,).
        atol: what counts as zero, in units of the largest difference of payoffs within a column; the
            square root of the machine epsilon where None. The sum of x may be as far from one.

    Raises:
        ValueError: `payoff` is not square and finite, `x` is not on the simplex, or `atol` is negative.

    Source: hofbauer1998, section 7.2.

    Example:
        >>> from dynamics.replicator import hawk_dove
        >>> is_nash(hawk_dove(2.0, 4.0), [0.5, 0.5]), is_nash(hawk_dove(2.0, 4.0), [1.0, 0.0])
        (True, False)
    """
    game, state, atol = _require_state(payoff, x, atol)
    fitness = game @ state
    return bool(np.max(fitness) - state @ fitness <= atol)


def is_ess(payoff: ArrayLike, x: ArrayLike, *, atol: float | None = None) -> bool:
    r"""Whether x is an evolutionarily stable strategy, on the boundary of the simplex too.

    x is one if it is a Nash equilibrium and x^T A y > y^T A y for every other best reply y to it. With
    y = x + d, that is d^T A d < 0 for all directions d != 0 of sum zero with d_i free on the support of x,
    d_i >= 0 for the other best replies and d_i = 0 elsewhere. One coordinate of the support is eliminated;
    then the form -d^T A d must be positive definite in the free coordinates, and its Schur complement on
    the others strictly copositive. The latter is decided face by face: the cost doubles with each best reply
    outside of the support.

    Args:
        payoff: payoff matrix A, shape (n, n).
        x: point of the simplex, shape (n,).
        atol: what counts as zero, as in `is_nash`; also below which a coordinate of x is outside the support.

    Raises:
        ValueError: `payoff` is not square and finite, `x` is not on the simplex.

    Source: abakuks1980, for the elimination; hadeler1983, for copositivity by faces.

    Example:
        >>> from dynamics.replicator import rock_paper_scissors
        >>> centre = [1 / 3, 1 / 3, 1 / 3]
        >>> is_ess(rock_paper_scissors(2.0, 1.0), centre), is_ess(rock_paper_scissors(1.0, 1.0), centre)
        (True, False)
    """
    game, state, atol = _require_state(payoff, x, atol)
    fitness = game @ state
    if np.max(fitness) - state @ fitness > atol:
        return False
    support = state > atol
    pivot = np.argmax(state)
    to_pivot = game - game[pivot] - game[:, [pivot]] + game[pivot, pivot]
    form = -(to_pivot + to_pivot.T) / 2
    free = np.flatnonzero(support & (np.arange(state.size) != pivot))
    others = np.flatnonzero(~support & (fitness >= np.max(fitness) - atol))
    bent = form[np.ix_(others, others)]
    if free.size:
        inner, mixed = form[np.ix_(free, free)], form[np.ix_(free, others)]
        if np.linalg.eigvalsh(inner)[0] <= atol:
            return False
        bent = bent - mixed.T @ np.linalg.solve(inner, mixed)
    return _is_strictly_copositive(bent, atol)


class RestPoints(NamedTuple):
    """Rest points of the replicator flow, support by support: single strategies first, all of them last.

    Attributes:
        supports: strategies that are present, shape (P, n) with P = 2^n - 1.
        points: the rest point with exactly this support, shape (P, n); NaN where there is not exactly one.
        exists: whether there is exactly one, shape (P,).
        continuum: whether there are infinitely many, shape (P,).
    """

    supports: np.ndarray
    points: np.ndarray
    exists: np.ndarray
    continuum: np.ndarray


def rest_points(payoff: ArrayLike, *, atol: float | None = None) -> RestPoints:
    r"""Rest points x_i ((A x)_i - x^T A x) = 0: one candidate for every non-empty support.

    On the support all strategies have the same fitness, a linear system: it has one solution, none, or a
    continuum, which is flagged and not listed. `points[exists]` are the isolated ones.

    Args:
        payoff: payoff matrix A, shape (n, n).
        atol: what counts as zero, as in `is_nash`; also the smallest share of a strategy that is present.

    Returns:
        `RestPoints`; its arrays have 2^n - 1 rows.

    Raises:
        ValueError: `payoff` is not square and finite.

    Source: hofbauer1998, section 7.1.

    Example:
        >>> from dynamics.replicator import hawk_dove
        >>> found = rest_points(hawk_dove(2.0, 4.0))
        >>> found.points[found.exists].tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    """
    game, atol = _require_payoff(payoff, atol)
    n = len(game)
    chosen = [list(members) for size in range(1, n + 1) for members in combinations(range(n), size)]
    supports = np.zeros((len(chosen), n), bool)
    points = np.full((len(chosen), n), np.nan)
    continuum = np.zeros(len(chosen), bool)
    for row, members in enumerate(chosen):
        supports[row, members] = True
        part = game[np.ix_(members, members)]
        shares = _equal_fitness(part, atol)
        if shares is None:
            continuum[row] = _has_interior_rest_point(part, atol)
        elif np.all(shares > atol):
            points[row] = 0
            points[row, members] = shares
    return RestPoints(supports, points, np.isfinite(points[:, 0]), continuum)


def eigenvalues(payoff: ArrayLike, x: ArrayLike) -> np.ndarray:
    r"""Eigenvalues of the replicator flow's linearization at rest points, along the simplex.

    At the boundary those of the directions that lead inwards, (A x)_i - x^T A x for absent strategies i,
    are among them.

    Args:
        payoff: payoff matrices, shape (..., n, n), n >= 2.
        x: rest points, shape (..., n).

    Returns:
        Complex numbers, shape (..., n - 1), per unit time.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.

    Source: hofbauer1998, section 7.1.

    Example:
        >>> from dynamics.replicator import hawk_dove
        >>> eigenvalues(hawk_dove(2.0, 3.0), [2 / 3, 1 / 3]).real.round(6).tolist()  # -V (C - V) / (2 C)
        [-0.333333]
    """
    game, state = _on_host("payoff", payoff), _on_host("x", x)
    n = state.shape[-1] if state.ndim else 0
    if n < 2 or game.shape[-2:] != (n, n) or not _fit(game.shape[:-2], state.shape[:-1]):
        raise ValueError(
            f"payoff and x must have shapes (..., n, n) and (..., n), n >= 2, got {game.shape}, {state.shape}"
        )
    game, exponent = _scaled(game)
    fitness = np.einsum("...ij,...j->...i", game, state)
    slope_of_mean = fitness + np.einsum("...ji,...j->...i", game, state)
    advantage = fitness - np.sum(state * fitness, axis=-1, keepdims=True)
    jacobian = advantage[..., None] * np.eye(n) + state[..., None] * (game - slope_of_mean[..., None, :])
    basis = helmert(n).T
    values = np.linalg.eigvals(basis.T @ jacobian @ basis)
    return np.ldexp(np.real(values), exponent) + 1j * np.ldexp(np.imag(values), exponent)


def stability(payoff: ArrayLike, x: ArrayLike, *, atol: float | None = None) -> Stability:
    r"""What the replicator flow does next to a rest point, as far as its linearization tells.

    Args:
        payoff: payoff matrix A, shape (n, n), n >= 2.
        x: rest point, shape (n,).
        atol: what counts as zero, as in `is_nash`.

    Returns:
        "attracting" or "repelling" where all `eigenvalues` have negative or positive real parts, "saddle"
        where some have either, "centre" where all are imaginary, "degenerate" where some real part vanishes
        otherwise and the linearization does not decide.

    Raises:
        ValueError: `payoff` is not square and finite, `x` is not on the simplex or no rest point.

    Source: hofbauer1998, section 7.1.

    Example:
        >>> from dynamics.replicator import hawk_dove
        >>> stability(hawk_dove(2.0, 4.0), [0.5, 0.5]), stability(hawk_dove(2.0, 4.0), [1.0, 0.0])
        ('attracting', 'repelling')
    """
    game, state, atol = _require_state(payoff, x, atol)
    fitness = game @ state
    speed = np.max(np.abs(state * (fitness - state @ fitness)))
    if speed > atol:
        raise ValueError(f"x must be a rest point, got {brief(state)} with speed {speed:.2g}")
    values = eigenvalues(game, state)
    growth, frequency = np.real(values), np.imag(values)
    still = np.abs(growth) <= atol
    if np.any(still):
        return "centre" if np.all(still & (np.abs(frequency) > atol)) else "degenerate"
    if np.all(growth < 0):
        return "attracting"
    return "repelling" if np.all(growth > 0) else "saddle"


def _require_payoff(payoff: ArrayLike, atol: float | None, *beside: ArrayLike) -> tuple[np.ndarray, float]:
    """The payoffs with columns of mean zero in units of the largest difference in one, and the tolerance."""
    game = _on_host("payoff", payoff)
    if game.ndim != 2 or game.shape[0] != game.shape[1] or game.size == 0:
        raise ValueError(f"payoff must have shape (n, n), got shape {game.shape}")
    if atol is None:
        tolerance = max(map(_epsilon, (payoff, *beside))) ** 0.5
    else:
        require_concrete("atol", require_number("atol", atol, jnp.result_type(float), at_least=0))
        tolerance = float(np.asarray(atol))
    game, _ = _scaled(game)
    span = np.max(np.ptp(game, axis=0))
    return (game - np.mean(game, axis=0)) / (span if span > 0 else 1), tolerance


def _scaled(game: np.ndarray) -> tuple[np.ndarray, int]:
    """The payoffs over a power of two, at most one in size, so that no sum overflows, and its exponent."""
    _, exponent = np.frexp(np.max(np.abs(game), initial=0))
    return np.ldexp(game, -exponent), int(exponent)


def _on_host(name: str, value: ArrayLike) -> np.ndarray:
    """Finite numbers in double precision, whatever precision JAX has."""
    if type(value) is not np.ndarray or value.dtype != np.float64:
        require_concrete(name, value)
    elif not np.all(np.isfinite(value)):  # many small calls would spend their time on a device
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return np.asarray(value, float)


def _fit(*batches: tuple[int, ...]) -> bool:
    """Whether shapes broadcast."""
    try:
        np.broadcast_shapes(*batches)
    except ValueError:
        return False
    return True


def _epsilon(values: ArrayLike) -> float:
    dtype = getattr(values, "dtype", np.dtype(float))
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else float(np.finfo(float).eps)


def _require_state(
    payoff: ArrayLike, x: ArrayLike, atol: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    state = _on_host("x", x)
    game, atol = _require_payoff(payoff, atol, x)
    require_shape("x", state, (len(game),))
    if not (np.all(state >= 0) and abs(np.sum(state) - 1) <= max(1e-6, atol)):
        rule = "a point of the simplex (no negative entry, sum one)"
        raise ValueError(f"x must be {rule}, got {brief(state)}")
    return game, state / np.sum(state), atol


def _equal_fitness(game: np.ndarray, atol: float) -> np.ndarray | None:
    """The v of sum one that makes all entries of game @ v equal; None where it is not unique."""
    bordered = _border(game)
    if np.linalg.svd(bordered, compute_uv=False)[-1] <= atol:
        return None
    return np.linalg.solve(bordered, np.eye(len(bordered))[-1])[:-1]


def _border(game: np.ndarray) -> np.ndarray:
    """Matrix of the equations game @ v - lambda = 0, sum v in the unknowns (v, lambda)."""
    n = len(game)
    return np.block([[game, -np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])


def _has_interior_rest_point(game: np.ndarray, atol: float) -> bool:
    """Whether some v > 0 of sum one gives all strategies the same fitness."""
    n = len(game)
    # The unknowns are the shares, the common fitness, and a floor under the shares, which is maximized.
    equations = np.hstack([_border(game), np.zeros((n + 1, 1))])
    floor = np.hstack([-np.eye(n), np.zeros((n, 1)), np.ones((n, 1))])
    best = linprog(
        -np.eye(n + 2)[-1],
        A_ub=floor,
        b_ub=np.zeros(n),
        A_eq=equations,
        b_eq=np.eye(n + 1)[-1],
        bounds=[(None, None)] * (n + 2),
    )
    return bool(best.success and -best.fun > atol)


def _is_strictly_copositive(form: np.ndarray, atol: float) -> bool:
    """Whether v^T form v > 0 for all v >= 0, v != 0.

    The minimum over the simplex lies inside some face, where all entries of form @ v are equal. A face where
    such a v is not unique can be left out: the form is constant along the line of them, which ends on a
    smaller face.
    """
    for size in range(1, len(form) + 1):
        for members in combinations(range(len(form)), size):
            face = form[np.ix_(members, members)]
            v = _equal_fitness(face, atol)
            if v is not None and np.all(v > 0) and v @ face @ v <= atol:
                return False
    return True
