"""Neural collapse: with weight decay the features of a class become their mean, and too much undoes it again.

Where features are free, the minimum is exact: all features of a class are equal, and all of them vanish at
one strength. Networks with two hidden layers of ReLU are trained on images, full batch, on the mean of
|f(x) - y|^2, or cross-entropy, plus kappa times the squares of all parameters, with kappa from zero to where
nothing is left. Adam has no gradient flow: the axis is the step. Ridge regression, which has no hidden
layer, is set beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import collapse
from dynamics.spectra import NeuralCollapse, neural_collapse, numerical_rank
from models.classifier import Classifier
from models.data.images import shuffled
from models.draws import normal
from models.training import record_steps, train
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, equals, qualified, quoted, stated
from sims.compare import WRONG_FACTOR, largest, percent
from sims.ranges import Count, Length, NonNegative, Positive, Range, check_ranges
from sims.results import Context, Saved

SLIDES = "ziyin2022talk, slides on neural collapse"
CLASSES = 10
ALIVE = 1e-3  # of the root mean square of features: below it nothing is left to measure
MODERATE, USEFUL, STRONG = 1e-4, 1e-3, 1e-2  # weight decays: at the last features collapse no more
# Free features: classes, samples of each, dimension, and weight decays (of classifier and features).
FREE, PER_CLASS, DIM = 4, 10, 16
DECAYS = ((1e-2, 1e-3), (5e-2, 1e-2), (0.12, 0.02), (0.02, 0.12))
NEAR = (0.5, 0.9, 0.95, 1.05, 1.1, 2.0)  # K^2 n lw lh where the two are as one to four
RATIO, SEARCH = 4.0, 4000
RIDGES = (1e-3, 1e-1, 1.0, 10.0, 100.0)
CUTOFFS = (1e-10, 1e-9, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)  # of the pseudo-inverse, over the largest eigenvalue


@dataclass(frozen=True)
class Config:
    """The images, the network, and how it is trained."""

    data: Literal["digits", "mnist"] = "digits"
    """Images: digits that come with scikit-learn, or MNIST from --data-dir."""
    train_images: Annotated[int, Range(at_least=100)] = 200
    """Images to train on."""
    test_images: Count = 797
    """Images to test on."""
    width: Annotated[int, Range(at_least=CLASSES)] = 48
    """Units of each of the two hidden layers."""
    decays: Annotated[tuple[NonNegative, ...], Length(4)] = (0.0, 1e-4, 1e-3, 1e-2, 0.3)
    """Weight decays of squared error, rising from 0, with 1e-4, 1e-3 and 1e-2; the last is too much."""
    entropy_decays: Annotated[tuple[Positive, ...], Length(2)] = (1e-5, 1e-3)
    """Weight decays of cross-entropy, rising; without any its weights grow for ever."""
    steps: Annotated[int, Range(at_least=100)] = 1000
    """Steps of Adam on all images at once."""
    learning_rate: Positive = 3e-3
    """It falls to a hundredth by a cosine."""
    every: Count = 50
    """Steps between two records."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        check_ranges(self)
        for name, wanted in (("decays", {0.0, MODERATE, USEFUL, STRONG}), ("entropy_decays", set())):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or not wanted <= set(values):
                listed = f" and have {sorted(wanted)} among them" if wanted else ""
                raise ValueError(f"{name} must rise{listed}, got {values}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        train_images=1000,
        width=128,
        decays=(0.0, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.3),
        entropy_decays=(1e-5, 1e-4, 1e-3),
        steps=4000,
        every=100,
    ),
    "paper": replace(
        Config(),
        data="mnist",
        train_images=10_000,
        test_images=10_000,
        width=512,
        decays=(0.0, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.3),
        entropy_decays=(1e-6, 1e-5, 1e-4, 1e-3),
        steps=10_000,
        learning_rate=1e-3,
        every=100,
    ),
}


class Images(NamedTuple):
    """Flat images (N, pixels) and labels (N,), to train on and to test on."""

    x: Any
    y: Any
    x_test: Any
    y_test: Any


