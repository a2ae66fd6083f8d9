"""Linear BYOL without its predictor, or without its stop-gradient, goes to zero; with both it does not.

A linear network W embeds two views of a sample. It is trained in three ways: to make both embeddings equal
(no predictor), to predict one from the other by a predictor that is held, with a gradient through both (no
stop-gradient), and as BYOL is, with a predictor that is trained towards a constant target, a moving average.
The first two are linear flows, with closed forms; the matrix of each is positive semidefinite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure

from dynamics.flow import Trajectory
from dynamics.noncontrastive import ByolWeights, byol_flow, no_predictor_flow, no_stop_gradient_flow
from models.byol import LinearByol, byol_loss, byol_weights, exact_views, flow_gradient
from models.draws import normal
from models.functional import as_function
from models.training import Descent
from sims import plotting
from sims.claims import (
    ROUNDING,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    every,
    qualified,
    quoted,
    stated,
)
from sims.compare import SOLVE, first_order, lane, lane_gaps, largest, require_ok, right_and_wrong
from sims.ranges import NonNegative, Positive, Range, check_ranges
from sims.results import Context, Saved

SLIDE = "tian2021directpred, the talk's slide on what does not work"
WAYS = ("no predictor", "no stop-gradient", "both")
LATER = 50.0  # when what is left of a network is looked at
LATE = 0.02  # part of its first size that a network which collapses has at the end, at most


@dataclass(frozen=True)
class Config:
    """The data, the network, and its training."""

    inputs: Annotated[int, Range(at_least=3)] = 5
    """Dimension of the inputs."""
    width: Annotated[int, Range(at_least=2)] = 3
    """Dimension of the embeddings."""
    augmentation_variance: Positive = 0.25
    """Mean variance of the augmentation, beside data of variance one."""
    weight_decay: NonNegative = 0.04
    """Weight decay per unit of time."""
    ema_rate: Positive = 0.5
    """Rate of the moving average per unit of time."""
    descent: Descent = Descent(horizon=60.0, points=60, substeps=(5, 15, 50, 150))
    """Training at several learning rates."""
    seeds: Annotated[int, Range(at_least=2)] = 8
    """Draws of data and start for what is checked without training."""

    def __post_init__(self):
        check_ranges(self)


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), seeds=32, descent=Descent(60.0, 60, (5, 15, 50, 150, 500))),
    "paper": replace(
        Config(), inputs=12, width=8, seeds=64, descent=Descent(60.0, 60, (5, 15, 50, 150, 500))
    ),
}


class Setting(NamedTuple):
    """Where training starts, and the moments of the data."""

    weights: ByolWeights
    X: Array
    X_aug_cov: Array


def _setting(config: Config, key: Array) -> Setting:
    """Covariances near those of the theory, but not isotropic, and weights without any symmetry."""
    keys = jax.random.split(key, 5)
    n1, n2 = config.inputs, config.width

    def covariance(key, size):
        A = normal(key, (n1, 4 * n1))
        return size * A @ A.T / (4 * n1)

    W = normal(keys[2], (n2, n1)) / n1**0.5
    noise = normal(keys[3], (n2, n2)) / n2**0.5
    # The predictor is as large as the features are, so that no mode starts below its threshold.
    Wp = 0.8 * jnp.eye(n2) + 0.1 * noise
    weights = ByolWeights(W, Wp, W + 0.1 * normal(keys[4], W.shape))
    return Setting(weights, covariance(keys[0], 1.0), covariance(keys[1], config.augmentation_variance))


def _network(way: str, weights: ByolWeights) -> LinearByol:
    W, Wp, _ = weights
    if way == "no predictor":
        return LinearByol(ByolWeights(W, None, None))
    if way == "no stop-gradient":
        return LinearByol(ByolWeights(W, Wp, None), stop_gradient=False, train_predictor=False)
    return LinearByol(weights)


def _flow(way: str, config: Config, setting: Setting, ts: Any) -> Trajectory:
    """W over time, as the theory has it."""
    (W, Wp, Wa), X, X_aug_cov = setting
    decay = {"weight_decay": config.weight_decay}
    if way == "no predictor":
        return no_predictor_flow(W, X_aug_cov, ts, **decay)
    if way == "no stop-gradient":
        return no_stop_gradient_flow(W, Wp, X, X_aug_cov, ts, **decay)
    path = byol_flow(
        W, Wp, Wa, X, X_aug_cov, ts, predictor_rate=1.0, ema_rate=config.ema_rate, **decay, **SOLVE
    )
    return Trajectory(path.ts, path.ys.W, path.ok)


@jax.jit
def _spread(W: Array, X: Array, X_aug_cov: Array) -> Array:
    """Standard deviation of normalized embeddings over samples, on average over their dimensions."""
    first, _ = exact_views(X, X_aug_cov)
    z = first @ W.T
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    return jnp.mean(jnp.std(z, axis=0))


def _trained(way: str, config: Config, setting: Setting) -> tuple[np.ndarray, Trajectory]:
    """W over time at every learning rate."""
    predict, params = as_function(_network(way, setting.weights))
    loss = Partial(byol_loss, predict, views=exact_views(setting.X, setting.X_aug_cov))
    rates = {"weight_decay": config.weight_decay} | ({"ema_rate": config.ema_rate} if way == "both" else {})
    return jax.device_get(config.descent.train(loss, params, _online, flow_gradient(**rates)))


def _online(params: Any) -> Array:
    return byol_weights(params).W


def _of_way(way: str, config: Config, setting: Setting) -> dict:
    """One way of training beside its flow: gaps, sizes, and what embeddings look like."""
    rates, trained = _trained(way, config, setting)
    ts = config.descent.times
    flows = right_and_wrong(lambda factor: _flow(way, config, setting, factor * ts))
    require_ok(way, trained, *flows.values())
    flows = {name: Trajectory(ts, np.asarray(path.ys), True) for name, path in flows.items()}
    finest = lane(trained, int(np.argmin(rates)))
    paths = {"theory": flows["right"].ys, "trained": np.asarray(finest.ys)}
    return {
        "gap": ("rate", {name: lane_gaps(path, trained) for name, path in flows.items()}),
        "value": (
            "time direction",
            {name: np.linalg.svd(W, compute_uv=False) for name, W in paths.items()},
        ),
        "spread": (
            "time",
            {name: np.asarray(_spreads(W, setting.X, setting.X_aug_cov)) for name, W in paths.items()},
        ),
    }


_spreads = jax.jit(jax.vmap(_spread, (0, None, None)))


@partial(jax.jit, static_argnames="config")
def _identities(config: Config, keys: Array) -> dict:
    """Gradients of both losses against their matrices, as printed and as derived, for each draw."""

    def relative(found, expected):
        return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)

    def one(key):
        # As many inputs as embeddings, so that both orders of a product have a shape.
        square = replace(config, width=config.inputs)
        (W, Wp, _), X, X_aug_cov = setting = _setting(square, key)
        views, one = exact_views(X, X_aug_cov), jnp.eye(config.inputs)

        def gradient(way):
            predict, params = as_function(_network(way, setting.weights))
            return _online(jax.grad(partial(byol_loss, predict))(params, views))

        apart = Wp - one
        matrix = jnp.kron(X_aug_cov, Wp.T @ Wp + one) + jnp.kron(X, apart.T @ apart)
        columns, rows = gradient("no stop-gradient").T.ravel(), gradient("no stop-gradient").ravel()
        no_predictor = gradient("no predictor")
        # Without weight decay what augmentation does not move stays: here one direction of the inputs.
        still = one - jnp.outer(one[0], one[0])
        first = jnp.outer(one[0], one[0])

        def later(predictor, A, B, eta):
            """The network of both ablations at a later time."""
            alone = no_predictor_flow(W, B, [0.0, LATER], weight_decay=eta).ys[-1]
            both = no_stop_gradient_flow(W, predictor, A, B, [0.0, LATER], weight_decay=eta).ys[-1]
            return jnp.stack([alone, both])

        def part(ends, columns):
            return jnp.linalg.norm(ends[:, :, columns], axis=(1, 2)) / jnp.linalg.norm(W[:, columns])

        everything, moved = slice(None), still @ X_aug_cov @ still
        kept = later(one, still @ X @ still + first, moved, 0.0)
        decayed = [later(Wp, X, moved, config.weight_decay), later(Wp, X, X_aug_cov, 0.0)]
        return {
            "left": relative(no_predictor, X_aug_cov @ W),
            "right": relative(no_predictor, W @ X_aug_cov),
            "columns": relative(columns, matrix @ W.T.ravel()),
            "rows": relative(rows, matrix @ W.ravel()),
            "least": jnp.stack([jnp.linalg.eigvalsh(X_aug_cov)[0], jnp.linalg.eigvalsh(matrix)[0]]),
            "kept": part(kept, slice(0, 1)),
            "others": part(kept, slice(1, None)),
            "later": jnp.stack([part(ends, everything) for ends in decayed]),
        }

    return jax.vmap(one)(keys)


def run(config: Config, context: Context) -> dict:
    """Three ways of training beside their flows, and the matrices of the two that are linear."""
    start, draws = jax.random.split(jax.random.key(context.seed))
    setting = jax.jit(partial(_setting, config))(start)
    ways = {}
    for index, way in enumerate(WAYS):
        context.progress(way, index / 4)
        ways[way] = _of_way(way, config, setting)
    context.progress("gradients", 3 / 4)
    found = jax.device_get(_identities(config, jax.random.split(draws, config.seeds)))
    dims = {
        "least": "draw ablation",
        "kept": "draw ablation",
        "others": "draw ablation",
        "later": "draw half ablation",
    }
    return {
        "rate": ("rate", config.descent.rates),
        "time": ("time", config.descent.times),
        "way": ways,
        "identity": {name: (dims.get(name, "draw"), part) for name, part in found.items()},
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What both ablations do, how they are printed, and what keeps BYOL from it."""
    yield _of_collapse(config, saved)
    yield _of_order(saved)
    yield _of_columns(saved)
    yield _of_condition(config, saved)
    for way, name in zip(WAYS, ("no-predictor", "no-stop-gradient", "both"), strict=True):
        yield stated(
            f"flow-{name}",
            f"Gradient descent follows the flow ({'predictor and stop-gradient' if way == 'both' else way})",
            SLIDE if way != "both" else f"{SLIDE} (the flow of all weights is derived)",
            *first_order(saved["rate"], saved[f"way/{way}/gap"]),
        )
    yield quoted(
        "performance",
        "On ImageNet DirectPred has 64.4 % and 72.4 % top-1 after 60 and 300 epochs, a two-layer predictor "
        "64.7 % and 72.5 %, and a linear one that is trained 59.4 % and 69.9 %",
        "tian2021directpred, the talk's slides on the performance of DirectPred",
        needs="ImageNet, a ResNet-50 trained for 60 and 300 epochs with each predictor, and linear probes",
    )


