"""Low-rank gradients: their form in reversible networks, and how fast their stable rank falls under descent.

What sits behind a layer W is kept as it is, so that the network J_i W f_i has a gradient that is linear in
W, and its iterates have a closed form. The printed bound on their stable rank takes a rate rho^2t; to first
order the excess falls like rho^t, with either sign. One instance breaks the bound at every step, and about
half of all random ones break it, by little, from some step on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure

from dynamics.galore import (
    bound_counterexample,
    gradient_iterates,
    gradient_operator,
    reversible_gradient,
    reversible_terms,
    slow_split,
    stable_rank_bound,
)
from dynamics.spectra import numerical_rank, stable_rank
from models.losses import bind, mean_squared_error
from models.training import record_steps, train
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.compare import convergence_order
from sims.results import Context, Result, Saved

EARLY = 400  # steps that random instances were first looked at for
ROUNDING = 1e-11  # relative, of a stable rank and its bound
LATE = 1e-6  # of the slow part: what is left of the rest at the late step
SLOPES = {"ReLU": 0.0, "leaky ReLU": 0.2, "linear": 1.0}  # of the activation below zero
SPECIAL = 8  # instances with dependent inputs, and as many with one Jacobian for all samples
RATE = 0.66  # of the counterexample, over 1 / lambda_max: a learning rate of 0.5
FROM, TO = 50, 60  # steps between which the decay of its excess is measured, and to which it is looked at
EVERY = 10  # steps between two records of a training
SMALL = 0.3  # from this factor on logits are small


@dataclass(frozen=True)
class Config:
    """Random networks, and how long they are followed."""

    instances: int = 100
    """Random instances."""
    m: int = 5
    """Outputs of the layer."""
    n: int = 4
    """Inputs of the layer; half as many are independent in the instances with dependent inputs."""
    samples: int = 10
    """Samples N."""
    horizon: int = 100_000
    """Steps that the iterates are followed for, in closed form."""
    points: int = 150
    """Steps among them that are looked at, equally spaced in their logarithm."""
    steps: int = 400
    """Steps that the networks are trained for."""
    scales: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01)
    """Factors on the logits of the softmax."""

    def __post_init__(self):
        if max(self.scales) != 1 or sum(scale <= SMALL for scale in self.scales) < 2:
            raise ValueError(f"scales must hold 1 and two that are at most {SMALL}, got {self.scales}")
        if self.n < 4 or self.m < self.n or self.samples < self.n + 6 or self.instances < 10:
            sizes = (self.n, self.m, self.samples, self.instances)
            raise ValueError(f"n, m, samples, instances must be at least 4, n, n + 6 and 10, got {sizes}")
        if self.horizon < EARLY or self.points < 10 or self.steps < TO:
            raise ValueError(
                f"horizon, points and steps must be at least {EARLY}, 10 and {TO}, "
                f"got {self.horizon}, {self.points} and {self.steps}"
            )


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), m=6, n=5, samples=12, points=300, steps=2000),
    "paper": replace(Config(), m=10, n=8, samples=24, points=300, steps=4000),
}


# --- The gradient's form in a network with nonlinear layers


def _leaky(z: Array, slope: Array) -> Array:
    return jnp.where(z > 0, z, slope * z)


def _tail(z: Array, weights: tuple[Array, Array, Array], slope: Array) -> Array:
    """What sits behind the layer: two more layers, the first of them with biases, which may be zero."""
    V, U, bias = weights
    return _leaky(_leaky(z, slope) @ V.T + bias[None], slope) @ U.T


def _mlp(W: Array, inputs: tuple[Array, tuple[Array, Array, Array], Array]) -> Array:
    """Outputs of the network whose layer W is trained, from the inputs of that layer."""
    f, weights, slope = inputs
    return _tail(f @ W.T, weights, slope)


def _soft_cross_entropy(W: Array, data) -> Array:
    predict, inputs, targets = data
    return jnp.mean(optax.losses.softmax_cross_entropy(predict(W, inputs), targets))


def _forms(rng: np.random.Generator, config: Config) -> tuple[Array, Array, Array]:
    """Relative errors of the gradient's form: squared loss by activation, with biases, softmax by scale."""
    hidden, outputs, samples = 2 * config.m, 5, config.samples
    x, first = rng.normal(size=(samples, 6)), rng.normal(size=(config.n, 6))
    W = rng.normal(size=(config.m, config.n)) / config.n**0.5
    V = rng.normal(size=(hidden, config.m)) / config.m**0.5
    U = rng.normal(size=(outputs, hidden)) / hidden**0.5
    y, one_hot = rng.normal(size=(samples, outputs)), np.eye(outputs)[np.arange(samples) % outputs]
    network = jax.tree.map(jnp.asarray, (x, first, W, V, U, rng.normal(size=hidden), y, one_hot))
    slopes, scales, dtype = tuple(SLOPES.values()), config.scales, network[2].dtype
    ones, zeros = (1.0,) * len(slopes), (0.0,) * len(scales)
    errors = _errors(
        network,
        jnp.asarray((False,) * (len(slopes) + 1) + (True,) * len(scales)),
        jnp.asarray((*slopes, 0.0, *zeros), dtype),
        jnp.asarray((*ones, 1.0, *scales), dtype),
        jnp.asarray((*(0.0 for _ in slopes), 1.0, *zeros), dtype),
    )
    return errors[: len(slopes)], errors[len(slopes)], errors[len(slopes) + 1 :]


