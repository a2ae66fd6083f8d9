"""Perturbed stages: noise on the active weights decays, but for the part that a conservation law keeps.

The stationary points of the greedy path of an attention head with diagonal weights are perturbed on their
active coordinates, and gradient flow and gradient descent start there. The products u v return to the
stage. The weights do so where noise keeps |u| = |v|; otherwise u^2 - v^2 stays what it is, and they end
where it and the product say. With the coordinate that is next slightly active, the next stage is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import incremental
from dynamics.flow import Trajectory
from dynamics.incremental import GreedyPath, Products
from models.attention import AttentionHead, diagonal_head_loss, product_coordinates
from models.data.teachers import HeadTask, diagonal_teacher
from models.draws import normal
from models.functional import as_function
from models.losses import bind, total_squared_error
from models.training import Descent, map_lanes
from sims import plotting
from sims.claims import SOLVER, Claim, Preset, at_least, at_most, corrected, stated
from sims.compare import SOLVE, WRONG_FACTOR, first_order, lane, lane_gaps, largest, require_ok
from sims.ranges import Count, Length, check_ranges
from sims.results import Context, Saved

ENTRY = 0.05  # both factors of the coordinate that is next
RETURNED = 1e-3  # of the noise: what is left counts as none


class Kind(NamedTuple):
    """A way to perturb a stage: size of the noise, whether |u| = |v| stays, whether the next one enters."""

    sd: float
    balanced: bool
    enters: bool


KINDS = {
    "balanced": Kind(0.05, True, False),
    "balanced, large": Kind(0.2, True, False),
    "any": Kind(0.05, False, False),
    "any, large": Kind(0.2, False, False),
    "balanced, next enters": Kind(0.05, True, True),
    "any, next enters": Kind(0.05, False, True),
}


@dataclass(frozen=True)
class Config:
    """Task, stages, and training."""

    samples: Count = 100
    """Samples N."""
    tokens: Count = 6
    """Tokens n of a sample, standard Gaussian."""
    dim: Count = 4
    """Dimension d; there are 2 d products."""
    stages: Annotated[tuple[Count, ...], Length(1)] = (2, 4, 6)
    """Stages that are perturbed, counted from 1."""
    draws: Count = 1
    """Draws of the noise, each used for all ways to perturb."""
    descent: Descent = Descent(horizon=50.0, points=100, substeps=(15, 30, 60))
    """Gradient descent until all has relaxed; the substeps double from one to the next."""

    def __post_init__(self):
        check_ranges(self)
        substeps = self.descent.substeps
        if any(2 * few != many for few, many in pairwise(substeps)):
            raise ValueError(f"substeps must double from one to the next, got {substeps}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(
        samples=60, tokens=4, dim=3, stages=(1, 3), descent=Descent(20.0, points=40, substeps=(8, 16, 32))
    ),
    "standard": Config(),
    "paper": Config(
        samples=1000,
        tokens=10,
        dim=12,
        stages=(2, 6, 10, 14, 18),
        draws=2,
        descent=Descent(horizon=100.0, points=200, substeps=(30, 60, 120)),
    ),
}


def _greedy_path(g: Partial, config: Config) -> GreedyPath:
    """The greedy path to the stage after the last one that is perturbed."""
    last = max(config.stages)
    path = jax.device_get(incremental.greedy(g, 2 * config.dim, max_stages=last + 1))
    found = np.count_nonzero(np.isfinite(path.times))
    if found <= last:
        raise ValueError(f"stages must be less than {found}, which there are, got {config.stages}")
    return path


@jax.jit
def _hessians(g: Partial, beta: Array) -> Array:
    """Hessians of the loss in u at stationary points (S, p), where v = sign(beta) u: (S, p, p)."""

    def at(beta):
        slope = 2 * jnp.sign(beta) * jnp.sqrt(jnp.abs(beta))
        return -slope[:, None] * jax.jacfwd(g)(beta) * slope[None]

    return jax.vmap(at)(beta)


def _least_curvatures(g: Partial, beta: Any) -> list[float]:
    """The least eigenvalue of each Hessian on the active coordinates, at stationary points (S, p)."""
    pairs = zip(np.asarray(_hessians(g, beta)), beta != 0, strict=True)
    return [np.linalg.eigvalsh(hessian[np.ix_(active, active)])[0] for hessian, active in pairs]


def _starts(key: Array, path: GreedyPath, config: Config) -> tuple[Products, np.ndarray]:
    """Perturbed factors, (kind, draw, stage, p) each, and the products that they should end at, alike."""
    stages = np.array(config.stages)
    before, after = path.beta[stages], path.beta[stages + 1]
    noise = np.asarray(normal(key, (2, config.draws, *before.shape), before.dtype))
    noise = np.where(before != 0, noise, 0)  # inactive weights stay zero
    u, sign = np.sqrt(np.abs(before)), np.sign(before)
    entry = np.where(path.order[stages][:, None] == np.arange(before.shape[1]), ENTRY, 0)
    sign_of_entry = np.sign(1 - path.log_scale[stages + 1])

    def start(kind):
        near_u = u + kind.sd * noise[0]
        near_v = sign * near_u if kind.balanced else sign * u + kind.sd * noise[1]
        return Products(near_u + kind.enters * entry, near_v + sign_of_entry * kind.enters * entry)

    starts = jax.tree.map(lambda *leaves: np.stack(leaves), *map(start, KINDS.values()))
    targets = [after if kind.enters else before for kind in KINDS.values()]
    return starts, np.broadcast_to(np.stack(targets)[:, None], starts.u.shape)


def _ends(start: Products, beta: np.ndarray) -> Products:
    r"""Where factors end that keep u^2 - v^2 and the signs of u + v and u - v, the product being beta.

    With c = u^2 - v^2 and r = sqrt(c^2 + 4 beta^2), which is u^2 + v^2, they have (u + v)^2 = r + 2 beta and
    (u - v)^2 = r - 2 beta.
    """
    u, v = start
    total = np.hypot((u - v) * (u + v), 2 * beta)
    w = np.sign(u + v) * np.sqrt(np.maximum(total + 2 * beta, 0))
    z = np.sign(u - v) * np.sqrt(np.maximum(total - 2 * beta, 0))
    return Products((w + z) / 2, (w - z) / 2)


@jax.jit
def _flow(g: Partial, starts: Products, ts: Array) -> Trajectory:
    """Factors (L, T, p) along the flow from all starts (L, p)."""
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11, **SOLVE}
    # One after the other, which compiles more quickly than all side by side.
    return map_lanes(
        lambda start: incremental.raw_flow(g, start.u, start.v, ts, **options), starts, at_once=1
    )


def _flows(g: Partial, starts: Products, ts: Any) -> dict[str, Trajectory]:
    """Factors (T, L, p) along the flow, and where the gradient is too large: time that runs too fast."""
    clocks = {"right": ts, "wrong": WRONG_FACTOR * ts}
    marks = np.unique(np.concatenate(list(clocks.values())))
    paths = jax.device_get(_flow(g, starts, marks))
    require_ok("the flow of the factors", paths)
    return {name: _at(paths, np.searchsorted(marks, clock), ts) for name, clock in clocks.items()}


def _at(paths: Trajectory, index: np.ndarray, ts: np.ndarray) -> Trajectory:
    """Some times of a batch of trajectories, all of them side by side: leaves (T, L, ...)."""
    ys = jax.tree.map(lambda leaf: np.swapaxes(leaf[:, index], 0, 1), paths.ys)
    return Trajectory(ts, ys, np.all(paths.ok))


def _train(task: HeadTask, starts: Products, descent: Descent) -> Trajectory:
    """Factors (rate, T, L, p) along gradient descent on the weights of heads with these factors."""
    u, v = (leaf.reshape(len(leaf), 2, -1) for leaf in starts)
    weights = (u[:, 0], v[:, 0], u[:, 1], v[:, 1])  # key, query, value, output
    predict, params = jax.vmap(lambda *weights: as_function(AttentionHead(*weights)))(*weights)
    loss = bind(total_squared_error, (jnp.ones(len(u)), (predict, task.X, task.Y)))
    _, path = descent.train(loss, params, observe=jax.vmap(product_coordinates))
    return jax.device_get(Trajectory(path.ts, Products(*path.ys), path.ok))


def _products(path: Trajectory) -> Trajectory:
    return Trajectory(path.ts, path.ys.u * path.ys.v, path.ok)


def _distances(weights: Products, goal: np.ndarray) -> dict[str, np.ndarray]:
    """Largest distances of a product, and of a factor's magnitude, to the goal; without the last axis."""
    root = np.sqrt(np.abs(goal))
    u, v = (np.abs(np.abs(factor) - root) for factor in weights)
    product = np.abs(weights.u * weights.v - goal)
    return {"product": np.max(product, axis=-1), "factor": np.max(np.maximum(u, v), axis=-1)}


