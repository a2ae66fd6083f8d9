"""A head with full weights: the ranks of both products grow step by step, as in gradient flow.

The theory is one of diagonal weights. Here all four matrices are full, the targets are those of a teacher
head of low rank, and the singular values of W_K W_Q^T and W_V W_O^T are followed from Gaussian starts of
several scales, in rescaled time. The reference is gradient flow on the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from dynamics.flow import Trajectory, gradient_flow, integrate
from dynamics.spectra import stable_rank
from models.attention import AttentionHead, head_products
from models.functional import as_function
from models.losses import bind, mean_squared_error
from models.training import train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.compare import WRONG_FACTOR, first_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

PRODUCTS = ("KQ", "VO")
NAMES = {"KQ": "$W_K W_Q^T$", "VO": "$W_V W_O^T$"}
SMALL = 1e-2  # from here on down a scale counts as small
THRESHOLD = 0.05  # singular values above it count
COARSE = 10  # intervals of the coarse times


@dataclass(frozen=True)
class Config:
    """Task, scales of the start, and learning rates."""

    samples: int = 200
    """Samples N."""
    tokens: int = 6
    """Tokens n of a sample, standard Gaussian."""
    dim: int = 6
    """Dimension d; all weights are (d, d)."""
    kq: tuple[float, ...] = (1.2, 0.6, 0.3)
    """Singular values of the teacher's W_K W_Q^T other than zero, falling."""
    vo: tuple[float, ...] = (2.0, 1.0, 0.5)
    """Singular values of the teacher's W_V W_O^T, as many."""
    alphas: tuple[float, ...] = (0.1, 0.01, 1e-4)
    """Scales of the Gaussian start, falling: 0.1 or more first, 0.01 or less after it."""
    horizon: float = 2.5
    """Rescaled time t / log(1 / alpha) at which all runs end."""
    points: int = 100
    """Records along a run; a multiple of ten."""
    substeps: tuple[int, ...] = (8, 16, 32, 64)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        require_sweeps(self, "alphas", "substeps")
        if not 1 > self.alphas[0] >= 0.1 or not SMALL >= max(self.alphas[1:]) >= min(self.alphas) > 0:
            raise ValueError(f"alphas must be one of 0.1 or more, then some to {SMALL}, got {self.alphas}")
        if not 2 <= len(self.kq) == len(self.vo) <= self.dim:
            raise ValueError(f"kq and vo must be 2 to {self.dim} numbers each, got {self.kq} and {self.vo}")
        if self.points % COARSE:
            raise ValueError(f"points must be a multiple of {COARSE}, got {self.points}")


PRESETS: dict[Preset, Config] = {
    "quick": replace(
        Config(),
        samples=60,
        tokens=4,
        dim=4,
        kq=(1.2, 0.6),
        vo=(2.0, 1.0),
        alphas=(0.1, 1e-3),
        substeps=(4, 8, 16),
    ),
    "standard": Config(),
    "paper": replace(Config(), samples=1000, tokens=10, dim=50, substeps=(16, 32)),
}


def _rescaled_loss(params: Any, data: Any) -> Array:
    """Sum over the scales (A,) of log(1 / alpha) times the loss of its network: its time is rescaled time."""
    log_inv_alpha, data = data
    losses = jax.vmap(lambda params: mean_squared_error(params, data))(params)
    return jnp.sum(log_inv_alpha * losses)


_FIELD = gradient_flow(_rescaled_loss)


@partial(jax.jit, static_argnames="config")
def _task(key: Array, config: Config) -> tuple[Array, Array, Array]:
    """Tokens X (N, n, d), the teacher's outputs, and the four weights (4, d, d) of a standard start."""
    key_tokens, key_teacher, key_start = jax.random.split(key, 3)
    X = jax.random.normal(key_tokens, (config.samples, config.tokens, config.dim))
    rotations = jax.random.orthogonal(key_teacher, config.dim, (4,))[..., : len(config.kq)]
    roots = jnp.sqrt(jnp.array([config.kq, config.kq, config.vo, config.vo]))
    teacher = AttentionHead(*(rotations * roots[:, None]))
    return X, teacher(X), jax.random.normal(key_start, (4, config.dim, config.dim))


