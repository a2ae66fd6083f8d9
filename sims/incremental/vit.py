"""Vision transformers trained from a scaled start: spectra of what their attention heads learn.

A small vision transformer is trained with Adam on real images, from initial values times a scale, all but
those of the token embedder. Of every head the two products W_K W_Q^T and W_V W_O^T are followed: singular
values and stable rank of their change since the start, beside those of the products at the start. One
program trains all scales and seeds. A control scales the weights alone and leaves the gains of the norms.
Adam has no gradient flow: the axis is the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

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
from sims.claims import Claim, Preset, at_least, at_most, every, qualified, quoted, stated
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

PRODUCTS = ("KQ", "VO")
NAMES = {"KQ": "$W_K W_Q^T$", "VO": "$W_V W_O^T$"}
LINES = {"KQ": "-", "VO": "--"}
COLORS = {"KQ": "C0", "VO": "C1"}
SMALL = 0.1  # from here on down a scale counts as small
RUNS = (2, 3, 4)  # the axes of seeds, layers and heads, behind those of steps and lanes
SECTION_5 = "boixadsera2023, section 5 (vision transformers)"
QUOTED = {
    "cifar-10": (
        "On all of CIFAR-10, depth 6, 8 heads of dimension 128, 500 epochs: the change is of low rank, and "
        "more so from smaller starts",
        "Figures 1, 3, 4, 5, 11 and 12",
        "CIFAR-10, and 500 epochs of this network for each scale on an accelerator",
    ),
    "cifar-100": (
        "On CIFAR-100 the trends are those of CIFAR-10",
        "Figures 13 and 14",
        "CIFAR-100, and as many epochs as on CIFAR-10",
    ),
    "imagenet": (
        "The rank of the change grows more on ImageNet than on CIFAR-10, where its growth is harder to see",
        "Figures 1, 15 and 16",
        "ImageNet, and training of a vision transformer on it on several accelerators",
    ),
}
SETS = {"digits": "Digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class Config:
    """Images, network and training."""

    data: Literal["digits", "mnist", "cifar10", "cifar100"] = "digits"
    """Images: digits that come with scikit-learn, or a set from --data-dir."""
    train_images: Count | None = 1400
    """Images to train on; all of the training set where None."""
    test_images: Count = 397
    """Images to test on."""
    scales: Annotated[tuple[Positive, ...], Length(2)] = (1.0, 0.3, 0.1, 0.03)
    """Scales of the initial values, in falling order, the first of them 1."""
    hold_gains: bool = True
    """Whether the control is run: the same scales with the gains of the norms left at 1."""
    seeds: Count = 3
    """Random initializations, the same ones for every scale."""
    patch: tuple[Count, Count] = (2, 2)
    """Height and width of a patch."""
    depth: Count = 2
    """Layers."""
    heads: Count = 4
    """Heads per layer."""
    width: Count = 32
    """Dimension of a token."""
    head_dim: Count = 8
    """Dimension of a head."""
    mlp_width: Count = 64
    """Hidden nodes of the part that acts on each token."""
    batch: Count = 64
    """Images per step, drawn with replacement."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam."""
    warmup: Annotated[int, Range(at_least=0)] = 0
    """Steps over which the learning rate grows from zero."""
    cycles: Annotated[int, Range(at_least=0)] = 0
    """Cosine cycles from the learning rate down to zero after the warm-up; 0 for a constant one."""
    steps: Count = 1000
    """Updates."""
    every: Count = 20
    """Steps between two records."""
    calls: Count = 5
    """Calls that a run is cut into, for its progress; steps must be a multiple of every * calls."""
    threshold: Positive = 0.1
    """Singular values above it count for the numerical rank."""
    variants: tuple[tuple[Count, Count, Count], ...] = ()
    """Other depths, heads and widths, three numbers each, trained at scales 1 and 0.1."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        check_ranges(self)
        if self.scales[0] != 1 or self.scales[-1] > SMALL or np.any(np.diff(self.scales) >= 0):
            raise ValueError(f"scales must fall from 1 to {SMALL} or below, got {self.scales}")
        if self.steps % (self.every * self.calls):
            raise ValueError(
                f"steps must be a multiple of every * calls = {self.every * self.calls}, got {self.steps}"
            )

    @property
    def small(self) -> int:
        """Where the largest of the small scales is."""
        return int(np.argmax(np.asarray(self.scales) <= SMALL))

    @property
    def lanes(self) -> list[tuple[float, float]]:
        """Scales of the initial values and of the gains, of all that is trained side by side."""
        held = [(scale, 1.0) for scale in self.scales[1:]] if self.hold_gains else []
        return [(scale, scale) for scale in self.scales] + held


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


def read(config: Config, context: Context) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
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
    sizes = {"train_images": (wanted, count), "test_images": (config.test_images, len(test[0]))}
    for name, (number, most) in sizes.items():
        if number > most:
            raise ValueError(f"{name} must be from 1 to {most}, got {number}")
    return (
        tuple(jnp.asarray(part[:wanted]) for part in whole),
        tuple(jnp.asarray(part[: config.test_images]) for part in test),
    )


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

    # One after the other: what draws many small arrays at once compiles for longer.
    return jax.lax.map(lambda lane: jax.lax.map(lambda key: start(lane, key), keys), lanes)


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
    training: tuple[Array, ...],
    test: tuple[Array, ...],
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


def run(config: Config, context: Context) -> dict:
    """Train at all scales, then other sizes, and look at the spectra of what was learned."""
    context.progress("reading the images", 0.0)
    training, test = read(config, context)
    key, lanes = jax.random.key(context.seed), config.lanes
    share = 1 / (1 + 0.5 * len(config.variants))

    def report(done, steps):
        context.progress(f"training at {len(lanes)} scales, {done} steps", 0.05 + 0.9 * share * done / steps)

    report(0, config.steps)
    starts, path = train_lanes(config, lanes, key, training, test, report)
    if not bool(path.ok):
        raise RuntimeError("training gave numbers that are not finite: lower learning_rate")
    ys: Observed = jax.device_get(path.ys)
    initial: dict[str, Spectrum] = dict(zip(PRODUCTS, jax.device_get(_initial_spectra(starts)), strict=True))
    change: dict[str, Spectrum] = {"KQ": ys.KQ, "VO": ys.VO}

    def progress(label, done):
        context.progress(label, 0.05 + 0.9 * (share + (1 - share) * done))

    small, (scales, gains) = config.small, np.array(lanes).T
    saved = {
        "lane": ("lane", [f"scale {a:g}" + (", gains held" if a != b else "") for a, b in lanes]),
        "scale": ("lane", scales),
        "gain_scale": ("lane", gains),
        "step": ("step", path.ts),
        "images": len(training[0]),
        "accuracy": ("lane seed", ys.accuracy[-1]),
        "leading_share": ("lane", _leading_share(ys.KQ.values[-1])),
        **_other_sizes(config, key, training, test, change, progress),
    }
    for name, one in change.items():
        start, head = initial[name], one.values[:, :, 0, 0, 0]
        saved |= {
            f"mean/{name}": ("step lane", one.stable_rank.mean(axis=RUNS)),
            f"sd/{name}": ("step lane", one.stable_rank.std(axis=RUNS)),
            f"number/{name}": ("step lane", one.numerical_rank.mean(axis=RUNS)),
            f"end/{name}": ("lane seed", one.stable_rank[-1].mean(axis=(-2, -1))),
            f"start/{name}": ("seed", start.stable_rank.mean(axis=(-2, -1))),
            f"one_head/start/{name}": ("start_index", start.values[0, 0, 0]),
            f"one_head/large/{name}": ("step index", head[:, 0]),
            f"one_head/small/{name}": ("step index", head[:, small]),
            f"all_heads/small/{name}": ("layer head index", one.values[-1, small, 0]),
        }
    return saved | {"all_heads/large/KQ": ("layer head index", ys.KQ.values[-1, 0, 0])}


def _other_sizes(
    config: Config, key: Array, training: Any, test: Any, change: dict[str, Spectrum], progress: Any
) -> dict:
    """Stable ranks at the end, at scale 1 and at a small one, of this network and of those of other sizes."""
    both = [0, config.small]
    final = [{name: one.stable_rank[-1, both] for name, one in change.items()}]
    sizes = [(config.depth, config.heads, config.width), *config.variants]
    for index, (depth, heads, width) in enumerate(config.variants):
        label = f"training with depth {depth}, {heads} heads, width {width}"
        progress(label, index / len(config.variants))
        mlp_width = config.mlp_width * width // config.width
        variant = replace(config, depth=depth, heads=heads, width=width, mlp_width=mlp_width)
        variant = replace(variant, calls=1, every=config.steps)
        _, path = train_lanes(variant, [config.lanes[lane] for lane in both], key, training, test)
        final.append({name: np.asarray(getattr(path.ys, name).stable_rank[-1]) for name in PRODUCTS})
    means = {name: np.stack([one[name].mean(axis=(-2, -1)) for one in final]) for name in PRODUCTS}
    sds = {name: np.stack([one[name].std(axis=(-2, -1)) for one in final]) for name in PRODUCTS}
    return {
        "size": ("size", np.array([f"{depth}: {heads} × {width}" for depth, heads, width in sizes])),
        "size_scale": ("size_scale", np.array(config.scales)[both]),
        "size_mean": ("size size_scale seed", means),
        "size_sd": ("size size_scale seed", sds),
    }


def _leading_share(values: Any) -> np.ndarray:
    """Share of the leading direction in the squared norm, mean over seeds and heads, of (lane, ..., k)."""
    squares = values**2
    return np.mean(squares[..., 0] / squares.sum(axis=-1), axis=(1, 2, 3))


@jax.jit
def _initial_spectra(starts: Any) -> tuple[Spectrum, ...]:
    """Spectra of the products that all seeds start from, at the first scale."""

    def one(params):
        return tuple(spectrum(product, 0) for product in thin_products(head_weights(params)))

    return jax.vmap(one)(jax.tree.map(lambda leaf: leaf[0], starts))


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The trend with the scale, what is learned from small ones, how ranks grow, other sizes, the task."""
    yield _init_scale(config, saved)
    share = saved["leading_share"][saved["scale"] <= SMALL].min()
    leading = "share of the leading direction, mean over heads and seeds, worst scale"
    yield stated(
        "one-direction",
        f"From small starts (scale {SMALL:g} and less) what a head learns in W_K W_Q^T is one direction",
        f"{SECTION_5}, Figures 4 and 5",
        at_least(leading, share, 0.9, why="nine tenths of the squared Frobenius norm"),
    )
    lower = {name: saved[f"end/{name}"] < saved[f"start/{name}"][None] for name in PRODUCTS}
    yield stated(
        "below-start",
        "What is learned is of lower rank than what the weights start from",
        f"{SECTION_5}, Figures 1 and 5",
        *(every(f"{name}: runs with a smaller stable rank, mean over heads", lower[name]) for name in lower),
    )
    yield _gradual(saved)
    if config.variants:
        falls = {name: mean[:, 0] - mean[:, 1] for name, mean in saved["size_mean"].items()}
        falls = {name: fall.mean(axis=1) >= 0.3 for name, fall in falls.items()}
        trend = "sizes whose stable rank falls by 0.3 with the scale"
        yield stated(
            "sizes",
            "Networks of other depths, widths and numbers of heads show the same trend",
            SECTION_5,
            # Several times what a mean over heads and seeds varies by.
            *(every(f"{name}: {trend}", fall) for name, fall in falls.items()),
            preset="standard",
        )
    chance, at_end = 1 / CLASSES[config.data], saved["accuracy"].mean(axis=1)
    yield stated(
        "learns",
        "The networks that are looked at have learned their task, from every scale",
        SECTION_5,
        at_least("test accuracy, scale 1", at_end[0], 5 * chance, why="far from chance"),
        at_least("smallest test accuracy of a scale", at_end.min(), 3 * chance, why="far from chance"),
        preset="standard",
    )
    for name, (statement, place, needs) in QUOTED.items():
        yield quoted(name, statement, f"boixadsera2023, {place}", needs=needs)


