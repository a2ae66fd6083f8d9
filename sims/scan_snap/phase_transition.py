"""From scanning to snapping: attention grows, and then almost stops, near t = K ln(M) / learning_rate_Y.

The closed form of the growth B_n(t) and its printed form stand beside the theorem's own hypothesis,
integrated. The full population flow tells when attention moves fastest and when scanning turns into snapping,
over classes, vocabularies and learning rates. Trained networks tell what either learning rate does to the
sparsity of attention. The growth in a trained network follows the flow's at first order in the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

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
from models.training import Descent, map_lanes, scale_by_name
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
from sims.compare import SOLVE, convergence_order, fit_line, largest, named_groups, require_ok
from sims.ranges import Count, Length, Positive, Range, Share, check_ranges
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
    """Increasing learning_rate_Z of trained networks, learning_rate_Y = 1; the first two are at most 1."""
    rates_Y: Rates = (1.0, 3.0, 10.0)
    """Increasing learning_rate_Y of trained networks, at least learning_rate_Z = 1."""
    long_horizon: Positive = 100.0
    """Time at which the training of these networks ends."""
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

    def __post_init__(self):
        check_ranges(self)
        if self.rates_Z[1] > 1 or self.rates_Z[-2] < 1 or self.rates_Y[0] < 1:
            wanted = "must begin with two numbers <= 1 and end with two >= 1, and rates_Y be >= 1"
            raise ValueError(f"rates_Z {wanted}, got {self.rates_Z} and {self.rates_Y}")

    @property
    def long(self) -> Descent:
        """Gradient descent of the networks of several rates, in steps of two lengths."""
        return Descent(self.long_horizon, points=200, substeps=(10, 20))

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

    def one(lane):
        (K, M, C0, rate_Y, rate_Z), ts = lane
        start = (jnp.zeros((), ts.dtype), jnp.zeros((), ts.dtype))
        path = integrate(
            _hypothesis_field, start, ts, (K, M, C0, rate_Y, rate_Z), rtol=1e-10, atol=1e-12, **SOLVE
        )
        sizes = {"learning_rate_Y": rate_Y, "num_classes": K, "vocab_size": M}
        crossover = scan_snap.crossover_time(**sizes)
        # From the second time on: the late forms are infinite at t = 0.
        forms = {name: form(ts[1:], learning_rate_Z=rate_Z, C0=C0, **sizes) for name, form in FORMS.items()}
        integrated = jnp.where(path.ok, -path.ys[1][1:], jnp.nan)
        return {**forms, "integrated": integrated, "crossover": crossover}

    return map_lanes(one, (settings, ts), at_once=1)


def _closed_form(config: Config) -> dict:
    """Growth over time by the closed forms and as integrated, both learning rates one."""
    constants = np.unique([1.0, *config.constants])
    # Settings are K, M, C0, and the learning rates of decoder and attention.
    settings = np.array([(*size, C0, 1.0, 1.0) for C0 in constants for size in config.sizes])
    K, M, C0, *_ = settings.T
    # Times in units of K ln(M), with those at which the claims look.
    units = np.unique([0.0, 0.1, 2.0, 200.0, *np.geomspace(1e-2, 400, 93)])
    found = jax.device_get(_growth(settings, (K * np.log(M))[:, None] * units))
    shown = C0 == 1
    return {
        "unit": ("unit", units[1:]),
        "growth": ("size unit", {name: found[name][shown] for name in (*FORMS, "integrated")}),
        "growth_gap": largest(found["closed"] - found["integrated"]),
        "size_crossover": ("size", found["crossover"][shown]),
    }


def _lane(shape: tuple[int, int], units: np.ndarray, overlap: float, rate_Y: float, rate_Z: float) -> tuple:
    """What a flow is solved for: classes, the learning rates of decoder and attention, and times."""
    K, M = shape
    classes = one_common_token(overlap, K, num_distinct=DISTINCT, vocab_size=M)
    return classes, np.array([rate_Y, rate_Z]), units * (K * np.log(M) / rate_Y)


def _confidence(weights: scan_snap.Weights, classes: SequenceClasses) -> jax.Array:
    """Probability of the next token of the first class."""
    f = scan_snap.attended_features(weights.Z, classes.P, classes.query)[0]
    return jax.nn.softmax(f @ weights.Y)[classes.next_token[0]]


@eqx.filter_jit
def _solve(flow, lanes: tuple) -> Trajectory:
    """A flow in every lane: xi by its own formula, and of the first class |z'| and the next token."""

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
            speed = jnp.abs(velocity[classes.query[0], likeliest])
            return {"growth_rate": xi, "speed": speed, "confidence": _confidence(weights, classes)}

        return Trajectory(ts, jax.vmap(measure)(ts, path.ys), path.ok)

    # Side by side all would take the steps of the one that takes most.
    return map_lanes(one, lanes, at_once=1)


