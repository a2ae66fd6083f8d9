"""Checks of arguments: what they say, and that they look at concrete values under somebody's `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics import joma, replicator
from dynamics.arguments import (
    as_real,
    nan_unless,
    one_hot,
    require_arrays,
    require_choice,
    require_every,
    require_finite,
    require_indices,
    require_integer,
    require_number,
    require_positive,
    require_same_shape,
    require_shapes,
    require_sizes,
    require_symmetric,
    require_times,
    require_vector,
    rows,
)


def shapes(**arrays):
    require_shapes(**{name: (jnp.zeros(shape), axes) for name, (shape, axes) in arrays.items()})


def test_letters_fit_where_they_have_one_length_and_dots_stand_for_any_axes():
    shapes(a=((2, 3), "N n"), b=((2,), "N"))
    shapes(a=((2, 3, 3), "... m m"), b=((3, 1), "m r"))
    shapes(a=((4, 5, 3, 1), "... m r"), b=((4, 5, 3, 2), "... m s"))
    shapes(a=((3, 1), "... m r"), b=((3, 2), "... m s"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: shapes(a=((2, 3), "N n"), b=((3,), "N")),
            r"a and b .* \(N, n\) and \(N,\), got \(2, 3\) and",
        ),
        (lambda: shapes(a=((4, 3, 1), "... m r"), b=((5, 3, 2), "... m s")), r"a and b must have shapes"),
        (lambda: shapes(a=((4, 3, 1), "... m r"), b=((3, 2), "... m s")), r"a and b must have shapes"),
        (lambda: shapes(a=((3,), "... m r")), r"a must have shape \(\.\.\., m, r\), got \(3,\)"),
        (lambda: shapes(a=((3, 2), "m m")), r"a must have shape \(m, m\), got \(3, 2\)"),
        (lambda: shapes(a=((3,), "m n"), b=((1,), "r"), c=((), "r")), "a, b and c must have shapes"),
        (
            lambda: require_same_shape("(p,)", [1], u=jnp.ones((2, 1)), v=jnp.ones((2, 1))),
            "u and v must have",
        ),
        (lambda: require_arrays(a=[1.0], b=[np.inf]), "b must be finite, got NaN or infinity"),
        (lambda: require_arrays(a=[1j]), "a must be real, got dtype complex128"),
        (lambda: require_arrays(a=[]), r"a must not be empty, got shape \(0,\)"),
        (lambda: require_vector("x", []), r"x must have shape \(n,\), got shape \(0,\)"),
        (
            lambda: require_every("t", jnp.array([0.0, np.nan]), lambda t: t >= 0, ">= 0"),
            "t must be >= 0, got nan",
        ),
        (lambda: require_choice("kind", "a", ("b", "c")), r"kind must be one of \('b', 'c'\), got 'a'"),
        (lambda: require_integer("steps", -1, at_least=0), "steps must be an integer >= 0, got -1"),
        (lambda: require_integer("steps", 1.0, at_least=0), "steps must be an integer >= 0, got 1.0"),
        (lambda: require_integer("steps", True, at_least=0), "steps must be an integer >= 0, got True"),
        (lambda: require_choice("kind", np.ones(2), ("b", "c")), r"kind must be one of .* got \[1. 1.\]"),
        (lambda: require_number("scale", "one", float), "scale must be a finite number, got 'one'"),
        (lambda: require_number("scale", [1.0], float), r"scale must be a finite number, got \[1.0\]"),
        (lambda: require_sizes(rank=True), "rank must be a positive integer, got True"),
        (lambda: require_positive("scale", 0.0, float), "scale must be a positive number, got 0.0"),
        (lambda: require_symmetric("S", jnp.array([[1.0, 2.0], [0.0, 1.0]])), "S must be symmetric, got an"),
        (lambda: require_symmetric("S", jnp.array([[1.0, 1e-6], [0.0, 1.0]])), "S .* asymmetry of 1e-06"),
    ],
)
def test_errors_name_the_argument_its_rule_and_its_value(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_what_is_returned():
    first, second = require_arrays(a=jnp.ones(2, jnp.float32), b=np.ones(3, int))
    assert (first.dtype, second.dtype) == (jnp.float32, jnp.float32)
    assert require_sizes(m=np.int64(2), n=3) == [2, 3]
    assert require_integer("steps", np.int32(0), at_least=0) == 0
    assert require_positive("scale", 2, jnp.float32).dtype == jnp.float32


UNSERVED = {
    "float16": (np.ones(2, np.float16), "must be float32 or float64, got dtype float16"),
    "bfloat16": (jnp.ones(2, jnp.bfloat16), "must be float32 or float64, got dtype bfloat16"),
    "bool": ([True, False], "must be float32 or float64, got dtype bool"),
    "complex": (1j, "must be real, got dtype complex128"),
    "masked": (np.ma.masked_array([1.0, 2.0]), "must be an array without a mask"),
    "None": (None, "must be an array of numbers, got None"),
    "string": ("one", "must be an array of numbers, got 'one'"),
    "object": ([1.0, {}], r"must be an array of numbers, got \[1.0, {}\]"),
    "ragged": ([[1.0], [1.0, 2.0]], "must be an array of numbers, got"),
    "long": (np.longdouble(1), "must be an array of numbers, got 1.0"),
    "huge": (10**400, "must be an array of numbers, got 1000"),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_what_the_numerics_cannot_serve_is_refused_by_name(kind):
    value, message = UNSERVED[kind]
    with pytest.raises(ValueError, match=f"^x {message}") as error:
        as_real("x", value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("value", [1, [1, 2], np.uint8(3), np.arange(3), jnp.arange(2, dtype=jnp.int32)])
def test_integers_become_the_default_float_and_stay_concrete(value):
    assert as_real("x", value).dtype == jnp.float64
    with pytest.raises(ValueError, match="x must be >= 9"):
        jax.jit(lambda s: s * require_every("x", as_real("x", value), lambda x: x >= 9, ">= 9"))(1.0)


VECTOR, SQUARE = np.array([1.0, 2.0]), np.eye(2)
# The guard, and numbers that it takes and that it refuses.
GUARDS = {
    "finite": (lambda x: require_finite("x", x), VECTOR, [1.0, np.inf]),
    "arrays": (lambda x: require_arrays(x=x)[0], VECTOR, [np.nan, 1.0]),
    "every": (lambda x: require_every("x", x, lambda x: x >= 0, ">= 0"), VECTOR, [1.0, -2.0]),
    "number": (lambda x: require_number("x", x, float), 3.0, np.inf),
    "at least": (lambda x: require_number("x", x, float, at_least=1), 3.0, 0.5),
    "positive": (lambda x: require_positive("x", x, float), 3.0, 0.0),
    "times": (lambda x: require_times(x, float), VECTOR, [2.0, 2.0]),
    "symmetric": (lambda x: require_symmetric("x", x), SQUARE, [[1.0, 2.0], [0.0, 1.0]]),
}


@pytest.mark.parametrize("name", GUARDS)
def test_the_guard_is_in_the_value(name):
    """Bad: ValueError if concrete, also under jit; NaN in its own lane, with its derivatives, if traced."""
    guard, good, bad = GUARDS[name]
    good, bad = jnp.asarray(good), jnp.asarray(bad)
    for transform in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(transform(lambda s: s * guard(good))(1.0), good)
        with pytest.raises(ValueError, match=r"^(x|ts) must "):
            transform(lambda s: s * guard(bad))(1.0)

    lanes = jnp.stack([good, bad])
    values = jax.vmap(guard)(lanes)
    np.testing.assert_array_equal(values[0], good)
    assert np.any(np.isnan(values[1]))
    for gradient in (jax.grad, jax.jacfwd):
        slopes = jax.vmap(gradient(lambda x: jnp.sum(guard(x))))(lanes)
        np.testing.assert_array_equal(slopes[0], np.ones_like(good))
        assert np.any(np.isnan(slopes[1]))


def test_a_number_that_is_infinite_may_be_kept():
    x = jnp.array([np.inf, -np.inf, -0.0, np.nan])
    np.testing.assert_array_equal(nan_unless(True, x), x)
    assert np.all(np.isnan(nan_unless(False, x)))


def test_indices_neither_wrap_nor_clamp():
    table = jnp.arange(6.0).reshape(3, 2)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=f"^token must be integers from 0 to 2, got {bad}"):
            jax.jit(lambda s, tokens: s * rows(table, require_indices("token", tokens, 3)), static_argnums=1)(
                1.0, (0, bad)
            )
    with pytest.raises(ValueError, match=r"^token must hold integers, got dtype float64$"):
        require_indices("token", [0.0], 3)

    def look_up(tokens, table):
        tokens = require_indices("token", tokens, 3)
        return rows(table, tokens), one_hot(tokens, 3, float)

    found, hot = jax.jit(look_up)(jnp.array([2, -1, 3]), table)
    np.testing.assert_array_equal(found, [[4.0, 5.0], [np.nan] * 2, [np.nan] * 2])
    np.testing.assert_array_equal(hot, [[0.0, 0.0, 1.0], [np.nan] * 3, [np.nan] * 3])
    slope = jax.vmap(jax.grad(lambda table, token: jnp.sum(look_up(token, table)[0])), in_axes=(None, 0))
    slopes = slope(table, jnp.array([1, 7]))
    np.testing.assert_array_equal(slopes[0], [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert np.any(np.isnan(slopes[1]))


HALF = np.array([0.5, 0.5])
CALLS = {
    "x must be a point of the simplex": (lambda x: replicator.kkt_residual(x, HALF)[0], HALF, [0.5, 0.6]),
    "hessian must be symmetric": (
        lambda hessian: replicator.condition_number(HALF, hessian),
        np.eye(2),
        np.triu(np.ones((2, 2))),
    ),
    "x must be >= 0, got -1.0": (lambda x: joma.attend(HALF, x, "exp")[0], HALF, [1.0, -1.0]),
    "delta must be finite": (joma.blow_up_time, HALF, [1.0, np.nan]),
}


@pytest.mark.parametrize("message", CALLS)
def test_concrete_values_are_looked_at_under_jit(message):
    call, *values = CALLS[message]
    good, bad = map(jnp.asarray, values)
    assert np.isfinite(jax.jit(lambda scale: scale * call(good))(1.0))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda scale: scale * call(bad))(1.0)
