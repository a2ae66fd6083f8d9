"""Every simulation as a whole: its claims, its figure, and what it saves."""

import io

import numpy as np
import pytest
from rich.console import Console

from sims import results
from sims.__main__ import Options, available, execute


@pytest.mark.parametrize("preset", ["quick", pytest.param("standard", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", available())
def test_every_claim_stands(name, preset, tmp_path):
    (saved,) = execute([name], Options(preset=preset), out=tmp_path, console=Console(file=io.StringIO()))
    assert saved.claims
    failing = [str(claim) for claim in saved.claims if claim.at(preset) == "fails"]
    assert not failing, failing
    assert all(claim.id.startswith(f"{name}/") for claim in saved.claims)
    again = results.load(tmp_path, name)
    assert again.record == saved.record
    for path, array in saved.arrays.items():
        np.testing.assert_array_equal(again[path], array)
    assert 10_000 < (tmp_path / f"{name}.png").stat().st_size < 300_000
