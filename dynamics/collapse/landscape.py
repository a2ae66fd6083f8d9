"""The landscape around a point: directions that lead down, and the loss along a rescaling of all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_real,
    nan_unless,
    require_finite,
    require_number,
    require_positive,
)


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
        ValueError: the parameters are no finite numbers, `rtol` is out of range and can be looked at, or the
            loss is no number.

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
    require_scalar(loss, params)
    # One program: by itself each operation of a network's second derivative would be compiled alone.
    values = jax.jit(lambda flat: jnp.linalg.eigvalsh(jax.hessian(lambda p: loss(unravel(p)))(flat)))(flat)
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
        ValueError: a number is not finite and can be looked at, or the loss is no number.

    Example:
        >>> rescaled_loss(lambda w: (w - 2.0) ** 2, 1.0, [0.0, 2.0]).tolist()
        [4.0, 0.0]
    """
    params = jax.tree.map(lambda leaf: require_finite("params", as_real("params", leaf)), params)
    scales = require_finite("scales", as_real("scales", scales))
    require_scalar(loss, params)

    def at(scale):
        return loss(jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, params))

    return jax.jit(jax.vmap(at))(scales.reshape(-1)).reshape(scales.shape)


def rescaled_curvature(
    loss: Callable[[Any], Array], params: PyTree, step: ArrayLike = 0.02
) -> Float[Array, ""]:
    r"""Curvature of the loss at zero along a rescaling of all weights, a -> loss(a params).

        (loss(h params) - 2 loss(0) + loss(-h params)) / h^2

    Where it is negative the loss falls on the way from collapse to these weights. Differences see what
    derivatives do not, such as the kink of a ReLU network with several layers at zero.

    It tells of two layers, or of the last layer alone, which is enough for collapse: hand over a loss of that
    part. With all L > 2 layers rescaled at once the loss is flat at zero: what is found goes like h^(L - 2),
    odd orders cancel, and in 32-bit it is rounding. A number that is not clearly negative proves nothing
    there; `rescaled_loss` shows the whole way.

    Source: ziyin2022talk, slides on landscapes of nonlinear networks.

    Args:
        loss: scalar function of the parameters.
        params: a pytree of floating arrays, as for `rescaled_loss`.
        step: h, a positive number.

    Returns:
        The curvature.

    Raises:
        ValueError: a number is not finite or `step` is not positive, and can be looked at, or the loss is no
            number.

    Example:
        >>> round(float(rescaled_curvature(lambda w: w**4 - 3 * w**2, 1.0)), 3)
        -5.999
    """
    step = require_positive("step", step, jnp.result_type(float))
    above, at, below = rescaled_loss(loss, params, step * jnp.arange(1.0, -2.0, -1.0))
    return (above - 2 * at + below) / step.astype(at.dtype) ** 2


def require_scalar(loss: Callable[[Any], Any], params: PyTree) -> None:
    """Refuse a loss that is no number."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(loss, params))]
    if shapes != [()]:
        raise ValueError(f"loss must return a number, got {', '.join(map(str, shapes)) or 'nothing'}")
