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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata

from dynamics.flow import Trajectory
from dynamics.replicator import tangent_basis
from dynamics.spectra import entropy
from models.attention import PromptAttention, attention_log_ratio, attention_logits, log_mean_ratio
from models.data.images import digits, patches
from models.functional import as_function
from models.losses import gauss_newton_spectrum
from models.training import record_steps, train
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.results import Context, Result, Saved

OPTIMIZERS: dict[str, Callable[..., Any]] = {"GD": optax.sgd, "Adam": optax.adam}
SETTINGS = ("prompts alone", "prompts and values")
Predict = Callable[[Any, Any], jax.Array]


@dataclass(frozen=True)
class Config:
    """Images, network and training."""

    train_images: int = 300
    """Images to train on."""
    test_images: int = 200
    """Images to test on."""
    patch: tuple[int, int] = (2, 2)
    """Height and width of a token's patch: `2 2` cuts an image into 16 tokens, `1 8` into its 8 rows."""
    heads: int = 4
    """Heads: prompts, each with a value of its own."""
    batch: int | None = None
    """Images per step; all of them where None."""
    seeds: int = 2
    """Random initializations."""
    steps: int = 200
    """Updates."""
    every: int = 4
    """Steps between two records."""
    rates_gd: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """Learning rates of gradient descent."""
    rates_adam: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Learning rates of Adam."""
    spectra: int = 8
    """Times at which the Gauss-Newton spectrum is taken, evenly spaced in the logarithm of the step."""
    spectrum_images: int = 40
    """Test images that make up the Gauss-Newton matrix."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""


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


@eqx.filter_jit
def prepare(key, images, labels, patch, train_images, test_images, heads, seeds) -> tuple[Any, ...]:
    """Training and test set (images, tokens, labels) in random order; the network and all seeds' starts."""
    k_order, k_start = jax.random.split(key)
    order = jax.random.permutation(k_order, len(images))[: train_images + test_images]
    images, labels = images[order], labels[order]
    tokens = image_tokens(images, patch, train_images)

    def start(key):
        dim, dtype = tokens.shape[-1], tokens.dtype
        return as_function(PromptAttention.standard(key, dim, outputs=10, heads=heads, dtype=dtype))

    whole = (images, tokens, labels)
    training = jax.tree.map(lambda leaf: leaf[:train_images], whole)
    test = jax.tree.map(lambda leaf: leaf[train_images:], whole)
    return training, test, *jax.vmap(start)(jax.random.split(k_start, seeds))


def class_logits(predict: Predict, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits of the classes, (N, 10): the output at the one query."""
    return predict(params, tokens)[:, 0]


def cross_entropy(predict: Predict, params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss, a mean over images."""
    logits = class_logits(predict, params, tokens)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


@eqx.filter_jit
def train_lanes(predict, optimizer, rates, keys, starts, tokens, labels, batch, steps, every) -> Trajectory:
    """Train in both settings, at every rate, from every start; leaves (setting, rate, seed, time, ...)."""

    def lane(train_value, rate, key, start):
        def loss(params, chosen=slice(None)):
            # Values that are held have no gradient, and without one both optimizers leave them alone.
            value = jax.tree.map(
                lambda leaf: jnp.where(train_value, leaf, jax.lax.stop_gradient(leaf)), params["value"]
            )
            params = nnx.State({**params, "value": value})
            return cross_entropy(predict, params, tokens[chosen], labels[chosen])

        def draw(key):
            return jax.random.choice(key, len(labels), (batch,), replace=False)

        batches = {} if batch is None else {"batches": draw, "key": key}
        _, path = train(loss, start, optimizer(rate), steps=steps, every=every, **batches)
        return path

    over_seeds = jax.vmap(lane, in_axes=(None, None, 0, 0))
    over_rates = jax.vmap(over_seeds, in_axes=(None, 0, None, None))
    return jax.vmap(over_rates, in_axes=(0, None, None, None))(jnp.array([False, True]), rates, keys, starts)


@eqx.filter_jit
def measure(predict, params, tokens, labels, test_tokens, test_labels) -> dict[str, jax.Array]:
    """Loss, accuracies and sharpness of the attention for all of many parameters, (..., heads, 1, d)."""

    def one(params):
        log_ratios = attention_log_ratio(params["prompt"][...], test_tokens).reshape(-1)
        attention = jax.nn.softmax(attention_logits(params["prompt"][...], test_tokens), axis=-1)
        right = jnp.argmax(class_logits(predict, params, tokens), axis=-1) == labels
        test_right = jnp.argmax(class_logits(predict, params, test_tokens), axis=-1) == test_labels
        return {
            "loss": cross_entropy(predict, params, tokens, labels),
            "train_accuracy": jnp.mean(right),
            "test_accuracy": jnp.mean(test_right),
            "log10_mean_ratio": log_mean_ratio(log_ratios) / math.log(10),
            "log10_median_ratio": jnp.median(log_ratios) / math.log(10),
            "entropy": jnp.mean(entropy(attention)) / math.log(attention.shape[-1]),
        }

    return _map_lanes(one, params)


@eqx.filter_jit
def condition_numbers(predict, params, tokens) -> jax.Array:
    """Largest over smallest eigenvalue of G^T G / N, G = d logits / d prompts, for all of many parameters."""
    dtype = jnp.result_type(float)  # smaller eigenvalues survive than in the network's own dtype
    params, tokens = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, tokens))

    def one(params):
        def logits(prompt, tokens):
            return class_logits(predict, nnx.State({**params, "prompt": prompt}), tokens)

        spectrum = gauss_newton_spectrum(logits, params["prompt"], tokens)
        return spectrum[0] / spectrum[-1]

    return _map_lanes(one, params)


