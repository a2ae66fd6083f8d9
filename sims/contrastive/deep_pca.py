"""Deep linear networks under the contrastive energy find one principal component, whatever their depth.

With weights of pairs that are held, and each matrix on the sphere of unit Frobenius norm, the energy of a
linear network is tr(W_L ... W_1 X W_1^T ... W_L^T) with X = C_alpha[x, x]. Networks of several depths ascend
it from random weights; data whose largest eigenvalue is repeated, or negative, tell what the theorem needs.
Its condition besides is on the layers above the first: W_{>1}^T W_{>1}, with W_{>1} = W_L ... W_2, has a
largest eigenvalue that is not repeated. A single layer has none above it, and W_{>1} = I.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.contrastive import (
    contrastive_covariance,
    deep_linear_energy,
    deep_linear_flow,
    deep_linear_maximum,
    min_player,
)
from dynamics.flow import Trajectory
from models.collapse import Noisy, StochasticLinear, random_weights, weights
from models.draws import normal
from models.functional import as_function
from models.losses import alpha_cl_loss
from models.optimizers import along_spheres
from models.training import Descent, train
from sims import plotting
from sims.claims import Check, Claim, Preset, at_least, at_most, qualified, stated
from sims.compare import SOLVE, first_order, lane_gaps, largest, require_ok, right_and_wrong
from sims.ranges import Count, Positive, Range, check_ranges
from sims.results import Context, Saved

THEOREM = "tian2022contrastive, Theorem 3"
CASES = ("distinct", "repeated", "negative")  # the largest eigenvalue of X
VARIANCES = (2.0, 0.4)  # of the inputs, from the largest to the least
FLAT = 5  # matrices from which on starts are close to a flat saddle, and take long
TANGENT = along_spheres()  # one object: a new one would be compiled anew


@dataclass(frozen=True)
class Config:
    """The data, the networks, and their training."""

    samples: Annotated[int, Range(at_least=10)] = 40
    """Samples of the data set."""
    inputs: Annotated[int, Range(at_least=3)] = 6
    """Dimension of the inputs."""
    width: Annotated[int, Range(at_least=2)] = 8
    """Units of every other layer."""
    depths: tuple[Count, ...] = (1, 2, 3, 4)
    """Numbers of matrices."""
    starts: Annotated[int, Range(at_least=2)] = 8
    """Random starts at each depth; few of them are taken from five matrices on."""
    few: Annotated[int, Range(at_least=2)] = 3
    """Random starts at each of these depths."""
    rate: Positive = 0.2
    """Learning rate on half of the energy, whose largest value is 1 / 2."""
    steps: Annotated[int, Range(at_least=1000)] = 2000
    """Steps of training, up to four matrices."""
    many: Annotated[int, Range(at_least=1000)] = 120_000
    """Steps of training from five matrices on."""
    descent: Descent = Descent(horizon=12.0, points=30, substeps=(2, 6, 20, 60))
    """Training of two matrices beside the flow, at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if self.few > self.starts:
            raise ValueError(f"few must be at most the {self.starts} starts, got {self.few}")
        if 1 not in self.depths or len(set(self.depths)) < 2:
            raise ValueError(f"depths must have 1 and others beside it, got {self.depths}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        depths=(1, 2, 3, 4, 5, 6),
        steps=4000,
        starts=20,
        descent=Descent(12.0, 30, (2, 6, 20, 60, 200)),
    ),
    "paper": replace(
        Config(), samples=200, inputs=20, width=30, depths=(1, 2, 3, 4, 5, 6), starts=64, few=16, steps=4000
    ),
}


@partial(jax.jit, static_argnames="config")
def _views(config: Config, key: Array) -> tuple[dict[str, Array], Array, Array]:
    """Inputs, their augmentations and weights of pairs by case; the X of each case, and the best energy."""
    one, other = jax.random.split(key)
    x = normal(one, (config.samples, config.inputs))
    # Their covariance is as it is meant, and not as it is drawn.
    x = jnp.linalg.svd(x - jnp.mean(x, axis=0, keepdims=True), full_matrices=False)[0] * config.samples**0.5
    x = x * jnp.geomspace(*VARIANCES, config.inputs)[None] ** 0.5
    noise = normal(other, x.shape)

    def augmented(strength):
        x_aug = x + strength * noise
        alpha = min_player("entropy", x, x_aug, temperature=4.0)
        X = contrastive_covariance(alpha, x, x_aug)
        return x_aug, alpha / jnp.max(jnp.abs(jnp.linalg.eigvalsh(X)))

    (plain, strong), (alpha, strong_alpha) = jax.vmap(augmented)(jnp.array([0.3, 3.0]))
    # A linear map of the data maps X alike: this one makes its two largest eigenvalues equal.
    values, vectors = jnp.linalg.eigh(contrastive_covariance(alpha, x, plain))
    equal = vectors * jnp.ones_like(values).at[-2].set((values[-1] / values[-2]) ** 0.5)[None]
    data = {
        "x": jnp.stack([x, x @ equal, x]),
        "x_aug": jnp.stack([plain, plain @ equal, strong]),
        "alpha": jnp.stack([alpha, alpha, strong_alpha]),
    }
    X = jax.vmap(contrastive_covariance)(data["alpha"], data["x"], data["x_aug"])
    return data, X, jax.vmap(lambda X: deep_linear_maximum(X).energy)(X)


