"""Posterior collapse: the modes of an autoencoder go one by one as beta grows, each at a known threshold.

A linear variational autoencoder keeps a mode of size zeta_i while beta < beta_i = zeta_i^2 / eta_dec^2, and
no more of them than it has latents. Its loss in closed form is minimized from many starts; networks, linear
and with a ReLU in their encoder, are trained on latents that are drawn. Images are centered; their zeta_i^2
are the eigenvalues of their covariance, and both standard deviations, eta_dec and eta_enc, are 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import collapse
from dynamics.collapse import VaeWeights
from dynamics.spectra import active_units
from models.data.images import digits, mnist
from models.draws import normal
from models.functional import as_function
from models.training import train
from models.vae import AmortizedVae, LinearVae, VaeInputs, negative_elbo, vae_batch, vae_weights
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, corrected, equals, every, stated
from sims.compare import largest, named_groups
from sims.ranges import Count, Positive, Range, check_ranges
from sims.results import Context, Saved

THEOREM = "ziyin2022talk, Theorem 2 (linear latent variable model)"
SLIDES = "ziyin2022talk, slides on posterior collapse"
# The largest eigenvalues of the covariance of the digits, and the sum of all.
DIGITS = (0.69886, 0.63917, 0.55355, 0.39470, 0.27138, 0.23076, 0.20256, 0.17184, 0.15738, 0.14450)
TOTAL = 4.69328
MODES = 64  # that the closed-form loss has; of larger images the smaller ones are constants
ALIVE = 1e-3  # of a decoder's column
FAR = 0.1  # of a distance to a threshold, where counts are exact
NEAR, NEAR_STARTS = (0.99, 1.01), 1  # of a threshold, where the closed-form loss is minimized too
SHOWN, SAMPLES = 5, 16  # weights beta with digits, and digits of each
# Correlated inputs and targets, of which no mode is a singular value of E[y x^T]; four latents.
LATENTS, DEC, ENC, STARTS = 4, 0.8, 1.7, 64
EXAMPLES, NETWORKS = 12, 4  # examples of these data, and networks trained on them at each beta
ZETA, SPREAD = (1.6, 1.2, 0.9, 0.6, 0.3), (2.0, 1.5, 1.0, 0.6, 0.4, 0.2)  # modes, and what inputs vary by
REPEATED = np.pad(np.diag([2.0, 2.0, 1.5, 1.0, 0.5]), ((0, 0), (0, 1)))
STEP = 0.05  # of log beta beside a threshold


@dataclass(frozen=True)
class Config:
    """The images, the weights of the prior, and how networks are trained."""

    data: Literal["digits", "mnist"] = "digits"
    """Images: digits that come with scikit-learn, or MNIST from --data-dir."""
    latents: Annotated[int, Range(at_least=8, at_most=32)] = 12
    """Latents of the networks; with many of them small modes want a longer search."""
    betas: tuple[Positive, ...] = ()
    """Weights of the prior; ten where there are none: between the thresholds that are furthest apart, and on
    both sides of all."""
    starts: Count = 2
    """Random starts of the search for the minimum on the images."""
    search: Annotated[int, Range(at_least=1000)] = 3000
    """Steps of descent with momentum from each."""
    hidden: Count = 32
    """Hidden units of the amortized encoder."""
    steps: Annotated[int, Range(at_least=100)] = 5000
    """Steps of Adam on drawn latents."""
    linear_batch: Count = 256
    """Images in a batch of linear networks."""
    amortized_batch: Count = 128
    """Of amortized ones."""
    linear_rate: Positive = 0.007
    """Learning rate of linear networks; it falls to a thousandth by a cosine."""
    amortized_rate: Positive = 0.005
    """Of amortized ones."""

    def __post_init__(self):
        check_ranges(self)
        if 0 < len(self.betas) < SHOWN:
            raise ValueError(f"betas must be at least {SHOWN}, or none, got {self.betas}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), starts=64, steps=12_000),
    "paper": replace(
        Config(), starts=64, search=6000, steps=50_000, linear_batch=512, amortized_batch=512, hidden=128
    ),
}


class Form(NamedTuple):
    """What a linear autoencoder has in closed form, as `dynamics.collapse.linear_vae_loss` takes it."""

    Z: Any
    beta: Any
    eta_dec: Any = 1.0
    eta_enc: Any = 1.0


def _images(config: Config, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Centered images, flat, and their mean."""
    images = digits() if config.data == "digits" else mnist(context.data_dir)
    flat = np.asarray(images[0], float).reshape(len(images[0]), -1)
    return flat - flat.mean(axis=0), flat.mean(axis=0)


