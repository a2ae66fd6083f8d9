"""Linear regression on products of weights: the greedy algorithm, the flow down to alpha = 1e-1000, training.

The network X (u v) is the simplest one that depends on products. Its flow from (alpha u0, alpha v0) is
integrated in log coordinates for one power of ten after the other and set against the staircase of the greedy
algorithm; gradient descent from the largest alpha is set against the flow. A problem whose coordinates do not
interact gives the time of an activation in closed form, and one of two coordinates shows where the flow of
the weights themselves is lost to cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure
from scipy.special import expit

from dynamics import incremental
from dynamics.flow import Trajectory
from dynamics.incremental import GreedyPath
from models.losses import bind, mean_squared_error
from models.training import Descent, map_lanes
from sims import plotting
from sims.claims import (
    ROUNDING,
    SOLVER,
    Claim,
    Preset,
    at_least,
    at_most,
    equals,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import SOLVE, WRONG_FACTOR, convergence_order, first_order, lane, lane_gaps, largest
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

LOG10 = float(np.log(10))
SIZE = 6
FIRST, SECOND = 1.0, 0.5  # the factors at the start, over alpha
# Targets of the coordinates that do not interact; the last one has nothing to learn.
TARGETS = (2.0, -1.5, 1.0, -0.75, 0.5, 0.0)
# Two that do: the second one is pushed down to b = 1.7 before the first is active, and up from then on.
TURNING = (((1.0, -0.95), (-0.95, 1.2)), (1.0, -0.7))
KEPT, LOST = 8, 16  # powers of ten: u + v of the second one is above rounding then, and below it
LEAVING = (0, 40)  # seed and samples of a problem where a product leaves, and returns with the other sign
PROBLEMS = ("correlated", "orthogonal", "turning", "leaving")
EXPLICIT = 32  # the power of ten up to which an explicit solver is the quicker one
HORIZON = 9.0  # rescaled time that is long enough for both
# A product is negligible below this share of the largest one of the path. The exponent b of the next one runs
# from 1 to 0 in its time T, so that it grows like exp(2 log(1/alpha) tau / T) and is negligible until about
# log(50) / 2 = 2 units of T / log(1/alpha) before its jump: a stage whose middle is earlier lasts.
NEGLIGIBLE, LASTS = 0.01, 4.0
HALVES = "one half, bent by exp(-lam) and the widths of the jumps"
EXACT = "counts are exact"


@dataclass(frozen=True)
class Config:
    """Starts and learning rates."""

    samples: Annotated[int, Range(at_least=SIZE)] = 40
    """Samples of the regression problem, which has six products."""
    powers: Annotated[tuple[Count, ...], Length(3)] = (2, 4, 8, 16, 32)
    """Starts alpha = 10^-power; gradient descent is run from the first, the scalar problem starts at 4."""
    points: Count = 1500
    """Times of the flow, equally spaced in their logarithm; half as many are added around the jumps."""
    beyond: Annotated[float, Range(above=1)] = 1.35
    """Time at which the flow ends, over the time of the last jump."""
    horizon: Positive = 8.0
    """Rescaled time at which training ends."""
    records: Count = 100
    """Records along a run."""
    substeps: Annotated[tuple[Count, ...], Length(2)] = (8, 16, 32, 64, 128)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        check_ranges(self)
        if not {KEPT, LOST} < set(self.powers) or sorted(set(self.powers)) != list(self.powers):
            raise ValueError(f"powers must increase and hold {KEPT}, {LOST} and others, got {self.powers}")

    @property
    def alone(self) -> tuple[int, ...]:
        """The powers from which coordinates that do not interact are set against their closed form."""
        return tuple(power for power in self.powers if 4 <= power <= EXPLICIT)


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": Config(
        powers=(2, 4, 8, 16, 32, 64, 128, 300, 1000), points=4000, substeps=(8, 16, 32, 64, 128, 256, 512)
    ),
    "paper": Config(
        samples=400,
        powers=(2, 4, 8, 16, 32, 64, 128, 256, 512, 1000),
        points=8000,
        substeps=(8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    ),
}


@jax.jit
def _loss(beta: Array, X: Any, y: Any) -> Array:
    return 0.5 * jnp.mean(jnp.square(y - X @ beta))


def _predict(params: dict[str, Array], X: Array) -> Array:
    return X @ (params["u"] * params["v"])


def _products(params: dict[str, Array]) -> Array:
    return params["u"] * params["v"]


def _problem(seed: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated Gaussian inputs (N, p) and what a Gaussian teacher makes of them."""
    # NumPy's generator: the path of its seed 0 is on record.
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(samples, SIZE))
    X = X @ (np.eye(SIZE) + 0.6 * rng.normal(size=(SIZE, SIZE)) / SIZE**0.5)
    return X, X @ rng.normal(size=SIZE)


