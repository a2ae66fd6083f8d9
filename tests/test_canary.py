"""Does this JAX compute small products right? Some versions get rows wrong, without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rows", [16_385, 32_769, 40_000])
@pytest.mark.parametrize("reduce", ["sum of squares", "max"])
def test_vectorized_small_products_are_right(dtype, rows, reduce):
    random = np.random.default_rng(0)
    W = random.normal(size=(3, 3)).astype(dtype)
    x = random.normal(size=(rows, 3)).astype(dtype)
    of = {
        "sum of squares": (lambda y: jnp.sum(y**2), lambda y: np.sum(y**2, 1)),
        "max": (jnp.max, lambda y: y.max(1)),
    }
    measured, exact = of[reduce]
    found = np.asarray(jax.jit(jax.vmap(lambda row: measured(W @ row)))(x))
    expected = exact(x.astype(float) @ W.T.astype(float))
    scale = np.linalg.norm(W) * np.linalg.norm(x, axis=1)
    wrong = int(np.sum(~(np.abs(found - expected) <= 10 * np.finfo(dtype).eps * (scale + scale**2))))
    assert wrong == 0, (
        f"jax {jax.__version__} computes {wrong} of {rows} rows of a 3 x 3 product wrong in {dtype}: "
        "no number from it can be trusted; install another version (pyproject.toml says which are known good)"
    )
