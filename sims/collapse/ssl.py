"""Encoders that are trained by contrast: how much augmentation makes a mode collapse, if any does.

A linear encoder W on Gaussian data of covariance A, with augmentation of covariance C, has the InfoNCE loss

    attraction tr(W C W^T) - (1/2) log det(I + T) - (1/2) tr(T (I + T)^{-1}),   T = W (A + C) W^T

and to fourth order -tr(W B W^T) + (3/4) tr(T^2) with B = A - (attraction - 1) C. Eigenvalues of its minimum,
and of that of the quartic form, stand beside those of encoders that are trained on pairs of augmented
examples, drawn anew at every step; series of several losses along rays are averages over such batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

from dynamics import collapse
from dynamics.flow import gradient_flow, integrate
from models.collapse import weights
from models.draws import normal
from models.functional import as_function
from models.self_supervised import (
    Encoder,
    Views,
    infonce,
    on_views,
    scale_embedding,
    soft_triplet,
    spectral_contrastive,
    two_views,
)
from models.training import train
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
    slope,
    stated,
)
from sims.compare import SOLVE, convergence_order, largest, named_groups, require_ok
from sims.ranges import Positive, Range, check_ranges
from sims.results import Context, Saved

INFONCE, MINIMA = "ziyin2022talk, slide on InfoNCE", "ziyin2022talk, slide on its minima"
VARIANCES = np.array([1.5, 1.0, 0.6, 0.3])
A, MODES = np.diag(VARIANCES), len(VARIANCES)
LIGHT = 0.2  # variance of an isotropic augmentation that leaves all modes
STRONG = 1.7  # of one that leaves none, with attraction 2
TILTED = np.array([[0.9, 0.4, 0.1, 0.0], [0.4, 1.2, 0.2, 0.1], [0.1, 0.2, 0.2, 0.1], [0.0, 0.1, 0.1, 0.5]])
WIDTHS = (1, 2, 4)
CASES = {  # covariance of the augmentation, attraction and width where InfoNCE is minimized
    "attraction 2": (LIGHT * np.eye(MODES), 2.0, 4),
    "attraction 1": (LIGHT * np.eye(MODES), 1.0, 4),
    "tilted": (TILTED, 2.0, 4),
    "tilted, two rows": (TILTED, 2.0, 2),
}
NEAR = 10.0 ** -np.arange(1, 4.5, 0.5)  # of the second mode's variance over that of the augmentation
REACHED = slice(1, 4)  # of these, where descent comes to rest
RATES = 0.008, 0.04  # of descent, and where a mode is close to its threshold and slow
ORDER, SERIES_BATCH = 4, 32
FINITE = (2, 4, 16)  # examples of batches with the positive in the denominator
LARGE_BATCH, LARGE_DRAWS = 1000, 20
RAY = np.linspace(-2.7, 2.7, 54)  # without zero, where embeddings have no direction
DEAD = 1e-3  # roots of eigenvalues below are zero
RATE, MOMENTUM = 0.1, 0.9
CLOSE = 0.04  # to a threshold a mode takes longer to collapse than training lasts


@dataclass(frozen=True)
class Config:
    """The strengths of augmentation, and the encoders that are trained."""

    points: Annotated[int, Range(at_least=12)] = 60
    """Variances of the augmentation at which minima are computed, from 0.05 to 1.8."""
    strengths: tuple[Positive, ...] = (0.2, 0.45, 0.8, 1.25, 1.7)
    """Variances of the augmentation at which encoders are trained, with attraction 2 and 1."""
    batch: Annotated[int, Range(at_least=64)] = 96
    """Examples of a batch in training."""
    steps: Annotated[int, Range(at_least=500)] = 1200
    """Steps of descent with momentum, each on a batch of its own."""
    starts: Annotated[int, Range(at_least=64)] = 64
    """Random starts of the descent that closed forms are compared with."""
    draws: Annotated[int, Range(at_least=100)] = 600
    """Batches of 32 over which series are averaged."""

    def __post_init__(self):
        check_ranges(self)
        if LIGHT not in self.strengths or max(self.strengths) < VARIANCES[0]:
            raise ValueError(f"strengths must hold {LIGHT} and one above 1.5, got {self.strengths}")
        if np.min(np.abs(np.subtract.outer(self.strengths, VARIANCES))) < CLOSE:
            raise ValueError(f"strengths must be {CLOSE} or more from {VARIANCES}, got {self.strengths}")


_STANDARD = replace(
    Config(),
    points=200,
    strengths=(0.2, 0.25, 0.35, 0.45, 0.55, 0.8, 1.1, 1.25, 1.4, 1.7),
    batch=256,
    steps=2000,
    draws=3000,
)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(_STANDARD, batch=1024, steps=4000, starts=256, draws=12_000),
}


# What is minimized, in closed form and by descent.


@jax.jit
@jax.vmap
def _modes(variance: Array) -> dict[str, Array]:
    """Roots of the eigenvalues of W W^T over the variance of the augmentation, mode by mode."""
    C = variance * jnp.eye(MODES)
    quartic = collapse.landau_minimum(A - C, A + C, MODES, 1.0).W
    exact = {
        name: jnp.sqrt(collapse.infonce_minimum(VARIANCES, variance, attraction))
        for name, attraction in (("two", 2.0), ("one", 1.0))
    }
    # The series of the slide's loss, which has attraction 1.
    series = collapse.landau_minimum(A, A + C, MODES, 0.75).W
    return {
        "quartic": jnp.linalg.norm(quartic, axis=1),
        "series": jnp.linalg.norm(series, axis=1),
        **exact,
    }


@partial(jax.jit, static_argnames="loss")
def _descended(loss: Callable, lanes: tuple, starts: Array):
    """Losses and encoders at the end of descent on a loss, from many starts in every lane.

    Rows that start at zero stay there, so that one program serves encoders of several widths.
    """

    def descended(lane, start):
        *covariances, number, used, rate = lane
        of = Partial(lambda data, W: loss(W, *data), (*covariances, number))
        optimizer = optax.sgd(rate, momentum=0.95)
        W, _ = train(of, used[:, None] * start, optimizer, steps=1500, every=1500)
        return of(W), W

    return jax.vmap(jax.vmap(descended, (None, 0)), (0, None))(lanes, starts)


def _lanes(cases, close) -> tuple[np.ndarray, ...]:
    """Matrices, numbers, sizes of the rows in use and rates of cases, and of those close to a threshold.

    The large rate asks for starts that are small.
    """
    *matrices, numbers, widths = zip(*cases, *close, strict=True)
    used = np.arange(MODES)[None] < np.asarray(widths)[:, None]
    counts = len(cases), len(close)
    rates, sizes = np.repeat(RATES, counts), np.repeat([1.0, 0.5], counts)
    return *(np.stack(each) for each in matrices), np.asarray(numbers), sizes[:, None] * used, rates


def _against(dim: str, least: list, found: tuple) -> dict:
    """What descent found beside the closed form; both up to a rotation of the rows."""
    losses, W = found
    expected = np.stack([np.asarray(each.W).T @ np.asarray(each.W) for each in least])
    return {
        "least": (dim, np.stack([each.loss for each in least])),
        "loss": (f"{dim} start", losses),
        "gap": (f"{dim} start", np.abs(np.swapaxes(W, -1, -2) @ W - expected[:, None]).max(axis=(-2, -1))),
        "rank": (f"{dim} start", np.sum(np.linalg.svd(W, compute_uv=False) > DEAD, axis=-1)),
    }


def _minima(config: Config, rng: np.random.Generator) -> dict:
    B, Sigma = A - TILTED, A + TILTED
    starts = 0.4 * rng.normal(size=(config.starts, MODES, MODES))
    quartic = [(B, Sigma, 1.0, width) for width in WIDTHS]
    forms = [collapse.landau_minimum(B, S, width, q) for B, S, q, width in quartic]
    exact = [(A, C, attraction, width) for C, attraction, width in CASES.values()]
    encoders = [collapse.infonce_encoder(A, C, width, number) for _, C, number, width in exact]
    near = [c * np.eye(MODES) for c in VARIANCES[1] * (1 - NEAR[REACHED])]
    sides = {
        "quartic": (collapse.landau_loss, quartic, [(A - C, A + C, 1.0, MODES) for C in near]),
        "two": (collapse.infonce_loss, exact, [(A, C, 2.0, MODES) for C in near]),
    }
    ends, roots = [], {}
    for name, (loss, cases, close) in sides.items():
        found = jax.device_get(_descended(loss, _lanes(cases, close), starts))
        ends.append([each[: len(cases)] for each in found])
        # The second mode, as the augmentation is isotropic and the first varies more.
        second = np.linalg.svd(found[1][len(cases) :], compute_uv=False)[..., 1]
        roots[name] = ("reached start", second)
    path = jax.device_get(_flowed(0.25 * starts[0], B, Sigma))
    require_ok("flow", path)
    end = np.asarray(forms[-1].W).T @ np.asarray(forms[-1].W)
    return {
        "quartic": _against("width", forms, ends[0]),
        "exact": _against("case", encoders, ends[1]),
        "near": roots,
        "flow": ("time", np.abs(np.swapaxes(path.ys, -1, -2) @ path.ys - end).max(axis=(-2, -1))),
    }


@jax.jit
def _flowed(start: Array, B: Array, Sigma: Array):
    """Gradient flow of the quartic form."""
    field = gradient_flow(lambda W: collapse.landau_loss(W, B, Sigma, 1.0))
    return integrate(field, start, jnp.linspace(0.0, 40.0, 21), **SOLVE)


# What is drawn.


@partial(jax.jit, static_argnames="size")
def _drawn(key: Array, size: int, variance: Array | float) -> Views:
    """Two views each of new examples."""
    data, noise = jax.random.split(key)
    return two_views(noise, normal(data, (size, MODES)) * jnp.sqrt(jnp.asarray(VARIANCES))[None], variance)


@partial(jax.jit, static_argnames=("batch", "steps"))
def _trained(batch: int, steps: int, lanes: tuple[Array, Array, Array], keys: Array):
    """Encoders along training on the loss of drawn batches, in every lane."""
    predict, params = as_function(Encoder([jnp.zeros((MODES, MODES))]))

    def one(variance, attraction, rate, key):
        loss = on_views(Partial(infonce, attraction=attraction), predict)
        start, draws = jax.random.split(key)
        decay = optax.cosine_decay_schedule(1.0, steps)
        optimizer = optax.sgd(lambda step: rate * decay(step), momentum=MOMENTUM)
        return train(
            loss,
            jax.tree.map(lambda leaf: 0.3 * normal(start, leaf.shape), params),
            optimizer,
            steps=steps,
            observe=lambda params: weights(params)[0],
            every=steps // 10,
            batches=lambda key: _drawn(key, batch, variance),
            key=draws,
        )[1]

    return jax.vmap(one)(*lanes, keys)


def _encoders(rng: np.random.Generator) -> tuple[Callable, list]:
    """A function and the parameters of two encoders of one shape: a linear one, and one with ReLU.

    As relu(h) - relu(-h) = h, pairs of hidden units make a linear network. Its map has tr(W A W^T) = 1.
    """
    W = rng.normal(size=(MODES, MODES))
    W = W / np.sqrt(np.trace(W @ A @ W.T))
    pairs = np.concatenate([np.eye(MODES), -np.eye(MODES)])
    networks = (
        (pairs, np.concatenate([W, -W], axis=1)),
        (rng.normal(size=(2 * MODES, MODES)), 0.2 * rng.normal(size=(MODES, 2 * MODES))),
    )
    found = [as_function(Encoder(matrices)) for matrices in networks]
    return found[0][0], [params for _, params in found]


# All take the weight of the attraction, which means nothing to the third.
FAMILY: dict[str, Callable[..., Array]] = {
    "InfoNCE": infonce,
    "InfoNCE, inner products": partial(infonce, similarity="inner"),
    "spectral contrastive": lambda first, second, attraction=1.0: spectral_contrastive(first, second),
    "soft triplet": soft_triplet,
}
DISTANCES = ("InfoNCE", "soft triplet")  # those that see the augmentation
POSITIVE = partial(infonce, positive=True)
COSINE = partial(infonce, similarity="cosine", temperature=0.5)
ATTRACTIONS = (1.0, 2.0)


@partial(jax.jit, static_argnames=("loss", "order"))
def _series(loss: Callable, order: int, predict, params, batches: Views):
    """Taylor coefficients of a loss along the rescaling of an encoder: means over batches, and their errors.

    For every encoder and attraction.
    """

    def of_batch(views):
        def along(params, attraction, a):
            of = on_views(Partial(loss, attraction=attraction), predict)
            return of(scale_embedding(params, a), views)

        def coefficients(params, attraction):
            return collapse.taylor_coefficients(partial(along, params, attraction), 1.0, order)

        return jax.vmap(jax.vmap(coefficients, (None, 0)), (0, None))(params, jnp.asarray(ATTRACTIONS))

    found = jax.lax.map(of_batch, batches)
    return jnp.mean(found, axis=0), jnp.std(found, axis=0) / len(found) ** 0.5


def _expected(params, size: int, variance: float) -> np.ndarray:
    """Second and fourth coefficients of the family for a linear encoder: (loss, attraction, 2)."""
    first, second = (np.asarray(matrix) for matrix in weights(params))
    W = second @ np.maximum(first, 0)  # its columns are the images of unit vectors
    data, noise = W @ A @ W.T, variance * W @ W.T
    T, kept = data + noise, (size - 2) / (size - 1)  # what is left of a variance over size - 1 others
    square, rows = np.trace(T @ T), []
    for attraction in ATTRACTIONS:
        B = np.trace(data - (attraction - 1) * noise)
        mean = attraction * np.trace(noise) - np.trace(T)
        triplet = mean**2 + (2 * attraction**2 - attraction) * np.trace(noise @ noise) + 2 * square
        rows.append(
            [
                (-B, 0.75 * square * kept),
                (-attraction * np.trace(data), square / 2 * kept),
                (-2 * np.trace(data), square),
                (-B / 2, triplet / 8),
            ]
        )
    return np.swapaxes(np.asarray(rows), 0, 1)


@jax.jit
def _along_ray(predict, params, views: Views, key: Array):
    """Losses of one batch along a ray, and with all embeddings rotated, before and after."""
    rotation, _ = jnp.linalg.qr(normal(key, (MODES, MODES)))

    def embeddings(view):
        scaled = jax.vmap(lambda a: predict(scale_embedding(params, a), view))(RAY)
        return jnp.concatenate([scaled, scaled[-1:] @ rotation])

    pairs = [embeddings(view) for view in views]
    return jnp.stack([jax.vmap(loss)(*pairs) for loss in (*FAMILY.values(), COSINE)])


@jax.jit
def _sampled(W: Array, attraction: Array, keys: Array):
    """The loss of large batches at a given encoder, and its mean over Gaussian data in closed form."""
    predict, params = as_function(Encoder([W]))
    loss = on_views(Partial(infonce, attraction=attraction), predict)
    drawn = jax.lax.map(lambda key: loss(params, _drawn(key, LARGE_BATCH, LIGHT)), keys)
    return drawn, collapse.infonce_loss(W, A, LIGHT * np.eye(MODES), attraction)


def _drawn_series(config: Config, rng: np.random.Generator, keys: Array) -> dict:
    """Series of the losses, and those of InfoNCE whose denominator has the positive, over the batch."""
    predict, (linear, relu) = _encoders(rng)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), linear, relu)
    views, strong = (
        jax.device_get(_drawn(key, SERIES_BATCH * config.draws, variance))
        for key, variance in ((keys[0], LIGHT), (jax.random.fold_in(keys[0], 1), STRONG))
    )

    def batches(size, views=views):
        return Views(*(view.reshape(-1, size, MODES) for view in views))

    def side_by_side(found):
        return (np.stack(each) for each in zip(*jax.device_get(found), strict=True))

    mean, error = side_by_side(
        [_series(loss, ORDER, predict, both, batches(SERIES_BATCH)) for loss in FAMILY.values()]
    )
    above, around = side_by_side(
        [_series(FAMILY[name], ORDER, predict, both, batches(SERIES_BATCH, strong)) for name in DISTANCES]
    )
    rows = [list(FAMILY).index(name) for name in DISTANCES]
    finite, errors = side_by_side([_series(POSITIVE, 2, predict, both, batches(size)) for size in FINITE])
    first = jax.tree.map(lambda view: view[0], batches(SERIES_BATCH))
    along = np.asarray(_along_ray(predict, linear, first, keys[1]))
    return {
        "mean": ("loss encoder attraction order", mean),
        "error": ("loss encoder attraction order", error),
        "expected": ("loss attraction even", _expected(linear, SERIES_BATCH, LIGHT)),
        "strong": {
            "mean": ("distances encoder attraction order", above),
            "error": ("distances encoder attraction order", around),
            "expected": ("distances attraction even", _expected(linear, SERIES_BATCH, STRONG)[rows]),
        },
        "inside": _inside(linear, views),
        "finite": ("finite", np.asarray(FINITE)),
        "second": ("finite", finite[:, 0, 0, 2]),
        "second_error": ("finite", errors[:, 0, 0, 2]),
        "ray": ("ray", RAY),
        "along": ("rescaled ray", along[:, :-1]),
        "rotated": ("rescaled", along[:, -1]),
    }


def _inside(params, views: Views) -> tuple[str, np.ndarray]:
    """The quartic coefficient with the mean over x inside of the logarithm, and its error, over tr(T^2).

    It is half the variance of distances over all pairs, as the slide's is half their variance for one x.
    """
    first, second = (np.asarray(matrix) for matrix in weights(params))
    W = second @ np.maximum(first, 0)
    f, g = (view.reshape(-1, SERIES_BATCH, MODES) @ W.T for view in views)
    norms = [np.sum(each**2, axis=-1) / 2 for each in (f, g)]
    distances = norms[0][:, :, None] + norms[1][:, None] - f @ np.swapaxes(g, 1, 2)
    distances = distances[:, ~np.eye(SERIES_BATCH, dtype=bool)]
    halves = np.mean((distances - distances.mean()) ** 2, axis=1) / 2
    T = W @ (A + LIGHT * np.eye(MODES)) @ W.T
    return "moment", np.array([halves.mean(), halves.std() / len(halves) ** 0.5]) / np.trace(T @ T)


def run(config: Config, context: Context) -> dict:
    """Minima over the strength of augmentation, what finds them, trained encoders, and series of losses."""
    context.progress("minima", 0.0)
    keys = jax.random.split(jax.random.key(context.seed), (4, 2))
    rng = np.random.default_rng(context.seed)
    grid = np.linspace(0.05, 1.8, config.points)
    lanes = {"grid": grid, "near": VARIANCES[1] * (1 - NEAR), "trained": config.strengths, "free": [0.0]}
    modes = named_groups(_modes, {name: list(values) for name, values in lanes.items()})
    near = {name: ("near", modes["near"][name][:, 1]) for name in ("quartic", "two")}
    context.progress("descent and flow", 0.1)
    minima = _minima(config, rng)
    context.progress("series", 0.4)
    series = _drawn_series(config, rng, keys[0])
    context.progress("training", 0.7)
    return {
        "strength": ("strength", grid),
        "theory": _by_name(modes["grid"], "strength"),
        "distance": ("near", NEAR * VARIANCES[1]),
        "near": near,
        "width": ("width", np.asarray(WIDTHS)),
        "minima": minima,
        "series": series,
        "sampled": _large_batches(keys[1]),
        **_training(config, modes, keys[2:]),
    }


def _by_name(modes: Mapping[str, np.ndarray], dim: str) -> dict:
    return {name: (f"{dim} mode", values) for name, values in modes.items()}


def _large_batches(keys: Array) -> dict:
    """The slide's loss of large batches, with either attraction, and its exact mean, at one encoder."""
    W = collapse.infonce_encoder(A, LIGHT * np.eye(MODES), MODES, 2.0).W
    pairs = zip(ATTRACTIONS, keys, strict=True)
    found = [
        jax.device_get(_sampled(W, np.asarray(at), jax.random.split(key, LARGE_DRAWS))) for at, key in pairs
    ]
    drawn, exact = (np.stack(each) for each in zip(*found, strict=True))
    return {"drawn": ("attraction draw", drawn), "exact": ("attraction", exact)}


