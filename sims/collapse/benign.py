"""Local minima from many starts have one loss and the largest rank there is, but for deep networks.

Newton's method by the sizes of curvatures goes down to local minima of regularized networks, of linear
autoencoders and of contrastive encoders; by the curvatures themselves it goes to whatever is stationary.
Rank is that of the representation. Three saddles of the rank of the minima, with their least curvatures:

    one row of a contrastive encoder, on the second mode     -2 S_1 (b_1 - b_2),   S = a + s,  b = (a - s) / S
    a network in which one of several noisy units is active  2 gamma - 2 |c - A W^T U^T|
    one latent of an autoencoder, on the second mode         of [[theta^2 + sigma^2, -zeta_1],
                                                                 [-zeta_1, lambda^2 + beta]]

The encoder has augmentation of variance s, the network one gamma, the autoencoder standard deviations of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import collapse
from dynamics.collapse import Moments
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, corrected, equals, every, stated
from sims.compare import in_calls, largest
from sims.ranges import Range
from sims.results import Context, Saved

SLIDES = "ziyin2022talk, slides on benignity"
SCALES = (0.03, 2.0)  # standard deviations of starts
RADIUS, HALVINGS, FLOOR = 0.5, 6, 1e-5  # of Newton's steps; curvatures count as FLOOR of the largest at least
ALIVE = 1e-5  # singular values below are zero
AT_REST = 1e-9  # the largest gradient of a stationary point
A = np.array([[1.2, 0.3, 0.0], [0.3, 0.8, -0.2], [0.0, -0.2, 0.5]])
SCALAR = Moments(A, np.array([0.6, -0.5, 0.4]), 1.5)
TWO = Moments(np.eye(3), np.array([[0.6, 0.1], [-0.5, 0.4], [0.4, 0.5]]), 2.0)
LINEAR = Moments(A, np.outer([0.6, -0.5, 0.4], [1.0, 0.5, 0.0]) + np.outer([0.2, 0.3, 0.1], [0, 1, 1]), 2.0)
NOISE, GAMMA, DEEP_GAMMA = 0.5, 0.2, {2: 0.1, 3: 0.05}  # below the critical ones
DEEP, WIDTHS = ("D = 2", "D = 3"), {1: (3,), 2: (3, 3), 3: (2, 2, 2)}
ZETA, BETA = np.array([2.0, 1.5, 1.2, 0.5]), 1.0
VARIANCES, AUGMENTATION, ATTRACTION = np.array([1.5, 1.0, 0.6, 0.3]), 0.5, 2.0
UNEVEN = np.diag([0.5, 0.1, 0.3, 0.4]) + 0.1 * (np.eye(4, k=1) + np.eye(4, k=-1))
QUARTIC, REACH = 0.75, 0.6  # the latter: how far ways from saddles go
SADDLES = ("contrastive, second mode", "one active unit", "autoencoder, second mode")
FEW = "of 24 starts or more"


@dataclass(frozen=True)
class Config:
    """How many starts there are, and how long each is followed."""

    starts: Annotated[int, Range(at_least=16)] = 24
    """Random starts of each search in each model."""
    steps: Annotated[int, Range(at_least=40)] = 60
    """Newton's steps from each."""
    points: Annotated[int, Range(at_least=11)] = 61
    """Points of the ways down from the saddles."""


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": Config(64, 100, 121),
    "paper": Config(512, 200, 121),
}


Loss = Callable[[list[Array]], Array]


class Model(NamedTuple):
    """A loss of weights that closes over its data, and what theory says of its global minimum."""

    loss: Loss
    shapes: tuple[tuple[int, ...], ...]
    least: Any
    rank: int
    encoder: int = 0  # place of the matrix that represents


def _network(*data: Any) -> Loss:
    return lambda params: collapse.stochastic_linear_loss(params, *data)


def _autoencoder(Z: np.ndarray) -> Loss:
    def loss(params):
        U, V, log_scale = params
        return collapse.linear_vae_loss(U, V, jnp.exp(log_scale), Z, BETA, 1.0, 1.0)

    return loss


def _quartic(*data: Any) -> Loss:
    return lambda params: collapse.landau_loss(params[0], *data)


def _contrastive(*data: Any) -> Loss:
    return lambda params: collapse.infonce_loss(params[0], *data)


def _shapes(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(sizes[1:], sizes, strict=False))


