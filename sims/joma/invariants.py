"""Theorem 1's invariants in trained blocks: drift over learning rate, rate ratio, context and coherence.

A block with one query is trained under every combination of attention, activation, loss, upper layers and
ratio of the two learning rates, at several learning rates to the same time. What a gradient flow conserves
drifts in proportion to the learning rate; what it does not conserve drifts all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import joma
from models.attention import JomaBlock, JomaInputs, joma_observer
from models.data.teachers import nearly_orthogonal_keys
from models.functional import as_function
from models.losses import bind, cross_entropy, mean_squared_error
from models.training import Descent, scale_by_name
from sims import plotting
from sims.claims import ROUNDING, Check, Claim, Preset, at_least, at_most, corrected, every, qualified, slope
from sims.compare import convergence_order, largest
from sims.ranges import Count, Length, Positive, check_ranges
from sims.results import Context, Saved

ACTIVATIONS = {"ReLU": jax.nn.relu, "identity": lambda h: h, "square": lambda h: h**2 / 2}
# Between two linear layers above the block.
HEADS = {"linear layers above": lambda h: h, "tanh network above": jnp.tanh}
LOSSES = {"cross-entropy": cross_entropy, "squared error": mean_squared_error}
EXACT: tuple[joma.Kind, ...] = ("linear", "exp")
PER_RATE = "gradients below one over a time of order one"


@dataclass(frozen=True)
class Config:
    """Sizes of the block, and sweeps."""

    tokens: Count = 8
    """Context tokens M."""
    hidden: Count = 5
    """Hidden nodes K."""
    samples: Count = 24
    """Samples of the query."""
    classes: Count = 4
    """Classes that the head tells apart."""
    scale: Positive = 0.5
    """Standard deviation of the hidden weights at the start."""
    descent: Descent = Descent(horizon=5.0, points=100, substeps=(1, 2, 4, 8))
    """Gradient descent at several learning rates."""
    ratios: Annotated[tuple[Positive, ...], Length(2)] = (1.0, 0.2)
    """Learning rate of the attention logits over that of all other weights; 1 is the printed setting."""
    coherences: Annotated[tuple[Positive, ...], Length(2)] = (0.003, 0.01, 0.03, 0.1)
    """Deviation of the embeddings' Gram matrix from the identity, in spectral norm."""

    def __post_init__(self):
        check_ranges(self)
        if self.ratios[:1] != (1,) or 1 in self.ratios[1:]:
            raise ValueError(f"ratios must start with 1 and go on with others, got {self.ratios}")


_QUICK = Config()
_STANDARD = replace(
    _QUICK,
    tokens=12,
    hidden=8,
    samples=60,
    scale=0.4,
    descent=replace(_QUICK.descent, points=200, substeps=(1, 2, 5, 10)),
    ratios=(1.0, 0.2, 3.0),
    coherences=(0.001, 0.003, 0.01, 0.03, 0.1),
)
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "paper": replace(_STANDARD, descent=replace(_STANDARD.descent, horizon=20.0, points=800)),
}


class Lane(NamedTuple):
    """What differs between runs of one compiled network; the last three are indices into the dicts above."""

    x: Any  # contexts of the query's samples, (B, M)
    U: Any  # embeddings of the context tokens and the query, (d, M + 1)
    ratio: Any = 1.0  # learning rate of z over that of the other weights
    activation: Any = 0
    head: Any = 0
    loss: Any = 0


