"""GaLore with Adafactor inside, and LoRA from a checkpoint: small runs on images of digits.

Adafactor keeps its second moments as a row and a column; with a first moment its state is as large as the
matrix, and GaLore projects that as well. For LoRA a network is first trained on upright images. The second
task is on mixtures of the upright image and the transposed one, near the first where the transposed share is
small, far from it where that is all. LoRA is trained beside all parameters, from the checkpoint and from
random weights. Each learning rate is the one with the smallest error on images of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.classifier import Classifier, is_hidden
from models.data.images import digits
from models.functional import as_function
from models.galore import galore, scale_by_galore
from models.losses import cross_entropy
from models.lowrank import lora_params, on_factors, on_trained
from models.training import record_steps, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, qualified, quoted, stated
from sims.ranges import Count, Length, Positive, Range, Share, check_ranges
from sims.results import Context, Saved

SCALE = 0.25  # of GaLore; the matrices of Adafactor move at this share of the learning rate as well
OPTIMIZERS = {"adafactor": "Adafactor, split rates", "galore": "GaLore, Adafactor inside"}
TASKS, STARTS = ("near", "far"), ("random", "checkpoint")
FIRST_RATE = 1e-2  # of Adam, for the checkpoint
# Errors of such a network, for standard errors that are known before the run: after all first images, and
# after the few of the second task.
EXPECTED, EXPECTED_FEW = 0.03, 0.08
PAPER = "zhao2024galore"
# What is printed on fine-tuning: the statement, and what a test would take.
QUOTED = {
    "SQuAD": (
        "BERT-base on SQuAD at rank 16: exact match 80.52 and F1 88.29 with GaLore, 77.99 and 86.11 with "
        "LoRA, 80.83 and 88.41 with all parameters",
        "the pretrained weights of BERT-base, and SQuAD",
    ),
    "Oaast-SFT": (
        "Perplexities of Gemma-2b, Phi-2 and LLaMA-7B on Oaast-SFT at rank 128: 4.51, 3.83 and 2.95 with "
        "GaLore, 4.56, 4.24 and 2.94 with LoRA, 4.53, 3.81 and 2.98 with all parameters",
        "the weights of the three models, the data, and a GPU that all parameters of 7B can be trained on",
    ),
    "Belle-1M": (
        "Perplexities of Gemma-2b, Phi-2 and LLaMA-7B on Belle-1M at rank 128: 5.35, 2.62 and 2.28 with "
        "GaLore, 5.37, 2.75 and 2.30 with LoRA, 5.44, 2.66 and 2.27 with all parameters",
        "the weights of the three models, the data, and a GPU that all parameters of 7B can be trained on",
    ),
}


@dataclass(frozen=True)
class Config:
    """Images, network and training."""

    first_images: Count = 600
    """Images of the first task: those of Adafactor, and of the checkpoint."""
    train_images: Count = 200
    """Images of the second task to train on."""
    validation_images: Count = 297
    """Images that learning rates are chosen on."""
    test_images: Count = 700
    """Images to test on."""
    width: Count = 128
    """Nodes of each of the two hidden layers."""
    rank: Count = 16
    """Rank of GaLore."""
    update_gap: Count = 50
    """Steps between two bases of GaLore."""
    near: Share = 0.3
    """Share of the transposed image in the near task."""
    ranks: Annotated[tuple[Count, ...], Length(1)] = (1, 4, 16)
    """Ranks of LoRA, in rising order; the claims are on the first."""
    galore_rates: Annotated[tuple[Positive, ...], Length(1)] = (1e-2, 3e-2, 1e-1, 3e-1)
    """Grid of learning rates of Adafactor and GaLore; each falls to a tenth over the run, by a cosine."""
    lora_rates: Annotated[tuple[Positive, ...], Length(1)] = (3e-3, 1e-2, 3e-2)
    """Grid of learning rates of Adam on the second task."""
    seeds: Annotated[int, Range(at_least=2)] = 6
    """Cuts of the images, starts and orders of batches."""
    batch: Count = 64
    """Images per step, drawn with replacement."""
    steps: Count = 400
    """Updates."""
    every: Count = 20
    """Steps between two records of the training loss."""

    def __post_init__(self):
        check_ranges(self)
        if list(self.ranks) != sorted(set(self.ranks)):
            raise ValueError(f"ranks must rise, got {self.ranks}")
        wanted = self.first_images + self.train_images + self.validation_images + self.test_images
        if wanted > 1797:
            raise ValueError(f"images of all parts must be 1797 at most, got {wanted}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(
        width=32, rank=4, ranks=(1,), galore_rates=(1e-2,), lora_rates=(1e-2,), seeds=2, steps=100
    ),
    "standard": Config(),
    "paper": Config(ranks=(1, 2, 4, 8, 16), seeds=20),
}


class Seed(NamedTuple):
    """All that is drawn at random: a start, parts of the images by place, batches (steps, batch)."""

    params: Any
    first: Any
    training: Any
    validation: Any
    test: Any
    first_batches: Any
    batches: Any
    key: Any


def _adafactor() -> optax.GradientTransformation:
    """Adafactor with a first moment, without learning rate and the parameters' scale."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
        optax.ema(0.9, debias=False),
    )


