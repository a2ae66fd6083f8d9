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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from models.classifier import Classifier, is_hidden
from models.data.images import digits, mnist
from models.functional import as_function
from models.galore import galore, scale_by_adam_8bit, state_bytes
from models.losses import cross_entropy
from models.lowrank import lora_params, low_rank_params, on_factors, on_trained, relora
from models.memory import full_rank_memory, galore_memory, lora_memory, nbytes
from models.training import record_steps, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, qualified, stated
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

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
    train_images: Count = 800
    """Images to train on."""
    validation_images: Count = 297
    """Images that learning rates are chosen on."""
    test_images: Count = 700
    """Images to test on."""
    width: Count = 128
    """Nodes of each of the two hidden layers."""
    methods: tuple[Method, ...] = get_args(Method)
    """Methods; adam, split_adam, galore, lora and low_rank at least."""
    rank: Count = 16
    """Rank of all methods that have one."""
    update_gap: Count = 50
    """Steps between two bases of GaLore."""
    restart_every: Count = 100
    """Steps between two restarts of ReLoRA."""
    restart_warmup: Count = 10
    """Steps over which ReLoRA's learning rate grows after a restart."""
    ranks: tuple[Count, ...] = (2, 4, 8, 16, 32)
    """Ranks of the sweep, in rising order, the rank itself among them."""
    gaps: tuple[Count, ...] = (1, 10, 50, 600)
    """Gaps of the sweep."""
    learning_rates: Annotated[tuple[Positive, ...], Length(1)] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Grid of learning rates, in rising order; each falls to a tenth over the run, by a cosine."""
    seeds: Annotated[int, Range(at_least=2)] = 4
    """Cuts of the images, starts and orders of batches."""
    batch: Count = 64
    """Images per step, drawn with replacement."""
    steps: Count = 600
    """Updates."""
    every: Count = 30
    """Steps between two records of the training loss."""
    timings: Annotated[int, Range(at_least=0)] = 100
    """Steps that are timed, of every method; none where 0."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        check_ranges(self)
        missing = {"adam", "split_adam", *SWEPT} - set(self.methods)
        if missing:
            raise ValueError(f"methods must have {sorted(missing)} among them, got {self.methods}")
        for name in ("ranks", "learning_rates"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
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


class Job(NamedTuple):
    """A method with its rank and its gap: what one program is made for."""

    method: Method
    rank: int
    gap: int


class Trained(NamedTuple):
    """Training loss (rate, seed, step), and errors at the end (rate, seed)."""

    loss: Any
    validation: Any
    test: Any

    def best(self) -> int:
        """The place of the rate with the smallest error on the second part of the images."""
        return int(np.argmin(self.validation.mean(axis=1)))

    def chosen(self) -> Trained:
        """Losses and errors of all seeds at that rate."""
        return Trained(*(part[self.best()] for part in self))


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


class Task(NamedTuple):
    """The network as a function with flat images and labels, and all seeds."""

    config: Config
    network: tuple[Any, Array, Array]
    seeds: Seed


def read(config: Config, context: Context) -> tuple[Array, Array]:
    """All images, flat, and their labels; the parts of MNIST are put together and cut anew."""
    if config.data == "digits":
        images, labels = digits(config.dtype)
    else:
        parts = [mnist(context.data_dir, split, config.dtype) for split in ("train", "test")]
        images, labels = (jnp.concatenate(both) for both in zip(*parts, strict=True))
    wanted = config.train_images + config.validation_images + config.test_images
    if wanted > len(images):
        raise ValueError(f"images to train, validate and test on must be {len(images)} at most, got {wanted}")
    return images.reshape(len(images), -1), labels


@partial(jax.jit, static_argnums=(0, 1))
def build(config: Config, inputs: int, keys: Array) -> tuple[Any, Any]:
    """The network as a function, of models that are a product of factors as well, and its starts."""

    def one(key):
        return as_function(Classifier(key, inputs, config.width, config.dtype))

    predict, params = jax.vmap(one)(keys)
    return on_factors(predict), params


def prepare(config: Config, context: Context) -> Task:
    """Read the images, and draw all seeds."""
    images, labels = read(config, context)
    # What is drawn by NumPy needs no compiling.
    generators = [np.random.default_rng([context.seed, index]) for index in range(config.seeds)]
    order = np.stack([generator.permutation(len(images)) for generator in generators])
    ends = np.cumsum([config.train_images, config.validation_images, config.test_images])
    training, validation, test, _ = np.split(order, ends, axis=1)
    size = (config.steps, config.batch)
    pairs = zip(generators, training, strict=True)
    batches = np.stack([generator.choice(own, size) for generator, own in pairs])
    keys = jax.random.split(jax.random.key(context.seed), config.seeds)
    predict, params = build(config, images.shape[1], keys)
    places = [jnp.asarray(part, jnp.int32) for part in (training, validation, test, batches)]
    seeds = Seed(params, *places, key=keys)
    return Task(config, (predict, images, labels), seeds)


def loss_on(predict: Any, images: Array, labels: Array, params: Any, places: Array) -> Array:
    """Cross-entropy on the images at these places."""
    return cross_entropy(params, (predict, images[places], labels[places]))


@eqx.filter_jit
def train_lanes(config: Config, job: Job, network: Any, starts: Any, seeds: Seed, lanes: Array) -> Trained:
    """Train in all lanes from all seeds: losses and errors of runs (lane, seed)."""
    predict, images, labels = network
    loss = Partial(loss_on, *network)

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

        def error(places):
            wrong = jnp.argmax(predict(params, images[places]), axis=-1) != labels[places]
            # A run that blew up has learned nothing.
            return jnp.where(path.ok, jnp.mean(wrong), 1.0)

        return Trained(path.ys, error(seed.validation), error(seed.test))

    each_seed = jax.vmap(one, in_axes=(None, 0, 0))
    return jax.vmap(each_seed, in_axes=(0, None, None))(lanes, starts, seeds)


@partial(jax.jit, static_argnums=(0, 1))
def one_step(config: Config, job: Job, network: Any, params: Any, state: Any, seed: Seed) -> Any:
    """One update of one network, as it is timed."""
    gradient = jax.grad(Partial(loss_on, *network))(params, seed.batches[0])
    optimizer = optimizer_of(config, job, (config.learning_rates[0], SCALE), seed.key)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def train_all(task: Task, starts: Any, factors: dict[Job, float], rates: np.ndarray) -> dict[Job, Trained]:
    """Train at all rates, and with the factors of jobs that are one program, in that one program."""
    first, *_ = factors
    pairs = [(rate, factor) for factor in factors.values() for rate in rates]
    lanes = jnp.asarray(pairs, task.config.dtype)
    found = jax.device_get(train_lanes(task.config, first, task.network, starts, task.seeds, lanes))
    parts = (np.split(part, len(factors)) for part in found)
    return {job: Trained(*part) for job, *part in zip(factors, *parts, strict=True)}


def train_jobs(task: Task, context: Context, jobs: list[Job], starts: dict[Job, Any]) -> dict[Job, Trained]:
    """Train every job at all rates; Adam at one rate and at split rates, in one program."""
    rates = np.array(task.config.learning_rates)
    adam, split = (next(job for job in jobs if job.method == name) for name in ("adam", "split_adam"))
    context.progress("training: Adam", 0.0)
    trained = train_all(task, starts[adam], {adam: 1.0, split: SCALE}, rates)
    for index, job in enumerate(jobs):
        if job not in trained:
            label = f"training: {LOOKS[job.method][0]}, rank {job.rank}"
            context.progress(label, 0.7 * index / len(jobs))
            trained |= train_all(task, starts[job], {job: 1.0}, rates)
    return trained


def vary_gap(task: Task, context: Context, starts: Any, rate: float) -> np.ndarray:
    """Test errors (gap, seed) of GaLore with other gaps between two bases, at one rate."""
    errors = []
    for index, gap in enumerate(task.config.gaps):
        context.progress(f"training: GaLore, gap {gap}", 0.7 + 0.2 * index / len(task.config.gaps))
        job = Job("galore", task.config.rank, gap)
        errors.append(train_all(task, starts, {job: 1.0}, np.array([rate]))[job].test[0])
    return np.array(errors)


def run(config: Config, context: Context) -> dict:
    """Train with every method, sweep ranks and gaps, measure states and step times."""
    task = prepare(config, context)
    jobs: dict[Method, Job] = {name: Job(name, config.rank, config.update_gap) for name in config.methods}
    sweep = [[Job(method, rank, config.update_gap) for rank in config.ranks] for method in SWEPT]
    wanted = list(dict.fromkeys([*jobs.values(), *(job for row in sweep for job in row)]))
    drawn = (task.seeds.params, task.seeds.key)
    starts = {job: jax.jit(jax.vmap(partial(start_of, job)))(*drawn) for job in wanted}
    trained = train_jobs(task, context, wanted, starts)
    chosen = {job: runs.chosen() for job, runs in trained.items()}
    best = config.learning_rates[trained[jobs["galore"]].best()]
    gap_errors = vary_gap(task, context, starts[jobs["galore"]], best)

    context.progress("measuring states and steps", 0.9)
    networks = {job: first_network(task, job, starts[job]) for job in wanted}
    measured = {
        "method": ("method", np.array(list(jobs))),
        "rate": ("rate", np.array(config.learning_rates)),
        "step": ("step", record_steps(config.steps, config.every)),
        "loss": ("method seed step", [chosen[job].loss for job in jobs.values()]),
        "validation": ("method rate seed", [trained[job].validation for job in jobs.values()]),
        "test": ("method seed", [chosen[job].test for job in jobs.values()]),
        "swept": ("swept", np.array(SWEPT)),
        "rank": ("rank", np.array(config.ranks)),
        "sweep": {
            "test": ("swept rank seed", [[chosen[job].test for job in row] for row in sweep]),
            "bytes": ("swept rank", [[nbytes(networks[job][1]) for job in row] for row in sweep]),
        },
        **measure_states(config, {method: networks[job] for method, job in jobs.items()}),
    }
    if config.gaps:
        measured |= {"gap": ("gap", np.array(config.gaps)), "gap_test": ("gap seed", gap_errors)}
    if config.timings:
        spent = time_steps(task, {job: networks[job] for job in jobs.values()})
        measured |= {"kind": ("kind", np.array(["ordinary", "first"])), "step_ms": ("method kind", spent)}
    return measured


def first_network(task: Task, job: Job, starts: Any) -> tuple[Any, Any]:
    """The first seed's parameters, and their optimizer's state."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], starts)
    lane = (task.config.learning_rates[0], SCALE)
    return params, optimizer_of(task.config, job, lane, task.seeds.key[0]).init(params)


def measure_states(config: Config, networks: dict[Method, tuple[Any, Any]]) -> dict[str, Any]:
    """Bytes of every method's state and of the counts in it, and the numbers that the formulas give."""
    states = [jax.tree.leaves(state) for _, state in networks.values()]
    counts = [nbytes([leaf for leaf in leaves if not leaf.ndim]) for leaves in states]
    params = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(networks["adam"][0])
    }
    hidden = {name: leaf for name, leaf in params.items() if is_hidden(name, leaf)}
    rest = sum(leaf.size for name, leaf in params.items() if name not in hidden)

    def formula(memory: Callable[..., Any], *rank: int) -> int:
        kept = [memory(*leaf.shape, *rank) for leaf in hidden.values()]
        return sum(one.states + one.projection for one in kept) + 2 * rest

    factors = formula(lora_memory, config.rank)
    return {
        "state": {"bytes": ("method", list(map(nbytes, states))), "counts": ("method", counts)},
        "formula": {
            "adam": formula(full_rank_memory),
            "galore": formula(galore_memory, config.rank),
            "lora": factors,
            "low_rank": factors,
        },
        "hidden_bytes": state_bytes(hidden, config.rank),
        # Adam on the rest has a count as well, and so has the schedule: four bytes each.
        "rest_bytes": 2 * np.dtype(config.dtype).itemsize * rest + 8,
    }


