"""Several attention heads: those that read inputs of their own follow the one-head flow, others do not.

Heads are summed into one output. All of them attend to all samples, but each has samples of its own, whose
tokens are worth only s times as much to the other heads: the sharing. At s = 0 every head follows the
replicator flow of a single head; as soon as inputs are shared, heads see each other through the residual and
the gap grows like s. The coupled flow of all heads follows the network at any s.

In self-attention every token is a query, and one matrix W is trained for all: a teacher of a small or a very
large ratio of attention says whether gradient descent slows down as it does with one query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gmean

from dynamics import replicator
from dynamics.flow import Trajectory, gradient_flow, integrate
from models.attention import PromptAttention, attention_function
from models.attention.prompt import attention_log_ratio, log_mean_ratio
from models.attention.students import best_rate
from models.data.teachers import orthogonal_keys, teacher_with_ratio
from models.draws import normal
from models.functional import as_function
from models.losses import bind, gauss_newton_spectrum, squared_error
from models.training import Descent, map_lanes, record_steps, train
from sims import plotting
from sims.claims import (
    SECOND_ORDER,
    SOLVER,
    Claim,
    Preset,
    at_least,
    at_most,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import SOLVE, convergence_order, lane, lane_gaps, largest, named_lanes, orders, require_ok
from sims.ranges import Count, Length, Positive, Range
from sims.results import Context, Saved

Ratio = Annotated[float, Range(above=1)]
TARGET = 1e-10  # relative loss of self-attention up to which iterations are counted
EVERY = 20  # steps between two records of it


@dataclass(frozen=True)
class Config:
    """Network, data and sweeps."""

    heads: Annotated[int, Range(at_least=2)] = 2
    """Number of heads; sample i belongs to head i mod heads."""
    samples: Count = 4
    """Number of samples N."""
    tokens: Annotated[int, Range(at_least=2)] = 4
    """Tokens per sample n."""
    dim: Count = 20
    """Token dimension d, at least N n for orthogonal keys."""
    key_scale: Positive = 2.0
    """Squared length k of the keys."""
    descent: Descent = Descent(horizon=10.0, points=40, substeps=(2, 6, 20, 60, 200))
    """Gradient descent at several learning rates."""
    sharing: Annotated[tuple[Positive, ...], Length(2)] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """How much a sample's tokens are worth to the heads it does not belong to; 0 and 1 are always run too."""
    self_sizes: tuple[Count, Count, Count] = (20, 5, 4)
    """Self-attention: samples, tokens and dimension d; the d^2 weights are fewer than the outputs."""
    self_ratios: tuple[Ratio, Ratio] = (10.0, 1e25)
    """Self-attention: the teachers' mean ratios of largest to smallest attention."""
    self_seeds: Count = 4
    """Self-attention: seeds."""
    self_steps: Count = 8000
    """Self-attention: steps of gradient descent."""
    rate_multiples: Annotated[tuple[Positive, ...], Length(1)] = (0.5, 1.0)
    """The same: rates in units of 2 / (smallest + largest Gauss-Newton eigenvalue at the teacher)."""


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": Config(heads=3, samples=9, tokens=6, dim=60),
    "paper": Config(heads=8, samples=24, tokens=16, dim=400),
}
# Gradient descent of the network tends to this flow as the learning rate goes to zero.
_network_field = gradient_flow(squared_error)


def own_rows(rows: jax.Array) -> jax.Array:
    """What belongs to every sample's own head, (..., N, n), of what all heads have, (..., N, H, n)."""
    samples, heads, _ = rows.shape[-3:]
    sample = np.arange(samples)
    return rows[..., sample, sample % heads, :]


class Task(NamedTuple):
    """Tokens (N, n, d), prompts (H, 1, d), what tokens are worth to each head (N, H, n), targets (N,)."""

    tokens: jax.Array
    prompts: jax.Array
    worth: jax.Array
    targets: jax.Array

    def values_at(self, sharing) -> jax.Array:
        """What tokens are worth to each head, to those that do not own them `sharing` times as much."""
        samples, heads, _ = self.worth.shape
        is_owner = np.arange(samples)[:, None] % heads == np.arange(heads)[None, :]
        return self.worth * jnp.where(is_owner, 1.0, sharing)[:, :, None]

    def network_at(self, sharing, key_scale: float):
        """Data and parameters of the network, and its attention."""
        # Orthogonal keys let a value vector give every token any worth: X_i v_h = u_ih.
        value = jnp.einsum("ind,ihn->hd", self.tokens, self.values_at(sharing)) / key_scale
        model = PromptAttention(self.prompts, value, train_value=False)
        predict, params = as_function(model)
        return (predict, self.tokens, self.targets[:, None]), params, attention_function(model)


