"""Vision transformers trained from a scaled start: spectra of what their attention heads learn.

A small vision transformer is trained with Adam on real images, from initial values times a scale, all but
those of the token embedder. Of every head the two products W_K W_Q^T and W_V W_O^T are followed: singular
values and stable rank of their change since the start, beside those of the products at the start. One
program trains all scales and seeds. A control scales the weights alone and leaves the gains of the norms.
Adam has no gradient flow: the axis is the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.flow import Trajectory
from dynamics.spectra import stable_rank
from models.attention.products import thin_products
from models.data.images import cifar10, cifar100, digits, mnist
from models.functional import as_function
from models.losses import cross_entropy
from models.training import train_in_chunks
from models.vit import VisionTransformer, head_weights, scale_initial
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.results import Context, Result, Saved

PRODUCTS = ("KQ", "VO")
NAMES = {"KQ": "$W_K W_Q^T$", "VO": "$W_V W_O^T$"}
SMALL = 0.1  # from here on down a scale counts as small
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class Config:
    """Images, network and training."""

    data: Literal["digits", "mnist", "cifar10", "cifar100"] = "digits"
    """Images: digits that come with scikit-learn, or a set from --data-dir."""
    train_images: int | None = 1400
    """Images to train on; all of the training set where None."""
    test_images: int = 397
    """Images to test on."""
    scales: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)
    """Scales of the initial values, in falling order, the first of them 1."""
    hold_gains: bool = True
    """Whether the control is run: the same scales with the gains of the norms left at 1."""
    seeds: int = 3
    """Random initializations, the same ones for every scale."""
    patch: tuple[int, int] = (2, 2)
    """Height and width of a patch."""
    depth: int = 2
    """Layers."""
    heads: int = 4
    """Heads per layer."""
    width: int = 32
    """Dimension of a token."""
    head_dim: int = 8
    """Dimension of a head."""
    mlp_width: int = 64
    """Hidden nodes of the part that acts on each token."""
    batch: int = 64
    """Images per step, drawn with replacement."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""
    warmup: int = 0
    """Steps over which the learning rate grows from zero."""
    cycles: int = 0
    """Cosine cycles from the learning rate down to zero after the warm-up; 0 for a constant one."""
    steps: int = 1000
    """Updates."""
    every: int = 20
    """Steps between two records."""
    calls: int = 5
    """Calls that a run is cut into, for its progress; steps must be a multiple of every * calls."""
    threshold: float = 0.1
    """Singular values above it count for the numerical rank."""
    variants: tuple[tuple[int, int, int], ...] = ()
    """Other depths, heads and widths, three numbers each, trained at scales 1 and 0.1."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        falling = all(0 < low < high for high, low in zip(self.scales, self.scales[1:], strict=False))
        if len(self.scales) < 2 or self.scales[0] != 1 or not falling or self.scales[-1] > SMALL:
            raise ValueError(f"scales must fall from 1 to {SMALL} or below, got {self.scales}")
        if self.steps % (self.every * self.calls):
            raise ValueError(
                f"steps must be a multiple of every * calls = {self.every * self.calls}, got {self.steps}"
            )


_EPOCH = math.ceil(50_000 / 512)
PRESETS: dict[Preset, Config] = {
    "quick": Config(scales=(1.0, 0.3, 0.1), seeds=1, steps=200, every=10, calls=1),
    "standard": Config(variants=((4, 4, 32), (2, 8, 32), (2, 4, 64))),
    "paper": Config(
        data="cifar10",
        train_images=None,
        test_images=2000,
        hold_gains=False,
        seeds=1,
        patch=(4, 4),
        depth=6,
        heads=8,
        width=512,
        head_dim=128,
        mlp_width=512,
        batch=512,
        learning_rate=1e-4,
        warmup=15 * _EPOCH,
        cycles=1,
        steps=500 * _EPOCH,
        every=10 * _EPOCH,
        calls=50,
    ),
}


class Spectrum(NamedTuple):
    """Of all heads (layers, heads): singular values (..., k), falling; stable and numerical rank."""

    values: Array | Any
    stable_rank: Array | Any
    numerical_rank: Array | Any


class Observed(NamedTuple):
    """What is recorded of one network: the change of its products, and its accuracy."""

    KQ: Spectrum
    VO: Spectrum
    accuracy: Array | Any


def read(config: Config, context: Context) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Training and test set: images and labels, the digits in random order."""
    if config.data == "digits":
        images, labels = map(np.asarray, digits(config.dtype))
        order = np.random.default_rng(context.seed).permutation(len(images))
        images, labels = images[order], labels[order]
        whole, test = (images, labels), (images[-config.test_images :], labels[-config.test_images :])
        count = len(images) - config.test_images
    else:
        reader = {"mnist": mnist, "cifar10": cifar10, "cifar100": cifar100}[config.data]
        parts = (reader(context.data_dir, split, config.dtype) for split in ("train", "test"))
        whole, test = jax.tree.map(np.asarray, tuple(parts))
        count = len(whole[0])
    wanted = count if config.train_images is None else config.train_images
    for name, number, most in (
        ("train_images", wanted, count),
        ("test_images", config.test_images, len(test[0])),
    ):
        if not 1 <= number <= most:
            raise ValueError(f"{name} must be from 1 to {most}, got {number}")

    def first(count, images, labels):
        return jnp.asarray(images[:count]), jnp.asarray(labels[:count])

    return first(wanted, *whole), first(config.test_images, *test)


