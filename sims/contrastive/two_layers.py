"""Two linear layers under InfoNCE lose dimensions that one layer keeps, from small weights.

With X the contrastive covariance of the inputs, two layers follow

    dW_1/dt = W_2^T W_2 W_1 X,   dW_2/dt = W_2 W_1 X W_1^T

Their directions grow in proportion to what they are already, and from small weights few do, though X is
positive along all. A single layer, which starts from their product, is beside them.
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

from dynamics.contrastive import aligned_flow, balance, encoder_flow
from dynamics.flow import Trajectory, integrate
from dynamics.spectra import effective_rank
from models.collapse import StochasticLinear, weights
from models.draws import normal, uniform
from models.functional import as_function
from models.self_supervised import Views
from models.training import Descent, map_lanes, train
from sims import plotting
from sims.claims import (
    ROUNDING,
    SECOND_ORDER,
    SOLVER,
    Claim,
    Preset,
    at_least,
    at_most,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import SOLVE, first_order, lane_gaps, largest, orders, require_ok, right_and_wrong
from sims.contrastive._linear import covariance, dead, mean_loss, moving_field, noisy_views, product, rotation
from sims.ranges import Positive, Range, check_ranges
from sims.results import Context, Saved

PAPER = "jing2022, the talk's slide on representation collapse"
WEAK = 0.001  # standard deviation of the noise on inputs of variance one
STARTS = ("small", "large")  # of the singular values
LAYERS = ("one", "two")
LEVEL = 0.05  # of the loss at which one layer and two are compared
RECORDS = 100


@dataclass(frozen=True)
class Config:
    """The data, and the training of one and of two layers."""

    samples: Annotated[int, Range(at_least=16)] = 48
    """Samples of the data set, in two views that are held."""
    inputs: Annotated[int, Range(at_least=4)] = 8
    """Dimension of the inputs, and of all layers."""
    draws: Annotated[int, Range(at_least=2)] = 2
    """Data sets, each with a start of its own."""
    rate: Positive = 0.1
    """Learning rate, on the mean loss of a sample."""
    steps: Annotated[int, Range(at_least=1000)] = 2000
    """Steps of training; a multiple of 100."""
    descent: Descent = Descent(horizon=12.0, points=20, substeps=(120, 400, 1200))
    """Training of two layers beside the flow, at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if self.steps % RECORDS:
            raise ValueError(f"steps must be a multiple of {RECORDS}, got {self.steps}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(), samples=64, draws=8, steps=3000, descent=Descent(12.0, 20, (120, 400, 1200, 4000))
    ),
    "paper": replace(Config(), samples=256, inputs=16, draws=16, steps=10_000),
}


@partial(jax.jit, static_argnames="config")
def _starts(config: Config, keys: Array, large: Array) -> tuple[list[Array], Views]:
    """By key, two layers of equal singular values, one for all where large, and weakly augmented data."""

    def one(key, large):
        data, *keys = jax.random.split(key, 5)
        values = jnp.where(large, 1.0, 0.5 * jnp.exp(-0.7 * jnp.arange(config.inputs)))
        first, second, third, fourth = _rotations(jnp.stack(keys), config.inputs)
        matrices = [(first * values[None]) @ second, (third * values[None]) @ fourth]
        return matrices, noisy_views(data, config.samples, jnp.full(config.inputs, WEAK))

    return jax.vmap(one)(keys, large)


_rotations = jax.vmap(rotation, (0, None))


@partial(jax.jit, static_argnames="config")
def _trained(config: Config, starts: list[Any], views: Views) -> tuple[dict[str, Array], list[Array]]:
    """By lane, the loss and the product of the layers over time, and the layers at the end."""

    def one(lane):
        matrices, views = lane
        predict, params = as_function(StochasticLinear(matrices))
        loss = Partial(mean_loss, predict, views=views)
        last, path = train(
            loss,
            params,
            optax.sgd(config.rate),
            steps=config.steps,
            every=config.steps // RECORDS,
            observe=lambda params: {"loss": loss(params), "product": product(weights(params))},
        )
        return path.ys, weights(last)

    return map_lanes(one, (starts, views))


