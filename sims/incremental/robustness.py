"""Perturbed stages: noise on the active weights decays, but for the part that a conservation law keeps.

The stationary points of the greedy path of an attention head with diagonal weights are perturbed on their
active coordinates, and gradient flow and gradient descent start there. The products u v return to the
stage. The weights do so where noise keeps |u| = |v|; otherwise u^2 - v^2 stays what it is, and they end
where it and the product say. With the coordinate that is next slightly active, the next stage is reached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
from models.attention import AttentionHead, diagonal_head, product_coordinates, split_products
from models.data.teachers import diagonal_teacher
from models.functional import as_function
from models.losses import bind, mean_squared_error
from models.training import train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import WRONG_FACTOR, first_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

ENTRY = 0.05  # both factors of the coordinate that is next
RETURNED = 1e-3  # of the noise: what is left counts as none


class Factors(NamedTuple):
    """Weights whose products count, as NumPy arrays (..., p)."""

    u: np.ndarray
    v: np.ndarray


class Kind(NamedTuple):
    """A way to perturb a stage: size of the noise, whether |u| = |v| stays, whether the next one enters."""

    sd: float
    balanced: bool
    enters: bool


KINDS = (
    Kind(0.05, True, False),
    Kind(0.2, True, False),
    Kind(0.05, False, False),
    Kind(0.2, False, False),
    Kind(0.05, True, True),
    Kind(0.05, False, True),
)


@dataclass(frozen=True)
class Config:
    """Task, stages, and training."""

    samples: int = 100
    """Samples N."""
    tokens: int = 6
    """Tokens n of a sample, standard Gaussian."""
    dim: int = 4
    """Dimension d; there are 2 d products."""
    stages: tuple[int, ...] = (2, 4, 6)
    """Stages that are perturbed, counted from 1."""
    draws: int = 1
    """Draws of the noise, each used for all ways to perturb."""
    horizon: float = 50.0
    """Time to relax."""
    points: int = 100
    """Records along a run."""
    substeps: tuple[int, ...] = (15, 30, 60)
    """Steps between two records, one per learning rate; each twice the one before."""

    def __post_init__(self):
        require_sweeps(self, "substeps")
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages must be at least one, all from 1 on, got {self.stages}")
        if any(2 * few != many for few, many in zip(self.substeps, self.substeps[1:], strict=False)):
            raise ValueError(f"substeps must double from one to the next, got {self.substeps}")


PRESETS: dict[Preset, Config] = {
    "quick": replace(
        Config(),
        samples=60,
        tokens=4,
        dim=3,
        stages=(1, 3),
        horizon=20.0,
        points=40,
        substeps=(8, 16, 32),
    ),
    "standard": Config(),
    "paper": replace(
        Config(),
        samples=1000,
        tokens=10,
        dim=12,
        stages=(2, 6, 10, 14, 18),
        draws=2,
        horizon=100.0,
        points=200,
        substeps=(30, 60, 120),
    ),
}


def _head(beta: Array, X: Array) -> Array:
    KQ, VO = split_products(beta, X.shape[-1])
    return diagonal_head(KQ[0, 0], VO[0, 0], X)


def _loss(beta: Array, X: Array, Y: Array) -> Array:
    """Loss of the products (p,)."""
    return mean_squared_error(beta, (_head, X, Y))


def _total_loss(params: Any, data: Any) -> Array:
    """Sum of the losses of many networks (L, ...): each trains as it would alone."""
    return jnp.sum(jax.vmap(lambda params: mean_squared_error(params, data))(params))


@jax.jit
def _curvature(neg_gradient: Partial, beta: Array) -> Array:
    """Hessians of the loss in u at stationary points (S, p), where v = sign(beta) u: (S, p, p)."""

    def at(beta):
        slope = 2 * jnp.sign(beta) * jnp.sqrt(jnp.abs(beta))
        return -slope[:, None] * jax.jacfwd(neg_gradient)(beta) * slope[None]

    return jax.vmap(at)(beta)


def _starts(key: Array, path: GreedyPath, config: Config) -> tuple[Factors, np.ndarray]:
    """Perturbed factors, (kind, draw, stage, p) each, and the products that they should end at, alike."""
    stages = np.array(config.stages)
    beta, order, log_scale = path.beta, path.order, path.log_scale
    before, after = beta[stages], beta[stages + 1]
    noise = np.asarray(jax.random.normal(key, (2, config.draws, *before.shape), before.dtype))
    noise = np.where(before != 0, noise, 0)  # inactive weights stay zero
    u, sign = np.sqrt(np.abs(before)), np.sign(before)
    entry = np.where(order[stages][:, None] == np.arange(before.shape[1]), ENTRY, 0)
    sign_of_entry = np.sign(1 - log_scale[stages + 1])

    def start(kind):
        near_u = u + kind.sd * noise[0]
        near_v = sign * near_u if kind.balanced else sign * u + kind.sd * noise[1]
        enters = kind.enters * entry
        return near_u + enters, near_v + sign_of_entry * enters

    starts = Factors(*map(np.stack, zip(*map(start, KINDS), strict=True)))
    targets = [np.broadcast_to(after if kind.enters else before, starts.u.shape[1:]) for kind in KINDS]
    return starts, np.stack(targets)


@jax.jit
def predicted_factors(start: Products, beta: Array) -> Products:
    r"""Where factors end that keep u^2 - v^2 and the signs of u + v and u - v, the product being beta.

    With c = u^2 - v^2 and r = sqrt(c^2 + 4 beta^2), which is u^2 + v^2, they have (u + v)^2 = r + 2 beta and
    (u - v)^2 = r - 2 beta.
    """
    total = jnp.hypot(incremental.conserved_quantity(start.u, start.v), 2 * beta)
    w = jnp.sign(start.u + start.v) * jnp.sqrt(jnp.maximum(total + 2 * beta, 0))
    z = jnp.sign(start.u - start.v) * jnp.sqrt(jnp.maximum(total - 2 * beta, 0))
    return Products((w + z) / 2, (w - z) / 2)


def run(config: Config, context: Context) -> Result:
    """Follow the greedy path, perturb its stages, and relax with gradient flow and gradient descent."""
    key = jax.random.key(context.seed)
    task = diagonal_teacher(key, config.samples, config.tokens, config.dim)
    neg_gradient = incremental.negative_gradient(_loss, task.X, task.Y)

    context.progress("following the greedy path", 0.0)
    last = max(config.stages)
    path = incremental.greedy(neg_gradient, 2 * config.dim, max_stages=last + 1)
    path = jax.tree.map(np.asarray, path)
    found = int(np.sum(np.isfinite(path.times)))
    if found <= last:
        raise ValueError(f"stages must be less than {found}, which there are, got {config.stages}")
    hessians = np.asarray(_curvature(neg_gradient, path.beta[1:]))
    active = path.beta[1:] != 0
    least = np.array(
        [np.linalg.eigvalsh(H[np.ix_(on, on)])[0] for H, on in zip(hessians, active, strict=True)]
    )
    start, target = _starts(jax.random.fold_in(key, 1), path, config)
    shape = target.shape
    lanes = Products(*(jnp.asarray(leaf.reshape(-1, shape[-1])) for leaf in start))

    context.progress("relaxing by gradient descent", 0.4)
    split = [np.asarray(part).reshape(-1, 2, config.dim) for part in lanes]
    weights = [part[:, kind] for kind in range(2) for part in split]  # key, query, value, output
    predict, params = jax.vmap(lambda *weights: as_function(AttentionHead(*weights)))(*weights)
    rates, trained = train_at_rates(
        bind(_total_loss, (predict, task.X, task.Y)),
        params,
        config.substeps,
        horizon=config.horizon,
        points=config.points,
        observe=jax.vmap(product_coordinates),
    )
    trained = jax.tree.map(np.asarray, Trajectory(trained.ts, Products(*trained.ys), trained.ok))

    context.progress("relaxing by gradient flow", 0.7)
    ts = trained.ts[0]
    # A gradient that is 2 % too large is a time that runs 2 % too fast.
    marks = np.unique(np.concatenate([ts, WRONG_FACTOR * ts]))
    solutions = jax.vmap(
        lambda one: incremental.raw_flow(
            neg_gradient, one.u, one.v, marks, rtol=1e-9, atol=1e-11, throw=False
        )
    )(lanes)
    solutions = jax.tree.map(np.asarray, solutions)
    flow, wrong = (_at(solutions, np.searchsorted(marks, factor * ts), ts) for factor in (1.0, WRONG_FACTOR))
    gaps = {
        name: lane_gaps(_products(theory), _products(trained))
        for name, theory in (("flow", flow), ("wrong", wrong))
    }

    context.progress("measuring", 0.9)
    by_rate = [Factors(*lane(trained, index).ys) for index in np.argsort(rates)[:2]]
    goal = target.reshape(-1, shape[-1])
    ends = Factors(*map(np.asarray, predicted_factors(lanes, goal)))
    seen = {"flow": Factors(*flow.ys), "trained": by_rate[0]}
    distance = {name: _distances(weights, goal, shape) for name, weights in seen.items()}
    # The error is of first order in the learning rate, which halves.
    limit = Factors(*((2 * fine - coarse)[-1] for fine, coarse in zip(*by_rate, strict=True)))
    reached = {
        "predicted": ends,
        "flow": Factors(*(leaf[-1] for leaf in seen["flow"])),
        "trained": Factors(*(leaf[-1] for leaf in seen["trained"])),
        "limit": limit,
    }
    reached = {name: np.stack(pair, axis=1).reshape(*shape[:-1], 2, -1) for name, pair in reached.items()}
    silent = np.broadcast_to((np.asarray(lanes.u) == 0) & (np.asarray(lanes.v) == 0), by_rate[0].u.shape)
    conserved = np.asarray(incremental.conserved_quantity(*flow.ys))
    drift = np.max(np.abs(conserved - conserved[:1]))
    data = {
        "ts": ts,
        "rates": rates,
        "gap": gaps,
        "distance": distance,
        "reached": reached,
        "beta": target,
        "least_curvature": least,
        "path": {"times": path.times, "beta": path.beta, "order": path.order},
    }
    claims = (
        _product_returns(distance, least, max(np.max(np.abs(leaf[silent])) for leaf in by_rate[0])),
        _factors(distance, reached, drift),
        _next_stage(distance),
        first_order(
            "incremental.robustness/network",
            "Gradient descent relaxes as gradient flow does, at first order in the learning rate",
            "boixadsera2023, Figures 9 and 10 (gradient flow in theory, gradient descent in experiments)",
            rates,
            gaps["flow"],
            gaps["wrong"],
        ),
    )
    lanes_of = ("kind", "draw", "stage")
    dims = {
        "ts": ("time",),
        "rates": ("rate",),
        **{f"gap/{name}": ("rate",) for name in gaps},
        **{f"distance/{name}/{what}": ("time", *lanes_of) for name in seen for what in ("product", "factor")},
        **{f"reached/{name}": (*lanes_of, "factor", "coordinate") for name in reached},
        "beta": (*lanes_of, "coordinate"),
    }
    return Result(data, claims, dims)


def _at(paths: Trajectory, index: np.ndarray, ts: np.ndarray) -> Trajectory:
    """Some times of a batch of trajectories, all of them side by side: leaves (T, L, ...)."""
    ys = jax.tree.map(lambda leaf: np.swapaxes(leaf[:, index], 0, 1), paths.ys)
    return Trajectory(ts, ys, np.all(paths.ok))


def _products(path: Trajectory) -> Trajectory:
    return Trajectory(path.ts, path.ys.u * path.ys.v, path.ok)


def _distances(weights: Factors, goal: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Largest distances of a product, and of a factor's magnitude, to a stage; (T, kind, draw, stage)."""
    root = np.sqrt(np.abs(goal))[None]
    product = np.abs(weights.u * weights.v - goal[None])
    factor = np.maximum(np.abs(np.abs(weights.u) - root), np.abs(np.abs(weights.v) - root))
    return {
        name: np.max(one, axis=-1).reshape(-1, *shape[:-1])
        for name, one in (("product", product), ("factor", factor))
    }


