"""Checks of arguments: each returns the value, or says in one line what it must be."""

from __future__ import annotations

import math
import operator
from typing import Any, get_args

import jax
from jax.core import Tracer


def require_count(argument: str, value: Any, least: int = 1) -> int:
    """Refuse what is not an integer of at least `least`."""
    try:
        count = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = least - 1
    if count < least:
        wanted = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{argument} must be {wanted}, got {value!r}")
    return count


def require_finite(argument: str, value: Any) -> Any:
    """Refuse what is not a finite number; a traced one is taken as it is."""
    if isinstance(value, Tracer) and value.ndim == 0:
        return value
    try:
        finite = math.isfinite(value)
    except TypeError:
        finite = False
    if not finite:
        raise ValueError(f"{argument} must be a finite number, got {value!r}")
    return value


def require_choice(argument: str, value: Any, choices: Any) -> Any:
    """Refuse what is not one of the names of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"{argument} must be one of {get_args(choices)}, got {value!r}")
    return value


def require_axes(spec: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Refuse what is not a pair of axes or tuples of axes; returned are two tuples of axes."""
    try:
        rows, columns = (
            tuple(map(operator.index, axes)) if isinstance(axes, (tuple, list)) else (operator.index(axes),)
            for axes in spec
        )
    except (TypeError, ValueError):
        rows = columns = ()
    if not rows or not columns:
        raise ValueError(
            f"matrix_axes must be a pair (rows, columns) of axes or tuples of axes, got {spec!r}"
        )
    return rows, columns


def is_number(option: Any) -> bool:
    """Tell whether an option is one number for all leaves: neither a function nor a pytree."""
    return not callable(option) and jax.tree_util.all_leaves([option])
