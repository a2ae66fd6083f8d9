"""The phase portrait of linear BYOL: which modes collapse, by weight decay, predictor and moving average.

Once predictor and features are aligned, each mode has an eigenvalue p of the predictor, s of the features,
and a size tau of its target. On balance, s = p^2 / alpha_p, it moves along a line: zero is stable, and so is
p_plus; p_minus in between is the threshold of collapse. A network that is trained walks on this portrait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.flow import Trajectory
from dynamics.noncontrastive import (
    ByolWeights,
    Modes,
    collapse_threshold,
    decoupled_flow,
    fixed_points,
    phase_velocity,
)
from models.byol import LinearByol, byol_loss, byol_weights, exact_views, flow_gradient
from models.draws import normal
from models.functional import as_function
from models.training import Descent
from sims import plotting
from sims.claims import (
    ROUNDING,
    Claim,
    Preset,
    at_least,
    at_most,
    every,
    qualified,
    stated,
)
from sims.compare import SOLVE, first_order, lane, lane_gaps, largest, require_ok, right_and_wrong
from sims.ranges import Positive, Range, check_ranges
from sims.results import Context, Saved

SLIDES = "tian2021directpred, the talk's slides on why there is no collapse"
VARIANCE = 0.25  # sigma^2 of the augmentation
VARIANCES = (0.0, 0.25, 1.0)  # where the critical weight decay is looked at
DECAY = 0.04  # weight decay, where it is not swept
SHARES = (0.2, 1.0, 1.25)  # weight decays of the phase lines, over the critical one
DECAYS = (0.01, 0.04, 0.1, 0.19, 0.21)  # the last is above the critical 1 / (4 (1 + sigma^2)) = .2
TAUS = (1.0, 0.7)
IMBALANCES = (-0.001, 0.0, 0.0005, 0.001, 0.002)  # c = s - p^2 / alpha_p at the start
PREDICTOR_RATES = (0.25, 1.0, 4.0)
EMA_RATES = (0.02, 0.1, 0.5, 2.0, np.inf)  # the last is no moving average
TARGETS = (0.5, 1.0, 1.5)  # tau at the start
EDGE = 1e-3  # how far from a threshold, relatively, starts on both of its sides are
LONG = 3000.0  # time after which starts near a threshold have left it
PLANE = 0.12, 0.01  # the largest p and s of the portrait
STIFF = 1e4  # a moving average that is as good as none
WALKERS = (0.02, 0.035, 0.06, 0.3)  # p of the modes of a network at the start


@dataclass(frozen=True)
class Config:
    """The portrait, and the network that walks on it."""

    cells: Annotated[int, Range(at_least=20)] = 60
    """Starts of the portrait along each axis."""
    stiff_cells: Annotated[int, Range(at_least=10)] = 20
    """The same for the fast moving average."""
    starts: Annotated[int, Range(at_least=50)] = 130
    """Starts between which a threshold is looked for, by moving average and target."""
    duration: Positive = 600.0
    """Time after which a mode of the portrait is looked at."""
    descent: Descent = Descent(horizon=200.0, points=50, substeps=(10, 30, 100, 300))
    """Training of the network at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if self.cells % self.stiff_cells:
            raise ValueError(f"cells must be a multiple of stiff_cells, {self.stiff_cells}, got {self.cells}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        cells=300,
        stiff_cells=60,
        starts=400,
        descent=Descent(200.0, 50, (10, 30, 100, 300, 1000)),
    ),
    "paper": replace(Config(), cells=600, stiff_cells=60, starts=800, duration=900.0),
}


USUAL = {"augmentation_variance": VARIANCE, "predictor_rate": 1.0, "weight_decay": DECAY, "ema_rate": np.inf}


def _flow(start: Sequence[Any], ts: Any, **rates: Any) -> Modes:
    """Modes over time from p, s and tau, for these rates in place of the usual ones."""
    p0, s0, tau0 = start
    path = decoupled_flow(p0, s0, tau0, ts, **USUAL | rates, **SOLVE)
    require_ok("the decoupled flow", path)
    return jax.device_get(path.ys)


