"""Two reduced flows of attention against the full population flow, over the ratio of the learning rates.

A decoder that learns faster than attention can be solved for, first with the Gram matrix of the classes kept
(the fast decoder), then with the identity in its place (weak correlation). The error of the first falls
linearly with learning_rate_Z / learning_rate_Y; the second is right only where classes hardly overlap. The
fate of tokens, the relative gain of distinct ones and the bounds on their growth are checked in all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from dynamics import scan_snap
from dynamics.flow import Trajectory
from dynamics.scan_snap import FLOWS, SequenceClasses, attention_error
from models.data.tokens import one_common_token, synthetic_classes
from models.training import map_lanes
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, every, qualified, slope, stated
from sims.compare import SOLVE, convergence_order, require_ok
from sims.ranges import Count, Positive, Share
from sims.results import Context, Saved

# Figure 4 of the source: two classes, ten common and ten distinct tokens. All data share its sizes.
DISTINCT, VOCABULARY = 10, 34
NAMES = {"full": "full flow", "fast": "fast-decoder flow", "weak": "weak-correlation flow"}
REDUCED, STILL = ("fast", "weak"), ("no common", "one law")  # attention rests on the last two data
# What the claims need, whatever else is swept.
OVERLAPS, RATIOS = (1e-3, 3e-2, 0.72), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0)


@dataclass(frozen=True)
class Config:
    """Sweeps; learning_rate_Y is one."""

    overlaps: tuple[Share, ...] = (0.1,)
    """Further cosines between two classes of one common token, besides 0.001, 0.03 and 0.72."""
    ratios: tuple[Positive, ...] = (0.3, 10.0)
    """Further ratios learning_rate_Z / learning_rate_Y, besides 0.001, 0.003, 0.01, 0.03, 0.1 and 1."""
    horizon: Positive = 20.0
    """Time at which the runs end, in units of K ln(M) / learning_rate_Y."""
    points: Count = 100
    """Records along a run, denser at its start."""


_QUICK = Config()
_FINE = replace(_QUICK, ratios=(0.2, 0.3, 0.6, 2.0, 3.0, 6.0, 10.0))
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_FINE, overlaps=(1e-4, 3e-4, 3e-3, 1e-2, 0.1, 0.3)),
    "paper": replace(_FINE, overlaps=(1e-4, 2e-4, 5e-4, 2e-3, 5e-3, 1e-2, 0.1, 0.2, 0.4, 0.9), points=200),
}


def _data(overlaps: np.ndarray) -> dict[str, SequenceClasses]:
    """Classes by name: one common token at every cosine, ten or three of them; then those at rest."""
    figure4 = synthetic_classes(2)
    # Of three common tokens one is probable in both classes, the others prefer a class each.
    unequal = synthetic_classes(2, num_common=3, vocab_size=VOCABULARY)
    weights = np.array(unequal.P / unequal.P[0, 0])
    weights[:, :3] = [[4.0, 1.0, 0.2], [4.0, 0.2, 1.0]]
    return {
        **{str(each): one_common_token(each, vocab_size=VOCABULARY) for each in overlaps},
        "figure4": figure4,
        "unequal": replace(unequal, P=weights / weights.sum(axis=1, keepdims=True)),
        "no common": synthetic_classes(2, num_common=0, vocab_size=VOCABULARY),
        "one law": replace(figure4, P=np.tile(np.asarray(figure4.P)[:1], (2, 1))),
    }


def _ranked_tokens(classes: SequenceClasses) -> np.ndarray:
    """Ten tokens of each class, (K, 10): the distinct ones by their probability, then the others."""
    order = np.asarray(classes.P) + 2 * np.asarray(scan_snap.distinct_tokens(classes))
    return np.argsort(-order, axis=1)[:, :DISTINCT]


@eqx.filter_jit
def _solve(flow, classes, tokens, ts, ratios) -> Trajectory:
    """A flow on all data (D) at all ratios (R): what `_measure` makes of its states."""

    def one(classes, tokens, ratio):
        # What is left is rounding: every threshold of the claims is far above.
        tight = {"rtol": 1e-10, "atol": 1e-13, **SOLVE}
        path = flow(classes, ts, learning_rate_Y=1.0, learning_rate_Z=ratio, **tight)
        measured = jax.vmap(partial(_measure, flow, classes, tokens))(path.ys, ts)
        gains = {name: jnp.max(measured[name]) for name in ("gain", "reverse")}
        return Trajectory(ts, measured | gains, path.ok)

    def at_all_ratios(data):
        return map_lanes(partial(one, *data), ratios, at_once=1)

    # Side by side all would take the steps of the one that takes most: on a CPU that is work.
    return map_lanes(at_all_ratios, (classes, tokens), at_once=1)


def _measure(flow, classes, tokens, weights, t) -> dict[str, jax.Array]:
    """Logits of the queries, the flow's growth rate xi, and the largest errors of the relative gain.

    These are errors of its closed form over pairs of distinct tokens, the first of which is the more probable
    one; the `reverse` error is for the other order.
    """

    @partial(jax.vmap, in_axes=1)
    def error(token, reference):
        args = (weights.Z, classes, token, reference)
        return scan_snap.log_relative_gain(*args) - scan_snap.log_relative_gain_closed_form(*args)

    if flow is scan_snap.weak_correlation_flow:
        xi = scan_snap.weak_growth_rate(weights.Z, classes, t, 1.0)
    else:
        xi = scan_snap.growth_rate(weights, classes)
    first, second = (tokens[:, places] for places in np.triu_indices(DISTINCT, 1))
    return {
        "z": weights.Z[classes.query],
        "growth_rate": xi,
        "gain": jnp.max(jnp.abs(error(first, second))),
        "reverse": jnp.max(jnp.abs(error(second, first))),
    }


def run(config: Config, context: Context) -> dict:
    """Solve the three flows on all data (D) at all ratios (R); measure errors, gains, bounds and signs."""
    overlaps, ratios = np.unique([*OVERLAPS, *config.overlaps]), np.unique([*RATIOS, *config.ratios])
    data = _data(overlaps)
    classes = jax.tree.map(lambda *leaves: np.stack(leaves), *data.values())
    tokens = np.stack([_ranked_tokens(each) for each in data.values()])
    ts = config.horizon * 2 * np.log(VOCABULARY) * np.linspace(0, 1, config.points + 1) ** 2
    found = {}
    for index, (name, flow) in enumerate(FLOWS.items()):
        context.progress(f"solving for the {NAMES[name]}", index / len(FLOWS))
        path = jax.device_get(_solve(flow, classes, tokens, ts, ratios))
        require_ok(f"the {NAMES[name]}", path)
        found[name] = path.ys

    z = {name: paths["z"] for name, paths in found.items()}  # (D, R, T, K, M)
    distinct = {name: np.take_along_axis(path, tokens[:, None, None], axis=-1) for name, path in z.items()}
    f = classes.P / np.linalg.norm(classes.P, axis=-1, keepdims=True)
    f0 = np.take_along_axis(f, tokens, axis=-1)[:, None, None, :, 0]
    log_chi = {name: 2 * path[..., 0] for name, path in distinct.items()}
    xi, rates = {name: paths["growth_rate"] for name, paths in found.items()}, ratios[:, None, None]
    B = {name: scan_snap.growth_along(rate, ts, rates) for name, rate in xi.items()}
    # The start is left out, where z is zero.
    later = {name: path[:, :, 1:] for name, path in z.items()}
    # The figure shows the first class of Figure 4's data: z at ratio 0.1, and its growth at ratio 1.
    row, (tenth, one) = list(data).index("figure4"), np.searchsorted(ratios, [0.1, 1.0])
    shown = [0, tokens[row, 0, 0]]
    return {
        "time": ("time", ts),
        "ratio": ("ratio", ratios),
        "overlap": ("overlap", overlaps),
        "data": ("data", np.array(list(data))),
        "fate": _fate(later["full"], distinct["full"][:, :, 1:], data, tenth),
        "gain": ("data ratio", {name: found[name]["gain"] for name in FLOWS}),
        "reverse": ("data ratio", {name: found[name]["reverse"] for name in REDUCED}),
        "bound": {
            "below": ("data", {name: _most(2 * f0**2 * B[name] - log_chi[name]) for name in FLOWS}),
            "above": ("data", {name: _most(log_chi[name] - 2 * B[name]) for name in FLOWS}),
        },
        "error": (
            "data ratio",
            {each: attention_error(later[each], later["full"]).max(-1) for each in REDUCED},
        ),
        "size": ("data ratio", {name: np.max(np.abs(path), axis=(2, 3, 4)) for name, path in z.items()}),
        "figure4_overlap": f[row, 0] @ f[row, 1],
        "token": ("token", np.array(["common token", "strongest distinct"])),
        "z": ("time token", {name: path[row, tenth][:, 0, shown] for name, path in z.items()}),
        "growth": ("time", {"log_chi": log_chi["full"][row, one, :, 0], "B": B["full"][row, one, :, 0]}),
        "f0": f0[row, 0, 0, 0],
    }


def _most(excess: np.ndarray) -> np.ndarray:
    return np.max(excess, axis=(1, 2, 3))


def _fate(z: np.ndarray, distinct: np.ndarray, data: dict[str, SequenceClasses], middle: int) -> dict:
    """Signs of logits along the full flow, on the data that move; those of one common token come first."""
    common = {name: np.asarray(scan_snap.common_tokens(classes)) for name, classes in data.items()}
    moving = [name not in STILL for name in data]
    single = [name not in (*STILL, "figure4", "unequal") for name in data]
    total = np.einsum("drtkm,dm->drtk", z, np.stack([*common.values()]))
    unequal = z[list(data).index("unequal"), middle]
    return {
        "distinct_grow": ("moving ratio later class distinct", distinct[moving] > 0),
        "single_falls": ("overlap ratio later class", total[single] < 0),
        "sum_falls": ("moving ratio later class", total[moving] < 0),
        "unequal": np.max(unequal[..., common["unequal"]]),
    }


def _tokens(saved: Saved) -> Iterator[Claim]:
    """The fate of tokens, their relative gains, and the bounds on their growth."""
    fate, rare = saved["fate"], "one class hardly uses it"
    largest = fate["unequal"]
    yield qualified(
        "fate",
        "Distinct tokens gain attention logits, common tokens lose them",
        "tian2023scan, Theorem 2",
        condition="there is one common token; of several, the sum falls but one of them may grow",
        inside=[
            every("distinct tokens, all data, ratios and times: z > 0", fate["distinct_grow"]),
            every("one common token: z < 0", fate["single_falls"]),
            every("one or several common tokens: sum of z < 0", fate["sum_falls"]),
        ],
        # A common token that one class hardly uses is nearly distinct for the other.
        outside=[at_least("three common tokens of unequal probability: largest z", largest, 0.01, why=rare)],
    )
    moving = ~np.isin(saved["data"], STILL)
    errors = {name: [saved[f"gain/{name}"], saved[f"reverse/{name}"]] for name in REDUCED}
    worst = {name: np.max(np.stack(both)[:, moving]) for name, both in errors.items()}
    exact = "exact: the solver's 1e-13 per step, times exp(2 z)"
    yield stated(
        "relative-gain-reduced",
        "The relative gain of two distinct tokens is r(t) = r(0) exp(2 (z_l(t) - z_l(0)))",
        "tian2023scan, Theorem 3",
        at_most("fast decoder: largest error of ln(1 + r)", worst["fast"], 1e-6, why=exact),
        at_most("weak correlation: largest error of ln(1 + r)", worst["weak"], 1e-6, why=exact),
    )
    # The first of a pair is the more probable one: otherwise r < 0, and errors of ln(1 + r) have no bound.
    ratio, gain = _places(saved["ratio"]), saved["gain/full"][moving]
    worst, rising = gain.max(axis=0), np.diff(gain[:, saved["ratio"] <= 0.1], axis=1) > 0
    second = "what is neglected is of second order"
    yield stated(
        "relative-gain-full",
        "The closed form of the gain over a rarer token holds on the full flow where the decoder is fast",
        "tian2023scan, Theorem 3",
        at_most("largest error of ln(1 + r) at ratio 0.1, r > 0", worst[ratio[0.1]], 2e-2, why=second),
        at_most("largest error at ratio 0.01, r > 0", worst[ratio[0.01]], 1e-3, why=second),
        every("errors that rise with the ratio, up to 0.1", rising),
    )
    # In the full and the fast-decoder flow B is the integral of z' / f^2, where the upper bound says that z
    # never falls; the weak-correlation flow has its own B.
    bound = {name: np.max(excess[moving]) for name, excess in saved["bound"].items()}
    why = "Simpson's rule on the records"
    yield stated(
        "growth-bounds",
        "The gain of the dominant token lies between exp(2 f(0)^2 B) and exp(2 B): its share f rises from "
        "f(0), and the upper bound says no more than that f is at most 1",
        "tian2023scan, Theorem 3",
        *(
            at_most(f"{label}: {side}", bound[f"{key}/{name}"], 0.0, 1e-6, why=why)
            for name, label in NAMES.items()
            for key, side in (("below", "below 2 f(0)^2 B"), ("above", "above 2 B"))
        ),
    )


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What tokens do in all three flows, and how far the reduced ones are from the full one."""
    yield from _tokens(saved)
    data, ratio = _places(saved["data"]), _places(saved["ratio"])
    slow = ratio[0.01]

    def order(name, largest):
        chosen = saved["ratio"] <= largest
        return convergence_order(saved["ratio"][chosen], saved["error/fast"][data[name], chosen]).slope

    weakly, figure4, strongly = order("0.03", 0.1), order("figure4", 0.1), order("0.72", 0.01)
    # Where one token is all that the classes attend to, the error is larger and linear later.
    bends = "the second order, about the error itself"
    yield stated(
        "reduced-error",
        "The error of the fast-decoder flow falls linearly with learning_rate_Z / learning_rate_Y",
        "tian2023scan, section 4 (derived here: only dF/dt is dropped)",
        slope("order, one common token, cosine 0.03, ratios <= 0.1", weakly, 1.0, 0.1, why=bends),
        slope("order, Figure 4's data, ratios <= 0.1", figure4, 1.0, 0.1, why=bends),
        slope("order, one common token, cosine 0.72, ratios <= 0.01", strongly, 1.0, 0.1, why=bends),
    )
    error = saved["error/weak"][:, slow]
    source, hardly = (
        error[data["figure4"]],
        np.max([error[data[str(cosine)]] for cosine in saved["overlap"] if cosine <= 1e-3]),
    )
    few, wrong = "a few cosines, and the fast decoder's error", "an error of the size of z"
    yield qualified(
        "weak-correlation",
        "With a fast decoder attention follows a flow in which each class is learned on its own",
        "tian2023scan, Theorem 1",
        condition="the classes hardly overlap: cosines of 0.001, not those of the source's own data",
        inside=[at_most("error at ratio 0.01, cosines <= 0.001", hardly, 0.02, why=few)],
        outside=[at_least("error at ratio 0.01, Figure 4's data (cosine 0.72)", source, 0.5, why=wrong)],
    )
    size, one_law = saved["size"], data["one law"]
    apart = np.max([each[data["no common"]] for each in size.values()])
    alike, grown = np.max([each[one_law, slow] for each in size.values()]), size["full"][one_law, -1]
    yield qualified(
        "still",
        "Attention does not move where no token is common, nor where all classes have one law",
        "tian2023scan, section 4 (derived here: Y g_n stays along f_n)",
        condition="nothing perturbs it: under one law z = 0 is unstable, and rounding grows",
        inside=[
            at_most("no common token, all flows and ratios: |z|", apart, 1e-12, why=ROUNDING),
            at_most("one law, all flows, ratio 0.01: |z|", alike, 1e-12, why=ROUNDING),
        ],
        outside=[at_least("one law, full flow, largest ratio: |z|", grown, 0.1, why="exponential growth")],
    )


