"""Local analysis of softmax attention at random interior minima: the condition number and its bounds.

Near a minimum x inside the simplex the flow is linear with the matrix -J(x)^2 H on the tangent space. Its
condition number is held against the printed lower bound (mu/L) (max x / min x)^2, which random minima and
minima next to a vertex violate, and against the two bounds that are proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import replicator
from dynamics.flow import Trajectory
from models.training import map_lanes
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, corrected, equals, every, slope, stated
from sims.compare import SOLVE, convergence_order, largest, named_groups, require_ok
from sims.ranges import Count, NonNegative, Positive, Range
from sims.results import Context, Saved

Exponent = Annotated[float, Range(at_least=-300, at_most=-1)]


@dataclass(frozen=True)
class Config:
    """Random minima, families of minima and perturbed flows."""

    instances: Count = 500
    """Random minima for each number of tokens."""
    max_tokens: Annotated[int, Range(at_least=3)] = 8
    """Numbers of tokens n: 2 up to this one."""
    log10_ratio: Positive = 4.0
    """Decades over which the entries of a minimum spread, at most."""
    log10_spread: NonNegative = 2.0
    """Decades over which the eigenvalues of a Hessian spread, at most."""
    log10_epsilon: tuple[Exponent, Exponent] = (-8.0, -2.0)
    """Range of the smallest entry in the two families of minima, as powers of ten."""
    flows: Count = 16
    """Minima that a flow is started next to, with three tokens each."""


PRESETS: dict[Preset, Config] = {
    "quick": Config(max_tokens=5),
    "standard": Config(instances=3000, flows=64),
    "paper": Config(instances=20_000, flows=256),
}

# The Lagrange multiplier of sum(x) = 1 at the minima; any number will do.
_MULTIPLIER = 0.5
# Inequalities are between quotients of numbers that are each exact up to rounding.
_ROUNDING = 1e-8


def loss_gradient(hessian: jax.Array, minimum: jax.Array, x: jax.Array) -> jax.Array:
    """Gradient of a quadratic loss whose minimum over the simplex is given."""
    return hessian @ (x - minimum) + _MULTIPLIER


def with_large(count: int, n: int, epsilons: np.ndarray) -> np.ndarray:
    """Points at which `count` tokens share evenly what the others, at e each, leave; shape (E, n)."""
    x = np.repeat(epsilons[:, None], n, axis=1)
    x[:, :count] = ((1 - (n - count) * epsilons) / count)[:, None]
    return x


@jax.jit
@jax.vmap
def local_analysis(minimum: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    """Conditioning, linearizations on the tangent space, and the vertices, for minima one per row."""
    x, hessian = minimum
    n = x.size
    # The Hessian is lowered along the vector of ones by more than its largest eigenvalue.
    lowered = hessian - 2 * jnp.trace(hessian) / n

    def linearized(hessian):
        return replicator.linearize(lambda y: replicator.attention_field(y, loss_gradient(hessian, x, y)), x)

    matrix, lowered_matrix = jax.vmap(linearized)(jnp.stack([hessian, lowered]))
    vertices = jnp.eye(n, dtype=x.dtype)
    gradients = jax.vmap(Partial(loss_gradient, hessian, x))(vertices)
    residuals = jnp.maximum(*jax.vmap(replicator.kkt_residual)(vertices, gradients))
    lower, upper = replicator.condition_bounds(x, hessian)
    return {
        "kappa": replicator.condition_number(x, hessian),
        "lower": lower,
        "upper": upper,
        "corollary": replicator.corollary_bound(x, hessian),
        "matrix": matrix,
        "lowered_matrix": lowered_matrix,
        "formula": replicator.local_matrix(x, hessian),
        "vertex_residual": jnp.min(residuals),
        "vertex_speed": jnp.max(jnp.abs(replicator.softmax_jacobian_product(vertices, gradients))),
    }


def _analyze(x: np.ndarray, hessian: np.ndarray, epsilons: np.ndarray) -> tuple[dict, dict]:
    """One number of each kind per random minimum, and the two families, whose Hessian is round."""
    n = x.shape[1]
    vertex, pair = ([(point, np.eye(n)) for point in with_large(count, n, epsilons)] for count in (1, 2))
    # All ride along in one program per number of tokens.
    groups = {"random": [*zip(x, hessian, strict=True)], "vertex": vertex, "pair": pair}
    found = named_groups(local_analysis, groups)
    minima, vertex, pair = found.values()
    families = {"vertex": vertex["kappa"], "pair": pair["kappa"], "pair_bound": pair["corollary"]}

    matrix, formula = minima.pop("matrix"), minima.pop("formula")
    values, lowered_values = np.linalg.eigvals(matrix), np.linalg.eigvals(minima.pop("lowered_matrix"))
    curvatures, error = np.linalg.eigvalsh(hessian), np.linalg.norm(matrix - formula, axis=(1, 2))
    minima |= {
        "ratio": x.max(axis=1) / x.min(axis=1),
        "spread": curvatures[:, -1] / curvatures[:, 0],
        "linearization_error": error / np.linalg.norm(formula, axis=(1, 2)),
        "imaginary": np.max(np.abs(np.imag(values) / np.real(values)), axis=1),
        "abscissa": np.real(values).max(axis=1),
        "abscissa_lowered": np.real(lowered_values).max(axis=1),
    }
    return minima, families


@jax.jit
def _flows(gradients, starts, ts) -> tuple[Trajectory, jax.Array]:
    """Attention along flows, several from each minimum, and the largest KKT residual where these rest."""

    def from_one(gradient, ts, start):
        path = replicator.softmax_flow(gradient, jnp.log(start), ts, rtol=1e-13, atol=1e-14, **SOLVE)
        path = Trajectory(ts, jax.nn.softmax(path.ys, axis=1), path.ok)
        rest = path.ys[-1]
        return path, jnp.maximum(*replicator.kkt_residual(rest, gradient(rest)))

    def from_all(lane):
        gradient, starts, ts = lane
        paths, residuals = map_lanes(partial(from_one, gradient, ts), starts, at_once=1)
        return paths, jnp.max(residuals)

    # One after the other, which compiles more quickly than all side by side.
    return map_lanes(from_all, (gradients, starts, ts), at_once=1)


def _decay(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Flows with three tokens from next to minima, along the slowest direction, and from far."""
    x, hessian = replicator.random_minima(rng, 3, count, 0.7, 0.5)
    matrix = jax.jit(jax.vmap(replicator.local_matrix))(x, hessian)
    values, vectors = (np.real(part) for part in np.linalg.eig(matrix))
    lanes, slow = np.arange(count), np.argmax(values, axis=1)
    slowest = -values[lanes, slow]
    direction = vectors[lanes, :, slow] @ np.asarray(replicator.tangent_basis(3)).T
    near = x + 1e-3 * direction / np.max(np.abs(direction / x), axis=1, keepdims=True)
    far, _ = replicator.random_minima(rng, 3, count, 1.0, 0.0)
    # Slopes are taken after two time constants, when faster modes are gone; after sixty it is at rest.
    ts = np.array([0.0, 2.0, 6.0, 60.0]) / slowest[:, None]
    gradient = Partial(loss_gradient, hessian, x)
    paths, residual = jax.device_get(_flows(gradient, np.stack([near, far], axis=1), ts))
    require_ok("a flow to a minimum", paths)
    distance = np.linalg.norm(paths.ys[:, 0] - x[:, None], axis=2)
    rate = np.log(distance[:, 1] / distance[:, 2]) / (ts[:, 2] - ts[:, 1])
    return {"rate": rate, "slowest": slowest, "residual": residual}