def _sizes(saved: Saved, way: str, side: str) -> np.ndarray:
    return np.linalg.norm(np.asarray(saved[f"way/{way}/value/{side}"]), axis=-1)


def _of_collapse(config: Config, saved: Saved) -> Claim:
    ts, eta = np.asarray(saved["time"]), config.weight_decay
    checks = []
    for way in WAYS[:2]:
        size = _sizes(saved, way, "theory")
        checks += [
            at_most(
                f"{way}: flow over its bound, |W(0)| exp(-eta t)",
                np.max(size / (size[0] * np.exp(-eta * ts))),
                1 + 1e-6,
                why="the matrix beside the weight decay is positive semidefinite",
            ),
            at_most(
                f"{way}: size of the trained network at the end, over the first",
                _sizes(saved, way, "trained")[-1] / _sizes(saved, way, "trained")[0],
                LATE,
                why=f"weight decay alone leaves {np.exp(-eta * ts[-1]):.2g}, augmentation takes most of that",
            ),
        ]
    value = np.asarray(saved["way/both/value/trained"])
    checks += [
        at_least(
            "predictor and stop-gradient: least singular value of the trained network at the end",
            value[-1, -1],
            0.3,
            why="with isotropic data it would be p_plus, about .75 at the usual rates",
        )
    ]
    return stated(
        "collapse",
        "Without a predictor, or without the stop-gradient, the linear network goes to zero; with both, not",
        SLIDE,
        *checks,
    )


