"""Landscapes of trained networks along a rescaling of weights: what the curvature at zero tells of collapse.

Networks are trained on images of digits, zeros and ones, in the phase in which they do not collapse, and
their last layer, W -> a W, or its two rows, by r_1 and r_2, are rescaled. For an encoder f under InfoNCE
without normalization, with a weight `attraction`, the second derivative at zero along a row is

    2 (attraction c - a - c) = -2 (a - (attraction - 1) c)

where a is the variance of the row's outputs between images and c that between augmentations of one image.
A linear encoder has a row for each of the two largest eigenvalues of the covariance of images. So stronger
augmentation makes zero stable in none, one or both of two directions, and networks are trained at every
strength, from random weights and from those of the weakest one, to see what is left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import collapse
from dynamics.collapse import VaeWeights
from models.collapse import StochasticLinear, noisy_batch, random_weights, weights
from models.data.images import digits
from models.draws import normal
from models.functional import as_function
from models.losses import mean_squared_error
from models.self_supervised import (
    ConvEncoder,
    Encoder,
    Views,
    batch_of_views,
    infonce,
    on_views,
    scale_embedding,
    two_views,
)
from models.training import map_lanes, train
from models.vae import LinearVae, VaeInputs, negative_elbo, vae_batch
from sims import plotting
from sims.claims import Check, Claim, Preset, at_least, at_most, equals, every, qualified, stated
from sims.compare import largest
from sims.ranges import Count, Positive, Range, check_ranges
from sims.results import Context, Saved

NONLINEAR = "ziyin2022talk, slides on landscapes of nonlinear networks"
AUTOENCODER = "ziyin2022talk, slide on the landscape of a trained autoencoder"
WEAK, MEDIUM, STRONG = SHOWN = (0.2, 1.2, 2.5)  # variances of augmentation, and weights of the prior
MIXED = "modes are mixed, or variances are those of another beta"
NEAR = 1.6  # below the strength at which all of zero becomes stable
ENCODERS = ("linear", "ReLU", "conv.")
ATTRACTION, PLAIN = 2.0, 1.0  # weights of the attraction; the slide has the second
ALIVE = 1e-2  # variances of embeddings below are nothing to a loss whose distances are of order one
STEP = 0.02  # of second differences, in units of trained weights
REACH = 1.5  # of landscapes, in these units
COPIES = 4  # augmentations of each image for second differences
SHARES, DROPOUT = (0.3, 0.9, 1.2), 0.5  # of supervised networks: gamma over |E[x y]|, variance of the noise
HIDDEN = 4  # of these
RATE = 0.03  # the largest learning rate of encoders


@dataclass(frozen=True)
class Config:
    """Which strengths there are, how long networks are trained, and how fine landscapes are drawn."""

    between: tuple[Positive, ...] = ()
    """Variances of augmentation besides 0.2, 1.2, 1.6 and 2.5."""
    steps: Annotated[int, Range(at_least=100)] = 600
    """Steps of each training."""
    batch: Annotated[int, Range(at_least=16)] = 64
    """Images in a batch."""
    grid: Annotated[int, Range(at_least=5)] = 13
    """Points of a landscape along each direction, in a quadrant."""
    hidden: Count = 32
    """Hidden units of the ReLU encoder."""

    def __post_init__(self):
        check_ranges(self)
        if not all(WEAK < strength < STRONG for strength in self.between):
            raise ValueError(f"between must lie between {WEAK} and {STRONG}, got {self.between}")

    @property
    def strengths(self) -> tuple[float, ...]:
        """All variances of augmentation, ascending."""
        return tuple(sorted({*SHOWN, NEAR, *self.between}))


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": Config(between=(0.4, 0.6, 0.85, 2.2), steps=1200, grid=21),
    "paper": Config((0.3, 0.4, 0.5, 0.6, 0.85, 1.0, 1.4, 2.2), 10_000, 256, 31),
}


def _images() -> tuple[np.ndarray, np.ndarray]:
    """Images of zeros and ones without their mean, (n, 8, 8), and their classes as centered signs (n, 1)."""
    images, labels = (np.asarray(part) for part in digits())
    images, signs = images[labels < 2], np.where(labels[labels < 2] == 1, 1.0, -1.0)
    return images - images.mean(axis=0), (signs - signs.mean())[:, None]


def _encoder(name: str, config: Config, key: Array) -> nnx.Module:
    if name == "conv.":
        return ConvEncoder(key, (8, 8), 2, channels=(4, 8))
    sizes = (64, 2) if name == "linear" else (64, config.hidden, 2)
    drawn = random_weights(key, sizes, 1.0)
    return Encoder([W / W.shape[1] ** 0.5 for W in drawn])


def _built(network: Callable[[Array], nnx.Module], key: Array) -> tuple[Any, PyTree]:
    """A network as a function, and its parameters, which one program draws."""
    return jax.jit(lambda key: as_function(network(key)))(key)


def _contrast(predict: Partial, attraction: Array | float) -> Partial:
    """InfoNCE of an encoder's parameters and views."""
    return on_views(partial(infonce, attraction=attraction), predict)