def _models() -> dict[str, Model]:
    """Losses of weights, with the loss and the rank of the global minimum."""
    gammas = {D: np.full(D + 1, DEEP_GAMMA.get(D, GAMMA)) for D in (0, 1, 2, 3)}
    ridge, shapes = collapse.ridge_minimum(LINEAR, GAMMA), _shapes((3, 3))
    models = {"ridge": Model(_network(LINEAR, 0.0, gammas[0]), shapes, ridge.loss, 2)}
    # For white inputs singular values of the best map are those of E[y x^T] less gamma.
    kept = np.maximum(np.linalg.svd(TWO.c, compute_uv=False) - GAMMA, 0)
    shapes, least = _shapes((3, *WIDTHS[1], 2)), TWO.y2 - np.sum(kept**2)
    models["D = 1, two outputs"] = Model(_network(TWO, 0.0, gammas[1]), shapes, least, 2)
    for D, name in enumerate(("D = 1, noise", *DEEP), start=1):
        shapes = _shapes((3, *WIDTHS[D], 1))
        least = collapse.deep_minimum(SCALAR, gammas[D], NOISE, WIDTHS[D])
        models[name] = Model(_network(SCALAR, NOISE, gammas[D]), shapes, least.loss, 1)
    modes, Z = len(ZETA), np.diag(ZETA)
    shapes, least = ((modes, 2), (modes, 2), (2,)), collapse.vae_minimum(Z, 2, BETA, 1.0, 1.0).loss
    models["autoencoder"] = Model(_autoencoder(Z), shapes, least, 2, 1)
    data = (np.diag(VARIANCES) - UNEVEN, np.diag(VARIANCES) + UNEVEN)
    least = collapse.landau_minimum(*data, 2, QUARTIC).loss
    models["quartic"] = Model(_quartic(*data, QUARTIC), ((2, modes),), least, 2)
    data = (np.diag(VARIANCES), AUGMENTATION * np.eye(modes), ATTRACTION)
    eigenvalues = collapse.infonce_minimum(VARIANCES, AUGMENTATION, ATTRACTION)
    least = collapse.infonce_loss(np.diag(np.sqrt(eigenvalues)), *data)
    models["contrastive"] = Model(_contrastive(*data), ((modes, modes),), least, 3)
    return models


@partial(jax.jit, static_argnames=("loss", "shapes"))
def _looked_at(loss, shapes, points) -> tuple[Array, Array, Array]:
    """The loss, its gradient and its Hessian at points (N, n)."""

    def column(point, direction):
        def gradient(flat):
            value, slopes = jax.value_and_grad(lambda flat: loss(_matrices(shapes, flat)))(flat)
            return slopes, (value, slopes)

        _, curved, seen = jax.jvp(gradient, (point,), (direction,), has_aux=True)
        return *seen, curved

    # One axis of all points and directions compiles more quickly than two.
    count, size = points.shape
    value, slopes, columns = jax.vmap(column)(
        jnp.repeat(points, size, axis=0), jnp.tile(jnp.eye(size), (count, 1))
    )
    return value[::size], slopes[::size], columns.reshape(count, size, size)