def _map_lanes(function: Callable[[Any], Any], params: Any) -> Any:
    """Map over all leading axes of the parameters, a few at a time."""
    lanes = params["prompt"].shape[:-3]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lanes) :]), params)
    found = jax.lax.map(function, flat, batch_size=8)
    return jax.tree.map(lambda leaf: leaf.reshape(*lanes, *leaf.shape[1:]), found)


@eqx.filter_jit
def attention_maps(prompts, tokens) -> jax.Array:
    """Attention (setting, image, head, token) of prompts (setting, head, 1, d)."""
    logits = jax.vmap(lambda prompt: attention_logits(prompt, tokens))(prompts)
    return jax.nn.softmax(logits, axis=-1)[:, :, :, 0]


def best_rates(loss: jax.Array) -> np.ndarray:
    """For each setting the index of the rate with the lowest loss, a mean over seeds and the whole run."""
    average = np.mean(np.asarray(loss, float), axis=(2, 3))
    return np.argmin(np.where(np.isfinite(average), average, np.inf), axis=1)


def run(config: Config, context: Context) -> Result:
    """Train with both optimizers in both settings and measure how sharp and how ill-conditioned they end."""
    context.progress("reading the images", 0.0)
    images, labels = digits(config.dtype)
    if config.train_images + config.test_images > len(images):
        raise ValueError(
            f"train_images and test_images must be at most {len(images)} in all, "
            f"got {config.train_images} and {config.test_images}"
        )
    k_data, k_batch = jax.random.split(jax.random.key(context.seed))
    sizes = (config.patch, config.train_images, config.test_images, config.heads, config.seeds)
    training, test, predict, starts = prepare(k_data, images, labels, *sizes)
    keys = jax.random.split(k_batch, config.seeds)
    steps = record_steps(config.steps, config.every)
    marks = np.unique(np.geomspace(1, len(steps), config.spectra).round().astype(int)) - 1
    shown_images = max(2, config.heads // 3)

    def run_optimizer(name, rates, begun):
        context.progress(f"training with {name}", begun)
        rates = jnp.asarray(rates, config.dtype)
        _, tokens, labels = training
        _, test_tokens, test_labels = test
        length = {"batch": config.batch, "steps": config.steps, "every": config.every}
        paths = train_lanes(predict, OPTIMIZERS[name], rates, keys, starts, tokens, labels, **length)
        context.progress(f"measuring {name}", begun + 0.3)
        measured = measure(predict, paths.ys, tokens, labels, test_tokens, test_labels)
        best = best_rates(measured["loss"])
        shown, params = jax.tree.map(
            lambda leaf: np.asarray(leaf)[np.arange(len(SETTINGS)), best], (measured, paths.ys)
        )
        at_marks = jax.tree.map(lambda leaf: leaf[:, :, marks], params)
        return {
            **shown,
            "condition": condition_numbers(predict, at_marks, test_tokens[: config.spectrum_images]),
            "maps": attention_maps(params["prompt"][...][:, 0, -1], test_tokens[:shown_images]),
            "rates": rates,
            "best": best,
            "loss_of_rates": measured["loss"],
        }

    runs = {
        "GD": run_optimizer("GD", config.rates_gd, 0.05),
        "Adam": run_optimizer("Adam", config.rates_adam, 0.5),
    }
    data = {"steps": steps, "marks": marks, "images": test[0][:shown_images], "runs": runs}
    claims = (_sharpens(runs), _conditioning(runs, marks), _adam(runs, steps))
    dims = {
        f"runs/{name}/{quantity}": ("setting", "seed", "time")
        for name in runs
        for quantity in ("loss", "train_accuracy", "test_accuracy", "log10_mean_ratio", "log10_median_ratio")
    }
    return Result(data, claims, {**dims, "steps": ("time",)})


def _growth(curves: Any) -> np.ndarray:
    """Last minus first along time, median over seeds: one number per setting."""
    curves = np.asarray(curves, float)
    return np.median(curves[..., -1] - curves[..., 0], axis=1)


def _sharpens(runs: Any) -> Claim:
    grown = {name: np.min(_growth(runs[name]["log10_mean_ratio"])) for name in runs}
    accuracy = np.median(np.asarray(runs["Adam"]["test_accuracy"])[1, :, -1])
    return Claim(
        "replicator.digits/sharpens",
        "Training on real images drives attention towards sparse maps: the ratio grows by decades",
        "softmax2025talk, experiment (there with a teacher)",
        "stated",
        [
            # Ratios are told apart in orders of magnitude: one at least, in both settings.
            Check("decades that the mean ratio grows by, GD", "at least", 1.0, grown["GD"]),
            Check("decades that the mean ratio grows by, Adam", "at least", 1.0, grown["Adam"]),
            # Far from chance, 0.1, so that it is a network that has learned whose attention is looked at.
            Check("test accuracy, Adam, prompts and values", "at least", 0.8, accuracy),
        ],
    )


def _conditioning(runs: Any, marks: np.ndarray) -> Claim:
    checks = []
    for name, saved in runs.items():
        ratio = np.asarray(saved["log10_mean_ratio"], float)[:, :, marks]
        condition = np.log10(np.asarray(saved["condition"], float))
        ranks = [rankdata(np.median(curves, axis=1)) for curves in (ratio, condition)]
        checks += [
            # Orders of magnitude are told apart by decades: one at least, in both settings.
            Check(f"decades of the condition number, {name}", "at least", 1.0, np.min(_growth(condition))),
            # One is a monotone relation, zero is none: more than half of the way.
            Check(f"rank correlation with the ratio, {name}", "at least", 0.5, np.corrcoef(*ranks)[0, 1]),
        ]
    return Claim(
        "replicator.digits/conditioning",
        "As the attention sharpens, the Gauss-Newton matrix over the prompts becomes ill-conditioned: "
        "its condition number grows by decades along with the ratio",
        "softmax2025talk, theorem on local analysis and experiment, as seen on real images",
        "stated",
        checks,
    )


def speedups(loss_gd: np.ndarray, loss_adam: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Steps of GD over steps of Adam to the lowest training loss that both reach; (setting, seed)."""
    target = np.maximum(loss_gd.min(axis=-1), loss_adam.min(axis=-1))[..., None]
    taken_gd, taken_adam = (steps[np.argmax(loss <= target, axis=-1)] for loss in (loss_gd, loss_adam))
    return taken_gd / taken_adam


def _adam(runs: Any, steps: np.ndarray) -> Claim:
    loss_gd, loss_adam = (np.asarray(runs[name]["loss"], float) for name in OPTIMIZERS)
    alone, together = np.min(speedups(loss_gd, loss_adam, steps), axis=1)
    inside = [(run["best"] > 0) & (run["best"] < len(run["rates"]) - 1) for run in runs.values()]
    return Claim(
        "replicator.digits/adam",
        "Adam is less affected: it needs fewer than half of gradient descent's steps to a loss that both "
        "reach; with prompts alone the two end in different minima, and some starts are against Adam",
        "softmax2025talk, experiment and answer on Adam",
        "qualified",
        [
            # A factor of two at each one's best rate is more than a finer grid of rates could make up for.
            Check("prompts and values, steps of GD per step of Adam, worst start", "at least", 2.0, together),
            Check("prompts alone, steps of GD per step of Adam, worst start", "at most", 2.0, alone),
            # A best rate at the end of its grid would not be the best.
            Check("best rates that lie inside their grid", "all of", 4, np.sum(inside)),
        ],
        condition="the values are trained along with the prompts",
        preset="standard",  # it takes several starts to meet one that is against Adam
    )


def figure(saved: Saved) -> Figure:
    """Loss, accuracy, ratio and condition number in both settings, and where the heads look in the end."""
    drawn, axes = plotting.new_figure(3, 4, width=3.0, height=2.5)
    steps, marks = saved["steps"], saved["marks"]
    for row, setting in enumerate(SETTINGS):
        loss, accuracy, ratio, condition = axes[row]
        for color, name in zip(("C0", "C1"), OPTIMIZERS, strict=True):

            def curves(quantity, path=f"runs/{name}", row=row):
                return saved[f"{path}/{quantity}"][row]

            rate = saved[f"runs/{name}/rates"][curves("best")]
            _band(loss, steps, curves("loss"), color, label=f"{name}, rate {rate:.3g}")
            _band(accuracy, steps, curves("test_accuracy"), color)
            _band(accuracy, steps, curves("train_accuracy"), color, linestyle=":")
            _band(ratio, steps, curves("log10_mean_ratio"), color)
            _band(ratio, steps, curves("log10_median_ratio"), color, linestyle=":")
            _band(condition, steps[marks], curves("condition"), color, label=name, marker="o")
        for ax, full, dotted in ((accuracy, "test", "training"), (ratio, "mean", "median")):
            ax.plot([], [], color="0.3", label=full)
            ax.plot([], [], color="0.3", linestyle=":", label=dotted)
        low, high = loss.get_ylim()
        loss.set(ylabel="training loss (nats)", **({"yscale": "log"} if low < 0.1 * high else {}))
        loss.set_title(f"Loss: {setting}")
        accuracy.set(ylim=(0, 1.03), ylabel="accuracy")
        accuracy.set_title("Accuracy")
        ratio.set(ylabel="log10 max / min attention")
        ratio.set_title("Attention ratio, test set")
        condition.set(yscale="log", ylabel="condition number")
        condition.set_title("Gauss-Newton, prompts")
        for ax, place in zip(axes[row], ("best", "lower right", "upper left", "upper left"), strict=True):
            ax.set_xscale("symlog", linthresh=2 * steps[1])
            ticks = [0, *(10**power for power in range(1, len(str(steps[-1]))))]
            ax.set_xticks(ticks, labels=map(str, ticks))
            ax.set(xlabel="step", xlim=(0, steps[-1]))
            ax.legend(loc=place)

    grid = axes[2, 0].get_gridspec()
    for ax in axes[2]:
        ax.remove()
    halves = [drawn.add_subplot(grid[2, :2]), drawn.add_subplot(grid[2, 2:])]
    for ax, name in zip(halves, OPTIMIZERS, strict=True):
        _maps(ax, saved["images"], saved[f"runs/{name}/maps"][1], saved.config["patch"])
        ax.set_title(f"Heads after {name} on {SETTINGS[1]}")
    drawn.colorbar(halves[-1].images[0], ax=halves, label="attention", fraction=0.02, pad=0.01)
    return drawn


def _band(ax: Axes, x: np.ndarray, curves: np.ndarray, color: str, **line: Any) -> None:
    """Median over seeds, for full lines with the span from the smallest to the largest."""
    ax.plot(x, np.median(curves, axis=0), color=color, **{"linewidth": 1.5, "markersize": 3, **line})
    if "linestyle" in line:
        return
    ax.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _maps(ax: Axes, images: np.ndarray, maps: np.ndarray, patch: list[int]) -> Axes:
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
    return ax
