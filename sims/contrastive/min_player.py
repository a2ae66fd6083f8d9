"""The min player of contrastive learning: which weights of pairs are least, and what losses and rules do.

For losses with psi(u) = exp(u / t) the importance of pairs minimizes the energy less an entropy, over rows of
given sums. Closed forms of that minimum, and of those of other regularizers, stand beside descent from random
weights on the simplex; then how each loss weighs a pair by its distance, and what rules that are in use do in
place of the minima.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.contrastive import contrastive_energy, min_player, pairwise_importance
from dynamics.contrastive.family import Name
from models.draws import normal
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, corrected, every, qualified, stated
from sims.compare import largest
from sims.ranges import Count, Positive, Range, check_ranges
from sims.results import Context, Saved

PAPER = "tian2022contrastive"
EXPONENTIAL = ("infonce", "mine", "soft_triplet", "n_plus_1_tuplet", "lifted")
WITH_TEMPERATURE = ("infonce", "soft_triplet")
LOSSES = get_args(Name)
REGULARIZERS = ("entropy", "inverse", "square")
GAMMA, POWER = 2.0, 4.0
RULE_TEMPERATURES = (0.5, 1000.0)  # at the second the square regularizer keeps all pairs
SOFTMAX_TEMPERATURES = (0.05, 0.5, 2.0)
DIRECT_POWERS = (1.5, 3.0, 4.0)
EPSILON = 0.7  # of an InfoNCE with the positive pair in its denominator


@dataclass(frozen=True)
class Config:
    """The batch, and the search for the least weights."""

    samples: Annotated[int, Range(at_least=4)] = 6
    """Samples of a batch."""
    dimension: Count = 3
    """Dimension of the embeddings."""
    temperature: Positive = 1.0
    """t of all losses and regularizers that have one."""
    starts: Annotated[int, Range(at_least=2)] = 8
    """Random weights from which each search starts."""
    steps: Annotated[int, Range(at_least=50)] = 150
    """Steps of L-BFGS of each search."""

    def __post_init__(self):
        check_ranges(self)


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), samples=10, starts=64, steps=300),
    "paper": replace(Config(), samples=30, dimension=16, starts=64, steps=500),
}


def _draw(config: Config, key: Array) -> tuple[Array, Array]:
    one, other = jax.random.split(key)
    f = normal(one, (config.samples, config.dimension)) / config.dimension**0.5
    return f, f + 0.3 * normal(other, f.shape) / config.dimension**0.5


def _regularizer(name: str, alpha: Array, temperature: Array | float) -> Array:
    """The sum of r(alpha_ij) over pairs of different samples."""
    if name == "entropy":
        return -2 * temperature * jnp.sum(alpha * jnp.log(alpha))
    if name == "inverse":
        return jnp.sum(2 * temperature / (1 - GAMMA) * alpha ** (1 - GAMMA))
    return -jnp.sum(temperature / 2 * alpha**2)


def _found(loss: Callable[[Any], Any], starts: Array, steps: int) -> tuple[Any, Any]:
    """The logits at which L-BFGS ends from each start, and their losses."""
    optimizer = optax.lbfgs()

    def step(carry, _):
        logits, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(logits, state=state)
        updates, state = optimizer.update(gradient, state, logits, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(logits, updates), state), None

    def one(start):
        (logits, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
        return logits, loss(logits)

    return jax.vmap(one)(starts)


def _others(n: int) -> np.ndarray:
    """The indices of all others, by sample, (n, n - 1)."""
    return np.asarray([[j for j in range(n) if j != i] for i in range(n)])


@partial(jax.jit, static_argnames="config")
def _searched(config: Config, key: Array) -> dict:
    """For each problem of a min player: the weights of its closed form, and those that searches end at."""
    data, drawn = jax.random.split(key)
    f, f_aug = _draw(config, data)
    n, temperature = config.samples, config.temperature
    starts = normal(drawn, (config.starts, n, n - 1))
    others = _others(n)

    def search(problem):
        """The closed form, the best of all searches, and their losses."""
        alpha, kind, tau, sums = problem
        closed = jnp.take_along_axis(alpha, others, axis=1)

        def penalized(rows):
            penalty = jax.lax.switch(kind, [partial(_regularizer, name) for name in REGULARIZERS], rows, tau)
            alpha = jnp.zeros((n, n)).at[jnp.arange(n)[:, None], others].set(rows)
            return contrastive_energy(alpha, f, f_aug) - penalty

        def rows(logits):
            return sums[:, None] * jax.nn.softmax(logits, axis=1)

        ends, losses = _found(lambda logits: penalized(rows(logits)), starts, config.steps)
        return {
            "closed": closed,
            "found": rows(ends[jnp.argmin(losses)]),
            "loss": losses,
            "least": penalized(closed),
        }

    problems = {}
    for name in EXPONENTIAL:
        hyper: dict[str, Any] = {"temperature": temperature} if name in WITH_TEMPERATURE else {}
        alpha = pairwise_importance(name, f, f_aug, **hyper)
        tau = temperature if hyper else 1.0
        problems[name] = alpha, REGULARIZERS.index("entropy"), tau, jnp.sum(alpha, axis=1)
    # The same with the regularizer halved, which a reader who drops the 2 would take.
    alpha, kind, tau, sums = problems["infonce"]
    problems["halved"] = alpha, kind, tau / 2, sums
    for kind, name in enumerate(REGULARIZERS):
        hyper: dict[str, Any] = {"gamma": GAMMA} if name == "inverse" else {}
        alpha = min_player(name, f, f_aug, temperature=temperature, **hyper)
        problems[name] = alpha, kind, temperature, jnp.ones(n)
    # One after another: side by side, each problem would compute all three regularizers.
    entries = jax.lax.map(search, jax.tree.map(lambda *parts: jnp.stack(parts), *problems.values()))
    found = {name: jax.tree.map(lambda part, i=i: part[i], entries) for i, name in enumerate(problems)}
    found["halved"] = {name: found["halved"][name] for name in ("closed", "found")}
    return found


@partial(jax.jit, static_argnames="config")
def _weights(config: Config) -> dict:
    """How each loss and each regularizer weighs the pairs of one anchor, whose distances grow evenly."""
    # One anchor at the origin, its other view close by, and the negatives on a ray.
    far = jnp.linspace(0.05, 1.5, 40)
    f = jnp.concatenate([jnp.zeros(1), far])[:, None]
    f_aug = f + jnp.concatenate([jnp.full(1, 0.7), jnp.zeros(40)])[:, None]
    by_loss = {}
    for name in LOSSES:
        # The other losses with an exponential psi have a temperature of one.
        hyper: dict[str, Any] = {"temperature": 1.0} if name in WITH_TEMPERATURE else {}
        hyper |= {"epsilon": 0.2} if name == "triplet" else {}
        hyper |= {"scale": 8.0} if name == "coria" else {}
        by_loss[name] = pairwise_importance(name, f, f_aug, **hyper)[0, 1:]
    tau = config.temperature / 2
    by_rule = {
        "entropy": min_player("entropy", f, f_aug, temperature=tau)[0, 1:],
        "inverse": min_player("inverse", f, f_aug, temperature=tau, gamma=GAMMA)[0, 1:],
        "square": min_player("square", f, f_aug, temperature=tau)[0, 1:],
        "direct": min_player("direct", f, f_aug, temperature=tau, power=POWER)[0, 1:],
    }
    losses = jnp.stack([by_loss[name] for name in LOSSES])
    return {"half_squared": far**2 / 2, "loss": losses, "rule": jnp.stack(list(by_rule.values()))}


@partial(jax.jit, static_argnames="config")
def _rules(config: Config, key: Array) -> dict:
    """What rules that are in use give in place of the minima: the distance to those, and sums of rows."""
    f, f_aug = _draw(replace(config, samples=30), key)
    off = ~jnp.eye(30, dtype=bool)
    squared = jnp.sum((f[:, None] - f[None]) ** 2, axis=-1) / 2

    def normalized(alpha):
        alpha = jnp.where(off, alpha, 0)
        return alpha / jnp.sum(alpha, axis=1, keepdims=True)

    def dropped(row, tau):
        """Water filling with the level of one distance more than is kept."""
        floor = jnp.sort(2 * row)
        levels = (jnp.cumsum(floor) + tau) / jnp.arange(1.0, floor.size + 1)
        first = jnp.argmax(floor >= levels)
        return jnp.maximum(levels[first] - 2 * row, 0) / tau

    tau, cold = config.temperature / 2, jnp.asarray(RULE_TEMPERATURES)
    inverse = min_player("inverse", f, f_aug, temperature=tau, gamma=GAMMA)
    used = normalized((squared + tau) ** (-1 / GAMMA))
    rows = jnp.take_along_axis(squared, _others(30), axis=1)
    sums = jax.vmap(lambda tau: jnp.sum(jax.vmap(lambda row: dropped(row, tau))(rows), axis=1))(cold)
    exact = jax.vmap(lambda tau: min_player("square", f, f_aug, temperature=tau).sum(axis=1))(cold)
    return {
        "inverse": jnp.sum(jnp.abs(used - inverse), axis=1),
        "sum": sums,
        "exact_sum": exact,
        "inverse_sum": jnp.sum(inverse, axis=1),
    }


def _half_squares(f: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Half the squared distances from raw differences."""
    return np.sum((f[:, None] - other[None]) ** 2, axis=-1) / 2


