"""Contextual sparsity: which tokens trained attention leaves, to several queries and classes of one query.

Every token occurs before every query. A class, one next token after one query, has tokens that are frequent
in it and rare in all other classes, and there are tokens that are frequent in all. The logits belong to a
query, so that the two classes of a query share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure

from dynamics import scan_snap
from dynamics.flow import Trajectory
from dynamics.scan_snap import SequenceClasses
from dynamics.spectra import entropy
from models.attention import ScanSnapAttention, population_loss
from models.data.tokens import sample_contexts
from models.functional import as_function
from models.losses import cross_entropy, on_batches
from models.training import Descent, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, every, qualified, stated
from sims.compare import first_order, lane, lane_gaps, require_ok, right_and_wrong
from sims.ranges import Count, Positive, Range, Share
from sims.results import Context, Saved

LATE = 10_000.0  # a time at which the flow is looked at besides
OWN = (0.5, 1.0)  # weights of a class's own tokens, before normalization; common tokens have the mean


@dataclass(frozen=True)
class Config:
    """Tokens, queries and training."""

    queries: Annotated[int, Range(at_least=2)] = 2
    """Last tokens."""
    classes: Annotated[int, Range(at_least=2)] = 2
    """Next tokens, and so classes, of each."""
    tokens: Annotated[int, Range(at_least=2)] = 5
    """Tokens of each class's own, and as many that are common to all."""
    rare: Share = 0.1
    """Weight of a token in other classes, over that in its own."""
    descent: Descent = Descent(horizon=150.0, points=60, substeps=(5, 10, 20, 40))
    """Gradient descent on infinitely long contexts at several learning rates."""
    seeds: Annotated[int, Range(at_least=2)] = 4
    """Networks that are trained on sampled sequences."""
    length: Annotated[int, Range(at_least=2)] = 256
    """Tokens of a sampled sequence, the last one included."""
    batch: Count = 128
    """Sequences per step."""
    rate: Positive = 0.5
    """Learning rate on sampled sequences, up to the same time."""

    @property
    def steps(self) -> int:
        """Steps on sampled sequences."""
        return round(self.descent.horizon / self.rate)


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": Config(
        queries=3, descent=Descent(horizon=300.0, points=100, substeps=(5, 10, 20, 40, 80)), seeds=16
    ),
    "paper": Config(
        queries=5,
        classes=3,
        descent=Descent(horizon=600.0, points=100, substeps=(5, 10, 20, 40, 80)),
        seeds=64,
    ),
}


def _classes(seed: int, config: Config) -> tuple[SequenceClasses, np.ndarray]:
    """The classes, and which class each context token is frequent in; -1 where in all."""
    rng, K = np.random.default_rng(seed), config.queries * config.classes
    owner = np.repeat(np.arange(-1, K), config.tokens)
    weights = np.where(owner >= 0, rng.uniform(*OWN, size=owner.size), np.mean(OWN))
    frequent = (owner == np.arange(K)[:, None]) | (owner < 0)
    P = np.zeros((K, owner.size + config.queries + K))
    P[:, : owner.size] = np.where(frequent, weights, config.rare * weights)
    query = owner.size + np.repeat(np.arange(config.queries), config.classes)
    next_token = owner.size + config.queries + np.arange(K)
    return SequenceClasses(P / P.sum(axis=1, keepdims=True), query, next_token), owner


@partial(jax.jit, static_argnames="config")
def _train_sampled(key: Array, config: Config, classes: SequenceClasses) -> tuple[Array, Array]:
    """Attention logits (seed, M, M) after training on sampled sequences, and whether all is finite."""
    predict, params = as_function(ScanSnapAttention.zeros(classes.vocab_size))
    batches = Partial(partial(sample_contexts, length=config.length, batch=config.batch), classes=classes)

    def one(key):
        loss, optimizer = on_batches(cross_entropy, predict), optax.sgd(config.rate)
        length: Any = {"steps": config.steps, "every": config.steps}
        _, path = train(loss, params, optimizer, observe=_logits, batches=batches, key=key, **length)
        return path.ys[-1], path.ok

    return jax.vmap(one)(jax.random.split(key, config.seeds))


def _logits(params: Any) -> Array:
    return params["Z"][...]


@jax.jit
def _attention(Z: Array, classes: SequenceClasses) -> Array:
    """Attention (..., K, M) of each class for logits (..., M, M)."""
    one = partial(scan_snap.context_distribution, classes=classes)
    return jnp.vectorize(one, signature="(m,m)->(k,m)")(Z)


