"""Gradient flow of softmax attention against the replicator equation with two softmax Jacobians.

A prompt is trained by gradient descent on tokens that are orthogonal keys. Its attention rows follow
dx/dt = -k J(x)^2 g(x) with a gap that falls linearly with the learning rate, and for keys that are orthogonal
up to eps linearly with eps; the coupled flow follows the network whatever the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from matplotlib.figure import Figure

from dynamics import replicator
from dynamics.flow import Trajectory, gradient_flow, integrate
from models.attention import PromptAttention, attention_function
from models.data.teachers import nearly_orthogonal_keys
from models.functional import as_function
from models.losses import bind, squared_error
from models.training import train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import compare, convergence_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved


@dataclass(frozen=True)
class Config:
    """Network, data and sweeps."""

    def __post_init__(self):
        require_sweeps(self, "substeps", "eps")

    samples: int = 3
    """Number of samples N."""
    tokens: int = 4
    """Tokens per sample n."""
    dim: int = 15
    """Token dimension d, at least N n for orthogonal keys."""
    key_scale: float = 2.0
    """Squared length k of the keys."""
    horizon: float = 20.0
    """Time at which the runs end."""
    points: int = 40
    """Records along a run."""
    substeps: tuple[int, ...] = (2, 6, 20, 60, 200)
    """Steps between two records, one per learning rate: the rate is horizon / (points * substeps)."""
    eps: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 5e-1)
    """Relative deviations of the keys' Gram matrix from k I."""


_QUICK = Config()
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_QUICK, samples=5, tokens=8, dim=60, substeps=(2, 4, 10, 20, 40, 100, 200, 400)),
    "paper": replace(_QUICK, samples=20, tokens=20, dim=400, substeps=(2, 4, 10, 20, 40, 100, 200, 400)),
}


# The network's own gradient flow: what gradient descent tends to as the learning rate goes to zero.
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
    generic = jax.random.normal(k_generic, shape) * jnp.sqrt(config.key_scale / config.dim)
    tokens = jnp.concatenate([near(jnp.array([0.0, *config.eps])), generic[None]])
    prompt = jax.random.normal(k_prompt, (config.dim,))
    value = jax.random.normal(k_value, (config.dim,))
    return Task(tokens, prompt, value, jax.random.normal(k_target, (config.samples,)))


def _times(config: Config) -> np.ndarray:
    return np.linspace(0.0, config.horizon, config.points + 1)


@partial(jax.jit, static_argnames="config")
def _flows(task: Task, config: Config):
    """Attention along separate and coupled flows in every lane; with one Jacobian, and in the shares."""
    ts, tokens = _times(config), task.tokens

    def separate_flows(tokens, flow=replicator.softmax_flow):
        """N separate flows, one per sample; sees the values, the targets and the first logits."""

        def one(values, target, z0):
            return flow(Partial(replicator.squared_error_gradient, values, target), z0, ts, config.key_scale)

        path = jax.vmap(one)(tokens @ task.value, task.targets, tokens @ task.prompt)
        rows = jnp.moveaxis(jax.nn.softmax(path.ys, axis=-1), 0, 1)
        return Trajectory(ts, rows, jnp.all(path.ok))

    def coupled_flow(tokens):
        gram = jnp.einsum("iad,jbd->iajb", tokens, tokens)
        gradient = Partial(replicator.squared_error_gradient, tokens @ task.value, task.targets)
        path = replicator.coupled_flow(gradient, tokens @ task.prompt, gram, ts)
        return Trajectory(ts, jax.nn.softmax(path.ys, axis=-1), path.ok)

    def in_shares(values, target, x0):
        args = (Partial(replicator.squared_error_gradient, values, target), config.key_scale)
        return integrate(_attention_field, x0, ts, args).ys

    separate = jax.vmap(separate_flows)(tokens)
    coupled = jax.vmap(coupled_flow)(tokens)
    single = separate_flows(tokens[0], flow=replicator.natural_gradient_flow)
    shares = jax.vmap(in_shares, out_axes=1)(tokens[0] @ task.value, task.targets, separate.ys[0, 0])
    return separate, coupled, single, shares


@partial(jax.jit, static_argnames="config")
def _network_flows(task: Task, config: Config) -> Trajectory:
    """The network's attention along its own gradient flow, in every lane."""
    predict, params, attention = task.network()
    ts = _times(config)

    def flow(tokens):
        data = (predict, tokens, task.targets)
        path = integrate(_network_field, params, ts, data, rtol=1e-10, atol=1e-12)
        return Trajectory(ts, jax.vmap(attention, in_axes=(0, None))(path.ys, tokens), path.ok)

    return jax.vmap(flow)(task.tokens)


@partial(jax.jit, static_argnames="config")
def _train(task: Task, config: Config):
    """Learning rates, and attention along gradient descent, on orthogonal and on Gaussian keys."""
    predict, params, attention = task.network()

    def train(tokens):
        return train_at_rates(
            bind(squared_error, (predict, tokens, task.targets)),
            params,
            config.substeps,
            horizon=config.horizon,
            points=config.points,
            observe=bind(attention, tokens),
        )

    return jax.vmap(train, out_axes=(None, 0))(task.tokens[np.array([0, -1])])