def _optimizer(config: Config, name: str, rate: Any) -> optax.GradientTransformation:
    falling = optax.cosine_decay_schedule(rate, config.steps, 0.1)
    if name == "galore":
        rest: Any = {"inner": _adafactor(), "plain": _adafactor()}
        return galore(falling, config.rank, update_gap=config.update_gap, scale=SCALE, **rest)

    def split(path, update):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return SCALE * update if is_hidden(name, update) else update

    splitting = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(split, updates))
    return optax.chain(_adafactor(), splitting, optax.scale_by_learning_rate(falling))


def _loss(predict: Any, images: Array, labels: Array, params: Any, places: Array) -> Array:
    """Cross-entropy on the images at these places."""
    return cross_entropy(params, (predict, images[places], labels[places]))


def _error(predict: Any, images: Array, labels: Array, params: Any, places: Array) -> Array:
    """Share of the images at these places that are taken for another digit."""
    return jnp.mean(jnp.argmax(predict(params, images[places]), axis=-1) != labels[places])


def _mixed(images: Array, share: Any) -> Array:
    """Flat images with a share of the transposed ones in them."""
    return ((1 - share) * images + share * images.mT).reshape(len(images), -1)


@eqx.filter_jit
def _with_adafactor(config: Config, name: str, network: Any, seeds: Seed, rates: Array) -> tuple[Any, ...]:
    """Loss (rate, seed, step), and errors on the second and third part (rate, seed)."""
    predict, images, labels = network
    task = (predict, _mixed(images, 0.0), labels)

    def one(rate, seed):
        loss, optimizer = Partial(_loss, *task), _optimizer(config, name, rate)
        settings: Any = {"steps": config.steps, "every": config.every, "batches": seed.first_batches}
        params, path = train(loss, seed.params, optimizer, observe=lambda p: loss(p, seed.first), **settings)
        # A run that blew up has learned nothing.
        errors = (_error(*task, params, part) for part in (seed.validation, seed.test))
        return path.ys, *(jnp.where(path.ok, error, 1.0) for error in errors)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rates, seeds)


@eqx.filter_jit
def _checkpoint(config: Config, network: Any, seeds: Seed, shares: Array) -> tuple[Any, Array]:
    """Networks after the first task, and their errors (task, seed) on the second ones."""
    predict, images, labels = network
    optimizer = optax.adam(optax.cosine_decay_schedule(FIRST_RATE, config.steps, 0.1))

    def one(seed):
        loss = Partial(_loss, predict, _mixed(images, 0.0), labels)
        settings: Any = {"steps": config.steps, "every": config.steps, "observe": lambda params: 0.0}
        params, _ = train(loss, seed.params, optimizer, batches=seed.first_batches, **settings)

        def error(share):
            return _error(predict, _mixed(images, share), labels, params, seed.test)

        return params, jax.vmap(error)(shares)

    params, errors = jax.vmap(one)(seeds)
    return params, errors.T


