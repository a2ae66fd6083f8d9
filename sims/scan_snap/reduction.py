"""Two reduced flows of attention against the full population flow, over the ratio of the learning rates.

A decoder that learns faster than attention can be solved for, first with the Gram matrix of the classes kept
(the fast decoder), then with the identity in its place (weak correlation). The error of the first falls
linearly with learning_rate_Z / learning_rate_Y; the second is right only where classes hardly overlap. The
fate of tokens, the relative gain of distinct ones and the bounds on their growth are checked in all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.integrate import cumulative_simpson

from dynamics import scan_snap
from dynamics.flow import Trajectory
from dynamics.scan_snap import SequenceClasses
from models.data.tokens import one_common_token, synthetic_classes
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.compare import convergence_order
from sims.results import Context, Result, Saved

# Figure 4 of the source: two classes, ten common and ten distinct tokens. All data share its sizes.
DISTINCT, VOCABULARY = 10, 34
# What the claims need, whatever else is swept.
NAMES = {"full": "full flow", "fast": "fast-decoder flow", "weak": "weak-correlation flow"}
OVERLAPS, RATIOS = (1e-3, 3e-2, 0.72), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0)


@dataclass(frozen=True)
class Config:
    """Sweeps; learning_rate_Y is one."""

    overlaps: tuple[float, ...] = (0.1,)
    """Further cosines between two classes of one common token, besides 0.001, 0.03 and 0.72."""
    ratios: tuple[float, ...] = (0.3, 10.0)
    """Further ratios learning_rate_Z / learning_rate_Y, besides 0.001, 0.003, 0.01, 0.03, 0.1 and 1."""
    horizon: float = 20.0
    """Time at which the runs end, in units of K ln(M) / learning_rate_Y."""
    points: int = 100
    """Records along a run, denser at its start."""


_QUICK = Config()
_FINE = replace(_QUICK, ratios=(0.2, 0.3, 0.6, 2.0, 3.0, 6.0, 10.0))
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_FINE, overlaps=(1e-4, 3e-4, 3e-3, 1e-2, 0.1, 0.3)),
    "paper": replace(_FINE, overlaps=(1e-4, 2e-4, 5e-4, 2e-3, 5e-3, 1e-2, 0.1, 0.2, 0.4, 0.9), points=200),
}


def unequal_common_tokens() -> SequenceClasses:
    """Three common tokens: one is probable in both classes, the others prefer a class each."""
    classes = synthetic_classes(2, num_common=3, vocab_size=VOCABULARY)
    weights = np.array(classes.P)
    weights /= weights[0, 0]
    weights[:, :3] = [[4.0, 1.0, 0.2], [4.0, 0.2, 1.0]]
    return SequenceClasses(weights / weights.sum(axis=1, keepdims=True), classes.query, classes.next_token)


def one_law() -> SequenceClasses:
    """Two classes with the same law of their tokens."""
    classes = synthetic_classes(2)
    return SequenceClasses(np.tile(np.asarray(classes.P)[:1], (2, 1)), classes.query, classes.next_token)


def ranked_tokens(classes: SequenceClasses) -> np.ndarray:
    """Ten tokens of each class, (K, 10): the distinct ones by their probability, then the others."""
    order = np.asarray(classes.P) + 2 * np.asarray(scan_snap.distinct_tokens(classes))
    return np.argsort(-order, axis=1)[:, :DISTINCT]


@eqx.filter_jit
def _solve(flow, classes, ts, ratios):
    """A flow on all data (D) at all ratios (R)."""

    def one(classes, ratio):
        # What is left is rounding: every threshold of the claims is far above.
        tight = {"rtol": 1e-10, "atol": 1e-13, "throw": False}
        return flow(classes, ts, learning_rate_Y=1.0, learning_rate_Z=ratio, **tight)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(classes, ratios)


@jax.jit
def _measure(path, classes, tokens):
    """Logits of the queries, the growth rate xi, and the largest error of the relative gain's closed form.

    That is over times and pairs of distinct tokens. The first of a pair is the more probable one; the
    `reverse` error is for the other order.
    """
    first, second = np.triu_indices(DISTINCT, 1)

    def at(weights, t, classes, tokens):
        def error(token, reference):
            args = (weights.Z, classes, token, reference)
            return scan_snap.log_relative_gain(*args) - scan_snap.log_relative_gain_closed_form(*args)

        def largest(first, second):
            return jnp.max(jnp.abs(jax.vmap(error, in_axes=1)(tokens[:, first], tokens[:, second])))

        return {
            "z": weights.Z[classes.query],
            "growth_rate": scan_snap.growth_rate(weights, classes),
            "weak_growth_rate": scan_snap.weak_growth_rate(weights.Z, classes, t, 1.0),
            "gain": largest(first, second),
            "reverse": largest(second, first),
        }

    over_runs = jax.vmap(jax.vmap(at, in_axes=(0, 0, None, None)), in_axes=(0, 0, None, None))
    measured = jax.vmap(over_runs)(path.ys, path.ts, classes, tokens)
    return measured | {name: jnp.max(measured[name], axis=-1) for name in ("gain", "reverse")}


def run(config: Config, context: Context) -> Result:
    """Solve the three flows on all data at all ratios; measure errors, gains, bounds and signs."""
    overlaps = np.unique([*OVERLAPS, *config.overlaps])
    ratios = np.unique([*RATIOS, *config.ratios])
    figure4, unequal = synthetic_classes(2), unequal_common_tokens()
    moving = [*(one_common_token(overlap, vocab_size=VOCABULARY) for overlap in overlaps), figure4, unequal]
    still = [synthetic_classes(2, num_common=0, vocab_size=VOCABULARY), one_law()]
    classes = jax.tree.map(lambda *leaves: np.stack(leaves), *moving, *still)
    tokens = np.stack([ranked_tokens(each) for each in (*moving, *still)])
    horizon = config.horizon * figure4.num_classes * np.log(figure4.vocab_size)
    ts = horizon * np.linspace(0, 1, config.points + 1) ** 2

    flows: dict[str, Callable[..., Trajectory]] = {
        "full": scan_snap.population_flow,
        "fast": scan_snap.fast_decoder_flow,
        "weak": scan_snap.weak_correlation_flow,
    }
    solved = {}
    for index, (name, flow) in enumerate(flows.items()):
        context.progress(f"solving for the {NAMES[name]}", index / len(flows))
        path = _solve(flow, classes, ts, ratios)
        if not np.asarray(path.ok).all():
            raise RuntimeError(f"the {NAMES[name]} was not solved at every ratio")
        solved[name] = jax.tree.map(np.asarray, _measure(path, classes, tokens))
    solved["weak"]["growth_rate"] = solved["weak"]["weak_growth_rate"]

    count = len(moving)
    z = {name: paths["z"] for name, paths in solved.items()}
    error = {name: _relative_error(z[name], z["full"])[:count] for name in ("fast", "weak")}
    # The strongest distinct token l0 of each class: ln chi, f at the start, and B, of shape (D, R, T, K).
    strongest = np.broadcast_to(tokens[:count, None, None, :, :1], (*z["full"][:count].shape[:-1], 1))
    start = classes.P[:count] / np.linalg.norm(classes.P[:count], axis=-1, keepdims=True)
    f0 = np.take_along_axis(start, tokens[:count, :, :1], axis=-1)[:, None, None, :, 0]
    log_chi, growth = {}, {}
    for name, paths in solved.items():
        log_chi[name] = 2 * np.take_along_axis(z[name][:count], strongest, axis=-1)[..., 0]
        integral = cumulative_simpson(paths["growth_rate"][:count], x=ts, axis=2, initial=0)
        growth[name] = ratios[:, None, None] * integral

    claims = (
        _fate(z["full"], moving, ratios),
        _gain_reduced(solved, count),
        _gain_full(solved["full"], ratios, count),
        _growth_bounds(log_chi, growth, f0),
        _reduced_error(error["fast"], ratios, overlaps),
        _weak_correlation(error["weak"], ratios, overlaps),
        _still(z, ratios, count),
    )
    # The figure shows the first class of Figure 4's data, z at ratio 0.1 and its growth at ratio 1.
    shown, fast = ((count - 2, np.searchsorted(ratios, ratio)) for ratio in (0.1, 1.0))
    data = {
        "ts": ts,
        "overlaps": overlaps,
        "figure4_overlap": start[-2, 0] @ start[-2, 1],
        "ratios": ratios,
        "error": error,
        "gain_error": {name: paths["gain"][:count] for name, paths in solved.items()},
        "z": {name: path[shown][:, 0][:, [0, tokens[shown[0], 0, 0]]] for name, path in z.items()},
        "log_chi": log_chi["full"][fast][:, 0],
        "growth": growth["full"][fast][:, 0],
        "f0": f0[shown[0], 0, 0, 0],
    }
    dims = {f"error/{name}": ("data", "ratio") for name in error}
    return Result(data, claims, {**dims, "ts": ("time",), "overlaps": ("overlap",), "ratios": ("ratio",)})


def _relative_error(reduced: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Largest relative error of z over time, (D, R); the start is left out, where z is zero."""
    gap, size = (np.linalg.norm(z[:, :, 1:], axis=(-1, -2)) for z in (reduced - full, full))
    return np.max(gap / np.where(size > 0, size, 1), axis=-1)


