"""Students of a prompt-attention teacher, all runs of one kind in one compiled program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array

from dynamics import replicator
from models.attention.prompt import PromptAttention, attention_log_ratio, log_mean_ratio, prompt_attention
from models.data.teachers import teacher_with_ratio
from models.draws import normal
from models.functional import as_function
from models.losses import gauss_newton_spectrum
from models.optimizers import one_of
from models.training import train

# A student starts from one of two places; these are their positions in `Task`.
STANDARD, LOCAL = 0, 1


class Task(NamedTuple):
    """What a student is trained on, and from where.

    Attributes:
        tokens: X, (N, n, d).
        labels: the outputs of the teacher, (N,).
        prompt: the teacher's prompt, (d,).
        value: the teacher's value, (d,).
        start_prompts: prompts that a student starts from, standard and local, (2, d).
        start_values: values that it starts from, (2, d).
    """

    tokens: Any
    labels: Any
    prompt: Any
    value: Any
    start_prompts: Any
    start_values: Any


def _task(key, ratio, tokens, vectors, noise) -> Task:
    """A teacher of a given mean ratio, and students; `vectors` are five draws from N(0, I / d)."""
    value, standard_prompt, standard_value, prompt_noise, value_noise = vectors
    prompt = teacher_with_ratio(key, tokens, ratio)

    def near(teacher, direction):
        return teacher + noise * jnp.linalg.norm(teacher) * direction

    return Task(
        tokens,
        prompt_attention(prompt, value, tokens),
        prompt,
        value,
        jnp.stack([standard_prompt, near(prompt, prompt_noise)]),
        jnp.stack([standard_value, near(value, value_noise)]),
    )


def _draws(key, leading, samples, dim, dtype=None):
    """Tokens X ~ N(0, 1) with as many tokens as dimensions, and the vectors of `_task`."""
    rows = normal(key, (*leading, samples * dim + 5, dim), dtype)
    tokens = rows[..., :-5, :].reshape(*leading, samples, dim, dim)
    return tokens, rows[..., -5:, :] / dim**0.5


def _spectrum(prompt, value, tokens, joint):
    return gauss_newton_spectrum(*as_function(PromptAttention(prompt, value, train_value=joint)), tokens)


@eqx.filter_jit
def make_tasks(key, seeds, ratios, samples, dim, noise) -> tuple[Task, dict[str, Any]]:
    """Make tasks over (seed, ratio), tokens and value over seeds alone, and the spectra at the teachers."""
    k_draws, k_teacher = jax.random.split(key)

    def one(key, ratio, tokens, vectors):
        task = _task(key, ratio, tokens, vectors, noise)
        teacher = task.prompt, task.value, tokens
        return task, {"frozen": _spectrum(*teacher, False), "joint": _spectrum(*teacher, True)}

    over_ratios = jax.vmap(one, in_axes=(None, 0, None, None), out_axes=(Task(None, 0, 0, None, 0, 0), 0))
    tokens, vectors = _draws(k_draws, (seeds,), samples, dim)
    return jax.vmap(over_ratios, in_axes=(0, None, 0, 0))(
        jax.random.split(k_teacher, seeds), ratios, tokens, vectors
    )


def _loss(predict, tokens, labels, params):
    return jnp.mean(optax.losses.l2_loss(predict(params, tokens), labels))


def _student(optimizer, prompt, value, tokens, labels, joint, steps, every):
    """Train prompt attention; record the loss, the logarithm of the mean ratio, and the prompt."""
    predict, params = as_function(PromptAttention(prompt, value, train_value=joint))
    loss = Partial(_loss, predict, tokens, labels)

    def observe(params):
        prompt = params["prompt"][...]
        log_ratio = log_mean_ratio(attention_log_ratio(prompt, tokens))
        return {"loss": loss(params), "log10_ratio": log_ratio / math.log(10), "prompt": prompt}

    return train(loss, params, optimizer, steps=steps, observe=observe, every=every)[1].ys


class Runs(NamedTuple):
    """Runs of one optimizer on all data.

    Attributes:
        optimizer: its maker, one of those in `models.optimizers`.
        rates: learning rates, (rate,) or (seed, ratio, rate).
        second: the second number that the maker takes.
        start: where the students start from, `STANDARD` or `LOCAL`.
    """

    optimizer: Callable[..., optax.GradientTransformation]
    rates: Any
    second: float = 0.0
    start: int = STANDARD


def train_all(
    task: Task, table: Mapping[str, Runs], steps: int, every: int, joint: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Train the runs of a table from every seed at every ratio, in one program.

    Args:
        task: what `make_tasks` makes.
        table: the runs, by name.
        steps: number of updates.
        every: steps between two records.
        joint: whether the value is trained along with the prompt.

    Returns:
        By name `loss`, `log10_ratio` and `prompt` as recorded, (seed, ratio, rate, record, ...), and the
        rates, (seed, ratio, rate).
    """
    families = tuple(dict.fromkeys(runs.optimizer for runs in table.values()))
    leading = task.start_prompts.shape[:2]
    rates = [np.broadcast_to(runs.rates, (*leading, np.shape(runs.rates)[-1])) for runs in table.values()]
    sizes, rate = [part.shape[-1] for part in rates], np.concatenate(rates, axis=-1)
    columns = [(families.index(runs.optimizer), runs.second, runs.start) for runs in table.values()]
    lanes = tuple(np.repeat(column, sizes) for column in zip(*columns, strict=True))
    found = jax.device_get(_train_lanes(task, rate, lanes, families, joint, steps, every)) | {"rate": rate}
    parts = {key: np.split(leaf, np.cumsum(sizes)[:-1], axis=2) for key, leaf in found.items()}
    return {name: {key: part[i] for key, part in parts.items()} for i, name in enumerate(table)}