@jax.jit
def _growth_rates(X: Array, Y: Array) -> Array:
    """Rates of W_V W_O^T at zero, (d,): singular values of its gradient, (1/N) sum_ia mean(X_i)^T Y_ia."""
    gradient = jnp.einsum("id,iae->de", jnp.mean(X, axis=1), Y) / len(X)
    return jnp.linalg.svd(gradient, compute_uv=False)


@jax.jit
def _spectra(products: tuple[Array, Array]) -> dict[str, dict[str, Array]]:
    """Of products (..., d, d) in the order of `PRODUCTS`: singular values (..., d), stable rank (...)."""
    return {
        name: {"values": jnp.linalg.svd(matrix, compute_uv=False), "stable_rank": stable_rank(matrix)}
        for name, matrix in zip(PRODUCTS, products, strict=True)
    }


def run(config: Config, context: Context) -> Result:
    """Integrate the flow from all scales, train from all of them at all rates, and take the spectra."""
    X, Y, start = _task(jax.random.key(context.seed), config)
    predict, standard = as_function(AttentionHead(*start))
    alphas = jnp.asarray(config.alphas)
    params = jax.tree.map(lambda weight: alphas[:, None, None] * weight[None], standard)
    data = (-jnp.log(alphas), (predict, X, Y))

    context.progress("training from every scale at every rate", 0.0)
    rates, trained = train_at_rates(
        bind(_rescaled_loss, data),
        params,
        config.substeps,
        horizon=config.horizon,
        points=config.points,
        observe=head_products,
    )
    context.progress("integrating the flow", 0.7)
    taus = trained.ts[0]
    # A gradient that is 2 % too large is a time that runs 2 % too fast.
    marks = jnp.unique(jnp.concatenate([taus, WRONG_FACTOR * taus]))
    solution = integrate(_FIELD, params, marks, data, solver=diffrax.Tsit5(), rtol=1e-7, atol=1e-9)
    products = head_products(solution.ys)
    flow, wrong = (
        Trajectory(
            taus, tuple(matrix[jnp.searchsorted(marks, factor * taus)] for matrix in products), solution.ok
        )
        for factor in (1.0, WRONG_FACTOR)
    )
    gaps = {"flow": lane_gaps(flow, trained), "wrong": lane_gaps(wrong, trained)}

    context.progress("taking the spectra", 0.9)
    smallest = lane(trained, int(np.argmin(rates)))
    spectra = jax.tree.map(np.asarray, {"trained": _spectra(smallest.ys), "flow": _spectra(flow.ys)})
    values = {name: spectra["trained"][name]["values"] for name in PRODUCTS}
    ranks = {name: np.sum(values[name] > THRESHOLD, axis=-1) for name in PRODUCTS}
    claims = (
        _stepwise(config, np.asarray(taus), values, ranks, _growth_rates(X, Y)),
        _value_first(config, np.asarray(taus), values, ranks),
        _teacher(config, values),
        first_order(
            "incremental.full_weights/network",
            "Gradient descent follows gradient flow in rescaled time, at first order in the learning rate",
            "boixadsera2023, section 5 (gradient flow in theory, gradient descent in experiments)",
            rates,
            gaps["flow"],
            gaps["wrong"],
        ),
    )
    dims = {
        "taus": ("time",),
        "rates": ("rate",),
        **{f"gap/{name}": ("rate",) for name in gaps},
        **{f"rank/{name}": ("time", "alpha") for name in PRODUCTS},
        **{f"{kind}/{name}/values": ("time", "alpha", "index") for kind in spectra for name in PRODUCTS},
        **{f"{kind}/{name}/stable_rank": ("time", "alpha") for kind in spectra for name in PRODUCTS},
    }
    return Result({"taus": taus, "rates": rates, "gap": gaps, "rank": ranks, **spectra}, claims, dims)


