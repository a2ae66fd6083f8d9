"""A linear layer under InfoNCE loses dimensions to strong augmentation.

The loss of embeddings z = W x, whose positive pair is in its denominator, moves W along W X, where X is the
contrastive covariance of the inputs: the spread between samples less that between views, weighted by the
importance of pairs. Along directions where augmentation outweighs the data X is negative, and W shrinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.contrastive import encoder_flow
from dynamics.flow import Trajectory, integrate
from models.collapse import Noisy, StochasticLinear, weights
from models.functional import as_function
from models.losses import alpha_cl_loss
from models.self_supervised import Views
from models.training import Descent, map_lanes, train
from sims import plotting
from sims.claims import (
    ROUNDING,
    SOLVER,
    Claim,
    Preset,
    at_least,
    at_most,
    every,
    qualified,
    quoted,
    stated,
)
from sims.compare import SOLVE, first_order, lane, lane_gaps, largest, require_ok, right_and_wrong
from sims.contrastive._linear import (
    DEAD,
    covariance,
    dead,
    importance,
    mean_loss,
    moving_field,
    noisy_views,
    rotation,
)
from sims.ranges import Positive, Range, check_ranges
from sims.results import Context, Saved

PAPER = "jing2022, the talk's slide on representation collapse"
STRENGTHS = (0.1, 0.5, 1.0, 1.5, 2.0)  # standard deviations of the noise on inputs of variance one


@dataclass(frozen=True)
class Config:
    """The data, and the training of a layer."""

    samples: Annotated[int, Range(at_least=16)] = 48
    """Samples of the data set, in two views that are held."""
    inputs: Annotated[int, Range(at_least=4)] = 8
    """Dimension of the inputs and of the embeddings; one half is augmented."""
    draws: Annotated[int, Range(at_least=2)] = 2
    """Data sets, each with a start of its own."""
    rate: Positive = 0.1
    """Learning rate, on the mean loss of a sample."""
    steps: Annotated[int, Range(at_least=1000)] = 2000
    """Steps of training."""
    descent: Descent = Descent(horizon=2.0, points=20, substeps=(40, 120, 400))
    """Training beside the flow, at several learning rates."""

    def __post_init__(self):
        check_ranges(self)


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(), samples=64, draws=8, steps=3000, descent=Descent(2.0, 20, (40, 120, 400, 1200))
    ),
    "paper": replace(Config(), samples=256, inputs=16, draws=16, steps=10_000),
}


def _start(config: Config, key: Array, strength: Array) -> tuple[Array, Views]:
    """A layer that is a rotation, and its data, with noise on one half of the inputs."""
    data, start = jax.random.split(key)
    noise = strength * (jnp.arange(config.inputs) >= config.inputs // 2)
    return rotation(start, config.inputs), noisy_views(data, config.samples, noise)


def _descended(config: Config, case: tuple[Array, Views]) -> dict:
    """A layer after its training, and X before it."""
    start, views = case
    predict, params = as_function(StochasticLinear([start]))
    last, _ = train(
        Partial(mean_loss, predict, views=views), params, optax.sgd(config.rate), steps=config.steps
    )
    (W,) = weights(last)
    _, values, directions = jnp.linalg.svd(W)
    z = views.first @ W.T
    return {
        "before": jnp.linalg.eigvalsh(covariance([start], views))[::-1],
        "value": values,
        "embedding": jnp.linalg.svd(z - jnp.mean(z, axis=0, keepdims=True), compute_uv=False),
        "augmented": jnp.sum(directions[:, config.inputs // 2 :] ** 2, axis=1),
        "gain": jnp.sum((directions @ covariance([W], views)) * directions, axis=1),
    }


@partial(jax.jit, static_argnames="config")
def _trained(config: Config, key: Array) -> dict:
    """Layers by strength of augmentation and draw."""
    keys, strengths = jax.random.split(key, config.draws), jnp.asarray(STRENGTHS)
    cases = jax.vmap(lambda s: jax.vmap(lambda key: _start(config, key, s))(keys))(strengths)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cases)
    found = map_lanes(partial(_descended, config), flat)
    return jax.tree.map(lambda leaf: leaf.reshape(len(STRENGTHS), -1, *leaf.shape[1:]), found)


@partial(jax.jit, static_argnames="descent")
def _descents(descent: Descent, start: Array, views: Views) -> tuple[Array, Trajectory]:
    """A layer trained at several learning rates: pairs keep the importance of the start, or do not."""
    predict, params = as_function(StochasticLinear([start]))
    alpha = importance([start], views)

    def one(live):
        def loss(params):
            embedded = (predict(params, Noisy(view)) for view in views)
            return jnp.where(live, mean_loss(predict, params, views), alpha_cl_loss(alpha, *embedded))

        return descent.train(loss, params, weights)

    return jax.vmap(one)(jnp.array([False, True]))


@partial(jax.jit, static_argnames="config")
def _to_follow(config: Config, key: Array) -> tuple[Array, Views, Array, Array]:
    """A layer under the strongest augmentation, its first X, and the loss's gradient plus W X, over it."""
    start, views = _start(config, key, jnp.asarray(STRENGTHS[-1]))
    predict, params = as_function(StochasticLinear([start]))
    (G,), X = weights(jax.grad(partial(mean_loss, predict))(params, views)), covariance([start], views)
    return start, views, X, jnp.linalg.norm(G + start @ X) / jnp.linalg.norm(G)


