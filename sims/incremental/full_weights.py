"""A head with full weights: the ranks of both products grow step by step, as in gradient flow.

The theory is one of diagonal weights. Here all four matrices are full, the targets are those of a teacher
head of low rank, and the singular values of W_K W_Q^T and W_V W_O^T are followed from Gaussian starts of
several scales, in rescaled time. The reference is gradient flow on the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.flow import Trajectory, gradient_flow, integrate
from models.attention import AttentionHead, head_products
from models.draws import normal
from models.functional import as_function
from models.losses import bind, total_squared_error
from models.training import Descent
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, every, qualified, stated
from sims.compare import (
    SOLVE,
    WRONG_FACTOR,
    first_order,
    lane,
    lane_gaps,
    named_lanes,
    percent,
    require_ok,
)
from sims.ranges import Count, Length, Positive, Share, check_ranges
from sims.results import Context, Saved

PRODUCTS = ("KQ", "VO")
NAMES = {"KQ": "$W_K W_Q^T$", "VO": "$W_V W_O^T$"}
SMALL = 1e-2  # from here on down a scale counts as small
THRESHOLD = 0.05  # singular values above it count
COARSE = 10  # intervals of the coarse times


@dataclass(frozen=True)
class Config:
    """Task, scales of the start, and learning rates."""

    samples: Count = 200
    """Samples N."""
    tokens: Count = 6
    """Tokens n of a sample, standard Gaussian."""
    dim: Count = 6
    """Dimension d; all weights are (d, d)."""
    kq: Annotated[tuple[Positive, ...], Length(2)] = (1.2, 0.6, 0.3)
    """Singular values of the teacher's W_K W_Q^T other than zero, falling."""
    vo: Annotated[tuple[Positive, ...], Length(2)] = (2.0, 1.0, 0.5)
    """Singular values of the teacher's W_V W_O^T, as many."""
    alphas: Annotated[tuple[Share, ...], Length(2)] = (0.1, 0.01, 1e-4)
    """Scales of the Gaussian start, falling: 0.1 or more first, 0.01 or less after it."""
    descent: Descent = Descent(horizon=2.5, points=100, substeps=(8, 16, 32, 64))
    """Gradient descent in rescaled time t / log(1 / alpha); ten must divide the number of records."""

    def __post_init__(self):
        check_ranges(self)
        if not self.alphas[0] >= 0.1 or not max(self.alphas[1:]) <= SMALL:
            raise ValueError(f"alphas must be one of 0.1 or more, then some to {SMALL}, got {self.alphas}")
        if not len(self.kq) == len(self.vo) <= self.dim:
            raise ValueError(f"kq and vo must be 2 to {self.dim} numbers each, got {self.kq} and {self.vo}")
        if self.descent.points % COARSE:
            raise ValueError(f"points must be a multiple of {COARSE}, got {self.descent.points}")


_STANDARD = Config()
PRESETS: dict[Preset, Config] = {
    "quick": Config(
        samples=60,
        tokens=4,
        dim=4,
        kq=(1.2, 0.6),
        vo=(2.0, 1.0),
        alphas=(0.1, 1e-3),
        descent=replace(_STANDARD.descent, substeps=(4, 8, 16)),
    ),
    "standard": _STANDARD,
    "paper": replace(
        _STANDARD,
        samples=1000,
        tokens=10,
        dim=50,
        descent=replace(_STANDARD.descent, substeps=(16, 32)),
    ),
}


# The weights of the losses are log(1 / alpha) of each scale: time is rescaled time.
_FIELD = gradient_flow(total_squared_error)


@partial(jax.jit, static_argnames="config")
def _task(key: Array, config: Config) -> tuple[Array, Array, Array]:
    """Tokens X (N, n, d), the teacher's outputs, and the four weights (4, d, d) of a standard start."""
    key_tokens, key_teacher, key_start = jax.random.split(key, 3)
    X = normal(key_tokens, (config.samples, config.tokens, config.dim))
    rotations = jax.random.orthogonal(key_teacher, config.dim, (4,))[..., : len(config.kq)]
    roots = jnp.sqrt(jnp.array([config.kq, config.kq, config.vo, config.vo]))
    teacher = AttentionHead(*(rotations * roots[:, None]))
    return X, teacher(X), normal(key_start, (4, config.dim, config.dim))


