"""One hidden layer: regularization makes the network collapse, continuously, and ridge regression never.

A linear network U W x with noise on its hidden units, of mean 1 and variance s, has the exact mean loss

    L = E|U diag(e) W x - y|^2 + gamma_u |U|^2 + gamma_w |W|^2.

Its global minimum is zero where gamma_u gamma_w >= |E[x y]|^2. Below that all weights grow from zero like the
root of the distance, a transition of second order. Networks are trained on the exact loss by gradient descent
from many starts, and by SGD with noise that is drawn; a theory that is two percent off would be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import collapse
from dynamics.collapse import Moments
from dynamics.flow import Trajectory
from models.collapse import StochasticLinear, noisy_batch, random_weights, weights
from models.draws import normal
from models.functional import as_function
from models.losses import mean_squared_error
from models.training import Descent, train
from sims import plotting
from sims.claims import (
    SECOND_ORDER,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    equals,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import (
    SOLVE,
    convergence_order,
    first_order,
    fit_line,
    in_calls,
    lane_gaps,
    largest,
    require_ok,
    right_and_wrong,
)
from sims.ranges import Count, Length, Positive, Range, Share, check_ranges
from sims.results import Context, Saved

TALK = "ziyin2022talk"
STEPS = (1e-1, 1e-2, 1e-3)  # relative to the critical strength, at which kinks are looked for
CLOSE = 0.04  # how near to the critical strength networks are trained
SIGNAL = 2.0  # |E[x y]| of the data, which differs from its square
UNEQUAL = 0.25  # gamma_u / gamma_w where the two layers differ
LANES = 300  # points of the curves of minima


@dataclass(frozen=True)
class Config:
    """The data, the network, and how it is trained."""

    inputs: Annotated[int, Range(at_least=2)] = 4
    """Dimension d of the inputs."""
    width: Annotated[int, Range(at_least=2)] = 3
    """Hidden units."""
    noise_variance: Positive = 0.7
    """Variance s of the noise on hidden units; dropout at rate p has s = p / (1 - p)."""
    samples: Annotated[int, Range(at_least=10)] = 40
    """Examples in the data set."""
    shares: Annotated[tuple[Positive, ...], Length(4)] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3)
    """Strengths at which networks are trained, over the critical one, on both sides of it."""
    starts: Annotated[int, Range(at_least=2)] = 64
    """Random starts at each strength."""
    steps: Count = 4000
    """Steps of descent with momentum from each start."""
    seeds: Annotated[int, Range(at_least=2)] = 4
    """Runs of SGD with drawn noise at each strength."""
    noisy_steps: Annotated[int, Range(at_least=100)] = 3000
    """Steps of SGD."""
    noisy_rate: Share = 0.004
    """Learning rate of SGD."""
    batch: Count = 32
    """Examples in a batch of SGD."""
    gamma: Positive = 0.15
    """Strength of both layers where descent is followed from one start."""
    descent: Descent = Descent(horizon=3.0, points=30, substeps=(4, 12, 40, 120))
    """That descent, at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if list(self.shares) != sorted(self.shares) or not self.shares[1] < 1 < self.shares[-1]:
            raise ValueError(f"shares must increase, from two below 1 to one above it, got {self.shares}")
        if any(abs(share - 1) < CLOSE for share in self.shares):
            raise ValueError(
                f"shares must keep {CLOSE:g} away from 1, where descent slows, got {self.shares}"
            )


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        shares=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3),
        steps=10_000,
        seeds=8,
        noisy_steps=20_000,
        noisy_rate=0.002,
        descent=Descent(3.0, 30, (4, 12, 40, 120, 400)),
    ),
    "paper": replace(
        Config(), inputs=20, width=10, samples=400, starts=256, steps=20_000, noisy_steps=50_000
    ),
}