def _of_order(saved: Saved) -> Claim:
    return corrected(
        "order",
        "Without predictor and moving average dW/dt = -(X' + eta I) W",
        SLIDE,
        printed=[
            at_most(
                "all draws, square W: gradient less X' W, over it",
                largest(saved["identity/left"]),
                1e-12,
                why=ROUNDING,
            )
        ],
        mended=[
            at_most(
                "all draws, square W: gradient less W X', over it",
                largest(saved["identity/right"]),
                1e-12,
                why=ROUNDING,
            )
        ],
    )


def _of_columns(saved: Saved) -> Claim:
    return stated(
        "columns",
        "Without stop-gradient d vec(W)/dt = -[X' (x) (W_p^T W_p + I) + X (x) (W_p - I)^T (W_p - I) + eta I] "
        "vec(W), with a positive semidefinite matrix, where vec stacks columns",
        SLIDE,
        at_most(
            "all draws: gradient less the product, over it",
            largest(saved["identity/columns"]),
            1e-12,
            why=ROUNDING,
        ),
        at_least(
            "the same with rows stacked: least difference",
            np.min(saved["identity/rows"]),
            0.01,
            why="the Kronecker product in this order belongs to columns",
        ),
        at_least("least eigenvalue of both matrices", np.min(saved["identity/least"]), -1e-12, why=ROUNDING),
    )