@jax.jit
def _to_vertex(ts: jax.Array):
    """Logit of the losing token over the other along a flow with constant gradient, and its closed form."""
    gradient = Partial(_constant_gradient, jnp.array([0.0, 1.0]))
    logits = replicator.softmax_flow(gradient, jnp.zeros(2), ts).ys
    return logits[:, 1] - logits[:, 0], replicator.two_token_solution(ts, gap=1.0)


def _constant_gradient(gradient: jax.Array, x: jax.Array) -> jax.Array:
    return gradient


@partial(jax.jit, static_argnames="config")
def _loss_rates(task: Task, config: Config):
    """dL/dt at the start on orthogonal keys: by autodiff, and by the theory's formula."""
    predict, params, attention = task.network()
    tokens = task.tokens[0]
    gradient = jax.grad(squared_error)(params, (predict, tokens, task.targets))
    network_rate = -sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))
    x = attention(params, tokens)
    pushed = replicator.softmax_jacobian_product(
        x, replicator.squared_error_gradient(tokens @ task.value, task.targets, x)
    )
    return network_rate, -config.key_scale * jnp.sum(pushed**2)


def run(config: Config, context: Context) -> Result:
    """Integrate the theory, train the network, and measure the gap over learning rates and over eps."""
    task = _draw(jax.random.key(context.seed), config)

    context.progress("integrating the theory", 0.0)
    separate, coupled, single, shares = jax.tree.map(np.asarray, _flows(task, config))
    theory, generic_theory = lane(separate, 0), lane(coupled, -1)

    context.progress("integrating the network's gradient flow", 0.4)
    network = jax.tree.map(np.asarray, _network_flows(task, config))
    eps = np.array(config.eps)
    eps_gap, eps_gap_coupled = (
        np.max(np.abs(network.ys - flow.ys), axis=(1, 2, 3))[1:-1] for flow in (separate, coupled)
    )

    context.progress("training at every learning rate", 0.6)
    rates, both = jax.tree.map(np.asarray, _train(task, config))
    trained, generic_trained = lane(both, 0), lane(both, 1)

    context.progress("following a flow to a vertex", 0.9)
    vertex_ts = np.append(0.0, np.logspace(-2, 6, 81))
    vertex, closed = map(np.asarray, _to_vertex(vertex_ts))

    gaps = {
        "theory": lane_gaps(theory, trained),
        "single": lane_gaps(single, trained),
        "coupled": lane_gaps(generic_theory, generic_trained),
    }
    flow_gap, single_gap = (compare(flow, lane(network, 0)).gap for flow in (theory, single))
    data = {
        "theory": theory,
        "single": single,
        "trained": trained,
        "rates": rates,
        "gap": gaps,
        "eps": {"values": eps, "separate": eps_gap, "coupled": eps_gap_coupled},
        "vertex": {"ts": vertex_ts, "log_ratio": vertex},
    }
    claims = (
        _follows_flow(rates, gaps, flow_gap, single_gap),
        _near_orthogonal(eps, eps_gap, eps_gap_coupled, rates, gaps),
        _interior(shares, theory),
        _dissipation(*map(float, _loss_rates(task, config))),
        Claim(
            "replicator.flow/vertex",
            "Towards a vertex the losing token falls like 1/(2 k D t), not exponentially",
            "softmax2025talk, gradient flow (closed form derived anew: u + sinh u = -k D t)",
            "stated",
            [
                # The solver's relative tolerance is 1e-8 per step on numbers of size 15.
                Check("largest gap to the closed form up to t = 1e6", "at most", 1e-6, _sup(vertex - closed)),
                # The next term is u / exp(u), of relative size 3e-5 there.
                Check("2 t x_2 at t = 1e6", "equals", 1.0, 2e6 * np.exp(float(vertex[-1])), 1e-4),
            ],
        ),
    )
    dims = {"trained/ys": ("rate", "time", "sample", "token"), "theory/ys": ("time", "sample", "token")}
    return Result(data, claims, {**dims, "theory/ts": ("time",), "rates": ("rate",), "eps/values": ("eps",)})


def _sup(values: np.ndarray) -> float:
    return float(np.max(np.abs(values)))


def _follows_flow(rates, gaps, flow_gap, single_gap) -> Claim:
    order = convergence_order(rates, gaps["theory"])
    return Claim(
        "replicator.flow/two-jacobians",
        "With orthogonal keys attention follows the replicator equation x' = J(x) F(x), F = -k J(x) g",
        "softmax2025talk, gradient flow of the attention vectors",
        "stated",
        [
            # Two solves at 1e-8 and 1e-10: what is left is solver error.
            Check("gap of the network's own gradient flow", "at most", 1e-6, flow_gap),
            # A first-order method: the curvature of the fit over two decades stays below this.
            Check("order of gradient descent's gap in the learning rate", "slope", 1.0, order.slope, 0.1),
            # One Jacobian too few is visible at the size of the attention itself.
            Check("gap of the network's flow to one Jacobian", "at least", 1e-2, single_gap),
        ],
    )


