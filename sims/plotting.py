"""Plotting: one style, and the few pieces that figures of several theories share.

Functions draw on an Axes and return it. Nothing here opens a window or keeps global state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import getp
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Theory lies over the trained curve as thin black dashes: where the two agree, both can be seen.
THEORY: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 3)), "linewidth": 1.1, "zorder": 5}
TRAINED: dict[str, Any] = {"linewidth": 2.4, "alpha": 0.85}
PRINTED: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.6}


@contextmanager
def style() -> Iterator[None]:
    """The project's matplotlib style, for the time of a `with` block."""
    with matplotlib.rc_context():
        matplotlib.style.use(Path(__file__).with_name("dynascope.mplstyle"))
        yield


def with_fixed_colors(figure: Figure) -> Figure:
    """The figure with the colors that its lines have in the style at hand.

    Matplotlib looks up "C0" when it draws, which may be in another style.
    """
    legends = [legend for ax in figure.axes if (legend := ax.get_legend())]
    for line in chain(*(each.get_lines() for each in (*figure.axes, *legends))):
        line.set_color(to_hex(line.get_color(), keep_alpha=True))
        for part in ("markerfacecolor", "markeredgecolor"):
            color = getp(line, part)
            if color != "none":
                line.set(**{part: to_hex(color, keep_alpha=True)})
    return figure


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 4.2, height: float = 3.4
) -> tuple[Figure, Any]:
    """A figure of panels, each `width` by `height` inches, and its array of Axes (rows, columns)."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(
    ax: Axes, title: str, xlabel: str, ylabel: str, legend: str | Mapping[str, Any] = "", **settings: Any
) -> Axes:
    """Set title, labels and other properties of a panel, and draw its legend: a place, or its options."""
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **settings)
    if legend:
        ax.legend(**({"loc": legend} if isinstance(legend, str) else legend))
    return ax


def gap_panel(
    ax: Axes,
    scales: np.ndarray,
    gaps: Mapping[str, np.ndarray],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Axes:
    """Draw gaps to a theory over a scale, such as the learning rate, beside the line of slope one.

    The first of the gaps is the one that the line goes through; the last is drawn in grey.
    """
    markers, last = ("o", "s", "D", "v"), len(gaps) - 1
    for index, (label, gap) in enumerate(gaps.items()):
        color = "0.45" if index == last > 1 else f"C{2 * index}"
        ax.loglog(scales, gap, markers[index], color=color, label=label)
    reference_slope(ax, scales, next(iter(gaps.values())), 1, "slope 1")
    powers_of_ten = np.floor(np.log10(max(scales))) - np.ceil(np.log10(min(scales))) + 1
    if max(scales) < 15 * min(scales) or powers_of_ten < 2:
        label_ticks(ax, scales, "{:.2g}")  # Matplotlib would write its own labels one over another
    make_room(ax, above=0.5)
    return finish(ax, title, xlabel, ylabel, "upper left")


def reference_slope(ax: Axes, x: np.ndarray, y: np.ndarray, slope: float, label: str) -> Axes:
    """Draw the power law of a given slope through the first of the points, on logarithmic axes."""
    ax.plot(x, y[0] * (np.asarray(x) / x[0]) ** slope, label=label, **THEORY)
    return ax


def make_room(ax: Axes, above: float = 0.0, below: float = 0.0) -> Axes:
    """Leave room for a legend above the data, or below, in heights of the panel so far."""
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        ax.set_ylim(low * (low / high) ** below, high * (high / low) ** above)
    else:
        ax.set_ylim(low - below * (high - low), high + above * (high - low))
    return ax


def label_ticks(ax: Axes, places: ArrayLike, labels: str | Sequence[str] = "{:g}") -> Axes:
    """Draw ticks of the horizontal axis at these places alone; labels may be the format of all."""
    places = np.asarray(places)
    ax.set_xticks(places, [labels.format(x) for x in places] if isinstance(labels, str) else labels)
    ax.set_xticks([], minor=True)
    return ax


def theory_and_trained(
    ax: Axes,
    ts: np.ndarray,
    theory: np.ndarray,
    trained: np.ndarray,
    labels: Sequence[str],
    name: str = "theory",
) -> Axes:
    """Draw coordinates over time, (T, n) each: trained in colour, theory, under its name, dashed over it."""
    for index, label in enumerate(labels):
        ax.plot(ts, trained[:, index], color=f"C{index}", label=label, **TRAINED)
    lines = ax.plot(ts, theory, **THEORY)
    lines[0].set_label(name)
    return ax
