"""Sparsity: under more weight decay fewer neurons of a two-layer network live, and at a known strength none.

A network U relu(W x) without biases is trained on centered images and their classes, on the mean of
|f(x) - y|^2 plus kappa (|W|^2 + |U|^2), full batch, in 32-bit. A neuron grows from zero while kappa is below

    kappa_c = max over |w| = 1 of |E[y relu(w . x)]|.

At and above it zero is the only stationary point: scaled by a, weights have the loss E|y|^2 + a^2 Q + a^4 R
with R = E|f|^2 >= 0, and Q >= (kappa - kappa_c) (|W|^2 + |U|^2). Below it the squared norm is at most
2 E|y|^2 (kappa_c - kappa) / kappa^2: it goes to zero without a jump. Adam has no gradient flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import collapse
from models.collapse import random_weights
from models.data.images import shuffled
from models.functional import as_function
from models.self_supervised import Encoder
from models.training import train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, every, stated
from sims.compare import largest
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

SLIDE = "ziyin2022talk, slide on sparsity"
CLASSES = 10
SMALL = 1e-4  # weights below it count as zero
ACTIVE = 1e-3  # squared norm of an active neuron's weights
AGAIN = 1.05  # over the critical decay, where networks are trained on
SIDES = (0.98, 1.02)  # over it, where the loss at the origin is looked at
SIZE = 1e-3  # of the weights there
LANDSCAPE = (0.9, 1.0, 1.1)  # decays over it at which the loss along the best neuron is drawn
RANDOM = 200  # random neurons there


@dataclass(frozen=True)
class Config:
    """The images, the network, and how it is trained."""

    data: Literal["digits", "mnist"] = "digits"
    """Images: digits that come with scikit-learn, or MNIST from --data-dir."""
    train_images: Annotated[int, Range(at_least=100)] = 300
    """Images to train on."""
    test_images: Count = 797
    """Images to test on."""
    hidden: Annotated[int, Range(at_least=CLASSES)] = 32
    """Hidden units."""
    shares: Annotated[tuple[Positive, ...], Length(5)] = (0.03, 0.3, 0.6, 0.9, 0.95, 1.1)
    """Weight decays over the critical one, rising, with 0.9 and 0.95 among them."""
    steps: Annotated[int, Range(at_least=100)] = 2000
    """Steps of Adam on all images at once."""
    learning_rate: Positive = 1e-2
    """It falls to a thousandth by a cosine."""
    starts: Count = 16
    """Starts of the search for the critical decay."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        check_ranges(self)
        shares = self.shares
        if list(shares) != sorted(set(shares)) or not {0.9, 0.95} <= set(shares) or shares[-1] < 1.1:
            raise ValueError(
                f"shares must rise to 1.1 or above and have 0.9 and 0.95 among them, got {shares}"
            )


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        train_images=1000,
        hidden=64,
        shares=(0.03, 0.1, 0.3, 0.6, 0.9, 0.95, 0.98, 1.1),
        steps=5000,
        starts=32,
    ),
    "paper": replace(
        Config(),
        data="mnist",
        train_images=60_000,
        test_images=10_000,
        hidden=512,
        shares=(0.01, 0.03, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.95, 0.98, 1.1),
        steps=10_000,
        learning_rate=1e-3,
        starts=64,
    ),
}


class Images(NamedTuple):
    """Flat centered images (N, pixels), classes as unit vectors (N, 10); images to test on, and labels."""

    x: Any
    y: Any
    x_test: Any
    y_test: Any


def _images(config: Config, context: Context) -> Images:
    flat, labels = shuffled(config.data, context.data_dir, context.seed)
    count = config.train_images + config.test_images
    if count > len(flat):
        raise ValueError(f"train_images and test_images must be {len(flat)} at most, got {count}")
    x = np.asarray(flat, float)
    x, own = x - x[: config.train_images].mean(axis=0), config.train_images
    return Images(x[:own], np.eye(CLASSES)[labels[:own]], x[own:count], labels[own:count])


def _loss(predict: Any, x: Array, y: Array, decay: Any, params: Any) -> Array:
    """Mean of |f(x) - y|^2 and kappa times the squares of all weights."""
    error = jnp.mean(jnp.sum((predict(params, x) - y) ** 2, axis=1))
    return error + decay * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@partial(jax.jit, static_argnums=0)