@jax.jit
def _errors(network: tuple[Array, ...], softmax: Array, slopes: Array, scales: Array, biases: Array) -> Array:
    """Relative error of the gradient's form, (L,): by loss, activation, factors on logits and on biases."""
    x, first, W, V, U, bias, y, one_hot = network

    def error(softmax, slope, scale, biased):
        f, targets = _leaky(x @ first.T, slope), jnp.where(softmax, one_hot, y)
        weights = (V, scale * U, biased * bias)
        data = (_mlp, (f, weights, slope), targets)

        def loss(W):
            return jnp.where(softmax, _soft_cross_entropy(W, data), mean_squared_error(W, data))

        J = jax.vmap(jax.jacobian(lambda z: _tail(z[None], weights, slope)[0]))(f @ W.T)
        small, squared = (
            reversible_gradient(*reversible_terms(J, f, targets, kind), W) for kind in ("softmax", "squared")
        )
        actual = -jax.grad(loss)(W)
        return jnp.linalg.norm(jnp.where(softmax, small, squared) - actual) / jnp.linalg.norm(actual)

    return jax.vmap(error)(softmax, slopes, scales, biases)


# --- A layer with linear gradient dynamics


def _predict(W: Array, inputs: tuple[Array, Array]) -> Array:
    """Outputs J_i W f_i (N, d) of a layer whose surroundings stay as they are."""
    J, f = inputs
    return jnp.einsum("adm,mn,an->ad", J, W, f)


