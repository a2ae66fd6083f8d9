"""Several hidden nodes: the stable rank of V and of V' on the way to the blow-up, in theory and in a network.

From zero start every row of V keeps the direction of its row of Delta, and the row with the largest |Delta|
blows up. V' collapses to that row long before V, which only follows in the logarithm of the time left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import erfinv

from dynamics import joma
from dynamics.flow import Trajectory
from dynamics.spectra import stable_rank
from models.attention import JomaBlock, JomaInputs, joma_observer
from models.draws import normal
from models.functional import as_function
from models.losses import bind, upstream_product
from models.training import Descent
from sims import plotting
from sims.claims import SOLVER, Claim, Preset, at_least, at_most, equals, every, qualified, slope, stated
from sims.compare import SOLVE, WRONG_FACTOR, convergence_order, lane, lane_gaps, largest, percent, require_ok
from sims.ranges import Count, Length, Range
from sims.results import Context, Saved

TOKENS, HIDDEN = 20, 8
HORIZON = 0.9  # of the blow-up time, where training ends
SIZES = (10.0, 30.0, 100.0)  # of the winning row, where 1 - t / t* can no longer be told from zero
OFF = f"{percent(WRONG_FACTOR)} off"


@dataclass(frozen=True)
class Config:
    """Gaussian matrices Delta of 20 tokens and 8 hidden nodes; training is with the first."""

    seeds: Annotated[int, Range(at_least=2)] = 64
    """Matrices Delta."""
    samples: Annotated[int, Range(at_least=TOKENS)] = 100
    """Contexts S of the network."""
    points: Count = 18
    """Records along training, which ends at 0.9 of the blow-up time."""
    substeps: Annotated[tuple[Count, ...], Length(2)] = (3, 10, 30, 100, 300)
    """Steps between two records, one per learning rate."""


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), seeds=1000, samples=400, substeps=(3, 10, 30, 100, 300, 1000)),
    "paper": replace(Config(), seeds=10_000, samples=400, substeps=(3, 10, 30, 100, 300, 1000, 3000)),
}


def _outsider() -> Array:
    """A Delta whose winner stands alone: all other tokens share a direction at a right angle to its row."""
    delta = jnp.zeros((TOKENS, HIDDEN)).at[:, 0].set(1.0)
    return delta.at[0].set(2.0 * jax.nn.one_hot(1, HIDDEN, dtype=delta.dtype))


@partial(jax.jit, static_argnames="config")
def _draw(key: Array, config: Config):
    """Gaussian Deltas; data, parameters and coordinates of the network whose saliency is the first one."""
    key_delta, key_x, key_block = jax.random.split(key, 3)
    deltas = normal(key_delta, (config.seeds, TOKENS, HIDDEN))
    x = jax.random.exponential(key_x, (config.samples, TOKENS))
    x = x / jnp.sum(x, axis=1, keepdims=True)
    gradient = config.samples * jnp.linalg.pinv(x).T @ deltas[0]  # its saliency is that Delta
    block = JomaBlock.standard(key_block, TOKENS, HIDDEN, kind="exp", scale=0.0, activation=jax.nn.identity)
    predict, params = as_function(block)
    inputs = JomaInputs(x, jnp.zeros(config.samples, int))
    return deltas, (predict, inputs, gradient), params, joma_observer(block)


def _follow(delta: Array, sizes: Array, progress: Array) -> tuple[Trajectory, dict, dict]:
    """A flow at sizes of its winning row: itself, stable ranks, and gaps to its closed form over progress."""
    # The winning row grows at unit rate in tau / |Delta|.
    taus = sizes / jnp.max(jnp.linalg.norm(delta, axis=1))
    path = joma.rescaled_mlp_flow(jnp.zeros_like(delta), delta, taus, rtol=1e-11, atol=1e-13, **SOLVE)
    V, t = path.ys
    exponent = jnp.sum(V**2, axis=-1) / 2
    growth = jnp.exp(exponent - jnp.max(exponent, axis=1, keepdims=True))
    ranks = {"V": stable_rank(V), "dV": stable_rank(growth[..., None] * delta[None])}
    blow_up = joma.blow_up_time(delta)
    closed = joma.modified_mlp_solution(blow_up * progress, delta)
    gaps = {
        "V": jnp.max(jnp.abs(V[: progress.size] - closed), axis=(1, 2)),
        "time": jnp.abs(t[: progress.size] / blow_up - progress),
    }
    return path, ranks, gaps


@jax.jit
def _flows(deltas: Array, sizes: Array, progress: Array) -> tuple[Trajectory, dict, dict, dict]:
    """The first flow; ranks of the Gaussian flows and of the outsider's from the second size on; all gaps."""
    every = jnp.concatenate([deltas, _outsider()[None]])
    paths, ranks, gaps = jax.vmap(partial(_follow, sizes=sizes, progress=progress))(every)
    first = Trajectory(paths.ts[0], paths.ys.V[0], jnp.all(paths.ok))
    gaussian, outsider = (jax.tree.map(lambda leaf, i=i: leaf[i, ..., 1:], ranks) for i in (slice(-1), -1))
    return first, gaussian, outsider, gaps


