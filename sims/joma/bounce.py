"""Attention that gets sparse and then dense again: fields and networks whose entropy bounces, and others.

The source draws the bounce from an effective flow of the hidden weights and lays it to the nonlinearity. Here
are that flow, as printed and as drawn, networks that bounce with a linear activation, and networks with ReLU
that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp

from dynamics import joma
from dynamics.flow import ArrayLike, Trajectory, integrate
from dynamics.spectra import entropy
from models.attention import JomaBlock, JomaInputs, JomaState
from models.data.recorded import JOMA_FIGURE_4_RATE as FIGURE_4_RATE
from models.data.recorded import JOMA_FIGURE_4_TARGETS as FIGURE_4_TARGETS
from models.functional import as_function
from models.losses import bind, cross_entropy, mean_squared_error
from models.training import Descent, train
from sims import plotting
from sims.claims import (
    ROUNDING,
    SOLVER,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    equals,
    qualified,
    slope,
    stated,
)
from sims.compare import lane, lane_gaps, largest, orders, percent
from sims.ranges import Length, Positive, Range, check_ranges
from sims.results import Context, Saved

OTHER_TARGETS = {"medium": (1.0, 2.0, 3.0), "small": (0.5, 1.0, 1.5)}
TOKENS = 10  # of the networks with one-hot contexts
START = 0.05  # of every hidden weight; the logits start at START^2 / 2, where the invariant is zero
LARGEST = 20.0  # target of the last token; the first one's is a twentieth
WRONG_FACTOR = 1.05
# What the networks that do not bounce are called.
LABELS = {
    "dense": "squared error, dense features, targets to 2",
    "linear_exp": "cross-entropy, linear, exp attention",
    "linear_softmax": "cross-entropy, linear, softmax attention",
    "relu_exp": "cross-entropy, ReLU, exp attention",
    "relu_softmax": "cross-entropy, ReLU, softmax attention",
}
RATES = {"one_hot_relu": 0.01, **dict.fromkeys(LABELS, 0.1)}
OFF = f"{percent(WRONG_FACTOR)} off"
LEGEND = {"loc": "upper left", "fontsize": 7}
TIME, ENTROPY = "time = learning rate × step", "entropy of attention [nats]"
# The entropy's minimum in the source's Figure 4, and how far off it may be: the lowest tick is 1.00, ticks
# are 0.25 apart, and the axis goes a twentieth beyond the curve, which begins at ln 10.
READ_OFF, PRECISION = 0.94, 0.12
VISIBLE = "a tenth of a nat is what can be seen in a figure"


@dataclass(frozen=True)
class Config:
    """Training of the networks; the fields are those of the source."""

    descent: Descent = Descent(horizon=60.0, points=3000, substeps=(2, 5, 15))
    """Gradient descent on one-hot tokens at several learning rates."""
    steps: Annotated[int, Range(at_least=1000)] = 6000
    """Steps of the other networks."""
    largest: Annotated[tuple[Positive, ...], Length(2)] = (2.0, 5.0, 10.0, 40.0)
    """Largest targets at which the reduced flow is integrated besides 20; the least is 5 at most."""

    def __post_init__(self):
        check_ranges(self)
        if all(target > 5 for target in self.largest):
            raise ValueError(f"largest must hold a number of 5 at most, got {self.largest}")


_QUICK = Config()
_STANDARD = replace(_QUICK, steps=20_000, descent=replace(_QUICK.descent, substeps=(2, 5, 10, 20, 50)))
_FINE = replace(_QUICK.descent, substeps=(*_STANDARD.descent.substeps, 100, 200))
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "paper": replace(_QUICK, steps=100_000, descent=_FINE),
}


@jax.jit
def _entropies(logits: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: entropy(jax.nn.softmax(leaf, axis=-1)), logits)


@jax.jit
def _drawn_field(targets: Array) -> Array:
    """Euler steps of v' = (mu - v) softmax(v^2 / 3), what the figure was drawn from: v at every iteration."""

    def step(v, _):
        return v + FIGURE_4_RATE * (targets - v) * jax.nn.softmax(v**2 / 3), v

    return jax.lax.scan(step, jnp.full_like(targets, START), None, length=5000)[1]


