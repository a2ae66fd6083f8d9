"""How long a basis stays good: the share of later gradients in the subspace of one, while a network trains.

A network with three square matrices between its hidden layers learns to read digits with Adam. At chosen
steps the leading left singular vectors of a minibatch gradient become the basis P of every matrix, as in a
refresh of GaLore, and the share |P^T G|^2 / |G|^2 of gradients of other minibatches is followed from there
on, beside the share that a fresh basis of each gradient's own would have. The training is not projected.
Beside them stand the ranks of the weights and of their change since the start, and the angles by which the
leading subspace of this change turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.spectra import captured_energy, principal_angles, stable_rank
from models.data.images import digits
from models.losses import cross_entropy, on_batches
from models.training import train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, every, qualified, stated
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

PIXELS, CLASSES = 64, 10
MATRICES = ("first", "second", "third")  # square ones, from the images up


@dataclass(frozen=True)
class Config:
    """Network, training, and when bases are taken and looked at."""

    width: Count = 64
    """Units of each hidden layer."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate."""
    batch: Count = 64
    """Images of a minibatch."""
    ranks: tuple[Count, Count] = (4, 16)
    """Vectors of a basis, of which `width` would be whole."""
    starts: Annotated[tuple[int, ...], Length(2)] = (0, 50, 400)
    """Steps at which bases are taken, ascending from 0."""
    offsets: Annotated[tuple[int, ...], Length(2)] = (0, 1, 2, 5, 10, 20, 50, 100, 200)
    """Steps since then, ascending from 0; the last is the gap between two refreshes."""
    probes: Annotated[int, Range(at_least=2)] = 4
    """Minibatches whose gradients are taken at every step looked at."""
    seeds: Count = 3
    """Initial weights and orders of minibatches."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the network."""

    def __post_init__(self):
        check_ranges(self)
        for name in ("starts", "offsets"):
            steps = getattr(self, name)
            if list(steps) != sorted({0, *(step for step in steps if step > 0)}):
                raise ValueError(f"{name} must ascend from 0, got {steps}")
        if list(self.ranks) != sorted({rank for rank in self.ranks if rank <= self.width}):
            raise ValueError(f"ranks must ascend to at most width = {self.width}, got {self.ranks}")


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


def _shares(G: Array, places: np.ndarray, rank: int) -> dict[str, Array]:
    """Shares of one matrix's gradients (mark, probe, m, n) in old bases and in their own, (start, offset)."""
    U, s, _ = jnp.linalg.svd(G[:, 0], full_matrices=False)
    own = jnp.cumsum(s**2, axis=1) / jnp.sum(s**2, axis=1, keepdims=True)

    def of_start(start):
        U, later = start
        in_basis = partial(captured_energy, U[:, :rank])
        return jax.lax.map(lambda probes: jax.lax.map(in_basis, probes).mean(), later)

    others = G[places][:, :, 1:]  # the basis is from the first minibatch
    old = jax.lax.map(of_start, (U[places[:, 0]], others))
    return {"old": old, "fresh": own[:, rank - 1][places]}


def _of_weights(W: Array, places: np.ndarray, rank: int) -> dict[str, Array]:
    """Stable ranks of one matrix (mark, m, n) and of its change, and the largest angle by which this turns.

    The angle is between the leading left singular vectors at a start, but the first, and a gap later.
    """
    change = W[1:] - W[:1]
    U = jnp.linalg.svd(change[places[1:, [0, -1]] - 1])[0][..., :rank]
    turned = jax.lax.map(lambda pair: principal_angles(pair[0], pair[1])[-1], U)
    return {"weight_rank": stable_rank(W), "change_rank": stable_rank(change), "turned": turned}


