"""From scanning to snapping: attention grows, and then almost stops, near t = K ln(M) / learning_rate_Y.

The closed form of the growth B_n(t) and its printed form stand beside the theorem's own hypothesis,
integrated. The full population flow tells when attention moves fastest, over classes, vocabularies and
learning rates. The growth in a trained network follows the flow's at first order in the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import scan_snap
from dynamics.flow import Trajectory, integrate
from dynamics.scan_snap import FLOWS, SequenceClasses
from models.attention import observe_weights, population_loss
from models.data.tokens import one_common_token
from models.training import Descent, scale_by_name
from sims import plotting
from sims.claims import (
    SECOND_ORDER,
    SOLVER,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    equals,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import SOLVE, convergence_order, fit_line, largest, named_lanes, require_ok
from sims.ranges import Count, Length, Positive, Range, Share
from sims.results import Context, Saved

# Distinct tokens per class, of weights 0.1 and 1.
DISTINCT = 2
# Where the peak leaves its place: classes that overlap like the source's, and attention that is fast.
STRONG_OVERLAP, FAST_RATIO = 0.72, 10.0
# A second learning rate of the decoder.
OTHER_RATE_Y = 5.0
FORMS = {
    "closed": scan_snap.attention_growth,
    "scanning": scan_snap.attention_growth_scanning,
    "snapping": scan_snap.attention_growth_snapping,
    "printed": scan_snap.attention_growth_printed,
}
Rates = Annotated[tuple[Positive, ...], Length(2)]
Size = Annotated[int, Range(at_least=2)]


@dataclass(frozen=True)
class Config:
    """Sizes and sweeps."""

    vocab_sizes: Annotated[tuple[Size, ...], Length(1)] = (34, 100, 1000, 10_000)
    """Vocabulary sizes M of the closed form."""
    num_classes: Annotated[tuple[Count, ...], Length(1)] = (2, 10)
    """Numbers of classes K of the closed form."""
    constants: tuple[Positive, ...] = (0.1, 10.0)
    """The theorem's constants C0 of the closed form, besides 1."""
    rates_Z: Rates = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Increasing learning_rate_Z of the closed form, learning_rate_Y = 1."""
    rates_Y: Rates = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Increasing learning_rate_Y of the closed form, learning_rate_Z = 1."""
    shapes: Annotated[tuple[tuple[Size, Size], ...], Length(2)] = ((2, 34), (8, 34), (8, 102))
    """Numbers of classes and vocabulary sizes (K, M) of the full flow; the network has the first."""
    ratios: Annotated[tuple[float, ...], Length(1), Range(above=0, at_most=1)] = (0.01, 0.1, 1.0)
    """Increasing ratios learning_rate_Z / learning_rate_Y of the full flow, at most 1."""
    overlap: Share = 0.03
    """Cosine between two classes of the full flow; they have one token in common."""
    trained_ratio: Positive = 0.3
    """Ratio learning_rate_Z / learning_rate_Y of the network."""
    horizon: Positive = 4.0
    """Time at which training ends, in units of K ln(M) / learning_rate_Y."""
    points: Count = 120
    """Records along a flow, and along the network's training."""
    substeps: Annotated[tuple[Count, ...], Length(2)] = (2, 4, 8, 16)
    """Steps of the network between two records, one per learning rate."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Numbers of classes and vocabulary sizes (K, M) of the closed form."""
        return [(K, M) for M in self.vocab_sizes for K in self.num_classes]


_QUICK = Config()
_SHAPES = tuple((K, M) for M in (34, 102) for K in (2, 4, 8))
_FINE = replace(_QUICK, shapes=_SHAPES, substeps=(2, 4, 8, 16, 32, 64), points=160)
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": _FINE,
    "paper": replace(_FINE, shapes=(*_SHAPES, (2, 204), (8, 204)), ratios=(0.01, 0.03, 0.1, 0.3, 1.0)),
}