def _unit(matrices: list[Array]) -> list[Array]:
    return [W / jnp.linalg.norm(W) for W in matrices]


def _loss(predict: Any, params: Any, data: dict[str, Array]) -> Array:
    """Minus half of the energy of a network's embeddings."""
    embedded = (predict(params, Noisy(data[name])) for name in ("x", "x_aug"))
    return alpha_cl_loss(data["alpha"], *embedded)


def _shape(matrices: list[np.ndarray], X: np.ndarray) -> dict[str, np.ndarray]:
    """By case and start, how far matrices are from v_l v_{l-1}^T with v_0 the eigenvector of X."""
    matrices = [W / np.linalg.norm(W, axis=(-2, -1), keepdims=True) for W in matrices]
    parts = [np.linalg.svd(W, full_matrices=False) for W in matrices]
    direction = parts[0].Vh[..., 0, :]
    cosines = [np.abs(np.sum(a.Vh[..., 0, :] * b.U[..., 0], axis=-1)) for b, a in pairwise(parts)]
    first = direction @ np.linalg.eigh(X).eigenvectors[..., ::-1]
    one = np.broadcast_to(np.eye(matrices[0].shape[-2]), (*matrices[0].shape[:-1], matrices[0].shape[-2]))
    above = reduce(lambda before, W: W @ before, matrices[1:], one)
    gram = np.linalg.eigvalsh(above.mT @ above)
    return {
        "second": np.max([part.S[..., 1] / part.S[..., 0] for part in parts], axis=0),
        "alignment": np.min([np.ones(direction.shape[:-1]), *cosines], axis=0),
        "direction": direction,
        "component": np.abs(first[..., 0]),
        "plane": np.linalg.norm(first[..., :2], axis=-1),
        "product": np.linalg.norm(above @ matrices[0], axis=(-2, -1)),
        "above": gram[..., -2] / gram[..., -1],
    }


@partial(jax.jit, static_argnames="config")
def _trained(config: Config, starts: list[Array], data: dict[str, Array], X: Array) -> tuple:
    """Networks after training, by case and start, and their energies on the way."""
    steps = config.many if len(starts) >= FLAT else config.steps
    optimizer = optax.chain(TANGENT, optax.sgd(config.rate))

    def one(start, data, X):
        predict, params = as_function(StochasticLinear(_unit(start)))
        last, path = train(
            Partial(_loss, predict, data=data),
            params,
            optimizer,
            steps=steps,
            every=steps // 100,
            observe=lambda params: deep_linear_energy(_unit(weights(params)), X),
        )
        return weights(last), path.ys

    return jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, 0))(starts, data, X)


def _of_depth(config: Config, depth: int, data: dict[str, Array], X: Array, key: Array) -> dict:
    """Where networks of one depth end, by case and start, and their energies on the way."""
    starts = config.few if depth >= FLAT else config.starts
    sizes = (config.inputs, *[config.width] * depth)
    drawn = jax.vmap(lambda key: random_weights(key, sizes, 1.0))(jax.random.split(key, starts))
    last, energy = jax.device_get(_trained(config, drawn, data, X))
    return {"energy": energy[..., -1], "path": energy, **_shape(last, np.asarray(X))}