def _covariances(predict: Partial, params: PyTree, views: Views) -> tuple[Array, Array]:
    """Covariances (2, 2) of embeddings: of all of them, and between images."""
    embedded = (predict(params, view) for view in views)
    first, second = (part - jnp.mean(part, axis=0, keepdims=True) for part in embedded)
    count = len(first)
    across = first.T @ second / count
    return (first.T @ first + second.T @ second) / (2 * count), (across + across.T) / 2


@partial(jax.jit, static_argnames=("steps", "batch"))
def _encoder_trained(steps, batch, predict, images, key, start, variance, attraction):
    """An encoder that is trained on drawn augmentations, its loss, and the variances of its embeddings."""
    training, few, many = jax.random.split(key, 3)
    # Large steps in noise of many directions would keep alive what collapses.
    rate = optax.cosine_decay_schedule(RATE, steps, 0.03)
    last, path = train(
        _contrast(predict, attraction),
        start,
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9)),
        steps=steps,
        every=steps,
        observe=lambda params: jnp.zeros(()),
        batches=lambda key: batch_of_views(key, images, batch, variance),
        key=training,
    )
    copies = jnp.concatenate([images] * COPIES)
    every_one, _ = _covariances(predict, last, two_views(many, copies, variance))
    loss = _contrast(predict, attraction)(last, two_views(few, images, variance))
    return last, path.ok, {"loss": loss, "spread": jnp.linalg.eigvalsh(every_one)[::-1]}


@jax.jit
def _turned(predict, params, images, key):
    """An encoder whose rows are turned to the axes of its embeddings; no loss of distances sees that."""
    every_one, between = _covariances(predict, params, two_views(key, images, MEDIUM))
    _, axes = jnp.linalg.eigh(2 * between - every_one)
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten([*leaves[:-1], leaves[-1] @ axes[:, ::-1]])


@jax.jit
def _second_differences(predict, params, images, key, lanes):
    """Those of the loss at zero along one row in each lane, (lane,), of encoders that are stacked."""
    many = jnp.concatenate([images] * COPIES)

    def along(lane):
        which, variance, attraction, direction = lane
        views, own = two_views(key, many, variance), jax.tree.map(lambda leaf: leaf[which], params)
        loss = _contrast(predict, attraction)
        return collapse.rescaled_curvature(
            lambda scales: loss(scale_embedding(own, scales), views), direction, STEP
        )

    return map_lanes(along, lanes, at_once=1)


@jax.jit
def _landscapes(predict, params, images, key, lanes, scales):
    """The loss where both rows are rescaled, each by its own number: (lane, place) for scales (place, 2)."""

    def of(lane):
        variance, attraction = lane
        views = two_views(key, images, variance)

        def loss(scales):
            return _contrast(predict, attraction)(scale_embedding(params, scales), views)

        return jax.lax.map(loss, scales)

    return jax.lax.map(of, lanes)


