"""Portraits of the basin of collapse of linear BYOL, from cold: one call of `decoupled_flow` for each grid.

    python -m tests.benchmarks.basin_portrait

Programs are compiled anew, without the cache: 300 x 300 starts without a moving average and with rates up to
2, and 60 x 60 with a rate of 10^4. It prints the seconds of each call, with its compilation, the processor's,
and how far the scalar invariant is from where it should be at the end, at the worst start.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from dynamics.noncontrastive import decoupled_flow
from sims.startup import configure_jax

DECAY = 0.04


def main(duration: float = 900.0) -> None:
    """Print seconds by rate of the moving average."""
    configure_jax(x64=True, cache="off")
    for points, rate in ((300, np.inf), (300, 0.5), (300, 2.0), (60, 1e4)):
        p0, s0 = jnp.linspace(0, 1.2, points)[:, None], jnp.linspace(1e-3, 1.2, points)
        rates = {
            "augmentation_variance": 0.25,
            "predictor_rate": 1.0,
            "weight_decay": DECAY,
            "ema_rate": rate,
        }
        jax.clear_caches()
        started = time.perf_counter(), time.process_time()
        end = jax.block_until_ready(decoupled_flow(p0, s0, 1.0, [0.0, duration], **rates).ys)
        wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
        left = np.exp(-2 * DECAY * duration) * (s0 - p0**2)
        drift = np.max(np.abs(end.s[-1] - end.p[-1] ** 2 - left))
        name = f"rate {rate:g}" if np.isfinite(rate) else "no average"
        print(f"{points} x {points}, {name}: {wall:.1f} s ({processor:.1f} s of the processor)", end=", ")
        print(f"{100 * np.mean(end.p[-1] < 0.1):.1f} % collapsed, invariant off by {drift:.1e}")


if __name__ == "__main__":
    main()
