"""What the options say about each leaf: which axes are its matrices, how they are projected, and when."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .checks import is_number, require_axes
from .options import OF_LEAVES, Options
from .projection import Layout


def plan(tree: Any, options: Options) -> tuple[list[Layout | None], list[Any]]:
    """Return layouts and scales of all leaves in the order of the tree, None for leaves left alone."""
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    specs = [axes_of(name, leaf, options.matrix_axes) for name, leaf in named]
    count = sum(spec is not None for spec in specs)
    layouts: list[Layout | None] = []
    scales: list[Any] = []
    place = 0
    for (name, leaf), spec in zip(named, specs, strict=True):
        if spec is None:
            layouts.append(None)
            scales.append(None)
            continue
        layout = _layout(name, leaf, spec, options)
        phase = layout.gap * place // count if options.stagger else 0
        layouts.append(layout._replace(phase=phase))
        scales.append(_option("scale", options, name, leaf))
        place += 1
    return layouts, scales


def _layout(name: str, leaf: Any, spec: tuple[tuple[int, ...], tuple[int, ...]], options: Options) -> Layout:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"params must be real floating arrays, got {leaf.dtype} for {name!r}")
    gap = _option("update_gap", options, name, leaf)
    rank = _option("rank", options, name, leaf)
    layout = Layout(leaf.shape, *spec, rank, True, True, gap, 0)
    left, right = _sides(layout.m, layout.n, options.projection)
    return layout._replace(rank=min(rank, layout.m, layout.n), left=left, right=right)


def _sides(m: int, n: int, projection: str) -> tuple[bool, bool]:
    shorter_left = m <= n
    left = {"std": shorter_left, "reverse_std": not shorter_left, "left": True, "right": False, "full": True}
    return left[projection], projection == "full" or not left[projection]


def _option(argument: str, options: Options, name: str, leaf: Any) -> Any:
    """Return the value of an option for one leaf, checked."""
    value = option = getattr(options, argument)
    if callable(option):
        value = option(name, leaf)
    elif not is_number(option):
        values = by_name(option)
        if name not in values:
            raise ValueError(f"{argument} must have a number for every projected leaf, got none for {name!r}")
        value = values[name]
    return OF_LEAVES[argument](argument, value)


def path_name(path: Any) -> str:
    """Join the keys of a path with "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree under the names of their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def axes_of(name: str, leaf: Any, matrix_axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return axes of rows and of columns, not negative; None for a leaf that is not projected."""
    if matrix_axes is None:
        spec = (0, 1) if leaf.ndim == 2 else None
    elif callable(matrix_axes):
        spec = matrix_axes(name, leaf)
    else:
        spec = matrix_axes if leaf.ndim >= 2 else None
    if spec is None or leaf.size == 0:
        return None
    rows, columns = require_axes(spec)
    if not all(-leaf.ndim <= axis < leaf.ndim for axis in rows + columns):
        raise ValueError(f"matrix_axes must be axes of {name!r} of shape {leaf.shape}, got {spec!r}")
    rows, columns = (tuple(axis % leaf.ndim for axis in axes) for axes in (rows, columns))
    if len(set(rows + columns)) < len(rows + columns):
        raise ValueError(f"matrix_axes must name each axis of {name!r} at most once, got {spec!r}")
    return rows, columns
