"""Results on disk: nothing is lost on the way, and never a half file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.flow import Trajectory
from sims.claims import Check, Claim
from sims.ledger import render, write_page
from sims.results import Context, Result, load, save, to_saved, to_xarray, write_whole


@dataclass(frozen=True)
class Config:
    steps: int = 5
    rates: tuple[float, ...] = (0.1, math.inf)
    folder: Path | None = None


CLAIM = Claim(
    "toy.run/gap",
    "The gap |a| < b*c closes to <a, b>",
    "someone2024, Lemma 2",
    "stated",
    [Check("gap |a|", "at most", math.inf, 0.25), Check("lost", "equals", 1, math.nan)],
)


def make(data, dims=None, claims=(CLAIM,), **rest):
    context = Context(seed=3, preset="standard")
    return to_saved("toy.run", Config(), context, Result(data, claims, dims or {}), 1.23456, **rest)


def test_save_and_load_give_back_everything(tmp_path):
    flow = Trajectory(jnp.arange(3.0), {"p": jnp.ones((3, 2))}, jnp.asarray(True))
    data = {
        "flow": flow,
        "pair": (np.arange(4), np.float32(2)),
        "flag": False,
        "half": jnp.ones(2, jnp.bfloat16),
    }
    saved = make(data, {"flow/ys/p": ("time", "token")}, flags="--steps 5")
    assert set(saved.arrays) == {"flow/ts", "flow/ys/p", "flow/ok", "pair/0", "pair/1", "flag", "half"}
    save(saved, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.run.json", "toy.run.npz"]
    again = load(tmp_path, "toy.run")
    assert again.record == saved.record
    for path, array in saved.arrays.items():
        assert again[path].dtype == array.dtype
        np.testing.assert_array_equal(again[path], array)
    assert again["pair/1"].dtype == np.float32
    np.testing.assert_array_equal(again["half"], [1, 1])
    assert again.config == {"steps": 5, "rates": [0.1, "inf"], "folder": None}
    (claim,) = again.claims
    assert claim.id == CLAIM.id
    assert claim.verdict == "fails"
    assert claim.checks[0] == CLAIM.checks[0]
    record = again.record
    kept = {"name": "toy.run", "preset": "standard", "seed": 3, "x64": True, "flags": "--steps 5"}
    assert {key: record[key] for key in kept} == kept
    assert record["seconds"] == 1.235
    assert record["versions"]["jax"].count(".") >= 2


def test_json_is_strict(tmp_path):
    save(make({"x": np.ones(2)}), tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "toy.run.json").read_text(), parse_constant=refuse)


def test_nothing_saved():
    with pytest.raises(FileNotFoundError, match=r"toy\.run\.npz"):
        load("nowhere", "toy.run")


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"y": ("time",)}, r"^dims must name arrays of the result, got \['y'\]; there are \['x'\]$"),
        ({"x": ("time", "token")}, r"^dims of x must be 1 names, got \('time', 'token'\)$"),
    ],
)
def test_dims_that_do_not_fit(dims, message):
    with pytest.raises(ValueError, match=message):
        make({"x": np.ones(2)}, dims)


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "toy.run.png"
    write_whole(path, lambda file: file.write_text("old"))

    with path.open() as reader:
        write_whole(path, lambda file: file.write_text("new"))
        assert reader.read() == "old"  # who reads it meanwhile sees the old file whole
    assert path.read_text() == "new"

    def fail(file):
        assert file.parent == tmp_path
        assert file.suffix == ".png"
        file.write_text("half")
        raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        write_whole(path, fail)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("toy.run.png", "new")]
    assert path.stat().st_mode & 0o777 == 0o644


def test_xarray_has_the_names_and_netcdf_keeps_them(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    data = {"gap": {"error": np.arange(6.0).reshape(2, 3)}, "flow": {"ts": np.arange(3.0)}}
    saved = make(data, {"gap/error": ("rate", "time")})
    to_xarray(saved).to_netcdf(tmp_path / "toy.nc", engine="h5netcdf")
    dataset = xarray.open_dataset(tmp_path / "toy.nc", engine="h5netcdf")
    assert dataset["gap.error"].dims == ("rate", "time")
    np.testing.assert_array_equal(dataset["gap.error"], saved["gap/error"])
    assert dataset["flow.ts"].shape == (3,)
    assert json.loads(dataset.attrs["record"])["name"] == "toy.run"


def test_the_page_shows_what_is_saved_and_passes_over_the_rest(tmp_path, capsys):
    saved = make({"x": np.ones(2)}, flags="--steps 7")
    save(saved, tmp_path)
    for name in ("toy.run", "broken"):
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "other.json").write_text("{}")  # of another program
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "broken.npz").write_text("no archive")
    (tmp_path / ".toy.run.half.json").write_text('{"name": ')  # left by a run that was killed
    page = write_page(tmp_path)
    assert page == tmp_path / "README.md"
    text = page.read_text(encoding="utf-8")
    assert text == render([saved])
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path / 'broken.json'} is left out of the page: ")
    with pytest.raises(ValueError, match="no result that can be read"):
        load(tmp_path, "broken")
    assert "| [`toy.run/gap`](#toyrun) | someone2024, Lemma 2 | fails |" in text
    assert "`python -m sims run toy.run --preset standard --seed 3 --steps 7` (64-bit, jax " in text
    assert "![toy.run](toy.run.png)" in text
    assert r"- **fails** — The gap \|a\| < b\*c closes to \<a, b> (someone2024, Lemma 2)" in text
    assert r"  - ✓ gap \|a\|: 0.25 (at most inf)" in text
    assert "  - ✗ lost: nan (equals 1)" in text
    assert str(tmp_path) not in text