def _followed(config: Config, data: dict[str, Array], X: Array, key: Array) -> dict:
    """Two matrices that are trained at several learning rates, beside the flow."""
    start = _unit(random_weights(key, (config.inputs, config.width, config.width), 1.0))
    plain = {name: part[0] for name, part in data.items()}
    predict, params = as_function(StochasticLinear(start))
    rates, trained = jax.device_get(
        config.descent.train(Partial(_loss, predict, data=plain), params, weights, TANGENT)
    )
    ts = config.descent.times
    # Descent on half of the energy has half of its speed.
    flows = right_and_wrong(lambda factor: deep_linear_flow(start, X[0], factor * ts / 2, **SOLVE))
    flows = {name: Trajectory(ts, path.ys, path.ok) for name, path in flows.items()}
    require_ok("the flow and training", trained, *flows.values())
    finest = [np.asarray(W)[int(np.argmin(rates))] for W in trained.ys]

    def values(path):
        return np.stack([np.linalg.svd(W, compute_uv=False)[:, 0] for W in path], axis=1)

    return {
        "rate": ("rate", rates),
        "time": ("time", ts),
        "gap": ("rate", {name: lane_gaps(path, trained) for name, path in flows.items()}),
        "theory": ("time layer", values(flows["right"].ys)),
        "trained": ("time layer", values(finest)),
    }