def _fields() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Times, and logits (T, M) along the source's flow with three sets of targets."""
    mus = {"printed": FIGURE_4_TARGETS, **OTHER_TARGETS}
    # Elementwise: one state holds the components of all three.
    mu = np.concatenate(list(mus.values()))
    ts = np.append(0.0, np.geomspace(0.01, 200.0, 4000))
    # Targets below four are not too stiff for an explicit solver, which is quicker to compile.
    v = np.asarray(joma.saturating_flow(np.zeros_like(mu), mu, ts, solver=diffrax.Dopri8()).ys)
    parts = np.split(v, np.cumsum(list(map(len, mus.values())))[:-1], axis=1)
    return ts, {name: part**2 / 2 for name, part in zip(mus, parts, strict=True)}


def _in_numpy(targets: np.ndarray) -> np.ndarray:
    """Entropy along the steps of `_drawn_field`, written out in NumPy."""
    v, path = np.full_like(targets, START), []
    for _ in range(5000):
        share = np.exp(v**2 / 3) / np.sum(np.exp(v**2 / 3))
        path.append(-np.sum(share * np.log(share)))
        v = v + FIGURE_4_RATE * (targets - v) * share
    return np.array(path)


def _by_scipy(field: Callable[[np.ndarray], np.ndarray], start: np.ndarray, ts: np.ndarray) -> np.ndarray:
    """Entropy of exp(v^2 / 2) along v' = field(v), by SciPy's solver and in NumPy."""
    solved = solve_ivp(
        lambda _, v: field(v), (0, ts[-1]), start, method="LSODA", t_eval=ts, rtol=1e-10, atol=1e-12
    )
    share = np.exp(solved.y**2 / 2)
    share /= share.sum(axis=0)
    return -np.sum(share * np.log(share), axis=0)


def _reduced_field(t, state, args):
    """One-hot tokens, exp attention, linear activation, squared error; z = v^2 / 2 by the invariant."""

    def field(v, targets, factor):
        attention = jnp.exp(factor * v**2 / 2)
        return (targets - v * attention) * attention / TOKENS

    return {name: field(v, *args[name]) for name, v in state.items()}


def _reduced_flows(config: Config) -> tuple[dict[str, Trajectory], np.ndarray]:
    """The network's flow and one whose exponent is off; logits (T, size, token) by largest target."""
    targets = _targets(LARGEST, TOKENS)
    args = {
        "right": (targets, 1.0),
        "wrong": (targets, WRONG_FACTOR),
        "by_size": (_targets(config.largest, TOKENS), 1.0),
    }
    start = {name: np.full_like(targets, START) for name, (targets, _) in args.items()}
    ts = config.descent.times
    V = jax.device_get(integrate(_reduced_field, start, ts, args).ys)
    flows = {name: Trajectory(ts, JomaState(V[name], V[name] ** 2 / 2), True) for name in ("right", "wrong")}
    return flows, np.concatenate([V["right"][:, None], V["by_size"]], axis=1) ** 2 / 2


def _targets(largest: ArrayLike, size: int) -> np.ndarray:
    return np.linspace(np.divide(largest, 20), largest, size, axis=-1)


def _block(tokens: int, activation: Callable[[Array], Array]) -> JomaBlock:
    """One hidden node on exp attention, without a residual, at the small start."""
    start = np.full((tokens, 1), START)
    no_query = np.zeros((tokens, 1))
    return JomaBlock(np.eye(tokens), no_query, start, start.T**2 / 2, kind="exp", activation=activation)


def _one_hot(activation: Callable[[Array], Array]):
    """Data and parameters of the network that sees one token at a time, each with a target of its own."""
    predict, params = as_function(_block(TOKENS, activation))
    tokens = JomaInputs(jnp.asarray(np.eye(TOKENS)), jnp.asarray(np.zeros(TOKENS, np.int32)))
    return (predict, tokens, _targets(LARGEST, TOKENS)[:, None]), params


def _observe(params) -> JomaState:
    return JomaState(params["W"][...][:, 0], params["z"][...][0])