@eqx.filter_jit
def _second_task(config: Config, network: Any, starts: Any, seeds: Seed, shares: Array, rates: Array) -> Any:
    """Errors (rate, task, start, seed) on the second part and the third, of what the starts train."""
    predict, images, labels = network

    def one(rate, share, params, seed):
        task = (predict, _mixed(images, share), labels)
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, config.steps, 0.1))
        if hasattr(params, "frozen"):
            optimizer = on_trained(optimizer)
        settings: Any = {"steps": config.steps, "every": config.steps, "observe": lambda params: 0.0}
        params, path = train(Partial(_loss, *task), params, optimizer, batches=seed.batches, **settings)
        errors = (_error(*task, params, part) for part in (seed.validation, seed.test))
        return tuple(jnp.where(path.ok, error, 1.0) for error in errors)

    lanes = jax.vmap(one, (None, None, 0, 0))
    for axes in ((None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        lanes = jax.vmap(lanes, axes)
    return lanes(rates, shares, starts, seeds)


@partial(jax.jit, static_argnums=0)
def _build(config: Config, keys: Array) -> tuple[Any, Any]:
    def one(key):
        return as_function(Classifier(key, 64, config.width, "float32"))

    return jax.vmap(one)(keys)


def _prepare(config: Config, seed: int) -> tuple[tuple[Any, Array, Array], Seed]:
    """The network as a function, with all images and labels; and all seeds."""
    images, labels = digits("float32")
    generators = [np.random.default_rng([seed, index]) for index in range(config.seeds)]
    order = np.stack([generator.permutation(len(images)) for generator in generators])
    sizes = (config.first_images, config.train_images, config.validation_images, config.test_images)
    *parts, _ = np.split(order, np.cumsum(sizes), axis=1)
    size = (config.steps, config.batch)
    batches = [
        np.stack([generator.choice(own, size) for generator, own in zip(generators, part, strict=True)])
        for part in parts[:2]
    ]
    keys = jax.random.split(jax.random.key(seed), config.seeds)
    predict, params = _build(config, keys)
    places = [jnp.asarray(part, jnp.int32) for part in (*parts, *batches)]
    return (on_factors(predict), images, labels), Seed(params, *places, key=keys)


def _chosen(validation: Any, *found: Any) -> list[np.ndarray]:
    """Of arrays (rate, ..., seed) those at the rate with the smallest mean error on the second part."""
    best = np.argmin(np.mean(validation, axis=-1), axis=0)[None, ..., None]
    return [np.take_along_axis(np.asarray(part), best, axis=0)[0] for part in found]


def _hidden_numbers(config: Config, params: Any) -> tuple[int, int]:
    """Numbers in the state of the hidden matrices, GaLore with Adafactor inside: kept, and by a formula."""
    named = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda leaf: leaf[0], params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}
    hidden = {name: leaf for name, leaf in names.items() if is_hidden(name, leaf)}
    optimizer = scale_by_galore(config.rank, inner=_adafactor())
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, hidden))
    kept = sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    sides = [(min(leaf.shape), max(leaf.shape)) for leaf in hidden.values()]
    ranks = [min(config.rank, m) for m, _ in sides]
    # Optax has an empty second moment besides, of one number.
    return kept, sum(m * r + r * n + r + n + 1 for r, (m, n) in zip(ranks, sides, strict=True))


def run(config: Config, context: Context) -> dict:
    """Train with Adafactor alone and inside of GaLore; then checkpoints, and the second tasks from them."""
    network, seeds = _prepare(config, context.seed)
    rates, found = jnp.asarray(config.galore_rates, "float32"), []
    for index, (name, label) in enumerate(OPTIMIZERS.items()):
        context.progress(f"training: {label}", 0.15 * index)
        found.append(jax.device_get(_with_adafactor(config, name, network, seeds, rates)))
    losses, validation, tests = zip(*found, strict=True)
    best = [int(np.argmin(errors.mean(axis=1))) for errors in validation]

    context.progress("training the checkpoints", 0.3)
    shares = jnp.asarray([config.near, 1.0], "float32")
    checkpoint, before = _checkpoint(config, network, seeds, shares)
    starts = jax.tree.map(lambda *leaves: np.stack(leaves), seeds.params, checkpoint)
    adam_rates, errors = jnp.asarray(config.lora_rates, "float32"), []
    for index, rank in enumerate((None, *config.ranks)):
        context.progress(f"second task: rank {rank}" if rank else "second task", 0.4 + 0.15 * index)
        trained = starts if rank is None else _adapted(starts, seeds.key, rank)
        second = jax.device_get(_second_task(config, network, trained, seeds, shares, adam_rates))
        errors += _chosen(second[0], second[1])
    kept, formula = _hidden_numbers(config, seeds.params)
    return {
        "optimizer": ("optimizer", np.array(list(OPTIMIZERS))),
        "rate": ("rate", np.array(config.galore_rates)),
        "step": ("step", record_steps(config.steps, config.every)),
        "loss": ("optimizer seed step", [loss[one] for loss, one in zip(losses, best, strict=True)]),
        "validation": ("optimizer rate seed", list(validation)),
        "test": ("optimizer seed", [test[one] for test, one in zip(tests, best, strict=True)]),
        "numbers": {"kept": kept, "formula": formula},
        "task": ("task", np.array(TASKS)),
        "start": ("start", np.array(STARTS)),
        "rank": ("rank", np.array(config.ranks)),
        "before": ("task seed", before),
        "full": ("task start seed", errors[0]),
        "lora": ("rank task start seed", errors[1:]),
    }


