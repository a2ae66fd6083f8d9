"""Several heads and layers: heads of a layer tie, enter together and share by their starts; stacks of layers.

At zero all heads of a layer have one gradient, on the products of value and output weights (VO) alone. They
become active at the same time, and gradient flow splits the learned product between them in proportions
that the starts set, for any alpha. The ties last until a head's key and query product (KQ) enters: heads with
unequal shares wait unequally long for that, after which they are different functions. As they differ by
little, they then exchange their shares slowly: at alpha = 1e-16 the flow may not have come to the next
stationary point of the greedy path when another product enters, and goes elsewhere.

How long the exchange takes depends on the instance, and so does when products enter: this is a recorded one.
In others the flow keeps up with the path, or has not told close jumps apart at the same alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

from dynamics import incremental
from dynamics.flow import Trajectory
from dynamics.incremental import GreedyPath
from models.attention import AttentionStack, Feedforward, diagonal_stack, observe_products, split_products
from models.data.teachers import HeadTask, diagonal_teacher
from models.draws import normal, uniform
from models.functional import as_function
from models.losses import bind, mean_squared_error
from models.training import Descent, map_lanes
from sims import plotting
from sims.claims import (
    ROUNDING,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    equals,
    every,
    qualified,
    stated,
)
from sims.compare import SOLVE, WRONG_FACTOR, first_order, lane_gaps, largest, named_groups, require_ok
from sims.ranges import Count, Length, NonNegative, Positive, Range, check_ranges
from sims.results import Context, Saved

HEADS = 2
HIDDEN = 4  # width of the feed-forward part
NETWORK_DECADES = 2.0  # the network starts at alpha = 1e-2
KQ, VO = 0, 1  # the two kinds of products
LOG10 = float(np.log(10))
EXACT = "counts are exact"
HALVES = "1 / log(1/alpha), which a squaring halves"


@dataclass(frozen=True)
class Config:
    """Sizes, starts and learning rates."""

    instance: Annotated[int, Range(at_least=0)] = 0
    """Seed of teachers, tokens, starts and feed-forward weights; the seed of the run draws nothing else."""
    layers: Count = 1
    """Layers of the stack with a feed-forward part; the other problem has one layer without it."""
    dim: Count = 3
    """Dimension d of the tokens."""
    tokens: Count = 5
    """Tokens per sample."""
    samples: Count = 24
    """Samples N."""
    kq_scale: Positive = 1.0
    """Standard deviation of the teachers' KQ products."""
    feedforward_scale: NonNegative = 0.5
    """Standard deviation of the frozen feed-forward weights; small ones leave layers nearly tied."""
    second: Positive = 0.7
    """Size of the second head's starts over the first one's."""
    stages: Annotated[int, Range(at_least=2)] = 3
    """Stages of the greedy path that are followed."""
    shares: Annotated[tuple[Positive, ...], Length(2)] = (2.0, 3.0, 4.0, 8.0, 16.0)
    """log10(1 / alpha) of the flows of one layer; as many as `decades` and two more compile nothing anew."""
    decades: Annotated[tuple[Positive, ...], Length(2)] = (8.0, 16.0, 32.0)
    """log10(1 / alpha) of the flows of the stack, each twice the one before."""
    far: tuple[Positive, ...] = ()
    """More of one layer, with an implicit solver: where the shares have the time for their exchange."""
    points: Annotated[int, Range(at_least=2)] = 2001
    """Rescaled times of a flow."""
    records: Count = 40
    """Records of the network along its run."""
    substeps: Annotated[tuple[Count, ...], Length(2)] = (4, 12, 40, 120)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        check_ranges(self)
        if not np.allclose(np.diff(np.log2(self.decades)), 1):
            raise ValueError(f"decades must double from one to the next, got {self.decades}")
        if not np.isclose(self.shares[-1], 2 * self.shares[-2]):
            raise ValueError(f"shares must end with a number and its double, got {self.shares}")
        if (self.points - 1) % self.records:
            raise ValueError(f"records must divide points - 1 = {self.points - 1}, got {self.records}")

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Shape of all products: layers, heads, kinds and coordinates."""
        return self.layers, HEADS, 2, self.dim


_STANDARD = Config(
    layers=2,
    feedforward_scale=0.75,
    samples=60,
    stages=4,
    points=8001,
    far=(100.0, 1000.0),
    substeps=(4, 12, 40, 120, 400),
)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(_STANDARD, dim=6, samples=400, tokens=10, kq_scale=0.5, stages=8),
}


def _loss(beta: Array, trained: Array, X: Array, Y: Array, feedforward: Feedforward) -> Array:
    """The loss of a stack as a function of its products; those that are not `trained` stay zero."""
    layers, dim = feedforward.up.shape[:2]
    kq, vo = split_products(trained * beta, dim, layers, HEADS)
    return mean_squared_error((kq, vo), (_outputs, (X, feedforward), Y))


def _outputs(products: Any, inputs: Any) -> Array:
    return diagonal_stack(*products, *inputs)


@partial(jax.jit, static_argnames="config")
def _draw(config: Config):
    """Task of one layer, feed-forward weights, target of the stack, and the starts u0 and v0."""
    dim, scale = config.dim, config.feedforward_scale
    keys = jax.random.split(jax.random.key(config.instance), 5)
    task = diagonal_teacher(keys[0], config.samples, config.tokens, dim, kq_scale=config.kq_scale)
    feedforward = Feedforward(*(scale * normal(keys[1], (2, config.layers, dim, HIDDEN))))
    kq, vo = normal(keys[4], (2, config.layers, HEADS, dim))
    target = diagonal_stack(config.kq_scale * kq, vo, task.X, feedforward)
    heads = jnp.array([1.0, config.second])[None, :, None, None]
    u0 = uniform(keys[2], config.grid, minval=0.8, maxval=1.2)
    v0 = uniform(keys[3], config.grid, minval=-0.3, maxval=0.3)
    return task, feedforward, target, (heads * u0).ravel(), (heads * v0).ravel()


@eqx.filter_jit
def _solve(g: Any, u0: Any, v0: Any, starts: Any, solver: Any) -> Trajectory:
    """The products (L, T, p) along flows, one after the other: that compiles quickly."""

    def one(start):
        path = incremental.log_flow(g, u0, v0, LOG10 * start[0], start[1], solver=solver, **SOLVE)
        return Trajectory(path.ts, path.ys.beta, path.ok)

    return map_lanes(one, starts, at_once=1)


def _flows(g: Any, u0: Any, v0: Any, starts: Mapping[str, Any], solver: Any) -> dict[str, Any]:
    """The products (T, p) along the flows from several starts: log10(1 / alpha) and rescaled times (T,)."""
    groups = {name: [start] for name, start in starts.items()}
    paths = named_groups(lambda lanes: _solve(g, u0, v0, lanes, solver), groups)
    require_ok("a flow of products", *paths.values())
    return {name: path.ys[0] for name, path in paths.items()}


@jax.jit
def _distances(path: GreedyPath, ends: Array, taus: Array, beta: Array) -> Array:
    """Distances to the staircase up to each of the ends, (E, A), of every flow (A, T, p)."""

    def one(end, beta):
        # Times beyond the end are taken for the last one before it, and add nothing.
        last = jnp.max(jnp.where(taus <= end, taus, 0))
        return incremental.staircase_distance(path, jnp.minimum(taus, last), beta)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(ends, beta)


def _ends(path: GreedyPath) -> Any:
    """A time inside of every stage but the last: midway to the next jump, if that is not far off."""
    return (path.times[:-1] + np.minimum(path.times[1:], 1.5 * path.times[:-1])) / 2


def _entered(beta: np.ndarray) -> np.ndarray:
    """Whether a product enters, (stages, layers, heads, kinds, d)."""
    return (beta[1:] != 0) & (beta[:-1] == 0)


def _gaps(config: Config, horizon: float, data: Any, u0: Any, v0: Any, flows: Mapping[str, Any]) -> dict:
    """Learning rates, and the gaps of gradient descent on the stack's weights to its flows."""
    lam, (X, target, feedforward) = LOG10 * NETWORK_DECADES, data
    u, v = (np.exp(-lam) * x.reshape(config.grid) for x in (u0, v0))
    weights = (x[:, :, kind] for kind in (KQ, VO) for x in (u, v))  # key, query, value, output
    predict, params = as_function(AttentionStack(*map(jnp.asarray, weights), feedforward=feedforward))
    descent = Descent(horizon * lam, config.records, config.substeps)
    loss = bind(mean_squared_error, (predict, X, target))
    _, trained = descent.train(loss, params, observe=observe_products)
    step = (config.points - 1) // config.records
    gaps = {
        name: lane_gaps(Trajectory(trained.ts[0], beta[::step], np.True_), trained)
        for name, beta in flows.items()
    }
    return {"rate": ("rate", descent.rates), "gap": ("rate", gaps)}


