"""Theorem 1's invariants in trained blocks: drift over learning rate, rate ratio, context and coherence.

A block with one query is trained under every combination of attention, activation, loss, upper layers and
ratio of the two learning rates, at several learning rates to the same time. What a gradient flow conserves
drifts in proportion to the learning rate; what it does not conserve drifts all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

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
from models.losses import bind, cross_entropy, squared_error
from models.training import scale_by_name, train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import convergence_order, require_sweeps
from sims.results import Context, Result, Saved

ACTIVATIONS = {"ReLU": jax.nn.relu, "identity": lambda h: h, "square": lambda h: h**2 / 2}
# Between two linear layers above the block.
HEADS = {"linear layers above": lambda h: h, "tanh network above": jnp.tanh}
LOSSES = ("cross-entropy", "squared error")
EXACT: tuple[joma.Kind, ...] = ("linear", "exp")
CONTEXTS = ("one context", "random contexts")


@dataclass(frozen=True)
class Config:
    """Sizes of the block, and sweeps."""

    tokens: int = 8
    """Context tokens M."""
    hidden: int = 5
    """Hidden nodes K."""
    samples: int = 24
    """Samples of the query."""
    classes: int = 4
    """Classes that the head tells apart."""
    scale: float = 0.5
    """Standard deviation of the hidden weights at the start."""
    horizon: float = 5.0
    """Time at which the runs end."""
    points: int = 100
    """Records along a run."""
    substeps: tuple[int, ...] = (1, 2, 4, 8)
    """Steps between two records, one per learning rate: the rate is horizon / (points * substeps)."""
    ratios: tuple[float, ...] = (1.0, 0.2)
    """Learning rate of the attention logits over that of all other weights; 1 is the printed setting."""
    coherences: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Deviation of the embeddings' Gram matrix from the identity, in spectral norm."""

    def __post_init__(self):
        require_sweeps(self, "substeps", "ratios", "coherences")
        if self.ratios[0] != 1 or 1 in self.ratios[1:]:
            raise ValueError(f"ratios must start with 1 and go on with others, got {self.ratios}")


_QUICK = Config()
_STANDARD = replace(
    _QUICK,
    tokens=12,
    hidden=8,
    samples=60,
    scale=0.4,
    points=200,
    substeps=(1, 2, 5, 10),
    ratios=(1.0, 0.2, 3.0),
    coherences=(0.001, 0.003, 0.01, 0.03, 0.1),
)
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "paper": replace(_STANDARD, horizon=20.0, points=800),
}


class Lane(NamedTuple):
    """What differs between runs of one compiled network.

    Attributes:
        x: contexts of the query's samples, shape (B, M).
        U: embeddings of the context tokens and the query, shape (d, M + 1).
        activation: index into ACTIVATIONS.
        head: index into HEADS.
        loss: index into LOSSES.
        ratio: learning rate of z over that of the other weights.
    """

    x: Any
    U: Any
    activation: Any = 0
    head: Any = 0
    loss: Any = 0
    ratio: Any = 1.0


