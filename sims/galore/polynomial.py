"""Networks with polynomial activations: the form of a layer's gradient, and its stable rank under descent.

Behind the layer W is one with a monomial, y = U (V W f)^p. As a function of W f that is homogeneous of degree
p, so that y = J W f / p with its own Jacobian J. The matrix K of a reversible network, y = K x forward, is
then J / p, and the gradient does not come back by K^T but by J^T = p K^T: with that constant the gradient has
its form, B_i = J_i^T J_i / p, at every step. A sum of monomials has no such constant. Here B_i moves with W,
and the theory of constant B_i does not tell what the stable rank does.
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
from matplotlib.figure import Figure

from dynamics.galore import gradient_operator, reversible_gradient, reversible_terms
from dynamics.spectra import stable_rank
from models.losses import bind, mean_squared_error
from models.training import record_steps, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, corrected, qualified
from sims.compare import require_ok
from sims.ranges import Count, Range, Share, check_ranges
from sims.results import Context, Saved

# Coefficients of x, x^2 and x^3 in the activation, and the degree of what is behind the layer.
ACTIVATIONS = {
    "x": ((1.0, 0.0, 0.0), 1),
    "x²": ((0.0, 1.0, 0.0), 2),
    "x³": ((0.0, 0.0, 1.0), 3),
    "x + x²": ((1.0, 1.0, 0.0), 1),
}
POWERS = slice(1, 3)  # the monomials of degree two and three among them
MIXED = 3
OUTPUTS = 5


@dataclass(frozen=True)
class Config:
    """Sizes of the network, and its training."""

    instances: Annotated[int, Range(at_least=4)] = 8
    """Random networks of each activation."""
    m: Count = 12
    """Outputs of the layer."""
    n: Count = 10
    """Inputs of the layer."""
    samples: Count = 48
    """Samples N."""
    rate: Share = 0.05
    """Learning rate, in units of what the curvature at the start allows."""
    steps: Annotated[int, Range(at_least=100)] = 4000
    """Steps of gradient descent."""
    points: Annotated[int, Range(at_least=4)] = 40
    """Records of it, equally spaced."""

    def __post_init__(self):
        check_ranges(self)


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), instances=32, steps=10_000, points=100),
    "paper": replace(Config(), instances=32, m=32, n=24, samples=128, steps=50_000, points=100),
}


def _predict(W: Array, surroundings: tuple[Array, Array, Array, Array]) -> Array:
    f, V, U, coefficients = surroundings
    return _tail(f @ W.T, V, U, coefficients)


def _tail(z: Array, V: Array, U: Array, coefficients: Array) -> Array:
    """Outputs (..., d) of what is behind the layer, for what W gives, (..., m)."""
    (first, second, third), h = coefficients, z @ V.T
    return (first * h + second * h**2 + third * h**3) @ U.T


def _errors(W: Array, data: Any, degree: Array) -> dict[str, Array]:
    """Relative errors of the gradient's form: as printed, with the degree, and with the best constant."""
    (f, V, U, coefficients), y = data
    J = jax.vmap(jax.jacobian(lambda z: _tail(z, V, U, coefficients)))(f @ W.T)
    actual = -jax.grad(mean_squared_error)(W, (_predict, *data))
    printed = reversible_gradient(*reversible_terms(J, f, y, "squared"), W)
    mended = reversible_gradient(*reversible_terms(J, f, y, "squared", degree=degree), W)
    targets = reversible_gradient(*reversible_terms(J, f, y, "squared"), jnp.zeros_like(W))
    of_weights, wanted = printed - targets, actual - targets
    best = targets + of_weights * jnp.sum(of_weights * wanted) / jnp.sum(of_weights**2)
    size = jnp.linalg.norm(actual)
    forms = {"printed": printed, "degree": mended, "best": best}
    return {name: jnp.linalg.norm(form - actual) / size for name, form in forms.items()}


@partial(jax.jit, static_argnames="config")
def _follow(config: Config, draws: Any, coefficients: Array, degrees: Array) -> Any:
    """Train every activation on all draws: errors at the start, and records (activation, instance, ...)."""
    every = config.steps // config.points

    def one(draw, coefficients, degree):
        f, V, U, W0, teacher = draw
        scale = jnp.sqrt(jnp.mean(_predict(teacher, (f, V, U, coefficients)) ** 2))
        surroundings = (f, V, U / scale, coefficients)
        data = (surroundings, _predict(teacher, surroundings))
        J = jax.vmap(jax.jacobian(lambda z: _tail(z, *surroundings[1:])))(f @ W0.T)
        terms = reversible_terms(J, f, data[1], "squared")
        largest = jnp.linalg.eigvalsh(gradient_operator(terms.B, terms.C))[-1]
        loss, optimizer = bind(mean_squared_error, (_predict, *data)), optax.sgd(config.rate / largest)
        _, path = train(loss, W0, optimizer, steps=config.steps, every=every)
        forms = jax.vmap(lambda W: _errors(W, data, degree))(path.ys)
        return {
            "error": {name: error[0] for name, error in forms.items()},
            "on_the_way": jnp.max(forms["degree"]),
            "stable_rank": stable_rank(jax.vmap(jax.grad(loss))(path.ys)),
            "loss": jax.vmap(loss)(path.ys),
        }, path

    return jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, 0))(draws, coefficients, degrees)