def _of_condition(config: Config, saved: Saved) -> Claim:
    least = np.asarray(saved["identity/least"])
    by_decay, by_augmentation = np.moveaxis(np.asarray(saved["identity/later"]), 1, 0)
    return qualified(
        "condition",
        "In both cases W goes to zero",
        SLIDE,
        condition="there is weight decay, or augmentation moves every direction",
        inside=[
            at_most(
                "weight decay, and a direction without augmentation: largest |W| at t = 50 over the first",
                np.max(by_decay),
                np.exp(-LATER * config.weight_decay),
                within=1e-12,
                why="no direction decays more slowly than weight decay alone lets it",
            ),
            at_most(
                "no weight decay, and X' of full rank: largest |W| at t = 50 over exp(-50 least eigenvalue)",
                np.max(by_augmentation * np.exp(LATER * least)),
                1 + 1e-9,
                why="the least eigenvalue of the matrix is the slowest rate",
            ),
            at_most(
                "the same: largest |W| over the first", np.max(by_augmentation), 0.1, why="X' is near .25 I"
            ),
        ],
        outside=[
            at_most(
                "neither, for one direction: change of W along it until t = 50 (a predictor that is I)",
                largest(np.asarray(saved["identity/kept"]) - 1),
                1e-12,
                why="the matrix has a zero there",
            ),
            every(
                "draws and ablations in which the other directions have shrunk",
                np.asarray(saved["identity/others"]) < 0.5,
                why="augmentation moves them",
            ),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Sizes and spread of embeddings over time, singular values of BYOL, and gaps to the flows."""
    drawn, ((sizes, values), (spread, gaps)) = plotting.new_figure(2, 2, width=4.6)
    time = np.asarray(saved["time"])
    theory, trained = (
        np.stack([_sizes(saved, way, side) for way in WAYS], axis=1) for side in ("theory", "trained")
    )
    plotting.theory_and_trained(sizes, time, theory, trained, WAYS, "flow")
    sizes.set_yscale("log")
    label = "time = learning rate × step"
    plotting.finish(sizes, "Size of the network", label, "|W|", "lower left")
    both = saved["way/both/value/theory"], saved["way/both/value/trained"]
    labels = [f"singular value {index + 1}" for index in range(np.shape(both[0])[1])]
    plotting.theory_and_trained(values, time, *both, labels, "flow")
    plotting.finish(values, "Predictor and stop-gradient", label, "singular value of W", "upper right")
    theory, trained = (
        np.stack([saved[f"way/{way}/spread/{side}"] for way in WAYS], axis=1)
        for side in ("theory", "trained")
    )
    plotting.theory_and_trained(spread, time, theory, trained, WAYS, "flow")
    spread.axhline(config.width**-0.5, color="grey", lw=0.8)
    plotting.finish(
        spread, "Spread of normalized embeddings", label, "standard deviation", "lower left", ylim=(0, None)
    )
    found = {way: saved[f"way/{way}/gap/right"] for way in WAYS}
    found["both, 2 % off"] = saved["way/both/gap/wrong"]
    plotting.gap_panel(
        gaps, np.asarray(saved["rate"]), found, "learning rate", "largest gap", "Gap to the flow"
    )
    return drawn