def _lanes(rng: np.random.Generator, config: Config) -> tuple[Array, ...]:
    """J, f, y, W_0, the learning rate over 1 / lambda_max, and whether inputs are independent, of every lane.

    First the random instances, then those with one Jacobian for all samples, those with dependent inputs,
    and the counterexample.
    """
    count, (m, n) = config.instances + 2 * SPECIAL, (config.m, config.n)
    J = rng.normal(size=(count, config.samples, m, m)) / m**0.5
    f = rng.normal(size=(count, config.samples, n))
    y, W0 = rng.normal(size=(count, config.samples, m)), rng.normal(size=(count, m, n))
    J[config.instances : -SPECIAL] = J[config.instances : -SPECIAL, :1]
    # The other inputs are the sum of the independent ones.
    f[-SPECIAL:, :, n // 2 :] = f[-SPECIAL:, :, : n // 2].sum(axis=-1, keepdims=True)
    random = (J, f, y, W0, np.ones(count), np.arange(count) < count - SPECIAL)
    special = (*_counterexample(config), np.zeros((m, n)), RATE, True)
    pairs = zip(random, special, strict=True)
    return tuple(jnp.asarray(np.concatenate([many, np.asarray(one)[None]])) for many, one in pairs)


def _counterexample(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """J, f and y of the 2 by 2 counterexample, in a corner of a larger layer."""
    G0, B, C = (np.asarray(array) for array in bound_counterexample())
    m, n, N, pairs = config.m, config.n, config.samples, len(B)
    # All of them have rank one.
    j, phi = (np.linalg.eigh(X)[1][:, :, -1] * np.linalg.norm(X, axis=(1, 2))[:, None] ** 0.5 for X in (B, C))
    J, f, y = np.zeros((N, m, m)), np.zeros((N, n)), np.zeros((N, m))
    J[:pairs, 0, :2], f[:pairs, :2] = (N / pairs) ** 0.5 * j, phi
    # Every weight outside of the corner has the eigenvalue one, and no gradient.
    rest = N**0.5 * np.eye(m)
    J[pairs : pairs + n], f[pairs : pairs + n] = rest, np.eye(n)
    J[pairs : pairs + 2, :2] = 0
    dyads = J[:pairs, 0, :2, None] * f[:pairs, None, :2]
    y[:pairs, 0] = np.linalg.lstsq(dyads.reshape(pairs, 4).T, N * G0.reshape(4))[0]
    return J, f, y


@partial(jax.jit, static_argnames="trained")
def _follow(lanes: tuple[Array, ...], steps: Array, trained: int) -> dict[str, Array]:
    """Iterates, bounds and a trained network of every lane.

    The first of them at `steps`, and last at a step so late that the rest is small against the slowest part.
    """
    marks = record_steps(trained, EVERY)

    def follow(J, f, y, W0, rate, independent):
        data = (_predict, (J, f), y)
        terms = reversible_terms(J, f, y, "squared")
        G0, S = reversible_gradient(*terms, W0), gradient_operator(terms.B, terms.C)
        split, kernel = (slow_split(G0, S, form) for form in ("valid", "printed"))
        eta, size = rate / kernel.largest, jnp.linalg.norm(G0)
        limit, (U, values, Vt) = stable_rank(split.parallel), jnp.linalg.svd(split.parallel)
        rho = (1 - eta * split.second) / (1 - eta * split.slowest)
        late = jnp.ceil(jnp.log(LATE * values[0] / jnp.linalg.norm(split.perpendicular)) / jnp.log(rho))
        at = jnp.concatenate([steps, late[None], marks])

        # Relative to the slowest part nothing underflows. With dependent inputs the rounding errors in the
        # null space of S would grow.
        shift = jnp.where(independent, split.slowest, 0)
        path = gradient_iterates(G0, S - shift * jnp.eye(len(S)), eta / (1 - eta * shift), at)
        rest = path[len(steps)] - split.parallel
        theory = path[len(steps) + 1 :] * ((1 - eta * shift) ** marks)[:, None, None]

        optimizer = optax.sgd(eta)
        _, weights = train(bind(mean_squared_error, data), W0, optimizer, steps=trained, every=EVERY)
        network = -jax.vmap(lambda W: jax.grad(mean_squared_error)(W, data))(weights.ys)
        return {
            "stable_rank": stable_rank(path[: len(steps) + 1]),
            "printed": stable_rank_bound(G0, S, eta, at[: len(steps) + 1], "printed"),
            "valid": stable_rank_bound(G0, S, eta, at[: len(steps) + 1], "valid"),
            "limit": limit,
            "rho": rho,
            "first_order": -2 * limit * (U[:, 0] @ rest @ Vt[0]) / values[0],
            "left": (1 - eta * split.slowest) ** steps,
            "kernel": jnp.linalg.norm(kernel.parallel) / size,
            "network": stable_rank(network),
            "rank": numerical_rank(network, atol=1e-12 * size),
            "gap": jnp.linalg.norm(network - theory, axis=(1, 2)) / size,
        }

    return jax.vmap(follow)(*lanes)


def run(config: Config, context: Context) -> Result:
    """Compare gradients, then follow all instances, in closed form and by training."""
    rng = np.random.default_rng(context.seed)
    context.progress("form of the gradient", 0.0)
    squared, biased, softmax = (np.asarray(error) for error in _forms(rng, config))

    context.progress("iterates and training", 0.4)
    grid = np.geomspace(TO, config.horizon, config.points).round()
    steps = np.unique(np.concatenate([np.arange(TO + 1), grid])).astype(int)
    found = _follow(_lanes(rng, config), jnp.asarray(steps), config.steps)
    lanes = {name: np.asarray(array) for name, array in found.items()}

    kinds = {
        "random": slice(config.instances),
        "shared": slice(config.instances, -1 - SPECIAL),
        "dependent": slice(-1 - SPECIAL, -1),
    }
    groups = {name: {key: array[at] for key, array in lanes.items()} for name, at in kinds.items()}
    example = {key: array[-1] for key, array in lanes.items()}
    share = np.maximum.accumulate(_violated(groups["random"], "printed")[:, :-1], axis=1).mean(axis=0)
    data = {
        "steps": steps,
        "example": {name: example[name][:-1] for name in ("stable_rank", "printed", "valid")}
        | {name: example[name] for name in ("limit", "rho", "network")},
        "share": share,
        "excess": np.max((groups["random"]["stable_rank"] - groups["random"]["printed"])[:, :-1], axis=0),
        "scales": np.asarray(config.scales),
        "error": {"squared": squared, "biased": biased, "softmax": softmax},
    }
    claims = (
        _gradient_form(squared, float(biased)),
        _softmax(np.asarray(config.scales), softmax),
        _training(lanes),
        _bound(steps, example, groups),
        _random(steps, share, groups["random"]),
        _rate(steps, example, groups["random"]),
        _dependent(config, groups),
        _shared(groups["shared"]),
    )
    dims = {
        "steps": ("step",),
        **{f"example/{name}": ("step",) for name in ("stable_rank", "printed", "valid")},
        "example/network": ("record",),
        "share": ("step",),
        "excess": ("step",),
        "scales": ("scale",),
        "error/squared": ("activation",),
        "error/softmax": ("scale",),
    }
    return Result(data, claims, dims)


def _violated(lanes: dict[str, np.ndarray], form: str) -> np.ndarray:
    """Where the stable rank is above a bound by more than rounding."""
    return lanes["stable_rank"] > (1 + ROUNDING) * lanes[form]


def _gradient_form(squared: np.ndarray, biased: float) -> Claim:
    return Claim(
        "galore.stable_rank/gradient-form",
        "In reversible networks the gradient of a layer is (1/N) sum_i (A_i - B_i W C_i), for squared loss",
        "zhao2024galore, Theorem 3.2",
        "qualified",
        [
            # Rounding, with room for larger networks.
            *(
                Check(f"{name} network: relative error", "at most", 1e-10, error)
                for name, error in zip(SLOPES, squared, strict=True)
            ),
            # The biases are as large as what they are added to.
            Check("ReLU network with biases: the same", "at least", 0.05, biased),
        ],
        condition="layers have no biases: else outputs are not J_i W f_i",
    )


def _softmax(scales: np.ndarray, errors: np.ndarray) -> Claim:
    small = scales <= SMALL
    return Claim(
        "galore.stable_rank/softmax",
        "For cross-entropy the gradient has that form too, with B_i = J_i^T P1 J_i / K",
        "zhao2024galore, Theorem 3.2",
        "qualified",
        [
            # What is left out of the softmax is of second order, next orders bend the line.
            Check(
                "order of the relative error in the scale of the logits",
                "slope",
                2.0,
                convergence_order(scales[small], errors[small]).slope,
                0.2,
            ),
            # Two orders of magnitude above that of the smallest logits.
            Check("logits as they come: relative error", "at least", 1e-2, errors[np.argmax(scales)]),
        ],
        condition="the logits are small",
    )


def _training(lanes: dict[str, np.ndarray]) -> Claim:
    return Claim(
        "galore.stable_rank/training",
        "While A_i, B_i and C_i stay, gradients under descent are vec(G_t) = (1 - eta S)^t vec(G_0)",
        "zhao2024galore, Lemma 3.3",
        "stated",
        [
            # Rounding of some hundred steps.
            Check(
                f"{len(lanes['gap'])} trained networks: largest difference, over |G_0|",
                "at most",
                1e-12,
                lanes["gap"].max(),
            )
        ],
    )


def _bound(
    steps: np.ndarray, example: dict[str, np.ndarray], groups: dict[str, dict[str, np.ndarray]]
) -> Claim:
    random, early = groups["random"], steps <= TO
    records = np.arange(0, TO + 1, EVERY)
    return Claim(
        "galore.stable_rank/bound",
        "sr(G_t) <= sr(G_par) + rho^{2t} |G_0 - G_par|_F^2 / |G_par|_2^2",
        "zhao2024galore, Lemma 3.3 (the valid bound is derived here)",
        "corrected",
        [
            # Counts are exact, up to 1e-11 of the bound for rounding.
            all_of(
                f"counterexample, {TO} steps: those that keep it",
                ~_violated(example, "printed")[:-1][early],
            ),
            all_of(
                f"the same network, trained: records of {TO} steps that keep it",
                example["network"][: len(records)] <= example["printed"][records],
            ),
            all_of(
                f"random instances that keep it for {steps[-1]} steps",
                ~_violated(random, "printed").any(axis=1),
            ),
            all_of("counterexample: steps that keep the valid one", ~_violated(example, "valid")),
            all_of(
                "random instances that keep the valid one",
                ~_violated(random, "valid").any(axis=1),
            ),
            # 2e-6 where the rest is 1e-6 of the slowest part.
            Check(
                "valid bound at the late step, over its limit sr(G_par), less 1: largest",
                "at most",
                3 * LATE,
                (random["valid"][:, -1] / random["limit"] - 1).max(),
            ),
        ],
        printed=3,
    )


def _random(steps: np.ndarray, share: np.ndarray, random: dict[str, np.ndarray]) -> Claim:
    excess = (random["stable_rank"] - random["printed"])[:, :-1]
    count = len(excess)
    return Claim(
        "galore.stable_rank/random",
        "Random networks keep the printed bound",
        "zhao2024galore, Lemma 3.3 (a statement on random instances; measured here)",
        "qualified",
        [
            # Rare: the bound's own second order is far above the first order of the excess for long.
            Check(f"share that has left it after {EARLY} steps", "at most", 0.1, share[steps <= EARLY][-1]),
            # The sign of a first order that is symmetric: three standard deviations of a fair coin.
            Check(f"after {steps[-1]} steps", "equals", 0.5, share[-1], 1.5 / count**0.5),
            # It leaves late, when little is left to exceed by.
            Check("largest excess over the bound", "at most", 1e-2, excess.max()),
        ],
        condition="they are followed for some hundred steps; about half leave it later, by little",
    )


def _rate(steps: np.ndarray, example: dict[str, np.ndarray], random: dict[str, np.ndarray]) -> Claim:
    rho, limit = float(example["rho"]), example["limit"]
    curve = np.interp([FROM, TO], steps, example["stable_rank"][:-1]) - limit
    trained = example["network"][[FROM // EVERY, TO // EVERY]] - limit
    decay, actual = ((pair[1] / pair[0]) ** (1 / (TO - FROM)) for pair in (curve, trained))
    excess = random["stable_rank"][:, -1] - random["limit"]
    above = random["stable_rank"][:, -1] > random["printed"][:, -1]
    label = f"decay of the excess per step, steps {FROM} to {TO}"
    return Claim(
        "galore.stable_rank/rate",
        "The stable rank tends to that of the slowest part like rho^{2t}",
        "zhao2024galore, Lemma 3.3 (the first order is derived here)",
        "corrected",
        [
            # Two percent: far less than rho and rho^2 differ.
            Check(f"{label}, over rho^2", "equals", 1.0, decay / rho**2, 0.02),
            Check(f"{label}, over rho", "equals", 1.0, decay / rho, 0.02),
            Check("the same of the trained network, over rho", "equals", 1.0, actual / rho, 0.02),
            # The second order, 1e-6 of the first, over differences of singular values.
            Check(
                "random instances: excess over -2 sr(G_par) u^T X v / |G_par|_2: median distance to 1",
                "at most",
                1e-3,
                np.median(np.abs(excess / random["first_order"] - 1)),
            ),
            # Where the first order is far smaller than elsewhere the next one decides.
            all_of(
                "those where its sign tells whether the printed bound fails",
                above == (random["first_order"] > 0),
                missing=len(excess) // 50,
            ),
        ],
    )


def _dependent(config: Config, groups: dict[str, dict[str, np.ndarray]]) -> Claim:
    dependent, independent = groups["dependent"], config.n // 2
    # Later on what rounding left in the null space is no longer small.
    safe = dependent["left"] > 1e-4
    kept = ~_violated(dependent, "valid")[:, :-1]
    return Claim(
        "galore.stable_rank/dependent-inputs",
        "With N' < n independent inputs the bound holds with V_1 the null space of S",
        "zhao2024galore, Corollary 3.4",
        "corrected",
        [
            # Of rounding size it does not count as a part to tend to.
            Check(
                "part of G_0 in the null space, over |G_0|: largest",
                "at least",
                1e-9,
                dependent["kernel"].max(),
            ),
            # Counts are exact; singular values below 1e-12 of the gradient's norm are zero.
            Check(
                f"rank of G_t, of {config.n} inputs: largest", "at most", independent, dependent["rank"].max()
            ),
            Check(
                f"independent inputs, {TO} steps: smallest rank",
                "at least",
                config.n,
                groups["random"]["rank"][:, : TO // EVERY + 1].min(),
            ),
            all_of("valid bound, with the slowest excited eigenvalue: steps that keep it", kept[safe]),
        ],
    )


def _shared(shared: dict[str, np.ndarray]) -> Claim:
    return Claim(
        "galore.stable_rank/one-jacobian",
        "Where the slowest eigenspace is one dyad, as for S = C (x) B, the stable rank tends to 1",
        "zhao2024galore, Corollary 3.5",
        "stated",
        [
            # Of second order here, 1e-12 at the late step.
            Check(
                "stable rank at the late step less 1: largest",
                "at most",
                1e-3,
                (shared["stable_rank"][:, -1] - 1).max(),
            ),
            all_of("instances that keep the printed bound", ~_violated(shared, "printed").any(axis=1)),
            # They have something to lose.
            Check(
                "stable rank at the start: median", "at least", 1.05, np.median(shared["stable_rank"][:, 0])
            ),
        ],
    )


def figure(saved: Saved) -> Figure:
    """The counterexample with both bounds, its excess, random instances, and errors of the form."""
    drawn, ((path, excess), (share, form)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    steps, example = (
        saved["steps"],
        {name: saved[f"example/{name}"] for name in ("stable_rank", "printed", "valid")},
    )
    limit, rho = float(saved["example/limit"]), float(saved["example/rho"])
    early, records = steps <= 20, np.arange(0, TO + 1, EVERY)
    network = saved["example/network"][: len(records)]

    path.plot(
        steps[early], example["stable_rank"][early], color="C0", label="stable rank", **plotting.TRAINED
    )
    path.plot(records[:3], network[:3], "o", color="C3", label="trained network")
    path.plot(steps[early], example["printed"][early], label="printed bound", **plotting.PRINTED)
    path.plot(steps[early], example["valid"][early], label="valid bound", **plotting.THEORY)
    path.axhline(limit, color="0.8", linewidth=0.8, zorder=0)
    path.set(xlabel="step", ylabel="stable rank of the gradient")
    path.set_title("Counterexample: above the printed bound")
    path.legend(loc="upper right")

    shown = steps <= TO
    t = steps[shown]
    excess.plot(t, example["stable_rank"][shown] - limit, color="C0", label="stable rank", **plotting.TRAINED)
    excess.plot(records, network - limit, "o", color="C3", label="trained network")
    excess.plot(t, example["printed"][shown] - limit, label="printed bound, ρ²ᵗ", **plotting.PRINTED)
    first = (example["stable_rank"][shown] - limit)[-1] * rho ** (t - float(TO))
    excess.plot(t, first, label="ρᵗ", **plotting.THEORY)
    excess.set(yscale="log", xlabel="step", ylabel="excess over the limit")
    excess.set_title(f"Its excess falls like ρᵗ, ρ = {rho:.3f}")
    excess.legend(loc="lower left")

    share.plot(steps[1:], saved["share"][1:], color="C0", **plotting.TRAINED)
    share.axvline(EARLY, label=f"{EARLY} steps", **plotting.PRINTED)
    share.axhline(0.5, label="one half", **plotting.THEORY)
    share.set(xscale="log", ylim=(-0.03, 1), xlabel="step", ylabel="share above the printed bound so far")
    share.set_title(f"{saved.config['instances']} random instances")
    share.legend(loc="upper left")

    scales, errors = saved["scales"], saved["error/softmax"]
    form.loglog(scales, errors, "o", color="C0", label="softmax")
    small = scales <= SMALL
    plotting.reference_slope(form, scales[small], errors[small], 2, "slope 2")
    for index, (name, error) in enumerate(zip(SLOPES, saved["error/squared"], strict=True)):
        floor = np.maximum(np.full(len(scales), error), np.finfo(float).tiny)
        form.plot(scales, floor, color=f"C{index + 1}", label=f"squared loss, {name}", linewidth=1.6)
    form.axhline(float(saved["error/biased"]), label="squared loss, with biases", **plotting.PRINTED)
    form.set(ylim=(1e-17, 1e6), xlabel="scale of the logits (softmax)", ylabel="relative error")
    form.set_title("Form of the gradient, against autodiff")
    form.legend(loc="upper left", ncols=2, fontsize=7.5)
    return drawn
