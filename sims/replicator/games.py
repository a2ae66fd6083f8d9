"""Phase portraits of classical games, and the theorems on their equilibria checked on random ones.

Six games of three strategies on the simplex: where the replicator flow goes, how fast, and which of its rest
points attract. Then the long run: closed orbits and their averages, a heteroclinic cycle down to 1e-200, and
random games for the folk theorem of evolutionary game theory and for Fisher's theorem.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.quiver import Quiver
from scipy.integrate import cumulative_trapezoid

from dynamics.flow import Trajectory
from dynamics.replicator import games
from dynamics.replicator.population import replicator_field, simulate
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.results import Context, Result, Saved


@dataclass(frozen=True)
class Config:
    """Portraits, long runs and random games."""

    starts: int = 6
    """Steps a side of the triangular lattice at whose inner points a portrait's trajectories start."""
    arrows: int = 11
    """Steps a side of the lattice on which a portrait's arrows are drawn."""
    closed_horizon: float = 100.0
    """Time up to which the closed orbit of zero-sum rock-paper-scissors is followed."""
    cycle_horizon: float = 1000.0
    """Time up to which the heteroclinic cycle is followed."""
    points: int = 1000
    """Records along a run."""
    random_games: int = 300
    """Random games with three strategies."""
    followed: int = 60
    """Evolutionarily stable strategies, and symmetric games, whose neighbourhood is simulated."""
    rtol: float = 1e-10
    """Relative tolerance of the solver."""


_QUICK = Config()
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_QUICK, random_games=3000, followed=300),
    "paper": replace(_QUICK, random_games=30_000, followed=1000),
}

ROCK_PAPER_SCISSORS = ("rock", "paper", "scissors")
# Title, strategies and time shown of each portrait; the order is that of `_payoffs`.
PORTRAITS: tuple[tuple[str, tuple[str, str, str], float], ...] = (
    ("Win = loss: centre", ROCK_PAPER_SCISSORS, 12.0),
    ("Win 2, loss 1: spiral", ROCK_PAPER_SCISSORS, 20.0),
    ("Win 1, loss 2: cycle", ROCK_PAPER_SCISSORS, 14.0),
    ("Coordination, rewards 1, 2, 3", ("1", "2", "3"), 30.0),
    ("Zeeman's game", ("1", "2", "3"), 30.0),
    ("Hawk-dove-bourgeois", ("hawk", "dove", "bourgeois"), 60.0),
)

PATH = "C1"
_DOT: dict[str, Any] = {"marker": "o", "color": "black", "markersize": 8}
MARKERS: dict[str, dict[str, Any]] = {
    "attracting": _DOT,
    "repelling": {**_DOT, "markerfacecolor": "white"},
    "saddle": {**_DOT, "fillstyle": "left", "markerfacecoloralt": "white"},
    "centre": {**_DOT, "markerfacecolor": "C5"},
    "degenerate": {**_DOT, "marker": "D", "markerfacecolor": "0.75"},
}


def _payoffs() -> np.ndarray:
    return np.stack(
        [
            games.rock_paper_scissors(1.0, 1.0),
            games.rock_paper_scissors(2.0, 1.0),
            games.rock_paper_scissors(1.0, 2.0),
            games.coordination([1.0, 2.0, 3.0]),
            games.zeeman(),
            games.hawk_dove_bourgeois(2.0, 4.0),
        ]
    )


def lattice(steps: int) -> np.ndarray:
    """Inner points of the triangular lattice with `steps` steps a side, in barycentric coordinates (M, 3)."""
    i, j = np.meshgrid(np.arange(1, steps), np.arange(1, steps), indexing="ij")
    inner = i + j < steps
    return np.stack([i[inner], j[inner], steps - i[inner] - j[inner]], axis=1) / steps


def to_plane(x: np.ndarray) -> np.ndarray:
    """Points of the simplex (..., 3) in a triangle of unit sides (..., 2): left, right and upper corner."""
    return x @ np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])


def field(payoff: Array, x: Array) -> Array:
    """The replicator equation of one game at one point."""
    return replicator_field(x, payoff @ x)


