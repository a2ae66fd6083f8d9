"""Low-rank gradients: their form in reversible networks, and how fast their stable rank falls under descent.

What sits behind a layer W is kept as it is, so that the network J_i W f_i has a gradient that is linear in
W, and its iterates have a closed form. The printed bound on their stable rank takes a rate rho^2t; to first
order the excess falls like rho^t, with either sign. One instance breaks the bound at every step, and about
half of all random ones break it, by little, from some step on.
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
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.flow import gradient_flow
from dynamics.galore import (
    gradient_iterates,
    gradient_operator,
    reversible_gradient,
    reversible_terms,
    slow_split,
    stable_rank_bound,
)
from dynamics.spectra import numerical_rank, stable_rank
from models.layer import counterexample_network, layer_outputs, leaky_relu, mlp_outputs, mlp_tail
from models.losses import bind, mean_squared_error
from models.training import record_steps, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, corrected, equals, every, qualified, slope, stated
from sims.compare import convergence_order
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

EARLY = 400  # steps after which few random instances have left the printed bound
SLACK = 1e-11  # for rounding of a stable rank and its bound, relative
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

    instances: Annotated[int, Range(at_least=10)] = 100
    """Random instances."""
    m: Count = 5
    """Outputs of the layer, at least as many as inputs."""
    n: Annotated[int, Range(at_least=4)] = 4
    """Inputs of the layer; half as many are independent in the instances with dependent inputs."""
    samples: Count = 10
    """Samples N."""
    horizon: Annotated[int, Range(at_least=EARLY)] = 100_000
    """Steps that the iterates are followed for, in closed form."""
    points: Annotated[int, Range(at_least=10)] = 150
    """Steps among them that are looked at, equally spaced in their logarithm."""
    steps: Annotated[int, Range(at_least=TO)] = 400
    """Steps that the networks are trained for."""
    scales: Annotated[tuple[Positive, ...], Length(3)] = (1.0, 0.3, 0.1, 0.03, 0.01)
    """Factors on the logits of the softmax."""

    def __post_init__(self):
        check_ranges(self)
        if max(self.scales, default=0) != 1 or sum(scale <= SMALL for scale in self.scales) < 2:
            raise ValueError(f"scales must hold 1 and two that are at most {SMALL}, got {self.scales}")
        if self.m < self.n or self.samples < self.n + 6:
            raise ValueError(f"m and samples must be at least n and n + 6, got {self.m} and {self.samples}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), m=6, n=5, samples=12, points=300, steps=2000),
    "paper": replace(Config(), m=10, n=8, samples=24, points=300, steps=4000),
}
_negative_gradient = partial(gradient_flow(mean_squared_error), None)


# --- The gradient's form in a network with nonlinear layers


def _soft_cross_entropy(W: Array, data) -> Array:
    predict, inputs, targets = data
    return jnp.mean(optax.losses.softmax_cross_entropy(predict(W, inputs), targets))


def _forms(rng: np.random.Generator, config: Config) -> dict[str, np.ndarray]:
    """Relative errors of the gradient's form: squared loss by activation, with biases, softmax by scale."""
    hidden, outputs, samples = 2 * config.m, 5, config.samples
    x, first = rng.normal(size=(samples, 6)), rng.normal(size=(config.n, 6))
    W = rng.normal(size=(config.m, config.n)) / config.n**0.5
    V = rng.normal(size=(hidden, config.m)) / config.m**0.5
    U = rng.normal(size=(outputs, hidden)) / hidden**0.5
    y, one_hot = rng.normal(size=(samples, outputs)), np.eye(outputs)[np.arange(samples) % outputs]
    network = jax.tree.map(jnp.asarray, (x, first, W, V, U, rng.normal(size=hidden), y, one_hot))
    # Whether softmax, the activation below zero, factors on logits and on biases.
    cases = [
        *(("squared", False, slope, 1.0, 0.0) for slope in SLOPES.values()),
        ("biased", False, 0.0, 1.0, 1.0),
        *(("softmax", True, 0.0, scale, 0.0) for scale in config.scales),
    ]
    kinds, *lanes = (np.array(column) for column in zip(*cases, strict=True))
    errors = np.asarray(_errors(network, *map(jnp.asarray, lanes)))
    return {kind: errors[kinds == kind] for kind in ("squared", "biased", "softmax")}