def _quadratic(S: Any, c: Any, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Data whose loss is beta S beta / 2 - c beta, up to a constant; more coordinates have c = 0."""
    size = len(c)
    X, y = np.eye(samples, SIZE), np.zeros(samples)
    root = np.linalg.cholesky(np.asarray(S, float))
    X[:size, :size], y[:size] = root.T, np.linalg.solve(root, np.asarray(c, float))
    return samples**0.5 * X, samples**0.5 * y


def _times(path: GreedyPath, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Times that resolve narrow jumps near those of the path, and where among them the records are."""
    jumps = path.times
    end = max(config.beyond * jumps[-1], config.horizon)
    around = np.geomspace(1e-6, 0.5, config.points // (4 * jumps.size))
    records = np.linspace(0, config.horizon, config.records + 1)
    background = np.geomspace(jumps[0] / 50, end, config.points)
    near = jumps[:, None] * (1 + np.concatenate([-around, [0.0], around]))
    taus = np.unique(np.concatenate([records, background, near.ravel()]).astype(path.times.dtype))
    taus = taus[taus <= end]
    return taus, np.searchsorted(taus, records.astype(taus.dtype))


@eqx.filter_jit
def _flows(g: Partial, powers: Any, taus: Any, options: dict[str, Any]) -> Trajectory:
    """The products (A, T, p) along the flow from every alpha; other data of the same shapes share it."""
    u0, v0 = jnp.full(SIZE, FIRST), jnp.full(SIZE, SECOND)

    def flow(lam):
        path = incremental.log_flow(g, u0, v0, lam, taus, **options, **SOLVE)
        return Trajectory(taus, path.ys.beta, path.ok)

    # One after the other, which compiles more quickly than all side by side.
    return map_lanes(flow, LOG10 * powers, at_once=1)


def _integrate(g: dict[str, Partial], times: dict[str, np.ndarray], config: Config) -> dict[str, Trajectory]:
    """The flow of every problem from all moderate alphas, and of the correlated one from the others too."""
    quick = {"solver": diffrax.Dopri8(), "rtol": 1e-9, "atol": 1e-11}
    powers = np.asarray(config.powers, times["correlated"].dtype)
    explicit = powers <= EXPLICIT
    flows = {name: _flows(g[name], powers[explicit], taus, quick) for name, taus in times.items()}
    if not np.all(explicit):
        stiff = {"solver": diffrax.Kvaerno5()}
        rest = _flows(g["correlated"], powers[~explicit], times["correlated"], stiff)
        flows["correlated"] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), flows["correlated"], rest)
    return jax.device_get(flows)


@jax.jit
def _distances(path: GreedyPath, taus: Array, beta: Array) -> Array:
    """Distances of flows (A, T, p) to the staircase, (A,)."""
    return jax.vmap(lambda one: incremental.staircase_distance(path, taus, one))(beta)


def _greedy(name: str, data: tuple[np.ndarray, np.ndarray]) -> tuple[GreedyPath, dict]:
    """The greedy path of a problem, and what is saved of it."""
    path = jax.device_get(incremental.greedy(incremental.negative_gradient(_loss, *data), SIZE))
    losses = jax.vmap(_loss, (0, None, None))(path.beta, *data)
    return path, {
        "beta": (f"stage_{name} product", path.beta),
        "loss": (f"stage_{name}", losses),
        "tied": (f"jump_{name}", path.tied),
        "converged": (f"jump_{name}", path.converged),
        "complete": path.complete,
    }


def _half_time(taus: np.ndarray, share: np.ndarray) -> float:
    """When a share passes one half: its log odds are interpolated, which are linear in time."""
    i = int(np.argmax(share > 0.5))
    near = share[i - 1 : i + 1]
    return float(np.interp(0.0, np.log(near / (1 - near)), taus[i - 1 : i + 1]))