def _solved(flow, lanes: dict[str, tuple]) -> dict[str, dict[str, np.ndarray]]:
    paths = named_groups(Partial(_solve, flow), {name: [lane] for name, lane in lanes.items()})
    require_ok("a flow of attention", *paths.values())
    return {name: {each: values[0] for each, values in path.ys.items()} for name, path in paths.items()}


def _peaks(config: Config, context: Context, network: tuple) -> tuple[dict, np.ndarray]:
    """When attention moves fastest and the next token is even, over shapes and rates; xi for the network."""
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
    K, M = np.array(config.shapes).T
    even = np.array([[_even(paths[name]["confidence"], units) for name in weak] for paths in solved])
    measured = {
        "ratio": ("ratio", np.array(config.ratios)),
        "weak_peak": ("shape ratio", np.stack([peaks[name] for name in weak], axis=1)),
        "peak": ("shape", {name: peak for name, peak in peaks.items() if name not in weak}),
        "even": ("shape ratio", (K * np.log(M))[:, None] * even),
        "crossover": ("shape", [_crossover(shape) for shape in config.shapes]),
    }
    return measured, solved[0]["network"]["growth_rate"]


def _crossover(shape: tuple[int, int]) -> float:
    K, M = shape
    return float(scan_snap.crossover_time(1.0, num_classes=K, vocab_size=M))


def _even(confidence: np.ndarray, ts: np.ndarray) -> float:
    """When the next token is as likely as all others together."""
    return float(np.interp(0.5, confidence, ts))


@eqx.filter_jit
def _train_long(descent: Descent, lanes: tuple) -> Trajectory:
    """Networks trained in every lane of classes and learning rates of decoder and attention."""

    def one(lane):
        classes, (rate_Y, rate_Z) = lane
        loss, params = population_loss(classes)

        def observe(params):
            weights = observe_weights(params)
            return {
                "growth_rate": scan_snap.growth_rate(weights, classes)[0],
                "entropy": scan_snap.distinct_entropy(weights.Z, classes)[0],
                "confidence": _confidence(weights, classes),
            }

        return descent.train(loss, params, observe, scale_by_name(Y=rate_Y, Z=rate_Z))[1]

    return map_lanes(one, lanes, at_once=1)


