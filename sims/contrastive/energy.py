"""One energy behind many contrastive losses: their gradients, and descent on them as a game of two players.

With u_ij = d_i^2 - d_ij^2, half the squared distances between views of a sample and between samples, a loss
sum_i phi(sum_j psi(u_ij)) has in the parameters of an encoder the gradient of minus half the energy

    E_alpha = tr C_alpha[f, f],   alpha_ij = phi'(xi_i) psi'(u_ij),   xi_i = sum_j psi(u_ij)

with alpha held. So a step of descent is a move of the min player, who sets alpha, and one of the max player,
who ascends the energy; several steps at one alpha are another path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.contrastive import (
    contrastive_covariance,
    contrastive_energy,
    min_player,
    pairwise_importance,
)
from dynamics.contrastive.family import Name
from models.collapse import random_weights
from models.draws import normal
from models.functional import as_function
from models.losses import alpha_cl_loss, contrastive_loss
from models.self_supervised import Encoder, two_views
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, corrected, qualified, stated
from sims.compare import largest
from sims.ranges import Count, Positive, Range, check_ranges
from sims.results import Context, Saved

PAPER = "tian2022contrastive"
LOSSES = get_args(Name)
EPSILON, TEMPERATURE = 0.7, 0.5  # of the InfoNCE that is descended
STALE = (1, 2, 5, 10)  # steps that the max player takes at one alpha
WEIGHTS = (0.0, 0.35, 0.7, 1.0)  # of the positive pair in InfoNCE, at which values are compared


@dataclass(frozen=True)
class Config:
    """The encoder, its batches, and the descent on InfoNCE."""

    samples: Annotated[int, Range(at_least=3)] = 12
    """Samples of a batch."""
    inputs: Count = 6
    """Dimension of the inputs."""
    width: Count = 16
    """Hidden units of the encoder, with ReLU."""
    outputs: Count = 4
    """Dimension of the embeddings."""
    augmentation: Positive = 0.1
    """Variance of the noise on each view."""
    batches: Annotated[int, Range(at_least=2)] = 3
    """Batches and encoders on which gradients are compared."""
    rate: Positive = 0.002
    """Learning rate of descent on the sum over a batch."""
    steps: Annotated[int, Range(at_least=20)] = 60
    """Steps of descent; a multiple of ten."""

    def __post_init__(self):
        check_ranges(self)
        if self.steps % max(STALE):
            raise ValueError(f"steps must be a multiple of {max(STALE)}, got {self.steps}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(), samples=48, inputs=16, width=64, outputs=8, batches=8, rate=0.0005, steps=200
    ),
    "paper": replace(
        Config(), samples=128, inputs=64, width=256, outputs=32, batches=8, rate=1e-4, steps=200
    ),
}


def _draw(config: Config, key: Array):
    """An encoder's parameters and two views of a batch."""
    weights, data, noise = jax.random.split(key, 3)
    sizes = (config.inputs, config.width, config.outputs)
    matrices = [W / n**0.5 for W, n in zip(random_weights(weights, sizes, 1.0), sizes, strict=False)]
    predict, params = as_function(Encoder(matrices))
    x = normal(data, (config.samples, config.inputs))
    return predict, params, two_views(noise, x, config.augmentation)


@partial(jax.jit, static_argnames="config")
def _gradients(config: Config, keys: Array) -> dict:
    """By loss and batch: the gradient of a loss beside those that half the energy and the whole foretell."""

    def one(key):
        predict, params, views = _draw(config, key)
        flat, unravel = ravel_pytree(params)

        def embedded(flat):
            return predict(unravel(flat), views.first), predict(unravel(flat), views.second)

        both, pulled_back = jax.vjp(embedded, flat)
        # Embeddings are the same for all losses: their gradients are pulled back through the encoder at once.
        of_losses = [jax.grad(lambda both, name=name: contrastive_loss(name, *both))(both) for name in LOSSES]
        (loss,) = jax.vmap(pulled_back)(jax.tree.map(lambda *parts: jnp.stack(parts), *of_losses))
        alpha = jnp.stack([pairwise_importance(name, *both) for name in LOSSES])
        of_energy = jax.grad(lambda both, alpha: contrastive_energy(alpha, *both))
        (energy,) = jax.vmap(lambda alpha: pulled_back(of_energy(both, alpha)))(alpha)
        size, full = jnp.linalg.norm(loss, axis=1), jnp.linalg.norm(energy, axis=1)
        return {
            "half": jnp.linalg.norm(loss + energy / 2, axis=1) / size,
            "whole": jnp.linalg.norm(loss + energy, axis=1) / size,
            "cosine": jnp.sum(loss * energy, axis=1) / (size * full),
            "ratio": full / size,
        }

    return jax.vmap(one, out_axes=1)(keys)