def run(config: Config, context: Context) -> dict:
    """Follow the greedy path, perturb its stages, and relax with gradient flow and gradient descent."""
    key = jax.random.key(context.seed)
    task = diagonal_teacher(key, config.samples, config.tokens, config.dim)
    g = incremental.negative_gradient(diagonal_head_loss, task.X, task.Y)
    context.progress("following the greedy path", 0.0)
    path = _greedy_path(g, config)
    start, goal = _starts(jax.random.fold_in(key, 1), path, config)
    starts = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), start)

    context.progress("relaxing by gradient descent", 0.4)
    trained = _train(task, starts, config.descent)
    context.progress("relaxing by gradient flow", 0.7)
    flows = _flows(g, starts, trained.ts[0])

    context.progress("measuring", 0.9)

    def unfold(path):
        """Factors (T, kind, draw, stage, p)."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *goal.shape), path.ys)

    flow = unfold(flows["right"])
    fine, coarse = (unfold(lane(trained, rate)) for rate in np.argsort(config.descent.rates)[:2])
    conserved = (flow.u - flow.v) * (flow.u + flow.v)
    silent = (start.u == 0) & (start.v == 0)
    reached = {
        "predicted": _ends(start, goal),
        "flow": jax.tree.map(lambda leaf: leaf[-1], flow),
        "trained": jax.tree.map(lambda leaf: leaf[-1], fine),
        # The error is of first order in the learning rate, which halves.
        "limit": jax.tree.map(lambda half, whole: (2 * half - whole)[-1], fine, coarse),
    }
    gaps = {name: lane_gaps(_products(path), _products(trained)) for name, path in flows.items()}
    return {
        "time": ("time", config.descent.times),
        "rate": ("rate", config.descent.rates),
        "kind": ("kind", np.array(list(KINDS))),
        "stage": ("stage", np.array(config.stages)),
        "gap": ("rate", gaps),
        "distance/flow": ("time kind draw stage", _distances(flow, goal)),
        "distance/trained": ("time kind draw stage", _distances(fine, goal)),
        "reached": ("kind draw stage product", reached),
        "goal": ("kind draw stage product", goal),
        "least_curvature": ("visited", _least_curvatures(g, path.beta[1:])),
        "silent": max(largest(leaf[:, silent]) for leaf in fine),
        "drift": largest(conserved - conserved[:1]),
    }


def _left(distance: np.ndarray, *, balanced: bool | None = None, enters: bool = False) -> np.ndarray:
    """Distance at the end over the size of the noise, for some of the ways to perturb."""
    ends = {kind: end / kind.sd for kind, end in zip(KINDS.values(), distance[-1], strict=True)}
    wanted = (True, False) if balanced is None else (balanced,)
    return np.stack([end for kind, end in ends.items() if kind.enters == enters and kind.balanced in wanted])


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Products return, factors end where the conservation law says, and the next stage is reached."""
    left = {name: _left(saved[f"distance/{name}/product"]).max() for name in ("flow", "trained")}
    least, silent, gone = saved["least_curvature"].min(), saved["silent"], "all but a thousandth is gone"
    yield stated(
        "product-returns",
        "Stationary points of the stages are strict local minima on their active coordinates: from noise on "
        "these the products u v return",
        "boixadsera2023, Assumption 4.3 and Figure 9",
        at_least(
            "smallest eigenvalue of the Hessian there, all stages", least, 1e-6, why="stages known to 1e-9"
        ),
        at_most("flow: largest distance at the end over the noise", left["flow"], RETURNED, why=gone),
        at_most("network: the same", left["trained"], RETURNED, why=gone),
        at_most("network: largest weight that was not active", silent, 0, why="two zeros have no gradient"),
    )
    yield _factors(saved)
    yield stated(
        "next-stage",
        "With noise on the active coordinates and the next one slightly active, the next stage is reached",
        "boixadsera2023, Assumption 4.4 and Figure 10",
        *(
            at_most(
                f"{name}, noise {noise}: largest distance of a product to it over the noise",
                _left(saved[f"distance/{kind}/product"], balanced=balanced, enters=True).max(),
                RETURNED,
                why=gone,
            )
            for name, kind in (("flow", "flow"), ("network", "trained"))
            for noise, balanced in (("that keeps |u| = |v|", True), ("of any kind", False))
        ),
    )
    yield stated(
        "network",
        "Gradient descent relaxes as gradient flow does, at first order in the learning rate",
        "boixadsera2023, Figures 9 and 10 (gradient flow in theory, gradient descent in experiments)",
        *first_order(saved["rate"], saved["gap"]),
    )