def time_steps(task: Task, networks: dict[Job, tuple[Any, Any]]) -> np.ndarray:
    """Median milliseconds of an ordinary step, and of a first, of each job (job, 2); they take turns."""
    seed = jax.tree.map(lambda leaf: leaf[0], task.seeds)

    def step(job, params, state):
        return one_step(task.config, job, task.network, params, state, seed)

    # GaLore's first step is one with new bases, its second is not.
    lanes = [
        (job, params, which)
        for job, (params, state) in networks.items()
        for which in (step(job, params, state)[1], state)
    ]
    spent = np.zeros((task.config.timings, len(lanes)))
    for turn in range(task.config.timings):
        for index, lane in enumerate(lanes):
            begun = time.perf_counter()
            jax.block_until_ready(step(*lane))
            spent[turn, index] = 1e3 * (time.perf_counter() - begun)
    return np.median(spent, axis=0).reshape(-1, 2)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Errors against full-rank Adam, factors and adaptors of small rank, and the size of the states."""
    # What one test set cannot tell from noise: two standard errors of the error on it.
    noise = 2 * (EXPECTED_ERROR * (1 - EXPECTED_ERROR) / config.test_images) ** 0.5
    why = "two standard errors of one test set"
    test = dict(zip(saved["method"], saved["test"].mean(axis=-1).astype(float), strict=True))
    pairs: list[tuple[Method, Method]] = [("galore", "split_adam"), ("galore", "adam")]
    if "galore_8bit" in config.methods:
        pairs.append(("galore_8bit", "galore"))
    yield stated(
        "comparable",
        f"GaLore of rank {config.rank} trains as well as full-rank Adam, at one learning rate and at split "
        "ones, and with 8-bit moments as well as without, as far as a test set can tell",
        "zhao2024galore, section 5.1 and Table 2 (on a small classifier)",
        *(
            at_most(f"{LOOKS[one][0]} minus {LOOKS[other][0]}", test[one] - test[other], noise, why=why)
            for one, other in pairs
        ),
        preset="standard",
    )
    by_rank = dict(zip(saved["swept"], saved["sweep/test"].mean(axis=-1).astype(float), strict=True))
    ends = [0, -1]
    smallest, largest = (f"rank {config.ranks[end]}" for end in ends)
    low, high = (by_rank["low_rank"] - by_rank["galore"])[ends]
    much = "much is as much again as the error that is expected"
    yield qualified(
        "low-rank",
        "Weights of low rank, W = A B, are much worse than GaLore at the same rank",
        "zhao2024galore, section 5.1 and Table 2 (on a small classifier)",
        condition="the rank is small against what the task needs",
        inside=[at_least(f"{smallest}: test error minus GaLore's", low, 2 * EXPECTED_ERROR, why=much)],
        outside=[at_most(f"{largest}: the same", high, noise, why=why)],
        preset="standard",
    )
    low, high = (by_rank["lora"] - test["split_adam"])[ends]
    label = f"{smallest}: test error minus that of Adam, split rates"
    of_means = "two standard errors of a difference of two means over seeds"
    yield qualified(
        "adaptors",
        "LoRA from frozen random weights is worse than training in full rank",
        "zhao2024galore, section 5.1 and Table 2 (on a small classifier)",
        condition="the rank is small against what the task needs",
        inside=[at_least(label, low, noise * (2 / config.seeds) ** 0.5, why=of_means)],
        outside=[at_most(f"{largest}: the same", high, noise, why=why)],
        preset="standard",
    )
    yield _states(config, saved)


def _states(config: Config, saved: Saved) -> Claim:
    formulas, counts, exact = saved["formula"], saved["state/counts"], "numbers are counted"
    kept = (saved["state/bytes"] - counts) / np.dtype(config.dtype).itemsize
    numbers = dict(zip(saved["method"], kept, strict=True))
    ratio, expected = (both["galore"] / both["adam"] for both in (numbers, formulas))
    hidden = saved["state/bytes"][config.methods.index("galore")] - saved["rest_bytes"]
    label = "GaLore on the hidden matrices: bytes, against models.galore.state_bytes"
    aside = "numbers, all parameters, counts aside"
    return stated(
        "state-bytes",
        "For a matrix (m, n) with m <= n the optimizer keeps m r + 2 n r numbers with GaLore, 2 m n with "
        "Adam in full rank, 2 (m r + n r) with Adam on factors of rank r",
        "zhao2024galore, Table 1",
        *(
            equals(f"{LOOKS[method][0]}: {aside}", numbers[method], formulas[method], why=exact)
            for method in ("adam", "galore", "lora", "low_rank")
        ),
        equals("bytes of GaLore's state over Adam's, counts aside", ratio, expected, why=exact),
        equals(label, hidden, saved["hidden_bytes"], why=exact),
        at_most("bytes of the counts, most of a method", counts.max(), 64, why="a few integers"),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Training loss, choice of rates, test error over state size, sweeps and step times."""
    drawn, ((losses, choice, memory), (ranks, gaps, times)) = plotting.new_figure(2, 3, width=4.3, height=3.4)
    drawn.suptitle(
        f"{SETS[config.data]}, {config.train_images:,} to train on and {config.test_images:,} to "
        f"test on: two hidden layers of {config.width}, {config.steps:,} steps of {config.batch}, "
        f"{config.seeds} seeds",
        fontsize=11,
    )
    _draw_runs(losses, choice, config, saved)
    for method, test, size in zip(config.methods, saved["test"], saved["state/bytes"], strict=True):
        if method not in SWEPT:
            _points(memory, np.array([size]) / 1000, test[None], method, "none")
    for method, test, sizes in zip(SWEPT, saved["sweep/test"], saved["sweep/bytes"], strict=True):
        _points(memory, sizes / 1000, test, method)
        _points(ranks, np.array(config.ranks), test, method)
    for ax in (choice, memory, ranks):
        ax.set(yscale="log")
        _plain_ticks(ax.yaxis, (1, 2, 3, 5, 10, 20, 30, 50, 100))
    memory.set(xscale="log", xlabel="optimizer state (kB)", ylabel="test error (%)")
    _plain_ticks(memory.xaxis, (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
    memory.set_title("Test error (± sd of seeds) and state")
    memory.legend(fontsize=7.5)

    full = 100 * saved["test"][config.methods.index("split_adam")].mean()
    for ax in (ranks, gaps):
        ax.axhline(full, label=LOOKS["split_adam"][0], **plotting.PRINTED)
        ax.set(xscale="log", ylabel="test error (%)")
    ranks.set_xlabel("rank")
    _plain_ticks(ranks.xaxis, config.ranks)
    ranks.set_title("Rank")
    ranks.legend(fontsize=7.5)
    if config.gaps:
        gaps.set_xlabel("steps between two bases")
        _plain_ticks(gaps.xaxis, config.gaps)
        gaps.set_title(f"Update gap of GaLore, rank {config.rank}")
        _points(gaps, np.array(config.gaps), saved["gap_test"], "galore")
        gaps.set_ylim(bottom=0)
        gaps.legend(fontsize=7.5, loc="lower left")
    if config.timings:
        _bars(times, config, saved)
    for ax, shown in ((gaps, config.gaps), (times, config.timings)):
        if not shown:
            ax.set_axis_off()
            ax.set_visible(False)
    return drawn


def _draw_runs(losses: Axes, choice: Axes, config: Config, saved: Saved) -> None:
    """Training loss at the chosen rates, and the validation errors that these were chosen by."""
    rates, validation = saved["rate"], 100 * saved["validation"].mean(axis=-1)
    for method, loss, of_rates in zip(config.methods, saved["loss"].mean(axis=1), validation, strict=True):
        name, color, marker = LOOKS[method]
        best = np.argmin(of_rates)
        losses.plot(saved["step"], loss, color=color, label=f"{name}, {rates[best]:g}", linewidth=1.4)
        choice.plot(rates, of_rates, color=color, marker=marker, label=name)
        choice.plot(rates[best], of_rates[best], marker, color=color, markersize=9, alpha=0.5)
    losses.set(yscale="log", xlabel="step", ylabel="training cross-entropy (nats)")
    losses.set_title("Training loss at the chosen rate")
    losses.set_ylim(top=200)  # room for the legend
    losses.legend(fontsize=7.5, ncols=2, title="learning rate", title_fontsize=7.5)
    choice.set(xscale="log", xlabel="learning rate", ylabel="validation error (%)")
    choice.set_title("Choice of the learning rate (large markers)")


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


def _bars(ax: Axes, config: Config, saved: Saved) -> None:
    """Milliseconds of an ordinary step, and of one with new bases."""
    for place, (method, (ordinary, first)) in enumerate(zip(config.methods, saved["step_ms"], strict=True)):
        ax.barh(place, ordinary, color=LOOKS[method][1], height=0.6)
        text = f" {ordinary:.2f}"
        if method.startswith("galore"):
            text += f" ({first:.1f} with new bases)"
        ax.text(ordinary, place, text, va="center", fontsize=8)
    ax.set_yticks(range(len(config.methods)), [LOOKS[method][0] for method in config.methods])
    ax.invert_yaxis()
    ax.set(xlabel="ms, median", ylabel="method", xlim=(0, 2.2 * max(saved["step_ms"][:, 0])))
    ax.grid(axis="y", visible=False)
    ax.set_title(f"One step of one network on {saved.record['device']}")
