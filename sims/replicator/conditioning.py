"""Local analysis of softmax attention at random interior minima: the condition number and its bounds.

Near a minimum x inside the simplex the flow is linear with the matrix -J(x)^2 H on the tangent space. Its
condition number is held against the printed lower bound (mu/L) (max x / min x)^2, which random minima and
minima next to a vertex violate, and against the two bounds that are proved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import replicator
from dynamics.replicator import attention_field, corollary_bound
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import convergence_order
from sims.results import Context, Result, Saved


@dataclass(frozen=True)
class Config:
    """Random minima, families of minima and perturbed flows."""

    instances: int = 500
    """Random minima for each number of tokens."""
    max_tokens: int = 8
    """Numbers of tokens n: 2 up to this one."""
    log10_ratio: float = 4.0
    """Decades over which the entries of a minimum spread, at most."""
    log10_spread: float = 2.0
    """Decades over which the eigenvalues of a Hessian spread, at most."""
    log10_epsilon: tuple[float, float] = (-8.0, -2.0)
    """Range of the smallest entry in the two families of minima, as powers of ten."""
    flows: int = 16
    """Minima that a flow is started next to, with three tokens each."""


_QUICK = Config()
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_QUICK, instances=3000, flows=64),
    "paper": replace(_QUICK, instances=20_000, flows=256),
}

# The Lagrange multiplier of sum(x) = 1 at the minima; any number will do.
_MULTIPLIER = 0.5
# Inequalities between quotients of numbers that are each exact up to rounding.
_ROUNDING = 1e-8


def loss_gradient(hessian: jax.Array, minimum: jax.Array, x: jax.Array) -> jax.Array:
    """Gradient of a quadratic loss whose minimum over the simplex is given."""
    return hessian @ (x - minimum) + _MULTIPLIER


def random_minima(
    rng: np.random.Generator, n: int, count: int, log10_ratio: float, log10_spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points inside the simplex (count, n) and positive definite Hessians (count, n, n).

    Entries of a point and eigenvalues of a Hessian are log-uniform over a random number of decades, up to
    the given ones; the eigenvalues are at least one.
    """
    x = 10 ** (-log10_ratio * rng.uniform(size=(count, 1)) * rng.uniform(size=(count, n)))
    values = 10 ** (log10_spread * rng.uniform(size=(count, 1)) * rng.uniform(size=(count, n)))
    rotation = np.linalg.qr(rng.normal(size=(count, n, n)))[0]
    hessian = (rotation * values[:, None, :]) @ np.swapaxes(rotation, 1, 2)
    return x / x.sum(axis=1, keepdims=True), (hessian + np.swapaxes(hessian, 1, 2)) / 2


def next_to_vertex(n: int, epsilons: np.ndarray) -> np.ndarray:
    """One token has all but (n - 1) e, the others e each; shape (E, n)."""
    return np.stack([np.array([1 - (n - 1) * e, *[e] * (n - 1)]) for e in epsilons])


def two_large(n: int, epsilons: np.ndarray) -> np.ndarray:
    """Two tokens share all but (n - 2) e; shape (E, n)."""
    return np.stack([np.array([*[(1 - (n - 2) * e) / 2] * 2, *[e] * (n - 2)]) for e in epsilons])


class Local(NamedTuple):
    """What the theory says about a minimum, and what is measured there."""

    kappa: Any
    """Condition number."""
    lower: Any
    """Proved lower bound on it."""
    upper: Any
    """Proved upper bound on it."""
    corollary: Any
    """Proved lower bound in the smallest and the largest entry."""
    matrix: Any
    """Linearization of the flow on the tangent space, by automatic differentiation."""
    indefinite: Any
    """The same with the Hessian made negative off the tangent space."""
    residual: Any
    """KKT residual at each vertex, shape (n,)."""
    speed: Any
    """Largest |J g| at a vertex."""