@eqx.filter_jit
def _train(key: jax.Array, lanes: Lane, kind: joma.Kind, config: Config) -> tuple[dict, jax.Array]:
    """What `_measure` finds, (lane, L) each, and whether all of it is finite."""
    key_weights, key_head, key_labels = jax.random.split(key, 3)
    M, K, C, dtype = config.tokens, config.hidden, config.classes, lanes.x.dtype
    labels = jax.random.randint(key_labels, (config.samples,), 0, C)
    targets = {"cross-entropy": labels, "squared error": jax.nn.one_hot(labels, C, dtype=dtype)}
    W = config.scale * jax.random.normal(key_weights, (lanes.U.shape[1], K), dtype)
    rngs = nnx.Rngs(key_head)
    below, above = (nnx.Linear(K, size, param_dtype=dtype, rngs=rngs) for size in (K, C))

    def one(lane):
        between = partial(jax.lax.switch, lane.head, list(HEADS.values()))
        block = JomaBlock(
            lane.U[:, :M],
            lane.U[:, M:],
            W,
            jnp.full((1, M), float(kind == "linear"), dtype),
            kind=kind,
            activation=partial(jax.lax.switch, lane.activation, list(ACTIVATIONS.values())),
            head=nnx.Sequential(below, between, above),
        )
        predict, params = as_function(block)

        def loss(params, inputs):
            losses = [loss(params, (predict, inputs, targets[name])) for name, loss in LOSSES.items()]
            return jnp.stack(losses)[lane.loss]

        _, path = config.descent.train(
            bind(loss, JomaInputs(lane.x, jnp.zeros(config.samples, int))),
            params,
            observe=joma_observer(block),
            precondition=scale_by_name(W=1.0, z=lane.ratio, head=1.0),
        )
        return jax.vmap(lambda V, z: _measure(V, z[:, 0], lane, kind))(*path.ys), path.ok

    measured, ok = jax.vmap(one)(lanes)
    return measured, jnp.all(ok)


def _measure(V: jax.Array, z: jax.Array, lane: Lane, kind: joma.Kind) -> dict[str, jax.Array]:
    """Drifts of a path (T, M, K), (T, M) of weights and logits, over the largest change of the logits."""

    def change(path):
        return jnp.max(jnp.abs(path - path[:1]))

    def drift(ratio):
        kept = jax.vmap(lambda V, z: joma.invariant(V, z, kind, learning_rate_z=ratio))(V, z)
        return ratio * change(kept) / change(z**2 if kind == "linear" else z)

    if kind != "softmax":
        return {"printed": drift(1.0), "weighted": drift(lane.ratio)}
    mean = jax.vmap(lambda z: jnp.mean(joma.attend(z, lane.x, kind), axis=0))(z)
    moving = joma.softmax_logits(V, mean, z[0], lane.ratio)
    still = joma.softmax_logits(V, jnp.broadcast_to(mean[0], mean.shape), z[0], lane.ratio)
    return {
        "drift": jnp.max(jnp.abs(moving - z)) / change(z),
        "correlation": jnp.corrcoef(still[-1], z[-1])[0, 1],
        "sum": change(jnp.sum(z, axis=1)),
    }


def _train_groups(key: jax.Array, kind: joma.Kind, config: Config, **groups: list[Lane]) -> dict[str, Any]:
    """What `_measure` finds in groups of lanes, by their names; all are trained in one program."""
    lanes = list(itertools.chain(*groups.values()))
    stacked = Lane(*(jnp.asarray(np.stack(field)) for field in zip(*lanes, strict=True)))
    measured, ok = jax.device_get(_train(key, stacked, kind, config))
    if not ok:
        raise RuntimeError("training diverged; lower the learning rates: raise points or substeps")
    ends = np.cumsum([len(group) for group in groups.values()])
    parts = {name: slice(end - len(groups[name]), end) for name, end in zip(groups, ends, strict=True)}
    return {name: jax.tree.map(lambda leaf, part=part: leaf[part], measured) for name, part in parts.items()}