@partial(jax.jit, static_argnames="config")
def _follow(keys: Array, images: Array, labels: Array, config: Config) -> dict[str, Any]:
    """Train every seed and follow the bases."""
    marks, places = _marks(config)
    loss = on_batches(cross_entropy, _predict)

    def draw(key):
        chosen = jax.random.randint(key, (config.batch,), 0, len(images))
        return images[chosen], labels[chosen]

    def of_matrix(G):
        shares = [_shares(G, places, rank) for rank in config.ranks]
        return jax.tree.map(lambda *ranks: jnp.stack(ranks), *shares), stable_rank(G).mean(axis=1)

    def one(key):
        k_initial, k_train, k_probe = jax.random.split(key, 3)
        start, optimizer = _initial(k_initial, config), optax.adam(config.learning_rate)
        _, path = train(loss, start, optimizer, steps=int(marks[-1]), batches=draw, key=k_train)
        params = jax.tree.map(lambda leaf: leaf[marks], path.ys)
        probes = jax.random.split(k_probe, (len(marks), config.probes))

        def look(mark):
            params, keys = mark
            gradients = jax.lax.map(lambda key: jax.grad(loss)(params, draw(key))["hidden"], keys)
            return gradients, loss(params, (images, labels))

        gradients, losses = jax.lax.map(look, (params, probes))
        shares, ranks = jax.lax.map(of_matrix, jnp.moveaxis(gradients, 2, 0))
        of_weights = partial(_of_weights, places=places, rank=config.ranks[0])
        weights = jax.lax.map(of_weights, jnp.moveaxis(params["hidden"], 1, 0))
        return {"share": shares, "stable_rank": ranks, "loss": losses, **weights}

    # One after the other: on large batches of small products the threads of a CPU wait for each other.
    return jax.lax.map(one, keys)


