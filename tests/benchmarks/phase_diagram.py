"""A phase diagram of 200 x 200 points, from cold: one vmapped call of a global minimum, compiled and run.

    python -m tests.benchmarks.phase_diagram

Programs are compiled anew, without the cache, for networks of one and of two hidden layers, by regularization
and noise. It prints the seconds of each call, with its compilation, and the processor's.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from dynamics import collapse
from sims.startup import configure_jax


def main(points: int = 200) -> None:
    """Print seconds by depth."""
    configure_jax(x64=True, cache="off")
    x = np.random.default_rng(0).normal(size=(500, 10))
    data = collapse.moments(x, x.sum(axis=1) / 5)
    gammas, variances = jnp.linspace(0.01, 1.5, points), jnp.linspace(0.0, 2.0, points)
    for widths in ((4,), (4, 4)):

        def size(gamma, variance, widths=widths):
            return jnp.sum(collapse.deep_minimum(data, [gamma] * (len(widths) + 1), variance, widths).norms)

        diagram = jax.jit(jax.vmap(jax.vmap(size, (None, 0)), (0, None)))
        started = time.perf_counter(), time.process_time()
        collapsed = np.asarray(diagram(gammas, variances)) == 0
        wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
        print(f"{len(widths)} hidden: {wall:.1f} s ({processor:.1f} s of the processor)", end=", ")
        print(f"{100 * collapsed.mean():.0f} % of {points} x {points} collapsed")


if __name__ == "__main__":
    main()