@eqx.filter_jit
def build(config: Config, image_shape: tuple[int, ...], lanes: Array, keys: Array) -> tuple[Any, Any]:
    """The network as a function, and its starts (lane, seed, ...); a lane is two scales, the gains' last."""

    def start(lane, key):
        model = VisionTransformer(
            key,
            image_shape,
            CLASSES[config.data],
            patch=config.patch,
            depth=config.depth,
            heads=config.heads,
            width=config.width,
            head_dim=config.head_dim,
            mlp_width=config.mlp_width,
            dtype=config.dtype,
        )
        predict, params = as_function(model)
        return predict, scale_initial(params, lane[0], gain_scale=lane[1])

    return jax.vmap(lambda lane: jax.vmap(lambda key: start(lane, key))(keys))(lanes)


def total_loss(predict: Any, params: Any, batch: tuple[Array, Array]) -> Array:
    """Sum of the cross-entropies of all networks (lane, seed, ...), on one batch for every seed.

    No network acts on another's loss, and Adam goes number by number: they train as they would alone.
    """
    one_lane = jax.vmap(lambda params, batch: cross_entropy(params, (predict, *batch)))
    return jnp.sum(jax.vmap(one_lane, in_axes=(0, None))(params, batch))


def draw(images: Array, labels: Array, seeds: int, size: int, key: Array) -> tuple[Array, Array]:
    """A batch of images and labels for every seed."""
    chosen = jax.random.randint(key, (seeds, size), 0, len(images))
    return images[chosen], labels[chosen]


def spectrum(matrix: Array, threshold: Any) -> Spectrum:
    """What is recorded of thin products (..., k, k)."""
    values = jnp.linalg.svd(matrix, compute_uv=False)
    return Spectrum(values, stable_rank(matrix), jnp.sum(values > threshold, axis=-1))


@jax.jit
def observe(predict: Any, starts: Any, threshold: Array, test: tuple[Array, Array], params: Any) -> Observed:
    """Spectra of what every network (lane, seed, ...) has learned, and its accuracy."""

    def one(params, start):
        changes = thin_products(head_weights(params), head_weights(start))
        images, labels = test
        right = jnp.argmax(predict(params, images), axis=-1) == labels
        KQ, VO = (spectrum(change, threshold) for change in changes)
        return Observed(KQ, VO, jnp.mean(right))

    # Lane by lane: all at once would be tens of thousands of small products in the attention on the test set.
    return jax.lax.map(lambda lane: jax.vmap(one)(*lane), (params, starts))


