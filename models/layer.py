"""One layer W inside of a network: what a gradient of W alone sees of what lies before and behind it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import ArrayLike, as_real, require_integer, require_shapes
from dynamics.galore import bound_counterexample


def layer_outputs(W: ArrayLike, surroundings: tuple[ArrayLike, ArrayLike]) -> Float[Array, "N d *inputs"]:
    r"""Outputs J_i W F_i of a layer W (m, n), linear in it: its gradient has constant coefficients.

    Args:
        W: weights, (m, n).
        surroundings: J (N, d, m), what sits behind the layer, and the layer's inputs F: one of each sample,
            (N, n), or several that share what sits behind, (N, n, L).

    Returns:
        (N, d), or (N, d, L).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> layer_outputs(jnp.array([[3.0]]), (jnp.array([[[2.0]]]), jnp.array([[5.0]]))).tolist()
        [[30.0]]
    """
    W, J, F = (as_real(name, array) for name, array in zip("WJF", (W, *surroundings), strict=True))
    require_shapes(W=(W, "m n"), J=(J, "N d m"), F=(F, "N n L" if F.ndim == 3 else "N n"))
    return jnp.einsum("adm,mn,an...->ad...", J, W, F)


def leaky_relu(z: Array, slope: Array | float) -> Array:
    """Rectifier: z where it is positive, slope z elsewhere, for a slope that may be traced.

    Example:
        >>> leaky_relu(jnp.array([-1.0, 2.0]), 0.5).tolist()
        [-0.5, 2.0]
    """
    z, slope = as_real("z", z), as_real("slope", slope)
    return jnp.where(z > 0, z, slope * z)


def mlp_tail(z: Float[Array, "N m"], weights: tuple[Array, Array, Array], slope: Array | float) -> Array:
    """Outputs (N, d) of two layers behind the outputs z of W; a tail without biases is homogeneous.

    Args:
        z: what W gives.
        weights: V (h, m), U (d, h), and the biases of the first (h,), which may be zero.
        slope: of the activation below zero.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> mlp_tail(-one, (one, 3 * one, jnp.array([2.0])), 0.5).tolist()  # 3 (-0.5 + 2)
        [[4.5]]
    """
    V, U, bias = weights
    require_shapes(z=(z, "N m"), V=(V, "h m"), U=(U, "d h"), bias=(bias, "h"))
    return leaky_relu(leaky_relu(z, slope) @ V.T + bias[None], slope) @ U.T


def mlp_outputs(W: Array, surroundings: tuple[Array, tuple[Array, Array, Array], Array | float]) -> Array:
    """Outputs (N, d) of a layer W (m, n) with an `mlp_tail`, of surroundings = (f, weights, slope).

    The inputs f of the layer are (N, n).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> mlp_outputs(2 * one, (one, (one, one, jnp.zeros(1)), 0.5)).tolist()
        [[2.0]]
    """
    f, weights, slope = surroundings
    require_shapes(W=(W, "m n"), f=(f, "N n"))
    return mlp_tail(f @ W.T, weights, slope)


def counterexample_network(m: int, n: int, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A layer from W = 0 on whose gradient breaks the printed bound on stable ranks at every step.

    The 2 by 2 `bound_counterexample` is a corner of the layer. Every weight outside of the corner has the
    eigenvalue one, and no gradient.

    Source: derived here, for zhao2024galore, Lemma 3.3.

    Args:
        m: outputs of the layer, at least 2.
        n: inputs of the layer, at least 2.
        samples: at least n + 6.

    Returns:
        J (samples, m, m), f (samples, n) and targets y (samples, m), for `layer_outputs`.

    Raises:
        ValueError: a size is too small.

    Example:
        >>> [part.shape for part in counterexample_network(3, 2, 8)]
        [(8, 3, 3), (8, 2), (8, 3)]
    """
    m, n = require_integer("m", m, at_least=2), require_integer("n", n, at_least=2)
    samples = require_integer("samples", samples, at_least=n + 6)
    G0, B, C = (np.asarray(array) for array in bound_counterexample())
    pairs = len(B)
    # All of the pairs have rank one.
    j, phi = (np.linalg.eigh(X)[1][:, :, -1] * np.linalg.norm(X, axis=(1, 2))[:, None] ** 0.5 for X in (B, C))
    J, f, y = np.zeros((samples, m, m)), np.zeros((samples, n)), np.zeros((samples, m))
    J[:pairs, 0, :2], f[:pairs, :2] = (samples / pairs) ** 0.5 * j, phi
    J[pairs : pairs + n], f[pairs : pairs + n] = samples**0.5 * np.eye(m), np.eye(n)
    J[pairs : pairs + 2, :2] = 0
    dyads = J[:pairs, 0, :2, None] * f[:pairs, None, :2]
    y[:pairs, 0] = np.linalg.lstsq(dyads.reshape(pairs, 4).T, samples * G0.reshape(4))[0]
    return J, f, y