def _trained(config: Config, x: Array, y: Array, lanes: tuple[list[Array], Array]) -> dict[str, Array]:
    """Networks after training: in each lane matrices to start from, and a weight decay."""

    def one(lane):
        matrices, decay = lane
        predict, params = as_function(Encoder(matrices))
        rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 1e-3)
        loss = partial(_loss, predict, x, y, decay)
        optimizer = optax.adam(rate, b1=0.95, b2=0.95)
        end, _ = train(loss, params, optimizer, steps=config.steps, every=config.steps, observe=loss)
        W, U = (layer["kernel"][...].T for layer in end["layers"].values())
        return {"W": W, "U": U, "loss": loss(end)}

    return jax.vmap(one)(lanes)


@jax.jit
def _change(x: Array, y: Array, lanes: tuple[list[Array], Array, Array]) -> Array:
    """How the loss changes where one neuron leaves zero, for its direction, a weight decay and a size."""

    def one(lane):
        (w, u), decay, size = lane
        predict, params = as_function(Encoder([size * w[None], size * u[:, None]]))
        zero = jax.tree.map(jnp.zeros_like, params)
        return _loss(predict, x, y, decay, params) - _loss(predict, x, y, decay, zero)

    return jax.vmap(one)(lanes)


def _origin(images: Images, critical: collapse.ReluCritical, seed: int) -> dict:
    """The loss beside zero on both sides of the critical decay: along the best neuron, and random ones."""
    rng = np.random.default_rng([seed, 1])
    drawn = [rng.normal(size=(RANDOM, part.size)) for part in (critical.w, critical.u)]
    drawn = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in drawn]
    sizes = np.linspace(0, 0.3, 25)
    best = (np.stack([critical.w]), np.stack([critical.u]))
    groups = [  # neurons, shares of the critical decay, sizes
        *((best, share, sizes) for share in LANDSCAPE),
        *((best, share, [SIZE]) for share in SIDES),
        *((drawn, share, [SIZE]) for share in SIDES),
    ]
    lanes = [
        (w, u, share * critical.gamma, size)
        for (ws, us), share, many in groups
        for w, u in zip(ws, us, strict=True)
        for size in many
    ]
    w, u, decays, at = (np.stack(part) for part in zip(*lanes, strict=True))
    change = np.asarray(_change(images.x, images.y, ([w, u], decays, at)))
    along, beside = np.split(change, [len(LANDSCAPE) * len(sizes)])
    growth, few = beside / SIZE**2, len(SIDES)
    return {
        "size": ("size", sizes),
        "landscape": ("decay size", along.reshape(len(LANDSCAPE), -1)),
        "side": ("side", np.asarray(SIDES)),
        "best": ("side", growth[:few]),
        "random": ("side neuron", growth[few:].reshape(few, -1)),
    }


def _measures(config: Config, images: Images, found: dict[str, np.ndarray], lane: str) -> dict:
    """Neurons, ranks, sparsity and accuracy of trained networks; weights that count as zero are taken out."""
    W, U = (np.where(np.abs(found[name]) < SMALL, 0, found[name]) for name in ("W", "U"))
    count = W[0].size + U[0].size

    def accuracy(x, labels):
        outputs = np.maximum(x @ np.swapaxes(W, 1, 2), 0) @ np.swapaxes(U, 1, 2)
        return np.mean(np.argmax(outputs, axis=2) == labels, axis=1)

    values = np.linalg.svd(W, compute_uv=False)
    return {
        "incoming": (f"{lane} hidden", np.linalg.norm(found["W"], axis=2)),
        "outgoing": (f"{lane} hidden", np.linalg.norm(found["U"], axis=1)),
        "sparsity": (lane, (np.sum(W == 0, axis=(1, 2)) + np.sum(U == 0, axis=(1, 2))) / count),
        "rank": (lane, np.sum(values > np.maximum(1e-2 * values[:, :1], SMALL), axis=1)),
        "train": (lane, accuracy(images.x, np.argmax(images.y, axis=1))),
        "test": (lane, accuracy(images.x_test, images.y_test)),
    }


