"""Linear encoders under InfoNCE lose dimensions: to strong augmentation, and to a second layer.

The loss of embeddings z = W x, whose positive pair is in its denominator, moves W along W X, where X is the
contrastive covariance of the inputs: the spread between samples less that between views, weighted by the
importance of pairs. Along directions where augmentation outweighs the data X is negative. Two layers follow

    dW_1/dt = W_2^T W_2 W_1 X,   dW_2/dt = W_2 W_1 X W_1^T

and from small weights few of their directions grow, with X positive all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.contrastive import balance, contrastive_covariance, pairwise_importance
from dynamics.flow import Trajectory, integrate
from dynamics.spectra import effective_rank
from models.collapse import Noisy, StochasticLinear, weights
from models.draws import normal
from models.functional import as_function
from models.losses import alpha_cl_loss, contrastive_loss
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
    quoted,
    slope,
    stated,
)
from sims.compare import (
    SOLVE,
    WRONG_FACTOR,
    first_order,
    lane,
    lane_gaps,
    largest,
    orders,
    require_ok,
    right_and_wrong,
)
from sims.ranges import Positive, Range, check_ranges
from sims.results import Context, Saved

PAPER = "jing2022, the talk's slide on representation collapse"
LOSS: dict[str, Any] = {"temperature": 1.0, "epsilon": 1.0}
STRENGTHS = (0.1, 0.5, 1.0, 1.5, 2.0)  # standard deviations of the noise on inputs of variance one
WEAK = 0.001  # the noise under which two layers collapse
STARTS = ("small", "large")  # of two layers
DEPTHS = ("one", "two")
DEAD = 0.01  # a direction is dead where its singular value is below this part of the largest
LEVEL = 0.05  # of the loss at which one layer and two are compared
RECORDS = 100
SLOWER = 1 / 6  # the speed of one layer under strong augmentation beside that of two from small weights


@dataclass(frozen=True)
class Config:
    """The data, and the training of one and of two layers."""

    samples: Annotated[int, Range(at_least=16)] = 48
    """Samples of the data set, in two views that are held."""
    inputs: Annotated[int, Range(at_least=4)] = 8
    """Dimension of the inputs, and of all layers; one half is augmented."""
    draws: Annotated[int, Range(at_least=2)] = 2
    """Data sets, each with a start of its own."""
    rate: Positive = 0.1
    """Learning rate, on the mean loss of a sample."""
    steps: Annotated[int, Range(at_least=1000)] = 2000
    """Steps of training; a multiple of 100."""
    descent: Descent = Descent(horizon=12.0, points=20, substeps=(40, 120, 400))
    """Training beside the flow, at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if self.steps % RECORDS:
            raise ValueError(f"steps must be a multiple of {RECORDS}, got {self.steps}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(), samples=64, draws=8, steps=3000, descent=Descent(12.0, 20, (40, 120, 400, 1200))
    ),
    "paper": replace(Config(), samples=256, inputs=16, draws=16, steps=10_000),
}


class Case(NamedTuple):
    """What is trained: two layers, or one, where the second is the identity and has no speed."""

    matrices: list[Array]
    views: Views
    speed: Array  # of each layer: its part of the learning rate


