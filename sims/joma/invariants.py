"""Theorem 1's invariants in trained blocks: drift over learning rate, rate ratio, context and coherence.

A block with one query is trained under every combination of attention, activation, loss, upper layers and
ratio of the two learning rates, at several learning rates to the same time. What a gradient flow conserves
drifts in proportion to the learning rate; what it does not conserve drifts all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

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
from sims.compare import convergence_order, largest, named_groups
from sims.ranges import Count, Length, Positive, check_ranges
from sims.results import Context, Saved

ACTIVATIONS = {"ReLU": jax.nn.relu, "identity": lambda h: h, "square": lambda h: h**2 / 2}
# Between two linear layers above the block.
HEADS = {"linear layers above": lambda h: h, "tanh network above": jnp.tanh}
LOSSES = {"cross-entropy": cross_entropy, "squared error": mean_squared_error}
EXACT: tuple[joma.Kind, ...] = ("linear", "exp")
KINDS: tuple[joma.Kind, ...] = (*EXACT, "softmax")
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
    """What differs between runs: numbers, so that all are one program; but for the ratio they are indices."""

    kind: int
    ratio: float = 1.0  # learning rate of z over that of the other weights
    activation: int = 0
    head: int = 0
    loss: int = 0
    coherence: int = 0
    one_context: bool = False


def _data(key: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Contexts (B, M), uniform on the simplex; embeddings (coherence, d, M + 1), orthonormal ones first."""
    key_context, key_embedding = jax.random.split(key)
    x = jax.random.exponential(key_context, (config.samples, config.tokens))
    size = config.tokens + 1
    rows = jax.vmap(lambda eps: nearly_orthogonal_keys(key_embedding, 1, size, size + 3, 1.0, eps)[0])
    U = jnp.swapaxes(rows(jnp.array([0.0, *config.coherences])), 1, 2)
    return x / x.sum(axis=1, keepdims=True), U


@partial(jax.jit, static_argnames="config")
def _train(key: jax.Array, lanes: Lane, config: Config) -> tuple[dict, jax.Array]:
    """What `_measure` finds, (lane, L) each, and whether all of it is finite."""
    key_train, key_data = jax.random.split(key)
    key_weights, key_head, key_labels = jax.random.split(key_train, 3)
    contexts, embeddings = _data(key_data, config)
    M, K, C, dtype = config.tokens, config.hidden, config.classes, contexts.dtype
    labels = jax.random.randint(key_labels, (config.samples,), 0, C)
    targets = {"cross-entropy": labels, "squared error": jax.nn.one_hot(labels, C, dtype=dtype)}
    W = config.scale * jax.random.normal(key_weights, (embeddings.shape[1], K), dtype)
    rngs = nnx.Rngs(key_head)
    below, above = (nnx.Linear(K, size, param_dtype=dtype, rngs=rngs) for size in (K, C))

    def one(lane):
        x, U = jnp.where(lane.one_context, contexts[:1], contexts), embeddings[lane.coherence]
        block = JomaBlock(
            U[:, :M],
            U[:, M:],
            W,
            jnp.full((1, M), lane.kind == KINDS.index("linear"), dtype),
            kind=partial(jax.lax.switch, lane.kind, [partial(joma.attend, kind=kind) for kind in KINDS]),
            activation=partial(jax.lax.switch, lane.activation, list(ACTIVATIONS.values())),
            head=nnx.Sequential(below, partial(jax.lax.switch, lane.head, list(HEADS.values())), above),
        )
        predict, params = as_function(block)

        def loss(params, inputs):
            losses = [loss(params, (predict, inputs, targets[name])) for name, loss in LOSSES.items()]
            return jnp.stack(losses)[lane.loss]

        _, path = config.descent.train(
            bind(loss, JomaInputs(x, jnp.zeros(config.samples, int))),
            params,
            observe=joma_observer(block),
            precondition=scale_by_name(W=1.0, z=lane.ratio, head=1.0),
        )
        return (*path.ys, x, lane.ratio), path.ok

    def measure(path):
        V, z, x, ratio = path
        return jax.vmap(lambda V, z: _measure(V, z[:, 0], x, ratio))(V, z)

    paths, ok = jax.vmap(one)(lanes)
    # Lane by lane: attention to all samples at all times takes much memory.
    return jax.lax.map(measure, paths), ok