def run(config: Config, context: Context) -> dict:
    """The critical decay, the loss beside zero, and networks over weight decay, some trained on above it."""
    images = _images(config, context)
    context.progress("critical decay", 0.0)
    own, start = jax.random.split(jax.random.key(context.seed))
    critical = jax.device_get(collapse.relu_critical_gamma(images.x, images.y, own, config.starts))
    origin = _origin(images, critical, context.seed)
    context.progress("training", 0.3)
    sizes = (images.x.shape[1], config.hidden, CLASSES)
    shares = np.asarray(config.shares)
    x, y, decays, again = (
        np.asarray(part, config.dtype)
        for part in (
            images.x,
            images.y,
            shares * critical.gamma,
            np.full(len(shares), AGAIN * critical.gamma),
        )
    )
    first = [np.asarray(matrix, config.dtype) for matrix in random_weights(start, sizes, 0.15)]
    lanes = [np.broadcast_to(matrix, (len(shares), *matrix.shape)) for matrix in first]
    ends = jax.device_get(_trained(config, x, y, (lanes, decays)))
    context.progress("training on", 0.7)
    after = jax.device_get(_trained(config, x, y, ([ends["W"], ends["U"]], again)))
    if not all(np.all(np.isfinite(part["loss"])) for part in (ends, after)):
        raise RuntimeError("training ended with numbers that are not finite")
    return {
        "critical": critical.gamma,
        "maxima": ("start", critical.maxima),
        "square": np.mean(np.maximum(images.x @ critical.w, 0) ** 2),
        "origin": origin,
        "share": ("share", shares),
        "network": _measures(config, images, ends, "share"),
        "again": ("share", np.sum(after["W"] ** 2, axis=(1, 2)) + np.sum(after["U"] ** 2, axis=(1, 2))),
    }


def _norms(saved: Saved) -> np.ndarray:
    """Squared norms of the weights of all neurons, (share, hidden)."""
    return (
        np.asarray(saved["network/incoming"], float) ** 2 + np.asarray(saved["network/outgoing"], float) ** 2
    )


def _active(saved: Saved) -> np.ndarray:
    """The number of active neurons of each network; NaN where a norm is."""
    norms = _norms(saved)
    return np.where(np.isnan(norms).any(axis=1), np.nan, np.sum(norms > ACTIVE, axis=1))


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """That networks get sparser, where nothing is left, how, and what it costs."""
    yield _sparser(saved)
    yield _complete(saved)
    yield _origin_claim(saved)
    yield _from_above(saved)
    yield _continuous(saved)
    yield _second_order(saved)
    yield _balance(saved)
    yield _price(saved)


def _sparser(saved: Saved) -> Claim:
    sparsity, rank = np.asarray(saved["network/sparsity"]), np.asarray(saved["network/rank"])
    return stated(
        "sparser",
        "A two-layer network gets sparser with weight decay: more of its weights are zero, and fewer "
        "directions of the first layer are left",
        f"{SLIDE} (on digits)",
        every(
            "weight decays at which more weights are below 1e-4 than at the one before", np.diff(sparsity) > 0
        ),
        every("at which the rank of the first layer is no larger", np.diff(rank) <= 0),
        at_least(
            "share of weights below 1e-4 at the largest decay, less that at the least",
            sparsity[-1] - sparsity[0],
            0.5,
            why="it goes to one, from a few dark pixels",
        ),
    )


def _complete(saved: Saved) -> Claim:
    share, active = np.asarray(saved["share"]), _active(saved)
    norm = np.sum(_norms(saved), axis=1)
    above = share >= 1.1
    return stated(
        "complete",
        "Nothing is left at 1.1 critical decays, and something at 0.9: kappa_c is the largest "
        "|E[y relu(w . x)]| over directions w",
        f"{SLIDE} (the critical decay is derived)",
        equals("neurons active at 1.1 and above, most", np.max(active[above]), 0, why="counts are exact"),
        at_most("squared norm there", np.max(norm[above]), 1e-8, why="Adam's last steps are some 1e-5"),
        equals(
            "share of weights below 1e-4 there", np.min(saved["network/sparsity"][above]), 1, why="all are"
        ),
        at_least("neurons active at 0.9 and below, least", np.min(active[share <= 0.9]), 1, why="exact"),
    )


