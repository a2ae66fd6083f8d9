"""Students of a prompt-attention teacher, all runs of one kind in one compiled program."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array

from dynamics import replicator
from models.attention.prompt import PromptAttention, attention_log_ratio, log_mean_ratio, prompt_attention
from models.data.teachers import teacher_with_ratio
from models.functional import as_function
from models.losses import gauss_newton_spectrum
from models.optimizers import one_of
from models.training import train

# A student starts from one of two places; these are their positions in `Task`.
STANDARD, LOCAL = 0, 1


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
    rows = jax.random.normal(key, (*leading, samples * dim + 5, dim), dtype)
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


class Lanes(NamedTuple):
    """What differs between runs on the data of one seed: arrays of shape (lane,), rates (seed, lane)."""

    optimizer: Any
    ratio: Any
    start: Any
    rate: Any
    second: Any


@eqx.filter_jit
def train_lanes(task: Task, lanes: Lanes, families, joint, steps, every):
    """Train all lanes of all seeds in one program: records have shape (seed, lane, record, ...)."""

    def run(tokens, labels, prompt, value, lane):
        optimizers = [family(lane.rate, lane.second, steps) for family in families]
        optimizer = one_of(lane.optimizer, optimizers)
        return _student(optimizer, prompt, value, tokens, labels, joint, steps, every)

    def of_seed(task, lanes):
        # A frozen value is the teacher's own, and all lanes share it.
        values = task.start_values[lanes.ratio, lanes.start] if joint else task.value
        over_lanes = jax.vmap(run, in_axes=(None, 0, 0, 0 if joint else None, 0))
        prompts = task.start_prompts[lanes.ratio, lanes.start]
        return over_lanes(task.tokens, task.labels[lanes.ratio], prompts, values, lanes)

    return jax.vmap(of_seed, in_axes=(0, Lanes(None, None, None, 0, None)))(task, lanes)


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

    return jax.vmap(run)(jax.random.normal(key, (seeds, 12, 12)))