def _hypothesis_field(t, state, setting):
    """The theorem's hypothesis on the logit z of the one common token: z' = -(rate_Z / C0) gamma exp(4 z).

    The margin u = M h is a state of its own. B' = -z', so that B = -z.
    """
    (u, z), (K, M, C0, rate_Y, rate_Z) = state, setting
    slowed = 1 / (M - 1 + jnp.exp(u))
    gamma = (M - 1) ** 2 * u / M * slowed
    return M / K * rate_Y * slowed, -rate_Z / C0 * gamma * jnp.exp(4 * z)


@jax.jit
def _growth(settings: jax.Array, ts: jax.Array) -> dict[str, jax.Array]:
    """B in every setting (L, 5) at its times (L, T): integrated and by the closed forms; the crossover."""

    def one(setting, ts):
        K, M, C0, rate_Y, rate_Z = setting
        start = (jnp.zeros((), ts.dtype), jnp.zeros((), ts.dtype))
        path = integrate(_hypothesis_field, start, ts, tuple(setting), rtol=1e-10, atol=1e-12, **SOLVE)
        sizes = {"learning_rate_Y": rate_Y, "num_classes": K, "vocab_size": M}
        crossover = scan_snap.crossover_time(**sizes)
        margin = M * scan_snap.decoder_margin(crossover, **sizes)
        # From the second time on: the late forms are infinite at t = 0.
        forms = {name: form(ts[1:], learning_rate_Z=rate_Z, C0=C0, **sizes) for name, form in FORMS.items()}
        integrated = jnp.where(path.ok, -path.ys[1][1:], jnp.nan)
        return {**forms, "integrated": integrated, "crossover": crossover, "margin": margin}

    return jax.vmap(one)(settings, ts)


def _closed_form(config: Config) -> dict:
    """Growth over time by the closed forms and as integrated, and over either learning rate."""
    most = (config.num_classes[-1], config.vocab_sizes[-1], 1.0)
    constants = np.unique([1.0, *config.constants])
    # Settings are K, M, C0, and the learning rates of decoder and attention.
    groups = {
        "grid": [(*size, C0, 1.0, 1.0) for C0 in constants for size in config.sizes],
        "over_Z": [(*most, 1.0, rate) for rate in config.rates_Z],
        "over_Y": [(*most, rate, 1.0) for rate in config.rates_Y],
    }
    settings = np.array([setting for group in groups.values() for setting in group])
    K, M, _, rate_Y, _ = settings.T
    # Times in units of K ln(M), with those at which the claims look.
    units = np.unique([0.0, 0.1, 2.0, 200.0, *np.geomspace(1e-2, 400, 93)])
    found = jax.device_get(_growth(settings, (K * np.log(M))[:, None] * units))
    off = found["crossover"] * rate_Y / (K * (np.log(M) + 1)) - 1
    group = np.repeat(list(groups), [len(each) for each in groups.values()])
    shown, over_Z = (group == "grid") & (settings[:, 2] == 1), group == "over_Z"
    return {
        "unit": ("unit", units[1:]),
        "rate_Z": ("rate_Z", np.array(config.rates_Z)),
        "rate_Y": ("rate_Y", np.array(config.rates_Y)),
        "growth": ("size unit", {name: found[name][shown] for name in (*FORMS, "integrated")}),
        "growth_gap": largest(found["closed"] - found["integrated"]),
        "crossover": {
            "grid": ("size", found["crossover"][shown]),
            "over_Z": ("rate_Z", found["crossover"][over_Z]),
        },
        "crossover_excess": largest(np.exp(found["margin"]) / (M - 1) - 1),
        "crossover_error": largest(off[np.max(M) == M]),
        "over_Z": ("rate_Z unit", {name: found[name][over_Z] for name in ("closed", "printed")}),
        "over_Y": ("rate_Y unit", found["closed"][group == "over_Y"]),
    }