def _sharing(g: Any, steps: np.ndarray, start: tuple[Array, Array], flows: np.ndarray) -> dict:
    """How the products that enter together at the first jump share; steps and flows are (..., *grid)."""
    layer, _, kind, coordinate = np.argwhere(_entered(steps)[0])[0]
    pair = (Ellipsis, layer, slice(None), kind, coordinate)
    # All in one head: what the sum is stays.
    moved = steps[1].copy()
    moved[pair] = [steps[1][pair].sum(), 0.0]
    points = np.stack([steps[0], steps[1], moved])
    gradients = jax.jit(jax.vmap(g))(points.reshape(3, -1))
    zero, after, moved = np.asarray(gradients).reshape(points.shape)
    waits = incremental.time_until_active(np.ones(zero.size), zero.ravel())
    w0, z0 = (np.asarray(x).reshape(zero.shape)[pair] for x in incremental.canonical_start(*start))
    by_start = w0 if zero[pair][0] > 0 else z0
    return {
        "share/start": (by_start[1] / by_start[0]) ** 2,
        "share/predicted": steps[1][pair][1] / steps[1][pair][0],
        "share/measured": ("share_power", flows[pair][:, 1] / flows[pair][:, 0]),
        "wait_at_zero": ("layer head kind coordinate", np.reshape(waits, zero.shape)),
        "kq_gradient": ("head coordinate", after[0, :, KQ]),
        "pull_in_one_head": largest(moved[pair]) / largest(zero),
    }


