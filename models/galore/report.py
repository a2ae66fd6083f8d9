"""What `galore` does with each parameter, told before training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .optimizer import labels_of, whole_optimizer
from .options import GaloreOptions
from .paths import absent, parameters
from .plan import plan
from .projection import Layout


class Row(NamedTuple):
    """What is done with one parameter.

    Attributes:
        path: its keys, joined with "/".
        shape: its shape.
        layout: how it is projected, None where it is left to Adam.
        hidden: whether it is a hidden matrix: labelled "galore", and of two axes or more.
        state_bytes: bytes of the optimizer's state.
        adam_bytes: bytes of the moments of Adam.
    """

    path: str
    shape: tuple[int, ...]
    layout: Layout | None
    hidden: bool
    state_bytes: int
    adam_bytes: int


class Report(NamedTuple):
    """What `galore` does with all parameters; printed, it is a table.

    Attributes:
        rows: the parameters in the order of the tree.
        state_bytes: bytes of the whole state.
        adam_bytes: bytes of the whole state of Adam.
    """

    rows: tuple[Row, ...]
    state_bytes: int
    adam_bytes: int

    @property
    def hidden(self) -> tuple[Row, ...]:
        """Return the rows of hidden matrices."""
        return tuple(row for row in self.rows if row.hidden)

    @property
    def projected(self) -> tuple[Row, ...]:
        """Return the rows of what is projected."""
        return tuple(row for row in self.rows if row.layout is not None)

    def __str__(self) -> str:
        """Return a table, in which parameters that differ by a number in their path share a line."""
        alike: dict[Any, list[Row]] = {}
        for row in self.rows:
            alike.setdefault((re.sub(r"\d+", "*", row.path), _treatment(row)), []).append(row)
        lines: list[tuple[str, ...]] = [("parameter", "shape", "matrices", "rank", "state", "Adam")]
        for (pattern, treatment), rows in alike.items():
            path = rows[0].path if len(rows) == 1 else f"{pattern} ({len(rows)})"
            sums = sum(row.state_bytes for row in rows), sum(row.adam_bytes for row in rows)
            lines.append((path, *treatment, *(f"{total:,}" for total in sums)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines]
        hidden, projected = (sum(math.prod(row.shape) for row in of) for of in (self.hidden, self.projected))
        share = f"{projected / hidden:.0%}" if hidden else "none"
        counts = f"{len(self.projected)} of {len(self.hidden)} hidden matrices"
        told = (
            f"{counts} are projected, {share} of their numbers.",
            f"The state takes {self.state_bytes:,} bytes, that of Adam {self.adam_bytes:,}.",
        )
        return "\n".join([*table, *told])


def report(params: Any, rank: Any, **options: Any) -> Report:
    """Tell what `galore(learning_rate, rank, **options)` does with each parameter; nothing is allocated.

    Args:
        params: parameters, or their shapes (`jax.ShapeDtypeStruct`).
        rank: as for `galore`.
        **options: its other options, but for the learning rate.

    Returns:
        The report, to be printed: which matrices each parameter has (of rows and columns, and how many), to
        which rank they are projected and on which side, and what its state takes beside that of Adam.

    Raises:
        ValueError: as `galore` and its `init`.

    Example:
        >>> from models.galore import flax_axes
        >>> shapes = {"kernel": (64, 2, 32), "bias": (2, 32)}
        >>> query = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        >>> print(report({"query": query}, 8, matrix_axes=flax_axes))
        parameter     shape        matrices  rank    state  Adam
        query/bias    (2, 32)      Adam              512    512
        query/kernel  (64, 2, 32)  64 x 64   8 left  6,144  32,768
        1 of 1 hidden matrices are projected, 100% of their numbers.
        The state takes 6,668 bytes, that of Adam 33,284.
    """
    chosen = GaloreOptions(0.0, rank, **options)
    leaves, treedef = jax.tree.flatten(params)
    every = parameters(params)
    labels = jax.tree.leaves(labels_of(chosen, params))
    kept = [
        leaf if label == "galore" else optax.MaskedNode() for leaf, label in zip(leaves, labels, strict=True)
    ]
    layouts = iter(plan(treedef.unflatten(kept), chosen)[0])
    init = whole_optimizer(chosen).init
    without = _bytes(init, absent(params))
    # A leaf's own bytes follow from these: a model has few that differ.
    sizes: dict[Any, int] = {}
    rows = []
    for place, (parameter, label, want) in enumerate(zip(every, labels, chosen.wanted(every), strict=True)):
        shape, dtype = jnp.shape(parameter.leaf), jnp.result_type(parameter.leaf)
        layout = next(layouts) if label == "galore" else None
        if (kind := (shape, dtype, layout)) not in sizes:
            alone = [leaf if i == place else absent(leaf) for i, leaf in enumerate(leaves)]
            sizes[kind] = _bytes(init, treedef.unflatten(alone)) - without
        hidden = want and len(shape) >= 2
        moments = 2 * math.prod(shape) * dtype.itemsize
        rows.append(Row(parameter.name, shape, layout, hidden, sizes[kind], moments))
    return Report(tuple(rows), _bytes(init, params), _bytes(optax.adam(0.0).init, params))


def _bytes(init: Callable[[Any], Any], params: Any) -> int:
    state = jax.eval_shape(init, params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _treatment(row: Row) -> tuple[str, str, str]:
    """Return the shape of a parameter, its matrices, and their rank with the side that is projected."""
    if (layout := row.layout) is None:
        return str(row.shape), "Adam", ""
    count = f"{math.prod(layout.batch_shape)} of " if layout.batch_shape else ""
    sides = " and ".join(side for side in ("left", "right") if getattr(layout, side))
    return str(row.shape), f"{count}{layout.m} x {layout.n}", f"{layout.rank} {sides}"
