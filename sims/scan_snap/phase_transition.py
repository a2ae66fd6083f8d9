"""From scanning to snapping: attention grows, and then almost stops, near t = K ln(M) / learning_rate_Y.

The closed form of the growth B_n(t) and its printed form stand beside the theorem's own hypothesis,
integrated. The full population flow tells when attention moves fastest, over classes, vocabularies and
learning rates. The growth in a trained network follows the flow's at first order in the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.figure import Figure
from scipy.integrate import cumulative_simpson

from dynamics import scan_snap
from dynamics.flow import Trajectory, integrate
from dynamics.scan_snap import SequenceClasses
from models.attention import ScanSnapAttention, observe_weights
from models.data.tokens import one_common_token, population_contexts
from models.functional import as_function
from models.losses import bind, cross_entropy
from models.training import scale_by_name, train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.compare import compare, convergence_order, fit_line, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

# Distinct tokens per class, of weights 0.1 and 1.
DISTINCT = 2
# Where the peak leaves its place: classes that overlap like the source's, and attention that is fast.
STRONG_OVERLAP, FAST_RATIO = 0.72, 10.0
# A second learning rate of the decoder.
OTHER_RATE_Y = 5.0


@dataclass(frozen=True)
class Config:
    """Sizes and sweeps."""

    def __post_init__(self):
        require_sweeps(self, "shapes", "substeps", "rates_Y", "rates_Z")
        if not 0 < min(self.ratios) <= max(self.ratios) <= 1:
            raise ValueError(f"ratios must be positive and at most 1, got {self.ratios}")

    vocab_sizes: tuple[int, ...] = (34, 100, 1000, 10_000)
    """Vocabulary sizes M of the closed form."""
    num_classes: tuple[int, ...] = (2, 10)
    """Numbers of classes K of the closed form."""
    constants: tuple[float, ...] = (0.1, 10.0)
    """The theorem's constants C0 of the closed form, besides 1."""
    rates_Z: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Increasing learning_rate_Z of the closed form, learning_rate_Y = 1."""
    rates_Y: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Increasing learning_rate_Y of the closed form, learning_rate_Z = 1."""
    shapes: tuple[tuple[int, int], ...] = ((2, 34), (8, 34), (8, 102))
    """Numbers of classes and vocabulary sizes (K, M) of the full flow; the network has the first."""
    ratios: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Increasing ratios learning_rate_Z / learning_rate_Y of the full flow, at most 1."""
    overlap: float = 0.03
    """Cosine between two classes of the full flow; they have one token in common."""
    trained_ratio: float = 0.3
    """Ratio learning_rate_Z / learning_rate_Y of the network."""
    horizon: float = 4.0
    """Time at which training ends, in units of K ln(M) / learning_rate_Y."""
    points: int = 120
    """Records along a flow, and along the network's training."""
    substeps: tuple[int, ...] = (2, 4, 8, 16)
    """Steps of the network between two records, one per learning rate."""


_QUICK = Config()
_SHAPES = tuple((K, M) for M in (34, 102) for K in (2, 4, 8))
_FINE = replace(_QUICK, shapes=_SHAPES, substeps=(2, 4, 8, 16, 32, 64), points=160)
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": _FINE,
    "paper": replace(_FINE, shapes=(*_SHAPES, (2, 204), (8, 204)), ratios=(0.01, 0.03, 0.1, 0.3, 1.0)),
}


def hypothesis_field(t, state, setting):
    """The theorem's hypothesis on the logit z of the one common token: z' = -(rate_Z / C0) gamma exp(4 z).

    The margin u = M h is a state of its own. B' = -z', so that B = -z.
    """
    u, z = state
    K, M, C0, rate_Y, rate_Z = setting
    slowed = 1 / (M - 1 + jnp.exp(u))
    gamma = (M - 1) ** 2 * u / M * slowed
    return M / K * rate_Y * slowed, -rate_Z / C0 * gamma * jnp.exp(4 * z)