def run(config: Config, context: Context) -> dict:
    """Draw networks and their teachers, train the layer, and look at its gradients."""
    rng, (m, n, hidden) = np.random.default_rng(context.seed), (config.m, config.n, config.m + 4)
    count = config.instances
    draws = (
        rng.normal(size=(count, config.samples, n)),
        rng.normal(size=(count, hidden, m)) / m**0.5,
        rng.normal(size=(count, OUTPUTS, hidden)) / hidden**0.5,
        *rng.normal(size=(2, count, m, n)) / n**0.5,
    )
    coefficients, degrees = (np.array(part, float) for part in zip(*ACTIVATIONS.values(), strict=True))
    context.progress("training", 0.0)
    found, paths = jax.device_get(_follow(config, *jax.tree.map(jnp.asarray, (draws, coefficients, degrees))))
    require_ok("training", paths)
    return {
        "activation": ("activation", np.array(list(ACTIVATIONS))),
        "step": ("step", record_steps(config.steps, config.steps // config.points)),
        "error": ("activation instance", found["error"]),
        "on_the_way": ("activation instance", found["on_the_way"]),
        "stable_rank": ("activation instance step", found["stable_rank"]),
        "loss": ("activation instance step", found["loss"]),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The form of the gradient, and what becomes of its stable rank."""
    printed, degree, best = (saved[f"error/{name}"] for name in ("printed", "degree", "best"))
    both, error = "x² and x³", "relative error of the form"
    rounding, small = "rounding alone", "rounding, over gradients that get small"
    on_the_way, mixed = saved["on_the_way"][POWERS].max(), np.median(best[MIXED])
    yield corrected(
        "polynomial-form",
        "Polynomial networks are reversible, y = K x and g_x = K^T g_y, so that B_i = J_i^T J_i; corrected: "
        "those of a monomial x^p are up to p, g_x = p K^T g_y and B_i = J_i^T J_i / p, and sums are not",
        "zhao2024galore, Definition 3.1 and Theorem 3.2 (the constant is derived here)",
        printed=[at_most(f"printed: {both}, largest {error}", printed[POWERS].max(), 1e-10, why=rounding)],
        mended=[
            at_most("with the degree: the same", degree[POWERS].max(), 1e-10, why=rounding),
            at_most("with the degree: largest on the way", on_the_way, 1e-9, why=small),
            at_least(f"x + x², best constant of each: median {error}", mixed, 1e-3, why="no rounding"),
        ],
    )
    yield _low_rank(config, saved)


def _low_rank(config: Config, saved: Saved) -> Claim:
    ranks = saved["stable_rank"]
    start, end = ranks[:, :, 0], ranks[:, :, -1]
    grown = np.median(end[POWERS] / start[POWERS], axis=1)
    fall = np.median(saved["loss"][..., 0] / saved["loss"][..., -1], axis=1)
    whole = min(config.m, config.n)
    dyad, quarter = "the slowest eigenspace of S is one dyad here", "low is a quarter of what there could be"
    label = "stable rank at the end over that at the start, median"
    return qualified(
        "polynomial-rank",
        "Gradients of reversible networks become low-rank in training",
        "zhao2024galore, Lemma 3.3 (on polynomials; measured here)",
        condition="B_i stays as it is: behind monomials gradients are low-rank at first, and less so later",
        inside=[at_most("x: stable rank at the end, median", np.median(end[0]), 1.1, why=dyad)],
        outside=[
            at_most(f"x² and x³: at the start, of {whole}", np.median(start[POWERS]), whole / 4, why=quarter),
            at_least(f"x²: {label}", grown[0], 1, why="it does not fall"),
            at_least(f"x³: {label}", grown[1], 1, why="it does not fall"),
            at_least("x² and x³: fall of the loss, median", fall[POWERS].min(), 2, why="it does train"),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Errors of the gradient's form, and the median stable rank over training."""
    drawn, ((form, ranks),) = plotting.new_figure(1, 2, width=4.8, height=3.6)
    labels = {
        "printed": "as printed, K both ways",
        "degree": "with the degree",
        "best": "with the best constant",
    }
    for index, (name, label) in enumerate(labels.items()):
        errors = np.maximum(np.median(saved[f"error/{name}"], axis=1), 1e-17)
        style: Any = {"marker": "osD"[index], "linestyle": "", "markersize": 8 - 2 * index}
        form.semilogy(range(len(ACTIVATIONS)), errors, color=f"C{index}", label=label, **style)
    form.set_xticks(range(len(ACTIVATIONS)), list(ACTIVATIONS))
    plotting.finish(form, "Form of the gradient at the start", "activation", "relative error, median")
    plotting.make_room(form, above=0.35)
    form.legend(loc="upper left")
    for index, name in enumerate(ACTIVATIONS):
        low, middle, high = np.quantile(saved["stable_rank"][index], (0.25, 0.5, 0.75), axis=0)
        ranks.plot(saved["step"], middle, color=f"C{index}", label=name)
        ranks.fill_between(saved["step"], low, high, color=f"C{index}", alpha=0.15, linewidth=0)
    plotting.finish(ranks, "Under descent: median and quartiles", "step", "stable rank of the gradient")
    plotting.make_room(ranks, above=0.25)
    ranks.legend(loc="upper left", ncols=2)
    return drawn
