"""Gradient flow of softmax attention against the replicator equation with two softmax Jacobians.

A prompt is trained by gradient descent on tokens that are orthogonal keys. Its attention rows follow
dx/dt = -k J(x)^2 g(x) with a gap that falls linearly with the learning rate, and for keys that are orthogonal
up to eps linearly with eps; the coupled flow follows the network whatever the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from dynamics import replicator
from dynamics.flow import Trajectory, gradient_flow, integrate
from models.attention import PromptAttention, attention_function
from models.data.teachers import nearly_orthogonal_keys
from models.draws import normal
from models.functional import as_function
from models.losses import bind, squared_error
from models.training import Descent, map_lanes
from sims import plotting
from sims.claims import (
    ROUNDING,
    SECOND_ORDER,
    SOLVER,
    Claim,
    Preset,
    at_least,
    at_most,
    equals,
    slope,
    stated,
)
from sims.compare import SOLVE, compare, lane, lane_gaps, largest, named_lanes, orders, require_ok
from sims.ranges import Count, Length, Positive, Range
from sims.results import Context, Saved


@dataclass(frozen=True)
class Config:
    """Network, data and sweeps."""

    samples: Count = 3
    """Number of samples N."""
    tokens: Annotated[int, Range(at_least=2)] = 4
    """Tokens per sample n."""
    dim: Count = 15
    """Token dimension d, at least N n for orthogonal keys."""
    key_scale: Positive = 2.0
    """Squared length k of the keys."""
    descent: Descent = Descent(horizon=20.0, points=40, substeps=(2, 6, 20, 60, 200))
    """Gradient descent at several learning rates."""
    eps: Annotated[tuple[Positive, ...], Length(2)] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 5e-1)
    """Relative deviations of the keys' Gram matrix from k I."""


_DESCENT = Descent(horizon=20.0, points=40, substeps=(2, 4, 10, 20, 40, 100, 200, 400))
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": Config(samples=5, tokens=8, dim=60, descent=_DESCENT),
    "paper": Config(samples=20, tokens=20, dim=400, descent=_DESCENT),
}
VERTEX_TIMES = np.append(0.0, np.logspace(-2, 6, 81))
# Gradient descent of the network tends to this flow as the learning rate goes to zero.
_network_field = gradient_flow(squared_error)


def _attention_field(t, x, args):
    """The replicator equation in the shares themselves, which nothing keeps on the simplex."""
    gradient, key_scale = args
    return replicator.attention_field(x, gradient(x), key_scale)


class Task(NamedTuple):
    """Tokens (lane, N, n, d), prompt, value and targets.

    Lane 0: orthogonal keys; then keys that are orthogonal up to eps; the last lane: Gaussian keys.
    """

    tokens: jax.Array
    prompt: jax.Array
    value: jax.Array
    targets: jax.Array

    def network(self):
        """The network's function of parameters and tokens, its parameters, and its attention."""
        model = PromptAttention(self.prompt, self.value, train_value=False)
        return *as_function(model), attention_function(model)


@partial(jax.jit, static_argnames="config")
def _draw(key: jax.Array, config: Config) -> Task:
    k_keys, k_prompt, k_value, k_target, k_generic = jax.random.split(key, 5)
    shape = (config.samples, config.tokens, config.dim)
    near = jax.vmap(lambda eps: nearly_orthogonal_keys(k_keys, *shape, config.key_scale, eps))
    generic = normal(k_generic, shape) * jnp.sqrt(config.key_scale / config.dim)
    tokens = jnp.concatenate([near(jnp.array([0.0, *config.eps])), generic[None]])
    prompt = jax.random.normal(k_prompt, (config.dim,))
    value = jax.random.normal(k_value, (config.dim,))
    return Task(tokens, prompt, value, jax.random.normal(k_target, (config.samples,)))