def _fate(z: np.ndarray, data: list[SequenceClasses], ratios: np.ndarray) -> Claim:
    """Signs at all times after the start; `data` ends with Figure 4's and the unequal common tokens."""
    distinct, common = [], []
    for paths, classes in zip(z, data, strict=False):
        own = np.asarray(scan_snap.distinct_tokens(classes))
        shared = np.asarray(scan_snap.common_tokens(classes))
        distinct.append(paths[:, 1:, own])
        common.append(paths[:, 1:][..., shared])
    grown, single = np.stack(distinct), np.stack(common[:-2])
    sums = np.stack([paths.sum(axis=-1) for paths in common])
    exception = np.max(common[-1][np.searchsorted(ratios, 0.1)])
    return Claim(
        "scan_snap.reduction/fate",
        "Distinct tokens gain attention logits, common tokens lose them",
        "tian2023scan, Theorem 2",
        "qualified",
        [
            # Signs: no tolerance.
            all_of("distinct tokens, all data, ratios and times: z > 0", grown > 0),
            all_of("one common token: z < 0", single < 0),
            all_of("one or several common tokens: sum of z < 0", sums < 0),
            # A common token that one class hardly uses is nearly distinct for the other.
            Check("three common tokens of unequal probability: largest z", "at least", 0.01, exception),
        ],
        condition="there is one common token; of several, the sum falls but one of them may grow",
    )


