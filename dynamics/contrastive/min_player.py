"""The min player of contrastive learning: which importance of pairs makes a regularized energy least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    nan_unless,
    require_choice,
    require_every,
)
from dynamics.contrastive.family import half_squared_distances, require_normal, require_views
from dynamics.flow import all_finite

Regularizer = Literal["entropy", "inverse", "square", "direct"]

_DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "entropy": {"temperature": 0.5},
    "inverse": {"temperature": 0.5, "gamma": 2.0},
    "square": {"temperature": 0.5},
    "direct": {"temperature": 0.5, "power": 4.0},
}


def min_player(
    regularizer: Regularizer | str,
    f: ArrayLike,
    f_aug: ArrayLike,
    *,
    row_sums: ArrayLike = 1.0,
    **hyper: Any,
) -> Float[Array, "N N"]:
    r"""The importance alpha >= 0 of pairs that minimizes E_alpha - sum_{i, j != i} r(alpha_ij), exactly.

    | regularizer | r(a) | minimum, with d^2 = |f_i - f_j|^2 / 2 | hyperparameters |
    |---|---|---|---|
    | entropy | -2 t a log a | S_i exp(-d^2 / t) / sum_j exp(-d^2 / t) | temperature t = 0.5 |
    | inverse | 2 t a^(1 - g) / (1 - g) | (t / (d^2 - mu_i))^(1 / g) | t, gamma g = 2, above 1 |
    | square | -t a^2 / 2 | max(mu_i - 2 d^2, 0) / t | t |
    | direct | none: it is set | exp(-d^p / t), each row over its sum | t, power p = 4, above 0 |

    Every row sums to one (for entropy to `row_sums`), which fixes mu_i: a root of one variable for the
    inverse regularizer, and a level of water over the sorted distances for the square one. The distance to
    the other view has no part, since it is the same for a whole row. For the losses that are of psi = exp(x /
    t), `pairwise_importance` is the entropy's minimum for its own row sums.

    Source: tian2022contrastive, the talk's slides on the min player and on alpha-CL (minima are
    derived here).

    Args:
        regularizer: "entropy", "inverse", "square" or "direct".
        f: embeddings of one view of N >= 2 samples, (N, o).
        f_aug: those of the other view, (N, o).
        row_sums: S, a number >= 0 or one for each row, (N,), for the entropy alone.
        **hyper: `temperature`, `gamma` and `power`, as far as the regularizer has them.

    Returns:
        alpha, (N, N), with a diagonal of zero.

    Raises:
        ValueError: the regularizer is unknown or has no such hyperparameter, `row_sums` of another than the
            entropy are not one, the shapes do not fit, there is one sample alone, or a number is out of
            range and can be looked at.

    Example:
        >>> min_player("square", [[0.0], [1.0], [3.0]], [[0.0], [1.0], [3.0]], temperature=1.0)[0].tolist()
        [0.0, 1.0, 0.0]
    """
    f, f_aug = require_views(f=f, f_aug=f_aug)
    require_choice("regularizer", regularizer, get_args(Regularizer))
    own = _DEFAULTS[regularizer]
    if strange := sorted(hyper.keys() - own.keys()):
        raise ValueError(
            f"{strange[0]} is no hyperparameter of {regularizer}, which takes {' and '.join(own)}"
        )
    values = {**own, **hyper}
    checked = {key: require_normal(key, value, f.dtype) for key, value in values.items()}
    if regularizer == "inverse":
        gamma = checked["gamma"]
        checked["gamma"] = require_every("gamma", gamma, lambda g: g > 1, "above 1")
    sums = _require_sums(row_sums, f)
    if regularizer != "entropy":
        rule = f"1 for {regularizer}, whose rows sum to one"
        sums = require_every("row_sums", sums, lambda s: s == 1, rule)
    return nan_unless(all_finite((f, f_aug, sums, checked)), _player(regularizer, f, sums, checked))


def _require_sums(row_sums: ArrayLike, f: Array) -> Array:
    sums = cast(as_real("row_sums", row_sums), f.dtype)
    if sums.shape not in ((), (len(f),)):
        raise ValueError(f"row_sums must be a number or of shape ({len(f)},), got shape {sums.shape}")
    sums = require_every("row_sums", sums, lambda s: (s >= 0) & (s < jnp.inf), "finite and >= 0")
    return jnp.broadcast_to(sums, (len(f),))


@eqx.filter_jit
def _player(regularizer, f, sums, hyper):
    negative = ~jnp.eye(len(f), dtype=bool)
    distances = half_squared_distances(f, f)
    # What a row shares has no part. No number is infinite before it was divided by the temperature: the
    # quotient's derivative would be NaN.
    least = jnp.min(jnp.where(negative, distances, jnp.inf), axis=1, keepdims=True)
    beyond = jnp.where(negative, distances - least, 0)
    temperature = hyper["temperature"]
    if regularizer == "entropy":
        alpha = sums[:, None] * _softmax(jnp.where(negative, -beyond / temperature, -jnp.inf))
    elif regularizer == "direct":
        base = jnp.where(negative & (distances > 0), distances, 1)
        power = jnp.where(distances > 0, base ** (hyper["power"] / 2), 0)
        alpha = _softmax(jnp.where(negative, -power / temperature, -jnp.inf))
    elif regularizer == "square":
        alpha = jax.vmap(_filled, (0, 0, None))(beyond, negative, temperature)
    else:
        alpha = jax.vmap(_inverse, (0, 0, None, None))(beyond, negative, temperature, hyper["gamma"])
    return jnp.where(negative, alpha, 0)


def _softmax(logits):
    return jax.nn.softmax(logits, axis=1)


def _filled(beyond, negative, temperature):
    """Water of volume one over a floor at 2 d^2, in units of the temperature: max(level - floor, 0)."""
    # The level is at most one above the lowest floor, so that a floor of two is dry, as the row's own is.
    floor = jnp.where(negative, 2 * jnp.minimum(beyond, temperature) / temperature, 2)
    ascending = jnp.sort(floor)
    levels = (1 + jnp.cumsum(ascending)) / jnp.arange(1, floor.size + 1, dtype=floor.dtype)
    wet = jnp.sum(ascending < levels)
    return jnp.maximum(levels[wet - 1] - floor, 0)


def _inverse(beyond, negative, temperature, gamma):
    """(t / (d^2 - mu))^(1/g) with a sum of one, by the logarithm of its largest entry, which is -u."""
    beyond = beyond / temperature
    bits = jnp.finfo(beyond.dtype).nmant + 4

    def log_alpha(u):
        # The gap between mu and the least d^2 is t exp(g u), which may overflow; its inverse may not.
        return -u - jnp.log1p(beyond * jnp.exp(-gamma * u)) / gamma

    def excess(u):
        return jax.nn.logsumexp(jnp.where(negative, log_alpha(u), -jnp.inf))

    def bisected(function, start):
        # At u = 0 one entry alone is one; at log n none is above 1 / n. The sum falls in between.
        def halved(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = function(middle) > 0
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        return jax.lax.fori_loop(0, bits, halved, (start, start + jnp.log(1.0 * len(beyond))))[1]

    start = jnp.zeros((), beyond.dtype)
    u = jax.lax.custom_root(excess, start, bisected, lambda linear, y: y / linear(jnp.ones_like(y)))
    return jnp.exp(log_alpha(u))
