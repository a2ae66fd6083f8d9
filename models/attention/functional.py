"""Flax modules as pure functions of their trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from dynamics.flow import ArrayLike


class Frozen(nnx.Variable):
    """A variable of a model that is not trained."""


def as_function(model: nnx.Module) -> tuple[Callable[[PyTree, Any], Any], PyTree]:
    """A model as a pure function `predict(params, inputs)` and its trained parameters.

    The function is a pytree that carries the frozen variables: another model of the same structure gives
    an equal function, which compiles nothing anew where it is passed to `eqx.filter_jit`.

    Example:
        >>> from models.attention import PromptAttention
        >>> predict, params = as_function(PromptAttention([0.0], [1.0], train_value=False))
        >>> float(predict(params, [[2.0], [4.0]])), [leaf.shape for leaf in jax.tree.leaves(params)]
        (3.0, [(1,)])
    """
    structure, params, frozen = nnx.split(model, nnx.Param, ...)
    return jax.tree_util.Partial(_predict, structure, frozen), params


def _predict(structure, frozen, params, inputs):
    return nnx.merge(structure, params, frozen)(inputs)


def gauss_newton_spectrum(
    predict: Callable[[PyTree, Any], Array], params: PyTree, tokens: ArrayLike
) -> Float[Array, " P"]:
    r"""Eigenvalues of the Gauss-Newton matrix G^T G / N, where G = d f / d params.

    For (1/2N) sum_i |f_i - y_i|^2 this is the Hessian at an exact fit, and its spectrum says how fast
    gradient descent closes each direction. Squared singular values of G: nothing is squared before they
    are taken, so that condition numbers up to the square of 1/epsilon survive.

    Args:
        predict: `predict(params, tokens)`, the outputs of all samples, for instance from `as_function`.
        params: the trained parameters, a pytree of P numbers in all.
        tokens: the samples, leading axis N.

    Returns:
        Eigenvalues in descending order, shape (P,); zeros where there are fewer outputs than parameters.

    Example:
        >>> linear = lambda params, tokens: tokens @ params
        >>> gauss_newton_spectrum(linear, jnp.zeros(2), jnp.diag(jnp.array([2.0, 4.0]))).tolist()
        [8.0, 2.0]
    """
    tokens = jnp.asarray(tokens)
    flat, unravel = ravel_pytree(params)

    def outputs(flat):
        return predict(unravel(flat), tokens).reshape(-1)

    rows = jax.eval_shape(outputs, flat).size
    jacobian = jax.jacfwd if flat.size <= rows else jax.jacrev
    singular = jnp.linalg.svd(jacobian(outputs)(flat), compute_uv=False)
    return jnp.pad(singular**2 / len(tokens), (0, flat.size - singular.size))