def _gain_reduced(solved: dict[str, dict[str, np.ndarray]], count: int) -> Claim:
    worst = {
        name: max(np.max(solved[name][order][:count]) for order in ("gain", "reverse"))
        for name in ("fast", "weak")
    }
    return Claim(
        "scan_snap.reduction/relative-gain-reduced",
        "The relative gain of two distinct tokens is r(t) = r(0) exp(2 (z_l(t) - z_l(0)))",
        "tian2023scan, Theorem 3",
        "stated",
        [
            # Exact in both reductions: what is left is the solver's, 1e-13 per step times exp(2 z).
            Check("fast decoder: largest error of ln(1 + r)", "at most", 1e-6, worst["fast"]),
            Check("weak correlation: largest error of ln(1 + r)", "at most", 1e-6, worst["weak"]),
        ],
    )


def _gain_full(full: dict[str, np.ndarray], ratios: np.ndarray, count: int) -> Claim:
    # The first of a pair is the more probable one: otherwise r < 0, and errors of ln(1 + r) have no bound.
    slow = ratios <= 0.1
    worst = np.max(full["gain"][:count, slow], axis=0)
    rising = np.diff(full["gain"][:count, slow], axis=1) > 0
    return Claim(
        "scan_snap.reduction/relative-gain-full",
        "The closed form of the gain over a rarer token holds on the full flow where the decoder is fast",
        "tian2023scan, Theorem 3",
        "stated",
        [
            # The neglected terms are of second order in the ratio.
            Check("largest error of ln(1 + r) at ratio 0.1, r > 0", "at most", 2e-2, worst[-1]),
            Check(
                "largest error at ratio 0.01, r > 0",
                "at most",
                1e-3,
                worst[np.searchsorted(ratios[slow], 0.01)],
            ),
            all_of("errors that rise with the ratio, up to 0.1", rising),
        ],
    )