def run(config: Config, context: Context) -> dict:
    """Train on infinitely long contexts beside the flow, and on sampled ones."""
    classes, owner = _classes(context.seed, config)
    rows, descent = np.unique(classes.query), config.descent
    context.progress("integrating the flow", 0.0)
    ts = np.append(descent.times, LATE)
    paths = right_and_wrong(
        lambda factor: scan_snap.population_flow(classes, ts, learning_rate_Y=factor, learning_rate_Z=factor)
    )
    logits = {name: np.asarray(path.ys.Z) for name, path in paths.items()}
    flows = {name: Trajectory(descent.times, Z[:-1, rows, : owner.size], True) for name, Z in logits.items()}
    late = logits["right"][-1]
    context.progress("training on infinitely long contexts", 0.3)
    loss, params = population_loss(classes)
    _, path = jax.device_get(descent.train(loss, params, observe=_logits))
    context.progress("training on sampled sequences", 0.7)
    sampled, ok = jax.device_get(_train_sampled(jax.random.key(context.seed), config, classes))
    require_ok("training", path, Trajectory(np.zeros(1), sampled, ok))
    trained = replace(path, ys=path.ys[:, :, rows, : owner.size])
    finest = int(np.argmin(descent.rates))
    share = np.asarray(_attention(lane(path, finest).ys, classes))[..., : owner.size]
    return {
        "token": ("token", owner),
        "rate": ("rate", descent.rates),
        "time": ("time", descent.times),
        "gap": ("rate", {name: lane_gaps(flow, trained) for name, flow in flows.items()}),
        "attention": {"start": ("class token", share[0]), "end": ("class token", share[-1])},
        "entropy": ("time class", np.asarray(entropy(share))),
        "late": ("class", np.asarray(entropy(_attention(jnp.asarray(late), classes)))),
        "z": {
            "flow": ("query token", flows["right"].ys[-1]),
            "trained": ("query token", lane(trained, finest).ys[-1]),
            "sampled": ("seed query token", sampled[:, rows, : owner.size]),
        },
    }


def _of_query(config: Config, owner: np.ndarray) -> np.ndarray:
    """Which tokens (query, token) are frequent in a class of a query, and not in all."""
    return (owner // config.classes == np.arange(config.queries)[:, None]) & (owner >= 0)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What attention leaves to a query and to its classes, and the network beside the flow."""
    owner, end = saved["token"], saved["attention/end"]
    own = _of_query(config, owner)
    mine = np.arange(len(end))[:, None] == owner
    mass = {when: np.sum(saved[f"attention/{when}"] * mine, axis=1) for when in ("start", "end")}
    leading = np.argsort(-end, axis=1)[:, : config.tokens]
    left_own = [np.all(mine[n, tokens]) for n, tokens in enumerate(leading)]
    agree = np.mean((saved["z/sampled"] > 0) == own, axis=(1, 2))
    rise = np.min(mass["end"] - mass["start"])
    shown, noise = "a tenth is what can be seen in a figure", "rare tokens of sampled sequences are noisy"
    yield stated(
        "contextual",
        "Which tokens trained attention leaves depends on the query: the same token gains before the query "
        "of its class and loses before others, and each of two classes of a query keeps tokens of its own",
        "tian2023scan, the talk's slide on contextual sparsity",
        every("tokens and queries with a logit of the right sign", (saved["z/trained"] > 0) == own),
        every("classes whose leading tokens are all their own", left_own),
        at_least("attention on own tokens: smallest rise of a class", rise, 0.1, why=shown),
        at_least("sampled sequences: share of right signs, least of a run", agree.min(), 0.9, why=noise),
    )
    start, trained = saved["entropy"][0], saved["entropy"][-1]
    still = np.min(np.exp(trained - start))
    yield qualified(
        "sparse",
        "Trained attention is sparse",
        "tian2023scan, the talk's slide on contextual sparsity (how far is measured here)",
        condition="sparser than at the start is meant: at equal rates it stays on most of the tokens",
        inside=[
            every("classes whose attention has a smaller entropy after training", trained < start),
            every(f"and a still smaller one along the flow at t = {LATE:g}", saved["late"] < trained),
        ],
        outside=[at_least("exp(entropy), end over start: least of a class", still, 0.5, why="most is half")],
    )
    yield stated(
        "network",
        "Gradient descent follows the population flow with several queries and several classes of each",
        "tian2023scan, Lemma 2",
        *first_order(saved["rate"], saved["gap"]),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Attention of each class before and after, logits by query, and the gap to the flow."""
    drawn, ((before, after), (logits, gaps)) = plotting.new_figure(2, 2, width=5.0, height=3.4)
    top = saved["attention/end"].max()
    owner, names = (
        saved["token"],
        [f"query {n // config.classes + 1}, class {n + 1}" for n in range(len(saved["attention/end"]))],
    )
    edges = np.flatnonzero(np.diff(owner)) + 0.5
    for ax, when, title in (
        (before, "start", "Attention at the start"),
        (after, "end", "and after training"),
    ):
        image = ax.imshow(saved[f"attention/{when}"], aspect="auto", cmap="viridis", vmin=0, vmax=top)
        for edge in edges:
            ax.axvline(edge, color="white", linewidth=0.6)
        ax.set_yticks(range(len(names)), names)
        plotting.finish(ax, title, "token: common, then by class", "class")
        ax.grid(visible=False)
    drawn.colorbar(image, ax=[before, after], label="attention", fraction=0.04, pad=0.02)
    for query, (flow, trained) in enumerate(zip(saved["z/flow"], saved["z/trained"], strict=True)):
        logits.plot(trained, "o", color=f"C{query}", markersize=4, label=f"query {query + 1}")
        logits.plot(flow, **plotting.THEORY)
    logits.plot([], [], label="population flow", **plotting.THEORY)
    plotting.finish(logits, "Logits of the same tokens to each query", "token", "attention logit z")
    plotting.make_room(logits, above=0.35)
    logits.legend(loc="upper left", ncols=2, fontsize=7.5)
    both = {"flow": saved["gap/right"], "rates 2 % off": saved["gap/wrong"]}
    plotting.gap_panel(
        gaps, saved["rate"], both, "learning rate", "largest gap of z", "Trained beside the flow"
    )
    plotting.label_ticks(gaps, saved["rate"], "{:.2g}")
    return drawn
