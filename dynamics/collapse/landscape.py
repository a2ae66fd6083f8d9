"""The landscape around a point: directions that lead down, and the loss along a rescaling of all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import ArrayLike, as_real, nan_unless, require_finite, require_number


def hessian_index(
    loss: Callable[[Any], Array], params: PyTree, *, rtol: ArrayLike | None = None
) -> Float[Array, ""]:
    r"""The number of directions that lead down from a stationary point: negative eigenvalues of the Hessian.

    It is 0 at a minimum and positive at a strict saddle. It is a floating number, so that it can be NaN.

    Args:
        loss: scalar function of the parameters, twice differentiable.
        params: the point, a pytree of floating arrays; the Hessian is dense in all of their numbers.
        rtol: eigenvalues count where they are below -rtol times the largest in size; 1e-8 where None, and
            1e-4 in 32-bit.

    Returns:
        The number of such eigenvalues.

    Raises:
        ValueError: the parameters are no finite numbers, or `rtol` is out of range and can be looked at.

    Example:
        >>> float(hessian_index(lambda p: p["x"] ** 2 - p["y"] ** 2, {"x": 0.0, "y": 0.0}))
        1.0
    """
    params = jax.tree.map(lambda leaf: require_finite("params", as_real("params", leaf)), params)
    flat, unravel = ravel_pytree(params)
    if not flat.size:
        raise ValueError("params must hold at least one number, got none")
    if rtol is None:
        rtol = 1e-8 if jnp.finfo(flat.dtype).bits == 64 else 1e-4
    rtol = require_number("rtol", rtol, flat.dtype, at_least=0)
    hessian = jax.hessian(lambda flat: loss(unravel(flat)))(flat)
    values = jnp.linalg.eigvalsh(hessian)
    count = jnp.sum(values < -rtol * jnp.max(jnp.abs(values))).astype(flat.dtype)
    return nan_unless(jnp.all(jnp.isfinite(values)) & jnp.isfinite(rtol), count)


def rescaled_loss(loss: Callable[[Any], Array], params: PyTree, scales: ArrayLike) -> Float[Array, "*scales"]:
    r"""The loss where all weights are multiplied by a number, a -> loss(a params): the way to collapse.

    Args:
        loss: scalar function of the parameters.
        params: a pytree of floating arrays; a part of a network, such as its last layer, by a loss of that
            part.
        scales: the numbers a, any shape.

    Returns:
        The loss at each, of the shape of `scales`.

    Raises:
        ValueError: a number is not finite and can be looked at.

    Example:
        >>> rescaled_loss(lambda w: (w - 2.0) ** 2, 1.0, [0.0, 2.0]).tolist()
        [4.0, 0.0]
    """
    params = jax.tree.map(lambda leaf: require_finite("params", as_real("params", leaf)), params)
    scales = require_finite("scales", as_real("scales", scales))

    def at(scale):
        return loss(jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, params))

    return jax.vmap(at)(scales.reshape(-1)).reshape(scales.shape)