@partial(jax.jit, static_argnames="config")
def _theory(task: Task, config: Config) -> tuple[dict[str, Trajectory], jax.Array]:
    """Attention along separate and coupled flows in every lane; with one Jacobian, and in the shares.

    With them go two logits along a flow to a vertex, and the closed form of their difference.
    """
    ts, tokens = config.descent.times, task.tokens

    def separate_flows(tokens, flow=replicator.softmax_flow):
        """N separate flows, one per sample; sees the values, the targets and the first logits."""

        def one(values, target, z0):
            gradient = Partial(replicator.squared_error_gradient, values, target)
            return flow(gradient, z0, ts, config.key_scale, **SOLVE)

        samples = tokens @ task.value, task.targets, tokens @ task.prompt
        path = map_lanes(lambda sample: one(*sample), samples, at_once=1)
        rows = jnp.moveaxis(jax.nn.softmax(path.ys, axis=-1), 0, 1)
        return Trajectory(ts, rows, jnp.all(path.ok))

    def coupled_flow(tokens):
        gram = jnp.einsum("iad,jbd->iajb", tokens, tokens)
        gradient = Partial(replicator.squared_error_gradient, tokens @ task.value, task.targets)
        path = replicator.coupled_flow(gradient, tokens @ task.prompt, gram, ts, **SOLVE)
        return Trajectory(ts, jax.nn.softmax(path.ys, axis=-1), path.ok)

    def in_shares(sample):
        values, target, x0 = sample
        args = (Partial(replicator.squared_error_gradient, values, target), config.key_scale)
        return integrate(_attention_field, x0, ts, args, **SOLVE)

    # Solves go one after the other, which compiles more quickly too.
    separate = map_lanes(separate_flows, tokens, at_once=1)
    samples = tokens[0] @ task.value, task.targets, separate.ys[0, 0]
    shares = map_lanes(in_shares, samples, at_once=1)
    constant = jnp.array([0.0, 1.0])
    flows = {
        "separate": separate,
        "coupled": map_lanes(coupled_flow, tokens, at_once=1),
        "single": separate_flows(tokens[0], flow=replicator.natural_gradient_flow),
        "shares": Trajectory(ts, jnp.moveaxis(shares.ys, 0, 1), jnp.all(shares.ok)),
        "vertex": replicator.softmax_flow(lambda x: constant, np.zeros(2), VERTEX_TIMES, **SOLVE),
    }
    return flows, replicator.two_token_solution(VERTEX_TIMES, gap=1.0)


@partial(jax.jit, static_argnames="config")
def _network(task: Task, config: Config) -> tuple[Trajectory, dict[str, Trajectory], dict[str, jax.Array]]:
    """The network's attention along its own gradient flow in every lane, and along gradient descent.

    It descends at every learning rate, on orthogonal and on Gaussian keys. With both goes dL/dt at the start
    on orthogonal keys, by autodiff and by the theory's formula.
    """
    predict, params, attention = task.network()
    ts = config.descent.times

    def flow(tokens):
        data = (predict, tokens, task.targets)
        path = integrate(_network_field, params, ts, data, rtol=1e-10, atol=1e-12, **SOLVE)
        return Trajectory(ts, jax.vmap(attention, in_axes=(0, None))(path.ys, tokens), path.ok)

    def train(tokens):
        loss = bind(squared_error, (predict, tokens, task.targets))
        return config.descent.train(loss, params, observe=bind(attention, tokens))[1]

    orthogonal, gaussian = task.tokens[0], task.tokens[-1]
    x = attention(params, orthogonal)
    g = replicator.squared_error_gradient(orthogonal @ task.value, task.targets, x)
    pushed = replicator.softmax_jacobian_product(x, g)
    gradient = jax.grad(squared_error)(params, (predict, orthogonal, task.targets))
    loss_rate = {
        "network": -optax.tree.norm(gradient, squared=True),
        "formula": -config.key_scale * jnp.sum(pushed**2),
    }
    return (
        map_lanes(flow, task.tokens, at_once=1),
        named_lanes(train, orthogonal=orthogonal, gaussian=gaussian),
        loss_rate,
    )