def _betas(thresholds: np.ndarray, count: int = 10) -> np.ndarray:
    """Rising weights of the prior: two below all thresholds, one above, the others in the widest gaps."""
    thresholds = thresholds[thresholds > 1e-9 * thresholds[0]]
    ratios = thresholds[:-1] / thresholds[1:]
    widest = np.sort(np.argsort(-ratios, kind="stable")[: count - 3])
    middles = np.sqrt(thresholds[widest] * thresholds[widest + 1])
    return np.concatenate(
        [[0.5 * thresholds[-1], 0.8 * thresholds[-1]], middles[::-1], [1.2 * thresholds[0]]]
    )


@partial(jax.jit, static_argnums=0)
def _least(latents: int, lanes: Form) -> collapse.VaeMinimum:
    return jax.vmap(lambda form: collapse.vae_minimum(form.Z, latents, *form[1:]))(lanes)


@partial(jax.jit, static_argnums=(0, 1))
def _searched(latents: int, steps: int, lanes: tuple[Form, Array]) -> dict[str, Array]:
    """What descent on the closed-form loss finds in each lane, latents with the largest decoder first."""

    def one(lane):
        (Z, beta, dec, enc), start = lane

        def loss(weights):
            U, V, logs = weights
            return collapse.linear_vae_loss(U, V, jnp.exp(logs / 2), Z, beta, dec, enc)

        U, V = jnp.split(
            0.1 * normal(jax.random.wrap_key_data(start), (sum(Z.shape), latents), Z.dtype), [Z.shape[0]]
        )
        # The largest curvature is about this. Momentum bears four times its inverse, but overshoots at first.
        curvature = (enc**2 + jnp.linalg.norm(Z, 2) ** 2 / enc**2) / dec**2 + beta * (1 + 1 / enc**2)
        rate = optax.linear_schedule(0.3 / curvature, 2.5 / curvature, steps // 3)
        weights = VaeWeights(U, V, jnp.full(latents, 2 * jnp.log(enc)))
        (U, V, logs), path = train(
            loss, weights, optax.sgd(rate, momentum=0.985), steps=steps, every=steps, observe=loss
        )
        order = jnp.argsort(-jnp.sum(U**2, axis=0))
        sizes = {"lam": jnp.linalg.norm(U, axis=0)[order], "theta": jnp.linalg.norm(V, axis=0)[order]}
        return {"loss": path.ys[-1], "ok": path.ok, "sigma2": jnp.exp(logs)[order], **sizes}

    return jax.vmap(one)(lanes)


def _search(
    latents: int, steps: int, groups: Mapping[str, tuple[Sequence[Form], int]], key: Array
) -> dict[str, dict[str, np.ndarray]]:
    """Searches of groups of closed forms, each from so many starts: arrays (form, start, ...)."""
    keys = jax.device_get(jax.random.key_data(jax.random.split(key, max(n for _, n in groups.values()))))
    lanes = {
        name: [(_arrays(form), keys[start]) for form in forms for start in range(count)]
        for name, (forms, count) in groups.items()
    }
    ends = named_groups(partial(_searched, latents, steps), lanes)
    if not all(np.all(end.pop("ok")) for end in ends.values()):
        raise RuntimeError("search: the numbers are not finite")
    shapes = {name: (len(forms), count) for name, (forms, count) in groups.items()}
    return {
        name: {part: values.reshape(*shapes[name], *values.shape[1:]) for part, values in end.items()}
        for name, end in ends.items()
    }


def _closed(latents: int, groups: Mapping[str, Sequence[Form]]) -> dict[str, collapse.VaeMinimum]:
    lanes = {name: [_arrays(form) for form in forms] for name, forms in groups.items()}
    return named_groups(partial(_least, latents), lanes)


def _arrays(form: Form) -> Form:
    return jax.tree.map(np.asarray, form)


@partial(jax.jit, static_argnums=(0, 1))
def _trained(config: Config, kind: str, key: Array, x: Array, betas: Array) -> dict[str, Array]:
    """Networks trained on drawn latents, one for each beta, with the same draws; largest latents first."""
    first, key = jax.random.split(key)
    size, latents = x.shape[1], config.latents
    rate, batch = (getattr(config, f"{kind}_{name}") for name in ("rate", "batch"))
    if kind == "linear":
        U, W = jnp.split(0.1 * normal(first, (2 * size, latents), x.dtype), 2)
        network: Any = LinearVae(VaeWeights(U, W, jnp.zeros(latents, x.dtype)))
    else:
        network = AmortizedVae(first, size, config.hidden, latents, size, x.dtype)
    predict, params = as_function(network)

    def one(beta):
        end, path = train(
            lambda params, batch: negative_elbo(params, (predict, *batch, (beta, 1.0, 1.0))),
            params,
            optax.adam(optax.cosine_decay_schedule(rate, config.steps, 1e-3)),
            steps=config.steps,
            every=config.steps,
            observe=lambda params: params["decoder"]["kernel"][...],
            batches=lambda key: vae_batch(key, x, x, batch, latents),
            key=key,
        )
        U, (_, mean, logs) = path.ys[-1].T, predict(end, VaeInputs(x))
        order = jnp.argsort(-jnp.sum(U**2, axis=0))
        divergence = jnp.mean(mean**2 + jnp.exp(logs) - 1 - logs, axis=0) / 2
        return {
            "ok": path.ok,
            "U": U[:, order],
            "lam": jnp.linalg.norm(U, axis=0)[order],
            "active": active_units(mean),
            "variance": jnp.var(mean, axis=0)[order],
            "sigma2": jnp.mean(jnp.exp(logs), axis=0)[order],
            "divergence": divergence[order],
        }

    return jax.vmap(one)(betas)


def _networks(config: Config, key: Array, x: np.ndarray, betas: np.ndarray) -> tuple[dict, np.ndarray]:
    """What both kinds of networks ended at, and the decoders of linear ones."""
    found, decoders = {}, {}
    for kind, own in zip(("linear", "amortized"), jax.random.split(key), strict=True):
        numbers = (jnp.asarray(x, jnp.float32), jnp.asarray(betas, jnp.float32))
        ends = jax.device_get(_trained(config, kind, own, *numbers))
        if not np.all(ends["ok"]):
            raise RuntimeError(f"{kind}: training ended with numbers that are not finite")
        decoders[kind] = ends["U"]
        parts = {name: ("beta latent", ends[name]) for name in ("variance", "sigma2", "lam")}
        counted = {"active": ("beta", ends["active"]), "divergence": ("beta latent", ends["divergence"])}
        found[kind] = {**counted, **(parts if kind == "linear" else {})}
    return found, decoders["linear"]


def _correlated() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Z = E[y x^T] A^{-1/2}, (5, 6), and inputs (12, 6) that go together and targets (12, 5) that have it.

    Both are centered, and a part of the targets is in no linear map of the inputs.
    """
    rng = np.random.default_rng(0)
    F, G, axes = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (5, 6, 6))
    Z = F * np.array(ZETA) @ G[:, :5].T
    root = (axes * np.array(SPREAD)) @ axes.T
    white = rng.normal(size=(EXAMPLES, EXAMPLES - 1))
    white = np.linalg.qr(white - white.mean(axis=0))[0] * EXAMPLES**0.5
    return Z, white[:, :6] @ root, white[:, :6] @ Z.T + 0.3 * white[:, 6:]


@partial(jax.jit, static_argnums=0)
def _descended(steps: int, x: Array, y: Array, lanes: tuple[Array, Array]) -> dict[str, Array]:
    """Singular values of the decoders of networks trained on (x, y) for each beta, from each start.

    Noise on 2 k points has the mean and the covariance of a normal law, and the loss is quadratic in it: so
    this is its mean over drawn latents.
    """
    points = jnp.concatenate([jnp.eye(LATENTS), -jnp.eye(LATENTS)]) * LATENTS**0.5
    inputs = VaeInputs(jnp.repeat(x, len(points), axis=0), jnp.tile(points, (len(x), 1)))
    targets = jnp.repeat(y, len(points), axis=0)
    sizes = ((y.shape[1], LATENTS), (x.shape[1], LATENTS))
    spread, gain = jnp.linalg.norm(x, 2) ** 2 / len(x), jnp.linalg.norm(y, 2) ** 2 / len(y) / ENC**2

    def one(lane):
        beta, start = lane
        keys = jax.random.split(jax.random.wrap_key_data(start))
        U, W = (0.1 * normal(key, size, x.dtype) for key, size in zip(keys, sizes, strict=True))
        network = LinearVae(VaeWeights(U, W, jnp.full(LATENTS, 2 * jnp.log(ENC), x.dtype)))
        predict, params = as_function(network)
        # As for the loss in closed form, but for the spread of inputs, which the encoder's curvature has.
        curvature = (ENC**2 + spread * gain) / DEC**2 + beta * (1 + spread / ENC**2)
        rate = optax.linear_schedule(0.3 / curvature, 2.5 / curvature, steps // 3)
        _, path = train(
            lambda params: negative_elbo(params, (predict, inputs, targets, (beta, DEC, ENC))),
            params,
            optax.sgd(rate, momentum=0.985),
            steps=steps,
            every=steps,
            observe=lambda params: jnp.linalg.svd(vae_weights(params).U, compute_uv=False),
        )
        return {"decoder": path.ys[-1], "ok": path.ok}

    return jax.vmap(one)(lanes)


def _of_network(steps: int, x: np.ndarray, y: np.ndarray, betas: np.ndarray, key: Array) -> np.ndarray:
    """Singular values of decoders (beta, start, latent)."""
    keys = jax.random.key_data(jax.random.split(key, NETWORKS))
    lanes = (np.repeat(betas, NETWORKS), np.tile(keys, (len(betas), 1)))
    ends = jax.device_get(_descended(steps, x, y, lanes))
    if not np.all(ends["ok"]):
        raise RuntimeError("networks on correlated data: the numbers are not finite")
    return ends["decoder"].reshape(len(betas), NETWORKS, LATENTS)


def _beside(thresholds: np.ndarray) -> np.ndarray:
    """Two weights below each threshold, and two above."""
    return thresholds[:, None] * np.exp(STEP * np.array([-2, -1, 1, 2]))


def _between(thresholds: np.ndarray) -> np.ndarray:
    """Falling weights: above all thresholds, between each two, and below all."""
    middles = np.sqrt(thresholds[:-1] * thresholds[1:])
    return np.concatenate([[1.5 * thresholds[0]], middles, [0.5 * thresholds[-1]]])


def _small(steps: int, key: Array) -> tuple[np.ndarray, dict]:
    """Weights beta, and what the closed-form loss of correlated data and of repeated modes has there."""
    Z, x, y = _correlated()
    zeta, of_product = np.asarray(collapse.vae_modes(x, y)), np.linalg.svd(y.T @ x / len(x), compute_uv=False)
    betas = _between(zeta[:LATENTS] ** 2 / DEC**2)[1:]
    beside = _beside(zeta[:LATENTS] ** 2 / DEC**2)
    distinct = np.unique(np.diag(REPEATED))[::-1]
    counted = _between(distinct**2)
    groups = {
        "searched": ([Form(Z, beta, DEC, ENC) for beta in betas], STARTS),
        "beside": ([Form(Z, beta, DEC, ENC) for beta in beside.ravel()], 4),
        "repeated": ([Form(REPEATED, beta) for beta in counted], 8),
    }
    found = _search(LATENTS, steps, groups, key)
    decoder = _of_network(steps, x, y, betas, jax.random.fold_in(key, 1))
    closed = {
        "least": groups["searched"][0],
        **{
            name: [Form(np.pad(np.diag(values), ((0, 0), (0, 1))), beta, DEC, ENC) for beta in betas]
            for name, values in (("printed", of_product), ("whitened", zeta))
        },
    }
    least = _closed(LATENTS, closed)
    # The divergence from the prior at the best start, whose slope in log beta jumps by a half.
    best = found["beside"]["loss"].argmin(axis=1)[:, None, None]
    theta, sigma2 = (
        np.take_along_axis(found["beside"][part], best, axis=1)[:, 0] for part in ("theta", "sigma2")
    )
    logs = np.log(sigma2 / ENC**2)
    divergence = np.sum(theta**2 / ENC**2 + np.exp(logs) - 1 - logs, axis=1) / 2
    return betas, {
        "zeta": ("mode_5", zeta),
        "of_product": ("mode_5", of_product),
        "searched": {
            "loss": ("small_beta start_64", found["searched"].pop("loss")),
            **{part: ("small_beta start_64 unit", values) for part, values in found["searched"].items()},
        },
        "least": {
            "loss": ("small_beta", least["least"].loss),
            **{
                part: ("small_beta unit", getattr(least["least"], part))
                for part in ("lam", "theta", "sigma2")
            },
        },
        "decoder": ("small_beta start_4 unit", decoder),
        "printed": ("small_beta unit", least["printed"].lam),
        "whitened": ("small_beta unit", least["whitened"].lam),
        "threshold": ("critical", zeta[:LATENTS] ** 2 / DEC**2),
        "beside": {
            "beta": ("critical side", beside),
            "divergence": ("critical side", divergence.reshape(-1, 4)),
        },
        "repeated": {
            "zeta": ("mode_5", np.diag(REPEATED)),
            "beta": ("counted", counted),
            "lam": ("counted start_8 unit", found["repeated"]["lam"]),
        },
        "rotated": _rotated(Z, betas, least["least"]),
    }


@jax.jit
@jax.vmap
def _losses(weights: tuple, form: tuple) -> Array:
    return collapse.linear_vae_loss(*weights, *form)


def _rotated(Z: np.ndarray, betas: np.ndarray, least: collapse.VaeMinimum) -> dict:
    """What a rotation of the latents costs, with the best variances for it and with a full covariance."""
    P = np.linalg.qr(np.random.default_rng(0).normal(size=(LATENTS, LATENTS)))[0]
    F, _, G = np.linalg.svd(Z, full_matrices=False)
    U, V = (
        factor[:, :LATENTS] * np.asarray(size)[:, None] @ P
        for factor, size in ((F, least.lam), (G.T, least.theta))
    )
    M = np.eye(LATENTS) + (ENC / DEC) ** 2 / betas[:, None, None] * np.swapaxes(U, 1, 2) @ U
    diagonal = np.diagonal(M, axis1=1, axis2=2)
    # The best variances and the best covariance for this decoder.
    own = np.sqrt(ENC**2 / diagonal)[:, :, None] * np.eye(LATENTS)
    full = ENC * np.linalg.cholesky(np.linalg.inv(M))
    ones = np.ones(len(betas))
    form = (Z * ones[:, None, None], betas, DEC * ones, ENC * ones)
    lanes = {"diagonal": own, "full": full}
    excess = {
        name: ("small_beta", np.asarray(_losses((U, V, scale), form)) - least.loss)
        for name, scale in lanes.items()
    }
    gap = betas / 2 * (np.sum(np.log(diagonal), axis=1) - np.linalg.slogdet(M)[1])
    return {**excess, "gap": ("small_beta", gap)}


def run(config: Config, context: Context) -> dict:
    """Closed forms over beta, searches of the loss in closed form, and networks with drawn latents."""
    context.progress("closed forms", 0.0)
    x, mean = _images(config, context)
    zeta = np.asarray(collapse.vae_modes(x))[:MODES]
    thresholds, Z = zeta**2, np.diag(zeta)
    betas = np.sort(config.betas) if config.betas else _betas(thresholds[: config.latents])
    looked_at = thresholds[[0, 1, 3, 5, 7]]
    near = (looked_at[:, None] * np.array(NEAR)).ravel()
    fine = np.geomspace(betas[0], betas[-1], 120)
    least = _closed(
        config.latents, {"at": [Form(Z, beta) for beta in betas], "fine": [Form(Z, beta) for beta in fine]}
    )
    search, small, network = jax.random.split(jax.random.key(context.seed), 3)
    context.progress("the loss in closed form", 0.1)
    groups = {
        "searched": ([Form(Z, beta) for beta in betas], config.starts),
        "near": ([Form(Z, beta) for beta in near], NEAR_STARTS),
    }
    found = _search(config.latents, config.search, groups, search)
    small_betas, small_ones = _small(config.search, small)
    context.progress("training on drawn latents", 0.5)
    networks, decoders = _networks(config, network, x, betas)
    shown = np.round(np.linspace(0, len(betas) - 1, SHOWN)).astype(int)
    z = np.random.default_rng(context.seed).normal(size=(SAMPLES, config.latents))
    return {
        "threshold": ("mode", thresholds),
        "total": float(np.sum(x**2) / len(x)),
        "beta": ("beta", betas),
        "least": {"loss": ("beta", least["at"].loss), **_of_minimum("beta", least["at"])},
        "fine": {"at": ("fine", fine), **_of_minimum("fine", least["fine"])},
        "searched": {
            "loss": ("beta start", found["searched"]["loss"]),
            **{part: ("beta start latent", found["searched"][part]) for part in ("lam", "sigma2")},
        },
        "near": {
            "beta": ("near", near),
            "lam": ("near start_1 latent", found["near"]["lam"]),
        },
        "network": networks,
        "shown": ("shown", shown),
        "generated": (
            "shown sample pixel",
            (mean + z @ np.swapaxes(decoders[shown], 1, 2)).astype(np.float32),
        ),
        "small_beta": ("small_beta", small_betas),
        "small": small_ones,
    }


def _of_minimum(dim: str, least: collapse.VaeMinimum) -> dict:
    return {part: (f"{dim} latent", getattr(least, part)) for part in ("lam", "sigma2")}


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The minimum, what decides, what rotations cost, how many modes go and how; and networks beside it."""
    yield _minimum_claim(saved)
    yield _images_claim(config, saved)
    # What is printed and fails: the values that decide, a rotation that is free, the number of collapses.
    yield _whitening(saved)
    yield _rotation(saved)
    yield _collapses(saved)
    yield _order_claim(saved)
    yield _active(saved)
    yield _learned(saved)
    yield _of_prior(saved)
    yield _variety(saved)


def _minimum_claim(saved: Saved) -> Claim:
    found, least = saved["small/searched"], saved["small/least"]
    rest = "descent has come to rest"
    sizes = {
        part: largest(found[part] - np.asarray(least[part])[:, None]) for part in ("lam", "theta", "sigma2")
    }
    return stated(
        "minimum",
        "The global minimum has singular values (zeta_i^2 - beta eta_dec^2)^{1/2} / eta_enc of the decoder, "
        "and of the encoder eta_enc / zeta_i of the root; a mode that is gone has the variance of the prior",
        f"{THEOREM} (equations 17 and 18; variances and least loss are derived)",
        at_most(
            "64 starts at four weights beta: loss over the minimum's, largest",
            largest(found["loss"] - np.asarray(least["loss"])[:, None]),
            3e-14,
            why=rest,
        ),
        at_most("decoder's columns less lambda", sizes["lam"], 3e-9, why=rest),
        at_most("encoder's columns less theta", sizes["theta"], 6e-9, why=rest),
        at_most("variances less beta (eta_dec eta_enc / zeta)^2", sizes["sigma2"], 9e-9, why=rest),
    )


def _images_claim(config: Config, saved: Saved) -> Claim:
    gap = np.asarray(saved["searched/loss"]) - np.asarray(saved["least/loss"])[:, None]
    near = np.sum(np.asarray(saved["near/lam"]) > ALIVE, axis=-1)
    rest = "descent has come to rest"
    checks = [
        at_most("loss over the minimum's at every beta, from every start", largest(gap), 2.5e-11, why=rest),
        every(
            "modes as expected one percent below and above thresholds 1, 2, 4, 6 and 8",
            near == _above(saved, saved["near/beta"])[:, None],
        ),
    ]
    if config.data == "digits":
        known = "they are given in five digits"
        largest_modes = np.asarray(saved["threshold"])[: len(DIGITS)]
        checks += [
            at_most(
                "the largest thresholds less those known", largest(largest_modes - DIGITS), 1e-5, why=known
            ),
            at_most("variance of the images less 4.69328", abs(saved["total"] - TOTAL), 1e-5, why=known),
        ]
    return stated(
        "images",
        "On images the thresholds in beta are the eigenvalues of their covariance, for eta_dec = 1",
        f"{THEOREM} (for y = x)",
        *checks,
    )


def _whitening(saved: Saved) -> Claim:
    part = saved["small"]
    decoder = np.asarray(part["decoder"])
    rest = "descent has come to rest"
    return corrected(
        "whitening",
        "What decides are the singular values of E[y x^T] (printed are their squares); it is those of "
        "E[y x^T] A^{-1/2}",
        f"{THEOREM} (zeta_i on the slide before)",
        printed=[
            at_most(
                "networks trained on correlated x and y: singular values of the decoder, less lambda of "
                "those of E[y x^T]",
                largest(decoder - np.asarray(part["printed"])[:, None]),
                1e-6,
                why=rest,
            )
        ],
        mended=[
            at_most(
                "the same, less lambda of those of E[y x^T] A^{-1/2}",
                largest(decoder - np.asarray(part["whitened"])[:, None]),
                1e-9,
                why=rest,
            ),
            at_least(
                "largest difference of the two kinds of singular values",
                largest(np.asarray(part["zeta"]) - np.asarray(part["of_product"])),
                0.1,
                why="inputs are far from white",
            ),
        ],
    )


def _rotation(saved: Saved) -> Claim:
    part = saved["small"]
    excess, gap = np.asarray(part["rotated/diagonal"]), np.asarray(part["rotated/gap"])
    return corrected(
        "rotation",
        "Latents of the minimum cannot be rotated for free: with variances of their own it costs Hadamard's "
        "gap (beta / 2) (sum_i log M_ii - log det M), M = 1 + (eta_enc / eta_dec)^2 U^T U / beta",
        f"{THEOREM} (P is printed as any orthogonal matrix)",
        printed=[at_most("loss of rotated latents over the minimum", largest(excess), 1e-12, why=ROUNDING)],
        mended=[
            at_most("that less Hadamard's gap", largest(excess - gap), 3e-14, why=ROUNDING),
            at_most(
                "with a full covariance: loss over the minimum",
                largest(part["rotated/full"]),
                1.8e-14,
                why=ROUNDING,
            ),
        ],
    )


def _collapses(saved: Saved) -> Claim:
    part = saved["small"]
    counts = np.sum(np.asarray(part["repeated/lam"]) > ALIVE, axis=-1)
    order = np.argsort(np.asarray(part["repeated/beta"]))[::-1]
    changes = np.count_nonzero(np.diff(counts[order], axis=0), axis=0)
    zeta = np.asarray(part["repeated/zeta"])
    exact = "counts are exact"
    return corrected(
        "collapses",
        "There are as many collapses as different positive zeta_i among the k largest, for k latents",
        f"{THEOREM} (the slide after)",
        printed=[
            equals(
                "four latents, modes 2, 2, 1.5, 1, 0.5: values of beta where modes go",
                np.max(changes),
                len(np.unique(zeta)),
                why="as many as different zeta_i",
            )
        ],
        mended=[
            equals("the same", np.max(changes), len(np.unique(zeta[:LATENTS])), why="of the largest four"),
            equals("and from the start that finds the fewest", np.min(changes), np.max(changes), why=exact),
            equals("modes at the smallest beta", np.max(counts[order[-1]]), LATENTS, why=exact),
        ],
    )


def _order_claim(saved: Saved) -> Claim:
    part = saved["small/beside"]
    logs, divergence = np.log(np.asarray(part["beta"])), np.asarray(part["divergence"])
    slopes = (np.diff(divergence, axis=1) / np.diff(logs, axis=1))[:, ::2]
    critical = np.log(np.asarray(saved["small/threshold"]))
    at = divergence[:, 1:3] + slopes * (critical[:, None] - logs[:, 1:3])
    return stated(
        "second-order",
        "Each collapse is a transition of second order: the slope of the least loss in beta, the divergence "
        "from the prior, is continuous, and the second derivative jumps by 1 / (2 beta_i)",
        f"{THEOREM} (the slides beside it; the jump is derived)",
        at_most(
            "jump times 2 beta_i, less 1, at four thresholds",
            largest(2 * (slopes[:, 1] - slopes[:, 0]) - 1),
            6e-8,
            why="of searches five and ten percent away, on which the divergence is linear in log beta",
        ),
        at_most(
            "divergence at the threshold, from below less from above",
            largest(at[:, 1] - at[:, 0]),
            3e-9,
            why="descent has come to rest",
        ),
    )


def _thresholds(saved: Saved) -> np.ndarray:
    """Those of the largest modes, as many as there are latents: the others never live."""
    return np.asarray(saved["threshold"])[: np.asarray(saved["least/lam"]).shape[1]]


def _above(saved: Saved, beta: Any) -> np.ndarray:
    """How many thresholds are above each weight."""
    return np.sum(_thresholds(saved) > np.asarray(beta)[:, None], axis=1)


def _far(saved: Saved) -> np.ndarray:
    """Which weights are further than a tenth from every threshold."""
    return np.min(np.abs(np.asarray(saved["beta"])[:, None] / _thresholds(saved) - 1), axis=1) > FAR


def _divergence(saved: Saved, beta: Any) -> np.ndarray:
    """Of the latents from the prior, at each weight."""
    return np.sum(np.log(np.maximum(_thresholds(saved) / np.asarray(beta)[:, None], 1)), axis=1) / 2


def _active(saved: Saved) -> Claim:
    far, expected = _far(saved), _above(saved, saved["beta"])
    active = {kind: np.asarray(saved[f"network/{kind}/active"]) for kind in ("linear", "amortized")}
    off = {kind: np.abs(counted - expected) for kind, counted in active.items()}
    tied = "close to a threshold two latents may share a mode for long"
    return stated(
        "active-units",
        "Networks with drawn latents have as many active units as thresholds are above beta; those with a "
        "ReLU in their encoder as well",
        f"{SLIDES} (the number of modes left)",
        every("linear: weights beta with a count that is at most one off", off["linear"] <= 1, 1, why=tied),
        every("those further than a tenth from every threshold: exact", off["linear"][far] == 0),
        at_least("their number", np.sum(far & (off["linear"] == 0)), 5, why="of ten"),
        every("amortized: at most one off", off["amortized"] <= 1, 1, why=tied),
        every(
            "further than a tenth: exact", off["amortized"][far] == 0, 1, why="its encoder is found slower"
        ),
    )


def _learned(saved: Saved) -> Claim:
    far = _far(saved)
    linear, least = saved["network/linear"], saved["least"]
    gaps = {part: largest((linear[part] - np.asarray(least[part]))[far]) for part in ("lam", "sigma2")}
    alive = np.asarray(least["lam"])[far] > 0
    both = (np.asarray(linear["variance"]) + np.asarray(linear["sigma2"]))[far]
    noise = "drawn latents leave two or three percent"
    return stated(
        "learned-variance",
        "Such networks learn the variance beta / beta_i of each mode, and 1 of those that are gone",
        f"{THEOREM} (the variances are derived)",
        at_most("further than a tenth: variances less those", gaps["sigma2"], 0.05, why=noise),
        at_most("columns of the decoder less lambda", gaps["lam"], 0.05, why=noise),
        at_most(
            "variance of the mean plus that of the noise, less 1, of modes that live",
            largest(both[alive] - 1),
            0.07,
            why="the sum of two such numbers",
        ),
    )


def _of_prior(saved: Saved) -> Claim:
    law = _divergence(saved, saved["beta"])
    divergence = {
        kind: np.sum(saved[f"network/{kind}/divergence"], axis=1) for kind in ("linear", "amortized")
    }
    return stated(
        "divergence",
        "The divergence from the prior is (1/2) sum_i log(beta_i / beta) over modes that live, and goes to 0",
        f"{SLIDES} (the law is derived)",
        *(
            at_most(
                f"{kind}: divergence less the law, in nats, of {law[0]:.3g} at most",
                largest(divergence[kind] - law),
                bound,
                why=why,
            )
            for kind, bound, why in (
                ("linear", 0.1, "drawn latents leave a percent of the largest"),
                ("amortized", 0.25, "its encoder is found slower"),
            )
        ),
    )


def _variety(saved: Saved) -> Claim:
    far = _far(saved)
    spread = {name: np.sum(np.square(saved[name]), axis=1) for name in ("least/lam", "network/linear/lam")}
    pixels = np.var(np.asarray(saved["generated"], float), axis=1).sum(axis=1)
    return stated(
        "variety",
        "Generated images lose variety as beta grows: their variance is sum_i (beta_i - beta) over modes "
        "that live",
        f"{SLIDES} (its law is derived)",
        at_most(
            "further than a tenth: variance less the law, over that of the images",
            largest((spread["network/linear/lam"] - spread["least/lam"])[far]) / saved["total"],
            0.015,
            why="a percent or two of the law",
        ),
        every("images shown at five weights vary less at each", np.diff(pixels) < 0),
        at_most(
            "their variance at the last over that at the first",
            pixels[-1] / pixels[0],
            0.005,
            why="there is no mode left",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Generated images at five weights beta; modes, variances, active units and the divergence over beta."""
    drawn = Figure(figsize=(9.2, 8.8), layout="constrained")
    parts: Any = drawn.subfigures(2, 1, height_ratios=[1, 3.1])
    tiles, panels = parts[0].subplots(1, SHOWN), parts[1].subplots(2, 2)
    expected = _above(saved, saved["beta"])
    for ax, images, index in zip(tiles, saved["generated"], np.asarray(saved["shown"]), strict=True):
        ax.imshow(_tiled(np.asarray(images)), cmap="gray_r", vmin=0, vmax=1)
        ax.set_axis_off()
        ax.set_title(f"β = {saved['beta'][index]:.3g}\n{expected[index]} modes left")
    (modes, variances), (units, divergence) = panels
    _modes_panel(modes, saved, "lam")
    plotting.make_room(modes, above=0.3)
    plotting.finish(modes, "Singular values of the decoder", "weight β of the prior", "λ", "upper right")
    _modes_panel(variances, saved, "sigma2")
    variances.set_yscale("log")
    plotting.finish(variances, "Learned variance of each mode", "weight β of the prior", "σ²", "lower right")
    _units_panel(units, saved)
    _divergence_panel(divergence, saved)
    return drawn


def _tiled(images: np.ndarray) -> np.ndarray:
    """Square images (n, pixels), n a square, side by side with white between them."""
    side, rows = (int(size**0.5) for size in (images.shape[1], len(images)))
    framed = np.pad(images.reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)))
    return framed.reshape(rows, rows, side + 2, side + 2).swapaxes(1, 2).reshape(rows * (side + 2), -1)


def _modes_panel(ax: Axes, saved: Saved, part: str) -> None:
    beta, fine = np.asarray(saved["beta"]), np.asarray(saved["fine/at"])
    law, trained = np.asarray(saved[f"fine/{part}"]), np.asarray(saved[f"network/linear/{part}"])
    best = np.argmin(saved["searched/loss"], axis=1)
    searched = np.asarray(saved[f"searched/{part}"])[np.arange(len(beta)), best]
    for index in range(law.shape[1]):
        color = f"C{index % 7}"
        ax.plot(fine, law[:, index], color=color, lw=1.2)
        ax.plot(beta, searched[:, index], "o", mfc="none", color=color, ms=6)
        ax.plot(beta, trained[:, index], "x", color=color, ms=4)
    ax.plot([], [], "-", color="0.3", lw=1.2, label="closed form")
    ax.plot([], [], "o", mfc="none", color="0.3", ms=6, label="search from many starts")
    ax.plot([], [], "x", color="0.3", ms=4, label="trained on drawn latents")
    _label_weights(ax, saved)


def _label_weights(ax: Axes, saved: Saved) -> None:
    ax.set_xscale("log")
    beta = np.asarray(saved["beta"])
    plotting.label_ticks(ax, np.geomspace(beta[0], beta[-1], 5), "{:.2g}")


def _units_panel(ax: Axes, saved: Saved) -> None:
    ax.step(
        saved["fine/at"], np.sum(np.asarray(saved["fine/lam"]) > 0, axis=1), where="mid", **plotting.THEORY
    )
    ax.lines[-1].set_label("thresholds above β")
    for kind, marker, size in (("linear", "o", 7), ("amortized", "x", 6)):
        ax.plot(saved["beta"], saved[f"network/{kind}/active"], marker, ms=size, label=kind)
    _label_weights(ax, saved)
    plotting.finish(
        ax, "Active units: variance of the mean above 0.01", "weight β of the prior", "units", "upper right"
    )


def _divergence_panel(ax: Axes, saved: Saved) -> None:
    fine = np.asarray(saved["fine/at"])
    for kind, marker, size in (("linear", "o", 7), ("amortized", "x", 6)):
        divergence = np.sum(saved[f"network/{kind}/divergence"], axis=1)
        ax.plot(saved["beta"], divergence, marker, ms=size, label=kind)
    ax.plot(fine, _divergence(saved, fine), label="½ Σ log(βᵢ / β)", **plotting.THEORY)
    for threshold in _thresholds(saved):
        ax.axvline(threshold, color="0.85", lw=0.8, zorder=0)
    _label_weights(ax, saved)
    plotting.finish(
        ax, "Divergence from the prior", "weight β of the prior, thresholds in grey", "nats", "upper right"
    )