@partial(jax.jit, static_argnames="config")
def _values(config: Config, key: Array) -> dict:
    """InfoNCE by its definition, by the family, and minus half of the regularized energy at its minimum."""
    predict, params, views = _draw(config, key)
    f, g = predict(params, views.first), predict(params, views.second)
    negative = ~jnp.eye(len(f), dtype=bool)

    def at(epsilon):
        near, far = jnp.sum((f - g) ** 2, axis=1) / 2, jnp.sum((f[:, None] - f[None]) ** 2, axis=-1) / 2
        shares = jnp.exp(-far / TEMPERATURE)
        bottom = epsilon * jnp.exp(-near / TEMPERATURE) + jnp.sum(jnp.where(negative, shares, 0), axis=1)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "epsilon": epsilon}
        sums = jnp.sum(pairwise_importance("infonce", f, g, **options), axis=1)
        alpha = min_player("entropy", f, g, temperature=TEMPERATURE, row_sums=sums)
        entropy = -jnp.sum(jnp.where(negative, alpha * jnp.log(jnp.where(negative, alpha, 1)), 0))
        return {
            "defined": jnp.sum(near + TEMPERATURE * jnp.log(bottom)),
            "family": contrastive_loss("infonce", f, g, **options),
            "players": -(contrastive_energy(alpha, f, g) - 2 * TEMPERATURE * entropy) / 2,
        }

    alpha = pairwise_importance("infonce", f, g)
    differences = f[:, None] - f[None]
    spread = jnp.sum(alpha * jnp.sum(differences**2, axis=-1))
    within = jnp.sum(alpha * jnp.sum((f - g) ** 2, axis=1, keepdims=True))
    trace = jnp.trace(contrastive_covariance(alpha, f, g))
    return jax.vmap(at)(jnp.asarray(WEIGHTS)) | {"trace": trace, "double_sum": spread - within}


@partial(jax.jit, static_argnames="config")
def _games(config: Config, key: Array) -> dict:
    """Descent on InfoNCE, and games in which alpha is set anew after some steps of the max player."""
    predict, params, views = _draw(config, key)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "epsilon": EPSILON}

    def embedded(params):
        return predict(params, views.first), predict(params, views.second)

    def loss(params):
        return contrastive_loss("infonce", *embedded(params), **options)

    def descended(params, _):
        value, gradient = jax.value_and_grad(loss)(params)
        return optax.apply_updates(params, jax.tree.map(lambda g: -config.rate * g, gradient)), value

    def played(stale):
        def step(carry, index):
            params, alpha = carry
            fresh = pairwise_importance("infonce", *embedded(params), **options)
            alpha = jnp.where(index % stale == 0, fresh, alpha)
            gradient = jax.grad(lambda params: alpha_cl_loss(alpha, *embedded(params)))(params)
            moved = jax.tree.map(lambda g: -config.rate * g, gradient)
            return (optax.apply_updates(params, moved), alpha), loss(params)

        start = params, jnp.zeros((config.samples, config.samples))
        (end, _), values = jax.lax.scan(step, start, jnp.arange(config.steps))
        return end, values

    end, losses = jax.lax.scan(descended, params, length=config.steps)
    ends, values = jax.vmap(played)(jnp.asarray(STALE))

    def apart(one, other):
        return jnp.linalg.norm(ravel_pytree(jax.tree.map(jnp.subtract, one, other))[0])

    return {
        "moved": apart(end, params),
        "distance": jax.vmap(apart, (0, None))(ends, end),
        "loss": losses,
        "losses": values,
    }