def _left(distance: np.ndarray, *, balanced: bool | None = None, enters: bool = False) -> np.ndarray:
    """Distance at the end over the size of the noise, for some of the ways to perturb."""
    kinds = [
        index
        for index, kind in enumerate(KINDS)
        if kind.enters == enters and balanced in (None, kind.balanced)
    ]
    return np.stack([distance[-1, index] / KINDS[index].sd for index in kinds])


def _product_returns(distance: dict[str, dict[str, np.ndarray]], least: np.ndarray, silent: float) -> Claim:
    flow, trained = (_left(distance[name]["product"]).max() for name in ("flow", "trained"))
    return Claim(
        "incremental.robustness/product-returns",
        "Stationary points of the stages are strict local minima on their active coordinates: from noise on "
        "these the products u v return",
        "boixadsera2023, Assumption 4.3 and Figure 9",
        "stated",
        [
            # The stage itself is known to 1e-9.
            Check("smallest eigenvalue of the Hessian there, all stages", "at least", 1e-6, least.min()),
            # All but a thousandth is gone.
            Check("flow: largest distance at the end over the noise", "at most", RETURNED, flow),
            Check("network: the same", "at most", RETURNED, trained),
            # A product of two zeros has no gradient in either.
            Check("network: largest weight that was not active", "at most", 0.0, silent),
        ],
    )


