"""Linear activation and exp attention: who wins and when, the erf law, and a network on the closed form.

One hidden node from zero start, a fixed upstream gradient, contexts from two topics that share their common
tokens. Attention is folded into the modified-MLP flow, whose closed form the trained network must reach at
first order in the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import erfinv
from scipy.stats import spearmanr

from dynamics import joma
from dynamics.flow import Trajectory
from models.attention import JomaBlock, JomaInputs, joma_observer
from models.functional import as_function
from models.losses import bind, upstream_product
from models.training import Descent
from sims import compare, plotting
from sims.claims import Claim, Preset, at_least, at_most, corrected, equals, every, slope, stated
from sims.compare import SOLVE, WRONG_FACTOR, lane, lane_gaps, largest, named_lanes, percent, require_ok
from sims.ranges import Count, Length, Range, check_ranges
from sims.results import Context, Saved

COMMON = 8
HORIZON, BEFORE = 0.9, 0.9999  # of the blow-up time: where training ends, and the flow
# Two that tie for the winner, three behind them, one without saliency and a negative one.
CONTEST = (1.0, 1.0, 0.9, 0.5, 0.1, 0.0, -0.3)
RESCALED_END = 6.0  # of the winner: erfc(6 / sqrt(2)) = 2e-9 of the blow-up time is left
TIGHT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-14, **SOLVE}
OFF = f"{percent(WRONG_FACTOR)} off"
GROWN = "the solver's error, grown 2000-fold by the blow-up"


@dataclass(frozen=True)
class Config:
    """Contexts and learning rates."""

    samples: Annotated[int, Range(at_least=2)] = 100
    """Contexts S, half of them of either topic."""
    length: Count = 128
    """Tokens per context, whose one-hot vectors are averaged."""
    distinct: Count = 6
    """Distinct tokens per topic, beside eight common ones."""
    points: Count = 20
    """Records along a run, which ends at 0.9 of the blow-up time."""
    substeps: Annotated[tuple[Count, ...], Length(2)] = (1, 3, 10, 30, 100, 300, 1000)
    """Steps between two records, one per learning rate."""
    small: Count = 10
    """Rates with at least so many steps between two records are small: the order is fitted there."""

    def __post_init__(self):
        check_ranges(self)
        if sum(count >= self.small for count in self.substeps) < 2:
            raise ValueError(f"small must leave at least two of the substeps, got {self.small}")


_STANDARD = replace(
    Config(), samples=400, length=32, substeps=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(_STANDARD, samples=4000, substeps=(*_STANDARD.substeps, 5000, 10000)),
}


def _sample(key: Array, config: Config) -> tuple[Array, Array]:
    """Contexts x (S, M) as token frequencies, and upstream gradients (S,) whose sign is the topic's."""
    key_tokens, key_gradient = jax.random.split(key)
    topic = jnp.arange(config.samples) % 2
    frequent = jnp.linspace(1.0, 0.2, config.distinct)
    distinct = jnp.kron(jnp.eye(2), 0.6 * frequent / jnp.sum(frequent))
    P = jnp.concatenate([jnp.full((2, COMMON), 0.4 / COMMON), distinct], axis=1)
    shape = (config.samples, config.length)
    tokens = jax.random.categorical(key_tokens, jnp.log(P)[topic][:, None], shape=shape)
    x = jnp.mean(jax.nn.one_hot(tokens, P.shape[1], dtype=P.dtype), axis=1)
    strength = jax.random.uniform(key_gradient, (config.samples,), minval=0.5, maxval=1.5)
    return x, (1 - 2 * topic) * strength


@partial(jax.jit, static_argnames="config")
def _draw(key: Array, config: Config):
    """Saliency and its blow-up time; data, parameters and coordinates of the network."""
    key_data, key_block = jax.random.split(key)
    x, gradient = _sample(key_data, config)
    delta = joma.saliency(gradient, x)
    inputs = JomaInputs(x, jnp.zeros(config.samples, int))
    block = JomaBlock.standard(key_block, x.shape[1], 1, kind="exp", scale=0.0, activation=jax.nn.identity)
    predict, params = as_function(block)
    return delta, joma.blow_up_time(delta), (predict, inputs, gradient[:, None]), params, joma_observer(block)


