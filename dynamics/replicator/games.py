"""Classical games and what is measured on states of a population that plays them.

Payoff matrices have shape (n, n): entry (i, j) is what strategy i gets against j.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    is_traced,
    nan_unless,
    require_every,
    require_number,
    require_positive,
    require_shapes,
    require_vector,
)
from dynamics.replicator.simplex import require_simplex
from dynamics.spectra import entropy


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
        ValueError: a number is not finite or win + loss <= 0, and can be looked at.

    Source: hofbauer1998, section 7.7.

    Example:
        >>> rock_paper_scissors(1.0, 2.0).tolist()
        [[0.0, -2.0, 1.0], [1.0, 0.0, -2.0], [-2.0, 1.0, 0.0]]
    """
    numbers = _require_numbers(win=win, loss=loss)
    win, loss = _require_order("win must be above -loss", lambda win, loss: win > -loss, *numbers)
    return _game([[0, -loss, win], [win, 0, -loss], [-loss, win, 0]])


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
    value, cost = _require_numbers(value=value, cost=cost)
    value = require_positive("value", value, value.dtype)
    cost = require_positive("cost", cost, cost.dtype)
    return _game([[(value - cost) / 2, value], [0, value / 2]])


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
    against_bourgeois = jnp.sum(plain / 2, axis=1, keepdims=True)
    rows = jnp.concatenate([plain, against_bourgeois], axis=1)
    # It meets its like as the owner or as the intruder: no two of them ever fight.
    with_itself = plain[0, 1] / 2 + plain[1, 0] / 2
    bourgeois = jnp.append(jnp.sum(plain / 2, axis=0), with_itself)
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
    numbers = _require_numbers(temptation=temptation, reward=reward, punishment=punishment, sucker=sucker)
    t, r, p, s = _require_order(
        "temptation > reward > punishment > sucker must hold",
        lambda t, r, p, s: (t > r) & (r > p) & (p > s),
        *numbers,
    )
    return _game([[r, s], [t, p]])


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
    numbers = _require_numbers(stag=stag, hare=hare)
    stag, hare = _require_order(
        "stag > hare > 0 must hold", lambda stag, hare: (stag > hare) & (hare > 0), *numbers
    )
    return _game([[stag, 0], [hare, hare]])


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
    rewards = require_vector("rewards", rewards)
    rule = "positive and finite"
    rewards = require_every("rewards", rewards, lambda reward: (reward > 0) & (reward < jnp.inf), rule)
    return _game(jnp.diag(rewards))


def zeeman() -> Float[Array, "3 3"]:
    r"""Zeeman's game: the centre attracts though it is not evolutionarily stable; so does a corner.

    Source: zeeman1980.

    Example:
        >>> from dynamics.replicator import is_ess, stability
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
    r"""Mean fitness x^T A x of states x (..., n) with payoffs A (n, n).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> float(mean_fitness(jnp.eye(2), [0.5, 0.5]))
        0.5
    """
    payoff, x = as_real("payoff", payoff), as_real("x", x)
    require_shapes(payoff=(payoff, "n n"), x=(x, "... n"))
    return jnp.einsum("...i,ij,...j->...", x, payoff, x)


def conserved_quantity(x_star: ArrayLike, log_x: ArrayLike) -> Float[Array, "*batch"]:
    r"""Logarithm of prod_i x_i^{x*_i}: constant in zero-sum games with interior equilibrium x*.

    Along any flow d/dt sum_i x*_i log x_i = (x* - x)^T A x.

    Args:
        x_star: point of the simplex, shape (n,).
        log_x: logarithms of states, shape (..., n), such as `ys` of `simulate`.

    Returns:
        Shape (...); NaN where `log_x` is, or where a traced `x_star` is off the simplex.

    Raises:
        ValueError: `x_star` is not on the simplex, or the shapes do not fit.

    Source: hofbauer1998, section 7.7, for rock-paper-scissors.

    Example:
        >>> round(float(conserved_quantity([0.5, 0.5], jnp.log(jnp.array([0.2, 0.8])))), 6)  # log 0.4
        -0.916291
    """
    x_star, log_x = require_simplex("x_star", x_star), as_real("log_x", log_x)
    require_shapes(x_star=(x_star, "n"), log_x=(log_x, "... n"))
    # A strategy that x* lacks counts for nothing, even where its share is zero.
    weights = jnp.broadcast_to(x_star.astype(log_x.dtype), log_x.shape)
    lacking = (weights == 0) & ~jnp.isnan(log_x)
    return jnp.sum(jnp.where(lacking, 0, weights * log_x), axis=-1)


def kl_divergence(x_star: ArrayLike, log_x: ArrayLike) -> Float[Array, "*batch"]:
    r"""Kullback-Leibler divergence KL(x* || x) = sum_i x*_i log(x*_i / x_i), in nats.

    Along the flow d KL / dt = (x - x*)^T A x: near an evolutionarily stable x* it falls, in a zero-sum
    game with interior equilibrium x* it is constant.

    Args:
        x_star: point of the simplex, shape (n,).
        log_x: logarithms of states, shape (..., n).

    Returns:
        Shape (...); inf where x lacks a strategy that x* has, NaN where `log_x` is, or where a traced
        `x_star` is off the simplex.

    Raises:
        ValueError: `x_star` is not on the simplex, or the shapes do not fit.

    Source: hofbauer1998, section 7.2.

    Example:
        >>> round(float(kl_divergence([1.0, 0.0], jnp.log(jnp.array([0.5, 0.5])))), 6)  # log 2
        0.693147
    """
    x_star, log_x = require_simplex("x_star", x_star), as_real("log_x", log_x)
    return -entropy(x_star.astype(log_x.dtype)) - conserved_quantity(x_star, log_x)


def _require_numbers(**values: ArrayLike) -> list[Array]:
    """Finite numbers of one dtype."""
    arrays = {name: as_real(name, value) for name, value in values.items()}
    dtype = jnp.result_type(*arrays.values())
    return [require_number(name, array, dtype) for name, array in arrays.items()]


def _require_order(rule: str, holds: Callable[..., Any], *numbers: Array) -> list[Array]:
    """The numbers, of which a rule holds that is about all of them; NaN if one is traced and it does not."""
    if is_traced(numbers):
        good = holds(*numbers)
        return [nan_unless(good, number) for number in numbers]
    looked_at = [np.asarray(number) for number in numbers]
    if not holds(*looked_at):
        raise ValueError(f"{rule}, got {', '.join(map(str, looked_at))}")
    return list(numbers)


def _game(payoff: Any) -> Array:
    """The payoff matrix; all of it is NaN where a number is."""
    payoff = jnp.array(payoff)
    return nan_unless(jnp.all(jnp.isfinite(payoff)), payoff)
