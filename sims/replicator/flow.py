"""Gradient flow of softmax attention against the replicator equation with two softmax Jacobians.

A prompt is trained by gradient descent on tokens that are orthogonal keys. Its attention rows follow
dx/dt = -k J(x)^2 g(x) with a gap that falls linearly with the learning rate, and for keys that are orthogonal
up to eps linearly with eps; the coupled flow follows the network whatever the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from dynamics import replicator
from dynamics.flow import Trajectory, gradient_flow, integrate
from models.attention import PromptAttention, as_function
from models.data.teachers import nearly_orthogonal_keys
from models.training import train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import compare, convergence_order, lane, lane_gaps
from sims.results import Context, Result, Saved


@dataclass(frozen=True)
class Config:
    """Network, data and sweeps."""

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


def sample_gradient(values: jax.Array, target: jax.Array, x: jax.Array) -> jax.Array:
    """Gradient in one attention row x of (1/2) (<u, x> - y)^2, with u = X v what each token is worth."""
    return (jnp.sum(values * x) - target) * values


def all_gradients(values: jax.Array, targets: jax.Array, x: jax.Array) -> jax.Array:
    """`sample_gradient` for all rows, (N, n)."""
    return jax.vmap(sample_gradient)(values, targets, x)


def loss(params: Any, data: Any) -> jax.Array:
    """The network's loss, (1/2) sum_i (f(X_i) - y_i)^2."""
    predict, tokens, targets = data
    return jnp.sum(optax.losses.l2_loss(predict(params, tokens), targets))


def loss_of_params(data: Any, params: Any) -> jax.Array:
    """The loss with its data first, to be bound by `Partial`."""
    return loss(params, data)


def _attention(tokens: jax.Array, params: Any) -> jax.Array:
    return jax.nn.softmax(tokens @ params["prompt"][...], axis=-1)


# The network's own gradient flow: what gradient descent tends to as the learning rate goes to zero.
network_flow_field = gradient_flow(loss)


@partial(jax.jit, static_argnames="config")
def _draw(key: jax.Array, config: Config) -> tuple[jax.Array, ...]:
    """Tokens (lane, N, n, d), prompt, value and targets.

    Lane 0: orthogonal keys; then keys that are orthogonal up to eps; the last lane: Gaussian keys.
    """
    k_keys, k_prompt, k_value, k_target, k_generic = jax.random.split(key, 5)
    shape = (config.samples, config.tokens, config.dim)
    near = jax.vmap(lambda eps: nearly_orthogonal_keys(k_keys, *shape, config.key_scale, eps))
    generic = jax.random.normal(k_generic, shape) * jnp.sqrt(config.key_scale / config.dim)
    tokens = jnp.concatenate([near(jnp.array([0.0, *config.eps])), generic[None]])
    prompt = jax.random.normal(k_prompt, (config.dim,))
    value = jax.random.normal(k_value, (config.dim,))
    return tokens, prompt, value, jax.random.normal(k_target, (config.samples,))


