"""A classifier of real images: Adam, GaLore, LoRA, ReLoRA and W = A B; error, optimizer state, step time.

A multilayer perceptron is trained from scratch with every method, at every learning rate of one grid and
from several seeds, in one program per method. A seed is a cut of the images into three parts, a start and
an order of batches, the same for all methods. A method's rate is the one with the smallest error on the
second part, and its error is measured on the third. GaLore moves its matrices at its scale, a quarter, times
the learning rate; so Adam is trained at one rate and at rates split in the same way. Adam has no gradient
flow: the axis is the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from models.data.images import digits, mnist
from models.functional import as_function
from models.galore import galore, scale_by_adam_8bit, state_bytes
from models.losses import cross_entropy
from models.lowrank import lora_params, low_rank_params, merge, on_factors, on_trained, relora
from models.memory import full_rank_memory, galore_memory, lora_memory
from models.training import record_steps, train
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.results import Context, Result, Saved

Method = Literal["adam", "split_adam", "galore", "galore_8bit", "lora", "relora", "low_rank"]
# Name, colour and marker of each.
LOOKS: dict[Method, tuple[str, str, str]] = {
    "adam": ("Adam", "black", "s"),
    "split_adam": ("Adam, split rates", "C6", "D"),
    "galore": ("GaLore", "C0", "o"),
    "galore_8bit": ("GaLore, 8-bit", "C5", "h"),
    "lora": ("LoRA", "C1", "v"),
    "relora": ("ReLoRA", "C4", "^"),
    "low_rank": ("W = AB", "C2", "X"),
}
SETS = {"digits": "Digits", "mnist": "MNIST"}
SWEPT: tuple[Method, ...] = ("galore", "lora", "low_rank")
SCALE = 0.25  # of GaLore
EXPECTED_ERROR = 0.03  # of such a network on the digits, for standard errors that are known before the run


@dataclass(frozen=True)
class Config:
    """Images, network, methods and training."""

    data: Literal["digits", "mnist"] = "digits"
    """Images: digits that come with scikit-learn, or MNIST from --data-dir."""
    train_images: int = 800
    """Images to train on."""
    validation_images: int = 297
    """Images that learning rates are chosen on."""
    test_images: int = 700
    """Images to test on."""
    width: int = 128
    """Nodes of each of the two hidden layers."""
    methods: tuple[Method, ...] = get_args(Method)
    """Methods; adam, split_adam, galore, lora and low_rank at least."""
    rank: int = 16
    """Rank of all methods that have one."""
    update_gap: int = 50
    """Steps between two bases of GaLore."""
    restart_every: int = 100
    """Steps between two restarts of ReLoRA."""
    restart_warmup: int = 10
    """Steps over which ReLoRA's learning rate grows after a restart."""
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Ranks of the sweep, in rising order, the rank itself among them."""
    gaps: tuple[int, ...] = (1, 10, 50, 600)
    """Gaps of the sweep."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Grid of learning rates, in rising order; each falls to a tenth over the run, by a cosine."""
    seeds: int = 4
    """Cuts of the images, starts and orders of batches."""
    batch: int = 64
    """Images per step, drawn with replacement."""
    steps: int = 600
    """Updates."""
    every: int = 30
    """Steps between two records of the training loss."""
    timings: int = 100
    """Steps that are timed, of every method; none where 0."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, got {self.seeds}")
        missing = {"adam", "split_adam", *SWEPT} - set(self.methods)
        if missing:
            raise ValueError(f"methods must have {sorted(missing)} among them, got {self.methods}")
        for name in ("ranks", "learning_rates"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must rise, got {values}")
        if self.rank not in self.ranks:
            raise ValueError(f"ranks must have rank = {self.rank} among them, got {self.ranks}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(
        width=64,
        methods=("adam", "split_adam", *SWEPT),
        rank=8,
        ranks=(8,),
        gaps=(),
        learning_rates=(1e-2, 3e-2),
        seeds=2,
        steps=150,
        every=15,
        timings=0,
    ),
    "standard": Config(),
    "paper": Config(
        data="mnist",
        train_images=50_000,
        validation_images=10_000,
        test_images=10_000,
        width=512,
        rank=64,
        update_gap=200,
        restart_every=1000,
        restart_warmup=100,
        ranks=(4, 16, 64, 256),
        gaps=(1, 10, 50, 200, 10_000),
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        batch=128,
        steps=10_000,
        every=100,
    ),
}


class Classifier(nnx.Module):
    """Two hidden layers and a head, with biases."""

    def __init__(self, key: Array, inputs: int, width: int, dtype: Any):
        linear = partial(nnx.Linear, rngs=nnx.Rngs(key), dtype=dtype, param_dtype=dtype)
        self.hidden = nnx.List([linear(inputs, width), linear(width, width)])
        self.head = linear(width, 10)

    def __call__(self, images: Array) -> Array:
        """Logits (N, 10) of flat images (N, inputs)."""
        for layer in self.hidden:
            images = nnx.relu(layer(images))
        return self.head(images)


class Job(NamedTuple):
    """A method with its rank and its gap: what one program is made for."""

    method: Method
    rank: int
    gap: int


class Trained(NamedTuple):
    """Of all lanes and seeds (lane, seed): training loss (..., time), and errors at the end."""

    loss: Any
    validation: Any
    test: Any


def is_hidden(path: str, leaf: Any) -> bool:
    """Whether a parameter is a matrix of a hidden layer: those are what the methods differ in."""
    return path.startswith("hidden") and leaf.ndim == 2


def start_of(job: Job, params: Any, key: Array) -> Any:
    """The parameters that a method trains, from those of the model."""

    def rank(path, leaf):
        return job.rank if is_hidden(path, leaf) else None

    if job.method == "low_rank":
        return low_rank_params(params, rank)
    return lora_params(params, rank, key) if job.method in ("lora", "relora") else params


def optimizer_of(config: Config, job: Job, lane: Any, key: Array) -> optax.GradientTransformation:
    """A method's optimizer; a lane is a learning rate and, for Adam, a factor of that of hidden matrices."""
    rate, factor = lane
    falling = optax.cosine_decay_schedule(rate, config.steps, 0.1)

    def restarted(step):
        return falling(step) * jnp.minimum(1, (step % config.restart_every + 1) / config.restart_warmup)

    def split(path, update):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return factor * update if is_hidden(name, update) else update

    if job.method in ("galore", "galore_8bit"):
        # The matrices of this network are small: in 8 bits is all that fills a block.
        inner = scale_by_adam_8bit(min_size=256) if job.method == "galore_8bit" else None
        return galore(falling, job.rank, update_gap=job.gap, scale=SCALE, inner=inner)
    if job.method == "lora":
        return on_trained(optax.adam(falling))
    if job.method == "relora":
        return relora(optax.adam(restarted), config.restart_every, key)
    if job.method == "low_rank":
        return optax.adam(falling)
    splitting = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(split, updates))
    return optax.chain(optax.adam(falling), splitting)