def _origin_claim(saved: Saved) -> Claim:
    side, best, drawn = (np.asarray(saved[f"origin/{name}"]) for name in ("side", "best", "random"))
    critical, maxima = float(saved["critical"]), np.asarray(saved["maxima"])
    law = 2 * critical * (side - 1)
    return stated(
        "origin",
        "In the loss of the network zero is unstable below the critical decay alone: the best small neuron "
        "changes it by 2 (kappa - kappa_c) times its squared size",
        f"{SLIDE} (the critical decay is derived)",
        at_most(
            "best neuron at 0.98 and 1.02: change over that, less 1",
            largest(best / law - 1),
            1e-3,
            why=f"the next order, E relu(w . x)^2 {SIZE:g}^2, over 0.04 kappa_c",
        ),
        at_most("at 0.98: change along the best neuron", best[0], 0, why="it is a direction of descent"),
        at_least(
            "at 1.02: along all neurons, least", np.minimum(best[1], np.min(drawn[1])), 0, why="there is none"
        ),
        at_least(
            "starts of the search that find the largest maximum",
            np.sum(maxima > (1 - 1e-6) * critical),
            2,
            why="one alone might be found by chance",
        ),
    )


def _from_above(saved: Saved) -> Claim:
    again, norm = np.asarray(saved["again"]), np.sum(_norms(saved), axis=1)
    share = np.asarray(saved["share"])
    return stated(
        "no-other-minimum",
        "Above the critical decay zero is the only stationary point, so that networks which were trained "
        "below it collapse as well: the transition of this network is not of first order",
        f"{SLIDE} (derived here)",
        at_most(
            f"trained below, then at {AGAIN:g} critical decays: largest squared norm",
            np.max(again[share < 1]),
            1e-8,
            why="Adam's last steps are some 1e-5",
        ),
        at_least("before, least", np.min(norm[share < 1]), 1e-3, why="they were alive"),
    )


def _law(saved: Saved, share: Any) -> np.ndarray:
    """Squared norm where one direction is left: 2 (kappa_c - kappa) / E[relu(w . x)^2]."""
    return 2 * saved["critical"] * np.maximum(1 - np.asarray(share), 0) / saved["square"]


def _continuous(saved: Saved) -> Claim:
    share, norm = np.asarray(saved["share"]), np.sum(_norms(saved), axis=1)
    below = share < 1
    decay = share[below] * saved["critical"]
    bound = 2 * (saved["critical"] - decay) / decay**2
    return stated(
        "continuous",
        "The squared norm is at most 2 E|y|^2 (kappa_c - kappa) / kappa^2: it does not jump",
        f"{SLIDE} (derived here)",
        every("weight decays below the critical one with such a norm", norm[below] <= bound),
        at_most(
            "squared norm at 0.95 over that at 0.9",
            float(norm[share == 0.95][0] / norm[share == 0.9][0]),
            0.7,
            why="it is a half where one direction is left, and less where more are",
        ),
    )


def _second_order(saved: Saved) -> Claim:
    share, norm = np.asarray(saved["share"]), np.sum(_norms(saved), axis=1)
    nearest = np.flatnonzero(share < 1)[-2:]
    ratio = norm[nearest] / _law(saved, share[nearest])
    return stated(
        "second-order",
        "Close to the critical decay the squared norm is 2 (kappa_c - kappa) / E[relu(w . x)^2], with the "
        "direction w that is left last: the transition is of second order",
        f"{SLIDE} (derived here)",
        *(
            equals(
                f"at {share[at]:g}: squared norm over that",
                of,
                1,
                0.1 * (1 - share[at]),
                why="the next order in the distance",
            )
            for at, of in zip(nearest, ratio, strict=True)
        ),
        preset="standard",
    )


def _balance(saved: Saved) -> Claim:
    incoming, outgoing = (np.asarray(saved[f"network/{name}"]) for name in ("incoming", "outgoing"))
    alive = _norms(saved) > ACTIVE
    gap = np.abs(incoming - outgoing)
    return stated(
        "balance",
        "At rest the incoming and the outgoing weights of each neuron have the same norm",
        f"{SLIDE} (derived from the network's homogeneity)",
        at_most("largest difference of the two", np.max(gap), 2e-3, why="Adam's last steps are some 1e-5"),
        at_least(
            "their largest norm", np.max(incoming[alive]) if np.any(alive) else np.nan, 0.1, why="of order 1"
        ),
    )