@jax.jit
def _growth(settings, ts):
    """B in every setting (L) at its times (L, T): integrated and by the closed forms; the crossover."""

    def one(setting, ts):
        K, M, C0, rate_Y, rate_Z = setting
        start = (jnp.zeros((), ts.dtype), jnp.zeros((), ts.dtype))
        path = integrate(hypothesis_field, start, ts, setting, throw=False, rtol=1e-10, atol=1e-12)
        sizes = {"learning_rate_Y": rate_Y, "num_classes": K, "vocab_size": M}
        crossover = scan_snap.crossover_time(**sizes)
        forms = {
            "closed": scan_snap.attention_growth,
            "scanning": scan_snap.attention_growth_scanning,
            "snapping": scan_snap.attention_growth_snapping,
            "printed": scan_snap.attention_growth_printed,
        }
        # From the second time on: the late forms are infinite at t = 0.
        growth = {name: form(ts[1:], learning_rate_Z=rate_Z, C0=C0, **sizes) for name, form in forms.items()}
        growth["integrated"] = jnp.where(path.ok, -path.ys[1][1:], jnp.nan)
        margin = M * scan_snap.decoder_margin(crossover, **sizes)
        return {**growth, "ts": ts[1:], "crossover": crossover, "crossover_margin": margin}

    return jax.vmap(one)(settings, ts)


@eqx.filter_jit
def _solve(flow, classes, rates, ts):
    """A flow in every lane (L): xi by the flow's own formula, |z'| of the first class's likeliest token."""

    def one(classes, rates, ts):
        rate_Y, rate_Z = rates
        path = flow(classes, ts, learning_rate_Y=rate_Y, learning_rate_Z=rate_Z, throw=False)
        likeliest = jnp.argmax(jnp.where(scan_snap.distinct_tokens(classes), classes.P, -1)[0])

        def measure(t, weights):
            velocity = rate_Z * scan_snap.population_field(weights, classes).Z
            if flow is scan_snap.weak_correlation_flow:
                xi = scan_snap.weak_growth_rate(weights.Z, classes, t, rate_Y)
            else:
                xi = scan_snap.growth_rate(weights, classes)
            return {"growth_rate": xi, "speed": jnp.abs(velocity[classes.query[0], likeliest])}

        return Trajectory(ts, jax.vmap(measure)(ts, path.ys), path.ok)

    return jax.vmap(one)(classes, rates, ts)


def _observe(classes: SequenceClasses, params) -> jax.Array:
    return scan_snap.growth_rate(observe_weights(params), classes)


