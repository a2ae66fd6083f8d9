"""Nonlinear nodes under the contrastive energy learn patterns: each node one, and more nodes more of them.

A node h(w . x) on the unit sphere ascends w^T A(w) w, where A(w) is the contrastive covariance of the inputs
that its gate lets through: dw/dt = (I - w w^T) A(w) w. Linear nodes all end at the leading eigenvector of one
matrix; ReLU nodes end at different patterns, each a maximum of its own. Trained nodes follow the flow, along
which the energy rises, but where steps go over the edges of gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure

from dynamics.contrastive import (
    contrastive_energy,
    gated_covariance,
    homogeneous_activation,
    pattern_coverage,
    power_flow,
)
from dynamics.flow import Trajectory
from models.draws import normal, uniform
from models.functional import as_function
from models.losses import alpha_cl_loss
from models.optimizers import along_spheres
from models.self_supervised import Nodes
from models.training import Descent, map_lanes
from sims import plotting
from sims.claims import (
    ROUNDING,
    Claim,
    Preset,
    at_least,
    at_most,
    equals,
    every,
    qualified,
    stated,
)
from sims.compare import first_order, lane_gaps, largest, require_ok, right_and_wrong
from sims.ranges import Count, Range, check_ranges
from sims.results import Context, Saved

PAPER = "tian2023nonlinear"
COUNTS = (25, 20, 18, 15, 12, 10)  # samples of each pattern
DIMENSION = 10
NODES = (1, 2, 5, 10, 20, 40)  # numbers of nodes whose coverage is measured
KINDS = ("linear", "relu", "leaky_relu", "monomial")
POWER = 3  # of the monomial
END = 200.0  # of the flow
STEPS = 2000  # of the flow along which the energy is watched
LENGTHS = (0.05, 0.1, 0.2, 0.4)  # of these steps
WATCHED = 40  # nodes there
AUGMENTATION = 0.1  # standard deviation of the noise on inputs that are compared with the theory
FOUND, ALIGNED = 0.95, 0.999  # cosines at which a node is said to be at a pattern, or at a direction
ERRORS = 4  # standard errors that a mean may be off: one of 16,000 is farther
TANGENT = along_spheres(axis=0)  # one object: a new one would be compiled anew


@dataclass(frozen=True)
class Config:
    """How many nodes start, and how they are trained."""

    starts: Annotated[int, Range(at_least=200)] = 400
    """Nodes that start at random; from half of them basins are counted, from sets of the others coverage."""
    identities: Count = 5
    """Data sets and nodes on which energies and gradients are compared."""
    trained: Annotated[int, Range(at_least=2)] = 8
    """Nodes that are trained beside the flow."""
    descent: Descent = Descent(horizon=40.0, points=80, substeps=(2, 6, 20, 60))
    """That training, at several learning rates."""

    def __post_init__(self):
        check_ranges(self)


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), starts=1000, identities=50, descent=Descent(40.0, 80, (2, 6, 20, 60, 200))),
    "paper": replace(Config(), starts=4000, identities=200, trained=64),
}


def _data(key: Array) -> tuple[Array, Array, Array]:
    """Orthonormal patterns, samples that show one each, and weights of pairs that are all alike."""
    patterns = jnp.linalg.qr(normal(key, (DIMENSION, DIMENSION)))[0][: len(COUNTS)]
    x = jnp.repeat(patterns, np.asarray(COUNTS), axis=0)
    n = len(x)
    return patterns, x, (1 - jnp.eye(n)) / n**2


def _unit(key: Array, count: int) -> Array:
    w = normal(key, (count, DIMENSION))
    return w / jnp.linalg.norm(w, axis=1, keepdims=True)


def _energy(w: Array, x: Array, alpha: Array, activation: Any, x_aug: Array | None = None) -> Array:
    out, other = (activation(view @ w)[:, None] for view in (x, x if x_aug is None else x_aug))
    return contrastive_energy(alpha, out, other)


@partial(jax.jit, static_argnames="kind")
def _ends(kind: str, w0: Array, patterns: Array, x: Array, alpha: Array, steps: Array) -> dict:
    """Where nodes of one activation end, and what is seen there."""
    h = homogeneous_activation(kind)
    path = power_flow(w0, x, x, alpha, h, jnp.array([0.0, END]))
    ends = path.ys[-1]

    def own(w):
        """The cosine of a node with the leading eigenvector of its own matrix."""
        vector = jnp.linalg.eigh(gated_covariance(w, x, x, alpha, h))[1][:, -1]
        return jnp.abs(vector @ w)

    def change(w):
        """The largest change of the energy over small steps along the sphere."""
        near = w[None] + 0.01 * steps
        near = near / jnp.linalg.norm(near, axis=1, keepdims=True)
        return jnp.max(jax.vmap(lambda v: _energy(v, x, alpha, h))(near)) - _energy(w, x, alpha, h)

    return {
        "ok": path.ok,
        "overlap": ends @ patterns.T,
        "place": ends,
        "own": jax.vmap(own)(ends),
        "open": jnp.any(w0 @ patterns.T > 0, axis=1),
        "change": jax.vmap(change)(patterns),
    }


@jax.jit
def _watched(nodes: Array, patterns: Array, x: Array, alpha: Array, length: Array) -> dict:
    """Changes of the energy of ReLU nodes by step, and the steps in which some gate is within reach."""
    path = power_flow(nodes, x, x, alpha, jax.nn.relu, length * jnp.arange(STEPS + 1), steps=STEPS)
    energies = jax.vmap(lambda w: _energy(w, x, alpha, jax.nn.relu))
    energy = map_lanes(energies, path.ys, at_once=3)  # each has distances of all pairs of samples
    # The field varies little within a step that crosses no edge: its stages go less than twice as far.
    reach = 2 * jnp.linalg.norm(jnp.diff(path.ys, axis=0), axis=-1)
    edge = jnp.min(jnp.abs(path.ys @ patterns.T), axis=-1)
    near = jnp.minimum(edge[1:], edge[:-1]) <= reach
    change = jnp.diff(energy, axis=0)

    def fall(where):
        return jnp.max(-change, where=where, initial=-jnp.inf) / jnp.max(energy)

    return {
        "ok": path.ok,
        "clear": fall(~near),
        "near": fall(near),
        "count": jnp.sum(~near),
        "gain": jnp.min(energy[-1] - energy[0]) / jnp.max(energy),
    }


def _augmented(key: Array, x: Array) -> Array:
    return x + AUGMENTATION * normal(key, x.shape)


def _identities(config: Config, key: Array) -> dict:
    """By activation and data: a node's energy over w^T A(w) w, and its gradient less 2 A(w) w, over it."""

    def of(kind, key):
        data, noise, weights, node = jax.random.split(key, 4)
        x = normal(data, (sum(COUNTS), DIMENSION))
        x_aug, alpha = _augmented(noise, x), _uneven(weights, len(x))
        hyper = {"power": POWER} if kind == "monomial" else {}
        (w,), h = _unit(node, 1), homogeneous_activation(kind, **hyper)
        A = gated_covariance(w, x, x_aug, alpha, h)
        gradient, foretold = jax.grad(_energy)(w, x, alpha, h, x_aug), 2 * A @ w
        size = jnp.linalg.norm(foretold)
        along = (gradient @ foretold) / size**2
        return (
            _energy(w, x, alpha, h, x_aug) / (w @ A @ w),
            along,
            jnp.linalg.norm(gradient - along * foretold) / size,
        )

    keys = jax.random.split(key, config.identities)
    found = jax.device_get(jax.jit(lambda keys: [jax.vmap(partial(of, kind))(keys) for kind in KINDS])(keys))
    energy, gradient, aside = (np.asarray(part) for part in zip(*found, strict=True))
    return {"energy": energy, "gradient": gradient, "aside": aside}