@jax.jit
def _errors(network: tuple[Array, ...], softmax: Array, slopes: Array, scales: Array, biases: Array) -> Array:
    """Relative error of the gradient's form, (L,): by loss, activation, factors on logits and on biases."""
    x, first, W, V, U, bias, y, one_hot = network

    def error(softmax, slope, scale, biased):
        f, targets = leaky_relu(x @ first.T, slope), jnp.where(softmax, one_hot, y)
        weights = (V, scale * U, biased * bias)
        data = (mlp_outputs, (f, weights, slope), targets)

        def loss(W):
            return jnp.where(softmax, _soft_cross_entropy(W, data), mean_squared_error(W, data))

        J = jax.vmap(jax.jacobian(lambda z: mlp_tail(z[None], weights, slope)[0]))(f @ W.T)
        small, squared = (
            reversible_gradient(*reversible_terms(J, f, targets, kind), W) for kind in ("softmax", "squared")
        )
        actual = -jax.grad(loss)(W)
        return jnp.linalg.norm(jnp.where(softmax, small, squared) - actual) / jnp.linalg.norm(actual)

    return jax.vmap(error)(softmax, slopes, scales, biases)


# --- A layer with linear gradient dynamics


def _lanes(rng: np.random.Generator, config: Config) -> tuple[np.ndarray, tuple[Array, ...]]:
    """What every lane is; its J, f, y, W_0, rate over 1 / lambda_max, and whether inputs are independent.

    A lane is random, with one Jacobian for all samples, with dependent inputs, or the counterexample.
    """
    kinds = np.repeat(["random", "shared", "dependent"], [config.instances, SPECIAL, SPECIAL])
    count, (m, n), dependent = len(kinds), (config.m, config.n), kinds == "dependent"
    J = rng.normal(size=(count, config.samples, m, m)) / m**0.5
    f = rng.normal(size=(count, config.samples, n))
    y, W0 = rng.normal(size=(count, config.samples, m)), rng.normal(size=(count, m, n))
    J[kinds == "shared"] = J[kinds == "shared", :1]
    # The other inputs are the sum of the independent ones.
    f[dependent, :, n // 2 :] = f[dependent, :, : n // 2].sum(axis=-1, keepdims=True)
    lanes = (J, f, y, W0, np.ones(count), ~dependent)
    example = (*counterexample_network(m, n, config.samples), np.zeros((m, n)), RATE, True)
    pairs = zip(lanes, example, strict=True)
    together = tuple(jnp.asarray(np.concatenate([many, np.asarray(one)[None]])) for many, one in pairs)
    return np.append(kinds, "example"), together


@partial(jax.jit, static_argnames="trained")
def _follow(lanes: tuple[Array, ...], steps: Array, trained: int) -> dict[str, Any]:
    """Stable ranks and bounds of every lane at `steps`, and at a late one; a trained network beside them.

    The late step is one where the rest is small against the slowest part.
    """
    marks = record_steps(trained, EVERY)

    def follow(J, f, y, W0, rate, independent):
        data = (layer_outputs, (J, f), y)
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
        at = at[: len(steps) + 1]
        curves = {
            "actual": stable_rank(path[: len(at)]),
            "printed": stable_rank_bound(G0, S, eta, at, "printed"),
            "valid": stable_rank_bound(G0, S, eta, at, "valid"),
        }

        optimizer = optax.sgd(eta)
        _, weights = train(bind(mean_squared_error, data), W0, optimizer, steps=trained, every=EVERY)
        network = jax.vmap(_negative_gradient, (0, None))(weights.ys, data)
        return {
            "early": {name: curve[:-1] for name, curve in curves.items()},
            "late": {name: curve[-1] for name, curve in curves.items()},
            "limit": limit,
            "rho": rho,
            "first_order": -2 * limit * (U[:, 0] @ rest @ Vt[0]) / values[0],
            "slowest": 1 - eta * split.slowest,
            "kernel": jnp.linalg.norm(kernel.parallel) / size,
            "trained": stable_rank(network),
            "rank": numerical_rank(network, atol=1e-12 * size),
            "gap": jnp.max(jnp.linalg.norm(network - theory, axis=(1, 2))) / size,
        }

    return jax.vmap(follow)(*lanes)


def run(config: Config, context: Context) -> dict:
    """Compare gradients, then follow all instances, in closed form and by training."""
    rng = np.random.default_rng(context.seed)
    context.progress("form of the gradient", 0.0)
    error = _forms(rng, config)
    context.progress("iterates and training", 0.4)
    grid = np.geomspace(TO, config.horizon, config.points).round()
    steps = np.unique(np.concatenate([np.arange(TO + 1), grid])).astype(int)
    kinds, lanes = _lanes(rng, config)
    found = jax.device_get(_follow(lanes, jnp.asarray(steps), config.steps))
    dims = {"early": "network step", "trained": "network record", "rank": "network record"}
    return {
        "activation": ("activation", np.array(list(SLOPES))),
        "scale": ("scale", np.array(config.scales)),
        "error": {
            "squared": ("activation", error["squared"]),
            "biased": error["biased"][0],
            "softmax": ("scale", error["softmax"]),
        },
        "step": ("step", steps),
        "record": ("record", record_steps(config.steps, EVERY)),
        "network": ("network", kinds),
        "of": {name: (dims.get(name, "network"), values) for name, values in found.items()},
    }


def _of_kind(saved: Saved, kind: str) -> dict[str, np.ndarray]:
    """What was found of the networks of one kind, (network, ...) each."""
    return {path: array[saved["network"] == kind] for path, array in saved["of"].items()}


def _keeps(networks: dict[str, np.ndarray], form: str, when: str = "early") -> np.ndarray:
    """Where the stable rank is within a bound, up to rounding."""
    return networks[f"{when}/actual"] <= (1 + SLACK) * networks[f"{when}/{form}"]


def _always_keeps(networks: dict[str, np.ndarray], form: str) -> np.ndarray:
    return _keeps(networks, form).all(axis=1) & _keeps(networks, form, "late")


def _share_above(random: dict[str, np.ndarray]) -> np.ndarray:
    """Share of the networks that have been above the printed bound so far, (step,)."""
    return np.maximum.accumulate(~_keeps(random, "printed"), axis=1).mean(axis=0)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The gradient's form, its iterates, the bound on their stable rank, and how that falls."""
    random, shared, dependent = (_of_kind(saved, kind) for kind in ("random", "shared", "dependent"))
    example = {name: part[0] for name, part in _of_kind(saved, "example").items()}
    yield from _forms_of_gradient(saved)
    gap, rounding = saved["of/gap"], "rounding of some hundred steps"
    label = f"{len(gap)} trained networks: largest difference, over |G_0|"
    yield stated(
        "training",
        "While A_i, B_i and C_i stay, gradients under descent are vec(G_t) = (1 - eta S)^t vec(G_0)",
        "zhao2024galore, Lemma 3.3",
        at_most(label, gap.max(), 1e-12, why=rounding),
    )
    yield _bound(saved["step"], saved["record"], example, random)
    yield _random(saved["step"], random)
    yield _rate(example, random)
    yield _dependent(config, saved["step"], dependent, random["rank"])
    first, late = np.median(shared["early/actual"][:, 0]), np.max(shared["late/actual"] - 1)
    second = "it is of second order here, 1e-12 at that step"
    yield stated(
        "one-jacobian",
        "Where the slowest eigenspace is one dyad, as for S = C (x) B, the stable rank tends to 1",
        "zhao2024galore, Corollary 3.5",
        at_most("stable rank at the late step less 1: largest", late, 1e-3, why=second),
        every("instances that keep the printed bound", _always_keeps(shared, "printed")),
        at_least("stable rank at the start: median", first, 1.05, why="there is something to lose"),
    )


def _forms_of_gradient(saved: Saved) -> Iterator[Claim]:
    rounding, as_large = "rounding, in larger networks too", "biases are as large as what they are added to"
    errors = zip(SLOPES, saved["error/squared"], strict=True)
    biased = saved["error/biased"]
    yield qualified(
        "gradient-form",
        "In reversible networks the gradient of a layer is (1/N) sum_i (A_i - B_i W C_i), for squared loss",
        "zhao2024galore, Theorem 3.2",
        condition="layers have no biases: else outputs are not J_i W f_i",
        inside=[
            at_most(f"{name} network: relative error", error, 1e-10, why=rounding) for name, error in errors
        ],
        outside=[at_least("ReLU network with biases: the same", biased, 0.05, why=as_large)],
    )
    scales, errors = saved["scale"], saved["error/softmax"]
    small, whole = scales <= SMALL, errors[np.argmax(scales)]
    order = convergence_order(scales[small], errors[small]).slope
    left_out = "the softmax lacks its second order; next orders bend the line"
    above = "two orders of magnitude above that of the smallest logits"
    yield qualified(
        "softmax",
        "For cross-entropy the gradient has that form too, with B_i = J_i^T P1 J_i / K",
        "zhao2024galore, Theorem 3.2",
        condition="the logits are small",
        inside=[
            slope("order of the relative error in the scale of the logits", order, 2.0, 0.2, why=left_out)
        ],
        outside=[at_least("logits as they come: relative error", whole, 1e-2, why=above)],
    )


def _bound(steps: np.ndarray, records: np.ndarray, example: dict, random: dict) -> Claim:
    early, recorded = steps <= TO, records[records <= TO]
    trained = example["trained"][records <= TO] <= example["early/printed"][recorded]
    valid = np.append(_keeps(example, "valid"), _keeps(example, "valid", "late"))
    above_limit = np.max(random["late/valid"] / random["limit"] - 1)
    label = "valid bound at the late step, over its limit sr(G_par), less 1: largest"
    twice = "2e-6 where the rest is 1e-6 of the slowest part"
    return corrected(
        "bound",
        "sr(G_t) <= sr(G_par) + rho^{2t} |G_0 - G_par|_F^2 / |G_par|_2^2",
        "zhao2024galore, Lemma 3.3 (the valid bound is derived here)",
        # Counts are exact, up to 1e-11 of the bound for rounding.
        printed=[
            every(f"counterexample, {TO} steps: those that keep it", _keeps(example, "printed")[early]),
            every(f"the same network, trained: records of {TO} steps that keep it", trained),
            every(
                f"random instances that keep it for {steps[-1]} steps, and late",
                _always_keeps(random, "printed"),
            ),
        ],
        mended=[
            every("counterexample: steps that keep the valid one", valid),
            every("random instances that keep the valid one", _always_keeps(random, "valid")),
            at_most(label, above_limit, 3 * LATE, why=twice),
        ],
    )


def _random(steps: np.ndarray, random: dict) -> Claim:
    share, count = _share_above(random), len(random["limit"])
    early, excess = share[steps <= EARLY][-1], np.max(random["early/actual"] - random["early/printed"])
    rare = "the bound's second order is above the first of the excess for long"
    coin = "the sign of a symmetric first order: three deviations of a fair coin"
    late = "it leaves late, when little is left to exceed by"
    return qualified(
        "random",
        "Random networks keep the printed bound",
        "zhao2024galore, Lemma 3.3 (a statement on random instances; measured here)",
        condition="they are followed for some hundred steps; about half leave it later, by little",
        inside=[at_most(f"share that has left it after {EARLY} steps", early, 0.1, why=rare)],
        outside=[
            equals(f"after {steps[-1]} steps", share[-1], 0.5, 1.5 / count**0.5, why=coin),
            at_most("largest excess over the bound", excess, 1e-2, why=late),
        ],
    )


def _rate(example: dict, random: dict) -> Claim:
    def decay(curve):
        start, end = curve - example["limit"]
        return (end / start) ** (1 / (TO - FROM))

    rho, iterates = example["rho"], decay(example["early/actual"][[FROM, TO]])
    trained = decay(example["trained"][[FROM // EVERY, TO // EVERY]])
    actual, first_order = random["late/actual"], random["first_order"]
    off = np.median(np.abs((actual - random["limit"]) / first_order - 1))
    told = (actual > random["late/printed"]) == (first_order > 0)
    label = f"decay of the excess per step, steps {FROM} to {TO}"
    two_percent = "far less than rho and rho^2 differ"
    formula = "random instances: excess over -2 sr(G_par) u^T X v / |G_par|_2: median distance to 1"
    second = "second order, 1e-6 of the first, over differences of singular values"
    sign = "those where its sign tells whether the printed bound fails"
    weak = "where the first order is far smaller than elsewhere the next decides"
    return corrected(
        "rate",
        "The stable rank tends to that of the slowest part like rho^{2t}",
        "zhao2024galore, Lemma 3.3 (the first order is derived here)",
        printed=[equals(f"{label}, over rho^2", iterates / rho**2, 1.0, 0.02, why=two_percent)],
        mended=[
            equals(f"{label}, over rho", iterates / rho, 1.0, 0.02, why=two_percent),
            equals("the same of the trained network, over rho", trained / rho, 1.0, 0.02, why=two_percent),
            at_most(formula, off, 1e-3, why=second),
            every(sign, told, len(told) // 50, why=weak),
        ],
    )


def _dependent(config: Config, steps: np.ndarray, dependent: dict, ranks: np.ndarray) -> Claim:
    # Later on what rounding left in the null space is no longer small.
    safe = dependent["slowest"][:, None] ** steps > 1e-4
    kept = _keeps(dependent, "valid")[safe]
    kernel, rank = dependent["kernel"].max(), dependent["rank"].max()
    independent = ranks[:, : TO // EVERY + 1].min()
    zero = "singular values below 1e-12 of the gradient's norm are zero"
    no_part = "of rounding size it is no part to tend to"
    return corrected(
        "dependent-inputs",
        "With N' < n independent inputs the bound holds with V_1 the null space of S",
        "zhao2024galore, Corollary 3.4",
        printed=[at_least("part of G_0 in the null space, over |G_0|: largest", kernel, 1e-9, why=no_part)],
        mended=[
            at_most(f"rank of G_t, of {config.n} inputs: largest", rank, config.n // 2, why=zero),
            at_least(f"independent inputs, {TO} steps: smallest rank", independent, config.n, why=zero),
            every("valid bound, with the slowest excited eigenvalue: steps that keep it", kept),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """The counterexample with both bounds, its excess, random instances, and errors of the form."""
    drawn, ((path, excess), (share, form)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    _draw_example(path, excess, saved)
    steps, above = saved["step"], _share_above(_of_kind(saved, "random"))
    share.plot(steps[1:], above[1:], color="C0", **plotting.TRAINED)
    share.axvline(EARLY, label=f"{EARLY} steps", **plotting.PRINTED)
    share.axhline(0.5, label="one half", **plotting.THEORY)
    share.set(xscale="log", ylim=(-0.03, 1), xlabel="step", ylabel="share above the printed bound so far")
    share.set_title(f"{config.instances} random instances")
    share.legend(loc="upper left")

    scales, errors = saved["scale"], saved["error/softmax"]
    form.loglog(scales, errors, "o", color="C0", label="softmax")
    small = scales <= SMALL
    plotting.reference_slope(form, scales[small], errors[small], 2, "slope 2")
    for index, (name, error) in enumerate(zip(SLOPES, saved["error/squared"], strict=True)):
        floor = np.full(len(scales), max(error, np.finfo(float).tiny))
        form.plot(scales, floor, color=f"C{index + 1}", label=f"squared loss, {name}", linewidth=1.6)
    form.axhline(saved["error/biased"].item(), label="squared loss, with biases", **plotting.PRINTED)
    form.set(ylim=(1e-17, 1e6), xlabel="scale of the logits (softmax)", ylabel="relative error")
    form.set_title("Form of the gradient, against autodiff")
    form.legend(loc="upper left", ncols=2, fontsize=7.5)
    return drawn


def _draw_example(path: Axes, excess: Axes, saved: Saved) -> None:
    """The counterexample's stable rank with both bounds, and its excess over the limit."""
    example = {name: part[0] for name, part in _of_kind(saved, "example").items()}
    t, records = saved["step"][: TO + 1], saved["record"][: TO // EVERY + 1]
    network, limit, rho = example["trained"][: len(records)], example["limit"], example["rho"]
    for ax, shown, shift, rate in ((path, 20, 0.0, ""), (excess, TO, limit, ", ρ²ᵗ")):
        early = slice(shown + 1)
        actual, printed = (example[f"early/{name}"][early] - shift for name in ("actual", "printed"))
        ax.plot(t[early], actual, color="C0", label="stable rank", **plotting.TRAINED)
        recorded = records[: shown // EVERY + 1]
        ax.plot(recorded, network[: len(recorded)] - shift, "o", color="C3", label="trained network")
        ax.plot(t[early], printed, label=f"printed bound{rate}", **plotting.PRINTED)
    path.plot(t[:21], example["early/valid"][:21], label="valid bound", **plotting.THEORY)
    path.axhline(limit, color="0.8", linewidth=0.8, zorder=0)
    path.set(xlabel="step", ylabel="stable rank of the gradient")
    path.set_title("Counterexample: above the printed bound")
    path.legend(loc="upper right")
    first = (example["early/actual"][TO] - limit) * rho ** (t - float(TO))
    excess.plot(t, first, label="ρᵗ", **plotting.THEORY)
    excess.set(yscale="log", xlabel="step", ylabel="excess over the limit")
    excess.set_title(f"Its excess falls like ρᵗ, ρ = {rho:.3f}")
    excess.legend(loc="lower left")
