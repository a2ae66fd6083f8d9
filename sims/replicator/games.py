"""Phase portraits of classical games, and the theorems on their equilibria checked on random ones.

Six games of three strategies on the simplex: where the replicator flow goes, how fast, and which of its rest
points attract. Then the long run: closed orbits and their averages, a heteroclinic cycle down to 1e-200, and
random games for the folk theorem of evolutionary game theory and for Fisher's theorem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

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
from dynamics.replicator import equilibria, games
from dynamics.replicator.population import replicator_field, simulate
from models.draws import normal
from models.training import record_steps
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_most, equals, every, stated
from sims.compare import SOLVE, largest
from sims.ranges import Count, Positive, Range
from sims.results import Context, Saved

Side = Annotated[int, Range(at_least=3)]


@dataclass(frozen=True)
class Config:
    """Portraits, long runs and random games."""

    starts: Side = 6
    """Steps a side of the triangular lattice at whose inner points a portrait's trajectories start."""
    arrows: Side = 11
    """Steps a side of the lattice on which a portrait's arrows are drawn."""
    closed_horizon: Positive = 100.0
    """Time up to which the closed orbit of zero-sum rock-paper-scissors is followed."""
    cycle_horizon: Positive = 1000.0
    """Time up to which the heteroclinic cycle is followed."""
    points: Count = 1000
    """Records along a run."""
    random_games: Count = 300
    """Random games with three strategies."""
    followed: Count = 60
    """Evolutionarily stable strategies, and symmetric games, whose neighbourhood is simulated."""
    rtol: Positive = 1e-10
    """Relative tolerance of the solver."""


_QUICK = Config()
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_QUICK, random_games=3000, followed=300),
    "paper": replace(_QUICK, random_games=30_000, followed=1000),
}


ROCK_PAPER_SCISSORS = ("rock", "paper", "scissors")
ANIMALS = ("hawk", "dove", "bourgeois")
ZERO_SUM = partial(games.rock_paper_scissors, 1.0, 1.0)
FAVOURABLE = partial(games.rock_paper_scissors, 2.0, 1.0)
UNFAVOURABLE = partial(games.rock_paper_scissors, 1.0, 2.0)
# Each portrait has a title, payoffs, strategies and the time that it shows.
PORTRAITS: tuple[tuple[str, Callable[[], Array], tuple[str, str, str], float], ...] = (
    ("Win = loss: centre", ZERO_SUM, ROCK_PAPER_SCISSORS, 12.0),
    ("Win 2, loss 1: spiral", FAVOURABLE, ROCK_PAPER_SCISSORS, 20.0),
    ("Win 1, loss 2: cycle", UNFAVOURABLE, ROCK_PAPER_SCISSORS, 14.0),
    ("Coordination, rewards 1, 2, 3", partial(games.coordination, (1.0, 2.0, 3.0)), ("1", "2", "3"), 30.0),
    ("Zeeman's game", games.zeeman, ("1", "2", "3"), 30.0),
    ("Hawk-dove-bourgeois", partial(games.hawk_dove_bourgeois, 2.0, 4.0), ANIMALS, 60.0),
)
# What hawks and doves fight for, and what losing a fight costs.
VALUE, COST = 2.0, 3.0

PATH = "C1"
_DOT: dict[str, Any] = {"marker": "o", "color": "black", "markersize": 8}
MARKERS: dict[str, dict[str, Any]] = {
    "attracting": _DOT,
    "repelling": {**_DOT, "markerfacecolor": "white"},
    "saddle": {**_DOT, "fillstyle": "left", "markerfacecoloralt": "white"},
    "centre": {**_DOT, "markerfacecolor": "C5"},
    "degenerate": {**_DOT, "marker": "D", "markerfacecolor": "0.75"},
}


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


@partial(jax.jit, static_argnames="config")
def _draw(seed: int, config: Config) -> tuple[Array, Array, Array]:
    """Random games, symmetric games, and starts anywhere on the simplex."""
    k_games, k_symmetric, k_starts = jax.random.split(jax.random.key(seed), 3)
    halves = normal(k_symmetric, (config.followed, 3, 3))
    # Uniform on the simplex; the sampler of a general Dirichlet law takes seconds to compile.
    waits = jax.random.exponential(k_starts, (config.followed, 3))
    return (
        normal(k_games, (config.random_games, 3, 3)),
        halves + jnp.swapaxes(halves, 1, 2),
        waits / jnp.sum(waits, axis=1, keepdims=True),
    )


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0, None))
def _simulate_each(payoff: Array, x0: Array, ts: Array, rtol: Array) -> Trajectory:
    return simulate(payoff, x0, ts, rtol=rtol, **SOLVE)