@eqx.filter_jit
def _train(
    key: jax.Array, lanes: Lane, kind: joma.Kind, config: Config
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Learning rates (L,), what `_measure` finds, (lane, L), and whether all of it is finite."""
    key_weights, key_head, key_labels = jax.random.split(key, 3)
    M, K, C, dtype = config.tokens, config.hidden, config.classes, lanes.x.dtype
    labels = jax.random.randint(key_labels, (config.samples,), 0, C)
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
        inputs = JomaInputs(lane.x, jnp.zeros(config.samples, int))

        def loss(params, data):
            errors = squared_error(params, (predict, inputs, jax.nn.one_hot(labels, C, dtype=dtype)))
            return jnp.where(lane.loss == 0, cross_entropy(params, data), errors / config.samples)

        rates, path = train_at_rates(
            bind(loss, (predict, inputs, labels)),
            params,
            config.substeps,
            horizon=config.horizon,
            points=config.points,
            observe=joma_observer(block),
            precondition=scale_by_name(W=1.0, z=lane.ratio, head=1.0),
        )
        return rates, jax.vmap(lambda V, z: _measure(V, z[:, 0], lane, kind))(*path.ys), path.ok

    rates, measured, ok = jax.vmap(one)(lanes)
    return rates[0], measured, jnp.all(ok)


def _measure(V: jax.Array, z: jax.Array, lane: Lane, kind: joma.Kind) -> dict[str, jax.Array]:
    """Drifts of a path (T, M, K), (T, M) of weights and logits, over the largest change of the logits."""

    def largest(path):
        return jnp.max(jnp.abs(path - path[:1]))

    def drift(ratio):
        kept = jax.vmap(lambda V, z: joma.invariant(V, z, kind, learning_rate_z=ratio))(V, z)
        return ratio * largest(kept) / largest(z**2 if kind == "linear" else z)

    if kind != "softmax":
        return {"printed": drift(1.0), "weighted": drift(lane.ratio)}
    mean = jax.vmap(lambda z: jnp.mean(joma.attend(z, lane.x, kind), axis=0))(z)
    moving, still = (
        joma.softmax_logits(V, mean, z[0], lane.ratio)
        for mean in (mean, jnp.broadcast_to(mean[0], mean.shape))
    )
    return {
        "differential": jnp.max(jnp.abs(moving - z)) / largest(z),
        "integral": jnp.max(jnp.abs(still - z)) / largest(z),
        "correlation": jnp.corrcoef(still[-1], z[-1])[0, 1],
        "sum": largest(jnp.sum(z, axis=1)),
    }


@partial(jax.jit, static_argnames="config")
def _data(key: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Contexts (B, M), uniform on the simplex; embeddings (coherence, d, M + 1), orthonormal ones first."""
    key_context, key_embedding = jax.random.split(key)
    x = jax.random.exponential(key_context, (config.samples, config.tokens))
    size = config.tokens + 1
    rows = jax.vmap(lambda eps: nearly_orthogonal_keys(key_embedding, 1, size, size + 3, 1.0, eps)[0])
    U = jnp.swapaxes(rows(jnp.array([0.0, *config.coherences])), 1, 2)
    return x / x.sum(axis=1, keepdims=True), U


def _stack(lanes: Iterable[Lane]) -> Lane:
    return Lane(*(jnp.asarray(np.stack(field)) for field in zip(*lanes, strict=True)))


def run(config: Config, context: Context) -> Result:
    """Train every combination at every learning rate, and measure what is conserved."""
    context.progress("drawing contexts and embeddings", 0.0)
    key_train, key_data = jax.random.split(jax.random.key(context.seed))
    x, embeddings = (np.asarray(array) for array in _data(key_data, config))
    choices = itertools.product(config.ratios, range(len(ACTIVATIONS)), range(len(HEADS)), range(len(LOSSES)))
    combinations = [Lane(x, embeddings[0], a, head, loss, ratio) for ratio, a, head, loss in choices]
    lanes = _stack(combinations + [Lane(x, U) for U in embeddings])

    context.progress("training linear attention", 0.1)
    rates, linear, linear_ok = _train(key_train, lanes, "linear", config)
    context.progress("training exp attention", 0.4)
    _, exp, exp_ok = _train(key_train, lanes, "exp", config)

    context.progress("training softmax attention", 0.7)
    one_and_random = (np.broadcast_to(x[:1], x.shape), x)
    choices = itertools.product(one_and_random, config.ratios, range(len(ACTIVATIONS)), range(len(HEADS)))
    softmax_lanes = _stack(Lane(x, embeddings[0], a, head, 0, ratio) for x, ratio, a, head in choices)
    _, softmax, softmax_ok = _train(key_train, softmax_lanes, "softmax", config)
    if not (linear_ok & exp_ok & softmax_ok):
        raise RuntimeError("training diverged; lower the learning rates: raise points or substeps")

    exact, n = {"linear": linear, "exp": exp}, len(combinations)
    data = {
        "rates": rates,
        "choice": {
            name: np.array([getattr(lane, name) for lane in combinations])
            for name in ("ratio", "activation", "head", "loss")
        },
        "coherences": np.array([0.0, *config.coherences]),
        "drift": {kind: jax.tree.map(lambda values: values[:n], found) for kind, found in exact.items()},
        "coherent": {kind: found["weighted"][n:] for kind, found in exact.items()},
        "softmax": jax.tree.map(
            lambda values: values.reshape(len(CONTEXTS), -1, len(config.substeps)), softmax
        ),
    }
    data = jax.tree.map(np.asarray, data)
    claims = (*(_exact(kind, data) for kind in EXACT), _softmax(data), _orthogonal(data))
    dims = {
        "rates": ("rate",),
        **{f"choice/{name}": ("combination",) for name in data["choice"]},
        "coherences": ("coherence",),
        **{f"drift/{kind}/{form}": ("combination", "rate") for kind in EXACT for form in linear},
        **{f"coherent/{kind}": ("coherence", "rate") for kind in EXACT},
        **{f"softmax/{name}": ("context", "softmax_combination", "rate") for name in softmax},
    }
    return Result(data, claims, dims)


def _orders(rates: np.ndarray, errors: np.ndarray) -> np.ndarray:
    return np.array([convergence_order(rates, error).slope for error in errors])


def _first_order(what: str, orders: np.ndarray) -> Check:
    # The second order bends the line at the largest rate.
    held = int(np.sum(np.abs(orders - 1) <= 0.1))
    return Check(f"{what}: combinations whose drift is of order 1.0 ± 0.1", "all of", len(orders), held)


def _exact(kind: joma.Kind, data: dict[str, Any]) -> Claim:
    rates, drift, ratios = data["rates"], data["drift"][kind], data["choice"]["ratio"]
    printed = _orders(rates, drift["printed"][ratios != 1]).max()
    # Either learning rate may be the larger one.
    per_rate = np.max(drift["weighted"] / (rates[None] * np.maximum(ratios, 1)[:, None]))
    quantity = "z^2 - sum_k v_k^2" if kind == "linear" else "z - (1/2) sum_k v_k^2"
    return Claim(
        f"joma.invariants/{kind}",
        f"{kind.capitalize()} attention: training conserves {quantity} at any learning rates of z and W, for "
        "any activation, loss and layers above; corrected: each term over its learning rate",
        "tian2024joma, Theorem 1",
        "corrected",
        [
            # The tolerance of the weighted form.
            Check("as printed, unequal rates: largest order of the drift", "slope", 1.0, printed, 0.1),
            _first_order("weighted", _orders(rates, drift["weighted"])),
            # Over a time of order one, with gradients below one: twice what other blocks showed.
            Check("weighted: largest drift / change of z, per learning rate", "at most", 0.1, per_rate),
        ],
    )


def _softmax(data: dict[str, Any]) -> Claim:
    rates, errors = data["rates"], data["softmax"]
    one, random = errors["differential"]
    left, correlation = np.median(random[:, -1]), errors["correlation"][1].min()
    return Claim(
        "joma.invariants/softmax",
        "Softmax attention: the logits follow from the hidden weights and the mean attention",
        "tian2024joma, Theorem 1 and its proof",
        "qualified",
        [
            _first_order("one context", _orders(rates, one)),
            # As for the other kinds of attention.
            Check(
                "one context: median drift, per learning rate", "at most", 0.1, float(np.median(one / rates))
            ),
            # What is left at a learning rate of zero has order zero.
            Check("random contexts: largest order", "at most", 0.1, _orders(rates, random).max()),
            # What the bound above would allow at a learning rate of one.
            Check("random contexts: median drift at the smallest rate", "at least", 0.1, float(left)),
            # A direction, no more: how good it is depends on the data.
            Check("random contexts: smallest correlation with the real logits", "at least", 0.5, correlation),
            # Rounding.
            Check("largest drift of sum_l z_l, which is exact", "at most", 1e-12, errors["sum"].max()),
        ],
        condition="all samples of the query have one attention; elsewhere in direction, not in size",
    )


def _orthogonal(data: dict[str, Any]) -> Claim:
    rates, eps = data["rates"], data["coherences"]
    drifts = {kind: data["coherent"][kind][:, -1] for kind in EXACT}
    orders = {kind: convergence_order(eps[1:], drift[1:]).slope for kind, drift in drifts.items()}
    per_rate = max(drift[0] for drift in drifts.values()) / rates[-1]
    return Claim(
        "joma.invariants/orthogonal",
        "What training conserves presupposes orthonormal embeddings",
        "tian2024joma, section 3 (assumed); the order is derived here",
        "qualified",
        [
            # As above.
            Check("orthonormal: largest drift, per learning rate", "at most", 0.1, per_rate),
            # The learning rate adds a few percent at the smallest coherence, the second order at the largest.
            Check("linear: order of the drift in the coherence", "slope", 1.0, orders["linear"], 0.1),
            Check("exp: order of the drift in the coherence", "slope", 1.0, orders["exp"], 0.1),
        ],
        condition="the embeddings are orthonormal; the drift grows in proportion to their coherence",
    )


def figure(saved: Saved) -> Figure:
    """Drift over the learning rate for every combination; softmax by context; drift over coherence."""
    drawn, axes = plotting.new_figure(2, 2, width=5.0, height=3.6)
    (linear, exp), (softmax, coherent) = axes
    rates = saved["rates"]
    choice = {name: saved[f"choice/{name}"] for name in ("ratio", "activation", "head", "loss")}
    for ax, kind in ((linear, "linear"), (exp, "exp")):
        printed, weighted = saved[f"drift/{kind}/printed"], saved[f"drift/{kind}/weighted"]
        for index in range(len(weighted)):
            color = f"C{choice['activation'][index]}"
            fill = color if choice["loss"][index] == 0 else "white"
            marker = "os"[choice["head"][index]]
            ax.loglog(rates, weighted[index], marker, color=color, mfc=fill, ms=4, alpha=0.8)
            if choice["ratio"][index] != 1:
                ax.loglog(rates, printed[index], **plotting.PRINTED)
        for index, label in enumerate(ACTIVATIONS):
            ax.plot([], [], "o", color=f"C{index}", label=label)
        ax.plot([], [], label="as printed, unequal rates", **plotting.PRINTED)
        plotting.reference_slope(ax, rates, np.median(weighted, axis=0), 1, "slope 1")
        _finish(ax, rates)
        ax.set(ylabel="drift / change of z")
        ax.set_title(f"{kind.capitalize()} attention: z and W learn at any rates")
        ax.legend(fontsize=7.5, ncols=2, loc="upper left")
    key = "filled: cross-entropy, open: squared error\n○ linear layers above, □ tanh network above"
    linear.text(0.98, 0.03, key, transform=linear.transAxes, fontsize=7, ha="right")

    for index, (label, color) in enumerate(zip(CONTEXTS, ("C0", "C1"), strict=True)):
        errors = saved["softmax/differential"][index]
        softmax.loglog(rates, errors.T, "o", color=color, ms=4, alpha=0.8)
        softmax.plot([], [], "o", color=color, label=label)
    middle = np.median(saved["softmax/differential"][0], axis=0)
    plotting.reference_slope(softmax, rates, middle, 1, "slope 1")
    _finish(softmax, rates)
    softmax.set(ylabel="drift / change of z")
    softmax.set_title("Softmax attention: logits from V")
    softmax.legend(ncols=3, loc="upper left")

    eps = saved["coherences"]
    for kind, marker, color in (("linear", "o", "C0"), ("exp", "x", "C1")):
        drift = saved[f"coherent/{kind}"][:, -1]
        coherent.loglog(eps[1:], drift[1:], marker, color=color, label=f"{kind} attention")
        if kind == "exp":
            plotting.reference_slope(coherent, eps[1:], drift[1:], 1, "slope 1")
            coherent.axhline(drift[0], label="orthonormal embeddings", **plotting.PRINTED)
    coherent.set(xlabel="coherence: |Gram matrix − identity|", ylabel="drift / change of z")
    coherent.set_title(f"Embeddings that are not orthogonal (rate {rates[-1]:.2g})")
    coherent.legend()
    return drawn


def _finish(ax: Axes, rates: np.ndarray) -> None:
    """The learning rates as ticks, and room for the legend above the data."""
    ax.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    ax.minorticks_off()
    ax.set_xlabel("learning rate")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.3)