def _stepwise(
    config: Config,
    taus: np.ndarray,
    values: dict[str, np.ndarray],
    ranks: dict[str, np.ndarray],
    rates: Array,
) -> Claim:
    every = config.points // COARSE
    large, small = config.alphas[0], config.alphas[-1]
    rising = [np.diff(ranks[name][::every, 1:], axis=0) >= 0 for name in PRODUCTS]
    visited = [np.isin(np.arange(len(config.vo) + 1), ranks[name][:, -1]) for name in PRODUCTS]
    VO = values["VO"]
    tenth, half = (
        np.array([_passes(taus, VO[:, lane, 0], share) for lane in range(len(config.alphas))])
        for share in (0.1, 0.5)
    )
    width = half - tenth
    stretch = np.log(small) / np.log(large)
    behind = [
        np.interp(half[lane], taus, VO[:, lane, 1]) / VO[-1, lane, 1] for lane in range(len(config.alphas))
    ]
    power = np.log(behind[-1] / behind[0]) / np.log(small / large)
    return Claim(
        "incremental.full_weights/rank-steps",
        "Full weights learn incrementally as well: the numerical ranks of both products grow step by step",
        "boixadsera2023, section 5 and Figure 2",
        "qualified",
        [
            # Between jumps nothing shrinks; a value may pass the threshold but once.
            all_of(f"alpha <= {SMALL:g}: ranks that do not fall between coarse times", rising),
            all_of(f"alpha = {small:g}: ranks from 0 to the teacher's that both take", visited),
            # Growth by exp(2 g t), with a jump at t = log(1/alpha) / g, goes from a tenth to a half within
            # log(5) / (2 log(1/alpha)) of that time: 0.35 at 0.1, less than 0.18 from 0.01 on.
            Check(
                f"alpha = {small:g}: first jump of W_V W_O^T from 10 to 50 %, over its time",
                "at most",
                0.25,
                width[-1] / half[-1],
            ),
            Check(f"alpha = {large:g}: the same", "at least", 0.25, width[0] / half[0]),
            # The larger start, itself up to a tenth of the end, is not negligible: it may change the jump by
            # a few tenths.
            Check(
                f"width of that jump at {large:g} over that at {small:g}, by log(1/alpha)",
                "equals",
                stretch,
                width[0] / width[-1],
                0.3 * stretch,
            ),
            # Left of the second direction is alpha^2 exp(2 g_2 t), with t = log(1/alpha) / g_1. A factor of
            # e over the range is allowed for.
            Check(
                "power of alpha by which the second value is behind when the first is at 50 %",
                "equals",
                2 * float(1 - rates[1] / rates[0]),
                power,
                1 / np.log(large / small),
            ),
        ],
        condition=f"the start is small, alpha <= {SMALL:g}; at {large:g} the steps run into each other (the "
        "theorem is about diagonal weights, and leaves this case out)",
    )


def _passes(taus: np.ndarray, values: np.ndarray, share: float) -> float:
    """When values (T,) first pass a share of their end, interpolated; at once if they start there."""
    level = values / values[-1] - share
    i = max(int(np.argmax(level > 0)), 1)
    return float(np.interp(0.0, level[i - 1 : i + 1], taus[i - 1 : i + 1]))


def _value_first(
    config: Config, taus: np.ndarray, values: dict[str, np.ndarray], ranks: dict[str, np.ndarray]
) -> Claim:
    every, small = config.points // COARSE, slice(1, None)
    first = {name: np.argmax(values[name][:, small, 0] > THRESHOLD, axis=0) for name in PRODUCTS}
    lanes = np.arange(len(config.alphas) - 1)
    KQ = values["KQ"][:, small, 0]
    return Claim(
        "incremental.full_weights/value-first",
        "W_V W_O^T comes first: where it is zero W_K W_Q^T has no gradient",
        "boixadsera2023, section 5 and Figure 2 (the reason is derived here)",
        "stated",
        [
            all_of(
                "coarse times at which the rank of W_V W_O^T is not the smaller one",
                ranks["VO"][::every, small] >= ranks["KQ"][::every, small],
            ),
            # A record is a tenth of a coarse interval: two of them tell the two apart.
            Check(
                "rescaled time between the first values of the two, smallest over alpha",
                "at least",
                2 * config.horizon / config.points,
                np.min(taus[first["KQ"]] - taus[first["VO"]]),
            ),
            # W_V W_O^T passes 0.05 within a record, at which it may be three times that; its time integral,
            # which is what moves W_K W_Q^T, is then a tenth.
            Check(
                "largest value of W_K W_Q^T over its start when the first of W_V W_O^T passes",
                "at most",
                1.5,
                np.max(KQ[first["VO"], lanes] / KQ[0]),
            ),
        ],
    )