def _followed(config: Config, key: Array) -> dict:
    """A layer that is trained at several learning rates, with X held and with X moving, beside its flows."""
    start, views, X, gradient = _to_follow(config, key)
    rates, trained = jax.device_get(_descents(config.descent, start, views))
    ts = config.descent.times
    flows = {
        "held": right_and_wrong(lambda factor: encoder_flow([start], X, factor * ts, **SOLVE)),
        "moving": right_and_wrong(
            lambda factor: integrate(moving_field, [start], factor * ts, views, **SOLVE)
        ),
    }
    require_ok("the flow and training", trained, *flows["held"].values(), *flows["moving"].values())
    values, vectors = np.linalg.eigh(np.asarray(X))
    gaps, length = {}, {"theory": np.linalg.norm(np.asarray(flows["held"]["right"].ys[0]) @ vectors, axis=1)}
    for index, (name, sides) in enumerate(flows.items()):
        runs = lane(trained, index)
        finest = np.asarray(runs.ys[0])[int(np.argmin(rates[index]))]
        length[name] = np.linalg.norm(finest @ vectors, axis=1)
        gaps[name] = {side: lane_gaps(Trajectory(ts, path.ys, path.ok), runs) for side, path in sides.items()}
    return {
        "rate": ("rate", rates[0]),
        "time": ("time", ts),
        "gap": ("rate", gaps),
        "eigenvalue": ("value", values),
        "length": ("time value", length),
        "gradient": gradient,
    }