@eqx.filter_jit
def _train_lanes(task, rates, lanes, families, joint, steps, every):
    def train_one(task, rate, lane):
        index, second, start = lane
        optimizer = one_of(index, [family(rate, second, steps) for family in families])
        # A frozen value is the teacher's own, and all lanes share it.
        prompt, value = task.start_prompts[start], task.start_values[start] if joint else task.value
        return _student(optimizer, prompt, value, task.tokens, task.labels, joint, steps, every)

    over_lanes = jax.vmap(train_one, in_axes=(None, 0, 0))
    over_ratios = jax.vmap(over_lanes, in_axes=(Task(None, 0, 0, None, 0, 0), 0, None))
    return jax.vmap(over_ratios, in_axes=(0, 0, None))(task, rates, lanes)


def best_rate(ys: Mapping[str, np.ndarray], target: float, every: int) -> dict[str, np.ndarray]:
    """The runs at the best rate: fewest iterations to a relative loss, or else the lowest last loss.

    Args:
        ys: runs of one name, as `train_all` gives them.
        target: the relative loss.
        every: steps between two records.

    Returns:
        The same for one rate, (seed, ratio, ...), and `iterations`, infinity where the target is never
        reached.
    """
    losses = ys["loss"]
    reached = losses <= target * losses[..., :1]
    iterations = np.where(reached.any(axis=-1), every * reached.argmax(axis=-1), np.inf)
    last = np.nan_to_num(losses[..., -1] / losses[..., 0], nan=np.inf)
    # The key is negative, and so ahead of every loss, where the target was reached.
    index = np.argmin(np.where(np.isfinite(iterations), -1 / (1 + iterations), last), axis=2)
    seed, ratio = np.indices(index.shape)
    return {key: leaf[seed, ratio, index] for key, leaf in {**ys, "iterations": iterations}.items()}


@eqx.filter_jit
def condition_numbers(tokens, values, prompts):
    """Condition numbers of the Gauss-Newton matrix in p at prompts of shape (seed, ratio, M, d)."""

    def one(tokens, value, prompt):
        return condition_number(_spectrum(prompt, value, tokens, False))

    over_prompts = jax.vmap(jax.vmap(one, in_axes=(None, None, 0)), in_axes=(None, None, 0))
    return jax.vmap(over_prompts)(tokens, values, prompts)


def condition_number(spectrum: Array) -> Array:
    """Largest over smallest eigenvalue, of a spectrum (..., P) in descending order."""
    return spectrum[..., 0] / spectrum[..., -1]


@eqx.filter_jit
def train_wide(key, seeds, ratios, rate, samples, dim, dtype, steps, every):
    """Train (p, v) by gradient descent from the standard start with d > N, over (seed, ratio)."""

    def run(lane):
        seed, ratio = lane
        k_draws, k_teacher = jax.random.split(jax.random.fold_in(key, seed))
        task = _task(k_teacher, ratio, *_draws(k_draws, (), samples, dim, dtype), 0.0)
        start = task.start_prompts[STANDARD], task.start_values[STANDARD]
        ys = _student(optax.sgd(rate), *start, task.tokens, task.labels, True, steps, every)
        return {**ys, "prompt": jnp.linalg.norm(ys["prompt"], axis=-1)}

    # Runs go one after the other: products of many tokens with a vector stream through memory at full speed.
    grid = jnp.meshgrid(jnp.arange(seeds), ratios, indexing="ij")
    runs = jax.lax.map(run, tuple(axis.reshape(-1) for axis in grid))
    return jax.tree.map(lambda leaf: leaf.reshape(seeds, len(ratios), *leaf.shape[1:]), runs)


@eqx.filter_jit
def train_small(key, seeds, steps):
    """Train instances to which the over-parametrized theorem applies: N = n = 3, d = 12."""

    def run(draws):
        # The twelve rows of twelve numbers are tokens, prompt, value, and the direction of the labels.
        tokens, (prompt, value) = draws[:9].reshape(3, 3, 12), draws[9:11] / 12**0.5
        direction = draws[11, :3] / jnp.linalg.norm(draws[11, :3])
        predict, start = as_function(PromptAttention(prompt, value))

        def smallest_singular_value(params):
            attention = jax.nn.softmax(tokens @ params["prompt"][...], axis=-1)
            return jnp.linalg.svd(jnp.einsum("in,ind->id", attention, tokens), compute_uv=False)[-1]

        sigma = smallest_singular_value(start)
        lipschitz = replicator.attention_lipschitz(tokens, tokens)
        # The residual is a tenth less than the hypothesis allows.
        residual = sigma**2 / (4 * lipschitz) / 1.1
        labels = predict(start, tokens) + residual * direction
        theory = replicator.overparametrized_rate(sigma, lipschitz, residual)
        # The run ends when the bound has fallen to exp(-14), a millionth.
        rate = 7 / theory.rate / steps

        def loss(params):
            return jnp.sum(optax.losses.l2_loss(predict(params, tokens), labels))

        def observe(params):
            return {
                "loss": loss(params) / loss(start),
                "displacement": optax.tree.norm(jax.tree.map(jnp.subtract, params, start)),
                "sigma": smallest_singular_value(params) / sigma,
            }

        _, path = train(loss, start, optax.sgd(rate), steps=steps, observe=observe, every=10, time_step=rate)
        bound = jnp.exp(-2 * theory.rate * path.ts)
        return {
            **path.ys,
            "mu_t": theory.rate * path.ts,
            "loss_bound": bound,
            "displacement_bound": theory.displacement,
            "hypothesis": theory.hypothesis,
        }

    return jax.vmap(run)(normal(key, (seeds, 12, 12)))
