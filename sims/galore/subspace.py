"""How long a basis stays good: the share of later gradients in the subspace of one, while a network trains.

A network with three square matrices between its hidden layers learns to read digits with Adam. At chosen
steps the leading left singular vectors of a minibatch gradient become the basis P of every matrix, as in a
refresh of GaLore, and the share |P^T G|^2 / |G|^2 of gradients of other minibatches is followed from there
on, beside the share that a fresh basis of each gradient's own would have. The training is not projected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.spectra import captured_energy, stable_rank
from models.data.images import digits
from models.losses import cross_entropy, on_batches
from models.training import train
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.results import Context, Result, Saved

PIXELS, CLASSES = 64, 10
MATRICES = ("first", "second", "third")  # square ones, from the images up


@dataclass(frozen=True)
class Config:
    """Network, training, and when bases are taken and looked at."""

    width: int = 64
    """Units of each hidden layer."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    batch: int = 64
    """Images of a minibatch."""
    ranks: tuple[int, ...] = (4, 16)
    """Vectors of a basis, of which `width` would be whole."""
    starts: tuple[int, ...] = (0, 50, 400)
    """Steps at which bases are taken, ascending."""
    offsets: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100, 200)
    """Steps since then, ascending from 0; the last is the gap between two refreshes."""
    probes: int = 4
    """Minibatches whose gradients are taken at every step looked at."""
    seeds: int = 3
    """Initial weights and orders of minibatches."""
    dtype: str = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        for name in ("starts", "offsets"):
            steps = getattr(self, name)
            if len(steps) < 2 or steps[0] != 0 or np.any(np.diff(steps) <= 0):
                raise ValueError(f"{name} must be at least two steps ascending from 0, got {steps}")
        if self.probes < 2 or self.seeds < 1 or self.batch < 1:
            sizes = (self.probes, self.seeds, self.batch)
            raise ValueError(f"probes must be at least 2, seeds and batch at least 1, got {sizes}")
        if len(self.ranks) != 2 or not 1 <= self.ranks[0] < self.ranks[1] <= self.width:
            raise ValueError(f"ranks must be two ascending ones, up to {self.width}, got {self.ranks}")


_STANDARD = Config(starts=(0, 20, 100, 400, 2000), seeds=8, probes=8)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(_STANDARD, width=256, ranks=(16, 64), starts=(*_STANDARD.starts, 10_000)),
}


def _initial(key: Array, config: Config) -> dict[str, Array]:
    """He-normal matrices below units, a LeCun-normal head."""
    k_first, k_hidden, k_head = jax.random.split(key, 3)
    he, lecun = jax.nn.initializers.he_normal, jax.nn.initializers.lecun_normal
    width, dtype = config.width, config.dtype
    return {
        "first": he()(k_first, (PIXELS, width), dtype),
        "hidden": he(batch_axis=0)(k_hidden, (len(MATRICES), width, width), dtype),
        "head": lecun()(k_head, (width, CLASSES), dtype),
    }


def _predict(params: dict[str, Array], x: Array) -> Array:
    x = jax.nn.relu(x @ params["first"])
    x, _ = jax.lax.scan(lambda x, W: (jax.nn.relu(x @ W), None), x, params["hidden"])
    return x @ params["head"]


def _marks(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """All steps that are looked at, and which of them lie `offsets` after each start, (start, offset)."""
    wanted = np.add.outer(config.starts, config.offsets)
    marks = np.unique(wanted)
    return marks, np.searchsorted(marks, wanted)


@partial(jax.jit, static_argnames="config")
def _follow(keys: Array, images: Array, labels: Array, config: Config) -> dict[str, Any]:
    """Train every seed and follow the bases."""
    marks, places = _marks(config)
    loss = on_batches(cross_entropy, _predict)

    def draw(key):
        chosen = jax.random.randint(key, (config.batch,), 0, len(images))
        return images[chosen], labels[chosen]

    def follow(G):
        """Of one matrix's gradients (mark, probe, m, n)."""
        U, s, _ = jnp.linalg.svd(G[:, 0], full_matrices=False)
        share = jnp.cumsum(s**2, axis=1) / jnp.sum(s**2, axis=1, keepdims=True)
        later = G[places][:, :, 1:]  # other minibatches than the basis is from

        def energy(rank):
            def of_start(start):
                U, later = start
                flat = later.reshape(-1, *later.shape[2:])
                shares = jax.lax.map(lambda G: captured_energy(U[:, :rank], G), flat)
                return shares.reshape(later.shape[:2]).mean(axis=1)

            return jax.lax.map(of_start, (U[places[:, 0]], later))

        return {
            "old": jnp.stack([energy(rank) for rank in config.ranks]),
            "fresh": jnp.stack([share[:, rank - 1][places] for rank in config.ranks]),
            "stable_rank": stable_rank(G).mean(axis=1),
        }

    def one(key):
        k_initial, k_train, k_probe = jax.random.split(key, 3)
        _, path = train(
            loss,
            _initial(k_initial, config),
            optax.adam(config.learning_rate),
            steps=int(marks[-1]),
            batches=draw,
            key=k_train,
        )
        params = jax.tree.map(lambda leaf: leaf[marks], path.ys)
        probes = jax.random.split(k_probe, (len(marks), config.probes))

        def look(mark):
            params, keys = mark
            gradients = jax.lax.map(lambda key: jax.grad(loss)(params, draw(key))["hidden"], keys)
            return gradients, loss(params, (images, labels))

        gradients, losses = jax.lax.map(look, (params, probes))
        return {"loss": losses, **jax.lax.map(follow, jnp.moveaxis(gradients, 2, 0))}

    # One after the other: on large batches of small products the threads of a CPU wait for each other.
    return jax.lax.map(one, keys)


def run(config: Config, context: Context) -> Result:
    """Train, and follow the bases."""
    context.progress("training and following bases", 0.0)
    images, labels = digits(config.dtype)
    keys = jax.random.split(jax.random.key(context.seed), config.seeds)
    found = jax.tree.map(np.asarray, _follow(keys, images.reshape(-1, PIXELS), labels, config))
    data = {"marks": _marks(config)[0], **found}
    claims = (_no_need(found), _minibatch(found), _stable_rank(found))
    followed = ("seed", "matrix", "rank", "start", "offset")
    dims = {
        "marks": ("mark",),
        "loss": ("seed", "mark"),
        "stable_rank": ("seed", "matrix", "mark"),
        "old": followed,
        "fresh": followed,
    }
    return Result(data, claims, dims)


def _no_need(found: dict[str, np.ndarray]) -> Claim:
    old = np.mean(found["old"], axis=0)
    lost = old[..., 0] - old[..., -1]
    return Claim(
        "galore.subspace/no_need_to_change",
        "Consecutive gradients are similar, P P^T G ~ G: P need not change between two refreshes",
        "zhao2024galore, section 4.1, and the talk's slide on how often to change P",
        "qualified",
        [
            # A tenth of the energy is a third of the gradient's norm: on either side of it.
            Check("late basis: largest share lost over a gap", "at most", 0.1, np.max(lost[..., -1])),
            Check("first basis: largest share lost over a gap", "at least", 0.1, np.max(lost[..., 0])),
            # Three quarters of the energy: what is left out has half of the gradient's norm.
            Check(
                "late basis of the larger rank: smallest share after a gap",
                "at least",
                0.75,
                np.min(old[:, 1, -1, -1]),
            ),
        ],
        condition="the network has been trained for a while when the basis is taken",
    )


def _minibatch(found: dict[str, np.ndarray]) -> Claim:
    old, fresh = (np.mean(found[name], axis=(0, 1))[:, -1] for name in ("old", "fresh"))
    ratio = (fresh[:, 0] - old[:, 0]) / np.abs(old[:, 0] - old[:, -1])
    return Claim(
        "galore.subspace/minibatch",
        "Late in training a basis misses more because it is of one minibatch than because it is old",
        "derived here",
        "stated",
        # One is where both miss the same.
        [
            Check(f"{name} rank: share lost to the minibatch over that to age", "at least", 1.0, value)
            for name, value in zip(("smaller", "larger"), ratio, strict=True)
        ],
    )


def _stable_rank(found: dict[str, np.ndarray]) -> Claim:
    ranks = np.mean(found["stable_rank"], axis=0)
    return Claim(
        "galore.subspace/stable_rank",
        "Gradients become low-rank in training: their stable rank falls",
        "zhao2024galore, section 3.2",
        "stated",
        # Any decrease counts, in the mean over seeds and minibatches.
        [
            all_of(
                "matrices with a smaller stable rank at the end than at the start", ranks[:, -1] < ranks[:, 0]
            )
        ],
    )


def figure(saved: Saved) -> Figure:
    """Shares over the steps since the basis was taken; stable rank and loss over training."""
    drawn, axes = plotting.new_figure(2, 4, width=3.1, height=2.8)
    starts, offsets = saved.config["starts"], saved.config["offsets"]
    marks, width = saved["marks"], saved.config["width"]
    old, fresh = (np.mean(saved[name], axis=0) for name in ("old", "fresh"))
    spread = np.std(saved["old"], axis=0)
    for row, rank in enumerate(saved.config["ranks"]):
        for column, name in enumerate(MATRICES):
            ax = axes[row, column]
            for index, start in enumerate(starts):
                share, error = old[column, row, index], spread[column, row, index]
                ax.plot(offsets, share, "o-", color=f"C{index}", label=f"from step {start}")
                ax.fill_between(
                    offsets, share - error, share + error, color=f"C{index}", alpha=0.15, linewidth=0
                )
                ax.plot(offsets, fresh[column, row, index], ":", color=f"C{index}")
            ax.plot([], [], ":", color="0.3", label="own basis")
            _step_axis(ax, offsets[-1], 1)
            ax.set(ylim=(0, 1.03), xlabel="steps since the basis", ylabel="share of |G|² captured")
            ax.set_title(f"Rank {rank} of {width}, {name} matrix")
    axes[0, 0].legend(loc="lower left")
    ranks, loss = axes[:, 3]
    for index, name in enumerate(MATRICES):
        ranks.plot(
            marks, np.mean(saved["stable_rank"], axis=0)[index], "o-", color=f"C{index + 3}", label=name
        )
    ranks.set(ylabel="stable rank of G")
    ranks.set_title("Stable rank over training")
    ranks.legend(loc="upper right")
    loss.plot(marks, np.mean(saved["loss"], axis=0), "o-", color="0.3")
    loss.set(yscale="log", ylabel="loss (nats)")
    loss.set_title("Loss over training")
    for ax in (ranks, loss):
        _step_axis(ax, marks[-1], 10)
        ax.set_xlabel("step")
    return drawn


def _step_axis(ax: Axes, last: int, linear: int) -> None:
    """Steps on a logarithmic axis that begins at 0."""
    ax.set_xscale("symlog", linthresh=linear)
    ticks = [0, *(10**power for power in range(len(str(linear)) - 1, len(str(last))))]
    ax.set_xticks(ticks, labels=map(str, ticks))
    ax.set_xlim(-0.1 * linear, 1.2 * last)