def run(config: Config, context: Context) -> dict:
    """Integrate the theory, train the network, and measure the gap over learning rates and over eps."""
    task = _draw(jax.random.key(context.seed), config)
    context.progress("integrating the theory", 0.0)
    flows, closed = jax.device_get(_theory(task, config))
    context.progress("integrating and training the network", 0.5)
    network, trained, loss_rate = jax.device_get(_network(task, config))
    require_ok("a flow of attention", *flows.values(), network)

    orthogonal, gaussian = lane(flows["separate"], 0), lane(flows["coupled"], -1)
    gaps = {
        "theory": lane_gaps(orthogonal, trained["orthogonal"]),
        "single": lane_gaps(flows["single"], trained["orthogonal"]),
        "coupled": lane_gaps(gaussian, trained["gaussian"]),
    }
    over_eps = {
        name: np.max(np.abs(network.ys - flows[name].ys), axis=(1, 2, 3))[1:-1]
        for name in ("separate", "coupled")
    }
    own_flow = lane(network, 0)
    return {
        "rate": ("rate", config.descent.rates),
        "time": ("time", config.descent.times),
        "eps": ("eps", np.array(config.eps)),
        "theory": ("time sample token", orthogonal.ys),
        "single": ("time sample token", flows["single"].ys),
        "shares": ("time sample token", flows["shares"].ys),
        "trained": ("time sample token", lane(trained["orthogonal"], -1).ys),
        "gap": ("rate", gaps),
        "eps_gap": ("eps", over_eps),
        "flow_gap": {
            "theory": compare(orthogonal, own_flow).gap,
            "single": compare(flows["single"], own_flow).gap,
        },
        "loss_rate": loss_rate,
        "vertex_time": ("vertex_time", VERTEX_TIMES),
        "vertex": ("vertex_time", {"flow": flows["vertex"].ys @ [-1, 1], "closed": closed}),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The equation and its assumption, the simplex, the loss, and the way to a vertex."""
    own, shares, loss_rate = saved["flow_gap"], saved["shares"], saved["loss_rate"]
    order = orders(saved["rate"], saved["gap"])
    in_rate = "order of gradient descent's gap in the learning rate"
    to_single = "gap of the network's flow to one Jacobian"
    yield stated(
        "two-jacobians",
        "With orthogonal keys attention follows the replicator equation x' = J(x) F(x), F = -k J(x) g",
        "softmax2025talk, gradient flow of the attention vectors",
        at_most("gap of the network's own gradient flow", own["theory"], 1e-6, why=SOLVER),
        slope(in_rate, order["theory"], 1, 0.1, why=SECOND_ORDER),
        at_least(to_single, own["single"], 1e-2, why="size of the attention"),
    )
    small = saved["eps"] <= 0.1
    in_eps = orders(saved["eps"][small], {"separate": saved["eps_gap/separate"][small]})["separate"]
    coupled, twice = largest(saved["eps_gap/coupled"]), "the second order bends it by eps, twice"
    gaussian = "coupled flow, Gaussian keys: order in the learning rate"
    yield stated(
        "near-orthogonal",
        "The equation still holds approximately where the keys are nearly orthogonal",
        "softmax2025talk, remark on the orthogonality assumption",
        slope("order of the gap in eps, eps <= 0.1", in_eps, 1, 0.2, why=twice),
        at_most("largest gap of the coupled flow at any eps", coupled, 1e-6, why=f"{SOLVER}, for any keys"),
        slope(gaussian, order["coupled"], 1, 0.1, why=SECOND_ORDER),
    )
    mass, kept = largest(shares.sum(axis=-1) - 1), "Runge-Kutta keeps linear invariants"
    distance = largest(shares - saved["theory"])
    yield stated(
        "interior",
        "The interior of the simplex is invariant",
        "softmax2025talk, replicator equation",
        # The equation is solved in the shares themselves, where neither is built in.
        at_most("deviation of the shares' sum from one", mass, 1e-10, why=kept),
        at_least("smallest share", shares.min(), 0.0, why="the statement itself"),
        at_most("distance of the shares from softmax of the logits", distance, 1e-6, why=SOLVER),
    )
    quotient = loss_rate["network"] / loss_rate["formula"]
    yield stated(
        "dissipation",
        "The loss falls at the rate k sum |J g|^2",
        "softmax2025talk, gradient flow of the attention vectors (derived here from it)",
        equals("dL/dt by autodiff over the formula", quotient, 1.0, 1e-12, why=ROUNDING),
    )
    flow, end = saved["vertex/flow"], saved["vertex_time"][-1]
    gap, steps = largest(flow - saved["vertex/closed"]), "1e-8 per step, on logits to 15"
    share, next_term = 2 * end * np.exp(flow[-1]), "the next term is u / exp(u), 3e-5"
    yield stated(
        "vertex",
        "Towards a vertex the losing token falls like 1/(2 k D t), not exponentially",
        "softmax2025talk, gradient flow (closed form derived anew: u + sinh u = -k D t)",
        at_most("largest gap to the closed form up to t = 1e6", gap, 1e-6, why=steps),
        equals("2 t x_2 at t = 1e6", share, 1, 1e-4, why=next_term),
    )


GAP = "largest gap of the attention"


def figure(config: Config, saved: Saved) -> Figure:
    """Attention over time, the gap over the learning rate and over eps, and the way to a vertex."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (over_time, over_rate), (over_eps, to_vertex) = axes

    ts, trained = saved["time"], saved["trained"]
    # What is shown is the sample whose attention moves most, and those of its tokens that do.
    moved = np.abs(trained[-1] - trained[0])
    sample = np.argmax(moved.max(axis=1))
    tokens = np.argsort(-moved[sample])[:4]
    labels = [f"token {token + 1}" for token in tokens]
    theory = saved["theory"][:, sample, tokens]
    plotting.theory_and_trained(over_time, ts, theory, trained[:, sample, tokens], labels)
    over_time.plot(ts, saved["single"][:, sample, tokens], **plotting.PRINTED)
    over_time.plot([], [], label="one Jacobian only", **plotting.PRINTED)
    title, legend = "Attention of one sample: trained and theory", {"loc": "upper center", "ncols": 3}
    time = "time = learning rate × step"
    plotting.finish(over_time, title, time, "attention", legend, ylim=(-0.02, 1.3))

    gaps = {
        "orthogonal keys: two Jacobians": saved["gap/theory"],
        "Gaussian keys: coupled flow": saved["gap/coupled"],
        "orthogonal keys: one Jacobian": saved["gap/single"],
    }
    title = "Gap of gradient descent to the flow"
    plotting.gap_panel(over_rate, saved["rate"], gaps, "learning rate", GAP, title)
    gaps = {"separate flows": saved["eps_gap/separate"], "coupled flow": saved["eps_gap/coupled"]}
    eps, title = "eps: deviation of the keys' Gram matrix", "Keys that are orthogonal up to eps"
    plotting.gap_panel(over_eps, saved["eps"], gaps, eps, GAP, title)

    ts, ratio = saved["vertex_time"][1:], saved["vertex/flow"][1:]
    log10_x2 = -np.logaddexp(0, -ratio) / np.log(10)
    to_vertex.semilogx(ts, log10_x2, color="C0", label="softmax flow (two Jacobians)", **plotting.TRAINED)
    to_vertex.plot(ts, -np.log10(2 * ts), label="1 / (2 k D t)", **plotting.THEORY)
    natural = -np.logaddexp(0, ts) / np.log(10)
    to_vertex.plot(ts, natural, color="C1", label="natural gradient (one): exp(-D t)")
    title, ylabel = "To a vertex: algebraic, not exponential", "log10 of the losing token's attention"
    plotting.finish(to_vertex, title, "time", ylabel, "upper right", ylim=(-8, 2.5))
    return drawn