@jax.jit
@jax.vmap
def local_analysis(x: jax.Array, hessian: jax.Array) -> Local:
    """Conditioning, linearization and stationary points of minima, one per row."""
    n = x.size
    # Lowered along the vector of ones by more than the largest eigenvalue.
    lowered = hessian - 2 * jnp.trace(hessian) / n

    def linearized(hessian):
        return replicator.linearize(lambda y: attention_field(y, loss_gradient(hessian, x, y)), x)

    matrix, indefinite = jax.vmap(linearized)(jnp.stack([hessian, lowered]))
    vertices = jnp.eye(n, dtype=x.dtype)
    gradients = jax.vmap(Partial(loss_gradient, hessian, x))(vertices)
    return Local(
        replicator.condition_number(x, hessian),
        *replicator.condition_bounds(x, hessian),
        corollary_bound(x, hessian),
        matrix,
        indefinite,
        residual=jnp.maximum(*jax.vmap(replicator.kkt_residual)(vertices, gradients)),
        speed=jnp.max(jnp.abs(replicator.softmax_jacobian_product(vertices, gradients))),
    )


def linearization(x: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The formula -J^2 H on the tangent space, shape (count, n - 1, n - 1)."""
    basis = np.asarray(replicator.tangent_basis(x.shape[1]))
    jacobian = np.asarray(jax.jit(jax.vmap(replicator.softmax_jacobian))(x))
    return -basis.T @ jacobian @ jacobian @ hessian @ basis


@jax.jit
@jax.vmap
def _decay(x, hessian, slowest, direction, far):
    """Flows from next to a minimum and from far: the decay of the first, the KKT residuals at rest."""
    near = x + 1e-3 * direction / jnp.max(jnp.abs(direction / x))
    # Slopes are taken after two time constants, when faster modes are gone; after sixty it is at rest.
    ts = jnp.array([0.0, 2.0, 6.0, 60.0]) / slowest
    gradient = Partial(loss_gradient, hessian, x)

    def flow(start):
        path = replicator.softmax_flow(gradient, jnp.log(start), ts, rtol=1e-13, atol=1e-14, throw=False)
        return jax.nn.softmax(path.ys, axis=1)

    attention = jax.vmap(flow)(jnp.stack([near, far]))
    distance = jnp.linalg.norm(attention[0] - x[None, :], axis=1)
    rate = jnp.log(distance[1] / distance[2]) / (ts[2] - ts[1])
    rest = attention[:, -1]
    residuals = jax.vmap(replicator.kkt_residual)(rest, jax.vmap(gradient)(rest))
    return rate, jnp.max(jnp.stack(residuals))


def run(config: Config, context: Context) -> Result:
    """Analyze random minima and the two families for every size, and flows next to minima."""
    rng = np.random.default_rng(context.seed)
    sizes = range(2, config.max_tokens + 1)
    epsilons = np.logspace(*config.log10_epsilon, 25)
    columns, kappas, bounds = [], [], []
    for index, n in enumerate(sizes):
        context.progress(f"minima with {n} tokens", 0.8 * index / len(sizes))
        x, hessian = random_minima(rng, n, config.instances, config.log10_ratio, config.log10_spread)
        # The families have a round Hessian. They ride along: one program per number of tokens.
        family = np.concatenate([next_to_vertex(n, epsilons), two_large(n, epsilons)])
        round_hessians = np.tile(np.eye(n), (len(family), 1, 1))
        both = local_analysis(np.concatenate([x, family]), np.concatenate([hessian, round_hessians]))
        both = jax.tree.map(np.asarray, both)
        columns.append(_columns(x, hessian, jax.tree.map(lambda leaf: leaf[: config.instances], both)))
        kappas.append(np.split(both.kappa[config.instances :], 2))
        bounds.append(both.corollary[config.instances + len(epsilons) :])
    minima = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    vertex, pair = np.stack(kappas, axis=1)
    families = {
        "tokens": np.array(sizes),
        "epsilon": epsilons,
        "vertex": vertex,
        "pair": pair,
        "pair_bound": np.stack(bounds),
    }

    context.progress("flows next to a minimum", 0.8)
    x, hessian = random_minima(rng, 3, config.flows, 0.7, 0.5)
    values, vectors = np.linalg.eig(linearization(x, hessian))
    values, vectors = np.real(values), np.real(vectors)
    lanes, slow = np.arange(config.flows), np.argmax(values, axis=1)
    slowest = -values[lanes, slow]
    directions = vectors[lanes, :, slow] @ np.asarray(replicator.tangent_basis(3)).T
    far, _ = random_minima(rng, 3, config.flows, 1.0, 0.0)
    rate, rest = (np.asarray(leaf) for leaf in _decay(x, hessian, slowest, directions, far))

    claims = (
        _lower_bound(minima),
        _corollary(minima, families),
        _stability(minima, rate / slowest),
        _kkt(minima, rest),
    )
    dims = {f"minima/{name}": ("minimum",) for name in minima}
    dims |= {f"family/{name}": ("tokens", "epsilon") for name in ("vertex", "pair", "pair_bound")}
    flow = {"rate": rate, "slowest": slowest}
    return Result({"minima": minima, "family": families, "flow": flow}, claims, dims)


def _columns(x: np.ndarray, hessian: np.ndarray, local: Local) -> dict[str, np.ndarray]:
    """One number per minimum of each kind that the claims and the figure are made of."""
    curvatures = np.linalg.eigvalsh(hessian)
    spread = curvatures[:, -1] / curvatures[:, 0]
    formula = linearization(x, hessian)
    error = np.linalg.norm(local.matrix - formula, axis=(1, 2)) / np.linalg.norm(formula, axis=(1, 2))
    values, lowered_values = np.linalg.eigvals(local.matrix), np.linalg.eigvals(local.indefinite)
    return {
        "tokens": np.full(len(x), x.shape[1]),
        "ratio": x.max(axis=1) / x.min(axis=1),
        "spread": spread,
        "kappa": local.kappa,
        "lower": local.lower,
        "upper": local.upper,
        "corollary": local.corollary,
        "linearization_error": error,
        "imaginary": np.max(np.abs(values.imag / values.real), axis=1),
        "abscissa": values.real.max(axis=1),
        "abscissa_lowered": lowered_values.real.max(axis=1),
        "vertex_residual": local.residual.min(axis=1),
        "vertex_speed": local.speed,
    }


def _count(which: np.ndarray) -> int:
    return int(np.count_nonzero(which))


def _lower_bound(minima: dict[str, np.ndarray]) -> Claim:
    kappa, total = minima["kappa"], minima["kappa"].size
    printed = minima["ratio"] ** 2 / minima["spread"]

    def obey(bound: np.ndarray) -> int:
        return _count(kappa >= bound * (1 - _ROUNDING))

    return Claim(
        "replicator.conditioning/lower-bound",
        "The condition number at a minimum is at least (mu/L) (max x / min x)^2; what is proved is "
        "(mu/L) (max w / min w)^2 <= kappa <= (L/mu) (max x / min x)^2 with w = x (1 - x)",
        "softmax2025talk, theorem",
        "corrected",
        [
            Check("random minima above the printed bound", "all of", total, obey(printed)),
            # An inequality that is proved: no exception.
            Check("random minima above the proved lower bound", "all of", total, obey(minima["lower"])),
            Check(
                "random minima below the proved upper bound",
                "all of",
                total,
                _count(kappa <= minima["upper"] * (1 + _ROUNDING)),
            ),
        ],
    )


def _corollary(minima: dict[str, np.ndarray], family: dict[str, np.ndarray]) -> Claim:
    epsilons, small = family["epsilon"], family["epsilon"] <= 1e-3
    # From three tokens on: with two the tangent space is a line, and kappa is one.
    n, vertex, pair = family["tokens"][1:, None], family["vertex"][1:], family["pair"][1:]
    at = int(np.argmin(np.abs(np.log10(epsilons) + 4)))
    # The weakest reading of the printed bound: the largest entry is only known to be at least 1 / n.
    over_printed = vertex * (n * epsilons[None, :]) ** 2
    exact = (n * (1 - (n - 1) * epsilons[None, :])) ** 2
    slopes = np.array([convergence_order(epsilons[small], kappa[small]).slope for kappa in pair])
    obeyed = _count(minima["kappa"] >= minima["corollary"] * (1 - _ROUNDING))
    return Claim(
        "replicator.conditioning/corollary",
        "As the smallest entry e of a minimum goes to 0 its condition number goes to infinity; it does "
        "where the largest entry stays below 1 - d, and goes to n^2 next to a vertex",
        "softmax2025talk, corollary",
        "corrected",
        [
            Check(
                f"next to a vertex, e = {epsilons[at]:.0e}: largest kappa over the printed bound",
                "at least",
                1.0,
                over_printed[:, at].max(),
            ),
            # There kappa / n^2 - 1 = -2 (n - 1) e to first order.
            Check(
                "the same minima: largest distance of kappa / n^2 from one",
                "at most",
                1e-2,
                np.max(np.abs(vertex[:, at] / n[:, 0] ** 2 - 1)),
            ),
            # An identity: rounding, enlarged where 1 - (n - 1) e cancels.
            Check(
                "distance of kappa from n^2 (1 - (n - 1) e)^2 at every e, relative",
                "at most",
                1e-10,
                np.max(np.abs(vertex / exact - 1)),
            ),
            Check(
                "two large tokens: smallest kappa over the corrected bound",
                "at least",
                1.0,
                np.min(pair / family["pair_bound"][1:]),
                _ROUNDING,
            ),
            Check("random minima above the corrected bound", "all of", minima["kappa"].size, obeyed),
            # Below e = 1e-3 the next term of the expansion in e changes the slope by less.
            Check(
                "two large tokens: log-log slope of kappa in e, the one furthest from -2",
                "slope",
                -2.0,
                slopes[np.argmax(np.abs(slopes + 2))],
                1e-2,
            ),
        ],
    )


def _stability(minima: dict[str, np.ndarray], rate_ratio: np.ndarray) -> Claim:
    total = minima["kappa"].size
    return Claim(
        "replicator.conditioning/stability",
        "An interior minimum with a positive definite Hessian is linearly stable: the flow linearizes to "
        "-J^2 H, whose eigenvalues on the tangent space are real and negative",
        "softmax2025talk, theorem",
        "stated",
        [
            # Two routes to one matrix: rounding, as every entry of J is exact to full relative precision.
            Check(
                "distance of the linearization from -J^2 H, relative",
                "at most",
                1e-12,
                minima["linearization_error"].max(),
            ),
            # Two equal real eigenvalues become a complex pair at the square root of rounding, 1e-8.
            Check(
                "largest imaginary part of an eigenvalue, relative",
                "at most",
                1e-6,
                minima["imaginary"].max(),
            ),
            Check(
                "minima with negative eigenvalues alone",
                "all of",
                total,
                _count(minima["abscissa"] < 0),
            ),
            Check(
                "the same where the Hessian is negative off the tangent space",
                "all of",
                total,
                _count(minima["abscissa_lowered"] < 0),
            ),
            # The flow starts at 1e-3 of the way, which is the size of the terms beyond the linear ones.
            Check(
                "flows next to a minimum: largest distance of rate / slowest eigenvalue from one",
                "at most",
                1e-3,
                np.max(np.abs(rate_ratio - 1)),
            ),
        ],
    )


def _kkt(minima: dict[str, np.ndarray], rest: np.ndarray) -> Claim:
    total = minima["kappa"].size
    return Claim(
        "replicator.conditioning/kkt",
        "A stationary point inside the simplex is a KKT point of minimizing the loss there; on the boundary "
        "it need not be one",
        "softmax2025talk, theorem",
        "stated",
        [
            # The flow damps every error by exp(-60), and the solver adds rounding of its own.
            Check("KKT residual where flows from near and far rest", "at most", 1e-12, rest.max()),
            # x_i (g_i - <x, g>) has an exact zero in every product.
            Check("largest |J g| at a vertex", "equals", 0.0, minima["vertex_speed"].max()),
            # With the minimum inside, convexity leaves no vertex a KKT point.
            Check(
                "minima none of whose vertices has a KKT residual below 1e-12",
                "all of",
                total,
                _count(minima["vertex_residual"] > 1e-12),
            ),
        ],
    )


def figure(saved: Saved) -> Figure:
    """Random minima against the printed bound, kappa over each bound, and the two families."""
    drawn, axes = plotting.new_figure(1, 3, width=4.6, height=3.9)
    against_ratio, over_bounds, over_epsilon = axes[0]
    ratio, kappa = saved["minima/ratio"], saved["minima/kappa"]
    printed = ratio**2 / saved["minima/spread"]
    _scatter(against_ratio, ratio, kappa * saved["minima/spread"], kappa < printed * (1 - _ROUNDING))
    _histograms(
        over_bounds,
        {
            "proved lower bound (never < 0)": (kappa / saved["minima/lower"], "C0"),
            "proved upper bound (never > 0)": (kappa / saved["minima/upper"], "C2"),
            "printed lower bound": (kappa / printed, "C1"),
        },
    )

    epsilon, sizes = saved["family/epsilon"], saved["family/tokens"]
    largest = sizes[-1]
    pair, vertex = saved["family/pair"][-1], saved["family/vertex"]
    over_epsilon.loglog(epsilon, pair, "s", color="C1", label=f"two large tokens, n = {largest}")
    plotting.reference_slope(over_epsilon, epsilon, pair, -2, "slope −2, and n²")
    printed = 1 / (largest * epsilon) ** 2
    over_epsilon.loglog(epsilon, printed, label=f"printed bound, n = {largest}", **plotting.PRINTED)
    shown = np.unique(np.linspace(1, len(sizes) - 1, 3).astype(int))
    for index, color in zip(shown, ("C0", "C2", "C3"), strict=False):
        n = sizes[index]
        over_epsilon.loglog(epsilon, vertex[index], "o", color=color, label=f"one large token, n = {n}")
        over_epsilon.axhline(n**2, **plotting.THEORY)
    over_epsilon.set(xlabel="smallest entry e of the minimum", ylabel="condition number", ylim=(1, 1e24))
    over_epsilon.set_title("A small entry: kappa → n² next to a vertex")
    over_epsilon.legend(loc="upper right")
    return drawn


def _scatter(ax: Axes, ratio: np.ndarray, scaled: np.ndarray, violates: np.ndarray) -> Axes:
    # Enough points to see the cloud, spread over all numbers of tokens.
    shown = np.zeros(ratio.size, bool)
    shown[:: max(1, ratio.size // 3500)] = True
    for chosen, color, text in ((~violates, "C0", "above the printed bound"), (violates, "C1", "below")):
        label = f"{text}: {np.sum(chosen)} of {ratio.size}"
        ax.loglog(ratio[shown & chosen], scaled[shown & chosen], ".", markersize=3, color=color, label=label)
    line = np.array([1.0, ratio.max()])
    ax.loglog(line, line**2, label="printed bound", **{**plotting.PRINTED, "color": "black", "zorder": 5})
    ax.set(xlabel="max x / min x", ylabel="condition number × L / mu", ylim=(0.5, scaled.max() * 300))
    ax.set_title("Random minima against the printed bound")
    ax.legend(loc="upper left", markerscale=3)
    return ax


def _histograms(ax: Axes, quotients: dict[str, tuple[np.ndarray, str]]) -> Axes:
    logs = {label: np.log10(values) for label, (values, _) in quotients.items()}
    everything = np.concatenate(list(logs.values()))
    # One edge at zero, which the proved bounds never cross.
    bins = 0.2 * np.arange(np.floor(everything.min() / 0.2), np.ceil(everything.max() / 0.2) + 1)
    for label, (_, color) in quotients.items():
        look = {"linewidth": 2, "fill": False} if label == "printed lower bound" else {"alpha": 0.45}
        counts, _ = np.histogram(logs[label].round(9), bins)
        ax.stairs(counts, bins, label=label, color=color, **{"fill": True, **look})
    ax.axvline(0, **plotting.THEORY)
    ax.set(xlabel="log10 of condition number / bound", ylabel="random minima", yscale="log")
    ax.set_ylim(0.7, 4 * ax.get_ylim()[1])
    ax.set_title("Condition number over each bound")
    ax.legend(loc="upper left")
    return ax