@partial(jax.jit, static_argnames="config")
def _data(key: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Contexts (B, M), uniform on the simplex; embeddings (coherence, d, M + 1), orthonormal ones first."""
    key_context, key_embedding = jax.random.split(key)
    x = jax.random.exponential(key_context, (config.samples, config.tokens))
    size = config.tokens + 1
    rows = jax.vmap(lambda eps: nearly_orthogonal_keys(key_embedding, 1, size, size + 3, 1.0, eps)[0])
    U = jnp.swapaxes(rows(jnp.array([0.0, *config.coherences])), 1, 2)
    return x / x.sum(axis=1, keepdims=True), U


def run(config: Config, context: Context) -> dict:
    """Train every combination at every learning rate, and measure what is conserved."""
    key_train, key_data = jax.random.split(jax.random.key(context.seed))
    x, embeddings = map(np.asarray, _data(key_data, config))
    coherent = [Lane(x, U) for U in embeddings]
    shape = (len(config.ratios), len(ACTIVATIONS), len(HEADS), len(LOSSES))
    lanes = [Lane(x, embeddings[0], config.ratios[ratio], *of) for ratio, *of in np.ndindex(shape)]
    found = {}
    for index, kind in enumerate(EXACT):
        context.progress(f"training {kind} attention", 0.3 * index)
        found[kind] = _train_groups(key_train, kind, config, choice=lanes, coherence=coherent)

    context.progress("training softmax attention", 0.7)
    random = [lane for lane in lanes if lane.loss == 0]
    one = [lane._replace(x=np.broadcast_to(x[:1], x.shape)) for lane in random]
    softmax = _train_groups(key_train, "softmax", config, one=one, random=random)
    choices = {kind: found[kind]["choice"] for kind in EXACT}
    exact = jax.tree.map(lambda leaf: leaf.reshape(*shape, -1), choices)
    drifts = {name: part["drift"].reshape(*shape[:-1], -1) for name, part in softmax.items()}
    return {
        "rate": ("rate", config.descent.rates),
        "ratio": ("ratio", np.array(config.ratios)),
        "activation": ("activation", list(ACTIVATIONS)),
        "head": ("head", list(HEADS)),
        "loss": ("loss", list(LOSSES)),
        "drift": ("ratio activation head loss rate", exact),
        "coherence": ("coherence", np.array([0.0, *config.coherences])),
        "coherent": ("coherence", {kind: found[kind]["coherence"]["weighted"][:, -1] for kind in EXACT}),
        "softmax": ("ratio activation head rate", drifts),
        "correlation": softmax["random"]["correlation"].min(),
        "sum": max(part["sum"].max() for part in softmax.values()),
    }


def _orders(rates: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Order in the learning rate of every combination."""
    return np.array([convergence_order(rates, error).slope for error in errors.reshape(-1, len(rates))])


def _first_order(what: str, orders: np.ndarray) -> Check:
    label = f"{what}: combinations whose drift is of order 1.0 ± 0.1"
    return every(label, np.abs(orders - 1) <= 0.1, why="the second order bends it at the largest rate")


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What linear, exp and softmax attention conserve, and what that presupposes of the embeddings."""
    for kind in EXACT:
        yield _exact(kind, saved)
    yield _softmax(saved)
    rates, eps, drifts = saved["rate"], saved["coherence"], saved["coherent"]
    order = {kind: convergence_order(eps[1:], drift[1:]).slope for kind, drift in drifts.items()}
    per_rate = max(drift[0] for drift in drifts.values()) / rates[-1]
    bent = "the rate adds a few percent at one end, the second order at the other"
    yield qualified(
        "orthogonal",
        "What training conserves presupposes orthonormal embeddings",
        "tian2024joma, section 3 (assumed); the order is derived here",
        condition="the embeddings are orthonormal; the drift grows in proportion to their coherence",
        inside=[at_most("orthonormal: largest drift, per learning rate", per_rate, 0.1, why=PER_RATE)],
        outside=[
            slope(f"{kind}: order of the drift in the coherence", order[kind], 1, 0.1, why=bent)
            for kind in EXACT
        ],
    )


def _exact(kind: joma.Kind, saved: Saved) -> Claim:
    rates, ratios, drift = saved["rate"], saved["ratio"], saved[f"drift/{kind}"]
    printed = _orders(rates, drift["printed"][ratios != 1]).max()
    # Either learning rate may be the larger one.
    per_rate = largest(
        drift["weighted"] / np.multiply.outer(np.maximum(ratios, 1), rates)[:, None, None, None]
    )
    quantity = "z^2 - sum_k v_k^2" if kind == "linear" else "z - (1/2) sum_k v_k^2"
    unequal, same = "as printed, unequal rates: largest order of the drift", "that of the weighted form"
    return corrected(
        kind,
        f"{kind.capitalize()} attention: training conserves {quantity} at any learning rates of z and W, for "
        "any activation, loss and layers above; corrected: each term over its learning rate",
        "tian2024joma, Theorem 1",
        printed=[slope(unequal, printed, 1, 0.1, why=same)],
        mended=[
            _first_order("weighted", _orders(rates, drift["weighted"])),
            at_most("weighted: largest drift / change of z, per learning rate", per_rate, 0.1, why=PER_RATE),
        ],
    )


def _softmax(saved: Saved) -> Claim:
    rates, one, random = (saved[name] for name in ("rate", "softmax/one", "softmax/random"))
    per_rate, left, order = np.median(one / rates), np.median(random[..., -1]), _orders(rates, random).max()
    correlation = "random contexts: smallest correlation with the real logits"
    none = "what is left at a rate of zero has order 0"
    direction = "a direction, no more; how good depends on the data"
    return qualified(
        "softmax",
        "Softmax attention: the logits follow from the hidden weights and the mean attention",
        "tian2024joma, Theorem 1 and its proof",
        condition="all samples of the query have one attention; elsewhere in direction, not in size",
        inside=[
            _first_order("one context", _orders(rates, one)),
            at_most("one context: median drift, per learning rate", per_rate, 0.1, why=PER_RATE),
        ],
        outside=[
            at_most("random contexts: largest order", order, 0.1, why=none),
            at_least("random contexts: median drift at the smallest rate", left, 0.1, why="the bound inside"),
            at_least(correlation, saved["correlation"], 0.5, why=direction),
            at_most("largest drift of sum_l z_l, which is exact", saved["sum"], 1e-12, why=ROUNDING),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Drift over the learning rate for every combination; softmax by context; drift over coherence."""
    drawn, ((linear, exp), (softmax, coherent)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    rates = saved["rate"]
    for ax, kind in ((linear, "linear"), (exp, "exp")):
        _draw_drift(ax, kind, saved)
    key = "filled: cross-entropy, open: squared error\n○ linear layers above, □ tanh network above"
    linear.text(0.98, 0.03, key, transform=linear.transAxes, fontsize=7, ha="right")

    one, random = (saved[f"softmax/{name}"].reshape(-1, len(rates)) for name in ("one", "random"))
    for label, errors, color in (("one context", one, "C0"), ("random contexts", random, "C1")):
        softmax.loglog(rates, errors.T, "o", color=color, ms=4, alpha=0.8)
        softmax.plot([], [], "o", color=color, label=label)
    plotting.reference_slope(softmax, rates, np.median(one, axis=0), 1, "slope 1")
    _finish(softmax, rates)
    softmax.set_title("Softmax attention: logits from V")
    softmax.legend(ncols=3, loc="upper left")

    eps = saved["coherence"][1:]
    for kind, marker, color in (("linear", "o", "C0"), ("exp", "x", "C1")):
        orthonormal, *drift = saved[f"coherent/{kind}"]
        coherent.loglog(eps, drift, marker, color=color, label=f"{kind} attention")
        if kind == "exp":
            plotting.reference_slope(coherent, eps, np.array(drift), 1, "slope 1")
            coherent.axhline(orthonormal, label="orthonormal embeddings", **plotting.PRINTED)
    coherent.set(xlabel="coherence: |Gram matrix − identity|", ylabel="drift / change of z")
    coherent.set_title(f"Embeddings that are not orthogonal (rate {rates[-1]:.2g})")
    coherent.legend()
    return drawn


def _draw_drift(ax: Axes, kind: str, saved: Saved) -> None:
    rates, printed, weighted = saved["rate"], saved[f"drift/{kind}/printed"], saved[f"drift/{kind}/weighted"]
    for choice in np.ndindex(weighted.shape[:-1]):
        ratio, activation, head, loss = choice
        color = f"C{activation}"
        fill = color if saved["loss"][loss] == "cross-entropy" else "white"
        ax.loglog(rates, weighted[choice], "os"[head], color=color, mfc=fill, ms=4, alpha=0.8)
        if saved["ratio"][ratio] != 1:
            ax.loglog(rates, printed[choice], **plotting.PRINTED)
    for index, label in enumerate(saved["activation"]):
        ax.plot([], [], "o", color=f"C{index}", label=label)
    ax.plot([], [], label="as printed, unequal rates", **plotting.PRINTED)
    plotting.reference_slope(ax, rates, np.median(weighted, axis=(0, 1, 2, 3)), 1, "slope 1")
    _finish(ax, rates)
    ax.set_title(f"{kind.capitalize()} attention: z and W learn at any rates")
    ax.legend(fontsize=7.5, ncols=2, loc="upper left")


def _finish(ax: Axes, rates: np.ndarray) -> None:
    """Draw the learning rates as ticks, and leave room for the legend above the data."""
    ax.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    ax.minorticks_off()
    ax.set(xlabel="learning rate", ylabel="drift / change of z")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.3)