class Seed(NamedTuple):
    """All that is drawn at random: the start, the three parts of the images, the batches (steps, batch).

    Images are listed by their places. Everything has the seeds in front, (seed, ...).
    """

    params: Any
    training: Any
    validation: Any
    test: Any
    batches: Any
    key: Any


@partial(jax.jit, static_argnums=(0, 1))
def build(config: Config, inputs: int, keys: Array) -> tuple[Any, Any]:
    """The network as a function, of models that are a product of factors as well, and its starts."""

    def one(key):
        return as_function(Classifier(key, inputs, config.width, config.dtype))

    predict, params = jax.vmap(one)(keys)
    return on_factors(predict), params


def draw(config: Config, count: int, inputs: int, seed: int) -> tuple[Any, Seed]:
    """The network as a function, and all seeds."""
    # What is drawn by NumPy needs no compiling.
    generators = [np.random.default_rng([seed, index]) for index in range(config.seeds)]
    order = np.stack([generator.permutation(count) for generator in generators])
    training, validation, test = np.split(
        order[:, : config.train_images + config.validation_images + config.test_images],
        np.cumsum([config.train_images, config.validation_images]),
        axis=1,
    )
    size = (config.steps, config.batch)
    chosen = np.stack(
        [generator.choice(own, size) for generator, own in zip(generators, training, strict=True)]
    )
    keys = jax.random.split(jax.random.key(seed), config.seeds)
    predict, params = build(config, inputs, keys)
    training, validation, test, chosen = (
        jnp.asarray(part, jnp.int32) for part in (training, validation, test, chosen)
    )
    return predict, Seed(params, training, validation, test, chosen, keys)


def loss_on(predict: Any, images: Array, labels: Array, params: Any, places: Array) -> Array:
    """Cross-entropy on the images at these places."""
    return cross_entropy(params, (predict, images[places], labels[places]))