@partial(jax.jit, static_argnames="rank")
def _adapted(starts: Any, keys: Array, rank: int) -> Any:
    """LoRA of the hidden matrices, from all starts and seeds."""

    def one(params, key):
        return lora_params(params, lambda path, leaf: rank if is_hidden(path, leaf) else None, key)

    return jax.vmap(jax.vmap(one), (0, None))(starts, keys)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """GaLore with Adafactor inside, the size of its state, LoRA from a checkpoint, and what is quoted."""
    alone, inside = saved["test"].mean(axis=-1)
    noise = 2 * (EXPECTED * (1 - EXPECTED) / config.test_images) ** 0.5
    why = "two standard errors of one test set"
    yield stated(
        "adafactor",
        f"GaLore of rank {config.rank} with Adafactor inside trains as well as Adafactor alone, as far as a "
        "test set can tell",
        f"{PAPER}, the talk's slide on Adafactor (on a small classifier)",
        at_most("GaLore with Adafactor minus Adafactor: test error", inside - alone, noise, why=why),
        at_most("test error of Adafactor alone", alone, 2 * EXPECTED, why="it has learned the task"),
        preset="standard",
    )
    yield stated(
        "adafactor-state",
        "With Adafactor and its first moment inside, GaLore keeps m r + r n + r + n numbers of a matrix "
        "(m, n), m <= n, where Adafactor keeps m n + m + n",
        "derived here",
        equals(
            "numbers kept of the hidden matrices, one for an empty moment each",
            saved["numbers/kept"],
            saved["numbers/formula"],
            why="numbers are counted",
        ),
    )
    yield _lora(config, saved)
    for name, (statement, needs) in QUOTED.items():
        yield quoted(
            name.lower(), statement, f"{PAPER}, the talk's slide on fine-tuning ({name})", needs=needs
        )


def _lora(config: Config, saved: Saved) -> Claim:
    lora = saved["lora"][0].mean(axis=-1)  # (task, start)
    excess = lora - saved["full"].mean(axis=-1)
    variance = EXPECTED_FEW * (1 - EXPECTED_FEW) / config.test_images
    noise = 2 * (2 * variance / config.seeds) ** 0.5
    why = "two standard errors of a difference of two means over seeds"
    label = f"rank {config.ranks[0]}, test error less that of all parameters"
    gained = saved["before"].mean(axis=-1)[0] - lora[0, 1]
    return qualified(
        "lora-checkpoint",
        "LoRA fails from random weights and works from pretrained ones",
        f"{PAPER}, the talk's slide on LoRA (on a small classifier)",
        condition="the new task is near the one of the checkpoint",
        inside=[
            at_most(f"near task, from the checkpoint: {label}", excess[0, 1], noise, why=why),
            at_least("near task, from random weights: the same", excess[0, 0], noise, why=why),
            at_least("near task: what LoRA takes off the checkpoint's error", gained, 0.1, why="it learns"),
        ],
        outside=[at_least("far task, from the checkpoint: the same", excess[1, 1], noise, why=why)],
        preset="standard",
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Loss and choice of rates with Adafactor, and errors of LoRA over its rank, near and far."""
    drawn, ((losses, choice), (near, far)) = plotting.new_figure(2, 2, width=4.8, height=3.4)
    curves = zip(OPTIMIZERS.values(), saved["loss"], saved["validation"], saved["test"], strict=True)
    for index, (label, loss, validation, test) in enumerate(curves):
        name = f"{label}: test error {100 * test.mean():.1f} %"
        losses.semilogy(saved["step"], loss.mean(axis=0), color=f"C{index}", label=name)
        choice.plot(saved["rate"], 100 * validation.mean(axis=-1), "o-", color=f"C{index}", label=label)
    plotting.finish(
        losses, f"Adafactor, GaLore of rank {config.rank}", "step", "cross-entropy (nats)", "best"
    )
    plotting.finish(
        choice, "Choice of the learning rate", "learning rate", "validation error (%)", "best", xscale="log"
    )
    plotting.label_ticks(choice, saved["rate"])
    for index, (ax, share) in enumerate(((near, config.near), (far, 1.0))):
        _draw_lora(ax, index, saved)
        title = f"{TASKS[index].capitalize()} task: {100 * share:.0f} % transposed"
        plotting.finish(ax, title, "rank of LoRA", "test error (%)")
        plotting.make_room(ax, above=0.45)
        ax.legend(loc="upper left", ncols=2, fontsize=8)
    return drawn


def _draw_lora(ax: Axes, task: int, saved: Saved) -> None:
    lora, full = 100 * saved["lora"][:, task], 100 * saved["full"][task]
    for start, (name, color) in enumerate(zip(STARTS, ("C1", "C0"), strict=True)):
        spread = {"yerr": lora[:, start].std(axis=-1, ddof=1), "marker": "o", "capsize": 2}
        ax.errorbar(saved["rank"], lora[:, start].mean(axis=-1), color=color, label=f"LoRA, {name}", **spread)
        style: Any = {"color": color, "linestyle": "--", "label": f"all parameters, {name}"}
        ax.axhline(full[start].mean(), **style)
    ax.set_xscale("log")
    plotting.label_ticks(ax, saved["rank"])