@cache
def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam, with a linear warm-up and cosine cycles where there are any; one object for one configuration."""
    rate, rest = config.learning_rate, config.steps - config.warmup
    after, marks = [optax.constant_schedule(rate)], [config.warmup]
    if config.cycles:
        length = math.ceil(rest / config.cycles)
        after = [optax.cosine_decay_schedule(rate, length)] * config.cycles
        marks = [config.warmup + cycle * length for cycle in range(config.cycles)]
    warmup = optax.linear_schedule(0.0, rate, max(config.warmup, 1))
    return optax.adam(optax.join_schedules([warmup, *after], marks))


def train_lanes(
    config: Config,
    lanes: Any,
    key: Array,
    training: tuple[Array, Array],
    test: tuple[Array, Array],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, Trajectory]:
    """Train all lanes and seeds in one program: their starts, and what is seen of them at all times."""
    key_start, key_batch = jax.random.split(key)
    keys = jax.random.split(key_start, config.seeds)
    predict, starts = build(config, training[0].shape[1:], jnp.asarray(lanes, config.dtype), keys)
    _, path = train_in_chunks(
        Partial(total_loss, predict),
        starts,
        optimizer(config),
        steps=config.steps,
        chunk=config.steps // config.calls,
        every=config.every,
        observe=Partial(observe, predict, starts, jnp.asarray(config.threshold, config.dtype), test),
        batches=Partial(draw, *training, config.seeds, config.batch),
        key=key_batch,
        progress=progress,
    )
    return starts, path


def run(config: Config, context: Context) -> Result:
    """Train at all scales, then other sizes, and look at the spectra of what was learned."""
    context.progress("reading the images", 0.0)
    training, test = read(config, context)
    key = jax.random.key(context.seed)
    lanes = [(scale, scale) for scale in config.scales]
    if config.hold_gains:
        lanes += [(scale, 1.0) for scale in config.scales[1:]]
    share = 1 / (1 + 0.5 * len(config.variants))

    def report(done, steps):
        context.progress(f"training at {len(lanes)} scales, {done} steps", 0.05 + 0.9 * share * done / steps)

    report(0, config.steps)
    starts, path = train_lanes(config, lanes, key, training, test, report)
    if not bool(path.ok):
        raise RuntimeError("training gave numbers that are not finite: lower learning_rate")
    ys: Observed = jax.tree.map(np.asarray, path.ys)
    initial = jax.tree.map(np.asarray, _initial_spectra(starts))

    sizes = [(config.depth, config.heads, config.width), *config.variants]
    small = _small(config.scales)
    final = [{name: getattr(ys, name).stable_rank[-1, [0, small]] for name in PRODUCTS}]
    for index, (depth, heads, width) in enumerate(config.variants):
        begun = 0.05 + 0.9 * (share + (1 - share) * index / len(config.variants))
        context.progress(f"training with depth {depth}, {heads} heads, width {width}", begun)
        mlp_width = config.mlp_width * width // config.width
        variant = replace(config, depth=depth, heads=heads, width=width, mlp_width=mlp_width, calls=1)
        _, other = train_lanes(
            replace(variant, every=config.steps), [lanes[0], lanes[small]], key, training, test
        )
        final.append({name: np.asarray(getattr(other.ys, name).stable_rank[-1]) for name in PRODUCTS})

    data = {
        "lanes": np.array(lanes),
        "steps": np.asarray(path.ts),
        "images": len(training[0]),
        "change": {name: getattr(ys, name)._asdict() for name in PRODUCTS},
        "initial": {name: one._asdict() for name, one in zip(PRODUCTS, initial, strict=True)},
        "accuracy": ys.accuracy,
        "sizes": {
            "depth_heads_width": np.array(sizes),
            # Over layers and heads.
            "mean": {name: np.stack([one[name].mean(axis=(-2, -1)) for one in final]) for name in PRODUCTS},
            "sd": {name: np.stack([one[name].std(axis=(-2, -1)) for one in final]) for name in PRODUCTS},
        },
    }
    claims = (
        _init_scale(config, ys),
        _leading(np.array(lanes), ys),
        _below_start(ys, initial),
        _gradual(np.array(lanes), ys),
        *([_sizes(data["sizes"]["mean"])] if config.variants else []),
        _learns(config, ys.accuracy),
        *_quoted(),
    )
    run_axes = ("time", "lane", "seed")
    dims = {
        "lanes": ("lane", "scale_and_gain_scale"),
        "steps": ("time",),
        "accuracy": run_axes,
        **{f"change/{name}/values": (*run_axes, "layer", "head", f"index_{name}") for name in PRODUCTS},
        **{
            f"change/{name}/{rank}_rank": (*run_axes, "layer", "head")
            for name in PRODUCTS
            for rank in ("stable", "numerical")
        },
    }
    return Result(data, claims, dims)


@jax.jit
def _initial_spectra(starts: Any) -> tuple[Spectrum, ...]:
    """Spectra of the products that all seeds start from, at the first scale."""

    def one(params):
        return tuple(spectrum(product, 0) for product in thin_products(head_weights(params)))

    return jax.vmap(one)(jax.tree.map(lambda leaf: leaf[0], starts))


def _small(scales: Any) -> int:
    """The largest of the small scales."""
    return int(np.argmax(np.asarray(scales) <= SMALL))


def _over_heads(leaf: Any) -> np.ndarray:
    """Mean over seeds, layers and heads, (time, lane)."""
    return leaf.mean(axis=(2, 3, 4))


def _init_scale(config: Config, ys: Observed) -> Claim:
    count, small = len(config.scales), _small(config.scales)
    KQ, VO = (_over_heads(change.stable_rank)[-1] for change in (ys.KQ, ys.VO))
    checks = [
        # Far from both: one direction that is learned, and the three that a start has.
        Check("W_K W_Q^T, scale 1", "at least", 1.7, KQ[0]),
        Check(f"W_K W_Q^T, scale {config.scales[small]:g}", "at most", 1.3, KQ[small]),
        # The spread of heads is 0.5 or less; some twenty of them make a mean that is known to 0.1.
        Check("W_K W_Q^T, fall from scale 1 to the next", "at least", 0.3, KQ[0] - KQ[1]),
        Check(
            f"W_V W_O^T, smallest fall to the next scale, down to {config.scales[small]:g}",
            "at least",
            0.1,
            -np.max(np.diff(VO[: small + 1])),
        ),
    ]
    if config.hold_gains:
        held = np.append(KQ[0], KQ[count:])[: small + 1]
        checks += [
            Check("gains held: W_K W_Q^T, same scale", "at most", 1.3, held[-1]),
            # The first fall is large, the second from near one to one.
            Check("gains held: W_K W_Q^T, smallest fall", "at least", 0.05, -np.max(np.diff(held))),
        ]
    return Claim(
        "incremental.vit/init-scale",
        "The low-rank bias is more evident with smaller initialization: the stable rank of what heads learn, "
        "a mean over heads and seeds, falls with the scale",
        "boixadsera2023, section 5 (vision transformers), Figures 3 and 4",
        "stated",
        checks,
        preset="standard",  # means over several seeds
    )


def _leading(lanes: np.ndarray, ys: Observed) -> Claim:
    values = ys.KQ.values[-1, lanes[:, 0] <= SMALL] ** 2
    share = np.mean(values[..., 0] / values.sum(axis=-1), axis=(1, 2, 3))
    return Claim(
        "incremental.vit/one-direction",
        f"From small starts (scale {SMALL:g} and less) what a head learns in W_K W_Q^T is one direction",
        "boixadsera2023, section 5 (vision transformers), Figures 4 and 5",
        "stated",
        [
            # More than nine tenths of the squared Frobenius norm.
            Check(
                "share of the leading direction, mean over heads and seeds, worst scale",
                "at least",
                0.9,
                share.min(),
            )
        ],
    )


def _below_start(ys: Observed, initial: Any) -> Claim:
    def runs(change, start):
        return change.stable_rank[-1].mean(axis=(-2, -1)) < start.stable_rank.mean(axis=(-2, -1))[None]

    return Claim(
        "incremental.vit/below-start",
        "What is learned is of lower rank than what the weights start from",
        "boixadsera2023, section 5 (vision transformers), Figures 1 and 5",
        "stated",
        [
            all_of(
                f"{name}: runs with a smaller stable rank, mean over heads", runs(getattr(ys, name), start)
            )
            for name, start in zip(PRODUCTS, initial, strict=True)
        ],
    )


def _gradual(lanes: np.ndarray, ys: Observed) -> Claim:
    below = lanes[:, 0] < 1
    # The first record is of no change at all.
    stable = {name: _over_heads(getattr(ys, name).stable_rank)[1:, below] for name in PRODUCTS}
    number = {name: _over_heads(getattr(ys, name).numerical_rank)[:, below] for name in PRODUCTS}
    backward = [np.max(np.maximum.accumulate(one) - one) / np.max(one) for one in number.values()]
    VO, KQ = stable["VO"], stable["KQ"]
    return Claim(
        "incremental.vit/gradual",
        "The rank of what is learned grows gradually",
        "boixadsera2023, appendix B, Figures 11 and 12",
        "qualified",
        [
            # Heads may lose a value again; a tenth of the largest number is for that.
            Check("singular values above the threshold: largest way back", "at most", 0.1, np.max(backward)),
            # A second one in half of the heads at least.
            Check("the same, W_V W_O^T: their number at the end", "at least", 1.5, number["VO"][-1].min()),
            # A step of Adam is of one size for all weights at first, whatever the gradient: it has high rank.
            Check(
                "stable rank of W_V W_O^T: fall from the first record",
                "at least",
                0.1,
                np.mean(VO[0] - VO.min(0)),
            ),
            # Noise of a mean over heads between two records is 0.02.
            Check(
                "the same: growth from its least to the end", "at least", 0.05, np.mean(VO[-1] - VO.min(0))
            ),
            # Nearly one all the way.
            Check(
                "stable rank of W_K W_Q^T: growth from its least", "at most", 0.1, np.mean(KQ[-1] - KQ.min(0))
            ),
        ],
        condition="rank counts singular values above a threshold; the stable rank falls at first, and then "
        "grows for W_V W_O^T alone",
        preset="standard",
    )


def _sizes(final: dict[str, np.ndarray]) -> Claim:
    falls = {name: mean[:, 0] - mean[:, 1] for name, mean in final.items()}
    return Claim(
        "incremental.vit/sizes",
        "Networks of other depths, widths and numbers of heads show the same trend",
        "boixadsera2023, section 5 (vision transformers)",
        "stated",
        [
            # Several times what a mean over heads and seeds varies by.
            all_of(f"{name}: sizes whose stable rank falls by 0.3 with the scale", fall.mean(axis=1) >= 0.3)
            for name, fall in falls.items()
        ],
        preset="standard",
    )


def _learns(config: Config, accuracy: Any) -> Claim:
    chance = 1 / CLASSES[config.data]
    at_end = accuracy[-1].mean(axis=1)
    return Claim(
        "incremental.vit/learns",
        "The networks that are looked at have learned their task, from every scale",
        "boixadsera2023, section 5 (vision transformers)",
        "stated",
        [
            # A sanity check: far from chance.
            Check("test accuracy, scale 1", "at least", 5 * chance, at_end[0]),
            Check("smallest test accuracy of a scale", "at least", 3 * chance, at_end.min()),
        ],
        preset="standard",
    )


def _quoted() -> list[Claim]:
    return [
        Claim(f"incremental.vit/{name}", statement, f"boixadsera2023, {place}", "quoted")
        for name, statement, place in (
            (
                "cifar-10",
                "On all of CIFAR-10, depth 6, 8 heads of dimension 128, 500 epochs: the change is of low "
                "rank, and more so from smaller starts",
                "Figures 1, 3, 4, 5, 11 and 12",
            ),
            ("cifar-100", "On CIFAR-100 the trends are those of CIFAR-10", "Figures 13 and 14"),
            (
                "imagenet",
                "On ImageNet the stable rank of the change grows for longer than on CIFAR-10",
                "Figures 1, 15 and 16",
            ),
        )
    ]


SETS = {"digits": "Digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def figure(saved: Saved) -> Figure:
    """Spectra beside the start's, leading values and ranks over training, ranks over scale and size."""
    drawn, (above, below) = plotting.new_figure(2, 5, width=2.8, height=2.5)
    config, steps = saved.config, saved["steps"]
    scales, small = np.array(config["scales"]), _small(config["scales"])
    drawn.suptitle(
        f"{SETS[config['data']]}, {saved['images']:,} images: vision transformers of depth {config['depth']} "
        f"and width {config['width']}, {config['heads']} heads of dimension {config['head_dim']}, "
        f"Adam at {config['learning_rate']:g}, {config['seeds']} seed{'s' * (config['seeds'] > 1)}",
        fontsize=11,
    )
    for ax, lane, name in zip(above, (0, small, small), ("KQ", "KQ", "VO"), strict=False):
        _spectra(ax, saved, lane, name)
    above[0].legend(loc="lower left", fontsize=7)
    _leading_values(above[3], saved, 0)
    _leading_values(above[4], saved, small)

    number = below[2]
    for index, scale in enumerate(scales):
        color, label = f"C{index}", f"scale {scale:g}"
        for name, ax in zip(PRODUCTS, below, strict=False):
            ranks = saved[f"change/{name}/stable_rank"][1:, index].reshape(len(steps) - 1, -1)
            mean, sd = ranks.mean(axis=1), ranks.std(axis=1)
            ax.plot(steps[1:], mean, color=color, label=label)
            ax.fill_between(steps[1:], mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)
        for name, line in zip(PRODUCTS, ("-", "--"), strict=True):
            counts = _over_heads(saved[f"change/{name}/numerical_rank"])[:, index]
            number.plot(steps, counts, line, color=color)
        accuracy = saved["accuracy"][-1, index].mean()
        number.plot([], [], color=color, label=f"{label}: {accuracy:.0%} right")
    for name, ax in zip(PRODUCTS, below, strict=False):
        start = saved[f"initial/{name}/stable_rank"].mean()
        ax.axhline(start, label="start", **plotting.PRINTED)
        ax.set(xlabel="step", ylabel="stable rank (± sd of heads)", ylim=(0.8, 1.4 * start))
        ax.set_title(f"Change of {NAMES[name]}")
    below[0].legend(loc="upper left", ncols=2, fontsize=7)
    number.set(xlabel="step", ylabel="number (KQ full, VO dashed)", ylim=(0, 1.7 * number.get_ylim()[1]))
    number.set_title(f"Singular values > {config['threshold']:g}")
    number.legend(loc="upper left", fontsize=7)
    _over_scale(below[3], saved, scales)
    _over_sizes(below[4], saved, scales[small])
    return drawn


