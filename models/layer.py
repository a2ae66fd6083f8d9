"""One linear layer inside a network whose other parts stay as they are."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.flow import ArrayLike


def layer_outputs(W: ArrayLike, surroundings: tuple[ArrayLike, ArrayLike]) -> Float[Array, "N d *inputs"]:
    r"""Outputs J_i W F_i of a layer W (m, n), linear in it: its gradient has constant coefficients.

    Args:
        W: weights, (m, n).
        surroundings: J (N, d, m), what sits behind the layer, and the layer's inputs F: one of each sample,
            (N, n), or several that share what sits behind, (N, n, L).

    Returns:
        (N, d), or (N, d, L).

    Example:
        >>> layer_outputs(jnp.array([[3.0]]), (jnp.array([[[2.0]]]), jnp.array([[5.0]]))).tolist()
        [[30.0]]
    """
    J, F = surroundings
    return jnp.einsum("adm,mn,an...->ad...", J, W, F)