@eqx.filter_jit
def train_lanes(config: Config, job: Job, loss: Any, starts: Any, seeds: Seed, lanes: Array) -> Any:
    """Train in all lanes from all seeds: full matrices, and losses, of runs (lane, seed)."""

    def one(lane, start, seed):
        params, path = train(
            loss,
            start,
            optimizer_of(config, job, lane, seed.key),
            steps=config.steps,
            every=config.every,
            observe=lambda params: loss(params, seed.training[:2000]),
            batches=seed.batches,
        )
        return merge(params), path

    each_seed = jax.vmap(one, in_axes=(None, 0, 0))
    return jax.vmap(each_seed, in_axes=(0, None, None))(lanes, starts, seeds)


@eqx.filter_jit
def errors(predict: Any, images: Array, labels: Array, params: Any, places: Array) -> Array:
    """Part of the images at these places (seed, N) that networks (lane, seed, ...) get wrong."""

    def one(params, places):
        return jnp.mean(jnp.argmax(predict(params, images[places]), axis=-1) != labels[places])

    return jax.vmap(lambda params: jax.vmap(one)(params, places))(params)


@partial(jax.jit, static_argnums=(0, 1))
def one_step(config: Config, job: Job, loss: Any, params: Any, state: Any, places: Any, key: Array) -> Any:
    """One update of one network, as it is timed."""
    gradient = jax.grad(loss)(params, places)
    optimizer = optimizer_of(config, job, (config.learning_rates[0], SCALE), key)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def read(config: Config, context: Context) -> tuple[Array, Array]:
    """All images, flat, and their labels; the parts of MNIST are put together and cut anew."""
    if config.data == "digits":
        images, labels = digits(config.dtype)
    else:
        parts = [mnist(context.data_dir, split, config.dtype) for split in ("train", "test")]
        images, labels = (jnp.concatenate(both) for both in zip(*parts, strict=True))
    wanted = config.train_images + config.validation_images + config.test_images
    if min(config.train_images, config.validation_images, config.test_images) < 1 or wanted > len(images):
        raise ValueError(f"images to train, validate and test on must be {len(images)} at most, got {wanted}")
    return images.reshape(len(images), -1), labels


def run(config: Config, context: Context) -> Result:
    """Train with every method, sweep ranks and gaps, measure states and step times."""
    images, labels = read(config, context)
    rates = np.array(config.learning_rates)
    jobs: dict[Method, Job] = {
        method: Job(method, config.rank, config.update_gap) for method in config.methods
    }
    swept = [Job(method, rank, config.update_gap) for rank in config.ranks for method in SWEPT]
    wanted = list(dict.fromkeys([*jobs.values(), *swept]))
    programs = len(wanted) + len(config.gaps) + 1

    predict, seeds = draw(config, len(images), images.shape[1], context.seed)
    loss = Partial(loss_on, predict, images, labels)

    def train_all(job, rates, factors=(1.0,)):
        starts = jax.vmap(partial(start_of, job))(seeds.params, seeds.key)
        lanes = jnp.asarray([(rate, factor) for factor in factors for rate in rates], config.dtype)
        params, path = train_lanes(config, job, loss, starts, seeds, lanes)
        # A run that blew up has learned nothing.
        validation, test = (
            np.where(path.ok, errors(predict, images, labels, params, places), 1.0)
            for places in (seeds.validation, seeds.test)
        )
        return starts, Trained(np.asarray(path.ys), validation, test)

    context.progress("training: Adam", 0.0)
    adam, split = jobs["adam"], jobs["split_adam"]
    # One program for both.
    start, both = train_all(adam, rates, (1.0, SCALE))
    starts = {adam: start, split: start}
    trained = {
        job: jax.tree.map(lambda leaf, lanes=lanes: leaf[lanes], both)
        for job, lanes in ((adam, slice(len(rates))), (split, slice(len(rates), None)))
    }
    for index, job in enumerate(wanted):
        if job not in trained:
            name, *_ = LOOKS[job.method]
            context.progress(f"training: {name}, rank {job.rank}", index / programs)
            starts[job], trained[job] = train_all(job, rates)
    best = {job: int(np.argmin(runs.validation.mean(axis=1))) for job, runs in trained.items()}

    gap_errors = []
    for index, gap in enumerate(config.gaps):
        context.progress(f"training: GaLore, gap {gap}", (len(wanted) + index) / programs)
        _, runs = train_all(Job("galore", config.rank, gap), rates[[best[jobs["galore"]]]])
        gap_errors.append(runs.test[0])

    context.progress("measuring states and steps", 1 - 1 / programs)
    key = jax.random.key(context.seed)
    networks = {}
    for job, lanes in starts.items():
        params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], lanes)
        optimizer = optimizer_of(config, job, (config.learning_rates[0], SCALE), key)
        networks[job] = params, optimizer.init(params)
    sizes = {job: _nbytes(state) for job, (_, state) in networks.items()}
    timed = [(job, networks[job][0], networks[job][1]) for job in jobs.values()]
    step_ms = _time_steps(config, timed, loss, seeds.batches[0, 0], key) if config.timings else {}

    data = {
        "steps": record_steps(config.steps, config.every),
        "methods": {
            method: {
                **trained[job]._asdict(),
                "best": best[job],
                "bytes": sizes[job],
            }
            for method, job in jobs.items()
        },
        "ranks": {
            method: {
                "test": np.stack([trained[job].test[best[job]] for job in swept if job.method == method]),
                "bytes": np.array([sizes[job] for job in swept if job.method == method]),
                "best": np.array([best[job] for job in swept if job.method == method]),
            }
            for method in SWEPT
        },
        "step_ms": step_ms,
        "gaps": np.array(gap_errors).reshape(len(config.gaps), config.seeds),
    }
    test = {job: float(trained[job].test[best[job]].mean()) for job in wanted}
    claims = (
        _comparable(config, {method: test[job] for method, job in jobs.items()}),
        _low_rank(config, test),
        _adaptors(config, test, test[jobs["split_adam"]]),
        _states(jobs, {method: networks[job][1] for method, job in jobs.items()}, networks[adam][0]),
    )
    dims = {
        "steps": ("time",),
        "gaps": ("gap", "seed"),
        **{f"methods/{method}/loss": ("rate", "seed", "time") for method in jobs},
        **{
            f"methods/{method}/{part}": ("rate", "seed") for method in jobs for part in ("validation", "test")
        },
        **{f"step_ms/{method}": ("kind_of_step",) for method in step_ms},
        **{f"ranks/{method}/test": ("rank", "seed") for method in SWEPT},
        **{f"ranks/{method}/{name}": ("rank",) for method in SWEPT for name in ("bytes", "best")},
    }
    return Result(data, claims, dims)