def _follow(runs: dict[str, tuple[Any, np.ndarray, float]], config: Config) -> tuple[np.ndarray, dict, dict]:
    """Runs (payoffs, starts, horizon) as one batch; returns ok, and times and log x by the runs' names."""
    sizes = [len(x0) for _, x0, _ in runs.values()]
    payoffs = np.concatenate([np.broadcast_to(payoff, (len(x0), 3, 3)) for payoff, x0, _ in runs.values()])
    starts = np.concatenate([x0 for _, x0, _ in runs.values()])
    times = {name: np.linspace(0.0, horizon, config.points + 1) for name, (*_, horizon) in runs.items()}
    path = _simulate_each(payoffs, starts, np.repeat([*times.values()], sizes, axis=0), config.rtol)
    pieces = np.split(np.asarray(path.ys), np.cumsum(sizes)[:-1])
    return np.asarray(path.ok), times, dict(zip(runs, pieces, strict=True))


def _census(payoffs: np.ndarray) -> dict[str, np.ndarray]:
    """All isolated rest points of many games: the game's number and the point, and what the point is."""
    points = [found.points[found.exists] for found in map(equilibria.rest_points, payoffs)]
    game, x = np.repeat(np.arange(len(payoffs)), [len(found) for found in points]), np.concatenate(points)
    growth = np.max(np.real(equilibria.eigenvalues(payoffs[game], x)), axis=1)
    fitness = np.einsum("gij,gj->gi", payoffs[game], x)
    best_replies = np.sum(fitness >= np.max(fitness, axis=1, keepdims=True), axis=1)
    pure = np.max(x, axis=1) == 1
    nash, ess = (
        np.array([decide(payoffs[g], point) for g, point in zip(game, x, strict=True)])
        for decide in (equilibria.is_nash, equilibria.is_ess)
    )
    strict = pure & (np.argmax(x, axis=1) == np.argmax(fitness, axis=1)) & (best_replies == 1)
    return {"game": game, "x": x, "attracts": growth < 0, "strict": strict, "nash": nash, "ess": ess}


@jax.jit
@jax.vmap
def _ascent(payoff: Array, log_x: Array) -> dict[str, Array]:
    """How far d/dt x^T A x is from twice the variance of fitness, and how mean fitness moves."""

    def at(log_x):
        x = jnp.exp(log_x)
        mean, growth = jax.jvp(lambda y: games.mean_fitness(payoff, y), (x,), (field(payoff, x),))
        return mean, growth - 2 * jnp.sum(x * (payoff @ x - mean) ** 2)

    mean, error = jax.vmap(at)(log_x)
    return {"error": jnp.max(jnp.abs(error)), "least_step": jnp.min(jnp.diff(mean))}


_divergence = jax.jit(jax.vmap(games.kl_divergence))
_rock_paper_scissors = jax.jit(jax.vmap(jax.vmap(games.rock_paper_scissors)))
_velocity = jax.jit(jax.vmap(jax.vmap(field, (None, 0)), (0, None)))


def _portraits(log_x: list[np.ndarray], config: Config) -> dict[str, Any]:
    """Trajectories, arrows and rest points of the six games."""
    payoffs, grid = np.stack([payoff() for _, payoff, *_ in PORTRAITS]), lattice(config.arrows)
    points = np.stack([equilibria.rest_points(payoff).points for payoff in payoffs])
    kinds = [
        ["" if np.isnan(x[0]) else equilibria.stability(payoff, x) for x in found]
        for payoff, found in zip(payoffs, points, strict=True)
    ]
    return {
        "log_x": ("game start record strategy", np.stack(log_x)),
        "arrows": ("arrow strategy", grid),
        "velocity": ("game arrow strategy", _velocity(payoffs, grid)),
        "rest_points": ("game support strategy", points),
        "stability": ("game support", np.array(kinds)),
    }


def _solve_by_hand() -> dict[str, Any]:
    """Rates and shares at rest points that are known."""
    pays, centre = np.linspace(0.5, 3, 6), np.full(3, 1 / 3)
    payoffs = _rock_paper_scissors(*np.meshgrid(pays, pays, indexing="ij"))
    found = equilibria.eigenvalues(payoffs, np.broadcast_to(centre, (6, 6, 3)))
    hawk_dove, zeeman = games.hawk_dove(VALUE, COST), games.zeeman()
    mixed = equilibria.rest_points(hawk_dove).points[-1]
    growth = np.max(np.real(equilibria.eigenvalues(zeeman, centre)))
    return {
        "win": ("win", pays),
        "loss": ("loss", pays),
        # The upper one of each conjugate pair is compared.
        "eigenvalue": ("win loss", np.where(np.imag(found[..., 0]) > 0, found[..., 0], found[..., 1])),
        "hawks": {"share": mixed[0], "rate": np.real(equilibria.eigenvalues(hawk_dove, mixed))[0]},
        "zeeman": {"growth": growth, "ess": equilibria.is_ess(zeeman, centre)},
    }