def _over_rates(config: Config) -> dict:
    """Sparsity of trained attention over either learning rate, and its growth at a small one."""
    K, M = shape = config.shapes[0]
    weak, strong = (
        one_common_token(overlap, K, num_distinct=DISTINCT, vocab_size=M)
        for overlap in (config.overlap, STRONG_OVERLAP)
    )
    families = {
        "over_Z": [(weak, np.array([1.0, rate])) for rate in config.rates_Z],
        "over_Y": [(weak, np.array([rate, 1.0])) for rate in config.rates_Y],
        "strong_over_Y": [(strong, np.array([rate, 1.0])) for rate in config.rates_Y],
    }
    paths = named_groups(Partial(_train_long, config.long), families)
    require_ok("training", *paths.values())
    # The finest steps of the smallest learning_rate_Z: what the closed form says does not depend on C0 there.
    ts, slowest = config.long.times, jax.tree.map(lambda leaf: leaf[0, -1], paths["over_Z"].ys)
    B = scan_snap.growth_along(slowest["growth_rate"][:, None], ts, config.rates_Z[0])[1:, 0]
    exponent = ts[1:] * config.rates_Z[0] * slowest["growth_rate"][1:] / B
    marks = [K * np.log(M) / 10, _crossover(shape), ts[-1]]
    return {
        "rate_Z": ("rate_Z", np.array(config.rates_Z)),
        "rate_Y": ("rate_Y", np.array(config.rates_Y)),
        "long_time": ("long_time", ts),
        "entropy": {
            name: (f"rate_{name[-1]} step long_time", path.ys["entropy"]) for name, path in paths.items()
        },
        "trained_even": ("step", [_even(row, ts) for row in paths["over_Z"].ys["confidence"][0]]),
        "exponent": ("mark", np.interp(marks, ts[1:], exponent)),
    }


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
    context.progress("training networks at several rates", 0.6)
    over_rates = _over_rates(config)
    context.progress("training the network", 0.8)
    return {**closed_form, **peaks, **over_rates, **_network(config, lane, full)}


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The closed form and what it says of learning rates, the peak of the flow, and the network."""
    yield _closed_form_claim(saved)
    yield _crossover_claim(config, saved)
    yield _peak_time(config, saved)
    yield _rates(config, saved)
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


def _crossover_claim(config: Config, saved: Saved) -> Claim:
    closed, even, trained = saved["crossover"], saved["even"], saved["trained_even"]
    flow = even / closed[:, None]
    worst, trained = flow.flat[np.argmax(abs(flow - 1))], trained[-1] / closed[0]
    (K, M), early, at, late = config.shapes[0], *saved["exponent"]
    # For small B, with u = M h, the exponent is 2 t u' / u, and u' = M / (2 K (M - 1)) at the crossover.
    derived, end = 1 + (M - 2) / ((M - 1) * np.log(M - 1)), 2 / np.log(M * config.long_horizon / K)
    overlap = f"classes overlap by {config.overlap:g}, up to seven others"
    moved = "attention that has moved, and the overlap"
    return stated(
        "crossover",
        "Growth of attention turns from scanning (t^2) to snapping (ln^2 t) where the next token has "
        "probability 1/2, at K (ln(M - 1) (M - 1) / M + (M - 2) / M) / learning_rate_Y, about K (ln(M) + 1)",
        "tian2023scan, Theorem 4 (derived here; trained networks and the full flow at rate_Z <= rate_Y)",
        equals("its time in a trained network over the derived one", trained, 1.0, 0.05, why=overlap),
        equals("the same along the full flow, all shapes and ratios, worst", worst, 1.0, 0.05, why=overlap),
        equals("power of t in trained growth at 0.1 K ln(M)", early, 2.0, 0.1, why="u is linear so early"),
        equals("the same at the crossover, 1 + (M - 2) / ((M - 1) ln(M - 1))", at, derived, 0.15, why=moved),
        equals("the same at the end, 2 / ln(M t / K)", late, end, 0.15, why=moved),
    )


def _rates(config: Config, saved: Saved) -> Claim:
    entropy, ts, (K, M) = saved["entropy"], saved["long_time"], config.shapes[0]
    # From one rate to the next, at either length of steps and at every time but the first.
    over = {name: np.diff(path, axis=0)[..., 1:] for name, path in entropy.items()}
    slow = saved["rate_Z"][1:] <= 1
    unit = ts[1:] * saved["rate_Y"][:-1, None, None] / (K * np.log(M))
    unit = np.broadcast_to(unit, over["over_Y"].shape)
    return qualified(
        "rates",
        "Larger learning_rate_Z gives sparser attention, larger learning_rate_Y denser attention",
        "tian2023scan, Theorem 4 (in trained networks, by the entropy of attention over the distinct tokens)",
        condition="learning_rate_Z <= learning_rate_Y, classes hardly overlap, and late for learning_rate_Y",
        inside=[
            every("falls with learning_rate_Z up to learning_rate_Y, all times", over["over_Z"][slow] < 0),
            every("rises with learning_rate_Y, after 2 K ln(M) / rate_Y", over["over_Y"][unit >= 2] > 0),
        ],
        outside=[
            every("falls with learning_rate_Y, before K ln(M) / (2 rate_Y)", over["over_Y"][unit <= 0.5] < 0),
            every(
                "rises from the last learning_rate_Z but one to the last, at the end",
                over["over_Z"][-1, :, -1] > 0,
            ),
            every(
                f"falls from the first learning_rate_Y to the next, overlap {STRONG_OVERLAP:g}, at the end",
                over["strong_over_Y"][0, :, -1] < 0,
            ),
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
    """The growth over time, sparsity over learning rates, times over shapes, and the trained network."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (over_time, over_rates), (times, network) = axes
    _draw_growth(over_time, config, saved)
    _draw_sparsity(over_rates, saved)
    _draw_times(times, config, saved)

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
        (K, M), crossover = config.sizes[row], saved["size_crossover"][row]
        unit = K * np.log(M)
        ts = saved["unit"] * unit
        ax.plot(ts, growth["closed"], color=f"C{index}", label=f"K = {K}, M = {M}", **plotting.TRAINED)
        for form, where in (("scanning", ts <= unit), ("snapping", ts >= 2 * unit)):
            ax.plot(ts[where], growth[form][where], **plotting.THEORY)
        ax.plot(ts[ts >= unit], growth["printed"][ts >= unit], **{**plotting.PRINTED, "color": f"C{index}"})
        ax.plot(crossover, np.interp(crossover, ts, growth["closed"]), "o", color=f"C{index}", zorder=6)
    ax.plot([], [], label="early and late form", **plotting.THEORY)
    ax.plot([], [], label="late form, as printed", **plotting.PRINTED)
    ax.plot([], [], "o", color="0.3", label="crossover")
    ax.set(xscale="log", yscale="log", xlabel="time, both learning rates 1", ylabel="growth B")
    ax.set(ylim=(1e-4, 20), title="Scanning, then snapping")
    ax.legend(loc="lower right")