@jax.jit
def _theory(delta: Array, ts: Array, progress: Array) -> tuple[dict, list[Trajectory]]:
    """Closed forms, and the flows beside them: to shares of the blow-up time, and of the contest past it."""
    contest = jnp.array(CONTEST)
    blow_up, start = joma.blow_up_time(contest), jnp.zeros_like(contest)

    def flow(delta):
        ts = progress * joma.blow_up_time(delta)
        return joma.modified_mlp_flow(jnp.zeros_like(delta), delta, ts, **TIGHT)

    def spread(scaled):
        """Relative spread over the tokens of erf / Delta, at every time."""
        ratio = erf(scaled) / delta[None]
        return jnp.ptp(ratio, axis=1) / jnp.mean(ratio, axis=1)

    # Padded with tokens that have no saliency, the contest shares a solve with the network.
    padded = jnp.pad(contest, (0, delta.size - contest.size))
    paths = named_lanes(flow, network=delta, contest=padded)
    past = joma.rescaled_mlp_flow(start, contest, jnp.array([0.0, RESCALED_END]), **TIGHT)
    V = paths["network"].ys[1:]
    closed, limits = joma.modified_mlp_solution(jnp.array([BEFORE, 2.0]) * blow_up, contest)
    found = {
        "right": joma.modified_mlp_solution(ts, delta),
        "wrong": joma.modified_mlp_solution(ts, WRONG_FACTOR * delta),
        "spread": {"printed": spread(V / 2), "corrected": spread(V / jnp.sqrt(2.0))},
        "before": {"flow": paths["contest"].ys[-1, : contest.size], "closed": closed},
        "limit": limits,
        "end": past.ys.V[-1],
        "end_time": past.ys.t[-1] / blow_up,
    }
    return found, [*paths.values(), past]