def _spectra(ax: Axes, saved: Saved, lane: int, name: str) -> Axes:
    """Singular values of one head's change at several steps, of all heads' at the end, and of the start."""
    values = saved[f"change/{name}/values"][:, lane, 0]
    steps = saved["steps"]
    index = np.arange(1, values.shape[-1] + 1)
    others = values[-1].reshape(-1, len(index))
    ax.plot(index, (others / others[:, :1]).T, color="0.7", linewidth=0.8)
    ax.plot([], [], color="0.7", label="other heads, end")
    marks = np.unique(np.geomspace(1, len(steps) - 1, 4).round().astype(int))
    for mark, depth in zip(marks, np.linspace(0.3, 1, len(marks)), strict=True):
        one = values[mark, 0, 0]
        ax.plot(index, one / one[0], color="C2", alpha=depth, label=f"change, step {steps[mark]:.0f}")
    start = saved[f"initial/{name}/values"][0, 0, 0]
    ax.plot(index[: len(start)], start / start[0], color="C1", label="start")
    ax.set(yscale="log", ylim=(1e-4, 3), xlabel="index, one head", ylabel="value over the largest")
    ax.set_title(f"{NAMES[name]}, scale {saved['lanes'][lane, 0]:g}")
    ax.set_xticks(index[:: len(index) // 4])
    return ax


def _leading_values(ax: Axes, saved: Saved, lane: int) -> Axes:
    """The four largest singular values of one head's change over training."""
    for name, line in zip(PRODUCTS, ("-", "--"), strict=True):
        values = saved[f"change/{name}/values"][:, lane, 0, 0, 0, :4]
        for rank in range(values.shape[-1]):
            ax.plot(saved["steps"], values[:, rank], line, color=f"C{rank}")
        ax.plot([], [], line, color="0.3", label=NAMES[name])
    ax.set(xlabel="step", ylabel="singular value", ylim=(0, 1.2 * ax.get_ylim()[1]))
    ax.set_title(f"One head, scale {saved['lanes'][lane, 0]:g}")
    ax.legend(loc="upper left", ncols=2)
    return ax


def _over_scale(ax: Axes, saved: Saved, scales: np.ndarray) -> Axes:
    """Stable rank at the end over the scale, with the control."""
    for name, color in zip(PRODUCTS, ("C0", "C1"), strict=True):
        last = saved[f"change/{name}/stable_rank"][-1]
        ranks = last.reshape(len(last), -1)
        mean, sd = ranks.mean(axis=1), ranks.std(axis=1)
        count = len(scales)
        ax.errorbar(scales, mean[:count], sd[:count], fmt="o-", color=color, capsize=2, label=NAMES[name])
        if saved.config["hold_gains"]:
            held = np.append(mean[0], mean[count:])
            ax.plot(scales, held, "s:", color=color, mfc="white")
    if saved.config["hold_gains"]:
        ax.plot([], [], "s:", color="0.3", mfc="white", label="gains held")
    ax.set(xscale="log", xlabel="scale of the initial values", ylabel="stable rank of the change")
    ax.set_xticks(scales, labels=[f"{scale:g}" for scale in scales])
    ax.minorticks_off()
    ax.set_title("At the end, ± sd of heads")
    ax.legend(loc="upper left", fontsize=7.5)
    return ax


def _over_sizes(ax: Axes, saved: Saved, small: float) -> Axes:
    """Stable rank at the end of networks of other sizes, at two scales."""
    sizes = saved["sizes/depth_heads_width"]
    rows = np.arange(len(sizes))
    for name, color, shift in zip(PRODUCTS, ("C0", "C1"), (-0.12, 0.12), strict=True):
        mean, sd = (saved[f"sizes/{part}/{name}"].mean(axis=2) for part in ("mean", "sd"))
        for index, (scale, fill) in enumerate(((1, color), (small, "white"))):
            label = f"{NAMES[name]}, scale {scale:g}"
            style = {"fmt": "o", "color": color, "mfc": fill, "capsize": 2, "elinewidth": 0.8}
            ax.errorbar(mean[:, index], rows + shift, xerr=sd[:, index], label=label, **style)
    ax.set_yticks(rows, labels=[f"{depth}: {heads} × {width}" for depth, heads, width in sizes])
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set(ylim=(len(sizes) - 0.5, -0.5 - 0.35 * len(sizes)), xlabel="stable rank of the change")
    ax.set_title("Depth: heads × width")
    ax.legend(loc="upper left", ncols=2, fontsize=6.5, columnspacing=0.8, handletextpad=0.2)
    return ax