def _measure(V: jax.Array, z: jax.Array, x: jax.Array, ratio: jax.Array) -> dict[str, Any]:
    """Drifts of V (T, M, K) and z (T, M), by each kind of attention, over the largest change of z."""

    def change(path):
        return jnp.max(jnp.abs(path - path[:1]))

    def drift(kind, ratio):
        kept = jax.vmap(lambda V, z: joma.invariant(V, z, kind, learning_rate_z=ratio))(V, z)
        return ratio * change(kept) / change(z**2 if kind == "linear" else z)

    mean = jax.vmap(lambda z: jnp.mean(joma.attend(z, x, "softmax"), axis=0))(z)
    moving, still = (
        joma.softmax_logits(V, of, z[0], ratio) for of in (mean, jnp.broadcast_to(mean[0], mean.shape))
    )
    exact = {kind: {"printed": drift(kind, 1.0), "weighted": drift(kind, ratio)} for kind in EXACT}
    return exact | {
        "softmax": jnp.max(jnp.abs(moving - z)) / change(z),
        "correlation": jnp.corrcoef(still[-1], z[-1])[0, 1],
        "sum": change(jnp.sum(z, axis=1)),
    }


def run(config: Config, context: Context) -> dict:
    """Train every combination at every learning rate, and measure what is conserved."""
    context.progress("training every combination", 0.0)
    shape = (len(config.ratios), len(ACTIVATIONS), len(HEADS), len(LOSSES))
    choices = [Lane(0, config.ratios[ratio], *of) for ratio, *of in np.ndindex(shape)]
    lanes, eps = {}, [0.0, *config.coherences]
    for kind, name in enumerate(EXACT):
        lanes[name] = [lane._replace(kind=kind) for lane in choices]
        lanes[f"{name}, coherent"] = [Lane(kind, coherence=index) for index in range(len(eps))]
    softmax = [lane._replace(kind=len(EXACT)) for lane in choices if lane.loss == 0]
    lanes |= {"random": softmax, "one": [lane._replace(one_context=True) for lane in softmax]}
    found = named_groups(partial(_train, jax.random.key(context.seed), config=config), lanes)
    if not all(np.all(ok) for _, ok in found.values()):
        raise RuntimeError("training diverged; lower the learning rates: raise points or substeps")
    drift = {name: drift for name, (drift, _) in found.items()}
    exact = {kind: jax.tree.map(lambda leaf: leaf.reshape(*shape, -1), drift[kind][kind]) for kind in EXACT}
    of_softmax = {name: drift[name]["softmax"].reshape(*shape[:-1], -1) for name in ("one", "random")}
    coherent = {kind: drift[f"{kind}, coherent"][kind]["weighted"][:, -1] for kind in EXACT}
    return {
        "rate": ("rate", config.descent.rates),
        "ratio": ("ratio", np.array(config.ratios)),
        "activation": ("activation", list(ACTIVATIONS)),
        "head": ("head", list(HEADS)),
        "loss": ("loss", list(LOSSES)),
        "drift": ("ratio activation head loss rate", exact),
        "coherence": ("coherence", eps),
        "coherent": ("coherence", coherent),
        "softmax": ("ratio activation head rate", of_softmax),
        "correlation": drift["random"]["correlation"].min(),
        "sum": max(drift[name]["sum"].max() for name in of_softmax),
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
        "Softmax attention: where the mean attention is constant and not correlated with the gradients, the "
        "logits follow from it and from the hidden weights",
        "tian2024joma, Theorem 1 and its proof",
        condition="all samples of the query have one attention, which makes both so; elsewhere in direction, "
        "not in size",
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
    _finish(softmax, "Softmax attention: logits from V", rates, ncols=3)

    eps = saved["coherence"][1:]
    for kind, marker, color in (("linear", "o", "C0"), ("exp", "x", "C1")):
        orthonormal, *drift = saved[f"coherent/{kind}"]
        coherent.loglog(eps, drift, marker, color=color, label=f"{kind} attention")
        if kind == "exp":
            plotting.reference_slope(coherent, eps, np.array(drift), 1, "slope 1")
            coherent.axhline(orthonormal, label="orthonormal embeddings", **plotting.PRINTED)
    labels = ("coherence: |Gram matrix − identity|", "drift / change of z", "best")
    plotting.finish(coherent, f"Embeddings that are not orthogonal (rate {rates[-1]:.2g})", *labels)
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
    _finish(ax, f"{kind.capitalize()} attention: z and W learn at any rates", rates, ncols=2, fontsize=7.5)


def _finish(ax: Axes, title: str, rates: np.ndarray, **legend: Any) -> None:
    plotting.label_ticks(ax, rates, "{:.3g}").minorticks_off()
    plotting.make_room(ax, above=0.3)
    plotting.finish(ax, title, "learning rate", "drift / change of z", {"loc": "upper left", **legend})
