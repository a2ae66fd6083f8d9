"""Comparison: how far a trained trajectory is from a theory's, and at which rate the gap closes.

With it go the batches that let one compiled program serve several runs, told apart by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dynamics.flow import ArrayLike, Trajectory, is_traced
from sims.claims import SECOND_ORDER, Check, at_most, slope

# How simulations solve inside of compiled programs: they look at `ok` outside, since a program that can raise
# is not kept in the cache, and differentiate nothing in reverse.
SOLVE: dict[str, Any] = {"throw": False, "adjoint": diffrax.ForwardMode()}
WRONG_FACTOR = (
    1.02  # of a gradient that is wrong on purpose, which `first_order` must tell from the right one
)


@dataclass(frozen=True)
class Comparison:
    """Errors between two trajectories at every time; all arrays have shape (T,).

    All four are kept because each hides what another shows: a correlation of 0.99 goes together with a
    seven-fold error of amplitude.

    Attributes:
        ts: the common times.
        relative_l2: |trained - theory| / |theory|, Euclidean norms over all coordinates.
        max_abs: largest absolute difference of a coordinate.
        correlation: Pearson correlation over the coordinates; NaN where either does not vary.
        amplitude_ratio: |trained| / |theory|.
        spacing: distance of two neighbouring numbers at the largest coordinate, in the coarser of the two
            precisions: what `convergence_order` derives the noise of rounding from.
    """

    ts: np.ndarray
    relative_l2: np.ndarray
    max_abs: np.ndarray
    correlation: np.ndarray
    amplitude_ratio: np.ndarray
    spacing: float = 0.0

    @property
    def gap(self) -> float:
        """The largest absolute difference over all times and coordinates."""
        return float(np.max(self.max_abs))

    def __str__(self) -> str:
        return (
            f"largest gap {self.gap:.3g}; at the end: relative L2 {self.relative_l2[-1]:.3g}, "
            f"correlation {self.correlation[-1]:.6f}, amplitude ratio {self.amplitude_ratio[-1]:.6f}"
        )


def compare(theory: Trajectory, trained: Trajectory) -> Comparison:
    """Compare two trajectories with the same times and the same coordinates.

    Coordinates are matched by name: fields of a record and keys of a dict go together, whatever their order.

    Args:
        theory: what was predicted.
        trained: what a network did, brought into the theory's coordinates by `observe`.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: the times, or the names or shapes of the coordinates differ, or a trajectory is not ok.

    Example:
        >>> import jax.numpy as jnp
        >>> path = Trajectory(jnp.arange(3.0), jnp.ones((3, 2)), jnp.asarray(True))
        >>> compare(path, path).gap
        0.0
    """
    for name, path in (("theory", theory), ("trained", trained)):
        if not bool(np.all(path.ok)):
            raise ValueError(f"{name} must be ok, got a trajectory that failed")
    ts = np.asarray(theory.ts)
    other = np.asarray(trained.ts)
    if ts.ndim != 1 or ts.shape != other.shape or not np.allclose(ts, other, rtol=1e-5, atol=1e-12):
        raise ValueError(
            f"trained must have the times of theory, got {other.shape} times and {ts.shape}; "
            "integrate the theory at trained.ts"
        )
    leaves, others = _coordinates(theory.ys), _coordinates(trained.ys)
    if not _same_coordinates(leaves, others, jax.tree.structure(theory.ys) == jax.tree.structure(trained.ys)):
        raise ValueError(
            "trained must have the coordinates of theory, by name and shape, "
            f"got {_shown(others)} and {_shown(leaves)}"
        )
    a, b = _side_by_side(leaves.values()), _side_by_side(others[name] for name in leaves)
    with np.errstate(divide="ignore", invalid="ignore"):
        norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        da, db = _centred(a), _centred(b)
        correlation = np.sum(da * db, axis=1) / (np.linalg.norm(da, axis=1) * np.linalg.norm(db, axis=1))
        relative, amplitude = np.linalg.norm(b - a, axis=1) / norm_a, norm_b / norm_a
    epsilon = max(float(jnp.finfo(leaf.dtype).eps) for leaf in (*leaves.values(), *others.values()))
    spacing = epsilon * max(largest(a), largest(b))
    return Comparison(ts, relative, np.max(np.abs(b - a), axis=1), correlation, amplitude, spacing)


def _coordinates(ys: PyTree) -> dict[tuple[Any, ...], np.ndarray]:
    """The leaves by path: names of fields, keys and positions, whatever the containers."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(ys):
        leaf = np.asarray(leaf)
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        found[tuple(_name(key) for key in path)] = leaf if inexact else leaf.astype(float)
    return found


