"""An attention head with diagonal weights learns a diagonal teacher: the staircase, the flow, the network.

The toy model of the source's Figures 2 and 6 to 8, on Gaussian tokens. The head depends on the products kq
of W_K and W_Q, and vo of W_V and W_O. The greedy algorithm predicts which of them become active, when, and to
what; the flow approaches this staircase as its start goes to zero, and gradient descent follows the flow.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.flow import Trajectory
from dynamics.incremental import (
    GreedyPath,
    greedy,
    jump_times,
    log_flow,
    negative_gradient,
    staircase,
    staircase_distance,
    time_until_active,
)
from models.attention import AttentionHead, diagonal_head, observe_products, split_products
from models.data.teachers import diagonal_teacher
from models.functional import as_function
from models.losses import bind, mean_squared_error
from models.training import train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.compare import WRONG_FACTOR, first_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

# Factors over alpha, equal in all coordinates: what the flows differ in is alpha alone.
U0, V0 = 1.0, 0.5
TRAINED = 1  # the alpha that the network is trained from: the second one
LOSS_TIMES = 400  # of a flow, at most
RESCALED = "rescaled time t / log(1/α)"
STIFF = 40.0  # explicit solvers are faster below this log(1 / alpha)


@dataclass(frozen=True)
class Config:
    """The task, the starts, and the learning rates."""

    dim: int = 4
    """Dimension d of the tokens; there are 2 d products."""
    tokens: int = 4
    """Tokens of a sample."""
    samples: int = 60
    """Samples."""
    kq_scale: float = 0.5
    """Standard deviation of the teacher's kq; its vo has 1."""
    stages: int = 12
    """Most stages of the greedy algorithm; where they are too few to end it, some claims are left out."""
    shown: int = 8
    """Stages that the flows go through."""
    alpha: float = 0.1
    """The largest start."""
    squarings: int = 3
    """How often alpha is squared for a smaller start."""
    records: int = 20
    """Records of the network, which is trained from alpha squared until 1.5 times the second jump."""
    fine: int = 160
    """Times per record at which the flows are looked at; they must resolve the jumps."""
    substeps: tuple[int, ...] = (20, 40, 80)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        require_sweeps(self, "substeps")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")
        if self.squarings < 2:
            raise ValueError(f"squarings must be at least 2, got {self.squarings}")
        if not 2 <= self.shown <= self.stages:
            raise ValueError(f"shown must be at least 2, and stages no fewer, got {self.shown}")


