"""The settings against XLA's faults on CPU, and when they can be made."""

import os
import subprocess
import sys

import pytest

from dynamics import workarounds

SAFE = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@pytest.fixture
def machine(monkeypatch):
    """Make `apply` see another machine before JAX has started; returns what it sets."""
    for name in ("XLA_FLAGS", "PJRT_NPROC", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workarounds, "_jax_has_started", lambda: False)

    def applied(release="0.12.0.1", cores=8, **environment):
        monkeypatch.setattr(workarounds, "version", lambda _: release)
        monkeypatch.setattr(workarounds.os, "cpu_count", lambda: cores)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        workarounds.apply()
        return os.environ.get("XLA_FLAGS"), os.environ.get("PJRT_NPROC")

    return applied


@pytest.mark.parametrize(
    ("release", "before", "after"),
    [
        ("0.10.1", "", SAFE),
        ("0.10.2", "--other", f"--other {SAFE}"),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=", "--xla_cpu_experimental_ynn_fusion_type="),
        ("0.11.0", "--other", "--other"),
    ],
)
def test_the_fusion_is_off_below_0_11(release, before, after, machine):
    assert machine(release, XLA_FLAGS=before) == (after, None)


@pytest.mark.parametrize(
    ("cores", "before", "after"),
    [(2, {}, "4"), (64, {}, None), (2, {"PJRT_NPROC": "3"}, "3"), (2, {"NPROC": "3"}, None)],
)
def test_small_pools_of_threads_get_more(cores, before, after, machine):
    assert machine(cores=cores, **before) == (None, after)


PROGRAM = """
import importlib.metadata, os, sys, warnings
installed = importlib.metadata.version
importlib.metadata.version = lambda name: "0.10.1" if name == "jaxlib" else installed(name)
import jax
if "started" in sys.argv: jax.numpy.zeros(1)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import {package}
print(*[str(warning.message) for warning in told if warning.category is RuntimeWarning], sep="\\n")
print("SAFE" if "INDIVIDUAL_DOT" in os.environ.get("XLA_FLAGS", "") else "AS IT WAS")
"""


@pytest.mark.parametrize("package", ["dynamics", "models", "sims"])
def test_an_import_prepares_jax_or_says_that_it_is_too_late(package):
    environment = dict(os.environ)
    for name in ("XLA_FLAGS", "PJRT_NPROC"):
        environment.pop(name, None)

    def run(*when):
        program = [sys.executable, "-c", PROGRAM.replace("{package}", package), *when]
        done = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
        return done.stdout.strip().split("\n")

    assert run() == ["SAFE"]
    warning, flags = run("started")
    assert flags == "AS IT WAS"
    assert warning.startswith("JAX started before dynascope was imported")
    assert SAFE in warning