def _init_scale(config: Config, saved: Saved) -> Claim:
    KQ, VO = (saved[f"mean/{name}"][-1] for name in PRODUCTS)
    scaled = saved["scale"] == saved["gain_scale"]
    small, scale = config.small, config.scales[config.small]
    fall = -np.max(np.diff(VO[scaled][: small + 1]))
    # The spread of heads is 0.5 or less; some twenty of them make a mean that is known to 0.1.
    checks = [
        at_least("W_K W_Q^T, scale 1", KQ[0], 1.7, why="a start has three directions"),
        at_most(f"W_K W_Q^T, scale {scale:g}", KQ[small], 1.3, why="one direction is learned"),
        at_least("W_K W_Q^T, fall from scale 1 to the next", KQ[0] - KQ[1], 0.3, why="known to 0.1"),
        at_least(
            f"W_V W_O^T, smallest fall to the next scale, down to {scale:g}", fall, 0.1, why="known to 0.1"
        ),
    ]
    if config.hold_gains:
        held = KQ[saved["gain_scale"] == 1][: small + 1]
        fall = -np.max(np.diff(held))
        checks += [
            at_most("gains held: W_K W_Q^T, same scale", held[-1], 1.3, why="one direction is learned"),
            at_least("gains held: W_K W_Q^T, smallest fall", fall, 0.05, why="the second, from near 1 to 1"),
        ]
    return stated(
        "init-scale",
        "The low-rank bias is more evident with smaller initialization: the stable rank of what heads learn, "
        "a mean over heads and seeds, falls with the scale",
        f"{SECTION_5}, Figures 3 and 4",
        *checks,
        preset="standard",  # means over several seeds
    )


