"""Strict settings for the whole suite: 64-bit, no silent rank promotion, warnings are errors."""

import gc
import itertools

from sims import startup

startup.prepare_environment()

import jax  # noqa: E402
from hypothesis import settings  # noqa: E402

startup.configure_jax(x64=True)
# Tracing makes many objects, few of them garbage: collecting after each 700 takes an eighth of the time.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling makes the first example of a property slow.
settings.register_profile("dynascope", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("dynascope")


def pytest_configure(config):
    # Two workers share the cache: one may look at a program that the other is writing.
    config.addinivalue_line("filterwarnings", f"ignore:{startup.CACHE_WARNING}")


_ended = itertools.count(1)


def pytest_runtest_teardown():
    # A worker runs a thousand tests, and would run out of memory mappings; looking takes a few hundredths.
    if next(_ended) % 20 == 0:
        startup.forget_programs()
