"""Teachers of attention models: prompts of a given sharpness, keys with a given Gram matrix, heads."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array

from dynamics.arguments import require_real, require_sizes
from dynamics.flow import ArrayLike, as_inexact, is_traced
from models.attention import attention_log_ratio, diagonal_head, log_mean_ratio


def teacher_with_ratio(key: Array, keys: ArrayLike, ratio: ArrayLike) -> Array:
    r"""A prompt p whose mean ratio of largest to smallest attention has a given value.

    p = s q with a random direction q ~ N(0, I), and the scale s >= 0 that solves

        (1/N) sum_i exp(s R_i) = ratio,   R_i = max_j (K_i q)_j - min_j (K_i q)_j,

    in logarithms: ratios far beyond the range of the dtype, such as 1e50 in 32-bit, are reached.

    Source: softmax2025talk, experiment.

    Args:
        key: PRNG key of the direction.
        keys: K, shape (N, n, d) with n >= 2 tokens. p has their dtype.
        ratio: mean over samples of max_j a_ij / min_j a_ij with a_i = softmax(K_i p), a number >= 1.

    Returns:
        p of shape (d,); zero for ratio 1. NaN where a traced ratio is below 1 or not finite, or where traced
        keys are such that all tokens of every sample are the same.

    Raises:
        ValueError: `keys` or `ratio` is bad and can be looked at.

    Example:
        >>> keys = jax.random.normal(jax.random.key(0), (5, 3, 4))
        >>> p = teacher_with_ratio(jax.random.key(1), keys, 1e25)
        >>> round(float(log_mean_ratio(attention_log_ratio(p, keys))) / math.log(10), 6)
        25.0
    """
    keys = as_inexact(keys)
    if keys.ndim != 3 or keys.shape[0] < 1 or keys.shape[1] < 2 or keys.shape[2] < 1:
        raise ValueError(f"keys must have shape (N, n, d) with n >= 2 tokens, got shape {keys.shape}")
    require_real("keys", keys)
    if np.shape(ratio) != ():
        raise ValueError(f"ratio must be a number, got shape {np.shape(ratio)}")
    if not is_traced(keys):
        values = np.asarray(keys, float)
        if not np.all(np.isfinite(values)):
            raise ValueError("keys must be finite, got NaN or infinity")
        if not np.any(np.ptp(values, axis=1)):
            raise ValueError("keys must differ between the tokens of some sample, got equal ones")
    if is_traced(ratio):
        log_ratio = jnp.log(as_inexact(ratio)).astype(keys.dtype)
    else:
        # The logarithm is taken before the number is cast: 1e50 is infinite in 32-bit.
        value = np.asarray(ratio, float)
        if not 1 <= value < np.inf:
            raise ValueError(f"ratio must be a finite number >= 1, got {ratio}")
        log_ratio = jnp.asarray(np.log(value), keys.dtype)
    return _teacher(key, keys, log_ratio)


@eqx.filter_jit
def _teacher(key, keys, log_ratio):
    direction = jax.random.normal(key, keys.shape[-1:], keys.dtype)
    log_ratios = attention_log_ratio(direction, keys)

    def excess(scale, _):
        return log_mean_ratio(scale * log_ratios) - log_ratio

    # The mean lies between max_i exp(s R_i) / N and max_i exp(s R_i), which brackets the root. The excess is
    # convex and increasing: Newton's method falls to the root monotonically from the upper end.
    largest = jnp.max(log_ratios)
    upper = (log_ratio + math.log(len(keys))) / largest
    epsilon = float(jnp.finfo(keys.dtype).eps)
    newton = optx.Newton(rtol=4 * epsilon, atol=0.0)
    scale = optx.root_find(excess, newton, upper, max_steps=64, throw=False).value
    scale = jnp.where(log_ratio == 0, 0, scale)
    solvable = (log_ratio == 0) | ((log_ratio > 0) & jnp.isfinite(log_ratio) & (largest > 0))
    return jnp.where(solvable, scale, jnp.nan) * direction


def orthogonal_keys(
    key: Array, samples: int, tokens: int, dim: int, scale: ArrayLike = 1.0, dtype: Any = None
) -> Array:
    r"""Keys that are all orthogonal: K_i K_j^T = delta_ij scale I.

    The condition under which the attention of every sample follows a flow of its own. It takes as many
    dimensions as there are tokens in all samples together.

    Source: softmax2025talk, flow.

    Args:
        key: PRNG key.
        samples: N.
        tokens: n, tokens per sample.
        dim: d >= N n.
        scale: squared length of every key, > 0.
        dtype: floating dtype; JAX's default where None.

    Returns:
        Keys of shape (N, n, d), uniform over all such keys.

    Raises:
        ValueError: a size is not positive, dim < N n, or `scale` is not positive and can be looked at.

    Example:
        >>> K = orthogonal_keys(jax.random.key(0), 1, 2, 5, scale=4.0)[0]
        >>> bool(jnp.allclose(K @ K.T, 4 * jnp.eye(2)))
        True
    """
    _require_keys(samples, tokens, dim, scale)
    rows = jax.random.orthogonal(key, samples * tokens, dtype=dtype, m=dim)
    return (jnp.sqrt(jnp.asarray(scale, rows.dtype)) * rows).reshape(samples, tokens, dim)


def nearly_orthogonal_keys(
    key: Array,
    samples: int,
    tokens: int,
    dim: int,
    scale: ArrayLike,
    eps: ArrayLike,
    dtype: Any = None,
) -> Array:
    r"""Keys whose Gram matrix is scale (I + eps S), with a random symmetric S of spectral norm one.

    The keys are L Q with the Cholesky factor L of I + eps S and the rows of `orthogonal_keys` for Q, which
    they are for eps = 0.

    Args:
        key: PRNG key.
        samples: N.
        tokens: n, tokens per sample.
        dim: d >= N n.
        scale: mean squared length of the keys up to order eps, > 0.
        eps: relative deviation of the Gram matrix in spectral norm, |eps| < 1. May be traced.
        dtype: floating dtype; JAX's default where None.

    Returns:
        Keys of shape (N, n, d); NaN where a traced |eps| is too large for a Gram matrix.

    Raises:
        ValueError: as `orthogonal_keys`; |eps| >= 1 and it can be looked at.

    Example:
        >>> K = nearly_orthogonal_keys(jax.random.key(0), 1, 2, 5, 1.0, 0.1)[0]
        >>> round(float(jnp.linalg.norm(K @ K.T - jnp.eye(2), 2)), 6)
        0.1
    """
    _require_keys(samples, tokens, dim, scale)
    if not is_traced(eps) and not np.abs(np.asarray(eps, float)) < 1:
        raise ValueError(f"eps must be a number with |eps| < 1, got {eps}")
    key_rows, key_gram = key, jax.random.fold_in(key, 1)
    keys = orthogonal_keys(key_rows, samples, tokens, dim, scale, dtype)
    rows = keys.reshape(samples * tokens, dim)
    noise = jax.random.normal(key_gram, (len(rows), len(rows)), rows.dtype)
    deviation = noise + noise.T
    deviation = deviation / jnp.linalg.norm(deviation, 2)
    gram = jnp.eye(len(rows), dtype=rows.dtype) + jnp.asarray(eps, rows.dtype) * deviation
    return (jnp.linalg.cholesky(gram) @ rows).reshape(keys.shape)


class HeadTask(NamedTuple):
    """What a teacher head makes of random tokens.

    Attributes:
        X: tokens, (N, n, d).
        Y: the teacher's outputs, (N, n, d).
        kq: its diagonal of W_K W_Q^T, (d,).
        vo: its diagonal of W_V W_O^T, (d,).
    """

    X: Array
    Y: Array
    kq: Array
    vo: Array


def diagonal_teacher(
    key: Array,
    samples: int,
    tokens: int,
    dim: int,
    *,
    kq_scale: ArrayLike = 1.0,
    vo_scale: ArrayLike = 1.0,
    dtype: Any = None,
) -> HeadTask:
    r"""Standard Gaussian tokens and the outputs of an attention head with diagonal weights.

    The diagonals are Gaussian with the given standard deviations. A logit, sum_j kq_j x_aj x_bj, is of size
    kq_scale sqrt(d) between tokens, and a token's own differs from the others' by the sum of kq: in large
    dimensions `kq_scale` must be well below one, or the softmax saturates.

    Source: boixadsera2023, section 5 and Appendix A (the toy model; its scales are not stated).

    Args:
        key: PRNG key.
        samples: number N of samples.
        tokens: number n of tokens of a sample.
        dim: dimension d.
        kq_scale: standard deviation of the entries of kq.
        vo_scale: standard deviation of the entries of vo.
        dtype: floating dtype; JAX's default where None.

    Raises:
        ValueError: a size is not a positive integer.

    Example:
        >>> task = diagonal_teacher(jax.random.key(0), 5, 3, 2)
        >>> task.Y.shape == task.X.shape, task.kq.shape
        (True, (2,))
    """
    samples, tokens, dim = require_sizes(samples=samples, tokens=tokens, dim=dim)
    dtype = jnp.result_type(float) if dtype is None else dtype
    scales = jnp.asarray(kq_scale, dtype), jnp.asarray(vo_scale, dtype)
    return _diagonal_teacher(key, *scales, (samples, tokens, dim))


@partial(jax.jit, static_argnums=3)
def _diagonal_teacher(key: Array, kq_scale: Array, vo_scale: Array, shape: tuple[int, int, int]) -> HeadTask:
    of_tokens, of_kq, of_vo = jax.random.split(key, 3)
    X = jax.random.normal(of_tokens, shape, kq_scale.dtype)
    kq = kq_scale * jax.random.normal(of_kq, shape[2:], kq_scale.dtype)
    vo = vo_scale * jax.random.normal(of_vo, shape[2:], vo_scale.dtype)
    return HeadTask(X, diagonal_head(kq, vo, X), kq, vo)


def _require_keys(samples: int, tokens: int, dim: int, scale: ArrayLike) -> None:
    if samples < 1 or tokens < 1:
        raise ValueError(f"samples and tokens must be positive integers, got {samples} and {tokens}")
    if dim < samples * tokens:
        raise ValueError(f"dim must be >= samples * tokens = {samples * tokens}, got {dim}")
    if not is_traced(scale) and not 0 < np.asarray(scale, float) < np.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