def _flows(ts: Any, sweeps: dict[str, dict[str, Any]]) -> dict[str, Modes]:
    """Modes over time of several sweeps, from one solve: p0, and what is not as usual."""
    names = ("p0", "s0", "tau0", *USUAL)
    arrays = {
        name: np.broadcast_arrays(
            *(({"tau0": 1.0, "s0": sweep["p0"] ** 2} | USUAL | sweep)[n] for n in names)
        )
        for name, sweep in sweeps.items()
    }
    *start, variance, alpha_p, eta, beta = (
        np.concatenate([part[i].ravel() for part in arrays.values()]) for i in range(len(names))
    )
    modes = _flow(
        start, ts, augmentation_variance=variance, predictor_rate=alpha_p, weight_decay=eta, ema_rate=beta
    )
    ends = np.cumsum([part[0].size for part in arrays.values()])[:-1]
    parts = [np.split(np.asarray(leaf), ends, axis=1) for leaf in modes]
    return {
        name: Modes(*(leaf[index].reshape(-1, *arrays[name][0].shape) for leaf in parts))
        for index, name in enumerate(arrays)
    }


def _lines() -> dict:
    """Speeds along phase lines, their fixed points, and the slopes there by autodiff."""
    decays = np.array(SHARES) / (4 * (1 + VARIANCE))
    p = np.linspace(-0.1, 1.0, 221)
    points = np.stack(fixed_points(1.0, decays, VARIANCE), axis=1)
    speed = jax.vmap(jax.vmap(jax.value_and_grad(phase_velocity), (0, None, None, None)), (0, None, 0, None))
    at_points, slopes = jax.jit(speed)(jnp.nan_to_num(points), 1.0, decays, VARIANCE)
    return {
        "weight_decay": ("weight_decay", decays),
        "at": ("at", p),
        "speed": ("weight_decay at", np.asarray(phase_velocity(p[None], 1.0, decays[:, None], VARIANCE))),
        "point": ("weight_decay point", points),
        "rest": ("weight_decay point", np.where(np.isnan(points), np.nan, at_points)),
        "slope": ("weight_decay point", np.where(np.isnan(points), np.nan, slopes)),
    }


def _thresholds() -> dict:
    """Thresholds of collapse by bisection, in sweeps that share one program."""
    decays, taus = np.array(DECAYS), np.array(TAUS)
    imbalances, rates = np.array(IMBALANCES), np.array(PREDICTOR_RATES)
    sweeps = {
        "line": (taus[:, None], decays[None], 0.0, 1.0),
        "imbalance": (1.0, DECAY, imbalances[:, None], rates[None]),
        "regime": (1.0, decays, 0.01, 1.0),
    }
    flat = [np.broadcast_arrays(*sweep) for sweep in sweeps.values()]
    tau, decay, c, rate = (np.concatenate([sweep[i].ravel() for sweep in flat]) for i in range(4))
    found = np.asarray(collapse_threshold(tau, decay, VARIANCE, c, rate, duration=LONG))
    ends = np.cumsum([sweep[0].size for sweep in flat])
    parts = dict(zip(sweeps, np.split(found, ends[:-1]), strict=True))
    shapes = {name: sweep[0].shape for name, sweep in zip(sweeps, flat, strict=True)}
    curve = np.linspace(0, decays[-1], 301)
    return {
        "tau": ("tau", taus),
        "curve_decay": ("curve_decay", curve),
        "curve": (
            "tau curve_decay point",
            np.stack(fixed_points(taus[:, None], curve[None], VARIANCE), axis=-1),
        ),
        "decay": ("decay", decays),
        "imbalance": ("imbalance", imbalances),
        "rate": ("rate", rates),
        "line": ("tau decay", parts["line"].reshape(shapes["line"])),
        "minus": ("tau decay", np.asarray(fixed_points(taus[:, None], decays[None], VARIANCE).p_minus)),
        "by_imbalance": ("imbalance rate", parts["imbalance"].reshape(shapes["imbalance"])),
        "regime": ("decay", parts["regime"]),
    }


