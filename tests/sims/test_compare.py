"""Errors between trajectories in cases known by hand, and slopes of exact powers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.flow import Trajectory
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

TS = np.array([0.0, 1.0, 2.0])
YS = {"a": np.array([[3.0], [1.0], [2.0]]), "b": np.array([[4.0, 0.0], [2.0, 3.0], [2.0, 2.0]])}


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
        (path(TS, YS), path(1.01 * TS, YS), r"^trained must have the times of theory"),
        (path(TS[None], YS), path(TS[None], YS), r"^trained must have the times of theory"),
        (
            path(TS, YS),
            path(TS, YS["b"]),
            r"^trained must have the coordinates of theory",
        ),
        (
            path(TS, YS),
            path(TS, {"a": YS["b"], "b": YS["a"]}),
            r"^trained must have the coordinates of theory, got \[\(3, 2\), \(3, 1\)\]",
        ),
    ],
)
def test_trajectories_that_cannot_be_compared(theory, trained, message):
    with pytest.raises(ValueError, match=message):
        compare(theory, trained)


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
