"""A ReLU network of two layers, trained by InfoNCE, learns the tokens of patterns: a node for each.

Samples show a pattern: tokens at some of K disjoint locations, and at the others any. Both views have the
tokens of the pattern. Nodes on each location, normalized over the batch, and a linear layer are trained with
common SGD. Networks of linear nodes, and one whose nodes are not normalized, see the same batches beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

from models.data.patterns import located_patterns, pattern_views, tokens_of_patterns
from models.draws import uniform
from models.functional import as_function
from models.locations import LocalNet, token_overlaps
from models.losses import contrastive_loss
from models.training import map_lanes, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, every, qualified, stated
from sims.ranges import Count, NonNegative, Positive, Range, Share, check_ranges
from sims.results import Context, Saved

SECTION = "tian2023nonlinear, Section 5 (the public code's network of two layers)"
TEMPERATURE = 0.1
FOUND = 0.95  # the cosine from which on a node is one for a token
RECORDS = 20


def _same(x: Array) -> Array:
    return x


NETS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "ReLU, normalized": (jax.nn.relu, True),
    "linear, normalized": (_same, True),
    "ReLU, not normalized": (jax.nn.relu, False),
}
"""The activation of a network, and whether its nodes are normalized over the batch."""


@dataclass(frozen=True)
class Config:
    """Patterns, networks and training; presets but `quick` have the sizes and rates that are reported."""

    locations: Count = 5
    """Locations of a sample."""
    vocabulary: Annotated[int, Range(at_least=2)] = 10
    """Tokens in all."""
    per_location: Count = 3
    """Tokens that patterns may have at one location."""
    patterns: Count = 12
    """Number of patterns."""
    fixed: Count = 3
    """Locations at which a pattern has a token."""
    nodes: Count = 12
    """Nodes on each location."""
    outputs: Count = 16
    """Units of the linear layer."""
    batch: Annotated[int, Range(at_least=2)] = 64
    """Samples of a batch."""
    steps: Annotated[int, Range(at_least=RECORDS)] = 1000
    """Steps of training."""
    rate: Positive = 0.1
    """Learning rate."""
    momentum: Share = 0.9
    """Momentum of gradient descent."""
    decay: NonNegative = 0.005
    """Weight decay, which is added to gradients."""
    runs: Count = 2
    """Draws of patterns and of networks."""

    def __post_init__(self):
        check_ranges(self)
        for name, bound in (("fixed", "locations"), ("per_location", "vocabulary")):
            if getattr(self, name) > getattr(self, bound):
                raise ValueError(f"{name} must be at most {bound}, got {getattr(self, name)}")


_REPORTED = Config(10, 20, 5, 40, 5, 25, 50, 128, 5000, 0.02, runs=8)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _REPORTED,
    "paper": replace(_REPORTED, runs=32),
}


def _loss(predicts: dict[str, Any], params: dict[str, Any], batch: tuple[Array, Array]) -> Array:
    """The sum over networks of the mean InfoNCE of unit outputs: each trains as it would alone."""

    def unit(out):
        return out / jnp.linalg.norm(out, axis=1, keepdims=True)

    def one(predict, params):
        f, g = (unit(predict(params, view)) for view in batch)
        total = contrastive_loss("infonce", f, g, temperature=TEMPERATURE, epsilon=1.0)
        return total / (TEMPERATURE * len(f))

    return jnp.sum(jnp.stack([one(predicts[name], params[name]) for name in NETS]))


def _batch(config: Config, patterns: Array, key: Array) -> tuple[Array, Array]:
    one, other = pattern_views(key, patterns, config.batch, config.vocabulary)
    return jax.nn.one_hot(one, config.vocabulary), jax.nn.one_hot(other, config.vocabulary)


def _weights(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform weights as common code draws them, up to the inverse root of the number of inputs."""
    return uniform(key, shape, minval=-1.0) / shape[-1] ** 0.5


def _observe(present: Array, params: dict[str, Any]) -> dict[str, Array]:
    """Cosines of tokens with their closest nodes, by network.

    Of the tokens of patterns these are the mean, the least, and the share of tokens that no node is for; of
    others the mean, the mean of what is positive, and the largest.
    """
    overlaps = jnp.stack(
        [
            token_overlaps(params[name]["filters"]["kernel"][...], signed=NETS[name][0] is not _same)
            for name in NETS
        ]
    )
    there, elsewhere = ({"axis": (1, 2), "where": which[None]} for which in (present, ~present))
    return {
        "present": jnp.mean(overlaps, **there),
        "least": jnp.min(overlaps, initial=1.0, **there),
        "missed": jnp.mean(overlaps < FOUND, **there),
        "absent": jnp.mean(overlaps, **elsewhere),
        "left": jnp.mean(jnp.maximum(overlaps, 0), **elsewhere),
        "most": jnp.max(overlaps, initial=-1.0, **elsewhere),
    }