def _lane(shape: tuple[int, int], units: np.ndarray, overlap: float, rate_Y: float, rate_Z: float) -> tuple:
    """What a flow is solved for: classes, the learning rates of decoder and attention, and times."""
    K, M = shape
    classes = one_common_token(overlap, K, num_distinct=DISTINCT, vocab_size=M)
    return classes, np.array([rate_Y, rate_Z]), units * (K * np.log(M) / rate_Y)


@eqx.filter_jit
def _solve(flow, lanes: dict[str, tuple]) -> dict[str, Trajectory]:
    """A flow in every lane: xi by the flow's own formula, |z'| of the first class's likeliest token."""

    def one(lane):
        classes, (rate_Y, rate_Z), ts = lane
        path = flow(classes, ts, learning_rate_Y=rate_Y, learning_rate_Z=rate_Z, **SOLVE)
        likeliest = jnp.argmax(jnp.where(scan_snap.distinct_tokens(classes), classes.P, -1)[0])

        def measure(t, weights):
            velocity = rate_Z * scan_snap.population_field(weights, classes).Z
            if flow is scan_snap.weak_correlation_flow:
                xi = scan_snap.weak_growth_rate(weights.Z, classes, t, rate_Y)
            else:
                xi = scan_snap.growth_rate(weights, classes)
            return {"growth_rate": xi, "speed": jnp.abs(velocity[classes.query[0], likeliest])}

        return Trajectory(ts, jax.vmap(measure)(ts, path.ys), path.ok)

    return named_lanes(one, **lanes)


def _solved(flow, lanes: dict[str, tuple]) -> dict[str, dict[str, np.ndarray]]:
    paths = jax.device_get(_solve(flow, lanes))
    require_ok("a flow of attention", *paths.values())
    return {name: path.ys for name, path in paths.items()}


def _peaks(config: Config, context: Context, network: tuple) -> tuple[dict, np.ndarray]:
    """When attention moves fastest along the full flow, over shapes and rates; xi in the network's lane."""
    units = np.concatenate([[0], np.geomspace(0.1, 5, config.points)])
    slowest = config.ratios[0]
    weak = {f"ratio {ratio}": (config.overlap, 1.0, ratio) for ratio in config.ratios}
    settings = {
        **weak,
        "other_rate_Y": (config.overlap, OTHER_RATE_Y, slowest),
        "fast": (config.overlap, 1.0, FAST_RATIO),
        "strong": (STRONG_OVERLAP, 1.0, slowest),
    }
    solved = []
    for index, shape in enumerate(config.shapes):
        context.progress(f"solving the full flow for K, M = {shape}", 0.1 + 0.5 * index / len(config.shapes))
        lanes = {name: _lane(shape, units, *setting) for name, setting in settings.items()}
        lanes |= {"network": network} if index == 0 else {}
        solved.append(_solved(scan_snap.population_flow, lanes))
    speeds = [{name: paths[name]["speed"][1:] for name in settings} for paths in solved]
    peaks = {name: units[1:][np.argmax([speed[name] for speed in speeds], axis=1)] for name in settings}
    measured = {
        "flow_unit": ("flow_unit", units[1:]),
        "ratio": ("ratio", np.array(config.ratios)),
        "weak_peak": ("shape ratio", np.stack([peaks[name] for name in weak], axis=1)),
        "peak": ("shape", {name: peak for name, peak in peaks.items() if name not in weak}),
        "speed": ("shape flow_unit", np.array([speed[f"ratio {slowest}"] for speed in speeds])),
        "first_speed": ("flow_unit", {name: speeds[0][name] for name in ("fast", "strong")}),
    }
    return measured, solved[0]["network"]["growth_rate"]


def _observe(classes: SequenceClasses, params) -> jax.Array:
    return scan_snap.growth_rate(observe_weights(params), classes)


