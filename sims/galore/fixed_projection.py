"""Descent in a fixed subspace: the gradient inside of it vanishes, the rest stays until the basis is renewed.

The networks are y = J_i W F_i, so that the gradient of W has constant coefficients. The optimizer is GaLore
around plain gradient descent, with a basis that is kept, renewed now and then, or renewed at every step.
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
from dynamics.galore import contraction_factor, gradient_operator, projected_coefficients, projected_descent
from dynamics.spectra import captured_energy
from models.galore import scale_by_galore
from models.layer import layer_outputs
from models.losses import bind, mean_squared_error
from models.training import record_steps, train
from sims import plotting
from sims.claims import (
    ROUNDING,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    equals,
    every,
    qualified,
    stated,
)
from sims.compare import largest
from sims.ranges import Count, Range
from sims.results import Context, Saved

SLACK = 1e-9  # for rounding of a ratio of norms, as long as the gradient is above LIVE of the first one
LIVE = 1e-5
RATES = (1.0, 1.9, 2.1)  # over 1 / lambda_max inside the subspace
OUTPUTS, INPUTS, RANK = 12, 10, 3
GAPS = {"fixed": None, "T = 10": 10, "T = 1": 1}  # steps between two refreshes
EVERY = 5  # steps between two records
WHOLE = 50  # steps that full rank is compared for
SHOWN = 100  # steps that are drawn
# G(w) = 0.6 - (1 - 0.4 w) w: the coefficient depends on the weight.
CONSTANT, SLOPE, SCALAR_RATE, SCALAR_STEPS = 0.6, 0.4, 0.1, 60


@dataclass(frozen=True)
class Config:
    """Random networks, and how long they are trained."""

    instances: Count = 10
    """Random networks whose contraction is measured, each at three learning rates."""
    samples: Count = 10
    """Samples of each, of six inputs side by side."""
    kept: Annotated[int, Range(at_least=200)] = 400
    """Steps that they are trained for."""
    steps: Annotated[int, Range(at_least=1000)] = 2000
    """Steps of the training with bases that are renewed."""


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), instances=50, samples=20, steps=5000),
    "paper": replace(Config(), instances=200, samples=20, kept=1000, steps=10_000),
}
_negative_gradient = partial(gradient_flow(mean_squared_error), None)


def _together(params: dict[str, Array], network: tuple[Array, ...]) -> Array:
    """Sum of the losses of several copies of the layer, which do not see one another."""
    J, F, y = network
    losses = [mean_squared_error(W, (layer_outputs, (J, F), y)) for W in params.values()]
    return jnp.sum(jnp.stack(losses))


def _coefficients(J: Array, F: Array) -> tuple[Array, Array]:
    return J.mT @ J, F @ F.mT


def _networks(rng: np.random.Generator, lanes: int, samples: int, m: int, n: int) -> tuple[Array, ...]:
    """J, F and targets of random networks."""
    J = rng.normal(size=(lanes, samples, 2 * m, m)) / (2 * m) ** 0.5
    F = rng.normal(size=(lanes, samples, n, 2 * n)) / (2 * n) ** 0.5
    return tuple(jnp.asarray(part) for part in (J, F, 3 * rng.normal(size=(lanes, samples, 2 * m, 2 * n))))


@partial(jax.jit, static_argnames="steps")
def _contract(networks: tuple[Array, ...], rates: Array, steps: int) -> dict[str, Array]:
    """Train in the leading subspace of the first gradient, kept from then on, both sides projected."""

    def of_network(J, F, y):
        B, C = _coefficients(J, F)
        data = (layer_outputs, (J, F), y)
        W0 = jnp.zeros((J.shape[-1], F.shape[-2]), J.dtype)
        G0 = _negative_gradient(W0, data)
        U, _, Vt = jnp.linalg.svd(G0, full_matrices=False)
        P, Q = U[:, :RANK], Vt[:RANK].T
        B_hat, C_hat = projected_coefficients(B, P), projected_coefficients(C, Q)
        fastest = jnp.linalg.eigvalsh(gradient_operator(B_hat, C_hat))[-1]
        galore = scale_by_galore(
            RANK, update_gap=steps + 1, scale=1.0, projection="full", inner=optax.identity()
        )

        def at(rate):
            eta = rate / fastest
            optimizer = optax.chain(galore, optax.sgd(eta))
            _, path = train(bind(mean_squared_error, data), W0, optimizer, steps=steps)
            G = jax.vmap(_negative_gradient, (0, None))(path.ys, data)
            theory = projected_descent(G0, B, C, P, Q, eta, jnp.asarray([steps]))
            return {
                "projected": jnp.linalg.norm(P.T @ G @ Q, axis=(1, 2)),
                "gradient": jnp.linalg.norm(G, axis=(1, 2)),
                "gap": jnp.linalg.norm(path.ys[-1] - theory.change[0]) / jnp.linalg.norm(theory.change[0]),
                "stays": jnp.linalg.norm(theory.gradient[0]),
                "printed": contraction_factor(B_hat, C_hat, eta, "printed"),
                "valid": contraction_factor(B_hat, C_hat, eta, "valid"),
            }

        return jax.vmap(at)(rates)

    return jax.vmap(of_network)(*networks)


@jax.jit
def _scalar() -> dict[str, Array]:
    """Contraction of one weight whose coefficient depends on it, and both factors."""

    def loss(w):
        return -CONSTANT * w + w**2 / 2 - SLOPE * w**3 / 3

    w = train(loss, jnp.zeros(()), optax.sgd(SCALAR_RATE), steps=SCALAR_STEPS)[1].ys
    G, B = CONSTANT - (1 - SLOPE * w) * w, (1 - SLOPE * w)[:, None, None, None]
    bounds = {"lipschitz": (0.0, SLOPE, 0.0), "weight_bound": jnp.max(w), "sup_B": 1.0, "sup_C": 1.0}
    printed, valid = (
        contraction_factor(B, jnp.ones_like(B), SCALAR_RATE, form, **bounds) for form in ("printed", "valid")
    )
    return {"ratio": G[1:] / G[:-1], "printed": printed, "valid": valid}


def _of_path(values: dict[str, Any]):
    """An option of the optimizer that depends on the name of a parameter."""
    return lambda path, _: values[path]


def _axes(path: str, _) -> tuple[int, int] | None:
    """The matrix named "plain" is not projected."""
    return None if path == "plain" else (0, 1)


@partial(jax.jit, static_argnames="steps")
def _renew(network: tuple[Array, ...], steps: int) -> dict[str, Array]:
    """Train copies of one layer with different bases, and one without a projection, side by side."""
    J, F, y = network
    B, C = _coefficients(J, F)
    eta = 1 / jnp.linalg.eigvalsh(gradient_operator(B, C))[-1]
    start = jnp.zeros((OUTPUTS, INPUTS), J.dtype)
    gaps = {name: gap or steps + 1 for name, gap in GAPS.items()} | {"whole": 1, "plain": 1}
    galore = scale_by_galore(
        _of_path(dict.fromkeys(GAPS, RANK) | {"whole": INPUTS, "plain": RANK}),
        update_gap=_of_path(gaps),
        scale=1.0,
        inner=optax.identity(),
        matrix_axes=_axes,
    )
    optimizer = optax.chain(galore, optax.sgd(eta))
    _, path = train(bind(_together, network), dict.fromkeys(gaps, start), optimizer, steps=steps, every=EVERY)
    whole, plain = path.ys["whole"], path.ys["plain"]
    W = jnp.stack([path.ys[name] for name in GAPS])
    G = jax.vmap(jax.vmap(_negative_gradient, (0, None)), (0, None))(W, (layer_outputs, (J, F), y))
    # The columns are the short side.
    Q = jnp.linalg.svd(G[0, 0])[2][:RANK].T
    theory = projected_descent(G[0, 0], B, C, jnp.eye(OUTPUTS), Q, eta, jnp.asarray([steps]))
    inside = captured_energy(jnp.broadcast_to(Q, (G.shape[1], *Q.shape)), G[0].mT)
    values = jnp.linalg.svd(W, compute_uv=False)
    return {
        "gradient": jnp.linalg.norm(G, axis=(2, 3)),
        "inside": jnp.sqrt(inside) * jnp.linalg.norm(G[0], axis=(1, 2)),
        "stays": jnp.linalg.norm(theory.gradient[0]),
        # Singular values below 1e-9 of the largest are zero.
        "rank": jnp.sum(values > 1e-9 * values[:, -1:, :1], axis=-1),
        "whole": jnp.max(jnp.linalg.norm(whole - plain, axis=(1, 2)))
        / jnp.max(jnp.linalg.norm(plain, axis=(1, 2))),
    }


@partial(jax.jit, static_argnames="inner")
def _whole(network: tuple[Array, ...], rate: Array, inner: optax.GradientTransformation) -> Array:
    """Relative difference that a basis of full rank makes to training with another transformation inside."""
    galore = scale_by_galore(INPUTS, update_gap=WHOLE + 1, scale=1.0, inner=inner, matrix_axes=_axes)
    start = dict.fromkeys(("whole", "plain"), jnp.zeros((OUTPUTS, INPUTS), network[0].dtype))
    last, _ = train(bind(_together, network), start, optax.chain(galore, optax.sgd(rate)), steps=WHOLE)
    return jnp.linalg.norm(last["whole"] - last["plain"]) / jnp.linalg.norm(last["plain"])


def _ratio(projected: np.ndarray) -> np.ndarray:
    """Contraction of |R| (..., step) per step; NaN where rounding of the whole gradient is seen in it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = projected[..., 1:] / projected[..., :-1]
    return np.where(projected[..., 1:] > LIVE * projected[..., :1], ratio, np.nan)


