"""The settings of a program that runs simulations."""

import os

import pytest

from sims import startup

SAFE = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@pytest.mark.parametrize(
    ("release", "before", "after"),
    [
        ("0.10.1", None, SAFE),
        ("0.10.2", "--other", f"--other {SAFE}"),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=", "--xla_cpu_experimental_ynn_fusion_type="),
        ("0.11.0", "--other", "--other"),
        ("0.12.0.1", None, None),
    ],
)
def test_the_fusion_is_off_below_0_11(release, before, after, monkeypatch):
    monkeypatch.setattr(startup, "version", lambda _: release)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    startup.set_xla_flags()
    assert os.environ.get("XLA_FLAGS") == after


@pytest.mark.parametrize(
    ("cores", "before", "after"),
    [(2, {}, "4"), (64, {}, "64"), (2, {"PJRT_NPROC": "3"}, "3"), (2, {"NPROC": "3"}, None)],
)
def test_small_pools_of_threads_get_more(cores, before, after, monkeypatch):
    for name in ("NPROC", "PJRT_NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(startup.os, "cpu_count", lambda: cores)
    startup.set_xla_flags()
    assert os.environ.get("PJRT_NPROC") == after
