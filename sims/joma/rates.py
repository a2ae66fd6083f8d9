"""Saturating weights: rates of convergence that are exponential in the squared target, and their ratios.

The effective flow v' = (mu - v) exp(v^2 / 2) from zero start, in s = ln(1 / (1 - v / mu)). Late on
s = exp(mu^2 / 2) (t - D(mu)), so that the ratio of two rates is exp((mu_j^2 - mu_k^2) / 2) up to the delays
D over t.

A network has this flow where its loss hands down the upstream gradient mu - v. With one-hot tokens, exp
attention and a linear activation it makes h = v exp(z) of a token, and keeps z = v^2 / 2 from zero start. So
v(h) is the inverse of v exp(v^2 / 2), and the loss is Phi(h) - mu h with the convex

    Phi(h) = max_v (v h - exp(v^2 / 2)),   Phi'(h) = v(h).

The source draws v over its sorted index, from steps of (mu - v) softmax(v^2 / 3): `joma.bounce` tells why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import lambertw

from dynamics import joma
from dynamics.flow import Trajectory
from models.attention import JomaBlock, JomaInputs, JomaState, joma_observer
from models.data.recorded import (
    JOMA_FIGURE_4_RATE,
    JOMA_FIGURE_4_START,
    JOMA_FIGURE_4_STEPS,
    JOMA_FIGURE_4_TARGETS,
)
from models.functional import as_function
from models.losses import bind
from models.training import Descent
from sims import plotting
from sims.claims import (
    ROUNDING,
    SECOND_ORDER,
    Claim,
    Preset,
    at_least,
    at_most,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import (
    WRONG_FACTOR,
    convergence_order,
    first_order,
    lane_gaps,
    largest,
    percent,
    require_ok,
)
from sims.ranges import NonNegative, Range, check_ranges
from sims.results import Context, Saved

REFERENCE = 1.0  # the component that the others are measured against
MARKS = (20.0, 100.0, 1000.0)  # times of the claims
OFF = f"{percent(WRONG_FACTOR)} off"
NETWORK_MU = np.array([0.5, 1.0, 1.5, 2.0])  # targets of the network's tokens
DRAWN_MU = np.array(JOMA_FIGURE_4_TARGETS)  # targets of the source's figure, sorted
DRAWN_MARKS = np.array([100, 200, 300, 400, 600, 1000, 2000, 5000])  # iterations that are drawn of it


@dataclass(frozen=True)
class Config:
    """Targets and times; the last time is 1000."""

    mu: tuple[NonNegative, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    """Targets; the rates are compared with that of mu = 1, and zero is a component without a target."""
    times: Annotated[int, Range(at_least=10)] = 60
    """Number of times from 0.01 to 1000, equally spaced in their logarithm."""
    descent: Descent = Descent(horizon=3.0, points=30, substeps=(20, 50, 150, 500))
    """Gradient descent of the network at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if not {0.0, REFERENCE} < set(self.mu):
            raise ValueError(f"mu must hold 0, {REFERENCE:g} and other numbers, got {self.mu}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), mu=(0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), times=200),
    "paper": replace(Config(), mu=(0.0, *np.arange(0.25, 3.01, 0.25).tolist()), times=400),
}


def _saturated(h: Array) -> Array:
    """The v >= 0 with v exp(v^2 / 2) = h >= 0: v^2 is Lambert's W of h^2, here by Newton's method."""
    x = jnp.where(h > 0, h**2, 1)
    size = jnp.log1p(x)
    w = size * (1 - jnp.log1p(size) / (2 + size))
    for _ in range(5):
        w = w * (1 + jnp.log(x / w)) / (1 + w)
    return jnp.where(h > 0, jnp.sqrt(w), 0)


def _loss(params: PyTree, data) -> Array:
    """The sum over tokens of Phi(h) - mu h."""
    predict, tokens, mu = data
    h = predict(params, tokens)[:, 0]
    # At the maximum over v nothing depends on v to first order.
    v = _saturated(jax.lax.stop_gradient(h))
    return jnp.sum(v * h - jnp.exp(v**2 / 2) - mu * h)