def _draw_sparsity(ax: Axes, saved: Saved) -> None:
    """How much sparser attention of trained networks has become, at the finest steps."""
    ts, paths = saved["long_time"][1:], saved["entropy"]

    def draw(path, label, **style):
        fall = 1e3 * (path[-1, 0] - path[-1, 1:])
        (line,) = ax.plot(ts, fall, **style)
        _name(ax, ts[-1], fall[-1], label, line.get_color())

    for index, rate in enumerate(saved["rate_Z"]):
        draw(paths["over_Z"][index], "both rates 1" if rate == 1 else f"rate_Z = {rate:g}", color=f"C{index}")
    for index, rate in enumerate(saved["rate_Y"]):
        if rate > 1:
            draw(paths["over_Y"][index], f"rate_Y = {rate:g}", color="0.35", linestyle="--")
    ax.set(xscale="log", xlim=(0.4, 14 * ts[-1]), xlabel="time = learning rate × step")
    ax.set_ylabel("fall of the entropy [nats / 1000]")
    ax.set_title("Trained attention gets sparser; the other rate is 1")


def _draw_times(ax: Axes, config: Config, saved: Saved) -> None:
    """When attention moves fastest, and when the next token is even, for every shape."""
    K, M = np.array(config.shapes).T
    unit, places, last = K * np.log(M), np.arange(len(K)), len(K) - 1
    circles: dict[str, Any] = {"ms": 8, "mfc": "none", "color": "C0"}
    even, crossover = saved["even"][:, 0] / unit, saved["crossover"] / unit
    series = {
        f"fastest, overlap {STRONG_OVERLAP:g}": (saved["peak/strong"], "^", {"color": "C3"}),
        "next token has probability 1/2": (even, "o", circles),
        f"fastest, rate_Z = {saved['ratio'][0]:g} rate_Y": (saved["weak_peak"][:, 0], "s", {"color": "C1"}),
        f"fastest, rate_Z = {saved['ratio'][-1]:g} rate_Y": (saved["weak_peak"][:, -1], "D", {"color": "C4"}),
        f"fastest, rate_Z = {FAST_RATIO:g} rate_Y": (saved["peak/fast"], "v", {"color": "C2"}),
    }
    for label, (values, marker, style) in series.items():
        ax.plot(places, values, marker, **style)
        _name(ax, last + 0.15, values[-1], label, style["color"])
    ax.plot(0, saved["trained_even"][-1] / unit[0], "*", color="C0", label="probability 1/2, trained network")
    ax.plot(places, crossover, label="crossover, closed form", **plotting.THEORY)
    plotting.label_ticks(ax, places, [f"{k}\n{m}" for k, m in config.shapes])
    ax.set(xlim=(-0.4, last + 0.9 * len(K)), ylim=(0, 3), xlabel="classes K, and vocabulary M below")
    ax.set(ylabel="time / (K ln(M) / learning_rate_Y)", title="When attention turns, full flow")
    ax.legend(loc="upper right")


def _name(ax: Axes, x: float, y: float, label: str, color: Any) -> None:
    """Write what a curve is to the right of its end."""
    place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    ax.annotate(label, (x, y), color=color, fontsize=8, **place)
