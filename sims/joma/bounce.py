"""Attention that gets sparse and then dense again: fields and networks whose entropy bounces, and others.

The source draws the bounce from an effective flow of the hidden weights and lays it to the nonlinearity. Here
are that flow, as printed and as drawn, networks that bounce with a linear activation, and networks with ReLU
that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree
from matplotlib.figure import Figure

from dynamics.flow import ArrayLike, Trajectory, integrate
from dynamics.joma import Kind, saturating_flow
from dynamics.spectra import entropy
from models.attention import JomaBlock, JomaInputs, JomaState
from models.functional import as_function
from models.losses import bind, cross_entropy, squared_error
from models.training import train, train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import convergence_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

# The targets of the source's Figure 4: ten draws of 3 U(0, 1) + 1, sorted.
FIGURE_4_TARGETS = (1.2654, 1.3961, 1.9223, 2.3669, 2.4703, 2.4888, 2.8969, 2.9022, 3.3047, 3.6893)
FIGURE_4_RATE = 0.02  # its Euler steps
OTHER_TARGETS = {"medium": (1.0, 2.0, 3.0), "small": (0.5, 1.0, 1.5)}
TOKENS = 10  # of the networks with one-hot contexts
START = 0.05  # of every hidden weight; the logits start at START^2 / 2, where the invariant is zero
LARGEST = 20.0  # target of the last token; the first one's is a twentieth
WRONG_FACTOR = 1.05
# Of the networks beside the one that theory describes: learning rate and what it is called.
RATES = {
    "one_hot_relu": 0.01,
    "dense": 0.1,
    "linear_exp": 0.1,
    "linear_softmax": 0.1,
    "relu_exp": 0.1,
    "relu_softmax": 0.1,
}
LABELS = {
    "dense": "squared error, dense features, targets to 2",
    "linear_exp": "cross-entropy, linear, exp attention",
    "linear_softmax": "cross-entropy, linear, softmax attention",
    "relu_exp": "cross-entropy, ReLU, exp attention",
    "relu_softmax": "cross-entropy, ReLU, softmax attention",
}


@dataclass(frozen=True)
class Config:
    """Training of the networks; the fields are those of the source."""

    horizon: float = 60.0
    """Time at which the runs on one-hot tokens end."""
    points: int = 3000
    """Records along those runs."""
    substeps: tuple[int, ...] = (2, 5, 15)
    """Steps between two records, one per learning rate: the rate is horizon / (points * substeps)."""
    steps: int = 6000
    """Steps of the other networks."""
    largest: tuple[float, ...] = (2.0, 5.0, 10.0, 40.0)
    """Largest targets at which the reduced flow is integrated besides 20; the least is 5 at most."""

    def __post_init__(self):
        require_sweeps(self, "substeps", "largest")
        if not 0 < min(self.largest) <= 5:
            raise ValueError(f"largest must be positive, its least 5 at most, got {self.largest}")
        if self.steps < 1000:
            raise ValueError(f"steps must be at least 1000, got {self.steps}")


_QUICK = Config()
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_QUICK, substeps=(2, 5, 10, 20, 50), steps=20_000),
    "paper": replace(_QUICK, substeps=(2, 5, 10, 20, 50, 100, 200), steps=100_000),
}


def _mean_squared_error(params, data):
    return squared_error(params, data) / len(data[2])


@jax.jit
def _entropies(logits: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: entropy(jax.nn.softmax(leaf, axis=-1)), logits)


@jax.jit
def _drawn_field(targets: Array) -> Array:
    """Euler steps of v' = (mu - v) softmax(v^2 / 3), what the figure was drawn from: v at every iteration."""

    def step(v, _):
        return v + FIGURE_4_RATE * (targets - v) * jax.nn.softmax(v**2 / 3), v

    return jax.lax.scan(step, jnp.full_like(targets, START), None, length=5000)[1]


def _reduced_field(t, v, args):
    """One-hot tokens, exp attention, linear activation, squared error; z = v^2 / 2 by the invariant."""
    targets, factor = args
    attention = jnp.exp(factor * v**2 / 2)
    return (targets - v * attention) * attention / TOKENS


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