def _one(config: Config, key: Array, noise: Array, speed: Any = 1.0) -> Case:
    """One layer that starts at a rotation, and its data, with noise on one half of the inputs."""
    data, start = jax.random.split(key)
    views = _views(config, data, noise * (jnp.arange(config.inputs) >= config.inputs // 2))
    matrices = [_rotation(start, config.inputs), jnp.eye(config.inputs)]
    return Case(matrices, views, speed * jnp.array([1.0, 0.0]))


def _two(config: Config, key: Array, large: Any, layers: Any = 2) -> Case:
    """Two layers of given singular values, or one layer that is their product, under weak augmentation."""
    data, *keys = jax.random.split(key, 5)
    values = jnp.where(large, 1.0, 0.5 * jnp.exp(-0.7 * jnp.arange(config.inputs)))
    first, second, third, fourth = (_rotation(each, config.inputs) for each in keys)
    W1, W2 = (first * values[None]) @ second, (third * values[None]) @ fourth
    two = jnp.asarray(layers) == 2
    matrices = [jnp.where(two, W1, W2 @ W1), jnp.where(two, W2, jnp.eye(config.inputs))]
    views = _views(config, data, jnp.full(config.inputs, WEAK))
    return Case(matrices, views, jnp.stack([jnp.ones(()), jnp.where(two, 1.0, 0.0)]))


def _views(config: Config, key: Array, noise: Array) -> Views:
    """Two views of normal samples, with noise of a standard deviation for each input."""
    one, other = jax.random.split(key)
    x = normal(one, (config.samples, config.inputs))
    first, second = noise[None, None] * normal(other, (2, *x.shape))
    return Views(x + first, x + second)


def _rotation(key: Array, d: int) -> Array:
    return jnp.linalg.qr(normal(key, (d, d)))[0]


def _network(case: Case) -> tuple[Any, Any, optax.GradientTransformation]:
    """The network of a case, its parameters, and what gives each layer its speed."""
    predict, params = as_function(StochasticLinear(case.matrices))

    def scaled(updates, _):
        leaves, structure = jax.tree.flatten(updates)
        return structure.unflatten([speed * leaf for speed, leaf in zip(case.speed, leaves, strict=True)])

    return predict, params, optax.stateless(scaled)


def _loss(predict: Any, params: Any, views: Views) -> Array:
    """InfoNCE of a network, of one sample on average."""
    f, other = (predict(params, Noisy(view)) for view in views)
    return contrastive_loss("infonce", f, other, **LOSS) / len(f)


def _importance(matrices: list[Array], views: Views) -> Array:
    """The weight that the mean loss gives to each pair."""
    W = matrices[1] @ matrices[0]
    alpha = pairwise_importance("infonce", *(view @ W.T for view in views), **LOSS)
    return alpha / len(alpha)


def _covariance(matrices: list[Array], views: Views) -> Array:
    """The X of the theory at these weights."""
    return contrastive_covariance(_importance(matrices, views), *views)


def _field(t: Any, matrices: list[Array], case: Case) -> list[Array]:
    """The flow of both layers, with the X of the moment."""
    W1, W2 = matrices
    X = _covariance(matrices, case.views)
    return [case.speed[0] * W2.T @ W2 @ W1 @ X, case.speed[1] * W2 @ W1 @ X @ W1.T]


def _seen(matrices: list[Array], loss: Array) -> dict[str, Array]:
    """Singular values of the product, its effective rank, and cosines of what both layers share."""
    W1, W2 = matrices
    U1, V2 = jnp.linalg.svd(W1)[0], jnp.linalg.svd(W2)[2]
    return {
        "loss": loss,
        "value": jnp.linalg.svd(W2 @ W1, compute_uv=False),
        "rank": effective_rank(W2 @ W1),
        "alignment": jnp.abs(jnp.sum(V2 * U1.T, axis=1)),
    }


def _descended(config: Config, case: Case) -> dict:
    """A case before, during and after its training."""
    predict, params, speeds = _network(case)
    loss = Partial(_loss, predict, views=case.views)
    last, path = train(
        loss,
        params,
        optax.chain(speeds, optax.sgd(config.rate)),
        steps=config.steps,
        every=config.steps // RECORDS,
        observe=lambda params: _seen(weights(params), loss(params)),
    )
    W = weights(last)[1] @ weights(last)[0]
    directions, X = jnp.linalg.svd(W)[2], _covariance(weights(last), case.views)
    z = case.views.first @ W.T
    return {
        "path": path.ys,
        "before": jnp.linalg.eigvalsh(_covariance(case.matrices, case.views))[::-1],
        "embedding": jnp.linalg.svd(z - jnp.mean(z, axis=0, keepdims=True), compute_uv=False),
        "augmented": jnp.sum(directions[:, config.inputs // 2 :] ** 2, axis=1),
        "gain": jnp.sum((directions @ X) * directions, axis=1),
    }


@partial(jax.jit, static_argnames="config")
def _trained(config: Config, key: Array) -> tuple[dict, dict]:
    """One layer by strength and draw, and layers under weak augmentation by start, number and draw."""
    keys = jax.random.split(key, config.draws)
    strengths, kinds, layers = jnp.asarray(STRENGTHS), jnp.arange(2) == 1, jnp.arange(1, 3)
    swept = jax.vmap(lambda s: jax.vmap(lambda key: _one(config, key, s))(keys))(strengths)
    layered = jax.vmap(
        lambda kind: jax.vmap(lambda n: jax.vmap(lambda key: _two(config, key, kind, n))(keys))(layers)
    )(kinds)

    def flat(cases, axes):
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[axes:]), cases)

    cases = jax.tree.map(lambda *parts: jnp.concatenate(parts), flat(swept, 2), flat(layered, 3))
    found = map_lanes(partial(_descended, config), cases)
    count = len(STRENGTHS) * config.draws
    return (
        jax.tree.map(lambda leaf: leaf[:count].reshape(len(STRENGTHS), -1, *leaf.shape[1:]), found),
        jax.tree.map(lambda leaf: leaf[count:].reshape(2, 2, -1, *leaf.shape[1:]), found),
    )


@partial(jax.jit, static_argnames="config")
def _identities(config: Config, keys: Array) -> dict:
    """By alignment of two layers and draw: gradients of the loss, and the rates of singular values."""

    def one(aligned, key):
        data, drawn, *keys = jax.random.split(key, 6)
        case = _one(config, data, jnp.ones(()))
        first, second, third, other = (_rotation(each, config.inputs) for each in keys)
        s1, s2 = 1 + jnp.abs(normal(drawn, (2, config.inputs)))
        shared = jnp.where(aligned, second, other)
        matrices = [(second * s1[None]) @ first.T, (third * s2[None]) @ shared.T]
        case = Case(matrices, case.views, jnp.ones(2))
        predict, params, _ = _network(case)
        G1, G2 = weights(jax.grad(partial(_loss, predict))(params, case.views))
        F1, F2 = _field(0.0, matrices, case)
        gain = jnp.sum(first * (_covariance(matrices, case.views) @ first), axis=0)
        rates = jnp.stack([-jnp.sum(second * (G1 @ first), axis=0), -jnp.sum(third * (G2 @ shared), axis=0)])
        printed = jnp.stack([s1 * s2**2 * gain, s2 * s1**2 * gain])
        return {
            "gradient": jnp.stack(
                [jnp.linalg.norm(G + F) / jnp.linalg.norm(F) for G, F in ((G1, F1), (G2, F2))]
            ),
            "rate": jnp.linalg.norm(rates - printed) / jnp.linalg.norm(printed),
            "lowest": jnp.min(gain),
        }

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.array([True, False]), keys)


@partial(jax.jit, static_argnames="descent")
def _descents(descent: Descent, cases: Case, live: Array) -> tuple[Array, Trajectory]:
    """Cases that are trained at several learning rates; pairs keep the importance of the start, or not."""

    def one(case, live):
        predict, params, speeds = _network(case)
        alpha = _importance(case.matrices, case.views)

        def loss(params):
            embedded = (predict(params, Noisy(view)) for view in case.views)
            return jnp.where(live, _loss(predict, params, case.views), alpha_cl_loss(alpha, *embedded))

        return descent.train(loss, params, weights, speeds)

    return jax.vmap(one)(cases, live)


def _held_flow(ts: np.ndarray, case: Case, X: np.ndarray) -> tuple[Trajectory, np.ndarray]:
    """W_0 exp(X t), the flow of one layer with its first X, and the eigenvectors of that."""
    values, vectors = np.linalg.eigh(X)
    start, speed = np.asarray(case.matrices[0]), float(case.speed[0])
    growth = np.exp(speed * ts[:, None] * values[None])
    W = ((start @ vectors)[None] * growth[:, None]) @ vectors.T[None]
    return Trajectory(ts, [W, np.broadcast_to(np.asarray(case.matrices[1]), W.shape)], True), vectors


@partial(jax.jit, static_argnames="config")
def _to_follow(config: Config, key: Array) -> tuple[Case, Array, Array]:
    """One layer under strong augmentation, twice, and two under weak one; which are live, and the first X."""
    one, two = _one(config, key, jnp.asarray(STRENGTHS[-1]), SLOWER), _two(config, key, jnp.asarray(False))
    cases = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, one, two)
    return cases, jnp.array([False, True, True]), _covariance(one.matrices, one.views)


