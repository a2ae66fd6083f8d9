"""Nonlinear nodes under the contrastive energy: a power iteration whose matrix depends on the node itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    cast,
    nan_unless,
    require_arrays,
    require_choice,
    require_every,
    require_integer,
    require_number,
    require_sizes,
    require_times,
    require_vector,
)
from dynamics.contrastive.energy import covariance, importance_laplacian, require_importance
from dynamics.contrastive.family import require_views
from dynamics.flow import Trajectory, all_finite

_LONGEST = 0.25  # of a step, over 1 / |A(w) w|
Activation = Callable[[Any], Any]
Kind = Literal["linear", "relu", "leaky_relu", "monomial"]


def homogeneous_activation(
    kind: Kind | str, power: int | None = None, slope: ArrayLike | None = None
) -> Activation:
    r"""An activation h with h(x) = h'(x) x, by name; monomials have that up to their constant.

    | kind | h(x) |
    |---|---|
    | linear | x |
    | relu | max(x, 0) |
    | leaky_relu | max(x, slope x) |
    | monomial | x^p / p, with p h(x) = h'(x) x |

    For monomials w^T A(w) w is p^2 times the energy of the node, and 2 A(w) w is p times its gradient.

    Source: tian2023nonlinear, the talk's slide on the overview of nonlinear analysis.

    Args:
        kind: "linear", "relu", "leaky_relu" or "monomial".
        power: p, an integer from 1 on, of monomials alone; 2 where None.
        slope: of the leaky ReLU alone, where x is negative, a number between 0 and 1; 0.1 where None.

    Returns:
        h, a function of a number.

    Raises:
        ValueError: the kind is unknown or has no such number, or that is out of range.

    Example:
        >>> float(homogeneous_activation("monomial", power=2)(3.0))
        4.5
    """
    require_choice("kind", kind, get_args(Kind))
    for name, given, own in (("power", power, "monomial"), ("slope", slope, "leaky_relu")):
        if given is not None and kind != own:
            raise ValueError(f"{name} is no hyperparameter of {kind}, but of {own} alone")
    power = require_integer("power", 2 if power is None else power, at_least=1)
    dtype = jnp.result_type(float)
    slope = require_number("slope", 0.1 if slope is None else slope, dtype, at_least=0, at_most=1)
    # Functions of the module, so that programs that were compiled for one are found again.
    return {
        "linear": Partial(_linear),
        "relu": Partial(jax.nn.relu),
        "leaky_relu": Partial(_leaky_relu, slope),
        "monomial": Partial(_monomial, power),
    }[kind]


def _linear(x):
    return x


def _leaky_relu(slope, x):
    x = jnp.asarray(x)
    x = x.astype(jnp.result_type(x, 1.0))
    return jnp.where(x > 0, x, slope.astype(x.dtype) * x)


def _monomial(power, x):
    return x**power / power


def gated_covariance(
    w: ArrayLike, x: ArrayLike, x_aug: ArrayLike, alpha: ArrayLike, activation: Activation
) -> Float[Array, "d d"]:
    r"""A(w) = C_alpha[x~, x~] of gated inputs x~ = x h'(w^T x), the matrix whose power iteration a node does.

    The energy of a node h(w^T x) is w^T A(w) w for h(x) = h'(x) x, and its gradient 2 A(w) w.

    Source: tian2023nonlinear, the talk's slide on the nonlinear setting.

    Args:
        w: weights of a node, (d,).
        x: one view of N >= 2 samples, (N, d).
        x_aug: the other view, (N, d).
        alpha: importance of pairs, (N, N); its diagonal has no part.
        activation: h, a function of a number.

    Returns:
        A(w), symmetric, (d, d).

    Raises:
        ValueError: the shapes do not fit, there is one sample alone, or numbers are not finite.

    Example:
        >>> x = [[1.0, 0.0], [0.0, 1.0]]
        >>> gated_covariance([1.0, 0.0], x, x, [[0.0, 1.0], [0.0, 0.0]], jax.nn.relu).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    x, x_aug = require_views(x=x, x_aug=x_aug)
    w, alpha = _require_node(w, x, [1]), require_importance(alpha, x)
    found = _matrix(w, x, x_aug, alpha, activation)
    return nan_unless(all_finite((w, x, x_aug, alpha)), found)


