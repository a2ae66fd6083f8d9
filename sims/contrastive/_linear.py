"""Linear encoders under InfoNCE, which several simulations train: their data, their loss, and its flow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dynamics.contrastive import contrastive_covariance, deep_linear_energy, pairwise_importance
from models.collapse import Noisy
from models.draws import normal
from models.losses import contrastive_loss
from models.self_supervised import Views

LOSS: dict[str, Any] = {"temperature": 1.0, "epsilon": 1.0}
DEAD = 0.01  # a direction is dead where its singular value is below this part of the largest


def noisy_views(key: Array, samples: int, noise: Array) -> Views:
    """Two views of normal samples, with noise of a standard deviation for each input."""
    one, other = jax.random.split(key)
    x = normal(one, (samples, len(noise)))
    first, second = noise[None, None] * normal(other, (2, *x.shape))
    return Views(x + first, x + second)


def rotation(key: Array, d: int) -> Array:
    """A random orthogonal matrix."""
    return jnp.linalg.qr(normal(key, (d, d)))[0]


def product(matrices: list[Array]) -> Array:
    """The map of a linear network, whose matrices come input side first."""
    return jax.tree.reduce(lambda before, W: W @ before, matrices)


def mean_loss(predict: Any, params: Any, views: Views) -> Array:
    """InfoNCE of a network, of one sample on average."""
    f, other = (predict(params, Noisy(view)) for view in views)
    return contrastive_loss("infonce", f, other, **LOSS) / len(f)


def importance(matrices: list[Array], views: Views) -> Array:
    """The weight that the mean loss gives to each pair."""
    W = product(matrices)
    alpha = pairwise_importance("infonce", *(view @ W.T for view in views), **LOSS)
    return alpha / len(alpha)


def covariance(matrices: list[Array], views: Views) -> Array:
    """The X of the theory at these weights."""
    return contrastive_covariance(importance(matrices, views), *views)


def moving_field(t: Any, matrices: list[Array], views: Views) -> list[Array]:
    """The field of `encoder_flow`, half the gradient of the energy, with the X of the moment."""
    X = covariance(matrices, views)
    return jax.tree.map(lambda G: G / 2, jax.grad(deep_linear_energy)(matrices, X))


def dead(values: Any) -> np.ndarray:
    """Which singular values, the largest first, are far below the first; NaN where that is not known."""
    values = np.asarray(values)
    return np.where(np.isfinite(values), values < DEAD * values[..., :1], np.nan)