def _train(config: Config) -> dict:
    """The network trained at every learning rate from zero, and its gaps to the flow in s."""
    size, descent = len(NETWORK_MU), config.descent
    no_query, zeros = np.zeros((size, 1)), np.zeros((1, size))
    block = JomaBlock(np.eye(size), no_query, zeros.T, zeros, kind="exp", activation=lambda h: h)
    predict, params = as_function(block)
    tokens = JomaInputs(jnp.eye(size), jnp.zeros(size, jnp.int32))
    loss = bind(_loss, (predict, tokens, NETWORK_MU))
    _, trained = jax.device_get(descent.train(loss, params, observe=joma_observer(block)))
    require_ok("training", trained)
    state: JomaState = trained.ys
    v, z, ts = state.V[..., 0], state.z[:, :, 0], descent.times
    # Steps of finite length leave z off v^2 / 2, so that v ends beside mu: what tends to it is v(h).
    seen = np.sqrt(lambertw((v * np.exp(z)) ** 2).real)
    s = Trajectory(trained.ts, -np.log1p(-seen / NETWORK_MU), trained.ok)
    flows = {
        name: Trajectory(ts, np.asarray(joma.log_residual_flow(NETWORK_MU, factor * ts).ys), True)
        for name, factor in {"right": 1.0, "wrong": WRONG_FACTOR}.items()
    }
    finest = int(np.argmin(descent.rates))
    return {
        "rate": ("rate", descent.rates),
        "gap": ("rate", {name: lane_gaps(flow, s) for name, flow in flows.items()}),
        "z_gap": ("rate", np.max(np.abs(z - v**2 / 2), axis=(1, 2))),
        "record": ("record", ts),
        "trained": ("record token", s.ys[finest]),
        "flow": ("record token", flows["right"].ys),
    }


def _by_index(record: np.ndarray, trained: np.ndarray) -> dict:
    """The figure's v over its sorted index; when its components, the flow's, the network's are half way."""
    v = np.full((JOMA_FIGURE_4_STEPS + 1, len(DRAWN_MU)), JOMA_FIGURE_4_START)
    for step, before in enumerate(v[:-1]):
        share = np.exp(before**2 / 3) / np.sum(np.exp(before**2 / 3))
        v[step + 1] = before + JOMA_FIGURE_4_RATE * (DRAWN_MU - before) * share
    ts = np.linspace(0, 2, 401)
    s = np.asarray(joma.log_residual_flow(DRAWN_MU, ts).ys)
    iterations, half = np.arange(len(v)), np.log(2.0)  # s is ln 2 half way
    return {
        "index": ("index", np.arange(len(DRAWN_MU))),
        "mark": ("mark", DRAWN_MARKS),
        "by_index": ("mark index", v[DRAWN_MARKS]),
        "half_way": {
            "steps": ("index", [np.interp(0.5, path, iterations) for path in (v / DRAWN_MU).T]),
            "flow": ("index", [np.interp(half, path, ts) for path in s.T]),
            "network": ("token", [np.interp(half, path, record) for path in trained.T]),
        },
    }