@partial(jax.jit, static_argnames="config")
def _draw(config: Config, key: Array) -> tuple[Array, Array, Moments]:
    """Inputs of unequal variances, noisy targets that are linear in them, and their moments."""
    keys = jax.random.split(key, 3)
    spread = jnp.geomspace(1.6, 0.4, config.inputs)
    x = normal(keys[0], (config.samples, config.inputs)) * spread[None]
    y = x @ normal(keys[1], (config.inputs, 1)) / config.inputs**0.5
    y = y + 0.2 * normal(keys[2], y.shape)
    y = y * SIGNAL / jnp.linalg.norm(collapse.moments(x, y[:, 0]).c)
    return x, y, collapse.moments(x, y[:, 0])


def _exact_loss(data: tuple, params: list[Array]) -> Array:
    """The loss of a network, with the noise on its hidden units integrated."""
    return collapse.stochastic_linear_loss(params, *data)


@partial(jax.jit, static_argnames=("width",))
def _minima_of(gammas: Any, moments: Moments, noise: Any, width: int) -> collapse.TwoLayerMinimum:
    """The global minima at many (gamma_u, gamma_w); a program for each number of them."""
    return jax.vmap(lambda u, w: collapse.two_layer_minimum(moments, u, w, noise, width))(*gammas)


def _minima(gammas: Any, moments: Moments, noise: float, width: int) -> collapse.TwoLayerMinimum:
    """The same of one compiled program for all curves."""
    both = tuple(np.asarray(gammas, float))
    return in_calls(lambda lanes: _minima_of(lanes, moments, np.float64(noise), width), both, LANES)


def _theory(config: Config, moments: Moments, critical: float) -> dict:
    """The minimum over the strength of both layers, with that of ridge regression beside it."""
    share = np.linspace(0.01, 1.5, LANES)
    both = critical * np.asarray([share, share])
    least = _minima(both, moments, config.noise_variance, config.width)
    ridge = jax.jit(jax.vmap(partial(collapse.ridge_minimum, moments)))(both[0])
    b = np.linspace(-1.6, 1.6, 161) * least.b[0] / config.width**0.5
    depths = np.asarray([0.3, 0.6, 1.0, 1.3])
    landscape = jax.jit(
        jax.vmap(
            lambda s: collapse.effective_landscape(
                b, moments, s * critical, config.noise_variance, config.width, 1
            )
        )
    )(depths)
    return {
        "share": ("share", share),
        "b": ("share", least.b),
        "ridge_norm": ("share", np.linalg.norm(ridge.W, axis=(1, 2))),
        "landscape": {"share": ("depth", depths), "b": ("at", b), "loss": ("depth at", landscape)},
    }


def _near(config: Config, moments: Moments) -> dict:
    """The order parameter over the distance t = |c|^2 - gamma_u gamma_w, and its law close to zero."""
    signal = np.sum(moments.c**2)
    t = np.geomspace(1e-6, 0.9, 80)
    gamma_w = np.sqrt(signal / UNEQUAL)  # so that gamma_u / gamma_w is `UNEQUAL` at the transition
    gammas = np.stack([signal * (1 - t) / gamma_w, np.full(t.shape, gamma_w)])
    stretch = moments.c @ moments.A @ moments.c
    law = gamma_w * signal * t / (2 * (config.noise_variance + config.width) * stretch)
    return {
        "t": ("t", t),
        "b": ("t", _minima(gammas, moments, config.noise_variance, config.width).b),
        "law": ("t", np.sqrt(law)),
    }


def _kinks(config: Config, moments: Moments, critical: float) -> dict:
    """Second differences of the squared norm of the weights around the transition, and its order."""
    width, noise = config.width, config.noise_variance

    @jax.jit
    def of_ridge(gamma):
        return jnp.sum(collapse.ridge_minimum(moments, gamma).W ** 2)

    squared_norm = {
        "network": lambda gamma: (
            2 * width * float(_minima([[gamma], [gamma]], moments, noise, width).b[0]) ** 2
        ),
        "ridge": lambda gamma: float(of_ridge(float(gamma))),
    }
    around = critical * (1 + np.asarray(STEPS)[:, None] * np.asarray([-1.0, 0.0, 1.0]))
    norm = {name: np.vectorize(of)(around) for name, of in squared_norm.items()}
    jump = np.abs(2 * width * critical**2 / ((noise + width) * (moments.c @ moments.A @ moments.c)))
    orders = {name: collapse.transition_order(of, critical) for name, of in squared_norm.items()}
    return {
        "step": ("step", np.asarray(STEPS)),
        "bend": {
            name: ("step", np.abs(m @ [1, -2, 1]) / (critical * np.asarray(STEPS)))
            for name, m in norm.items()
        },
        "fall": ("step", norm["network"][:, 0] - norm["network"][:, 2]),
        "jump": jump,
        "order": orders,
    }