def _seen(model: Model, batch: int, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """What is seen at points, by calls of one size."""
    return in_calls(partial(_looked_at, model.loss, model.shapes), points, batch)


def _matrices(shapes: Sequence[tuple[int, ...]], flat: Any) -> list[Any]:
    """Weights of points (..., n), in the order of the shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = zip(shapes, ends, strict=True)
    return [flat[..., end - math.prod(shape) : end].reshape(*flat.shape[:-1], *shape) for shape, end in parts]


def _settled(
    look: Callable[[np.ndarray], Any], points: np.ndarray, downhill: np.ndarray, steps: int
) -> tuple:
    """Where Newton's method ends, `downhill` or wherever the gradient vanishes, and what is seen there."""
    seen = look(points)
    for step in range(steps):
        loss, gradient, hessian = seen
        # The loss cannot tell the last steps of a descent, which are by the gradient.
        down = downhill & (step < steps - 5)
        curvatures, vectors = np.linalg.eigh(hessian)
        sizes = np.maximum(np.abs(curvatures), FLOOR * np.abs(curvatures).max(axis=1, keepdims=True))
        signed = np.where(down[:, None], sizes, np.copysign(sizes, curvatures))
        move = -np.einsum("kij,kj,klj,kl->ki", vectors, 1 / signed, vectors, gradient, optimize=True)
        move /= np.maximum(1, np.linalg.norm(move, axis=1, keepdims=True) / RADIUS)
        merit = np.where(down, loss, np.sum(gradient**2, axis=1))
        waiting = np.ones(len(points), bool)
        for _ in range(HALVINGS):
            tried = look(points + move)
            better = waiting & (np.where(down, tried[0], np.sum(tried[1] ** 2, axis=1)) < merit)
            points = np.where(better[:, None], points + move, points)
            seen = [np.where(_along(better, new), new, old) for new, old in zip(tried, seen, strict=True)]
            waiting, move = waiting & ~better, move / 2
            if not waiting.any():
                break
    return points, seen


def _along(mask: np.ndarray, like: np.ndarray) -> np.ndarray:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _saddles(network: Model) -> list[tuple[Model, list[np.ndarray], float]]:
    """The three `SADDLES`, each with its model, its weights and its least curvature in closed form."""
    a, s, q = VARIANCES[:2], AUGMENTATION, QUARTIC
    B, Sigma, ratio = np.diag(a - s), np.diag(a + s), (a - s) / (a + s)
    least = collapse.landau_minimum(B, Sigma, 1, q)
    row = np.array([[0.0, np.sqrt(ratio[1] / (2 * q * (a + s)[1]))]])
    quartic = Model(_quartic(B, Sigma, q), ((1, 2),), least.loss, 1)
    found = [(quartic, [row], -2 * (a + s)[0] * (ratio[0] - ratio[1]))]

    (units,) = WIDTHS[1]
    # n units with noise of variance n s are one with s whose weights are divided by sqrt(n): one program.
    alike = jax.device_get(collapse.two_layer_minimum(SCALAR, GAMMA, GAMMA, units * NOISE, units))
    W, U = units**0.5 * alike.W[:1], units**0.5 * alike.U[:1]
    weights = [np.pad(W, ((0, units - 1), (0, 0))), np.pad(U[None], ((0, 0), (0, units - 1)))]
    rest = SCALAR.c - SCALAR.A @ W.T @ U
    found.append((network, weights, 2 * (GAMMA - np.linalg.norm(rest))))

    zeta, of_second = ZETA[:2], collapse.vae_minimum(ZETA[1:2, None], 1, BETA, 1.0, 1.0)
    lam, theta, sigma2 = (np.asarray(part) for part in of_second[:3])
    weights = [np.pad(lam[:, None], ((1, 0), (0, 0))), np.pad(theta[:, None], ((1, 0), (0, 0)))]
    block = np.array([[theta[0] ** 2 + sigma2[0], -zeta[0]], [-zeta[0], lam[0] ** 2 + BETA]])
    least = collapse.vae_minimum(np.diag(zeta), 1, BETA, 1.0, 1.0).loss
    model = Model(_autoencoder(np.diag(zeta)), ((2, 1), (2, 1), (1,)), least, 1, 1)
    weights.append(np.log(sigma2) / 2)
    return [*found, (model, weights, np.linalg.eigvalsh(block)[0])]


@partial(jax.jit, static_argnames=("loss", "shapes"))
def _index(loss, shapes, flat) -> Array:
    return collapse.hessian_index(lambda flat: loss(_matrices(shapes, flat)), flat)


def _looks(config: Config, model: Model, weights: list[np.ndarray], curvature: float) -> dict[str, Any]:
    """A saddle: its gradient, its index, its least curvature, its rank, and the loss along a way down."""
    flat, steps = np.concatenate([W.ravel() for W in weights]), REACH * np.linspace(-1, 1, config.points)
    look = partial(_seen, model, 2 * config.starts)
    _, (gradient,), (hessian,) = look(flat[None])
    curvatures, vectors = np.linalg.eigh(hessian)
    way, _, _ = look(flat + steps[:, None] * vectors[:, 0])
    return {
        "gradient": np.linalg.norm(gradient),
        "index": _index(model.loss, model.shapes, flat),
        "curvature": curvatures[0],
        "predicted": curvature,
        "rank": np.linalg.matrix_rank(weights[model.encoder], tol=ALIVE),
        "full": model.rank,
        "way": way - float(model.least),
    }


def _search(config: Config, seed: int, model: Model) -> dict[str, np.ndarray]:
    """Ends (search, start) of both searches: losses, gradients, curvatures and singular values."""
    rng, count = np.random.default_rng(seed), config.starts
    scales = np.geomspace(*SCALES, count)[:, None]
    points = scales * rng.standard_normal((count, sum(map(math.prod, model.shapes))))
    look = partial(_seen, model, 2 * count)
    downhill = np.repeat([True, False], count)
    ends, (loss, gradient, hessian) = _settled(look, np.tile(points, (2, 1)), downhill, config.steps)
    curvatures = np.linalg.eigvalsh(hessian)
    values = np.linalg.svd(_matrices(model.shapes, ends)[model.encoder], compute_uv=False)
    found = {
        "loss": loss,
        "gradient": np.linalg.norm(gradient, axis=1),
        "least": curvatures[:, 0],
        "largest": np.abs(curvatures).max(axis=1),
        "rank": np.sum(values > ALIVE, axis=1),
    }
    return {name: value.reshape(2, count) for name, value in found.items()}


def run(config: Config, context: Context) -> dict:
    """Where both searches end in all models, and three saddles that are written down."""
    context.progress("minima", 0.0)
    models = _models()
    found = []
    for index, (name, model) in enumerate(models.items()):
        context.progress(name, (1 + index) / (2 + len(models)))
        found.append(_search(config, context.seed, model))
    saddles = [_looks(config, *saddle) for saddle in _saddles(models["D = 1, noise"])]
    dims = dict.fromkeys(saddles[0], "saddle") | {"way": "saddle along"}
    return {
        "model": ("model", np.array(list(models))),
        "theory": ("model", {"loss": np.array([float(model.least) for model in models.values()])}),
        "full": ("model", np.array([model.rank for model in models.values()])),
        "search": ("model search start", {name: np.stack([one[name] for one in found]) for name in found[0]}),
        "along": ("along", REACH * np.linspace(-1, 1, config.points)),
        "saddle": {name: (dims[name], np.stack([one[name] for one in saddles])) for name in saddles[0]},
    }


def _ends(saved: Saved) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The ends of descents, those of the other search that are saddles, and which models are not deep."""
    part = {
        name: np.asarray(saved[f"search/{name}"]) for name in ("loss", "gradient", "least", "largest", "rank")
    }
    strict = (part["gradient"][:, 1] < AT_REST) & (part["least"][:, 1] < -1e-6 * part["largest"][:, 1])
    return part, strict, ~np.isin(saved["model"], DEEP)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """That minima are alike but for deep networks, and that saddles can have their rank."""
    part, strict, shallow = _ends(saved)
    full, least = np.asarray(saved["full"]), np.asarray(saved["theory/loss"])
    loss, rank = part["loss"][:, 0], part["rank"][:, 0]
    curvature = part["least"][:, 0] / part["largest"][:, 0]
    newton = "Newton's method has come to rest"
    yield stated(
        "rank",
        "All local minima have the largest rank there is: networks with one hidden layer or none, linear "
        "autoencoders, contrastive encoders",
        SLIDES,
        every("starts that end at the rank of the global minimum", rank[shallow] == full[shallow, None]),
        at_most("largest gradient there", largest(part["gradient"][shallow, 0]), 3e-15, why=newton),
        at_least(
            "least curvature over the largest",
            np.min(curvature[shallow]),
            -5e-15,
            why="rotations leave the loss as it is: zero to rounding",
        ),
    )
    yield stated(
        "one-loss",
        "Collapse does not depend on the start: all local minima are global ones",
        SLIDES,
        at_most("spread of the loss over starts", np.max(np.ptp(loss[shallow], axis=1)), 8e-15, why=newton),
        at_most(
            "loss over the global minimum's", largest(loss[shallow] - least[shallow, None]), 4e-15, why=newton
        ),
    )
    yield _deep(saved, loss, rank, ~shallow)
    yield _equal_ranks(saved, part["rank"][:, 1] - full[:, None], strict, shallow)


def _deep(saved: Saved, loss: np.ndarray, rank: np.ndarray, deep: np.ndarray) -> Claim:
    part, gap = saved["search"], loss[deep] - np.asarray(saved["theory/loss"])[deep, None]
    zero = rank[deep] == 0
    curvature = np.asarray(part["least"])[deep, 0]
    expected = 2 * np.array(list(DEEP_GAMMA.values()))[:, None]
    at_zero = np.where(zero, curvature - expected, 0)
    return stated(
        "deep",
        "With more hidden layers zero, whose rank is none, is a local minimum too, and starts end there",
        f"{SLIDES} (with more than one hidden layer)",
        at_least(
            "D = 2 and 3: smallest share of starts at rank zero", zero.mean(axis=1).min(), 0.05, why=FEW
        ),
        at_most("least curvature there, less 2 gamma", largest(at_zero), 3e-15, why=ROUNDING),
        at_least(
            "loss there, over the global minimum's", np.min(gap[zero]), 0.1, why="0.36 and more by theory"
        ),
        at_least(
            "smallest share of starts at the global minimum", (gap < 1e-9).mean(axis=1).min(), 0.05, why=FEW
        ),
    )


def _equal_ranks(saved: Saved, excess: np.ndarray, strict: np.ndarray, shallow: np.ndarray) -> Claim:
    saddle = saved["saddle"]
    lower = saddle["full"] - saddle["rank"]
    among = np.sum(np.any(strict & (excess == 0), axis=1)[shallow])
    gap = largest(saddle["curvature"] - saddle["predicted"])
    down = np.min(saddle["way"], axis=1) - saddle["way"][:, saddle["way"].shape[1] // 2]
    return corrected(
        "saddles",
        "Saddles all have lower rank than the local minima (they have at most that rank)",
        SLIDES,
        printed=[
            at_least("three saddles: smallest rank of minima less theirs", np.min(lower), 1, why="as printed")
        ],
        mended=[
            every("saddles that are found: rank at most that of the minima", excess[strict] <= 0),
            at_least(
                "models of one hidden layer or none in which one of equal rank is found",
                among,
                3,
                why="three are written down",
            ),
            at_most("those three: largest gradient", largest(saddle["gradient"]), 2e-15, why=ROUNDING),
            every("directions that lead down", saddle["index"] >= 1),
            at_most("least curvatures, less their closed forms", gap, 1.6e-15, why=ROUNDING),
            equals("that of the autoencoder", saddle["curvature"][2], -0.4704, 1e-4, why="printed digits"),
            every("ways down on which the loss falls", down < 0),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Losses of local minima and of saddles by their ranks, and the ways down from three saddles."""
    drawn, ((minima, saddles, ways),) = plotting.new_figure(1, 3, width=4.7, height=4.0)
    part, strict, _ = _ends(saved)
    lower = np.asarray(saved["full"])[:, None, None] - part["rank"]
    gap = part["loss"] - np.asarray(saved["theory/loss"])[:, None, None]
    everywhere = np.ones_like(strict)
    _by_model(minima, saved, gap[:, 0], lower[:, 0], everywhere, f"Local minima from {config.starts} starts")
    _by_model(saddles, saved, gap[:, 1], lower[:, 1], strict, "Saddles that are found")
    along, ways_down = np.asarray(saved["along"]), np.asarray(saved["saddle/way"])
    for index, label in enumerate(SADDLES):
        bend = float(saved["saddle/predicted"][index])
        change = ways_down[index] - ways_down[index, along.size // 2]
        ways.plot(along, change, color=f"C{index}", label=f"{label}: {bend:.3f}", **plotting.TRAINED)
        near = np.abs(along) < REACH / 2
        ways.plot(along[near], bend * along[near] ** 2 / 2, **plotting.THEORY)
    ways.plot([], [], label="curvature in closed form", **plotting.THEORY)
    title, legend = "Saddles that have the minima's rank", {"loc": "upper center", "title": "least curvature"}
    low = (ways_down.min(axis=1) - ways_down[:, along.size // 2]).min()
    plotting.finish(
        ways, title, "distance along it", "change of the loss", legend, ylim=(1.2 * low, -3 * low)
    )
    return drawn


def _by_model(
    ax: Axes, saved: Saved, gap: np.ndarray, lower: np.ndarray, shown: np.ndarray, title: str
) -> None:
    """Losses over that of the global minimum, one column for each model."""
    places = np.arange(len(gap))[:, None] + np.linspace(-0.3, 0.3, gap.shape[1])
    kinds = (("rank of the global minimum", "C0", "o"), ("one less", "C1", "s"), ("two less", "C3", "D"))
    for missing, (label, color, marker) in enumerate(kinds):
        at = shown & (lower == missing)
        ax.plot(places[at], gap[at], marker, color=color, mfc="none", ms=5, label=label)
    plotting.label_ticks(ax, np.arange(len(gap)), [str(name) for name in saved["model"]])
    ax.tick_params(axis="x", rotation=60)
    plotting.finish(ax, title, "model", "loss above the global minimum", "upper left")
    plotting.make_room(ax, above=0.4)
