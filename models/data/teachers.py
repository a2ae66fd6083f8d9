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

from dynamics.arguments import (
    ArrayLike,
    as_concrete,
    as_real,
    is_traced,
    nan_unless,
    require_dtype,
    require_every,
    require_finite,
    require_number,
    require_positive,
    require_sizes,
)
from models.attention import attention_log_ratio, diagonal_head, log_mean_ratio
from models.draws import normal


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
    keys = as_real("keys", keys)
    if keys.ndim != 3 or keys.shape[0] < 1 or keys.shape[1] < 2 or keys.shape[2] < 1:
        raise ValueError(f"keys must have shape (N, n, d) with n >= 2 tokens, got shape {keys.shape}")
    keys = require_finite("keys", keys)
    values = as_concrete(keys)
    if values is not None and not np.any(np.ptp(values, axis=1)):
        raise ValueError("keys must differ between the tokens of some sample, got equal ones")
    if is_traced(ratio):
        ratio = as_real("ratio", ratio)
        log_ratio = jnp.log(require_number("ratio", ratio, ratio.dtype, at_least=1)).astype(keys.dtype)
    else:
        # The logarithm is taken before the number is cast: 1e50 is infinite in 32-bit.
        as_real("ratio", ratio)
        value = np.asarray(ratio, float)
        if value.ndim or not 1 <= value < np.inf:
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
    return nan_unless(solvable & jnp.isfinite(largest), scale) * direction


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
        Keys of shape (N, n, d), uniform over all such keys; NaN where a traced `scale` is not positive.

    Raises:
        ValueError: a size is not positive, dim < N n, or `scale` is not positive and can be looked at.

    Example:
        >>> K = orthogonal_keys(jax.random.key(0), 1, 2, 5, scale=4.0)[0]
        >>> bool(jnp.allclose(K @ K.T, 4 * jnp.eye(2)))
        True
    """
    samples, tokens, dim = require_sizes(samples=samples, tokens=tokens, dim=dim)
    if dim < samples * tokens:
        raise ValueError(f"dim must be >= samples * tokens = {samples * tokens}, got {dim}")
    dtype = require_dtype(dtype)
    scale = require_positive("scale", scale, dtype)
    rows = jax.random.orthogonal(key, samples * tokens, dtype=dtype, m=dim)
    return (jnp.sqrt(scale) * rows).reshape(samples, tokens, dim)


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
        Keys of shape (N, n, d); NaN where a traced |eps| is 1 or more, or a traced `scale` not positive.

    Raises:
        ValueError: as `orthogonal_keys`; |eps| >= 1 and it can be looked at.

    Example:
        >>> K = nearly_orthogonal_keys(jax.random.key(0), 1, 2, 5, 1.0, 0.1)[0]
        >>> round(float(jnp.linalg.norm(K @ K.T - jnp.eye(2), 2)), 6)
        0.1
    """
    key_rows, key_gram = key, jax.random.fold_in(key, 1)
    keys = orthogonal_keys(key_rows, samples, tokens, dim, scale, dtype)
    eps = require_number("eps", eps, keys.dtype)
    eps = require_every("eps", eps, lambda eps: abs(eps) < 1, "a number with |eps| < 1")
    rows = keys.reshape(samples * tokens, dim)
    noise = normal(key_gram, (len(rows), len(rows)), rows.dtype)
    deviation = noise + noise.T
    deviation = deviation / jnp.linalg.norm(deviation, 2)
    gram = jnp.eye(len(rows), dtype=rows.dtype) + eps * deviation
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
        kq_scale: standard deviation of the entries of kq, >= 0.
        vo_scale: standard deviation of the entries of vo, >= 0.
        dtype: floating dtype; JAX's default where None.

    Returns:
        The tokens, the outputs and the products; NaN where a traced scale is negative.

    Raises:
        ValueError: a size is not a positive integer, or a scale is negative and can be looked at.

    Example:
        >>> task = diagonal_teacher(jax.random.key(0), 5, 3, 2)
        >>> task.Y.shape == task.X.shape, task.kq.shape
        (True, (2,))
    """
    samples, tokens, dim = require_sizes(samples=samples, tokens=tokens, dim=dim)
    dtype = require_dtype(dtype)
    scales = (
        require_number("kq_scale", kq_scale, dtype, at_least=0),
        require_number("vo_scale", vo_scale, dtype, at_least=0),
    )
    return _diagonal_teacher(key, *scales, (samples, tokens, dim))


@partial(jax.jit, static_argnums=3)
def _diagonal_teacher(key: Array, kq_scale: Array, vo_scale: Array, shape: tuple[int, int, int]) -> HeadTask:
    of_tokens, of_kq, of_vo = jax.random.split(key, 3)
    X = normal(of_tokens, shape, kq_scale.dtype)
    kq = kq_scale * jax.random.normal(of_kq, shape[2:], kq_scale.dtype)
    vo = vo_scale * jax.random.normal(of_vo, shape[2:], vo_scale.dtype)
    return HeadTask(X, diagonal_head(kq, vo, X), kq, vo)