@jax.jit
def _growth_rates(X: Array, Y: Array) -> Array:
    """Rates of W_V W_O^T at zero, (d,): singular values of its gradient, (1/N) sum_ia mean(X_i)^T Y_ia."""
    gradient = jnp.einsum("id,iae->de", jnp.mean(X, axis=1), Y) / len(X)
    return jnp.linalg.svd(gradient, compute_uv=False)


@eqx.filter_jit
def _flows(params: Any, data: Any, taus: Array) -> dict[str, Trajectory]:
    """Both products along the flow from every scale, and where the gradient is too large."""

    def flow(factor):
        # A gradient that is too large is time that runs too fast.
        options: dict[str, Any] = {"solver": diffrax.Tsit5(), "rtol": 1e-7, "atol": 1e-9, **SOLVE}
        path = integrate(_FIELD, params, factor * taus, data, **options)
        return Trajectory(taus, head_products(path.ys), path.ok)

    return named_lanes(flow, right=1.0, wrong=WRONG_FACTOR)


@jax.jit
def _singular_values(products: tuple[Array, Array]) -> dict[str, Array]:
    """Singular values (..., d) of the two products (..., d, d)."""
    return {
        name: jnp.linalg.svd(matrix, compute_uv=False)
        for name, matrix in zip(PRODUCTS, products, strict=True)
    }