def _images(config: Config, context: Context) -> tuple[Images, np.ndarray, np.ndarray]:
    """The two parts, and all flat images with their labels."""
    flat, labels = shuffled(config.data, context.data_dir, context.seed)
    count = config.train_images + config.test_images
    if count > len(flat):
        raise ValueError(f"train_images and test_images must be {len(flat)} at most, got {count}")
    x, cut = flat.astype(config.dtype), slice(config.train_images, count)
    return Images(x[: cut.start], labels[: cut.start], x[cut], labels[cut]), flat, labels


def _network(config: Config, pixels: int) -> tuple[Any, Any]:
    """The structure of the network, and the shapes of its parameters."""
    made = nnx.eval_shape(lambda: Classifier(jax.random.key(0), pixels, config.width, config.dtype, CLASSES))
    return nnx.split(made)


def _outputs(structure: Any, params: Any, x: Array) -> tuple[Array, Array]:
    """Features and logits of images."""
    network = nnx.merge(structure, params)
    features = network.features(x)
    return features, network.head(features)


@partial(jax.jit, static_argnums=0)
def _trained(config: Config, key: Array, images: Images, lanes: tuple[Array, Array]) -> tuple[Any, Array]:
    """Networks from one start: in each lane a weight decay, and whether the loss is cross-entropy.

    Parameters at all records, (lane, step, ...), and the losses at the end.
    """
    structure, shapes = _network(config, images.x.shape[1])
    drawn = normal(key, (sum(leaf.size for leaf in jax.tree.leaves(shapes)),), config.dtype)

    def started(leaf):  # biases start at zero
        return drawn[: leaf.size].reshape(leaf.shape) * (leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 0)

    params = jax.tree.map(started, shapes)
    targets = jax.nn.one_hot(images.y, CLASSES, dtype=config.dtype)
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 0.01)

    def one(lane):
        decay, entropy = lane

        def loss(params):
            _, logits = _outputs(structure, params, images.x)
            squares = jnp.mean(jnp.sum((logits - targets) ** 2, axis=1))
            nats = jnp.mean(optax.losses.softmax_cross_entropy(logits, targets))
            penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
            return jnp.where(entropy, nats, squares) + decay * penalty

        # Short memories: gradients shrink by orders of magnitude while features collapse.
        optimizer = optax.adam(rate, b1=0.95, b2=0.95)
        end, path = train(loss, params, optimizer, steps=config.steps, every=config.every)
        return path.ys, loss(end)

    return jax.vmap(one)(lanes)


@partial(jax.jit, static_argnums=0)
def _measured(config: Config, images: Images, params: Any) -> tuple[dict[str, Array], Array]:
    """What networks (lane, step, ...) measure, (lane, step), and their features at the end."""
    structure, _ = _network(config, images.x.shape[1])

    def one(params):
        features, logits = _outputs(structure, params, images.x)
        _, of_test = _outputs(structure, params, images.x_test)
        head = nnx.merge(structure, params).head
        measures = neural_collapse(features, images.y, head.kernel[...].T, head.bias[...])
        return {
            **measures._asdict(),
            "rank": numerical_rank(features, rtol=1e-2),
            "size": jnp.sqrt(jnp.mean(features**2)),
            "train": jnp.mean(jnp.argmax(logits, axis=1) == images.y),
            "test": jnp.mean(jnp.argmax(of_test, axis=1) == images.y_test),
        }

    found = jax.lax.map(jax.vmap(one), jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), params))
    last = jax.tree.map(lambda leaf: leaf[:, -1], params)
    features = jax.vmap(lambda params: _outputs(structure, params, images.x)[0])(last)
    return jax.tree.map(jnp.transpose, found), features


def _networks(config: Config, context: Context, images: Images) -> dict:
    """What networks measure over training, of squared error and of cross-entropy, and what a cut-off does."""
    decays = np.array([*config.decays, *config.entropy_decays], config.dtype)
    entropy = np.arange(len(decays)) >= len(config.decays)
    params, loss = _trained(config, jax.random.key(context.seed), images, (decays, entropy))
    path, features = jax.device_get(_measured(config, images, params))
    if not np.all(np.isfinite(loss)):
        raise RuntimeError("training ended with numbers that are not finite")
    # Measures of features that have vanished are quotients of rounding.
    alive = path["size"] > ALIVE
    path |= {kind: np.where(alive, path[kind], np.nan) for kind in NeuralCollapse._fields}
    path["rank"] = np.where(alive, path["rank"], 0)
    kept = {"squares": [kind for kind in path if kind != "size"], "entropy": ["nc1_trace", "nc3", "train"]}
    found: dict[str, Any] = {"step": ("step", record_steps(config.steps, config.every))}
    for name, own, part in (
        ("squares", config.decays, ~entropy),
        ("entropy", config.entropy_decays, entropy),
    ):
        found[name] = {"decay": (name, np.asarray(own))}
        found[name] |= {kind: (f"{name} step", path[kind][part]) for kind in kept[name]}
    found["cutoff"] = {
        "at": ("cutoff", np.asarray(CUTOFFS)),
        "nc1": ("cutoff", _with_cutoffs(features[config.decays.index(MODERATE)], images.y)),
    }
    return found