def _price(saved: Saved) -> Claim:
    share, train = np.asarray(saved["share"]), np.asarray(saved["network/train"])
    test = np.asarray(saved["network/test"])
    kept = float(train[share == 0.9][0])
    return stated(
        "price",
        "Close to the critical decay sparsity has cost most of the accuracy, and at it all",
        f"{SLIDE} (measured here)",
        at_least("accuracy on training images at the least decay", train[0], 0.95, why="nothing is lost yet"),
        at_most("at 0.9 critical decays", kept, 0.5, why="two or three directions are left for ten classes"),
        at_least("test accuracy at the least decay", test[0], 0.85, why="it is that of such networks"),
        at_most("at the largest decay", test[-1], 0.2, why="chance is a tenth"),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Sparsity, neurons and accuracy over weight decay, the norm near the end, balance, and the origin."""
    drawn, axes = plotting.new_figure(2, 3, width=3.9, height=3.3)
    (sparsity, accuracy, norm), (neurons, balance, origin) = axes
    share = saved["share"]
    sparsity.plot(share, saved["network/sparsity"], "o-", color="C0", label="weights below 1e-4")
    dead = 1 - _active(saved) / config.hidden
    sparsity.plot(share, dead, "s--", color="C1", label="dead neurons")
    _finish(sparsity, "Sparsity over weight decay", "share", "upper left", ylim=(-0.03, 1.25))
    for name, style in (("train", "s-"), ("test", "o-")):
        accuracy.plot(share, saved[f"network/{name}"], style, label=name, ms=4)
    _finish(accuracy, "Accuracy", "accuracy", "lower left", ylim=(-0.02, 1.05))
    _norm_panel(norm, saved)
    neurons.semilogy(share, np.maximum(_active(saved), 0.5), "s--", color="C1", label="active neurons")
    neurons.semilogy(share, np.maximum(saved["network/rank"], 0.5), "o-", color="C0", label="rank of W")
    neurons.set_yticks([0.5, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
    neurons.set_yticks([], minor=True)
    _finish(neurons, "What is left of the first layer", "number", "lower left")
    _balance_panel(balance, saved)
    _origin_panel(origin, saved)
    return drawn


def _finish(ax: Axes, title: str, ylabel: str, legend: str, **settings: Any) -> None:
    ax.axvline(1, color="black", ls=(0, (4, 3)), lw=1.1, zorder=0)
    plotting.finish(ax, title, "weight decay κ / critical κ", ylabel, legend, **settings)


def _norm_panel(ax: Axes, saved: Saved) -> None:
    share, norm = np.asarray(saved["share"]), np.sum(_norms(saved), axis=1)
    fine = np.linspace(0.85, 1.2, 100)
    ax.plot(share, norm, "o", color="C0", label="trained")
    ax.plot(np.full(len(share), AGAIN), saved["again"], "x", color="C3", label=f"then at {AGAIN:g}")
    ax.plot(fine, _law(saved, fine), label="one direction left: law", **plotting.THEORY)
    shown = norm[share >= 0.9]
    _finish(
        ax,
        "Close to the end",
        "squared norm of all weights",
        "upper right",
        xlim=(0.88, 1.13),
        ylim=(-0.05 * shown.max(), 1.6 * shown.max()),
    )


def _balance_panel(ax: Axes, saved: Saved) -> None:
    incoming, outgoing = (np.asarray(saved[f"network/{name}"]) for name in ("incoming", "outgoing"))
    for index, share in enumerate(np.asarray(saved["share"])):
        if share in (0.03, 0.3, 0.6, 0.9):
            ax.plot(incoming[index], outgoing[index], "o", ms=4, mfc="none", label=f"{share:g}")
    ends = [0, incoming.max()]
    ax.plot(ends, ends, **plotting.THEORY)
    legend = {"loc": "lower right", "title": "κ / critical κ"}
    plotting.finish(ax, "Balance of each neuron", "|incoming weights|", "|outgoing weights|", legend)


def _origin_panel(ax: Axes, saved: Saved) -> None:
    size, change = np.asarray(saved["origin/size"]), np.asarray(saved["origin/landscape"])
    for index, share in enumerate(LANDSCAPE):
        ax.plot(size, 1e3 * change[index], color=f"C{index}", label=f"{share:g}")
        lowest = np.argmin(change[index])
        ax.plot(size[lowest], 1e3 * change[index, lowest], "o", color=f"C{index}", ms=5)
    plotting.make_room(ax, above=0.6)
    legend = {"loc": "upper left", "title": "κ / critical κ"}
    plotting.finish(
        ax, "Loss along the best neuron", "size of its weights", "change of the loss, 1e-3", legend
    )
