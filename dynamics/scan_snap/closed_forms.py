"""Closed forms of Scan and Snap: the decoder's margin, the growth of attention, relative gains."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    nan_unless,
    require_every,
    require_indices,
    require_number,
    require_positive,
    require_shape,
    rows,
)
from dynamics.scan_snap.classes import SequenceClasses, log_context_weights


def decoder_margin(
    t: ArrayLike, learning_rate_Y: ArrayLike, num_classes: ArrayLike, vocab_size: ArrayLike
) -> Array:
    r"""Margin h(t) of a decoder that learns a class on its own: its logits are M h (e_n - 1/M).

    h solves h' = (learning_rate_Y / K) / (M - 1 + exp(M h)) from h(0) = 0, that is

        (M - 1) h + (exp(M h) - 1) / M = learning_rate_Y t / K,

    which is solved to machine precision. It differentiates to any order, and vmaps.

    Source: tian2023scan, Theorem 1.

    Args:
        t: times >= 0, any shape.
        learning_rate_Y: learning rate of the decoder, a number >= 0.
        num_classes: number of sequence classes K.
        vocab_size: size of the vocabulary M, at least 2.

    Returns:
        h, of the shape of `t`; NaN where a traced argument is out of range, or M learning_rate_Y t / K is
        beyond the dtype.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> h = decoder_margin(3.0, learning_rate_Y=1.0, num_classes=1, vocab_size=2)
        >>> round(float(h + (jnp.exp(2 * h) - 1) / 2), 12)
        3.0
    """
    t, rate, K, M = _require_setting(t, learning_rate_Y, num_classes, vocab_size)
    drive = M * rate * t / K
    u = jax.vmap(_solve_margin, in_axes=(0, None))(drive.reshape(-1), M).reshape(drive.shape)
    return nan_unless(jnp.isfinite(drive), u / M)


@eqx.filter_jit
def _solve_margin(drive: Array, M: Array) -> Array:
    """The root u = M h of (M - 1) u + e^u - 1 = drive."""

    def excess(u, args):
        drive, M = args
        return (M - 1) * u + jnp.expm1(u) - drive

    # Both bounds lie above the root, and the excess is convex: Newton's method falls to the root
    # monotonically, and then stays within rounding, which is not what the solver calls converged.
    upper = jnp.minimum(drive / M, jnp.log1p(drive))
    precision = jnp.finfo(drive.dtype)
    newton = optx.Newton(rtol=4 * float(precision.eps), atol=float(precision.tiny))
    return optx.root_find(excess, newton, upper, (drive, M), max_steps=64, throw=False).value


def crossover_time(learning_rate_Y: ArrayLike, num_classes: ArrayLike, vocab_size: ArrayLike) -> Array:
    r"""Time at which scanning ends and snapping begins: exp(M h(t)) = M - 1.

        t = (K / learning_rate_Y) (((M - 1) / M) ln(M - 1) + (M - 2) / M),

    about K (ln M + 1) / learning_rate_Y. Attention moves fastest near K ln(M) / learning_rate_Y.

    Source: tian2023scan, Theorem 4 (derived here; from 2 K ln(M) / learning_rate_Y on its late form is good).

    Args:
        learning_rate_Y: learning rate of the decoder, a positive number.
        num_classes: number of sequence classes K.
        vocab_size: size of the vocabulary M, at least 2.

    Returns:
        The time, a scalar; NaN where a traced argument is out of range.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> round(float(crossover_time(1.0, num_classes=2, vocab_size=34)), 2)
        8.67
    """
    _, rate, K, M = _require_setting(0.0, learning_rate_Y, num_classes, vocab_size)
    rate = require_positive("learning_rate_Y", rate, rate.dtype)
    return K / rate * ((M - 1) / M * jnp.log(M - 1) + (M - 2) / M)


def attention_growth(
    t: ArrayLike,
    *,
    learning_rate_Y: ArrayLike,
    learning_rate_Z: ArrayLike,
    num_classes: ArrayLike,
    vocab_size: ArrayLike,
    C0: ArrayLike = 1.0,
) -> Array:
    r"""Growth of attention B_n(t), from scanning (like t^2, then ln(t) / 2) to snapping (like ln ln t).

    For classes with one common token, under the theorem's own hypothesis that its logit follows
    z' = -(learning_rate_Z / C0) gamma exp(4 z), gamma = (M - 1)^2 h / (M - 1 + exp(M h)),

        B_n(t) = (1/4) ln(1 + (2 K (M - 1)^2 / C0) (learning_rate_Z / learning_rate_Y) h(t)^2)

    holds exactly, h being the `decoder_margin`. The printed form lacks the factor 1/4.

    Source: tian2023scan, Theorem 4, corrected.

    Args:
        t: times >= 0, any shape.
        learning_rate_Y: learning rate of the decoder, a number >= 0.
        learning_rate_Z: learning rate of attention, a number >= 0.
        num_classes: number of sequence classes K.
        vocab_size: size of the vocabulary M, at least 2.
        C0: the theorem's constant of the data, a positive number.

    Returns:
        B, of the shape of `t`; NaN where a traced argument is out of range.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> rates = dict(learning_rate_Y=1.0, learning_rate_Z=1.0)
        >>> round(float(attention_growth(10 * jnp.log(1e3), **rates, num_classes=10, vocab_size=1000)), 4)
        1.6726
    """
    t, rate_Y, K, M = _require_setting(t, learning_rate_Y, num_classes, vocab_size)
    rate_Z, C0 = _require_growth(learning_rate_Z, C0, t.dtype)
    h = decoder_margin(t, rate_Y, K, M)
    # For a decoder that stands still h / learning_rate_Y has the limit t / (K M), and nothing grows.
    per_rate = jnp.where(rate_Y > 0, h / jnp.where(rate_Y > 0, rate_Y, 1), t / (K * M))
    return jnp.log1p(2 * K * (M - 1) ** 2 / C0 * rate_Z * h * per_rate) / 4


def attention_growth_scanning(
    t: ArrayLike,
    *,
    learning_rate_Y: ArrayLike,
    learning_rate_Z: ArrayLike,
    num_classes: ArrayLike,
    vocab_size: ArrayLike,
    C0: ArrayLike = 1.0,
) -> Array:
    r"""Early form of `attention_growth`, for t below K ln(M) / learning_rate_Y, where h = rate_Y t / (K M).

        B = (1/4) ln(1 + 2 (M - 1)^2 / (C0 K M^2) learning_rate_Y learning_rate_Z t^2)

    Source: tian2023scan, Theorem 4, corrected. Arguments, result and errors are those of `attention_growth`.

    Example:
        >>> rates = dict(learning_rate_Y=1.0, learning_rate_Z=1.0)
        >>> float(attention_growth_scanning(0.0, **rates, num_classes=2, vocab_size=34))
        0.0
    """
    t, rate_Y, K, M = _require_setting(t, learning_rate_Y, num_classes, vocab_size)
    rate_Z, C0 = _require_growth(learning_rate_Z, C0, t.dtype)
    return jnp.log1p(2 * (1 - 1 / M) ** 2 / (C0 * K) * rate_Y * rate_Z * t**2) / 4


def attention_growth_snapping(
    t: ArrayLike,
    *,
    learning_rate_Y: ArrayLike,
    learning_rate_Z: ArrayLike,
    num_classes: ArrayLike,
    vocab_size: ArrayLike,
    C0: ArrayLike = 1.0,
) -> Array:
    r"""Late form of `attention_growth`, t above 2 K ln(M) / learning_rate_Y: M h = ln(M rate_Y t / K).

        B = (1/4) ln(1 + 2 K (M - 1)^2 / (C0 M^2) (learning_rate_Z / learning_rate_Y) ln^2(M rate_Y t / K))

    Source: tian2023scan, Theorem 4, corrected. Arguments, result and errors are those of `attention_growth`,
    but that learning_rate_Y must be positive. It is infinite at t = 0, where it does not apply.

    Example:
        >>> rates = dict(learning_rate_Y=1.0, learning_rate_Z=1.0)
        >>> t = 20 * jnp.log(1e3)
        >>> round(float(attention_growth_snapping(t, **rates, num_classes=10, vocab_size=1000)), 4)
        1.876
    """
    t, rate_Y, K, M = _require_setting(t, learning_rate_Y, num_classes, vocab_size)
    rate_Z, C0 = _require_growth(learning_rate_Z, C0, t.dtype)
    rate_Y = require_positive("learning_rate_Y", rate_Y, rate_Y.dtype)
    square = jnp.log(M * rate_Y * t / K) ** 2
    return jnp.log1p(2 * K * (1 - 1 / M) ** 2 / C0 * rate_Z / rate_Y * square) / 4


def attention_growth_printed(
    t: ArrayLike,
    *,
    learning_rate_Y: ArrayLike,
    learning_rate_Z: ArrayLike,
    num_classes: ArrayLike,
    vocab_size: ArrayLike,
    C0: ArrayLike = 1.0,
) -> Array:
    r"""The late form as it is printed, about four times too large: see `attention_growth_snapping`.

        B = ln(C0 + 2 K (learning_rate_Z / learning_rate_Y) ln^2(M learning_rate_Y t / K))

    Source: tian2023scan, Theorem 4, as in the talks. Arguments, result and errors are those of
    `attention_growth_snapping`.

    Example:
        >>> rates = dict(learning_rate_Y=1.0, learning_rate_Z=1.0)
        >>> t = 20 * jnp.log(1e3)
        >>> round(float(attention_growth_printed(t, **rates, num_classes=10, vocab_size=1000)), 2)
        7.51
    """
    t, rate_Y, K, M = _require_setting(t, learning_rate_Y, num_classes, vocab_size)
    rate_Z, C0 = _require_growth(learning_rate_Z, C0, t.dtype)
    rate_Y = require_positive("learning_rate_Y", rate_Y, rate_Y.dtype)
    return jnp.log(C0 + 2 * K * rate_Z / rate_Y * jnp.log(M * rate_Y * t / K) ** 2)


def log_relative_gain(
    Z: ArrayLike, classes: SequenceClasses, token: ArrayLike, reference: ArrayLike
) -> Float[Array, " K"]:
    r"""ln(1 + r) with r = c~_l^2 / c~_l'^2 - 1, the relative gain of a token over another in every class.

    c~_l = P(l | n) exp(z_ml) underflows for tokens that attention has left; its logarithm does not.

    Source: tian2023scan, Theorem 3.

    Args:
        Z: attention logits [query, context token], shape (M, M).
        classes: K sequence classes.
        token: l of each class, integers, shape (K,) or ().
        reference: l' of each class, integers, shape (K,) or ().

    Returns:
        ln(1 + r), shape (K,); NaN where a traced token lies outside of the vocabulary.

    Raises:
        ValueError: `Z` has the wrong shape, or a token lies outside of the vocabulary.

    Example:
        >>> classes = SequenceClasses([[0.8, 0.2]], query=[0], next_token=[1])
        >>> round(float(log_relative_gain(jnp.zeros((2, 2)), classes, 0, 1)[0]), 6)  # 2 ln 4
        2.772589
    """
    log_weights = log_context_weights(Z, classes)
    token, reference = (
        _require_tokens("token", token, classes),
        _require_tokens("reference", reference, classes),
    )
    return 2 * (jax.vmap(rows)(log_weights, token) - jax.vmap(rows)(log_weights, reference))


def log_relative_gain_closed_form(
    Z: ArrayLike,
    classes: SequenceClasses,
    token: ArrayLike,
    reference: ArrayLike,
    Z0: ArrayLike | None = None,
) -> Float[Array, " K"]:
    r"""ln(1 + r) by the closed form r(t) = r(0) exp(2 (z_ml(t) - z_ml(0))), which knows nothing of z_ml'.

    It holds in both reduced flows for two distinct tokens of a class, and then 1 / c~_l^2 - 1 / c~_l'^2 is
    conserved. `log_relative_gain` is what it is to be compared with.

    Source: tian2023scan, Theorem 3.

    Args:
        Z: attention logits [query, context token] at time t, shape (M, M).
        classes: K sequence classes.
        token: l of each class, integers, shape (K,) or ().
        reference: l' of each class, integers, shape (K,) or ().
        Z0: attention logits at the start, shape (M, M); zero where None.

    Returns:
        ln(1 + r), shape (K,). NaN where r(0) < 0 and the form promises less than nothing: take the token
        that is more probable than the reference.

    Raises:
        ValueError: `Z` or `Z0` has the wrong shape, or a token lies outside of the vocabulary.

    Example:
        >>> classes = SequenceClasses([[0.8, 0.2]], query=[0], next_token=[1])
        >>> zeros = jnp.zeros((2, 2))
        >>> round(float(log_relative_gain_closed_form(zeros, classes, 0, 1)[0]), 6)
        2.772589
    """
    Z = as_real("Z", Z)
    Z0 = jnp.zeros_like(Z) if Z0 is None else as_real("Z0", Z0)
    require_shape("Z0", Z0, (classes.vocab_size, classes.vocab_size))
    initial = jnp.expm1(log_relative_gain(Z0, classes, token, reference))
    gained = log_context_weights(Z, classes) - log_context_weights(Z0, classes)
    gained = jax.vmap(rows)(gained, _require_tokens("token", token, classes))
    return jnp.log1p(initial * jnp.exp(2 * gained))


def _require_tokens(name: str, tokens: ArrayLike, classes: SequenceClasses) -> Array:
    tokens = require_indices(name, tokens, classes.vocab_size)
    if tokens.shape not in ((), (classes.num_classes,)):
        raise ValueError(f"{name} must have shape () or ({classes.num_classes},), got shape {tokens.shape}")
    return jnp.broadcast_to(tokens, (classes.num_classes,))


def _require_setting(
    t: ArrayLike, learning_rate_Y: ArrayLike, num_classes: ArrayLike, vocab_size: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    t = require_every("t", as_real("t", t), lambda t: (t >= 0) & (t < np.inf), "finite and >= 0")
    rate = require_number("learning_rate_Y", learning_rate_Y, t.dtype, at_least=0)
    K = require_number("num_classes", num_classes, t.dtype, at_least=1)
    return t, rate, K, require_number("vocab_size", vocab_size, t.dtype, at_least=2)


def _require_growth(learning_rate_Z: ArrayLike, C0: ArrayLike, dtype: Any) -> tuple[Array, Array]:
    rate = require_number("learning_rate_Z", learning_rate_Z, dtype, at_least=0)
    return rate, require_positive("C0", C0, dtype)