def run(config: Config, context: Context) -> dict:
    """Follow all games in one batched solve, decide on their rest points, and measure the rest."""
    context.progress("rest points of random games", 0.0)
    random, symmetric, anywhere = jax.device_get(_draw(context.seed, config))
    census = _census(random)
    stable = np.flatnonzero(census["ess"])[: config.followed]
    game, stable_x = census.pop("game")[stable], census.pop("x")[stable]

    context.progress("following all trajectories", 0.2)
    orbit = np.array([[0.5, 0.3, 0.2]])
    runs = {title: (payoff(), lattice(config.starts), time) for title, payoff, _, time in PORTRAITS}
    runs |= {
        "closed": (ZERO_SUM(), orbit, config.closed_horizon),
        "cycle": (UNFAVOURABLE(), orbit, config.cycle_horizon),
        "ess": (random[game], 0.999 * stable_x + 0.001 / 3, 100.0),
        "ascent": (symmetric, anywhere, 20.0),
    }
    ok, times, log_x = _follow(runs, config)
    divergence = np.asarray(_divergence(stable_x, log_x["ess"]))
    drawn = record_steps(config.points, max(1, config.points // 250))

    context.progress("deciding on rest points", 0.9)
    return {
        "game": ("game", np.array([title for title, *_ in PORTRAITS])),
        "portrait": _portraits([log_x[title][:, drawn] for title, *_ in PORTRAITS], config),
        "ok": ("trajectory", ok),
        "closed_time": ("closed_time", times["closed"]),
        "closed": ("closed_time strategy", log_x["closed"][0]),
        "cycle_time": ("cycle_time", times["cycle"]),
        "cycle": ("cycle_time strategy", log_x["cycle"][0]),
        "ess_time": ("ess_time", times["ess"][drawn]),
        "divergence": ("stable ess_time", divergence[:, drawn]),
        "largest_rise": ("stable", np.max(np.diff(divergence, axis=1), axis=1)),
        "ascent": ("symmetric_game", _ascent(symmetric, log_x["ascent"])),
        "census": ("rest_point", census),
        **_solve_by_hand(),
    }


def average_error(ts: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """Largest deviation of the time average over [0, t] from 1/3, at every t but the first."""
    area = cumulative_trapezoid(np.exp(log_x), ts, axis=0)
    return np.max(np.abs(area / ts[1:, None] - 1 / 3), axis=1)


def average_bound(log_x: np.ndarray) -> float:
    """What t |average - 1/3| cannot exceed in zero-sum rock-paper-scissors.

    (log x(t) - log x(0)) / t = A (average - 1/3), and A stretches tangent vectors by sqrt(3).
    """
    return float(np.max(np.linalg.norm(log_x - log_x[:1], axis=1))) / np.sqrt(3)


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Long runs, games that are solved by hand, and three theorems."""
    yield from _long_runs(saved)
    yield from _solved_by_hand(saved)
    yield from _theorems(saved)


def _long_runs(saved: Saved) -> Iterator[Claim]:
    ts, log_x = saved["closed_time"], saved["closed"]
    drift = largest(np.expm1(np.sum(log_x, axis=1) - np.sum(log_x[0])))
    yield stated(
        "zero-sum",
        "Zero-sum rock-paper-scissors has closed orbits: x1 x2 x3 is constant",
        "hofbauer1998, section 7.7",
        at_most("largest relative drift of x1 x2 x3", drift, 2e-8, why="about a hundred steps at 1e-10 each"),
    )
    bound, measured = average_bound(log_x), largest(ts[1:] * average_error(ts, log_x))
    trapezoids = "exact, but for the trapezoidal rule"
    yield stated(
        "time-average",
        "The time average of an orbit that stays off the boundary tends to the Nash equilibrium",
        "hofbauer1998, section 7.6",
        at_most("largest t |average - 1/3|", measured, bound, 0.01 * bound, why=trapezoids),
    )
    log_x, leaders = saved["cycle"], np.argmax(saved["cycle"], axis=1)
    switches = np.flatnonzero(np.diff(leaders)) + 1
    sojourns, turns = np.diff(saved["cycle_time"][switches]), np.diff(leaders)[switches - 1] % 3
    least, double = np.min(log_x) / np.log(10), sojourns[-1] / sojourns[-2]
    way = "between corners: a time of order 1 of 200"
    yield stated(
        "heteroclinic",
        "Where losing costs more than winning pays, rock-paper-scissors approaches the cycle of its corners",
        "hofbauer1998, section 7.7",
        every("trajectories of all games that stay finite", saved["ok"]),
        every("switches of the largest share in the order of the cycle", turns == turns[0]),
        # A share falls at the rate of the loss and returns at that of the win, 2 to 1.
        equals("last sojourn at a corner over the one before", double, 2, 0.1, why=way),
        at_most("log10 of the smallest share on the way", least, -150, why="10^-173 is exp(-2 * 200)"),
    )


def _solved_by_hand(saved: Saved) -> Iterator[Claim]:
    win, loss = saved["win"][:, None], saved["loss"]
    expected = -(win - loss) / 6 + 1j * (win + loss) / (2 * np.sqrt(3))
    off, two = largest(saved["eigenvalue"] - expected), "rounding of 2 x 2 problems"
    yield stated(
        "rock-paper-scissors",
        "The centre of rock-paper-scissors has eigenvalues -(win - loss)/6 ± i (win + loss)/(2 sqrt 3)",
        "hofbauer1998, section 7.7",
        at_most("largest deviation over 36 games", off, 1e-14, why=two),
    )
    rate = -VALUE * (COST - VALUE) / (2 * COST)
    yield stated(
        "hawk-dove",
        "Where fighting costs more than it brings, a share V/C of hawks is stable",
        "hofbauer1998, section 6.1",
        equals("stable share of hawks, V = 2, C = 3", saved["hawks/share"], VALUE / COST, 1e-12, why=two),
        equals("rate of return", saved["hawks/rate"], rate, 1e-12, why=two),
    )


def _theorems(saved: Saved) -> Iterator[Claim]:
    error, least_step = largest(saved["ascent/error"]), saved["ascent/least_step"]
    yield stated(
        "fisher",
        "In partnership games mean fitness grows, at twice the variance of fitness",
        "hofbauer1998, section 7.8",
        at_most("largest |d/dt x^T A x - 2 Var|", error, 2e-13, why=f"{ROUNDING}, of numbers up to ten"),
        # A mean fitness that has arrived still moves by rounding.
        every("trajectories with rising mean fitness", least_step > -1e-12),
    )
    attracts, strict, nash, ess = (saved[f"census/{name}"] for name in ("attracts", "strict", "nash", "ess"))
    yield stated(
        "folk-theorem",
        "Strict Nash equilibria attract, and what attracts is a Nash equilibrium",
        "hofbauer1998, section 7.2",
        every("strict equilibria that attract", attracts[strict]),
        every("attracting rest points that are Nash", nash[attracts]),
    )
    divergence = saved["divergence"]
    # Both terms of the divergence are of size one: below 1e-14 it is rounding.
    falls = (saved["largest_rise"] <= 1e-14) & (divergence[:, -1] < divergence[:, 0])
    growth, centres, two = saved["zeeman/growth"], saved["zeeman/ess"], "rounding of a 2 x 2 problem"
    yield stated(
        "ess",
        "Evolutionarily stable strategies attract; not all that attract are evolutionarily stable",
        "hofbauer1998, section 7.2",
        every("evolutionarily stable ones that attract", attracts[ess]),
        every("trajectories near them whose divergence falls", falls),
        equals("growth rate at the centre of Zeeman's game", growth, -1 / 3, 1e-12, why=two),
        equals("evolutionarily stable centres there", centres, 0, why="the statement itself"),
    )


def figure(config: Config, saved: Saved) -> Figure:
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
        cycle.plot(saved["cycle_time"], saved["cycle"][:, strategy] / np.log(10), label=label)
    cycle.set(xlabel="time", ylabel="log10 of the share")
    cycle.set_title("Far along the cycle")
    cycle.legend(loc="lower left")

    ts, log_x = saved["closed_time"], saved["closed"]
    averages.loglog(ts[1:], average_error(ts, log_x), color="C0", label="rock-paper-scissors")
    averages.loglog(ts[1:], average_bound(log_x) / ts[1:], label="bound ~ 1 / t", **plotting.THEORY)
    averages.set(xlabel="time t", ylabel="|average over [0, t] − 1/3|", ylim=(3e-4, 20))
    averages.set_title("Time average at the centre")
    averages.legend(loc="upper right")

    divergence = saved["divergence"][:16]
    near.semilogy(saved["ess_time"], (divergence / divergence[:, :1]).T, color="C0", linewidth=0.8)
    near.set(xlabel="time", ylabel="KL(x* ‖ x) / its start", ylim=(1e-7, 2))
    near.set_title(f"Next to {len(divergence)} stable points")
    return drawn


def _portrait(ax: Axes, saved: Saved, game: int) -> Quiver:
    """One game on the triangle; returns the arrows, for the colour bar."""
    title, _, corners, _ = PORTRAITS[game]
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