@partial(jax.jit, static_argnames="config")
def _draw(key: jax.Array, config: Config) -> Task:
    k_keys, k_prompt, k_worth, k_target = jax.random.split(key, 4)
    n, samples, heads = config.tokens, config.samples, config.heads
    tokens = orthogonal_keys(k_keys, samples, n, config.dim, config.key_scale)
    prompts = normal(k_prompt, (heads, 1, config.dim))
    worth = normal(k_worth, (samples, heads, n))
    return Task(tokens, prompts, worth, jax.random.normal(k_target, (samples,)))


@partial(jax.jit, static_argnames="config")
def _theory(task: Task, sharing: jax.Array, config: Config) -> tuple[Trajectory, Trajectory]:
    """Attention of every sample's own head along the one-head flow, and along coupled flows."""
    ts = config.descent.times
    logits = jnp.einsum("ind,hqd->ihn", task.tokens, task.prompts)
    samples, heads, n = task.worth.shape
    rows = samples * heads

    def one_head(sample):
        values, target, z0 = sample
        gradient = Partial(replicator.squared_error_gradient, values, target)
        path = replicator.softmax_flow(gradient, z0, ts, config.key_scale, **SOLVE)
        return jax.nn.softmax(path.ys, axis=-1), path.ok

    def gradient_of_all(values, x):
        # The heads of a sample are summed: their rows are one long row to the residual.
        x = x.reshape(samples, heads * n)
        return replicator.squared_error_gradient(values.reshape(x.shape), task.targets, x).reshape(rows, n)

    def coupled_flow(sharing):
        # Rows of different heads do not see each other's keys: their prompts are different parameters.
        gram = config.key_scale * jnp.eye(rows * n).reshape(rows, n, rows, n)
        gradient = Partial(gradient_of_all, task.values_at(sharing))
        path = replicator.coupled_flow(gradient, logits.reshape(rows, n), gram, ts, **SOLVE)
        attention = jax.nn.softmax(path.ys, axis=-1).reshape(len(ts), samples, heads, n)
        return Trajectory(ts, own_rows(attention), path.ok)

    own = own_rows(task.worth), task.targets, own_rows(logits)
    # Solves go one after the other, which compiles more quickly too.
    ys, ok = map_lanes(one_head, own, at_once=1)
    separate = Trajectory(ts, jnp.moveaxis(ys, 0, 1), jnp.all(ok))
    return separate, map_lanes(coupled_flow, sharing, at_once=1)


@partial(jax.jit, static_argnames="config")
def _network(task: Task, sharing: jax.Array, config: Config) -> tuple[Trajectory, dict[str, Trajectory]]:
    """The same along the network's own gradient flow, and, with own and shared inputs, gradient descent."""
    ts = config.descent.times

    def flow(sharing):
        data, params, attention = task.network_at(sharing, config.key_scale)
        path = integrate(_network_field, params, ts, data, rtol=1e-10, atol=1e-12, **SOLVE)
        rows = jax.vmap(attention, in_axes=(0, None))(path.ys, task.tokens)
        return Trajectory(ts, own_rows(rows[..., 0, :]), path.ok)

    def train(sharing):
        data, params, attention = task.network_at(sharing, config.key_scale)
        loss, observe = bind(squared_error, data), bind(attention, task.tokens)
        _, path = config.descent.train(loss, params, observe=observe)
        return Trajectory(path.ts, own_rows(path.ys[..., 0, :]), path.ok)

    return map_lanes(flow, sharing, at_once=1), named_lanes(train, own=0.0, shared=1.0)


def _self_attention(weights: jax.Array, tokens: jax.Array, value: jax.Array) -> jax.Array:
    """Outputs (N, n) of softmax(X W X^T) X v: every token is a query."""
    attention = jax.nn.softmax(jnp.einsum("iqd,de,ime->iqm", tokens, weights, tokens), axis=-1)
    return jnp.einsum("iqm,ime,e->iq", attention, tokens, value)


