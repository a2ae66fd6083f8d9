"""Classical games, their equilibria and what the replicator flow does next to them.

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
from jaxtyping import Array, Float
from scipy.optimize import linprog

from dynamics.arguments import require_finite, require_shape
from dynamics.flow import ArrayLike, as_inexact, is_traced
from dynamics.replicator.simplex import require_simplex, tangent_basis
from dynamics.spectra import entropy

Stability = Literal["attracting", "repelling", "saddle", "centre", "degenerate"]


def rock_paper_scissors(win: ArrayLike = 1.0, loss: ArrayLike = 1.0) -> Float[Array, "3 3"]:
    r"""Rock, paper, scissors: `win` against what one beats, `-loss` against what one is beaten by.

    Where win > loss all orbits spiral to the centre, where they are equal they are closed, where
    win < loss they approach the cycle of the three corners.

    Args:
        win: payoff of a win.
        loss: what a defeat costs; win + loss must be positive.

    Returns:
        Payoff matrix (3, 3), order rock, paper, scissors.

    Raises:
        ValueError: a number is not finite or win + loss <= 0.

    Source: hofbauer1998, section 7.7.

    Example:
        >>> rock_paper_scissors(1.0, 2.0).tolist()
        [[0.0, -2.0, 1.0], [1.0, 0.0, -2.0], [-2.0, 1.0, 0.0]]
    """
    win, loss = _scalars(win=win, loss=loss)
    payoff = jnp.array([[0, -loss, win], [win, 0, -loss], [-loss, win, 0]])
    return _require_game(payoff, win + loss > 0, f"win must be above -loss, got {win} and {loss}")


def hawk_dove(value: ArrayLike, cost: ArrayLike) -> Float[Array, "2 2"]:
    r"""Hawk-dove: [[(V - C)/2, V], [0, V/2]]; where V < C a share V/C of hawks is stable.

    Args:
        value: V > 0, what is fought for.
        cost: C > 0, what losing a fight costs.

    Returns:
        Payoff matrix (2, 2), order hawk, dove.

    Raises:
        ValueError: a number is not positive and finite.

    Source: hofbauer1998, section 6.1.

    Example:
        >>> hawk_dove(2.0, 4.0).tolist()
        [[-1.0, 2.0], [0.0, 1.0]]
    """
    value, cost = _scalars(value=value, cost=cost)
    payoff = jnp.array([[(value - cost) / 2, value], [0, value / 2]])
    positive = (value > 0) & (cost > 0)
    return _require_game(payoff, positive, f"value and cost must be positive, got {value} and {cost}")


def hawk_dove_bourgeois(value: ArrayLike, cost: ArrayLike) -> Float[Array, "3 3"]:
    r"""Hawk-dove with a third strategy, bourgeois: a hawk where it is the owner, else a dove.

    Each contestant is the owner half the time. Where V < C bourgeois is the only evolutionarily stable
    strategy.

    Args:
        value: V > 0.
        cost: C > 0.

    Returns:
        Payoff matrix (3, 3), order hawk, dove, bourgeois.

    Raises:
        ValueError: a number is not positive and finite.

    Example:
        >>> hawk_dove_bourgeois(2.0, 4.0)[2].tolist()
        [-0.5, 1.5, 1.0]
    """
    plain = hawk_dove(value, cost)
    against_bourgeois = jnp.mean(plain, axis=1, keepdims=True)
    rows = jnp.concatenate([plain, against_bourgeois], axis=1)
    # It meets its like as the owner or as the intruder: no two of them ever fight.
    with_itself = (plain[0, 1] + plain[1, 0]) / 2
    bourgeois = jnp.append(jnp.mean(plain, axis=0), with_itself)
    return jnp.concatenate([rows, bourgeois[None, :]])


def prisoners_dilemma(
    temptation: ArrayLike = 5.0, reward: ArrayLike = 3.0, punishment: ArrayLike = 1.0, sucker: ArrayLike = 0.0
) -> Float[Array, "2 2"]:
    r"""Prisoner's dilemma [[R, S], [T, P]] with T > R > P > S: defection dominates, cooperation pays more.

    Args:
        temptation: T, of one who defects alone.
        reward: R, of two who cooperate.
        punishment: P, of two who defect.
        sucker: S, of one who cooperates alone.

    Returns:
        Payoff matrix (2, 2), order cooperate, defect.

    Raises:
        ValueError: a number is not finite or they are not in the order T > R > P > S.

    Source: hofbauer1998, section 9.1.

    Example:
        >>> prisoners_dilemma().tolist()
        [[3.0, 0.0], [5.0, 1.0]]
    """
    t, r, p, s = _scalars(temptation=temptation, reward=reward, punishment=punishment, sucker=sucker)
    ordered = (t > r) & (r > p) & (p > s)
    message = f"temptation > reward > punishment > sucker must hold, got {t}, {r}, {p}, {s}"
    return _require_game(jnp.array([[r, s], [t, p]]), ordered, message)


def stag_hunt(stag: ArrayLike = 4.0, hare: ArrayLike = 3.0) -> Float[Array, "2 2"]:
    r"""Stag hunt [[stag, 0], [hare, hare]]: hunting together pays most, hunting hare is safe.

    Args:
        stag: each hunter's share of a stag, above `hare`.
        hare: what a hare is worth, above 0.

    Returns:
        Payoff matrix (2, 2), order stag, hare.

    Raises:
        ValueError: the numbers are not finite or not in the order stag > hare > 0.

    Example:
        >>> stag_hunt().tolist()
        [[4.0, 0.0], [3.0, 3.0]]
    """
    stag, hare = _scalars(stag=stag, hare=hare)
    message = f"stag > hare > 0 must hold, got {stag} and {hare}"
    return _require_game(jnp.array([[stag, 0], [hare, hare]]), (stag > hare) & (hare > 0), message)


def coordination(rewards: ArrayLike) -> Float[Array, "n n"]:
    r"""Coordination: two who choose the same strategy i get rewards[i], others nothing.

    Args:
        rewards: positive numbers, shape (n,).

    Returns:
        Payoff matrix diag(rewards).

    Raises:
        ValueError: `rewards` has another shape or a number that is not positive and finite.

    Example:
        >>> coordination([1.0, 2.0]).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    rewards = as_inexact(rewards)
    if rewards.ndim != 1 or rewards.size == 0:
        raise ValueError(f"rewards must have shape (n,), got shape {rewards.shape}")
    good = jnp.all(jnp.isfinite(rewards) & (rewards > 0))
    return _require_game(jnp.diag(rewards), good, f"rewards must be positive and finite, got {rewards}")