def _followed(config: Config, key: Array) -> dict:
    """Layers that are trained at several learning rates, beside their flows."""
    cases, live, X = _to_follow(config, key)
    rates, trained = jax.device_get(_descents(config.descent, cases, live))
    ts, moving = config.descent.times, jax.tree.map(lambda leaf: leaf[1:], cases)

    def flow(factor):
        return jax.vmap(lambda case: integrate(_field, case.matrices, factor * ts, case, **SOLVE))(moving)

    flows = right_and_wrong(flow)
    require_ok("the flow and training", trained, *flows.values())
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], cases)
    gaps, paths = {}, {}
    for index, name in enumerate(("held", *DEPTHS)):
        runs = lane(trained, index)
        paths[name] = np.asarray(runs.ys[0])[int(np.argmin(rates[index]))]
        gaps[name] = {}
        for side, factor in (("right", 1.0), ("wrong", WRONG_FACTOR)):
            theory = _held_flow(factor * ts, first, np.asarray(X))[0].ys
            theory = theory if name == "held" else [np.asarray(W)[index - 1] for W in flows[side].ys]
            gaps[name][side] = lane_gaps(Trajectory(ts, theory, True), runs)
    theory, vectors = _held_flow(ts, first, np.asarray(X))
    values = np.linalg.eigvalsh(np.asarray(X))
    two = [np.asarray(W)[2] for W in trained.ys]
    return {
        "rate": ("rate", rates[0]),
        "time": ("time", ts),
        "gap": ("rate", gaps),
        "eigenvalue": ("value", values),
        "length": (
            "time value",
            {
                name: np.linalg.norm(W @ vectors, axis=1)
                for name, W in (("theory", theory.ys[0]), ("held", paths["held"]), ("one", paths["one"]))
            },
        ),
        "drift": ("rate", _drift(two)),
        "kept": _drift([np.asarray(W)[1][None] for W in flows["right"].ys])[0],
    }