def _nbytes(state: Any) -> int:
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(state))


def _time_steps(
    config: Config, networks: Sequence[tuple[Job, Any, Any]], loss: Any, places: Any, key: Array
) -> dict[Method, np.ndarray]:
    """Median milliseconds of an ordinary step of each method, and of its first; they take turns."""

    def step(job, params, state):
        return one_step(config, job, loss, params, state, places, key)

    # GaLore's first step is one with new bases, its second is not.
    lanes = [
        (job, params, which)
        for job, params, state in networks
        for which in (step(job, params, state)[1], state)
    ]
    spent = np.zeros((config.timings, len(lanes)))
    for turn in range(config.timings):
        for index, lane in enumerate(lanes):
            begun = time.perf_counter()
            jax.block_until_ready(step(*lane))
            spent[turn, index] = 1e3 * (time.perf_counter() - begun)
    medians = np.median(spent, axis=0).reshape(-1, 2)
    return {job.method: pair for (job, *_), pair in zip(networks, medians, strict=True)}


def _standard_error(config: Config) -> float:
    """Of the error on one test set."""
    return (EXPECTED_ERROR * (1 - EXPECTED_ERROR) / config.test_images) ** 0.5


def _comparable(config: Config, test: Mapping[Method, float]) -> Claim:
    # What one test set cannot tell from noise.
    margin = 2 * _standard_error(config)
    pairs: list[tuple[Method, Method]] = [("galore", "split_adam"), ("galore", "adam")]
    if "galore_8bit" in test:
        pairs.append(("galore_8bit", "galore"))
    return Claim(
        "galore.digits/comparable",
        f"GaLore of rank {config.rank} trains as well as full-rank Adam, at one learning rate and at split "
        "ones, and with 8-bit moments as well as without, as far as a test set can tell",
        "zhao2024galore, section 5.1 and Table 2 (on a small classifier)",
        "stated",
        [
            Check(f"{LOOKS[one][0]} minus {LOOKS[other][0]}", "at most", margin, test[one] - test[other])
            for one, other in pairs
        ],
        preset="standard",
    )