def _long(config: Config, by_imbalance: np.ndarray) -> dict:
    """What many starts come to: beside fixed points that meet, beside thresholds, under moving averages."""
    sides, variances = 1 + EDGE * np.array([-1.0, 1.0]), np.array(VARIANCES)[:, None]
    decays, meeting = sides / (4 * (1 + variances)), 1 / (2 * (1 + variances))
    beside, alpha_p = sides[:, None, None] * by_imbalance[None], np.array(PREDICTOR_RATES)
    minus, plus = (float(p) for p in fixed_points(1.0, DECAY, VARIANCE))
    betas, p0 = np.array(EMA_RATES), np.linspace(0, 0.2, config.starts + 1)[1:]
    # From balance a trajectory follows the line, from elsewhere what is left of the imbalance.
    on_line = np.maximum(beside**2 / alpha_p + np.array(IMBALANCES)[:, None], 0)
    ts = np.append(np.linspace(0, 300, 301), LONG)
    found = _flows(
        ts,
        {
            "saddle_node": {
                "p0": np.broadcast_to(2 * meeting, decays.shape),
                "weight_decay": decays,
                "augmentation_variance": variances,
            },
            "beside": {"p0": beside, "s0": on_line, "predictor_rate": alpha_p},
            "minus": {"p0": minus * sides[:, None], "ema_rate": betas},
            "walk": {"p0": np.full(len(betas), 0.1), "ema_rate": betas},
            "grid": {"p0": p0, "tau0": np.array(TARGETS)[:, None, None], "ema_rate": betas[:, None]},
        },
    )
    survive, walk = found["grid"].p[-1] > plus / 2, found["walk"]
    first = np.where(survive.any(-1), p0[np.argmax(survive, axis=-1)], np.inf)
    return {
        "saddle_node": {
            "variance": ("variance", variances[:, 0]),
            "end": ("variance side", found["saddle_node"].p[-1]),
            "plus": ("variance", np.asarray(fixed_points(1.0, decays[:, 0], variances[:, 0]).p_plus)),
        },
        "beside": ("side imbalance rate", found["beside"].p[-1]),
        "momentum": {
            "ema_rate": ("ema_rate", betas),
            "target": ("target", np.array(TARGETS)),
            "beside": ("side ema_rate", found["minus"].p[-1]),
            "time": ("time", ts[:-1]),
            "walk": ("time ema_rate", {"p": walk.p[:-1], "tau": walk.tau[:-1]}),
            "threshold": ("target ema_rate", first),
            "spacing": float(p0[1] - p0[0]),
        },
    }


def _portrait(config: Config) -> dict:
    """Where modes end by their start: without a moving average, with a slow one, and with a very fast one."""
    p0, s0 = (np.linspace(0, high, config.cells) for high in PLANE)
    betas = np.array([np.inf, EMA_RATES[0]])[:, None, None]
    ts, every = [0.0, config.duration], config.cells // config.stiff_cells
    without, slow = _flow((p0[:, None], s0[None], 1.0), ts, ema_rate=betas).p[-1]
    few, start = without[::every, ::every], (p0[::every, None], s0[None, ::every], 1.0)
    return {
        "p": ("p", p0),
        "s": ("s", s0),
        "end": ("p s", {"without": without, "slow": slow}),
        "coarse": ("few_p few_s", {"without": few, "stiff": _flow(start, ts, ema_rate=STIFF).p[-1]}),
    }


@jax.jit
def _start(key: Array) -> tuple[Modes, ByolWeights, Array, Array]:
    """Aligned modes on both sides of the threshold, the network that has them, and their directions."""
    n = len(WALKERS)
    one, other = jax.random.split(key)
    U, V = (jnp.linalg.qr(normal(key, (n, n)))[0] for key in (one, other))
    p = jnp.array(WALKERS)
    W = (U * p[None]) @ V.T
    return Modes(p, p**2, jnp.ones(n)), ByolWeights(W, (U * p[None]) @ U.T, W), U, V


def _modes(U: Array, params: Any) -> dict[str, Array]:
    """The eigenvalues p and s along the directions of the start."""
    W, Wp, _ = byol_weights(params)
    return {"p": jnp.sum(U * (Wp @ U), axis=0), "s": jnp.sum((W.T @ U) ** 2, axis=0)}