def _explicit(config: Config, key: Array) -> dict:
    """Importances as the library has them beside their definitions, which are written out in NumPy."""
    f, f_aug = (np.asarray(view) for view in _draw(config, key))
    far, near, others = _half_squares(f, f), np.diag(_half_squares(f, f_aug)), _others(config.samples)
    far = np.take_along_axis(far, others, axis=1)

    def library(alpha):
        return np.take_along_axis(np.asarray(alpha), others, axis=1)

    def at(temperature):
        shares = np.exp(-far / temperature)
        softmax = shares / np.sum(shares, axis=1, keepdims=True)
        alpha = library(pairwise_importance("infonce", f, f_aug, temperature=temperature, epsilon=0.0))
        ratio = np.exp((far[:, None, :] - far[:, :, None]) / temperature)
        weighted = library(pairwise_importance("infonce", f, f_aug, temperature=temperature, epsilon=EPSILON))
        xi = np.sum(np.exp((near[:, None] - far) / temperature), axis=1)
        return {
            "softmax": np.max(np.abs(alpha - softmax)),
            "ratio": np.max(np.abs(alpha[:, :, None] / alpha[:, None, :] / ratio - 1)),
            "sum": np.max(np.abs(np.sum(weighted, axis=1) - xi / (EPSILON + xi))),
            "mean_sum": np.mean(np.sum(weighted, axis=1)),
        }

    def direct(power):
        # The d that has this power has a half in its square, as everywhere.
        weights = np.exp(-(np.sqrt(far) ** power) / config.temperature)
        alpha = min_player("direct", f, f_aug, temperature=config.temperature, power=power)
        return np.max(np.abs(library(alpha) - weights / np.sum(weights, axis=1, keepdims=True)))

    found = [at(temperature) for temperature in SOFTMAX_TEMPERATURES]
    return {
        **{name: ("temperature", np.array([part[name] for part in found])) for name in found[0]},
        "direct": ("power", np.array([direct(power) for power in DIRECT_POWERS])),
    }