def _places(values: np.ndarray) -> dict:
    """Where the values of a coordinate are."""
    return {value: index for index, value in enumerate(values.tolist())}


def figure(config: Config, saved: Saved) -> Figure:
    """Logits over time, errors over the ratio and over the cosine, and the bounds on the growth."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (over_time, over_ratio), (over_overlap, bounds) = axes
    ts, ratios, overlaps, full = saved["time"], saved["ratio"], saved["overlap"], saved["z/full"]

    for index, label in enumerate(saved["token"]):
        over_time.plot(ts, full[:, index], color=f"C{index}", label=f"full: {label}", **plotting.TRAINED)
    for flow, style in (("fast", plotting.THEORY), ("weak", plotting.PRINTED)):
        over_time.plot(ts, saved[f"z/{flow}"], **style)
        over_time.plot([], [], label=NAMES[flow], **style)
    room, place = (None, 1.8 * full.max()), {"loc": "upper left", "ncols": 2}
    labels = ("Ten common tokens, ratio 0.1", "time × learning_rate_Y", "attention logit z")
    plotting.finish(over_time, *labels, place, ylim=room)

    data, slow = _places(saved["data"]), _places(ratios)[0.01]
    common = [data[str(cosine)] for cosine in overlaps]
    for flow, color in (("fast", "C0"), ("weak", "C1")):
        error, name = saved[f"error/{flow}"], NAMES[flow]
        hollow, figure4 = {"color": color, "mfc": "none"}, error[data["figure4"]]
        over_ratio.loglog(ratios, error[data["0.03"]], "o", label=f"{name}, one common token", **hollow)
        over_ratio.loglog(ratios, figure4, "s", label=f"{name}, ten common tokens", **hollow)
        over_overlap.loglog(overlaps, error[common, slow], "o-", color=color, label=name)
        over_overlap.loglog(saved["figure4_overlap"], figure4[slow], "s", ms=8, **hollow)
    plotting.reference_slope(over_ratio, ratios, saved["error/fast"][data["0.03"]], 1, "slope 1")
    plotting.make_room(over_ratio, above=0.6)
    size, place = "largest relative error of z", "upper left"
    title, ratio = "Error over the ratio of learning rates", "learning_rate_Z / learning_rate_Y"
    plotting.finish(over_ratio, title, ratio, size, place)

    over_overlap.plot([], [], "s", color="0.3", mfc="none", ms=8, label="ten common tokens")
    title = "Error over the classes' overlap, ratio 0.01"
    plotting.finish(over_overlap, title, "cosine of the two classes", size, place)

    log_chi, B, f0 = saved["growth/log_chi"], saved["growth/B"], saved["f0"]
    bounds.plot(ts, log_chi, color="C0", label="strongest distinct token", **plotting.TRAINED)
    bounds.plot(ts, 2 * B, label="bounds 2 f(0)² B and 2 B", **plotting.THEORY)
    bounds.plot(ts, 2 * f0**2 * B, **plotting.THEORY)
    labels = ("Full flow, ratio 1: growth and its bounds", "time × learning_rate_Y", "ln of the growth χ")
    plotting.finish(bounds, *labels, place, ylim=(0, 2.8 * B.max()))
    return drawn