def zeeman() -> Float[Array, "3 3"]:
    r"""Zeeman's game: the centre attracts though it is not evolutionarily stable; so does a corner.

    Source: zeeman1980.

    Example:
        >>> stability(zeeman(), [1 / 3, 1 / 3, 1 / 3]), is_ess(zeeman(), [1 / 3, 1 / 3, 1 / 3])
        ('attracting', False)
    """
    return jnp.array([[0.0, 6.0, -4.0], [-3.0, 0.0, 5.0], [-1.0, 3.0, 0.0]])


def matching_pennies() -> tuple[Float[Array, "2 2"], Float[Array, "2 2"]]:
    r"""Matching pennies: the payoffs (A, -A) of the player who wants equal sides and of the other one.

    Both have shape (2, 2), own strategies in the rows for the first and in the columns for the second.

    Example:
        >>> [payoff.tolist() for payoff in matching_pennies()]
        [[[1.0, -1.0], [-1.0, 1.0]], [[-1.0, 1.0], [1.0, -1.0]]]
    """
    payoff = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    return payoff, -payoff


def mean_fitness(payoff: ArrayLike, x: ArrayLike) -> Float[Array, "*batch"]:
    r"""Mean fitness x^T A x of states x (..., n).

    Example:
        >>> float(mean_fitness(jnp.eye(2), [0.5, 0.5]))
        0.5
    """
    payoff, x = as_inexact(payoff), as_inexact(x)
    return jnp.einsum("...i,ij,...j->...", x, payoff, x)


def conserved_quantity(x_star: ArrayLike, log_x: ArrayLike) -> Float[Array, "*batch"]:
    r"""Logarithm of prod_i x_i^{x*_i}: constant in zero-sum games with interior equilibrium x*.

    Along any flow d/dt sum_i x*_i log x_i = (x* - x)^T A x.

    Args:
        x_star: point of the simplex, shape (n,).
        log_x: logarithms of states, shape (..., n), such as `ys` of `simulate`.

    Returns:
        Shape (...).

    Raises:
        ValueError: `x_star` is not on the simplex.

    Source: hofbauer1998, section 7.7, for rock-paper-scissors.

    Example:
        >>> round(float(conserved_quantity([0.5, 0.5], jnp.log(jnp.array([0.2, 0.8])))), 6)  # log 0.4
        -0.916291
    """
    x_star, log_x = require_simplex("x_star", x_star), as_inexact(log_x)
    # A strategy that x* lacks counts for nothing, even where its share is zero.
    weights = jnp.broadcast_to(x_star.astype(log_x.dtype), log_x.shape)
    return jnp.sum(jnp.where(weights == 0, 0, weights * log_x), axis=-1)


def kl_divergence(x_star: ArrayLike, log_x: ArrayLike) -> Float[Array, "*batch"]:
    r"""Kullback-Leibler divergence KL(x* || x) = sum_i x*_i log(x*_i / x_i), in nats.

    Along the flow d KL / dt = (x - x*)^T A x: near an evolutionarily stable x* it falls, in a zero-sum
    game with interior equilibrium x* it is constant.

    Args:
        x_star: point of the simplex, shape (n,).
        log_x: logarithms of states, shape (..., n).

    Returns:
        Shape (...); inf where x lacks a strategy that x* has.

    Raises:
        ValueError: `x_star` is not on the simplex.

    Source: hofbauer1998, section 7.2.

    Example:
        >>> round(float(kl_divergence([1.0, 0.0], jnp.log(jnp.array([0.5, 0.5])))), 6)  # log 2
        0.693147
    """
    log_x = as_inexact(log_x)
    return -entropy(require_simplex("x_star", x_star).astype(log_x.dtype)) - conserved_quantity(x_star, log_x)


