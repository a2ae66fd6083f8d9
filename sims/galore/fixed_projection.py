"""Descent in a fixed subspace: the gradient inside of it vanishes, the rest stays until the basis is renewed.

The networks are y = J_i W F_i, so that the gradient of W has constant coefficients. The optimizer is GaLore
around plain gradient descent, with a basis that is kept, renewed now and then, or renewed at every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure

from dynamics.galore import contraction_factor, gradient_operator, projected_coefficients, projected_descent
from dynamics.spectra import captured_energy
from models.galore import scale_by_galore
from models.losses import bind, mean_squared_error
from models.training import record_steps, train
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.results import Context, Result, Saved

ROUNDING = 1e-9  # of a ratio of norms, as long as the gradient is above LIVE of the first one
LIVE = 1e-5
RATES = (1.0, 1.9, 2.1)  # over 1 / lambda_max inside the subspace
OUTPUTS, INPUTS, RANK = 12, 10, 3
GAPS = {"fixed": None, "T = 10": 10, "T = 1": 1}  # steps between two refreshes
EVERY = 5  # steps between two records
WHOLE = 50  # steps that full rank is compared for
# G(w) = 0.6 - (1 - 0.4 w) w: the coefficient depends on the weight.
CONSTANT, SLOPE, SCALAR_RATE, SCALAR_STEPS = 0.6, 0.4, 0.1, 60


@dataclass(frozen=True)
class Config:
    """Random networks, and how long they are trained."""

    instances: int = 10
    """Random networks whose contraction is measured, each at three learning rates."""
    samples: int = 10
    """Samples of each, of six inputs side by side."""
    kept: int = 400
    """Steps that they are trained for."""
    steps: int = 2000
    """Steps of the training with bases that are renewed."""

    def __post_init__(self):
        if self.instances < 1 or self.samples < 1 or self.kept < 200 or self.steps < 1000:
            raise ValueError(
                "instances and samples must be positive, kept and steps at least 200 and 1000, "
                f"got {self.instances}, {self.samples}, {self.kept} and {self.steps}"
            )


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), instances=50, samples=20, steps=5000),
    "paper": replace(Config(), instances=200, samples=20, kept=1000, steps=10_000),
}


def _predict(W: Array, inputs: tuple[Array, Array]) -> Array:
    """Outputs J_i W F_i, (N, d, L): L inputs per sample share what sits behind the layer."""
    J, F = inputs
    return jnp.einsum("adm,mn,anl->adl", J, W, F)


def _gradient(W: Array, J: Array, F: Array, y: Array) -> Array:
    """Negative gradient of the actual loss."""
    return -jax.grad(mean_squared_error)(W, (_predict, (J, F), y))


def _together(params: dict[str, Array], network: tuple[Array, ...]) -> Array:
    """Sum of the losses of several copies of the layer, which do not see one another."""
    J, F, y = network
    return jnp.sum(jnp.stack([mean_squared_error(W, (_predict, (J, F), y)) for W in params.values()]))


def _coefficients(J: Array, F: Array) -> tuple[Array, Array]:
    return J.mT @ J, F @ F.mT


def _network(rng: np.random.Generator, lanes: int, samples: int, m: int, n: int) -> tuple[Array, ...]:
    """J, F and targets of random networks."""
    J = rng.normal(size=(lanes, samples, 2 * m, m)) / (2 * m) ** 0.5
    F = rng.normal(size=(lanes, samples, n, 2 * n)) / (2 * n) ** 0.5
    return tuple(jnp.asarray(part) for part in (J, F, 3 * rng.normal(size=(lanes, samples, 2 * m, 2 * n))))


@partial(jax.jit, static_argnames="steps")
def _contract(network: tuple[Array, ...], rates: Array, steps: int) -> dict[str, Array]:
    """Train in the leading subspace of the first gradient, kept from then on, both sides projected."""

    def lane(J, F, y):
        B, C = _coefficients(J, F)
        W0 = jnp.zeros((J.shape[-1], F.shape[-2]), J.dtype)
        G0 = _gradient(W0, J, F, y)
        U, _, Vt = jnp.linalg.svd(G0, full_matrices=False)
        P, Q = U[:, :RANK], Vt[:RANK].T
        B_hat, C_hat = projected_coefficients(B, P), projected_coefficients(C, Q)
        values = jnp.linalg.eigvalsh(gradient_operator(B_hat, C_hat))

        def at(rate):
            eta = rate / values[-1]
            optimizer = optax.chain(
                scale_by_galore(
                    RANK, update_gap=steps + 1, scale=1.0, projection="full", inner=optax.identity()
                ),
                optax.sgd(eta),
            )
            _, path = train(bind(mean_squared_error, (_predict, (J, F), y)), W0, optimizer, steps=steps)
            G = jax.vmap(_gradient, (0, None, None, None))(path.ys, J, F, y)
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

    return jax.vmap(lane)(*network)


@jax.jit
def _scalar() -> dict[str, Array]:
    """Contraction of one weight whose coefficient depends on it, and both factors."""

    def loss(w):
        return -CONSTANT * w + w**2 / 2 - SLOPE * w**3 / 3

    _, path = train(loss, jnp.zeros(()), optax.sgd(SCALAR_RATE), steps=SCALAR_STEPS)
    w = path.ys
    G, B = CONSTANT - (1 - SLOPE * w) * w, (1 - SLOPE * w)[:, None, None, None]
    printed, valid = (
        contraction_factor(
            B,
            jnp.ones_like(B),
            SCALAR_RATE,
            form,
            lipschitz=(0.0, SLOPE, 0.0),
            weight_bound=jnp.max(w),
            sup_B=1.0,
            sup_C=1.0,
        )
        for form in ("printed", "valid")
    )
    return {"ratio": G[1:] / G[:-1], "printed": printed, "valid": valid}


def _of_path(values: dict[str, Any]):
    """An option of the optimizer that depends on the name of a parameter."""
    return lambda path, _: values[path]


@partial(jax.jit, static_argnames="steps")
def _switch(network: tuple[Array, ...], steps: int) -> dict[str, Array]:
    """Train copies of one layer with different bases, and one without a projection, side by side."""
    J, F, y = network
    B, C = _coefficients(J, F)
    eta = 1 / jnp.linalg.eigvalsh(gradient_operator(B, C))[-1]
    start = jnp.zeros((OUTPUTS, INPUTS), J.dtype)
    gaps = {name: gap or steps + 1 for name, gap in GAPS.items()} | {"whole": 1, "plain": 1}
    optimizer = optax.chain(
        scale_by_galore(
            _of_path({name: RANK for name in GAPS} | {"whole": INPUTS, "plain": RANK}),
            update_gap=_of_path(gaps),
            scale=1.0,
            inner=optax.identity(),
            matrix_axes=lambda path, _: None if path == "plain" else (0, 1),
        ),
        optax.sgd(eta),
    )

    _, path = train(bind(_together, network), dict.fromkeys(gaps, start), optimizer, steps=steps, every=EVERY)
    W = jnp.stack([path.ys[name] for name in gaps])
    G = jax.vmap(jax.vmap(_gradient, (0, None, None, None)), (0, None, None, None))(W, J, F, y)
    # The columns are the short side.
    Q = jnp.linalg.svd(G[0, 0])[2][:RANK].T
    theory = projected_descent(G[0, 0], B, C, jnp.eye(OUTPUTS), Q, eta, jnp.asarray([steps]))
    inside = captured_energy(jnp.broadcast_to(Q, (G.shape[1], *Q.shape)), G[0].mT)
    return {
        "gradient": jnp.linalg.norm(G[: len(GAPS)], axis=(2, 3)),
        "inside": jnp.sqrt(inside) * jnp.linalg.norm(G[0], axis=(1, 2)),
        "stays": jnp.linalg.norm(theory.gradient[0]),
        "values": jnp.linalg.svd(W[: len(GAPS)], compute_uv=False),
        "whole": jnp.max(jnp.linalg.norm(W[-2] - W[-1], axis=(1, 2)))
        / jnp.max(jnp.linalg.norm(W[-1], axis=(1, 2))),
    }


@partial(jax.jit, static_argnames="inner")
def _whole(network: tuple[Array, ...], rate: Array, inner: optax.GradientTransformation) -> Array:
    """Relative difference that a basis of full rank makes to training with another transformation inside."""
    optimizer = optax.chain(
        scale_by_galore(
            INPUTS,
            update_gap=WHOLE + 1,
            scale=1.0,
            inner=inner,
            matrix_axes=lambda path, _: None if path == "plain" else (0, 1),
        ),
        optax.sgd(rate),
    )

    start = jnp.zeros((OUTPUTS, INPUTS), network[0].dtype)
    last, _ = train(bind(_together, network), {"whole": start, "plain": start}, optimizer, steps=WHOLE)
    return jnp.linalg.norm(last["whole"] - last["plain"]) / jnp.linalg.norm(last["plain"])


def run(config: Config, context: Context) -> Result:
    """Train in a subspace that is kept, one weight by itself, with bases that are renewed, at full rank."""
    rng = np.random.default_rng(context.seed)
    context.progress("fixed subspace", 0.0)
    found = _contract(_network(rng, config.instances, config.samples, 8, 6), jnp.asarray(RATES), config.kept)
    fixed = {name: np.asarray(array) for name, array in found.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = fixed["projected"][..., 1:] / fixed["projected"][..., :-1]
    # Below it rounding of the whole gradient is seen in a ratio.
    live = fixed["projected"][..., 1:] > LIVE * fixed["projected"][..., :1]
    ratio = np.where(live, ratio, np.nan)
    scalar = {name: np.asarray(array) for name, array in _scalar().items()}

    context.progress("renewed bases", 0.5)
    one = tuple(part[0] for part in _network(rng, 1, 1, OUTPUTS, INPUTS))
    switch = {name: np.asarray(array) for name, array in _switch(one, config.steps).items()}

    context.progress("full rank", 0.8)
    inner = {"momentum": optax.trace(0.9), "Adam": optax.scale_by_adam()}
    whole = {name: float(_whole(one, jnp.asarray(0.1), transform)) for name, transform in inner.items()}

    data = {
        "fixed": {name: fixed[name][0] for name in ("projected", "gradient", "stays", "printed", "valid")}
        | {"ratio": ratio[0]},
        "scalar": scalar,
        "marks": record_steps(config.steps, EVERY),
        "switch": {name: switch[name] for name in ("gradient", "inside", "stays")},
    }
    claims = (
        _contraction(ratio, fixed, scalar),
        _stays(fixed),
        _step_size(fixed, ratio),
        _renewed(config, switch),
        _full_rank(float(switch["whole"]), whole),
    )
    dims = {
        **{f"fixed/{name}": ("rate", "step") for name in ("projected", "gradient")},
        "fixed/ratio": ("rate", "later_step"),
        **{f"fixed/{name}": ("rate",) for name in ("stays", "printed", "valid")},
        "scalar/ratio": ("scalar_step",),
        "marks": ("record",),
        "switch/gradient": ("basis", "record"),
        "switch/inside": ("record",),
    }
    return Result(data, claims, dims)


def _contraction(ratio: np.ndarray, fixed: dict[str, np.ndarray], scalar: dict[str, np.ndarray]) -> Claim:
    kept = {
        form: np.all(~(ratio > fixed[form][..., None] + ROUNDING), axis=-1) for form in ("printed", "valid")
    }
    slowest = scalar["ratio"].max()
    return Claim(
        "galore.fixed_projection/contraction",
        "|R_t| <= (1 - eta M) |R_{t-1}|, M = mean min lmin(P^T B_i P) lmin(Q^T C_i Q) - L_A - L_B L_C D^2",
        "zhao2024galore, Theorem 3.8 (the valid factor is derived here)",
        "corrected",
        [
            # Rounding of ratios of norms.
            all_of(f"eta = {RATES[1]:g} / lmax: networks that keep it at all steps", kept["printed"][:, 1]),
            Check(
                "one weight, B = 1 - 0.4 w, L_C = 0: largest ratio",
                "at most",
                float(scalar["printed"]),
                slowest,
                ROUNDING,
            ),
            all_of("eta = 1 / lmax, constant coefficients: networks that keep it", kept["printed"][:, 0]),
            all_of("valid factor, all learning rates: networks that keep it", kept["valid"]),
            Check(
                "one weight, against the valid factor", "at most", float(scalar["valid"]), slowest, ROUNDING
            ),
            # Not an idle bound: a step is missing from the end, where it is reached.
            Check("the same", "at least", float(scalar["valid"]), slowest, 5e-3),
        ],
        printed=2,
    )


def _stays(fixed: dict[str, np.ndarray]) -> Claim:
    inside, gradient = fixed["projected"][:, 0, -1], fixed["gradient"][:, 0, -1]
    return Claim(
        "galore.fixed_projection/stays",
        "R_t goes to zero under a fixed projection: the gradient vanishes inside of the subspace only",
        "zhao2024galore, Theorem 3.8 and the remark after it",
        "stated",
        [
            # Rounding of a gradient of order ten.
            Check("|R| at the end: largest", "at most", 1e-12, inside.max()),
            Check("|G| there: smallest", "at least", 1.0, gradient.min()),
            # Rounding of some hundred steps.
            Check(
                "|G| over what the closed form leaves: largest distance to 1",
                "at most",
                1e-10,
                np.abs(gradient / fixed["stays"][:, 0] - 1).max(),
            ),
            Check(
                "trained weights to closed form: largest relative gap",
                "at most",
                1e-10,
                fixed["gap"][:, 0].max(),
            ),
        ],
    )


def _step_size(fixed: dict[str, np.ndarray], ratio: np.ndarray) -> Claim:
    growth = fixed["projected"][:, 2, -1] / fixed["projected"][:, 2, -2]
    decay = fixed["projected"][:, 1, -1] / fixed["projected"][:, 1, 0]
    return Claim(
        "galore.fixed_projection/step-size",
        "R_t goes to zero under a fixed projection, for positive M",
        "zhao2024galore, Theorem 3.8",
        "qualified",
        [
            # 0.9 per step: 1e-9 in 200 steps.
            Check(
                f"eta = {RATES[1]:g} / lmax: largest |R| at the end, over the start",
                "at most",
                1e-9,
                decay.max(),
            ),
            # The fastest component alone is left, and overshoots.
            Check(
                f"eta = {RATES[2]:g} / lmax: growth of |R| per step, smallest",
                "equals",
                RATES[2] - 1,
                growth.min(),
                1e-3,
            ),
        ],
        condition="eta < 2 / lmax of the projected operator",
    )


def _renewed(config: Config, switch: dict[str, np.ndarray]) -> Claim:
    marks, values = record_steps(config.steps, EVERY), switch["values"]
    ranks = np.sum(values > 1e-9 * values[:, -1:, :1], axis=-1)
    bases = np.array([np.minimum(-(-marks // (gap or config.steps)), INPUTS) for gap in GAPS.values()])
    first, last = switch["gradient"][:, 0], switch["gradient"][:, -1]
    return Claim(
        "galore.fixed_projection/renewed",
        "Renewing the basis lets low-rank updates learn weights of full rank",
        "zhao2024galore, section 4.1",
        "stated",
        [
            # Rounding.
            Check("fixed basis: |G| inside of it at the end", "at most", 1e-10, switch["inside"][-1]),
            Check("|G| over what the closed form leaves", "equals", 1.0, last[0] / switch["stays"], 1e-9),
            Check("rank of W_t - W_0", "equals", RANK, ranks[0, -1]),
            # Three orders: the slowest direction of the loss needs a thousand steps for them.
            *(
                Check(f"{name}: |G| at the end, over the start", "at most", 1e-3, end / start)
                for name, end, start in zip(list(GAPS)[1:], last[1:], first[1:], strict=True)
            ),
            Check("T = 10: rank of W_t - W_0 at the end", "equals", INPUTS, ranks[1, -1]),
            # Counts are exact; singular values below 1e-9 of the largest are zero.
            all_of("records with rank at most r times the number of bases", ranks <= RANK * bases),
        ],
    )


def _full_rank(identity: float, inner: dict[str, float]) -> Claim:
    return Claim(
        "galore.fixed_projection/full-rank",
        "With r = min(m, n) GaLore follows exactly the original training",
        "zhao2024galore, section 3 (full rank)",
        "qualified",
        [
            # Rounding.
            Check(
                "gradient descent inside: largest relative difference of weights", "at most", 1e-12, identity
            ),
            Check(f"momentum inside, one basis, {WHOLE} steps", "at most", 1e-12, inner["momentum"]),
            # Another rotation gives other signs, and signs are what Adam's first steps are made of.
            Check("Adam inside, the same", "at least", 0.05, inner["Adam"]),
        ],
        condition="the inner transformation commutes with rotations: Adam does not",
    )


def figure(saved: Saved) -> Figure:
    """Gradients inside of a fixed subspace and as a whole, renewed bases, contraction per step."""
    drawn, ((fixed, renewed), (factor, scalar)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    shown = slice(101)
    for index, rate in enumerate(RATES):
        label = f"|R|, η = {rate:g} / λmax"
        fixed.plot(saved["fixed/projected"][index][shown], color=f"C{index}", label=label, **plotting.TRAINED)
    fixed.plot(saved["fixed/gradient"][0][shown], color="C4", label="|G|, η = 1 / λmax", **plotting.TRAINED)
    fixed.axhline(float(saved["fixed/stays"][0]), label="what the closed form leaves", **plotting.THEORY)
    fixed.set(yscale="log", ylim=(1e-16, 1e12), xlabel="step", ylabel="norm")
    fixed.set_title("Fixed subspace, both sides projected")
    fixed.legend(loc="upper left", fontsize=7.5, ncols=2)

    marks = saved["marks"]
    for index, name in enumerate(GAPS):
        label = f"|G|, {name}" if index else "|G|, fixed basis"
        renewed.plot(
            marks, saved["switch/gradient"][index], color=f"C{index}", label=label, **plotting.TRAINED
        )
    renewed.plot(marks, saved["switch/inside"], color="C4", label="|G Q|, fixed basis", **plotting.TRAINED)
    renewed.axhline(float(saved["switch/stays"]), label="what the closed form leaves", **plotting.THEORY)
    renewed.set(yscale="log", ylim=(1e-15, 1e6), xlabel="step", ylabel="norm")
    renewed.set_title(f"Renewed bases of rank {RANK}, {OUTPUTS} by {INPUTS} weights")
    renewed.legend(loc="upper right", fontsize=7.5, ncols=2)

    for index, rate in enumerate(RATES):
        color, steps = f"C{index}", np.arange(1, 31)
        label = f"η = {rate:g} / λmax"
        factor.plot(steps, saved["fixed/ratio"][index][:30], color=color, label=label, **plotting.TRAINED)
        printed, valid = (float(saved[f"fixed/{form}"][index]) for form in ("printed", "valid"))
        factor.plot(steps, np.full(30, printed), **{**plotting.PRINTED, "color": color})
        factor.plot(steps, np.full(30, valid), **plotting.THEORY)
    factor.plot([], [], label="printed factor", **plotting.PRINTED)
    factor.plot([], [], label="valid factor", **plotting.THEORY)
    factor.set(ylim=(0, 1.6), xlabel="step", ylabel="|R| over that of the step before")
    factor.set_title("Contraction per step")
    factor.legend(loc="upper left", fontsize=7.5, ncols=2)

    steps = np.arange(1, SCALAR_STEPS + 1)
    scalar.plot(steps, saved["scalar/ratio"], color="C0", label="measured", **plotting.TRAINED)
    scalar.axhline(float(saved["scalar/printed"]), label="printed factor", **plotting.PRINTED)
    scalar.axhline(float(saved["scalar/valid"]), label="valid factor", **plotting.THEORY)
    scalar.set(ylim=(0.9, 1.0), xlabel="step", ylabel="G over that of the step before")
    scalar.set_title("One weight, B = 1 − 0.4 w, C = 1")
    scalar.legend(loc="upper left")
    return drawn
