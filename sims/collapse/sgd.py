"""Stochastic gradient descent that converges to a saddle or a maximum: large rates, small batches collapse.

The network has one neuron, f = w2 w1 x, and the loss (f - y)^2, on x = 1 and labels y = a with probability
0.6 and -a else; its minima are w1 w2 = E y, and zero is a saddle. Close to zero a step with the mean z of the
labels of a batch multiplies w1 + w2 by 1 + 2 eta z and w1 - w2 by 1 - 2 eta z, and descent ends there where

    E log |1 + 2 eta z| < 0   and   E log |1 - 2 eta z| < 0.

The slide names neither data nor network: these are ours. Labels are drawn, and each step is `jax.grad` of the
loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from dynamics.collapse import sgd_collapse_windows, sgd_lyapunov
from models.training import train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, every, qualified, quoted, stated
from sims.compare import WRONG_FACTOR, largest, percent
from sims.ranges import Positive, Range, check_ranges
from sims.results import Context, Saved

FIGURE, PAPER = "ziyin2022talk, Figure 3", "ziyin2022sgd, title"
POSITIVE = 0.6  # probability of a positive label
SIZE, LARGE = 2.0, 2.5  # of labels; the larger shows what the slide does at its two rates
SMALL_RATE, LARGE_RATE, SLIDE_RATE = 0.001, 0.1, 0.108  # those of the slide; at the last its loss diverges
BATCHES = (1, 2, 4, 8, 16)
TRAINED = (1, 2, 4, 16)  # those of whole runs
SHARES = (0.5, 0.8, 0.95, 1.05, 1.2, 1.5)  # learning rates over the first at which a batch collapses
BETWEEN = 0.35  # a learning rate beyond the window of batches 1 and 2, and between those of 4
HIGHEST = 0.9  # learning rates up to here are looked at for windows
COLLAPSED, DIVERGED = 1e-3, 1e3  # bounds of weights
TINY = 1e-30  # weights at which steps are linear, to rounding
RECORDS = 100  # of a run
SPREAD = 6  # steps over which the mean square of a few thousand chains is not yet that of a few alone
MARK = 2  # records after which the logarithms of weights at the maximum are taken, far from underflow


@dataclass(frozen=True)
class Config:
    """How many chains there are, for how long, and at which learning rates."""

    chains: Annotated[int, Range(at_least=16)] = 128
    """Independent runs at each learning rate and batch size."""
    steps: Annotated[int, Range(at_least=1000)] = 10_000
    """Steps of each, as on the slide."""
    rates: tuple[Positive, ...] = (
        0.01,
        0.02,
        0.04,
        0.06,
        0.07,
        0.08,
        0.12,
        0.14,
        0.16,
        0.18,
        0.2,
        0.22,
        0.25,
    )
    """Learning rates of the curve of losses, besides 0.001 and 0.1."""
    growing: Annotated[int, Range(at_least=1000)] = 4096
    """Chains close to zero, from which exponents and the mean and median of squares are taken."""
    growth_steps: Annotated[int, Range(at_least=100)] = 100
    """Steps of each of these."""

    def __post_init__(self):
        check_ranges(self)
        if self.steps % RECORDS:
            raise ValueError(f"steps must be a multiple of {RECORDS}, got {self.steps}")

    @property
    def all_rates(self) -> tuple[float, ...]:
        """Learning rates of the curve of losses, ascending."""
        return tuple(sorted({SMALL_RATE, LARGE_RATE, *self.rates}))


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": Config(
        chains=512,
        rates=tuple(float(rate) for rate in np.round(np.arange(0.01, 0.251, 0.01), 2)),
        growing=16_384,
        growth_steps=200,
    ),
    "paper": Config(chains=2048, steps=20_000, growing=65_536, growth_steps=400),
}


class Lanes(NamedTuple):
    """Learning rates, batches and data that one program serves, each with the lanes in front.

    Attributes:
        rate: learning rates.
        batch: samples in a batch.
        law: cumulative distribution of how many of them have positive labels, (lane, largest batch).
        size: a, of labels.
    """

    rate: Any
    batch: Any
    law: Any
    size: Any


def lanes_of(rates: Any, batches: Any, size: float) -> Lanes:
    """Lanes of pairs of a learning rate and a batch size, on labels of one size."""
    rates, batches = np.broadcast_arrays(np.asarray(rates, float), batches)
    law = binom.cdf(np.arange(max(BATCHES)), batches[:, None], POSITIVE)
    return Lanes(rates, batches.astype(float), law, np.full(rates.shape, size))


def drawn_share(u: Array, lane: Lanes) -> Array:
    """The share of positive labels in a batch: a uniform number draws how many there are, by their law."""
    return jnp.sum(u >= lane.law) / lane.batch


def _network_loss(lane: Lanes, w: tuple, u: Array) -> Array:
    """Mean of (f - y)^2 over a drawn batch, f = w2 w1 x and x = 1."""
    f, share = w[1] * w[0], drawn_share(u, lane)
    return share * (f - lane.size) ** 2 + (1 - share) * (f + lane.size) ** 2


def _maximum_loss(lane: Lanes, w: Array, u: Array) -> Array:
    """Mean of x w^2 / 2 over a drawn batch of numbers x = -y, whose mean is negative."""
    return -(2 * drawn_share(u, lane) - 1) * lane.size * w**2 / 2


@partial(jax.jit, static_argnames=("loss", "every"))
def _trained(loss: Callable, every: int, starts: Any, u: Any, lanes: Lanes) -> Any:
    """Weights along SGD, (chain, lane, record); each chain draws its batches from a row of u at all lanes."""

    def run(start, u, lane):
        optimizer = optax.sgd(lane.rate)
        return train(Partial(loss, lane), start, optimizer, steps=len(u), every=every, batches=u)[1].ys

    return jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None))(starts, u, lanes)


@partial(jax.jit, static_argnames=("chains", "steps"))
def _growth(chains: int, steps: int, key: Array, lanes: Lanes, shown: int) -> tuple[Array, Array]:
    """Logarithms of how much w1 + w2 and w1 - w2 grow, (direction, chain, lane); each step rescales both.

    The second are those of w1 + w2 of one lane after each step, (step, chain).
    """
    gradient = jax.vmap(jax.vmap(jax.grad(_network_loss, 1)), (None, 0, 0))

    def step(carry, key):
        w, logs = carry
        slopes = gradient(lanes, w, jax.random.uniform(key, logs[0].shape))
        one, other = (weight - lanes.rate[None] * slope for weight, slope in zip(w, slopes, strict=True))
        both = (one + other) / TINY, (one - other) / TINY
        plus, minus = (jnp.sign(part) * TINY / 2 for part in both)
        logs = tuple(log + jnp.log(jnp.abs(part)) for log, part in zip(logs, both, strict=True))
        return ((plus + minus, plus - minus), logs), logs[0][:, shown]

    zero = jnp.zeros((chains, len(lanes.rate)))
    start = (zero + TINY, zero), (zero, zero)
    (_, logs), path = jax.lax.scan(step, start, jax.random.split(key, steps))
    return jnp.stack(logs), path


@jax.jit
def _theory(rates: Array) -> Array:
    """Exponents of the direction that grows in the mean, (rate, batch), for labels of size a = 2."""
    law = [SIZE, -SIZE], [POSITIVE, 1 - POSITIVE]
    of = [jax.vmap(lambda rate, batch=batch: sgd_lyapunov(rate, *law, batch))(rates) for batch in BATCHES]
    return jnp.stack(of, axis=1)


def _batch_means(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """What the mean of labels over a batch can be, and with what probability."""
    counts = np.arange(batch + 1)
    return SIZE * (2 * counts / batch - 1), binom.pmf(counts, batch, POSITIVE)


def _other_exponent(rates: np.ndarray, batch: int) -> np.ndarray:
    """Exponents of the direction that shrinks in the mean."""
    means, weights = _batch_means(batch)
    return np.log(np.abs(1 - 2 * rates[:, None] * means)) @ weights


def _windows() -> tuple[dict, np.ndarray]:
    """Learning rates at which SGD collapses, by batch size, and those at which it is looked at."""
    law = [SIZE, -SIZE], [POSITIVE, 1 - POSITIVE]
    found = [sgd_collapse_windows(*law, batch, largest=HIGHEST) for batch in BATCHES]
    most = max(map(len, found))
    ends = [np.pad(each, [(0, most - len(each)), (0, 0)], constant_values=np.nan) for each in found]
    first = [found[BATCHES.index(batch)][0, 0] for batch in (1, 2)]
    rates = np.concatenate([*(np.asarray(SHARES) * end for end in first), [BETWEEN]])
    windows = {"count": ("batch", [len(each) for each in found]), "ends": ("batch window end", ends)}
    return windows, rates


def _ends(config: Config, starts: np.ndarray, u: np.ndarray, rates: np.ndarray) -> dict:
    """Where chains end, on the data of the slide's figure and over learning rate and batch size."""
    pairs = np.repeat(rates, len(TRAINED)), np.tile(TRAINED, rates.size)
    parts = lanes_of(config.all_rates, 1, LARGE), lanes_of(*pairs, SIZE)
    lanes = Lanes(*map(np.concatenate, zip(*parts, strict=True)))
    paths = _trained(_network_loss, config.steps // RECORDS, tuple(starts), u, lanes)
    paths = np.stack(paths, axis=-1)
    of_curve, of_map = np.split(np.swapaxes(paths, 0, 1), [len(config.all_rates)])
    largest_weight = np.max(np.abs(of_map[:, :, -1]), axis=-1).reshape(rates.size, len(TRAINED), -1)
    shown = [config.all_rates.index(rate) for rate in (SMALL_RATE, LARGE_RATE)]
    return {
        "start": ("chain weight", starts.T),
        "density": ("shown chain weight", of_curve[shown, :, -1]),
        "curve": {"rate": ("curve", np.asarray(config.all_rates)), **_losses(of_curve)},
        "map": {
            "collapsed": ("rate trained", np.mean(largest_weight < COLLAPSED, axis=-1)),
            "diverged": ("rate trained", np.mean(~(largest_weight < DIVERGED), axis=-1)),
        },
    }


def _losses(paths: np.ndarray) -> dict:
    """Mean loss over the later half of chains that stay finite, and the share of those that do not."""
    with np.errstate(over="ignore", invalid="ignore"):
        f = paths[:, :, RECORDS // 2 :, 0] * paths[:, :, RECORDS // 2 :, 1]
        loss = np.mean(LARGE**2 - 2 * (2 * POSITIVE - 1) * LARGE * f + f**2, axis=-1)
    stays = np.all(np.abs(paths[:, :, -1]) < DIVERGED, axis=-1)  # False for NaN
    count = np.sum(stays, axis=1)
    mean = np.sum(np.where(stays, loss, 0), axis=1) / np.maximum(count, 1)
    return {
        "loss": ("curve", np.where(count > 0, mean, np.nan)),
        "diverged": ("curve", 1 - count / stays.shape[1]),
    }


def _mean_and_error(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and its standard error."""
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / len(samples) ** 0.5


def _exponents(config: Config, key: Array, rates: np.ndarray, shown: int) -> dict:
    """Exponents of both directions by the network's steps, beside theory, and squares at one of the rates."""
    lanes = lanes_of(np.repeat(rates, len(BATCHES)), np.tile(BATCHES, rates.size), SIZE)
    steps = config.growth_steps
    logs, path = map(np.asarray, _growth(config.growing, steps, key, lanes, shown * len(BATCHES)))
    mean, error = _mean_and_error(np.moveaxis(logs / steps, 1, 0).reshape(-1, 2, rates.size, len(BATCHES)))
    grid = np.linspace(0.002, 0.4, 200)
    right, wrong, curve = np.split(
        np.asarray(_theory(np.concatenate([rates, WRONG_FACTOR * rates, grid]))),
        [rates.size, 2 * rates.size],
    )
    other = np.stack([_other_exponent(rates, batch) for batch in BATCHES], axis=1)
    return {
        "exponent": {
            "mean": ("direction rate batch", mean),
            "error": ("direction rate batch", error),
            "theory": ("direction rate batch", np.stack([right, other])),
            "wrong": ("rate batch", wrong),
            "grid": ("grid", grid),
            "curve": ("grid batch", curve),
        },
        "square": _squares(path, rates[shown], right[shown, 0]),
    }


def _squares(logs: np.ndarray, rate: float, exponent: float) -> dict:
    """Mean and median of the squared weight over its start, from the logarithms of its growth."""
    squares = np.exp(2 * logs.T)
    mean, error = _mean_and_error(squares)
    median, spread = np.median(logs, axis=1), np.std(logs, axis=1) / logs.shape[1] ** 0.5
    means, weights = _batch_means(1)
    steps = np.arange(1, len(logs) + 1)
    return {
        "step": ("step", steps),
        "mean": ("step", mean),
        "error": ("step", error),
        "exact": ("step", float(weights @ (1 + 2 * rate * means) ** 2) ** steps),
        "log_median": ("step", 2 * median),
        "log_error": ("step", 2 * (np.pi / 2) ** 0.5 * spread),
        "log_typical": ("step", 2 * exponent * steps),
    }


def _maximum(config: Config, u: np.ndarray, rates: np.ndarray) -> dict:
    """Chains at the maximum of E x w^2 / 2, at learning rates on both sides of where they converge."""
    every = config.steps // RECORDS
    lanes = lanes_of(2 * rates, np.ones(rates.size), SIZE)
    paths = np.abs(np.asarray(_trained(_maximum_loss, every, np.ones(config.chains), u, lanes)))
    growth, error = _mean_and_error(np.log(paths[:, :, MARK]) / (MARK * every))
    return {
        "collapsed": ("share", np.mean(paths[:, :, -1] < COLLAPSED, axis=0)),
        "growth": ("share", growth),
        "error": ("share", error),
    }


def run(config: Config, context: Context) -> dict:
    """Chains of SGD over learning rates and batch sizes, and how fast they leave or approach zero."""
    draws, growth = jax.random.split(jax.random.key(context.seed))
    windows, rates = _windows()
    context.progress("chains", 0.0)
    found = {"share": ("share", np.asarray(SHARES)), "rate": ("rate", rates), "window": windows}
    drawn = np.asarray(jax.random.uniform(draws, (config.chains, 2 + config.steps)))
    starts, u = 2 * drawn[:, :2].T - 1, drawn[:, 2:]
    found |= _ends(config, starts, u, rates)
    context.progress("maximum", 0.6)
    found["maximum"] = _maximum(config, u, rates[: len(SHARES)])
    context.progress("exponents", 0.7)
    return found | _exponents(config, growth, rates, len(SHARES) - 1)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Where SGD ends at a small and a large rate, when it collapses, and what exponents tell of it."""
    yield _small_rate(saved)
    yield _large_rate(saved)
    yield quoted(
        "divergence",
        f"The loss diverges for learning rates above {SLIDE_RATE}",
        FIGURE,
        needs="the network and the data of the slide, which it does not give; ours diverge above 0.16",
    )
    yield _equilibrium(saved)
    yield _collapse(saved)
    yield _critical_rate(saved)
    yield _exponents_agree(saved)
    yield _finite_step(saved)
    yield _mean_and_median(saved)
    yield _local_maximum(saved)


def _small_rate(saved: Saved) -> Claim:
    w = np.asarray(saved["density"])[0]
    target = (2 * POSITIVE - 1) * LARGE
    return stated(
        "small-rate",
        "At a learning rate of 0.001 SGD converges to global minima",
        f"{FIGURE} (its network and data are ours)",
        equals(
            "mean of w1 w2 at the last step",
            np.mean(w[:, 0] * w[:, 1]),
            target,
            0.03,
            why="four standard errors over chains",
        ),
        every("chains that are not at the saddle", np.max(np.abs(w), axis=1) > 10 * COLLAPSED),
    )


def _large_rate(saved: Saved) -> Claim:
    w = np.asarray(saved["density"])[1]
    return stated(
        "large-rate",
        "At a learning rate of 0.1 SGD converges to a saddle",
        f"{FIGURE} (its network and data are ours)",
        every("chains at the saddle at the last step", np.max(np.abs(w), axis=1) < COLLAPSED),
    )


def _equilibrium(saved: Saved) -> Claim:
    rate, loss, diverged = (np.asarray(saved[f"curve/{name}"]) for name in ("rate", "loss", "diverged"))
    minimum = LARGE**2 * (1 - (2 * POSITIVE - 1) ** 2)
    rising = rate <= 0.06
    return stated(
        "equilibrium",
        "The loss in equilibrium rises with the learning rate from that of the minimum, and is that of the "
        "saddle before chains diverge",
        f"{FIGURE} (its network and data are ours)",
        equals(
            "rate 0.001: loss", loss[rate == SMALL_RATE][0], minimum, 0.03, why="w1 w2 varies about its mean"
        ),
        every("rates up to 0.06: steps at which it rises", np.diff(loss[rising]) > 0),
        equals("rate 0.1: loss", loss[rate == LARGE_RATE][0], LARGE**2, 1e-9, why="weights are zero by then"),
        at_most(
            "rates up to 0.16: largest share that diverges",
            np.max(diverged[rate <= 0.165]),
            0.01,
            why="a chain may start far from all minima",
        ),
        at_least(
            "the largest rate: share that diverges",
            diverged[-1],
            0.5,
            why="steps at the minima are larger than their valley",
        ),
    )


def _collapse(saved: Saved) -> Claim:
    collapsed, diverged = (np.asarray(saved[f"map/{name}"]) for name in ("collapsed", "diverged"))
    share, count = np.asarray(saved["share"]), len(SHARES)
    own = np.stack([collapsed[:count, 0], collapsed[count : 2 * count, 1]])
    finite = 1 - np.stack([diverged[:count, 0], diverged[count : 2 * count, 1]])
    why = "the spread over chains, and passages close to zero"
    return stated(
        "collapse",
        "Complete collapse happens when the learning rate is large and the batch is small",
        f"{FIGURE} (and the slide before it; network, data and thresholds are derived)",
        at_most("half the threshold, batches 1 and 2: largest fraction", np.max(own[:, 0]), 0.05, why=why),
        at_least(
            "1.2 and 1.5 of it: least fraction of chains that stay finite",
            np.min(own[:, share > 1.1] / finite[:, share > 1.1]),
            0.95,
            why=why,
        ),
        at_most(
            "1.2 of that of batch 1: fraction with batch 2",
            collapsed[:count][share == 1.2, 1][0],
            0.1,
            why="the rate is two thirds of its own threshold",
        ),
        at_most(
            "0.5 to 1.5 of that of batch 1: largest fraction with batches 4 and 16",
            np.max(collapsed[:count, 2:]),
            0.05,
            why=why,
        ),
    )


def _critical_rate(saved: Saved) -> Claim:
    count, ends, share = (np.asarray(saved[path]) for path in ("window/count", "window/ends", "share"))
    mean, error = (np.asarray(saved[f"exponent/{name}"]) for name in ("mean", "error"))
    low, high, length = mean - 4 * error, mean + 4 * error, len(SHARES)
    own = [slice(0, length), slice(length, 2 * length)]
    leaves = [low[0, part, index][share < 0.9] for index, part in enumerate(own)]
    stays = [high[:, part, index][:, share > 1.1] for index, part in enumerate(own)]
    digits, measured = "five digits are given", "four standard errors"
    return qualified(
        "critical-rate",
        "Beyond a critical learning rate SGD converges to the saddle",
        f"{FIGURE} (windows are derived)",
        condition="a batch holds one or two examples, and the rate is below that at which zero repels again",
        inside=[
            every("batches 1 and 2: one window", count[:2] == 1),
            equals("batch 1: where it begins", ends[0, 0, 0], 0.097348, 5e-7, why=digits),
            equals("batch 2: where it begins", ends[1, 0, 0], 0.17373, 5e-6, why=digits),
            at_least("0.5 and 0.8 of that: least exponent, less its error", np.min(leaves), 0, why=measured),
            at_most("1.2 and 1.5 of that: largest exponent, plus its error", np.max(stays), 0, why=measured),
        ],
        outside=[
            at_least(
                f"batches 1, 2 and 4 at {BETWEEN}: least exponent, less its error",
                np.min(low[0, -1, :3]),
                0,
                why=measured,
            ),
            equals("batch 4: windows, which that rate is between", count[2], 2, why="it is a whole number"),
            equals("the first of them begins at", ends[2, 0, 0], 0.24797, 5e-6, why=digits),
            equals("batch 8: its widest begins at", ends[3, 1, 0], 0.49922, 5e-6, why=digits),
            at_most(
                "batch 8: widest window",
                np.max(ends[3, :2, 1] - ends[3, :2, 0]),
                0.002,
                why="only close to a rate at which a batch takes weights to zero",
            ),
            equals(f"batch 16: windows below {HIGHEST}", count[4], 0, why="E log |1 + 2 eta z| is positive"),
        ],
    )


def _exponents_agree(saved: Saved) -> Claim:
    part = saved["exponent"]
    mean, error = np.asarray(part["mean"]), np.asarray(part["error"])
    right = (mean - part["theory"]) / error
    wrong = (mean[0] - part["wrong"]) / error[0]
    return stated(
        "exponents",
        "Close to zero w1 + w2 and w1 - w2 grow by E log |1 + 2 eta z| and E log |1 - 2 eta z| per step",
        f"{FIGURE} (exponents are derived)",
        at_most(
            "all rates and batches: largest distance in standard errors",
            largest(right),
            4,
            why="of 130 normal numbers one is above 4 in one run of a hundred",
        ),
        at_least(
            f"the same for a rate that is {percent(WRONG_FACTOR)} too large",
            largest(wrong),
            10,
            why="such a theory must be seen to fail",
        ),
    )


def _finite_step(saved: Saved) -> Claim:
    mean, error = (np.asarray(saved[f"exponent/{name}"])[0] for name in ("mean", "error"))
    score, share = (mean / error)[: len(SHARES), 0], np.asarray(saved["share"])
    collapsed = np.asarray(saved["map/collapsed"])[: len(SHARES), 0]
    why = "a chain that spends long times close to zero need not stay there"
    return stated(
        "finite-step",
        "The sign of the exponent tells where collapse begins; the fraction of weights near zero at the last "
        "step does not",
        f"{FIGURE} (exponents are derived)",
        at_least(
            "batch 1, 0.95 of the threshold: exponent over its error",
            score[share == 0.95][0],
            3,
            why="it leaves",
        ),
        at_most("1.05 of it: the same", score[share == 1.05][0], -3, why="it stays"),
        at_least("0.8 of it: fraction near zero", collapsed[share == 0.8][0], 0.05, why=why),
        at_least("0.95 of it: fraction near zero", collapsed[share == 0.95][0], 0.3, why=why),
    )


def _mean_and_median(saved: Saved) -> Claim:
    part = {name: np.asarray(saved[f"square/{name}"]) for name in ("mean", "error", "exact")}
    first = slice(0, SPREAD)
    gap = (part["mean"] - part["exact"])[first] / part["error"][first]
    fallen, typical, error = (saved[f"square/log_{name}"][-1] for name in ("median", "typical", "error"))
    return stated(
        "mean-and-median",
        "The mean of the squared weight diverges while its median falls to zero",
        f"{FIGURE} (stability in mean and in probability are derived)",
        at_most(
            f"1 to {SPREAD} steps: mean, its distance from E[(1 + 2 eta z)^2]^n in standard errors",
            largest(gap),
            4,
            why="later a few chains of thousands would carry the mean",
        ),
        at_least(
            "its least growth per step",
            np.min(np.diff(np.log(part["mean"][first]))),
            0.3,
            why="log E is 0.45",
        ),
        equals(
            "last step: logarithm of the median",
            fallen,
            typical,
            4 * error,
            why="four standard errors of a median; it is 2 n E log |1 + 2 eta z|",
        ),
        at_most("the same", fallen, -5, why="it falls"),
    )


def _local_maximum(saved: Saved) -> Claim:
    collapsed, share = np.asarray(saved["maximum/collapsed"]), np.asarray(saved["share"])
    theory = np.asarray(saved["exponent/theory"])[0, : len(SHARES), 0]
    gap = (np.asarray(saved["maximum/growth"]) - theory) / np.asarray(saved["maximum/error"])
    why = "logarithms spread like the root of the number of steps"
    return stated(
        "local-maximum",
        "SGD with a constant large learning rate can converge to a local maximum",
        f"{PAPER} (x w^2 / 2 with E x < 0 is our example: it converges where E log |1 - eta x| < 0)",
        at_most(
            "0.5 and 0.8 of the threshold: largest fraction at the maximum",
            np.max(collapsed[share < 0.9]),
            0.02,
            why=why,
        ),
        at_least("1.2 and 1.5 of it: least fraction", np.min(collapsed[share > 1.1]), 0.98, why=why),
        at_most(
            "growth per step, its distance from E log |1 - eta x| in standard errors",
            largest(gap),
            4,
            why="of six lanes",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """The slide's three panels, and below where it collapses, by which exponents, in which sense."""
    drawn, ((small, large, loss), (where, growth, squares)) = plotting.new_figure(2, 3, width=3.9, height=3.4)
    starts, ends = np.asarray(saved["start"]), np.asarray(saved["density"])
    _density_panel(small, starts, ends[0], f"Learning rate {SMALL_RATE}: minima")
    _density_panel(large, starts, ends[1], f"Learning rate {LARGE_RATE}: a saddle")
    _loss_panel(loss, saved)
    _collapse_panel(where, saved)
    _exponent_panel(growth, saved)
    _square_panel(squares, saved)
    return drawn


def _density_panel(ax: Axes, starts: np.ndarray, ends: np.ndarray, title: str) -> None:
    at = np.linspace(-2.3, 2.3, 121)
    one, other = np.meshgrid(at, at)
    target = (2 * POSITIVE - 1) * LARGE
    ax.contour(
        one, other, (one * other - target) ** 2, levels=[0.1, 0.5, 1, 2, 4], colors="0.85", linewidths=0.8
    )
    for side in (at[at > 0.2], at[at < -0.2]):
        ax.plot(side, target / side, **plotting.THEORY, label="minima" if side[0] > 0 else None)
    ax.plot(*starts.T, ".", color="0.6", ms=3, label="start")
    ax.plot(*ends.T, "o", color="C0", alpha=0.5, ms=4, label="last step")
    plotting.finish(ax, title, "weight w₁", "weight w₂", "upper left", xlim=(-1.8, 1.8), ylim=(-1.8, 2.3))


def _loss_panel(ax: Axes, saved: Saved) -> None:
    rate, loss, diverged = (np.asarray(saved[f"curve/{name}"]) for name in ("rate", "loss", "diverged"))
    ax.plot(rate, loss, "o-", color="C0", label="chains that stay")
    ax.axvline(SLIDE_RATE, label="slide: diverges", **plotting.PRINTED)
    if np.any(diverged > 0.01):
        ax.axvspan(rate[diverged > 0.01][0], rate[-1], color="C1", alpha=0.15, label="ours: some do")
    edge = float(np.asarray(saved["window/ends"])[0, 0, 0]) * SIZE / LARGE
    ax.axvline(edge, label="theory: collapse", **plotting.THEORY)
    plotting.finish(ax, "Loss in equilibrium", "learning rate", "mean loss", "lower right")


def _collapse_panel(ax: Axes, saved: Saved) -> None:
    rate, collapsed = np.asarray(saved["rate"]), np.asarray(saved["map/collapsed"])
    order, ends = np.argsort(rate), np.asarray(saved["window/ends"])
    for index, batch in enumerate(TRAINED):
        at = BATCHES.index(batch)
        color = f"C{at}"
        ax.plot(rate[order], collapsed[order, index], "o-", color=color, label=f"batch {batch}")
        for low, high in ends[at][np.isfinite(ends[at][:, 0])]:
            ax.axvspan(low, high, ymax=0.06 - 0.015 * index, color=color, alpha=0.5)
    ax.text(0.57, 0.02, "below: windows", fontsize=8.5, ha="right", va="center")
    maximum = rate[: len(SHARES)], saved["maximum/collapsed"]
    ax.plot(*maximum, "D", color="black", mfc="none", ms=6, label="maximum")
    plotting.finish(
        ax,
        "Chains that collapse",
        "learning rate",
        "fraction at zero",
        "upper right",
        ylim=(-0.1, 1.05),
        xlim=(0.03, 0.58),
    )


def _exponent_panel(ax: Axes, saved: Saved) -> None:
    rate, grid, curve = (np.asarray(saved[path]) for path in ("rate", "exponent/grid", "exponent/curve"))
    mean, error = (np.asarray(saved[f"exponent/{name}"])[0] for name in ("mean", "error"))
    for index, batch in enumerate(BATCHES):
        label = f"batch {batch}"
        ax.errorbar(rate, mean[:, index], 4 * error[:, index], fmt="o", color=f"C{index}", label=label)
        ax.plot(grid, curve[:, index], **plotting.THEORY)
    ax.axhline(0, color="0.3", linewidth=0.8)
    plotting.finish(
        ax, "Exponent at zero", "learning rate", "E log|1 + 2ηz|", "lower left", ylim=(-0.45, 0.25)
    )


def _square_panel(ax: Axes, saved: Saved) -> None:
    part = {
        name: np.asarray(saved[f"square/{name}"])
        for name in ("step", "mean", "exact", "log_median", "log_typical")
    }
    ax.semilogy(part["step"], part["mean"], color="C1", label="mean of chains", **plotting.TRAINED)
    ax.semilogy(part["step"], np.exp(part["log_median"]), color="C0", label="median", **plotting.TRAINED)
    ax.semilogy(part["step"], part["exact"], **plotting.THEORY, label="theory")
    ax.semilogy(part["step"], np.exp(part["log_typical"]), **plotting.THEORY)
    plotting.finish(ax, "Mean and median", "step", "w² / w²(0)", "upper left")
