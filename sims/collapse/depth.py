"""Collapse of regularized linear networks by depth: where it happens, how, and what is left of a network.

A network with D hidden layers of width w, noise of variance s on its hidden units and gamma on all layers,
for inputs with E[x x^T] = I, collapses at

    gamma_c = [w^{2D - 2} |c|^2 ((D - 1) / B)^{(D - 1) / D} / D^2]^{D / (D + 1)},   B = w^D (s + w)^D

where b, an entry of its inner matrices, is b_c with b_c^{2D} = gamma_c (D - 1) / B: the squared norm of all
weights, (D + 1) w^2 b_c^2, jumps to zero, but for D = 1. What has learned stays up to (D + 1) / 4^{D / (D +
1)} gamma_c; what has collapsed stays at zero at any gamma, but for D = 1.

Minima of the theory and landscapes stand beside gradient descent from many starts. Units whose weights start
at zero keep them there, so that one program trains networks of several widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from dynamics import collapse
from dynamics.collapse import Moments
from models.collapse import StochasticLinear, noisy_batch, random_weights, weights
from models.functional import as_function
from models.losses import mean_squared_error
from models.training import train
from sims import plotting
from sims.claims import (
    ROUNDING,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    equals,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import in_calls, largest, named_groups, orders
from sims.ranges import Count, Positive, Range, check_ranges
from sims.results import Context, Saved

WIDTH, NOISE, SIGNAL = 4, 0.5, np.array([0.6, 0.8])
EVEN = Moments(np.eye(2), SIGNAL, 1.0)
TILTED = Moments(np.array([[1.0, 0.3], [0.3, 0.5]]), SIGNAL, 1.5)
SPREAD, SPREAD_AT = Moments(np.diag([1.0, 0.01]), np.array([1.0, 0.2]), 5.0), (0.23, 0.35, 0.5)
EXAMPLES = 2**0.5 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])  # whose moments are those of EVEN
DEPTHS, DEEP, TRAINED = (0, 1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3)
HOLDS = {1: (WIDTH,), 2: (5, WIDTH), 3: (WIDTH,) * 3}  # widths of the programs that train
CASES = {  # hidden widths of unequal networks, and their gammas
    (4, 4): (0.1, 0.1, 0.1),
    (5, 3): (0.1, 0.05, 0.2),
    (3, 4, 3): (0.06, 0.06, 0.06, 0.06),
}
VARIANTS = {  # width, noise and moments of networks whose critical points are compared
    "base": (WIDTH, NOISE, EVEN),
    "no noise": (WIDTH, 0.0, EVEN),
    "more noise": (WIDTH, 2.0, EVEN),
    "one unit": (1, NOISE, EVEN),
    "other A": (WIDTH, NOISE, Moments(np.diag([2.0, 0.1]), SIGNAL, 7.0)),
}
UNEVEN = np.array([(0.5, 0.5), (2.0, 0.4), (0.4, 3.0), (1.5, 1.5)])  # gamma_w and gamma_u of Hessians
EQUAL = np.array([0.0, 0.01, 0.1, 1.0])
# These are relative to gamma_c: steps away from it, strengths where networks are trained near it, those of
# sweeps, of landscapes that are drawn and measured, and of noise that is drawn.
STEPS, NEAR = (1e-1, 1e-2, 1e-3, 1e-4), (0.97, 1.03)
PACE = (0.5, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3)
SHOWN, LEVELS, DRAWN = (0.6, 1.0, 1.1, 1.4), (0.3, 0.6, 0.9), (0.5, 1.3)
KICK = 1e-3  # standard deviation of what is added to all weights between two strengths of a sweep
CHUNK, BATCH = 64, 8  # minima, and trained networks, of one call
RATE, CLIP, DEAD = 0.05, 0.4, 1e-2  # of gradient descent; squared norms below the last are zero
DIFFERENCE = 1e-4  # of gamma, relative, for derivatives


@dataclass(frozen=True)
class Config:
    """How many networks are trained, at which strengths and for how long."""

    starts: Annotated[int, Range(at_least=8)] = 24
    """Starts of gradient descent at each strength, of standard deviations from 10^-1.5 to 10^0.3."""
    strengths: tuple[Positive, ...] = (0.3, 0.6, 0.9, 1.1)
    """Strengths of regularization over the critical one, at which networks are trained.

    Much closer to 1 one hidden layer takes longer than `horizon`, since its units even out slowly there.
    """
    horizon: Positive = 100.0
    """Time that gradient descent is given: learning rate times steps; twice that with one hidden layer."""
    drawn_steps: Count = 2000
    """Steps of gradient descent with noise that is drawn."""
    points: Annotated[int, Range(at_least=CHUNK)] = CHUNK
    """Strengths of the theory's curves."""

    def __post_init__(self):
        check_ranges(self)
        if not {0.3, 0.9} <= set(self.strengths):
            raise ValueError(f"strengths must hold 0.3 and 0.9, got {self.strengths}")


_STANDARD = Config(96, (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.95, 1.1), 200.0, 20_000, 4 * CHUNK)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(_STANDARD, starts=384, horizon=400.0, drawn_steps=100_000),
}