def _factors(
    distance: dict[str, dict[str, np.ndarray]], reached: dict[str, np.ndarray], drift: float
) -> Claim:
    def left(name, balanced):
        return _left(distance[name]["factor"], balanced=balanced)

    def off(name):
        return np.max(np.abs(reached[name] - reached["predicted"]))

    return Claim(
        "incremental.robustness/factors",
        "Perturbed weights return to where they were; corrected: to where u v is the stage's and u^2 - v^2 "
        "is still the perturbed one's",
        "boixadsera2023, Assumption 4.3 and Figure 9 (corrected by Lemma 4.1)",
        "corrected",
        [
            Check(
                "printed: network, any noise: largest distance of a weight at the end over the noise",
                "at most",
                RETURNED,
                max(left("trained", True).max(), left("trained", False).max()),
            ),
            # As for the products.
            Check(
                "flow, noise that keeps |u| = |v|: the same", "at most", RETURNED, left("flow", True).max()
            ),
            Check(
                "network, noise that keeps |u| = |v|: the same",
                "at most",
                RETURNED,
                left("trained", True).max(),
            ),
            # To first order a weight ends off by half the difference of two numbers of this size.
            Check(
                "network, other noise: the same, root mean square",
                "at least",
                0.1,
                np.sqrt(np.mean(left("trained", False) ** 2)),
            ),
            # The solver's tolerance, over some hundred steps.
            Check("flow: largest drift of u^2 - v^2", "at most", 1e-6, drift),
            # What may be left to relax: a thousandth of the smallest noise.
            Check(
                "flow: largest distance of a weight to the corrected end",
                "at most",
                RETURNED * min(kind.sd for kind in KINDS),
                off("flow"),
            ),
            # The learning rate's second order, of a drift that is 1e-3 at first order.
            Check("network, learning rate to zero: the same", "at most", 1e-4, off("limit")),
        ],
    )