@partial(jax.jit, static_argnames="config")
def _train_others(key: Array, config: Config) -> Trajectory:
    """Attention entropy of the networks of `RATES`: side by side in one program, each at its own rate."""
    keys = jax.random.split(key, 4)
    dtype = jnp.result_type(float)
    runs: dict[str, Any] = {"one_hot_relu": (_mean_squared_error, *_one_hot(jax.nn.relu))}

    # Of eight features about half are on, and the output adds them: all share one error.
    features = jax.random.bernoulli(keys[0], 0.5, (200, 8)).astype(dtype)
    predict, params = as_function(_block(8, jax.nn.identity))
    inputs = JomaInputs(features, jnp.zeros(200, jnp.int32))
    data = (predict, inputs, features @ _targets(2.0, 8)[:, None])
    runs["dense"] = (_mean_squared_error, data, params)

    # Six classes with two tokens of their own each, and six tokens that are common to all.
    labels, tokens = jnp.arange(120) % 6, jnp.arange(18)
    occurs = (tokens < 6)[None, :] | ((tokens - 6)[None, :] // 2 == labels[:, None])
    counts = jnp.where(occurs, jax.random.exponential(keys[1], occurs.shape, dtype), 0)
    contexts = JomaInputs(counts / counts.sum(axis=1, keepdims=True), jnp.zeros(120, jnp.int32))
    for name, activation in (("linear", jax.nn.identity), ("relu", jax.nn.relu)):
        for kind in get_args(Kind)[1:]:
            head = nnx.Linear(20, 6, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(keys[2]))
            block = JomaBlock.standard(
                keys[3], 18, 20, kind=kind, activation=activation, scale=0.1, head=head
            )
            predict, params = as_function(block)
            runs[f"{name}_{kind}"] = (cross_entropy, (predict, contexts, labels), params)

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


def _observe(params) -> JomaState:
    return JomaState(params["W"][...][:, 0], params["z"][...][0])


def run(config: Config, context: Context) -> Result:
    """Integrate the fields, train the networks, and take the entropy of attention along each."""
    context.progress("the source's fields", 0.0)
    figure_targets = np.array(FIGURE_4_TARGETS)
    drawn = np.asarray(_drawn_field(figure_targets))
    # Elementwise: one state holds the components of three fields.
    targets = [figure_targets, *map(np.array, OTHER_TARGETS.values())]
    ts = np.append(0.0, np.geomspace(0.01, 200.0, 4000))
    mu = np.concatenate(targets)
    # Targets below four are not too stiff for an explicit solver, which is quicker to compile.
    printed = saturating_flow(np.zeros_like(mu), mu, ts, solver=diffrax.Dopri8())
    parts = np.split(np.asarray(printed.ys), np.cumsum([len(part) for part in targets])[:-1], axis=1)
    logits = {
        "drawn": drawn**2 / 3,
        **{name: v**2 / 2 for name, v in zip(("printed", *OTHER_TARGETS), parts, strict=True)},
    }

    context.progress("the reduced flow of one-hot tokens", 0.2)
    times = np.linspace(0.0, config.horizon, config.points + 1)
    # Elementwise again: rows are largest targets. The second row is wrong, its exponent off by a few percent.
    largest = np.array([LARGEST, LARGEST, *config.largest])
    factors = np.where(np.arange(len(largest)) == 1, WRONG_FACTOR, 1.0)[:, None]
    targets = _targets(largest, TOKENS)
    flows = integrate(_reduced_field, np.full_like(targets, START), times, (targets, factors))
    V = jax.tree.map(np.asarray, flows.ys)
    theory, wrong = (Trajectory(times, JomaState(v, v**2 / 2), flows.ok) for v in (V[:, 0], V[:, 1]))

    context.progress("training on one-hot tokens", 0.4)
    data, params = _one_hot(jax.nn.identity)
    rates, trained = jax.tree.map(
        np.asarray,
        train_at_rates(
            bind(_mean_squared_error, data),
            params,
            config.substeps,
            horizon=config.horizon,
            points=config.points,
            observe=_observe,
        ),
    )
    gaps = {"flow": lane_gaps(theory, trained), "wrong": lane_gaps(wrong, trained)}
    finest = lane(trained, int(np.argmin(rates)))

    context.progress("training the other networks", 0.7)
    others = jax.tree.map(np.asarray, _train_others(jax.random.key(context.seed), config))
    paths = (logits, V**2 / 2, finest.ys.z)
    fields, by_size, one_hot_linear = jax.tree.map(np.asarray, _entropies(paths))
    networks = {"one_hot_linear": one_hot_linear, **others.ys}
    bounces = {name: _bounce(path) for name, path in networks.items()}
    falls = {name: float(path[0] - path.min()) for name, path in networks.items()}
    sizes = {
        "largest": np.array([LARGEST, *config.largest]),
        "bounce": np.array(list(map(_bounce, np.delete(by_size, 1, axis=1).T))),
    }

    shown = np.unique(np.round(np.geomspace(1, config.points + 1, 400)).astype(int) - 1)
    data = {
        "fields": {"ts": ts, "drawn_ts": FIGURE_4_RATE * np.arange(len(drawn)), **fields},
        "ts": times[shown],
        "theory": {"v": theory.ys.V[shown], "entropy": by_size[shown, 0]},
        "trained": {"v": finest.ys.V[shown], "entropy": networks["one_hot_linear"][shown]},
        "others": {"steps": others.ts, **others.ys},
        "rates": rates,
        "gap": gaps,
        "sizes": sizes,
    }
    claims = (
        _figure_4(fields),
        _large_targets(ts, fields),
        _network(times, rates, gaps, networks["one_hot_linear"]),
        _criterion(bounces, falls, sizes),
    )
    dims = {
        "theory/v": ("time", "token"),
        "trained/v": ("time", "token"),
        "theory/entropy": ("time",),
        "trained/entropy": ("time",),
        "rates": ("rate",),
        "gap/flow": ("rate",),
        "gap/wrong": ("rate",),
        "sizes/largest": ("size",),
        "sizes/bounce": ("size",),
    }
    return Result(data, claims, dims)


def _bounce(path: np.ndarray) -> float:
    """How far the entropy comes back up from its lowest point."""
    return float(path[-1] - path.min())


def _figure_4(fields) -> Claim:
    drawn, printed = fields["drawn"], fields["printed"]
    return Claim(
        "joma.bounce/figure",
        "The figure's entropy falls to 0.94 and comes back: it is of v' = (mu - v) exp(v^2 / 2)",
        "tian2024joma, Figure 4; the field that gives it is (mu - v) softmax(v^2 / 3)",
        "corrected",
        [
            # The targets are known to four decimals.
            Check("minimum, (mu - v) exp(v^2 / 2)", "equals", 0.9416, printed.min(), 1e-3),
            Check("minimum, (mu - v) softmax(v^2 / 3) in steps of 0.02", "equals", 0.9416, drawn.min(), 1e-3),
            Check("its iteration", "equals", 669, int(drawn.argmin()), 2),
            Check("entropy at iteration 4999", "equals", 1.5493, drawn[-1], 1e-3),
        ],
    )


def _large_targets(ts: np.ndarray, fields) -> Claim:
    printed = fields["printed"]
    return Claim(
        "joma.bounce/flow",
        "Along v' = (mu - v) exp(v^2 / 2) attention becomes sparser and then denser",
        "tian2024joma, section 4 (nonlinear activation)",
        "qualified",
        [
            # From another implementation, with four decimals; half a unit of the last one each.
            Check("lowest entropy, the figure's targets", "equals", 0.1497, printed.min(), 5e-4),
            Check("its time", "equals", 0.47, float(ts[int(printed.argmin())]), 5e-3),
            Check("entropy at t = 200", "equals", 1.1062, printed[-1], 1e-4),
            # A tenth of a nat is what can be seen in a figure of ten tokens.
            Check("bounce, the figure's targets", "at least", 0.1, _bounce(fields["printed"])),
            Check("bounce, targets (1, 2, 3)", "at least", 0.1, _bounce(fields["medium"])),
            Check("bounce, targets (0.5, 1, 1.5)", "at most", 0.01, _bounce(fields["small"])),
        ],
        condition="some target is well above one",
    )


def _network(ts: np.ndarray, rates, gaps, path: np.ndarray) -> Claim:
    return Claim(
        "joma.bounce/network",
        "A network on one-hot tokens follows v' = (mu - v e^{v^2/2}) e^{v^2/2} / M; its attention bounces",
        "tian2024joma, section 4 (the flow of this network is derived here)",
        "stated",
        [
            # The largest rate is a quarter of where descent gets unstable: the second order bends the line.
            Check(
                "order of the gap in the learning rate",
                "slope",
                1.0,
                convergence_order(rates, gaps["flow"]).slope,
                0.1,
            ),
            # A gap that does not close has order 0.
            Check(
                "order with an exponent 5 % off",
                "at most",
                0.5,
                convergence_order(rates, gaps["wrong"]).slope,
            ),
            # From another implementation, with four digits; of first order in the learning rate.
            Check("lowest entropy", "equals", 1.937, path.min(), 2e-3),
            Check("its time", "equals", 0.76, float(ts[int(path.argmin())]), 0.02),
            Check("entropy at the end", "equals", 2.184, path[-1], 2e-3),
        ],
    )


def _criterion(bounces, falls, sizes) -> Claim:
    small = float(np.max(sizes["bounce"][sizes["largest"] <= 5]))
    softest = {name: falls[name] for name in LABELS if name != "dense"}
    return Claim(
        "joma.bounce/criterion",
        "The nonlinearity makes attention bounce",
        "tian2024joma, section 4 (nonlinear activation)",
        "qualified",
        [
            # A tenth of a nat is what can be seen: the same line on both sides of the condition.
            Check("one-hot, squared error, linear", "at least", 0.1, bounces["one_hot_linear"]),
            Check("one-hot, squared error, ReLU", "at least", 0.1, bounces["one_hot_relu"]),
            Check("one-hot, squared error, targets of 5 at most", "at most", 0.1, small),
            *[Check(label, "at most", 0.1, bounces[name]) for name, label in LABELS.items()],
            # They do train: recorded falls are 0.40 to 0.43 under cross-entropy, 0.02 with dense features.
            Check("least fall of the entropy, cross-entropy", "at least", 0.3, min(softest.values())),
            Check("fall of the entropy, dense features", "at least", 0.01, falls["dense"]),
        ],
        condition="the loss stops every token by itself, at a large target; with or without a nonlinearity",
    )


def figure(saved: Saved) -> Figure:
    """Entropy along fields and networks, the weights behind it, gaps, and the bounce over the targets."""
    drawn, ((fields, bouncing, falling), (weights, over_rate, over_size)) = plotting.new_figure(
        2, 3, width=4.2, height=3.5
    )
    for ax in (fields, bouncing, falling):
        ax.set(xscale="log", ylabel="entropy of attention [nats]")

    fields.plot(
        saved["fields/drawn_ts"][1:],
        saved["fields/drawn"][1:],
        color="C0",
        label="drawn: (μ − v) softmax(v²/3)",
    )
    ts = saved["fields/ts"]
    for index, (name, label) in enumerate(
        {
            "printed": "printed: (μ − v) exp(v²/2)",
            **{
                name: f"the same, μ = ({', '.join(f'{m:g}' for m in mu)})"
                for name, mu in OTHER_TARGETS.items()
            },
        }.items()
    ):
        fields.plot(ts[1:], saved[f"fields/{name}"][1:], color=f"C{index + 1}", label=label)
    fields.set(xlabel="time")
    fields.set_title("The source's flows")
    fields.set_ylim(0, 3.6)
    fields.legend(loc="upper left", fontsize=7, ncols=1)

    ts = saved["ts"][1:]
    relu = RATES["one_hot_relu"] * saved["others/steps"][1:]
    bouncing.plot(relu, saved["others/one_hot_relu"][1:], color="C1", label="ReLU", linewidth=5, alpha=0.4)
    bouncing.plot(ts, saved["trained/entropy"][1:], color="C0", label="linear", **plotting.TRAINED)
    bouncing.plot(ts, saved["theory/entropy"][1:], label="reduced flow", **plotting.THEORY)
    bouncing.set(xlabel="time = learning rate × step")
    bouncing.set_title("Networks that bounce:\none-hot tokens, squared error, targets to 20")
    bouncing.legend()

    for index, (name, label) in enumerate(LABELS.items()):
        time = RATES[name] * saved["others/steps"][1:]
        falling.plot(time, saved[f"others/{name}"][1:], color=f"C{index}", label=label)
    falling.set(xlabel="time = learning rate × step")
    falling.set_ylim(1.9, 3.9)
    falling.set_title("Networks that do not")
    falling.legend(loc="upper left", fontsize=7)

    tokens = [0, 2, 4, 6, 9]
    targets = np.linspace(LARGEST / 20, LARGEST, TOKENS)
    labels = [f"target {targets[token]:.1f}" for token in tokens]
    plotting.theory_and_trained(
        weights, ts, saved["theory/v"][1:, tokens], saved["trained/v"][1:, tokens], labels
    )
    weights.set(xscale="log", xlabel="time = learning rate × step", ylabel="hidden weight v of a token")
    weights.set_title("Large targets are reached first")
    weights.legend(fontsize=7)

    gaps = {"reduced flow": saved["gap/flow"], "exponent 5 % off": saved["gap/wrong"]}
    plotting.gap_panel(over_rate, saved["rates"], gaps, "learning rate", "largest gap of v and z")
    over_rate.set_xticks(saved["rates"], [f"{rate:.2g}" for rate in saved["rates"]])
    over_rate.minorticks_off()
    over_rate.set_title("Gap to the reduced flow")

    order = np.argsort(saved["sizes/largest"])
    over_size.semilogx(saved["sizes/largest"][order], saved["sizes/bounce"][order], "o-", color="C0")
    over_size.axhline(0.1, **plotting.PRINTED)
    over_size.set_xticks(saved["sizes/largest"], [f"{largest:g}" for largest in saved["sizes/largest"]])
    over_size.minorticks_off()
    over_size.set(xlabel="largest target", ylabel="bounce of the entropy [nats]")
    over_size.set_title("Small targets hardly bounce")
    return drawn
