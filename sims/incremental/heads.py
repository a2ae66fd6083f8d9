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

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from dynamics import incremental
from dynamics.flow import Trajectory
from dynamics.incremental import GreedyPath
from models.attention import AttentionStack, Feedforward, diagonal_stack, observe_products, split_products
from models.data.teachers import diagonal_teacher
from models.functional import as_function
from models.losses import bind, mean_squared_error
from models.training import train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.compare import WRONG_FACTOR, first_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

HEADS = 2
HIDDEN = 4  # width of the feed-forward part
NETWORK_DECADES = 2.0  # the network starts at alpha = 1e-2
KQ, VO = 0, 1  # the two kinds of products


@dataclass(frozen=True)
class Config:
    """Sizes, starts and learning rates."""

    instance: int = 0
    """Seed of teachers, tokens, starts and feed-forward weights; the seed of the run draws nothing else."""
    layers: int = 1
    """Layers of the stack with a feed-forward part; the other problem has one layer without it."""
    dim: int = 3
    """Dimension d of the tokens."""
    tokens: int = 5
    """Tokens per sample."""
    samples: int = 24
    """Samples N."""
    kq_scale: float = 1.0
    """Standard deviation of the teachers' KQ products."""
    feedforward_scale: float = 0.5
    """Standard deviation of the frozen feed-forward weights; small ones leave layers nearly tied."""
    second: float = 0.7
    """Size of the second head's starts over the first one's."""
    stages: int = 3
    """Stages of the greedy path that are followed."""
    shares: tuple[float, ...] = (2.0, 3.0, 4.0, 8.0, 16.0)
    """log10(1 / alpha) of the flows of one layer; as many as `decades` and two more compile nothing anew."""
    decades: tuple[float, ...] = (8.0, 16.0, 32.0)
    """log10(1 / alpha) of the flows of the stack, each twice the one before."""
    far: tuple[float, ...] = ()
    """More of one layer, with an implicit solver: where the shares have the time for their exchange."""
    points: int = 2001
    """Rescaled times of a flow."""
    records: int = 40
    """Records of the network along its run."""
    substeps: tuple[int, ...] = (4, 12, 40, 120)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        require_sweeps(self, "shares", "decades", "substeps")
        if not np.allclose(np.diff(np.log2(self.decades)), 1):
            raise ValueError(f"decades must double from one to the next, got {self.decades}")
        if not np.isclose(self.shares[-1], 2 * self.shares[-2]):
            raise ValueError(f"shares must end with a number and its double, got {self.shares}")
        if (self.points - 1) % self.records or self.records < 1:
            raise ValueError(f"records must divide points - 1 = {self.points - 1}, got {self.records}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")