def _name(key: Any) -> Any:
    """What a container calls one of its parts; the key itself where the parts have no names."""
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
        return key
    return next(getattr(key, word) for word in ("key", "name", "idx") if hasattr(key, word))


def _same_coordinates(one: Mapping[Any, np.ndarray], other: Mapping[Any, np.ndarray], alike: bool) -> bool:
    """Whether names and shapes agree; parts without names agree only in containers that are alike."""
    nameless = any(isinstance(key, jax.tree_util.FlattenedIndexKey) for path in one for key in path)
    shapes, others = ({path: leaf.shape for path, leaf in tree.items()} for tree in (one, other))
    return shapes == others and (alike or not nameless)


def _shown(coordinates: Mapping[tuple[Any, ...], np.ndarray]) -> str:
    named = (f"{'.'.join(map(str, path)) or 'array'}: {leaf.shape}" for path, leaf in coordinates.items())
    return "{" + ", ".join(named) + "}"


def _side_by_side(leaves: Iterable[np.ndarray]) -> np.ndarray:
    """All coordinates: shape (T, number of coordinates)."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _centred(x: np.ndarray) -> np.ndarray:
    # The mean of equal numbers is rounded; what does not vary must give exact zeros.
    return np.where(np.ptp(x, axis=1, keepdims=True) > 0, x - x.mean(axis=1, keepdims=True), 0)


def lane(paths: Trajectory, index: int) -> Trajectory:
    """One trajectory of a batch, such as that of one learning rate."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], paths)


def lane_gaps(theory: Trajectory, trained: Trajectory) -> np.ndarray:
    """The `gap` of every trajectory of a batch to one theory, shape (L,)."""
    return np.array([compare(theory, lane(trained, index)).gap for index in range(len(trained.ok))])


