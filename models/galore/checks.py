"""Checks of arguments: each returns the value, or says in one line what it must be."""

from __future__ import annotations

import math
import operator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
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


def require_number(argument: str, value: Any, *, below: float = math.inf) -> Any:
    """Refuse what is not a finite number of at least 0, and less than `below`.

    A traced number is NaN where it is bad, and so is what is computed from it.
    """
    if isinstance(value, Tracer) and value.ndim == 0:
        return jnp.where((value >= 0) & (value < below), value, jnp.nan)
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{argument} must be a number without a mask, got a masked array")
    try:
        number = np.asarray(value)  # a jnp operation would be traced under somebody's `jit`
        good = number.ndim == 0 and number.dtype != bool and math.isfinite(number) and 0 <= number < below
    except (TypeError, ValueError):
        good = False
    if not good:
        wanted = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"{argument} must be {wanted}, got {value!r}")
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


def require_real(tree: Any) -> None:
    """Refuse parameters or gradients that are not real floating numbers."""
    for leaf in jax.tree.leaves(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"params must be real floating arrays, got {dtype}")