def run(config: Config, context: Context) -> dict:
    """Analyze random minima and the two families for every size, and flows next to minima."""
    rng = np.random.default_rng(context.seed)
    sizes = range(2, config.max_tokens + 1)
    epsilons = np.logspace(*config.log10_epsilon, 25)
    spreads = config.log10_ratio, config.log10_spread
    found = []
    for index, n in enumerate(sizes):
        context.progress(f"minima with {n} tokens", 0.8 * index / len(sizes))
        found.append(_analyze(*replicator.random_minima(rng, n, config.instances, *spreads), epsilons))
    minima, families = zip(*found, strict=True)
    context.progress("flows next to a minimum", 0.8)
    return {
        "size": ("size", np.array(sizes)),
        "epsilon": ("epsilon", epsilons),
        "minima": ("minimum", jax.tree.map(lambda *leaves: np.concatenate(leaves), *minima)),
        "family": ("size epsilon", jax.tree.map(lambda *leaves: np.stack(leaves), *families)),
        "flow": ("flow", _decay(rng, config.flows)),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The condition number against its bounds, stability, and what a stationary point is."""
    minima = saved["minima"]
    yield _lower_bound(minima)
    yield _corollary(saved)
    error, imaginary = minima["linearization_error"].max(), minima["imaginary"].max()
    root = "at the root of rounding two equal ones become a pair"
    flows = "flows next to a minimum: largest distance of rate / slowest eigenvalue from one"
    off = largest(saved["flow/rate"] / saved["flow/slowest"] - 1)
    yield stated(
        "stability",
        "An interior minimum with a positive definite Hessian is linearly stable: the flow linearizes to "
        "-J^2 H, whose eigenvalues on the tangent space are real and negative",
        "softmax2025talk, theorem",
        # Every entry of J is exact to full relative precision.
        at_most("distance of the linearization from -J^2 H, relative", error, 1e-12, why=ROUNDING),
        at_most("largest imaginary part of an eigenvalue, relative", imaginary, 1e-6, why=root),
        every("minima with negative eigenvalues alone", minima["abscissa"] < 0),
        every("the same where the Hessian is negative off the tangent space", minima["abscissa_lowered"] < 0),
        # The terms beyond the linear ones are as large as the start is far off.
        at_most(flows, off, 1e-3, why="flows start 1e-3 off"),
    )
    rest, residual = saved["flow/residual"].max(), minima["vertex_residual"]
    speed = minima["vertex_speed"].max()
    damped = "errors fall by exp(-60), to rounding"
    yield stated(
        "kkt",
        "A stationary point inside the simplex is a KKT point of minimizing the loss there; on the boundary "
        "it need not be one",
        "softmax2025talk, theorem",
        at_most("KKT residual where flows from near and far rest", rest, 1e-12, why=damped),
        equals("largest |J g| at a vertex", speed, 0, why="x_i (g_i - <x, g>) is zero in every product"),
        # With the minimum inside, convexity leaves no vertex a KKT point.
        every("minima none of whose vertices has a KKT residual below 1e-12", residual > 1e-12),
    )


def _lower_bound(minima: dict[str, np.ndarray]) -> Claim:
    kappa, printed = minima["kappa"], minima["ratio"] ** 2 / minima["spread"]
    above, below = 1 - _ROUNDING, 1 + _ROUNDING
    return corrected(
        "lower-bound",
        "The condition number at a minimum is at least (mu/L) (max x / min x)^2; what is proved is "
        "(mu/L) (max w / min w)^2 <= kappa <= (L/mu) (max x / min x)^2 with w = x (1 - x)",
        "softmax2025talk, theorem",
        printed=[every("random minima above the printed bound", kappa >= printed * above)],
        mended=[
            every("random minima above the proved lower bound", kappa >= minima["lower"] * above),
            every("random minima below the proved upper bound", kappa <= minima["upper"] * below),
        ],
    )


def _corollary(saved: Saved) -> Claim:
    epsilons, kappa, bound = saved["epsilon"], saved["minima/kappa"], saved["minima/corollary"]
    # From three tokens on: with two the tangent space is a line, and kappa is one.
    n, vertex, pair = saved["size"][1:, None], saved["family/vertex"][1:], saved["family/pair"][1:]
    at = int(np.argmin(np.abs(np.log10(epsilons) + 4)))
    # The weakest reading of the printed bound: the largest entry is only known to be at least 1 / n.
    over_printed = np.max(vertex * (n * epsilons[None, :]) ** 2, axis=0)[at]
    to_square = largest(vertex[:, at] / n[:, 0] ** 2 - 1)
    to_exact = largest(vertex / (n * (1 - (n - 1) * epsilons[None, :])) ** 2 - 1)
    over_bound = np.min(pair / saved["family/pair_bound"][1:])
    small = epsilons <= 1e-3
    slopes = np.array([convergence_order(epsilons[small], values[small]).slope for values in pair])
    furthest = slopes[np.argmax(np.abs(slopes + 2))]
    printed = f"next to a vertex, e = {epsilons[at]:.0e}: largest kappa over the printed bound"
    square = "the same minima: largest distance of kappa / n^2 from one"
    exact = "distance of kappa from n^2 (1 - (n - 1) e)^2 at every e, relative"
    line = "two large tokens: log-log slope of kappa in e, the one furthest from -2"
    two = "two large tokens: smallest kappa over the corrected bound"
    return corrected(
        "corollary",
        "As the smallest entry e of a minimum goes to 0 its condition number goes to infinity; it does "
        "where the largest entry stays below 1 - d, and goes to n^2 next to a vertex",
        "softmax2025talk, corollary",
        printed=[at_least(printed, over_printed, 1, why="the statement itself")],
        mended=[
            at_most(square, to_square, 1e-2, why="2 (n - 1) e to first order"),
            at_most(exact, to_exact, 1e-10, why="rounding, enlarged where 1 - (n - 1) e cancels"),
            at_least(two, over_bound, 1, _ROUNDING, why="proved, up to rounding"),
            every("random minima above the corrected bound", kappa >= bound * (1 - _ROUNDING)),
            slope(line, furthest, -2, 1e-2, why="below e = 1e-3 the next term in e changes it by less"),
        ],
    )


_FILLED = {"fill": True, "alpha": 0.45}
BOUNDS: dict[str, dict[str, Any]] = {
    "lower": {"label": "proved lower bound (never < 0)", "color": "C0", **_FILLED},
    "upper": {"label": "proved upper bound (never > 0)", "color": "C2", **_FILLED},
    "printed": {"label": "printed lower bound", "color": "C1", "linewidth": 2},
}


def figure(config: Config, saved: Saved) -> Figure:
    """Random minima against the printed bound, kappa over each bound, and the two families."""
    drawn, axes = plotting.new_figure(1, 3, width=4.6, height=3.9)
    against_ratio, over_bounds, over_epsilon = axes[0]
    ratio, spread, kappa = (saved[f"minima/{name}"] for name in ("ratio", "spread", "kappa"))
    printed = ratio**2 / spread
    _scatter(against_ratio, ratio, kappa * spread, kappa < printed * (1 - _ROUNDING))
    bounds = {"lower": saved["minima/lower"], "upper": saved["minima/upper"], "printed": printed}
    _histograms(over_bounds, {name: np.log10(kappa / bound) for name, bound in bounds.items()})

    epsilon, sizes = saved["epsilon"], saved["size"]
    n, pair, vertex = sizes[-1], saved["family/pair"][-1], saved["family/vertex"]
    over_epsilon.loglog(epsilon, pair, "s", color="C1", label=f"two large tokens, n = {n}")
    plotting.reference_slope(over_epsilon, epsilon, pair, -2, "slope −2, and n²")
    over_epsilon.loglog(epsilon, 1 / (n * epsilon) ** 2, label=f"printed bound, n = {n}", **plotting.PRINTED)
    shown = np.unique(np.linspace(1, len(sizes) - 1, 3).astype(int))
    for index, color in zip(shown, ("C0", "C2", "C3"), strict=False):
        n = sizes[index]
        over_epsilon.loglog(epsilon, vertex[index], "o", color=color, label=f"one large token, n = {n}")
        over_epsilon.axhline(n**2, **plotting.THEORY)
    title, xlabel = "A small entry: kappa → n² next to a vertex", "smallest entry e of the minimum"
    plotting.finish(over_epsilon, title, xlabel, "condition number", "upper right", ylim=(1, 1e24))
    return drawn


def _scatter(ax: Axes, ratio: np.ndarray, scaled: np.ndarray, violates: np.ndarray) -> None:
    # Enough points are drawn to see the cloud, spread over all numbers of tokens.
    shown = np.arange(ratio.size) % max(1, ratio.size // 3500) == 0
    for chosen, color, text in ((~violates, "C0", "above the printed bound"), (violates, "C1", "below")):
        label = f"{text}: {np.sum(chosen)} of {ratio.size}"
        ax.loglog(ratio[shown & chosen], scaled[shown & chosen], ".", markersize=3, color=color, label=label)
    line = np.array([1.0, ratio.max()])
    ax.loglog(line, line**2, label="printed bound", **{**plotting.PRINTED, "color": "black", "zorder": 5})
    title, legend = "Random minima against the printed bound", {"loc": "upper left", "markerscale": 3}
    labels = "max x / min x", "condition number × L / mu"
    plotting.finish(ax, title, *labels, legend, ylim=(0.5, scaled.max() * 300))


def _histograms(ax: Axes, logs: dict[str, np.ndarray]) -> None:
    everything = np.concatenate([*logs.values()])
    # One edge lies at zero, which the proved bounds never cross.
    bins = 0.2 * np.arange(np.floor(everything.min() / 0.2), np.ceil(everything.max() / 0.2) + 1)
    for name, log in logs.items():
        ax.stairs(np.histogram(log.round(9), bins)[0], bins, **BOUNDS[name])
    ax.axvline(0, **plotting.THEORY)
    ax.set(yscale="log")
    title, xlabel = "Condition number over each bound", "log10 of condition number / bound"
    plotting.finish(ax, title, xlabel, "random minima", "upper left", ylim=(0.7, 4 * ax.get_ylim()[1]))