def _alone(config: Config, taus: np.ndarray, beta: np.ndarray) -> dict:
    """Products that do not interact: from one start over time, and from several when each is half learned."""
    by_power = {power: beta[config.powers.index(power), :, :-1] for power in config.alone}
    half = [[_half_time(taus, one) for one in (beta / TARGETS[:-1]).T] for beta in by_power.values()]
    return {
        "alone_power": ("alone_power", np.array(config.alone)),
        "even_time": ("even_time", taus),
        "alone": ("even_time coordinate", by_power[KEPT]),
        "half_time": ("alone_power coordinate", half),
    }


def _conserved(g: Partial, seed: int, ts: np.ndarray) -> dict[str, float]:
    """Along a flow of weights of order one: drift of u^2 - v^2, and how far a product moves."""
    u0, v0 = np.random.default_rng(seed).normal(size=(2, SIZE))
    u, v = jax.device_get(incremental.raw_flow(g, u0, v0, ts).ys)
    conserved = (u - v) * (u + v)
    return {"drift": largest(conserved - conserved[:1]), "moved": largest(u[-1] * v[-1] - u[0] * v[0])}


def _cancellation(g: Partial, taus: np.ndarray, in_logs: dict[int, np.ndarray]) -> dict[str, float]:
    """The flow of two small weights as it is written, beside that in log coordinates: the second product."""
    written = {}
    for power in in_logs:
        start, ts = np.full(SIZE, 10.0**-power), power * LOG10 * taus
        # Weights this small are seen by a relative tolerance only, which is out of reach in 32-bit.
        path = incremental.raw_flow(g, FIRST * start, SECOND * start, ts, atol=1e-250, throw=False)
        written[power] = np.asarray(path.ys.u) * np.asarray(path.ys.v)
    return {
        "kept_gap": largest(written[KEPT] - in_logs[KEPT]),
        "lost_in_logs": in_logs[LOST][-1, 1],
        "lost_as_written": written[LOST][-1, 1],
    }


def _train(data: tuple[np.ndarray, np.ndarray], config: Config) -> tuple[np.ndarray, Trajectory]:
    """The learning rates, and the products along gradient descent from the largest alpha."""
    start, lam = np.full(SIZE, 10.0 ** -config.powers[0]), LOG10 * config.powers[0]
    descent = Descent(config.horizon * lam, config.records, config.substeps)
    params = {"u": FIRST * start, "v": SECOND * start}
    loss = bind(mean_squared_error, (_predict, *data))
    return descent.rates, jax.device_get(descent.train(loss, params, observe=_products)[1])