def _growth_bounds(log_chi: dict, growth: dict, f0: np.ndarray) -> Claim:
    def excess(bound: np.ndarray, name: str) -> float:
        """By how much ln chi falls short of a lower bound."""
        return float(np.max(bound * growth[name] - log_chi[name]))

    # Simpson's rule on the records; without it 1e-10. In the full and the fast-decoder flow B is the integral
    # of z' / f^2, where the upper bound says that z never falls; the weak-correlation flow has its own B.
    tolerance = 1e-6
    checks = [
        Check(
            "printed: most that ln chi is below 2 f(0) B", "at most", 0.0, excess(2 * f0, "full"), tolerance
        )
    ]
    for name, label in NAMES.items():
        above = float(np.max(log_chi[name] - 2 * growth[name]))
        checks += [
            Check(f"{label}: below 2 f(0)^2 B", "at most", 0.0, excess(2 * f0**2, name), tolerance),
            Check(f"{label}: above 2 B", "at most", 0.0, above, tolerance),
        ]
    return Claim(
        "scan_snap.reduction/growth-bounds",
        "The gain of the dominant token lies between exp(2 f(0)^2 B) and exp(2 B); a talk lost the square",
        "tian2023scan, Theorem 3",
        "corrected",
        checks,
    )


def _reduced_error(error: np.ndarray, ratios: np.ndarray, overlaps: np.ndarray) -> Claim:
    def order(data: int, largest: float) -> float:
        chosen = ratios <= largest
        return convergence_order(ratios[chosen], error[data, chosen]).slope

    def one_common(overlap: float) -> int:
        return int(np.searchsorted(overlaps, overlap))

    return Claim(
        "scan_snap.reduction/reduced-error",
        "The error of the fast-decoder flow falls linearly with learning_rate_Z / learning_rate_Y",
        "tian2023scan, section 4 (derived here: only dF/dt is dropped)",
        "stated",
        [
            # First order; the second bends the line by about the error itself.
            Check(
                "order, one common token, cosine 0.03, ratios <= 0.1",
                "slope",
                1.0,
                order(one_common(0.03), 0.1),
                0.1,
            ),
            Check("order, Figure 4's data, ratios <= 0.1", "slope", 1.0, order(-2, 0.1), 0.1),
            # Where one token is all that the classes attend to, the error is larger and linear later.
            Check(
                "order, one common token, cosine 0.72, ratios <= 0.01",
                "slope",
                1.0,
                order(one_common(0.72), 0.01),
                0.1,
            ),
        ],
    )


def _weak_correlation(error: np.ndarray, ratios: np.ndarray, overlaps: np.ndarray) -> Claim:
    slow = np.searchsorted(ratios, 0.01)
    return Claim(
        "scan_snap.reduction/weak-correlation",
        "With a fast decoder attention follows a flow in which each class is learned on its own",
        "tian2023scan, Theorem 1",
        "qualified",
        [
            # A few times the cosine, and the fast decoder's own error at this ratio.
            Check(
                "error at ratio 0.01, cosines <= 0.001",
                "at most",
                0.02,
                np.max(error[: len(overlaps)][overlaps <= 1e-3, slow]),
            ),
            Check("error at ratio 0.01, Figure 4's data (cosine 0.72)", "at least", 0.5, error[-2, slow]),
        ],
        condition="the classes hardly overlap: cosines of 0.001, not those of the source's own data",
    )


def _still(z: dict[str, np.ndarray], ratios: np.ndarray, count: int) -> Claim:
    size = {name: np.max(np.abs(paths[count:]), axis=(2, 3, 4)) for name, paths in z.items()}
    apart = max(np.max(sizes[0]) for sizes in size.values())
    slow, fastest = np.searchsorted(ratios, 0.01), np.argmax(ratios)
    alike = max(sizes[1, slow] for sizes in size.values())
    return Claim(
        "scan_snap.reduction/still",
        "Attention does not move where no token is common, nor where all classes have one law",
        "tian2023scan, section 4 (derived here: Y g_n stays along f_n)",
        "qualified",
        [
            # Rounding of numbers of order one.
            Check("no common token, all flows and ratios: |z|", "at most", 1e-12, apart),
            Check("one law, all flows, ratio 0.01: |z|", "at most", 1e-12, alike),
            # Unstable: rounding grows like an exponential of the ratio, up to order one.
            Check("one law, full flow, largest ratio: |z|", "at least", 0.1, size["full"][1, fastest]),
        ],
        condition="nothing perturbs it: under one law z = 0 is unstable, and rounding grows",
    )