def _with_cutoffs(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """tr(S_W pinv(S_B)) / K as printed, in the dtype of the features, for several cut-offs."""
    means = np.stack([features[labels == label].mean(axis=0) for label in range(CLASSES)])
    within = features - means[labels]
    M = means - means.mean(axis=0)
    S_W, S_B = within.T @ within / len(features), M.T @ M / CLASSES
    return (
        np.array([np.trace(S_W @ np.linalg.pinv(S_B, rcond=cut, hermitian=True)) for cut in CUTOFFS])
        / CLASSES
    )


def _ridge(x: np.ndarray, labels: np.ndarray) -> dict:
    """Rank and spread of ridge regression on all images, centered, over its strength."""
    x = np.asarray(x - x.mean(axis=0), float)
    moments = collapse.moments(x, np.eye(CLASSES)[labels])
    maps = np.stack([np.asarray(collapse.ridge_minimum(moments, gamma).W) for gamma in RIDGES])
    outputs = x @ np.swapaxes(maps, 1, 2)
    means = np.stack([outputs[:, labels == label].mean(axis=1) for label in range(CLASSES)], axis=1)
    within = np.mean(np.sum((outputs - means[:, labels]) ** 2, axis=-1), axis=1)
    between = np.mean(np.sum((means - means.mean(axis=1, keepdims=True)) ** 2, axis=-1), axis=1)
    return {
        "gamma": ("ridge", np.asarray(RIDGES)),
        "values": ("ridge mode", np.linalg.svd(maps, compute_uv=False)),
        "nc1_trace": ("ridge", within / between),
    }


@jax.jit
def _descended(key: Array, lanes: tuple[Array, Array, Array]) -> dict[str, Array]:
    """Free features and a classifier after descent: weight decays of both, and whether there is a bias."""
    samples = FREE * PER_CLASS
    targets = jnp.repeat(jnp.eye(FREE), PER_CLASS, axis=1)
    W, H = jnp.split(normal(key, ((FREE + samples) * DIM,)) / 4, [FREE * DIM])
    start = [W.reshape(FREE, DIM), H.reshape(DIM, samples), jnp.zeros(FREE)]

    def one(lane):
        lw, lh, bias = lane

        def loss(params):
            W, H, b = params
            fit = jnp.sum((W @ H + bias * b[:, None] - targets) ** 2) / (2 * samples)
            return fit + lw / 2 * jnp.sum(W**2) + lh / 2 * jnp.sum(H**2)

        # About the largest curvature: of the bias, and of the classifier or the features beside the other.
        ratio = jnp.sqrt(jnp.maximum(lw / lh, lh / lw))
        curvature = 1 + PER_CLASS**0.5 * ratio / samples + lw + lh
        optimizer = optax.sgd(1 / curvature, momentum=0.98)
        (W, H, b), path = train(loss, start, optimizer, steps=SEARCH, every=SEARCH, observe=loss)
        of_class = H.reshape(DIM, FREE, PER_CLASS)
        return {
            "ok": path.ok,
            "values": jnp.linalg.svd(W @ H, compute_uv=False),
            "spread": jnp.max(jnp.abs(of_class - jnp.mean(of_class, axis=2, keepdims=True))),
            "bias": bias * b,
        }

    return jax.vmap(one)(lanes)


def _free(context: Context) -> dict:
    """The unconstrained-features model: what descent finds, and its minimum, right and wrong on purpose."""
    critical = (FREE**2 * PER_CLASS) ** -0.5
    near = [(share**0.5 * critical * RATIO**0.5, share**0.5 * critical / RATIO**0.5) for share in NEAR]
    pairs = np.array([*DECAYS, *near])
    lw, lh = np.concatenate([pairs, pairs]).T
    bias = np.arange(len(lw)) >= len(pairs)
    found = jax.device_get(_descended(jax.random.key(context.seed), (lw, lh, bias.astype(float))))
    if not np.all(found["ok"]):
        raise RuntimeError("free features: the numbers are not finite")

    def least(factor):
        lanes = zip(factor * lw, lh, bias, strict=True)
        return np.array(
            [collapse.features_minimum(FREE, PER_CLASS, *lane[:2], bool(lane[2])) for lane in lanes]
        )

    return {
        "critical": ("free", FREE**2 * PER_CLASS * lw * lh),
        "with_bias": ("free", bias),
        "values": ("free value", found["values"]),
        "spread": ("free", found["spread"]),
        "bias": ("free value", found["bias"]),
        "least": {
            "right": ("free value", least(1.0)),
            "wrong": ("free value", least(WRONG_FACTOR)),
        },
    }


def run(config: Config, context: Context) -> dict:
    """Free features, ridge regression, and networks over weight decay."""
    context.progress("free features", 0.0)
    found = {"free": _free(context)}
    images, x, labels = _images(config, context)
    found["ridge"] = _ridge(x, labels)
    context.progress("training", 0.2)
    return found | _networks(config, context, images)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What free features do exactly, what networks do over weight decay, and ridge regression does not."""
    yield _soft(saved)
    yield _complete(saved)
    yield _variability(saved)
    yield _means(saved)
    yield _tenfold(saved)
    yield _rank(saved)
    yield _of_entropy(saved)
    yield _of_ridge(saved)
    yield _accuracy(config, saved)
    yield _cutoff(saved)
    yield quoted(
        "open-question",
        "Why does posterior collapse only happen for VAE, but not for other types of Bayesian learning?",
        "ziyin2022talk, slides on posterior collapse (an open question)",
        needs="other Bayesian networks, and a reason: the question is open",
    )


def _soft(saved: Saved) -> Claim:
    part = saved["free"]
    values, least = (
        np.asarray(part["values"]),
        {k: np.asarray(part[f"least/{k}"]) for k in ("right", "wrong")},
    )
    alive = np.asarray(part["critical"]) < 0.5
    off = np.abs(values - least["wrong"])[alive, 0]
    biases = np.asarray(part["bias"])[np.asarray(part["with_bias"])]
    rest = "descent has come to rest"
    return stated(
        "free-features",
        "Where features are free those of a class are equal at the minimum, and all singular values of W H "
        "are n^{1/2} - N (gamma_w gamma_h)^{1/2}; with a bias one is zero, and the bias is 1/K",
        f"{SLIDES} (the model is derived)",
        at_most("singular values less those: largest", largest(values - least["right"]), 1.5e-14, why=rest),
        at_most("distance of a feature from the mean of its class", largest(part["spread"]), 5e-15, why=rest),
        at_most("bias less 1/K", largest(biases - 1 / FREE), 1e-14, why=rest),
        at_least(
            f"with gamma_w taken {percent(WRONG_FACTOR)} too large: least difference of the first value",
            np.min(off),
            1e-3,
            why="it is 0.01 N (gamma_w gamma_h)^{1/2}",
        ),
    )


def _complete(saved: Saved) -> Claim:
    critical, values = np.asarray(saved["free/critical"]), np.asarray(saved["free/values"])
    below, above = critical < 1, critical > 1
    return stated(
        "free-complete",
        "Free features vanish if and only if K^2 n gamma_w gamma_h >= 1",
        f"{SLIDES} (the model is derived)",
        at_least(
            f"largest value at {np.max(critical[below]):.3g}: least, with a bias and without",
            np.min(values[below, 0]),
            0.05,
            why="it is n^{1/2} (1 - 0.95^{1/2})",
        ),
        at_most(
            f"at {np.min(critical[above]):.3g} and above: largest",
            np.max(values[above]),
            1e-12,
            why="descent has come to rest",
        ),
    )


def _at(saved: Saved, decay: float, name: str) -> float:
    """A measure of the networks with squared error at the end of training."""
    (index,) = np.flatnonzero(np.asarray(saved["squares/decay"]) == decay)
    return float(saved[f"squares/{name}"][index, -1])


def _variability(saved: Saved) -> Claim:
    free, moderate, strong = (_at(saved, decay, "nc1_trace") for decay in (0.0, USEFUL, STRONG))
    return qualified(
        "variability",
        "In regularized classification features within a class become their mean",
        SLIDES,
        condition="weight decay is moderate",
        inside=[
            at_most(
                "at 1e-3: spread within classes over that between them (traces), over that without decay",
                moderate / free,
                0.3,
                why="it is 0.1 on digits",
            ),
            at_most("at 1e-3: the quotient itself", moderate, 0.05, why="features have come together"),
        ],
        outside=[
            at_least("without: the quotient", free, 0.01, why="nothing draws features together"),
            at_least(
                "at 1e-2: over that at 1e-3", strong / moderate, 2, why="the fit gives way to the decay"
            ),
        ],
    )


def _tenfold(saved: Saved) -> Claim:
    free, moderate, strong = (_at(saved, decay, "nc1") for decay in (0.0, MODERATE, STRONG))
    return stated(
        "tenfold",
        "A weight decay of 1e-4 lowers tr(S_W pinv(S_B)) / K more than tenfold, and one of 1e-2 undoes it",
        f"{SLIDES} (measured here)",
        at_most("at 1e-4: over that without decay", moderate / free, 0.1, why="long training, full batch"),
        at_least("at 1e-2: over that at 1e-4", strong / moderate, 10, why="it does not go on falling"),
        preset="standard",
    )


def _means(saved: Saved) -> Claim:
    ratio = {name: _at(saved, USEFUL, name) / _at(saved, 0.0, name) for name in ("nc2", "nc3")}
    return stated(
        "simplex",
        "With decay class means come closer to a simplex, the classifier's weights to the class means, and "
        "it chooses the nearest one",
        f"{SLIDES} (NC2 to NC4 of the source that it names)",
        at_most("NC2 at 1e-3 over that without decay", ratio["nc2"], 0.85, why="a half to three quarters"),
        at_most("NC3, alike", ratio["nc3"], 0.6, why="a third"),
        at_most("NC4 at 1e-3", _at(saved, USEFUL, "nc4"), 0.01, why="one image in a hundred at most"),
    )


def _rank(saved: Saved) -> Claim:
    ranks = np.asarray(saved["squares/rank"])[:, -1]
    return stated(
        "rank",
        "Regularized features lose rank: fewer singular values are above a hundredth of the largest, and "
        "under too much decay nothing is left",
        SLIDES,
        at_most(
            "rank at 1e-3 over that without decay",
            _at(saved, USEFUL, "rank") / _at(saved, 0.0, "rank"),
            0.75,
            why="about a half; narrow networks lose less",
        ),
        at_least("rank at 1e-3", _at(saved, USEFUL, "rank"), CLASSES - 1, why="ten classes are told apart"),
        equals("rank at the largest decay", ranks[-1], 0, why="all features have vanished"),
        preset="standard",
    )


def _of_entropy(saved: Saved) -> Claim:
    part = {name: np.asarray(saved[f"entropy/{name}"])[:, -1] for name in ("nc1_trace", "nc3", "train")}
    squares = min(_at(saved, USEFUL, "nc1_trace"), _at(saved, MODERATE, "nc1_trace"))
    far = "images beyond the margin gain little, and nothing brings them to its edge"
    return qualified(
        "cross-entropy",
        "Weight decay draws the features of a class together",
        f"{SLIDES} (cross-entropy is measured here)",
        condition="the loss is the squared error",
        inside=[
            at_most("squared error: quotient of traces", squares, 0.05, why="features have come together")
        ],
        outside=[
            at_least("cross-entropy: quotient at each decay, least", np.min(part["nc1_trace"]), 0.1, why=far),
            at_least("accuracy on its training images", np.min(part["train"]), 0.99, why="all are fitted"),
            at_most(
                "largest quotient over the least",
                np.max(part["nc1_trace"]) / np.min(part["nc1_trace"]),
                1.5,
                why="decays a hundredfold apart",
            ),
        ],
    )


def _of_ridge(saved: Saved) -> Claim:
    values, quotient = np.asarray(saved["ridge/values"]), np.asarray(saved["ridge/nc1_trace"])
    ranks, gamma = np.sum(values > 1e-5 * values[:, :1], axis=1), np.asarray(saved["ridge/gamma"])
    return stated(
        "ridge",
        "A ridge regressor does not collapse: neither does the spread of its outputs within classes vanish, "
        "nor its rank",
        SLIDES,
        at_least(
            f"strengths from {np.min(gamma):g} to {np.max(gamma):g}: least quotient",
            np.min(quotient),
            0.3,
            why="it is 0.39 to 0.43",
        ),
        equals("least rank", np.min(ranks), CLASSES - 1, why="ten classes, centered"),
        equals("largest rank", np.max(ranks), CLASSES - 1, why="the same"),
        at_most(
            "networks at 1e-3: their quotient over the least",
            _at(saved, USEFUL, "nc1_trace") / np.min(quotient),
            0.1,
            why="depth makes the difference",
        ),
    )


def _accuracy(config: Config, saved: Saved) -> Claim:
    tests = np.asarray(saved["squares/test"])[:, -1]
    moderate = np.min([_at(saved, decay, "test") for decay in (MODERATE, USEFUL)])
    error = (0.05 * 0.95 / config.test_images) ** 0.5
    chance = 3 * (0.1 * 0.9 / config.test_images) ** 0.5
    return stated(
        "accuracy",
        "Features that collapse to their class means tell new images apart as well as others; those that "
        "vanish do not at all",
        f"{SLIDES} (that it is commonly regarded as a good thing)",
        at_least(
            "test accuracy at 1e-4 and 1e-3, the smaller, less that without decay",
            moderate - _at(saved, 0.0, "test"),
            -2 * 2**0.5 * error,
            why="two standard errors of a difference",
        ),
        equals("test accuracy at the largest decay", tests[-1], 0.1, chance + 0.02, why="chance"),
    )


def _cutoff(saved: Saved) -> Claim:
    at, nc1 = np.asarray(saved["cutoff/at"]), np.asarray(saved["cutoff/nc1"])
    kept = nc1[at >= 1e-6]
    inside = _at(saved, MODERATE, "nc1")
    return qualified(
        "cutoff",
        "tr(S_W pinv(S_B)) / K measures the spread of collapsed features in 32-bit",
        f"{SLIDES} (numerics are measured here)",
        condition="the pseudo-inverse leaves out eigenvalues below a millionth of the largest",
        inside=[
            at_most("cut-offs from 1e-6 to 1e-3: spread", np.ptp(kept) / np.mean(kept), 0.01, why=ROUNDING),
            at_most(
                "the measure of `neural_collapse` over that, less 1",
                abs(inside / kept[0] - 1),
                1e-2,
                why=ROUNDING,
            ),
        ],
        outside=[
            at_least(
                "cut-off 1e-9: size, over that at 1e-6",
                abs(nc1[np.argmin(np.abs(at - 1e-9))]) / kept[0],
                10,
                why="it divides by rounding",
            )
        ],
    )


MEASURES = {"nc1_trace": "NC1 (traces)", "nc2": "NC2", "nc3": "NC3", "nc4": "NC4"}


def figure(config: Config, saved: Saved) -> Figure:
    """Measures over training and over decay, accuracy and rank, cross-entropy, and free features."""
    drawn, axes = plotting.new_figure(2, 3, width=3.9, height=3.3)
    (without, moderate, over), (accuracy, entropy, free) = axes
    _training_panel(without, saved, 0.0, "No weight decay")
    _training_panel(moderate, saved, USEFUL, "Weight decay 1e-3")
    _decay_panel(over, saved)
    _accuracy_panel(accuracy, saved)
    _entropy_panel(entropy, saved)
    _free_panel(free, saved)
    return drawn


def _training_panel(ax: Axes, saved: Saved, decay: float, title: str) -> None:
    (index,) = np.flatnonzero(np.asarray(saved["squares/decay"]) == decay)
    for at, (name, label) in enumerate(MEASURES.items()):
        values = np.asarray(saved[f"squares/{name}"])[index]
        ax.semilogy(saved["step"], np.maximum(values, 1e-3), color=f"C{at}", label=label)
    plotting.finish(ax, title, "step", "measure (at least 1e-3)", {"loc": "upper right", "ncols": 2})
    ax.set_ylim(7e-4, 300)


def _place(decay: np.ndarray) -> np.ndarray:
    """Weight decays on a logarithmic axis; zero a decade below the least of the others."""
    return np.where(decay > 0, decay, np.min(decay[decay > 0]) / 10)


def _label_decays(ax: Axes, decay: np.ndarray) -> None:
    at = _place(decay)
    ax.set_xscale("log")
    exponents = np.arange(np.ceil(np.log10(at[decay > 0][0]) - 1e-9), 0)
    shown = [(at[0], "0"), *((10.0**power, f"{10.0**power:.0e}".replace("e-0", "e-")) for power in exponents)]
    plotting.label_ticks(ax, [place for place, _ in shown], [label for _, label in shown])


def _decay_panel(ax: Axes, saved: Saved) -> None:
    decay = np.asarray(saved["squares/decay"])
    shown = {"nc1": "NC1 (pinv)", **{name: MEASURES[name] for name in ("nc1_trace", "nc2", "nc3")}}
    for at, (name, label) in enumerate(shown.items()):
        color = f"C{at - 1}" if at else "C4"
        ax.plot(
            _place(decay), np.asarray(saved[f"squares/{name}"])[:, -1], "o-", color=color, label=label, ms=4
        )
    ridge = float(np.min(saved["ridge/nc1_trace"]))
    ax.axhline(ridge, color="0.45", ls=":", lw=1.6, label="ridge, NC1 (traces)")
    ax.set_yscale("log")
    _label_decays(ax, decay)
    plotting.make_room(ax, above=0.55)
    plotting.finish(
        ax, "After training", "weight decay κ", "measure", {"loc": "upper left", "ncols": 2, "fontsize": 7}
    )


def _accuracy_panel(ax: Axes, saved: Saved) -> None:
    decay = np.asarray(saved["squares/decay"])
    rank = np.asarray(saved["squares/rank"])[:, -1]
    ax.plot(_place(decay), np.asarray(saved["squares/train"])[:, -1], "s-", color="C1", label="train", ms=4)
    ax.plot(_place(decay), np.asarray(saved["squares/test"])[:, -1], "o-", color="C0", label="test", ms=4)
    ax.plot(_place(decay), rank / rank[0], "^--", color="0.45", label=f"rank / {rank[0]:.0f}", ms=4)
    _label_decays(ax, decay)
    legend = {"loc": "upper left", "ncols": 3, "fontsize": 7}
    plotting.finish(ax, "Accuracy and rank", "weight decay κ", "share", legend, ylim=(-0.02, 1.6))


def _entropy_panel(ax: Axes, saved: Saved) -> None:
    for index, decay in enumerate(np.asarray(saved["entropy/decay"])):
        for name, style in (("nc1_trace", "-"), ("nc3", "--")):
            values = np.asarray(saved[f"entropy/{name}"])[index]
            ax.semilogy(
                saved["step"], values, style, color=f"C{index}", label=f"{MEASURES[name]}, κ = {decay:g}"
            )
    ax.set_ylim(0.05, 50)
    plotting.finish(ax, "Cross-entropy", "step", "measure", {"loc": "upper right", "ncols": 2, "fontsize": 6})


def _free_panel(ax: Axes, saved: Saved) -> None:
    critical, with_bias = np.asarray(saved["free/critical"]), np.asarray(saved["free/with_bias"])
    values = np.asarray(saved["free/values"])
    fine = np.linspace(0, critical.max(), 200)
    ax.plot(critical[~with_bias], values[~with_bias, 0], "o", color="C0", label="largest, no bias")
    ax.plot(critical[with_bias], values[with_bias, -2], "x", color="C1", label="third of four, bias")
    ax.plot(critical[with_bias], values[with_bias, -1], "+", color="C3", label="last, bias")
    law = PER_CLASS**0.5 * np.maximum(1 - np.sqrt(fine), 0)
    ax.plot(fine, law, label="soft threshold", **plotting.THEORY)
    ax.axvline(1, color="0.85", lw=0.8, zorder=0)
    plotting.finish(ax, "Free features", "K² n γ_w γ_h", "singular value of WH", "upper right")