def _of_encoder(name: str, config: Config, images: np.ndarray, key: Array) -> dict:
    """An encoder trained at all strengths, and the landscapes of the one that the weakest leaves."""
    drawn, first, again, views = jax.random.split(key, 4)
    predict, random = _built(partial(_encoder, name, config), drawn)

    def trained(key, start, variance, attraction=ATTRACTION):
        settings = (config.steps, config.batch, predict, images)
        last, ok, seen = _encoder_trained(*settings, key, start, variance, attraction)
        if not ok:
            raise RuntimeError(f"training of the {name} encoder: the numbers are not finite")
        return last, seen

    # From small random weights an encoder of several layers starts slowly.
    weakest = trained(again, trained(first, random, WEAK)[0], WEAK)[0]
    weakest, at_weakest = trained(first, weakest, WEAK)
    stronger = config.strengths[1:]
    fresh = [at_weakest, *(trained(first, random, variance)[1] for variance in stronger)]
    warm = [at_weakest, *(trained(again, weakest, variance)[1] for variance in stronger)]
    _, plain = trained(first, random, STRONG, PLAIN)

    turned, start = (_turned(predict, params, images, views) for params in (weakest, random))
    strengths, attractions = [*config.strengths, STRONG], [ATTRACTION] * len(config.strengths) + [PLAIN]
    # Along each of both rows: of the trained encoder at all strengths, of the random one at the medium one.
    which = np.repeat([0, 1], [len(strengths), 1])
    lanes = which, np.array([*strengths, MEDIUM]), np.array([*attractions, ATTRACTION])
    rows = np.tile(np.eye(2), (which.size, 1))
    both = jax.tree.map(lambda *leaves: np.stack(leaves), turned, start)
    lanes = (*(np.repeat(each, 2) for each in lanes), rows)
    second = np.asarray(_second_differences(predict, both, images, views, lanes)).reshape(-1, 2)
    along, grid = _along(config)
    pairs = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)
    scales = np.concatenate([np.stack([along, along], axis=1), pairs.reshape(-1, 2)])
    shown = np.array([*SHOWN, STRONG]), np.array([ATTRACTION] * len(SHOWN) + [PLAIN])
    loss = np.asarray(_landscapes(predict, turned, images, views, shown, scales))
    line, quadrants = loss[:, : along.size], loss[:, along.size :].reshape(-1, grid.size, grid.size)
    return {
        "cold": np.stack([seen["spread"] for seen in fresh]),
        "warm": np.stack([seen["spread"] for seen in warm]),
        "loss": np.stack([[seen["loss"] for seen in part] for part in (fresh, warm)]),
        "second": second[:-2],
        "start": second[-1],
        "line": line[:-1],
        "map": quadrants[:-1],
        "plain": {"spread": plain["spread"], "second": second[-2]},
        "plain_line": line[-1],
    }