def closed_forms(depth: int, width: int = WIDTH, noise: float = NOISE) -> tuple[float, float, float]:
    """gamma_c, the squared norm of all weights that is lost there, and the largest metastable gamma."""
    D, w, B = depth, width, (width * (noise + width)) ** depth
    signal = w ** (2 * D - 2) * (SIGNAL @ SIGNAL) / D**2
    gamma = (signal * ((D - 1) / B) ** (1 - 1 / D)) ** (D / (D + 1))
    jump = (D + 1) * w**2 * (gamma * (D - 1) / B) ** (1 / D)
    return gamma, jump, gamma * (D + 1) / 4 ** (D / (D + 1))


def _hidden(depth: int, width: int = WIDTH) -> tuple[int, ...]:
    return (width,) * depth


@partial(jax.jit, static_argnames="widths")
def _least(widths, data, noise, gammas):
    return jax.vmap(lambda row: collapse.deep_minimum(data, row, noise, widths))(gammas)


def _deep_minima(widths: tuple[int, ...], gammas: Any, data: Moments = EVEN, noise: float = NOISE) -> Any:
    """Minima with an axis (K,) in front, at strengths (K,) or (K, D + 1)."""
    gammas = np.asarray(gammas, float)
    rows = gammas if gammas.ndim == 2 else np.repeat(gammas[:, None], len(widths) + 1, axis=1)
    return in_calls(partial(_least, widths, data, noise), rows, CHUNK)


def minima(widths: tuple[int, ...], gammas: Any, data: Moments = EVEN, noise: float = NOISE) -> Any:
    """Least losses and squared norms, (K,) each, at strengths (K,) or (K, D + 1)."""
    least = _deep_minima(widths, gammas, data, noise)
    return least.loss, np.sum(least.norms**2, axis=-1)