def _drift(paths: list[Any]) -> np.ndarray:
    """How far the balance of two layers, by run and time, goes from where it was, over its size there."""
    (kept,) = (np.asarray(part) for part in balance(paths))
    size = np.linalg.norm(kept[:, 0], axis=(1, 2))
    return np.max(np.linalg.norm(kept - kept[:, :1], axis=(2, 3)), axis=1) / size


def run(config: Config, context: Context) -> dict:
    """One layer by strength of augmentation, layers from small and large weights, and flows beside them."""
    first, second, third = jax.random.split(jax.random.key(context.seed), 3)
    context.progress("training", 0.0)
    swept, layered = jax.device_get(_trained(config, first))
    context.progress("training beside the flow", 0.6)
    followed = _followed(config, second)
    context.progress("gradients", 0.95)
    identities = jax.device_get(_identities(config, jax.random.split(third, config.draws)))
    path = swept.pop("path")
    paths = layered["path"]
    dims = {"loss": "", "value": " value", "rank": "", "alignment": " value"}
    return {
        "strength": ("strength", np.asarray(STRENGTHS)),
        "start": ("start", list(STARTS)),
        "layers": ("layers", list(DEPTHS)),
        "moment": ("moment", config.rate * config.steps / RECORDS * np.arange(RECORDS + 1)),
        "swept": ("strength draw value", {"value": path["value"][:, :, -1], **swept}),
        "layered": {name: (f"start layers draw moment{more}", paths[name]) for name, more in dims.items()},
        "identity": {
            "gradient": ("aligned draw layer", identities["gradient"]),
            "rate": ("aligned draw", identities["rate"]),
            "lowest": ("aligned draw", identities["lowest"]),
        },
        "descent": followed,
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What collapses and what does not, the flows behind it, and what the slide on DirectCLR reports."""
    yield _of_collapse(saved)
    yield _of_strength(saved)
    yield _of_held_pairs(saved)
    yield _of_flow(saved)
    yield _of_layers(saved)
    yield _of_alignment(saved)
    yield _of_values(saved)
    yield _of_balance(saved)
    yield quoted(
        "directclr",
        "On ImageNet a part of the dimensions, trained directly, has 62.7 % top-1; all have 51.5 % without a "
        "projector, 61.1 % with a linear and 66.5 % with a nonlinear one",
        "jing2022, the talk's slide on DirectCLR",
        needs="ImageNet, a ResNet-50 that is trained in each of the four ways, and linear probes",
    )


def _dead(values: Any) -> np.ndarray:
    """Which singular values, the largest first, are far below the first; NaN where that is not known."""
    values = np.asarray(values)
    return np.where(np.isfinite(values), values < DEAD * values[..., :1], np.nan)


def _ends(saved: Saved, start: str, layers: str) -> np.ndarray:
    """Singular values after training of networks under weak augmentation, (draw, value)."""
    at = list(saved["start"]).index(start), list(saved["layers"]).index(layers)
    return np.asarray(saved["layered/value"])[(*at, slice(None), -1)]


def _of_collapse(saved: Saved) -> Claim:
    embedding, value = (np.asarray(saved[f"swept/{name}"]) for name in ("embedding", "value"))
    d = value.shape[-1]
    return qualified(
        "collapse",
        "Embeddings that are learned with a contrastive loss do not use all dimensions",
        PAPER,
        condition="augmentation is strong, or there are two layers with small weights to start from",
        inside=[
            every(
                "strongest augmentation: draws with a dimension of the embeddings that is dead",
                np.sum(_dead(embedding[-1]), axis=-1) > 0,
            ),
            at_most(
                "weak augmentation, two layers from small weights: directions that live, out of all",
                np.max(np.sum(1 - _dead(_ends(saved, "small", "two")), axis=-1)) / d,
                0.5,
                why="few have grown",
            ),
        ],
        outside=[
            at_least(
                "weakest augmentation, one layer: least singular value over the largest",
                np.min(value[0, :, -1] / value[0, :, 0]),
                0.1,
                why="the data alone are isotropic",
            ),
            at_least(
                "weak augmentation, two layers from large weights: the same",
                np.min(_ends(saved, "large", "two")[:, -1] / _ends(saved, "large", "two")[:, 0]),
                0.1,
                why="they start at a rotation",
            ),
        ],
    )


def _of_strength(saved: Saved) -> Claim:
    part = {name: np.asarray(saved[f"swept/{name}"]) for name in ("value", "augmented", "gain")}
    dead = _dead(part["value"])
    counts = np.sum(dead, axis=-1)
    return stated(
        "strength",
        "With stronger augmentation no fewer directions of a layer are dead, all of them augmented ones",
        f"{PAPER} (derived: one layer by strength)",
        every("strengths and draws with no fewer than the one before", np.diff(counts, axis=0) >= 0),
        at_most("dead directions of the weakest", np.max(counts[0]), 0, why="X is positive there"),
        at_least("dead directions of the strongest", np.min(counts[-1]), 1, why="X is negative at first"),
        every(
            "dead directions with 0.95 of their square in the augmented half",
            part["augmented"][dead == 1] > 0.95,
        ),
        every("dead directions along which X is negative after training", part["gain"][dead == 1] < 0),
    )


def _of_held_pairs(saved: Saved) -> Claim:
    values, rate = np.asarray(saved["descent/eigenvalue"]), saved["descent/rate"]
    held, live = (np.asarray(saved[f"descent/length/{name}"])[-1] for name in ("held", "one"))
    negative, before = values < 0, np.asarray(saved["swept/before"])[-1]
    dead = np.sum(_dead(np.asarray(saved["swept/value"])[-1]), axis=-1)
    left = np.where(np.isfinite(before).all(axis=-1), np.sum(before < 0, axis=-1), np.nan) - dead
    return qualified(
        "held",
        "A layer vanishes along the directions in which X has negative eigenvalues at first",
        f"{PAPER} (derived: one layer with its first X)",
        condition="X is held, so that W(t) = W(0) exp(X t)",
        inside=[
            *first_order(rate, saved["descent/gap/held"]),
            at_most(
                "largest length along these, of one at first", np.max(held[negative]), 0.05, why="exp(-3)"
            ),
            every("other directions that grow", held[~negative] > 1),
        ],
        outside=[
            at_least(
                "X that moves along: the same length",
                np.max(live[negative]),
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


def _of_flow(saved: Saved) -> Claim:
    rate = saved["descent/rate"]
    checks = []
    for name, words in zip(DEPTHS, ("one layer", "two layers"), strict=True):
        checks += [
            replace(check, label=f"{words}: {check.label}")
            for check in first_order(rate, saved[f"descent/gap/{name}"])
        ]
    return stated(
        "flow",
        "Layers that are trained follow W' = W X, or W_1' = W_2^T W_2 W_1 X and W_2' = W_2 W_1 X W_1^T, with "
        "the X of the moment",
        f"{PAPER} (derived: the flows)",
        at_most(
            "gradients of both layers less that, over it",
            largest(saved["identity/gradient"]),
            1e-12,
            why=ROUNDING,
        ),
        *checks,
    )


def _first_below(saved: Saved) -> np.ndarray:
    """Effective ranks when the loss has first come to its level, by layers and draw, from small weights."""
    loss, rank = (np.asarray(saved[f"layered/{name}"])[0] for name in ("loss", "rank"))
    below = loss <= LEVEL
    found = np.take_along_axis(rank, np.argmax(below, axis=-1)[..., None], axis=-1)[..., 0]
    return np.where(np.any(below, axis=-1), found, np.nan)


def _of_layers(saved: Saved) -> Claim:
    (one, two), start = _first_below(saved), np.asarray(saved["layered/rank"])[0, 1, :, 0]
    large = np.asarray(saved["layered/rank"])[1, 1, :, -1]
    many = np.sum(1 - _dead(_ends(saved, "small", "one")), axis=-1)
    few = np.sum(1 - _dead(_ends(saved, "small", "two")), axis=-1)
    d = np.asarray(saved["layered/value"]).shape[-1]
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
            at_least(
                "one layer, from their product and at that loss: least of the same",
                np.min(one / start),
                1.1,
                why="directions grow alike where X is isotropic",
            ),
            at_least(
                "one layer: directions that live after training, over those of two layers",
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
            )
        ],
    )


def _of_alignment(saved: Saved) -> Claim:
    cosines, alive = np.asarray(saved["layered/alignment"])[0, 1], _dead(_ends(saved, "small", "two")) == 0
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
            at_most(
                "least v^T X v of a draw, of the draw in which it is largest",
                np.max(saved["identity/lowest"]),
                0,
                why="X is to have both signs there",
            ),
        ],
        outside=[at_least("the same of layers at random", np.min(apart), 0.1, why="directions mix")],
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
    """Spectra by strength, what X held and moving do, one layer and two over time, and gaps to flows."""
    drawn, ((spectra, held, gaps), (one, two, ranks)) = plotting.new_figure(2, 3, width=4.4)
    _spectra_panel(spectra, saved)
    _held_panel(held, saved)
    gap = {
        "one layer (a sixth of the rate)": saved["descent/gap/one/right"],
        "two layers": saved["descent/gap/two/right"],
        "one layer, 2 % off": saved["descent/gap/one/wrong"],
    }
    plotting.gap_panel(gaps, saved["descent/rate"], gap, "learning rate", "largest gap", "Gap to the flow")
    for index, (ax, words) in enumerate(((one, "one layer"), (two, "two layers"))):
        values = np.asarray(saved["layered/value"])[0, index, 0]
        ax.semilogy(np.asarray(saved["moment"]), np.maximum(values, 1e-6), color=f"C{index}")
        title = f"Weak augmentation, {words}"
        plotting.finish(
            ax, title, "time = learning rate × step", "singular values of the product", ylim=(1e-6, 100)
        )
    _rank_panel(ranks, saved)
    return drawn


def _spectra_panel(ax: Axes, saved: Saved) -> None:
    values, floor = np.asarray(saved["swept/value"])[:, 0], 1e-8
    number = np.arange(1, values.shape[-1] + 1)
    for strength, spectrum in zip(np.asarray(saved["strength"]), values, strict=True):
        ax.semilogy(number, np.maximum(spectrum / spectrum[0], floor), "o-", label=f"{strength:g}")
    ax.axhline(DEAD, label="dead below", **plotting.PRINTED)
    ax.annotate("or less", (number[-1] - 0.5, floor), (0, 7), textcoords="offset points", ha="center")
    legend = {"loc": "lower left", "title": "noise on one half"}
    plotting.finish(ax, "One layer after training", "number", "singular value over the largest", legend)


def _held_panel(ax: Axes, saved: Saved) -> None:
    time, negative = np.asarray(saved["descent/time"]), np.asarray(saved["descent/eigenvalue"]) < 0
    names = (("held", "C0", "X held"), ("one", "C1", "X moves along"))
    for name, color, label in names:
        lines = ax.semilogy(
            time * SLOWER,
            np.asarray(saved[f"descent/length/{name}"])[:, negative],
            color=color,
            **plotting.TRAINED,
        )
        lines[0].set_label(label)
    theory = np.asarray(saved["descent/length/theory"])[:, negative]
    ax.semilogy(time * SLOWER, theory, **plotting.THEORY)[0].set_label("W(0) exp(X t)")
    title = "Along negative eigenvalues of X"
    plotting.finish(ax, title, "time = learning rate × step", "length of the layer", "lower left")


def _rank_panel(ax: Axes, saved: Saved) -> None:
    loss, rank = (np.asarray(saved[f"layered/{name}"])[:, :, 0] for name in ("loss", "rank"))
    for kind, style in ((0, "-"), (1, "--")):
        for index, words in enumerate(("one layer", "two layers")):
            label = f"{words}, {saved['start'][kind]} start"
            ax.semilogx(loss[kind, index], rank[kind, index], style, color=f"C{index}", label=label)
    ax.invert_xaxis()
    plotting.make_room(ax, above=0.5)
    plotting.finish(ax, "Rank of the product", "loss, which falls", "effective rank", "upper left")