def run(config: Config, context: Context) -> Result:
    """Check the closed forms, find the peak of the full flow, and train the network."""
    context.progress("integrating the theorem's hypothesis", 0.0)
    constants = np.unique([1.0, *config.constants])
    grid = [(K, M, C0, 1.0, 1.0) for M in config.vocab_sizes for K in config.num_classes for C0 in constants]
    largest = (config.num_classes[-1], config.vocab_sizes[-1], 1.0)
    over_Z = [(*largest, 1.0, rate) for rate in config.rates_Z]
    over_Y = [(*largest, rate, 1.0) for rate in config.rates_Y]
    settings = np.array(grid + over_Z + over_Y)
    # Times in units of K ln(M), with those at which the claims look.
    units = np.unique([0.0, 0.1, 2.0, 200.0, *np.geomspace(1e-2, 400, 93)])
    scale = settings[:, 0] * np.log(settings[:, 1])
    growth = jax.tree.map(np.asarray, _growth(tuple(settings.T), scale[:, None] * units[None]))
    units, parts = units[1:], np.split(np.arange(len(settings)), [len(grid), len(grid) + len(over_Z)])
    on_grid, by_Z, by_Y = ({name: leaf[part] for name, leaf in growth.items()} for part in parts)

    # Lanes of the full flow: cosine, learning rates of decoder and attention. The network has the last.
    lanes = [(config.overlap, 1.0, ratio) for ratio in config.ratios]
    lanes += [(config.overlap, OTHER_RATE_Y, config.ratios[0])]
    lanes += [(config.overlap, 1.0, FAST_RATIO), (STRONG_OVERLAP, 1.0, config.ratios[0])]
    network_lane = (STRONG_OVERLAP, 1.0, config.trained_ratio)
    flow_units = np.concatenate([[0], np.geomspace(0.1, 5, config.points)])
    network_units = np.linspace(0, config.horizon, config.points + 1)

    def solve(flow: Callable[..., Trajectory], shape: tuple[int, int], lanes, units) -> Trajectory:
        K, M = shape
        classes = [one_common_token(overlap, K, num_distinct=DISTINCT, vocab_size=M) for overlap, *_ in lanes]
        rates = np.array(lanes)[:, 1:].T
        ts = units * (K * np.log(M) / rates[0])[:, None]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *classes)
        path = jax.tree.map(np.asarray, _solve(flow, stacked, tuple(rates), ts))
        if not np.all(path.ok):
            raise RuntimeError(f"a flow was not solved for K, M = {shape}")
        return path

    solved = []
    for index, shape in enumerate(config.shapes):
        context.progress(f"solving the full flow for K, M = {shape}", 0.1 + 0.5 * index / len(config.shapes))
        also = [network_lane] if index == 0 else []
        times = np.stack([flow_units] * len(lanes) + [network_units] * len(also))
        solved.append(solve(scan_snap.population_flow, shape, lanes + also, times))
    full = lane(solved[0], -1)
    speeds = np.stack([path.ys["speed"][: len(lanes), 1:] for path in solved])
    peaks = flow_units[1:][np.argmax(speeds, axis=-1)]

    context.progress("solving the reduced flows", 0.7)
    shape = config.shapes[0]
    fast, weak = (
        lane(solve(flow, shape, [network_lane], network_units[None]), 0)
        for flow in (scan_snap.fast_decoder_flow, scan_snap.weak_correlation_flow)
    )

    context.progress("training the network", 0.85)
    classes = one_common_token(STRONG_OVERLAP, shape[0], num_distinct=DISTINCT, vocab_size=shape[1])
    predict, params = as_function(ScanSnapAttention.zeros(shape[1]))
    rates, trained = train_at_rates(
        bind(cross_entropy, (predict, *population_contexts(classes))),
        params,
        config.substeps,
        horizon=float(full.ts[-1]),
        points=config.points,
        observe=Partial(_observe, classes),
        precondition=scale_by_name(Y=1.0, Z=config.trained_ratio),
    )

    def growth_along(path: Trajectory, growth_rate) -> Trajectory:
        """B, the integral of xi times learning_rate_Z."""
        B = config.trained_ratio * cumulative_simpson(growth_rate, x=full.ts, axis=-2, initial=0)
        return Trajectory(path.ts, B, path.ok)

    trained = jax.tree.map(np.asarray, trained)
    network = growth_along(trained, trained.ys)
    theory = {
        name: growth_along(path, path.ys["growth_rate"])
        for name, path in (("full", full), ("fast", fast), ("weak", weak))
    }
    gaps = lane_gaps(theory["full"], network)
    reduced_gap = compare(theory["fast"], lane(network, -1)).gap
    fastest = [np.argmax(xi[:, 0]) for xi in (full.ys["growth_rate"], trained.ys[-1])]
    claims = (
        _closed_form(growth, on_grid, settings[: len(grid)], units),
        _crossover(growth, settings),
        _peak_time(config, peaks),
        _rates(config, by_Z, by_Y, units),
        _trained(rates, gaps, reduced_gap, float(full.ts[fastest[1]] / full.ts[fastest[0]])),
    )
    data = {
        "settings": settings[: len(grid)],
        "grid": on_grid,
        "by_Z": by_Z,
        "flow_units": flow_units[1:],
        "speeds": speeds,
        "peaks": peaks,
        "rates": rates,
        "network": network,
        "theory": theory,
        "gaps": gaps,
    }
    dims = {"speeds": ("shape", "lane", "time"), "peaks": ("shape", "lane"), "rates": ("rate",)}
    return Result(data, claims, {**dims, "network/ys": ("rate", "time", "class"), "gaps": ("rate",)})


def _closed_form(growth: dict, on_grid: dict, settings: np.ndarray, units: np.ndarray) -> Claim:
    one = settings[:, 2] == 1
    late, later, early = (int(np.searchsorted(units, unit)) for unit in (2.0, 200.0, 0.1))

    def off(form: str, time: int) -> float:
        """Largest relative error of a form among the settings with C0 = 1."""
        return float(np.max(np.abs(on_grid[form] / on_grid["closed"] - 1)[one, time]))

    ratio = float(np.mean((on_grid["printed"] / on_grid["integrated"])[one, later]))
    gap = np.max(np.abs(growth["closed"] - growth["integrated"]))
    return Claim(
        "scan_snap.phase_transition/growth",
        "B = (1/4) ln(1 + (2 K (M - 1)^2 / C0) (learning_rate_Z / learning_rate_Y) h^2), with a factor 1/4",
        "tian2023scan, Theorem 4",
        "corrected",
        [
            # So late its other omissions cost little: what is left is the factor.
            Check("printed / integrated hypothesis, at 200 K ln(M) / rate_Y", "equals", 1.0, ratio, 0.1),
            # The solver's tolerance over all its steps.
            Check("closed form, largest error", "at most", 1e-6, gap),
            # Its margin u = ln(M rate_Y t / K) neglects (M - 1) u beside exp(u).
            Check("late form's error at 2 K ln(M) / rate_Y, C0 = 1", "at most", 0.1, off("snapping", late)),
            Check(
                "late form's error at 200 K ln(M) / rate_Y, C0 = 1", "at most", 1e-3, off("snapping", later)
            ),
            # Its margin neglects exp(u) - 1 beside M.
            Check(
                "early form's error at 0.1 K ln(M) / rate_Y, C0 = 1", "at most", 0.05, off("scanning", early)
            ),
        ],
    )