@partial(jax.jit, static_argnames="config")
def _trained(config: Config, key: Array) -> dict:
    """Cosines over the training of all networks, on one draw of patterns."""
    of_patterns, of_filters, of_head, of_batches = jax.random.split(key, 4)
    patterns = located_patterns(
        of_patterns,
        config.patterns,
        config.locations,
        fixed=config.fixed,
        vocabulary=config.vocabulary,
        per_location=config.per_location,
    )
    filters = _weights(of_filters, (config.locations, config.nodes, config.vocabulary))
    head = _weights(of_head, (config.outputs, config.locations * config.nodes))
    nets = {name: as_function(LocalNet(filters, head, *how)) for name, how in NETS.items()}
    _, path = train(
        Partial(_loss, {name: predict for name, (predict, _) in nets.items()}),
        {name: params for name, (_, params) in nets.items()},
        optax.chain(
            optax.add_decayed_weights(config.decay), optax.sgd(config.rate, momentum=config.momentum)
        ),
        steps=config.steps,
        every=config.steps // RECORDS,
        observe=Partial(_observe, tokens_of_patterns(patterns, config.vocabulary)),
        batches=Partial(partial(_batch, config), patterns),
        key=of_batches,
    )
    return {"ok": path.ok, "step": path.ts, **path.ys}


def run(config: Config, context: Context) -> dict:
    """Train the networks on the same batches, and see which tokens they have nodes for."""
    context.progress("training", 0.0)
    keys = jax.random.split(jax.random.key(context.seed), config.runs)
    found = jax.device_get(map_lanes(partial(_trained, config), keys, at_once=1))
    if not np.all(found["ok"]):
        raise RuntimeError("training: weights are not finite")
    return {
        "net": ("net", list(NETS)),
        "step": ("step", found["step"][0]),
        **{name: ("run step net", value) for name, value in found.items() if name not in ("ok", "step")},
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Which tokens the network has nodes for, and what that needs."""
    yield _of_contrast(saved)
    yield _of_tokens(saved)
    yield _of_others(saved)


def _by_network(saved: Saved, name: str) -> np.ndarray:
    """A measure at the end, by network (ReLU and normalized, linear, and not normalized) and run."""
    return np.asarray(saved[name])[:, -1].T


def _of_contrast(saved: Saved) -> Claim:
    ours, linear, _ = _by_network(saved, "present")
    others, _, others_plain = _by_network(saved, "left")
    start = np.asarray(saved["present"])[:, 0, 0]
    return stated(
        "contrast",
        "ReLU nodes come closer to the tokens of patterns than linear ones do, and normalized ones "
        "forget more of the other tokens",
        SECTION,
        every("runs in which linear nodes are farther by 0.05", ours > linear + 0.05),
        every("runs in which others are left if not normalized", others < others_plain),
        at_least("gain over the start, least", np.min(ours - start), 0.3, why="it is near a half there"),
    )


def _of_tokens(saved: Saved) -> Claim:
    ours, linear, _ = _by_network(saved, "present")
    start = np.asarray(saved["present"])[:, 0, 0]
    return qualified(
        "recovered",
        "In a network of two layers that is trained by InfoNCE each token of the patterns has a node, but "
        "for few where nodes are normalized",
        SECTION,
        condition="its nodes are ReLU",
        preset="standard",
        inside=[
            at_least("least mean cosine with the closest node", np.min(ours), FOUND, why="0.998 is reported"),
            at_most(
                f"largest share of tokens with a cosine below {FOUND} in a run",
                np.max(_by_network(saved, "missed")[0]),
                0.08,
                why=f"with cosines as at the start, about 0.4, more take the mean below {FOUND}",
            ),
            at_most("largest mean at the start", np.max(start), 0.6, why="nodes are random there"),
            at_least(
                "without normalization: least cosine of all tokens and runs",
                np.min(_by_network(saved, "least")[2]),
                FOUND,
                why="the gate is what it takes",
            ),
        ],
        outside=[
            at_most("linear nodes, up to sign: largest mean", np.max(linear), 0.9, why="they mix tokens")
        ],
    )


def _of_others(saved: Saved) -> Claim:
    others, _, others_plain = _by_network(saved, "left")
    return qualified(
        "others",
        "On average no node is left for a token that the patterns do not have at its location",
        SECTION,
        condition="nodes are normalized over the batch",
        preset="standard",
        inside=[
            at_most(
                "cosine with the closest node, zero where it is negative: largest mean of a run",
                np.max(others),
                0.05,
                why="0.003 is reported of the mean with signs",
            ),
            at_most(
                "mean with signs: largest of a run",
                np.max(_by_network(saved, "absent")[0]),
                0.05,
                why="0.003 is reported",
            ),
            at_least(
                "least mean at the start",
                np.min(np.asarray(saved["left"])[:, 0, 0]),
                0.2,
                why="nodes are random there",
            ),
        ],
        outside=[
            at_least(
                "without normalization, after as many steps: mean over runs",
                np.mean(others_plain),
                0.05,
                why="normalized nodes are to stay below",
            ),
            at_least(
                "single tokens: largest cosine of all runs",
                np.max(_by_network(saved, "most")[0]),
                0.1,
                why="a few tokens keep a node, which a mean does not show",
            ),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Cosines over training, of the tokens of patterns and of others."""
    drawn, ((tokens, others),) = plotting.new_figure(1, 2)
    panels = ((tokens, "present", "Tokens of the patterns"), (others, "left", "Other tokens"))
    for ax, name, title in panels:
        mean = np.mean(np.asarray(saved[name]), axis=0)
        for index, label in enumerate(NETS):
            ax.plot(saved["step"], mean[:, index], label=label)
        plotting.finish(
            ax, title, "steps of training", "mean cosine with the closest node", ylim=(-0.03, 1.05)
        )
    tokens.legend(loc="lower right")
    others.legend(loc="upper right")
    return drawn