def _uneven(key: Array, n: int) -> Array:
    """Weights of pairs that are drawn one by one: that of (i, j) is not that of (j, i)."""
    return (1 - jnp.eye(n)) * (0.5 + uniform(key, (n, n))) / n**2


def _places(ends: np.ndarray, *, signed: bool) -> np.ndarray:
    """The number of the place at which each node ends: one for all that are aligned with its first node."""
    cosines = ends @ ends.T if signed else np.abs(ends @ ends.T)
    number = np.full(len(ends), -1)
    while np.any(number < 0):
        first = np.argmax(number < 0)
        number[(number < 0) & ((cosines[first] > ALIGNED) | (np.arange(len(ends)) == first))] = first
    return np.unique(number, return_inverse=True)[1]


def _coverage(overlap: np.ndarray) -> dict:
    """Patterns that sets of nodes find on average, beside the law for the basins of other nodes.

    No node is in two sets of a size. The variance of a mean is at most that of patterns that are found
    independently, and so is that of the law for shares that are counted.
    """
    half = len(overlap) // 2
    at = np.where(np.max(overlap, axis=1) > FOUND, np.argmax(overlap, axis=1), -1)
    q = np.array([np.mean(at[:half] == pattern) for pattern in range(len(COUNTS))])
    rest = at[half:]

    def of(size):
        sets = rest[: len(rest) // size * size].reshape(-1, size)
        missed = (1 - q) ** size
        counted = (size * (1 - q) ** (size - 1)) ** 2 * q * (1 - q) / half
        return {
            "measured": np.mean([len(set(row) - {-1}) for row in sets]),
            "law": float(pattern_coverage(q, size)),
            "error": np.sqrt(np.sum(missed * (1 - missed) / len(sets) + counted)),
        }

    found = [of(size) for size in NODES]
    return {
        "share": ("pattern", q),
        "nodes": ("nodes", np.asarray(NODES)),
        **{name: ("nodes", np.array([part[name] for part in found])) for name in found[0]},
    }


def _loss(predict: Any, params: Any, data: tuple[Array, Array, Array]) -> Array:
    """Minus half of the energy of all nodes, whose sum is that of each."""
    *views, alpha = data
    return alpha_cl_loss(alpha, *(predict(params, view) for view in views))


def _followed(config: Config, w0: Array, patterns: Array, x: Array, x_aug: Array, alpha: Array) -> dict:
    """ReLU nodes that are trained at several learning rates, beside the flow."""
    predict, params = as_function(Nodes(w0, jax.nn.relu))
    rates, trained = jax.device_get(
        config.descent.train(
            Partial(_loss, predict, data=(x, x_aug, alpha)),
            params,
            lambda params: jax.tree.leaves(params)[0].T,
            TANGENT,
        )
    )
    ts = config.descent.times
    flows = right_and_wrong(lambda factor: power_flow(w0, x, x_aug, alpha, jax.nn.relu, factor * ts))
    flows = {name: Trajectory(ts, path.ys, path.ok) for name, path in flows.items()}
    require_ok("the flow and training", trained, *flows.values())
    finest = np.asarray(trained.ys)[int(np.argmin(rates))]
    return {
        "rate": ("rate", rates),
        "time": ("time", ts),
        "gap": ("rate", {name: lane_gaps(path, trained) for name, path in flows.items()}),
        "theory": ("time node", np.max(flows["right"].ys @ np.asarray(patterns).T, axis=-1)),
        "trained": ("time node", np.max(finest @ np.asarray(patterns).T, axis=-1)),
    }


def run(config: Config, context: Context) -> dict:
    """Where linear and ReLU nodes end, how many patterns they find, and training beside the flow."""
    keys = jax.random.split(jax.random.key(context.seed), 6)
    patterns, x, alpha = _data(keys[0])
    w0, steps = _unit(keys[1], config.starts), normal(keys[2], (200, DIMENSION))
    ends = {}
    for index, kind in enumerate(("linear", "relu")):
        context.progress(f"{kind} nodes", 0.3 * index)
        ends[kind] = jax.device_get(_ends(kind, w0, patterns, x, alpha, steps))
        if not ends[kind].pop("ok"):
            raise RuntimeError(f"flow of {kind} nodes: steps are too long")
    opened = np.asarray(ends["relu"].pop("open"))
    del ends["linear"]["open"]
    ends["linear"]["place"] = _places(ends["linear"]["place"], signed=False)
    places = np.full(opened.shape, -1)
    places[opened] = _places(ends["relu"]["place"][opened], signed=True)
    ends["relu"]["place"] = places
    context.progress("energy along the flow", 0.6)
    nodes = w0[np.flatnonzero(opened)[:WATCHED]]
    watched = [jax.device_get(_watched(nodes, patterns, x, alpha, length)) for length in LENGTHS]
    if not all(part.pop("ok") for part in watched):
        raise RuntimeError("flow along which the energy is watched: steps are too long")
    context.progress("training beside the flow", 0.8)
    dims = {"overlap": "start pattern", "change": "pattern"}
    return {
        "open": ("start", opened),
        **{
            kind: {name: (dims.get(name, "start"), value) for name, value in part.items()}
            for kind, part in ends.items()
        },
        "coverage": _coverage(np.asarray(ends["relu"]["overlap"])[opened]),
        "length": ("length", np.asarray(LENGTHS)),
        "ascent": {name: ("length", np.array([part[name] for part in watched])) for name in watched[0]},
        "kind": ("kind", list(KINDS)),
        "identity": ("kind case", _identities(config, keys[3])),
        "descent": _followed(
            config, w0[: config.trained], patterns, x, _augmented(keys[4], x), _uneven(keys[5], len(x))
        ),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What the slides say of the setting, of the flow, and of several nodes."""
    yield _of_setting(saved)
    yield _of_ascent(saved)
    yield _of_rest(saved)
    yield _of_linear(saved)
    yield _of_relu(saved)
    yield stated(
        "flow",
        "Nodes that are trained follow w' = (I - w w^T) A(w) w",
        f"{PAPER}, the talk's slide on training dynamics",
        *first_order(saved["descent/rate"], saved["descent/gap"]),
    )


def _of_setting(saved: Saved) -> Claim:
    energy, gradient, aside = (
        np.asarray(saved[f"identity/{name}"]) for name in ("energy", "gradient", "aside")
    )
    return qualified(
        "setting",
        "A node with an activation such as these maximizes w^T A(w) w, whose gradient is 2 A(w) w",
        f"{PAPER}, the talk's slide on the nonlinear setting",
        condition="h(x) = h'(x) x, as of linear, ReLU and leaky ReLU nodes; monomials have constants besides",
        inside=[
            at_most("their energy over it, less one", largest(energy[:3] - 1), 1e-12, why=ROUNDING),
            at_most("their gradient over it, less one", largest(gradient[:3] - 1), 1e-12, why=ROUNDING),
        ],
        outside=[
            at_most(
                f"x^{POWER} / {POWER}: its energy times {POWER**2} over it, less one",
                largest(POWER**2 * energy[3] - 1),
                1e-12,
                why="the constant is 1 / p^2",
            ),
            at_most(
                f"its gradient times {POWER} over it, less one",
                largest(POWER * gradient[3] - 1),
                1e-12,
                why="the constant is 1 / p",
            ),
            at_most("all: part of the gradient aside from it", largest(aside), 1e-12, why=ROUNDING),
        ],
    )


def _of_ascent(saved: Saved) -> Claim:
    part = {name: np.asarray(saved[f"ascent/{name}"]) for name in ("clear", "near", "count", "gain")}
    square = part["near"] / np.asarray(saved["length"]) ** 2
    return qualified(
        "ascent",
        "Like power iteration the flow w' = (I - w w^T) A(w) w never lowers w^T A(w) w, though A(w) changes",
        f"{PAPER}, the talk's slide on training dynamics (that it does not fall is derived)",
        condition="no gate is crossed in a step",
        inside=[
            at_most(
                "steps too far from all gates to cross one: largest fall over the largest value",
                np.max(part["clear"]),
                1e-14,
                why=ROUNDING,
            ),
            at_least(
                "number of these steps",
                np.min(part["count"]),
                100,
                why="nodes come to rest on edges of gates",
            ),
            at_least("whole paths: least rise", np.min(part["gain"]), 0.01, why="starts are at no maximum"),
        ],
        outside=[
            at_least(
                "all other steps: largest fall", np.min(part["near"]), 1e-9, why="steps end beyond an edge"
            ),
            at_most(
                "that fall over the square of the step's length: largest over least",
                np.max(square) / np.min(square),
                2.5,
                why="order one or three would make it 8; rounding decides which gates a step crosses",
            ),
        ],
    )


def _of_rest(saved: Saved) -> Claim:
    own, opened = np.asarray(saved["relu/own"]), np.asarray(saved["open"])
    return stated(
        "rest",
        "A node comes to rest where it is the leading eigenvector of its own matrix, and there are several "
        "such places",
        f"{PAPER}, the talk's slide on training dynamics",
        at_least(
            "ReLU nodes with an open gate: least cosine with that eigenvector",
            np.min(own[opened]),
            ALIGNED,
            why="gates flip at the edges that it rests on",
        ),
        equals(
            "different places at which they rest",
            np.max(saved["relu/place"]) + 1,
            len(COUNTS),
            0,
            why="one for each pattern, and ends are told apart by their cosines alone",
        ),
        at_most(
            "share of starts whose gates are all closed",
            1 - np.mean(opened),
            0.06,
            why="2^-6 of starts are so",
        ),
    )


def _of_linear(saved: Saved) -> Claim:
    overlap = np.asarray(saved["linear/overlap"])
    return stated(
        "linear",
        "Linear nodes all end at one direction, so that more of them do not help",
        f"{PAPER}, the talk's slide on several nodes",
        equals(
            "different directions at which they end, up to sign",
            np.max(saved["linear/place"]) + 1,
            1,
            0,
            why="the leading eigenvalue of their matrix is not repeated",
        ),
        at_least(
            "least cosine with the leading eigenvector",
            np.min(saved["linear/own"]),
            ALIGNED,
            why="the flow is close to its end",
        ),
        at_most("largest cosine with a pattern", np.max(np.abs(overlap)), FOUND, why="it mixes them"),
        every("patterns that a small step improves", np.asarray(saved["linear/change"]) > 0),
    )


def _of_relu(saved: Saved) -> Claim:
    part = {name: np.asarray(saved[f"coverage/{name}"]) for name in ("measured", "law", "share", "error")}
    overlap = np.asarray(saved["relu/overlap"])[np.asarray(saved["open"])]
    return stated(
        "nonlinear",
        "Nonlinear nodes end at different patterns, and more nodes with diverse starts find more of them",
        f"{PAPER}, the talk's slide on several nodes",
        every("nodes that end at a pattern", np.max(overlap, axis=1) > ALIGNED),
        every("patterns that no small step improves", np.asarray(saved["relu/change"]) < 0),
        every("patterns at which some node ends", part["share"] > 0),
        every("numbers of nodes of which more find more", np.diff(part["measured"]) > 0),
        at_least("patterns of 40 nodes, out of 6", part["measured"][-1], 5.5, why="the rarest has a tenth"),
        at_most(
            "law of independent starts, with basins counted on other nodes: largest gap over its error",
            largest((part["law"] - part["measured"]) / part["error"]),
            ERRORS,
            why="standard errors of sets without a common node, and of basins that are counted",
        ),
        at_most(
            "largest of these errors",
            np.max(part["error"]),
            0.5,
            why="it is 0.4 for the two sets of 40 that the least number of starts gives",
        ),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Overlaps of linear and of ReLU nodes with patterns, coverage, and training beside the flow."""
    drawn, ((ends, coverage), (values, gaps)) = plotting.new_figure(2, 2, width=4.6)
    for index, kind in enumerate(("linear", "relu")):
        overlap = np.minimum(np.max(np.abs(np.asarray(saved[f"{kind}/overlap"])), axis=1), 1)
        ends.hist(
            overlap,
            bins=np.linspace(-0.0125, 1.0125, 42),  # one bin is about 1, where rounding has both sides
            color=f"C{index}",
            alpha=0.7,
            label=f"{kind.replace('relu', 'ReLU')} nodes",
        )
    plotting.finish(ends, "Where nodes end", "cosine with the nearest pattern", "nodes", "upper left")
    nodes = np.asarray(saved["coverage/nodes"])
    coverage.semilogx(nodes, saved["coverage/measured"], "o", label="ReLU nodes")
    coverage.semilogx(nodes, saved["coverage/law"], **plotting.THEORY, label="independent starts")
    coverage.axhline(0, color="C1", label="linear nodes")
    plotting.label_ticks(coverage, nodes)
    plotting.finish(coverage, "Patterns that are found", "nodes", "patterns, of six", "center right")
    time, theory, trained = (saved[f"descent/{name}"] for name in ("time", "theory", "trained"))
    plotting.theory_and_trained(values, time, theory[:, :4], trained[:, :4], ["", "", "", ""], "flow")
    plotting.finish(
        values, "Four trained nodes", "time = learning rate × step", "cosine with the nearest pattern"
    )
    values.legend(handles=[values.lines[-1]], labels=["flow"], loc="lower right")
    gap = {"flow": saved["descent/gap/right"], "2 % off": saved["descent/gap/wrong"]}
    plotting.gap_panel(gaps, saved["descent/rate"], gap, "learning rate", "largest gap", "Gap to the flow")
    return drawn
