"""Results: what a simulation measured, and how it is saved, loaded, told apart and handed on."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np

from sims import storage
from sims.claims import Claim, Preset, from_json, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        results: folder in which other simulations save what they measure, or None.
    """

    seed: int = 0
    preset: Preset = "quick"
    data_dir: Path | None = None
    progress: Callable[[str, float], None] = _silent
    results: Path | None = None

    def __post_init__(self):
        require_seed(self.seed)


def require_seed(seed: Any) -> None:
    """Raise `ValueError` unless every generator of random numbers takes this seed, in 32-bit too."""
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be an integer >= 0 and < 2**31, got {seed!r}")


@dataclass(frozen=True)
class Saved:
    """A result as it lies on disk: all that its claims are judged by and its figure is drawn from.

    `saved["gap/flow"]` is an array; `saved["gap"]` is a dict of all arrays below that path.

    Attributes:
        arrays: every array by path, such as "gap/flow".
        record: configuration, claims, names of dimensions, versions, device and commit.
    """

    arrays: Mapping[str, np.ndarray]
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its files: that of the simulation, and what was set besides the preset."""
        return self.record["name"] + (f"@{self.record['variant']}" if self.record["variant"] else "")

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, as plain data."""
        return self.record["config"]

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """The claims, each with its checks."""
        return tuple(from_json(claim) for claim in self.record["claims"])

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The verdict on each claim, as seen from this run's preset and precision."""
        return tuple(claim["verdict"] for claim in self.record["claims"])

    def __getitem__(self, path: str) -> Any:
        if path in self.arrays:
            return self.arrays[path]
        below = f"{path}/"
        group = {key[len(below) :]: array for key, array in self.arrays.items() if key.startswith(below)}
        if not group:
            raise KeyError(f"{path!r} is not in the result {self.name}, which has {sorted(self.arrays)}")
        return group

    def __contains__(self, path: str) -> bool:
        return path in self.arrays or any(key.startswith(f"{path}/") for key in self.arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def keys(self):
        """The path of every array."""
        return self.arrays.keys()

    def figure(self) -> Figure:
        """The figure, drawn anew."""
        from sims.simulations import draw

        return draw(self)

    def to_xarray(self):
        """The result as an `xarray.Dataset`; see `to_xarray`."""
        return to_xarray(self)

    def __repr__(self) -> str:
        record = self.record
        precision = "64-bit" if record["x64"] else "32-bit"
        lines = [f"{self.name}: preset {record['preset']}, seed {record['seed']}, {precision}"]
        lines += [f"  {claim.id}: {word}" for claim, word in zip(self.claims, self.verdicts, strict=True)]
        for path, array in self.arrays.items():
            sizes = zip(record["dims"][path], array.shape, strict=True)
            lines.append(f"  {path} ({', '.join(f'{dim}: {size}' for dim, size in sizes)})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The figure and the verdicts, as a notebook shows them."""
        from sims.ledger import to_html

        return to_html(self)


def to_arrays(measured: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """What a simulation's `run` returned, as arrays and as names of their dimensions, both by path.

    An entry is a number, a pair `("time token", array)`, or a dict of entries. The second of a pair may be a
    pytree, all of whose leaves have these dimensions.

    Raises:
        ValueError: the names do not fit an array, a dimension has two sizes, or an entry is no array.

    Example:
        >>> arrays, dims = to_arrays({"gap": {"flow": ("rate", [0.1, 0.01])}, "order": 1.0})
        >>> dims
        {'gap/flow': ('rate',), 'order': ()}
    """
    arrays: dict[str, np.ndarray] = {}
    dims: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for path, names, leaf in _entries(measured):
        array = _to_numpy(leaf)
        if array.dtype.hasobject:
            raise ValueError(f"{path} must be an array of numbers or text, got objects")
        if len(names) != array.ndim or len(set(names)) != array.ndim:
            form = f'("{" ".join("abcd"[: array.ndim])}", array)'
            raise ValueError(
                f"{path} must have {array.ndim} names of dimensions, as in {form}, got {' '.join(names)!r}"
            )
        for name, size in zip(names, array.shape, strict=True):
            known, first = sizes.setdefault(name, (size, path))
            if known != size:
                raise ValueError(
                    f"{path} must have size {known} along {name!r}, as {first} has, got {size}; "
                    "another dimension needs another name"
                )
        arrays[path], dims[path] = array, names
    return arrays, dims


def _entries(measured: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, tuple[str, ...], Any]]:
    import jax

    for key, value in measured.items():
        path = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _entries(value, f"{path}/")
            continue
        if not isinstance(value, tuple):
            value = ("", value)
        if len(value) != 2 or not isinstance(value[0], str):
            raise ValueError(f'{path} must be a number, a pair ("dim dim", array) or a dict, got {value!r}')
        names, tree = tuple(value[0].split()), value[1]
        if isinstance(tree, list):
            tree = np.asarray(tree)
        for inner, leaf in jax.tree_util.tree_leaves_with_path(tree):
            below = jax.tree_util.keystr(inner, simple=True, separator="/")
            yield f"{path}/{below}" if below else path, names, leaf


def _to_numpy(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    # The npz format has no bfloat16 and would give back raw bytes.
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def to_saved(
    name: str,
    config: Any,
    context: Context,
    measured: Mapping[str, Any],
    *,
    seconds: float = 0.0,
    flags: str = "",
    file: str | None = None,
) -> Saved:
    """What a simulation measured with its provenance, as it is saved; not judged yet.

    Args:
        name: `<theory>.<experiment>`, or the name of the file of the user's own simulation.
        config: its configuration.
        context: what else it was given.
        measured: what its `run` returned.
        seconds: how long that took.
        flags: what was set besides preset and seed, as on the command line.
        file: where the user's own simulation lies.
    """
    import jax

    arrays, dims = to_arrays(measured)
    seed = f"--seed {context.seed}" if context.seed else ""
    record = {
        "name": name,
        "file": file,
        "variant": _variant(f"{flags} {seed}".strip()),
        "preset": context.preset,
        "seed": context.seed,
        "flags": flags,
        "x64": jax.config.read("jax_enable_x64"),
        "config": asdict(config),
        "claims": [],
        "dims": {path: list(names) for path, names in dims.items()},
        "arrays_sha256": storage.digest(arrays),
        "seconds": round(seconds, 3),
        "device": str(jax.devices()[0].device_kind),
        "versions": _versions(),
        "commit": _commit(),
    }
    # Through JSON and back, so that no view can use what a saved file does not hold.
    return Saved(arrays, json.loads(_dumps(record)))


def _variant(flags: str) -> str:
    """Flags as a part of a file name: `--tokens 5 --rates 1 2` is `tokens=5,rates=1+2`."""
    words = [part.split() for part in re.split(r"(?:^|\s)--", flags) if part]
    text = ",".join("=".join([word, *(["+".join(values)] if values else [])]) for word, *values in words)
    text = re.sub(r"[^\w.,=+-]", "_", text)
    if len(text) <= 60:
        return text
    return f"{text[:50]}~{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def with_claims(saved: Saved, claims: Iterator[Claim]) -> Saved:
    """The result with these claims in its record."""
    preset, x64 = saved.record["preset"], saved.record["x64"]
    judged = {"claims": [to_json(claim, preset, x64) for claim in claims]}
    return Saved(saved.arrays, json.loads(_dumps({**saved.record, **judged})))


def restore_config(kind: type, plain: Mapping[str, Any]) -> Any:
    """A configuration from its plain data, every field of the type that it is declared with."""
    hints = get_type_hints(kind)
    return kind(**{name: _restore(hints[name], value) for name, value in plain.items()})


def _restore(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, type) and is_dataclass(hint):
        return restore_config(hint, value)
    if isinstance(value, list):
        inner = get_args(hint) or (Any, ...)
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_restore(hint, entry) for hint, entry in zip(hints, value, strict=True))
    if hint is float or float in get_args(hint):
        return float(value)
    if hint is Path or Path in get_args(hint):
        return Path(value)
    return value


def save(saved: Saved, out: Path, figure: bytes | None = None) -> None:
    """Write `<out>/<name>.npz`, `.json` and `.png` at once: a kill leaves the old result or the new one.

    Without a figure none is left: an older one would stand beside new numbers.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the old result is still there.
    """
    record = {**saved.record, "arrays_sha256": storage.digest(saved.arrays)}
    files = {".npz": storage.pack(saved.arrays), ".png": figure}
    with storage.locked(out):
        storage.commit(out, saved.name, _dumps(record).encode(), files)


def save_beside(saved: Saved, out: Path, suffix: str, data: bytes) -> Path:
    """Write a figure, or a record, beside the arrays of a result that lie there; returns the path.

    Raises:
        ValueError: other arrays lie there.
    """
    path, record = out / f"{saved.name}{suffix}", out / f"{saved.name}.json"
    with storage.locked(out):
        storage.settle(out, saved.name)
        if json.loads(record.read_bytes())["arrays_sha256"] != saved.record["arrays_sha256"]:
            raise ValueError(
                f"{path} must go with {record.name}, which holds another result since; load it anew"
            )
        storage.replace_whole(path, data)
    return path


def save_record(saved: Saved, out: Path) -> None:
    """Write `<out>/<name>.json` alone, beside the arrays that are there."""
    save_beside(saved, out, ".json", _dumps(saved.record).encode())


def load(out: str | Path, name: str) -> Saved:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: nothing was saved there under this name.
        ValueError: what lies there is broken or something else.
    """
    out = Path(out)
    path = out / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in out.glob("*.json"))) or "no result at all"
        raise FileNotFoundError(errno.ENOENT, f"No result has this name, there is {there}", str(path))
    try:
        with storage.locked(out):
            with suppress(OSError):  # a folder that can be read only is taken as it is
                storage.settle(out, name)
            data = path.read_bytes()
            record = json.loads(data)
            _require_record(record)
            arrays = storage.unpack(storage.locate(out, name, data, ".npz"))
        _require_arrays(record, arrays)
        return Saved(arrays, record)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # whatever a file may hold
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} and its .npz are no result that can be read: {reason}") from error


_RECORD = ("name", "file", "variant", "preset", "seed", "flags", "x64", "config", "claims", "dims", "seconds")


def _require_record(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"the record must be a JSON object, got a {type(record).__name__}")
    if missing := {*_RECORD, "arrays_sha256", "versions"} - set(record):
        raise ValueError(f"the record lacks {', '.join(sorted(missing))}; another program wrote it")
    for claim in record["claims"]:
        from_json(claim)


def _require_arrays(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    if storage.digest(arrays) != record["arrays_sha256"]:
        raise ValueError("the arrays are not those that the record was written with")
    if {path: len(names) for path, names in record["dims"].items()} != {p: a.ndim for p, a in arrays.items()}:
        raise ValueError("the record's dims are not those of the arrays")


def to_xarray(result: Any, dims: str = ""):
    """A result, or a `Trajectory`, as an `xarray.Dataset`; needs the `xarray` extra.

    Every array has the names of its dimensions. An array with one dimension of its own name is a coordinate.
    Slashes in paths become dots, which netCDF can keep. What is known of a result is in the attributes, one
    by one: `seed`, `config.tokens`, `versions.jax`, `claims.<name>` with the verdict, and so on.

    Args:
        result: a `Saved`, or a `dynamics.flow.Trajectory`.
        dims: names for the dimensions of a trajectory's states, such as "time token".

    Example:
        >>> from dynamics.flow import Trajectory
        >>> path = Trajectory(np.arange(3.0), {"V": np.ones((3, 2))}, np.asarray(True))
        >>> to_xarray(path, "time token")["V"].dims
        ('time', 'token')
    """
    import xarray

    if isinstance(result, Saved):
        variables = {
            path.replace("/", "."): (result.record["dims"][path], array)
            for path, array in result.arrays.items()
        }
        return xarray.Dataset(variables, attrs=dict(_attributes(result.record)))
    return xarray.Dataset(_of_trajectory(result, tuple(dims.split())))


def _of_trajectory(path: Any, dims: tuple[str, ...]) -> dict[str, Any]:
    import jax

    lanes = tuple(f"lane_{axis}" for axis in range(np.ndim(path.ts) - 1))
    variables: dict[str, Any] = {"time" if not lanes else "times": ((*lanes, "time"), np.asarray(path.ts))}
    variables["ok"] = (lanes, np.asarray(path.ok))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(path.ys):
        name = jax.tree_util.keystr(keys, simple=True, separator=".") or "y"
        inner = [f"{name}_{axis}" for axis in range(np.ndim(leaf) - len(lanes) - 1)]
        variables[name] = (dims or (*lanes, "time", *inner), np.asarray(leaf))
    return variables


def _attributes(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, texts and lists of them, by joined path: what netCDF keeps as attributes."""
    for key, value in record.items():
        if key == "claims":
            for claim in value:
                yield f"claims.{claim['id'].split('/')[-1]}", claim["verdict"]
        elif isinstance(value, Mapping) and key != "dims":
            yield from _attributes(value, f"{above}{key}.")
        elif key != "dims":
            flat = value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
            numbers = isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value)
            yield f"{above}{key}", flat if flat is not None else value if numbers else str(value)


def _dumps(record: Any) -> str:
    return json.dumps(_strict(record), indent=1, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """Plain JSON: paths and numbers that JSON lacks become strings, which `float` reads back."""
    if isinstance(value, Mapping):
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