def run(config: Config, context: Context) -> dict:
    """Closed forms beside searches, weights by distance, and rules that are in use."""
    first, second = jax.random.split(jax.random.key(context.seed))
    context.progress("searches", 0.0)
    searched = jax.device_get(_searched(config, first))
    dims = {"closed": "row pair", "found": "row pair", "loss": "start"}
    context.progress("weights and rules", 0.8)
    weights, rules = jax.device_get((_weights(config), _rules(config, second)))
    return {
        "explicit": _explicit(config, jax.random.fold_in(first, 1)),
        "search": {
            name: {key: (dims[key], value) if key in dims else value for key, value in entry.items()}
            for name, entry in searched.items()
        },
        "half_squared": ("half_squared", weights["half_squared"]),
        "loss": ("loss", list(LOSSES)),
        "by_loss": ("loss half_squared", weights["loss"]),
        "by_rule": ("rule half_squared", weights["rule"]),
        "rule": {
            "inverse": ("anchor", rules["inverse"]),
            "sum": ("warmth anchor", rules["sum"]),
            "exact_sum": ("warmth anchor", rules["exact_sum"]),
            "inverse_sum": ("anchor", rules["inverse_sum"]),
        },
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What the slides say of the min player, of losses, and of alpha that is set otherwise."""
    yield _of_softmax(saved)
    yield _of_exponentials(saved)
    yield _of_near_pairs(saved)
    yield _of_regularizers(saved)
    yield _of_rules(saved)


def _gap(saved: Saved, name: str) -> float:
    part = saved[f"search/{name}"]
    return largest(np.asarray(part["closed"]) - np.asarray(part["found"]))


def _lower(saved: Saved, *names: str) -> float:
    """How far the losses of the best searches are from those of the closed forms."""
    parts = [saved[f"search/{name}"] for name in names]
    return largest([np.min(part["loss"]) - part["least"] for part in parts])


def _of_softmax(saved: Saved) -> Claim:
    part = {name: np.asarray(saved[f"explicit/{name}"]) for name in ("softmax", "ratio", "sum", "mean_sum")}
    return qualified(
        "softmax",
        "The importance of InfoNCE is the softmax of -d_ij^2 / t over the other samples j",
        f"{PAPER}, the talk's slide on the min player",
        condition="epsilon = 0, as is printed",
        inside=[
            at_most(
                "largest gap to the softmax of half squared differences",
                np.max(part["softmax"]),
                1e-12,
                why=ROUNDING,
            ),
            at_most(
                "alpha_ij / alpha_ik over exp((d_ik^2 - d_ij^2) / t), less one",
                np.max(part["ratio"]),
                1e-12,
                why=ROUNDING,
            ),
        ],
        outside=[
            at_most(
                f"epsilon {EPSILON}: sums of rows less xi_i / (epsilon + xi_i)",
                np.max(part["sum"]),
                1e-12,
                why=ROUNDING,
            ),
            at_most(
                "the same: largest mean of these sums, by t",
                np.max(part["mean_sum"]),
                0.99,
                why="the positive pair has the rest",
            ),
        ],
    )


def _of_exponentials(saved: Saved) -> Claim:
    why = "L-BFGS takes smooth losses to rounding"
    return stated(
        "entropy",
        "Where psi is exponential, alpha minimizes the energy less an entropy over rows of given sums",
        f"{PAPER}, the talk's slide on the min player",
        *(
            at_most(
                f"{name.replace('_', ' ')}: largest gap to what searches find",
                _gap(saved, name),
                1e-6,
                why=why,
            )
            for name in EXPONENTIAL
        ),
        at_most(
            "largest difference of the least loss",
            _lower(saved, *EXPONENTIAL),
            1e-12,
            why="no search finds less",
        ),
        at_least(
            "InfoNCE with half of the regularizer: the same gap",
            _gap(saved, "halved"),
            0.02,
            why="the 2 in 2 t H(alpha) must be seen to matter",
        ),
    )


def _of_near_pairs(saved: Saved) -> Claim:
    names, weights = list(saved["loss"]), np.asarray(saved["by_loss"])
    falls = {name: np.all(np.diff(weights[names.index(name)]) < 0) for name in names}
    known = {name: np.all(np.isfinite(weights[names.index(name)])) for name in names}
    bell = weights[names.index("coria")]
    return qualified(
        "near-pairs",
        "A pair has more weight the smaller its distance is",
        f"{PAPER}, the talk's slide on the min player",
        condition="psi is exponential",
        inside=[every("losses with weights that fall with distance", [falls[name] for name in EXPONENTIAL])],
        outside=[
            every(
                "triplet, coria and ji: weights that do not",
                [known[name] and not falls[name] for name in ("triplet", "coria", "ji")],
            ),
            at_least(
                "coria: its largest weight over that of the nearest pair",
                np.max(bell) / bell[0],
                1.2,
                why="a sigmoid is steepest in its middle",
            ),
            at_most("ji: spread of its weights", np.ptp(weights[names.index("ji")]), 0, why="psi is linear"),
        ],
    )


def _of_regularizers(saved: Saved) -> Claim:
    why = "L-BFGS takes smooth losses to rounding"
    return stated(
        "regularizers",
        "Alpha may as well be set directly, or be the minimum for an inverse regularizer, or for a square",
        f"{PAPER}, the talk's slide on alpha-CL (minima are derived)",
        at_most("entropy: largest gap to what searches find", _gap(saved, "entropy"), 1e-10, why=why),
        at_most("inverse: the same", _gap(saved, "inverse"), 1e-10, why=why),
        at_most(
            "square: the same",
            _gap(saved, "square"),
            1e-6,
            why="weights of zero are at infinite logits, and approached slowly",
        ),
        at_most(
            "largest difference of the least loss",
            _lower(saved, *REGULARIZERS),
            1e-7,
            why="no search finds less, but for weights that are approached slowly",
        ),
        at_most(
            "inverse and square: largest sum of a row less one",
            largest([*(saved["rule/inverse_sum"] - 1), *np.ravel(saved["rule/exact_sum"] - 1)]),
            1e-12,
            why=ROUNDING,
        ),
        at_most(
            "set directly: largest gap to exp(-d_ij^p / t) over the sum of its row",
            np.max(saved["explicit/direct"]),
            1e-12,
            why=ROUNDING,
        ),
    )


def _of_rules(saved: Saved) -> Claim:
    apart, (cold, warm) = np.asarray(saved["rule/inverse"]), np.asarray(saved["rule/sum"])
    return corrected(
        "rules",
        "Rules for the inverse and the square regularizer, as the authors' code has them, give those minima",
        f"{PAPER}, the talk's slide on alpha-CL (rules of the code that the paper names)",
        printed=[
            at_most(
                "inverse, (d^2 + t)^(-1/g) over the sum of its row: largest distance from the minimum",
                np.max(apart),
                1e-6,
                why="it would be the minimum",
            ),
            at_most(
                "square, with the level of the first pair that is dropped: largest sum of a row",
                np.max(cold),
                1 + 1e-9,
                why="rows sum to one",
            ),
        ],
        mended=[
            at_most(
                "square, with the level of the last pair that is kept: sums of rows less one",
                largest(saved["rule/exact_sum"] - 1),
                1e-12,
                why=ROUNDING,
            ),
            at_least(
                "the rule's sums where all pairs are kept", np.min(warm), 20, why="each of 29 pairs has one"
            ),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Closed forms beside searches, weights by distance for losses and regularizers, and sums of rows."""
    drawn, ((found, losses), (rules, sums)) = plotting.new_figure(2, 2, width=4.6)
    _search_panel(found, saved)
    at, names = np.asarray(saved["half_squared"]), list(saved["loss"])
    others = {name: f"C{index + 1}" for index, name in enumerate(("triplet", "coria", "ji"))}
    for name in (*EXPONENTIAL, *others):
        weights = np.asarray(saved["by_loss"])[names.index(name)]
        label = {EXPONENTIAL[0]: "psi = exp: five losses"}.get(name, name if name in others else None)
        losses.plot(at, weights / np.max(weights), color=others.get(name, "C0"), label=label)
    plotting.finish(
        losses,
        "Weights by loss",
        "half squared distance",
        "weight over the largest",
        "upper right",
        ylim=(-0.05, 1.6),
    )
    for index, name in enumerate((*REGULARIZERS, "direct")):
        rules.plot(at, np.asarray(saved["by_rule"])[index], label=name)
    plotting.finish(
        rules, "Weights by regularizer", "half squared distance", "weight of a pair", "upper right"
    )
    _sum_panel(sums, saved)
    return drawn


def _search_panel(ax: Axes, saved: Saved) -> None:
    for name, marker in (("infonce", "o"), ("inverse", "s"), ("square", "D"), ("halved", "x")):
        part = saved[f"search/{name}"]
        label = "InfoNCE, regularizer halved" if name == "halved" else name.replace("infonce", "InfoNCE")
        ax.plot(np.ravel(part["closed"]), np.ravel(part["found"]), marker, ms=4, label=label)
    ax.plot([0, 1], [0, 1], **plotting.THEORY)
    plotting.finish(ax, "Weights of pairs", "closed form", "what searches find", "upper left")


def _sum_panel(ax: Axes, saved: Saved) -> None:
    cold, warm = np.sort(np.asarray(saved["rule/sum"]), axis=1)
    ax.semilogy(warm, "s", ms=4, label=f"rule in use, t = {RULE_TEMPERATURES[1]:g}")
    ax.semilogy(cold, "o", ms=4, label=f"rule in use, t = {RULE_TEMPERATURES[0]:g}")
    ax.semilogy(np.asarray(saved["rule/exact_sum"])[0], **plotting.THEORY, label="minimum")
    plotting.finish(ax, "Square regularizer: sums of rows", "anchor, by its sum", "sum", "center right")
