"""Error of the population flow for finite contexts and finite steps: first order in both, and what is exact.

The flow is the limit of gradient descent for infinitely long contexts and small steps. A network is trained
at several learning rates on infinite contexts, and at one small learning rate on sampled contexts of several
lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from dynamics import scan_snap
from dynamics.flow import Trajectory
from dynamics.scan_snap import Weights
from models.attention import ScanSnapAttention, observe_weights, population_loss
from models.data.tokens import sample_contexts, sample_long_contexts, synthetic_classes
from models.functional import as_function
from models.losses import cross_entropy, on_batches
from models.training import Descent, map_lanes, train
from sims import plotting
from sims.claims import Claim, Preset, at_most, every, slope, stated
from sims.compare import SOLVE, convergence_order, lane, lane_gaps, named_groups, percent, require_ok
from sims.ranges import Count, Length, Range
from sims.results import Context, Saved

WRONG_FACTOR = 1.05


@dataclass(frozen=True)
class Config:
    """Sweeps; the classes are those of the source's Figure 4, both learning rates are equal."""

    descent: Descent = Descent(horizon=10.0, points=20, substeps=(1, 3, 10, 30, 100))
    """Gradient descent at several learning rates."""
    lengths: Annotated[tuple[int, ...], Length(2), Range(at_least=2)] = (257, 513, 1025, 2049)
    """Sequence lengths T, the last token included."""
    length_substeps: Count = 20
    """Steps between two records in the runs on sampled contexts."""
    batch: Count = 32
    """Sequences per step in those runs."""
    seeds: Count = 2
    """Runs per length, whose mean is compared with the flow."""


_QUICK = Config()
_STANDARD = replace(
    _QUICK,
    descent=replace(_QUICK.descent, substeps=(1, 2, 5, 10, 20, 50, 100)),
    lengths=(129, 257, 513, 1025, 2049, 4097),
    length_substeps=50,
    batch=128,
    seeds=4,
)
_LONG = (*_STANDARD.lengths, 8193, 16385)
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "paper": replace(_STANDARD, lengths=_LONG, length_substeps=200, batch=512),
}


@partial(jax.jit, static_argnames="config")
def _flows(rates: jax.Array, config: Config) -> Trajectory:
    """The flow at several pairs of rates of decoder and attention, (L, 2)."""

    def flow(rates):
        options = {"learning_rate_Y": rates[0], "learning_rate_Z": rates[1], **SOLVE}
        return scan_snap.population_flow(synthetic_classes(2), config.descent.times, **options)

    # One after the other, which compiles more quickly than all side by side.
    return map_lanes(flow, rates, at_once=1)


@partial(jax.jit, static_argnames="config")
def _train_lengths(key: jax.Array, config: Config) -> Trajectory:
    """Trained attention logits for every length and seed."""
    classes = synthetic_classes(2)
    predict, params = as_function(ScanSnapAttention.zeros(classes.vocab_size))
    steps = config.descent.points * config.length_substeps
    learning_rate = config.descent.horizon / steps

    def one(length, key):
        _, path = train(
            on_batches(cross_entropy, predict),
            params,
            optax.sgd(learning_rate),
            steps=steps,
            every=config.length_substeps,
            batches=lambda key: sample_long_contexts(key, classes, length, config.batch),
            key=key,
            observe=lambda params: params["Z"][...],
            time_step=learning_rate,
        )
        return path

    lengths, keys = jnp.asarray(config.lengths), jax.random.split(key, config.seeds)

    # One after the other, which compiles more quickly than all side by side.
    def over_seeds(length):
        return map_lanes(partial(one, length), keys, at_once=1)

    return map_lanes(over_seeds, lengths, at_once=1)