def power_flow(
    w0: ArrayLike,
    x: ArrayLike,
    x_aug: ArrayLike,
    alpha: ArrayLike,
    activation: Activation,
    ts: ArrayLike,
    *,
    steps: int = 4000,
) -> Trajectory:
    r"""Ascent of the energy by nodes of unit norm, dw/dt = (I - w w^T) A(w) w, each by itself.

    A(w) is `gated_covariance`. Nodes with ReLU end on the edges of their gates, where the field jumps, and
    steps that adapt to errors shrink without end: these are fixed, of order four where gates stay as they are
    and of order one where they turn. A node whose gates are all closed does not move.

    Source: tian2023nonlinear, the talk's slide on training dynamics.

    Args:
        w0: nodes at ts[0], of unit norm, (d,) or (K, d).
        x: one view of N >= 2 samples, (N, d).
        x_aug: the other view, (N, d).
        alpha: importance of pairs, (N, N); its diagonal has no part.
        activation: h, a function of a number, with h(x) = h'(x) x. Static.
        ts: times, (T,).
        steps: about how many steps of Runge and Kutta there are, equally many between any two times. Static.

    Returns:
        A `Trajectory` of the nodes, (T, d) or (T, K, d); `ok` is false where a step is longer, for some node,
            than 1 / (4 |A(w) w|).

    Raises:
        ValueError: the shapes do not fit, a norm is not one, there is one sample alone, or numbers are not
            finite.

    Example:
        >>> x, alpha = [[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
        >>> path = power_flow([0.8, 0.6], x, x, alpha, jax.nn.relu, [0.0, 20.0])
        >>> abs(path.ys[-1]).round(6).tolist()
        [1.0, 0.0]
    """
    x, x_aug = require_views(x=x, x_aug=x_aug)
    nodes, alpha = _require_node(w0, x, [1, 2]), require_importance(alpha, x)
    ts = require_times(ts, x.dtype)
    (steps,) = require_sizes(steps=steps)
    slack = 100 * float(jnp.finfo(x.dtype).eps)
    norms = jnp.linalg.norm(nodes, axis=-1)
    unit = require_every("w0", norms, lambda n: abs(n - 1) < slack, "of unit norm")
    start = jnp.atleast_2d(nodes * (unit / norms)[..., None])
    good = all_finite((start, x, x_aug, alpha, ts))
    path, ok = _flown(start, x, x_aug, alpha, activation, ts, -(-steps // max(len(ts) - 1, 1)))
    path = nan_unless(good, path)
    return Trajectory(ts, path if nodes.ndim == 2 else path[:, 0], ok & good)


def pattern_coverage(shares: ArrayLike, nodes: int) -> Float[Array, ""]:
    r"""How many patterns some node learns on average, sum_m 1 - (1 - q_m)^K, of K nodes that start at random.

    Source: tian2023nonlinear, the talk's slide on several nodes (this mean is derived here).

    Args:
        shares: q, of starts that end at each pattern, (M,), between 0 and 1.
        nodes: K.

    Returns:
        The mean number of patterns.

    Raises:
        ValueError: a share is out of range and can be looked at, or `nodes` is no positive integer.

    Example:
        >>> float(pattern_coverage([0.5, 0.5], 2))
        1.5
    """
    (nodes,) = require_sizes(nodes=nodes)
    q = require_every(
        "shares", require_vector("shares", shares, "M"), lambda q: (q >= 0) & (q <= 1), "in [0, 1]"
    )
    return jnp.sum(1 - (1 - q) ** nodes)


def _require_node(w: ArrayLike, x: Array, dims: list[int]) -> Array:
    (w,) = require_arrays(w0=w) if len(dims) > 1 else require_arrays(w=w)
    d = x.shape[1]
    if w.ndim not in dims or w.shape[-1] != d:
        name, shape = ("w0", f"({d},) or (K, {d})") if len(dims) > 1 else ("w", f"({d},)")
        raise ValueError(f"{name} must have shape {shape}, got shape {w.shape}")
    return cast(w, x.dtype)


@eqx.filter_jit
def _matrix(w, x, x_aug, alpha, activation):
    gated, gated_aug = _gated(w, x, activation), _gated(w, x_aug, activation)
    return covariance(alpha, gated, gated_aug, gated, gated_aug)


def _gated(w, x, activation):
    return x * jax.vmap(jax.grad(activation))(x @ w)[:, None]


def _ascents(nodes, x, x_aug, alpha, activation):
    """A(w) w of each node as products of matrices: what is gated is never built, nor are the matrices."""
    rows, laplacian = importance_laplacian(alpha)
    slopes = jax.vmap(jax.vmap(jax.grad(activation)))

    def gated(view):
        pre = nodes @ view.T
        gate = slopes(pre)
        return gate, gate * pre

    (gate, out), (gate_aug, out_aug) = gated(x), gated(x_aug)
    # A shift that all samples share has no part.
    between = (out - jnp.mean(out, axis=1, keepdims=True)) @ laplacian
    within = (out - out_aug) * rows[None]
    return (gate * (between - within)) @ x + (gate_aug * within) @ x_aug


@eqx.filter_jit
def _flown(nodes, x, x_aug, alpha, activation, ts, substeps):
    def ascent(w):
        return _ascents(w, x, x_aug, alpha, activation)

    def along(w, a):
        return a - jnp.sum(a * w, axis=1, keepdims=True) * w

    def field(w):
        return along(w, ascent(w))

    def step(carry, _, dt):
        w, a, speed = carry
        first = along(w, a)
        second = field(w + dt / 2 * first)
        third = field(w + dt / 2 * second)
        w = w + dt / 6 * (first + 2 * second + 2 * third + field(w + dt * third))
        w = w / jnp.linalg.norm(w, axis=1, keepdims=True)
        a = ascent(w)
        return (w, a, jnp.maximum(speed, jnp.max(jnp.linalg.norm(a, axis=1)) * dt)), None

    def until_next(carry, span):
        carry, _ = jax.lax.scan(partial(step, dt=span / substeps), carry, length=substeps)
        return carry, carry[0]

    start = nodes, ascent(nodes), jnp.zeros((), nodes.dtype)
    (*_, speed), path = jax.lax.scan(until_next, start, jnp.diff(ts))
    path = jnp.concatenate([nodes[None], path])
    return path, (speed <= _LONGEST) & jnp.all(jnp.isfinite(path))