def _near_orthogonal(eps, eps_gap, eps_gap_coupled, rates, gaps) -> Claim:
    small = eps <= 0.1
    slope = convergence_order(eps[small], eps_gap[small]).slope
    order = convergence_order(rates, gaps["coupled"])
    return Claim(
        "replicator.flow/near-orthogonal",
        "The equation still holds approximately where the keys are nearly orthogonal",
        "softmax2025talk, remark on the orthogonality assumption",
        "stated",
        [
            # The second order in eps bends the line: by about eps, twice over, at its end.
            Check("order of the gap in eps, eps <= 0.1", "slope", 1.0, slope, 0.2),
            # The coupled flow makes no assumption on the keys: solver error only.
            Check("largest gap of the coupled flow at any eps", "at most", 1e-6, _sup(eps_gap_coupled)),
            Check("coupled flow, Gaussian keys: order in the learning rate", "slope", 1.0, order.slope, 0.1),
        ],
    )


def _interior(shares: np.ndarray, theory: Trajectory) -> Claim:
    return Claim(
        "replicator.flow/interior",
        "The interior of the simplex is invariant",
        "softmax2025talk, replicator equation",
        "stated",
        [
            # The equation solved in the shares themselves, where neither is built in. A Runge-Kutta method
            # keeps a linear invariant of the field to rounding.
            Check("deviation of the shares' sum from one", "at most", 1e-10, _sup(shares.sum(axis=-1) - 1)),
            Check("smallest share", "at least", 0.0, shares.min()),
            # Two solves at 1e-8.
            Check(
                "distance of the shares from softmax of the logits", "at most", 1e-6, _sup(shares - theory.ys)
            ),
        ],
    )


def _dissipation(network_rate: float, theory_rate: float) -> Claim:
    return Claim(
        "replicator.flow/dissipation",
        "The loss falls at the rate k sum |J g|^2",
        "softmax2025talk, gradient flow of the attention vectors (derived here from it)",
        "stated",
        [
            # The same number by two routes: rounding only.
            Check(
                "dL/dt by autodiff over the formula",
                "equals",
                1.0,
                network_rate / theory_rate,
                1e-12,
            ),
        ],
    )


GAP = "largest gap of the attention"


def figure(saved: Saved) -> Figure:
    """Attention over time, the gap over the learning rate and over eps, and the way to a vertex."""
    drawn, axes = plotting.new_figure(2, 2, width=4.8, height=3.6)
    (over_time, over_rate), (over_eps, to_vertex) = axes

    ts, finest = saved["theory/ts"], saved["trained/ys"][-1]
    shown = min(4, finest.shape[-1])
    # The sample whose attention moves most, and its tokens that move most.
    moved = np.abs(finest[-1] - finest[0])
    sample = np.argmax(moved.max(axis=1))
    tokens = np.argsort(-moved[sample])[:shown]
    labels = [f"token {token + 1}" for token in tokens]
    theory = saved["theory/ys"][:, sample, tokens]
    plotting.theory_and_trained(over_time, ts, theory, finest[:, sample, tokens], labels)
    over_time.plot(ts, saved["single/ys"][:, sample, tokens], **plotting.PRINTED)
    over_time.plot([], [], label="one Jacobian only", **plotting.PRINTED)
    over_time.set(xlabel="time = learning rate × step", ylabel="attention", ylim=(-0.02, 1.3))
    over_time.set_title("Attention of one sample: trained and theory")
    over_time.legend(loc="upper center", ncols=3)

    rates = saved["rates"]
    gaps = {
        "orthogonal keys: two Jacobians": saved["gap/theory"],
        "Gaussian keys: coupled flow": saved["gap/coupled"],
        "orthogonal keys: one Jacobian": saved["gap/single"],
    }
    plotting.gap_panel(over_rate, rates, gaps, "learning rate", GAP)
    over_rate.set_title("Gap of gradient descent to the flow")

    gaps = {"separate flows": saved["eps/separate"], "coupled flow": saved["eps/coupled"]}
    eps = "eps: deviation of the keys' Gram matrix"
    plotting.gap_panel(over_eps, saved["eps/values"], gaps, eps, GAP)
    over_eps.set_title("Keys that are orthogonal up to eps")

    ts, ratio = saved["vertex/ts"][1:], saved["vertex/log_ratio"][1:]
    log10_x2 = -np.logaddexp(0, -ratio) / np.log(10)
    to_vertex.plot(ts, log10_x2, color="C0", label="softmax flow (two Jacobians)", **plotting.TRAINED)
    to_vertex.plot(ts, -np.log10(2 * ts), label="1 / (2 k D t)", **plotting.THEORY)
    natural = -np.logaddexp(0, ts) / np.log(10)
    to_vertex.plot(ts, natural, color="C1", label="natural gradient (one): exp(-D t)")
    to_vertex.set(xscale="log", xlabel="time", ylabel="log10 of the losing token's attention", ylim=(-8, 2.5))
    to_vertex.set_title("To a vertex: algebraic, not exponential")
    to_vertex.legend(loc="upper right")
    return drawn
