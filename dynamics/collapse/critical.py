"""Critical and metastable strengths of regularization, and the order of a transition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import ArrayLike, as_concrete, as_real, brief, require_number
from dynamics.collapse.moments import (
    Moments,
    log_volume,
    nan_unless_finite,
    require_moments,
    require_widths,
    scaled,
    spectrum,
)
from dynamics.collapse.search import best_ridge, powers


def critical_gamma(moments: Moments, noise_variance: ArrayLike, widths: Sequence[int]) -> Float[Array, ""]:
    r"""The smallest gamma, equal on all layers, at which zero is a global minimum: complete collapse.

        gamma_c^{(D + 1) / D} = rho^{1 - 1 / D} / D  max_lambda lambda^{1 / D} c^T (A + lambda)^{-1} c

    It is for linear networks without biases. gamma is half of a weight decay that is added to the gradient of
    the mean of |f(x) - y|^2, as by `optax.add_decayed_weights` before `optax.sgd`, and all of it for half of
    that loss; decay that is decoupled, as in AdamW, ends elsewhere. Where layers have different strengths,
    their geometric mean counts. For several outputs and one hidden layer without noise gamma_c is the
    spectral norm of E[y x^T], see `nuclear_minimum`; nothing is known here of deeper ones.

    It is |c| for one hidden layer, whatever A, widths and noise are; for more it depends on all of them. For
    A = a I and widths w

        gamma_c = [w^{2D - 2} |c|^2 ((D - 1) / B)^{(D - 1) / D} / D^2]^{D / (D + 1)},   B = w^D (s + w)^D a

    Source: ziyin2022talk, Theorems 1 and 2 (the formula is derived here).

    Args:
        moments: `Moments` of data with one output.
        noise_variance: s >= 0; dropout at rate p has s = p / (1 - p).
        widths: hidden units of the D hidden layers; static. Ridge regression, (), never collapses.

    Returns:
        gamma_c, a number; infinity for ridge regression, 0 where there is no signal, c = 0.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> data = Moments(jnp.eye(2), [0.6, 0.8], 1.0)
        >>> [round(float(critical_gamma(data, 0.5, widths)), 5) for widths in ((4,), (4, 4))]
        [1.0, 0.36688]
    """
    return _of_deep(_critical, moments, noise_variance, widths)


def metastable_gamma(moments: Moments, noise_variance: ArrayLike, widths: Sequence[int]) -> Float[Array, ""]:
    r"""The largest gamma, equal on all layers, at which a minimum other than zero is left.

        gamma_m^{(D + 1) / D} = rho^{1 - 1 / D}  max_lambda lambda^{1 + 1 / D} |(A + lambda)^{-1} c|^2

    Between `critical_gamma` and it a network that has learned stays where it is, though zero is better; one
    that has collapsed stays at zero at every gamma, unless it is kicked, see `hysteresis_sweep`. For
    A = a I the ratio of the two is (D + 1) / 4^{D / (D + 1)}: 1 for one hidden layer, 1.19 for two.

    Source: ziyin2022talk, slides on more layers (the formula is derived here).

    Args:
        moments: `Moments` of data with one output.
        noise_variance: s >= 0.
        widths: hidden units of the D hidden layers; static.

    Returns:
        gamma_m, a number; infinity for ridge regression, 0 where there is no signal, c = 0.

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> data = Moments(jnp.eye(2), [0.6, 0.8], 1.0)
        >>> round(float(metastable_gamma(data, 0.5, (4, 4)) / critical_gamma(data, 0.5, (4, 4))), 6)
        1.190551
    """
    return _of_deep(_metastable, moments, noise_variance, widths)


def _of_deep(function, moments, noise_variance, widths):
    """The function of a network that has hidden layers, with its arguments looked at."""
    moments, widths = require_moments(moments), require_widths(widths)
    noise_variance = require_number("noise_variance", noise_variance, moments.A.dtype, at_least=0)
    return function(moments, noise_variance, widths)


@eqx.filter_jit
def _critical(moments, noise_variance, widths):
    depth = len(widths)
    if depth < 2:
        return _shallow(moments, noise_variance, depth)

    def log_height(z, powers):
        return z / depth + jnp.log(powers.fit)

    def crossing(z, powers):
        return jnp.exp(z) * powers.norm / powers.fit - 1 / depth

    height, signal = _highest(log_height, crossing, moments, 1 / (depth - 1), depth)
    log_gamma = depth / (depth + 1) * (height + _volume(noise_variance, widths) - np.log(depth))
    return nan_unless_finite((moments, noise_variance), jnp.where(signal, jnp.exp(log_gamma), 0))


@eqx.filter_jit
def _metastable(moments, noise_variance, widths):
    depth = len(widths)
    if depth < 2:
        return _shallow(moments, noise_variance, depth)

    def log_height(z, powers):
        return (1 + 1 / depth) * z + jnp.log(powers.norm)

    def crossing(z, powers):
        return 2 * jnp.exp(z) * powers.fall / powers.norm - (1 + 1 / depth)

    height, signal = _highest(log_height, crossing, moments, (depth + 1) / (depth - 1), depth)
    log_gamma = depth / (depth + 1) * (height + _volume(noise_variance, widths))
    return nan_unless_finite((moments, noise_variance), jnp.where(signal, jnp.exp(log_gamma), 0))


def _volume(noise_variance, widths):
    """The log of rho^{1 - 1 / D}."""
    return (1 - 1 / len(widths)) * log_volume(noise_variance, widths)


def _shallow(moments, noise_variance, depth):
    """|c| for one hidden layer; without any, nothing collapses."""
    unit, _, log_c = scaled(moments)
    signal = jnp.sum(unit.c**2)
    length = jnp.where(signal > 0, jnp.sqrt(jnp.where(signal > 0, signal, 1)) * jnp.exp(log_c), 0)
    return nan_unless_finite((moments, noise_variance), length if depth else jnp.full_like(length, jnp.inf))


def _highest(log_height, crossing, moments, ratio, depth):
    """The largest `log_height` over all ridges, and whether there is a signal at all.

    Each direction of A alone has its largest where the ridge is `ratio` times its eigenvalue. Both heights
    are proportional to c^2 A^{1 / D - 1}.
    """
    signal = jnp.any(moments.c != 0)
    moments = moments._replace(c=jnp.where(signal, moments.c, jnp.ones_like(moments.c)))
    unit, log_A, log_c = scaled(moments)
    of = spectrum(unit.A)
    peaks = jnp.where(of.values > 0, ratio * of.values, of.values[-1])
    low, high = (jnp.log(jnp.where(peak > 0, peak, 1)) for peak in (jnp.min(peaks), jnp.max(peaks)))
    margin = jnp.log(jnp.full_like(low, 2))
    within = low - margin, high + margin
    z, _ = best_ridge(crossing, lambda *at: -log_height(*at), within, unit, of)
    return log_height(z, powers(z, unit, of)) + 2 * log_c - (1 - 1 / depth) * log_A, signal


def transition_order(order_parameter: Callable[[float], float], gamma_c: ArrayLike) -> int:
    r"""The order of the transition at gamma_c, from the squared norm m of all weights at the global minimum.

    Where all gammas are equal m is the derivative of the least loss L*, so that a jump of m is a transition
    of first order, and a kink one of second. With steps h that are relative to gamma_c,

        K(h) = |m(gamma_c + h) - 2 m(gamma_c) + m(gamma_c - h)| / h

    grows as 1 / h at a jump, tends to a number at a kink, and falls as h where m is smooth. The difference
    m(gamma_c - h) - m(gamma_c + h) alone would not tell a kink from a smooth function. Steps go
    from a tenth to a millionth, and the two smallest neighbours decide at which K is above the rounding of m,
    for which 1e4 units in its last place are allowed: a smaller kink is not seen.

    Source: ziyin2022talk, slides on phase transitions (the test is derived here).

    Args:
        order_parameter: m, a function of one number that returns one; it is called with Python numbers.
        gamma_c: where the transition is, positive; infinity stands for none.

    Returns:
        1 or 2; 0 where there is no transition.

    Raises:
        ValueError: `gamma_c` is not positive, or the order parameter is not finite.

    Example:
        >>> transition_order(lambda gamma: max(1.0 - gamma, 0.0), 1.0)
        2
    """
    if not callable(order_parameter):
        raise ValueError(f"order_parameter must be a function of gamma, got {brief(order_parameter)}")
    critical = as_concrete(as_real("gamma_c", gamma_c))
    if critical is None or critical.ndim or not critical > 0:
        raise ValueError(f"gamma_c must be a positive number that is concrete, got {brief(gamma_c)}")
    if critical == np.inf:
        return 0
    steps = 10.0 ** -np.arange(1, 7)
    m = np.array([[float(order_parameter(float(critical) * (1 + h * s))) for s in (-1, 0, 1)] for h in steps])
    if not np.all(np.isfinite(m)):
        raise ValueError("order_parameter must be finite near gamma_c, got NaN or infinity")
    # Numbers that 32 bits hold are taken for rounded to them.
    dtype = np.float32 if np.all(m.astype(np.float32) == m) else np.float64
    noise = 1e4 * np.finfo(dtype).eps * np.max(np.abs(m)) / steps
    bends = np.abs(m @ [1, -2, 1]) / steps
    clean = np.flatnonzero((bends > noise)[:-1] & (bends > noise)[1:])
    if not clean.size:
        return 0
    power = np.log10(bends[clean[-1]] / bends[clean[-1] + 1])
    return 0 if power > 0.5 else 1 if power < -0.5 else 2