_STANDARD = replace(
    Config(),
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


@jax.jit
def _loss(beta: Array, X: Array, Y: Array) -> Array:
    """Half the squared error of a sample, as a function of all products: kq, then vo."""
    kq, vo = split_products(beta, X.shape[-1])
    return 0.5 * jnp.sum((diagonal_head(kq[0, 0], vo[0, 0], X) - Y) ** 2) / len(X)


@partial(jax.jit, static_argnames="stages")
def _greedy(X: Array, Y: Array, stages: int) -> GreedyPath:
    return greedy(negative_gradient(_loss, X, Y), 2 * X.shape[-1], max_stages=stages)


@eqx.filter_jit
def _flows(X, Y, u0, v0, lams, taus, solver):
    """The products, (L, T, p), along the flows from several starts, each at times of its own, (L, T)."""

    def flow(lam, taus):
        g = negative_gradient(_loss, X, Y)
        return log_flow(g, u0, v0, lam, taus, solver=solver).ys.beta

    return jax.vmap(flow)(lams, taus)


class _Measured(NamedTuple):
    """What is measured on flows and staircase."""

    stairs: Any  # (T, p)
    distance: Any  # (L,)
    first_jump: Any  # (L,)
    flow_loss: Any  # (L, T / thin)
    stage_loss: Any  # (S + 1,)
    gradient: Any  # g at the products of each stage, (S + 1, p)


@partial(jax.jit, static_argnames="thin")
def _measure(path: GreedyPath, taus: Array, beta: Array, X: Array, Y: Array, thin: int) -> _Measured:
    thinned = beta[:, ::thin]
    flow_loss = jax.lax.map(
        lambda one: _loss(one, X, Y), thinned.reshape(-1, thinned.shape[-1]), batch_size=16
    )
    stage_loss, gradient = jax.lax.map(lambda one: jax.value_and_grad(_loss)(one, X, Y), path.beta)
    return _Measured(
        staircase(path, taus),
        jax.vmap(lambda beta: staircase_distance(path, taus, beta))(beta),
        jax.vmap(lambda beta: jump_times(path, taus, beta)[0])(beta),
        flow_loss.reshape(thinned.shape[:2]),
        stage_loss,
        -gradient,
    )


def run(config: Config, context: Context) -> Result:
    """Find the staircase, integrate the flows from several starts, and train the network from one of them."""
    sizes = {"samples": config.samples, "tokens": config.tokens, "dim": config.dim}
    draw = jax.jit(partial(diagonal_teacher, **sizes, kq_scale=config.kq_scale))
    task = draw(jax.random.key(context.seed))
    X, Y = task.X, task.Y

    context.progress("compiling greedy", 0.0)
    started = time.perf_counter()
    # With targets of zero there is nothing to learn: the program is compiled, and ends at once.
    jax.block_until_ready(_greedy(X, jnp.zeros_like(Y), config.stages))
    compiling = time.perf_counter() - started
    context.progress(f"greedy (compiled in {compiling:.1f} s)", 0.2)
    started = time.perf_counter()
    path = jax.tree.map(np.asarray, _greedy(X, Y, config.stages))
    count = int(np.sum(np.isfinite(path.times)))
    per_stage = (time.perf_counter() - started) / count
    path = _first(path, count)

    context.progress(f"flows (greedy: {count} stages, {per_stage:.2g} s each)", 0.5)
    shown = min(config.shown, count)
    # Halfway to the stage after the last one shown; past the last of all.
    next_time = path.times[shown] if shown < count else 1.4 * path.times[-1]
    taus = np.linspace(0, (path.times[shown - 1] + next_time) / 2, config.records * config.fine + 1)
    lams = -np.log(config.alpha) * 2.0 ** np.arange(config.squarings + 1)
    horizon = 1.5 * path.times[1]
    at_records = taus * (horizon / taus[-1])
    u0, v0 = jnp.full(2 * config.dim, U0), jnp.full(2 * config.dim, V0)
    beta = _flows(
        X,
        Y,
        u0,
        v0,
        jnp.asarray([*lams, lams[TRAINED], lams[TRAINED]]),
        # A gradient that is 2 % too large is time that runs 2 % too fast.
        jnp.asarray(np.stack([*([taus] * len(lams)), at_records, WRONG_FACTOR * at_records])),
        diffrax.Dopri8() if lams[-1] < STIFF else diffrax.Kvaerno5(),
    )
    beta, (right, wrong) = beta[:-2], np.asarray(beta[-2:, :: config.fine])

    context.progress("network", 0.7)
    alpha = np.exp(-lams[TRAINED])
    u, v = (alpha * one.reshape(2, config.dim) for one in (u0, v0))
    predict, params = as_function(AttentionHead(u[0], v[0], u[1], v[1]))
    rates, trained = train_at_rates(
        bind(mean_squared_error, (predict, X, Y)),
        params,
        config.substeps,
        horizon=float(lams[TRAINED] * horizon),
        points=config.records,
        observe=observe_products,
    )
    gaps = {
        name: lane_gaps(Trajectory(trained.ts[0], one, np.asarray(True)), trained)
        for name, one in (("flow", right), ("wrong", wrong))
    }

    context.progress("measuring", 0.9)
    thin = max(1, len(taus) // LOSS_TIMES)
    measured = jax.tree.map(np.asarray, _measure(path, jnp.asarray(taus), beta, X, Y, thin))
    beta = np.asarray(beta)
    # How near a flow comes to a stage's products, over the jump that leads there.
    nearest = [[np.min(np.sum(np.abs(flow - stage), axis=1)) for stage in path.beta[1:]] for flow in beta]
    missed = np.array(nearest) / np.sum(np.abs(np.diff(path.beta, axis=0)), axis=1)
    teacher = np.concatenate([task.kq, task.vo])
    data = {
        "alphas": np.exp(-lams),
        "lams": lams,
        "taus": taus,
        "flow": beta,
        "stairs": measured.stairs,
        "loss": {"taus": taus[::thin], "flow": measured.flow_loss, "stages": measured.stage_loss},
        "distance": measured.distance,
        "first_jump": measured.first_jump,
        "missed": missed,
        "path": {
            "times": path.times,
            "beta": path.beta,
            "order": path.order,
            "gradient": measured.gradient,
        },
        "teacher": teacher,
        "network": {
            "taus": at_records[:: config.fine],
            "trained": lane(trained, int(np.argmin(rates))).ys,
            "flow": right,
        },
        "rates": rates,
        "gap": gaps,
        "seconds": {"compiling": compiling, "per_stage": per_stage},
    }
    claims = (
        _loss_falls(path, measured.stage_loss),
        _value_first(path, measured.gradient[:2], config.dim),
        first_order(
            "incremental.attention/network",
            "Gradient descent on the weights of the head follows the flow, past the first two jumps",
            "boixadsera2023, Equations 3 and 4",
            rates,
            gaps["flow"],
            gaps["wrong"],
        ),
    )
    # Of a path that is cut short the flows see the first jumps alone, which they may not have made by then.
    if bool(path.complete) or count < config.stages:
        claims += (
            _teacher(path, teacher, measured.stage_loss),
            _limit(measured.distance),
            _already(path, measured, missed[TRAINED], lams, shown),
        )
    dims = {
        "alphas": ("start",),
        "lams": ("start",),
        "taus": ("time",),
        "flow": ("start", "time", "product"),
        "stairs": ("time", "product"),
        "loss/flow": ("start", "loss_time"),
        "loss/stages": ("stage",),
        "distance": ("start",),
        "first_jump": ("start",),
        "missed": ("start", "jump"),
        "path/beta": ("stage", "product"),
        "path/gradient": ("stage", "product"),
        "teacher": ("product",),
        "network/trained": ("record", "product"),
        "network/flow": ("record", "product"),
        **{f"gap/{name}": ("rate",) for name in gaps},
    }
    return Result(data, claims, dims)


def _first(path: GreedyPath, count: int) -> GreedyPath:
    """The path without the rows beyond its end."""
    return replace(
        path,
        **{name: getattr(path, name)[:count] for name in ("times", "order", "tied", "converged")},
        **{name: getattr(path, name)[: count + 1] for name in ("beta", "log_scale")},
    )


def _teacher(path: GreedyPath, teacher: np.ndarray, losses: np.ndarray) -> Claim:
    return Claim(
        "incremental.attention/teacher",
        "The greedy algorithm ends at the teacher, with every stage at a stationary point",
        "boixadsera2023, Algorithm 1 and section 5 (toy models)",
        "stated",
        [
            # Gradients count as zero at 1e-9 of the first one; the loss is flatter than 1e-3 nowhere.
            Check(
                "largest difference of a product to the teacher's",
                "at most",
                1e-6,
                np.max(np.abs(path.beta[-1] - teacher)),
            ),
            # The square of that, over a loss of order one.
            Check("loss at the end, over that at zero", "at most", 1e-12, losses[-1] / losses[0]),
            Check("whether no product is left that would become active", "equals", 1.0, float(path.complete)),
            all_of("stages that reach a stationary point", path.converged),
            all_of("stages that one product enters", ~np.asarray(path.tied)),
        ],
    )


def _limit(distance: np.ndarray) -> Claim:
    ratios = distance[1:] / distance[:-1]
    return Claim(
        "incremental.attention/limit",
        "As alpha goes to zero the flow in rescaled time tends to the staircase; the distance halves where "
        "alpha is squared",
        "boixadsera2023, Theorem 4.5 (the rate is derived here)",
        "stated",
        [
            # One half up to the next order in 1 / log(1/alpha), which is large at alpha = 0.1; a distance
            # that does not fall has ratio 1, and one that falls like a power of alpha a ratio near 0.
            Check("largest ratio of distances, alpha squared to alpha", "at most", 0.65, ratios.max()),
            Check("smallest", "at least", 0.4, ratios.min()),
        ],
    )


def _loss_falls(path: GreedyPath, losses: np.ndarray) -> Claim:
    active = np.asarray(path.beta) != 0
    return Claim(
        "incremental.attention/loss",
        "From stage to stage the loss falls, and at most one product becomes active",
        "boixadsera2023, Theorem 4.5 and Figure 6",
        "stated",
        [
            all_of("stages that lower the loss", np.diff(losses) < 0),
            all_of("stages with at most one new product", np.sum(active[1:] & ~active[:-1], axis=1) <= 1),
        ],
    )


def _value_first(path: GreedyPath, gradient: np.ndarray, dim: int) -> Claim:
    zero = np.ones(2 * dim)
    at_zero = np.asarray(time_until_active(zero, gradient[0]))
    after = np.asarray(time_until_active(zero, gradient[1]))
    return Claim(
        "incremental.attention/value-first",
        "W_V W_O^T comes first: while it is zero no entry of W_K W_Q^T has a gradient",
        "boixadsera2023, section 5, Figures 7 and 8 (derived here)",
        "stated",
        [
            # What is passed back to the logits is multiplied by vo, which is zero.
            Check("largest |g| of a kq at zero", "at most", 0.0, np.max(np.abs(gradient[0, :dim]))),
            all_of("entries of kq that would wait for ever at zero", np.isinf(at_zero[:dim])),
            all_of("entries of vo that would not", np.isfinite(at_zero[dim:])),
            all_of("entries of kq that would not after the first jump", np.isfinite(after[:dim])),
            Check("whether the first to enter is a vo", "equals", 1.0, float(path.order[0] >= dim)),
        ],
    )


def _already(
    path: GreedyPath, measured: _Measured, missed: np.ndarray, lams: np.ndarray, shown: int
) -> Claim:
    lam = lams[TRAINED]
    # The stages that the flows reach; the last of all has no end.
    length = np.diff(path.times)[:shown]
    return Claim(
        "incremental.attention/alpha-0.01",
        f"The dynamics are stagewise already at alpha = {np.exp(-lam):.2g}",
        "boixadsera2023, Appendix A, Figures 6 to 8 (the caption of its second version)",
        "qualified",
        [
            # Much less than the jump that leads there; the same for both.
            Check(
                "longest stage: how near the flow comes to its products, over its jump",
                "at most",
                0.15,
                missed[np.argmax(length)],
            ),
            # The next jump is under way before this one is done.
            Check("shortest stage: the same", "at least", 0.15, missed[np.argmin(length)]),
            # Logarithms of numbers of order one over log(1/alpha).
            Check(
                "first jump: relative error of its time",
                "at most",
                1 / lam,
                np.abs(measured.first_jump[TRAINED] / path.times[0] - 1),
            ),
            # It halves, or nearly so, with each squaring: the limit is far.
            Check(
                f"distance to the staircase over that at {np.exp(-lams[-1]):.0e}",
                "at least",
                0.65 ** -(len(lams) - 1 - TRAINED),
                measured.distance[TRAINED] / measured.distance[-1],
            ),
        ],
        condition="stages last long in units of 1 / log(1/alpha); short ones merge, and all are late",
    )


def _power(alpha: float) -> str:
    return f"α = $10^{{{np.log10(alpha):.3g}}}$"


def _entries(ax: Axes, saved: Saved, first: int, name: str) -> Axes:
    """The flow from the smallest start beside the staircase: the entries of one product matrix."""
    dim = saved.config["dim"]
    which = slice(first, first + dim)
    labels = ["flow, one colour per entry", *["_"] * (dim - 1)]
    ax = plotting.theory_and_trained(
        ax, saved["taus"], saved["stairs"][:, which], saved["flow"][-1][:, which], labels
    )
    ax.lines[dim].set_label("staircase")
    ax.set(xlabel=RESCALED, ylabel="entry of the diagonal", xlim=(0, _until(saved)))
    ax.set_title(f"{name}, {_power(saved['alphas'][-1])}")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.25 * (high - low))
    ax.legend(loc="upper right", ncols=2)
    return ax


def _until(saved: Saved) -> float:
    """A while after the last jump that is shown."""
    times = saved["path/times"][: saved.config["shown"]]
    return min(saved["taus"][-1], 1.3 * times[-1])


def figure(saved: Saved) -> Figure:
    """Loss and entries over rescaled time with the staircase; distance to it; the network on its flow."""
    drawn, ((loss, value, query), (distance, network, gap)) = plotting.new_figure(2, 3)
    config, alphas, times = saved.config, saved["alphas"], saved["path/times"]
    drawn.suptitle(
        f"A head with diagonal weights: {config['dim']} dimensions, {config['tokens']} tokens, "
        f"{config['samples']:,} samples. Greedy: {len(times)} stages, "
        f"{saved['seconds/per_stage']:.2g} s each, compiled in {saved['seconds/compiling']:.2g} s",
        fontsize=11,
    )
    for index, (alpha, one) in enumerate(zip(alphas, saved["loss/flow"], strict=True)):
        loss.plot(saved["loss/taus"], one, color=f"C{index}", label=_power(alpha), **plotting.TRAINED)
    loss.step([0, *times], saved["loss/stages"], where="post", label="staircase", **plotting.THEORY)
    small = np.flatnonzero(saved["loss/stages"][1:] < 0.01 * saved["loss/stages"][0])
    until = min(1.3 * times[small[0]], _until(saved)) if small.size else _until(saved)
    loss.set(xlabel=RESCALED, ylabel="loss (half the squared error)", xlim=(0, until))
    loss.set_title("Loss")
    loss.legend(loc="upper right")

    _entries(value, saved, config["dim"], "$W_V W_O^T$")
    _entries(query, saved, 0, "$W_K W_Q^T$")

    lams = saved["lams"]
    distance.loglog(lams, saved["distance"], "o", color="C0", label="flow")
    plotting.reference_slope(distance, lams[::-1], saved["distance"][::-1], -1, "slope −1")
    distance.set_xticks(lams, labels=[f"{lam:.3g}" for lam in lams])
    distance.set_xticks([], minor=True)
    distance.set(xlabel="log(1/α)", ylabel="∫ Σ |β − staircase| dτ")
    distance.set_title("Distance to the staircase")
    distance.legend(loc="upper right")

    products = 2 * config["dim"]
    labels = ["network, one colour per product", *["_"] * (products - 1)]
    at = (saved["network/taus"], saved["network/flow"], saved["network/trained"])
    plotting.theory_and_trained(network, *at, labels)
    network.lines[products].set_label("flow")
    low, high = network.get_ylim()
    network.set(xlabel=RESCALED, ylabel="product", ylim=(low, high + 0.25 * (high - low)))
    network.set_title(f"Trained, {_power(alphas[TRAINED])}, learning rate {saved['rates'].min():.1g}")
    network.legend(loc="upper left")

    gaps = {"to the flow": saved["gap/flow"], "gradient 2 % too large": saved["gap/wrong"]}
    plotting.gap_panel(gap, saved["rates"], gaps, "learning rate", "largest gap of a product")
    gap.set_xticks(saved["rates"], labels=[f"{rate:.2g}" for rate in saved["rates"]])
    gap.set_xticks([], minor=True)
    gap.set_title("Network and flow")
    return drawn