def _drawn(config: Config, flows: dict[str, Any], stairs: dict[str, Any], first: Any) -> dict:
    """The first products to enter, of one layer from three alphas, and all that enter in the stack."""
    powers = [*config.shares, *config.far]
    shown = [0, len(config.shares) - 1 if config.far else len(config.shares) // 2, len(powers) - 1]
    entrants = np.any(stairs["deep"] != 0, axis=0)
    kinds = {KQ: "KQ", VO: "VO"}
    labels = [
        f"layer {layer + 1}, head {head + 1}, {kinds[kind]} {coordinate + 1}"
        for layer, head, kind, coordinate in np.argwhere(entrants.reshape(config.grid))
    ]
    return {
        "drawn_power": ("drawn_power", np.array(powers)[shown]),
        "pair/flow": ("drawn_power time_one head", flows["one"][shown][..., first]),
        "pair/staircase": ("time_one head", stairs["one"][:, first]),
        "entrant": ("entrant", labels),
        "deep/flow": ("time_deep entrant", flows["deep"][-1][:, entrants]),
        "deep/staircase": ("time_deep entrant", stairs["deep"][:, entrants]),
    }


def _problems(config: Config, task: HeadTask, feedforward: Feedforward, target: Array) -> dict[str, Any]:
    """Negative gradients of the losses: of one layer without feed-forward part, and of the stack."""
    size = int(np.prod(config.grid))
    # Of one layer: residuals in student and teacher cancel, and all other layers are left out.
    alone = np.repeat(np.arange(config.layers) == 0, size // config.layers).astype(target.dtype)
    data = {
        "one": (alone, task.X, task.X + task.Y, jax.tree.map(np.zeros_like, feedforward)),
        "deep": (np.ones_like(alone), task.X, target, feedforward),
    }
    return {name: incremental.negative_gradient(_loss, *one) for name, one in data.items()}


def run(config: Config, context: Context) -> dict:
    """Greedy path and flows of one layer and of a stack with a feed-forward part, and a trained stack."""
    task, feedforward, target, u0, v0 = jax.device_get(_draw(config))
    g = _problems(config, task, feedforward, target)
    paths, ends, taus = {}, {}, {}
    for index, name in enumerate(g):
        context.progress(f"greedy path, {name}", 0.1 + 0.25 * index)
        path = incremental.greedy(g[name], u0.size, max_stages=config.stages + 1, u0=u0, v0=v0)
        paths[name] = jax.device_get(path)
        ends[name] = _ends(paths[name])[: config.stages]
        taus[name] = np.linspace(0.0, ends[name][-1], config.points)

    context.progress("integrating the flows", 0.6)
    horizon = float(1.5 * paths["deep"].times[0])
    network = np.linspace(0.0, horizon, config.points)
    # The network's flow rides along, and that of a gradient that is too large: time that runs too fast.
    times = {"right": network, "wrong": WRONG_FACTOR * network}
    one, far, deep = (
        {f"1e-{power:g}": (power, taus[name]) for power in powers}
        for name, powers in (("one", config.shares), ("one", config.far), ("deep", config.decades))
    )
    deep |= {name: (NETWORK_DECADES, clock) for name, clock in times.items()}
    one = _flows(g["one"], u0, v0, one, diffrax.Dopri8())
    one |= _flows(g["one"], u0, v0, far, diffrax.Kvaerno5()) if far else {}
    deep = _flows(g["deep"], u0, v0, deep, diffrax.Dopri8())
    context.progress("training at every learning rate", 0.75)
    data = (task.X, target, feedforward)
    gaps = _gaps(config, horizon, data, u0, v0, {name: deep.pop(name) for name in times})

    context.progress("comparing", 0.95)
    flows = {"one": np.stack(list(one.values())), "deep": np.stack(list(deep.values()))}
    stairs = {name: np.asarray(incremental.staircase(path, taus[name])) for name, path in paths.items()}
    distance = {name: _distances(path, ends[name], taus[name], flows[name]) for name, path in paths.items()}
    steps = {name: path.beta.reshape(-1, *config.grid) for name, path in paths.items()}
    middle = flows["one"][:, np.searchsorted(taus["one"], ends["one"][0])].reshape(-1, *config.grid)
    return {
        "share_power": ("share_power", [*config.shares, *config.far]),
        "decade": ("decade", list(config.decades)),
        "kind": ("kind", ["KQ", "VO"]),
        **{f"time_{name}": (f"time_{name}", taus[name]) for name in taus},
        "step": ("step layer head kind coordinate", steps),
        "tied": ("jump", {name: path.tied for name, path in paths.items()}),
        "distance/one": ("stage share_power", distance["one"]),
        "distance/deep": ("stage decade", distance["deep"]),
        "after_first_jump": ("layer head kind coordinate", middle[len(config.shares) - 1]),
        **_sharing(g["one"], steps["one"], (u0, v0), middle),
        **gaps,
        **_drawn(config, flows, stairs, np.flatnonzero(paths["one"].beta[1])),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What heads of a layer share, when the flow follows the path, and the network."""
    entered = {name: _entered(beta)[: config.stages] for name, beta in saved["step"].items()}
    yield _one_per_stage(config, saved, entered)
    yield _exchange(config, saved["distance/one"], _plain(entered["one"]))
    yield _depth(config, saved["distance/deep"], saved["tied/deep"][: _plain(entered["deep"])])
    yield stated(
        "network",
        "Gradient descent on the stack's weights follows the flow of its products",
        "boixadsera2023, Equations 3 and 4 and Example 3.2",
        *first_order(saved["rate"], saved["gap"]),
    )


def _one_per_stage(config: Config, saved: Saved, entered: dict[str, np.ndarray]) -> Claim:
    waits, share = saved["wait_at_zero"], saved["share"]
    vo = waits[0, :, VO]
    apart, finite = np.max(np.ptp(vo, axis=0) / vo.min(axis=0)), np.sum(~np.isinf(waits[:, :, KQ]))
    # A product counts above a percent of the largest.
    size = np.abs(saved["after_first_jump"])
    active = size > 0.01 * size.max()
    last, at, kq = config.shares[-1], len(config.shares) - 1, np.abs(saved["kq_gradient"])
    error = np.abs(share["measured"] / share["predicted"] - 1)
    proportion = largest(kq[1] / kq[0] / share["predicted"] - 1)
    sums = [found.any(axis=2).sum(axis=(1, 2, 3)) == 1 for found in entered.values()]
    heads, summed = active.any(axis=(0, 2, 3)).sum(), active.any(axis=1).sum()
    ties = [tied[0] for tied in saved["tied"].values()]
    against_starts = "second head's share over the first one's, path, against the starts"
    in_flow = f"the same in the flow at 1e-{last:g}: relative gap to the path"
    from_first = f"at alpha = 1e-{config.shares[0]:g} and below: largest gap"
    kq_ratio = "KQ gradients of second over first head, over that share: largest gap to 1"
    one_head = "all in one head: largest gradient on the pair, over the one at zero"
    return corrected(
        "one-per-stage",
        "In each stage at most one head on one layer gains, and by at most one rank; corrected: heads of a "
        "layer tie, and it is their sum that gains one coordinate, shared by the starts",
        "boixadsera2023, Example 4.6 (the tie is derived here)",
        printed=[
            at_most(f"heads active after the first jump, flow at alpha = 1e-{last:g}", heads, 1, why=EXACT)
        ],
        mended=[
            # The heads are one function of their VO where KQ is zero.
            at_most("waits at zero: largest relative gap of the two heads", apart, 1e-12, why=ROUNDING),
            at_most("waits at zero of KQ that are finite", finite, 0, why=EXACT),
            equals("products that enter at the first jump", entered["one"][0].sum(), HEADS, why=EXACT),
            every("both paths flag the tie there", ties),
            equals("coordinates of the sum active after it, same flow", summed, 1, why=EXACT),
            every("stages of both paths where one coordinate of the sum over heads enters", sums),
            # Both move by the same d log(beta), from the squares of u + v or u - v at the start.
            equals(against_starts, share["predicted"], share["start"], 1e-9, why="stages known to 1e-9"),
            # What is inactive is a power of alpha, which is why the share does not depend on alpha.
            at_most(in_flow, error[at], 1e-6, why="what is inactive is a power of alpha"),
            at_most(from_first, error.max(), 0.01, why="at larger alpha that power is less small"),
            at_most(kq_ratio, proportion, 1e-9, why="in proportion to the head's own VO product"),
            # The strict minimum of Assumption 4.3 is none.
            at_most(one_head, saved["pull_in_one_head"], 1e-8, why="the flow rests on every split"),
        ],
    )


def _plain(entered: np.ndarray) -> int:
    """Stages before the first KQ enters."""
    enters = entered[:, :, :, KQ].any(axis=(1, 2, 3))
    return int(np.argmax(enters)) if enters.any() else len(entered)


def _exchange(config: Config, distance: np.ndarray, plain: int) -> Claim:
    last, far = len(config.shares) - 1, config.far
    ratios = distance[:, last] / distance[:, last - 1]
    squaring = f"1e-{config.shares[-2]:g} to 1e-{config.shares[-1]:g}"
    after = f"all stages, {squaring}: ratio of distances"
    before = f"before a KQ enters, {squaring}: largest ratio of distances"
    inside = [at_most(before, ratios[:plain].max(), 0.65, why=HALVES)]
    if len(far) > 1:
        # Ten times the logarithm: a tenth of the distance, and as much again for what is slow.
        label = f"all stages, 1e-{far[0]:g} to 1e-{far[-1]:g}: ratio of distances"
        falls = distance[-1, -1] / distance[-1, -len(far)]
        inside += [at_most(label, falls, 2 * far[0] / far[-1], why="twice that, for what is slow")]
    return qualified(
        "exchange",
        "One layer: the flow from small starts follows the greedy path (here in one instance)",
        "boixadsera2023, Theorem 4.5 and Example 4.6",
        condition="no head of a tied pair attends yet, or log(1/alpha) is large against the time in which "
        "they exchange their shares",
        inside=inside,
        outside=[at_least(after, ratios[-1], 0.65, why="outside of what is allowed before")],
    )


def _depth(config: Config, distance: np.ndarray, tied: np.ndarray) -> Claim:
    ratios = distance[:, 1:] / distance[:, :-1]
    plain, all_stages = ratios[: len(tied)], f"in all {config.stages} stages: largest ratio"
    squaring = "distance per squaring of alpha, before the first KQ: largest ratio"
    return qualified(
        "depth",
        f"Tied heads with a feed-forward part, {config.layers} deep: the flow approaches the staircase",
        "boixadsera2023, Example 3.2 and Theorem 4.5",
        condition="no head of a tied pair attends yet; later it approaches more slowly than 1 / log(1/alpha)",
        inside=[
            every("tied stages before the first KQ", tied),
            at_most(squaring, plain.max(), 0.65, why=HALVES),
            at_least("smallest ratio", plain.min(), 0.4, why=HALVES),
        ],
        outside=[at_most(all_stages, ratios.max(), 0.9, why="shares are exchanged slowly: it falls")],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Products of tied heads, their ratio over alpha, the stack's products, and distances to staircases."""
    drawn, ((pair, ratio), (deep, distance)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    entry = np.argwhere(saved["step/one"][1])[0][-1] + 1
    times, opacity = saved["time_one"], (0.35, 0.65, 1.0)
    for power, flow, alpha in zip(saved["drawn_power"], saved["pair/flow"], opacity, strict=True):
        for head, values in enumerate(flow.T):
            label = f"head {head + 1}, α = 1e-{power:g}"
            pair.plot(times, values, color=f"C{head}", label=label, lw=2.0, alpha=alpha)
    pair.plot(times, saved["pair/staircase"], **plotting.THEORY)
    pair.plot([], [], label="tied staircase", **plotting.THEORY)
    pair.set(xlabel="rescaled time t / log(1/α)", ylabel=f"entry {entry} of W_V W_Oᵀ")
    pair.set_title("One layer: heads enter together, exchange later")
    pair.legend(fontsize=8)

    shares, predicted = saved["share_power"], float(saved["share/predicted"])
    ratio.plot(shares, saved["share/measured"], "o", color="C0", label="flow, after the first jump")
    ratio.axhline(predicted, label="set by the starts", **plotting.THEORY)
    ratio.set(xscale="log", xlabel="α", ylabel="entry of second head over first")
    ticks = shares[np.append(True, np.diff(np.log(shares)) > 0.5)]
    ratio.set_xticks(ticks, [f"1e-{tick:g}" for tick in ticks])
    ratio.set_xticks([], minor=True)
    ratio.set_ylim(0, 1.4 * predicted)
    ratio.set_title("The second head's share does not vanish")
    ratio.legend(loc="lower left")

    times, stairs = saved["time_deep"], saved["deep/staircase"]
    start, end = _shown(config, times, stairs)
    seen = (times >= start) & (times < end)
    for index, (label, values) in enumerate(zip(saved["entrant"], saved["deep/flow"].T, strict=True)):
        deep.plot(times[seen], values[seen], color=f"C{index % 10}", label=label, **plotting.TRAINED)
    deep.plot(times[seen], stairs[seen], **plotting.THEORY)
    deep.set(xlabel="rescaled time t / log(1/α)", ylabel="product")
    depth = f"{config.layers} layer{'s' * (config.layers > 1)}"
    deep.set_title(f"{depth} with feed-forward part, α = 1e-{config.decades[-1]:g}")
    deep.legend(loc="upper left", fontsize=8)
    _distance_panel(distance, config, saved, depth)
    return drawn


def _shown(config: Config, times: np.ndarray, stairs: np.ndarray) -> tuple[float, float]:
    """From well before the first jump to the end, or to the last jump if the flow is not through with it."""
    jumps = times[1:][np.any(np.diff(stairs, axis=0) != 0, axis=1)]
    # A jump at T takes a few T / log(1/alpha).
    through = times[-1] > jumps[-1] * (1 + 5 / (LOG10 * config.decades[-1]))
    return jumps[0] / 2, times[-1] if through else jumps[-1]


def _distance_panel(ax: Axes, config: Config, saved: Saved, depth: str) -> Axes:
    """Distances to the staircase over log(1/alpha), of the stack in each stage and of one layer."""
    lams, shares = LOG10 * saved["decade"], LOG10 * saved["share_power"]
    for stage, values in enumerate(saved["distance/deep"]):
        ax.loglog(lams, values, "o-", color=f"C{stage}", label=f"{depth}, stage {stage + 1}", ms=4)
    plotting.reference_slope(ax, lams, saved["distance/deep"][-1], -1, "slope −1")
    label = f"no feed-forward part, stage {config.stages}"
    ax.loglog(shares, saved["distance/one"][-1], "s-", color="0.45", label=label, ms=4)
    marks = np.unique(np.concatenate([shares, lams]))
    ax.set_xticks(marks, [f"{mark:.0f}" for mark in marks])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="log(1/α)", ylabel="integrated distance, to midway of a stage")
    ax.set_title("Distance of the flow to the staircase")
    low, high = ax.get_ylim()
    ax.set_ylim(low * (low / high) ** 0.8, high)  # room for the legend
    ax.legend(loc="lower left", fontsize=8)
    return ax
