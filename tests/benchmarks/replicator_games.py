"""Replicator flows of many random games: one batched, compiled call against Nashpy's loop over games.

Both get the same games, starts and times, in the same process, in turns: first at the same tolerance
(Nashpy's is that of `scipy.integrate.odeint`), then at the loosest tolerance of ours at which neither the
median nor the largest error is above Nashpy's. Errors are those of the shares x, against our own flow at a
tolerance of 1e-13, which is itself held against SciPy's DOP853 on a few of the games.

    python -m tests.benchmarks.replicator_games --games 1000 --pairs 5

needs Nashpy (`pip install dynascope[peers]`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array
from scipy.integrate import solve_ivp

from dynamics.replicator.population import simulate
from sims.startup import configure_jax


@dataclass(frozen=True)
class Options:
    """What is timed."""

    games: int = 1000
    """Number of random games."""
    strategies: int = 3
    """Strategies per game."""
    horizon: float = 10.0
    """Time to integrate to."""
    points: int = 100
    """Save points."""
    pairs: int = 5
    """How often both are timed, in turns."""
    tolerance: float = 1.49012e-8
    """Relative and absolute tolerance of both; this is odeint's default, which Nashpy does not let change."""
    solver: Literal["dopri5", "tsit5", "dopri8"] = "dopri5"
    """Our solver; with many save points the interpolation of the first is the cheapest by far."""
    checked: int = 20
    """Games of which the reference is compared with SciPy's DOP853."""
    seed: int = 0
    """Seed of the games."""


def main(options: Options) -> None:
    from nashpy.learning.replicator_dynamics import replicator_dynamics

    payoffs, starts, ts = draw_games(options)
    ours = batched(payoffs, starts, ts, options.solver)

    def theirs() -> np.ndarray:
        return np.stack([replicator_dynamics(A, x0, ts) for A, x0 in zip(payoffs, starts, strict=True)])

    first_call, _ = timed(lambda: ours(options.tolerance))
    reference = ours(1e-13)

    def errors(x: np.ndarray) -> np.ndarray:
        """Median over games and largest of a game's largest error."""
        worst = np.max(np.abs(x - reference), axis=(1, 2))
        return np.array([np.median(worst), np.max(worst)])

    their_x = theirs()
    ladder = options.tolerance * 2.0 ** np.arange(10)
    as_good = [tolerance for tolerance in ladder if np.all(errors(ours(tolerance)) <= errors(their_x))]
    checks = [scipy_path(payoffs[game], starts[game], ts) for game in range(options.checked)]

    print(f"{options.games} games of {options.strategies} strategies, T = {options.horizon:g}, ", end="")
    print(f"{options.points} save points; {jax.devices()[0].device_kind}, {options.solver}")
    print(f"first call, with compiling: {first_call:.2f} s")
    print(f"reference against DOP853: {np.max(np.abs(checks - reference[: options.checked])):.1e}")
    print("error of Nashpy: median {:.1e}, largest {:.1e}".format(*errors(their_x)))
    if not as_good:
        print("ours is less accurate at every tolerance tried")
    for label, tolerance in [
        ("equal tolerance", ladder[0]),
        *(("equal accuracy", best) for best in as_good[-1:]),
    ]:
        pairs = np.array(
            [(timed(lambda: ours(tolerance))[0], timed(theirs)[0]) for _ in range(options.pairs)]  # noqa: B023
        )
        ratios = pairs[:, 1] / pairs[:, 0]
        x = ours(tolerance)
        print(f"{label}, {tolerance:.2e}, medians of {options.pairs} pairs:")
        print("  ours {:.4f} s, Nashpy {:.4f} s".format(*np.median(pairs, axis=0)))
        print(f"  ratio {np.median(ratios):.1f} (from {np.min(ratios):.1f} to {np.max(ratios):.1f})")
        print("  error of ours: median {:.1e}, largest {:.1e}".format(*errors(x)))
        print(f"  largest difference of the trajectories: {np.max(np.abs(x - their_x)):.1e}")


def draw_games(options: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Payoffs, starts and save points."""
    rng = np.random.default_rng(options.seed)
    payoffs = rng.standard_normal((options.games, options.strategies, options.strategies))
    starts = rng.dirichlet(np.ones(options.strategies), options.games)
    return payoffs, starts, np.linspace(0.0, options.horizon, options.points)


def batched(
    payoffs: np.ndarray, starts: np.ndarray, ts: np.ndarray, solver: str = "dopri5"
) -> Callable[[float], np.ndarray]:
    """A function of the tolerance that gives the shares of all games at all times, in one program."""
    chosen = {"dopri5": diffrax.Dopri5(), "tsit5": diffrax.Tsit5(), "dopri8": diffrax.Dopri8()}[solver]

    @jax.jit
    def simulate_all(payoffs: Array, starts: Array, rtol: float, atol: float) -> tuple[Array, Array]:
        def one(payoff, x0):
            return simulate(payoff, x0, ts, rtol=rtol, atol=atol, solver=chosen, throw=False)

        path = jax.vmap(one)(payoffs, starts)
        return jnp.exp(path.ys), jnp.all(path.ok)

    def ours(tolerance: float) -> np.ndarray:
        x, ok = simulate_all(payoffs, starts, tolerance, tolerance)
        if not ok:
            raise RuntimeError("a solve failed")
        return np.asarray(x)

    return ours


def timed(call):
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def scipy_path(payoff: np.ndarray, x0: np.ndarray, ts: np.ndarray) -> np.ndarray:
    def field(t, x):
        fitness = payoff @ x
        return x * (fitness - x @ fitness)

    return solve_ivp(field, (ts[0], ts[-1]), x0, "DOP853", ts, rtol=1e-13, atol=1e-14).y.T


if __name__ == "__main__":
    configure_jax(x64=True)
    main(tyro.cli(Options, description=__doc__))
