"""The unconstrained-features model: how far weight decay shrinks features and classifier, when to zero."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics.arguments import ArrayLike, as_real, require_number, require_sizes


def features_minimum(
    classes: int, per_class: int, gamma_w: ArrayLike, gamma_h: ArrayLike, bias: bool = False
) -> Float[Array, " classes"]:
    r"""Singular values of W H at the global minimum of the unconstrained-features model.

        L = |W H + b 1^T - Y|^2 / (2 N) + (gamma_w / 2) |W|^2 + (gamma_h / 2) |H|^2

    with K classes of n samples each, N = K n, one-hot targets Y, and features H that are free. They are

        (n^{1/2} - N (gamma_w gamma_h)^{1/2})_+

    K times without the bias b, and K - 1 times and 0 with one, which is not regularized. Features of a class
    are equal there: neural collapse. All of them are zero where K^2 n gamma_w gamma_h >= 1.

    Source: ziyin2022talk, slides on neural collapse (the minimum is derived here).

    Args:
        classes: K. Static.
        per_class: n. Static.
        gamma_w: weight decay of the classifier W, a number >= 0; at 0 the result is a limit.
        gamma_h: that of the features H, likewise; a sample has at least as many of them as there are classes.
        bias: whether the classifier has a bias.

    Returns:
        The values, descending, (classes,).

    Raises:
        ValueError: an argument is out of range and can be looked at.

    Example:
        >>> features_minimum(2, 4, 0.25, 0.01, bias=True).tolist()
        [1.6, 0.0]
    """
    classes, per_class = require_sizes(classes=classes, per_class=per_class)
    if not isinstance(bias, (bool, np.bool_)):
        raise ValueError(f"bias must be True or False, got {bias!r}")
    gamma_w, gamma_h = as_real("gamma_w", gamma_w), as_real("gamma_h", gamma_h)
    rates = [
        require_number(name, gamma, gamma_w.dtype, at_least=0)
        for name, gamma in (("gamma_w", gamma_w), ("gamma_h", gamma_h))
    ]
    return _values(classes, per_class, rates[0], rates[1], bool(bias))


@eqx.filter_jit
def _values(classes, per_class, gamma_w, gamma_h, bias):
    # Two roots: the product of two small numbers would vanish.
    value = per_class**0.5 - classes * per_class * (jnp.sqrt(gamma_w) * jnp.sqrt(gamma_h))
    alive = jnp.arange(classes) < classes - bias
    return jnp.where(alive, jnp.maximum(value, 0), 0 * value)
