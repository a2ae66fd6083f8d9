"""Several outputs: the modes of a two-layer network on digits go one by one, those of ridge regression never.

Without noise the best linear map B of a two-layer network with L2 regularization of both layers minimizes

    E|B x - y|^2 + 2 lambda |B|_*,   lambda = (gamma_u gamma_w)^{1/2},

with the sum of singular values for a penalty: modes become exactly zero, all of them where lambda is at least
the spectral norm of E[y x^T]. Ridge regression has the sum of their squares, and keeps its rank for ever.
Inputs are images of digits, centered, and targets are their ten classes.
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
from numpy.typing import ArrayLike

from dynamics import collapse
from dynamics.collapse import Moments
from models.collapse import Noisy, StochasticLinear, random_weights
from models.data.images import digits
from models.functional import as_function
from models.losses import mean_squared_error
from models.training import train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, every, qualified, stated
from sims.compare import largest, named_groups, require_ok
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

TALK = "ziyin2022talk"
ALIVE = 1e-9  # of a singular value over that of E[y x^T]: modes that are gone are zero to rounding
RIDGES = (1e-3, 1e-1, 1.0, 10.0, 100.0)
NEAR = (0.9, 0.97, 0.99, 0.997, 0.999)  # strengths over the critical one where the last mode is looked at
CORRELATED = (1.0, 0.5)  # singular values of E[y x^T] where two inputs go together
BETWEEN = 0.55  # a strength above the second of them


@dataclass(frozen=True)
class Config:
    """The strengths of regularization, and the network that is trained."""

    points: Annotated[int, Range(at_least=12)] = 28
    """Strengths at which the minimum is computed, from 0.03 to 1.1 spectral norms of E[y x^T]."""
    shares: Annotated[tuple[Positive, ...], Length(3)] = (0.05, 0.2, 0.5, 0.8, 0.95, 1.05)
    """Strengths over that norm at which networks are trained."""
    hidden: Annotated[int, Range(at_least=10)] = 16
    """Hidden units of the network, at least one for each output."""
    steps: Count = 2000
    """Steps of descent with momentum, on all digits at once."""
    starts: Count = 2
    """Random starts at each strength."""

    def __post_init__(self):
        check_ranges(self)
        if not (min(self.shares) < 0.9 < 1 < max(self.shares)):
            raise ValueError(f"shares must lie below 0.9 and above 1, got {self.shares}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        points=80,
        shares=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9, 0.98, 1.02),
        starts=4,
        steps=4000,
    ),
    "paper": replace(Config(), points=200, starts=16, hidden=64, steps=10_000),
}


def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centered images (n, 64), classes as unit vectors (n, 10), and labels."""
    images, labels = (np.asarray(part) for part in digits())
    flat = images.reshape(len(images), -1)
    return flat - flat.mean(axis=0), np.eye(10)[labels], labels


@jax.jit
@jax.vmap
def _minimum(lane: tuple[Moments, Array]) -> collapse.NuclearMinimum:
    moments, gamma = lane
    return collapse.nuclear_minimum(moments, gamma, gamma)


def _singular_values(matrices: ArrayLike) -> np.ndarray:
    return np.linalg.svd(np.asarray(matrices), compute_uv=False)