def _factors(saved: Saved) -> Claim:
    flow, trained = (saved[f"distance/{name}/factor"] for name in ("flow", "trained"))
    balanced, other = (_left(trained, balanced=kind) for kind in (True, False))
    returns, off_by = _left(flow, balanced=True).max(), np.sqrt(np.mean(other**2))
    off = {
        name: largest([saved[f"reached/{name}/{x}"] - saved[f"reached/predicted/{x}"] for x in ("u", "v")])
        for name in ("flow", "limit")
    }
    printed = "printed: network, any noise: largest distance of a weight at the end over the noise"
    gone, rest = "all but a thousandth is gone", RETURNED * min(kind.sd for kind in KINDS.values())
    return corrected(
        "factors",
        "Perturbed weights return to where they were; corrected: to where u v is the stage's and u^2 - v^2 "
        "is still the perturbed one's",
        "boixadsera2023, Assumption 4.3 and Figure 9 (corrected by Lemma 4.1)",
        printed=[at_most(printed, max(balanced.max(), other.max()), RETURNED, why=gone)],
        mended=[
            at_most("flow, noise that keeps |u| = |v|: the same", returns, RETURNED, why=gone),
            at_most("network, noise that keeps |u| = |v|: the same", balanced.max(), RETURNED, why=gone),
            # To first order a weight ends off by half the difference of two numbers of this size.
            at_least("network, other noise: the same, root mean square", off_by, 0.1, why="half the noise"),
            at_most("flow: largest drift of u^2 - v^2", saved["drift"], 1e-6, why=SOLVER),
            at_most("flow: largest distance of a weight to the corrected end", off["flow"], rest, why=gone),
            # The drift is 1e-3 at first order in the learning rate.
            at_most("network, learning rate to zero: the same", off["limit"], 1e-4, why="its second order"),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Distances to the stage over time, balanced noise or not; to the next stage; where weights end."""
    drawn, ((balanced, other), (following, ends)) = plotting.new_figure(2, 2, width=5.0, height=3.5)
    _relaxing(balanced, saved, "balanced, large", "Noise that keeps |u| = |v|")
    _relaxing(other, saved, "any, large", "Noise of any kind: |u| and |v| stay apart")
    _relaxing(following, saved, "any, next enters", "Noise of any kind, the next one active")
    following.set_ylabel("largest distance to the next stage")

    for name, color in (("balanced, large", "C0"), ("any", "C2"), ("any, large", "C1")):
        kind, goal = KINDS[name], saved["goal"][saved["kind"] == name]
        predicted, trained = (
            np.stack([np.abs(saved[f"reached/{what}/{x}"][saved["kind"] == name]) for x in ("u", "v")])
            - np.sqrt(np.abs(goal))
            for what in ("predicted", "trained")
        )
        active = np.broadcast_to(goal != 0, trained.shape)
        label = f"{'|u| = |v| kept' if kind.balanced else 'any kind'}, sd {kind.sd:g}"
        ends.plot(predicted[active], trained[active], "o", ms=5, alpha=0.7, color=color, label=label)
    low, high = ends.get_xlim()
    ends.plot([low, high], [low, high], label="equal", **plotting.THEORY)
    ends.set(xlabel="predicted from u² − v² and the stage", ylabel="network")
    ends.set_title("Where |u| and |v| end, minus those of the stage")
    ends.legend(loc="upper left", fontsize=8)
    return drawn


def _relaxing(ax: Axes, saved: Saved, name: str, title: str) -> Axes:
    """Distances over time of the first draw from every stage."""
    ts, sd, kind = saved["time"], KINDS[name].sd, list(saved["kind"]).index(name)
    for index, stage in enumerate(saved["stage"]):
        for what, line in (("product", "-"), ("factor", ":")):
            trained = saved[f"distance/trained/{what}"][:, kind, 0, index]
            ax.plot(ts, trained, line, color=f"C{index}", **plotting.TRAINED)
        ax.plot(ts, saved["distance/flow/product"][:, kind, 0, index], **plotting.THEORY)
        ax.plot([], [], color=f"C{index}", label=f"stage {stage}", **plotting.TRAINED)
    ax.plot([], [], "-", color="0.4", label="products u v", **plotting.TRAINED)
    ax.plot([], [], ":", color="0.4", label="weights |u|, |v|", **plotting.TRAINED)
    ax.plot([], [], label="gradient flow", **plotting.THEORY)
    ax.axhline(RETURNED * sd, label="noise / 1000", **plotting.PRINTED)
    ax.set(yscale="log", ylim=(1e-8, 1e3), xlabel="time = learning rate × step")
    ax.set_ylabel("largest distance to the stage")
    ax.set_title(f"{title}, sd {sd:g}")
    ax.legend(loc="upper right", ncols=2, fontsize=7.5)
    return ax