def _walk(config: Config, key: Array) -> dict:
    """A network with modes on both sides of the threshold, at several learning rates, beside the flow."""
    start, weights, U, _ = _start(key)
    one, rates = jnp.eye(len(WALKERS)), {"ema_rate": 0.5, "weight_decay": DECAY}
    predict, params = as_function(LinearByol(weights))
    loss = Partial(byol_loss, predict, views=exact_views(one, VARIANCE * one))
    learning_rates, trained = jax.device_get(
        config.descent.train(loss, params, Partial(_modes, U), flow_gradient(**rates))
    )
    ts = config.descent.times
    flows = right_and_wrong(lambda factor: _flow(start, factor * ts, ema_rate=0.5))
    flows = {name: Trajectory(ts, {"p": modes.p, "s": modes.s}, True) for name, modes in flows.items()}
    require_ok("training", trained)
    finest = lane(trained, int(np.argmin(learning_rates)))
    return {
        "rate": ("learning_rate", learning_rates),
        "time": ("walk_time", ts),
        "theory": ("walk_time mode", flows["right"].ys),
        "trained": ("walk_time mode", {name: np.asarray(part) for name, part in finest.ys.items()}),
        "gap": ("learning_rate", {name: lane_gaps(path, trained) for name, path in flows.items()}),
    }