@partial(jax.jit, static_argnames="config")
def _descended(config: Config, key: Array, moments: Moments, gammas: Array, noise: Array) -> dict:
    """Where descent on the exact loss ends from many starts, at each strength and variance of the noise."""
    sizes = (config.inputs, config.width, 1)
    optimizer = optax.sgd(0.01, momentum=0.9)

    def trained(key, gammas, noise):
        loss = Partial(_exact_loss, (moments, noise, gammas))
        (W, U), _ = train(
            loss, random_weights(key, sizes, 0.5), optimizer, steps=config.steps, every=config.steps
        )
        second = jnp.linalg.svd(W, compute_uv=False)[1]
        units, norms = jnp.abs(U[0]), jnp.stack([jnp.sum(W**2), jnp.sum(U**2)])
        return {"loss": loss([W, U]), "units": units, "norms": norms, "second": second}

    keys = jax.random.split(key, config.starts)
    return jax.vmap(jax.vmap(trained, (0, None, None)), (None, 0, 0))(keys, gammas, noise)


def _starts(config: Config, key: Array, moments: Moments, critical: float) -> dict:
    """Descent from many starts at equal strengths, at unequal ones, and without noise; and the minima."""
    shares, noise = np.asarray(config.shares), config.noise_variance
    ratio = np.sqrt([[1 / UNEQUAL], [UNEQUAL]])  # of W and of U
    gammas = critical * np.concatenate([[shares, shares], ratio * shares, [shares[:2], shares[:2]]], axis=1)
    noises = np.concatenate([np.full(2 * shares.size, noise), np.zeros(2)])
    ends = jax.device_get(_descended(config, key, moments, jnp.asarray(gammas.T), jnp.asarray(noises)))
    dims = {"loss": "start", "units": "start unit", "norms": "start layer", "second": "start"}
    parts = {"equal": slice(0, shares.size), "unequal": slice(shares.size, -2), "noiseless": slice(-2, None)}

    def entries(name, part):
        lane, fields = ("low", ("loss", "units")) if name == "noiseless" else ("strength", dims)
        least = _minima(gammas[::-1, part], moments, noises[part][0], config.width)
        return {
            **{field: (f"{lane} {dims[field]}", ends[field][part]) for field in fields},
            "b": (lane, least.b),
            "least": (lane, least.loss),
        }

    return {"strength": ("strength", shares)} | {name: entries(name, part) for name, part in parts.items()}