def _low_rank(config: Config, test: Mapping[Job, float]) -> Claim:
    low, high = (
        test[Job("low_rank", rank, config.update_gap)] - test[Job("galore", rank, config.update_gap)]
        for rank in (config.ranks[0], config.ranks[-1])
    )
    return Claim(
        "galore.digits/low-rank",
        "Weights of low rank, W = A B, are much worse than GaLore at the same rank",
        "zhao2024galore, section 5.1 and Table 2 (on a small classifier)",
        "qualified",
        [
            # Much: as much again as the error that is expected.
            Check(f"rank {config.ranks[0]}: test error minus GaLore's", "at least", 2 * EXPECTED_ERROR, low),
            Check(f"rank {config.ranks[-1]}: the same", "at most", 2 * _standard_error(config), high),
        ],
        condition="the rank is small against what the task needs",
        preset="standard",
    )


def _adaptors(config: Config, test: Mapping[Job, float], full: float) -> Claim:
    low, high = (
        test[Job("lora", rank, config.update_gap)] - full for rank in (config.ranks[0], config.ranks[-1])
    )
    # Of a difference of two means over seeds.
    margin = 2 * _standard_error(config) * (2 / config.seeds) ** 0.5
    return Claim(
        "galore.digits/adaptors",
        "LoRA from frozen random weights is worse than training in full rank",
        "zhao2024galore, section 5.1 and Table 2 (on a small classifier)",
        "qualified",
        [
            Check(
                f"rank {config.ranks[0]}: test error minus that of Adam, split rates", "at least", margin, low
            ),
            Check(f"rank {config.ranks[-1]}: the same", "at most", 2 * _standard_error(config), high),
        ],
        condition="the rank is small against what the task needs",
        preset="standard",
    )


def _states(jobs: Mapping[Method, Job], states: Mapping[Method, Any], params: Any) -> Claim:
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    hidden = {name: leaf for name, leaf in leaves.items() if is_hidden(name, leaf)}
    rest = sum(leaf.size for name, leaf in leaves.items() if name not in hidden)

    def expected(memory: Callable[..., Any], *rank: int) -> int:
        kept = [memory(*leaf.shape, *rank) for leaf in hidden.values()]
        return sum(one.states + one.projection for one in kept) + 2 * rest

    rank = jobs["galore"].rank
    formulas: dict[Method, int] = {
        "adam": expected(full_rank_memory),
        "galore": expected(galore_memory, rank),
        "lora": expected(lora_memory, rank),
        "low_rank": expected(lora_memory, rank),
    }
    itemsize = next(iter(leaves.values())).dtype.itemsize
    counts = {
        method: _nbytes([leaf for leaf in jax.tree.leaves(state) if not leaf.ndim])
        for method, state in states.items()
    }
    nbytes = {method: _nbytes(state) - counts[method] for method, state in states.items()}
    # Adam on the rest has a count as well, and so has the schedule: four bytes each.
    of_rest = 2 * itemsize * rest + 8
    return Claim(
        "galore.digits/state-bytes",
        "For a matrix (m, n) with m <= n the optimizer keeps m r + 2 n r numbers with GaLore, 2 m n with "
        "Adam in full rank, 2 (m r + n r) with Adam on factors of rank r",
        "zhao2024galore, Table 1",
        "stated",
        [
            *(
                Check(
                    f"{LOOKS[method][0]}: numbers, all parameters, counts aside",
                    "equals",
                    formula,
                    nbytes[method] / itemsize,
                )
                for method, formula in formulas.items()
            ),
            Check(
                "bytes of GaLore's state over Adam's, counts aside",
                "equals",
                formulas["galore"] / formulas["adam"],
                nbytes["galore"] / nbytes["adam"],
            ),
            Check(
                "GaLore on the hidden matrices: bytes, against models.galore.state_bytes",
                "equals",
                state_bytes(hidden, rank),
                nbytes["galore"] + counts["galore"] - of_rest,
            ),
            # A few integers.
            Check("bytes of the counts, most of a method", "at most", 64, max(counts.values())),
        ],
    )


