"""Several attention heads: those that read inputs of their own follow the one-head flow, others do not.

Heads are summed into one output. All of them attend to all samples, but each has samples of its own, whose
tokens are worth only s times as much to the other heads: the sharing. At s = 0 every head follows the
replicator flow of a single head; as soon as inputs are shared, heads see each other through the residual and
the gap grows like s. The coupled flow of all heads follows the network at any s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.figure import Figure

from dynamics import replicator
from dynamics.flow import Trajectory, gradient_flow, integrate
from models.attention import PromptAttention, attention_function
from models.data.teachers import orthogonal_keys
from models.draws import normal
from models.functional import as_function
from models.losses import bind, squared_error
from models.training import Descent
from sims import plotting
from sims.claims import SECOND_ORDER, SOLVER, Claim, Preset, at_least, at_most, qualified, slope
from sims.compare import SOLVE, convergence_order, lane, lane_gaps, largest, named_lanes, orders, require_ok
from sims.ranges import Count, Length, Positive, Range
from sims.results import Context, Saved


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

    def one_head(values, target, z0):
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
    ys, ok = jax.vmap(one_head, out_axes=(1, 0))(*own)
    return Trajectory(ts, ys, jnp.all(ok)), jax.vmap(coupled_flow)(sharing)


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

    return jax.vmap(flow)(sharing), named_lanes(train, own=0.0, shared=1.0)


def run(config: Config, context: Context) -> dict:
    """Integrate one-head and coupled flows, and train the network, over sharing and learning rate."""
    task = _draw(jax.random.key(context.seed), config)
    sharing = np.array([0.0, *config.sharing, 1.0])
    context.progress("integrating the theory", 0.0)
    one_head, coupled = jax.device_get(_theory(task, sharing, config))
    context.progress("integrating and training the network", 0.5)
    network, trained = jax.device_get(_network(task, sharing, config))
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
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Several heads are like one where they read inputs of their own."""
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


GAP = "largest gap of the attention"


def figure(config: Config, saved: Saved) -> Figure:
    """Attention with own and with shared inputs beside the one-head flow, and the gaps."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (own, shared), (over_sharing, over_rate) = axes

    trained = {name: saved[f"trained/{name}"] for name in ("own", "shared")}
    # What is shown is the sample whose attention is changed most by sharing.
    sample = np.argmax(np.abs(trained["shared"] - trained["own"]).max(axis=(0, 2)))
    labels = [f"token {token + 1}" for token in range(min(4, config.tokens))]
    one_head = saved["one_head"][:, sample, : len(labels)]
    time, legend = "time = learning rate × step", {"loc": "upper center", "ncols": 3}
    titles = {"own": (own, "Own inputs (s = 0)"), "shared": (shared, "Shared inputs (s = 1)")}
    for name, (ax, title) in titles.items():
        paths = saved["time"], one_head, trained[name][:, sample]
        plotting.theory_and_trained(ax, *paths, labels, "one-head flow")
        title = f"{title} and the one-head flow"
        plotting.finish(ax, title, time, "attention", legend, ylim=(-0.02, 1.3))

    one_head, coupled = (saved[f"sharing_gap/{name}"][1:] for name in ("one_head", "coupled"))
    gaps = {"one-head flow": one_head, "coupled flow": coupled}
    title = "Gap of the network's flow over the sharing"
    plotting.gap_panel(over_sharing, saved["sharing"][1:], gaps, "sharing s", GAP, title)
    gaps = {
        "own: one-head flow": saved["rate_gap/own"],
        "shared: coupled flow": saved["rate_gap/coupled"],
        "shared: one-head flow": saved["rate_gap/shared"],
    }
    title = "Gap of gradient descent over the learning rate"
    plotting.gap_panel(over_rate, saved["rate"], gaps, "learning rate", GAP, title)
    return drawn