def run(config: Config, context: Context) -> dict:
    """Phase lines, thresholds, what the moving average does, portraits, and a network that walks on one."""
    context.progress("phase lines and thresholds", 0.0)
    thresholds = _thresholds()
    context.progress("long after", 0.3)
    long = _long(config, thresholds["by_imbalance"][1])
    context.progress("portraits", 0.5)
    portrait = _portrait(config)
    context.progress("training", 0.8)
    return {
        "line": _lines(),
        "threshold": thresholds | {"beside": long.pop("beside")},
        **long,
        "portrait": portrait,
        "walk": _walk(config, jax.random.key(context.seed)),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Where modes rest, which collapse, and what moves the threshold."""
    yield _of_line(saved)
    yield _of_saddle_node(saved)
    yield _of_balance(saved)
    yield _of_decay(saved)
    yield _of_predictor_rate(saved)
    yield _of_moving_average(saved)
    yield _of_speed(saved)
    yield _of_fast_average(saved)
    yield _of_walk(saved)


def _of_line(saved: Saved) -> Claim:
    points, slopes = np.asarray(saved["line/point"]), np.asarray(saved["line/slope"])
    found, minus = np.asarray(saved["threshold/line"]), np.asarray(saved["threshold/minus"])
    there = np.isfinite(minus)
    return stated(
        "line",
        "On balance p' = p (tau p - (1 + sigma^2) p^2 - eta): p_plus is stable, and a mode from below "
        "p_minus collapses",
        SLIDES,
        at_most(
            "speed at the fixed points", largest(np.asarray(saved["line/rest"])[:2]), 2e-16, why=ROUNDING
        ),
        at_least("slope of the speed at p_minus", slopes[0, 0], 0.01, why="it is unstable"),
        at_most("slope of the speed at p_plus", slopes[0, 1], -0.1, why="it is stable"),
        at_most(
            "both slopes less p (tau - 2 (1 + sigma^2) p)",
            largest(slopes[0] - points[0] * (1 - 2 * (1 + VARIANCE) * points[0])),
            2e-16,
            why=ROUNDING,
        ),
        at_most(
            "thresholds by bisection less p_minus, all decays and targets",
            largest(found[there] - minus[there]),
            1e-8,
            why="thirty halvings of a bracket of 1.6 leave 1.5e-9",
        ),
        every("decays above the critical one at which all starts collapse", np.isinf(found[~there])),
    )


def _of_saddle_node(saved: Saved) -> Claim:
    below, above = np.asarray(saved["saddle_node/end"]).T
    return stated(
        "saddle-node",
        "The stable point and the threshold meet at eta = tau^2 / (4 (1 + sigma^2)), and vanish beyond",
        SLIDES,
        at_most(
            f"sigma^2 from 0 to {np.max(saved['saddle_node/variance']):g}, 0.1 % below: end of a mode from "
            "twice that place, less p_plus",
            largest(below - np.asarray(saved["saddle_node/plus"])),
            1e-10,
            why="it comes to rest at rates near .01",
        ),
        at_most("0.1 % above it: end of the same", largest(above), 1e-6, why="nothing but zero is left"),
        at_most(
            "thresholds at tau = .7 that differ from p_minus, or are finite above .7^2 / (4 (1 + sigma^2))",
            np.count_nonzero(
                ~np.isclose(
                    np.asarray(saved["threshold/line"])[1],
                    np.nan_to_num(np.asarray(saved["threshold/minus"])[1], nan=np.inf),
                    atol=1e-8,
                )
            ),
            0,
            why="it scales with tau^2",
        ),
    )


def _of_balance(saved: Saved) -> Claim:
    """The threshold of the line is that of both equations, also away from balance."""
    thresholds, ends = np.asarray(saved["threshold/by_imbalance"]), np.asarray(saved["threshold/beside"])
    below, above = ends[:, thresholds > 0]
    plus = float(np.asarray(saved["line/point"])[0, 1])
    return stated(
        "both-equations",
        "What p and s do together is told by the line of p alone, with s = p^2 / alpha_p + exp(-2 eta t) c",
        f"{SLIDES} (the threshold away from balance is derived)",
        at_most(
            "starts 0.1 % below the line's threshold: largest p at the end",
            largest(below),
            1e-6,
            why="all collapse",
        ),
        at_most(
            "starts 0.1 % above it: p at the end less p_plus", largest(above - plus), 1e-13, why="all stay"
        ),
        at_least("thresholds that are looked at", below.size, 10, why="the rest are zero: none collapses"),
    )


def _of_decay(saved: Saved) -> Claim:
    small, _, medium, more, large = np.asarray(saved["threshold/regime"])
    line = np.asarray(saved["threshold/line"])[0]
    return stated(
        "weight-decay",
        "Of modes that start .01 above balance none collapses with little weight decay, with more only small "
        "ones do, and with too much all",
        SLIDES,
        at_most("eta = .01, c = .01: threshold", small, 0, why="the imbalance carries a mode over it"),
        at_least("eta = .1, c = .01: threshold", medium, 0.05, why="the imbalance decays before"),
        at_least("eta = .19: threshold over that", more / medium, 2, why="p_minus grows with eta"),
        every("the largest eta: all starts collapse", np.isinf([large, line[-1]])),
        every("on balance: thresholds that grow with eta", np.diff(line[:-1]) > 0),
    )


def _of_predictor_rate(saved: Saved) -> Claim:
    thresholds = np.asarray(saved["threshold/by_imbalance"])
    c, rates = np.asarray(saved["threshold/imbalance"]), np.asarray(saved["threshold/rate"])
    return qualified(
        "predictor-rate",
        "A larger learning rate of the predictor makes the basin of collapse smaller",
        SLIDES,
        condition="the features start above balance, s > p^2 / alpha_p",
        inside=[
            every(
                "c > 0: thresholds that fall, or are zero, from each predictor rate to the next",
                (np.diff(thresholds[c > 0], axis=1) < 0) | (thresholds[c > 0][:, 1:] == 0),
            ),
            at_most(
                f"rate {rates[-1]:g} over rate {rates[0]:g}: largest ratio of thresholds",
                np.max(thresholds[c > 0][:, -1] / thresholds[c > 0][:, 0]),
                0.8,
                why="the push is alpha_p c",
            ),
        ],
        outside=[
            at_most(
                "c = 0: spread of the threshold over predictor rates",
                float(np.ptp(thresholds[c == 0])),
                1e-8,
                why="alpha_p drops out of the line",
            ),
            every("c < 0: thresholds that grow", np.asarray(np.diff(thresholds[c < 0], axis=1)) > 0),
        ],
    )


def _of_moving_average(saved: Saved) -> Claim:
    threshold, spacing = np.asarray(saved["momentum/threshold"]), saved["momentum/spacing"]
    below, above = np.asarray(saved["momentum/beside"])
    (half, even, more), targets = threshold, np.asarray(saved["momentum/target"])
    saved_by_it, lost_by_it = _turned(saved)
    return qualified(
        "moving-average",
        "A slow moving average makes the basin of collapse smaller",
        SLIDES,
        condition="the target starts larger than the online network is, tau > 1, or as large, with features "
        "above balance",
        inside=[
            at_least(
                f"tau = {targets[2]:g}: threshold without average less that with the slowest, in spacings",
                (more[-1] - more[0]) / spacing,
                3,
                why="a larger target pulls for longer",
            ),
            every("the same: thresholds that do not fall from slower to faster averages", np.diff(more) >= 0),
            at_least(
                "tau = 1, above balance: share of the basin that the slowest average takes away",
                saved_by_it[0],
                0.05,
                why="features shrink at first, and the target is larger then",
            ),
            at_most("the same: share that it adds", lost_by_it[0], 0, why="nothing pulls less"),
        ],
        outside=[
            at_most(
                f"tau = {targets[1]:g}: spread over averages, in spacings",
                np.ptp(even) / spacing,
                0,
                why="it is p_minus",
            ),
            at_most(
                "tau = 1, 0.1 % below p_minus: end, all averages", largest(below), 1e-6, why="they collapse"
            ),
            at_least(
                "tau = 1, 0.1 % above p_minus: least end", np.min(above), 0.75, why="they stay, near p_plus"
            ),
            at_least(
                f"tau = {targets[0]:g}: threshold with the slowest average less that without, in spacings",
                (half[0] - half[-1]) / spacing,
                3,
                why="a smaller target pulls less for longer",
            ),
            at_least(
                "tau = 1, below balance: share of the basin that the slowest average adds",
                lost_by_it[1],
                0.05,
                why="features grow at first, and the target lags behind",
            ),
            at_most("the same: share that it takes away", saved_by_it[1], 0, why="nothing pulls more"),
        ],
    )


def _turned(saved: Saved) -> tuple[list[float], list[float]]:
    """Starts of the portrait that the slowest average keeps from collapse, and that collapse by it alone.

    Both are shares of the starts that collapse without an average, first above and then below balance.
    """
    half = np.asarray(saved["line/point"])[0, 1] / 2
    imbalance = np.asarray(saved["portrait/s"])[None] - np.asarray(saved["portrait/p"])[:, None] ** 2
    without, slow = (np.asarray(saved[f"portrait/end/{name}"]) < half for name in ("without", "slow"))
    sides = [imbalance > 0, imbalance < 0]

    def share(turned):
        return [float(np.sum(turned & side) / np.sum(without & side)) for side in sides]

    return share(without & ~slow), share(slow & ~without)


def _of_speed(saved: Saved) -> Claim:
    p, tau, ts = (np.asarray(saved[f"momentum/{name}"]) for name in ("walk/p", "walk/tau", "time"))
    least = np.asarray(np.min(tau, axis=0))
    arrival = ts[np.argmax(p > 0.9 * np.asarray(saved["line/point"])[0, 1], axis=0)]
    return stated(
        "speed",
        "A slow moving average makes training slow: the target lags behind features that grow",
        f"{SLIDES} (measured here)",
        every(
            "times to nine tenths of p_plus from p = .1 that fall from slower to faster averages",
            np.diff(arrival) < 0,
        ),
        at_least(
            "slowest average over none: ratio of the times", arrival[0] / arrival[-1], 5, why="1 / beta is 50"
        ),
        every("least tau that rises from slower to faster averages", least[1:] > least[:-1]),
    )


def _of_fast_average(saved: Saved) -> Claim:
    without, stiff = (np.asarray(saved[f"portrait/coarse/{name}"]) for name in ("without", "stiff"))
    slow, whole = (np.asarray(saved[f"portrait/end/{name}"]) for name in ("slow", "without"))
    half = np.asarray(saved["line/point"])[0, 1] / 2
    return stated(
        "fast-average",
        "A fast moving average is as good as none, and a slow one moves the basin off balance",
        f"{SLIDES} (derived here)",
        at_most(
            "rate 10^4: largest change of p at the end",
            largest(stiff - without),
            1e-6,
            why="all rest at one of two points, and no start of this grid changes to the other one",
        ),
        at_least(
            "rate .02: share of starts whose end is another one",
            np.mean((slow > half) != (whole > half)),
            0.01,
            why="tau dips while features grow",
        ),
    )


def _of_walk(saved: Saved) -> Claim:
    ends = {side: np.asarray(saved[f"walk/{side}/p"])[-1] for side in ("theory", "trained")}
    minus = np.asarray(saved["line/point"])[0, 0]
    return stated(
        "walk",
        "Modes of a linear BYOL that is trained walk on the portrait, and collapse where it says so",
        f"{SLIDES} (derived here)",
        *first_order(saved["walk/rate"], saved["walk/gap"]),
        every(
            "modes on the side of the threshold at the end on which they started",
            (ends["trained"] > minus) == (np.asarray(saved["walk/trained/p"])[0] > minus),
        ),
        at_most(
            f"p at t = {saved['walk/time'][-1]:g} less that of the flow, at the smallest rate",
            largest(ends["trained"] - ends["theory"]),
            1e-6,
            why="both are at rest, but for modes that still fall",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Phase lines, the portrait with a network on it, thresholds, and the way of a mode by moving average."""
    drawn, ((lines, portrait), (thresholds, walks)) = plotting.new_figure(2, 2, width=4.8)
    _lines_panel(lines, saved)
    _portrait_panel(portrait, saved)
    decays, found = np.asarray(saved["threshold/decay"]), np.asarray(saved["threshold/line"])
    for index, tau in enumerate(np.asarray(saved["threshold/tau"])):
        minus, plus = np.moveaxis(np.asarray(saved["threshold/curve"])[index], -1, 0)
        color = f"C{index}"
        thresholds.plot(saved["threshold/curve_decay"], plus, color=color, label=f"p_plus, tau = {tau:g}")
        thresholds.plot(saved["threshold/curve_decay"], minus, color=color, ls="--", label="p_minus")
        finite = np.isfinite(found[index])
        thresholds.plot(decays[finite], found[index][finite], "o", color=color, label="bisection")
    legend = {"loc": "upper right", "ncols": 2}
    plotting.finish(thresholds, "Stable point and threshold", "weight decay", "p", legend, ylim=(0, 1.35))
    time, p = saved["momentum/time"], np.asarray(saved["momentum/walk/p"])
    for index, rate in enumerate(np.asarray(saved["momentum/ema_rate"])):
        walks.plot(
            time, p[:, index], color=f"C{index}", label=f"{rate:g}" if np.isfinite(rate) else "no average"
        )
    legend = {"loc": "lower right", "title": "rate of the average"}
    plotting.finish(walks, "How fast a mode grows", "time", "p", legend)
    return drawn


def _lines_panel(ax: Axes, saved: Saved) -> None:
    p, points, slopes = (np.asarray(saved[f"line/{name}"]) for name in ("at", "point", "slope"))
    for index, decay in enumerate(np.asarray(saved["line/weight_decay"])):
        ax.plot(p, np.asarray(saved["line/speed"])[index], color=f"C{index}", label=f"weight decay {decay:g}")
        for point, slope in zip(points[index], slopes[index], strict=True):
            ax.plot(point, 0, "o", color=f"C{index}", mfc=f"C{index}" if slope < -1e-6 else "white")
    ax.plot(0, 0, "o", color="black")
    ax.axhline(0, color="grey", lw=0.8)
    plotting.finish(ax, "Phase lines (filled: stable)", "p", "dp/dt", "lower left", ylim=(-0.15, 0.1))


def _portrait_panel(ax: Axes, saved: Saved) -> None:
    p, s = np.asarray(saved["portrait/p"]), np.asarray(saved["portrait/s"])
    half = np.asarray(saved["line/point"])[0, 1] / 2
    end = np.asarray(saved["portrait/end/without"]).T
    ax.pcolormesh(p, s, np.where(end > half, 0, 1), cmap="Greys", vmin=0, vmax=3, rasterized=True)
    ax.contour(p, s, np.asarray(saved["portrait/end/slow"]).T, [half], colors="C1", linestyles="--")
    ax.plot([], [], color="C1", ls="--", label="basin at rate 0.02")
    found, c = np.asarray(saved["threshold/by_imbalance"])[:, 1], np.asarray(saved["threshold/imbalance"])
    ax.plot(found, found**2 + c, "D", color="black", ms=4, label="threshold of the line")
    ax.plot(p, p**2, color="grey", lw=0.8, label="balance")
    for index, start in enumerate(np.asarray(saved["walk/trained/p"])[0]):
        if start < p[-1]:
            way = (np.asarray(saved[f"walk/trained/{name}"])[:, index] for name in "ps")
            ax.plot(*way, ".-", color=f"C{2 + index}", ms=3, label=f"network, from p = {start:.3g}")
            flow = (np.asarray(saved[f"walk/theory/{name}"])[:, index] for name in "ps")
            ax.plot(*flow, **plotting.THEORY)
    ax.set(xlim=(0, p[-1]), ylim=(0, s[-1]))
    plotting.finish(ax, "Portrait (grey: collapses)", "p", "s", "upper left")