def _other_networks(key: Array) -> dict[str, Any]:
    """Loss, data and parameters of the networks of `RATES`."""
    keys = jax.random.split(key, 4)
    dtype = jnp.result_type(float)
    runs: dict[str, Any] = {"one_hot_relu": (mean_squared_error, *_one_hot(jax.nn.relu))}

    # Of eight features about half are on, and the output adds them: all share one error.
    features = jax.random.bernoulli(keys[0], 0.5, (200, 8)).astype(dtype)
    predict, params = as_function(_block(8, jax.nn.identity))
    inputs = JomaInputs(features, jnp.zeros(200, jnp.int32))
    runs["dense"] = (mean_squared_error, (predict, inputs, features @ _targets(2.0, 8)[:, None]), params)

    # Six classes with two tokens of their own each, and six tokens that are common to all.
    labels, tokens = jnp.arange(120) % 6, jnp.arange(18)
    occurs = (tokens < 6)[None, :] | ((tokens - 6)[None, :] // 2 == labels[:, None])
    counts = jnp.where(occurs, jax.random.exponential(keys[1], occurs.shape, dtype), 0)
    contexts = JomaInputs(counts / counts.sum(axis=1, keepdims=True), jnp.zeros(120, jnp.int32))
    for name, phi in (("linear", jax.nn.identity), ("relu", jax.nn.relu)):
        for kind in ("exp", "softmax"):
            head = nnx.Linear(20, 6, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(keys[2]))
            block = JomaBlock.standard(keys[3], 18, 20, kind=kind, activation=phi, scale=0.1, head=head)
            predict, params = as_function(block)
            runs[f"{name}_{kind}"] = (cross_entropy, (predict, contexts, labels), params)
    return runs


@partial(jax.jit, static_argnames="config")
def _train_others(key: Array, config: Config) -> Trajectory:
    """Attention entropy of the other networks: side by side in one program, each at its own rate."""
    runs = _other_networks(key)
    parts = {name: (RATES[name], loss, data) for name, (loss, data, _) in runs.items()}
    _, path = train(
        bind(_sum_of_losses, parts),
        {name: params for name, (_, _, params) in runs.items()},
        optax.sgd(1.0),
        steps=config.steps,
        every=config.steps // 1000,
        observe=lambda params: _entropies({name: values["z"][...][0] for name, values in params.items()}),
    )
    return path


def _sum_of_losses(params, parts) -> Array:
    # No network sees another's parameters: descent on the sum is descent on each, at its own rate.
    losses = [rate * loss(params[name], data) for name, (rate, loss, data) in parts.items()]
    return jnp.sum(jnp.stack(losses))


def _bounce(path: np.ndarray) -> np.ndarray:
    """How far the entropy (T, ...) comes back up from its lowest point."""
    return path[-1] - path.min(axis=0)


def run(config: Config, context: Context) -> dict:
    """Integrate the fields, train the networks, and take the entropy of attention along each."""
    context.progress("the source's fields", 0.0)
    field_time, of_field = _fields()
    drawn = _drawn_field(np.array(FIGURE_4_TARGETS))
    context.progress("the reduced flow of one-hot tokens", 0.2)
    flows, by_size = _reduced_flows(config)
    context.progress("training on one-hot tokens", 0.4)
    descent = config.descent
    data, params = _one_hot(jax.nn.identity)
    trained = jax.device_get(descent.train(bind(mean_squared_error, data), params, observe=_observe)[1])
    context.progress("training the other networks", 0.7)
    others = jax.device_get(_train_others(jax.random.key(context.seed), config))

    context.progress("the flows by SciPy", 0.9)
    mus = {"printed": FIGURE_4_TARGETS, **OTHER_TARGETS}
    other_field = {
        name: _by_scipy(lambda v, mu=mu: (mu - v) * np.exp(v**2 / 2), np.zeros(len(mu)), field_time)
        for name, mu in mus.items()
    }
    mu = _targets(LARGEST, TOKENS)
    other_network = _by_scipy(
        lambda v: (mu - v * np.exp(v**2 / 2)) * np.exp(v**2 / 2) / TOKENS,
        np.full(TOKENS, START),
        descent.times,
    )

    finest = lane(trained, int(np.argmin(descent.rates))).ys
    logits = {"field": of_field, "drawn": np.asarray(drawn) ** 2 / 3, "trained": finest.z, "sizes": by_size}
    entropies = jax.device_get(_entropies(logits))
    of_trained, of_sizes = entropies["trained"], entropies["sizes"]
    shown = np.unique(np.round(np.geomspace(1, descent.points + 1, 400)).astype(int) - 1)
    return {
        "field_time": ("field_time", field_time),
        "field": ("field_time", entropies["field"]),
        "drawn_time": ("drawn_time", FIGURE_4_RATE * np.arange(len(drawn))),
        "drawn": ("drawn_time", entropies["drawn"]),
        "independent": {
            "drawn": largest(entropies["drawn"] - _in_numpy(np.array(FIGURE_4_TARGETS))),
            "field": max(largest(entropies["field"][name] - path) for name, path in other_field.items()),
            "lowest": other_network.min(),
            "time": descent.times[other_network.argmin()],
            "end": other_network[-1],
        },
        "rate": ("rate", descent.rates),
        "gap": ("rate", {name: lane_gaps(flow, trained) for name, flow in flows.items()}),
        "time": ("time", descent.times[shown]),
        "entropy": ("time", {"theory": of_sizes[shown, 0], "trained": of_trained[shown]}),
        "lowest": {"entropy": of_trained.min(), "time": descent.times[of_trained.argmin()]},
        "v": ("time token", {"theory": flows["right"].ys.V[shown], "trained": finest.V[shown]}),
        "step": ("step", others.ts),
        "other": ("step", others.ys),
        "largest": ("largest", np.array([LARGEST, *config.largest])),
        "bounce": ("largest", _bounce(of_sizes)),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The source's figure and flow, the network on one-hot tokens, and which networks bounce."""
    fields, drawn, independent = saved["field"], saved["drawn"], saved["independent"]
    read, softmax = "ticks of 0.25, the lowest at 1.00: 0.82 to 1.06", "(mu - v) softmax(v^2 / 3)"
    yield corrected(
        "figure",
        "The figure's entropy falls to about 0.94 and comes back: it is of v' = (mu - v) exp(v^2 / 2)",
        f"tian2024joma, Figure 4 (read off its axis); the field that gives it is {softmax}",
        printed=[
            equals("minimum, (mu - v) exp(v^2 / 2)", fields["printed"].min(), READ_OFF, PRECISION, why=read)
        ],
        mended=[
            equals(f"minimum, {softmax} in steps of 0.02", drawn.min(), READ_OFF, PRECISION, why=read),
            at_least("bounce within 5,000 iterations", _bounce(drawn), 0.1, why=VISIBLE),
            at_most(
                "largest gap to the steps written out in NumPy", independent["drawn"], 1e-12, why=ROUNDING
            ),
        ],
    )
    bounce = {name: _bounce(path) for name, path in fields.items()}
    yield qualified(
        "flow",
        "Along v' = (mu - v) exp(v^2 / 2) attention becomes sparser and then denser",
        "tian2024joma, section 4 (nonlinear activation)",
        condition="some target is well above one",
        inside=[
            at_most("largest gap to SciPy's flow, all targets", independent["field"], 1e-6, why=SOLVER),
            at_least("bounce, the figure's targets", bounce["printed"], 0.1, why=VISIBLE),
            at_least("bounce, targets (1, 2, 3)", bounce["medium"], 0.1, why=VISIBLE),
        ],
        outside=[
            at_most("bounce, targets (0.5, 1, 1.5)", bounce["small"], 0.01, why="far below what is seen")
        ],
    )
    order = orders(saved["rate"], saved["gap"])
    lowest, end = saved["lowest"], saved["entropy/trained"][-1]
    quarter = "the largest rate is a quarter of where descent gets unstable"
    finest = "the finest rate is 1.3e-3, and the gap of first order in it"
    yield stated(
        "network",
        "A network on one-hot tokens follows v' = (mu - v e^{v^2/2}) e^{v^2/2} / M; its attention bounces",
        "tian2024joma, section 4 (the flow of this network is derived here)",
        slope("order of the gap in the learning rate", order["right"], 1, 0.1, why=quarter),
        at_most(f"order with an exponent {OFF}", order["wrong"], 0.5, why="a gap that stays has order 0"),
        equals("lowest entropy, as by SciPy", lowest["entropy"], independent["lowest"], 2e-3, why=finest),
        equals("its time", lowest["time"], independent["time"], 0.02, why="a record"),
        equals("entropy at the end", end, independent["end"], 2e-3, why=finest),
        at_least("bounce", end - lowest["entropy"], 0.1, why=VISIBLE),
    )
    yield _criterion(saved)


def _criterion(saved: Saved) -> Claim:
    bounces = {name: _bounce(path) for name, path in saved["other"].items()}
    falls = {name: path[0] - path.min() for name, path in saved["other"].items()}
    least = min(falls[name] for name in LABELS if name != "dense")
    linear = saved["entropy/trained"][-1] - saved["lowest/entropy"]
    small = np.max(saved["bounce"][saved["largest"] <= 5])
    trains = "it does train: recorded falls are 0.40 to 0.43"
    return qualified(
        "criterion",
        "The nonlinearity makes attention bounce",
        "tian2024joma, section 4 (nonlinear activation)",
        condition="the loss stops every token by itself, at a large target; with or without a nonlinearity",
        inside=[
            at_least("one-hot, squared error, linear", linear, 0.1, why=VISIBLE),
            at_least("one-hot, squared error, ReLU", bounces["one_hot_relu"], 0.1, why=VISIBLE),
        ],
        outside=[
            at_most("one-hot, squared error, targets of 5 at most", small, 0.1, why=VISIBLE),
            *(at_most(label, bounces[name], 0.1, why=VISIBLE) for name, label in LABELS.items()),
            at_least("least fall of the entropy, cross-entropy", least, 0.3, why=trains),
            at_least("fall of the entropy, dense features", falls["dense"], 0.01, why="it does train"),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Entropy along fields and networks, the weights behind it, gaps, and the bounce over the targets."""
    drawn, ((fields, bouncing, falling), (weights, over_rate, over_size)) = plotting.new_figure(
        2, 3, width=4.2, height=3.5
    )
    _draw_fields(fields, saved)
    _draw_networks(bouncing, falling, saved)

    tokens = [0, 2, 4, 6, 9]
    labels = [f"target {target:.1f}" for target in _targets(LARGEST, TOKENS)[tokens]]
    theory, trained = (saved[f"v/{of}"][1:, tokens] for of in ("theory", "trained"))
    plotting.theory_and_trained(weights, saved["time"][1:], theory, trained, labels)
    of_token, small = "hidden weight v of a token", {"fontsize": 7}
    plotting.finish(weights, "Large targets are reached first", TIME, of_token, small, xscale="log")

    rates, largest = saved["rate"], saved["largest"]
    gaps = {"reduced flow": saved["gap/right"], f"exponent {OFF}": saved["gap/wrong"]}
    title = "Gap to the reduced flow"
    plotting.gap_panel(over_rate, rates, gaps, "learning rate", "largest gap of v and z", title)
    plotting.label_ticks(over_rate, rates, "{:.2g}").minorticks_off()

    order = np.argsort(largest)
    over_size.semilogx(largest[order], saved["bounce"][order], "o-", color="C0")
    over_size.axhline(0.1, **plotting.PRINTED)
    plotting.label_ticks(over_size, largest)
    plotting.finish(
        over_size, "Small targets hardly bounce", "largest target", "bounce of the entropy [nats]"
    )
    return drawn


def _draw_fields(ax: Axes, saved: Saved) -> None:
    drawn = "drawn: (μ − v) softmax(v²/3)"
    ax.plot(saved["drawn_time"][1:], saved["drawn"][1:], color="C0", label=drawn)
    labels = {"printed": "printed: (μ − v) exp(v²/2)"}
    for name, mu in OTHER_TARGETS.items():
        labels[name] = f"the same, μ = ({', '.join(f'{m:g}' for m in mu)})"
    for index, (name, label) in enumerate(labels.items()):
        ax.plot(saved["field_time"][1:], saved[f"field/{name}"][1:], color=f"C{index + 1}", label=label)
    plotting.finish(ax, "The source's flows", "time", ENTROPY, LEGEND, xscale="log", ylim=(0, 3.6))


def _draw_networks(bouncing: Axes, falling: Axes, saved: Saved) -> None:
    ts, steps = saved["time"][1:], saved["step"][1:]
    relu: Any = {"color": "C1", "label": "ReLU", "linewidth": 5, "alpha": 0.4}
    bouncing.plot(RATES["one_hot_relu"] * steps, saved["other/one_hot_relu"][1:], **relu)
    bouncing.plot(ts, saved["entropy/trained"][1:], color="C0", label="linear", **plotting.TRAINED)
    bouncing.plot(ts, saved["entropy/theory"][1:], label="reduced flow", **plotting.THEORY)
    title = "Networks that bounce:\none-hot tokens, squared error, targets to 20"
    plotting.finish(bouncing, title, TIME, ENTROPY, "best", xscale="log")
    for index, (name, label) in enumerate(LABELS.items()):
        falling.plot(RATES[name] * steps, saved[f"other/{name}"][1:], color=f"C{index}", label=label)
    plotting.finish(falling, "Networks that do not", TIME, ENTROPY, LEGEND, xscale="log", ylim=(1.9, 3.9))
