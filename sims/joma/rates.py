"""Saturating weights: rates of convergence that are exponential in the squared target, and their ratios.

The effective flow v' = (mu - v) exp(v^2 / 2) from zero start, in s = ln(1 / (1 - v / mu)). Late on
s = exp(mu^2 / 2) (t - D(mu)), so that the ratio of two rates is exp((mu_j^2 - mu_k^2) / 2) up to the delays
D over t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from dynamics import joma
from dynamics.flow import Trajectory
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import convergence_order
from sims.results import Context, Result, Saved

REFERENCE = 1.0  # the component that the others are measured against
WRONG_FACTOR = 1.02
MARKS = (20.0, 100.0, 1000.0)  # times of the claims


@dataclass(frozen=True)
class Config:
    """Targets and times; the last time is 1000."""

    mu: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    """Targets; the rates are compared with that of mu = 1, and zero is a component without a target."""
    points: int = 60
    """Times from 0.01 to 1000, equally spaced in their logarithm."""

    def __post_init__(self):
        if not {0.0, REFERENCE} < set(self.mu) or min(self.mu) < 0:
            raise ValueError(f"mu must hold 0, {REFERENCE:g} and other positive numbers, got {self.mu}")
        if self.points < 10:
            raise ValueError(f"points must be at least 10, got {self.points}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), mu=(0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), points=200),
    "paper": replace(Config(), mu=(0.0, *np.arange(0.25, 3.01, 0.25).tolist()), points=400),
}


def run(config: Config, context: Context) -> Result:
    """Integrate the flow in s, and in v as long as v differs from its target."""
    mu = jnp.asarray(config.mu)
    grid = np.geomspace(1e-2, max(MARKS), config.points)
    ts = np.unique([0.0, *grid, *MARKS])

    context.progress("integrating in s", 0.0)
    in_s = joma.log_residual_flow(mu, ts, rtol=1e-11, atol=1e-12)
    s = np.asarray(in_s.ys)
    v_from_s = np.asarray(mu) * -np.expm1(-s)

    context.progress("integrating in v", 0.5)
    # Past s = 30 everywhere there is nothing left to see in v.
    early = ts[: np.argmax(s.min(axis=1) > 30) + 1]
    # An implicit solver cannot meet tolerances near the rounding of its numbers.
    epsilon = float(jnp.finfo(mu.dtype).eps)
    tolerances = {"rtol": max(1e-10, 100 * epsilon), "atol": max(1e-13, 10 * epsilon)}
    in_v = joma.saturating_flow(jnp.zeros_like(mu), mu, early, **tolerances)

    context.progress("comparing", 0.9)
    delay = joma.onset_delay(mu)
    law = np.exp(np.asarray(mu) ** 2 / 2) * (ts[:, None] - np.asarray(delay))
    reference = config.mu.index(REFERENCE)
    with np.errstate(invalid="ignore"):
        ratio, wrong = (
            (s / s[:, [reference]]) / np.asarray(joma.rate_ratio(factor * mu, factor * REFERENCE))
            for factor in (1.0, WRONG_FACTOR)
        )
    data = {
        "mu": mu,
        "ts": ts,
        "s": s,
        "law": law,
        "v": v_from_s,
        "direct": {"ts": early, "v": in_v.ys},
        "ratio": ratio,
        "wrong": wrong,
    }
    claims = (
        _ratio(ts, ratio, reference),
        _order(ts, ratio, wrong, np.asarray(delay), reference),
        _late_law(ts, s, law, config.mu.index(0.0)),
        _two_forms(in_v, s[: len(early)], v_from_s[: len(early)]),
    )
    dims = {
        **{name: ("time", "component") for name in ("s", "law", "v", "ratio", "wrong")},
        "ts": ("time",),
        "mu": ("component",),
        "direct/ts": ("early_time",),
        "direct/v": ("early_time", "component"),
    }
    return Result(data, claims, dims)


def _ratio(ts: np.ndarray, ratio: np.ndarray, reference: int) -> Claim:
    # The component without a target counts as well: s = t there.
    others = np.delete(np.abs(ratio - 1), reference, axis=1)
    at_20, at_100, at_1000 = (others[np.searchsorted(ts, mark)].max() for mark in MARKS)
    return Claim(
        "joma.rates/ratio",
        "Salient components grow much faster: ln(1/delta_j) / ln(1/delta_k) ~ exp(mu_j^2/2) / exp(mu_k^2/2)",
        "tian2024joma, Theorem 4",
        "qualified",
        [
            # The delays differ by half a unit of time: half a percent at t = 100.
            Check("largest relative error of the ratio at t = 100", "at most", 1e-2, at_100),
            Check("at t = 1000", "at most", 1e-3, at_1000),
            # The same two percent and more at t = 20.
            Check("at t = 20", "at least", 1e-2, at_20),
        ],
        condition="t is large against the delays: the relative error is (D_k - D_j) / t",
    )


def _order(ts: np.ndarray, ratio: np.ndarray, wrong: np.ndarray, delay: np.ndarray, reference: int) -> Claim:
    late = ts >= MARKS[1]
    right, off = (
        convergence_order(ts[late], np.max(np.abs(np.delete(values - 1, reference, axis=1)), axis=1)[late])
        for values in (ratio, wrong)
    )
    coefficient = ts[-1] * (ratio[-1] - 1)
    return Claim(
        "joma.rates/approach",
        "The ratio of the rates approaches its limit as 1 / t, with the difference of the delays before it",
        "tian2024joma, Theorem 4 (the correction is derived here)",
        "stated",
        [
            # (t - D_j) / (t - D_k) - 1 has a second order of D / t, half a percent at t = 100.
            Check("order of its relative error in t, from 100 to 1000", "slope", -1.0, right.slope, 0.01),
            # An error that does not fall has order 0 over most of the range.
            Check("order with mu 2 % off", "at least", -0.5, off.slope),
            # The second order again: D_k / t at t = 1000, of a difference below one.
            Check(
                "t times the relative error at t = 1000: largest difference to D_k - D_j",
                "at most",
                1e-3,
                np.max(np.abs(coefficient - (delay[reference] - delay))),
            ),
        ],
    )


def _late_law(ts: np.ndarray, s: np.ndarray, law: np.ndarray, zero: int) -> Claim:
    late = ts >= MARKS[0]
    return Claim(
        "joma.rates/late-law",
        "Late on s = exp(mu^2 / 2) (t - D(mu)), with a delay D in closed form",
        "tian2024joma, Theorem 4 (derived here)",
        "stated",
        [
            # What is left is of the order of exp(-s) / s, 1e-11 for mu = 0.5; the solver's error is as small.
            Check(
                "largest relative gap of s to it, from t = 20 on",
                "at most",
                1e-9,
                np.max(np.abs(s[late] / law[late] - 1)),
            ),
            # s' = 1 is integrated exactly but for rounding.
            Check(
                "mu = 0: largest relative gap of s to t",
                "at most",
                1e-12,
                np.max(np.abs(s[1:, zero] / ts[1:] - 1)),
            ),
        ],
    )


def _two_forms(in_v: Trajectory, s: np.ndarray, v_from_s: np.ndarray) -> Claim:
    return Claim(
        "joma.rates/two-forms",
        "The flows of v and of s = ln(1 / (1 - v / mu)) are the same, until v is its target to rounding",
        "tian2024joma, section 4 (nonlinear activation)",
        "stated",
        [
            # The solver's own tolerance, two orders of which the early growth may cost.
            Check(
                "largest gap of v to mu (1 - exp(-s)), to s = 30 everywhere",
                "at most",
                1e-8,
                np.max(np.abs(np.asarray(in_v.ys) - v_from_s)),
            ),
            Check("components that are past s = 30 there", "all of", s.shape[1], int(np.sum(s[-1] > 30))),
        ],
    )


def figure(saved: Saved) -> Figure:
    """Distances to the target with their late law, the ratio of rates over its limit, and the weights."""
    drawn, ((residual, ratio, weights),) = plotting.new_figure(1, 3, width=4.4, height=3.6)
    mu, ts = saved["mu"], saved["ts"]
    reference = int(np.flatnonzero(mu == REFERENCE)[0])
    for index, target in enumerate(mu):
        color, label = f"C{index % 7}", f"μ = {target:g}"
        residual.plot(ts, saved["s"][:, index], color=color, label=label, **plotting.TRAINED)
        law = saved["law"][:, index]
        residual.plot(ts[law > 0.05], law[law > 0.05], **plotting.THEORY)
        if index != reference:
            error = np.abs(saved["ratio"][1:, index] - 1)
            ratio.plot(ts[1:], error, color=color, label=label, **plotting.TRAINED)
        if target > 0:
            weights.plot(ts, saved["v"][:, index], color=color, label=label, **plotting.TRAINED)
            weights.plot(saved["direct/ts"], saved["direct/v"][:, index], **plotting.THEORY)
    residual.plot([], [], label="exp(μ²/2) (t − D)", **plotting.THEORY)
    residual.set(xscale="log", yscale="log", xlabel="time", ylabel="s = ln 1 / (1 − v/μ)")
    residual.set_title("Distance to the target, as s")
    residual.legend(loc="upper left", fontsize=7.5)

    late = ts >= 5
    last = np.abs(np.delete(saved["ratio"][-1] - 1, reference)).max()
    ratio.plot(ts[late], last * ts[-1] / ts[late], label="slope −1", **plotting.THEORY)
    wrong = np.max(np.abs(np.delete(saved["wrong"][1:] - 1, reference, axis=1)), axis=1)
    ratio.plot(ts[1:], wrong, color="0.45", linestyle=":", label="μ 2 % off (largest)")
    ratio.set(xscale="log", yscale="log", xlabel="time", ylabel="|ratio of s over its limit − 1|")
    ratio.set_title(f"Ratio of rates to that of μ = {REFERENCE:g}")
    ratio.legend(loc="lower left", fontsize=7.5)

    weights.plot([], [], label="integrated as v", **plotting.THEORY)
    weights.set(xscale="log", xlabel="time", ylabel="v")
    weights.set_title("Weights: from s, and integrated as v")
    weights.legend(loc="upper left", fontsize=7.5)
    return drawn
