"""Results: what a simulation returns, and how it is saved, loaded and told apart later."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sims.claims import Claim, Preset, from_json, to_json


def _silent(label: str, fraction: float) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Context:
    """What a simulation is given besides its own configuration.

    Attributes:
        seed: seed of everything random.
        preset: the preset that the configuration started from.
        data_dir: folder of real data sets, or None.
        progress: called as `progress(label, fraction_done)`.
    """

    seed: int = 0
    preset: Preset = "quick"
    data_dir: Path | None = None
    progress: Callable[[str, float], None] = _silent


@dataclass(frozen=True)
class Result:
    """What a simulation returns.

    Attributes:
        data: pytrees by name: trajectories and arrays, all that the figure needs.
        claims: the claims, each with its checks.
        dims: names of an array's dimensions by its path in `data`, such as "gap/error": ("rate",).
    """

    data: Mapping[str, Any]
    claims: tuple[Claim, ...]
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A result as it lies on disk: all that a figure is drawn from.

    Attributes:
        name: `<theory>.<experiment>`.
        arrays: every array by path, such as "flow/theory/ys".
        record: configuration, claims, versions, device and commit.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    record: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, as plain data."""
        return self.record["config"]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims."""
        return tuple(from_json(claim) for claim in self.record["claims"])

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The verdict on each claim, as seen from this run's preset and precision."""
        return tuple(claim.at(self.record["preset"], self.record["x64"]) for claim in self.claims)

    def __getitem__(self, path: str) -> np.ndarray:
        return self.arrays[path]


def to_saved(
    name: str, config: Any, context: Context, result: Result, seconds: float, flags: str = ""
) -> Saved:
    """A result with its provenance, as it is saved; `flags` are what was set besides preset and seed."""
    import jax

    paths = jax.tree_util.tree_leaves_with_path(dict(result.data))
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): _to_numpy(leaf) for path, leaf in paths}
    unknown = sorted(set(result.dims) - set(arrays))
    if unknown:
        raise ValueError(f"dims must name arrays of the result, got {unknown}; there are {sorted(arrays)}")
    for path, names in result.dims.items():
        if len(names) != arrays[path].ndim:
            raise ValueError(f"dims of {path} must be {arrays[path].ndim} names, got {names}")
    record = {
        "name": name,
        "preset": context.preset,
        "seed": context.seed,
        "flags": flags,
        "x64": jax.config.read("jax_enable_x64"),
        "config": asdict(config),
        "claims": [to_json(claim) for claim in result.claims],
        "dims": {path: list(names) for path, names in result.dims.items()},
        "seconds": round(seconds, 3),
        "device": str(jax.devices()[0].device_kind),
        "versions": _versions(),
        "commit": _commit(),
    }
    # Through JSON and back, so that a figure cannot use what a saved file does not hold.
    return Saved(name, arrays, json.loads(_dumps(record)))


def _to_numpy(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    # The npz format has no bfloat16 and would give back raw bytes.
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def save(saved: Saved, out: Path) -> None:
    """Write `<out>/<name>.npz` and then `<out>/<name>.json`, each whole or not at all.

    An older record goes first: where there is one, the arrays beside it are its own.
    """
    objects = sorted(path for path, array in saved.arrays.items() if array.dtype.hasobject)
    if objects:
        raise ValueError(f"data must hold numbers, got objects in {objects}")
    (out / f"{saved.name}.json").unlink(missing_ok=True)
    arrays: dict[str, Any] = dict(saved.arrays)
    write_whole(out / f"{saved.name}.npz", lambda path: np.savez_compressed(path, **arrays))
    write_whole(out / f"{saved.name}.json", lambda path: path.write_text(_dumps(saved.record) + "\n"))


def load(out: str | Path, name: str) -> Saved:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: nothing was saved there under this name.
        ValueError: what lies there is broken or something else.
    """
    record, data = Path(out) / f"{name}.json", Path(out) / f"{name}.npz"
    try:
        with np.load(data) as arrays:
            return Saved(name, dict(arrays), json.loads(record.read_text()))
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{data} and {record.name} are no result that can be read: {error}") from error


def to_xarray(saved: Saved):
    """The result as an `xarray.Dataset` with named dimensions; needs the `xarray` extra."""
    import xarray

    dims = saved.record["dims"]
    variables = {}
    for path, array in saved.arrays.items():
        variable = path.replace("/", ".")  # netCDF keeps slashes to itself
        names = dims.get(path) or [f"{variable}:{axis}" for axis in range(array.ndim)]
        variables[variable] = (names, array)
    return xarray.Dataset(variables, attrs={"record": _dumps(saved.record)})


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name and move it into place, so that a killed run leaves no half file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _dumps(record: Any) -> str:
    return json.dumps(_strict(record), indent=1, allow_nan=False)


def _strict(value: Any) -> Any:
    """Plain JSON: paths and numbers that JSON lacks become strings, which `float` reads back."""
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def _versions() -> dict[str, str]:
    names = ("dynascope", "jax", "jaxlib", "flax", "optax", "diffrax", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found


def _commit() -> str | None:
    """The commit of this checkout, marked when it was changed; None for an installed copy."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+changes" if status.strip() else "")