def _whitened(x: np.ndarray, y: np.ndarray) -> Moments:
    """Moments of whitened inputs: A is the identity but for pixels that never change."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    seen = values > 1e-10 * values[-1]
    scale = np.where(seen, 1 / np.sqrt(np.where(seen, values, 1)), 0)
    return collapse.moments(x @ (vectors * scale), y)


def _correlated(like: Moments) -> Moments:
    """Two inputs that go together, and two targets that look at one of them each, among zeros."""
    A, c = np.zeros(np.shape(like.A)), np.zeros(np.shape(like.c))
    A[:2, :2], c[:2, :2] = [[1.0, 0.95], [0.95, 1.0]], np.diag(CORRELATED)
    return Moments(A, c, 20.0)


def _modes(moments: Moments, strengths: np.ndarray, B: np.ndarray) -> dict:
    """Singular values of the best map over the strength, and of what certifies it."""
    residual = np.asarray(moments.c).T - B @ np.asarray(moments.A)
    penalty = np.sum(_singular_values(B), axis=1)
    return {
        "strength": ("strength", strengths),
        "values": ("strength mode", _singular_values(B)),
        "residual": ("strength mode", _singular_values(residual)),
        # <R, B> is lambda |B|_* where R is lambda on the singular vectors of B.
        "slackness": ("strength", np.sum(residual * B, axis=(1, 2)) - strengths * penalty),
    }


def _last_mode(moments: Moments, norm: float, B: np.ndarray) -> dict:
    """The one mode that is left close to its end, and its closed form to first order."""
    right = np.linalg.svd(np.asarray(moments.c).T)[2][0]
    law = norm * (1 - np.asarray(NEAR)) / (right @ np.asarray(moments.A) @ right)
    return {
        "share": ("near", np.asarray(NEAR)),
        "values": ("near mode", _singular_values(B)),
        "law": ("near", law),
    }


@partial(jax.jit, static_argnames="config")
def _trained(config: Config, keys: Array, lanes: tuple[Moments, Array]):
    """The matrices at the end of descent on the loss of the data, from each start in each lane."""

    def descended(lane, key):
        moments, gamma = lane
        data = (moments, jnp.zeros_like(gamma), jnp.stack([gamma, gamma]))
        loss = Partial(lambda data, params: collapse.stochastic_linear_loss(params, *data), data)
        optimizer = optax.sgd(0.2 / jnp.linalg.norm(moments.A, 2), momentum=0.95)
        start = random_weights(key, (moments.c.shape[0], config.hidden, moments.c.shape[1]), 0.1)
        return train(loss, start, optimizer, steps=config.steps, every=config.steps)

    return jax.vmap(jax.vmap(descended, (None, 0)), (0, None))(lanes, keys)


def _networks(lanes: list, least: collapse.NuclearMinimum, ends: list, data: tuple) -> dict:
    """Trained networks beside the minimum, and the loss of one on the images themselves."""
    (W, U), (moments, strengths) = ends, _stacked(lanes)
    maps = U @ W
    penalty = strengths[:, None] * (np.sum(W**2, axis=(2, 3)) + np.sum(U**2, axis=(2, 3)))
    fit = np.sum(
        (maps @ moments.A[:, None]) * maps - 2 * np.swapaxes(moments.c, 1, 2)[:, None] * maps, axis=(2, 3)
    )
    predict, params = as_function(StochasticLinear([W[0, 0], U[0, 0]]))
    x, y = map(jnp.asarray, data)
    on_images = 2 * float(mean_squared_error(params, (predict, Noisy(x), y)))
    return {
        "least": ("trained_at", least.loss),
        "expected": ("trained_at mode", _singular_values(least.B)),
        "loss": ("trained_at start", fit + moments.y2[:, None] + penalty),
        "values": ("trained_at start mode", _singular_values(maps)),
        "gap": ("trained_at start", np.linalg.norm(maps - least.B[:, None], axis=(2, 3))),
        "balance": (
            "trained_at start",
            np.abs(np.swapaxes(U, 2, 3) @ U - W @ np.swapaxes(W, 2, 3)).max(axis=(2, 3)),
        ),
        "on_images": on_images + penalty[0, 0],
    }


def _stacked(lanes: list) -> tuple[Moments, np.ndarray]:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *lanes)


def _ridge(moments: Moments, x, labels) -> dict:
    """Rank and norm of ridge regression over the strength, and the spread of its outputs within classes."""
    W = np.stack([np.asarray(collapse.ridge_minimum(moments, gamma).W) for gamma in RIDGES])
    outputs = x @ np.swapaxes(W, -1, -2)
    means = np.stack([outputs[:, labels == label].mean(axis=1) for label in range(10)], axis=1)
    within = np.mean(np.sum((outputs - means[:, labels]) ** 2, axis=-1), axis=1)
    centered = means - means.mean(axis=1, keepdims=True)
    between = np.mean(np.sum(centered**2, axis=-1), axis=1)
    return {
        "gamma": ("ridge", np.asarray(RIDGES)),
        "values": ("ridge mode", _singular_values(W)),
        "within": ("ridge", within / between),
    }


def run(config: Config, context: Context) -> dict:
    """The best maps of both models over the strength of regularization, and trained networks."""
    context.progress("minima", 0.0)
    x, y, labels = _digits()
    moments, whitened = jax.device_get((collapse.moments(x, y), _whitened(x, y)))
    signal, white = (_singular_values(data.c) for data in (moments, whitened))
    norm, shares = signal[0], np.geomspace(0.03, 1.1, config.points)
    coupled = (_correlated(moments), np.asarray(BETWEEN))
    lanes = {
        "minimum": [(moments, norm * share) for share in shares],
        "last": [(moments, norm * share) for share in NEAR],
        "white": [(whitened, white[0] * share) for share in config.shares],
        "trained": [(moments, norm * share) for share in config.shares],
        "correlated": [coupled],
    }
    least = named_groups(_minimum, lanes)
    context.progress("training", 0.5)
    keys = jax.random.split(jax.random.key(context.seed), config.starts)
    (W, U), paths = jax.device_get(_trained(config, keys, _stacked([*lanes["trained"], coupled])))
    require_ok("training", paths)
    return {
        "signal": ("mode", signal),
        "minimum": _modes(moments, norm * shares, least["minimum"].B),
        "last": _last_mode(moments, norm, least["last"].B),
        "white": {
            "signal": ("mode", white),
            "values": ("trained_at mode", _singular_values(least["white"].B)),
        },
        "ridge": _ridge(moments, x, labels),
        "share": ("trained_at", np.asarray(config.shares)),
        "network": _networks(lanes["trained"], least["trained"], [W[:-1], U[:-1]], (x, y)),
        "correlated": {
            "minimum": ("mode", _singular_values(least["correlated"].B[0])),
            "network": ("mode", _singular_values(U[-1, 0] @ W[-1, 0])),
        },
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """That modes go one by one, exactly; where; that networks land there; and that ridge keeps its rank."""
    signal, part = np.asarray(saved["signal"]), saved["minimum"]
    norm, strength = signal[0], np.asarray(part["strength"])
    rank = np.sum(part["values"] > ALIVE * norm, axis=1)
    alive = rank > 0
    certificate = part["residual"][:, 0] / strength - 1
    yield stated(
        "certificate",
        "The best map has the nuclear norm for its penalty: what is left of E[y x^T] has spectral norm "
        "lambda and is lambda on the modes that are alive",
        f"{TALK}, Theorem 1 (several outputs are derived)",
        at_most(
            "strengths with modes: spectral norm of the rest over lambda, less 1",
            largest(certificate[alive]),
            1e-12,
            why="the search ends with Newton's steps",
        ),
        at_most(
            "|<rest, B> - lambda |B|_*|, over the norm of E[y x^T]",
            largest(part["slackness"]) / norm,
            1e-13,
            why="the same",
        ),
    )
    share = np.asarray(saved["share"])
    trained = np.sum(np.asarray(saved["network/values"]) > 1e-6 * norm, axis=-1)
    nearest = [np.min(share[share > 1]), np.max(share[share < 1])]
    ends = [trained[share == at].ravel() for at in nearest]
    exact = "counts are exact"
    yield stated(
        "one-by-one",
        "As regularization grows the modes of the network become zero one after the other, the last one at "
        "the spectral norm of E[y x^T]",
        f"{TALK}, Theorem 1 (several outputs are derived)",
        every("strengths where no mode comes back", np.diff(rank) <= 0),
        equals("modes at the smallest strength", rank[0], np.sum(signal > 1e-9), why="ten classes, centered"),
        at_most(f"modes of networks trained at {nearest[0]:g} of the norm", np.max(ends[0]), 0, why=exact),
        at_least(f"modes of networks trained at {nearest[1]:g} of it", np.min(ends[1]), 1, why=exact),
    )
    yield from _thresholds(saved)
    yield from _training(config, saved)
    yield _kept(saved, norm)


def _thresholds(saved: Saved) -> Iterator[Claim]:
    white = np.asarray(saved["white/signal"])
    lam = np.asarray(saved["share"]) * white[0]
    soft = np.maximum(white[None] - lam[:, None], 0)
    values = np.asarray(saved["white/values"])
    outside = {
        name: np.sum(np.asarray(saved[f"correlated/{name}"]) > 1e-6) for name in ("minimum", "network")
    }
    coupled = (
        f"lambda = {BETWEEN} is above the second singular value, 0.5: correlated inputs keep the mode alive"
    )
    yield qualified(
        "thresholds",
        "A mode of the network is zero where its singular value of E[y x^T] is at most lambda, and else less "
        "by lambda",
        f"{TALK}, Theorem 1 (several outputs are derived)",
        condition="E[x x^T] is a multiple of the identity, but for the last mode",
        inside=[
            at_most(
                "whitened digits: singular values less the closed form",
                largest(values - soft),
                1e-13,
                why="the search ends with Newton's steps",
            ),
            every(
                "modes and strengths where zero is where it should be",
                (values > ALIVE * white[0]) == (soft > 0),
            ),
        ],
        outside=[
            equals("correlated inputs: modes of the minimum", outside["minimum"], 2, why=coupled),
            equals("and of a trained network", outside["network"], 2, why=coupled),
        ],
    )
    near = saved["last"]
    share, ratio = np.asarray(near["share"]), np.asarray(near["values"])[:, 0] / np.asarray(near["law"])
    alone = np.asarray(near["values"])[:, 1] < ALIVE * np.asarray(saved["signal"])[0]
    yield stated(
        "last-mode",
        "Close to its end the last mode is (|E[y x^T]| - lambda) / (v^T A v), v the leading right vector",
        f"{TALK}, Theorem 1 (several outputs are derived)",
        at_most(
            f"at {share[-1]:g} of the norm: its value over that, less 1",
            abs(ratio[-1] - 1),
            1e-4,
            why="the next order",
        ),
        at_most(
            f"error there over the error at {share[2]:g}",
            abs(ratio[-1] - 1) / abs(ratio[2] - 1),
            2 * (1 - share[-1]) / (1 - share[2]),
            why="it falls with the distance, which is a tenth",
        ),
        every("strengths where it is alone", alone),
    )


def _training(config: Config, saved: Saved) -> Iterator[Claim]:
    part, norm = saved["network"], np.asarray(saved["signal"])[0]
    gap = np.asarray(part["loss"]) - np.asarray(part["least"])[:, None]
    modes, expected = (
        np.sum(np.asarray(part[name]) > 1e-6 * norm, axis=-1) for name in ("values", "expected")
    )
    rest = "descent has come to rest"
    yield stated(
        "network",
        "Descent on a two-layer network ends at that map, from every start, with its two layers in balance",
        f"{TALK}, Theorem 1 (several outputs are derived)",
        at_most("loss over the minimum's", largest(gap), 1e-13, why=rest),
        at_most(
            "distance of the maps",
            largest(part["gap"]),
            1e-10,
            why=rest,
        ),
        at_most(
            "largest entry of U^T U - W W^T",
            largest(part["balance"]),
            1e-10,
            why="it decays as exp(-4 lambda t)",
        ),
        every("networks with as many modes as the minimum", modes == expected[:, None]),
        at_most(
            "loss on the images, less that from their moments",
            abs(part["on_images"] - part["loss"][0, 0]),
            1e-14,
            why="rounding alone",
        ),
    )


def _kept(saved: Saved, norm: float) -> Claim:
    part = saved["ridge"]
    values, gamma = np.asarray(part["values"]), np.asarray(part["gamma"])
    frobenius = np.sqrt(np.sum(values**2, axis=1))
    limit = np.sqrt(np.sum(np.asarray(saved["signal"]) ** 2))
    return stated(
        "ridge",
        "Ridge regression does not collapse: its rank stays, and outputs within a class do not become one",
        f"{TALK}, slides on neural collapse",
        every(
            "strengths from 0.001 to 100 with nine modes", np.sum(values > 1e-6 * values[:, :1], axis=1) == 9
        ),
        at_least(
            "ninth singular value over the first",
            np.min(values[:, 8] / values[:, 0]),
            0.1,
            why="it tends to that of E[y x^T], 0.24",
        ),
        at_most(
            "gamma = 100: gamma |W| over |E[y x^T]|, less 1",
            abs(gamma[-1] * frobenius[-1] / limit - 1),
            0.01,
            why="the largest eigenvalue of A over gamma is 0.007",
        ),
        at_least(
            "spread within classes over that between: least",
            np.min(part["within"]),
            0.3,
            why="it would vanish in a collapse",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Modes over the strength, what certifies them, ranks, and ridge regression."""
    drawn, ((modes, rest), (rank, ridge)) = plotting.new_figure(2, 2, width=4.6, height=3.4)
    norm, part = np.asarray(saved["signal"])[0], saved["minimum"]
    share, values = np.asarray(part["strength"]) / norm, np.asarray(part["values"])
    trained = saved["network"]
    for index in range(9):
        color = f"C{index % 7}"
        shown = np.where(values[:, index] > ALIVE * norm, values[:, index], np.nan)
        modes.plot(share, shown, color=color)
        found = np.asarray(trained["values"])[:, :, index].mean(axis=1)
        modes.plot(saved["share"], np.where(found > 1e-6 * norm, found, np.nan), "o", color=color, ms=4)
        rest.plot(share, np.asarray(part["residual"])[:, index] / norm, color=color)
    modes.plot([], [], "-", color="0.3", label="minimum")
    modes.plot([], [], "o", color="0.3", ms=4, label="trained network")
    modes.set_xscale("log")
    plotting.finish(modes, "Modes of the network's map", "λ / |E[yxᵀ]|", "singular value of B", "lower left")
    rest.plot(share, share, label="λ", **plotting.THEORY)
    plotting.finish(rest, "What is left of E[yxᵀ]", "λ / |E[yxᵀ]|", "singular value / |E[yxᵀ]|", "upper left")
    _rank_panel(rank, saved, norm)
    _ridge_panel(ridge, saved)
    return drawn


