"""DirectPred: a linear predictor that is set from the correlation of its inputs, and not trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    require_arrays,
    require_choice,
    require_number,
    require_shapes,
    require_symmetric,
)

_LEAST = 1e-4  # of an eigenvalue of the predictor, in the form of the public code


def directpred(F: ArrayLike, epsilon: ArrayLike, form: str = "paper") -> Float[Array, "d d"]:
    r"""The predictor W_p = U diag(p) U^T from the correlation F = U diag(s) U^T of its inputs.

        "paper":   p_j = s_j^{1/2} + epsilon max_j s_j
        "scaled":  p_j = max((s_j / max_j s_j)^{1/2} + epsilon, 1e-4)

    Negative s_j, which an estimate of F may have by rounding, count as zero. The second form is that of the
    public code, and does not depend on the size of F. The predictor is a constant to gradients: eigenvectors
    have no derivative where eigenvalues are equal, and nothing is trained through them.

    Source: tian2021directpred, the talk's slide on DirectPred, and its public code.

    Args:
        F: correlation of the predictor's inputs, symmetric, (d, d).
        epsilon: regularization, a number >= 0.
        form: "paper" or "scaled". Where F is zero the second form is max(epsilon, 1e-4) I.

    Returns:
        The predictor, symmetric, (d, d).

    Raises:
        ValueError: F has another shape or is not symmetric, epsilon is negative, or the form is unknown.

    Example:
        >>> directpred([[4.0, 0.0], [0.0, 1.0]], 0.5).tolist()
        [[4.0, 0.0], [0.0, 3.0]]
        >>> directpred([[4.0, 0.0], [0.0, 1.0]], 0.5, form="scaled").tolist()
        [[1.5, 0.0], [0.0, 1.0]]
    """
    (F,) = require_arrays(F=F)
    require_shapes(F=(F, "d d"))
    require_choice("form", form, ("paper", "scaled"))
    epsilon = require_number("epsilon", epsilon, F.dtype, at_least=0)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(require_symmetric("F", F)))
    values = jnp.maximum(values, 0)
    largest = jnp.max(values)
    if form == "paper":
        p = jnp.sqrt(values) + epsilon * largest
    else:
        p = jnp.maximum(jnp.sqrt(values / jnp.where(largest > 0, largest, 1)) + epsilon, _LEAST)
    Wp = (vectors * p[None]) @ vectors.T
    return jax.lax.stop_gradient((Wp + Wp.T) / 2)


def running_correlation(F: ArrayLike, z: ArrayLike, rate: ArrayLike) -> Float[Array, "d d"]:
    r"""A step of the estimate of a correlation, rate F + (1 - rate) z^T z / N; nothing is centred.

    Source: tian2021directpred, the talk's slide on DirectPred.

    Args:
        F: the estimate before, symmetric, (d, d); a good start is `z.T @ z / N` of a batch.
        z: embeddings of a batch, (N, d).
        rate: rho, from 0 to 1.

    Returns:
        The estimate after, (d, d).

    Raises:
        ValueError: the shapes do not fit, or a number is out of range.

    Example:
        >>> running_correlation([[1.0]], [[2.0], [0.0]], 0.5).tolist()
        [[1.5]]
    """
    F, z = require_arrays(F=F, z=z)
    require_shapes(F=(F, "d d"), z=(z, "N d"))
    rate = require_number("rate", rate, F.dtype, at_least=0, at_most=1)
    return rate * require_symmetric("F", F) + (1 - rate) * z.T @ z / len(z)
