"""An attention head with diagonal weights learns a diagonal teacher: the staircase, the flow, the network.

The toy model of the source's Figures 2 and 6 to 8, on Gaussian tokens. The head depends on the products kq
of W_K and W_Q, and vo of W_V and W_O. The greedy algorithm predicts which of them become active, when, and to
what; the flow approaches this staircase as its start goes to zero, and gradient descent follows the flow.
"""

from __future__ import annotations

import time
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

from dynamics import incremental
from dynamics.flow import Trajectory
from dynamics.incremental import GreedyPath
from models.attention import AttentionHead, diagonal_head_loss, observe_products
from models.data.teachers import HeadTask, diagonal_teacher
from models.functional import as_function
from models.losses import bind, mean_squared_error
from models.training import Descent, map_lanes
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, every, qualified, stated
from sims.compare import (
    SOLVE,
    WRONG_FACTOR,
    first_order,
    lane,
    lane_gaps,
    largest,
    named_groups,
    percent,
    require_ok,
)
from sims.ranges import Count, Length, Positive, Range, Share, check_ranges
from sims.results import Context, Saved

# Factors over alpha, equal in all coordinates: what the flows differ in is alpha alone.
U0, V0 = 1.0, 0.5
TRAINED = 1  # the alpha that the network is trained from: the second one
LOSS_TIMES = 400  # of a flow, at most
# A product is negligible below this share of the largest one of the path. The exponent b of the next one runs
# from 1 to 0 in its time T, so that it grows like exp(2 log(1/alpha) tau / T) and is negligible until about
# log(50) / 2 = 2 units of T / log(1/alpha) before its jump: a stage whose middle is earlier lasts.
NEGLIGIBLE, LASTS = 0.01, 4.0
EXACT = "counts are exact"
HALVES = "one half, bent by the next order in 1 / log(1/alpha)"
RESCALED = "rescaled time t / log(1/α)"
STIFF = 40.0  # explicit solvers are faster below this log(1 / alpha)


@dataclass(frozen=True)
class Config:
    """The task, the starts, and the learning rates."""

    dim: Count = 4
    """Dimension d of the tokens; there are 2 d products."""
    tokens: Count = 4
    """Tokens of a sample."""
    samples: Count = 60
    """Samples."""
    kq_scale: Positive = 0.5
    """Standard deviation of the teacher's kq; its vo has 1."""
    stages: Count = 12
    """Most stages of the greedy algorithm; where they are too few to end it, some claims are left out."""
    shown: Annotated[int, Range(at_least=2)] = 8
    """Stages that the flows go through."""
    alpha: Share = 0.1
    """The largest start."""
    squarings: Annotated[int, Range(at_least=2)] = 3
    """How often alpha is squared for a smaller start."""
    records: Count = 20
    """Records of the network, which is trained from alpha squared until 1.5 times the second jump."""
    fine: Count = 160
    """Times per record at which the flows are looked at; they must resolve the jumps."""
    substeps: Annotated[tuple[Count, ...], Length(2)] = (20, 40, 80)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        check_ranges(self)
        if self.shown > self.stages:
            raise ValueError(f"stages must be at least shown = {self.shown}, got {self.stages}")

    @property
    def lams(self) -> np.ndarray:
        """log(1 / alpha) of all starts."""
        return -np.log(self.alpha) * 2.0 ** np.arange(self.squarings + 1)


_STANDARD = Config(
    dim=12,
    tokens=6,
    samples=200,
    kq_scale=0.3,
    stages=30,
    shown=22,
    substeps=(10, 20, 40, 80),
    records=40,
    fine=80,
)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(_STANDARD, dim=50, tokens=10, samples=1000, kq_scale=0.14, stages=6, shown=4),
}


@partial(jax.jit, static_argnames="stages")
def _greedy(X: Array, Y: Array, stages: int) -> GreedyPath:
    g = incremental.negative_gradient(diagonal_head_loss, X, Y)
    return incremental.greedy(g, 2 * X.shape[-1], max_stages=stages)


def _path(task: HeadTask, config: Config, context: Context) -> tuple[GreedyPath, float]:
    """The greedy path, without the rows beyond its end, and the seconds that each stage took."""
    context.progress("compiling greedy", 0.0)
    # With targets of zero there is nothing to learn: the program is compiled, and ends at once.
    jax.block_until_ready(_greedy(task.X, jnp.zeros_like(task.Y), config.stages))
    context.progress("greedy", 0.2)
    started = time.perf_counter()
    path = jax.device_get(_greedy(task.X, task.Y, config.stages))
    seconds = time.perf_counter() - started
    beyond = np.count_nonzero(np.isinf(path.times))
    path = jax.tree.map(lambda leaf: leaf[: len(leaf) - beyond] if leaf.ndim else leaf, path)
    return path, seconds / len(path.times)