def run(config: Config, context: Context) -> dict:
    """Find the greedy paths, integrate the flow from every alpha, train at every learning rate."""
    X, y = _problem(context.seed, config.samples)
    data = {
        "correlated": (X, y),
        "orthogonal": _quadratic(np.eye(SIZE), TARGETS, config.samples),
        "turning": _quadratic(*TURNING, config.samples),
        "leaving": _problem(*LEAVING),
        "wrong": (WRONG_FACTOR**0.5 * X, WRONG_FACTOR**0.5 * y),
    }
    g = {name: incremental.negative_gradient(_loss, *pair) for name, pair in data.items()}
    context.progress("greedy algorithm", 0.0)
    paths, saved = {}, {}
    for name in PROBLEMS:
        paths[name], saved[name] = _greedy(name, data[name])

    context.progress("flow from every alpha", 0.25)
    taus, at_records = _times(paths["correlated"], config)
    even = np.linspace(0, HORIZON, taus.size, dtype=taus.dtype)
    times = {"correlated": taus, "wrong": taus, "orthogonal": even, "turning": even}
    flows = _integrate(g, times, config)
    beta = flows["correlated"].ys
    context.progress("flow of the weights", 0.7)
    in_logs = {power: flows["turning"].ys[config.powers.index(power)] for power in (KEPT, LOST)}
    cancellation = _cancellation(g["turning"], even, in_logs)
    context.progress("training at every learning rate", 0.8)
    rates, trained = _train((X, y), config)
    coarsest = lane(trained, int(np.argmax(rates))).ys
    theory = {
        name: Trajectory(trained.ts[0], flows[flow].ys[0, at_records], flows[flow].ok[0])
        for name, flow in (("right", "correlated"), ("wrong", "wrong"))
    }
    return {
        "power": ("power", np.array(config.powers)),
        "rescaled_time": ("rescaled_time", taus),
        "record": ("record", taus[at_records]),
        "rate": ("rate", rates),
        **{f"jump_{name}": (f"jump_{name}", path.times) for name, path in paths.items()},
        "path": saved,
        "gradient_at_zero": ("product", X.T @ y / len(y)),
        "ok": ("flow", np.concatenate([flow.ok for flow in flows.values()])),
        "staircase": ("rescaled_time product", incremental.staircase(paths["correlated"], taus)),
        "distance": ("power", _distances(paths["correlated"], taus, beta)),
        "flow": ("rescaled_time product", {"second": beta[1], "last": beta[-1]}),
        **_alone(config, even, flows["orthogonal"].ys),
        "conserved": _conserved(g["correlated"], context.seed, even),
        "cancellation": cancellation,
        "network": ("record product", {"flow": theory["right"].ys, "trained": coarsest}),
        "gap": ("rate", {name: lane_gaps(path, trained) for name, path in theory.items()}),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The limit, the first activation, what enters and leaves, conservation, cancellation, the network."""
    yield _staircase(config, saved)
    yield _first_activation(config, saved)
    yield _support(config, saved)
    yield from _stages({name: saved[f"path/{name}"] for name in PROBLEMS})
    drift, moved = saved["conserved/drift"], saved["conserved/moved"]
    yield stated(
        "conserved",
        "Gradient flow conserves u^2 - v^2 of every coordinate",
        "boixadsera2023, Lemma 4.1",
        at_most("weights of order one: largest drift", drift, 5e-8, why="a few steps, 1e-8 each"),
        at_least("largest change of a product", moved, 0.1, why="it is not that nothing happened"),
    )
    yield _loses(saved)
    yield stated(
        "network",
        "Gradient descent on u and v follows the flow",
        "boixadsera2023, Equation 3",
        *first_order(saved["rate"], saved["gap"]),
    )


def _staircase(config: Config, saved: Saved) -> Claim:
    distance = dict(zip(config.powers, saved["distance"], strict=True))
    ratios = np.array([distance[2 * power] / distance[power] for power in distance if 2 * power in distance])
    order = convergence_order(saved["power"] * LOG10, saved["distance"]).slope
    taus, gap = saved["rescaled_time"], np.abs(saved["flow/last"] - saved["staircase"])
    jumps = np.append(saved["jump_correlated"], taus[-1])
    middles = np.searchsorted(taus, np.sqrt(jumps[1:] * jumps[:-1])[jumps[1:] > 1.1 * jumps[:-1]])
    missing = gap.max() / largest(np.diff(saved["path/correlated/beta"], axis=0))
    at_all_times = "smallest alpha, at all times: largest gap, over the largest jump"
    in_between = "smallest alpha, middles of stages that last a tenth of their time: largest gap"
    return stated(
        "staircase",
        "As alpha goes to zero the flow in rescaled time tends to the greedy path, but at its jumps",
        "boixadsera2023, Theorem 4.5 (the rate is measured)",
        every("flows that reach the end", saved["ok"]),
        at_most("distance per squaring of alpha: largest ratio", ratios.max(), 0.65, why=HALVES),
        at_least("distance per squaring of alpha: smallest ratio", ratios.min(), 0.4, why=HALVES),
        slope("order of the distance in log(1/alpha)", order, -1, 0.1, why="bent as the ratios are"),
        at_most(in_between, gap[middles].max(), 1e-2, why="exponentially small in log(1/alpha) there"),
        # Between a jump of the path and that of the flow the whole jump is missing.
        at_least(at_all_times, missing, 0.5, why="a whole jump, but for the times in between"),
    )


def _first_activation(config: Config, saved: Saved) -> Claim:
    # Of an unbalanced start only the factor that grows counts, w for one sign and z for the other: what is
    # left out is of the order of alpha^2.
    s = np.asarray(TARGETS[:-1])
    size, grows = np.abs(s), np.where(s > 0, FIRST + SECOND, FIRST - SECOND)
    lams, half = LOG10 * saved["alone_power"][:, None], saved["half_time"]
    odds = 2 * lams + np.log(4 * size / grows**2) + np.log1p(-np.exp(-2 * lams) * grows**2 / (4 * size))
    closed = odds / (2 * size * lams)
    at = config.alone.index(KEPT)
    # The solver's error in the logits is multiplied by 2 log(1/alpha) |s| = 74.
    gap = largest(saved["alone"] - s * expit(2 * size * lams[at] * saved["even_time"][:, None] - odds[at]))
    first = saved["jump_correlated"][0] * largest(saved["gradient_at_zero"])
    waits = largest(saved["jump_orthogonal"] - np.sort(1 / size))
    order = convergence_order(lams[:, 0], np.abs(half[:, 0] - 1 / size[0])).slope
    not_interacting = "coordinates that do not interact: largest difference of T_k to 1 / |s_k|"
    return stated(
        "first-activation",
        "The first product is active at T_1 = min 1 / |g_i(0)|; alone, it is a logistic function of time",
        "boixadsera2023, Equation 8 and section 4.1 (the logistic function is derived here)",
        equals("T_1 over min 1 / |g_i(0)|", first, 1, 1e-12, why=ROUNDING),
        at_most(not_interacting, waits, 1e-12, why=ROUNDING),
        at_most(f"flow to logistic function at alpha = 1e-{KEPT}", gap, 1e-6, why=f"{SOLVER}, times 74"),
        at_most("half times: largest difference", largest(half - closed), 1e-7, why=SOLVER),
        # It is log(4 |s| / w0^2) / (2 |s| lam) and nothing else.
        slope("order of half time - 1 / |s| in log(1/alpha)", order, -1, 1e-3, why="a pure power"),
    )


def _active(beta: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Which products (..., p) are not negligible beside a path (S + 1, p): numbers, which keep a NaN."""
    return np.heaviside(np.abs(beta) / np.max(np.abs(path)) - NEGLIGIBLE, 0)


def _support(config: Config, saved: Saved) -> Claim:
    taus, jumps, path = saved["rescaled_time"], saved["jump_correlated"], saved["path/correlated/beta"]
    starts, ends = np.append(0, jumps), np.append(jumps, taus[-1])
    middles, should = (starts + ends) / 2, _active(path, path)
    lasting = np.flatnonzero(LOG10 * config.powers[-1] * (1 - starts / ends) >= LASTS)
    active = _active(saved["flow/last"][np.searchsorted(taus, middles[lasting])], path)
    entered = np.sum(np.diff(active, axis=0).clip(min=0), axis=1) / np.diff(lasting)

    # The network ends within a stage.
    records, seen = saved["record"], middles < saved["record"][-1]
    at = np.searchsorted(records, middles[seen])
    together = np.sum(np.diff(_active(saved["network/trained"][at], path), axis=0).clip(min=0), axis=1)
    last = np.sum(_active(saved["network/trained"][-1], path) != should[np.searchsorted(jumps, records[-1])])
    flow, network = f"flow from alpha = 1e-{config.powers[-1]}", f"network from alpha = 1e-{config.powers[0]}"
    return qualified(
        "support",
        "In each stage the number of products that are not negligible grows by at most one",
        "boixadsera2023, Theorem 4.5",
        condition="stages last in units of 1 / log(1/alpha); else several products enter at once",
        inside=[
            at_most(
                "jumps of the paths with ties",
                sum(saved[f"path/{name}/tied"].sum() for name in PROBLEMS),
                0,
                why=EXACT,
            ),
            at_most(
                f"{flow}: products that enter per jump, most of {len(lasting)} middles of stages",
                entered.max(),
                1,
                why=EXACT,
            ),
            every(
                f"{flow}: middles where the active products are the path's",
                np.all(active == should[lasting], axis=1),
            ),
            at_most(f"{network}, at its end: products active there or in the path alone", last, 0, why=EXACT),
        ],
        outside=[at_least(f"{network}: products that enter at once, most", together.max(), 2, why=EXACT)],
    )


def _stages(paths: dict[str, dict[str, np.ndarray]]) -> Iterator[Claim]:
    """What leaves from stage to stage of the greedy paths, how the loss falls, and that they end."""
    # As numbers, which keep a NaN.
    active = {name: np.abs(np.sign(path["beta"])) for name, path in paths.items()}
    left = {name: np.diff(1 - on, axis=0).clip(min=0).sum() for name, on in active.items()}
    beta = paths["leaving"]["beta"]
    back = np.sum((beta.min(axis=0) < 0) & (beta.max(axis=0) > 0) & (beta[-1] != 0))
    yield qualified(
        "leaving",
        "Products that are active stay active: the rank increases",
        "boixadsera2023, Appendix A",
        condition="inputs are not correlated; with correlated ones a product can leave, and return later",
        inside=[at_most("inputs without correlation: products that leave", left["orthogonal"], 0, why=EXACT)],
        outside=[
            at_least("correlated inputs: products that leave", left["leaving"], 1, why=EXACT),
            # After b has gone all the way from 0 to 2, or from 2 to 0.
            at_least("those back in the end with the other sign", back, 1, why=EXACT),
        ],
    )
    losses = {name: path["loss"] for name, path in paths.items()}
    rise = np.max([np.diff(values).max() / values[0] for values in losses.values()])
    rest = losses["correlated"][-1] / losses["correlated"][0]
    yield stated(
        "losses",
        "The loss falls from one stage of the greedy path to the next, until nothing is left",
        "boixadsera2023, Algorithm 1",
        at_most("largest rise, over the loss at zero", rise, 1e-15, why=ROUNDING),
        at_most("loss at the end, over that at zero", rest, 1e-15, why=ROUNDING),
        every("stages that settle", np.concatenate([path["converged"] for path in paths.values()])),
        every("paths that end with nothing left", [path["complete"] for path in paths.values()]),
    )


def _loses(saved: Saved) -> Claim:
    found, final = saved["cancellation"], saved["path/turning/beta"][-1, 1]
    in_logs, written = found["lost_in_logs"] / final, abs(found["lost_as_written"] / final)
    kept = f"alpha = 1e-{KEPT}: largest gap to the flow in log coordinates"
    lost = f"alpha = 1e-{LOST}, log coordinates: second product over what it settles to"
    return qualified(
        "cancellation",
        "The flow of u and v can be integrated as it is written, for any alpha",
        "boixadsera2023, Equation 4 (in double precision; measured here)",
        condition="u + v stays above rounding; else a product that would come back is lost, without an error",
        inside=[
            # Where u + v is smallest, rounding of u is some 1e-5 of it, and shifts the jump by as much.
            at_most(kept, found["kept_gap"], 5e-5, why="rounding of u over the smallest u + v")
        ],
        outside=[
            equals(lost, in_logs, 1, 1e-3, why="long after its time, T_2 = 7.8"),
            at_most(f"alpha = 1e-{LOST}, as written: the same", written, 1e-6, why="u + v stays zero"),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Products from two starts over rescaled time, distances to the staircase, training beside the flow."""
    drawn, ((moderate, tiny), (distance, network)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    powers, taus, stairs = config.powers, saved["rescaled_time"], saved["staircase"]
    names = [f"product {index + 1}" for index in range(SIZE)]
    shown = taus > 0
    for ax, beta, power in (
        (moderate, saved["flow/second"], powers[1]),
        (tiny, saved["flow/last"], powers[-1]),
    ):
        plotting.theory_and_trained(ax, taus[shown], stairs[shown], beta[shown], names)
        ax.lines[SIZE].set_label("greedy path")
        ax.set(xscale="log", xlabel="rescaled time t / log(1/α)", ylabel="product u v")
        # Room for the legend before the first jump.
        ax.set_xlim(saved["jump_correlated"][0] / 8, taus[-1])
        ax.set_title(f"Flow from α = 1e-{power}")
    moderate.legend(loc="upper left", fontsize=7.5)

    lams, away = LOG10 * saved["power"], saved["distance"]
    distance.loglog(lams, away, "o", color="C0", label="flow")
    constant = float(lams[-1] * away[-1])
    distance.plot(lams, constant / lams, label=f"slope −1: {constant:.1f} / log(1/α)", **plotting.THEORY)
    distance.set_xticks(lams, [f"{power}" for power in powers])
    distance.set_xticks([], minor=True)
    distance.set_ylim(10 ** np.floor(np.log10(away.min())), 10 ** np.ceil(np.log10(away.max())))
    distance.set(xlabel="log10(1/α)", ylabel="distance, integrated over rescaled time")
    distance.set_title("Distance of the flow to the greedy path")
    distance.legend(loc="upper right")

    beside = (saved["network/flow"], saved["network/trained"])
    plotting.theory_and_trained(network, saved["record"], *beside, names)
    network.lines[0].set_label("gradient descent")
    network.lines[SIZE].set_label("flow")
    handles = [network.lines[0], network.lines[SIZE]]
    network.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.0, 0.93))
    network.set(xlabel="rescaled time t / log(1/α)", ylabel="product u v")
    rate = float(saved["rate"].max())
    network.set_title(f"Training from α = 1e-{powers[0]}, learning rate {rate:.2g}")
    return drawn