def _gradual(saved: Saved) -> Claim:
    below = saved["scale"] < 1
    number = {name: saved[f"number/{name}"][:, below] for name in PRODUCTS}
    back = np.max([np.max(np.maximum.accumulate(one) - one) / np.max(one) for one in number.values()])
    # The first record is of no change at all.
    KQ, VO = (saved[f"mean/{name}"][1:, below] for name in PRODUCTS)
    fall, growth, flat = (np.mean(one) for one in (VO[0] - VO.min(0), VO[-1] - VO.min(0), KQ[-1] - KQ.min(0)))
    at_end, noise = number["VO"][-1].min(), "a mean over heads varies by 0.02 between records"
    way_back = "singular values above the threshold: largest way back"
    return qualified(
        "gradual",
        "The rank of what is learned grows gradually",
        "boixadsera2023, appendix B, Figures 11 and 12",
        condition="rank counts singular values above a threshold; the stable rank falls at first, and then "
        "grows for W_V W_O^T alone",
        inside=[
            at_most(way_back, back, 0.1, why="heads may lose a value again"),
            at_least("the same, W_V W_O^T: their number at the end", at_end, 1.5, why="two in half of them"),
        ],
        outside=[
            # A step of Adam is of one size for all weights at first, whatever the gradient: it has high rank.
            at_least("stable rank of W_V W_O^T: fall from the first record", fall, 0.1, why=noise),
            at_least("the same: growth from its least to the end", growth, 0.05, why=noise),
            at_most("stable rank of W_K W_Q^T: growth from its least", flat, 0.1, why="one all the way"),
        ],
        preset="standard",
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Spectra beside the start's, leading values and ranks over training, ranks over scale and size."""
    drawn, (above, below) = plotting.new_figure(2, 5, width=2.8, height=2.5)
    small = config.scales[config.small]
    drawn.suptitle(
        f"{SETS[config.data]}, {saved['images']:,} images: vision transformers of depth {config.depth} "
        f"and width {config.width}, {config.heads} heads of dimension {config.head_dim}, "
        f"Adam at {config.learning_rate:g}, {config.seeds} seed{'s' * (config.seeds > 1)}",
        fontsize=11,
    )
    _spectra(above[0], saved, "large", "KQ", 1)
    _spectra(above[1], saved, "small", "KQ", small)
    _spectra(above[2], saved, "small", "VO", small)
    above[0].legend(loc="lower left", fontsize=7)
    _leading_values(above[3], saved, "large", 1)
    _leading_values(above[4], saved, "small", small)
    for name, ax in zip(PRODUCTS, below, strict=False):
        _over_steps(ax, config, saved, name)
    below[0].legend(loc="upper left", ncols=2, fontsize=7)
    _numbers(below[2], config, saved)
    _over_scale(below[3], config, saved)
    _over_sizes(below[4], saved)
    return drawn


def _spectra(ax: Axes, saved: Saved, lane: str, name: str, scale: float) -> Axes:
    """Singular values of one head's change at several steps, of all heads' at the end, and of the start."""
    one_head, steps = saved[f"one_head/{lane}/{name}"], saved["step"]
    index = np.arange(1, one_head.shape[-1] + 1)
    others = saved[f"all_heads/{lane}/{name}"].reshape(-1, len(index))
    ax.plot(index, (others / others[:, :1]).T, color="0.7", linewidth=0.8)
    ax.plot([], [], color="0.7", label="other heads, end")
    marks = np.unique(np.geomspace(1, len(steps) - 1, 4).round().astype(int))
    for mark, depth in zip(marks, np.linspace(0.3, 1, len(marks)), strict=True):
        values, label = one_head[mark] / one_head[mark, 0], f"change, step {steps[mark]:.0f}"
        ax.plot(index, values, color="C2", alpha=depth, label=label)
    start = saved[f"one_head/start/{name}"]
    ax.plot(index[: len(start)], start / start[0], color="C1", label="start")
    ax.set(yscale="log", ylim=(1e-4, 3), xlabel="index, one head", ylabel="value over the largest")
    ax.set_title(f"{NAMES[name]}, scale {scale:g}")
    ax.set_xticks(index[:: len(index) // 4])
    return ax


def _leading_values(ax: Axes, saved: Saved, lane: str, scale: float) -> Axes:
    """The four largest singular values of one head's change over training."""
    for name, line in LINES.items():
        for rank, values in enumerate(saved[f"one_head/{lane}/{name}"].T[:4]):
            ax.plot(saved["step"], values, line, color=f"C{rank}")
        ax.plot([], [], line, color="0.3", label=NAMES[name])
    ax.set(xlabel="step", ylabel="singular value", ylim=(0, 1.2 * ax.get_ylim()[1]))
    ax.set_title(f"One head, scale {scale:g}")
    ax.legend(loc="upper left", ncols=2)
    return ax


def _over_steps(ax: Axes, config: Config, saved: Saved, name: str) -> Axes:
    """Stable rank over training at every scale, with the spread of heads, beside that of the start."""
    steps, start = saved["step"][1:], saved[f"start/{name}"].mean()
    for index, scale in enumerate(config.scales):
        mean, sd = saved[f"mean/{name}"][1:, index], saved[f"sd/{name}"][1:, index]
        ax.plot(steps, mean, color=f"C{index}", label=f"scale {scale:g}")
        ax.fill_between(steps, mean - sd, mean + sd, color=f"C{index}", alpha=0.15, linewidth=0)
    ax.axhline(start, label="start", **plotting.PRINTED)
    ax.set(xlabel="step", ylabel="stable rank (± sd of heads)", ylim=(0.8, 1.4 * start))
    ax.set_title(f"Change of {NAMES[name]}")
    return ax


def _numbers(ax: Axes, config: Config, saved: Saved) -> Axes:
    """Numerical rank over training at every scale, and the accuracy at the end."""
    for index, scale in enumerate(config.scales):
        for name, line in LINES.items():
            ax.plot(saved["step"], saved[f"number/{name}"][:, index], line, color=f"C{index}")
        accuracy = saved["accuracy"][index].mean()
        ax.plot([], [], color=f"C{index}", label=f"scale {scale:g}: {accuracy:.0%} right")
    ax.set(xlabel="step", ylabel="number (KQ full, VO dashed)", ylim=(0, 1.7 * ax.get_ylim()[1]))
    ax.set_title(f"Singular values > {config.threshold:g}")
    ax.legend(loc="upper left", fontsize=7)
    return ax


def _over_scale(ax: Axes, config: Config, saved: Saved) -> Axes:
    """Stable rank at the end over the scale, with the control."""
    scaled, held = saved["scale"] == saved["gain_scale"], saved["gain_scale"] == 1
    for name, color in COLORS.items():
        mean, sd = saved[f"mean/{name}"][-1], saved[f"sd/{name}"][-1]
        bars = {"fmt": "o-", "color": color, "capsize": 2, "label": NAMES[name]}
        ax.errorbar(config.scales, mean[scaled], sd[scaled], **bars)
        if config.hold_gains:
            ax.plot(config.scales, mean[held], "s:", color=color, mfc="white")
    if config.hold_gains:
        ax.plot([], [], "s:", color="0.3", mfc="white", label="gains held")
    ax.set(xscale="log", xlabel="scale of the initial values", ylabel="stable rank of the change")
    ax.set_xticks(config.scales, labels=[f"{scale:g}" for scale in config.scales])
    ax.minorticks_off()
    ax.set_title("At the end, ± sd of heads")
    ax.legend(loc="upper left", fontsize=7.5)
    return ax


def _over_sizes(ax: Axes, saved: Saved) -> Axes:
    """Stable rank at the end of networks of other sizes, at two scales."""
    count = len(saved["size"])
    for (name, color), shift in zip(COLORS.items(), (-0.12, 0.12), strict=True):
        mean, sd = (saved[f"size_{part}/{name}"].mean(axis=2) for part in ("mean", "sd"))
        for index, (scale, fill) in enumerate(zip(saved["size_scale"], (color, "white"), strict=True)):
            bars = {"fmt": "o", "color": color, "mfc": fill, "capsize": 2, "elinewidth": 0.8}
            label = f"{NAMES[name]}, scale {scale:g}"
            ax.errorbar(mean[:, index], np.arange(count) + shift, xerr=sd[:, index], label=label, **bars)
    ax.set_yticks(range(count), labels=saved["size"])
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set(ylim=(count - 0.5, -0.5 - 0.8 * count), xlabel="stable rank of the change")
    ax.set_ylabel("size")
    ax.set_title("Depth: heads × width")
    ax.legend(loc="upper left", fontsize=7.5)
    return ax