@partial(jax.jit, static_argnames="config")
def _descend(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Gradient descent on the weights of self-attention, over (seed, ratio, rate)."""
    (samples, tokens, dim), steps = config.self_sizes, config.self_steps

    def one(key, ratio):
        k_rows, k_teacher = jax.random.split(key)
        rows = normal(k_rows, (samples * tokens + 1 + dim, dim))
        X, value, start = rows[: -1 - dim].reshape(samples, tokens, dim), rows[-1 - dim], rows[-dim:] / dim
        # Logits are linear in W: a query and a token make one key of d^2 numbers.
        keys = jnp.einsum("iqd,ime->iqmde", X, X).reshape(samples * tokens, tokens, dim**2)
        teacher = teacher_with_ratio(k_teacher, keys, ratio).reshape(dim, dim)

        def outputs(weights, X):
            return _self_attention(weights, X, value / dim**0.5)

        def loss(weights):
            return jnp.mean(optax.losses.l2_loss(outputs(weights, X), outputs(teacher, X)))

        def observe(weights):
            log_ratio = log_mean_ratio(attention_log_ratio(weights.ravel(), keys))
            return {"loss": loss(weights), "log10_ratio": log_ratio / jnp.log(10.0)}

        # The loss is a mean over queries too.
        spectrum = gauss_newton_spectrum(outputs, teacher, X) / tokens
        rates = 2 / (spectrum[0] + spectrum[-1]) * jnp.asarray(config.rate_multiples)
        found = jax.vmap(
            lambda rate: train(loss, start, optax.sgd(rate), steps=steps, observe=observe, every=EVERY)[1].ys
        )(rates)
        return {**found, "rate": rates, "condition": spectrum[0] / spectrum[-1]}

    over_ratios = jax.vmap(one, (None, 0))
    keys = jax.random.split(key, config.self_seeds)
    return jax.vmap(over_ratios, (0, None))(keys, jnp.asarray(config.self_ratios))


def _self_entries(key: jax.Array, config: Config) -> dict[str, Any]:
    """What is saved of self-attention, at the best of the rates."""
    found = jax.device_get(_descend(key, config))
    condition = found.pop("condition")
    best = best_rate(found, TARGET, EVERY)
    return {
        "step": ("step", record_steps(config.self_steps, EVERY)),
        "ratio": ("ratio", np.array(config.self_ratios)),
        "self": {
            "condition": ("seed ratio", condition),
            "iterations": ("seed ratio", best["iterations"]),
            "loss": ("seed ratio step", best["loss"]),
            "log10_ratio": ("seed ratio", best["log10_ratio"][..., -1]),
        },
    }


def run(config: Config, context: Context) -> dict:
    """Integrate one-head and coupled flows, and train the network, over sharing and learning rate."""
    task = _draw(jax.random.key(context.seed), config)
    sharing = np.array([0.0, *config.sharing, 1.0])
    context.progress("integrating the theory", 0.0)
    one_head, coupled = jax.device_get(_theory(task, sharing, config))
    context.progress("integrating and training the network", 0.4)
    network, trained = jax.device_get(_network(task, sharing, config))
    context.progress("self-attention", 0.8)
    require_ok("a flow of attention", one_head, coupled, network)
    over_sharing = {
        "one_head": lane_gaps(one_head, network),
        "coupled": np.max(np.abs(network.ys - coupled.ys), axis=(1, 2, 3)),
    }
    over_rates = {
        "own": lane_gaps(one_head, trained["own"]),
        "shared": lane_gaps(one_head, trained["shared"]),
        "coupled": lane_gaps(lane(coupled, -1), trained["shared"]),
    }
    return {
        "rate": ("rate", config.descent.rates),
        "time": ("time", config.descent.times),
        "sharing": ("sharing", sharing),
        "one_head": ("time sample token", one_head.ys),
        "trained": ("time sample token", {name: path.ys[-1] for name, path in trained.items()}),
        "sharing_gap": ("sharing", over_sharing),
        "rate_gap": ("rate", over_rates),
        **_self_entries(jax.random.fold_in(jax.random.key(context.seed), 1), config),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Several heads are like one where they read inputs of their own; several queries are like one."""
    yield _many_queries(config, saved)
    sharing, gap = saved["sharing"], saved["sharing_gap/one_head"]
    small = (sharing > 0) & (sharing <= 0.1)
    in_sharing = convergence_order(sharing[small], gap[small]).slope
    order = orders(saved["rate"], saved["rate_gap"])
    coupled_gap = largest(saved["sharing_gap/coupled"])
    twice, in_rate = "the second order bends it by s, twice", "in the learning rate"
    yield qualified(
        "decoupled",
        "With several heads the results are similar",
        "softmax2025talk, questions: additional heads",
        condition="the heads read inputs of their own",
        inside=[
            at_most("own inputs: gap of the network's flow to the one-head flow", gap[0], 1e-6, why=SOLVER),
            slope(f"own inputs: order of the gap {in_rate}", order["own"], 1, 0.1, why=SECOND_ORDER),
        ],
        outside=[
            # The talk expects "different phenomena" here: a gap that stays.
            at_least("shared inputs: gap to the one-head flow", gap[-1], 1e-2, why="size of the attention"),
            at_most(f"shared inputs: its order {in_rate}", order["shared"], 0.5, why="1 where a gap closes"),
            slope("order of the gap in the sharing, s <= 0.1", in_sharing, 1, 0.2, why=twice),
            at_most("coupled flow: largest gap at any s", coupled_gap, 1e-6, why=SOLVER),
            slope(
                f"coupled flow, shared inputs: order {in_rate}", order["coupled"], 1, 0.1, why=SECOND_ORDER
            ),
        ],
    )


def _many_queries(config: Config, saved: Saved) -> Claim:
    # A run that never reaches the target counts with all its steps, which understates the slowdown.
    small, large = gmean(np.minimum(saved["self/iterations"], config.self_steps), axis=0)
    decades = np.log10(saved["self/condition"][:, 1] / saved["self/condition"][:, 0])
    off = np.median(np.abs(saved["self/log10_ratio"] - np.log10(saved["ratio"])), axis=0)
    best, severe = "the best first-order method slows down 7 times", "an order of magnitude, severe"
    well, same = "well: an eighth of its steps", "the same order of magnitude: half a decade"
    return stated(
        "self-attention",
        "In self-attention, where every token is a query, the observations hold: near the boundary the "
        "problem is ill-conditioned, and gradient descent does well for a small ratio and struggles for a "
        "large one",
        "softmax2025talk, questions during the talk: several queries",
        every("seeds where the condition number is larger at the large ratio", decades > 0),
        at_least("decades of condition number", np.mean(decades), 1, why=severe),
        at_most(f"iterations to {TARGET:g}, small ratio", small, config.self_steps / 8, why=well),
        at_least("iterations, large ratio over small ratio", large / small, 8, why=best),
        at_most("median decades off the teacher's ratio at the end, small ratio", off[0], 0.5, why=same),
        at_most("the same, large ratio", off[1], 0.5, why=same),
    )


GAP = "largest gap of the attention"


def figure(config: Config, saved: Saved) -> Figure:
    """Attention with own and with shared inputs beside the one-head flow, and the gaps."""
    drawn, axes = plotting.new_figure(2, 3, width=3.75, height=3.4)
    (own, shared, condition), (over_sharing, over_rate, losses) = axes

    trained = {name: saved[f"trained/{name}"] for name in ("own", "shared")}
    # What is shown is the sample whose attention is changed most by sharing.
    sample = np.argmax(np.abs(trained["shared"] - trained["own"]).max(axis=(0, 2)))
    labels = [f"token {token + 1}" for token in range(min(4, config.tokens))]
    one_head = saved["one_head"][:, sample, : len(labels)]
    time, legend = "time = learning rate × step", {"loc": "upper center", "ncols": 2}
    titles = {"own": (own, "Own inputs (s = 0)"), "shared": (shared, "Shared inputs (s = 1)")}
    for name, (ax, title) in titles.items():
        paths = saved["time"], one_head, trained[name][:, sample]
        plotting.theory_and_trained(ax, *paths, labels, "one-head flow")
        plotting.finish(ax, title, time, "attention", legend, ylim=(-0.02, 1.5))

    one_head, coupled = (saved[f"sharing_gap/{name}"][1:] for name in ("one_head", "coupled"))
    gaps = {"one-head flow": one_head, "coupled flow": coupled}
    title = "Flow of the network"
    plotting.gap_panel(over_sharing, saved["sharing"][1:], gaps, "sharing s", GAP, title)
    gaps = {
        "own: one-head flow": saved["rate_gap/own"],
        "shared: coupled flow": saved["rate_gap/coupled"],
        "shared: one-head flow": saved["rate_gap/shared"],
    }
    title = "Gradient descent on the network"
    plotting.gap_panel(over_rate, saved["rate"], gaps, "learning rate", GAP, title)
    _draw_queries(condition, losses, saved)
    return drawn


def _draw_queries(condition: Axes, losses: Axes, saved: Saved) -> None:
    """Self-attention: the condition number at the teacher, and the loss over iterations, of every seed."""
    seeds = np.arange(len(saved["self/condition"])) + 1
    for index, ratio in enumerate(saved["ratio"]):
        label, color = f"teacher's ratio $10^{{{np.log10(ratio):.3g}}}$", f"C{index}"
        condition.semilogy(seeds, saved["self/condition"][:, index], "o", color=color, label=label)
        for seed, loss in enumerate(saved["self/loss"][:, index]):
            losses.loglog(saved["step"][1:], loss[1:] / loss[0], color=color, label="_" if seed else label)
    condition.set_xticks(seeds)
    plotting.make_room(condition, above=0.3)
    plotting.finish(condition, "Self-attention: conditioning", "seed", "condition number", "upper left")
    plotting.make_room(losses, below=0.3)
    title = "Self-attention: gradient descent"
    plotting.finish(losses, title, "iterations", "loss over its first value", "lower left")