def _network(config: Config, lane: tuple, full: np.ndarray) -> dict:
    """Growth in a network trained at every learning rate, and along the three flows."""
    classes, _, ts = lane
    reduced = {name: _solved(FLOWS[name], {"network": lane})["network"] for name in ("fast", "weak")}
    rate = {"full": full, **{name: path["growth_rate"] for name, path in reduced.items()}}
    descent = Descent(float(ts[-1]), config.points, config.substeps)
    loss, params = population_loss(classes)
    scale = scale_by_name(Y=1.0, Z=config.trained_ratio)
    _, trained = descent.train(loss, params, observe=Partial(_observe, classes), precondition=scale)
    require_ok("training", trained)
    rate["network"] = np.asarray(trained.ys)
    B = {name: scan_snap.growth_along(xi, ts, config.trained_ratio) for name, xi in rate.items()}
    network = B.pop("network")
    fastest = {"full": full, "network": rate["network"][-1]}
    drawn = {"coarsest": network[0], "finest": network[-1], **B}
    return {
        "time": ("time", ts),
        "rate": ("rate", descent.rates),
        "gap": ("rate", np.max(np.abs(network - B["full"]), axis=(1, 2))),
        "reduced_gap": largest(network[-1] - B["fast"]),
        "fastest": {name: ts[np.argmax(xi[:, 0])] for name, xi in fastest.items()},
        "B": ("time", {name: path[:, 0] for name, path in drawn.items()}),
    }


