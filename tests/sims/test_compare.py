"""Errors between trajectories in cases known by hand, and slopes of exact powers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.flow import Trajectory
from models.training import train
from sims.compare import (
    WRONG_FACTOR,
    compare,
    convergence_order,
    first_order,
    fit_line,
    lane,
    lane_gaps,
    largest,
    named_lanes,
    require_ok,
    right_and_wrong,
)

CURVATURES = np.array([0.5, 1.0])


def bowl(w):
    """A parabola around (1, -2)."""
    ends = jnp.asarray([1.0, -2.0], w.dtype)
    return jnp.sum(jnp.asarray(CURVATURES, w.dtype) * (w - ends) ** 2) / 2


TS = np.array([0.0, 1.0, 2.0])
YS = {"a": np.array([[3.0], [1.0], [2.0]]), "b": np.array([[4.0, 0.0], [2.0, 3.0], [2.0, 2.0]])}


class Weights(NamedTuple):
    Y: Any
    Z: Any


@jax.tree_util.register_pytree_node_class
class Nameless:
    def __init__(self, *parts):
        self.parts = parts

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


def path(ts, ys, ok: Any = True):
    return Trajectory(jnp.asarray(ts), jax.tree.map(jnp.asarray, ys), jnp.asarray(ok))


def test_equal_trajectories():
    comparison = compare(path(TS, YS), path(TS, YS))
    assert comparison.gap == 0
    np.testing.assert_array_equal(comparison.relative_l2, 0)
    np.testing.assert_array_equal(comparison.amplitude_ratio, 1)
    # Nothing varies over the coordinates at the last time.
    np.testing.assert_allclose(comparison.correlation, [1, 1, np.nan], rtol=1e-15)


def test_an_error_of_amplitude_leaves_the_correlation():
    comparison = compare(path(TS, YS), path(TS, jax.tree.map(lambda leaf: 7 * leaf, YS)))
    np.testing.assert_allclose(comparison.amplitude_ratio, 7, rtol=1e-14)
    np.testing.assert_allclose(comparison.relative_l2, 6, rtol=1e-14)
    np.testing.assert_allclose(comparison.correlation[:2], 1, rtol=1e-14)
    np.testing.assert_allclose(comparison.max_abs, [24, 18, 12], rtol=1e-14)
    assert comparison.gap == 24
    assert str(comparison) == (
        "largest gap 24; at the end: relative L2 6, correlation nan, amplitude ratio 7.000000"
    )


def test_numbers_by_hand():
    comparison = compare(path([0.0], np.array([[3.0, 4.0]])), path([0.0], np.array([[4.0, 3.0]])))
    np.testing.assert_allclose(comparison.relative_l2, np.sqrt(2) / 5)
    np.testing.assert_allclose(comparison.correlation, -1)
    np.testing.assert_allclose([comparison.max_abs, comparison.amplitude_ratio], 1)


def test_what_does_not_vary_has_no_correlation():
    """Also where the mean of equal numbers is not that number in floating point."""
    for constant in (0.1, 0.0, 7.3):
        flat, other = np.full((1, 3), constant), np.array([[1.0, 2.0, 4.0]])
        assert np.isnan(compare(path([0.0], flat), path([0.0], other)).correlation)
    zero = compare(path([0.0], np.zeros((1, 2))), path([0.0], np.ones((1, 2))))
    assert np.isinf(zero.relative_l2)
    assert np.isinf(zero.amplitude_ratio)


@pytest.mark.parametrize(
    ("theory", "trained", "message"),
    [
        (path(TS, YS, ok=False), path(TS, YS), r"^theory must be ok, got a trajectory that failed$"),
        (path(TS, YS), path(TS, YS, ok=[True, False]), r"^trained must be ok"),
        (
            path(TS, YS),
            path(TS[:2], YS),
            r"^trained must have the times of theory, got \(2,\) times",
        ),
        (path(TS, YS), path(1.0001 * TS, YS), r"^trained must have the times of theory"),
        (path(TS[None], YS), path(TS[None], YS), r"^trained must have the times of theory"),
        (
            path(TS, YS),
            path(TS, YS["b"]),
            r"^trained must have the coordinates of theory",
        ),
        (
            path(TS, YS),
            path(TS, {"a": YS["b"], "b": YS["a"]}),
            r"^trained must have the coordinates of theory, by name and shape, "
            r"got \{a: \(3, 2\), b: \(3, 1\)\} and \{a: \(3, 1\), b: \(3, 2\)\}$",
        ),
        (
            path(TS, Weights(TS, 2 * TS)),
            path(TS, {"decoder": TS, "attention": 2 * TS}),
            r"got \{attention: \(3,\), decoder: \(3,\)\} and \{Y: \(3,\), Z: \(3,\)\}$",
        ),
        (path(TS, Weights(TS, TS)), path(TS, (TS, TS)), r"got \{0: \(3,\), 1: \(3,\)\} and \{Y: "),
        (path(TS, {"a/b": TS}), path(TS, {"a": {"b": TS}}), r"got \{a\.b: \(3,\)\} and \{a/b: \(3,\)\}$"),
        (path(TS, {0: TS, 1: TS}), path(TS, Nameless(TS, TS)), r"^trained must have the coordinates"),
    ],
)
def test_trajectories_that_cannot_be_compared(theory, trained, message):
    with pytest.raises(ValueError, match=message):
        compare(theory, trained)


def test_coordinates_go_by_their_names_whatever_holds_them():
    theory, other = path(TS, Weights(TS, 2 * TS)), {"Z": 2 * TS, "Y": TS}
    for ys in (other, Weights(**other)):
        assert compare(theory, path(TS, ys)).gap == 0
    swapped = compare(theory, path(TS, {"Z": TS, "Y": 2 * TS}))
    np.testing.assert_array_equal(swapped.max_abs, TS)
    assert compare(path(TS, [TS, 3 * TS]), path(TS, (TS, 3 * TS))).gap == 0
    assert compare(path(TS, Nameless(TS, TS)), path(TS, Nameless(TS, TS + 1))).gap == 1


def test_a_recording_is_a_trajectory_that_knows_whether_it_is_finite():
    recorded = Trajectory(TS, YS)
    assert compare(path(TS, YS), recorded).gap == 0
    lost = {**YS, "a": np.array([[1.0], [np.inf], [2.0]])}
    assert not Trajectory(TS, lost).ok
    assert not Trajectory(np.array([0.0, np.nan]), TS[:2]).ok
    lanes = Trajectory(np.stack([TS, TS]), jax.tree.map(lambda one, other: np.stack([one, other]), YS, lost))
    np.testing.assert_array_equal(lanes.ok, [True, False])
    np.testing.assert_array_equal(jax.vmap(Trajectory)(lanes.ts, lanes.ys).ok, [True, False])
    assert jax.tree.map(lambda leaf: None, recorded).ok is None


def test_lanes():
    batch = path(np.stack([TS, TS]), jax.tree.map(lambda leaf: np.stack([leaf, leaf + 2]), YS), [True, True])
    np.testing.assert_allclose(lane_gaps(path(TS, YS), batch), [0, 2], rtol=1e-15)
    jax.tree.map(np.testing.assert_array_equal, lane(batch, 0), path(TS, YS))


def scaled(factor):
    return {"square": factor**2, "row": factor * jnp.arange(3.0)}


@pytest.mark.parametrize("call", [named_lanes, jax.jit(named_lanes, static_argnums=0)])
def test_named_lanes_are_separate_calls(call):
    lanes = call(scaled, first=2.0, second=-3.0)
    assert list(lanes) == ["first", "second"]
    for name, factor in (("first", 2.0), ("second", -3.0)):
        jax.tree.map(np.testing.assert_array_equal, lanes[name], scaled(factor))


def test_first_order_tells_a_right_flow_from_a_wrong_one():
    rates = np.array([0.1, 0.03, 0.01])
    lanes = right_and_wrong(lambda factor: factor * jnp.ones(()))
    assert (float(lanes["right"]), float(lanes["wrong"])) == (1.0, WRONG_FACTOR)
    # Training is off by its rate; the wrong flow by a plateau as well.
    right, wrong = first_order(rates, {"right": rates, "wrong": rates + 0.5})
    assert right.holds
    assert wrong.holds
    assert wrong.label == "order with the gradient taken 2 % too large"
    assert not first_order(rates, {"right": rates + 0.5, "wrong": rates})[0].holds
    assert not first_order(rates, {"right": rates, "wrong": rates})[1].holds


def test_require_ok():
    require_ok("a flow", path(TS, YS))
    with pytest.raises(RuntimeError, match=r"^a flow: the solver gave up"):
        require_ok("a flow", path(TS, YS), path(TS, YS, False))
    assert largest([1.0, -3.0]) == 3
    assert np.isnan(largest([1.0, np.nan]))


@given(st.floats(0.1, 4), st.floats(1e-6, 1e6))
def test_order_of_an_exact_power(order, factor):
    scales = np.array([0.1, 0.03, 0.01])
    fit = convergence_order(scales, factor * scales**order)
    np.testing.assert_allclose(fit.slope, order, atol=1e-12)
    np.testing.assert_allclose(np.exp(fit.intercept), factor, rtol=1e-10)
    assert fit.stderr < 1e-7


def test_order_hands_nan_on():
    assert np.isnan(convergence_order([0.1, 0.2], [1.0, np.nan])).all()


@pytest.mark.parametrize("floor", [1e-3, [1e-9, 1e-9, 1e-3], np.array([0.0, 0.0, 2e-3])])
def test_what_lies_at_the_floor_is_left_out_and_told(floor):
    scales, errors = [0.1, 0.05, 0.001], [0.1, 0.05, 0.001]
    with pytest.warns(
        UserWarning, match=r"^convergence_order leaves out the scales \[0\.001\], whose errors"
    ):
        fit = convergence_order(scales, errors, floor=floor)
    assert fit.slope == pytest.approx(1)
    with pytest.warns(UserWarning, match="noise floor"):
        assert np.isnan(convergence_order(scales, errors, floor=0.07)).all()  # undecided, and not refuted


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("factor", "order"), [(1.0, 1.0), (1.02, 0.0)])
def test_rounding_does_not_refute_a_right_flow_nor_excuse_a_wrong_one(dtype, factor, order):
    """A network in 32-bit stands still where its updates are smaller than the spacing of its weights."""
    rates, time, ends = [1e-2, 1e-3, 1e-4], 8.0, jnp.asarray([1.0, -2.0], dtype)
    gaps = []
    for rate in rates:
        steps = round(time / rate)
        _, trained = train(bowl, ends - 1.3, optax.sgd(rate), steps=steps, every=steps // 40, time_step=rate)
        flow = np.asarray(ends) - 1.3 * np.exp(-factor * CURVATURES * np.asarray(trained.ts)[:, None])
        gaps.append(compare(Trajectory(np.asarray(trained.ts), flow), trained))
    if dtype == "float64":
        found = convergence_order(rates, gaps)
    elif factor == 1:
        assert convergence_order(rates, [gap.gap for gap in gaps]).slope < 0.7  # what the numbers alone say
        with pytest.warns(UserWarning, match=r"leaves out the scales \[0\.0001\]"):
            found = convergence_order(rates, gaps)
    else:
        found = convergence_order(rates[::-1], gaps[::-1])
    assert found.slope == pytest.approx(order, abs=0.1)


def test_order_of_a_plateau():
    scales = np.array([1e-1, 1e-2, 1e-3])
    assert convergence_order(scales, 0.5 + scales).slope < 0.05
    assert convergence_order(scales, np.full(3, 0.5)).slope == 0


@pytest.mark.parametrize(
    ("scales", "errors", "message"),
    [
        ([0.1], [1.0], r"^scales and errors must have one shape \(L,\), L >= 2, got \(1,\) and \(1,\)$"),
        ([0.1, 0.2], [1.0, 2.0, 3.0], r"^scales and errors must have one shape"),
        (0.1, 1.0, r"^scales and errors must have one shape"),
        ([0.1, 0.0], [1.0, 2.0], r"^scales must be positive and finite, got \[0\.1 0\. \]$"),
        ([0.1, 0.2], [1.0, -1.0], r"^errors must be positive and finite"),
        ([0.1, 0.2], [1.0, np.inf], r"^errors must be positive and finite"),
    ],
)
def test_bad_points_are_named(scales, errors, message):
    with pytest.raises(ValueError, match=message):
        convergence_order(scales, errors)


@pytest.mark.parametrize("floor", [-1.0, [0.1], np.nan])
def test_a_bad_floor_is_named(floor):
    with pytest.raises(ValueError, match=r"^floor must be one number >= 0, or one per scale, got"):
        convergence_order([0.1, 0.2], [1.0, 2.0], floor=floor)


def test_line_fit_against_the_normal_equations():
    random = np.random.default_rng(0)
    x = random.normal(size=20)
    y = 1.5 * x - 2 + 0.1 * random.normal(size=20)
    design = np.stack([x, np.ones(20)], axis=1)
    (slope, intercept), (residual,) = np.linalg.lstsq(design, y)[:2]
    fit = fit_line(x, y)
    np.testing.assert_allclose([fit.slope, fit.intercept], [slope, intercept], rtol=1e-12)
    np.testing.assert_allclose(fit.r2, 1 - residual / np.sum((y - y.mean()) ** 2), rtol=1e-12)
    np.testing.assert_allclose(fit.stderr, np.sqrt(residual / 18 / np.sum((x - x.mean()) ** 2)), rtol=1e-12)