def _crossover(growth: dict, settings: np.ndarray) -> Claim:
    K, M = settings[:, 0], settings[:, 1]
    excess = np.exp(growth["crossover_margin"]) / (M - 1) - 1
    estimate = growth["crossover"] * settings[:, 3] / (K * (np.log(M) + 1)) - 1
    error = np.max(np.abs(estimate)[M.max() == M])
    return Claim(
        "scan_snap.phase_transition/crossover",
        "Scanning turns into snapping, exp(M h) = M - 1, at about K (ln(M) + 1) / learning_rate_Y",
        "tian2023scan, Theorem 4 (derived here: twice K ln(M) is where its late form is good)",
        "stated",
        [
            # A root to machine precision, of size ln M.
            Check("exp(M h) / (M - 1) - 1 at the crossover", "at most", 1e-9, np.max(np.abs(excess))),
            # What is left out is 3 / M and ln(M) / M, over ln(M) + 1.
            Check("relative error of the estimate, largest M", "at most", 0.01, error),
        ],
    )


def _peak_time(config: Config, peaks: np.ndarray) -> Claim:
    count = len(config.ratios)
    weak, (other_rate, fast, strong) = peaks[:, :count], peaks[:, count:].T
    unit = np.array([K * np.log(M) for K, M in config.shapes])
    order = fit_line(np.log(unit), np.log(weak[:, 0] * unit))
    K, M = np.array(config.shapes).T
    same = np.equal(M, M[0])
    in_K = fit_line(np.log(K[same]), np.log((weak[:, 0] * unit)[same])).slope
    in_rate_Y = 1 + np.log(weak[:, 0] / other_rate) / np.log(OTHER_RATE_Y)
    return Claim(
        "scan_snap.phase_transition/peak-time",
        "Attention moves fastest at t of order K ln(M) / learning_rate_Y",
        "tian2023scan, Theorem 4",
        "qualified",
        [
            # Below the crossover, above half of it.
            Check("earliest peak / (K ln(M) / rate_Y), rate_Z <= rate_Y", "at least", 0.6, np.min(weak)),
            Check("latest peak / (K ln(M) / rate_Y), rate_Z <= rate_Y", "at most", 1.5, np.max(weak)),
            # Corrections of order 1 / ln(M): 0.93 of the unit at M = 34, 0.86 of it at M = 102.
            Check("power of K ln(M), smallest ratio", "slope", 1.0, order.slope, 0.15),
            # Classes that hardly overlap learn one after the other, K times as slowly.
            Check("power of K at the first M, smallest ratio", "slope", 1.0, in_K, 0.05),
            # learning_rate_Z is held: where it is small it hardly matters.
            Check(
                "power of 1 / learning_rate_Y", "slope", 1.0, in_rate_Y[np.argmax(abs(in_rate_Y - 1))], 0.05
            ),
            Check("latest peak with rate_Z = 10 rate_Y", "at most", 0.6, np.max(fast)),
            Check("earliest peak, classes overlap by 0.72, smallest ratio", "at least", 1.5, np.min(strong)),
        ],
        condition="learning_rate_Z <= learning_rate_Y (else earlier) and classes hardly overlap (else later)",
    )


def _rates(config: Config, by_Z: dict, by_Y: dict, units: np.ndarray) -> Claim:
    rising = np.diff(by_Z["closed"], axis=0) > 0
    early, late = units <= 1 / config.rates_Y[-1], units >= 2 / config.rates_Y[0]
    denser = np.diff(by_Y["closed"], axis=0)
    return Claim(
        "scan_snap.phase_transition/rates",
        "Larger learning_rate_Z gives sparser attention, larger learning_rate_Y denser attention",
        "tian2023scan, Theorem 4",
        "qualified",
        [
            # Signs: no tolerance.
            all_of("B rises with learning_rate_Z, all times", rising),
            all_of("B falls with learning_rate_Y, after 2 K ln(M) / rate_Y", denser[:, late] < 0),
            all_of("B rises with learning_rate_Y, before K ln(M) / rate_Y", denser[:, early] > 0),
        ],
        condition="it is late, for learning_rate_Y: early on B grows with it",
    )