def _last(holds: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """The strength up to which a condition holds, by grids each of which is an interval of the one before."""
    for _ in range(5):
        grid = np.linspace(low, high, CHUNK)
        end = int(np.argmin(holds(grid)))
        low, high = grid[max(end - 1, 0)], grid[end]
    return float(low + high) / 2


def _curves(config: Config, critical: Sequence[float]) -> dict:
    """L* and squared norms m by depth, what they do at gamma_c, and derivatives of L* below it."""
    ratio, h, n = np.linspace(0.05, 1.4, config.points), np.array(STEPS), len(STEPS)
    ends = 0.5 * np.array([1 - DIFFERENCE, 1, 1 + DIFFERENCE])
    at = np.concatenate([ratio, 1 - h, [1.0], 1 + h, ends])
    found = [minima(_hidden(D), g * at) for D, g in zip(DEPTHS, critical, strict=True)]
    cuts = [ratio.size, ratio.size + 2 * n + 1]
    (loss, L, L_ends), (norm, m, m_ends) = (
        np.split(x, cuts, axis=1) for x in np.moveaxis(np.array(found), 1, 0)
    )
    gamma = np.array(critical)[:, None]
    alone, of_both = minima(_hidden(1), np.stack([2 * ends, np.full(3, 0.5)], axis=1))

    def order(D):
        return collapse.transition_order(lambda g: float(minima(_hidden(D), [g])[1][0]), critical[D])

    fall = (L[:, [n]] - L[:, :n]) / (h * gamma)
    slopes = (L_ends[:, 2] - L_ends[:, 0]) / (DIFFERENCE * gamma[:, 0])
    return {
        "ratio": ("ratio", ratio),
        "step": ("step", h),
        "loss": ("depth ratio", loss),
        "norm": ("depth ratio", norm),
        "near": ("depth step", {"norm": m[:, :n], "fall": fall}),
        "kink": ("depth step", np.abs(m[:, n + 1 :] - 2 * m[:, [n]] + m[:, :n]) / (h * gamma)),
        "order": ("classified", np.array([order(D) for D in DEPTHS[:4]])),
        "derivative": ("depth", {"loss": slopes, "norm": m_ends[:, 1]}),
        "of_one": {"loss": (alone[2] - alone[0]) / (2 * DIFFERENCE), "norm": of_both[1]},
    }


@partial(jax.jit, static_argnames=("depth", "width"))
def _on_grid(depth, width, b, gammas):
    return jax.vmap(lambda g: collapse.effective_landscape(b, EVEN, g, NOISE, width, depth))(gammas)


def _valley(b: np.ndarray, landscape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where landscapes (K, b) have a minimum other than zero, NaN where not, and what they are there."""
    falls = np.diff(landscape, axis=1)[:, :-1] < 0
    at = falls.shape[1] - 1 - np.argmax(falls[:, ::-1], axis=1)
    low, middle, high = (np.take_along_axis(landscape, at[:, None] + i, axis=1)[:, 0] for i in (0, 1, 2))
    bend = low - 2 * middle + high
    places = b[at + 1] + (low - high) / (2 * bend) * (b[1] - b[0])
    found = np.stack([places, middle - (low - high) ** 2 / (8 * bend)])
    return tuple(np.where(np.any(falls, axis=1), found, np.nan))


def _landscape(critical: Sequence[float]) -> dict:
    """Landscapes over b, their minima, with both readings of d_0, and where the one beside zero is gone."""
    b = np.linspace(0, 0.3, 1501)

    def of(D, ratios, width=WIDTH):
        return in_calls(partial(_on_grid, D, width, b), critical[D] * np.asarray(ratios), CHUNK)

    def has_valley(D, ratios):
        return np.any(np.diff(of(D, ratios), axis=1) < 0, axis=1)

    least = [minima(_hidden(D), critical[D] * np.array(LEVELS))[0] for D in TRAINED]
    found = [_valley(b, of(D, LEVELS))[1] for D in TRAINED]
    return {
        "b": ("b", b),
        "landscape": ("shown b", of(2, SHOWN)),
        "valley": ("layers level", {"found": np.array(found), "least": np.array(least)}),
        "misread": ("level", _valley(b, of(2, LEVELS, EVEN.c.size))[1]),
        "gone": ("hidden", np.array([_last(partial(has_valley, D), 0.9, 1.8) for D in DEEP])),
        "branch": ("pace", 3 * WIDTH**2 * _valley(b, of(2, PACE))[0] ** 2),
    }


@partial(jax.jit, static_argnames="steps")
def _descend(steps, lanes):
    """Gradient descent on the exact loss, whose steps have a largest length: starts can be steep."""

    def one(lane):
        start, data, noise, gammas = lane

        def loss(params):
            return collapse.stochastic_linear_loss(params, data, noise, gammas)

        optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(RATE))
        last, _ = train(loss, start, optimizer, steps=steps, every=steps)
        return loss(last), last

    return jax.vmap(one)(lanes)


def _train(config: Config, depth: int, groups: dict) -> dict:
    """Losses and weights in the end, by the names of the groups of `_lanes`."""
    # Close to its transition a network with one hidden layer is slow.
    steps = int(config.horizon / RATE) * (2 if depth == 1 else 1)
    return named_groups(lambda lanes: in_calls(partial(_descend, steps), lanes, BATCH), groups)


def _held(matrices: Sequence[Any]) -> list[np.ndarray]:
    """These weights in a network of the program's widths, whose other units are zero."""
    full = (EVEN.c.size, *HOLDS[len(matrices) - 1], 1)
    sizes = zip(map(np.asarray, matrices), full[1:], full, strict=False)
    return [np.pad(W, ((0, m - W.shape[0]), (0, n - W.shape[1]))) for W, m, n in sizes]


def _starts(seed: Sequence[int], widths: Sequence[int], scales: Any) -> list[list[np.ndarray]]:
    """Normal weights of these standard deviations."""
    rng, sizes = np.random.default_rng(seed), (EVEN.c.size, *widths, 1)
    shapes = list(zip(sizes[1:], sizes, strict=False))
    return [_held([scale * rng.standard_normal(shape) for shape in shapes]) for scale in scales]


def _lanes(
    starts: Sequence[list[np.ndarray]], gammas: Any, data: Moments = EVEN, noise: float = NOISE
) -> list:
    gammas = np.broadcast_to(np.asarray(gammas, float), (len(starts[0]),))
    return [(start, Moments(*map(np.asarray, data)), np.float64(noise), gammas) for start in starts]


def _networks(config: Config, seed: int, critical: Sequence[float], points: np.ndarray) -> dict:
    """Trained networks by depth, and by the names of their groups."""
    found, scales = {}, np.logspace(-0.5, 0.3, BATCH)
    for D in TRAINED:
        starts = _starts((seed, 0, D), _hidden(D), np.logspace(-1.5, 0.3, config.starts))
        groups = {r: _lanes(starts, r * critical[D]) for r in config.strengths}
        for widths, gammas in CASES.items():
            if len(widths) == D:
                groups[widths] = _lanes(_starts((seed, 1), widths, scales), gammas, TILTED)
        if D < 3:
            for (name, (w, noise, data)), g in zip(VARIANTS.items(), points[D - 1], strict=True):
                some = _starts((seed, 2), _hidden(D, w), scales)
                groups |= {(name, r): _lanes(some, r * g, data, noise) for r in NEAR}
        if D == 1:
            some = _starts((seed, 3), _hidden(1), scales)
            groups |= {("uneven", r): _lanes(some, (2 * r, 0.5)) for r in NEAR}
        if D == 2:
            some = _starts((seed, 4), (1, 1), scales)
            groups |= {("spread", g): _lanes(some, g, SPREAD, 0.0) for g in SPREAD_AT}
        found[D] = _train(config, D, groups)
    return found


def _beside(config: Config, critical: Sequence[float], found: dict) -> dict:
    """The best of the starts against the minimum, and how many end at zero, or at a minimum at all."""
    names = ("gap", "norm", "trapped", "settled")
    rows = np.zeros((len(names), len(TRAINED), len(config.strengths)))
    for i, D in enumerate(TRAINED):
        least, _ = minima(_hidden(D), critical[D] * np.array(config.strengths))
        for j, r in enumerate(config.strengths):
            loss, last = found[D][r]
            norm = np.sum([np.sum(W**2, axis=(1, 2)) for W in last], axis=0)
            # Above gamma_c zero is the least, and the other minimum a local one.
            settled = (norm < DEAD) | (loss < least[j] + 1e-6) | (r > 1)
            best = np.argmin(loss)
            rows[:, i, j] = loss[best] - least[j], norm[best], np.mean(norm < DEAD), np.mean(settled)
    return {name: ("layers strength", row) for name, row in zip(names, rows, strict=True)}


def _cases(found: dict) -> dict:
    """The best networks of unequal widths and gammas: loss, balance of the layers, rank, and their d_0."""
    rows = []
    for widths, gammas in CASES.items():
        losses, last = found[len(widths)][widths]
        best = [W[np.argmin(losses)] for W in last]
        n = np.array([g * np.sum(W**2) for g, W in zip(gammas, best, strict=True)])
        sizes = [np.linalg.svd(W, compute_uv=False) for W in best[:-1]]
        # Equation 11 for k = 1: gamma_2 d_2 b_2^2 = gamma_1 d_0 b_1^2, b_1^2 = |W_1|^2 / (d_1 d).
        first, second = np.sum(best[0] ** 2) / EVEN.c.size, np.sum(best[1] ** 2) / widths[1]
        d_0 = gammas[1] * widths[1] * second / (gammas[0] * first)
        gap = losses.min() - minima(widths, [gammas], TILTED)[0][0]
        rows.append((gap, np.ptp(n) / n.mean(), max(s[1] / s[0] for s in sizes), d_0))
    names = ("gap", "balance", "rank", "d_0")
    return {name: ("case", row) for name, row in zip(names, np.transpose(rows), strict=True)}


def _gains(found: dict) -> dict:
    """By how much the best networks near critical points are better than zero; those of SPREAD over L*."""

    def gain(D, name, y2):
        return [y2 - found[D][name, r][0].min() for r in NEAR]

    least, _ = minima(_hidden(2), SPREAD_AT, SPREAD, 0.0)
    best = [found[2]["spread", g][0].min() for g in SPREAD_AT]
    of = [[gain(D, name, data.y2) for name, (_, _, data) in VARIANTS.items()] for D in (1, 2)]
    return {
        "gain": ("compared variant near", np.array(of)),
        "uneven": ("near", np.array(gain(1, "uneven", EVEN.y2))),
        "spread_gap": ("at", np.array(best) - least),
    }


def _drawn(config: Config, key: jax.Array, critical: float) -> jax.Array:
    """Squared norms, averaged over the later half, where noise is drawn: the most of two starts each."""
    sizes, targets = (2, WIDTH, WIDTH, 1), (EXAMPLES @ SIGNAL)[:, None]

    def one(gamma, key):
        start, key = jax.random.split(key)
        predict, params = as_function(StochasticLinear(random_weights(start, sizes, 0.8)))
        # Decay that is added to the gradient is the regularization gamma = decay / 2.
        _, path = train(
            lambda params, batch: 2 * mean_squared_error(params, (predict, *batch)),
            params,
            optax.chain(optax.add_decayed_weights(2 * gamma), optax.sgd(0.02)),
            steps=config.drawn_steps,
            every=20,
            observe=lambda params: sum(jnp.sum(W**2) for W in weights(params)),
            batches=lambda key: noisy_batch(key, EXAMPLES, targets, 32, _hidden(2), NOISE),
            key=key,
        )
        return jnp.mean(path.ys[path.ys.size // 2 :])

    gammas = jnp.repeat(critical * jnp.array(DRAWN), 2)
    return jnp.max(jax.jit(jax.vmap(one))(gammas, jax.random.split(key, 4)).reshape(2, 2), axis=1)


@partial(jax.jit, static_argnames="depth")
def _around_zero(depth, gammas):
    """Eigenvalues of the Hessian at zero, (K, P), and the rise of the loss from there towards what fits."""
    sizes = (EVEN.c.size, *_hidden(depth, 2), 1)
    shapes = list(zip(sizes[1:], sizes, strict=False))
    ends = np.cumsum([m * n for m, n in shapes])

    def loss(flat, row):
        parts = zip(jnp.split(flat, ends[:-1]), shapes, strict=True)
        return collapse.stochastic_linear_loss([W.reshape(shape) for W, shape in parts], EVEN, NOISE, row)

    zero, small = np.zeros(ends[-1]), 0.05 * np.append(np.tile(SIGNAL, 2), np.ones(ends[-1] - 4))

    def at(row):
        return jnp.linalg.eigvalsh(jax.hessian(loss)(zero, row)), loss(small, row) - loss(zero, row)

    return jax.vmap(at)(gammas)


def _hessians() -> dict:
    (one, _), (two, rise) = jax.device_get(
        (_around_zero(1, UNEVEN), _around_zero(2, np.stack([EQUAL] * 3, 1)))
    )
    return {
        "one": ("pair", {"least": one.min(axis=1), "most": one.max(axis=1)}),
        "two": ("equal", {"least": two.min(axis=1), "most": two.max(axis=1), "rise": rise}),
    }


def _sweeps(config: Config, seed: int, critical: Sequence[float]) -> dict:
    """Squared norms at the strengths of `PACE`, going up and down, and down without a kick.

    At each strength a network is trained from a kick away from where it was at the strength before.
    """
    found, up = {}, np.array(PACE)
    paths, sizes = {"up": up, "down": up[::-1], "unkicked": up[::-1]}, (KICK, KICK, 0.0)
    for D in (1, 2):
        least = _deep_minima(_hidden(D), [critical[D] * up[0]])
        states, norms = [_held([W[0] for W in least.weights])] * len(paths), []
        for index, gammas in enumerate(critical[D] * np.array(list(paths.values())).T):
            kicks = _starts((seed, 5, index), _hidden(D), sizes)
            kicked = [[W + k for W, k in zip(*pair, strict=True)] for pair in zip(states, kicks, strict=True)]
            lanes = {name: _lanes([W], g) for name, W, g in zip(paths, kicked, gammas, strict=True)}
            states = [[W[0] for W in last] for _, last in _train(config, D, lanes).values()]
            norms.append([sum(np.sum(W**2) for W in state) for state in states])
        for (name, path), norm in zip(paths.items(), np.array(norms).T, strict=True):
            found[f"{D}/{name}"] = ("pace", norm[np.argsort(path)])
    del found["2/unkicked"]  # which stays at zero as it does with kicks
    return found


def run(config: Config, context: Context) -> dict:
    """Minima, landscapes and Hessians of the theory; gradient descent from many starts, and sweeps."""

    def gamma_c(D, noise=NOISE, data=EVEN, width=WIDTH):
        # One unit would be a program of its own.
        return (
            closed_forms(D, 1, noise)[0] if width == 1 else collapse.critical_gamma(data, noise, _hidden(D))
        )

    def zoomed(D):
        return _last(lambda g: minima(_hidden(D), g)[0] < EVEN.y2, 0.5 * critical[D], 1.6 * critical[D])

    context.progress("minima by depth", 0.0)
    # Ridge regression has no critical point: it is looked at around gamma = 1.
    critical = [1.0, *(float(gamma_c(D)) for D in DEEP)]
    points = np.array([[gamma_c(D, s, data, w) for w, s, data in VARIANTS.values()] for D in (1, 2)])
    noises, strengths = np.linspace(0, 2, 9), np.linspace(0.2, 0.5, 8 * CHUNK)
    saved = _curves(config, critical) | {
        "gamma_c": (
            "hidden",
            {"formula": np.array(critical[1:]), "zoomed": np.array([zoomed(D) for D in DEEP])},
        ),
        "gamma_m": ("hidden", np.array([collapse.metastable_gamma(EVEN, NOISE, _hidden(D)) for D in DEEP])),
        "no_signal": gamma_c(2, data=EVEN._replace(c=0 * SIGNAL)),
        "noise": ("noise", noises),
        "by_noise": ("hidden noise", np.array([[gamma_c(D, s) for s in noises] for D in DEEP])),
        "point": ("compared variant", points),
        "spread": ("spread", {"gamma": strengths, "norm": minima(_hidden(2), strengths, SPREAD, 0.0)[1]}),
        "spread_critical": gamma_c(2, 0.0, SPREAD),
    }
    context.progress("landscapes", 0.3)
    saved |= _landscape(critical) | _hessians()
    context.progress("training", 0.5)
    found = _networks(config, context.seed, critical, points)
    context.progress("noise that is drawn, and sweeps", 0.8)
    drawn = {"norm": _drawn(config, jax.random.key(context.seed), critical[2])}
    drawn["theory"] = minima(_hidden(2), critical[2] * np.array(DRAWN))[1]
    return saved | {
        "strength": ("strength", np.array(config.strengths)),
        "trained": _beside(config, critical, found),
        "case": _cases(found),
        **_gains(found),
        "drawn": ("drawn", drawn),
        "pace": ("pace", np.array(PACE)),
        "sweep": _sweeps(config, context.seed, critical),
    }


THEOREM_2 = "ziyin2022talk, Theorem 2 (deep linear networks)"
LAYERS = "ziyin2022talk, slides on more layers"
TRANSITIONS = "ziyin2022talk, slides on phase transitions"
ESCAPING = "ziyin2022talk, slide on escaping"
CONVERGED = "what the slowest directions leave"
ZERO = "zero is best"
GRID = "the grid of b, of spacing 2e-4"
KICKS = f"kicks of {KICK:g}"


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Minima, critical points, orders, landscapes, zero, sweeps, and starts that are lost."""
    yield from _of_minima(saved)
    yield _critical(saved)
    yield _jumps(saved)
    yield from _of_orders(saved)
    yield _universal(saved)
    yield from _of_landscapes(saved)
    yield from _of_sweeps(saved)
    yield _trapped(config, saved)


def _of_minima(saved: Saved) -> Iterator[Claim]:
    case, gap, bound = saved["case"], "best of the starts: largest gap of the loss", 1e-8
    drawn, dead = saved["drawn/norm"] / saved["drawn/theory"][0]
    batches = "noise of the batches, and first order in the learning rate"
    yield stated(
        "minima",
        "The global minima of networks with one to three hidden layers are those of the theorem",
        THEOREM_2,
        at_most(gap, largest(saved["trained/gap"]), bound, why=CONVERGED),
        equals("noise drawn, gamma_c / 2: squared norm over theory", drawn, 1, 0.03, why=batches),
        at_most("noise drawn, 1.3 gamma_c: the same", dead, 1e-6, why="nothing but zero is left"),
    )
    yield stated(
        "unequal",
        "With unequal widths and gammas all matrices have rank one, and gamma_k |W_k|^2 is the same for all",
        THEOREM_2,
        at_most(gap, largest(case["gap"]), bound, why=CONVERGED),
        at_most("spread of gamma_k |W_k|^2, over its mean", largest(case["balance"]), 1e-6, why=CONVERGED),
        at_most("second singular value over the first", largest(case["rank"]), 1e-4, why=CONVERGED),
    )
    d_0, widths = case["d_0"], np.array([first for first, *_ in CASES])
    to_inputs, to_widths = largest(d_0 - EVEN.c.size), np.min(np.abs(d_0 - widths))
    yield qualified(
        "amplitudes",
        "Amplitudes of successive layers obey gamma_{k+1} d_{k+1} b_{k+1}^2 = gamma_k d_{k-1} b_k^2",
        THEOREM_2,
        condition="d_0 is the number of inputs, not the width that the landscape calls d_0",
        inside=[at_most("d_0 of trained networks: largest gap to inputs", to_inputs, 1e-4, why=CONVERGED)],
        outside=[at_least("smallest gap to the width", to_widths, 0.5, why="2 inputs, widths from 3")],
    )


def _critical(saved: Saved) -> Claim:
    norm, closed = saved["near/norm"], np.array([closed_forms(D) for D in DEEP])
    zoomed, formula = (largest(saved["gamma_c"][name] / closed[:, 0] - 1) for name in ("zoomed", "formula"))
    jump = largest(norm[2:, -1] / closed[1:, 1] - 1)
    return stated(
        "critical",
        "b jumps at a critical gamma; where inputs are white both have closed forms",
        f"{LAYERS} (the closed forms are derived here)",
        at_most("where L* is zero's: largest relative gap", zoomed, 1e-6, why="rounding: L* is flat there"),
        at_most("gamma_c by its formula for any A: the same", formula, 1e-12, why=ROUNDING),
        at_most("D = 2 to 4: jump of the squared norm, the same", jump, 1e-3, why="1e-4 below gamma_c"),
        at_most("D = 1: squared norm at 0.9999 gamma_c", norm[1, -1], 1e-3, why="it goes to zero linearly"),
    )


def _jumps(saved: Saved) -> Claim:
    at, falls = saved["spread/gamma"], -np.diff(saved["spread/norm"])
    jumps = np.sort(np.argsort(falls)[-2:])
    lower, upper = (at[jumps] + at[jumps + 1]) / 2
    others, upper = np.delete(falls, jumps), upper / saved["spread_critical"]
    learned = saved["norm"][2][(saved["ratio"] > 0.3) & (saved["ratio"] < 1)]
    smooth, steepest = "it is smooth there", np.max(-np.diff(learned)) / learned[-1]
    return qualified(
        "jumps",
        "b features a jump at a critical gamma",
        f"{LAYERS} (for D = 2)",
        condition="variances of the inputs are alike; else it can jump several times, the last time to zero",
        inside=[at_most("equal variances: largest fall before the last, over it", steepest, 0.1, why=smooth)],
        outside=[
            equals("variances 1 and 0.01: lower jump", lower, 0.261, 1e-3, why="the grid of gamma"),
            equals("upper jump, over gamma_c", upper, 1, 2e-3, why="the grid of gamma"),
            at_least("smaller one over other falls", falls[jumps].min() / others.max(), 5, why=smooth),
            at_most("networks between and beyond: gap", largest(saved["spread_gap"]), 1e-8, why=CONVERGED),
        ],
    )


def _of_orders(saved: Saved) -> Iterator[Claim]:
    kinks = {f"D = {D}": saved["kink"][D, 1:] for D in DEPTHS[:4]}
    powers, expected = orders(saved["step"][1:], kinks), (1, 0, -1, -1)
    constant = saved["kink"][1, -1] * (NOISE + WIDTH) / (2 * WIDTH)
    told = every("orders 0, 2, 1, 1 that the squared norm tells", saved["order"] == np.array([0, 2, 1, 1]))
    yield stated(
        "orders",
        "Without hidden layers there is no transition, with one of second order, with more of first order",
        TRANSITIONS,
        *(
            slope(f"{name}: order of K in h", power, e, 0.1, why="the next order in h")
            for (name, power), e in zip(powers.items(), expected, strict=True)
        ),
        equals("D = 1: K over 2 w / (s + w)", constant, 1, 1e-3, why="the next order in h"),
        told,
    )
    loss, near = saved["loss"], saved["near"]
    bend, excess = np.max(np.diff(loss, 2, axis=1)), np.max(near["fall"] / near["norm"])
    moved, some = np.min(np.ptp(loss, axis=1)), "it is not that nothing happens"
    yield stated(
        "continuous",
        "The least loss is continuous and concave in gamma: there is no transition of zeroth order",
        TRANSITIONS,
        at_most("D = 0 to 4: largest second difference of L*", bend, 1e-13, why=ROUNDING),
        at_most("its fall below gamma_c, over h and the squared norm", excess, 1, 1e-8, why=ROUNDING),
        at_least("smallest change over all gamma", moved, 0.3, why=some),
    )
    both, alone, (below, above) = saved["derivative"], saved["of_one"], saved["uneven"]
    gap, share = largest(both["loss"] / both["norm"] - 1), alone["loss"] / alone["norm"]
    yield qualified(
        "ehrenfest",
        "Derivatives of the least loss in gamma tell the order; the first is the squared norm of all weights",
        f"{TRANSITIONS} (the derivative is derived here)",
        condition="all layers have one gamma; else the path matters, and the critical point is a surface",
        inside=[at_most("D = 0 to 4: relative gap of dL*/dgamma", gap, 1e-6, why="differences of 1e-4")],
        outside=[
            equals("D = 1, gamma_w alone: dL*/dgamma_w over it", share, 1 / 3, 1e-6, why="gammas 1 and 1/2"),
            at_least("0.97 (2, 1/2): gain on zero", below, 1e-5, why="critical is a product of 1"),
            at_most("1.03 (2, 1/2): gain on zero", above, 1e-6, why=ZERO),
        ],
    )


def _universal(saved: Saved) -> Claim:
    (below, above), point = np.moveaxis(saved["gain"], -1, 0), saved["point"]
    at_own, ratio = "D = 2, each at 0.97 of its gamma_c: the same", np.max(point[1]) / np.min(point[1])
    return qualified(
        "universal",
        "The critical point depends neither on the width, nor on the noise, nor on the covariance of inputs",
        "ziyin2022talk, slides on the critical point",
        condition="there is one hidden layer",
        inside=[
            at_least(
                "five networks at 0.97 |c|: least gain on zero", below[0].min(), 1e-5, why="1e-4 and more"
            ),
            at_most("at 1.03 |c|: largest", above[0].max(), 1e-6, why=ZERO),
            at_most("gamma_c: largest gap to |c|", largest(point[0] - 1), 1e-12, why=ROUNDING),
        ],
        outside=[
            at_least("D = 2: largest gamma_c over the smallest", ratio, 1.5, why="far from one"),
            at_least(at_own, below[1].min(), 1e-5, why="3 percent of the jump"),
            at_most("at 1.03: largest", above[1].max(), 1e-6, why=ZERO),
        ],
    )


def _of_landscapes(saved: Saved) -> Iterator[Claim]:
    found, least = saved["valley/found"], saved["valley/least"]
    misread = largest(saved["misread"] - least[1])
    yield corrected(
        "landscape",
        "The effective landscape over b has the global minimum of the network",
        f"{LAYERS} (b is an entry of inner matrices)",
        printed=[at_most("d_0 the number of inputs, as in Theorem 2: gap to L*", misread, 1e-8, why=GRID)],
        mended=[at_most("d_0 the width of hidden layers: gap", largest(found - least), 1e-8, why=GRID)],
    )
    (w, u), one, two = UNEVEN.T, saved["one"], saved["two"]
    root = np.sqrt((w - u) ** 2 + 4 * SIGNAL @ SIGNAL)
    gap_one = largest([one["least"] - (w + u - root), one["most"] - (w + u + root)])
    gap_two = largest([two["least"] - 2 * EQUAL, two["most"] - 2 * EQUAL])
    unstable = (one["least"] < 0) == (w * u < SIGNAL @ SIGNAL)
    yield qualified(
        "origin",
        "With more than one hidden layer b = 0 is always a local minimum",
        LAYERS,
        condition="gamma > 0; c = 0 leaves no transition",
        inside=[
            at_most("D = 2: Hessian at zero, gap of eigenvalues to 2 gamma", gap_two, 1e-12, why=ROUNDING),
            at_least(
                "gamma >= 0.1: rise towards what fits",
                two["rise"][2:].min(),
                1e-4,
                why="zero is best near by",
            ),
            at_most("D = 1: gap to its eigenvalues in closed form", gap_one, 1e-12, why=ROUNDING),
            every("D = 1: zero is unstable just where gamma_u gamma_w < |c|^2", unstable),
        ],
        outside=[
            at_most("gamma = 0: largest eigenvalue", abs(two["most"][0]), 1e-12, why=ROUNDING),
            at_most("gamma = 0: rise towards what fits", two["rise"][0], -1e-5, why="of third order in 0.05"),
            equals("c = 0: gamma_c", saved["no_signal"], 0, why="nothing can be learned"),
        ],
    )


def _of_sweeps(saved: Saved) -> Iterator[Claim]:
    gamma_c, _, gamma_m = np.transpose([closed_forms(D) for D in DEEP])
    gone = largest(saved["gone"] * gamma_c / gamma_m - 1)
    formula = largest(saved["gamma_m"] / gamma_m - 1)
    one, two, pace = saved["sweep/1"], saved["sweep/2"], saved["pace"]
    lost, last, dead = np.searchsorted(pace, (0.8, 1.15, 1.2))
    stays = largest(two["up"][: last + 1] / saved["branch"][: last + 1] - 1)
    yield stated(
        "metastable",
        "What has learned stays above gamma_c, up to (D + 1) / 4^{D / (D + 1)} gamma_c",
        f"{LAYERS} (derived here)",
        at_most("D = 1 to 4: where the landscape loses its minimum, gap", gone, 1e-5, why=GRID),
        at_most("by the formula for any A: the same", formula, 1e-12, why=ROUNDING),
        at_most("D = 2, up to 1.15 gamma_c: norm over the minimum, gap", stays, 1e-3, why=GRID),
        at_most("at 1.2 gamma_c: squared norm", two["up"][dead], 1e-4, why=KICKS),
    )
    apart = np.abs(pace - 1) > 0.01
    gap = largest(one["up"][apart] - one["down"][apart])
    yield qualified(
        "hysteresis",
        "Where gamma falls again, networks of more layers need to escape from zero, and do not by themselves",
        f"{ESCAPING} (sweeps are this project's own)",
        condition="noise is put back at each step: without it one hidden layer seems to need that too",
        inside=[
            at_most(
                "D = 2, down to gamma_c / 2: largest squared norm", largest(two["down"]), 1e-4, why=KICKS
            ),
            at_most("D = 1: gap of squared norms up and down", gap, 1e-3, why=KICKS),
            at_least("D = 1, down at 0.8 gamma_c", one["down"][lost], 0.3, why="0.356 by theory"),
        ],
        outside=[
            at_most("D = 1, the same without kicks", one["unkicked"][lost], 1e-4, why="zero is left slowly")
        ],
    )


def _trapped(config: Config, saved: Saved) -> Claim:
    lost, below, few = saved["trained/trapped"], saved["strength"] < 1, "of 24 starts or more"
    weak, strong = (config.strengths.index(r) for r in (0.3, 0.9))
    _, two, three = lost[:, strong] - lost[:, weak]
    settled = np.min(saved["trained/settled"])
    return stated(
        "trapped",
        "More starts are lost at zero the stronger the regularization, and the more layers there are",
        f"{ESCAPING} (fractions are measured here)",
        at_most("D = 1, below gamma_c: fraction lost", lost[0, below].max(), 0, why="zero is a saddle"),
        at_least("D = 2: growth from 0.3 to 0.9 gamma_c", two, 0.1, why=few),
        at_least("D = 3: growth from 0.3 to 0.9 gamma_c", three, 0.05, why=few),
        at_least("smallest growth by a layer, at 0.3 gamma_c", np.diff(lost[:, weak]).min(), 0.05, why=few),
        at_least("starts that end at a minimum", settled, 0.85, why="steep valleys can take finer steps"),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Squared norms by depth, landscapes, hysteresis, K(h), starts that are lost, and gamma_c over noise."""
    drawn, ((norms, landscape, loops), (kinks, lost, points)) = plotting.new_figure(2, 3, 4.3, 3.5)
    color = dict(zip(DEPTHS, ("0.5", "C1", "C2", "C3", "C4"), strict=True))
    below, some = saved["strength"] < 1, {"marker": "o", "linestyle": "", "mec": "black", "mew": 0.6}
    for D in DEPTHS:
        label = f"D = {D}" if D else "D = 0, over γ"
        norms.plot(saved["ratio"], saved["norm"][D], color=color[D], label=label)
    for row, D in enumerate(TRAINED):
        norms.plot(saved["strength"], saved["trained/norm"][row], color=color[D], **some)
        line = {"marker": "o", "color": color[D], "label": f"D = {D}"}
        lost.plot(saved["strength"][below], saved["trained/trapped"][row][below], **line)
    norms.plot([], [], color="white", label="best trained", **some)
    title, norm = "What is left of the weights", "squared norm of all weights"
    upper = {"loc": "upper right", "ncols": 2}
    plotting.finish(norms, title, "γ / γ_c", norm, upper, ylim=(-0.2, 6.2), xlim=(0.05, 1.4))
    title = f"Starts that end at zero, of {config.starts}"
    plotting.finish(lost, title, "γ / γ_c", "fraction", "upper left", ylim=(-0.05, 1), xlim=(0, 1.05))

    for row, r in enumerate(SHOWN):
        landscape.plot(saved["b"], saved["landscape"][row], color=f"C{row}", label=f"γ = {r:g} γ_c")
    title, ylabel = "Landscape, D = 2", "loss, all else at its best"
    plotting.finish(
        landscape, title, "b, entries of the inner matrix", ylabel, "upper left", ylim=(0.65, 1.4)
    )

    loops.plot(saved["ratio"], saved["norm"][1], label="theory, D = 1", **plotting.THEORY)
    for D in (1, 2):
        path = saved[f"sweep/{D}"]
        loops.plot(saved["pace"], path["up"], ">-", color=color[D], label=f"D = {D}, γ going up")
        loops.plot(saved["pace"], path["down"], "<--", color=color[D], mfc="white", ms=7, label="going down")
    loops.plot(
        saved["pace"], saved["sweep/1/unkicked"], "x:", color="0.45", label="D = 1, down without kicks"
    )
    plotting.finish(
        loops, "Hysteresis of training", "γ / γ_c", norm, upper, xlim=(0.45, 1.35), ylim=(-0.1, 3.6)
    )

    step = saved["step"]
    for D, power in zip(DEPTHS[:4], (1, 0, -1, -1), strict=True):
        kinks.loglog(step, saved["kink"][D], "o", color=color[D], label=f"D = {D}")
        plotting.reference_slope(kinks, step, saved["kink"][D], power, "" if D else "slopes 1, 0, −1, −1")
    plotting.make_room(kinks, above=0.3)
    plotting.finish(kinks, "Bend of the squared norm at γ_c", "h / γ_c", "K(h)", upper)

    for row, D in enumerate(DEEP):
        points.plot(saved["noise"], saved["by_noise"][row], color=color[D], label=f"D = {D}")
    title = "Critical point over noise"
    plotting.finish(points, title, "variance of the noise", "γ_c / |c|", "center right", ylim=(0, 1.1))
    return drawn
