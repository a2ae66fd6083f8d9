"""Prompt attention on images of handwritten digits: attention ratio and conditioning, GD beside Adam.

The images are the 1797 digits that come with scikit-learn, cut into patches. Every head has a prompt that
says where it looks, and what the heads see is summed into the logits of ten classes. There is no teacher
here: how sharp the attention becomes, and what that does to the Gauss-Newton matrix over the prompts, is
what real data make of it. Training the prompts alone and training prompts and values are two settings;
each optimizer is shown at the learning rate, out of a grid, whose training loss is lowest on average over
the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata

from dynamics.replicator import tangent_basis
from models.attention import PromptAttention, attention_log_ratio, attention_logits, log_mean_ratio
from models.data.images import digits, patches
from models.functional import as_function
from models.losses import cross_entropy, gauss_newton_spectrum
from models.training import record_steps, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, every, qualified, stated
from sims.ranges import Count, Length, Positive, check_ranges
from sims.results import Context, Saved

OPTIMIZERS: dict[str, Callable[..., Any]] = {"GD": optax.sgd, "Adam": optax.adam}
SETTINGS = ("prompts alone", "prompts and values")
Rates = Annotated[tuple[Positive, ...], Length(1)]


@dataclass(frozen=True)
class Config:
    """Images, network and training."""

    train_images: Count = 300
    """Images to train on."""
    test_images: Count = 200
    """Images to test on."""
    patch: tuple[Count, Count] = (2, 2)
    """Height and width of a token's patch: `2 2` cuts an image into 16 tokens, `1 8` into its 8 rows."""
    heads: Count = 4
    """Heads: prompts, each with a value of its own."""
    batch: Count | None = None
    """Images per step; all of them where None."""
    seeds: Count = 2
    """Random initializations."""
    steps: Count = 200
    """Updates."""
    every: Count = 4
    """Steps between two records."""
    rates_gd: Rates = (0.3, 1.0, 3.0, 10.0)
    """Learning rates of gradient descent."""
    rates_adam: Rates = (0.03, 0.1, 0.3, 1.0)
    """Learning rates of Adam."""
    spectra: Count = 8
    """Times at which the Gauss-Newton spectrum is taken, evenly spaced in the logarithm of the step."""
    spectrum_images: Count = 40
    """Test images that make up the Gauss-Newton matrix."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        check_ranges(self)
        images = self.train_images + self.test_images
        if images > 1797:
            raise ValueError(f"train_images and test_images must be at most 1797 in all, got {images}")

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        """The learning rates of each optimizer."""
        return {"GD": self.rates_gd, "Adam": self.rates_adam}


_STANDARD = Config(
    train_images=1200,
    test_images=500,
    heads=8,
    seeds=6,
    steps=800,
    every=5,
    rates_gd=(0.1, 0.3, 1.0, 3.0),
    rates_adam=(0.01, 0.03, 0.1, 0.3),
    spectra=15,
    spectrum_images=100,
)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(_STANDARD, heads=16, seeds=10, steps=10_000, every=50),
}


def image_tokens(images: jax.Array, patch: tuple[int, int], train_images: int) -> jax.Array:
    """Tokens (N, n, d): whitened patches beside a code of their position.

    W is the identity, so that the keys bring no condition number of their own: hence the whitening, with the
    statistics of the training images. The code is Helmert's basis: no two positions are closer than any
    others, and there is no direction that is the same at all positions, which the softmax would not see.
    """
    pixels = patches(images, patch)
    samples, n, _ = pixels.shape
    training = pixels[:train_images].reshape(-1, pixels.shape[-1])
    variances, directions = jnp.linalg.eigh(jnp.cov(training.T))
    content = (pixels - jnp.mean(training, axis=0)[None, None]) @ (directions / jnp.sqrt(variances)[None])
    position = tangent_basis(n, images.dtype) * n**0.5
    return jnp.concatenate([content, jnp.broadcast_to(position[None], (samples, n, n - 1))], axis=-1)


class Task(NamedTuple):
    """Training and test set (images, tokens, labels); the network and all seeds' starts."""

    training: Any
    test: Any
    predict: Any
    starts: Any


@eqx.filter_jit
def prepare(key: jax.Array, images: jax.Array, labels: jax.Array, config: Config) -> Task:
    """Images in random order as tokens, and a start for each seed."""
    k_order, k_start = jax.random.split(key)
    count = config.train_images
    order = jax.random.permutation(k_order, len(images))[: count + config.test_images]
    images, labels = images[order], labels[order]
    tokens = image_tokens(images, config.patch, count)

    def start(key):
        dim, dtype = tokens.shape[-1], tokens.dtype
        model = PromptAttention.standard(key, dim, outputs=10, heads=config.heads, dtype=dtype)
        predict, params = as_function(model)
        return Partial(_class_logits, predict), params

    training = images[:count], tokens[:count], labels[:count]
    test = images[count:], tokens[count:], labels[count:]
    return Task(training, test, *jax.vmap(start)(jax.random.split(k_start, config.seeds)))