def run(config: Config, context: Context) -> dict:
    """Train in a subspace that is kept, one weight by itself, with bases that are renewed, at full rank."""
    rng = np.random.default_rng(context.seed)
    context.progress("fixed subspace", 0.0)
    networks = _networks(rng, config.instances, config.samples, 8, 6)
    fixed = jax.device_get(_contract(networks, jnp.asarray(RATES), config.kept))
    scalar = jax.device_get(_scalar())
    projected, gradient = fixed.pop("projected"), fixed.pop("gradient")

    context.progress("renewed bases", 0.5)
    one = tuple(part[0] for part in _networks(rng, 1, 1, OUTPUTS, INPUTS))
    renewed = jax.device_get(_renew(one, config.steps))

    context.progress("full rank", 0.8)
    inner = {"momentum": optax.trace(0.9), "Adam": optax.scale_by_adam()}
    whole = {name: float(_whole(one, jnp.asarray(0.1), transform)) for name, transform in inner.items()}
    at_end = {
        "projected": projected[..., -1],
        "gradient": gradient[..., -1],
        "decay": projected[..., -1] / projected[..., 0],
        "growth": projected[..., -1] / projected[..., -2],
    }
    slowest = np.nanmax(_ratio(projected), axis=-1)
    dims = {"gradient": "basis record", "rank": "basis record", "inside": "record"}
    return {
        "rate": ("rate", np.array(RATES)),
        "fixed": ("instance rate", fixed | at_end),
        "keeps": ("instance rate", {form: slowest <= fixed[form] + SLACK for form in ("printed", "valid")}),
        "step": ("step", np.arange(SHOWN + 1)),
        "projected": ("rate step", projected[0, :, : SHOWN + 1]),
        "gradient": ("step", gradient[0, 0, : SHOWN + 1]),
        "scalar_step": ("scalar_step", np.arange(1, SCALAR_STEPS + 1)),
        "scalar": {"ratio": ("scalar_step", scalar.pop("ratio")), **scalar},
        "basis": ("basis", np.array(list(GAPS))),
        "record": ("record", record_steps(config.steps, EVERY)),
        "renewed": {name: (dims.get(name, ""), part) for name, part in renewed.items()},
        "whole": whole,
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """A subspace that is kept: contraction, what stays, the step size; then bases that are renewed."""
    yield _contraction(saved["keeps/printed"], saved["keeps/valid"], saved["scalar"])
    one, near_two, above_two = (
        {name: values[:, index] for name, values in saved["fixed"].items()} for index in range(len(RATES))
    )
    inside, left, gap = one["projected"].max(), one["gradient"], one["gap"].max()
    off, steps = largest(left / one["stays"] - 1), "rounding of some hundred steps"
    yield stated(
        "stays",
        "R_t goes to zero under a fixed projection: the gradient vanishes inside of the subspace only",
        "zhao2024galore, Theorem 3.8 and the remark after it",
        at_most("|R| at the end: largest", inside, 1e-12, why="rounding of a gradient of order ten"),
        at_least("|G| there: smallest", left.min(), 1.0, why="a tenth of a gradient of order ten"),
        at_most("|G| over what the closed form leaves: largest distance to 1", off, 1e-10, why=steps),
        at_most("trained weights to closed form: largest relative gap", gap, 1e-10, why=steps),
    )
    decay, growth = near_two["decay"].max(), above_two["growth"].min()
    _, near, above = (f"eta = {rate:g} / lmax" for rate in RATES)
    shrinks, overshoots = "0.9 per step is 1e-9 in 200", "the fastest component alone is left, and overshoots"
    yield qualified(
        "step-size",
        "R_t goes to zero under a fixed projection, for positive M",
        "zhao2024galore, Theorem 3.8",
        condition="eta < 2 / lmax of the projected operator",
        inside=[at_most(f"{near}: largest |R| at the end, over the start", decay, 1e-9, why=shrinks)],
        outside=[
            equals(f"{above}: growth of |R| per step, smallest", growth, RATES[2] - 1, 1e-3, why=overshoots)
        ],
    )
    yield _renewed(config, saved["record"], saved["renewed"])
    descent, momentum, adam = saved["renewed/whole"], saved["whole/momentum"], saved["whole/Adam"]
    label = "gradient descent inside: largest relative difference of weights"
    signs = "a rotation changes signs, of which Adam's first steps are made"
    yield qualified(
        "full-rank",
        "With r = min(m, n) GaLore follows exactly the original training",
        "zhao2024galore, section 3 (full rank)",
        condition="the inner transformation commutes with rotations: Adam does not",
        inside=[
            at_most(label, descent, 1e-12, why=ROUNDING),
            at_most(f"momentum inside, one basis, {WHOLE} steps", momentum, 1e-12, why=ROUNDING),
        ],
        outside=[at_least("Adam inside, the same", adam, 0.05, why=signs)],
    )


def _contraction(printed: np.ndarray, valid: np.ndarray, scalar: dict[str, np.ndarray]) -> Claim:
    slowest, factor, rounding = scalar["ratio"].max(), scalar["valid"], "rounding of ratios of norms"
    label = "one weight, B = 1 - 0.4 w, L_C = 0: largest ratio"
    return corrected(
        "contraction",
        "|R_t| <= (1 - eta M) |R_{t-1}|, M = mean min lmin(P^T B_i P) lmin(Q^T C_i Q) - L_A - L_B L_C D^2",
        "zhao2024galore, Theorem 3.8 (the valid factor is derived here)",
        printed=[
            every(f"eta = {RATES[1]:g} / lmax: networks that keep it at all steps", printed[:, 1]),
            at_most(label, slowest, scalar["printed"], SLACK, why=rounding),
        ],
        mended=[
            every("eta = 1 / lmax, constant coefficients: networks that keep it", printed[:, 0]),
            every("valid factor, all learning rates: networks that keep it", valid),
            at_most("one weight, against the valid factor", slowest, factor, SLACK, why=rounding),
            at_least("the same", slowest, factor, 5e-3, why="it is reached a step after the last"),
        ],
    )


def _renewed(config: Config, steps: np.ndarray, renewed: dict[str, np.ndarray]) -> Claim:
    ranks = renewed["rank"]
    bases = [np.minimum(-(-steps // (gap or config.steps)), INPUTS) for gap in GAPS.values()]
    first, last = renewed["gradient"][:, 0], renewed["gradient"][:, -1]
    inside, left = renewed["inside"][-1], last[0] / renewed["stays"]
    few = ranks <= RANK * np.stack(bases)
    slow = "the slowest direction needs a thousand steps for three orders"
    return stated(
        "renewed",
        "Renewing the basis lets low-rank updates learn weights of full rank",
        "zhao2024galore, section 4.1",
        at_most("fixed basis: |G| inside of it at the end", inside, 1e-10, why=ROUNDING),
        equals("|G| over what the closed form leaves", left, 1.0, 1e-9, why=ROUNDING),
        equals("rank of W_t - W_0", ranks[0, -1], RANK, why="that of the basis"),
        at_most("T = 10: |G| at the end, over the start", last[1] / first[1], 1e-3, why=slow),
        at_most("T = 1: |G| at the end, over the start", last[2] / first[2], 1e-3, why=slow),
        equals("T = 10: rank of W_t - W_0 at the end", ranks[1, -1], INPUTS, why="that of all weights"),
        # Counts are exact; singular values below 1e-9 of the largest are zero.
        every("records with rank at most r times the number of bases", few),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Gradients inside of a fixed subspace and as a whole, renewed bases, contraction per step."""
    drawn, ((fixed, renewed), (factor, scalar)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    for index, rate in enumerate(RATES):
        label = f"|R|, η = {rate:g} / λmax"
        fixed.plot(saved["projected"][index], color=f"C{index}", label=label, **plotting.TRAINED)
    fixed.plot(saved["gradient"], color="C4", label="|G|, η = 1 / λmax", **plotting.TRAINED)
    fixed.axhline(saved["fixed/stays"][0, 0], label="what the closed form leaves", **plotting.THEORY)
    fixed.set(yscale="log", ylim=(1e-16, 1e12), xlabel="step", ylabel="norm")
    fixed.set_title("Fixed subspace, both sides projected")
    fixed.legend(loc="upper left", fontsize=7.5, ncols=2)

    steps = saved["record"]
    for index, name in enumerate(GAPS):
        label = f"|G|, {name}" if index else "|G|, fixed basis"
        gradient = saved["renewed/gradient"][index]
        renewed.plot(steps, gradient, color=f"C{index}", label=label, **plotting.TRAINED)
    inside, stays = saved["renewed/inside"], saved["renewed/stays"].item()
    renewed.plot(steps, inside, color="C4", label="|G Q|, fixed basis", **plotting.TRAINED)
    renewed.axhline(stays, label="what the closed form leaves", **plotting.THEORY)
    renewed.set(yscale="log", ylim=(1e-15, 1e6), xlabel="step", ylabel="norm")
    renewed.set_title(f"Renewed bases of rank {RANK}, {OUTPUTS} by {INPUTS} weights")
    renewed.legend(loc="upper right", fontsize=7.5, ncols=2)

    _draw_factors(factor, saved)
    scalar.plot(saved["scalar_step"], saved["scalar/ratio"], color="C0", label="measured", **plotting.TRAINED)
    scalar.axhline(saved["scalar/printed"].item(), label="printed factor", **plotting.PRINTED)
    scalar.axhline(saved["scalar/valid"].item(), label="valid factor", **plotting.THEORY)
    scalar.set(ylim=(0.9, 1.0), xlabel="step", ylabel="G over that of the step before")
    scalar.set_title("One weight, B = 1 − 0.4 w, C = 1")
    scalar.legend(loc="upper left")
    return drawn


def _draw_factors(ax: Axes, saved: Saved) -> None:
    """Contraction per step at every rate, with the printed and the valid factor."""
    steps, ratio = np.arange(1, 31), _ratio(saved["projected"])
    for index, rate in enumerate(RATES):
        color, label = f"C{index}", f"η = {rate:g} / λmax"
        ax.plot(steps, ratio[index, :30], color=color, label=label, **plotting.TRAINED)
        printed, valid = (saved[f"fixed/{form}"][0, index] for form in ("printed", "valid"))
        ax.plot(steps, np.full(30, printed), **{**plotting.PRINTED, "color": color})
        ax.plot(steps, np.full(30, valid), **plotting.THEORY)
    ax.plot([], [], label="printed factor", **plotting.PRINTED)
    ax.plot([], [], label="valid factor", **plotting.THEORY)
    ax.set(ylim=(0, 1.6), xlabel="step", ylabel="|R| over that of the step before")
    ax.set_title("Contraction per step")
    ax.legend(loc="upper left", fontsize=7.5, ncols=2)