def figure(saved: Saved) -> Figure:
    """Logits over time, errors over the ratio and over the cosine, and the bounds on the growth."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (over_time, over_ratio), (over_overlap, bounds) = axes
    ts, ratios, overlaps = saved["ts"], saved["ratios"], saved["overlaps"]

    for index, label in enumerate(("common token", "strongest distinct")):
        full = saved["z/full"][:, index]
        over_time.plot(ts, full, color=f"C{index}", label=f"full: {label}", **plotting.TRAINED)
    over_time.plot(ts, saved["z/fast"], **plotting.THEORY)
    over_time.plot(ts, saved["z/weak"], **plotting.PRINTED)
    over_time.plot([], [], label=NAMES["fast"], **plotting.THEORY)
    over_time.plot([], [], label=NAMES["weak"], **plotting.PRINTED)
    over_time.set(xlabel="time × learning_rate_Y", ylabel="attention logit z")
    top = float(np.max(saved["z/full"]))
    over_time.set_ylim(top=1.8 * top)  # room for the legend
    over_time.set_title("Ten common tokens, ratio 0.1")
    over_time.legend(loc="upper left", ncols=2)

    one, figure4 = int(np.searchsorted(overlaps, 0.03)), len(overlaps)
    series = [("fast", one, "C0", "o"), ("fast", figure4, "C0", "s")]
    series += [("weak", one, "C1", "o"), ("weak", figure4, "C1", "s")]
    data = {one: "one common token", figure4: "ten common tokens"}
    for name, row, color, marker in series:
        label = f"{NAMES[name]}, {data[row]}"
        over_ratio.loglog(ratios, saved[f"error/{name}"][row], marker, color=color, label=label, mfc="none")
    plotting.reference_slope(over_ratio, ratios, saved["error/fast"][one], 1, "slope 1")
    over_ratio.set(xlabel="learning_rate_Z / learning_rate_Y", ylabel="largest relative error of z")
    low, high = over_ratio.get_ylim()
    over_ratio.set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
    over_ratio.set_title("Error over the ratio of learning rates")
    over_ratio.legend(loc="upper left")

    slow = int(np.searchsorted(ratios, 0.01))
    for name, color in (("fast", "C0"), ("weak", "C1")):
        error = saved[f"error/{name}"][:, slow]
        over_overlap.loglog(overlaps, error[:figure4], "o-", color=color, label=NAMES[name])
        over_overlap.loglog(saved["figure4_overlap"], error[figure4], "s", color=color, mfc="none", ms=8)
    over_overlap.plot([], [], "s", color="0.3", mfc="none", ms=8, label="ten common tokens")
    over_overlap.set(xlabel="cosine of the two classes", ylabel="largest relative error of z")
    over_overlap.set_title("Error over the classes' overlap, ratio 0.01")
    over_overlap.legend(loc="upper left")

    B, f0 = saved["growth"], float(saved["f0"])
    bounds.plot(ts, saved["log_chi"], color="C0", label="strongest distinct token", **plotting.TRAINED)
    bounds.plot(ts, 2 * B, label="bounds 2 f(0)² B and 2 B", **plotting.THEORY)
    bounds.plot(ts, 2 * f0**2 * B, **plotting.THEORY)
    bounds.plot(ts, 2 * f0 * B, label="printed lower bound 2 f(0) B", **plotting.PRINTED)
    bounds.set(xlabel="time × learning_rate_Y", ylabel="ln of the growth χ", ylim=(0, 2.8 * B.max()))
    bounds.set_title("Full flow, ratio 1: growth and its bounds")
    bounds.legend(loc="upper left")
    return drawn