def run(config: Config, context: Context) -> dict:
    """Integrate the flow from all scales, train from all of them at all rates, and take the spectra."""
    X, Y, start = _task(jax.random.key(context.seed), config)
    predict, standard = as_function(AttentionHead(*start))
    alphas, descent = jnp.asarray(config.alphas), config.descent
    params = jax.tree.map(lambda weight: alphas[:, None, None] * weight[None], standard)
    data = (-jnp.log(alphas), (predict, X, Y))

    context.progress("training from every scale at every rate", 0.0)
    _, trained = descent.train(bind(total_squared_error, data), params, observe=head_products)
    context.progress("integrating the flow", 0.7)
    flows = _flows(params, data, trained.ts[0])
    require_ok("the flow of the weights", *flows.values())
    context.progress("taking the spectra", 0.9)
    smallest = lane(trained, int(np.argmin(descent.rates)))
    return {
        "alpha": ("alpha", np.array(config.alphas)),
        "rescaled_time": ("rescaled_time", descent.times),
        "rate": ("rate", descent.rates),
        "gap": ("rate", {name: lane_gaps(path, trained) for name, path in flows.items()}),
        "trained": ("rescaled_time alpha index", _singular_values(smallest.ys)),
        "flow": ("rescaled_time alpha index", _singular_values(flows["right"].ys)),
        "growth_rate": ("index", _growth_rates(X, Y)),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """How many of the singular values (..., d) are above the threshold; NaN where one is."""
    return np.sum(np.heaviside(values - THRESHOLD, 0), axis=-1)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Ranks that grow step by step, which of the two comes first, where they end, and the network."""
    yield _stepwise(config, saved)
    yield _value_first(config, saved)
    yield _teacher(config, saved["trained"])
    yield stated(
        "network",
        "Gradient descent follows gradient flow in rescaled time, at first order in the learning rate",
        "boixadsera2023, section 5 (gradient flow in theory, gradient descent in experiments)",
        *first_order(saved["rate"], saved["gap"]),
    )


def _stepwise(config: Config, saved: Saved) -> Claim:
    large, small = config.alphas[0], config.alphas[-1]
    taus, VO, g = saved["rescaled_time"], saved["trained/VO"], saved["growth_rate"]
    ranks = [_ranks(values) for values in saved["trained"].values()]
    rising = [np.diff(rank[:: config.descent.points // COARSE, 1:], axis=0) >= 0 for rank in ranks]
    visited = [np.isin(np.arange(len(config.vo) + 1), rank[:, -1]) for rank in ranks]
    tenth, half = ([_passes(taus, one, share) for one in VO[:, :, 0].T] for share in (0.1, 0.5))
    width, stretch = np.subtract(half, tenth), np.log(small) / np.log(large)
    # How far the second value is when the first is at 50 %, at the largest and at the smallest scale.
    second = {end: np.interp(half[end], taus, VO[:, end, 1]) / VO[-1, end, 1] for end in (0, -1)}
    power = np.log(second[-1] / second[0]) / np.log(small / large)
    jump = f"alpha = {small:g}: first jump of W_V W_O^T from 10 to 50 %, over its time"
    widths = f"width of that jump at {large:g} over that at {small:g}, by log(1/alpha)"
    behind = "power of alpha by which the second value is behind when the first is at 50 %"
    return qualified(
        "rank-steps",
        "Full weights learn incrementally as well: the numerical ranks of both products grow step by step",
        "boixadsera2023, section 5 and Figure 2",
        condition=f"the start is small, alpha <= {SMALL:g}; at {large:g} the steps run into each other (the "
        "theorem is about diagonal weights, and leaves this case out)",
        inside=[
            # Between jumps nothing shrinks; a value may pass the threshold but once.
            every(f"alpha <= {SMALL:g}: ranks that do not fall between coarse times", rising),
            every(f"alpha = {small:g}: ranks from 0 to the teacher's that both take", visited),
            # Growth by exp(2 g t), with a jump at t = log(1/alpha) / g, goes from a tenth to a half within
            # log(5) / (2 log(1/alpha)) of that time: 0.35 at 0.1, less than 0.18 from 0.01 on.
            at_most(jump, width[-1] / half[-1], 0.25, why="log(5) / (2 log(1/alpha)), below 0.18"),
        ],
        outside=[
            at_least(
                f"alpha = {large:g}: the same", width[0] / half[0], 0.25, why="by the same formula, 0.35"
            ),
            # The larger start, itself up to a tenth of the end, may change the jump by a few tenths.
            equals(
                widths, width[0] / width[-1], stretch, 0.3 * stretch, why="a start that is not negligible"
            ),
            # Left of the second direction is alpha^2 exp(2 g_2 t), with t = log(1/alpha) / g_1.
            equals(
                behind,
                power,
                2 * (1 - g[1] / g[0]),
                1 / np.log(large / small),
                why="a factor of e over the range",
            ),
        ],
    )


def _passes(taus: np.ndarray, values: np.ndarray, share: float) -> float:
    """When values (T,) first pass a share of their end, interpolated; at once if they start there."""
    level = values / values[-1] - share
    i = max(int(np.argmax(level > 0)), 1)
    return float(np.interp(0.0, level[i - 1 : i + 1], taus[i - 1 : i + 1]))


def _value_first(config: Config, saved: Saved) -> Claim:
    taus, points = saved["rescaled_time"], config.descent.points
    small = {name: saved[f"trained/{name}"][:, 1:] for name in PRODUCTS}
    coarse = {name: _ranks(values)[:: points // COARSE] for name, values in small.items()}
    first = {name: np.argmax(values[..., 0] > THRESHOLD, axis=0) for name, values in small.items()}
    apart = np.min(taus[first["KQ"]] - taus[first["VO"]])
    grown = np.max(np.diagonal(small["KQ"][first["VO"], :, 0]) / small["KQ"][0, :, 0])
    later = "coarse times at which the rank of W_V W_O^T is not the smaller one"
    between = "rescaled time between the first values of the two, smallest over alpha"
    passing = "largest value of W_K W_Q^T over its start when the first of W_V W_O^T passes"
    return stated(
        "value-first",
        "W_V W_O^T comes first: where it is zero W_K W_Q^T has no gradient",
        "boixadsera2023, section 5 and Figure 2 (the reason is derived here)",
        every(later, coarse["VO"] >= coarse["KQ"]),
        at_least(between, apart, 2 * config.descent.horizon / points, why="two records tell them apart"),
        # W_V W_O^T passes within a record, at which it may be three times the threshold.
        at_most(passing, grown, 1.5, why="the integral of W_V W_O^T, which moves it, is 0.1"),
    )


def _teacher(config: Config, values: dict[str, np.ndarray]) -> Claim:
    targets = (np.pad(taught, (0, config.dim - len(taught))) for taught in (config.kq, config.vo))
    off = [np.abs(values[name][-1] - target) for name, target in zip(PRODUCTS, targets, strict=True)]
    distance = np.max(off, axis=(0, 2))
    label, why = f"alpha <= {SMALL:g}: largest distance of a singular value", "a tenth of the threshold"
    return qualified(
        "teacher",
        "Training ends at the teacher's spectrum, and at its rank",
        "boixadsera2023, section 5 and Figure 2",
        condition=f"the start is small, alpha <= {SMALL:g}; what a larger one leaves in other directions "
        "decays slowly (the theorem is about diagonal weights, and leaves this case out)",
        inside=[at_most(label, distance[1:].max(), 5e-3, why=why)],
        outside=[at_least(f"alpha = {config.alphas[0]:g}: the same", distance[0], 5e-3, why=why)],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Singular values of both products over rescaled time for the smallest and the largest scale; ranks."""
    drawn, ((value_small, key_small, ranks), (value_large, key_large, gap)) = plotting.new_figure(
        2, 3, width=4.2, height=3.2
    )
    _spectrum(value_small, config, saved, "VO", -1)
    _spectrum(key_small, config, saved, "KQ", -1)
    _spectrum(value_large, config, saved, "VO", 0)
    _spectrum(key_large, config, saved, "KQ", 0)
    key_small.set_ylim(top=1.5 * config.kq[0])
    key_small.legend(loc="upper left", ncols=2, fontsize=7)
    _over_time(ranks, saved)
    wrong = f"gradient {percent(WRONG_FACTOR)} too large"
    gaps = {"to the flow": saved["gap/right"], wrong: saved["gap/wrong"]}
    plotting.gap_panel(gap, saved["rate"], gaps, "learning rate / log(1/α)", "largest gap of an entry")
    gap.set_title("Training approaches the flow")
    return drawn


def _spectrum(ax: Axes, config: Config, saved: Saved, name: str, index: int) -> Axes:
    """Singular values of a product over rescaled time, from one of the scales."""
    taus, rank, targets = saved["rescaled_time"], len(config.vo), {"KQ": config.kq, "VO": config.vo}
    trained, flow = (saved[f"{kind}/{name}"][:, index] for kind in ("trained", "flow"))
    for k in range(rank):
        ax.plot(taus, trained[:, k], color=f"C{k}", label=f"value {k + 1}", **plotting.TRAINED)
    ax.plot(taus, trained[:, rank:], color="0.6", linewidth=1)
    ax.plot(taus, flow[:, :rank], **plotting.THEORY)
    ax.plot([], [], color="0.6", linewidth=1, label="the others")
    ax.plot([], [], label="gradient flow", **plotting.THEORY)
    for target in targets[name]:
        ax.axhline(target, **plotting.PRINTED)
    ax.plot([], [], label="teacher", **plotting.PRINTED)
    ax.set(xlabel="rescaled time t / log(1/α)", ylabel="singular value")
    ax.set_title(f"{NAMES[name]}, α = {config.alphas[index]:g}")
    return ax


def _over_time(ax: Axes, saved: Saved) -> Axes:
    """Numerical ranks of both products from every scale over rescaled time."""
    alphas, lines = saved["alpha"], {"VO": "-", "KQ": "--"}
    ranks = {name: _ranks(saved[f"trained/{name}"]) for name in lines}
    for index, alpha in enumerate(alphas):
        for name, line in lines.items():
            # Apart from each other, so that lines on one level can be told.
            shift = 0.06 * (index - (len(alphas) - 1) / 2) - 0.02 * (name == "KQ")
            ax.step(
                saved["rescaled_time"], ranks[name][:, index] + shift, line, where="post", color=f"C{index}"
            )
        ax.plot([], [], color=f"C{index}", label=f"α = {alpha:g}")
    for name, line in lines.items():
        ax.plot([], [], line, color="0.3", label=NAMES[name])
    ax.set_yticks(range(int(max(rank.max() for rank in ranks.values())) + 1))
    ax.set(xlabel="rescaled time t / log(1/α)", ylabel="number", title=f"Singular values > {THRESHOLD:g}")
    ax.legend(loc="lower right", fontsize=7.5)
    return ax
