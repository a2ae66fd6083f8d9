"""Optimizers, whose numbers may be traced."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from models.optimizers import adam, decaying, descent, normalized_descent, sign_descent
from tests.helpers import compiled


def test_a_traced_number_is_taken_as_it_is():
    """The update has the dtype of the parameters, and none of a rate's digits are lost."""
    makers = (descent, adam, normalized_descent, sign_descent, decaying)

    def updates(*rates) -> Any:
        for rate in rates:
            for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
                gradient = jnp.array([0.5, -0.25], dtype)
                for make in makers:
                    optimizer = make(rate, 0.9, 5)
                    yield optimizer.update(gradient, optimizer.init(gradient))[0]

    rates = (1e-8, 1e5, 0.3)
    traced: Any = compiled(lambda *rates: list(updates(*rates)))(*rates)
    for found, eager in zip(traced, updates(*rates), strict=True):
        assert found.dtype == eager.dtype
        rtol = float(jnp.finfo(eager.dtype).eps)
        np.testing.assert_allclose(found.astype(float), eager.astype(float), rtol=rtol)