def _rank_panel(ax: Axes, saved: Saved, norm: float) -> None:
    share = np.asarray(saved["minimum/strength"]) / norm
    ranks = np.sum(np.asarray(saved["minimum/values"]) > ALIVE * norm, axis=1)
    found = np.sum(np.asarray(saved["network/values"]) > 1e-6 * norm, axis=-1)
    ax.step(share, ranks, where="mid", color="C0", label="minimum")
    ax.plot(saved["share"], np.median(found, axis=1), "o", color="C1", ms=5, label="trained network")
    ax.axhline(9, color="C3", label="ridge, any strength")
    plotting.finish(
        ax, "Modes that are alive", "λ / |E[yxᵀ]|", "rank of the map", "lower left", ylim=(-0.5, 10)
    )


def _ridge_panel(ax: Axes, saved: Saved) -> None:
    part = saved["ridge"]
    values = np.asarray(part["values"])
    ax.loglog(part["gamma"], values[:, 0], "o-", label="first singular value")
    ax.loglog(part["gamma"], values[:, 8], "s-", label="ninth")
    ax.loglog(part["gamma"], part["within"], "D-", color="C3", label="spread within classes / between")
    plotting.finish(ax, "Ridge regression", "γ", "", "lower left")
    ax.set_ylabel("singular value, or ratio")
