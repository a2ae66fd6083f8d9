"""Theory code does not mix dtypes silently."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield
