"""Linear regression on products of weights: the greedy algorithm, the flow down to alpha = 1e-1000, training.

The network X (u v) is the simplest one that depends on products. Its flow from (alpha u0, alpha v0) is
integrated in log coordinates for one power of ten after the other and set against the staircase of the greedy
algorithm; gradient descent from the largest alpha is set against the flow. A problem whose coordinates do not
interact gives the time of an activation in closed form, and one of two coordinates shows where the flow of
the weights themselves is lost to cancellation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure
from scipy.special import expit

from dynamics import incremental
from dynamics.flow import Trajectory
from dynamics.incremental import GreedyPath, greedy, log_flow, negative_gradient, raw_flow
from models.losses import bind, mean_squared_error
from models.training import train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.compare import WRONG_FACTOR, convergence_order, first_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

LOG10 = float(np.log(10))
SIZE = 6
FIRST, SECOND = 1.0, 0.5  # the factors at the start, over alpha
# Targets of the coordinates that do not interact; the last one has nothing to learn.
TARGETS = (2.0, -1.5, 1.0, -0.75, 0.5, 0.0)
# Two that do: the second one is pushed down to b = 1.7 before the first is active, and up from then on.
TURNING = (((1.0, -0.95), (-0.95, 1.2)), (1.0, -0.7))
KEPT, LOST = 8, 16  # powers of ten: u + v of the second one is above rounding then, and below it
LEAVING = (0, 40)  # seed and samples of a problem where a product leaves, and returns with the other sign
EXPLICIT = 32  # the power of ten up to which an explicit solver is the quicker one
HORIZON = 9.0  # rescaled time that is long enough for both


@dataclass(frozen=True)
class Config:
    """Starts and learning rates."""

    samples: int = 40
    """Samples of the regression problem, which has six products."""
    powers: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Starts alpha = 10^-power; gradient descent is run from the first, the scalar problem starts at 4."""
    points: int = 1500
    """Times of the flow, equally spaced in their logarithm; half as many are added around the jumps."""
    beyond: float = 1.35
    """Time at which the flow ends, over the time of the last jump."""
    horizon: float = 8.0
    """Rescaled time at which training ends."""
    records: int = 100
    """Records along a run."""
    substeps: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        require_sweeps(self, "substeps")
        if not {KEPT, LOST} < set(self.powers) or sorted(set(self.powers)) != list(self.powers):
            raise ValueError(f"powers must increase and hold {KEPT}, {LOST} and others, got {self.powers}")
        if self.powers[0] < 1:
            raise ValueError(f"powers must be positive, got {self.powers}")
        if self.samples < SIZE:
            raise ValueError(f"samples must be at least {SIZE}, got {self.samples}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        powers=(2, 4, 8, 16, 32, 64, 128, 300, 1000),
        points=4000,
        substeps=(8, 16, 32, 64, 128, 256, 512),
    ),
    "paper": replace(
        Config(),
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


def _flows(g: Partial, powers: tuple[int, ...], taus: np.ndarray) -> Trajectory:
    """The flow from every alpha: one program, which other data of the same shapes share."""
    u0, v0 = np.full(SIZE, FIRST), np.full(SIZE, SECOND)
    options: dict[str, Any] = {"solver": diffrax.Kvaerno5()}
    if powers[-1] <= EXPLICIT:
        options = {"solver": diffrax.Dopri8(), "rtol": 1e-9, "atol": 1e-11}
    lams = LOG10 * np.asarray(powers, taus.dtype)
    return jax.tree.map(np.asarray, jax.vmap(lambda lam: log_flow(g, u0, v0, lam, taus, **options))(lams))


def run(config: Config, context: Context) -> Result:
    """Find the greedy paths, integrate the flow from every alpha, train at every learning rate."""
    X, y = _problem(context.seed, config.samples)
    data = {
        "correlated": (X, y),
        "orthogonal": _quadratic(np.eye(SIZE), TARGETS, config.samples),
        "turning": _quadratic(*TURNING, config.samples),
        "leaving": _problem(*LEAVING),
    }
    g = {name: negative_gradient(_loss, *pair) for name, pair in data.items()}

    context.progress("greedy algorithm", 0.0)
    paths = {name: jax.tree.map(np.asarray, greedy(gradient, SIZE)) for name, gradient in g.items()}
    path = paths["correlated"]

    context.progress("flow from every alpha", 0.25)
    taus, at_records = _times(path, config)
    even = np.linspace(0, HORIZON, taus.size, dtype=taus.dtype)
    times = {"correlated": taus, "wrong": taus, "orthogonal": even, "turning": even}
    g["wrong"] = negative_gradient(_loss, WRONG_FACTOR**0.5 * X, WRONG_FACTOR**0.5 * y)
    moderate = tuple(power for power in config.powers if power <= EXPLICIT)
    flows = {name: _flows(g[name], moderate, grid) for name, grid in times.items()}
    beta, ok = flows["correlated"].ys.beta, np.concatenate([flow.ok for flow in flows.values()])
    if len(config.powers) > len(moderate):
        rest = _flows(g["correlated"], config.powers[len(moderate) :], taus)
        beta, ok = np.concatenate([beta, rest.ys.beta]), np.concatenate([ok, rest.ok])
    stairs = np.asarray(incremental.staircase(path, taus))
    distance = np.asarray(jax.vmap(lambda beta: incremental.staircase_distance(path, taus, beta))(beta))

    context.progress("flow of the weights", 0.7)
    u0, v0 = np.random.default_rng(context.seed).normal(size=(2, SIZE))
    free = jax.tree.map(np.asarray, raw_flow(g["correlated"], u0, v0, even))
    raw = {}
    for power in (KEPT, LOST):
        start = np.full(SIZE, 10.0**-power)
        ts = power * LOG10 * even
        # Weights this small are seen by a relative tolerance only, which is out of reach in 32-bit.
        weights = raw_flow(g["turning"], FIRST * start, SECOND * start, ts, atol=1e-250, throw=False).ys
        raw[power] = np.asarray(weights.u) * np.asarray(weights.v)

    context.progress("training at every learning rate", 0.8)
    alpha, lam = 10.0 ** -config.powers[0], LOG10 * config.powers[0]
    start = np.full(SIZE, alpha)
    rates, trained = train_at_rates(
        bind(mean_squared_error, (_predict, X, y)),
        {"u": FIRST * start, "v": SECOND * start},
        config.substeps,
        horizon=config.horizon * lam,
        points=config.records,
        observe=_products,
    )
    theory, wrong = (
        Trajectory(trained.ts[0], flows[name].ys.beta[0, at_records], flows[name].ok[0])
        for name in ("correlated", "wrong")
    )
    gaps = {"flow": lane_gaps(theory, trained), "wrong": lane_gaps(wrong, trained)}

    saved = {
        "lams": LOG10 * np.asarray(config.powers),
        "taus": taus,
        "beta": beta,
        "staircase": stairs,
        "jumps": path.times,
        "distance": distance,
        "rates": rates,
        "gap": gaps,
        "records": {
            "taus": taus[at_records],
            "theory": theory.ys,
            "trained": lane(trained, int(np.argmax(rates))).ys,
        },
    }
    claims = (
        _staircase(config.powers, distance, ok, path, taus, beta[-1] - stairs),
        _first_activation(moderate, paths, data, even, flows["orthogonal"]),
        _support(paths),
        _leaving(paths),
        _losses(paths, data),
        _conserved(free),
        _cancellation(moderate, paths["turning"], raw, flows["turning"]),
        first_order(
            "incremental.linear/network",
            "Gradient descent on u and v follows the flow",
            "boixadsera2023, Equation 3",
            rates,
            gaps["flow"],
            gaps["wrong"],
        ),
    )
    dims = {
        "lams": ("alpha",),
        "distance": ("alpha",),
        "taus": ("time",),
        "beta": ("alpha", "time", "product"),
        "staircase": ("time", "product"),
        "jumps": ("jump",),
        "rates": ("rate",),
        **{f"gap/{name}": ("rate",) for name in gaps},
        "records/taus": ("record",),
        **{f"records/{name}": ("record", "product") for name in ("theory", "trained")},
    }
    return Result(saved, claims, dims)


def _staircase(
    powers: tuple[int, ...],
    distance: np.ndarray,
    ok: np.ndarray,
    path: GreedyPath,
    taus: np.ndarray,
    gap: np.ndarray,
) -> Claim:
    ratios = np.array(
        [
            distance[powers.index(2 * power)] / distance[i]
            for i, power in enumerate(powers)
            if 2 * power in powers
        ]
    )
    jumps = np.append(path.times, taus[-1])
    middles = np.searchsorted(taus, np.sqrt(jumps[1:] * jumps[:-1])[jumps[1:] > 1.1 * jumps[:-1]])
    return Claim(
        "incremental.linear/staircase",
        "As alpha goes to zero the flow in rescaled time tends to the greedy path, but at its jumps",
        "boixadsera2023, Theorem 4.5 (the rate is measured)",
        "stated",
        [
            all_of("flows that reach the end", ok),
            # One half in the limit; terms of the order exp(-lam) and the widths of the jumps bend it.
            Check("distance per squaring of alpha: largest ratio", "at most", 0.65, ratios.max()),
            Check("distance per squaring of alpha: smallest ratio", "at least", 0.4, ratios.min()),
            # The same bend, over the whole range.
            Check(
                "order of the distance in log(1/alpha)",
                "slope",
                -1.0,
                convergence_order(np.asarray(powers) * LOG10, distance).slope,
                0.1,
            ),
            # The gap there falls exponentially with log(1/alpha) and the length of the stage.
            Check(
                "smallest alpha, middles of stages that last a tenth of their time: largest gap",
                "at most",
                1e-2,
                np.abs(gap[middles]).max(),
            ),
            # Between a jump of the path and that of the flow the whole jump is missing.
            Check(
                "smallest alpha, at all times: largest gap, over the largest jump",
                "at least",
                0.5,
                np.abs(gap).max() / np.abs(np.diff(path.beta, axis=0)).max(),
            ),
        ],
    )


def _first_activation(
    powers: tuple[int, ...],
    paths: dict[str, GreedyPath],
    data: dict[str, tuple[np.ndarray, np.ndarray]],
    taus: np.ndarray,
    flow: Trajectory,
) -> Claim:
    X, y = data["correlated"]
    at_zero = np.abs(X.T @ y) / len(y)
    # Of an unbalanced start only the factor that grows counts, w for one sign and z for the other: what is
    # left out is of the order of alpha^2.
    s = np.asarray(TARGETS[:-1])
    size, grows = np.abs(s), np.where(s > 0, FIRST + SECOND, FIRST - SECOND)
    powers_used = np.asarray([power for power in powers if power >= 4])
    lams = LOG10 * powers_used[:, None]
    odds = 2 * lams + np.log(4 * size / grows**2) + np.log1p(-np.exp(-2 * lams) * grows**2 / (4 * size))
    half = odds / (2 * size * lams)
    beta = flow.ys.beta[-len(lams) :, :, :-1]
    measured = np.array([[_half_time(taus, one[:, i] / s[i]) for i in range(s.size)] for one in beta])
    at = int(np.flatnonzero(powers_used == KEPT)[0])
    logistic = s * expit(2 * size * lams[at] * taus[:, None] - odds[at])
    return Claim(
        "incremental.linear/first-activation",
        "The first product is active at T_1 = min 1 / |g_i(0)|; alone, it is a logistic function of time",
        "boixadsera2023, Equation 8 and section 4.1 (the logistic function is derived here)",
        "stated",
        [
            # Rounding.
            Check(
                "T_1 over min 1 / |g_i(0)|",
                "equals",
                1.0,
                paths["correlated"].times[0] * at_zero.max(),
                1e-12,
            ),
            Check(
                "coordinates that do not interact: largest difference of T_k to 1 / |s_k|",
                "at most",
                1e-12,
                np.abs(np.asarray(paths["orthogonal"].times) - np.sort(1 / np.abs(s))).max(),
            ),
            # The solver's tolerance, which 2 log(1/alpha) |s| = 74 multiplies.
            Check(
                f"flow to logistic function at alpha = 1e-{KEPT}",
                "at most",
                1e-6,
                np.abs(beta[at] - logistic).max(),
            ),
            # The tolerance as it is.
            Check("half times: largest difference", "at most", 1e-7, np.abs(measured - half).max()),
            # log(4 |s| / w0^2) / (2 |s| lam) and nothing else.
            Check(
                "order of half time - 1 / |s| in log(1/alpha)",
                "slope",
                -1.0,
                convergence_order(lams[:, 0], np.abs(measured[:, 0] - 1 / size[0])).slope,
                1e-3,
            ),
        ],
    )


def _half_time(taus: np.ndarray, share: np.ndarray) -> float:
    """When a share passes one half: its log odds are interpolated, which are linear in time."""
    i = int(np.argmax(share > 0.5))
    near = share[i - 1 : i + 1]
    return float(np.interp(0.0, np.log(near / (1 - near)), taus[i - 1 : i + 1]))


def _support(paths: dict[str, GreedyPath]) -> Claim:
    active = [np.asarray(path.beta) != 0 for path in paths.values()]
    entered = np.concatenate([np.sum(on[1:] & ~on[:-1], axis=1) for on in active])
    return Claim(
        "incremental.linear/support",
        "In each stage the number of products that are not negligible grows by at most one",
        "boixadsera2023, Theorem 4.5",
        "stated",
        [
            # Counts are exact.
            Check(f"products that enter, most of {entered.size} stages", "at most", 1, entered.max()),
            Check("jumps with ties", "at most", 0, sum(int(np.sum(path.tied)) for path in paths.values())),
            all_of("stages that settle", np.concatenate([path.converged for path in paths.values()])),
            all_of("paths that end with nothing left", [bool(path.complete) for path in paths.values()]),
        ],
    )


def _leaving(paths: dict[str, GreedyPath]) -> Claim:
    betas = {name: path.beta for name, path in paths.items()}
    left = {name: np.sum((beta[:-1] != 0) & (beta[1:] == 0)) for name, beta in betas.items()}
    beta = betas["leaving"]
    back = (beta.min(axis=0) < 0) & (beta.max(axis=0) > 0) & (beta[-1] != 0)
    return Claim(
        "incremental.linear/leaving",
        "Products that are active stay active: the rank increases",
        "boixadsera2023, Appendix A",
        "qualified",
        [
            # Counts are exact.
            Check("inputs without correlation: products that leave", "at most", 0, int(left["orthogonal"])),
            Check("correlated inputs: products that leave", "at least", 1, int(left["leaving"])),
            # After b has gone all the way from 0 to 2, or from 2 to 0.
            Check("those back in the end with the other sign", "at least", 1, int(back.sum())),
        ],
        condition="inputs are not correlated; with correlated ones a product can leave, and return later",
    )


def _losses(paths: dict[str, GreedyPath], data: dict[str, tuple[np.ndarray, np.ndarray]]) -> Claim:
    losses = {
        name: np.asarray(jax.vmap(_loss, (0, None, None))(path.beta, *data[name]))
        for name, path in paths.items()
    }
    rises = [np.diff(values).max() / values[0] for values in losses.values()]
    return Claim(
        "incremental.linear/losses",
        "The loss falls from one stage of the greedy path to the next",
        "boixadsera2023, Algorithm 1",
        "stated",
        [
            # Rounding.
            Check("largest rise, over the loss at zero", "at most", 1e-15, max(rises)),
            Check(
                "loss at the end, over that at zero",
                "at most",
                1e-15,
                losses["correlated"][-1] / losses["correlated"][0],
            ),
        ],
    )


def _conserved(free: Trajectory) -> Claim:
    conserved = np.asarray(incremental.conserved_quantity(free.ys.u, free.ys.v))
    drift = np.abs(conserved - conserved[:1])
    moved = free.ys.u * free.ys.v
    return Claim(
        "incremental.linear/conserved",
        "Gradient flow conserves u^2 - v^2 of every coordinate",
        "boixadsera2023, Lemma 4.1",
        "stated",
        [
            # The tolerance of a few steps, 1e-8 each.
            Check("weights of order one: largest drift", "at most", 5e-8, drift.max()),
            # It is not that nothing happened.
            Check("largest change of a product", "at least", 0.1, np.abs(moved[-1] - moved[0]).max()),
        ],
    )


def _cancellation(
    powers: tuple[int, ...], path: GreedyPath, raw: dict[int, np.ndarray], flow: Trajectory
) -> Claim:
    logs = {power: flow.ys.beta[powers.index(power)] for power in raw}
    final = float(path.beta[-1, 1])
    return Claim(
        "incremental.linear/cancellation",
        "The flow of u and v can be integrated as it is written, for any alpha",
        "boixadsera2023, Equation 4 (in double precision; measured here)",
        "qualified",
        [
            # Where u + v is smallest, rounding of u is some 1e-5 of it, and shifts the jump by as much.
            Check(
                f"alpha = 1e-{KEPT}: largest gap to the flow in log coordinates",
                "at most",
                5e-5,
                np.abs(raw[KEPT] - logs[KEPT]).max(),
            ),
            # Long after its time, T_2 = 7.8.
            Check(
                f"alpha = 1e-{LOST}, log coordinates: second product over what it settles to",
                "equals",
                1.0,
                logs[LOST][-1, 1] / final,
                1e-3,
            ),
            # u + v is zero, and stays so.
            Check(f"alpha = 1e-{LOST}, as written: the same", "at most", 1e-6, abs(raw[LOST][-1, 1] / final)),
        ],
        condition="u + v stays above rounding; else a product that would come back is lost, without an error",
    )


def figure(saved: Saved) -> Figure:
    """Products from two starts over rescaled time, distances to the staircase, training beside the flow."""
    drawn, ((moderate, tiny), (distance, network)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    powers, taus = saved.config["powers"], saved["taus"]
    names = [f"product {index + 1}" for index in range(SIZE)]
    shown = taus > 0
    for ax, index in ((moderate, 1), (tiny, len(powers) - 1)):
        beta, stairs = saved["beta"][index], saved["staircase"]
        plotting.theory_and_trained(ax, taus[shown], stairs[shown], beta[shown], names)
        ax.lines[SIZE].set_label("greedy path")
        ax.set(xscale="log", xlabel="rescaled time t / log(1/α)", ylabel="product u v")
        # Room for the legend before the first jump.
        ax.set_xlim(saved["jumps"][0] / 8, taus[-1])
        ax.set_title(f"Flow from α = 1e-{powers[index]}")
    moderate.legend(loc="upper left", fontsize=7.5)

    lams, away = saved["lams"], saved["distance"]
    distance.loglog(lams, away, "o", color="C0", label="flow")
    constant = float(lams[-1] * away[-1])
    distance.plot(lams, constant / lams, label=f"slope −1: {constant:.1f} / log(1/α)", **plotting.THEORY)
    distance.set_xticks(lams, [f"{power}" for power in powers])
    distance.set_xticks([], minor=True)
    distance.set_ylim(10 ** np.floor(np.log10(away.min())), 10 ** np.ceil(np.log10(away.max())))
    distance.set(xlabel="log10(1/α)", ylabel="distance, integrated over rescaled time")
    distance.set_title("Distance of the flow to the greedy path")
    distance.legend(loc="upper right")

    times = saved["records/taus"]
    plotting.theory_and_trained(network, times, saved["records/theory"], saved["records/trained"], names)
    network.lines[0].set_label("gradient descent")
    network.lines[SIZE].set_label("flow")
    handles = [network.lines[0], network.lines[SIZE]]
    network.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.0, 0.93))
    network.set(xlabel="rescaled time t / log(1/α)", ylabel="product u v")
    rate = float(saved["rates"].max())
    network.set_title(f"Training from α = 1e-{powers[0]}, learning rate {rate:.2g}")
    return drawn