def run(config: Config, context: Context) -> dict:
    """Train, and follow the bases."""
    context.progress("training and following bases", 0.0)
    images, labels = digits(config.dtype)
    keys = jax.random.split(jax.random.key(context.seed), config.seeds)
    found = jax.device_get(_follow(keys, images.reshape(-1, PIXELS), labels, config))
    return {
        "matrix": ("matrix", np.array(MATRICES)),
        "rank": ("rank", np.array(config.ranks)),
        "start": ("start", np.array(config.starts)),
        "offset": ("offset", np.array(config.offsets)),
        "step": ("step", _marks(config)[0]),
        "share": ("seed matrix rank start offset", found["share"]),
        "later_start": ("later_start", np.array(config.starts[1:])),
        "later_step": ("later_step", _marks(config)[0][1:]),
        "stable_rank": ("seed matrix step", found["stable_rank"]),
        "weight_rank": ("seed matrix step", found["weight_rank"]),
        "change_rank": ("seed matrix later_step", found["change_rank"]),
        "turned": ("seed matrix later_start", found["turned"]),
        "loss": ("seed step", found["loss"]),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Bases late in training and at its start, what a minibatch costs, and the stable rank."""
    every_seed, fresh = saved["share/old"], saved["share/fresh"]
    old = np.mean(every_seed, axis=0)
    late, first = (old[:, :, start, 0] - old[:, :, start, -1] for start in (-1, 0))
    tenth, half = "a tenth of the energy, a third of the norm", "what is left out has half of the norm"
    label = "late basis of the larger rank: smallest share after a gap"
    yield qualified(
        "no_need_to_change",
        "Consecutive gradients are similar, P P^T G ~ G: P need not change between two refreshes",
        "zhao2024galore, section 4.1, and the talk's slide on how often to change P",
        condition="the network has been trained for a while when the basis is taken",
        inside=[
            at_most("late basis: largest share lost over a gap", np.max(late), 0.1, why=tenth),
            at_least(label, np.min(old[:, 1, -1, -1]), 0.75, why=half),
        ],
        outside=[at_least("first basis: largest share lost over a gap", np.max(first), 0.1, why=tenth)],
    )
    old, fresh = (np.mean(share, axis=(0, 1))[:, -1] for share in (every_seed, fresh))
    ratio = (fresh[:, 0] - old[:, 0]) / np.abs(old[:, 0] - old[:, -1])
    label = "rank: share lost to the minibatch over that to age"
    yield stated(
        "minibatch",
        "Late in training a basis misses more because it is of one minibatch than because it is old",
        "derived here",
        at_least(f"smaller {label}", ratio[0], 1.0, why="at one both miss the same"),
        at_least(f"larger {label}", ratio[1], 1.0, why="at one both miss the same"),
    )
    yield from _of_ranks(config, saved)


def _of_ranks(config: Config, saved: Saved) -> Iterator[Claim]:
    """Stable ranks of gradients and weights, and how the subspace of the change turns."""
    # In the mean over seeds and minibatches.
    ranks = np.mean(saved["stable_rank"], axis=0)
    low, eighth = config.width / 8, "low is an eighth of what is possible"
    largest = f"largest stable rank at any step, of at most {config.width}"
    yield qualified(
        "stable_rank",
        "Gradients become low-rank in training: their stable rank falls",
        "zhao2024galore, section 3.2",
        condition="the end is compared with the start, where gradients are low-rank already, and rise first",
        inside=[
            every("matrices with a smaller one at the end than at the start", ranks[:, -1] < ranks[:, 0]),
            at_most(largest, ranks.max(), low, why=eighth),
        ],
        outside=[
            every("matrices with a larger one on the way than at the start", ranks.max(axis=1) > ranks[:, 0])
        ],
    )
    weights, change = (np.mean(saved[f"{name}_rank"], axis=0) for name in ("weight", "change"))
    slide = "zhao2024galore, the talk's slides on the rank of weights over time"
    yield qualified(
        "low_rank_weights",
        "Weights are of low rank later in training, and low-rank weights go with low-rank gradients",
        slide,
        condition="their change since the start is meant: weights keep the rank of their random start",
        inside=[
            at_most("change of the weights: largest stable rank", change.max(), low, why=eighth),
            at_most("gradients: largest stable rank", ranks.max(), low, why=eighth),
        ],
        outside=[at_least("weights: smallest stable rank", weights.min(), low, why=eighth)],
    )
    turned = np.mean(saved["turned"], axis=0)
    over = f"largest angle of {config.ranks[0]} directions over a gap, in radians"
    yield stated(
        "turns",
        "At first the subspace in which the weights change turns a lot, later little",
        slide,
        at_least(
            f"from step {config.starts[1]}, least matrix: {over}",
            turned[:, 0].min(),
            np.pi / 4,
            why="half way",
        ),
        at_most(
            f"from step {config.starts[-1]}: {over}",
            turned[:, -1].max(),
            np.pi / 8,
            why="a quarter of the way",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Shares over the steps since the basis was taken; stable rank and loss over training."""
    drawn, axes = plotting.new_figure(2, 4, width=3.1, height=2.8)
    for row, rank in enumerate(config.ranks):
        for column, name in enumerate(MATRICES):
            ax = axes[row, column]
            _draw_shares(ax, saved, column, row)
            ax.set_title(f"Rank {rank} of {config.width}, {name} matrix")
    axes[0, 0].legend(loc="lower left")
    ranks, loss = axes[:, 3]
    steps = saved["step"]
    for index, name in enumerate(MATRICES):
        over_seeds = np.mean(saved["stable_rank"], axis=0)
        ranks.plot(steps, over_seeds[index], "o-", color=f"C{index + 3}", label=name)
        for line, kind, at in (("--", "weight", steps), (":", "change", saved["later_step"])):
            ranks.plot(at, np.mean(saved[f"{kind}_rank"], axis=0)[index], line, color=f"C{index + 3}")
    for line, label in (("--", "weights"), (":", "their change")):
        ranks.plot([], [], line, color="0.3", label=label)
    ranks.set(xlabel="step", ylabel="stable rank", ylim=(0, 28), title="Stable ranks")
    ranks.legend(loc="upper right", ncols=2)
    loss.plot(steps, np.mean(saved["loss"], axis=0), "o-", color="0.3")
    loss.set(yscale="log", xlabel="step", ylabel="loss (nats)", title="Loss over training")
    for ax in (ranks, loss):
        _step_axis(ax, steps[-1], 10)
    return drawn


def _draw_shares(ax: Axes, saved: Saved, matrix: int, rank: int) -> None:
    """Mean and spread over seeds of the shares in old bases, and the shares in gradients' own ones."""
    offsets = saved["offset"]
    old, fresh = (saved[f"share/{basis}"][:, matrix, rank] for basis in ("old", "fresh"))
    for index, start in enumerate(saved["start"]):
        color, share, spread = f"C{index}", np.mean(old[:, index], axis=0), np.std(old[:, index], axis=0)
        ax.plot(offsets, share, "o-", color=color, label=f"from step {start}")
        ax.fill_between(offsets, share - spread, share + spread, color=color, alpha=0.15, linewidth=0)
        ax.plot(offsets, np.mean(fresh[:, index], axis=0), ":", color=color)
    ax.plot([], [], ":", color="0.3", label="own basis")
    _step_axis(ax, offsets[-1], 1)
    ax.set(ylim=(0, 1.03), xlabel="steps since the basis", ylabel="share of |G|² captured")


def _step_axis(ax: Axes, last: int, linear: int) -> None:
    """Steps on a logarithmic axis that begins at 0."""
    ax.set_xscale("symlog", linthresh=linear)
    ticks = [0, *(10**power for power in range(len(str(linear)) - 1, len(str(last))))]
    ax.set_xticks(ticks, labels=map(str, ticks))
    ax.set_xlim(-0.1 * linear, 1.2 * last)