def _next_stage(distance: dict[str, dict[str, np.ndarray]]) -> Claim:
    return Claim(
        "incremental.robustness/next-stage",
        "With noise on the active coordinates and the next one slightly active, the next stage is reached",
        "boixadsera2023, Assumption 4.4 and Figure 10",
        "stated",
        [
            # As for the return.
            Check(
                f"{name}, noise {noise}: largest distance of a product to it over the noise",
                "at most",
                RETURNED,
                _left(distance[kind]["product"], balanced=balanced, enters=True).max(),
            )
            for name, kind in (("flow", "flow"), ("network", "trained"))
            for noise, balanced in (("that keeps |u| = |v|", True), ("of any kind", False))
        ],
    )


def figure(saved: Saved) -> Figure:
    """Distances to the stage over time, balanced noise or not; to the next stage; where weights end."""
    drawn, ((balanced, other), (following, ends)) = plotting.new_figure(2, 2, width=5.0, height=3.5)
    _relaxing(balanced, saved, 1, "Noise that keeps |u| = |v|")
    _relaxing(other, saved, 3, "Noise of any kind: |u| and |v| stay apart")
    _relaxing(following, saved, 5, "Noise of any kind, the next one active")
    following.set_ylabel("largest distance to the next stage")

    stage = np.sqrt(np.abs(saved["beta"]))[..., None, :]
    active = np.broadcast_to(saved["beta"][..., None, :] != 0, saved["reached/trained"].shape)
    offset = {name: np.abs(saved[f"reached/{name}"]) - stage for name in ("predicted", "trained")}
    for index, color in ((1, "C0"), (2, "C2"), (3, "C1")):
        on = active[index]
        kind = KINDS[index]
        label = f"{'|u| = |v| kept' if kind.balanced else 'any kind'}, sd {kind.sd:g}"
        predicted, trained = offset["predicted"][index][on], offset["trained"][index][on]
        ends.plot(predicted, trained, "o", ms=5, alpha=0.7, color=color, label=label)
    low, high = ends.get_xlim()
    ends.plot([low, high], [low, high], label="equal", **plotting.THEORY)
    ends.set(xlabel="predicted from u² − v² and the stage", ylabel="network")
    ends.set_title("Where |u| and |v| end, minus those of the stage")
    ends.legend(loc="upper left", fontsize=8)
    return drawn


def _relaxing(ax: Axes, saved: Saved, kind: int, title: str) -> Axes:
    """Distances over time of the first draw from every stage."""
    ts = saved["ts"]
    for index, stage in enumerate(saved.config["stages"]):
        for what, line in (("product", "-"), ("factor", ":")):
            trained, flow = (
                saved[f"distance/{name}/{what}"][:, kind, 0, index] for name in ("trained", "flow")
            )
            ax.plot(ts, trained, line, color=f"C{index}", **plotting.TRAINED)
            if what == "product":
                ax.plot(ts, flow, **plotting.THEORY)
        ax.plot([], [], color=f"C{index}", label=f"stage {stage}", **plotting.TRAINED)
    ax.plot([], [], "-", color="0.4", label="products u v", **plotting.TRAINED)
    ax.plot([], [], ":", color="0.4", label="weights |u|, |v|", **plotting.TRAINED)
    ax.plot([], [], label="gradient flow", **plotting.THEORY)
    ax.axhline(RETURNED * KINDS[kind].sd, label="noise / 1000", **plotting.PRINTED)
    ax.set(yscale="log", ylim=(1e-8, 1e3), xlabel="time = learning rate × step")
    ax.set_ylabel("largest distance to the stage")
    ax.set_title(f"{title}, sd {KINDS[kind].sd:g}")
    ax.legend(loc="upper right", ncols=2, fontsize=7.5)
    return ax