def run(config: Config, context: Context) -> dict:
    """Gradients of all losses, values of InfoNCE, and games with fresh and stale importances."""
    first, second, third = jax.random.split(jax.random.key(context.seed), 3)
    context.progress("gradients", 0.0)
    gradients = jax.device_get(_gradients(config, jax.random.split(first, config.batches)))
    context.progress("values", 0.5)
    values = jax.device_get(_values(config, second))
    trace = {name: values.pop(name) for name in ("trace", "double_sum")}
    context.progress("games", 0.7)
    games = jax.device_get(_games(config, third))
    return {
        "loss": ("loss", list(LOSSES)),
        "gradient": ("loss batch", gradients),
        "epsilon": ("epsilon", np.asarray(WEIGHTS)),
        "value": ("epsilon", values),
        "energy": trace,
        "stale": ("stale", np.asarray(STALE)),
        "game": {
            "distance": ("stale", games["distance"]),
            "descent": ("step", games["loss"]),
            "played": ("stale step", games["losses"]),
            "moved": games["moved"],
        },
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What the slides say of losses, their energy, and the two players."""
    yield _of_infonce(saved)
    yield _of_energy(saved)
    yield _of_gradients(saved)
    yield _of_turns(saved)
    yield _of_values(saved)


def _of_infonce(saved: Saved) -> Claim:
    defined, family = (np.asarray(saved[f"value/{name}"]) for name in ("defined", "family"))
    gap = largest(family - defined) / np.max(np.abs(defined))
    return stated(
        "infonce",
        "InfoNCE is sum_i phi(sum_j psi(u_ij)), with phi(x) = t log(e + x) and psi(x) = exp(x / t)",
        f"{PAPER}, the talk's slide on InfoNCE",
        at_most("its definition less that form, over the loss", gap, 1e-12, why=ROUNDING),
    )


def _of_energy(saved: Saved) -> Claim:
    trace, double = saved["energy/trace"], saved["energy/double_sum"]
    return stated(
        "energy",
        "The energy is the trace of the contrastive covariance: the weighted spread between samples less "
        "that between views",
        f"{PAPER}, the talk's slide on the energy",
        at_most("the trace less the double sum, over it", abs(trace / double - 1), 1e-11, why=ROUNDING),
    )


def _of_gradients(saved: Saved) -> Claim:
    half, whole, cosine, ratio = (
        np.asarray(saved[f"gradient/{name}"]) for name in ("half", "whole", "cosine", "ratio")
    )
    return corrected(
        "gradient",
        "Descent on any of the eight losses is a step up the gradient of their energy, with alpha held",
        f"{PAPER}, the talk's slide on coordinate-wise optimization",
        printed=[
            at_most("largest |dL + dE| / |dL|", largest(whole), 1e-10, why="the gradients must be opposite")
        ],
        mended=[
            at_most("all losses: largest |dL + dE / 2| / |dL|", largest(half), 1e-12, why=ROUNDING),
            at_most("|dE| / |dL| less two", largest(ratio - 2), 1e-12, why="the energy has twice the slope"),
            at_most("cosine of dE and dL plus one", largest(cosine + 1), 1e-12, why="the way is the same"),
        ],
    )


def _of_turns(saved: Saved) -> Claim:
    distance = np.asarray(saved["game/distance"]) / saved["game/moved"]
    return qualified(
        "turns",
        "Minimizing such a loss is a game: a min player sets alpha, and a max player ascends the energy",
        f"{PAPER}, the talk's slide on coordinate-wise optimization",
        condition="the max player takes one step for each alpha",
        inside=[at_most("one step: distance from descent over the way", distance[0], 1e-12, why=ROUNDING)],
        outside=[
            at_least(
                "two steps: the same",
                distance[1],
                1e-5,
                why="every other step has an alpha that is one step old; rounding leaves 1e-12",
            ),
            at_least(
                "ten steps: the same over that of two",
                distance[-1] / distance[1],
                3,
                why="alpha is 4.5 steps old on average, and half a step there: nine times as much",
            ),
        ],
    )


def _of_values(saved: Saved) -> Claim:
    family, players = (np.asarray(saved[f"value/{name}"]) for name in ("family", "players"))
    gap = np.abs(players / family - 1)
    return qualified(
        "value",
        "InfoNCE is minus half of the least energy less the entropy of the min player's rows",
        f"{PAPER}, the talk's slide on the min player (the values are compared here)",
        condition="epsilon = 0: the positive pair is not in the denominator",
        inside=[at_most("epsilon 0: relative gap", gap[0], 1e-12, why=ROUNDING)],
        outside=[
            at_least(
                "the others: least relative gap",
                np.min(gap[1:]),
                1e-3,
                why="the gradients agree, the values need not",
            )
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Gradients by loss, the importance each loss gives, values by epsilon, and games with stale alpha."""
    drawn, ((gradients, values), (games, losses)) = plotting.new_figure(2, 2, width=4.6)
    _gradient_panel(gradients, saved)
    epsilon = np.asarray(saved["epsilon"])
    values.plot(epsilon, saved["value/family"], "o-", label="InfoNCE")
    values.plot(epsilon, saved["value/defined"], **plotting.THEORY, label="by its definition")
    values.plot(epsilon, saved["value/players"], "s-", label="half of entropy less energy")
    plotting.finish(values, "Values agree at epsilon = 0", "epsilon", "loss", "best")
    share = np.asarray(saved["game/distance"]) / saved["game/moved"]
    games.loglog(saved["stale"], np.maximum(share, 1e-17), "o-")
    plotting.label_ticks(games, np.asarray(saved["stale"]))
    plotting.finish(games, "Games and descent part", "steps at one alpha", "distance at the end over the way")
    _loss_panel(losses, saved)
    return drawn


def _gradient_panel(ax: Axes, saved: Saved) -> None:
    names, at = list(saved["loss"]), np.arange(len(saved["loss"]))
    for part, marker, label in (("whole", "s", "dL + dE"), ("half", "o", "dL + dE / 2")):
        worst = np.max(np.asarray(saved[f"gradient/{part}"]), axis=1)
        ax.semilogy(at, np.maximum(worst, 1e-17), marker, label=label)
    ax.set_xticks(at, [name.replace("_", " ") for name in names], rotation=40, ha="right")
    plotting.finish(ax, "Gradients of eight losses", "loss", "largest norm over |dL|", "center right")


def _loss_panel(ax: Axes, saved: Saved) -> None:
    descent, played = np.asarray(saved["game/descent"]), np.asarray(saved["game/played"])
    steps = np.arange(2, len(descent))  # the first step is the same
    for index in (1, 2, 3):
        apart = np.abs(played[index] - descent)[2:]
        ax.semilogy(steps, apart, label=f"{saved['stale'][index]} steps at one alpha")
    plotting.make_room(ax, above=0.4)
    plotting.finish(ax, "Loss of games less that of descent", "step", "difference of the loss", "upper right")