def run(config: Config, context: Context) -> dict:
    """Where networks of every depth end, on three kinds of data, and one of them beside its flow."""
    drawn, starts, start = jax.random.split(jax.random.key(context.seed), 3)
    data, X, best = _views(config, drawn)
    found = []
    for index, depth in enumerate(config.depths):
        context.progress(f"depth {depth}", 0.8 * index / len(config.depths))
        found.append(_of_depth(config, depth, data, X, jax.random.fold_in(starts, depth)))
    context.progress("training beside the flow", 0.8)
    spectrum = np.linalg.eigvalsh(np.asarray(X))[:, ::-1]
    paths = np.stack([part.pop("path")[0, 0] for part in found])
    # Few starts of a depth are filled up with the first of them.
    filled = [
        jax.tree.map(lambda leaf: leaf[:, np.arange(config.starts) % leaf.shape[1]], part) for part in found
    ]
    ends = jax.tree.map(lambda *parts: np.stack(parts), *filled)
    return {
        "depth": ("depth", np.asarray(config.depths)),
        "case": ("case", list(CASES)),
        "spectrum": ("case eigenvalue", spectrum),
        "best": ("case", np.asarray(best)),
        "end": {
            name: ("depth case start" + (" input" if name == "direction" else ""), part)
            for name, part in ends.items()
        },
        "path": ("depth record", paths),
        "descent": _followed(config, data, X, start),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What the theorem says, what it needs, and that training follows the flow."""
    yield _of_theorem(saved)
    yield stated(
        "flow",
        "Gradient ascent of the energy with matrices of unit norm follows W' = G - <G, W> W",
        f"{THEOREM} (its dynamics)",
        *first_order(saved["descent/rate"], saved["descent/gap"]),
    )


def _of_theorem(saved: Saved) -> Claim:
    return qualified(
        "theorem",
        "Almost every local maximum of a deep linear network is global: all its matrices have rank one and "
        "are aligned, the first along a leading eigenvector of X, and its energy is the eigenvalue",
        f"{THEOREM} (its unit norms are not on the slide; derived: one eigenvector, and one layer)",
        condition="lambda_max(X) > 0, W_{>1}^T W_{>1} has a largest eigenvalue that is not repeated, and "
        "matrices have unit norm",
        inside=_where_one_vector_leads(saved),
        outside=_where_none_does(saved),
    )


def _ends(saved: Saved) -> tuple[dict[str, np.ndarray], ...]:
    """What was found at the end in each of the cases, by depth and start."""
    return tuple(
        {name: np.asarray(part)[:, index] for name, part in saved["end"].items()}
        for index in range(len(CASES))
    )


def _where_one_vector_leads(saved: Saved) -> list[Check]:
    distinct, repeated, _ = _ends(saved)
    best, spectrum = np.asarray(saved["best"]), np.asarray(saved["spectrum"])
    layered, rest = np.asarray(saved["depth"]) > 1, "training has come to rest"
    positive = (distinct, repeated)
    return [
        at_most(
            "two layers and more, X with a repeated eigenvalue or without: second eigenvalue of "
            "W_{>1}^T W_{>1} over the largest",
            largest([case["above"][layered] for case in positive]),
            1e-12,
            why="so the condition is met, whether X has it or not",
        ),
        at_most(
            "the same: energy less the eigenvalue, over it",
            largest(
                [case["energy"][layered] / top - 1 for case, top in zip(positive, best[:2], strict=True)]
            ),
            1e-12,
            why=rest,
        ),
        at_most(
            "the same: second singular value of a matrix over the first",
            largest([case["second"][layered] for case in positive]),
            1e-10,
            why=rest,
        ),
        at_least(
            "the same: least cosine of neighbours",
            np.min([case["alignment"][layered] for case in positive]),
            1 - 1e-12,
            why=rest,
        ),
        at_least(
            "eigenvalue repeated: least part of v_0 in its plane",
            np.min(repeated["plane"][layered]),
            1 - 1e-12,
            why=rest,
        ),
        at_most(
            "eigenvalue not repeated: the second eigenvalue of X over it",
            spectrum[0, 1] / spectrum[0, 0],
            0.9,
            why="they differ",
        ),
        at_least(
            "the same: least cosine of v_0 with its eigenvector, one layer included",
            np.min(distinct["component"]),
            1 - 1e-12,
            why=rest,
        ),
        at_most(
            "the same, one layer: second singular value over the first",
            largest(distinct["second"][~layered]),
            1e-10,
            why="all rows are along one eigenvector",
        ),
    ]


def _where_none_does(saved: Saved) -> list[Check]:
    _, repeated, negative = _ends(saved)
    best, depth = np.asarray(saved["best"]), np.asarray(saved["depth"])
    layered, many, alone = depth > 1, depth < FLAT, "W_{>1} = I"
    between = repeated["direction"] @ np.swapaxes(repeated["direction"], -1, -2)
    return [
        at_least(
            "one layer: second eigenvalue of W_{>1}^T W_{>1} over the largest",
            np.min(repeated["above"][~layered]),
            1,
            why=alone,
        ),
        at_least(
            "one layer, eigenvalue repeated: least second singular value over the first",
            np.min(repeated["second"][~layered]),
            0.01,
            why=f"rows end anywhere in the plane, as {alone}",
        ),
        at_most(
            "the same: energy less the eigenvalue, over it",
            largest(repeated["energy"][~layered] / best[1] - 1),
            1e-12,
            why="the maximum is global all the same",
        ),
        at_most(
            f"eigenvalue repeated, below {FLAT} matrices: least cosine of two starts' v_0",
            np.max(np.min(np.abs(between[many]), axis=(1, 2))),
            0.9,
            why="starts end anywhere in the plane",
        ),
        at_most(
            "all eigenvalues negative, two layers and more: largest product of the matrices",
            np.max(negative["product"][layered]),
            0.05,
            why="the best is zero, which is approached like a power of time",
        ),
        at_most("the same: largest energy", np.max(negative["energy"][layered]), 0, why="none is above zero"),
    ]


def figure(config: Config, saved: Saved) -> Figure:
    """Energies on the way, spectra of the data, singular values beside the flow, and the gap to it."""
    drawn, ((energy, spectra), (values, gaps)) = plotting.new_figure(2, 2, width=4.6)
    _energy_panel(energy, config, saved)
    for index, (name, marker) in enumerate(zip(CASES, "osD", strict=True)):
        spectrum = np.asarray(saved["spectrum"])[index]
        spectra.plot(np.arange(1, spectrum.size + 1), spectrum, f"{marker}-", label=f"largest: {name}")
    spectra.axhline(0, color="grey", lw=0.8)
    plotting.finish(
        spectra,
        "Eigenvalues of X",
        "number",
        "eigenvalue",
        {"loc": "upper right", "bbox_to_anchor": (1, 0.62)},
    )
    time, theory, trained, rate = (saved[f"descent/{name}"] for name in ("time", "theory", "trained", "rate"))
    plotting.theory_and_trained(values, time, theory, trained, ["first matrix", "second matrix"], "flow")
    labels = "time = learning rate × step", "largest singular value"
    plotting.finish(values, "Matrices become rank one", *labels, "lower right")
    gap = {"flow": saved["descent/gap/right"], "2 % off": saved["descent/gap/wrong"]}
    plotting.gap_panel(gaps, rate, gap, "learning rate", "largest gap", "Gap to the flow")
    return drawn


def _energy_panel(ax: Axes, config: Config, saved: Saved) -> None:
    steps = np.linspace(0, 1, np.asarray(saved["path"]).shape[1])
    for index, depth in enumerate(np.asarray(saved["depth"])):
        more = f" (steps × {config.many / config.steps:g})" if depth >= FLAT else ""
        path = np.asarray(saved["path"])[index] / np.asarray(saved["best"])[0]
        ax.semilogy(steps, np.maximum(path, 1e-6), label=f"{depth} matri{'x' if depth == 1 else 'ces'}{more}")
    plotting.finish(
        ax, "Energy of one start by depth", "share of the steps", "energy over its best", "center right"
    )