def _shared(matrices: list[np.ndarray]) -> np.ndarray:
    """Cosines of the second layer's right singular vectors with the left ones of the first."""
    first, second = (np.linalg.svd(W) for W in matrices)
    return np.abs(np.sum(second.Vh * first.U.mT, axis=-1))


@jax.jit
def _seen(loss: Array, product: Array) -> dict[str, Array]:
    """The loss, singular values of the product and its effective rank."""
    return {
        "loss": loss,
        "value": jnp.linalg.svd(product, compute_uv=False),
        "rank": effective_rank(product),
    }


def _swept(config: Config, starts: list[np.ndarray], views: Views) -> tuple[dict, np.ndarray]:
    """One layer and two over time by start and draw; from small weights the cosines before and after."""
    (one, _), (two, last) = (_trained(config, W, views) for W in ([starts[1] @ starts[0]], starts))
    found = jax.device_get([_seen(**path) for path in (one, two)])
    lanes = len(STARTS), config.draws
    path = jax.tree.map(
        lambda *parts: np.stack([part.reshape(*lanes, *part.shape[1:]) for part in parts], axis=1), *found
    )
    small = jax.tree.map(
        lambda W: np.asarray(W).reshape(*lanes, *W.shape[1:])[STARTS.index("small")], [starts, last]
    )
    return path, np.stack([_shared(matrices) for matrices in small], axis=1)


