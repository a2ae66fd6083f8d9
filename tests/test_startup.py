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
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    startup.set_xla_flags()
    assert os.environ.get("XLA_FLAGS") == after
