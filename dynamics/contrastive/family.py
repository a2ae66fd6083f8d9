"""A family of contrastive losses, phi(sum_j psi(u_ij)), and how important each of them makes a pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynamics.arguments import (
    ArrayLike,
    nan_unless,
    require_arrays,
    require_choice,
    require_every,
    require_number,
    require_positive,
    require_same_shape,
)
from dynamics.flow import all_finite

Name = Literal["infonce", "mine", "triplet", "soft_triplet", "n_plus_1_tuplet", "lifted", "coria", "ji"]
Negatives = Literal["view", "both"]

# The hyperparameters that a loss has, with their defaults.
_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "infonce": {"temperature": 0.5, "epsilon": 1.0},
    "mine": {},
    "triplet": {"epsilon": 1.0},
    "soft_triplet": {"temperature": 0.5, "epsilon": 0.0},
    "n_plus_1_tuplet": {},
    "lifted": {"epsilon": 1.0},
    "coria": {"scale": 1.0},
    "ji": {},
}


class Pairs(NamedTuple):
    """How much closer each anchor's other view is than each of its negatives.

    Attributes:
        excess: u_ij = d_i^2 - d_ij^2 with d^2 half a squared distance, (anchors, anchors).
        negative: whether j is a negative of i, of the same shape.
    """

    excess: Float[Array, "m m"]
    negative: Bool[Array, "m m"]


def contrastive_pairs(f: ArrayLike, f_aug: ArrayLike, *, negatives: Negatives | str = "view") -> Pairs:
    r"""The pairs that contrastive losses compare: u_ij = |f_i - f'_i|^2 / 2 - |f_i - f_j|^2 / 2, j != i.

    Source: tian2022contrastive, the talk's slide on contrastive losses.

    Args:
        f: embeddings of one view of N >= 2 samples, (N, o).
        f_aug: those of the other view, f', (N, o).
        negatives: "view": those of the same view, f_j, as the source has it; "both": both views are anchors,
            and both views of all other samples are their negatives, 2N - 2 of them.

    Returns:
        `Pairs`, (N, N) or (2N, 2N) with the first view in front.

    Raises:
        ValueError: the shapes do not fit, there is one sample alone, or numbers are not finite.

    Example:
        >>> contrastive_pairs([[0.0], [2.0]], [[1.0], [2.0]]).excess.tolist()
        [[0.5, -1.5], [-2.0, 0.0]]
    """
    f, f_aug = require_views(f=f, f_aug=f_aug)
    require_choice("negatives", negatives, get_args(Negatives))
    return _pairs(f, f_aug, negatives == "both")


def require_views(**views: ArrayLike) -> list[Array]:
    """Two views of the same samples, two at least, as arrays of one dtype."""
    arrays = require_arrays(**views)
    require_same_shape("(N, o)", [2], **dict(zip(views, arrays, strict=True)))
    if len(arrays[0]) < 2:
        name = next(iter(views))
        raise ValueError(f"{name} must hold at least 2 samples, since one has no negatives, got 1")
    return arrays


@eqx.filter_jit
def _pairs(f, f_aug, both):
    negative = ~jnp.eye(len(f), dtype=bool)
    if both:
        f, f_aug = jnp.concatenate([f, f_aug]), jnp.concatenate([f_aug, f])
        negative = jnp.tile(negative, (2, 2))
    positive = jnp.sum((f - f_aug) ** 2, axis=1, keepdims=True) / 2
    return Pairs(positive - half_squared_distances(f, f), negative)


def half_squared_distances(f: Float[Array, "m o"], g: Float[Array, "n o"]) -> Float[Array, "m n"]:
    """|f_i - g_j|^2 / 2; rounding leaves none below zero, and all have the derivatives of the square."""
    # A shift that all share changes no distance, but its square would take the digits that they have.
    center = jnp.mean(g, axis=0, keepdims=True)
    f, g = f - center, g - center
    squares = (jnp.sum(f**2, axis=1)[:, None] + jnp.sum(g**2, axis=1)[None]) / 2 - f @ g.T
    return squares + jax.lax.stop_gradient(jnp.maximum(-squares, 0))


def require_hyper(name: Name | str, given: Mapping[str, Any], dtype: Any) -> dict[str, Array]:
    """The hyperparameters of a loss, defaults included."""
    require_choice("name", name, get_args(Name))
    own = _DEFAULTS[name]
    if strange := sorted(given.keys() - own.keys()):
        takes = f"takes {' and '.join(own)}" if own else "takes none"
        raise ValueError(f"{strange[0]} is no hyperparameter of {name}, which {takes}")
    values = {**own, **given}
    checked = {}
    for key, value in values.items():
        if key in ("temperature", "scale"):
            checked[key] = require_normal(key, value, dtype)
        else:  # of InfoNCE the weight of the positive pair, else a margin
            checked[key] = require_number(key, value, dtype, at_least=0 if name == "infonce" else None)
    return checked


def require_normal(name: str, value: Any, dtype: Any) -> Array:
    """One positive number that arithmetic does not take for zero, as it does those below the normal ones."""
    least = float(jnp.finfo(dtype).tiny)
    rule = f"at least {least:.3g}, the smallest normal number of {jnp.dtype(dtype).name}"
    return require_every(name, require_positive(name, value, dtype), lambda x: x >= least, rule)


def anchor_losses(name: Name | str, pairs: Pairs, hyper: Mapping[str, Array]) -> Float[Array, " m"]:
    """phi(xi_i) with xi_i = sum_j psi(u_ij), of every anchor, safe where exp(u_ij) would overflow."""
    u, negative = pairs
    if name == "triplet":
        return _sum(jax.nn.relu(u + hyper["epsilon"]), negative)
    if name == "coria":
        return _sum(jax.nn.sigmoid(hyper["scale"] * u), negative)
    if name == "ji":
        return _sum(u, negative)
    tau = hyper.get("temperature", jnp.ones((), u.dtype))
    total = _log_sum(u / tau, negative)
    if name == "infonce":
        return tau * _log_weighted(hyper["epsilon"], total)
    if name == "soft_triplet":
        return tau * jax.nn.softplus(total + hyper["epsilon"])
    if name == "lifted":
        return jax.nn.relu(total + hyper["epsilon"]) ** 2
    return jax.nn.softplus(total) if name == "n_plus_1_tuplet" else total


def _sum(values, negative):
    return jnp.sum(jnp.where(negative, values, 0), axis=1)


def _log_sum(logits, negative):
    return jax.nn.logsumexp(jnp.where(negative, logits, -jnp.inf), axis=1)


def _log_weighted(epsilon, total):
    """log(epsilon + exp(total)), with its derivatives also at epsilon = 0."""
    small, shift, odds = _odds(epsilon, total)
    return jnp.where(small, total + jnp.log1p(odds), jnp.logaddexp(shift, total))


def _odds(epsilon, total):
    """Whether epsilon is at most exp(total), its logarithm where it is more, and its share of it where not.

    The slope of a logarithm at zero would be infinite, and times zero NaN.
    """
    none = ~(epsilon > 0)
    small = none | (jnp.log(jnp.where(none, 1, epsilon)) <= total)
    most = math.log(jnp.finfo(total.dtype).max) - 1  # of which the exponential is finite
    odds = jnp.where(small, epsilon, 0) * jnp.exp(jnp.minimum(-total, most))
    return small, jnp.log(jnp.where(small, 1, epsilon)), odds


def pairwise_importance(
    name: Name | str, f: ArrayLike, f_aug: ArrayLike, *, negatives: Negatives | str = "view", **hyper: Any
) -> Float[Array, "m m"]:
    r"""How much a loss cares for each pair: alpha_ij = phi'(xi_i) psi'(u_ij), xi_i = sum_j psi(u_ij).

    | name | phi(x) | psi(x) | hyperparameters |
    |---|---|---|---|
    | infonce | t log(e + x) | exp(x / t) | temperature t = 0.5, epsilon e = 1 (0: without the positive) |
    | mine | log x | exp x | |
    | triplet | x | max(x + e, 0) | epsilon e = 1, a margin |
    | soft_triplet | t log(1 + x) | exp(x / t + e) | temperature t = 0.5, epsilon e = 0, a margin |
    | n_plus_1_tuplet | log(1 + x) | exp x | |
    | lifted | max(log x, 0)^2 | exp(x + e) | epsilon e = 1, a margin |
    | coria | x | sigmoid(c x) | scale c = 1 |
    | ji | x | x | |

    Where alpha is held, the loss and minus half the energy tr C_alpha[f, f] have the same gradient in f.

    Source: tian2022contrastive, the talk's slides on a general family and on coordinate-wise optimization.

    Args:
        name: the loss.
        f: embeddings of one view of N >= 2 samples, (N, o).
        f_aug: those of the other view, (N, o).
        negatives: "view" or "both"; see `contrastive_pairs`.
        **hyper: `temperature`, `epsilon` and `scale`, as far as the loss has them.

    Returns:
        alpha, (N, N), or (2N, 2N) for both views: not symmetric, and zero where a pair is no negative.

    Raises:
        ValueError: the loss is unknown or has no such hyperparameter, the shapes do not fit, there is one
            sample alone, or a number is out of range and can be looked at.

    Example:
        >>> pairwise_importance("mine", [[0.0], [1.0], [1.0]], [[0.0], [1.0], [1.0]])[0].tolist()
        [0.0, 0.5, 0.5]
    """
    pairs = contrastive_pairs(f, f_aug, negatives=negatives)
    checked = require_hyper(name, hyper, pairs.excess.dtype)
    # Comparisons with NaN, and what does not depend on features, would hide what is wrong with them.
    good = all_finite(checked) & ~jnp.any(jnp.isnan(pairs.excess))
    return nan_unless(good, _importance(name, pairs, checked))


@eqx.filter_jit
def _importance(name, pairs, hyper):
    u, negative = pairs
    if name == "triplet":
        weight = (u + hyper["epsilon"] > 0).astype(u.dtype)
    elif name == "coria":
        share = jax.nn.sigmoid(hyper["scale"] * u)
        weight = hyper["scale"] * share * (1 - share)
    elif name == "ji":
        weight = jnp.ones_like(u)
    else:
        logits = u / hyper.get("temperature", jnp.ones((), u.dtype))
        total = _log_sum(logits, negative)[:, None]
        row, logits = _of_row(name, total, hyper), jnp.where(negative, logits, -jnp.inf)
        weight = row * jnp.exp(logits - total)
    return jnp.where(negative, weight, 0)


def _of_row(name, total, hyper):
    """The sum of a row of importances, from log sum_j exp(u_ij / temperature)."""
    if name == "infonce":
        small, shift, odds = _odds(hyper["epsilon"], total)
        return jnp.where(small, 1 / (1 + odds), jax.nn.sigmoid(total - shift))
    if name == "lifted":
        return 2 * jax.nn.relu(total + hyper["epsilon"])
    if name in ("soft_triplet", "n_plus_1_tuplet"):
        return jax.nn.sigmoid(total + hyper.get("epsilon", jnp.zeros((), total.dtype)))
    return jnp.ones_like(total)