def run(config: Config, context: Context) -> Result:
    """Integrate the theory, train the network, and measure the gap over learning rates and over eps."""
    tokens, prompt, value, targets = _draw(jax.random.key(context.seed), config)
    predict, params = as_function(PromptAttention(prompt, value, train_value=False))
    ts = jnp.linspace(0.0, config.horizon, config.points + 1)
    eps = jnp.asarray(config.eps)

    def separate_flows(tokens, flow=replicator.softmax_flow):
        """N separate flows, one per sample; sees the values, the targets and the first logits."""

        def one(values, target, z0):
            return flow(Partial(sample_gradient, values, target), z0, ts, config.key_scale)

        path = jax.vmap(one)(tokens @ value, targets, tokens @ prompt)
        rows = jnp.moveaxis(jax.nn.softmax(path.ys, axis=-1), 0, 1)
        return Trajectory(ts, rows, jnp.all(path.ok))

    def coupled_flow(tokens):
        gram = jnp.einsum("iad,jbd->iajb", tokens, tokens)
        gradient = Partial(all_gradients, tokens @ value, targets)
        path = replicator.coupled_flow(gradient, tokens @ prompt, gram, ts)
        return Trajectory(ts, jax.nn.softmax(path.ys, axis=-1), path.ok)

    def network_flow(tokens):
        path = integrate(network_flow_field, params, ts, (predict, tokens, targets), rtol=1e-10, atol=1e-12)
        return Trajectory(ts, jax.vmap(lambda params: _attention(tokens, params))(path.ys), path.ok)

    def train(tokens):
        return train_at_rates(
            Partial(loss_of_params, (predict, tokens, targets)),
            params,
            config.substeps,
            horizon=config.horizon,
            points=config.points,
            observe=Partial(_attention, tokens),
        )

    context.progress("integrating the theory", 0.0)
    separate = jax.vmap(separate_flows)(tokens)
    coupled = jax.vmap(coupled_flow)(tokens)
    single = separate_flows(tokens[0], flow=replicator.natural_gradient_flow)
    theory, generic_theory = lane(separate, 0), lane(coupled, -1)

    context.progress("integrating the network's gradient flow", 0.4)
    network = jax.vmap(network_flow)(tokens)
    eps_gap, eps_gap_coupled = (
        jnp.max(jnp.abs(network.ys - flow.ys), axis=(1, 2, 3))[1:-1] for flow in (separate, coupled)
    )

    context.progress("training at every learning rate", 0.6)
    rates, both = jax.vmap(train)(tokens[jnp.array([0, -1])])
    rates, trained, generic_trained = rates[0], lane(both, 0), lane(both, 1)

    context.progress("following a flow to a vertex", 0.9)
    vertex_ts = jnp.concatenate([jnp.zeros(1), jnp.logspace(-2, 6, 81)])
    gradient = Partial(_constant_gradient, jnp.array([0.0, 1.0]))
    logits = replicator.softmax_flow(gradient, jnp.zeros(2), vertex_ts).ys
    vertex = logits[:, 1] - logits[:, 0]

    gaps = {
        "theory": lane_gaps(theory, trained),
        "single": lane_gaps(single, trained),
        "coupled": lane_gaps(generic_theory, generic_trained),
    }
    flow_gap = compare(theory, lane(network, 0)).gap
    data = {
        "theory": theory,
        "single": single,
        "trained": trained,
        "rates": rates,
        "gap": gaps,
        "eps": {"values": eps, "separate": eps_gap, "coupled": eps_gap_coupled},
        "vertex": {"ts": vertex_ts, "log_ratio": vertex},
    }
    closed = replicator.two_token_solution(vertex_ts, gap=1.0)
    claims = (
        _follows_flow(config, rates, gaps, flow_gap, compare(theory, single).gap),
        _near_orthogonal(eps, eps_gap, eps_gap_coupled, rates, gaps),
        _interior(trained),
        _dissipation(config, params, predict, tokens[0], value, targets),
        Claim(
            "replicator.flow/vertex",
            "Towards a vertex the losing token falls like 1/(2 k D t), not exponentially",
            "softmax2025talk, gradient flow (closed form derived anew: u + sinh u = -k D t)",
            "stated",
            [
                # The solver's relative tolerance is 1e-8 per step on numbers of size 15.
                Check("largest gap to the closed form up to t = 1e6", "at most", 1e-6, _sup(vertex - closed)),
                Check("2 t x_2 at t = 1e6", "equals", 1.0, 2e6 * np.exp(float(vertex[-1])), 1e-4),
            ],
        ),
    )
    dims = {"trained/ys": ("rate", "time", "sample", "token"), "theory/ys": ("time", "sample", "token")}
    return Result(data, claims, {**dims, "rates": ("rate",), "eps/values": ("eps",)})


