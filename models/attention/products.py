"""The products of weights that attention heads depend on."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.flow import ArrayLike, as_inexact

HEAD_WEIGHTS = ("key", "query", "value", "output")


def head_products(
    params: Mapping[str, ArrayLike],
) -> tuple[Float[Array, "*heads d d"], Float[Array, "*heads d d"]]:
    r"""The two products of an attention head, W_K W_Q^T and W_V W_O^T.

    The head softmax(X W_K W_Q^T X^T) X W_V W_O^T depends on its weights through these alone.

    Source: boixadsera2023, Equation 1.

    Args:
        params: the weights by the names `key`, `query`, `value` and `output`, each (..., d, d'), with any
            leading axes, such as layers and heads. Other entries are left alone.

    Returns:
        W_K W_Q^T and W_V W_O^T, each (..., d, d).

    Raises:
        ValueError: a name is missing, or the shapes do not fit.

    Example:
        >>> left, right = jnp.array([[2.0], [1.0]]), jnp.array([[0.0], [3.0]])
        >>> KQ, VO = head_products({"key": left, "query": right, "value": right, "output": right})
        >>> KQ.tolist(), VO.tolist()
        ([[0.0, 6.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 9.0]])
    """
    missing = [name for name in HEAD_WEIGHTS if name not in params]
    if missing:
        raise ValueError(f"params must hold {', '.join(HEAD_WEIGHTS)}, got no {', '.join(missing)}")
    weights = {name: as_inexact(params[name]) for name in HEAD_WEIGHTS}
    shapes = {name: array.shape for name, array in weights.items()}
    for left, right in (("key", "query"), ("value", "output")):
        if len(shapes[left]) < 2 or shapes[left] != shapes[right]:
            raise ValueError(
                f"{left} and {right} must have one shape (..., d, d'), got {shapes[left]} and {shapes[right]}"
            )
    if shapes["key"][:-1] != shapes["value"][:-1]:
        raise ValueError(
            f"key and value must agree but for the last axis, got {shapes['key']} and {shapes['value']}"
        )
    KQ, VO = (
        weights[left] @ jnp.swapaxes(weights[right], -1, -2)
        for left, right in (("key", "query"), ("value", "output"))
    )
    return KQ, VO
