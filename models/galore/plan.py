"""What the options say about each leaf: which axes are its matrices, how they are projected, and when."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .checks import require_axes
from .options import OF_LEAVES, Options
from .paths import Absent, Parameter, parameters, require_distinct, teller
from .projection import Layout

Axes = tuple[tuple[int, ...], tuple[int, ...]]


def plan(tree: Any, options: Options) -> tuple[list[Layout | None], list[Any]]:
    """Return layouts and scales of all leaves in the order of the tree, None for leaves left alone."""
    every = parameters(tree)
    specs = axes_of(every, options)
    tells = {argument: _teller(argument, options, every) for argument in OF_LEAVES}
    count = sum(spec is not None for spec in specs)
    layouts: list[Layout | None] = []
    scales: list[Any] = []
    place = 0
    for parameter, spec in zip(every, specs, strict=True):
        if isinstance(parameter.leaf, Absent):
            place += spec is not None
            continue
        if spec is None:
            layouts.append(None)
            scales.append(None)
            continue
        layout = _layout(parameter, spec, tells)
        phase = layout.gap * place // count if options.stagger else 0
        layouts.append(layout._replace(phase=phase))
        scales.append(tells["scale"](parameter))
        place += 1
    return layouts, scales


def axes_of(every: list[Parameter], options: Options) -> list[Axes | None]:
    """Return for each parameter the axes of its rows and columns, None where it is not projected."""
    if callable(options.matrix_axes):
        require_distinct("matrix_axes", every)
    return [
        _axes(parameter, options.matrix_axes) if want else None
        for parameter, want in zip(every, options.wanted(every), strict=True)
    ]


def _layout(parameter: Parameter, spec: Axes, tells: dict[str, Callable[[Parameter], Any]]) -> Layout:
    leaf = parameter.leaf
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"params must be real floating arrays, got {leaf.dtype} for {parameter.name!r}")
    gap, rank, projection = (tells[argument](parameter) for argument in ("update_gap", "rank", "projection"))
    layout = Layout(leaf.shape, *spec, rank, True, True, gap, 0)
    left, right = _sides(layout.m, layout.n, projection)
    return layout._replace(rank=min(rank, layout.m, layout.n), left=left, right=right)


def _sides(m: int, n: int, projection: str) -> tuple[bool, bool]:
    shorter_left = m <= n
    left = {"std": shorter_left, "reverse_std": not shorter_left, "left": True, "right": False, "full": True}
    return left[projection], projection == "full" or not left[projection]


def _teller(argument: str, options: Options, every: list[Parameter]) -> Callable[[Parameter], Any]:
    """Return the function that tells the value of an option for one leaf, checked."""
    tell = teller(argument, getattr(options, argument), every)

    def checked(parameter: Parameter) -> Any:
        value = tell(parameter)
        if value is None:
            raise ValueError(
                f"{argument} must have a value for every projected leaf, got none for {parameter.name!r}"
            )
        return OF_LEAVES[argument](argument, value)

    return checked


def _axes(parameter: Parameter, matrix_axes: Any) -> Axes | None:
    """Return axes of rows and of columns, not negative; None for a leaf that is not projected."""
    _, name, leaf = parameter
    if matrix_axes is None:
        spec = (0, 1) if leaf.ndim == 2 else None
    elif callable(matrix_axes):
        spec = matrix_axes(name, leaf)
    else:
        spec = matrix_axes if leaf.ndim >= 2 else None
    if spec is None or math.prod(leaf.shape) == 0:
        return None
    rows, columns = require_axes(spec)
    if not all(-leaf.ndim <= axis < leaf.ndim for axis in rows + columns):
        raise ValueError(f"matrix_axes must be axes of {name!r} of shape {leaf.shape}, got {spec!r}")
    rows, columns = (tuple(axis % leaf.ndim for axis in axes) for axes in (rows, columns))
    if len(set(rows + columns)) < len(rows + columns):
        raise ValueError(f"matrix_axes must name each axis of {name!r} at most once, got {spec!r}")
    return rows, columns
