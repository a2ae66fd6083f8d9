"""Series of losses along rays: those of polynomials, of the exact InfoNCE, and of what has a kink."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics.collapse import infonce_loss, landau_loss, taylor_coefficients


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.floats(-2, 2), st.sampled_from([0.0, 1.0, -0.5])
)
def test_a_polynomial_has_its_coefficients(coefficients, slope, at):
    found = taylor_coefficients(
        lambda w: jnp.polyval(jnp.array(coefficients), w["x"]), {"x": slope}, 4, at=at
    )
    # Of the polynomial in a, moved to where the series is around.
    along = np.poly1d(coefficients)(np.poly1d([slope, slope * at]))
    expected = np.zeros(5)
    expected[: along.order + 1] = along.coefficients[::-1]
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_infonce_has_three_quarters_where_the_slide_has_one():
    W, A, C = jnp.array([[0.7, -0.2], [0.1, 0.5]]), np.diag([1.0, 0.4]), np.array([[0.2, 0.1], [0.1, 0.3]])
    loss = partial(infonce_loss, A=A, C=C, attraction=1.7)
    quartic = partial(landau_loss, B=A - 0.7 * C, Sigma=A + C, quartic=1.0)
    found, form = jax.jit(lambda W: [taylor_coefficients(f, W, 4) for f in (loss, quartic)])(W)
    np.testing.assert_allclose(found, form * jnp.array([1, 1, 1, 1, 0.75]), rtol=1e-12, atol=1e-15)
    assert form[2] != 0 != form[4]


def test_the_dtype_of_parameters_stays_and_what_has_none_is_refused():
    found = taylor_coefficients(lambda w: jnp.sum(w**2), jnp.ones(3, jnp.float32), 2)
    assert found.dtype == jnp.float32
    assert found.tolist() == [0, 0, 3]
    for bad, message in (({}, "params must hold numbers"), (jnp.array([jnp.nan]), "params must be finite")):
        with pytest.raises(ValueError, match=message):
            taylor_coefficients(jnp.sum, bad, 2)
    with pytest.raises(ValueError, match="order must be an integer"):
        taylor_coefficients(lambda w: w, 1.0, -1)
    lanes = jax.vmap(lambda w: taylor_coefficients(lambda w: w**2, w, 2))(jnp.array([1.0, jnp.nan]))
    assert np.isfinite(lanes).tolist() == [[True] * 3, [False] * 3]