def _class_logits(predict: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits of the classes, (N, 10): the output at the one query."""
    return predict(params, tokens)[:, 0]


@eqx.filter_jit
def train_lanes(task: Task, optimizer: Any, rates: jax.Array, keys: jax.Array, config: Config) -> Any:
    """Parameters in both settings, at every rate, from every start; (setting, rate, seed, time, ...)."""
    _, tokens, labels = task.training

    def lane(train_value, rate, key, start):
        def loss(params, chosen=slice(None)):
            # Values that are held have no gradient, and without one both optimizers leave them alone.
            value = jax.tree.map(
                lambda leaf: jnp.where(train_value, leaf, jax.lax.stop_gradient(leaf)), params["value"]
            )
            params = nnx.State({**params, "value": value})
            return cross_entropy(params, (task.predict, tokens[chosen], labels[chosen]))

        def draw(key):
            return jax.random.choice(key, len(labels), (config.batch or len(labels),), replace=False)

        batches = {} if config.batch is None else {"batches": draw, "key": key}
        return train(loss, start, optimizer(rate), steps=config.steps, every=config.every, **batches)[1].ys

    over_seeds = jax.vmap(lane, in_axes=(None, None, 0, 0))
    over_rates = jax.vmap(over_seeds, in_axes=(None, 0, None, None))
    over_settings = jax.vmap(over_rates, in_axes=(0, None, None, None))
    train_value = jnp.array([setting == "prompts and values" for setting in SETTINGS])
    return over_settings(train_value, rates, keys, task.starts)


@eqx.filter_jit
def measure(task: Task, params: Any) -> dict[str, jax.Array]:
    """Loss, accuracies and sharpness of the attention for all of many parameters, (..., heads, 1, d)."""

    def accuracy(params, tokens, labels):
        return jnp.mean(jnp.argmax(task.predict(params, tokens), axis=-1) == labels)

    def one(params):
        log_ratios = attention_log_ratio(params["prompt"][...], task.test[1]).reshape(-1)
        return {
            "loss": cross_entropy(params, (task.predict, *task.training[1:])),
            "train_accuracy": accuracy(params, *task.training[1:]),
            "test_accuracy": accuracy(params, *task.test[1:]),
            "log10_mean_ratio": log_mean_ratio(log_ratios) / math.log(10),
            "log10_median_ratio": jnp.median(log_ratios) / math.log(10),
        }

    return _map_lanes(one, params)


def at_best_rates(task: Task, params: Any) -> tuple[np.ndarray, dict[str, np.ndarray], Any]:
    """For each setting the rate with the lowest loss, a mean over seeds and the whole run, and its runs."""
    curves = measure(task, params)
    average = np.mean(np.asarray(curves["loss"], float), axis=(2, 3))
    best = np.argmin(np.where(np.isfinite(average), average, np.inf), axis=1)
    lanes = np.arange(len(best)), best
    return best, *jax.tree.map(lambda leaf: np.asarray(leaf)[lanes], (curves, params))


@eqx.filter_jit
def condition_numbers(task: Task, params: Any, images: int) -> jax.Array:
    """Largest over smallest eigenvalue of G^T G / N, G = d logits / d prompts, for all of many parameters."""
    dtype = jnp.result_type(float)  # smaller eigenvalues survive than in the network's own dtype
    params, tokens = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, task.test[1][:images]))

    def one(params):
        def logits(prompt, tokens):
            return task.predict(nnx.State({**params, "prompt": prompt}), tokens)

        spectrum = gauss_newton_spectrum(logits, params["prompt"], tokens)
        return spectrum[0] / spectrum[-1]

    return _map_lanes(one, params)


def _map_lanes(function: Callable[[Any], Any], params: Any) -> Any:
    """Map over all leading axes of the parameters, a few at a time."""
    lanes = params["prompt"].shape[:-3]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lanes) :]), params)
    found = jax.lax.map(function, flat, batch_size=8)
    return jax.tree.map(lambda leaf: leaf.reshape(*lanes, *leaf.shape[1:]), found)


def run(config: Config, context: Context) -> dict:
    """Train with both optimizers in both settings and measure how sharp and how ill-conditioned they end."""
    context.progress("reading the images", 0.0)
    k_data, k_batch = jax.random.split(jax.random.key(context.seed))
    task = prepare(k_data, *digits(config.dtype), config)
    keys = jax.random.split(k_batch, config.seeds)
    steps = record_steps(config.steps, config.every)
    marks = np.unique(np.geomspace(1, len(steps), config.spectra).round().astype(int)) - 1
    images, tokens, _ = (leaf[: max(2, config.heads // 3)] for leaf in task.test)

    def with_optimizer(name, begun):
        context.progress(f"training with {name}", begun)
        rates = jnp.asarray(config.rates[name], config.dtype)
        params = train_lanes(task, OPTIMIZERS[name], rates, keys, config)
        context.progress(f"measuring {name}", begun + 0.3)
        best, curves, params = at_best_rates(task, params)
        at_marks = jax.tree.map(lambda leaf: leaf[:, :, marks], params)
        last_prompt = params["prompt"][...][SETTINGS.index("prompts and values"), 0, -1]
        attention = jax.nn.softmax(attention_logits(last_prompt, tokens), axis=-1)
        return {
            "best": ("setting", best),
            "condition": ("setting seed mark", condition_numbers(task, at_marks, config.spectrum_images)),
            "maps": ("sample head token", attention[:, :, 0]),
            **{quantity: ("setting seed step", curve) for quantity, curve in curves.items()},
        }

    return {
        "setting": ("setting", np.array(SETTINGS)),
        "step": ("step", steps),
        "mark": ("mark", steps[marks]),
        "image": ("sample row column", images),
        "GD": with_optimizer("GD", 0.05),
        "Adam": with_optimizer("Adam", 0.5),
    }


def _growth(curves: np.ndarray) -> float:
    """Last minus first along time, median over seeds, in the setting where it is least."""
    return np.min(np.median(curves[..., -1] - curves[..., 0], axis=1))


def speedups(loss_gd: np.ndarray, loss_adam: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Steps of GD over steps of Adam to the lowest training loss that both reach; (setting, seed)."""
    target = np.maximum(loss_gd.min(axis=-1), loss_adam.min(axis=-1))[..., None]
    taken_gd, taken_adam = (steps[np.argmax(loss <= target, axis=-1)] for loss in (loss_gd, loss_adam))
    return taken_gd / taken_adam


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Attention that sharpens, what it does to the conditioning, and to either optimizer."""
    ratio = {name: np.asarray(saved[f"{name}/log10_mean_ratio"], float) for name in OPTIMIZERS}
    _, accuracy = np.median(saved["Adam/test_accuracy"][:, :, -1], axis=1)
    decade = "orders of magnitude are told apart: one at least"
    chance = "a network that has learned: chance is 0.1"
    yield stated(
        "sharpens",
        "Training on real images drives attention towards sparse maps: the ratio grows by decades",
        "softmax2025talk, experiment (there with a teacher)",
        at_least("decades that the mean ratio grows by, GD", _growth(ratio["GD"]), 1, why=decade),
        at_least("decades that the mean ratio grows by, Adam", _growth(ratio["Adam"]), 1, why=decade),
        at_least("test accuracy, Adam, prompts and values", accuracy, 0.8, why=chance),
    )
    checks, marked = [], np.isin(saved["step"], saved["mark"])
    for name in OPTIMIZERS:
        condition = np.log10(saved[f"{name}/condition"])
        ranks = [rankdata(np.median(curves, axis=1)) for curves in (ratio[name][:, :, marked], condition)]
        monotone, half = np.corrcoef(*ranks)[0, 1], "1 if monotone, 0 if unrelated: more than half"
        checks += [
            at_least(f"decades of the condition number, {name}", _growth(condition), 1, why=decade),
            at_least(f"rank correlation with the ratio, {name}", monotone, 0.5, why=half),
        ]
    yield stated(
        "conditioning",
        "As the attention sharpens, the Gauss-Newton matrix over the prompts becomes ill-conditioned: "
        "its condition number grows by decades along with the ratio",
        "softmax2025talk, theorem on local analysis and experiment, as seen on real images",
        *checks,
    )
    gd, adam = (np.asarray(saved[f"{name}/loss"], float) for name in OPTIMIZERS)
    alone, together = np.min(speedups(gd, adam, saved["step"]), axis=1)
    best = np.stack([saved[f"{name}/best"] for name in OPTIMIZERS])
    last = np.array([len(config.rates[name]) - 1 for name in OPTIMIZERS])[:, None]
    twice = "more than a finer grid of rates could make up for"
    yield qualified(
        "adam",
        "Adam is less affected: it needs fewer than half of gradient descent's steps to a loss that both "
        "reach; with prompts alone the two end in different minima, and some starts are against Adam",
        "softmax2025talk, experiment and answer on Adam",
        condition="the values are trained along with the prompts",
        inside=[
            at_least("prompts and values, steps of GD per step of Adam, worst start", together, 2, why=twice),
            # A best rate at the end of its grid would not be the best.
            every("best rates that lie inside their grid", (best > 0) & (best < last)),
        ],
        outside=[at_most("prompts alone, steps of GD per step of Adam, worst start", alone, 2, why=twice)],
        preset="standard",  # it takes several starts to meet one that is against Adam
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Loss, accuracy, ratio and condition number in both settings, and where the heads look in the end."""
    drawn, axes = plotting.new_figure(3, 4, width=2.8, height=2.5)
    steps, marks = saved["step"], saved["mark"]
    for row, setting in enumerate(SETTINGS):
        loss, accuracy, ratio, condition = axes[row]
        for color, name in zip(("C0", "C1"), OPTIMIZERS, strict=True):
            rate = config.rates[name][saved[f"{name}/best"][row]]
            _band(loss, steps, saved[f"{name}/loss"][row], color, label=f"{name}, rate {rate:.3g}")
            _band(accuracy, steps, saved[f"{name}/test_accuracy"][row], color)
            _band(accuracy, steps, saved[f"{name}/train_accuracy"][row], color, linestyle=":")
            _band(ratio, steps, saved[f"{name}/log10_mean_ratio"][row], color)
            _band(ratio, steps, saved[f"{name}/log10_median_ratio"][row], color, linestyle=":")
            _band(condition, marks, saved[f"{name}/condition"][row], color, label=name, marker="o")
        _finish(axes[row], setting, steps)
    grid = axes[2, 0].get_gridspec()
    for ax in axes[2]:
        ax.remove()
    halves = [drawn.add_subplot(grid[2, :2]), drawn.add_subplot(grid[2, 2:])]
    for ax, name in zip(halves, OPTIMIZERS, strict=True):
        _maps(ax, saved["image"], saved[f"{name}/maps"], config.patch)
        ax.set_title(f"Heads after {name} on prompts and values")
    drawn.colorbar(halves[-1].images[0], ax=halves, label="attention", fraction=0.02, pad=0.01)
    return drawn


def _finish(panels: np.ndarray, setting: str, steps: np.ndarray) -> None:
    """The labels, scales and legends of the four panels of a setting."""
    loss, accuracy, ratio, condition = panels
    for ax, full, dotted in ((accuracy, "test", "training"), (ratio, "mean", "median")):
        ax.plot([], [], color="0.3", label=full)
        ax.plot([], [], color="0.3", linestyle=":", label=dotted)
    low, high = loss.get_ylim()
    loss.set_yscale("log" if low < 0.1 * high else "linear")
    accuracy.set_ylim(0, 1.03)
    condition.set_yscale("log")
    words = (
        ("Loss", "training loss (nats)", "best"),
        ("Accuracy", "accuracy", "lower right"),
        ("Test set", "log10 max / min attention", "upper left"),
        ("Gauss-Newton", "condition number", "upper left"),
    )
    ticks = [0, *(10**power for power in range(1, len(str(steps[-1]))))]
    for ax, (title, ylabel, place) in zip(panels, words, strict=True):
        ax.set_xscale("symlog", linthresh=2 * steps[1])
        ax.set_xticks(ticks, labels=map(str, ticks))
        ax.set(xlabel="step", ylabel=ylabel, xlim=(0, steps[-1]))
        ax.set_title(f"{title}, values {'frozen' if setting == SETTINGS[0] else 'trained'}", fontsize=9)
        ax.legend(loc=place)


def _band(ax: Axes, x: np.ndarray, curves: np.ndarray, color: str, **line: Any) -> None:
    """Median over seeds, for full lines with the span from the smallest to the largest."""
    ax.plot(x, np.median(curves, axis=0), color=color, **{"linewidth": 1.5, "markersize": 3, **line})
    if "linestyle" in line:
        return
    ax.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _maps(ax: Axes, images: np.ndarray, maps: np.ndarray, patch: tuple[int, int]) -> None:
    """One row per image, one column per head: attention as heat, with the digit's outline over it."""
    samples, height, width = images.shape
    heads = maps.shape[1]
    grid = maps.reshape(samples, heads, height // patch[0], width // patch[1])
    heat = grid.repeat(patch[0], axis=2).repeat(patch[1], axis=3)
    outline = np.repeat(images[:, None], heads, axis=1)
    frame = ((0, 0), (0, 0), (0, 1), (0, 1))
    size = (samples * (height + 1), heads * (width + 1))
    heat, outline = (
        np.pad(cells, frame, constant_values=gap).swapaxes(1, 2).reshape(size)
        for cells, gap in ((heat, np.nan), (outline, 0.0))
    )
    ax.imshow(heat, cmap="Oranges", vmin=0, vmax=1)
    ax.contour(outline, levels=[0.5], colors="black", linewidths=0.8)
    ax.set_axis_off()
