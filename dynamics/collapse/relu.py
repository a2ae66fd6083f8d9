"""Networks with one hidden layer of ReLU: how much regularization makes their origin stable."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from dynamics.arguments import ArrayLike, nan_unless, require_arrays, require_shapes, require_sizes
from dynamics.flow import all_finite

# Steps along the sphere that an ascent chooses from, over the radius; one is that of a power iteration.
_STEPS = tuple(4.0**power for power in range(1, -12, -1))
_MOST = 1000  # iterations of an ascent; it ends as soon as no start gains


class ReluCritical(NamedTuple):
    """Where the origin of a ReLU network becomes stable, and which direction is the last to.

    Attributes:
        gamma: the critical strength, a number.
        w: the direction of incoming weights that has it, of norm one, (d,).
        u: the direction of outgoing weights beside it, of norm one, (k,); (1,) for targets (n,).
        maxima: what the ascent from each start found, descending, (starts,): the largest is gamma, and others
            are local maxima.
    """

    gamma: Any
    w: Any
    u: Any
    maxima: Any


def relu_critical_gamma(x: ArrayLike, y: ArrayLike, key: Array, starts: int = 32) -> ReluCritical:
    r"""Strength of regularization below which the origin of a two-layer ReLU network is unstable.

    For a network u relu(W x) without biases, of any width, and its loss

        E|U relu(W x) - y|^2 + gamma_w |W|^2 + gamma_u |U|^2

    a small neuron (u, w) changes it by -2 u . E[y relu(w . x)] + gamma_w |w|^2 + gamma_u |u|^2 up to second
    order: some neuron grows if and only if (gamma_u gamma_w)^{1/2} is less than

        gamma = max over |w| = 1 of |E[y relu(w . x)]|.

    At and above it zero is the only stationary point: weights a theta have the loss E|y|^2 + a^2 Q + a^4 R,
    where both Q and R = E|f|^2 are positive, so that collapse is a matter of the origin's stability.

    The maximum is no convex problem; it is searched by an ascent along the sphere from random starts, so that
    what is found is a lower bound, which more starts can raise. For targets >= 0, such as classes, it is
    found to rounding; else it may lie in a kink, where some w . x is zero, and is found to about 1e-5 of its
    size. Derivatives by the data are right where it is in no kink.

    Source: ziyin2022talk, slide on sparsity (the critical strength is derived here).

    Args:
        x: inputs, (n, d). They are not centered here.
        y: targets, (n,) or (n, k).
        key: of the starts.
        starts: how many there are. Static.

    Returns:
        A `ReluCritical`. NaN where a traced argument is not finite.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.

    Example:
        >>> found = relu_critical_gamma([[3.0], [-1.0]], [1.0, 1.0], jax.random.key(0), starts=8)
        >>> found.gamma.tolist(), found.w.tolist(), found.u.tolist()
        (1.5, [1.0], [1.0])
    """
    x, y = require_arrays(x=x, y=y)
    require_shapes(x=(x, "n d"), y=(y, "n k" if y.ndim == 2 else "n"))
    (starts,) = require_sizes(starts=starts)
    return _searched(x, y.reshape(len(y), -1), key, starts)


@eqx.filter_jit
def _searched(x, y, key, starts):
    # The ascent sees data of order one; the maximum scales with both.
    sizes = [jax.lax.stop_gradient(jnp.max(jnp.abs(data))) for data in (x, y)]
    sizes = [jnp.where(size == 0, 1, size) for size in sizes]
    x, y = x / sizes[0], y / sizes[1]
    directions, maxima = _ascended(*jax.lax.stop_gradient((x, y)), key, starts)
    w = directions[jnp.argmax(maxima)]
    # Derivatives go through this alone: at a maximum those of the direction have no part in them.
    signal = _signal(x, y, w)
    gamma = _length(signal)
    u = signal / jnp.where(gamma == 0, 1, gamma)
    good = all_finite((x, y))
    scale = sizes[0] * sizes[1]
    result = ReluCritical(gamma * scale, w, u, jnp.sort(maxima)[::-1] * scale)
    return jax.tree.map(lambda leaf: nan_unless(good, leaf), result)


def _signal(x, y, w):
    """E[y relu(w . x)]."""
    return y.T @ jax.nn.relu(x @ w) / len(x)


def _length(v):
    square = jnp.sum(v**2)
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _ascended(x, y, key, starts):
    """Directions (starts, d) and what |E[y relu(w . x)]| is there after an ascent along the sphere."""

    def value(w):
        return _length(_signal(x, y, w))

    def climb(w, height):
        slope = jax.grad(value)(w)
        moved = height * w[None] + jnp.asarray(_STEPS, x.dtype)[:, None] * (slope - (slope @ w) * w)[None]
        lengths = jnp.linalg.norm(moved, axis=1, keepdims=True)
        moved = moved / jnp.where(lengths == 0, 1, lengths)
        heights = jax.vmap(value)(moved)
        best = jnp.argmax(heights)
        gains = heights[best] > height
        return jnp.where(gains, moved[best], w), jnp.where(gains, heights[best], height)

    def goes_on(state):
        _, _, count, gains = state
        return gains & (count < _MOST)

    def step(state):
        w, height, count, _ = state
        w, higher = jax.vmap(climb)(w, height)
        least = height + 4 * jnp.finfo(x.dtype).eps * jnp.max(height)
        return w, higher, count + 1, jnp.any(higher > least)

    w = jax.random.normal(key, (starts * x.shape[1],), x.dtype).reshape(starts, -1)
    w = w / jnp.linalg.norm(w, axis=1, keepdims=True)
    both = jnp.stack([w, -w])
    heights = jax.vmap(jax.vmap(value))(both)
    # On one side of a start there may be no input at all.
    side = jnp.argmax(heights, axis=0)
    state = (jnp.where(side[:, None] == 0, w, -w), jnp.max(heights, axis=0), jnp.zeros((), int), True)
    w, height, _, _ = jax.lax.while_loop(goes_on, step, state)
    return w, height