def run(config: Config, context: Context) -> dict:
    """Integrate the flow in s, and in v as long as v differs from its target, and train the network."""
    mu = jnp.asarray(config.mu)
    ts = np.unique([0.0, *np.geomspace(1e-2, max(MARKS), config.times), *MARKS])
    context.progress("integrating in s", 0.0)
    s = np.asarray(joma.log_residual_flow(mu, ts, rtol=1e-11, atol=1e-12).ys)

    context.progress("integrating in v", 0.3)
    # Past s = 30 everywhere there is nothing left to see in v.
    early = ts[: np.argmax(s.min(axis=1) > 30) + 1]
    # An implicit solver cannot meet tolerances near the rounding of its numbers.
    epsilon = float(jnp.finfo(mu.dtype).eps)
    tolerances = {"rtol": max(1e-10, 100 * epsilon), "atol": max(1e-13, 10 * epsilon)}
    in_v = joma.saturating_flow(jnp.zeros_like(mu), mu, early, **tolerances)

    with np.errstate(invalid="ignore"):  # at the start all are zero
        ratio = s / s[:, [config.mu.index(REFERENCE)]]
    limits = {"right": joma.rate_ratio(mu, REFERENCE)}
    limits["wrong"] = joma.rate_ratio(WRONG_FACTOR * mu, WRONG_FACTOR * REFERENCE)
    delay = np.asarray(joma.onset_delay(mu))
    context.progress("training the network", 0.6)
    network = _train(config)
    context.progress("the source's figure", 0.9)
    return {
        **network,
        **_by_index(config.descent.times, network["trained"][1]),
        "mu": ("mu", mu),
        "time": ("time", ts),
        "s": ("time mu", s),
        "law": ("time mu", np.exp(np.asarray(mu) ** 2 / 2) * (ts[:, None] - delay)),
        "delay": ("mu", delay),
        "v": ("time mu", np.asarray(mu) * -np.expm1(-s)),
        "early_time": ("early_time", early),
        "direct": ("early_time mu", in_v.ys),
        "ratio_error": ("time mu", {name: ratio / np.asarray(limit) - 1 for name, limit in limits.items()}),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The ratio of two rates and how it is approached, the law late on, the flow in v, and the network."""
    ts, s, error = saved["time"], saved["s"], saved["ratio_error/right"]
    # The component without a target counts as well: s = t there.
    worst = {name: np.max(np.abs(values), axis=1) for name, values in saved["ratio_error"].items()}
    at_20, at_100, at_1000 = worst["right"][np.searchsorted(ts, MARKS)]
    half = "the delays differ by half a unit of time"
    yield qualified(
        "ratio",
        "Salient components grow much faster: ln(1/delta_j) / ln(1/delta_k) ~ exp(mu_j^2/2) / exp(mu_k^2/2)",
        "tian2024joma, Theorem 4",
        condition="t is large against the delays: the relative error is (D_k - D_j) / t",
        inside=[
            at_most("largest relative error of the ratio at t = 100", at_100, 1e-2, why=half),
            at_most("at t = 1000", at_1000, 1e-3, why=half),
        ],
        outside=[at_least("at t = 20", at_20, 1e-2, why=f"{half}: two percent and more")],
    )
    late = ts >= MARKS[1]
    order = {name: convergence_order(ts[late], values[late]).slope for name, values in worst.items()}
    delays = saved["delay"][config.mu.index(REFERENCE)] - saved["delay"]
    gap, end = largest(ts[-1] * error[-1] - delays), "the relative error at t = 1000"
    second = "the second order of D / t, half a percent at t = 100"
    yield stated(
        "approach",
        "The ratio of the rates approaches its limit as 1 / t, with the difference of the delays before it",
        "tian2024joma, Theorem 4 (the correction is derived here)",
        slope("order of its relative error in t, from 100 to 1000", order["right"], -1, 0.01, why=second),
        at_least(f"order with mu {OFF}", order["wrong"], -0.5, why="an error that does not fall has order 0"),
        at_most(f"t times {end}: largest difference to D_k - D_j", gap, 1e-3, why=second),
    )
    late = ts >= MARKS[0]
    gap = largest(s[late] / saved["law"][late] - 1)
    to_time = largest(s[1:, config.mu.index(0.0)] / ts[1:] - 1)
    left = "exp(-s) / s is 1e-11 for mu = 0.5, the solver's error as small"
    yield stated(
        "late-law",
        "Late on s = exp(mu^2 / 2) (t - D(mu)), with a delay D in closed form",
        "tian2024joma, Theorem 4 (derived here)",
        at_most("largest relative gap of s to it, from t = 20 on", gap, 1e-9, why=left),
        at_most("mu = 0: largest relative gap of s to t", to_time, 1e-12, why=f"s' = 1, so {ROUNDING}"),
    )
    early = len(saved["early_time"])
    gap = largest(saved["direct"] - saved["v"][:early])
    grown = "the solver's tolerance, grown a hundredfold early on"
    yield stated(
        "two-forms",
        "The flows of v and of s = ln(1 / (1 - v / mu)) are the same, until v is its target to rounding",
        "tian2024joma, section 4 (nonlinear activation)",
        at_most("largest gap of v to mu (1 - exp(-s)), to s = 30 everywhere", gap, 1e-8, why=grown),
        every("components that are past s = 30 there", s[early - 1] > 30),
    )

    yield _network(saved)
    yield _sorted(saved)


def _sorted(saved: Saved) -> Claim:
    order = {name: np.diff(times) < 0 for name, times in saved["half_way"].items()}
    left = 1 - saved["by_index"][-1] / DRAWN_MU
    there, seen = "a hundredth cannot be seen in a figure", "a tenth can be seen in a figure"
    return stated(
        "sorted-index",
        "Over 5,000 iterations the components of v approach their targets from the large ones down: in the "
        "end the largest is there, and the smallest not yet",
        "tian2024joma, the talk's slide on v by sorted index (how far they come is measured here)",
        every("the figure's steps: neighbours of which the larger is half way first", order["steps"]),
        every("v' = (mu - v) exp(v^2 / 2): the same", order["flow"]),
        every("the trained network: the same", order["network"]),
        at_most("the figure's steps, largest target: 1 - v / mu in the end", left[-1], 0.01, why=there),
        at_least("smallest target: the same", left[0], 0.1, why=seen),
    )


def _network(saved: Saved) -> Claim:
    rates, reference = saved["rate"], list(NETWORK_MU).index(REFERENCE)
    order = convergence_order(rates, saved["z_gap"]).slope
    trained, flow = (saved[name][-1] / saved[name][-1, reference] for name in ("trained", "flow"))
    finest = "half the finest rate times exp(2) is 7e-4"
    return stated(
        "network",
        "Gradient descent on a network whose loss hands down mu - v follows the flow, and so do its rates",
        "tian2024joma, Theorem 4 (one-hot tokens, exp attention; the loss is derived here)",
        *first_order(rates, saved["gap"]),
        slope("order of the gap of z to v^2 / 2", order, 1, 0.1, why=SECOND_ORDER),
        at_most(
            "finest rate: ratios of s at the end, over the flow's",
            largest(trained / flow - 1),
            2e-3,
            why=finest,
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Rates of convergence with their late law, their ratios, the network's gap, and v by sorted index."""
    drawn, ((residual, ratio), (gaps, by_index)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    ts, law, error = saved["time"], saved["law"], np.abs(saved["ratio_error/right"])
    for index, target in enumerate(saved["mu"]):
        style = {"color": f"C{index % 7}", "label": f"μ = {target:g}", **plotting.TRAINED}
        residual.plot(ts[1:], saved["s"][1:, index] / ts[1:], **style)
        shown = law[:, index] > 0.9 * saved["s"][:, index]
        residual.plot(ts[shown], law[shown, index] / ts[shown], **plotting.THEORY)
        if target != REFERENCE:
            ratio.plot(ts[1:], error[1:, index], **style)
    circles: dict[str, Any] = {"marker": "o", "linestyle": "", "ms": 4, "mfc": "white", "zorder": 6}
    some = slice(1, None, 3)
    per_time = saved["trained"][some] / saved["record"][some, None]
    residual.plot(saved["record"][some], per_time, color="0.2", **circles)
    residual.plot([], [], label="trained network", color="0.2", **circles)
    residual.plot([], [], label="exp(μ²/2) (1 − D / t)", **plotting.THEORY)
    residual.set(xscale="log", yscale="log", xlim=(5e-4, 2 * ts[-1]))
    residual.set(xlabel="time", ylabel="s / t,  s = ln 1 / (1 − v/μ)")
    residual.set_title("Rate of convergence up to a time")
    residual.legend(loc="upper left", fontsize=7.5)

    late = ts >= 5
    ratio.plot(ts[late], error[-1].max() * ts[-1] / ts[late], label="slope −1", **plotting.THEORY)
    wrong = np.max(np.abs(saved["ratio_error/wrong"][1:]), axis=1)
    ratio.plot(ts[1:], wrong, color="0.45", linestyle=":", label=f"μ {OFF} (largest)")
    ratio.set(xscale="log", yscale="log", xlabel="time", ylabel="|ratio of s over its limit − 1|")
    ratio.set_title(f"Ratio of rates to that of μ = {REFERENCE:g}")
    ratio.legend(loc="lower left", fontsize=7.5)

    of_s = {"flow": saved["gap/right"], f"flow {OFF}": saved["gap/wrong"]}
    title = "Trained network beside the flow"
    plotting.gap_panel(gaps, saved["rate"], of_s, "learning rate", "largest gap of s", title)
    plotting.label_ticks(gaps, saved["rate"], "{:.1g}")
    _draw_by_index(by_index, saved)
    return drawn


def _draw_by_index(ax: Axes, saved: Saved) -> None:
    depths = np.linspace(0.2, 1, len(saved["mark"]))
    for mark, v, depth in zip(saved["mark"], saved["by_index"], depths, strict=True):
        ax.plot(saved["index"], v, "o-", color="C0", alpha=depth, markersize=3, label=f"{mark:,} iterations")
    ax.plot(saved["index"], DRAWN_MU, label="target μ", **plotting.THEORY)
    plotting.finish(ax, "The source's figure: v by sorted index", "sorted index", "v", ylim=(0, 5))
    ax.legend(loc="upper left", fontsize=7.5, ncols=2)