def run(config: Config, context: Context) -> dict:
    """Check the closed forms, find the peak of the full flow, and train the network."""
    context.progress("integrating the theorem's hypothesis", 0.0)
    closed_form = _closed_form(config)
    units = np.linspace(0, config.horizon, config.points + 1)
    lane = _lane(config.shapes[0], units, STRONG_OVERLAP, 1.0, config.trained_ratio)
    peaks, full = _peaks(config, context, lane)
    context.progress("training the network", 0.7)
    return {**closed_form, **peaks, **_network(config, lane, full)}


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The closed form and what it says of learning rates, the peak of the flow, and the network."""
    yield _closed_form_claim(saved)
    excess, error = saved["crossover_excess"], saved["crossover_error"]
    root, next_order = "a root to machine precision, of size ln M", "3 / M and ln(M) / M over ln(M) + 1"
    yield stated(
        "crossover",
        "Scanning turns into snapping, exp(M h) = M - 1, at about K (ln(M) + 1) / learning_rate_Y",
        "tian2023scan, Theorem 4 (derived here: twice K ln(M) is where its late form is good)",
        at_most("exp(M h) / (M - 1) - 1 at the crossover", excess, 1e-9, why=root),
        at_most("relative error of the estimate, largest M", error, 0.01, why=next_order),
    )
    yield _peak_time(config, saved)
    rising, denser = np.diff(saved["over_Z/closed"], axis=0) > 0, np.diff(saved["over_Y"], axis=0)
    early, late = saved["unit"] <= 1 / saved["rate_Y"][-1], saved["unit"] >= 2 / saved["rate_Y"][0]
    yield qualified(
        "rates",
        "Larger learning_rate_Z gives sparser attention, larger learning_rate_Y denser attention",
        "tian2023scan, Theorem 4",
        condition="it is late, for learning_rate_Y: early on B grows with it",
        inside=[
            every("B rises with learning_rate_Z, all times", rising),
            every("B falls with learning_rate_Y, after 2 K ln(M) / rate_Y", denser[:, late] < 0),
        ],
        outside=[every("B rises with learning_rate_Y, before K ln(M) / rate_Y", denser[:, early] > 0)],
    )
    order, gap = convergence_order(saved["rate"], saved["gap"]).slope, saved["reduced_gap"]
    peak, wrong = saved["fastest/network"] / saved["fastest/full"], "what a wrong flow looks like"
    yield stated(
        "trained",
        "A network trained by gradient descent goes through the same transition at the same time",
        "tian2023scan, Theorem 4 (the growth of its attention, from its own weights)",
        slope("order of B's gap to the full flow", order, 1.0, 0.1, why=SECOND_ORDER),
        at_least("B's gap to the fast-decoder flow, finest rate", gap, 0.01, why=wrong),
        equals("time of fastest growth, network / full flow", peak, 1.0, 0.05, why="a record or two"),
    )


def _closed_form_claim(saved: Saved) -> Claim:
    growth, (early, late, later) = saved["growth"], np.searchsorted(saved["unit"], [0.1, 2.0, 200.0])
    error = {name: np.max(np.abs(form / growth["closed"] - 1), axis=0) for name, form in growth.items()}
    ratio = np.mean((growth["printed"] / growth["integrated"])[:, later])
    early, late, later = error["scanning"][early], error["snapping"][late], error["snapping"][later]
    label = "printed / integrated hypothesis, at 200 K ln(M) / rate_Y"
    factor = "so late its other omissions cost little"
    # The margin u of the late form is ln(M rate_Y t / K).
    beside_exp, beside_M = "(M - 1) u is neglected beside exp(u)", "exp(u) - 1 is neglected beside M"
    return corrected(
        "growth",
        "B = (1/4) ln(1 + (2 K (M - 1)^2 / C0) (learning_rate_Z / learning_rate_Y) h^2), with a factor 1/4",
        "tian2023scan, Theorem 4",
        printed=[equals(label, ratio, 1.0, 0.1, why=factor)],
        mended=[
            at_most("closed form, largest error", saved["growth_gap"], 1e-6, why=SOLVER),
            at_most("late form's error at 2 K ln(M) / rate_Y, C0 = 1", late, 0.1, why=beside_exp),
            at_most("late form's error at 200 K ln(M) / rate_Y, C0 = 1", later, 1e-3, why=beside_exp),
            at_most("early form's error at 0.1 K ln(M) / rate_Y, C0 = 1", early, 0.05, why=beside_M),
        ],
    )


def _peak_time(config: Config, saved: Saved) -> Claim:
    weak, fast, strong = saved["weak_peak"], saved["peak/fast"], saved["peak/strong"]
    K, M = np.array(config.shapes).T
    unit, same = K * np.log(M), np.equal(M, M[0])
    slowest = np.log(weak[:, 0] * unit)
    in_unit, in_K = fit_line(np.log(unit), slowest).slope, fit_line(np.log(K[same]), slowest[same]).slope
    in_rate_Y = 1 + np.log(weak[:, 0] / saved["peak/other_rate_Y"]) / np.log(OTHER_RATE_Y)
    worst = in_rate_Y[np.argmax(abs(in_rate_Y - 1))]
    near, leaves = "below the crossover, above half of it", "beyond the bound that holds inside"
    # The peak is at 0.93 of the unit for M = 34, at 0.86 of it for M = 102.
    by_M, in_turn = "corrections of order 1 / ln(M)", "classes learn one after the other"
    return qualified(
        "peak-time",
        "Attention moves fastest at t of order K ln(M) / learning_rate_Y",
        "tian2023scan, Theorem 4",
        condition="learning_rate_Z <= learning_rate_Y (else earlier) and classes hardly overlap (else later)",
        inside=[
            at_least("earliest peak / (K ln(M) / rate_Y), rate_Z <= rate_Y", weak.min(), 0.6, why=near),
            at_most("latest peak / (K ln(M) / rate_Y), rate_Z <= rate_Y", weak.max(), 1.5, why=near),
            slope("power of K ln(M), smallest ratio", in_unit, 1.0, 0.15, why=by_M),
            slope("power of K at the first M, smallest ratio", in_K, 1.0, 0.05, why=in_turn),
            slope("power of 1 / learning_rate_Y", worst, 1.0, 0.05, why="a small rate_Z hardly matters"),
        ],
        outside=[
            at_most("latest peak with rate_Z = 10 rate_Y", fast.max(), 0.6, why=leaves),
            at_least("earliest peak, classes overlap by 0.72, smallest ratio", strong.min(), 1.5, why=leaves),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """The growth over time, over learning rates, the peak of every shape, and the trained network."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (over_time, over_rates), (peaks, network) = axes
    _draw_growth(over_time, config, saved)
    units, K, M = saved["unit"], config.num_classes[-1], config.vocab_sizes[-1]
    ts = units * (K * np.log(M))
    for index, rate in enumerate(saved["rate_Z"]):
        label = f"rate_Z = {rate:g} rate_Y"
        over_rates.plot(ts, saved["over_Z/closed"][index], color=f"C{index}", label=label)
        late = ts >= saved["crossover/over_Z"][index]
        over_rates.plot(ts[late], saved["over_Z/printed"][index][late], **plotting.PRINTED)
    over_rates.plot([], [], label="printed", **plotting.PRINTED)
    over_rates.set(xscale="log", xlabel="time × learning_rate_Y", ylabel="growth B", ylim=(-0.5, 16))
    over_rates.set_title("Larger learning_rate_Z, more growth and earlier")
    over_rates.legend(loc="upper left", ncols=2)

    def draw_speed(speed, **style):
        peaks.plot(saved["flow_unit"], speed / speed.max(), **style)

    for index, (K, M) in enumerate(config.shapes):
        draw_speed(saved["speed"][index], color=f"C{index}", label=f"K = {K}, M = {M}")
    draw_speed(saved["first_speed/fast"], color="0.45", linestyle="--", label="rate_Z = 10 rate_Y")
    draw_speed(saved["first_speed/strong"], color="0.45", linestyle=":", label="classes overlap by 0.72")
    peaks.plot([1, 1], [0, 1], color="0.7", linewidth=1)
    peaks.set(xscale="log", ylim=(0, 1.9), ylabel="|z'| / its maximum")
    peaks.set_xlabel("time / (K ln(M) / learning_rate_Y)")
    peaks.set_title("When attention moves fastest, full flow")
    peaks.legend(loc="upper left", ncols=2)

    ts = saved["time"]
    for color, name, rate in (("C0", "coarsest", saved["rate"][0]), ("C1", "finest", saved["rate"][-1])):
        network.plot(
            ts, saved[f"B/{name}"], color=color, label=f"network, rate {rate:.2g}", **plotting.TRAINED
        )
    network.plot(ts, saved["B/full"], label="full flow", **plotting.THEORY)
    network.plot(ts, saved["B/fast"], color="0.45", linestyle="--", label="fast-decoder flow")
    network.plot(ts, saved["B/weak"], label="weak-correlation flow", **plotting.PRINTED)
    network.set(xlabel="time = learning rate × step", ylabel="growth B")
    network.set_title(f"Trained network, ratio {config.trained_ratio:g}, and the flows")
    network.legend(loc="upper left")
    return drawn


def _draw_growth(ax: Axes, config: Config, saved: Saved) -> None:
    """Growth over time at the smallest, a middle and the largest number of classes and vocabulary."""
    count = len(config.sizes)
    for index, row in enumerate((0, count // 2, count - 1)):
        growth = {name: form[row] for name, form in saved["growth"].items()}
        (K, M), crossover = config.sizes[row], saved["crossover/grid"][row]
        unit = K * np.log(M)
        ts = saved["unit"] * unit
        ax.plot(ts, growth["closed"], color=f"C{index}", label=f"K = {K}, M = {M}", **plotting.TRAINED)
        for form, where in (("scanning", ts <= unit), ("snapping", ts >= 2 * unit)):
            ax.plot(ts[where], growth[form][where], **plotting.THEORY)
        ax.plot(crossover, np.interp(crossover, ts, growth["closed"]), "o", color=f"C{index}", zorder=6)
    ax.plot([], [], label="early and late form", **plotting.THEORY)
    ax.plot([], [], "o", color="0.3", label="crossover")
    ax.set(xscale="log", xlabel="time, both learning rates 1", ylabel="growth B")
    ax.set_title("Scanning, then snapping")
    ax.legend(loc="upper left")