def _trained(rates, gaps: np.ndarray, reduced_gap: float, peak: float) -> Claim:
    return Claim(
        "scan_snap.phase_transition/trained",
        "A network trained by gradient descent goes through the same transition at the same time",
        "tian2023scan, Theorem 4 (the growth of its attention, from its own weights)",
        "stated",
        [
            # A first-order method.
            Check(
                "order of B's gap to the full flow", "slope", 1.0, convergence_order(rates, gaps).slope, 0.1
            ),
            # What a wrong flow looks like at the finest learning rate.
            Check("B's gap to the fast-decoder flow, finest rate", "at least", 0.01, reduced_gap),
            # A record or two.
            Check("time of fastest growth, network / full flow", "equals", 1.0, peak, 0.05),
        ],
    )


def figure(saved: Saved) -> Figure:
    """The growth over time, over learning rates, the peak of every shape, and the trained network."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (over_time, over_rates), (peaks, network) = axes

    # The smallest and the largest number of classes and vocabulary, at C0 = 1.
    settings = saved["settings"]
    one = np.flatnonzero(settings[:, 2] == 1)
    for index, row in enumerate(one[[0, len(one) // 2, -1]]):
        ts, B = saved["grid/ts"][row], saved["grid/closed"][row]
        K, M = settings[row, :2].astype(int)
        over_time.plot(ts, B, color=f"C{index}", label=f"K = {K}, M = {M}", **plotting.TRAINED)
        unit = K * np.log(M)
        for form, where in (("scanning", ts <= unit), ("snapping", ts >= 2 * unit)):
            over_time.plot(ts[where], saved[f"grid/{form}"][row][where], **plotting.THEORY)
        crossover = saved["grid/crossover"][row]
        over_time.plot(crossover, np.interp(crossover, ts, B), "o", color=f"C{index}", zorder=6)
    over_time.plot([], [], label="early and late form", **plotting.THEORY)
    over_time.plot([], [], "o", color="0.3", label="crossover")
    over_time.set(xscale="log", xlabel="time, both learning rates 1", ylabel="growth B")
    over_time.set_title("Scanning, then snapping")
    over_time.legend(loc="upper left")

    rates = saved.config["rates_Z"]
    ts = saved["by_Z/ts"][0]
    for index, rate in enumerate(rates):
        over_rates.plot(ts, saved["by_Z/closed"][index], color=f"C{index}", label=f"rate_Z = {rate:g} rate_Y")
        late = ts >= saved["by_Z/crossover"][index]
        over_rates.plot(ts[late], saved["by_Z/printed"][index][late], **plotting.PRINTED)
    over_rates.plot([], [], label="printed", **plotting.PRINTED)
    over_rates.set(xscale="log", xlabel="time × learning_rate_Y", ylabel="growth B", ylim=(-0.5, 16))
    over_rates.set_title("Larger learning_rate_Z, more growth and earlier")
    over_rates.legend(loc="upper left", ncols=2)

    units, speeds = saved["flow_units"], saved["speeds"]
    count = len(saved.config["ratios"])
    for index, (K, M) in enumerate(saved.config["shapes"]):
        speed = speeds[index, 0]
        peaks.plot(units, speed / speed.max(), color=f"C{index}", label=f"K = {K}, M = {M}")
    for row, label in ((count + 1, "rate_Z = 10 rate_Y"), (count + 2, "classes overlap by 0.72")):
        speed = speeds[0, row]
        linestyle = "--" if row == count + 1 else ":"
        peaks.plot(units, speed / speed.max(), color="0.45", linestyle=linestyle, label=label)
    peaks.plot([1, 1], [0, 1], color="0.7", linewidth=1)
    peaks.set(xscale="log", ylim=(0, 1.9), ylabel="|z'| / its maximum")
    peaks.set_xlabel("time / (K ln(M) / learning_rate_Y)")
    peaks.set_title("When attention moves fastest, full flow")
    peaks.legend(loc="upper left", ncols=2)

    ts, B = saved["theory/full/ts"], saved["network/ys"]
    for index, row in enumerate((0, len(B) - 1)):
        rate = saved["rates"][row]
        network.plot(
            ts, B[row, :, 0], color=f"C{index}", label=f"network, rate {rate:.2g}", **plotting.TRAINED
        )
    network.plot(ts, saved["theory/full/ys"][:, 0], label="full flow", **plotting.THEORY)
    network.plot(ts, saved["theory/fast/ys"][:, 0], color="0.45", linestyle="--", label="fast-decoder flow")
    network.plot(ts, saved["theory/weak/ys"][:, 0], label="weak-correlation flow", **plotting.PRINTED)
    network.set(xlabel="time = learning rate × step", ylabel="growth B")
    network.set_title(f"Trained network, ratio {saved.config['trained_ratio']:g}, and the flows")
    network.legend(loc="upper left")
    return drawn