def _constant_gradient(gradient: jax.Array, x: jax.Array) -> jax.Array:
    return gradient


def _sup(values: jax.Array) -> float:
    return float(jnp.max(jnp.abs(values)))


def _follows_flow(config, rates, gaps, flow_gap, single_gap) -> Claim:
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
            Check("gap of the flow with a single Jacobian", "at least", 1e-2, single_gap),
        ],
    )


def _near_orthogonal(eps, eps_gap, eps_gap_coupled, rates, gaps) -> Claim:
    small = np.asarray(eps) <= 0.1
    slope = convergence_order(np.asarray(eps)[small], np.asarray(eps_gap)[small]).slope
    order = convergence_order(rates, gaps["coupled"])
    return Claim(
        "replicator.flow/near-orthogonal",
        "The equation still holds approximately where the keys are nearly orthogonal",
        "softmax2025talk, remark on the orthogonality assumption",
        "stated",
        [
            Check("order of the gap in eps, eps <= 0.1", "slope", 1.0, slope, 0.2),
            # The coupled flow makes no assumption on the keys: solver error only.
            Check("largest gap of the coupled flow at any eps", "at most", 1e-6, _sup(eps_gap_coupled)),
            Check("coupled flow, Gaussian keys: order in the learning rate", "slope", 1.0, order.slope, 0.1),
        ],
    )


def _interior(trained: Trajectory) -> Claim:
    mass = _sup(jnp.sum(trained.ys, axis=-1) - 1)
    return Claim(
        "replicator.flow/interior",
        "The interior of the simplex is invariant",
        "softmax2025talk, replicator equation",
        "stated",
        [
            Check("largest deviation of an attention row's sum from one", "at most", 1e-10, mass),
            Check("log10 of the smallest attention", "at least", -300, float(jnp.log10(jnp.min(trained.ys)))),
        ],
    )


def _dissipation(config, params, predict, tokens, value, targets) -> Claim:
    gradient = jax.grad(loss)(params, (predict, tokens, targets))
    network_rate = -sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))
    x = _attention(tokens, params)
    pushed = replicator.softmax_jacobian_product(x, all_gradients(tokens @ value, targets, x))
    theory_rate = -config.key_scale * float(jnp.sum(pushed**2))
    return Claim(
        "replicator.flow/dissipation",
        "The loss falls at the rate k sum |J g|^2",
        "softmax2025talk, gradient flow of the attention vectors",
        "stated",
        [
            # The same number by two routes: rounding only.
            Check(
                "dL/dt by autodiff, relative to the formula", "equals", 1.0, network_rate / theory_rate, 1e-9
            )
        ],
    )


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
    over_rate.loglog(rates, saved["gap/theory"], "o", color="C0", label="orthogonal keys: two Jacobians")
    over_rate.loglog(rates, saved["gap/coupled"], "s", color="C2", label="Gaussian keys: coupled flow")
    over_rate.loglog(rates, saved["gap/single"], "^", color="0.45", label="orthogonal keys: one Jacobian")
    plotting.reference_slope(over_rate, rates, saved["gap/theory"], 1, "slope 1")
    over_rate.set(xlabel="learning rate", ylabel="largest gap of the attention", ylim=(None, 3e3))
    over_rate.set_title("Gap of gradient descent to the flow")
    over_rate.legend(loc="upper left")

    eps = saved["eps/values"]
    over_eps.loglog(eps, saved["eps/separate"], "o", color="C0", label="separate flows")
    over_eps.loglog(eps, saved["eps/coupled"], "s", color="C2", label="coupled flow")
    plotting.reference_slope(over_eps, eps, saved["eps/separate"], 1, "slope 1")
    over_eps.set(xlabel="eps: deviation of the keys' Gram matrix", ylabel="largest gap of the attention")
    over_eps.set_title("Keys that are orthogonal up to eps")
    over_eps.legend(loc="center right")

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