def run(config: Config, context: Context) -> Result:
    """Follow all games in one batched solve, decide on their rest points, and check the theorems."""
    payoffs = _payoffs()
    starts, grid = lattice(config.starts), lattice(config.arrows)

    context.progress("rest points of random games", 0.0)
    random, symmetric, anywhere = (np.asarray(drawn) for drawn in _draw(context.seed, config))
    census = _census(random)
    stable = np.flatnonzero(census.ess)[: config.followed]
    stable_x = census.x[stable]

    context.progress("following all trajectories", 0.2)
    orbit_start = np.array([[0.5, 0.3, 0.2]])
    ok, paths = _follow(
        [
            *((payoff, starts, time) for payoff, (_, _, time) in zip(payoffs, PORTRAITS, strict=True)),
            (payoffs[0], orbit_start, config.closed_horizon),
            (payoffs[2], orbit_start, config.cycle_horizon),
            (random[census.game[stable]], 0.999 * stable_x + 0.001 / 3, 100.0),
            (symmetric, anywhere, 20.0),
        ],
        config,
    )
    (closed_ts, closed), (cycle_ts, cycle), (ess_ts, ess_logs), (_, ascent) = paths[len(PORTRAITS) :]
    closed, cycle = closed[0], cycle[0]

    context.progress("deciding on rest points", 0.9)
    found = [games.rest_points(payoff) for payoff in payoffs]
    kinds = [
        [
            games.stability(payoff, x) if exists else ""
            for x, exists in zip(rest.points, rest.exists, strict=True)
        ]
        for payoff, rest in zip(payoffs, found, strict=True)
    ]
    average_error = _average_error(closed_ts, closed)
    divergence = np.asarray(jax.jit(jax.vmap(games.kl_divergence))(stable_x, ess_logs))

    claims = (
        _zero_sum(closed),
        _time_average(closed_ts, closed, average_error),
        _cycle(cycle_ts, cycle, ok),
        _eigenvalues(),
        _hawk_dove(),
        _fisher(symmetric, ascent),
        _folk(census),
        _ess(census, divergence),
    )
    every = max(1, config.points // 250)
    data = {
        "portrait": {
            "log_x": np.stack([logs[:, ::every] for _, logs in paths[: len(PORTRAITS)]]),
            "arrows": grid,
            "velocity": jax.jit(jax.vmap(jax.vmap(field, (None, 0)), (0, None)))(payoffs, grid),
            "rest_points": np.stack([rest.points for rest in found]),
            "stability": np.array(kinds),
        },
        "closed": {"ts": closed_ts, "log_x": closed, "average_error": average_error},
        "cycle": {"ts": cycle_ts, "log_x": cycle},
        "ess": {"ts": ess_ts[::every], "divergence": divergence[:, ::every]},
    }
    dims = {
        "portrait/log_x": ("game", "start", "time", "strategy"),
        "cycle/log_x": ("time", "strategy"),
        "closed/log_x": ("time", "strategy"),
        "ess/divergence": ("point", "time"),
    }
    return Result(data, claims, dims)


@functools.partial(jax.jit, static_argnames="config")
def _draw(seed: int, config: Config) -> tuple[Array, Array, Array]:
    """Random games, symmetric games, and starts anywhere on the simplex."""
    k_games, k_symmetric, k_starts = jax.random.split(jax.random.key(seed), 3)
    halves = jax.random.normal(k_symmetric, (config.followed, 3, 3))
    # Uniform on the simplex; the sampler of a general Dirichlet law takes seconds to compile.
    waits = jax.random.exponential(k_starts, (config.followed, 3))
    return (
        jax.random.normal(k_games, (config.random_games, 3, 3)),
        halves + jnp.swapaxes(halves, 1, 2),
        waits / jnp.sum(waits, axis=1, keepdims=True),
    )


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
def _simulate_each(payoff: Array, x0: Array, ts: Array, rtol: Array) -> Trajectory:
    return simulate(payoff, x0, ts, rtol=rtol, throw=False)


def _follow(runs: Sequence[tuple[np.ndarray, np.ndarray, float]], config: Config):
    """All runs (payoffs, starts, horizon) as one batch; returns ok, and (ts, log x) by run."""
    sizes = [len(x0) for _, x0, _ in runs]
    payoffs = np.concatenate([np.broadcast_to(payoff, (len(x0), 3, 3)) for payoff, x0, _ in runs])
    starts = np.concatenate([x0 for _, x0, _ in runs])
    grids = [np.linspace(0.0, horizon, config.points + 1) for _, _, horizon in runs]
    times = np.repeat(grids, sizes, axis=0)
    path = _simulate_each(payoffs, starts, times, config.rtol)
    ends = np.cumsum([0, *sizes])
    ok, log_x = np.asarray(path.ok), np.asarray(path.ys)
    return ok, [(ts, log_x[a:b]) for ts, a, b in zip(grids, ends[:-1], ends[1:], strict=True)]


class Census(NamedTuple):
    """All isolated rest points of many games: the game's number and the point, and what the point is."""

    game: np.ndarray
    x: np.ndarray
    attracts: np.ndarray
    strict: np.ndarray
    nash: np.ndarray
    ess: np.ndarray


def _census(payoffs: np.ndarray) -> Census:
    points = [found.points[found.exists] for found in map(games.rest_points, payoffs)]
    game, x = np.repeat(np.arange(len(payoffs)), [len(found) for found in points]), np.concatenate(points)
    growth = np.max(np.real(games.eigenvalues(payoffs[game], x)), axis=1)
    fitness = np.einsum("gij,gj->gi", payoffs[game], x)
    best_replies = np.sum(fitness >= np.max(fitness, axis=1, keepdims=True), axis=1)
    strict = (
        (np.max(x, axis=1) == 1) & (np.argmax(x, axis=1) == np.argmax(fitness, axis=1)) & (best_replies == 1)
    )
    nash, ess = (
        np.array([decide(payoffs[g], point) for g, point in zip(game, x, strict=True)])
        for decide in (games.is_nash, games.is_ess)
    )
    return Census(game, x, growth < 0, strict, nash, ess)


def _average_error(ts: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """Largest deviation of the time average over [0, t] from 1/3, at every t but the first."""
    area = cumulative_trapezoid(np.exp(log_x), ts, axis=0)
    return np.max(np.abs(area / ts[1:, None] - 1 / 3), axis=1)


def _average_bound(log_x: np.ndarray) -> float:
    """What t |average - 1/3| cannot exceed in zero-sum rock-paper-scissors.

    (log x(t) - log x(0)) / t = A (average - 1/3), and A stretches tangent vectors by sqrt(3).
    """
    return float(np.max(np.linalg.norm(log_x - log_x[:1], axis=1))) / np.sqrt(3)


def _sup(values: np.ndarray) -> float:
    return float(np.max(np.abs(values)))


def _zero_sum(log_x: np.ndarray) -> Claim:
    drift = np.expm1(np.sum(log_x, axis=1) - np.sum(log_x[0]))
    return Claim(
        "replicator.games/zero-sum",
        "Zero-sum rock-paper-scissors has closed orbits: x1 x2 x3 is constant",
        "hofbauer1998, section 7.7",
        "stated",
        # About a hundred steps, each with an error of about 1e-10.
        [Check("largest relative drift of x1 x2 x3", "at most", 2e-8, _sup(drift))],
    )


def _time_average(ts: np.ndarray, log_x: np.ndarray, error: np.ndarray) -> Claim:
    bound = _average_bound(log_x)
    return Claim(
        "replicator.games/time-average",
        "The time average of an orbit that stays off the boundary tends to the Nash equilibrium",
        "hofbauer1998, section 7.6",
        "stated",
        [
            # The bound is exact; the trapezoidal rule errs by less than a hundredth of it.
            Check("largest t |average - 1/3|", "at most", bound, _sup(ts[1:] * error), 0.01 * bound),
        ],
    )


def _cycle(ts: np.ndarray, log_x: np.ndarray, ok: np.ndarray) -> Claim:
    leaders = np.argmax(log_x, axis=1)
    switches = np.flatnonzero(np.diff(leaders)) + 1
    sojourns = np.diff(ts[switches])
    in_order = np.diff(leaders)[switches - 1] % 3 == np.diff(leaders)[switches[0] - 1] % 3
    return Claim(
        "replicator.games/heteroclinic",
        "Where losing costs more than winning pays, rock-paper-scissors approaches the cycle of its corners",
        "hofbauer1998, section 7.7",
        "stated",
        [
            Check("trajectories of all games that stay finite", "all of", ok.size, int(np.sum(ok))),
            Check(
                "switches of the largest share in the order of the cycle",
                "all of",
                in_order.size,
                in_order.sum(),
            ),
            # A share falls at the rate of the loss and returns at that of the win, 2 to 1. The way between
            # two corners takes a time of order one, of a sojourn of two hundred.
            Check(
                "last sojourn at a corner over the one before",
                "equals",
                2.0,
                sojourns[-1] / sojourns[-2],
                0.1,
            ),
            Check(
                "log10 of the smallest share on the way", "at most", -150, float(np.min(log_x)) / np.log(10)
            ),
        ],
    )


def _eigenvalues() -> Claim:
    win, loss = (values.ravel() for values in np.meshgrid(np.linspace(0.5, 3, 6), np.linspace(0.5, 3, 6)))
    payoffs = jax.jit(jax.vmap(games.rock_paper_scissors))(win, loss)
    found = games.eigenvalues(payoffs, np.full((win.size, 3), 1 / 3))
    expected = -(win - loss) / 6 + 1j * (win + loss) / (2 * np.sqrt(3))
    upper = found[np.arange(win.size), np.argmax(np.imag(found), axis=1)]
    return Claim(
        "replicator.games/rock-paper-scissors",
        "The centre of rock-paper-scissors has eigenvalues -(win - loss)/6 ± i (win + loss)/(2 sqrt 3)",
        "hofbauer1998, section 7.7",
        "stated",
        # Rounding of a 2 x 2 eigenvalue problem.
        [Check("largest deviation over 36 games", "at most", 1e-14, np.max(np.abs(upper - expected)))],
    )


def _hawk_dove() -> Claim:
    value, cost = 2.0, 3.0
    payoff = games.hawk_dove(value, cost)
    mixed = games.rest_points(payoff).points[-1]
    rate = np.real(games.eigenvalues(payoff, mixed))[0]
    return Claim(
        "replicator.games/hawk-dove",
        "Where fighting costs more than it brings, a share V/C of hawks is stable",
        "hofbauer1998, section 6.1",
        "stated",
        [
            # Rounding of 2 x 2 problems.
            Check("stable share of hawks, V = 2, C = 3", "equals", value / cost, mixed[0], 1e-12),
            Check("rate of return", "equals", -value * (cost - value) / (2 * cost), rate, 1e-12),
        ],
    )


def _growth_of_mean(payoff: Array, log_x: Array) -> tuple[Array, Array, Array]:
    """Mean fitness, its derivative along the flow, and the variance of fitness."""
    x = jnp.exp(log_x)
    mean, growth = jax.jvp(lambda y: games.mean_fitness(payoff, y), (x,), (field(payoff, x),))
    return mean, growth, jnp.sum(x * (payoff @ x - mean) ** 2)


def _fisher(payoffs: np.ndarray, log_x: np.ndarray) -> Claim:
    along = jax.jit(jax.vmap(jax.vmap(_growth_of_mean, (None, 0))))
    mean, growth, variance = (np.asarray(values) for values in along(payoffs, log_x))
    # A mean fitness that has arrived still moves by rounding.
    rises = np.all(np.diff(mean, axis=1) > -1e-12, axis=1)
    return Claim(
        "replicator.games/fisher",
        "In partnership games mean fitness grows, at twice the variance of fitness",
        "hofbauer1998, section 7.8",
        "stated",
        [
            # The same number by two routes, of size up to ten: rounding only.
            Check("largest |d/dt x^T A x - 2 Var|", "at most", 2e-13, _sup(growth - 2 * variance)),
            Check("trajectories with rising mean fitness", "all of", rises.size, int(np.sum(rises))),
        ],
    )


def _folk(census: Census) -> Claim:
    return Claim(
        "replicator.games/folk-theorem",
        "Strict Nash equilibria attract, and what attracts is a Nash equilibrium",
        "hofbauer1998, section 7.2",
        "stated",
        [
            _all_of("strict equilibria that attract", census.strict, census.attracts),
            _all_of("attracting rest points that are Nash", census.attracts, census.nash),
        ],
    )


def _all_of(label: str, those: np.ndarray, too: np.ndarray) -> Check:
    return Check(label, "all of", int(np.sum(those)), int(np.sum(those & too)))


def _ess(census: Census, divergence: np.ndarray) -> Claim:
    # Both terms of the divergence are of size one: below 1e-14 it is rounding.
    falls = np.all(np.diff(divergence, axis=1) <= 1e-14, axis=1) & (divergence[:, -1] < divergence[:, 0])
    zeeman, centre = games.zeeman(), np.full(3, 1 / 3)
    growth = np.max(np.real(games.eigenvalues(zeeman, centre)))
    return Claim(
        "replicator.games/ess",
        "Evolutionarily stable strategies attract; not all that attract are evolutionarily stable",
        "hofbauer1998, section 7.2",
        "stated",
        [
            _all_of("evolutionarily stable ones that attract", census.ess, census.attracts),
            Check("trajectories near them whose divergence falls", "all of", falls.size, int(np.sum(falls))),
            # Rounding of a 2 x 2 eigenvalue problem.
            Check("growth rate at the centre of Zeeman's game", "equals", -1 / 3, growth, 1e-12),
            Check("evolutionarily stable centres there", "equals", 0, games.is_ess(zeeman, centre)),
        ],
    )


def figure(saved: Saved) -> Figure:
    """Six phase portraits, and three panels on the long run."""
    drawn = Figure(figsize=(8.6, 7.9), layout="constrained")
    upper, lower = np.asarray(drawn.subfigures(2, 1, height_ratios=(2.3, 1.0)))
    panels = upper.subplots(2, 3)
    arrows = [_portrait(ax, saved, game) for game, ax in enumerate(panels.flat)]
    bar = upper.colorbar(arrows[0], ax=panels, shrink=0.6, aspect=40)
    bar.set_label("speed, relative to the panel's largest")
    kinds = [Line2D([], [], linestyle="", label=kind, **style) for kind, style in MARKERS.items()]
    line = Line2D([], [], color=PATH, marker=".", markevery=[0], label="trajectory from its start")
    upper.legend(handles=[*kinds, line], loc="outside lower center", ncols=6, fontsize=9.5)

    cycle, averages, near = lower.subplots(1, 3)
    for strategy, label in enumerate(ROCK_PAPER_SCISSORS):
        cycle.plot(saved["cycle/ts"], saved["cycle/log_x"][:, strategy] / np.log(10), label=label)
    cycle.set(xlabel="time", ylabel="log10 of the share")
    cycle.set_title("Far along the cycle")
    cycle.legend(loc="lower left")

    ts, error = saved["closed/ts"][1:], saved["closed/average_error"]
    averages.loglog(ts, error, color="C0", label="rock-paper-scissors")
    averages.loglog(ts, _average_bound(saved["closed/log_x"]) / ts, label="bound ~ 1 / t", **plotting.THEORY)
    averages.set(xlabel="time t", ylabel="|average over [0, t] − 1/3|", ylim=(3e-4, 20))
    averages.set_title("Time average at the centre")
    averages.legend(loc="upper right")

    divergence = saved["ess/divergence"][:16]
    near.semilogy(saved["ess/ts"], (divergence / divergence[:, :1]).T, color="C0", linewidth=0.8)
    near.set(xlabel="time", ylabel="KL(x* ‖ x) / its start", ylim=(1e-7, 2))
    near.set_title(f"Next to {len(divergence)} stable points")
    return drawn


def _portrait(ax: Axes, saved: Saved, game: int) -> Quiver:
    """One game on the triangle; returns the arrows, for the colour bar."""
    title, corners, _ = PORTRAITS[game]
    ax.set_title(title)
    ax.set_axis_off()
    ax.set(aspect="equal", xlim=(-0.08, 1.08), ylim=(-0.1, 0.92))
    ax.plot(*to_plane(np.eye(3)[[0, 1, 2, 0]]).T, color="0.3", linewidth=1.2, zorder=2)
    beside = ((0, -9, "center", "top"), (0, -9, "center", "top"), (9, 0, "left", "center"))
    for label, place, (right, up, ha, va) in zip(corners, to_plane(np.eye(3)), beside, strict=True):
        ax.annotate(label, place, (right, up), textcoords="offset points", ha=ha, va=va)

    places, velocity = to_plane(saved["portrait/arrows"]), to_plane(saved["portrait/velocity"][game])
    speed = np.linalg.norm(velocity, axis=1, keepdims=True)
    unit = velocity / np.maximum(speed, 1e-12)
    look = {"cmap": "viridis", "clim": (0, 1), "pivot": "mid", "scale": 18, "width": 0.009}
    arrows = ax.quiver(*places.T, *unit.T, speed[:, 0] / np.max(speed), zorder=1, **look)
    x = np.exp(saved["portrait/log_x"][game])
    if corners == ROCK_PAPER_SCISSORS:
        # Rotating the strategies changes nothing: a third of the starts shows all orbits.
        x = x[np.all(x[:, 0, :1] > x[:, 0, 1:], axis=1)]
    for path in to_plane(x):
        ax.plot(*path.T, color=PATH, linewidth=0.9, marker=".", markevery=[0], zorder=3)
    for x, kind in zip(saved["portrait/rest_points"][game], saved["portrait/stability"][game], strict=True):
        if kind:
            ax.plot(*to_plane(x), zorder=6, clip_on=False, **MARKERS[str(kind)])
    return arrows
