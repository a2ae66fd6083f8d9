"""Checks of arguments: what they say, and that they look at concrete values under somebody's `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics import joma, replicator
from dynamics.arguments import (
    require_arrays,
    require_choice,
    require_every,
    require_finite,
    require_integer,
    require_positive,
    require_same_shape,
    require_shapes,
    require_sizes,
    require_symmetric,
    require_vector,
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
        (lambda: require_sizes(rank=True), "rank must be a positive integer, got True"),
        (lambda: require_positive("scale", 0.0, float), "scale must be a positive number, got 0.0"),
        (lambda: require_symmetric("S", jnp.array([[1.0, 2.0], [0.0, 1.0]])), "S must be symmetric, got an"),
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


def test_traced_values_pass():
    bad = jnp.array([jnp.nan, -1.0])
    jax.jit(lambda x: [require_finite("x", x), require_every("x", x, lambda x: x >= 0, ">= 0")] and x)(bad)


HALF = np.array([0.5, 0.5])
CALLS = {
    "x must be a point of the simplex": (lambda x: replicator.kkt_residual(x, HALF)[0], HALF, [0.5, 0.6]),
    "hessian must be finite and symmetric": (
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
