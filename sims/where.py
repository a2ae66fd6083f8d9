"""`python -m sims where`: what theory says of a data matrix, in words or as JSON, and as a figure."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dynamics.collapse import Where, where
from sims import plotting
from sims.execution import open_console

MODELS = {
    "vae": "linear variational autoencoder, decoder noise and prior of variance one",
    "supervised": "two-layer linear network, L2 regularization gamma of both layers",
    "ssl": "linear encoder under InfoNCE, augmentations of one variance",
}
_SHOWN = 20  # modes that are printed; JSON has all


@dataclass(frozen=True)
class WhereOptions:
    """Where a data matrix stands in the phase diagram of collapse: thresholds, and what survives."""

    kind: Literal["vae", "supervised", "ssl"]
    """The model that the data are for."""
    data: Path
    """File with a row per sample, npy, npz with one array, or csv; images are flattened."""
    target: Path | None = None
    """File with what is predicted, a row per sample; classes as one column each."""
    value: float | None = None
    """Present beta, gamma or variance of the augmentations. Default: thresholds alone."""
    attraction: float = 1.0
    """Weight of the attraction in InfoNCE; at 1, that of the usual loss, nothing collapses."""
    out: Path = Path("figures")
    """Folder for the figure, where-<kind>.png."""
    format: Literal["text", "json"] = "text"
    """How the answer is printed."""


def report(options: WhereOptions) -> None:
    """Print the answer, and draw it."""
    x = read(options.data)
    target = None if options.target is None else read(options.target)
    if target is not None and len(target) != len(x):
        raise ValueError(f"target must have the {len(x)} rows of data, got {len(target)} in {options.target}")
    try:
        found = where(options.kind, x, target, value=options.value, attraction=options.attraction)
    except ValueError as error:
        name = str(error).split()[0]
        file = {"x": options.data, "target": options.target}.get(name)
        raise ValueError(f"{file}: {error}" if file else str(error)) from None
    options.out.mkdir(parents=True, exist_ok=True)
    with plotting.style():
        drawn = options.out / f"where-{options.kind}.png"
        figure(found).savefig(drawn)
    if options.format == "json":
        print(json.dumps({**_finite(asdict(found)), "figure": str(drawn)}, indent=1, allow_nan=False))
        return
    print(f"{options.data.name}: {x.shape[0]} rows, {x.shape[1]} columns; {MODELS[options.kind]}")
    print(summary(found))
    if found.thresholds and not math.isinf(found.thresholds[0]):
        open_console().print(_table(found))
    for note in found.notes:
        print(f"note: {note}")
    print(f"figure: {drawn}")


def _finite(entry: Any) -> Any:
    """The same with null for what is infinite, which is no JSON: thresholds that are never reached."""
    if isinstance(entry, dict):
        return {name: _finite(value) for name, value in entry.items()}
    if isinstance(entry, (list, tuple)):
        return [_finite(value) for value in entry]
    return None if isinstance(entry, float) and not math.isfinite(entry) else entry


def read(path: Path) -> np.ndarray:
    """The numbers of a file, (rows, columns).

    Raises:
        ValueError: the file cannot be read, or holds something else than numbers.
    """
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} must be a file .npy, .npz or .csv")
    try:
        array = readers[path.suffix.lower()](path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold real numbers, got dtype {array.dtype}")
    if array.ndim == 0 or not array.size:
        raise ValueError(f"{path} must hold rows of numbers, got shape {array.shape}")
    return array.reshape(len(array), -1).astype(np.float64)


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{path} must be an array that NumPy saved, without objects") from None


def _read_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            if len(names) == 1:
                return arrays[names[0]]
    except (ValueError, EOFError, AttributeError):
        raise ValueError(f"{path} must be arrays that NumPy saved, without objects") from None
    raise ValueError(f"{path} must hold one array, got {', '.join(names) or 'none'}")


def _read_csv(path: Path) -> np.ndarray:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            lines = [row for row in csv.reader(file) if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be a text file with commas: {error}") from None
    names = lines.pop(0) if lines and not any(map(_is_number, lines[0])) else []
    widths = {len(row) for row in lines}
    if len(widths) != 1:
        raise ValueError(f"{path} must have rows of one length, got {sorted(widths) or 'no row'}")
    for row in lines:
        for index, cell in enumerate(row):
            if not _is_number(cell):
                column = names[index] if index < len(names) else str(index + 1)
                raise ValueError(f"{path} must hold numbers alone, got {cell!r} in column {column}")
    return np.array([[float(cell) for cell in row] for row in lines])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def summary(found: Where) -> str:
    """The answer in one sentence."""
    modes = len(found.thresholds)
    if not modes:
        return "the data have no modes: no column varies, or none varies with the target"
    if found.value is None:
        if math.isinf(found.thresholds[0]):
            return f"{modes} modes, none of which ever collapses"
        first, last = found.thresholds[-1], found.thresholds[0]
        if modes == 1:
            return f"one mode, which collapses at {found.parameter} = {last:.4g}"
        return f"{modes} modes collapse at values of {found.parameter} from {first:.4g} to {last:.4g}"
    text = f"{found.parameter} = {found.value:g}: {found.surviving} of {modes} modes survive"
    if found.distance is None:
        return f"{text}; nothing is left to collapse"
    if math.isinf(found.distance):
        return f"{text}; none of them ever collapses"
    return f"{text}; the next threshold is at {found.value + found.distance:.4g}, {found.distance:.4g} above"


def _table(found: Where) -> Table:
    table = Table(box=SIMPLE_HEAD)
    headings = ["mode", f"collapses at {found.parameter}"]
    headings += ["variance of mean", "sigma^2", "KL (nats)"] if found.units else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for index, threshold in enumerate(found.thresholds[:_SHOWN]):
        unit = found.units[index] if found.units else None
        numbers = [threshold, *((unit.variance, unit.sigma2, unit.kl) if unit else ())]
        table.add_row(str(index + 1), *(f"{number:.5g}" for number in numbers))
    if len(found.thresholds) > _SHOWN:
        table.caption = f"and {len(found.thresholds) - _SHOWN} more; --format json has all"
    return table


def figure(found: Where) -> Figure:
    """Thresholds mode by mode beside the present value; for an autoencoder the divergence of units too."""
    drawn, axes = plotting.new_figure(1, 2 if found.units else 1, width=4.6, height=3.4)
    thresholds = np.asarray(found.thresholds)
    modes = np.arange(1, len(thresholds) + 1)
    ax: Axes = axes[0, 0]
    shown = np.isfinite(thresholds)
    ax.semilogy(modes[shown], thresholds[shown], "o", ms=4, label="threshold")
    if found.value:
        ax.axhline(found.value, color="C3", label=f"value, {found.surviving} survive")
    legend = "" if not shown.any() else "lower left"
    plotting.finish(ax, "Where modes collapse", "mode", found.parameter, legend)
    if not shown.any():
        ax.text(0.5, 0.5, "nothing collapses", ha="center", transform=ax.transAxes)
    if found.units:
        units = found.units[: max(10, (found.surviving or 0) + 2)]
        divergences = [unit.kl if math.isfinite(unit.kl) else np.nan for unit in units]
        axes[0, 1].bar(modes[: len(units)], divergences, color="C0")
        plotting.finish(axes[0, 1], "Units at the value", "unit", "KL from the prior (nats)")
    return drawn