@eqx.filter_jit
def _flows(X: Array, Y: Array, starts: tuple[Any, Any], solver: Any) -> Trajectory:
    """The products, (L, T, p), along flows from several log(1 / alpha), (L,), at rescaled times (L, T)."""
    ones = jnp.ones(2 * X.shape[-1])

    def flow(start):
        lam, taus = start
        g = incremental.negative_gradient(diagonal_head_loss, X, Y)
        path = incremental.log_flow(g, U0 * ones, V0 * ones, lam, taus, solver=solver, **SOLVE)
        return Trajectory(taus, path.ys.beta, path.ok)

    # One after the other, which compiles more quickly than all side by side.
    return map_lanes(flow, starts, at_once=1)


def _train(task: HeadTask, config: Config, horizon: float) -> tuple[np.ndarray, Trajectory]:
    """The learning rates, and the head's products along gradient descent from the second start."""
    lam = config.lams[TRAINED]
    u, v = (np.full((2, config.dim), np.exp(-lam) * factor) for factor in (U0, V0))
    predict, params = as_function(AttentionHead(u[0], v[0], u[1], v[1]))
    loss = bind(mean_squared_error, (predict, task.X, task.Y))
    descent = Descent(horizon=float(lam * horizon), points=config.records, substeps=config.substeps)
    return descent.rates, jax.device_get(descent.train(loss, params, observe=observe_products)[1])


@partial(jax.jit, static_argnames="thin")
def _measure(path: GreedyPath, taus: Array, beta: Array, X: Array, Y: Array, thin: int) -> dict[str, Any]:
    """What is measured on the staircase, and on the flows (L, T, p) beside it."""
    thinned = beta[:, ::thin].reshape(-1, beta.shape[-1])
    losses = jax.lax.map(lambda one: diagonal_head_loss(one, X, Y), thinned, batch_size=16)
    stage_loss, slope = jax.lax.map(lambda one: jax.value_and_grad(diagonal_head_loss)(one, X, Y), path.beta)
    wait = partial(incremental.time_until_active, jnp.ones(beta.shape[-1]))
    return {
        "staircase": incremental.staircase(path, taus),
        "distance": jax.vmap(lambda one: incremental.staircase_distance(path, taus, one))(beta),
        "first_jump": incremental.jump_times(path, taus, beta[TRAINED])[0],
        "loss": losses.reshape(len(beta), -1),
        "stage_loss": stage_loss,
        "waiting": {"gradient": -slope[0], "at_zero": wait(-slope[0]), "after_first": wait(-slope[1])},
    }