def _teacher(config: Config, values: dict[str, np.ndarray]) -> Claim:
    distances = []
    for name, taught in zip(PRODUCTS, (config.kq, config.vo), strict=True):
        target = np.pad(taught, (0, config.dim - len(taught)))
        distances.append(np.max(np.abs(values[name][-1] - target), axis=-1))
    distance = np.maximum(*distances)
    return Claim(
        "incremental.full_weights/teacher",
        "Training ends at the teacher's spectrum, and at its rank",
        "boixadsera2023, section 5 and Figure 2",
        "qualified",
        [
            # A tenth of the threshold, and one to two percent of the teacher's smallest value.
            Check(
                f"alpha <= {SMALL:g}: largest distance of a singular value",
                "at most",
                5e-3,
                distance[1:].max(),
            ),
            Check(f"alpha = {config.alphas[0]:g}: the same", "at least", 5e-3, distance[0]),
        ],
        condition=f"the start is small, alpha <= {SMALL:g}; what a larger one leaves in other directions "
        "decays slowly (the theorem is about diagonal weights, and leaves this case out)",
    )


def figure(saved: Saved) -> Figure:
    """Singular values of both products over rescaled time for the smallest and the largest scale; ranks."""
    drawn, ((value_small, key_small, ranks), (value_large, key_large, gap)) = plotting.new_figure(
        2, 3, width=4.2, height=3.2
    )
    config, taus = saved.config, saved["taus"]
    alphas = config["alphas"]
    rank = len(config["vo"])
    for row, index in (((value_small, key_small), len(alphas) - 1), ((value_large, key_large), 0)):
        for ax, name in zip(row, ("VO", "KQ"), strict=True):
            trained, flow = (saved[f"{kind}/{name}/values"][:, index] for kind in ("trained", "flow"))
            for k in range(rank):
                ax.plot(taus, trained[:, k], color=f"C{k}", label=f"value {k + 1}", **plotting.TRAINED)
            ax.plot(taus, trained[:, rank:], color="0.6", linewidth=1)
            ax.plot(taus, flow[:, :rank], **plotting.THEORY)
            ax.plot([], [], color="0.6", linewidth=1, label="the others")
            ax.plot([], [], label="gradient flow", **plotting.THEORY)
            for target in config[name.lower()]:
                ax.axhline(target, **plotting.PRINTED)
            ax.plot([], [], label="teacher", **plotting.PRINTED)
            ax.set(xlabel="rescaled time t / log(1/α)", ylabel="singular value")
            ax.set_title(f"{NAMES[name]}, α = {alphas[index]:g}")
    key_small.set_ylim(top=1.5 * config["kq"][0])
    key_small.legend(loc="upper left", ncols=2, fontsize=7)

    for index, alpha in enumerate(alphas):
        for name, line in (("VO", "-"), ("KQ", "--")):
            # Apart from each other, so that lines on one level can be told.
            shift = 0.06 * (index - (len(alphas) - 1) / 2) - 0.02 * (name == "KQ")
            ranks.step(taus, saved[f"rank/{name}"][:, index] + shift, line, where="post", color=f"C{index}")
        ranks.plot([], [], color=f"C{index}", label=f"α = {alpha:g}")
    for name, line in (("VO", "-"), ("KQ", "--")):
        ranks.plot([], [], line, color="0.3", label=NAMES[name])
    top = max(saved[f"rank/{name}"].max() for name in PRODUCTS)
    ranks.set_yticks(range(top + 1))
    ranks.set(xlabel="rescaled time t / log(1/α)", ylabel="number")
    ranks.set_title(f"Singular values > {THRESHOLD:g}")
    ranks.legend(loc="lower right", fontsize=7.5)

    largest = {"to the flow": saved["gap/flow"], "gradient 2 % too large": saved["gap/wrong"]}
    plotting.gap_panel(gap, saved["rates"], largest, "learning rate / log(1/α)", "largest gap of an entry")
    gap.set_title("Training approaches the flow")
    return drawn