def is_nash(payoff: ArrayLike, x: ArrayLike, *, atol: float | None = None) -> bool:
    r"""Whether x is a symmetric Nash equilibrium: max_i (A x)_i <= x^T A x.

    Args:
        payoff: payoff matrix A, shape (n, n).
        x: point of the simplex, shape (n,).
        atol: what counts as zero, in units of the largest difference of payoffs within a column; the
            square root of the machine epsilon where None.

    Raises:
        ValueError: `payoff` is not square and finite, `x` is not on the simplex.

    Source: hofbauer1998, section 7.2.

    Example:
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
        ValueError: the shapes do not fit.

    Source: hofbauer1998, section 7.1.

    Example:
        >>> eigenvalues(hawk_dove(2.0, 3.0), [2 / 3, 1 / 3]).real.round(6).tolist()  # -V (C - V) / (2 C)
        [-0.333333]
    """
    game, state = np.asarray(payoff, float), np.asarray(x, float)
    n = state.shape[-1] if state.ndim else 0
    if n < 2 or game.shape[-2:] != (n, n):
        raise ValueError(
            f"payoff and x must have shapes (..., n, n) and (..., n), n >= 2, got {game.shape}, {state.shape}"
        )
    fitness = np.einsum("...ij,...j->...i", game, state)
    slope_of_mean = fitness + np.einsum("...ji,...j->...i", game, state)
    advantage = fitness - np.sum(state * fitness, axis=-1, keepdims=True)
    jacobian = advantage[..., None] * np.eye(n) + state[..., None] * (game - slope_of_mean[..., None, :])
    basis = np.asarray(tangent_basis(n))
    return np.linalg.eigvals(basis.T @ jacobian @ basis).astype(complex)


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
        >>> stability(hawk_dove(2.0, 4.0), [0.5, 0.5]), stability(hawk_dove(2.0, 4.0), [1.0, 0.0])
        ('attracting', 'repelling')
    """
    game, state, atol = _require_state(payoff, x, atol)
    fitness = game @ state
    speed = np.max(np.abs(state * (fitness - state @ fitness)))
    if speed > atol:
        raise ValueError(f"x must be a rest point, got {state.tolist()} with speed {speed:.2g}")
    values = eigenvalues(game, state)
    growth, frequency = np.real(values), np.imag(values)
    still = np.abs(growth) <= atol
    if np.any(still):
        return "centre" if np.all(still & (np.abs(frequency) > atol)) else "degenerate"
    if np.all(growth < 0):
        return "attracting"
    return "repelling" if np.all(growth > 0) else "saddle"


def _scalars(**values: ArrayLike) -> list[Array]:
    """Numbers as arrays of one dtype; `ValueError` unless each is a finite scalar."""
    arrays = {name: as_inexact(value) for name, value in values.items()}
    for name, value in arrays.items():
        if value.ndim:
            raise ValueError(f"{name} must be a number, got shape {value.shape}")
        require_finite(name, value)
    dtype = jnp.result_type(*arrays.values())
    return [value.astype(dtype) for value in arrays.values()]


def _require_game(payoff: Array, good: Array, message: str) -> Array:
    """The payoff matrix; a bad one raises if its numbers can be looked at and is NaN if they are traced."""
    if not is_traced(good) and not bool(good):
        raise ValueError(message)
    return jnp.where(good, payoff, jnp.nan)


def _require_payoff(payoff: ArrayLike, atol: float | None, *beside: ArrayLike) -> tuple[np.ndarray, float]:
    """The payoffs with columns of mean zero in units of the largest difference in one, and the tolerance."""
    game = np.asarray(payoff, float)
    if game.ndim != 2 or game.shape[0] != game.shape[1] or game.size == 0:
        raise ValueError(f"payoff must have shape (n, n), got shape {game.shape}")
    if not np.all(np.isfinite(game)):
        raise ValueError("payoff must be finite, got NaN or infinity")
    epsilon = max(_epsilon(values) for values in (payoff, *beside))
    tolerance = epsilon**0.5 if atol is None else atol
    if not tolerance >= 0:
        raise ValueError(f"atol must be a number >= 0, got {atol}")
    span = np.max(np.ptp(game, axis=0))
    return (game - np.mean(game, axis=0)) / (span if span > 0 else 1), tolerance


def _epsilon(values: ArrayLike) -> float:
    dtype = getattr(values, "dtype", np.dtype(float))
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else float(np.finfo(float).eps)


def _require_state(
    payoff: ArrayLike, x: ArrayLike, atol: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    game, atol = _require_payoff(payoff, atol, x)
    state = np.asarray(x, float)
    require_shape("x", state, (len(game),))
    # The state is looked at on the host: many small calls would spend their time on a device.
    if not (np.all(state >= 0) and abs(np.sum(state) - 1) <= max(1e-6, atol)):
        raise ValueError(
            f"x must be a point of the simplex (no negative entry, sum one), got {state.tolist()}"
        )
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