def named_lanes(f: Callable[[Any], PyTree], /, **lanes: PyTree) -> dict[str, Any]:
    """`f` of several arguments in one program, a `vmap`, with its results by the arguments' names.

    Args:
        f: function of one pytree.
        **lanes: the arguments, all of the same structure and shapes.

    Example:
        >>> {name: float(value) for name, value in named_lanes(jnp.square, right=1.0, wrong=3.0).items()}
        {'right': 1.0, 'wrong': 9.0}
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *lanes.values())
    results = jax.vmap(f)(stacked)
    if not is_traced(results):  # slices outside of a program would be small programs of their own
        results = jax.device_get(results)
    return {name: jax.tree.map(lambda leaf, i=i: leaf[i], results) for i, name in enumerate(lanes)}


def named_groups(f: Callable[[Any], PyTree], groups: Mapping[str, Sequence[PyTree]]) -> dict[str, Any]:
    """`f` of the lanes of several groups, stacked into one batch, with its results by the groups' names.

    Args:
        f: function of a batch, such as a compiled `vmap`; what it gives has the lanes in front.
        groups: lanes by group, all of the same structure and shapes.

    Example:
        >>> found = named_groups(jnp.square, {"odd": [1.0, 3.0], "even": [2.0]})
        >>> {name: values.tolist() for name, values in found.items()}
        {'odd': [1.0, 9.0], 'even': [4.0]}
    """
    lanes = [lane for group in groups.values() for lane in group]
    results = jax.device_get(f(jax.tree.map(lambda *leaves: np.stack(leaves), *lanes)))
    ends = np.cumsum([len(group) for group in groups.values()])
    parts = {name: slice(end - len(groups[name]), end) for name, end in zip(groups, ends, strict=True)}
    return {name: jax.tree.map(lambda leaf, part=part: leaf[part], results) for name, part in parts.items()}


def in_calls(function: Callable[..., Any], lanes: Any, size: int) -> Any:
    """A function of a batch by calls of one size, so that it is compiled once."""
    count = len(jax.tree.leaves(lanes)[0])
    lanes = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], -count % size, axis=0)]), lanes)
    starts = range(0, count, size)
    parts = [jax.device_get(function(jax.tree.map(lambda x, i=i: x[i : i + size], lanes))) for i in starts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def right_and_wrong(flow: Callable[[Any], PyTree], factor: float = WRONG_FACTOR) -> dict[str, Any]:
    """A flow of the gradient as it is, and of one that is `factor` times too large, or their times.

    Two calls of a solve share its program, which compiles more quickly than one of both side by side.

    Args:
        flow: function of the factor of the gradient, outside of compiled functions.
        factor: the factor that is wrong.

    Returns:
        What the flow gives, as "right" and "wrong": what `first_order` tells apart.
    """
    return jax.device_get({"right": flow(1.0), "wrong": flow(factor)})


def require_ok(what: str, *paths: Trajectory) -> None:
    """Raise `RuntimeError` unless all of these trajectories came to their end."""
    if not all(bool(np.all(path.ok)) for path in paths):
        raise RuntimeError(f"{what}: the solver gave up, or the numbers are not finite")


def largest(values: ArrayLike) -> float:
    """The largest absolute value, NaN where there is one."""
    return float(np.max(np.abs(np.asarray(values))))


class Fit(NamedTuple):
    """A straight-line fit: slope with its standard error, intercept and R^2."""

    slope: float
    stderr: float
    intercept: float
    r2: float


def fit_line(x: ArrayLike, y: ArrayLike) -> Fit:
    """Least-squares line through the points (x, y).

    Example:
        >>> fit_line([0, 1, 2], [1, 3, 5]).slope
        2.0
    """
    from scipy.stats import linregress

    line: Any = linregress(np.asarray(x, float), np.asarray(y, float))
    return Fit(float(line.slope), float(line.stderr), float(line.intercept), float(line.rvalue**2))


# Rounding an update is off by at most half a spacing of the numbers. Over a run these errors cancel but for a
# small part: on seven problems in float32, 800 to 200,000 updates, no more than a 45th of one spacing per
# update was left. A theory that is wrong by more than this share is never excused.
_ROUNDING = 1 / 40


def convergence_order(
    scales: ArrayLike, errors: ArrayLike | Sequence[Comparison], *, floor: ArrayLike | None = None
) -> Fit:
    """Order at which errors fall with a scale (a learning rate, 1/T, ...): the log-log slope.

    Gradient descent follows its flow at order one in the learning rate. A theory with a wrong factor
    leaves errors that do not fall, and an order near zero: the strongest single test of a pair.

    At small scales rounding leaves errors that do not fall either. Where `floor` is given, errors at or below
    it are left out. Where comparisons are given, whose scales are then taken for learning rates, their floor
    is derived: a part of the spacing of the numbers in the coarser precision, per update. It bounds a noise
    that can be much smaller, so that errors below it are left out only from where they fall less than three
    quarters as fast as those above (as the scale, below a single one). What is left out is told in a warning.

    Args:
        scales: positive scales, shape (L,), at least two.
        errors: positive errors, shape (L,), or L results of `compare`, whose gaps are the errors.
        floor: the error that noise alone leaves: one number, or one per scale, shape (L,).

    Returns:
        A `Fit` whose slope is the order, NaN where fewer than two errors lie above the floor.

    Raises:
        ValueError: fewer than two points, a scale or error that is infinite, zero or negative, or a floor
            that is negative or does not fit. NaN is handed on.

    Example:
        >>> round(convergence_order([0.1, 0.01], [2e-3, 2e-4]).slope, 9)
        1.0
    """
    x = np.asarray(scales, float)
    listed = errors if isinstance(errors, (list, tuple)) else []
    compared = [error for error in listed if isinstance(error, Comparison)]
    y = np.array([error.gap for error in compared]) if compared else np.asarray(errors, float)
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise ValueError(f"scales and errors must have one shape (L,), L >= 2, got {x.shape} and {y.shape}")
    for name, values in (("scales", x), ("errors", y)):
        if np.any(np.isinf(values) | (values <= 0)):
            raise ValueError(f"{name} must be positive and finite, got {values}")
    if floor is not None and (np.shape(floor) not in ((), x.shape) or not np.all(np.asarray(floor) >= 0)):
        raise ValueError(f"floor must be one number >= 0, or one per scale, got {floor}")
    if np.any(np.isnan(x + y)):
        return Fit(np.nan, np.nan, np.nan, np.nan)
    kept = np.ones(x.shape, bool)
    if floor is not None:
        kept = y > np.asarray(floor, float)
    elif compared:
        updates = np.array([np.ptp(error.ts) for error in compared]) / x
        kept = _above_noise(x, y, _ROUNDING * np.array([error.spacing for error in compared]) * updates)
    if not kept.all():
        left = f"scales {x[~kept]}, whose errors {y[~kept]} lie at the noise floor"
        warnings.warn(f"convergence_order leaves out the {left}", stacklevel=2)
    if kept.sum() < 2:
        return Fit(np.nan, np.nan, np.nan, np.nan)
    return fit_line(np.log(x[kept]), np.log(y[kept]))


def _above_noise(scales: np.ndarray, errors: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Which errors, from the largest scale on, are too large for noise or fall as those before them do."""
    kept = np.ones(scales.shape, bool)
    x, y, order = np.log(scales), np.log(errors), np.argsort(-scales)

    def falls(one, other):
        with np.errstate(divide="ignore", invalid="ignore"):
            return (y[one] - y[other]) / (x[one] - x[other])

    for at in range(1, len(order)):
        here, before = order[at], order[at - 1]
        expected = falls(order[0], before) if at > 1 else 1.0
        if errors[here] <= floor[here] and falls(before, here) < 0.75 * expected:
            kept[order[at:]] = False
            break
    return kept


def orders(scales: ArrayLike, errors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The order in the scale of several errors, by their names."""
    return {name: convergence_order(scales, error).slope for name, error in errors.items()}


def percent(factor: float) -> str:
    """How far a factor is from one, in words.

    Example:
        >>> percent(1.02)
        '2 %'
    """
    return f"{100 * abs(factor - 1):.3g} %"


def first_order(
    rates: ArrayLike,
    gaps: Mapping[str, np.ndarray],
    *,
    wrong: str = f"order with the gradient taken {percent(WRONG_FACTOR)} too large",
) -> tuple[Check, Check]:
    """The checks that training approaches a flow at first order in the learning rate.

    Args:
        rates: learning rates, shape (L,).
        gaps: "right", the gaps of training to the flow, and "wrong", to a flow that is wrong by a factor, as
            `right_and_wrong` gives it; shape (L,) each.
        wrong: label of the second check.
    """
    order = orders(rates, gaps)
    stays = "a gap that does not close has order 0, but for the largest rates"
    return (
        slope("order of the gap in the learning rate", order["right"], 1.0, 0.1, why=SECOND_ORDER),
        at_most(wrong, order["wrong"], 0.6, why=stays),
    )