@partial(jax.jit, static_argnames="config")
def _identities(config: Config, keys: Array) -> dict:
    """By alignment of two layers and draw: gradients of the loss, and the rates of singular values."""

    def one(aligned, key):
        data, drawn, *keys = jax.random.split(key, 6)
        views = noisy_views(data, config.samples, 1.0 * (jnp.arange(config.inputs) >= config.inputs // 2))
        first, second, third, other = _rotations(jnp.stack(keys), config.inputs)
        s1, s2 = 1 + jnp.abs(normal(drawn, (2, config.inputs)))
        shared = jnp.where(aligned, second, other)
        W1, W2 = matrices = [(second * s1[None]) @ first.T, (third * s2[None]) @ shared.T]
        predict, params = as_function(StochasticLinear(matrices))
        G1, G2 = weights(jax.grad(partial(mean_loss, predict))(params, views))
        X = covariance(matrices, views)
        F1, F2 = W2.T @ W2 @ W1 @ X, W2 @ W1 @ X @ W1.T
        gain = jnp.sum(first * (X @ first), axis=0)
        rates = jnp.stack([-jnp.sum(second * (G1 @ first), axis=0), -jnp.sum(third * (G2 @ shared), axis=0)])
        printed = jnp.stack([s1 * s2**2 * gain, s2 * s1**2 * gain])
        return {
            "gradient": jnp.stack(
                [jnp.linalg.norm(G + F) / jnp.linalg.norm(F) for G, F in ((G1, F1), (G2, F2))]
            ),
            "rate": jnp.linalg.norm(rates - printed) / jnp.linalg.norm(printed),
            "lowest": jnp.min(gain),
            "highest": jnp.max(gain),
        }

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.array([True, False]), keys)


@partial(jax.jit, static_argnames="config")
def _to_hold(config: Config, key: Array, matrices: list[Any], views: Views) -> dict[str, Array]:
    """Two layers along eigenvectors of the X of others, which is held, and two that are not."""
    values, vectors = jnp.linalg.eigh(covariance(matrices, views))
    # Every other direction shrinks, and the others grow slowly enough to stay finite.
    gain = 0.03 * values / jnp.max(jnp.abs(values)) * jnp.where(jnp.arange(len(values)) % 2 == 0, 1, -1)
    s = 0.2 + 0.6 * uniform(key, (2, config.inputs))
    hidden, turned = _rotations(jax.random.split(key), config.inputs)
    # In the order of the cases: aligned layers, and layers whose singular vectors between them differ.
    between = jnp.stack([jnp.eye(config.inputs), turned])
    return {
        "X": (vectors * gain[None]) @ vectors.T,
        "gain": gain,
        "values": s,
        "first": (hidden * s[0][None]) @ vectors.T,
        "second": s[1][None, :, None] * (between @ hidden.T[None]),
    }


def _aligned(ts: np.ndarray, held: dict[str, np.ndarray]) -> dict:
    """Singular values of two layers by time: by the flow of the layers, and by that of aligned ones."""
    by_layers = [encoder_flow([held["first"], W], held["X"], ts, **SOLVE) for W in held["second"]]
    by_values = aligned_flow(held["values"], held["gain"], ts, **SOLVE)
    require_ok("flows of aligned layers", *by_layers, by_values)

    def spectra(path):
        return np.stack([np.linalg.svd(W, compute_uv=False) for W in path.ys], axis=1)

    foretold = -np.sort(-np.asarray(by_values.ys), axis=-1)
    return {
        "aligned_gap": largest(spectra(by_layers[0]) - foretold),
        "apart_gap": largest(spectra(by_layers[1]) - foretold),
    }


def _followed(config: Config, matrices: list[np.ndarray], views: Views, key: Array) -> dict:
    """Two layers that are trained at several learning rates, beside their flow."""
    predict, params = as_function(StochasticLinear(matrices))
    rates, trained = jax.device_get(
        config.descent.train(Partial(mean_loss, predict, views=views), params, weights)
    )
    ts = config.descent.times
    flows = right_and_wrong(lambda factor: integrate(moving_field, matrices, factor * ts, views, **SOLVE))
    flows = {name: Trajectory(ts, path.ys, path.ok) for name, path in flows.items()}
    require_ok("the flow and training", trained, *flows.values())
    return {
        "rate": ("rate", rates),
        "gap": ("rate", {name: lane_gaps(path, trained) for name, path in flows.items()}),
        "drift": ("rate", _drift([np.asarray(W) for W in trained.ys])),
        "kept": _drift([np.asarray(W)[None] for W in flows["right"].ys])[0],
        **_aligned(ts, jax.device_get(_to_hold(config, key, matrices, views))),
    }


def _drift(paths: list[Any]) -> np.ndarray:
    """How far the balance of two layers, by run and time, goes from where it was, over its size there."""
    (kept,) = (np.asarray(part) for part in balance(paths))
    size = np.linalg.norm(kept[:, 0], axis=(1, 2))
    return np.max(np.linalg.norm(kept - kept[:, :1], axis=(2, 3)), axis=1) / size


def run(config: Config, context: Context) -> dict:
    """One layer and two from small and large weights, and two beside their flow."""
    first, second, third = jax.random.split(jax.random.key(context.seed), 3)
    draws = jax.random.split(first, config.draws)
    # The last one, of small weights too, is trained beside its flow.
    large = np.append(np.repeat([False, True], config.draws), False)
    matrices, views = jax.device_get(_starts(config, jnp.stack([*draws, *draws, second]), large))
    context.progress("training of one and of two", 0.0)
    path, alignment = _swept(config, *jax.tree.map(lambda leaf: leaf[:-1], (matrices, views)))
    context.progress("training beside the flow", 0.6)
    matrices, views = jax.tree.map(lambda leaf: leaf[-1], (matrices, views))
    followed = _followed(config, matrices, views, jax.random.fold_in(second, 1))
    context.progress("gradients", 0.95)
    identities = jax.device_get(_identities(config, jax.random.split(third, config.draws)))
    dims = {"loss": "", "value": " value", "rank": ""}
    return {
        "start": ("start", list(STARTS)),
        "layers": ("layers", list(LAYERS)),
        "moment": ("moment", config.rate * config.steps / RECORDS * np.arange(RECORDS + 1)),
        "path": {name: (f"start layers draw moment{more}", path[name]) for name, more in dims.items()},
        "alignment": ("draw when value", alignment),
        "identity": {
            name: ("aligned draw layer" if name == "gradient" else "aligned draw", value)
            for name, value in identities.items()
        },
        "descent": followed,
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What collapses and what does not, and the flow behind it."""
    yield _of_layers(saved)
    yield stated(
        "flow",
        "Two layers that are trained follow W_1' = W_2^T W_2 W_1 X and W_2' = W_2 W_1 X W_1^T, with the X of "
        "the moment",
        f"{PAPER} (derived: the flow of two layers)",
        at_most(
            "gradients of both layers plus that, over it",
            largest(saved["identity/gradient"]),
            1e-12,
            why=ROUNDING,
        ),
        *first_order(saved["descent/rate"], saved["descent/gap"]),
    )
    yield _of_alignment(saved)
    yield _of_values(saved)
    yield _of_balance(saved)


def _ends(saved: Saved, start: str, layers: str) -> np.ndarray:
    """Singular values after training, (draw, value)."""
    at = list(saved["start"]).index(start), list(saved["layers"]).index(layers)
    return np.asarray(saved["path/value"])[(*at, slice(None), -1)]


def _first_below(saved: Saved) -> np.ndarray:
    """Effective ranks when the loss has first come to its level, by layers and draw, from small weights."""
    loss, rank = (np.asarray(saved[f"path/{name}"])[0] for name in ("loss", "rank"))
    below = loss <= LEVEL
    found = np.take_along_axis(rank, np.argmax(below, axis=-1)[..., None], axis=-1)[..., 0]
    return np.where(np.any(below, axis=-1), found, np.nan)


def _of_layers(saved: Saved) -> Claim:
    (one, two), start = _first_below(saved), np.asarray(saved["path/rank"])[0, 1, :, 0]
    large = np.asarray(saved["path/rank"])[1, 1, :, -1]
    many, few = (np.sum(1 - dead(_ends(saved, "small", layers)), axis=-1) for layers in LAYERS)
    d, wide = np.asarray(saved["path/value"]).shape[-1], _ends(saved, "large", "two")
    return qualified(
        "layers",
        "Two layers lose rank by their own dynamics, under augmentation that takes nothing from one layer",
        f"{PAPER} (derived: two layers)",
        condition="the weights are small at first",
        inside=[
            at_most(
                f"two layers, at a loss of {LEVEL}: largest effective rank over that of the start",
                np.max(two / start),
                0.9,
                why="leading directions grow ahead of the others",
            ),
            at_most(
                "the same, after training: largest part of directions that live",
                np.max(few) / d,
                0.5,
                why="few have grown",
            ),
            at_least(
                "one layer, from their product and at that loss: least of the same rank",
                np.min(one / start),
                1.1,
                why="directions grow alike where X is isotropic",
            ),
            at_least(
                "the same, after training: directions that live, over those of two layers",
                np.min(many / few),
                2,
                why="the same",
            ),
        ],
        outside=[
            at_least(
                "two layers from a rotation: least effective rank after training over the largest possible",
                np.min(large) / d,
                0.8,
                why="nothing is ahead at the start",
            ),
            at_least(
                "the same: least singular value over the largest",
                np.min(wide[:, -1] / wide[:, 0]),
                0.1,
                why="the same",
            ),
        ],
    )


def _of_alignment(saved: Saved) -> Claim:
    cosines, alive = np.asarray(saved["alignment"]), dead(_ends(saved, "small", "two")) == 0
    grown, rest = cosines[:, -1][alive], cosines[:, -1][~alive]
    return qualified(
        "alignment",
        "The right singular vectors of the second layer become the left ones of the first",
        f"{PAPER} (derived: two layers)",
        condition="their direction has grown",
        inside=[
            at_least(
                "least cosine after training", np.min(grown), 0.95, why="what does not share them is small"
            ),
            at_most("mean cosine before", np.mean(cosines[:, 0]), 0.6, why="they are drawn independently"),
        ],
        outside=[
            at_most(
                "directions that have not grown: mean cosine", np.mean(rest), 0.8, why="nothing turns them"
            )
        ],
    )


def _of_values(saved: Saved) -> Claim:
    aligned, apart = np.asarray(saved["identity/rate"])
    return qualified(
        "values",
        "Singular values of two layers follow s_1' = s_1 s_2^2 v^T X v and s_2' = s_2 s_1^2 v^T X v",
        f"{PAPER} (derived: aligned layers)",
        condition="the layers are aligned",
        inside=[
            at_most("the loss's own rates less these, over them", np.max(aligned), 1e-12, why=ROUNDING),
            every(
                "draws in which v^T X v has both signs",
                (np.asarray(saved["identity/lowest"]) < 0) & (np.asarray(saved["identity/highest"]) > 0),
                missing=apart.size,
                why="most draws have both; the rates are right with one as well",
            ),
            at_most(
                "along eigenvectors of X, which is held: the flow of layers less that of their values",
                saved["descent/aligned_gap"],
                1e-5,
                why=SOLVER,
            ),
        ],
        outside=[
            at_least("rates of layers at random: the same", np.min(apart), 0.1, why="directions mix"),
            at_least(
                "the flow of layers at random less that of values",
                saved["descent/apart_gap"],
                0.01,
                why="directions mix",
            ),
        ],
    )


def _of_balance(saved: Saved) -> Claim:
    drift, rate = np.asarray(saved["descent/drift"]), saved["descent/rate"]
    return stated(
        "balance",
        "Two layers keep W_2^T W_2 - W_1 W_1^T",
        f"{PAPER} (derived: two layers)",
        at_most("the flow: its drift over its size", saved["descent/kept"], 5e-8, why=SOLVER),
        slope(
            "descent: order of its drift in the learning rate",
            orders(rate, {"drift": drift})["drift"],
            1,
            0.1,
            why=SECOND_ORDER,
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """One layer and two over time, their ranks over the loss, and the gap of two to their flow."""
    drawn, ((one, two), (ranks, gaps)) = plotting.new_figure(2, 2, width=4.6)
    for index, (ax, words) in enumerate(((one, "one layer"), (two, "two layers"))):
        values = np.asarray(saved["path/value"])[0, index, 0]
        ax.semilogy(np.asarray(saved["moment"]), np.maximum(values, 1e-6), color=f"C{index}")
        title, label = f"From small weights, {words}", "singular values of the product"
        plotting.finish(ax, title, "time = learning rate × step", label, ylim=(1e-6, 100))
    _rank_panel(ranks, saved)
    gap = {"flow": saved["descent/gap/right"], "2 % off": saved["descent/gap/wrong"]}
    plotting.gap_panel(
        gaps, saved["descent/rate"], gap, "learning rate", "largest gap", "Gap of two layers to the flow"
    )
    return drawn


def _rank_panel(ax: Axes, saved: Saved) -> None:
    loss, rank = (np.asarray(saved[f"path/{name}"])[:, :, 0] for name in ("loss", "rank"))
    for kind, style in ((0, "-"), (1, "--")):
        for index, words in enumerate(("one layer", "two layers")):
            label = f"{words}, {saved['start'][kind]} start"
            ax.semilogx(loss[kind, index], rank[kind, index], style, color=f"C{index}", label=label)
    ax.invert_xaxis()
    plotting.make_room(ax, above=0.5)
    plotting.finish(ax, "Rank of the product", "loss, which falls", "effective rank", "upper left")