def run(config: Config, context: Context) -> dict:
    """Train at every learning rate, and set the closed form and the flow beside it."""
    delta, blow_up, data, params, observe = _draw(jax.random.key(context.seed), config)
    context.progress("training at every learning rate", 0.0)
    descent = Descent(HORIZON * float(blow_up), config.points, config.substeps)
    trained = jax.device_get(descent.train(bind(upstream_product, data), params, observe=observe)[1])
    V = Trajectory(trained.ts, trained.ys.V[..., 0], trained.ok)

    context.progress("integrating the flow", 0.6)
    ts, near = descent.times, 1 - np.geomspace(1 - HORIZON, 1 - BEFORE, 7)[1:]
    progress = np.append(np.linspace(0.0, HORIZON, config.points + 1), near)
    theory, paths = jax.device_get(_theory(delta, ts, progress))
    require_ok("a flow of hidden weights", *paths)
    gaps = {name: lane_gaps(Trajectory(ts, theory[name], True), V) for name in ("right", "wrong")}
    gaps["z"] = np.max(np.abs(trained.ys.z[:, :, 0] - V.ys**2 / 2), axis=(1, 2))
    return {
        "rate": ("rate", descent.rates),
        "gap": ("rate", gaps),
        "time": ("time", ts),
        "blow_up": blow_up,
        "delta": ("token", delta),
        "trained": ("time token", lane(V, int(np.argmin(descent.rates))).ys),
        "closed": ("time token", theory["right"]),
        "printed": ("time token", 2 * erfinv(ts[:, None] * np.asarray(delta) / np.sqrt(np.pi))),
        "progress": ("progress", progress[1:]),
        "spread": ("progress", theory["spread"]),
        "contestant": ("contestant", np.array(CONTEST)),
        **{name: ("contestant", theory[name]) for name in ("before", "limit", "end")},
        "end_time": theory["end_time"],
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The erf law, the winner, the network on the closed form, and what saliency says of its tokens."""
    printed = saved["spread/printed"][config.points - 1]  # the first time, zero, is left out
    mended = saved["spread/corrected"].max()
    yield corrected(
        "erf",
        "At any time erf(v_l / 2) / Delta_l is the same for all l; corrected: erf(v_l / sqrt 2) / Delta_l",
        "tian2024joma, Theorem 2",
        printed=[at_most("printed: spread of erf(v/2)/Delta at 0.9 t*", printed, 1e-6, why=GROWN)],
        mended=[
            at_most("spread of erf(v/sqrt 2)/Delta to 0.9999 t*", mended, 1e-6, why=GROWN),
            at_least("the printed form's once more", printed, 1e-2, why="far above any error of a solver"),
        ],
    )
    yield _winner(saved)
    yield _network(config, saved)
    yield _saliency(saved)


def _winner(saved: Saved) -> Claim:
    delta, limits, end, before = (saved[name] for name in ("contestant", "limit", "end", "before/flow"))
    wins = np.abs(delta) == largest(delta)
    gap = largest(before - saved["before/closed"])
    left, left_at_end = (largest((v - limits)[~wins]) for v in (before, end))
    still = "they move by sqrt(pi/2) share exp(limit^2/2) of the time left"
    return stated(
        "winner",
        "The token with the largest |Delta| goes to infinity, in finite time sqrt(pi/2) / max |Delta|; the "
        "others stop at sqrt 2 erfinv(Delta_l / max |Delta|)",
        "tian2024joma, Theorem 2 (time and limits derived here)",
        at_most("flow to closed form at 0.9999 t*", gap, 1e-6, why=GROWN),
        at_most("others: distance to their limits at 0.9999 t*", left, 5e-4, why=f"{still}: 4.4e-4"),
        at_most("the same when |v| of the winner is 6", left_at_end, 1e-7, why=f"{still}: 2e-9 of it"),
        every("closed form past t*: winners at infinity", np.isinf(limits[wins])),
        equals("time then, over t*", saved["end_time"], 1, 1e-8, why="2e-9 is left, and the solver's error"),
        at_most("a tie: difference of the two winners", np.ptp(end[wins]), 0, why="equal numbers stay equal"),
        at_most("Delta = 0: |v| at the end", largest(end[delta == 0]), 0, why="zero stays zero"),
    )


def _network(config: Config, saved: Saved) -> Claim:
    rates, gaps = saved["rate"], saved["gap"]
    small = np.asarray(config.substeps) >= config.small
    order = compare.orders(rates[small], {name: gap[small] for name, gap in gaps.items()})
    decades, of_all = (np.log10(some.max() / rates.min()) for some in (rates[small], rates))
    over_all = compare.convergence_order(rates, gaps["right"]).slope
    label = f"order of the gap of v in the learning rate, {decades:.1f} decades of small rates"
    bent = "the second order bends it by a few percent"
    more = "rates of 20 steps in all bend it more"
    return stated(
        "network",
        "Gradient descent on hidden weights and attention follows the modified MLP, with logits z = v^2 / 2",
        "tian2024joma, Theorems 1 and 2 (the closed form corrected)",
        slope(label, order["right"], 1, 0.05, why=f"{bent} where 200 steps lead to 0.9 t*"),
        slope(f"the same over all {of_all:.1f} decades", over_all, 1, 0.1, why=more),
        slope("order of the gap of z to v^2 / 2", order["z"], 1, 0.05, why=bent),
        at_most(f"order with Delta {OFF}", order["wrong"], 0.6, why="a gap that does not close has order 0"),
    )


def _saliency(saved: Saved) -> Claim:
    delta, size = np.abs(saved["delta"]), np.abs(saved["trained"])
    relative, early, end = (v / v.max() for v in (delta, size[1], size[-1]))
    common, common_at_end = relative[:COMMON].max(), end[:COMMON].max()
    rank: Any = spearmanr(delta, size[-1])
    off, next_term = largest(early - relative), np.pi / 12 * (HORIZON / (len(size) - 1)) ** 2
    series = "the next term of erfinv, pi / 12 (t / t*)^2"
    monotone = "one increasing function takes |Delta| to |v|"
    return stated(
        "saliency",
        "Delta is near zero for common tokens, whose weights stay small; the larger |Delta|, the larger |v|",
        "tian2024joma, section 4",
        at_most("common tokens: |Delta| over the largest", common, 0.1, why="chance in 12800 tokens"),
        at_most("first record: |v| beside |Delta|, both over their maxima", off, next_term, why=series),
        at_most("end: |v| of common tokens over the winner's", common_at_end, common, why="they fall behind"),
        at_least("end: rank correlation of |v| with |Delta|", rank.statistic, 1, 1e-12, why=monotone),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Weights over time, saliency beside weights by token, gaps over the learning rate, and the erf law."""
    drawn, ((weights, tokens), (gap, law)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    _draw_weights(weights, saved)
    _draw_tokens(tokens, saved)

    # From the smallest rate up: the line goes through the first point.
    rising = np.argsort(saved["rate"])
    labels = {"right": "v to the closed form", "z": "z to v²/2", "wrong": f"Δ {OFF}"}
    gaps = {label: saved[f"gap/{name}"][rising] for name, label in labels.items()}
    title = "Gap of the network to theory"
    plotting.gap_panel(gap, saved["rate"][rising], gaps, "learning rate", "largest gap", title)

    left = 1 - saved["progress"]
    law.loglog(left, saved["spread/printed"], "s-", color="0.45", label="printed: erf(v/2) / Δ", ms=3.5)
    law.loglog(left, saved["spread/corrected"], "o-", color="C0", label="corrected: erf(v/√2) / Δ", ms=3.5)
    law.invert_xaxis()
    labels = ("1 − t / t*, t* the blow-up time", "relative spread over tokens", "center left")
    plotting.finish(law, "Which ratio all tokens share", *labels)
    return drawn


def _draw_weights(ax: Axes, saved: Saved) -> None:
    delta, ts, blow_up = saved["delta"], saved["time"], float(saved["blow_up"])
    order = np.argsort(-np.abs(delta))
    shown = [order[0], order[1], order[3], order[order < COMMON][0]]
    names = [f"{'common' if token < COMMON else 'distinct'}, Δ = {delta[token]:+.4f}" for token in shown]
    closed, trained = saved["closed"][:, shown], saved["trained"][:, shown]
    plotting.theory_and_trained(ax, ts, closed, trained, names, "closed form")
    lines = ax.plot(ts, saved["printed"][:, shown], **plotting.PRINTED)
    lines[0].set_label("printed: erf(v/2)")
    ax.axvline(blow_up, color="0.6", linewidth=0.8)
    ax.text(blow_up, 0.5, "blow-up", transform=ax.get_xaxis_transform(), ha="right", rotation=90)
    title = f"Trained (learning rate {saved['rate'].min():.1g}) and theory"
    legend = {"loc": "upper left", "fontsize": 7}
    plotting.finish(ax, title, "time = learning rate × step", "hidden weight v", legend)


def _draw_tokens(ax: Axes, saved: Saved) -> None:
    delta, v = saved["delta"], saved["trained"]
    position = np.arange(len(delta))
    heights = {"Δ": (delta, "0.6"), "v, first record": (v[1], "C0"), f"v at {HORIZON} t*": (v[-1], "C1")}
    for shift, (label, (bars, color)) in enumerate(heights.items()):
        ax.bar(position + 0.28 * (shift - 1), bars / np.abs(bars).max(), 0.28, color=color, label=label)
    ax.axvline(COMMON - 0.5, color="black", linestyle="--", linewidth=0.8)
    ax.set_xticks([(COMMON - 1) / 2, (COMMON + len(delta) - 1) / 2], ["common tokens", "distinct tokens"])
    ax.tick_params(axis="x", length=0)
    labels = ("Saliency and weights by token", "token", "relative to the largest", "lower left")
    plotting.finish(ax, *labels, ylim=(-1.25, 1.25))