def _training(config: Config, modes: dict, keys: Array) -> dict:
    """Trained encoders at every strength and attraction, without augmentation, and in smaller batches."""
    strengths, count = np.asarray(config.strengths), len(config.strengths)
    variances = np.concatenate([strengths, strengths, [0.0]])
    attractions = np.repeat([2.0, 1.0, 1.0], [count, count, 1])
    large = _roots(config.batch, config.steps, variances, attractions, keys[0, 0])
    small = _roots(config.batch // 2, config.steps, np.full(4, LIGHT), np.ones(4), keys[1, 0])
    at = config.strengths.index(LIGHT)
    gaps = [ends / modes["trained"]["one"][at] - 1 for ends in (small[:, -1], large[count + at, -1])]
    return {
        "trained_at": ("trained_at", strengths),
        "expected": _by_name(
            {name: modes["trained"][name] for name in ("quartic", "two", "one")}, "trained_at"
        ),
        "trained": _by_name({"two": large[:count, -1], "one": large[count : 2 * count, -1]}, "trained_at"),
        "size": ("size", np.array([config.batch // 2, config.batch])),
        "size_gap": ("size", np.array([abs(np.mean(gap)) for gap in gaps])),
        "free": {
            **{name: ("mode", modes["free"][name][0]) for name in ("quartic", "one")},
            "trained": ("step mode", large[-1]),
        },
    }


def _roots(batch: int, steps: int, variances: np.ndarray, attractions: np.ndarray, key: Array) -> np.ndarray:
    """Roots of the eigenvalues of W W^T along training, (lane, time, mode)."""
    keys = jax.random.split(key, len(variances))
    # Without augmentation weights grow exponentially.
    rates = np.where(variances > 0, RATE, RATE / 10)
    paths = jax.device_get(_trained(batch, steps, (variances, attractions, rates), keys))
    require_ok("training", paths)
    return np.linalg.svd(paths.ys, compute_uv=False)


# What is claimed of it.

Z = 4.0  # standard errors that a mean of many draws is off by at most
DRAWS = f"{Z:g} standard errors of the draws"


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The expansion of the slide's loss, which modes collapse, and that trained encoders follow."""
    yield from _expansion(saved)
    yield from _family(saved)
    yield from _closed_forms(saved)
    yield _square_root(saved)
    yield _no_augmentation(saved)
    yield _attraction(saved)
    yield _rank(saved)
    yield _trained_roots(config, saved)


def _errors(mean: np.ndarray, error: np.ndarray, expected: np.ndarray) -> float:
    """By how many standard errors means are off at most."""
    return largest((np.asarray(mean) - expected) / np.asarray(error))


def _expansion(saved: Saved) -> Iterator[Claim]:
    part = saved["series"]
    mean, error = part["mean"][0, 0, 0, ORDER], part["error"][0, 0, 0, ORDER]
    # The expected coefficient is 3/4 of what the slide has.
    share = 0.75 / part["expected"][0, 0, 1]
    label = "coefficient of tr(T^2) in series of the slide's loss"
    yield corrected(
        "coefficient",
        "To fourth order InfoNCE is -tr(W B W^T) + (3/4) tr(T^2); the slide has 1 for 3/4, which is right "
        "where the mean over x stands inside of the logarithm",
        INFONCE,
        printed=[equals(label, share * mean, 1.0, Z * share * error, why=DRAWS)],
        mended=[
            equals(label, share * mean, 0.75, Z * share * error, why=DRAWS),
            equals(
                "half the variance of distances over all pairs, over tr(T^2)",
                part["inside"][0],
                1.0,
                Z * part["inside"][1],
                why=DRAWS,
            ),
        ],
    )
    drawn, exact = np.asarray(saved["sampled/drawn"]), np.asarray(saved["sampled/exact"])
    error = drawn.std(axis=1) / LARGE_DRAWS**0.5
    yield stated(
        "sampled",
        "On Gaussian data the mean of the slide's loss is the exact one, for attraction 1 and 2",
        f"{INFONCE} (its expectation is derived here)",
        at_most(
            "standard errors between them, most", _errors(drawn.mean(axis=1), error, exact), Z, why=DRAWS
        ),
        at_most("standard error, most", largest(error), 0.02, why="a batch has a thousand examples"),
    )
    second, error = np.asarray(part["second"]), np.asarray(part["second_error"])
    yield stated(
        "finite-batch",
        "Where the positive is in the denominator, N examples in a batch make the quadratic part smaller by "
        "the factor 1 - 1/N",
        f"{INFONCE} (finite batches are derived here)",
        at_most(
            f"N = {', '.join(map(str, FINITE))}: standard errors off, most",
            _errors(second, error, -(1 - 1 / np.asarray(FINITE))),
            Z,
            why=DRAWS,
        ),
        at_least(
            f"N = {FINITE[-2]}: standard errors from the coefficient without that factor",
            (1 + second[-2]) / error[-2],
            3 * Z,
            why="a quarter of it is missing",
        ),
    )


def _family(saved: Saved) -> Iterator[Claim]:
    part = saved["series"]
    mean, error = np.asarray(part["mean"]), np.asarray(part["error"])
    along = np.asarray(part["along"])
    spread = np.ptp(along, axis=1)
    even = mean[..., [2, 4]], error[..., [2, 4]]
    # With attraction 2, the second in order.
    above, around = (np.asarray(saved[f"series/strong/{name}"])[:, :, 1, 2] for name in ("mean", "error"))
    yield stated(
        "rotation",
        "Rotating all embeddings changes no contrastive loss",
        INFONCE,
        at_most("change, most", largest(part["rotated"] - along[:, -1]), 1e-13, why=ROUNDING),
    )
    yield qualified(
        "family",
        "Odd orders vanish, the second is below zero and the fourth above: so it is for almost all "
        "contrastive losses",
        INFONCE,
        condition="embeddings are not normalized and augmentation is weak: tr(W B W^T) > 0, "
        "B = A - (attraction - 1) C for losses of distances and A for others",
        inside=[
            at_most(
                "InfoNCE of distances or inner products, spectral contrastive, soft triplet: odd orders",
                largest(mean[..., 1::2]),
                1e-13,
                why=ROUNDING,
            ),
            every(
                f"linear encoder and one with ReLU: second orders below zero by {Z:g} standard errors",
                even[0][:, :, 0, 0] < -Z * even[1][:, :, 0, 0],
            ),
            every("and fourth orders above", even[0][:, :, 0, 1] > Z * even[1][:, :, 0, 1]),
            at_most(
                "linear encoder: standard errors between these and their expectations, most",
                _errors(even[0][:, 0], even[1][:, 0], np.asarray(part["expected"])),
                Z,
                why=DRAWS,
            ),
            at_least("the least that these losses change along a ray", np.min(spread[:-1]), 0.1, why="signs"),
        ],
        outside=[
            at_most("InfoNCE of cosines: change along a ray", spread[-1], 2e-15, why="size is forgotten"),
            every(
                f"InfoNCE of distances and soft triplet, sigma^2 = {STRONG:g}, attraction 2: second orders "
                f"of either encoder above zero by {Z:g} standard errors",
                above > Z * around,
            ),
            at_most(
                "linear encoder: standard errors between these and -tr(W B W^T), or half of it, most",
                _errors(above[:, 0], around[:, 0], np.asarray(saved["series/strong/expected"])[:, 1, 0]),
                Z,
                why=DRAWS,
            ),
        ],
    )


def _closed_forms(saved: Saved) -> Iterator[Claim]:
    quartic, exact = saved["minima/quartic"], saved["minima/exact"]
    rest = "descent has come to rest"
    ranks = np.minimum(WIDTHS, 2)
    excess = np.asarray(quartic["loss"]) - np.asarray(quartic["least"])[:, None]
    yield stated(
        "quartic",
        "The quartic form has its minimum at the positive part of Sigma^(-1/2) B Sigma^(-1/2), of rank "
        "min(width, positive eigenvalues of B), also where C and A do not commute",
        f"{MINIMA} (general B, Sigma and width are derived here)",
        at_most("64 starts or more: loss of each, less the closed form", largest(excess), 8e-16, why=rest),
        at_most("W^T W, less the closed form", largest(quartic["gap"]), 3e-15, why=rest),
        every(
            "encoders of 1, 2 and 4 rows with their rank: 1, 2, 2",
            np.asarray(quartic["rank"]) == ranks[:, None],
        ),
    )
    yield stated(
        "flow",
        "The gradient flow of the quartic form ends there",
        f"{MINIMA} (general B, Sigma and width are derived here)",
        at_most(
            "W^T W at time 40, less the closed form",
            saved["minima/flow"][-1],
            1e-11,
            why="the solver's error alone",
        ),
        at_least("and at the start", saved["minima/flow"][0], 0.1, why="the flow starts close to zero"),
    )
    excess = np.asarray(exact["loss"]) - np.asarray(exact["least"])[:, None]
    yield stated(
        "exact",
        "The exact loss has its minimum mode by mode at (1/q - 1) / (a + c), "
        "q = ((1 + 8 rho)^(1/2) - 1) / 2, rho = attraction c / (a + c)",
        f"{MINIMA} (the exact form is derived here)",
        at_most("64 starts or more: loss of each, less the closed form", largest(excess), 6e-15, why=rest),
        at_most("W^T W, less the closed form", largest(exact["gap"]), 3e-14, why=rest),
        every(
            "isotropic and tilted augmentation, four rows or two: ranks of 4, 4, 2 and 2",
            np.asarray(exact["rank"]) == np.array([4, 4, 2, 2])[:, None],
        ),
    )


def _square_root(saved: Saved) -> Claim:
    distance = np.asarray(saved["distance"])[REACHED]
    near = {name: np.asarray(saved[f"minima/near/{name}"]) for name in ("quartic", "two")}
    order = {name: convergence_order(distance, roots.mean(axis=1)).slope for name, roots in near.items()}
    scale = {name: roots[-1].mean() / distance[-1] ** 0.5 for name, roots in near.items()}
    gaps = [roots / np.asarray(saved["near"][name])[REACHED, None] - 1 for name, roots in near.items()]
    at = list(saved["trained_at"]).index(LIGHT)
    far = (VARIANCES[1] - LIGHT) ** 0.5
    half, close = "the next order is half of the distance", "the next order is the distance at most"
    return qualified(
        "square-root",
        "The root of an eigenvalue of W W^T is proportional to (a - sigma^2)^(1/2)",
        MINIMA,
        condition="close to the threshold, for B = A - C",
        inside=[
            slope("descent on the quartic form, a = 1: exponent", order["quartic"], 0.5, 0.01, why=half),
            slope("on the exact loss with attraction 2: exponent", order["two"], 0.5, 0.01, why=half),
            equals(
                f"quartic form, a - sigma^2 = {distance[-1]:.2g}: factor over 1 / 8^(1/2)",
                scale["quartic"] * 8**0.5,
                1.0,
                distance[-1],
                why=close,
            ),
            equals(
                "exact loss: factor over 1 / 6^(1/2)", scale["two"] * 6**0.5, 1.0, distance[-1], why=close
            ),
            at_most(
                f"{near['two'].shape[1]} starts each: root over the closed form, less one, most",
                largest(gaps),
                3e-5,
                why="descent has all but come to rest",
            ),
        ],
        outside=[
            at_least(
                f"quartic form, sigma^2 = {LIGHT:g}: its factor over that",
                saved["expected/quartic"][at, 1] / far * 8**0.5,
                1.5,
                why="8^(1/2) / (2^(1/2) (a + sigma^2)) is 1.67",
            ),
            at_least(
                f"trained with attraction 2 at {LIGHT:g}: its factor over that of the exact loss",
                saved["trained/two"][at, 1] / far * 6**0.5,
                2.0,
                why="without augmentation it tends to infinity",
            ),
        ],
    )


def _no_augmentation(saved: Saved) -> Claim:
    free = saved["free"]
    grows = np.diff(np.asarray(free["trained"])[:, -1]) > 0
    return stated(
        "no-augmentation",
        "Without augmentation the loss has no finite minimum, though its quartic form has one",
        f"{MINIMA} (the exact form is derived here)",
        every("modes of the exact loss at infinity", np.isposinf(np.asarray(free["one"]))),
        every(
            "modes of the quartic form that are finite, and not zero",
            np.isfinite(np.asarray(free["quartic"])) & (np.asarray(free["quartic"]) > DEAD),
        ),
        every("tenths of training in which the least root of an encoder grows", grows),
        at_least(
            "the least root in the end", free["trained"][-1, -1], 500, why="with weak augmentation it is 1.3"
        ),
    )


def _attraction(saved: Saved) -> Claim:
    strengths, expected = np.asarray(saved["trained_at"]), saved["expected"]
    two, one = np.asarray(saved["trained/two"]), np.asarray(saved["trained/one"])
    alive = two > DEAD
    above = VARIANCES[None] > strengths[:, None]
    strongest = np.argmax(strengths)
    second, error, both = (saved["series"][name][0] for name in ("mean", "error", "expected"))
    second, error, both = second[0, :, 2], error[0, :, 2], both[:, 0]
    return corrected(
        "attraction",
        "With isotropic augmentation a mode collapses where its variance is at most sigma^2 for an "
        "attraction of 2, where B = A - C; with the slide's loss B = A, and none does",
        MINIMA,
        printed=[
            at_most(
                f"the slide's loss, sigma^2 = {strengths[strongest]:g}: largest root",
                np.max(one[strongest]),
                DEAD,
                why="it would have collapsed",
            ),
            equals(
                "the slide's loss: second order in series over -tr(W (A - C) W^T)",
                second[0] / both[1],
                1.0,
                Z * abs(error[0] / both[1]),
                why=DRAWS,
            ),
        ],
        mended=[
            every("attraction 2: modes that are alive where a > sigma^2, and not else", alive == above),
            at_most(
                "attraction 1 and 2: standard errors of second orders from -tr(W B W^T), most",
                _errors(second, error, both),
                Z,
                why=DRAWS,
            ),
            at_least(
                "the slide's loss: least root over that of theory",
                np.min(one / np.asarray(expected["one"])),
                0.85,
                why="draws and batches move it by a tenth",
            ),
        ],
    )


def _rank(saved: Saved) -> Claim:
    strengths = np.asarray(saved["trained_at"])
    one = np.asarray(saved["trained/one"])
    rank = np.sum(np.asarray(saved["trained/two"])[np.argsort(strengths)] > DEAD, axis=1)
    exact = "counts are exact"
    return qualified(
        "rank",
        "Stronger augmentation leaves a linear map of lower rank",
        "ziyin2022talk, slides on dimensional collapse",
        condition="the weight of the attraction is above 1, such as 2",
        inside=[
            every("attraction 2: strengths where no mode comes back", np.diff(rank) <= 0),
            equals("modes at the weakest", rank[0], MODES, why=exact),
            equals("modes at the strongest", rank[-1], 0, why=exact),
        ],
        outside=[
            every(
                f"attraction 1: strengths up to {np.max(strengths):g} where all modes are alive",
                np.all(one > DEAD, axis=1),
            ),
        ],
    )


def _trained_roots(config: Config, saved: Saved) -> Claim:
    strengths, expected = np.asarray(saved["trained_at"]), saved["expected"]
    two, one = np.asarray(saved["trained/two"]), np.asarray(saved["trained/one"])
    weakest = list(strengths).index(LIGHT)
    total = VARIANCES[None] + strengths[:, None]
    logs = [
        np.log1p(total * np.square(found)) - np.log1p(total * np.square(expected[name]))
        for name, found in (("two", two), ("one", one))
    ]
    return stated(
        "trained",
        "Encoders that descend on batches of drawn pairs end at the minimum of the exact loss, with an error "
        "that falls as batches grow",
        f"{MINIMA} (the exact form is derived here)",
        at_most(
            "log(1 + T), T the variance of a mode of the embeddings, less that of theory: most",
            largest(logs),
            12 / config.batch + 0.02,
            why="a finite batch moves it by up to 11 over its size, and 0.02 is what draws leave",
        ),
        at_most(
            f"the slide's loss, sigma^2 = {LIGHT:g}: exponent of the error in the batch",
            convergence_order(saved["size"], saved["size_gap"]).slope,
            -0.7,
            why="the leading order is -1; the next one makes small batches steeper",
        ),
        at_least(
            f"sigma^2 = {LIGHT:g}: roots over those of the quartic form, least",
            np.min(two[weakest] / np.asarray(expected["quartic"])[weakest]),
            1.2,
            why="so far from the threshold the quartic form is off by up to 2",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Order parameters over the strength of augmentation, losses along a ray, and batches."""
    drawn, ((quartic, two, one), (ray, root, batch)) = plotting.new_figure(2, 3, width=4.2, height=3.4)
    _modes_panel(quartic, saved, "quartic", "Quartic form, B = A − C")
    _modes_panel(two, saved, "two", "InfoNCE, attraction 2")
    _modes_panel(one, saved, "one", "InfoNCE of the slide, attraction 1")
    at, along = np.asarray(saved["series/ray"]), np.asarray(saved["series/along"])
    middle = len(at) // 2
    for index, name in enumerate((*FAMILY, "InfoNCE, cosines")):
        well = along[index] - along[index, middle]
        depth = 1 if name.endswith("cosines") else -np.min(well)
        ray.plot(at, well / depth, color=f"C{index}", label=name)
    ray.set_ylim(-1.2, 2.4)
    plotting.finish(ray, "Losses along W → aW", "a", "(loss − that at 0) / depth", "upper center")
    distance, near = np.asarray(saved["distance"]), saved["near"]
    for index, (name, label) in enumerate({"quartic": "quartic form", "two": "exact loss"}.items()):
        ends = np.asarray(saved[f"minima/near/{name}"]).mean(axis=1)
        root.loglog(distance, near[name], color=f"C{index}", linewidth=1.2)
        root.plot(distance[REACHED], ends, "os"[index], color=f"C{index}", label=f"descended, {label}")
        factor = 8**-0.5 if name == "quartic" else 6**-0.5
        root.plot(distance, factor * distance**0.5, **plotting.THEORY)
    root.plot([], [], label="√(a − σ²) / √8, / √6", **plotting.THEORY)
    plotting.finish(root, "Close to the threshold", "a − σ², a = 1", "√λ", "upper left")
    sizes = np.geomspace(FINITE[0], FINITE[-1], 50)
    batch.plot(sizes, 1 - 1 / sizes, label="1 − 1/N", **plotting.THEORY)
    measured, error = -np.asarray(saved["series/second"]), np.asarray(saved["series/second_error"])
    batch.errorbar(saved["series/finite"], measured, 2 * error, fmt="o", label="measured ± 2 s.e.")
    batch.set_xscale("log")
    plotting.label_ticks(batch, saved["series/finite"])
    plotting.finish(
        batch,
        "Positive in the denominator",
        "examples N in a batch",
        "second order / −tr(WAWᵀ)",
        "lower right",
    )
    return drawn


def _modes_panel(ax: Axes, saved: Saved, name: str, title: str) -> None:
    """Roots of the eigenvalues over the strength, with those of trained encoders where there are some."""
    strength, values = np.asarray(saved["strength"]), np.asarray(saved[f"theory/{name}"])
    for index, variance in enumerate(VARIANCES):
        color = f"C{index}"
        ax.plot(strength, values[:, index], color=color, label=f"a = {variance:g}")
        if name != "two":
            ax.plot(strength, saved["theory/series"][:, index], "--", color=color, linewidth=0.9)
        if name == "quartic":
            below = strength[strength <= variance]
            ax.plot(below, np.sqrt((variance - below) / 8) / variance, **plotting.PRINTED)
        else:
            ax.plot(saved["trained_at"], saved[f"trained/{name}"][:, index], "o", color=color, ms=5)
    if name == "quartic":
        ax.plot([], [], label="√(a − σ²) / (√8 a)", **plotting.PRINTED)
    else:
        ax.plot([], [], "o", color="0.3", ms=5, label="trained")
    if name != "two":
        ax.plot([], [], "--", color="0.3", linewidth=0.9, label="B = A, factor 3/4")
    plotting.finish(ax, title, "σ², variance of the augmentation", "√λ, λ of WWᵀ", "upper right")
    ax.set_ylim(-0.04, None)