@partial(jax.jit, static_argnames="config")
def _drawn(config: Config, key: Array, x: Array, y: Array, gammas: Array) -> Array:
    """Squared norms of all weights under SGD with drawn noise, averaged over the later half of each run."""

    def trained(key, gamma):
        start, key = jax.random.split(key)
        network = StochasticLinear(random_weights(start, (config.inputs, config.width, 1), 0.5))
        predict, params = as_function(network)
        # Decay that is added to the gradient is L2 regularization, with gamma half of it.
        optimizer = optax.chain(optax.add_decayed_weights(2 * gamma), optax.sgd(config.noisy_rate))
        _, path = train(
            lambda params, batch: 2 * mean_squared_error(params, (predict, *batch)),
            params,
            optimizer,
            steps=config.noisy_steps,
            every=10,
            observe=lambda params: sum(jnp.sum(W**2) for W in weights(params)),
            batches=lambda key: noisy_batch(key, x, y, config.batch, (config.width,), config.noise_variance),
            key=key,
        )
        return jnp.mean(path.ys[path.ys.shape[0] // 2 :])

    return jax.vmap(jax.vmap(trained, (0, None)), (None, 0))(jax.random.split(key, config.seeds), gammas)


def _followed(config: Config, key: Array, moments: Moments) -> dict:
    """Descent from one start beside the flow, at several learning rates, and the imbalance of its units."""
    start = random_weights(key, (config.inputs, config.width, 1), 0.5)
    noise, gammas = config.noise_variance, np.full(2, config.gamma)
    data = (moments, jnp.asarray(noise), jnp.asarray(gammas))
    rates, trained = jax.device_get(config.descent.train(Partial(_exact_loss, data), start))
    ts = config.descent.times

    def flow(factor):
        return collapse.stochastic_linear_flow(start, moments, noise, gammas, factor * ts, **SOLVE)

    flows = right_and_wrong(flow)
    flows = {name: Trajectory(ts, path.ys, path.ok) for name, path in flows.items()}
    require_ok("the flow and training", trained, *flows.values())
    units = np.asarray(collapse.imbalance(trained.ys)[0])
    decay = np.exp(-4 * config.gamma * ts)[:, None]
    return {
        "rate": ("rate", rates),
        "time": ("time", ts),
        "gap": ("rate", {name: lane_gaps(path, trained) for name, path in flows.items()}),
        "imbalance": {
            "law": ("time unit", decay * units[0, 0]),
            "flow": ("time unit", collapse.imbalance(flows["right"].ys)[0]),
            "trained": ("time unit", units[int(np.argmin(rates))]),
            "gap": ("rate", np.max(np.abs(units - decay * units[:, :1]), axis=(1, 2))),
        },
    }


def run(config: Config, context: Context) -> dict:
    """Minima over the strength of regularization, and networks that are trained on both sides."""
    data, starts, drawn, start = jax.random.split(jax.random.key(context.seed), 4)
    x, y, moments = jax.device_get(_draw(config, data))
    critical = float(collapse.critical_gamma(moments, config.noise_variance, (config.width,)))
    context.progress("minima", 0.0)
    found = {"critical": critical, "theory": _theory(config, moments, critical)}
    found |= {"near": _near(config, moments), "kink": _kinks(config, moments, critical)}
    context.progress("descent from many starts", 0.3)
    found["starts"] = _starts(config, starts, moments, critical)
    context.progress("SGD with drawn noise", 0.6)
    strengths = critical * np.asarray(config.shares)
    found["drawn"] = ("strength seed", _drawn(config, drawn, x, y, strengths))
    silent = _minima(np.stack([strengths, strengths]), moments, 0.0, config.width)
    found["silent_b"] = ("strength", silent.b)
    context.progress("descent beside the flow", 0.8)
    return found | {"descent": _followed(config, start, moments)}


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What Theorem 1 says, where the network collapses, how, and what ridge regression does instead."""
    yield _theorem(saved)
    yield _signs(saved)
    yield _critical(saved)
    yield _norm(saved)
    yield _square_root(saved)
    yield from _orders(saved)
    yield from _training(config, saved)


def _theorem(saved: Saved) -> Claim:
    runs = {name: saved[f"starts/{name}"] for name in ("equal", "unequal")}
    alive = np.asarray(saved["starts/strength"]) < 1
    worst = {
        "gap": [largest(run["loss"] - run["least"][:, None]) for run in runs.values()],
        "units": [largest(run["units"] - run["b"][:, None, None]) for run in runs.values()],
        "rank": [largest(run["second"][alive] / np.sqrt(run["norms"][alive, :, 0])) for run in runs.values()],
    }
    gap, units, rank = map(np.max, worst.values())  # the largest of NaN is NaN
    dead = np.concatenate([run["norms"][~alive].sum(axis=-1).ravel() for run in runs.values()])
    living = np.concatenate([run["norms"][alive].min(axis=-1).ravel() for run in runs.values()])
    left = "descent has come to rest"
    return stated(
        "theorem",
        "The global minimum is zero if and only if |E[xy]|^2 <= gamma_u gamma_w; else all |U_j| are the b of "
        "Equation 6 and W has rank one",
        f"{TALK}, Theorem 1",
        at_most("all starts, equal strengths and not: loss over the minimum's", gap, 1e-10, why=left),
        at_most("|U_j| less b", units, 1e-8, why=left),
        at_most("second singular value of W over its norm", rank, 1e-8, why=left),
        every("starts above the critical strength that end at zero", dead < 1e-8),
        every("starts below it that do not", living > 1e-4),
    )


def _signs(saved: Saved) -> Claim:
    spread = {
        name: np.ptp(saved[f"starts/{name}/units"][:2], axis=-1) / saved[f"starts/{name}/b"][:2, None]
        for name in ("equal", "noiseless")
    }
    gap = largest(saved["starts/noiseless/loss"] - saved["starts/noiseless/least"][:, None])
    turned = "without noise the loss does not change when hidden units are rotated"
    return qualified(
        "signs",
        "All global minima are U = b r with signs r: the hidden units share the signal equally",
        f"{TALK}, Theorem 1",
        condition="there is noise on the hidden units",
        inside=[
            at_most("spread of |U_j| over b", np.max(spread["equal"]), 1e-8, why="descent has come to rest")
        ],
        outside=[
            at_least("without noise: median spread", np.median(spread["noiseless"]), 0.1, why=turned),
            at_most("without noise: loss over the minimum's", gap, 1e-10, why=turned),
        ],
    )


def _critical(saved: Saved) -> Claim:
    left = saved["starts/equal/norms"].sum(axis=-1).max(axis=1) > 1e-6
    strength = saved["critical"] * np.asarray(saved["starts/strength"])
    last, first = strength[left].max(), strength[~left].min()
    product, signal = (last**2 + first**2) / 2, saved["critical"] ** 2
    half = (first**2 - last**2) / 2
    why = "half the distance of the two strengths between which training collapses"
    return corrected(
        "critical",
        "The network collapses where gamma_u gamma_w is |E[xy]| (as the lesson has it; its square is right)",
        f"{TALK}, slides on the critical point",
        printed=[equals("product at which training collapses", product, signal**0.5, half, why=why)],
        mended=[equals("product at which training collapses", product, signal, half, why=why)],
    )


def _norm(saved: Saved) -> Claim:
    run, width = saved["starts/unequal"], saved["starts/unequal/units"].shape[-1]
    alive = np.asarray(saved["starts/strength"]) < 0.8
    norm = run["norms"][alive].sum(axis=-1).mean(axis=1)
    b = run["b"][alive]
    why = "descent has come to rest"
    return corrected(
        "norm",
        "The b of the theorem is the norm of all weights (it is |U_j|: |U|^2 is width b^2, and |W|^2 "
        "gamma_u / gamma_w times that)",
        f"{TALK}, Theorem 1 (b on the slide before it)",
        printed=[at_most("norm over b, less 1: largest", largest(norm**0.5 / b - 1), 1e-3, why=why)],
        mended=[
            at_most(
                "squared norm over width b^2 (1 + gamma_u / gamma_w), less 1: largest",
                largest(norm / (width * b**2 * (1 + UNEQUAL)) - 1),
                1e-8,
                why=why,
            )
        ],
    )


def _square_root(saved: Saved) -> Claim:
    t, b, law = (np.asarray(saved["near"][name]) for name in ("t", "b", "law"))
    small, large = t <= 1e-2, t >= 0.3
    order = {name: fit_line(np.log(t[at]), np.log(b[at])).slope for name, at in (("s", small), ("l", large))}
    nearest = largest(b[t <= 1e-5] / law[t <= 1e-5] - 1)
    return qualified(
        "square-root",
        "The order parameter b is proportional to the root of the distance t to the critical point",
        f"{TALK}, slides on the critical point",
        condition="t is small against |E[xy]|^2",
        inside=[
            slope("exponent for t from 1e-6 to 1e-2", order["s"], 0.5, 0.01, why="the next order in t"),
            at_most("t <= 1e-5: b over its law, less 1", nearest, 2e-5, why="the next order in t"),
        ],
        outside=[at_least("exponent for t from 0.3 to 0.9", order["l"], 0.6, why="the law is asymptotic")],
    )


def _orders(saved: Saved) -> Iterator[Claim]:
    bend, order = saved["kink/bend"], saved["kink/order"]
    falls = fit_line(np.log(saved["kink/step"]), np.log(bend["ridge"])).slope
    smaller = "the next order in the step"
    yield stated(
        "second-order",
        "With one hidden layer the transition is of second order: the second derivative of the least loss "
        "jumps",
        f"{TALK}, slides on phase transitions (along equal strengths; the size of the jump is derived)",
        equals("order of the transition", order["network"], 2, why="it is a whole number"),
        equals(
            "jump of the second derivative over 2 width gamma_c^2 / ((s + width) c^T A c)",
            bend["network"][-1] / saved["kink/jump"],
            1,
            2e-3,
            why=smaller,
        ),
        slope(
            "fall of the first derivative over a step, in the step",
            fit_line(np.log(saved["kink/step"]), np.log(saved["kink/fall"])).slope,
            1,
            0.05,
            why=f"it is continuous: at a jump the order would be 0; {smaller}",
        ),
    )
    share, norm = np.asarray(saved["theory/share"]), np.asarray(saved["theory/ridge_norm"])
    yield stated(
        "ridge",
        "Ridge regression, which has no hidden layer, does not collapse and has no transition",
        f"{TALK}, slide on ridge regression",
        equals(
            "order of a transition where the network has its own",
            order["ridge"],
            0,
            why="it is a whole number",
        ),
        slope(
            "second difference over the step, in the step", falls, 1, 0.05, why="a smooth norm has order 1"
        ),
        at_least(
            "norm at 1.5 critical strengths, over that at 0.5",
            norm[-1] / np.interp(0.5, share, norm),
            1 / 3,
            why="(A + gamma)^{-1} falls no faster than 1 / gamma",
        ),
    )


def _training(config: Config, saved: Saved) -> Iterator[Claim]:
    yield stated(
        "flow",
        "Gradient descent on the network follows the gradient flow of its mean loss",
        f"{TALK}, Theorem 1 (the flow of its loss is derived)",
        *first_order(saved["descent/rate"], saved["descent/gap"]),
    )
    imbalance = saved["descent/imbalance"]
    yield stated(
        "imbalance",
        "With equal strengths |outgoing|^2 - |incoming|^2 of each hidden unit decays as exp(-4 gamma t), "
        "whatever the noise",
        f"{TALK}, Theorem 1 (the dynamics of its units is derived)",
        at_most(
            "flow: largest difference",
            largest(imbalance["flow"] - imbalance["law"]),
            3e-8,
            why="the solver's error, whose tolerance is 1e-8",
        ),
        slope(
            "descent: order of the difference in the learning rate",
            convergence_order(saved["descent/rate"], imbalance["gap"]).slope,
            1,
            0.1,
            why=SECOND_ORDER,
        ),
    )
    few = np.asarray(saved["starts/strength"]) <= 0.5
    size = 2 * config.width
    found = np.asarray(saved["drawn"])[few].mean(axis=1)
    with_noise, without = (size * np.asarray(saved[b])[few] ** 2 for b in ("starts/equal/b", "silent_b"))
    yield stated(
        "drawn-noise",
        "SGD with drawn dropout and weight decay ends at the minimum of the loss with integrated noise",
        f"{TALK}, Theorem 1 (its loss)",
        at_most(
            "strengths up to half the critical one: squared norm over the minimum's, less 1: largest",
            largest(found / with_noise - 1),
            0.05,
            why="the bias of finite steps and the spread over seeds are a percent or two each",
        ),
        at_least(
            "the same over that of the minimum without noise: least",
            np.min(np.abs(found / without - 1)),
            0.1,
            why="noise takes a fifth of the squared norm",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """How the network collapses, its landscape, law and kink, and training beside the theory."""
    drawn, axes = plotting.new_figure(2, 3, width=3.9, height=3.3)
    (order, landscape, law), (bend, units, gaps) = axes
    _order_panel(order, config, saved)
    _landscape_panel(landscape, saved)
    near = saved["near"]
    law.loglog(near["t"], near["b"], label="minimum", **plotting.TRAINED)
    law.loglog(near["t"], near["law"], label="square root of t", **plotting.THEORY)
    plotting.finish(law, "Close to the critical point", "t / |E[xy]|²", "b = |U_j|", "upper left")
    _bend_panel(bend, saved)
    ts = saved["descent/time"]
    law, trained = (np.asarray(saved[f"descent/imbalance/{name}"])[:, :5] for name in ("law", "trained"))
    labels = [f"unit {index + 1}" for index in range(min(config.width, 5))]
    plotting.theory_and_trained(units, ts, law, trained, labels, "exp(−4γt)")
    plotting.finish(
        units, "Imbalance of hidden units", "time = learning rate × step", "|out|² − |in|²", "lower right"
    )
    of_flow = {"flow": saved["descent/gap/right"], "gradient 2 % too large": saved["descent/gap/wrong"]}
    plotting.gap_panel(
        gaps,
        saved["descent/rate"],
        of_flow,
        "learning rate",
        "largest gap of a weight",
        "Descent beside the flow",
    )
    return drawn


def _order_panel(ax: Axes, config: Config, saved: Saved) -> None:
    shares, size = saved["starts/strength"], 2 * config.width
    ends = saved["starts/equal/norms"].sum(axis=-1)
    found = np.asarray(saved["drawn"])
    ax.plot(saved["theory/share"], np.asarray(saved["theory/ridge_norm"]) ** 2, color="C3", label="ridge")
    ax.plot(shares, np.median(ends, axis=1), "o", color="C0", label=f"descent, {config.starts} starts")
    ax.errorbar(
        shares,
        found.mean(axis=1),
        found.std(axis=1),
        fmt="s",
        color="C2",
        mfc="white",
        ms=4,
        label="SGD, drawn dropout",
    )
    ax.plot(
        saved["theory/share"], size * np.asarray(saved["theory/b"]) ** 2, label="minimum", **plotting.THEORY
    )
    plotting.finish(
        ax,
        "What regularization leaves",
        "γ / critical γ",
        "squared norm of all weights",
        "upper right",
        ylim=(-0.05 * ends.max(), 1.6 * ends.max()),
    )


def _landscape_panel(ax: Axes, saved: Saved) -> None:
    part = {name: np.asarray(saved[f"theory/landscape/{name}"]) for name in ("share", "b", "loss")}
    for index, share in enumerate(part["share"]):
        color = f"C{index}"
        b, loss = part["b"], part["loss"][index]
        ax.plot(b, loss, color=color, label=f"{share:g}")
        lowest = [np.argmin(np.where(side, loss, np.inf)) for side in (b <= 0, b >= 0)]
        ax.plot(b[lowest], loss[lowest], "o", color=color, ms=4)
    shown = part["loss"]
    legend = {"loc": "upper center", "title": "γ / critical γ"}
    plotting.finish(ax, "Effective landscape", "amplitude b", "loss", legend)
    ax.locator_params(axis="x", nbins=5)
    ax.set_ylim(shown.min() - 0.05 * np.ptp(shown), np.quantile(shown, 0.9))


def _bend_panel(ax: Axes, saved: Saved) -> None:
    step, bend = saved["kink/step"], saved["kink/bend"]
    ax.loglog(step, bend["network"], "o-", color="C0", label="one hidden layer")
    ax.loglog(step, bend["ridge"], "s-", color="C3", label="ridge")
    ax.axhline(float(saved["kink/jump"]), label="its closed form", **plotting.THEORY)
    plotting.finish(
        ax, "Kink of the squared norm", "step h / critical γ", "|second difference| / h", "center left"
    )