@partial(jax.jit, static_argnames="config")
def _momentum_on_samples(key: jax.Array, config: Config) -> dict[str, Weights]:
    """Drift of row sums in a run with momentum on short sequences, and the gap of gradients at its start."""
    classes = synthetic_classes(2)
    predict, params = as_function(ScanSnapAttention.uniform(key, classes.vocab_size))
    batches = Partial(partial(sample_contexts, length=17, batch=config.batch), classes=classes)
    loss, sgd = on_batches(cross_entropy, predict), optax.sgd(0.5, momentum=0.9)
    _, path = train(loss, params, sgd, steps=100, batches=batches, key=key, observe=observe_weights)
    sums = scan_snap.row_sums(path.ys)
    contexts, labels = batches(key)
    by_hand = scan_snap.loss_gradient(*observe_weights(params), contexts.counts, contexts.query, labels)
    automatic = observe_weights(jax.grad(loss)(params, (contexts, labels)))

    def apart(a, b):
        return jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), a, b)

    start = jax.tree.map(lambda sums: sums[:1], sums)
    return {"drift": apart(sums, start), "gradient_gap": apart(by_hand, automatic)}


def _first_class(Z: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of the first class's likeliest distinct token, and of a common one."""
    classes = synthetic_classes(2)
    likeliest = np.argmax(np.where(scan_snap.distinct_tokens(classes), classes.P, 0)[0])
    rows = Z[..., np.asarray(classes.query)[0], :]
    return {"distinct": rows[..., likeliest], "common": rows[..., 0]}


def run(config: Config, context: Context) -> dict:
    """Integrate the flow, train at every learning rate and at every length, and measure the gaps."""
    key_train, key_check = jax.random.split(jax.random.key(context.seed))
    context.progress("integrating the flow", 0.0)
    # The rate of the decoder or of attention is wrong by a factor.
    rates = {"right": (1.0, 1.0), "wrong_Y": (WRONG_FACTOR, 1.0), "wrong_Z": (1.0, WRONG_FACTOR)}
    paths = named_groups(partial(_flows, config=config), {name: [np.array(r)] for name, r in rates.items()})
    require_ok("a population flow", *paths.values())
    flows = {name: lane(path, 0) for name, path in paths.items()}

    context.progress("training at every learning rate", 0.3)
    classes = synthetic_classes(2)
    loss, params = population_loss(classes)
    _, at_rates = config.descent.train(loss, params, observe=observe_weights)

    context.progress("training on contexts of every length", 0.5)
    sampled = jax.device_get(_train_lengths(key_train, config))
    require_ok("training on contexts of some length", sampled)
    Z = sampled.ys.mean(axis=1)
    context.progress("checking what is exact", 0.9)
    return {
        "rate": ("rate", config.descent.rates),
        "time": ("time", config.descent.times),
        "length": ("length", np.array(config.lengths)),
        "gap": ("rate", {name: lane_gaps(path, at_rates) for name, path in flows.items()}),
        "error": {
            name: ("length", scan_snap.attention_error(Z[:, -1], flows[name].ys.Z[-1]))
            for name in ("right", "wrong_Z")
        },
        "theory": ("time", _first_class(flows["right"].ys.Z)),
        "trained": ("length time", _first_class(Z)),
        **{
            name: ("", gaps) for name, gaps in jax.device_get(_momentum_on_samples(key_check, config)).items()
        },
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What is exact, and the orders of the two errors."""
    exact = "the same numbers, below one, by two routes"
    yield stated(
        "gradient",
        "The gradients in Y and Z of the reparametrized model",
        "tian2023scan, Lemma 1",
        at_most("largest difference of dL/dY to autodiff", saved["gradient_gap/Y"], 1e-10, why=exact),
        at_most("largest difference of dL/dZ to autodiff", saved["gradient_gap/Z"], 1e-10, why=exact),
    )
    rounding = "rounding of 100 steps, numbers of order one"
    yield stated(
        "conserved",
        "Each row of Z, and of Y over the next tokens, keeps its sum: with momentum, on sampled sequences",
        "tian2023scan, Lemma 1 (derived here from it)",
        at_most("largest drift of a row sum of Y in 100 steps", saved["drift/Y"], 1e-12, why=rounding),
        at_most("largest drift of a row sum of Z in 100 steps", saved["drift/Z"], 1e-12, why=rounding),
    )
    order = {name: convergence_order(saved["rate"], gap).slope for name, gap in saved["gap"].items()}
    bent = "the largest rate bends the line, at its end"
    open_gap = "a gap that does not close has order 0 on most rates"
    off = percent(WRONG_FACTOR)
    yield stated(
        "learning-rate",
        "Gradient descent follows the population flow",
        "tian2023scan, Lemma 2",
        slope("order of the gap in the learning rate", order["right"], 1.0, 0.05, why=bent),
        at_most(f"order with the decoder's rate {off} off", order["wrong_Y"], 0.7, why=open_gap),
        at_most(f"order with attention's rate {off} off", order["wrong_Z"], 0.7, why=open_gap),
    )
    inverse = 1 / saved["length"]
    order = {name: convergence_order(inverse, error).slope for name, error in saved["error"].items()}
    # The second order in 1 / T bends the line by 5 to 10 % at the shortest contexts, and the learning rate's
    # own error adds a few percent at the longest.
    bent = "1/T^2 at the shortest, the steps' error at the longest"
    common = np.abs([*saved["trained/common"][:, -1], saved["theory/common"][-1]])
    yield stated(
        "length",
        "Training on contexts of length T follows the population flow as T grows",
        "tian2023scan, Lemma 2 (T to infinity); the order is derived here",
        slope("order of the error of Z in 1/T", order["right"], 1.0, 0.1, why=bent),
        at_most(
            f"order with attention's rate {off} off",
            order["wrong_Z"],
            0.7,
            why="an error of 5 % is as large as that of contexts of 1000 tokens",
        ),
        every(
            "longer contexts that suppress a common token more",
            np.diff(common) > 0,
            why="chance composition of short contexts weakens what can be learned",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Logits for several lengths beside the flow, and the gaps over the learning rate and over 1/T."""
    drawn, ((logits, over_rate, over_length),) = plotting.new_figure(1, 3, width=4.2, height=3.8)
    ts, lengths = saved["time"], saved["length"]
    for index, length in enumerate(lengths):
        style = {"color": f"C{index % 10}", **plotting.TRAINED}
        logits.plot(ts, saved["trained/distinct"][index], label=f"T = {length}", **style)
        logits.plot(ts, saved["trained/common"][index], **style)
    logits.plot(ts, saved["theory/distinct"], label="population flow", **plotting.THEORY)
    logits.plot(ts, saved["theory/common"], **plotting.THEORY)
    logits.text(0.55, 0.7, "likeliest\ndistinct token", transform=logits.transAxes, fontsize=8)
    logits.text(0.45, 0.08, "a common token", transform=logits.transAxes, fontsize=8)
    logits.set(xlabel="time = learning rate × step", ylabel="attention logit z")
    logits.set_title("Trained on contexts of length T")
    logits.legend(loc="upper left", fontsize=7)

    labels = {
        "right": "population flow",
        "wrong_Y": f"decoder's rate {percent(WRONG_FACTOR)} off",
        "wrong_Z": f"attention's rate {percent(WRONG_FACTOR)} off",
    }
    gaps = {label: saved[f"gap/{name}"] for name, label in labels.items()}
    plotting.gap_panel(over_rate, saved["rate"], gaps, "learning rate", "largest gap of Y and Z")
    over_rate.set_title("Gap to the flow, infinite contexts")

    errors = {labels[name]: saved[f"error/{name}"] for name in ("right", "wrong_Z")}
    plotting.gap_panel(over_length, 1 / lengths, errors, "1 / T", "relative L2 error of Z")
    over_length.set_xticks(1 / lengths, [f"1/{length}" for length in lengths])
    over_length.minorticks_off()
    over_length.set_title("Error for contexts of length T")
    return drawn