def _along(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Scales of lines, and of the quadrants of maps."""
    return np.linspace(-REACH, REACH, 4 * config.grid + 1), np.linspace(0, REACH, config.grid)


@partial(jax.jit, static_argnames=("steps", "batch"))
def _autoencoders_trained(steps, batch, predict, x, key, lanes):
    """Linear autoencoders that are trained on drawn latents, and the variances of their means, (lane, k)."""
    optimizer = optax.adam(optax.exponential_decay(0.02, steps, 0.01))

    def trained(lane):
        start, beta = lane
        last, path = train(
            lambda params, data: negative_elbo(params, (predict, *data, (beta, 1.0, 1.0))),
            start,
            optimizer,
            steps=steps,
            every=steps,
            observe=lambda params: jnp.zeros(()),
            batches=lambda key: vae_batch(key, x, x, batch, 2),
            key=key,
        )
        means = predict(last, VaeInputs(x)).mean
        return last, path.ok, jnp.var(means, axis=0)

    return map_lanes(trained, lanes, at_once=1)


def _rescaled_latents(params: PyTree, scales: Array, beta: Array | None) -> PyTree:
    """An autoencoder with rescaled latents, whose variances are as trained or, for a beta, at their best."""
    (decoder, encoder, log_variance), structure = jax.tree.flatten(params)
    decoder, encoder = decoder * scales[:, None], encoder * scales[None]
    if beta is not None:
        log_variance = jnp.log(beta / (beta + jnp.sum(decoder**2, axis=1)))
    return structure.unflatten([decoder, encoder, log_variance])


@jax.jit
def _autoencoder_landscapes(predict, params, x, noise, betas, along):
    """Second differences at zero, and lines of the loss, by variances as trained or at their best."""
    inputs = VaeInputs(jnp.concatenate([x, x]), jnp.concatenate([noise, -noise]))
    directions = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])

    def of(beta):
        def loss(best, scales):
            rescaled = _rescaled_latents(params, scales, beta if best else None)
            return negative_elbo(rescaled, (predict, inputs, inputs.x, (beta, 1.0, 1.0)))

        def second(best, direction):
            return collapse.rescaled_curvature(partial(loss, best), direction, STEP)

        lines = [collapse.rescaled_loss(partial(loss, best), directions[0], along) for best in (False, True)]
        best = jnp.stack([second(True, direction) for direction in directions])
        return {"lines": jnp.stack(lines), "frozen": second(False, directions[0]), "best": best}

    return jax.lax.map(of, betas)


def _of_autoencoder(config: Config, images: np.ndarray, key: Array) -> dict:
    """Linear autoencoders trained at all beta, and the landscapes of the one of the least beta."""
    drawn, training, latents = jax.random.split(key, 3)
    x, betas = images.reshape(len(images), -1), np.array(config.strengths)

    def network(key):
        U, W = random_weights(key, (2, 64, 2), 0.1)
        return LinearVae(VaeWeights(U, W.T, jnp.zeros(2)))

    predict, start = _built(network, drawn)
    lanes = (jax.tree.map(lambda leaf: np.stack([leaf] * betas.size), start), betas)
    ends, ok, spread = jax.device_get(
        _autoencoders_trained(4 * config.steps, config.batch, predict, x, training, lanes)
    )
    if not np.all(ok):
        raise RuntimeError("training of the autoencoder: the numbers are not finite")
    order = np.argsort(-spread[0])
    (decoder, encoder, log_variance), structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf[0], ends))
    weakest = structure.unflatten([decoder[order], encoder[:, order], log_variance[order]])
    # Noise of unit covariance and of both signs stands for its mean: the loss is quadratic in it.
    noise = np.linalg.qr(np.asarray(normal(latents, (len(x), 2))))[0] * len(x) ** 0.5
    found = _autoencoder_landscapes(predict, weakest, x, noise, betas, _along(config)[0])
    shown = np.array([config.strengths.index(beta) for beta in SHOWN])
    return {
        "spread": ("strength row", -np.sort(-spread, axis=1)),
        "frozen": ("strength", found["frozen"]),
        "best": ("strength direction", found["best"]),
        "lines": ("shown variances along", np.asarray(found["lines"])[shown]),
    }


@partial(jax.jit, static_argnames=("steps", "batch"))
def _supervised_trained(steps, batch, predict, x, y, key, lanes):
    """Networks of one hidden layer that are trained with dropout and weight decay, as matrices."""

    def trained(lane):
        start, gamma = lane
        # Decay that is added to the gradient is L2 regularization, with gamma half of it.
        optimizer = optax.chain(optax.add_decayed_weights(2 * gamma), optax.sgd(0.004, momentum=0.9))
        last, path = train(
            lambda params, data: 2 * mean_squared_error(params, (predict, *data)),
            start,
            optimizer,
            steps=steps,
            every=steps,
            observe=lambda params: jnp.zeros(()),
            batches=lambda key: noisy_batch(key, x, y, batch, (HIDDEN,), DROPOUT),
            key=key,
        )
        return weights(last), path.ok

    return map_lanes(trained, lanes, at_once=1)


def _of_supervised(config: Config, images: np.ndarray, signs: np.ndarray, key: Array) -> dict:
    """Networks trained at three strengths of regularization, and the landscapes of the weakest one."""
    drawn, training = jax.random.split(key)
    x = images.reshape(len(images), -1)
    moments = jax.device_get(jax.jit(collapse.moments)(x, signs[:, 0]))
    gammas = np.asarray(SHARES) * np.linalg.norm(moments.c)
    predict, start = _built(lambda key: StochasticLinear(random_weights(key, (64, HIDDEN, 1), 0.1)), drawn)
    lanes = (jax.tree.map(lambda leaf: np.stack([leaf] * gammas.size), start), gammas)
    ends, ok = jax.device_get(
        _supervised_trained(config.steps, config.batch, predict, x, signs, training, lanes)
    )
    if not np.all(ok):
        raise RuntimeError("training of the supervised network: the numbers are not finite")
    along = _along(config)[0]

    @jax.jit
    def landscape(gamma):
        def loss(params):
            return collapse.stochastic_linear_loss(params, moments, DROPOUT, jnp.stack([gamma, gamma]))

        weakest = [W[0] for W in ends]
        line = collapse.rescaled_loss(loss, weakest, along)
        return line, collapse.rescaled_curvature(loss, weakest, STEP)

    lines, second = map(np.stack, zip(*map(landscape, gammas), strict=True))
    return {
        "norm": ("share", sum(np.sum(W**2, axis=(1, 2)) for W in ends)),
        "second": ("share", second),
        "lines": ("share along", lines),
    }


def run(config: Config, context: Context) -> dict:
    """Networks that are trained at all strengths, and landscapes of those that the weakest one leaves."""
    images, signs = _images()
    *keys, latents, outputs = jax.random.split(jax.random.key(context.seed), 2 + len(ENCODERS))
    found = []
    for index, (name, key) in enumerate(zip(ENCODERS, keys, strict=True)):
        context.progress(f"{name} encoder", index / 5)
        found.append(jax.device_get(_of_encoder(name, config, images, key)))
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *found)
    context.progress("autoencoder and supervised network", 0.6)
    along, radii = _along(config)
    flat = images.reshape(len(images), -1)
    return {
        "strength": ("strength", np.array(config.strengths)),
        "share": ("share", np.array(SHARES)),
        "eigenvalue": ("row", np.linalg.eigvalsh(flat.T @ flat / len(flat))[::-1][:2]),
        "along": ("along", along),
        "radius": ("radius", radii),
        "encoder": {
            "cold": ("encoder strength row", stacked["cold"]),
            "warm": ("encoder strength row", stacked["warm"]),
            "second": ("encoder strength row", stacked["second"]),
            "start": ("encoder row", stacked["start"]),
            "loss": ("encoder start strength", stacked["loss"]),
            "line": ("encoder shown along", stacked["line"]),
            "map": ("encoder shown radius other", stacked["map"]),
            "plain": ("encoder row", stacked["plain"]),
            "plain_line": ("encoder along", stacked["plain_line"]),
        },
        "autoencoder": _of_autoencoder(config, images, latents),
        "supervised": _of_supervised(config, images, signs, outputs),
    }


def _crossings(second: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Strengths at which second differences (strength, ...), which are linear in it, vanish."""
    return strength[0] + (strength[-1] - strength[0]) * second[0] / (second[0] - second[-1])


def _left(variances: np.ndarray) -> np.ndarray:
    """How many directions are alive, (..., row) to (...); NaN where that is not known."""
    known = np.isfinite(variances).all(axis=-1)
    return np.where(known, np.sum(variances > ALIVE, axis=-1), np.nan)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What the curvature at zero tells of linear and other encoders, autoencoders and supervised networks."""
    yield _of_linear(saved)
    yield _of_nonlinear(saved)
    yield _of_weights(saved)
    yield _of_latents(saved)
    yield _of_layers(saved)


def _of_linear(saved: Saved) -> Claim:
    strength, eigenvalue = np.asarray(saved["strength"]), np.asarray(saved["eigenvalue"])
    second = np.asarray(saved["encoder/second"])[0]
    unstable, (one, other) = np.sum(second < 0, axis=1), _crossings(second, strength) / eigenvalue
    left = {name: _left(np.asarray(saved[f"encoder/{name}"])[0]) for name in ("cold", "warm")}
    drawn = "augmentations are drawn, and weights are those of SGD"
    return stated(
        "linear",
        "The strength of augmentation makes zero stable in none, one or both of two directions, and a linear "
        "encoder loses as many",
        f"{NONLINEAR} (the linear encoder beside them)",
        equals("leading row: strength at which it is stable, over its eigenvalue", one, 1, 0.1, why=drawn),
        equals("the other row: the same", other, 1, 0.1, why=drawn),
        every(
            "strengths with as many unstable directions as larger eigenvalues",
            unstable == np.sum(eigenvalue > strength[:, None], axis=1),
        ),
        every("and as many that are left, from random weights", left["cold"] == unstable),
        every("and from those of the weakest augmentation", left["warm"] == unstable),
    )


def _of_nonlinear(saved: Saved) -> Claim:
    strength, loss = saved["strength"], np.asarray(saved["encoder/loss"])[1:]
    shown, medium, near = (
        np.isin(strength, SHOWN),
        *(np.flatnonzero(strength == at)[0] for at in (MEDIUM, NEAR)),
    )
    unstable = np.sum(np.asarray(saved["encoder/second"])[1:] < 0, axis=-1)
    cold, warm = (_left(np.asarray(saved[f"encoder/{name}"])[1:]) for name in ("cold", "warm"))
    return qualified(
        "nonlinear",
        "ReLU and convolutional encoders show the same: the curvature at zero along trained weights tells "
        "what is lost",
        NONLINEAR,
        condition="training goes on from the weights whose landscape it is, and, with several hidden layers, "
        "strengths are far from that of collapse",
        inside=[
            every(
                "weak, medium, strong augmentation: two, one, no unstable direction",
                unstable[:, shown] == [2, 1, 0],
            ),
            every("and as many that are left", warm[:, shown] == [2, 1, 0]),
            every("ReLU, all strengths: as many left as are unstable", warm[0] == unstable[0]),
            at_most(
                "medium: largest loss, that of zero being zero",
                np.max(loss[:, 1, medium]),
                -1e-3,
                why="it is better than collapse",
            ),
        ],
        outside=[
            at_most(
                "medium, from random weights: most directions left",
                np.max(cold[:, medium]),
                0,
                why="zero is stable along random weights",
            ),
            every(
                "medium, random weights: stable directions, two of each encoder",
                np.asarray(saved["encoder/start"])[1:] > 0,
            ),
            at_most("its loss: largest", largest(loss[:, 0, medium]), 1e-3, why="it is that of zero"),
            at_least(
                f"variance {NEAR:g}, convolutional: unstable directions", unstable[1, near], 1, why="of two"
            ),
            at_most(
                "and those that are left",
                warm[1, near],
                0,
                why="all three layers shrink, and what hidden ones see changes",
            ),
        ],
    )


def _of_weights(saved: Saved) -> Claim:
    plain, end = saved["encoder/plain"], np.asarray(saved["encoder/second"])[:, -1]
    stable = np.where(np.isfinite(plain["second"]).all(axis=1), np.sum(plain["second"] > 0, axis=1), np.nan)
    return qualified(
        "attraction",
        "Strong augmentation makes zero stable, and encoders collapse",
        f"{NONLINEAR} (their loss is that of the slide on InfoNCE)",
        condition="the attraction weighs more than one",
        inside=[
            every("weight 2: directions of encoders that are stable", end > 0),
            at_most(
                "and what is left: largest variance of embeddings",
                largest(np.asarray(saved["encoder/warm"])[:, -1]),
                7e-4,
                why="distances are of order one where there is no collapse",
            ),
        ],
        outside=[
            at_most(
                "weight 1: most stable directions of an encoder",
                np.max(stable),
                0,
                why="the curvature is -2 a, with a the variance between images",
            ),
            at_least(
                "weight 1, from random weights: least variance of embeddings",
                np.min(plain["spread"]),
                ALIVE,
                why="the same",
            ),
        ],
    )


def _of_latents(saved: Saved) -> Claim:
    part, beta, eigenvalue = (
        saved["autoencoder"],
        np.asarray(saved["strength"]),
        np.asarray(saved["eigenvalue"]),
    )
    of_all, *of_each = _crossings(np.asarray(part["best"]), beta)
    frozen = _crossings(np.asarray(part["frozen"]), beta)
    unstable = np.sum(np.asarray(part["best"])[:, 1:] < 0, axis=1)
    weight, trained = (eigenvalue - WEAK) / eigenvalue, "weights are those of training on drawn latents"
    by_one = np.sum(eigenvalue - WEAK) / np.sum(weight)
    held = np.sum((2 - WEAK / eigenvalue) * (eigenvalue - WEAK)) / np.sum(weight)
    return qualified(
        "autoencoder",
        "Rescaling the weights of a trained autoencoder shows where it collapses",
        AUTOENCODER,
        condition="each latent is rescaled by itself, with the variance that is best for it",
        inside=[
            *(
                equals(f"{name} latent: beta at which zero is stable, over zeta^2", at, 1, 0.01, why=trained)
                for name, at in zip(("first", "second"), of_each / eigenvalue, strict=True)
            ),
            every(
                "beta with as many latents left as are unstable",
                _left(np.asarray(part["spread"])) == unstable,
            ),
            *_line_checks(saved, trained),
        ],
        outside=[
            equals("all weights by one number: beta, over theory", of_all / by_one, 1, 0.02, why=trained),
            equals("variances as trained: beta, over theory", frozen / held, 1, 0.02, why=trained),
            at_most(
                "the first of these over that of complete collapse", of_all / eigenvalue[0], 0.9, why=MIXED
            ),
            at_least("the second over it", frozen / eigenvalue[0], 1.1, why=MIXED),
        ],
    )


def _line_checks(saved: Saved, trained: str) -> Iterator[Check]:
    """That each line of an autoencoder's loss is that of theory, by its own range and its own well."""
    lines, along = np.asarray(saved["autoencoder/lines"]), np.asarray(saved["along"])
    change = lines - lines[..., [lines.shape[-1] // 2]]
    theory = np.stack(_landscape_of_theory(saved), axis=1)
    within = np.abs(along) < 1 + 1e-9
    gap = np.max(np.abs(change - theory)[..., within], axis=-1) / np.ptp(theory[..., within], axis=-1)
    yield at_most(
        "each line of the loss: gap to theory for |a| <= 1, over its range there",
        largest(gap),
        0.03,
        why=trained,
    )
    # At weak and medium beta there are wells, whatever the variances are.
    depth, expected = (-np.min(values[:2], axis=-1) for values in (change, theory))
    yield equals(
        "weak and medium beta: depth of each well over theory, the one furthest off",
        (depth / expected).flat[np.argmax(np.abs(depth / expected - 1))],
        1,
        0.1,
        why="at medium beta it is as (1.36 - beta)^2, so half a percent of 1.36 is nine percent of it",
    )
    place, expected = (np.abs(along[np.argmin(values[:2], axis=-1)]) for values in (change, theory))
    yield at_most(
        "and its place less theory's, in steps of the grid",
        largest(place - expected) / (along[1] - along[0]),
        0.5,
        why="both have the same point of the grid for their least",
    )


def _landscape_of_theory(saved: Saved) -> tuple[np.ndarray, np.ndarray]:
    """The loss along a rescaling of the minimum of weak beta, less that at zero, (shown, a)."""
    zeta2, a2 = np.asarray(saved["eigenvalue"]), np.asarray(saved["along"])[:, None] ** 2
    lam2, beta = a2 * (zeta2 - WEAK), np.asarray(SHOWN)[:, None, None]
    rest = lam2**2 / zeta2 - 2 * lam2 + beta * lam2 / zeta2
    best = beta / (beta + lam2)
    divergence = beta * (best - 1 - np.log(best))
    held, free = rest + WEAK / zeta2 * lam2, rest + best * lam2 + divergence
    return np.sum(held, axis=-1) / 2, np.sum(free, axis=-1) / 2


def _of_layers(saved: Saved) -> Claim:
    part, share = saved["supervised"], np.asarray(SHARES)
    alive = np.where(np.isfinite(part["norm"]), part["norm"] > 1e-3, np.nan)
    return stated(
        "supervised",
        "Zero is unstable along the weights of a trained network of two layers below the critical gamma, and "
        "stable above, where networks collapse",
        "ziyin2022talk, slides on the critical point (the effective landscape)",
        equals(
            "gamma at which zero is stable, over |E[xy]|",
            _crossings(np.asarray(part["second"]), share),
            1,
            0.03,
            why="the trained direction is not that of E[xy]: its cosine is 0.99",
        ),
        every("networks left just where zero is unstable", alive == (part["second"] < 0)),
        every("unstable at 0.3 and 0.9 of it, not at 1.2", (part["second"] < 0) == (share < 1)),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """The loss over r_1 and r_2 of encoders, with what training leaves, and over a of all networks."""
    drawn, axes = plotting.new_figure(4, 3, width=3.9, height=3.3)
    shown = np.flatnonzero(np.isin(saved["strength"], SHOWN))
    left = {name: _left(np.asarray(saved[f"encoder/{name}"])[:, shown]) for name in ("warm", "cold")}
    for row, name in enumerate(ENCODERS):
        for column, strength in enumerate(("weak", "medium", "strong")):
            ax, (warm, cold) = axes[row, column], (part[row, column] for part in left.values())
            _map(ax, np.asarray(saved["radius"]), np.asarray(saved["encoder/map"])[row, column])
            title = f"{name}, {strength}: {warm:.0f} left, {cold:.0f} anew"
            plotting.finish(ax, title, "r₁, of the first row", "r₂, of the second")
    encoders, autoencoder, layers = axes[3]
    for index, style in enumerate(("-", "--", ":")):
        lines = np.asarray(saved["encoder/line"])[index]
        labels = [f"{variance:g}" for variance in SHOWN] if index == 0 else [""] * len(SHOWN)
        _lines(encoders, saved["along"], lines, labels, style)
    plain = np.asarray(saved["encoder/plain_line"])[0]
    change, along = plain - plain[len(plain) // 2], np.asarray(saved["along"])
    encoders.plot(along, change, color="C3")
    lowest = np.argmin(change)
    encoders.annotate(
        f"{STRONG:g}, attraction {PLAIN:g}",
        (abs(along[lowest]), change[lowest]),
        (0, 0.9 * np.min(saved["encoder/line"] - saved["encoder/line"][..., [len(plain) // 2]])),
        ha="center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "C3"},
    )
    legend, title = (
        {"loc": "upper center", "title": "noise", "fontsize": 8},
        "encoders; ReLU dashed, conv. dotted",
    )
    plotting.finish(encoders, title, "a, of the last layer", "change of the loss", legend)
    _lines(
        autoencoder, saved["along"], np.asarray(saved["autoencoder/lines"])[:, 1], [f"{b:g}" for b in SHOWN]
    )
    theory = _landscape_of_theory(saved)[1]
    for index, values in enumerate(theory):
        autoencoder.plot(saved["along"], values, label="" if index else "theory", **plotting.THEORY)
    legend = {"loc": "upper center", "title": "beta"}
    plotting.finish(autoencoder, "linear autoencoder", "a, of all weights", "change of the loss", legend)
    _lines(layers, saved["along"], np.asarray(saved["supervised/lines"]), [f"{share:g}" for share in SHARES])
    legend = {"loc": "upper center", "title": "γ / |E[xy]|"}
    plotting.finish(layers, "supervised, two layers", "a, of all weights", "change of the loss", legend)
    return drawn


def _lines(ax: Axes, along: np.ndarray, lines: np.ndarray, labels: Sequence[str], style: str = "-") -> None:
    """The loss along a rescaling, less that at zero, with its minima."""
    change = lines - lines[:, [lines.shape[1] // 2]]
    for index, (label, values) in enumerate(zip(labels, change, strict=True)):
        ax.plot(along, values, style, color=f"C{index}", label=label, **plotting.TRAINED)
        inner = 1 + np.flatnonzero((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:]))
        ax.plot(along[inner], values[inner], "*", color=f"C{index}", ms=11, mec="black", mew=0.5)
    depth = -change.min()
    ax.set_ylim(-1.25 * depth, 3.2 * depth)


def _map(ax: Axes, radius: np.ndarray, quadrant: np.ndarray) -> None:
    """The loss over two rescalings, red where it is high, with stars at its minima."""
    both = np.concatenate([-radius[:0:-1], radius])
    half = np.concatenate([quadrant[:0:-1], quadrant])
    values = np.concatenate([half[:, :0:-1], half], axis=1).T
    ax.contourf(both, both, np.sqrt(values - values.min()), levels=12, cmap="RdYlBu_r", antialiased=False)
    padded = np.pad(values, 1, constant_values=np.inf)
    count = len(both)
    around = [padded[i : i + count, j : j + count] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    at = np.argwhere(values < np.min(around, axis=0))
    ax.plot(both[at[:, 1]], both[at[:, 0]], "*", color="black", ms=13, mec="white", mew=0.8)
    ax.set_aspect("equal")