def run(config: Config, context: Context) -> dict:
    """A layer by strength of augmentation, and flows beside one of them."""
    first, second = jax.random.split(jax.random.key(context.seed))
    context.progress("training", 0.0)
    swept = jax.device_get(_trained(config, first))
    context.progress("training beside the flow", 0.6)
    return {
        "strength": ("strength", np.asarray(STRENGTHS)),
        "swept": ("strength draw value", swept),
        "descent": _followed(config, second),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What collapses and what does not, the flow behind it, and what the slide on DirectCLR reports."""
    yield _of_collapse(saved)
    yield _of_strength(saved)
    yield _of_held_pairs(saved)
    yield stated(
        "flow",
        "A layer that is trained follows W' = W X, with the X of the moment",
        f"{PAPER} (derived: the flow of one layer)",
        at_most("the loss's gradient plus W X, over it", saved["descent/gradient"], 1e-12, why=ROUNDING),
        *first_order(saved["descent/rate"], saved["descent/gap/moving"]),
    )
    yield quoted(
        "directclr",
        "On ImageNet a part of the dimensions, trained directly, has 62.7 % top-1; all have 51.5 % without a "
        "projector, 61.1 % with a linear and 66.5 % with a nonlinear one",
        "jing2022, the talk's slide on DirectCLR",
        needs="ImageNet, a ResNet-50 that is trained in each of the four ways, and linear probes",
    )


def _of_collapse(saved: Saved) -> Claim:
    embedding, value = (np.asarray(saved[f"swept/{name}"]) for name in ("embedding", "value"))
    return qualified(
        "collapse",
        "Embeddings that are learned with a contrastive loss do not use all dimensions",
        PAPER,
        condition="augmentation is strong",
        inside=[
            every(
                "strongest augmentation: draws with a dimension of the embeddings that is dead",
                np.sum(dead(embedding[-1]), axis=-1) > 0,
            ),
        ],
        outside=[
            at_least(
                "weakest augmentation: least singular value over the largest",
                np.min(value[0, :, -1] / value[0, :, 0]),
                0.1,
                why="the data alone are isotropic",
            ),
        ],
    )


def _negatives(saved: Saved) -> np.ndarray:
    """How many eigenvalues of X are negative before training, by strength and draw; NaN where not known."""
    before = np.asarray(saved["swept/before"])
    return np.where(np.isfinite(before).all(axis=-1), np.sum(before < 0, axis=-1), np.nan)


def _of_strength(saved: Saved) -> Claim:
    part = {name: np.asarray(saved[f"swept/{name}"]) for name in ("value", "augmented", "gain")}
    gone, negatives = dead(part["value"]), _negatives(saved)
    counts = np.sum(gone, axis=-1)
    return stated(
        "strength",
        "With stronger augmentation no fewer directions of a layer are dead, all of them augmented ones",
        f"{PAPER} (derived: one layer by strength)",
        every("strengths and draws with no fewer than the one before", np.diff(counts, axis=0) >= 0),
        at_most("dead directions of the weakest", np.max(counts[0]), 0, why="X is positive there"),
        at_most("its negative eigenvalues at first", np.max(negatives[0]), 0, why="the noise is small"),
        at_least("dead directions of the strongest", np.min(counts[-1]), 1, why="X is negative at first"),
        every(
            "strengths and draws with no more than X has negative eigenvalues at first", counts <= negatives
        ),
        every(
            "dead directions with 0.95 of their square in the augmented half",
            part["augmented"][gone == 1] > 0.95,
        ),
        every("dead directions along which X is negative after training", part["gain"][gone == 1] < 0),
    )


def _of_held_pairs(saved: Saved) -> Claim:
    values, rate = np.asarray(saved["descent/eigenvalue"]), saved["descent/rate"]
    theory, held, live = (
        np.asarray(saved[f"descent/length/{name}"]) for name in ("theory", "held", "moving")
    )
    negative, foretold = values < 0, np.exp(np.asarray(saved["descent/time"])[:, None] * values[None])
    left = _negatives(saved)[-1] - np.sum(dead(np.asarray(saved["swept/value"])[-1]), axis=-1)
    return qualified(
        "held",
        "A layer vanishes along the directions in which X has negative eigenvalues at first",
        f"{PAPER} (derived: one layer with its first X)",
        condition="X is held, so that W(t) = W(0) exp(X t)",
        inside=[
            *first_order(rate, saved["descent/gap/held"]),
            at_most(
                "the flow's lengths along eigenvectors of X less exp(x t), over the larger of that and one",
                largest((theory - foretold) / np.maximum(foretold, 1)),
                1e-6,
                why=SOLVER,
            ),
            at_most(
                "training: largest length along negative eigenvalues x over exp(x t)",
                np.max(held[-1, negative] / foretold[-1, negative]),
                1,
                why="a step multiplies by 1 + r x, which is below exp(r x)",
            ),
            at_most(
                "the same: largest length, of one at first",
                np.max(held[-1, negative]),
                0.05,
                why="a twentieth counts as vanished",
            ),
            every("other directions that grow", held[-1, ~negative] > 1),
        ],
        outside=[
            at_least(
                "X that moves along: largest length along these",
                np.max(live[-1, negative]),
                0.1,
                why="X rises while they shrink",
            ),
            at_least(
                "the same, after training: negative eigenvalues less dead directions, mean of all draws",
                np.mean(left),
                0.5,
                why="X is no longer negative along some",
            ),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Spectra by strength, what X held and moving do, and gaps to both flows."""
    drawn, ((spectra, held, gaps),) = plotting.new_figure(1, 3, width=4.4)
    _spectra_panel(spectra, saved)
    _held_panel(held, saved)
    gap = {
        "X held": saved["descent/gap/held/right"],
        "X moves along": saved["descent/gap/moving/right"],
        "X moves along, 2 % off": saved["descent/gap/moving/wrong"],
    }
    plotting.gap_panel(gaps, saved["descent/rate"], gap, "learning rate", "largest gap", "Gap to the flow")
    return drawn


def _spectra_panel(ax: Axes, saved: Saved) -> None:
    values, floor = np.asarray(saved["swept/value"])[:, 0], 1e-8
    number = np.arange(1, values.shape[-1] + 1)
    for strength, spectrum in zip(np.asarray(saved["strength"]), values, strict=True):
        ax.semilogy(number, np.maximum(spectrum / spectrum[0], floor), "o-", label=f"{strength:g}")
    ax.axhline(DEAD, label="dead below", **plotting.PRINTED)
    ax.annotate("or less", (number[-1] - 0.5, floor), (0, 7), textcoords="offset points", ha="center")
    legend = {"loc": "lower left", "title": "noise on one half"}
    plotting.finish(ax, "A layer after training", "number", "singular value over the largest", legend)


def _held_panel(ax: Axes, saved: Saved) -> None:
    time, negative = np.asarray(saved["descent/time"]), np.asarray(saved["descent/eigenvalue"]) < 0
    for name, color, label in (("held", "C0", "X held"), ("moving", "C1", "X moves along")):
        length = np.asarray(saved[f"descent/length/{name}"])[:, negative]
        ax.semilogy(time, length, color=color, **plotting.TRAINED)[0].set_label(label)
    theory = np.asarray(saved["descent/length/theory"])[:, negative]
    ax.semilogy(time, theory, **plotting.THEORY)[0].set_label("W(0) exp(X t)")
    title = "Along negative eigenvalues of X"
    plotting.finish(ax, title, "time = learning rate × step", "length of the layer", "lower left")
