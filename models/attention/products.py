"""The products of weights that attention heads depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import as_real, nan_unless
from dynamics.spectra import after

HEAD_WEIGHTS = ("key", "query", "value", "output")


def head_products(
    params: Mapping[str, Any],
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
    weights = _require_heads(params)
    KQ, VO = (
        weights[left] @ jnp.swapaxes(weights[right], -1, -2)
        for left, right in (("key", "query"), ("value", "output"))
    )
    return KQ, VO


def thin_products(
    params: Mapping[str, Any], initial: Mapping[str, Any] | None = None
) -> tuple[Float[Array, "*heads k k"], Float[Array, "*heads k k"]]:
    r"""Small matrices with the singular values of a head's products, or of their change since the start.

    A product of two matrices (d, d') is R_1 R_2^T up to rotations, where R_1 and R_2 are the triangles of
    their QR decompositions; k is min(d, d') for a product. The change of one is the product of matrices
    (d, 2 d'), W_K W_Q^T - K_0 Q_0^T = (W_K - K_0) W_Q^T + K_0 (W_Q - Q_0)^T, which is exact where little has
    changed; k is min(d, 2 d'). All other singular values are zero.

    Args:
        params: the weights, as for `head_products`.
        initial: the weights at the start; the products themselves are taken where None.

    Returns:
        Matrices (..., k, k) for W_K W_Q^T and for W_V W_O^T, in the weights' precision.

    Raises:
        ValueError: a name is missing, or the shapes do not fit.

    Example:
        >>> weights = {name: jnp.eye(3)[:, :1] for name in ("key", "query", "value", "output")}
        >>> KQ, VO = thin_products(weights)
        >>> KQ.tolist(), VO.tolist()
        ([[1.0]], [[1.0]])
        >>> KQ, VO = thin_products({**weights, "value": 3 * weights["value"]}, weights)
        >>> float(jnp.linalg.norm(KQ)), float(jnp.linalg.norm(VO))
        (0.0, 2.0)
    """
    weights = _require_heads(params)
    start = None if initial is None else _require_heads(initial)
    if start is not None and any(start[name].shape != weights[name].shape for name in HEAD_WEIGHTS):
        shapes = (f"{sorted({array.shape for array in heads.values()})}" for heads in (start, weights))
        raise ValueError(f"initial and params must have the same shapes, got {' and '.join(shapes)}")

    def core(left, right):
        A, B = weights[left], weights[right]
        if start is not None:
            A, B = (
                jnp.concatenate([A - start[left], start[left]], axis=-1),
                jnp.concatenate([B, B - start[right]], axis=-1),
            )
        R_left = jnp.linalg.qr(A, mode="r")
        R_right = jnp.linalg.qr(after(R_left, B), mode="r")
        # The decomposition of a matrix with an infinite number may be finite.
        good = [jnp.all(jnp.isfinite(factor), axis=(-2, -1), keepdims=True) for factor in (A, B)]
        return nan_unless(good[0] & good[1], R_left @ jnp.swapaxes(R_right, -1, -2))

    return core("key", "query"), core("value", "output")


def require_weights(params: Mapping[str, Any]) -> dict[str, Array]:
    """The four weights by name as arrays, or `ValueError` unless they are there."""
    missing = [name for name in HEAD_WEIGHTS if name not in params]
    if missing:
        raise ValueError(f"params must hold {', '.join(HEAD_WEIGHTS)}, got no {', '.join(missing)}")
    return {name: as_real(name, params[name]) for name in HEAD_WEIGHTS}


def _require_heads(params: Mapping[str, Any]) -> dict[str, Array]:
    """The four weights, or `ValueError` unless they are there and fit."""
    weights = require_weights(params)
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
    return weights