def run(config: Config, context: Context) -> dict:
    """Find the staircase, integrate the flows from several starts, and train the network from one of them."""
    sizes = {"samples": config.samples, "tokens": config.tokens, "dim": config.dim}
    task = diagonal_teacher(jax.random.key(context.seed), **sizes, kq_scale=config.kq_scale)
    path, seconds = _path(task, config, context)

    count, lams = len(path.times), config.lams
    context.progress(f"flows (greedy: {count} stages, {seconds:.2g} s each)", 0.5)
    shown = min(config.shown, count)
    # Halfway to the stage after the last one shown; past the last of all.
    next_time = path.times[shown] if shown < count else 1.4 * path.times[-1]
    taus = np.linspace(0, (path.times[shown - 1] + next_time) / 2, config.records * config.fine + 1)
    horizon = 1.5 * float(path.times[1])
    until_horizon = taus * (horizon / taus[-1])
    lam, solver = lams[TRAINED], diffrax.Dopri8() if lams[-1] < STIFF else diffrax.Kvaerno5()
    # A gradient that is too large is time that runs too fast.
    network = {"right": [(lam, until_horizon)], "wrong": [(lam, WRONG_FACTOR * until_horizon)]}
    starts = {"squared": [(lam, taus) for lam in lams], **network}
    flows = named_groups(lambda lanes: _flows(task.X, task.Y, lanes, solver), starts)
    require_ok("a flow of products", *flows.values())
    beta = flows["squared"].ys

    context.progress("network", 0.7)
    rates, trained = _train(task, config, horizon)
    finest = lane(trained, int(np.argmin(rates))).ys
    theory = {
        name: Trajectory(trained.ts[0], flows[name].ys[0, :: config.fine], flows[name].ok[0])
        for name in network
    }

    context.progress("measuring", 0.9)
    thin = max(1, len(taus) // LOSS_TIMES)
    found = jax.device_get(_measure(path, taus, beta, task.X, task.Y, thin))
    # How near the flow comes to a stage's products, over the jump that leads there.
    nearest = [np.min(np.sum(np.abs(beta[TRAINED] - stage), axis=1)) for stage in path.beta[1:]]
    return {
        "log_inv_alpha": ("log_inv_alpha", lams),
        "rescaled_time": ("rescaled_time", taus),
        "loss_time": ("loss_time", taus[::thin]),
        "jump": ("jump", path.times),
        "product": ("product", [f"{name} {i + 1}" for name in ("kq", "vo") for i in range(config.dim)]),
        "record": ("record", until_horizon[:: config.fine]),
        "rate": ("rate", rates),
        "path": {
            "beta": ("stage product", path.beta),
            "loss": ("stage", found["stage_loss"]),
            **{name: ("jump", getattr(path, name)) for name in ("order", "tied", "converged")},
            "complete": path.complete,
        },
        "teacher": ("product", np.concatenate([task.kq, task.vo])),
        "products": ("rescaled_time product", {"flow": beta[-1], "staircase": found["staircase"]}),
        "distance": ("log_inv_alpha", found["distance"]),
        "loss": ("log_inv_alpha loss_time", found["loss"]),
        "waiting": ("product", found["waiting"]),
        "first_jump": found["first_jump"],
        "missed": ("jump", nearest / np.sum(np.abs(np.diff(path.beta, axis=0)), axis=1)),
        "network": ("record product", {"flow": theory["right"].ys, "trained": finest}),
        "gap": ("rate", {name: lane_gaps(one, trained) for name, one in theory.items()}),
        "seconds_per_stage": seconds,
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What enters, in which order and to what, the network; of a path with an end also the limit."""
    dim = config.dim
    yield stated(
        "loss",
        "From stage to stage the loss falls",
        "boixadsera2023, Figure 6",
        every("stages that lower the loss", np.diff(saved["path/loss"]) < 0),
    )
    waits, later = saved["waiting/at_zero"], saved["waiting/after_first"]
    pull, of_vo = largest(saved["waiting/gradient"][:dim]), saved["path/order"][0] >= dim
    yield stated(
        "value-first",
        "W_V W_O^T comes first: while it is zero no entry of W_K W_Q^T has a gradient",
        "boixadsera2023, section 5, Figures 7 and 8 (derived here)",
        at_most("largest |g| of a kq at zero", pull, 0, why="it is a multiple of vo, which is zero"),
        every("entries of kq that would wait for ever at zero", np.isinf(waits[:dim])),
        every("entries of vo that would not", np.isfinite(waits[dim:])),
        every("entries of kq that would not after the first jump", np.isfinite(later[:dim])),
        equals("whether the first to enter is a vo", of_vo, 1, why="the statement itself"),
    )
    yield stated(
        "network",
        "Gradient descent on the weights of the head follows the flow, past the first two jumps",
        "boixadsera2023, Equations 3 and 4",
        *first_order(saved["rate"], saved["gap"]),
    )
    # Of a path that is cut short the flows see the first jumps alone, which they may not have made by then.
    if saved["path/complete"] or len(saved["jump"]) < config.stages:
        yield _teacher(saved)
        yield _support(saved)
        yield _limit(saved["distance"])
        yield _already(config, saved)


def _teacher(saved: Saved) -> Claim:
    losses, complete = saved["path/loss"], saved["path/complete"]
    off, left = largest(saved["path/beta"][-1] - saved["teacher"]), losses[-1] / losses[0]
    return stated(
        "teacher",
        "The greedy algorithm ends at the teacher, with every stage at a stationary point",
        "boixadsera2023, Algorithm 1 and section 5 (toy models)",
        # Gradients count as zero at 1e-9 of the first one; the loss is flatter than 1e-3 nowhere.
        at_most("largest difference of a product to the teacher's", off, 1e-6, why="gradients known to 1e-9"),
        at_most("loss at the end, over that at zero", left, 1e-12, why="the square of that difference"),
        equals("whether no product is left that would become active", complete, 1, why="the statement"),
        every("stages that reach a stationary point", saved["path/converged"]),
        every("stages that one product enters", ~saved["path/tied"]),
    )


def _active(beta: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Which products (..., p) are not negligible beside a path (S + 1, p): numbers, which keep a NaN."""
    return np.heaviside(np.abs(beta) / np.max(np.abs(path)) - NEGLIGIBLE, 0)


def _support(saved: Saved) -> Claim:
    taus, jumps, path, lams = (
        saved[name] for name in ("rescaled_time", "jump", "path/beta", "log_inv_alpha")
    )
    # The flows go through some of the stages, and the network through fewer; the last one has no end.
    starts, ends = np.append(0, jumps[:-1]), jumps
    middles = (starts + ends) / 2
    lasting = np.flatnonzero((lams[-1] * (1 - starts / ends) >= LASTS) & (middles < taus[-1]))
    active = _active(saved["products/flow"][np.searchsorted(taus, middles[lasting])], path)
    entered = np.sum(np.diff(active, axis=0).clip(min=0), axis=1) / np.diff(lasting)
    records = saved["record"]
    at = np.searchsorted(records, middles[middles <= records[-1]])
    together = np.sum(np.diff(_active(saved["network/trained"][at], path), axis=0).clip(min=0), axis=1)
    flow, network = (f"from alpha = {np.exp(-lam):.0e}" for lam in (lams[-1], lams[TRAINED]))
    return qualified(
        "support",
        "In each stage the number of products that are not negligible grows by at most one",
        "boixadsera2023, Theorem 4.5",
        condition="stages last in units of 1 / log(1/alpha); else several products enter at once",
        inside=[
            at_most(
                f"flow {flow}: products that enter per jump, most of {len(lasting)} middles of stages",
                entered.max(),
                1,
                why=EXACT,
            ),
            every(
                f"flow {flow}: those where the active products are the path's",
                np.all(active == _active(path, path)[lasting], axis=1),
            ),
        ],
        outside=[at_least(f"network {network}: products that enter at once", together.max(), 2, why=EXACT)],
    )


def _limit(distance: np.ndarray) -> Claim:
    ratios = distance[1:] / distance[:-1]
    return stated(
        "limit",
        "As alpha goes to zero the flow in rescaled time tends to the staircase; where alpha is squared the "
        f"distance falls to {ratios.min():.2f} to {ratios.max():.2f} of itself, on the way to half",
        "boixadsera2023, Theorem 4.5 (the rate is derived here)",
        # A distance that does not fall has ratio 1, and one that falls like a power of alpha a ratio near 0.
        at_most("largest ratio of distances, alpha squared to alpha", ratios.max(), 0.65, why=HALVES),
        at_least("smallest", ratios.min(), 0.4, why=HALVES),
    )


def _already(config: Config, saved: Saved) -> Claim:
    times, lams, missed = saved["jump"], saved["log_inv_alpha"], saved["missed"]
    lam, squarings = lams[TRAINED], len(lams) - 1 - TRAINED
    # The stages that the flows reach; the last of all has no end.
    length = np.diff(times)[: config.shown]
    longest, shortest = missed[np.argmax(length)], missed[np.argmin(length)]
    late = abs(saved["first_jump"] / times[0] - 1)
    away = saved["distance"][TRAINED] / saved["distance"][-1]
    near = "longest stage: how near the flow comes to its products, over its jump"
    to_limit = f"distance to the staircase over that at {np.exp(-lams[-1]):.0e}"
    return qualified(
        "alpha-0.01",
        f"The dynamics are stagewise already at alpha = {np.exp(-lam):.2g}",
        "boixadsera2023, Appendix A, Figures 6 to 8 (the caption of its second version)",
        condition="stages last long in units of 1 / log(1/alpha); short ones merge, and all are late",
        inside=[
            at_most(near, longest, 0.15, why="much less than the jump that leads there"),
            at_most("first jump: relative error of its time", late, 1 / lam, why="order one, over lam"),
        ],
        outside=[
            at_least("shortest stage: the same", shortest, 0.15, why="the next jump is already under way"),
            at_least(to_limit, away, 0.65**-squarings, why="it halves with each squaring: the limit is far"),
        ],
    )


def _power(lam: float) -> str:
    return f"α = $10^{{{-lam / np.log(10):.3g}}}$"


def _until(config: Config, saved: Saved) -> float:
    """A while after the last jump that is shown."""
    return min(saved["rescaled_time"][-1], 1.3 * saved["jump"][: config.shown][-1])


def _entries(ax: Axes, config: Config, saved: Saved, which: slice, matrix: str) -> Axes:
    """The flow from the smallest start beside the staircase: the entries of one product matrix."""
    theory, flow = (saved[f"products/{name}"][:, which] for name in ("staircase", "flow"))
    _beside(ax, saved["rescaled_time"], theory, flow, "flow, a colour per entry", "staircase")
    ax.set(xlabel=RESCALED, ylabel="entry of the diagonal", xlim=(0, _until(config, saved)))
    ax.set_title(f"{matrix}, {_power(saved['log_inv_alpha'][-1])}")
    ax.legend(loc="upper right", ncols=2, columnspacing=1.0)
    return ax


def _beside(
    ax: Axes, ts: np.ndarray, theory: np.ndarray, trained: np.ndarray, label: str, theory_label: str
) -> Axes:
    """Many coordinates over time, (T, n) each, under one label; with room for a legend above."""
    count = trained.shape[1]
    plotting.theory_and_trained(ax, ts, theory, trained, [label, *["_"] * (count - 1)])
    ax.lines[count].set_label(theory_label)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.25 * (high - low))
    return ax


def _loss_panel(ax: Axes, config: Config, saved: Saved) -> Axes:
    """Losses of the flows from all starts beside those of the staircase, until little is left."""
    for index, (lam, loss) in enumerate(zip(saved["log_inv_alpha"], saved["loss"], strict=True)):
        ax.plot(saved["loss_time"], loss, color=f"C{index}", label=_power(lam), **plotting.TRAINED)
    stages, jumps, until = saved["path/loss"], saved["jump"], _until(config, saved)
    ax.step([0, *jumps], stages, where="post", label="staircase", **plotting.THEORY)
    small = np.flatnonzero(stages[1:] < 0.01 * stages[0])
    until = min(1.3 * jumps[small[0]], until) if small.size else until
    ax.set(xlabel=RESCALED, ylabel="loss (half the squared error)", xlim=(0, until), title="Loss")
    ax.legend(loc="upper right")
    return ax


def figure(config: Config, saved: Saved) -> Figure:
    """Loss and entries over rescaled time with the staircase; distance to it; the network on its flow."""
    drawn, ((loss, value, query), (distance, network, gap)) = plotting.new_figure(
        2, 3, width=3.75, height=3.2
    )
    drawn.suptitle(
        f"A head with diagonal weights: {config.dim} dimensions, {config.tokens} tokens, "
        f"{config.samples:,} samples. Greedy: {len(saved['jump'])} stages, "
        f"{saved['seconds_per_stage']:.2g} s each",
        fontsize=11,
    )
    _loss_panel(loss, config, saved)
    _entries(value, config, saved, slice(config.dim, None), "$W_V W_O^T$")
    _entries(query, config, saved, slice(config.dim), "$W_K W_Q^T$")

    lams = saved["log_inv_alpha"]
    distance.loglog(lams, saved["distance"], "o", color="C0", label="flow")
    constant = lams[-1] * saved["distance"][-1]
    distance.plot(
        lams, constant / lams, label=f"{constant:.2g} / log(1/α), as in the limit", **plotting.THEORY
    )
    distance.set_xticks(lams, labels=[f"{lam:.3g}" for lam in lams])
    distance.set_xticks([], minor=True)
    distance.set(xlabel="log(1/α)", ylabel="∫ Σ |β − staircase| dτ", title="Distance to the staircase")
    distance.legend(loc="upper right")

    theory, trained = saved["network/flow"], saved["network/trained"]
    _beside(network, saved["record"], theory, trained, "network, one colour per product", "flow")
    network.set(xlabel=RESCALED, ylabel="product")
    network.set_title(f"Trained, {_power(lams[TRAINED])}, learning rate {saved['rate'].min():.1g}")
    network.legend(loc="upper left")

    wrong = f"gradient {percent(WRONG_FACTOR)} too large"
    gaps = {"to the flow": saved["gap/right"], wrong: saved["gap/wrong"]}
    plotting.gap_panel(gap, saved["rate"], gaps, "learning rate", "largest gap of a product")
    gap.set_xticks(saved["rate"], labels=[f"{rate:.2g}" for rate in saved["rate"]])
    gap.set_xticks([], minor=True)
    gap.set_title("Network and flow")
    return drawn
