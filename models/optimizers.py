"""Optimizers as lanes of one program: made by one signature, and chosen by a number that may be traced.

Each is made from a learning rate, a second number (the momentum, or the last rate over the first) and the
number of steps. A number that is negative or not finite is refused with ValueError; where it is traced, the
updates are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from dynamics.arguments import is_traced, nan_unless, require_number, require_positive

# A number of Python, or of a trace.
Number = int | float | jax.Array


def descent(rate: Number, momentum: Number, steps: Number) -> optax.GradientTransformation:
    """Gradient descent with heavy-ball momentum."""
    momentum = _at_least_zero("momentum", momentum)
    return optax.sgd(_at_least_zero("rate", rate), momentum=momentum)


def adam(rate: Number, _: Number, steps: Number) -> optax.GradientTransformation:
    """Adam, which makes no use of the second number."""
    return optax.adam(_at_least_zero("rate", rate))


def langevin(time_step: Number, temperature: Number, key: jax.Array) -> optax.GradientTransformation:
    r"""Gradient descent with Gaussian noise: Euler's scheme of d theta = -grad L dt + sqrt(2 T) dB.

    Its density at rest is exp(-L / T), up to the order of the time step.

    Source: ziyin2022talk, slide on critical dynamics.

    Args:
        time_step: dt >= 0, the learning rate and the time that a step stands for.
        temperature: T >= 0.
        key: of the noise; `train` hands on none of its own.

    Raises:
        ValueError: a number is negative or not finite, and can be looked at.

    Example:
        >>> optimizer = langevin(0.5, 0.0, jax.random.key(0))
        >>> optimizer.update(jnp.array(1.0), optimizer.init(jnp.array(0.0)))[0].tolist()
        -0.5
    """
    time_step = _at_least_zero("time_step", time_step)
    temperature = _at_least_zero("temperature", temperature)
    # The noise is added to the step and not to the gradient, whose own would be infinite as dt goes to zero.
    return optax.chain(optax.sgd(time_step), optax.add_noise(2 * temperature * time_step, 0, key))


def normalized_descent(rate: Number, decay: Number, steps: Number) -> optax.GradientTransformation:
    """Steps along the gradient whose length is the learning rate, which decays by `decaying`."""
    # The default eps of 1e-6 would make it plain gradient descent where the gradient is small.
    return optax.chain(optax.normalize_by_update_norm(eps=1e-30), decaying(rate, decay, steps))


def sign_descent(rate: Number, decay: Number, steps: Number) -> optax.GradientTransformation:
    """Steps along the signs of the gradient; their size, the learning rate, decays by `decaying`."""
    return optax.chain(optax.scale_by_sign(), decaying(rate, decay, steps))


def decaying(rate: Number, decay: Number, steps: Number) -> optax.GradientTransformation:
    """The last link of a chain: it scales by a rate that falls by the factor `decay` in `steps`."""
    rate = _at_least_zero("rate", rate)
    good = [
        require_positive(name, x, jnp.result_type(float)) > 0
        for name, x in (("decay", decay), ("steps", steps))
    ]
    if is_traced(decay, steps):  # whose power zero is one, NaN or not
        rate = nan_unless(good[0] & good[1], rate)
    return optax.scale_by_learning_rate(lambda count: rate * decay ** (jnp.asarray(count, float) / steps))


def _at_least_zero(name: str, number: Number) -> Number:
    """The number as it is, since one of Python takes the update's dtype; NaN where it is bad and traced."""
    require_number(name, number, jnp.result_type(float), at_least=0)
    if not is_traced(number):
        return number
    # A factor of Python's numbers keeps the weak type of a number of Python that is traced.
    return number * jnp.where((number >= 0) & jnp.isfinite(number), 1.0, jnp.nan)


def along_spheres(axis: int | None = None) -> optax.GradientTransformation:
    """Gradients without their part along each parameter, in front of descent that keeps norms to first order.

    The norm is that of a whole parameter, or of each part along an axis, such as the columns of a kernel.

    Example:
        >>> optimizer, w = along_spheres(), jnp.array([1.0, 0.0])
        >>> optimizer.update(jnp.array([3.0, 2.0]), optimizer.init(w), w)[0].tolist()
        [0.0, 2.0]
    """

    def inner(g, w):
        return jnp.sum(g * w, axis=axis, keepdims=True)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params must be given to along_spheres, which looks at where they are")
        return jax.tree.map(lambda g, w: g - (inner(g, w) / inner(w, w)) * w, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def one_of(index: Number, optimizers: Sequence[optax.GradientTransformation]) -> optax.GradientTransformation:
    """The optimizer of a given number, which may be traced: lanes of one program may have different ones.

    Example:
        >>> optimizer = one_of(1, [optax.sgd(0.5), optax.sgd(0.25)])
        >>> optimizer.update(jnp.array(1.0), optimizer.init(jnp.array(0.0)))[0].tolist()
        -0.25
    """

    def init(params):
        return tuple(optimizer.init(params) for optimizer in optimizers)

    def update(updates, state, params=None):
        moves = [
            optimizer.update(updates, own, params) for optimizer, own in zip(optimizers, state, strict=True)
        ]
        proposed, state = zip(*moves, strict=True)
        return jax.tree.map(lambda *leaves: jax.lax.select_n(index, *leaves), *proposed), state

    return optax.GradientTransformation(init, update)
