"""Results on disk: nothing is lost on the way, and never a half file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.flow import Trajectory
from models.training import Descent
from sims.claims import Check, stated
from sims.ledger import render, write_page
from sims.ranges import Positive, Range
from sims.results import (
    Context,
    load,
    restore_config,
    save,
    to_arrays,
    to_saved,
    to_xarray,
    with_claims,
)


@dataclass(frozen=True)
class Config:
    steps: Annotated[int, Range(at_least=1)] = 5
    rates: tuple[Positive, ...] = (0.1, math.inf)
    shape: tuple[int, float] = (2, 3.0)
    pairs: tuple[tuple[int, int], ...] = ((1, 2),)
    folder: Path | None = None
    batch: int | None = 3
    descent: Descent = Descent(1.0, 2, (1, 2))


CLAIM = stated(
    "toy.run/gap",
    "The gap |a| < b*c closes to <a, b>",
    "someone2024, Lemma 2",
    Check("gap |a|", "at most", math.inf, 0.25, why="no bound"),
    Check("lost", "equals", 1, math.nan, why="the same number"),
)


def make(measured, claims=(CLAIM,), seed=0, **rest):
    saved = to_saved("toy.run", Config(), Context(seed, "standard"), measured, seconds=1.23456, **rest)
    return with_claims(saved, iter(claims))


def test_save_and_load_give_back_everything(tmp_path):
    measured = {
        "time": ("time", np.arange(3)),
        "flow": {"V": ("time token", {"p": jnp.ones((3, 2)), "q": np.zeros((3, 2))})},
        "order": np.float32(2),
        "flag": False,
        "half": ("lane", jnp.ones(2, jnp.bfloat16)),
        "kind": ("kind", np.array(["linear", "exp"])),
    }
    saved = make(measured, flags="--steps 5", seed=3)
    assert set(saved.arrays) == {"time", "flow/V/p", "flow/V/q", "order", "flag", "half", "kind"}
    save(saved, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{saved.name}.json", f"{saved.name}.npz"]
    again = load(tmp_path, saved.name)
    assert again.record == saved.record
    for path, array in saved.arrays.items():
        assert again[path].dtype == array.dtype
        np.testing.assert_array_equal(again[path], array)
    assert again["order"].dtype == np.float32
    np.testing.assert_array_equal(again["half"], [1, 1])
    assert sorted(again["flow/V"]) == ["p", "q"]
    with pytest.raises(KeyError, match=r"'flaw' is not in the result toy\.run@steps=5,seed=3, which has"):
        again["flaw"]
    (claim,) = again.claims
    assert claim.id == CLAIM.id
    assert again.verdicts == (claim.verdict,) == ("fails",)
    assert claim.checks[0] == CLAIM.checks[0]
    record = again.record
    kept = {"name": "toy.run", "preset": "standard", "seed": 3, "x64": True, "flags": "--steps 5"}
    assert {key: record[key] for key in kept} == kept
    assert record["seconds"] == 1.235
    assert record["versions"]["jax"].count(".") >= 2
    assert repr(again).splitlines()[:2] == [
        "toy.run@steps=5,seed=3: preset standard, seed 3, 64-bit",
        "  toy.run/gap: fails",
    ]
    assert "  flow/V/p (time: 3, token: 2)" in repr(again)


def test_a_configuration_comes_back_with_its_types():
    saved = make({"x": 1.0})
    assert saved.config["rates"] == [0.1, "inf"]
    assert restore_config(Config, saved.config) == Config()
    changed = Config(pairs=(), folder=Path("a"), batch=None)
    again = to_saved("toy.run", changed, Context(), {"x": 1.0})
    assert restore_config(Config, again.config) == changed


@pytest.mark.parametrize(
    ("flags", "seed", "name"),
    [
        ("", 0, "toy.run"),
        ("", 7, "toy.run@seed=7"),
        ("--tokens 5 --rates 0.1 1e-3 --no-noisy", 0, "toy.run@tokens=5,rates=0.1+1e-3,no-noisy"),
        ("--data-file 'a b/c'", 0, "toy.run@data-file=_a+b_c_"),
    ],
)
def test_variants_have_files_of_their_own(flags, seed, name):
    assert make({"x": 1.0}, flags=flags, seed=seed).name == name


def test_long_variants_stay_short_and_apart():
    one, other = (make({"x": 1.0}, flags=f"--rates {'0.125 ' * 40}{end}").name for end in (1, 2))
    assert len(one) < 80
    assert one != other


def test_json_is_strict(tmp_path):
    save(make({"x": ("lane", np.ones(2))}), tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "toy.run.json").read_text(), parse_constant=refuse)


def test_nothing_saved():
    with pytest.raises(
        FileNotFoundError,
        match=r"No result has this name, there is no result at all: 'nowhere",
    ):
        load("nowhere", "toy.run")


def test_a_result_names_its_arrays(tmp_path):
    saved = make({"x": {"y": ("lane", np.ones(2))}, "z": 1.0})
    assert list(saved) == list(saved.keys()) == ["x/y", "z"]
    assert len(saved) == 2
    assert ("x" in saved, "x/y" in saved, "x/" in saved, "y" in saved) == (True, True, False, False)
    assert dict(saved)["z"] == 1
    save(saved, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No result has this name, there is toy\.run"):
        load(tmp_path, "toy.walk")


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (
            {"x": ("time token", np.ones(2))},
            r"^x must have 1 names of dimensions, as in .*, got 'time token'$",
        ),
        (
            {"x": ("time time", np.ones((2, 2)))},
            r"^x must have 2 names of dimensions, as in .*, got 'time time'$",
        ),
        ({"a": {"x": np.ones(2)}}, r"^a/x must have 1 names of dimensions, as in .*, got ''$"),
        (
            {"x": ("time", np.ones(2)), "y": ("time", np.ones(3))},
            r"^y must have size 2 along 'time', as x has, got 3; another dimension needs another name$",
        ),
        ({"x": ("lane", np.array([None, 1]))}, r"^x must be an array of numbers or text, got objects$"),
        ({"x": (np.ones(2), "time")}, r"^x must be a number, a pair"),
    ],
)
def test_what_cannot_be_saved_is_told(measured, message):
    with pytest.raises(ValueError, match=message):
        to_arrays(measured)


def test_xarray_has_names_coordinates_and_attributes_and_netcdf_keeps_them(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    measured = {
        "rate": ("rate", np.array([0.1, 0.2])),
        "kind": ("kind", np.array(["linear", "exp", "softmax"])),
        "gap": {"error": ("rate kind", np.arange(6.0).reshape(2, 3))},
    }
    saved = make(measured, seed=3)
    to_xarray(saved).to_netcdf(tmp_path / "toy.nc", engine="h5netcdf")
    dataset = xarray.open_dataset(tmp_path / "toy.nc", engine="h5netcdf")
    assert set(dataset.coords) == {"rate", "kind"}
    assert float(dataset["gap.error"].sel(rate=0.2, kind="exp")) == 4
    assert dataset.attrs["claims.gap"] == "fails"
    assert dataset.attrs["config.descent.points"] == 2
    assert list(dataset.attrs["config.descent.substeps"]) == [1, 2]
    assert dataset.attrs["seed"] == 3
    assert dataset.attrs["versions.jax"] == saved.record["versions"]["jax"]


def test_xarray_of_trajectories():
    pytest.importorskip("xarray")
    one = Trajectory(jnp.arange(3.0), {"V": jnp.ones((3, 2)), "z": jnp.ones(3)}, jnp.asarray(True))
    dataset = to_xarray(one)
    assert (dataset["V"].dims, dataset["z"].dims) == (("time", "V_0"), ("time",))
    assert list(dataset.coords) == ["time"]
    lanes = Trajectory(jnp.ones((4, 3)), jnp.ones((4, 3, 2)), jnp.ones(4, bool))
    assert to_xarray(lanes, "rate time token")["y"].dims == ("rate", "time", "token")


def test_the_page_shows_what_is_saved_and_passes_over_the_rest(tmp_path, capsys):
    saved = make({"x": ("lane", np.ones(2))}, flags="--steps 7", seed=3)
    save(saved, tmp_path)
    for name in (saved.name, "broken"):
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
    assert "| [`toy.run/gap`](#toyrunsteps7seed3) | someone2024, Lemma 2 | fails |" in text
    assert "`python -m sims run toy.run --preset standard --seed 3 --steps 7` (64-bit, jax " in text
    assert "![toy.run@steps=7,seed=3](toy.run@steps=7,seed=3.png)" in text
    assert r"- **fails** — The gap \|a\| < b\*c closes to \<a, b> (someone2024, Lemma 2)" in text
    assert r"  - ✓ gap \|a\|: 0.25 (at most inf); no bound" in text
    assert "  - ✗ lost: nan (equals 1); the same number" in text
    assert str(tmp_path) not in text


def test_settings_take_lists_and_parts_by_their_fields():
    from sims import simulations
    from sims.joma import mixture

    config = simulations.with_settings(mixture.PRESETS["quick"], {"sizes": [100, 200], "substeps": (1, 2)})
    assert config.sizes == (100, 200)
    assert config.descent.substeps == (1, 2)
    with pytest.raises(
        ValueError, match=r"^descent must be given by its fields \(horizon, points, substeps\)$"
    ):
        simulations.with_settings(config, {"descent": {"points": 3}})