@jax.jit
def _network_ranks(path: Any, x: Array, gradient: Array) -> dict[str, Array]:
    """Stable ranks along training; V' = E[g b] is the saliency of what attention lets through."""
    field = jax.vmap(lambda z: joma.saliency(gradient, joma.attend(z, x, "exp")))(path.z[:, 0])
    return {"V": stable_rank(path.V)[1:], "dV": stable_rank(field)[1:]}  # V is zero at the first record


def _cosine_of_the_winner(deltas: np.ndarray) -> np.ndarray:
    """Cosine of the largest row of each Delta to its leading direction."""
    winner = np.argmax(np.linalg.norm(deltas, axis=2), axis=1)
    rows = np.take_along_axis(deltas, winner[:, None, None], axis=1)[:, 0]
    leading = np.linalg.svd(deltas, full_matrices=False)[2][:, 0]
    return np.abs(np.sum(rows * leading, axis=1)) / np.linalg.norm(rows, axis=1)


def run(config: Config, context: Context) -> dict:
    """Follow the flow of every Delta through its blow-up, and train a network with the first."""
    deltas, data, params, observe = _draw(jax.random.key(context.seed), config)
    # Shares of the blow-up time; the first are those of the network's records.
    left = np.geomspace(1 - HORIZON, 1e-8, 29)[1:]
    progress = np.append(np.linspace(0.0, HORIZON, config.points + 1), 1 - left)
    sizes = np.array([*np.sqrt(2) * erfinv(progress), *SIZES])
    context.progress("following the flows", 0.0)
    first, gaussian, outsider, gaps = jax.device_get(_flows(deltas, sizes, progress))
    require_ok("a flow through its blow-up", first)

    context.progress("training at every learning rate", 0.4)
    descent = Descent(HORIZON * float(joma.blow_up_time(deltas[0])), config.points, config.substeps)
    ts = descent.times
    _, trained = descent.train(bind(upstream_product, data), params, observe=observe)
    trained = jax.device_get(trained)
    V = Trajectory(trained.ts, trained.ys.V, trained.ok)
    wrong = joma.modified_mlp_solution(ts, WRONG_FACTOR * deltas[0])
    theories = {"right": first.ys[: len(ts)], "wrong": np.asarray(wrong)}
    finest = lane(trained, int(np.argmin(descent.rates))).ys
    return {
        "size": ("size", sizes[1:]),
        "left": ("left", 1 - progress[1:]),
        "gaussian": ("delta size", gaussian),
        "cosine": ("delta", _cosine_of_the_winner(np.asarray(deltas))),
        "outsider": ("size", outsider),
        "closed_gap": {
            "V": largest(gaps["V"][:, progress <= 0.9999 + 1e-9]),
            "time": largest(gaps["time"]),
        },
        "time": ("time", ts[1:]),
        "network": ("time", _network_ranks(finest, data[1].x, data[2])),
        "rate": ("rate", descent.rates),
        "gap": ("rate", {name: lane_gaps(Trajectory(ts, v, True), V) for name, v in theories.items()}),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The ranks near the blow-up and on the way to it, the closed form, and the network."""
    yield _low_rank(saved)
    yield _monotone(saved)
    grown = f"{SOLVER}, grown 2000-fold at 0.9999 of the blow-up time"
    yield stated(
        "zero-start",
        "From zero start row l of V keeps its direction and has norm sqrt 2 erfinv(sqrt(2/pi) |Delta_l| t)",
        "tian2024joma, section 4 (derived here for several hidden nodes)",
        at_most("largest gap of the flow to it, to 0.9999 t*", saved["closed_gap/V"], 1e-6, why=grown),
        # The sizes of the winning row were chosen for these times.
        at_most("largest gap of t / t* to its own closed form", saved["closed_gap/time"], 1e-9, why=SOLVER),
    )
    order = {name: convergence_order(saved["rate"], gap).slope for name, gap in saved["gap"].items()}
    ranks, count = saved["network"], config.points
    off = max(largest(ranks[name] - saved[f"gaussian/{name}"][0, :count]) for name in ranks)
    second = "the second order bends the line by a few percent"
    first = "first order in the smallest rate, of some 5000 steps"
    yield stated(
        "network",
        "Gradient descent on attention and several hidden nodes follows the modified MLP",
        "tian2024joma, Theorem 2 and its extension to several hidden nodes",
        slope("order of the gap of V in the learning rate", order["right"], 1, 0.05, why=second),
        at_most(f"order with Delta {OFF}", order["wrong"], 0.6, why="a gap that does not close has order 0"),
        at_most("largest difference of a stable rank to the flow's, to 0.9 t*", off, 5e-3, why=first),
    )


def _low_rank(saved: Saved) -> Claim:
    V, dV, sizes = saved["gaussian/V"], saved["gaussian/dV"], saved["size"]
    late = sizes >= min(SIZES)
    order = convergence_order(sizes[late] ** 2, np.median(V, axis=0)[late] - 1).slope
    at_99, at_end = (int(np.argmin(np.abs(np.log(saved["left"] / share)))) for share in (1e-2, 1e-6))
    dV_99, dV_end, V_end = (np.median(ranks) for ranks in (dV[:, at_99], dV[:, at_end], V[:, at_end]))
    close = "a runner-up as close as 1 % still counts"
    row = "the winner's row is 4.9, the others' limits are around 1"
    root = "the others' limits stay, the winner's row is a root"
    rows = "19 rows near 1 beside one of 100, and a runner-up"
    return qualified(
        "low-rank",
        "V gradually becomes low rank, and its gradient V' even more so",
        "tian2024joma, section 4 (several hidden nodes)",
        condition="the blow-up is near: V' in the time left, V itself only in its logarithm",
        inside=[
            at_most("median sr(V') at 0.99 t*", dV_99, 1.3, why="a tenth of the matrices lies above"),
            every("matrices with sr(V') < sr(V) there", dV[:, at_99] < V[:, at_99]),
            at_most("median sr(V') with 1e-6 of the time left", dV_end, 1.001, why=close),
            slope("order of sr(V) - 1 in |winning row|^2, from 10^2 to 100^2", order, -1, 0.02, why=root),
            at_most("largest sr(V) when the winner passes 100", V[:, -1].max(), 1.02, why=rows),
        ],
        outside=[at_least("median sr(V) with 1e-6 of the time left", V_end, 1.5, why=row)],
    )


def _monotone(saved: Saved) -> Claim:
    times = len(saved["left"])
    V, dV, V_out, dV_out = (saved[f"{of}/{name}"] for of in ("gaussian", "outsider") for name in ("V", "dV"))
    V, dV, V_out, dV_out = V[:, :times], dV[:, :times], V_out[:times], dV_out[:times]
    along = saved["cosine"] >= 0.8
    falling = np.all(np.diff(V, axis=1) <= 1e-9, axis=1)[along]
    below = np.all(dV <= V + 1e-9, axis=1)[along]
    few, why = max(1, 0.02 * along.sum()), "a cosine of 1 allows none, of 0.8 one in hundreds"
    even, rise = "2 where the two directions are even", (dV_out - V_out).max()
    return qualified(
        "monotone",
        "The stable rank of V falls all the way, and that of V' is never above it",
        "tian2024joma, section 4 (several hidden nodes)",
        condition="the winner lies along Delta's leading direction (for nearly all with a cosine >= 0.8)",
        inside=[
            every("Gaussian matrices with cosine >= 0.8 where sr(V) falls", falling, few, why=why),
            every("and sr(V') <= sr(V) at all times", below, few, why=why),
        ],
        outside=[
            at_least("winner at a right angle: largest sr(V)", V_out.max(), 1.9, why=even),
            equals("the same: sr(V) at the start", V_out[0], 1 + 4 / 19, 0.01, why="a 2 beside 19 of 1"),
            at_least("the same: largest sr(V') - sr(V)", rise, 0.1, why="V' is there first"),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Stable ranks over the time left and over the size of the winning row, and the network's gap."""
    drawn, ((ranks, sizes, gap),) = plotting.new_figure(1, 3, width=4.4, height=3.8)
    _draw_ranks(ranks, saved)

    exponent, V, left = saved["size"] ** 2 / 2, saved["gaussian/V"] - 1, saved["left"]
    sizes.loglog(exponent, V[:24].T, color="C0", linewidth=0.5, alpha=0.35)
    median, end = np.median(V, axis=0), exponent[len(left) - 1]
    sizes.loglog(exponent, median, color="C0", label="median", **plotting.TRAINED)
    late = exponent > 20
    law = median[-1] * exponent[-1] / exponent[late]
    sizes.plot(exponent[late], law, label="slope −1", **plotting.THEORY)
    sizes.axvline(end, color="0.6", linewidth=0.8)
    place = {"ha": "right", "fontsize": 8, "transform": sizes.get_xaxis_transform()}
    sizes.text(end, 0.02, f"{left[-1]:.0e} of t* left ", **place)
    sizes.set(xlabel="½ |winning row|² ≈ ln(1 / time left)", ylabel="sr(V) − 1")
    sizes.set_title("Through the blow-up, in rescaled time")
    sizes.legend(loc="upper right")

    rising = np.argsort(saved["rate"])
    gaps = {"flow": saved["gap/right"][rising], f"Δ {OFF}": saved["gap/wrong"][rising]}
    plotting.gap_panel(gap, saved["rate"][rising], gaps, "learning rate", "largest gap of V")
    gap.set_title("Gap of the network to the flow")
    return drawn


def _draw_ranks(ax: Axes, saved: Saved) -> None:
    left, count = saved["left"], len(saved["left"])
    names = {"V": ("sr(V)", "C0"), "dV": ("sr(V')", "C1")}
    for name, (label, color) in names.items():
        values, points = saved[f"gaussian/{name}"][:, :count], saved[f"network/{name}"][::3]
        outsider: Any = {
            "color": color,
            "linestyle": "--",
            "linewidth": 1,
            "label": f"{label}, outsider wins",
        }
        ax.plot(left, values[:24].T, color=color, linewidth=0.5, alpha=0.35)
        ax.plot(left, np.median(values, axis=0), color=color, label=f"{label}, median", **plotting.TRAINED)
        ax.plot(left, saved[f"outsider/{name}"][:count], **outsider)
        ax.plot(left[: 3 * len(points) : 3], points, "o", color=color, mfc="white", label=f"{label}, network")
    for name in names:
        ax.plot(left, saved[f"gaussian/{name}"][0, :count], **plotting.THEORY)
    ax.plot([], [], label="flow of the network", **plotting.THEORY)
    ax.set(xscale="log", xlabel="1 − t / t*, t* the blow-up time", ylabel="stable rank")
    ax.invert_xaxis()
    ax.set_ylim(0.9, ax.get_ylim()[1] * 1.25)
    ax.set_title("V' collapses long before V")
    ax.legend(loc="upper center", ncols=2, fontsize=6.5)
