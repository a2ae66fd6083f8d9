"""Stochastic gradient descent at the origin: exponents of growth, and where it collapses by itself.

The network has one neuron, f = w2 w1 x, and the loss (f - y)^2. Close to the origin a step with the mean z of
x y over a batch multiplies w1 + w2 by 1 + 2 eta z and w1 - w2 by 1 - 2 eta z: the origin is a saddle of the
mean loss, and a product of random numbers decides whether descent leaves it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import brentq, fminbound
from scipy.special import gammaln, xlogy

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    nan_unless,
    require_arrays,
    require_concrete,
    require_every,
    require_integer,
    require_number,
    require_positive,
    require_same_shape,
    require_sizes,
    require_vector,
)

_MOST_TERMS = 10**6
_NARROW = 1e-9  # of a learning rate: windows of which nobody would hit one
_WHOLE = 1e-6  # by how much probabilities may miss a sum of one


class SampledExponent(NamedTuple):
    """An exponent by sampling.

    Attributes:
        mean: mean of the logarithms of the factors.
        error: its standard error.
    """

    mean: Array
    error: Array


def sgd_lyapunov(
    learning_rate: ArrayLike, values: ArrayLike, probabilities: ArrayLike, batch_size: int
) -> Float[Array, ""]:
    r"""Exponent of SGD at the origin of a one-neuron network, for the direction that the mean gradient grows.

        E log |1 + 2 eta z|,   z the mean of x y over a batch

    for E[x y] >= 0, and with a minus where it is negative: the mean of log |w| grows by this per step. Where
    it is negative, and that with the other sign as well, SGD converges to the origin in probability, though
    the origin is a saddle of the mean loss; `sgd_collapse_windows` has the learning rates.

    Source: ziyin2022talk, Figure 3 (exponents are derived here).

    Args:
        learning_rate: eta, a number >= 0, on the loss (f - y)^2 without a factor 1/2.
        values: the values that x y takes, (n,).
        probabilities: their probabilities, (n,), which sum to one.
        batch_size: samples per step, drawn independently. Static.

    Returns:
        The exponent, exact: a sum over all batches. It is minus infinity where a batch ends at the origin in
        one step. NaN where a traced argument is out of range.

    Raises:
        ValueError: an argument is out of range, or there are more than a million different batches:
            `sampled_sgd_lyapunov` draws them.

    Example:
        >>> round(float(sgd_lyapunov(0.1, [2.0, -2.0], [0.6, 0.4], 1)), 5)  # below 0: SGD ends at the saddle
        -0.00245
    """
    values, probabilities, learning_rate = _require(values, probabilities, learning_rate)
    sign = _growing(values, probabilities)
    batches = _batches(values.size, batch_size)
    return _exact(
        sign * learning_rate, values, probabilities, *(part.astype(values.dtype) for part in batches)
    )


def sampled_sgd_lyapunov(
    learning_rate: ArrayLike,
    values: ArrayLike,
    probabilities: ArrayLike,
    batch_size: int,
    key: Array,
    samples: int = 10_000,
) -> SampledExponent:
    r"""`sgd_lyapunov` from random batches, for laws and batches with too many combinations to sum over.

    Source: ziyin2022talk, Figure 3 (exponents are derived here).

    Args:
        learning_rate: eta, a number >= 0.
        values: the values that x y takes, (n,).
        probabilities: their probabilities, (n,), which sum to one.
        batch_size: samples per step. Static.
        key: of the batches.
        samples: number of batches, at least 2. Static.

    Returns:
        A `SampledExponent`: mean and standard error.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> found = sampled_sgd_lyapunov(0.1, [2.0, -2.0], [0.6, 0.4], 1, jax.random.key(0))
        >>> bool(abs(found.mean - sgd_lyapunov(0.1, [2.0, -2.0], [0.6, 0.4], 1)) < 4 * found.error)
        True
    """
    values, probabilities, learning_rate = _require(values, probabilities, learning_rate)
    (batch_size,) = require_sizes(batch_size=batch_size)
    samples = require_integer("samples", samples, at_least=2)
    return _sampled(learning_rate, values, probabilities, batch_size, key, samples)


def sgd_collapse_windows(
    values: ArrayLike, probabilities: ArrayLike, batch_size: int, *, largest: float = 1.0
) -> np.ndarray:
    r"""Learning rates at which SGD converges to the origin: those with both exponents below zero.

    The exponents E log |1 + 2 eta z| and E log |1 - 2 eta z| are minus infinity where one batch takes a
    weight to zero, and concave in eta in between, so that each is positive on at most one interval between
    two such rates. For a large batch what is left are narrow windows, and no boundary of a phase; those
    narrower than a billionth of the rate are left out.

    Source: ziyin2022talk, Figure 3 (windows are derived here).

    Args:
        values: the values that x y takes, (n,).
        probabilities: their probabilities, (n,), which sum to one.
        batch_size: samples per step, with at most a million different batches.
        largest: learning rates up to this one are looked at, a positive number.

    Returns:
        Intervals (windows, 2), ascending, as NumPy numbers of 64 bit.

    Raises:
        ValueError: an argument is out of range, or traced.

    Example:
        >>> sgd_collapse_windows([2.0, -2.0], [0.6, 0.4], 1).round(4).tolist()
        [[0.0973, 0.3222]]
    """
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        given = {"values": values, "probabilities": probabilities, "largest": largest}
        given = {name: np.float64(require_concrete(name, value)) for name, value in given.items()}
        law = _require(given["values"], given["probabilities"], 0.0)[:2]
        largest = float(require_positive("largest", given["largest"], np.float64))
        values, probabilities = map(np.asarray, law)
    counts, log_choices = _batches(values.size, batch_size)
    weights = np.exp(log_choices + np.sum(xlogy(counts, probabilities), axis=1))
    means, weights = (counts @ values / batch_size)[weights > 0], weights[weights > 0]
    below = [_negative(sign * means, weights, largest) for sign in (1.0, -1.0)]
    both = [(max(a, c), min(b, d)) for (a, b), (c, d) in itertools.product(*below)]
    joined: list[list[float]] = []
    for low, high in sorted(pair for pair in both if pair[0] < pair[1]):
        if joined and low <= joined[-1][1]:  # they meet at a rate where an exponent is minus infinity
            joined[-1][1] = high
        else:
            joined.append([low, high])
    windows = np.asarray(joined).reshape(-1, 2)
    return windows[windows[:, 1] - windows[:, 0] > _NARROW * windows[:, 1]]


def _growing(values, probabilities):
    """The sign of the mean of x y, plus where it is zero up to rounding."""
    parts = values * probabilities
    rounding = len(parts) * float(jnp.finfo(parts.dtype).eps) * jnp.sum(jnp.abs(parts))
    return jnp.where(jnp.sum(parts) < -rounding, -1, 1).astype(parts.dtype)


def _negative(means: np.ndarray, weights: np.ndarray, largest: float) -> list[tuple[float, float]]:
    """Intervals of rates up to a largest one on which sum(weights log |1 + 2 rate means|) is negative."""

    def exponent(rate):
        with np.errstate(divide="ignore"):  # minus infinity is what it is there
            return float(weights @ np.log(np.abs(1 + 2 * rate * means)))

    found = []
    poles = np.unique(-0.5 / means[means < 0])
    edges = [0.0, *poles[poles < largest], largest]
    for low, high in itertools.pairwise(edges):
        # Just inside of a pole the logarithm is finite; at zero the exponent is zero.
        inner = np.nextafter(low, high), np.nextafter(high, low)
        peak = fminbound(lambda rate: -exponent(rate), *inner, xtol=1e-12 * high)
        if exponent(peak) <= 0:
            found += [(low, high)] * (exponent(inner[1]) < 0)
            continue
        if low > 0 and exponent(inner[0]) < 0:
            found.append((low, brentq(exponent, inner[0], peak, xtol=1e-15)))
        if exponent(inner[1]) < 0:
            found.append((brentq(exponent, peak, inner[1], xtol=1e-15), high))
    return found


def _require(values: Any, probabilities: Any, learning_rate: Any) -> tuple[Array, Array, Array]:
    values = require_vector("values", values)
    values, probabilities = require_arrays(values=values, probabilities=probabilities)
    require_same_shape("(n,)", (1,), values=values, probabilities=probabilities)
    probabilities = require_every("probabilities", probabilities, lambda p: p >= 0, ">= 0")
    total = as_concrete(jnp.sum(probabilities))
    if total is None:
        probabilities = nan_unless(abs(jnp.sum(probabilities) - 1) <= _WHOLE, probabilities)
    elif abs(total - 1) > _WHOLE:
        raise ValueError(f"probabilities must sum to 1, got a sum of {total:.7g}")
    return values, probabilities, require_number("learning_rate", learning_rate, values.dtype, at_least=0)


class _Batches(NamedTuple):
    """All batches that differ.

    Attributes:
        counts: how often each value is in a batch, (batches, n).
        log_choices: logarithms of the numbers of orders that give it, (batches,).
    """

    counts: np.ndarray
    log_choices: np.ndarray


def _batches(size: int, batch_size: int) -> _Batches:
    (batch_size,) = require_sizes(batch_size=batch_size)
    terms = math.comb(batch_size + size - 1, size - 1)
    if terms > _MOST_TERMS:
        raise ValueError(
            f"batch_size must leave at most {_MOST_TERMS} different batches, got {batch_size} with {terms}; "
            "sampled_sgd_lyapunov draws them instead"
        )
    # A choice of size - 1 bars among batch_size stars: counts are the numbers of stars in between.
    places = batch_size + size - 1
    bars = np.array(list(itertools.combinations(range(places), size - 1)), np.int64).reshape(terms, size - 1)
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, places)))
    counts = np.diff(edges, axis=1) - 1
    return _Batches(counts, gammaln(batch_size + 1) - np.sum(gammaln(counts + 1), axis=1))


@eqx.filter_jit
def _exact(learning_rate, values, probabilities, counts, log_choices):
    weights = jnp.exp(log_choices + jnp.sum(jax.scipy.special.xlogy(counts, probabilities[None]), axis=1))
    means = counts @ values / jnp.sum(counts[0])
    # A batch that never comes may be one that ends at the origin.
    factor = jnp.where(weights > 0, jnp.abs(1 + 2 * learning_rate * means), 1)
    exponent = jnp.sum(weights * jnp.log(factor))
    good = jnp.isfinite(learning_rate) & jnp.all(jnp.isfinite(values)) & jnp.all(jnp.isfinite(probabilities))
    return nan_unless(good, exponent)


@eqx.filter_jit
def _sampled(learning_rate, values, probabilities, batch_size, key, samples):
    sign = _growing(values, probabilities)

    def add(total, key):  # one sample to each batch
        return total + jax.random.choice(key, values, (samples,), p=probabilities), None

    keys = jax.random.split(key, batch_size)
    total, _ = jax.lax.scan(add, jnp.zeros(samples, values.dtype), keys)
    logs = jnp.log(jnp.abs(1 + 2 * sign * learning_rate * total / batch_size))
    good = jnp.isfinite(learning_rate) & jnp.all(jnp.isfinite(values)) & jnp.all(jnp.isfinite(probabilities))
    found = SampledExponent(jnp.mean(logs), jnp.std(logs, ddof=1) / samples**0.5)
    return jax.tree.map(lambda leaf: nan_unless(good, leaf), found)