def figure(saved: Saved) -> Figure:
    """Training loss, choice of rates, test error over state size, sweeps and step times."""
    drawn, (above, below) = plotting.new_figure(2, 3, width=4.3, height=3.4)
    config = saved.config
    drawn.suptitle(
        f"{SETS[config['data']]}, {config['train_images']:,} to train on and {config['test_images']:,} to "
        f"test on: two hidden layers of {config['width']}, {config['steps']:,} steps of {config['batch']}, "
        f"{config['seeds']} seeds",
        fontsize=11,
    )
    losses, choice, memory = above
    ranks, gaps, times = below
    for method in config["methods"]:
        name, color, marker = LOOKS[method]
        best = int(saved[f"methods/{method}/best"])
        loss = saved[f"methods/{method}/loss"][best].mean(axis=0)
        rate = config["learning_rates"][best]
        losses.plot(saved["steps"], loss, color=color, label=f"{name}, {rate:g}", linewidth=1.4)
        validation = saved[f"methods/{method}/validation"].mean(axis=1)
        choice.plot(config["learning_rates"], 100 * validation, color=color, marker=marker, label=name)
        choice.plot(rate, 100 * validation[best], marker, color=color, markersize=9, alpha=0.5)
        if method not in SWEPT:
            test = saved[f"methods/{method}/test"][best]
            size = saved[f"methods/{method}/bytes"] / 1000
            _points(memory, np.array([size]), test[None], method, "none")
    for method in SWEPT:
        test = saved[f"ranks/{method}/test"]
        _points(memory, saved[f"ranks/{method}/bytes"] / 1000, test, method)
        _points(ranks, np.array(config["ranks"]), test, method)
    for ax in (choice, memory, ranks):
        ax.set(yscale="log")
        _plain_ticks(ax.yaxis, (1, 2, 3, 5, 10, 20, 30, 50, 100))
    losses.set(yscale="log", xlabel="step", ylabel="training cross-entropy (nats)")
    losses.set_title("Training loss at the chosen rate")
    losses.set_ylim(top=200)  # room for the legend
    losses.legend(fontsize=7.5, ncols=2, title="learning rate", title_fontsize=7.5)
    choice.set(xscale="log", xlabel="learning rate", ylabel="validation error (%)")
    choice.set_title("Choice of the learning rate (large markers)")
    memory.set(xscale="log", xlabel="optimizer state (kB)", ylabel="test error (%)")
    _plain_ticks(memory.xaxis, (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
    memory.set_title("Test error (± sd of seeds) and state")
    memory.legend(fontsize=7.5)

    full = 100 * saved["methods/split_adam/test"][int(saved["methods/split_adam/best"])].mean()
    for ax in (ranks, gaps):
        ax.axhline(full, label=LOOKS["split_adam"][0], **plotting.PRINTED)
        ax.set(ylabel="test error (%)")
    ranks.set(xscale="log", xlabel="rank")
    _plain_ticks(ranks.xaxis, config["ranks"])
    ranks.set_title("Rank")
    ranks.legend(fontsize=7.5)
    gaps.set(xscale="log", xlabel="steps between two bases")
    if config["gaps"]:
        _plain_ticks(gaps.xaxis, config["gaps"])
        _points(gaps, np.array(config["gaps"]), saved["gaps"], "galore")
        gaps.set_ylim(bottom=0)
        gaps.legend(fontsize=7.5, loc="lower left")
    gaps.set_title(f"Update gap of GaLore, rank {config['rank']}")
    if config["timings"]:
        _bars(times, saved)
    for ax, wanted in ((gaps, config["gaps"]), (times, config["timings"])):
        ax.set_visible(bool(wanted))
    return drawn


def _points(ax: Axes, x: np.ndarray, test: np.ndarray, method: Method, line: str = "-") -> None:
    """Mean and spread over seeds of errors (point, seed)."""
    name, color, marker = LOOKS[method]
    spread = 100 * test.std(axis=1, ddof=1)
    style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "capsize": 2, "label": name}
    ax.errorbar(x, 100 * test.mean(axis=1), yerr=spread, **style)


def _plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Plain numbers for the ticks of a logarithmic axis."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _bars(ax: Axes, saved: Saved) -> None:
    """Milliseconds of an ordinary step, and of one with new bases."""
    methods = saved.config["methods"]
    for place, method in enumerate(methods):
        _, color, _ = LOOKS[method]
        ordinary, first = saved[f"step_ms/{method}"]
        ax.barh(place, ordinary, color=color, height=0.6)
        text = f" {ordinary:.2f}"
        if method.startswith("galore"):
            text += f" ({first:.1f} with new bases)"
        ax.text(ordinary, place, text, va="center", fontsize=8)
    ax.set_yticks(range(len(methods)), [LOOKS[method][0] for method in methods])
    ax.invert_yaxis()
    ax.set(xlabel="ms, median", xlim=(0, 2.2 * max(saved[f"step_ms/{method}"][0] for method in methods)))
    ax.grid(axis="y", visible=False)
    ax.set_title(f"One step of one network on {saved.record['device']}")