_STANDARD = replace(
    Config(),
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
    grid = (config.layers, HEADS, 2, dim)
    keys = jax.random.split(jax.random.key(config.instance), 5)
    task = diagonal_teacher(keys[0], config.samples, config.tokens, dim, kq_scale=config.kq_scale)
    feedforward = Feedforward(*(scale * jax.random.normal(keys[1], (2, config.layers, dim, HIDDEN))))
    kq, vo = jax.random.normal(keys[4], (2, config.layers, HEADS, dim))
    target = diagonal_stack(config.kq_scale * kq, vo, task.X, feedforward)
    heads = jnp.array([1.0, config.second])[None, :, None, None]
    u0 = (heads * jax.random.uniform(keys[2], grid, minval=0.8, maxval=1.2)).ravel()
    v0 = (heads * jax.random.uniform(keys[3], grid, minval=-0.3, maxval=0.3)).ravel()
    return task, feedforward, target, u0, v0


@eqx.filter_jit
def _flows(g, u0, v0, lams, taus, solver):
    """The flow at every alpha, each with its own times (A, T)."""

    def one(lam, taus):
        return incremental.log_flow(g, u0, v0, lam, taus, solver=solver)

    return jax.vmap(one)(lams, taus)


@jax.jit
def _distances(path: GreedyPath, ends: Array, taus: Array, beta: Array) -> Array:
    """Distances to the staircase up to each of the ends, (E, A), of every flow (A, T, p)."""

    def one(end, beta):
        # Times beyond the end are taken for the last one before it, and add nothing.
        last = jnp.max(jnp.where(taus <= end, taus, 0))
        return incremental.staircase_distance(path, jnp.minimum(taus, last), beta)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(ends, beta)


@eqx.filter_jit
def _gradients(g, betas):
    return jax.vmap(g)(betas)


def run(config: Config, context: Context) -> Result:
    """Greedy path and flows of one layer and of a stack with a feed-forward part, and a trained stack."""
    layers, dim = config.layers, config.dim
    grid = (layers, HEADS, 2, dim)
    size = int(np.prod(grid))
    task, feedforward, target, u0, v0 = jax.tree.map(np.asarray, _draw(config))

    # Of one layer: residuals in student and teacher cancel, and all other layers are left out.
    alone = np.repeat(np.arange(layers) == 0, size // layers).astype(u0.dtype)
    nothing = jax.tree.map(np.zeros_like, feedforward)
    one = incremental.negative_gradient(_loss, alone, task.X, task.X + task.Y, nothing)
    deep = incremental.negative_gradient(_loss, np.ones_like(alone), task.X, target, feedforward)

    paths, ends = {}, {}
    for index, (name, g) in enumerate({"one": one, "deep": deep}.items()):
        context.progress(f"greedy path, {name}", 0.1 + 0.25 * index)
        path = incremental.greedy(g, size, max_stages=config.stages + 1, u0=u0, v0=v0)
        paths[name] = jax.tree.map(np.asarray, path)
        ends[name] = _ends(paths[name])

    context.progress("integrating the flows", 0.6)
    flows = {}
    taus = {name: np.linspace(0.0, ends[name][config.stages - 1], config.points) for name in paths}
    # The network's times, and the same of a gradient 2 % too large, ride along with the stack's flows.
    horizon = float(1.5 * paths["deep"].times[0])
    network = np.linspace(0.0, horizon, config.points)
    lams = {
        "one": np.log(10) * np.asarray(config.shares),
        "deep": np.log(10) * np.asarray([*config.decades, NETWORK_DECADES, NETWORK_DECADES]),
    }
    for name, g in (("one", one), ("deep", deep)):
        times = np.tile(taus[name], (lams[name].size, 1))
        if name == "deep":
            times[-2:] = network, WRONG_FACTOR * network
        flows[name] = np.asarray(_flows(g, u0, v0, lams[name], times, diffrax.Dopri8()).ys.beta)
    if config.far:
        context.progress("integrating far flows", 0.7)
        more = np.log(10) * np.asarray(config.far)
        times = np.tile(taus["one"], (more.size, 1))
        far = _flows(one, u0, v0, more, times, diffrax.Kvaerno5()).ys.beta
        flows["one"] = np.concatenate([flows["one"], far])

    context.progress("training at every learning rate", 0.75)
    lam = float(lams["deep"][-1])
    kept = slice(None, None, (config.points - 1) // config.records)
    u, v = (np.exp(-lam) * x.reshape(grid) for x in (u0, v0))
    weights = (x[:, :, kind] for kind in (KQ, VO) for x in (u, v))  # key, query, value, output
    stack = AttentionStack(*map(jnp.asarray, weights), feedforward=feedforward)
    predict, params = as_function(stack)
    rates, trained = train_at_rates(
        bind(mean_squared_error, (predict, task.X, target)),
        params,
        config.substeps,
        horizon=horizon * lam,
        points=config.records,
        observe=observe_products,
    )
    gaps = {
        name: lane_gaps(Trajectory(trained.ts[0], flows["deep"][index, kept], np.True_), trained)
        for name, index in (("flow", -2), ("wrong", -1))
    }

    context.progress("comparing", 0.95)
    followed = {"one": flows["one"], "deep": flows["deep"][: len(config.decades)]}
    distances = {
        name: np.asarray(_distances(path, ends[name][: config.stages], taus[name], followed[name]))
        for name, path in paths.items()
    }
    split = _shares(one, paths["one"], grid, taus["one"], flows["one"])
    stairs = {name: np.asarray(incremental.staircase(paths[name], taus[name])) for name in paths}
    data = {
        "times": {name: path.times for name, path in paths.items()},
        "steps": {name: path.beta for name, path in paths.items()},
        "tied": {name: path.tied for name, path in paths.items()},
        "taus": taus,
        "flow": followed,
        "stairs": stairs,
        "distance": distances,
        "share": {name: split[name] for name in ("predicted", "measured")},
        "rates": rates,
        "gap": gaps,
        "network": {"taus": network[kept], "flow": flows["deep"][-2, kept], "trained": lane(trained, -1).ys},
    }
    claims = (
        _one_per_stage(config, one, paths, grid, split, (u0, v0)),
        _exchange(config, paths["one"], distances["one"], grid),
        _depth(config, paths["deep"], distances["deep"], grid),
        first_order(
            "incremental.heads/network",
            "Gradient descent on the stack's weights follows the flow of its products",
            "boixadsera2023, Equations 3 and 4 and Example 3.2",
            rates,
            gaps["flow"],
            gaps["wrong"],
        ),
    )
    dims = {
        **{f"taus/{name}": (f"time_{name}",) for name in paths},
        **{f"flow/{name}": (f"alpha_{name}", f"time_{name}", "product") for name in paths},
        **{f"stairs/{name}": (f"time_{name}", "product") for name in paths},
        **{f"distance/{name}": ("stage", f"alpha_{name}") for name in paths},
        **{f"gap/{name}": ("rate",) for name in gaps},
        "rates": ("rate",),
    }
    return Result(data, claims, dims)


def _ends(path: GreedyPath) -> np.ndarray:
    """A time inside of every stage but the last: midway to the next jump, if that is not far off."""
    times = np.asarray(path.times)
    return (times[:-1] + np.minimum(times[1:], 1.5 * times[:-1])) / 2


def _entered(path: GreedyPath, grid: tuple[int, ...]) -> np.ndarray:
    """Whether a product enters, (stages, layers, heads, kinds, d)."""
    beta = np.asarray(path.beta).reshape(-1, *grid)
    return (beta[1:] != 0) & (beta[:-1] == 0)


def _shares(g, path: GreedyPath, grid, taus: np.ndarray, beta: np.ndarray) -> dict[str, Any]:
    """Second head's product over the first one's after the first jump: predicted, and of the flows."""
    first = tuple(np.argwhere(_entered(path, grid)[0])[0])
    position = (Ellipsis, first[0], slice(None), *first[2:])
    pair = path.beta[1].reshape(grid)[position]
    middle = int(np.searchsorted(taus, _ends(path)[0]))
    flows = beta[:, middle].reshape(-1, *grid)
    # All in one head: what the sum is stays.
    moved = path.beta[1].reshape(grid).copy()
    moved[position] = [pair.sum(), 0.0]
    gradients = _gradients(g, np.stack([path.beta[0], path.beta[1], moved.ravel()]))
    return {
        "position": first,
        "predicted": pair[1] / pair[0],
        "measured": flows[position][:, 1] / flows[position][:, 0],
        "flows": flows,
        "gradients": np.asarray(gradients).reshape(-1, *grid),
    }


def _one_per_stage(config: Config, g, paths, grid, split, start) -> Claim:
    zero, after, moved = split["gradients"]
    layer, _, kind, coordinate = split["position"]
    waits = np.asarray(incremental.time_until_active(np.ones(zero.size), zero.ravel())).reshape(grid)
    vo = waits[0, :, VO]
    # Whose products count at the smallest alpha: above a percent of the largest.
    size = np.abs(split["flows"][len(config.shares) - 1])
    active = size > 0.01 * size.max()
    w0, z0 = (np.asarray(x).reshape(grid) for x in incremental.canonical_start(*start))
    starts = (w0 if zero[split["position"]] > 0 else z0)[layer, :, kind, coordinate]
    kq = np.abs(after[0, :, KQ])
    error = np.abs(split["measured"] / split["predicted"] - 1)
    entered = {name: _entered(path, grid)[: config.stages] for name, path in paths.items()}
    return Claim(
        "incremental.heads/one-per-stage",
        "In each stage at most one head on one layer gains, and by at most one rank; corrected: heads of a "
        "layer tie, and it is their sum that gains one coordinate, shared by the starts",
        "boixadsera2023, Example 4.6 (the tie is derived here)",
        "corrected",
        [
            Check(
                f"heads active after the first jump, flow at alpha = 1e-{config.shares[-1]:g}",
                "at most",
                1,
                active.any(axis=(0, 2, 3)).sum(),
            ),
            # The heads are one function of their VO where KQ is zero: rounding alone.
            Check(
                "waits at zero: largest relative gap of the two heads",
                "at most",
                1e-12,
                np.max(np.ptp(vo, axis=0) / vo.min(axis=0)),
            ),
            Check("waits at zero of KQ that are finite", "at most", 0, np.isfinite(waits[:, :, KQ]).sum()),
            Check("products that enter at the first jump", "equals", HEADS, entered["one"][0].sum()),
            all_of("both paths flag the tie there", [path.tied[0] for path in paths.values()]),
            Check(
                "coordinates of the sum active after it, same flow",
                "equals",
                1,
                active.any(axis=1).sum(),
            ),
            all_of(
                "stages of both paths where one coordinate of the sum over heads enters",
                np.concatenate([found.any(axis=2).sum(axis=(1, 2, 3)) == 1 for found in entered.values()]),
            ),
            # Both move by the same d log(beta), from the squares of u + v or u - v at the start.
            Check(
                "second head's share over the first one's, path, against the starts",
                "equals",
                (starts[1] / starts[0]) ** 2,
                split["predicted"],
                1e-9,
            ),
            # What is inactive is a power of alpha, which is why the share does not depend on alpha.
            Check(
                f"the same in the flow at 1e-{config.shares[-1]:g}: relative gap to the path",
                "at most",
                1e-6,
                error[len(config.shares) - 1],
            ),
            # At larger alpha the power is less small.
            Check(f"at alpha = 1e-{config.shares[0]:g} and below: largest gap", "at most", 0.01, error.max()),
            # KQ gradients are proportional to the head's own VO product.
            Check(
                "KQ gradients of second over first head, over that share: largest gap to 1",
                "at most",
                1e-9,
                np.max(np.abs(kq[1] / kq[0] / split["predicted"] - 1)),
            ),
            # The strict minimum of Assumption 4.3 is none: the flow rests on every split.
            Check(
                "all in one head: largest gradient on the pair, over the one at zero",
                "at most",
                1e-8,
                np.max(np.abs(moved[layer, :, kind, coordinate])) / np.abs(zero).max(),
            ),
        ],
    )


def _plain(config: Config, path: GreedyPath, grid: tuple[int, ...]) -> int:
    """Stages before the first KQ enters."""
    enters = _entered(path, grid)[: config.stages, :, :, KQ].any(axis=(1, 2, 3))
    return int(np.argmax(enters)) if enters.any() else config.stages


def _exchange(config: Config, path: GreedyPath, distance: np.ndarray, grid: tuple[int, ...]) -> Claim:
    plain, last = _plain(config, path, grid), len(config.shares) - 1
    ratios = distance[:, last] / distance[:, last - 1]
    squaring = f"1e-{config.shares[-2]:g} to 1e-{config.shares[-1]:g}"
    far = [
        # Ten times the logarithm: a tenth of the distance, and as much again for what is slow.
        Check(
            f"all stages, 1e-{config.far[0]:g} to 1e-{config.far[-1]:g}: ratio of distances",
            "at most",
            2 * config.far[0] / config.far[-1],
            distance[-1, -1] / distance[-1, -len(config.far)],
        )
        for _ in config.far[1:2]
    ]
    return Claim(
        "incremental.heads/exchange",
        "One layer: the flow from small starts follows the greedy path (here in one instance)",
        "boixadsera2023, Theorem 4.5 and Example 4.6",
        "qualified",
        [
            # As for single heads: 1 / log(1/alpha), which a squaring halves.
            Check(
                f"before a KQ enters, {squaring}: largest ratio of distances",
                "at most",
                0.65,
                ratios[:plain].max(),
            ),
            # Outside of what the check before allows.
            Check(f"all stages, {squaring}: ratio of distances", "at least", 0.65, ratios[-1]),
            *far,
        ],
        condition="no head of a tied pair attends yet, or log(1/alpha) is large against the time in which "
        "they exchange their shares",
    )


def _depth(config: Config, path: GreedyPath, distance: np.ndarray, grid: tuple[int, ...]) -> Claim:
    ratios = distance[:, 1:] / distance[:, :-1]
    plain = _plain(config, path, grid)
    return Claim(
        "incremental.heads/depth",
        f"Tied heads with a feed-forward part, {config.layers} deep: the flow approaches the staircase",
        "boixadsera2023, Example 3.2 and Theorem 4.5",
        "qualified",
        [
            all_of("tied stages before the first KQ", np.asarray(path.tied)[:plain]),
            # Jumps are late and wide by amounts of the order of 1 / log(1/alpha), which a squaring halves.
            Check(
                "distance per squaring of alpha, before the first KQ: largest ratio",
                "at most",
                0.65,
                ratios[:plain].max(),
            ),
            Check("smallest ratio", "at least", 0.4, ratios[:plain].min()),
            # Slow exchange of shares: it falls, if not by half.
            Check(f"in all {config.stages} stages: largest ratio", "at most", 0.9, ratios.max()),
        ],
        condition="no head of a tied pair attends yet; later it approaches more slowly than 1 / log(1/alpha)",
    )


def figure(saved: Saved) -> Figure:
    """Products of tied heads, their ratio over alpha, the stack's products, and distances to staircases."""
    drawn, ((pair, ratio), (deep, distance)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    config = saved.config
    grid = (config["layers"], HEADS, 2, config["dim"])
    shares, decades = np.asarray([*config["shares"], *config["far"]]), np.asarray(config["decades"])

    flows = saved["flow/one"].reshape(len(shares), -1, *grid)
    stairs = saved["stairs/one"].reshape(-1, *grid)
    steps = saved["steps/one"].reshape(-1, *grid)
    layer, _, kind, coordinate = np.argwhere(steps[1])[0]
    last = len(shares) - 1
    middle = len(config["shares"]) - 1 if config["far"] else 2
    for index, opacity in ((0, 0.35), (middle, 0.65), (last, 1.0)):
        for head in range(HEADS):
            label = f"head {head + 1}, α = 1e-{shares[index]:g}"
            values = flows[index, :, layer, head, kind, coordinate]
            pair.plot(saved["taus/one"], values, color=f"C{head}", label=label, lw=2.0, alpha=opacity)
    pair.plot(saved["taus/one"], stairs[:, layer, :, kind, coordinate], **plotting.THEORY)
    pair.plot([], [], label="tied staircase", **plotting.THEORY)
    pair.set(xlabel="rescaled time t / log(1/α)", ylabel=f"entry {coordinate + 1} of W_V W_Oᵀ")
    pair.set_title("One layer: heads enter together, exchange later")
    pair.legend(fontsize=7)

    predicted = float(saved["share/predicted"])
    ratio.plot(shares, saved["share/measured"], "o", color="C0", label="flow, after the first jump")
    ratio.axhline(predicted, label="set by the starts", **plotting.THEORY)
    ratio.set(xscale="log", xlabel="α", ylabel="entry of second head over first")
    ticks = shares[np.append(True, np.diff(np.log(shares)) > 0.5)]
    ratio.set_xticks(ticks, [f"1e-{tick:g}" for tick in ticks])
    ratio.set_xticks([], minor=True)
    ratio.set_ylim(0, 1.4 * predicted)
    ratio.set_title("The second head's share does not vanish")
    ratio.legend(loc="lower left")

    flow, taus = saved["flow/deep"][-1], saved["taus/deep"]
    stairs = saved["stairs/deep"]
    kinds = ("KQ", "VO")
    shown = [place for place in np.ndindex(grid) if np.any(stairs.reshape(-1, *grid)[(slice(None), *place)])]
    for index, place in enumerate(shown):
        layer, head, kind, coordinate = place
        column = np.ravel_multi_index(place, grid)
        label = f"layer {layer + 1}, head {head + 1}, {kinds[kind]} {coordinate + 1}"
        deep.plot(taus, flow[:, column], color=f"C{index % 10}", label=label, **plotting.TRAINED)
        deep.plot(taus, stairs[:, column], **plotting.THEORY)
    deep.set(xlabel="rescaled time t / log(1/α)", ylabel="product")
    depth = f"{config['layers']} layer{'s' * (config['layers'] > 1)}"
    deep.set_title(f"{depth} with feed-forward part, α = 1e-{decades[-1]:g}")
    deep.legend(loc="upper left", fontsize=6.5)

    lams = np.log(10) * decades
    for stage, values in enumerate(saved["distance/deep"]):
        distance.loglog(lams, values, "o-", color=f"C{stage}", label=f"{depth}, stage {stage + 1}", ms=4)
    plotting.reference_slope(distance, lams, saved["distance/deep"][-1], -1, "slope −1")
    label = f"no feed-forward part, stage {config['stages']}"
    distance.loglog(np.log(10) * shares, saved["distance/one"][-1], "s-", color="0.45", label=label, ms=4)
    marks = np.unique(np.log(10) * np.concatenate([shares, decades]))
    distance.set_xticks(marks, [f"{mark:.0f}" for mark in marks])
    distance.set_xticks([], minor=True)
    distance.set(xlabel="log(1/α)", ylabel="integrated distance, to midway of a stage")
    distance.set_title("Distance of the flow to the staircase")
    low, high = distance.get_ylim()
    distance.set_ylim(low * (low / high) ** 0.6, high)  # room for the legend
    distance.legend(loc="lower left", fontsize=7)
    return drawn
