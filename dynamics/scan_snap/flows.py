"""The flows of decoder and attention: the full one, and its two reductions for a fast decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    is_traced,
    nan_unless,
    one_hot,
    require_every,
    require_finite,
    require_indices,
    require_number,
    require_shape,
    require_shapes,
    rows,
)
from dynamics.flow import Trajectory, all_finite, integrate
from dynamics.scan_snap.classes import SequenceClasses, distinct_tokens, log_counts
from dynamics.scan_snap.closed_forms import decoder_margin


class Weights(NamedTuple):
    """The state of the model, and the `ys` of its trajectories.

    Attributes:
        Y: decoder [context token, next token], shape (M, M).
        Z: attention logits [query, context token], shape (M, M).
    """

    Y: Array
    Z: Array


def population_flow(
    classes: SequenceClasses,
    ts: ArrayLike,
    *,
    learning_rate_Y: ArrayLike,
    learning_rate_Z: ArrayLike,
    Y0: ArrayLike | None = None,
    Z0: ArrayLike | None = None,
    **options: Any,
) -> Trajectory:
    r"""Gradient flow of the one-layer model on infinitely long sequences: no approximation beyond that.

    With c_n the `context_distribution`, f_n = c_n / |c_n| and g_n = e_n - softmax(Y^T f_n), where e_n is the
    one-hot next token of class n,

        Y'   = (learning_rate_Y / K) sum_n f_n g_n^T
        z_m' = (learning_rate_Z / K) sum_{n: psi(n) = m} f_n * (I - f_n f_n^T) Y g_n.

    The sums of Y over next tokens and of each row of Z are conserved. Where classes share no context token,
    or all have the same P, zero logits are at rest from a zero decoder; in the second case they are a saddle
    if the queries differ, since different attention could tell the classes apart, and rounding grows.

    Source: tian2023scan, Lemma 2.

    Args:
        classes: K sequence classes over a vocabulary of M tokens.
        ts: times that increase strictly, shape (T,): learning rates are per unit of time.
        learning_rate_Y: learning rate of the decoder, a number >= 0.
        learning_rate_Z: learning rate of attention, a number >= 0.
        Y0: decoder at ts[0], shape (M, M); zero where None.
        Z0: attention logits at ts[0], shape (M, M); zero where None.
        **options: options of `dynamics.flow.integrate`, such as `rtol`, `throw`.

    Returns:
        A `Trajectory` with `ys.Y` (T, M, M) [context token, next token] and `ys.Z` (T, M, M)
        [query, context token].

    Raises:
        ValueError: a learning rate is negative, a start has the wrong shape, or a number is not finite.
        RuntimeError: the solve failed.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], query=[1, 2], next_token=[1, 2])
        >>> path = population_flow(classes, [0.0, 9.0], learning_rate_Y=1.0, learning_rate_Z=1.0)
        >>> jnp.sign(path.ys.Z[-1]).tolist()  # the common token 0 is suppressed, the distinct ones grow
        [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    dtype, rates = _require_rates(classes, learning_rate_Y, learning_rate_Z)
    start = Weights(_require_start("Y0", Y0, classes, dtype), _require_start("Z0", Z0, classes, dtype))
    return integrate(_population_flow_field, _guard(start, rates, classes), ts, (classes, rates), **options)


def fast_decoder_flow(
    classes: SequenceClasses,
    ts: ArrayLike,
    *,
    learning_rate_Y: ArrayLike,
    learning_rate_Z: ArrayLike,
    Z0: ArrayLike | None = None,
    **options: Any,
) -> Trajectory:
    r"""Reduced flow for a decoder that learns faster than attention, from Y(0) = 0; Gram matrix kept exact.

    The decoder stays in the span of what is attended to now, Y = F^T A with rows f_n of F, and

        A' = (learning_rate_Y / K) (E - softmax(F F^T A)),   E the one-hot next tokens,

    with z' as in `population_flow`. Only dF/dt in Y' is dropped: the relative error of Z falls linearly with
    learning_rate_Z / learning_rate_Y. It is the theory to draw beside a trained network.

    Source: tian2023scan, section 4 (before its Theorem 1 replaces F F^T by the identity).

    Args:
        classes: K sequence classes over a vocabulary of M tokens.
        ts: times that increase strictly, shape (T,).
        learning_rate_Y: learning rate of the decoder, a number >= 0.
        learning_rate_Z: learning rate of attention, a number >= 0.
        Z0: attention logits at ts[0], shape (M, M); zero where None.
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys.Y` and `ys.Z` as in `population_flow`.

    Raises:
        ValueError: a learning rate is negative, the start has the wrong shape, or a number is not finite.
        RuntimeError: the solve failed.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], query=[1, 2], next_token=[1, 2])
        >>> fast_decoder_flow(classes, [0.0, 9.0], learning_rate_Y=1.0, learning_rate_Z=0.1).ys.Z.shape
        (2, 3, 3)
    """
    dtype, rates = _require_rates(classes, learning_rate_Y, learning_rate_Z)
    A0 = jnp.zeros((classes.num_classes, classes.vocab_size), dtype)
    start = (A0, _require_start("Z0", Z0, classes, dtype))
    path = integrate(_fast_decoder_field, _guard(start, rates, classes), ts, (classes, rates), **options)
    return _with_decoder(path, classes)


def weak_correlation_flow(
    classes: SequenceClasses,
    ts: ArrayLike,
    *,
    learning_rate_Y: ArrayLike,
    learning_rate_Z: ArrayLike,
    Z0: ArrayLike | None = None,
    **options: Any,
) -> Trajectory:
    r"""Reduced flow for a fast decoder and classes that hardly overlap, from Y(0) = 0: F F^T replaced by I.

    Every class then learns alone, a_n = M h(t) (e_n - 1/M) with the `decoder_margin` h, and

        z_m' = (learning_rate_Z / K) kappa sum_{n: psi(n) = m} sum_{n' != n} f_n * (f_n <f_n, f_n'> - f_n'),
        kappa = M h / (M - 1 + exp(M h)).

    It is quantitative only where <f_n, f_n'> is below about 0.01 (`class_overlap`); beyond that it shows the
    signs, but not the size: far too little where classes overlap much.

    Source: tian2023scan, Theorem 1 and section 5 (kappa is its gamma times M / (M - 1)^2).

    Args:
        classes: K sequence classes over a vocabulary of M tokens.
        ts: times that increase strictly, shape (T,); h starts from zero at ts[0].
        learning_rate_Y: learning rate of the decoder, a number >= 0.
        learning_rate_Z: learning rate of attention, a number >= 0.
        Z0: attention logits at ts[0], shape (M, M); zero where None.
        **options: options of `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ys.Y` and `ys.Z` as in `population_flow`.

    Raises:
        ValueError: a learning rate is negative, the start has the wrong shape, or a number is not finite.
        RuntimeError: the solve failed.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], query=[1, 2], next_token=[1, 2])
        >>> weak_correlation_flow(classes, [0.0, 9.0], learning_rate_Y=1.0, learning_rate_Z=0.1).ys.Z.shape
        (2, 3, 3)
    """
    dtype, rates = _require_rates(classes, learning_rate_Y, learning_rate_Z)
    start = (jnp.zeros((), dtype), _require_start("Z0", Z0, classes, dtype))
    path = integrate(_weak_correlation_field, _guard(start, rates, classes), ts, (classes, rates), **options)
    # A = u (E - 1/M) with u = M h.
    u, Z = path.ys
    A = u[:, None, None] * (_one_hot(classes, dtype) - 1 / classes.vocab_size)[None]
    return _with_decoder(Trajectory(path.ts, (A, Z), path.ok), classes)


def attended_features(Z: ArrayLike, counts: ArrayLike, query: ArrayLike) -> Float[Array, "B M"]:
    r"""What attention hands to the decoder, f = b / |b| with b_l proportional to N_l exp(z_ml).

    Source: tian2023scan, section 2 and Lemma 1.

    Args:
        Z: attention logits [query, context token], shape (M, M).
        counts: how often each token occurs in each context, or probabilities, shape (B, M); not negative.
        query: last tokens m, integers in 0, ..., M - 1, shape (B,).

    Returns:
        f of unit length, a row per sequence; zero for an empty context. NaN where a traced query or count is
        out of range.

    Raises:
        ValueError: the shapes do not fit, or a query or count is out of range and can be looked at.

    Example:
        >>> f = attended_features(jnp.zeros((2, 2)), jnp.array([[3.0, 4.0]]), jnp.array([0]))
        >>> [round(float(entry), 6) for entry in f[0]]
        [0.6, 0.8]
    """
    Z, counts, query = _require_sequences(Z, counts, query)
    return _attend(rows(Z, query), counts)


def _require_sequences(Z: ArrayLike, counts: ArrayLike, query: ArrayLike) -> tuple[Array, Array, Array]:
    Z, counts = as_real("Z", Z), as_real("counts", counts)
    require_shapes(Z=(Z, "M M"), counts=(counts, "B M"))
    query = require_indices("query", query, len(Z))
    require_shapes(counts=(counts, "B M"), query=(query, "B"))
    return Z, require_every("counts", counts, lambda n: (n >= 0) & (n < jnp.inf), "finite and >= 0"), query


def _attend(z: Array, counts: Array) -> Array:
    """The `attended_features` of contexts with attention logits z, a row each."""
    empty = jnp.all(counts == 0, axis=-1, keepdims=True)
    b = jax.nn.softmax(jnp.where(empty, 0, log_counts(counts) + z), axis=-1)
    return jnp.where(empty, 0, b / jnp.linalg.norm(b, axis=-1, keepdims=True))


def loss_gradient(
    Y: ArrayLike, Z: ArrayLike, counts: ArrayLike, query: ArrayLike, next_token: ArrayLike
) -> Weights:
    r"""Gradient of the mean cross-entropy of B sequences in Y and Z, written out.

    For one sequence, with f the `attended_features` and g = e_next - softmax(Y^T f),

        dL/dY = -f g^T,   dL/dz_m = -f * (I - f f^T) Y g.

    Source: tian2023scan, Lemma 1.

    Args:
        Y: decoder [context token, next token], shape (M, M).
        Z: attention logits [query, context token], shape (M, M).
        counts: how often each token occurs in each context, or probabilities, shape (B, M).
        query: last tokens, integers in 0, ..., M - 1, shape (B,).
        next_token: next tokens, alike.

    Returns:
        The gradient as `Weights`; NaN where a traced token or count is out of range.

    Raises:
        ValueError: the shapes do not fit, or a token or count is out of range and can be looked at.

    Example:
        >>> zeros = jnp.zeros((2, 2))
        >>> loss_gradient(zeros, zeros, jnp.eye(2)[:1], jnp.array([1]), jnp.array([0])).Y[0].tolist()
        [-0.5, 0.5]
    """
    Y = as_real("Y", Y)
    Z, counts, query = _require_sequences(Z, counts, query)
    next_token = require_indices("next_token", next_token, len(Z))
    require_shape("Y", Y, Z.shape)
    require_shape("next_token", next_token, query.shape)
    f = _attend(rows(Z, query), counts)
    return jax.tree.map(
        jnp.negative, _direction(Weights(Y, Z), f, one_hot(next_token, len(Y), Y.dtype), query)
    )


def _direction(weights: Weights, f: Array, labels: Array, query: Array) -> Weights:
    """Minus the gradient, of sequences with features f and one-hot next tokens."""
    Y, Z = weights
    g = labels - jax.nn.softmax(f @ Y, axis=-1)
    # A query that is out of range has a row of its own that is not there: no row is known then.
    start = nan_unless(jnp.all((query >= 0) & (query < len(Z))), jnp.zeros_like(Z))
    return Weights(f.T @ g / len(f), start.at[query].add(_pull(f, g @ Y.T) / len(f)))


def population_field(weights: Weights, classes: SequenceClasses) -> Weights:
    r"""The direction of `population_flow` at unit learning rates: minus `loss_gradient` with counts P.

    Example:
        >>> classes = SequenceClasses([[1.0, 0.0]], query=[1], next_token=[0])
        >>> population_field(Weights(jnp.zeros((2, 2)), jnp.zeros((2, 2))), classes).Y[0].tolist()
        [0.5, -0.5]
    """
    weights = _require_weights(weights, classes)
    f = _features(weights.Z, classes)
    return _direction(weights, f, _one_hot(classes, f.dtype), classes.query)


def growth_rate(weights: Weights, classes: SequenceClasses) -> Float[Array, " K"]:
    r"""xi_n of every class: the growth factor of attention is B_n(t) = learning_rate_Z * integral of xi_n.

    xi_n = z'_l / (learning_rate_Z f_nl^2) at the most probable distinct token l, where z' is what class n
    contributes to the `population_field`. Along `fast_decoder_flow` it is the same at every distinct token.
    (`weak_correlation_flow` has a rate of its own, `weak_growth_rate`.)

    Source: tian2023scan, Theorem 3.

    Args:
        weights: decoder and attention logits.
        classes: the sequence classes.

    Returns:
        xi, shape (K,); 0 for a class that has no distinct token, or whose attention has left it to rounding.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], query=[1, 2], next_token=[1, 2])
        >>> growth_rate(Weights(jnp.zeros((3, 3)), jnp.zeros((3, 3))), classes).tolist()
        [0.0, 0.0]
    """
    Y, Z = _require_weights(weights, classes)
    f = _features(Z, classes)
    g = _one_hot(classes, f.dtype) - jax.nn.softmax(f @ Y, axis=-1)
    v = g @ Y.T
    distinct = distinct_tokens(classes)
    likeliest = jnp.argmax(jnp.where(distinct, classes.P, -1), axis=-1)[:, None]
    f_l, v_l = (jnp.take_along_axis(a, likeliest, axis=-1)[:, 0] for a in (f, v))
    # z'_l = f_l (v_l - f_l <f, v>) / K.
    attended = jnp.any(distinct, axis=-1) & (f_l != 0)
    xi = v_l / jnp.where(attended, f_l, 1) - jnp.sum(f * v, axis=-1)
    # What is distinct for a class depends on all of them.
    good = jnp.all(jnp.isfinite(classes.P))
    return nan_unless(good, jnp.where(attended, xi / classes.num_classes, 0))


def class_overlap(Z: ArrayLike, classes: SequenceClasses) -> Float[Array, "K K"]:
    r"""Cosines <f_n, f_n'> between what the classes attend to, f_n = c_n / |c_n|.

    Off the diagonal they decide which reduced flow is good: `weak_correlation_flow` needs them below 0.01.

    Source: tian2023scan, section 4.

    Args:
        Z: attention logits [query, context token], shape (M, M).
        classes: the sequence classes.

    Returns:
        The Gram matrix F F^T, shape (K, K), ones on the diagonal.

    Raises:
        ValueError: `Z` has the wrong shape.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], [1, 2], [1, 2])
        >>> class_overlap(jnp.zeros((3, 3)), classes).round(6).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    Z = as_real("Z", Z)
    require_shape("Z", Z, (classes.vocab_size, classes.vocab_size))
    f = _features(Z, classes)
    return f @ f.T


def weak_growth_rate(
    Z: ArrayLike, classes: SequenceClasses, t: ArrayLike, learning_rate_Y: ArrayLike
) -> Float[Array, " K"]:
    r"""`growth_rate` of `weak_correlation_flow`: xi_n = (kappa(t) / K) sum_{n' != n} <f_n, f_n'>.

    Source: tian2023scan, Theorem 3.

    Args:
        Z: attention logits [query, context token] at time t, shape (M, M).
        classes: the sequence classes.
        t: the time, from the start of the flow, a number >= 0.
        learning_rate_Y: learning rate of the decoder.

    Returns:
        xi, shape (K,).

    Raises:
        ValueError: `t` or the learning rate is out of range.

    Example:
        >>> classes = SequenceClasses([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], query=[1, 2], next_token=[1, 2])
        >>> weak_growth_rate(jnp.zeros((3, 3)), classes, 0.0, 1.0).tolist()
        [0.0, 0.0]
    """
    K, M = classes.num_classes, classes.vocab_size
    t = require_number("t", t, classes.P.dtype, at_least=0)
    u = M * decoder_margin(t, learning_rate_Y, K, M)
    others = jnp.sum(class_overlap(Z, classes), axis=-1) - 1
    return u / (M - 1 + jnp.exp(u)) / K * others


def row_sums(weights: Weights) -> Weights:
    r"""What every one of these flows conserves: sum_j Y_lj over next tokens, and sum_l z_ml over the context.

    Gradient descent conserves it to rounding as well, with momentum and on sampled sequences.

    Source: tian2023scan, Lemma 1 (derived here from it).

    Args:
        weights: decoder and attention logits, shapes (..., M, M).

    Returns:
        The sums, shapes (..., M).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> row_sums(Weights(jnp.eye(2), jnp.ones((2, 2)))).Z.tolist()
        [2.0, 2.0]
    """
    Y, Z = (as_real(name, array) for name, array in zip(Weights._fields, weights, strict=True))
    require_shapes(Y=(Y, "... M M"), Z=(Z, "... M M"))
    return Weights(jnp.sum(Y, axis=-1), jnp.sum(Z, axis=-1))


def _pull(f: Array, v: Array) -> Array:
    """The pull on attention logits, f * (I - f f^T) v for rows f and v."""
    return f * (v - f * jnp.sum(f * v, axis=-1, keepdims=True))


def _features(Z: Array, classes: SequenceClasses) -> Array:
    """f_n = c_n / |c_n|, shape (K, M)."""
    return _attend(Z[classes.query], classes.P.astype(Z.dtype))


def _one_hot(classes: SequenceClasses, dtype: Any) -> Array:
    return jax.nn.one_hot(classes.next_token, classes.vocab_size, dtype=dtype)


def _population_flow_field(t, weights, args):
    classes, (rate_Y, rate_Z) = args
    direction = population_field(weights, classes)
    return Weights(rate_Y * direction.Y, rate_Z * direction.Z)


def _fast_decoder_field(t, state, args):
    (A, Z), (classes, (rate_Y, rate_Z)) = state, args
    f = _features(Z, classes)
    g = _one_hot(classes, A.dtype) - jax.nn.softmax(f @ f.T @ A, axis=-1)
    # Y g_n = F^T A g_n.
    dz = _pull(f, g @ A.T @ f)
    return rate_Y / len(A) * g, rate_Z / len(A) * jnp.zeros_like(Z).at[classes.query].add(dz)


def _weak_correlation_field(t, state, args):
    # u = M h is a state of its own: u' = (M / K) learning_rate_Y / (M - 1 + e^u).
    (u, Z), (classes, (rate_Y, rate_Z)) = state, args
    M, K = classes.vocab_size, classes.num_classes
    f = _features(Z, classes)
    others = jnp.sum(f, axis=0, keepdims=True) - f
    # exp(u) may overflow in a step that the solver tries and rejects; 1 / infinity is the right limit.
    slowed = 1 / (M - 1 + jnp.exp(u))
    dz = -_pull(f, others)
    return M / K * rate_Y * slowed, rate_Z / K * u * slowed * jnp.zeros_like(Z).at[classes.query].add(dz)


@eqx.filter_jit
def _with_decoder(path: Trajectory, classes: SequenceClasses) -> Trajectory:
    """A trajectory of (A, Z) as one of (Y, Z), Y = F^T A."""
    A, Z = path.ys
    Y = jax.vmap(lambda A, Z: _features(Z, classes).T @ A)(A, Z)
    return Trajectory(path.ts, Weights(Y, Z), path.ok)


def _require_rates(classes: Any, rate_Y: ArrayLike, rate_Z: ArrayLike) -> tuple[Any, tuple]:
    if not isinstance(classes, SequenceClasses):
        raise ValueError(f"classes must be SequenceClasses, got {type(classes).__name__}")
    dtype = classes.P.dtype
    rates = (
        require_number("learning_rate_Y", rate_Y, dtype, at_least=0),
        require_number("learning_rate_Z", rate_Z, dtype, at_least=0),
    )
    return dtype, rates


def _require_start(name: str, start: ArrayLike | None, classes: SequenceClasses, dtype: Any) -> Array:
    M = classes.vocab_size
    if start is None:
        return jnp.zeros((M, M), dtype)
    start = cast(as_real(name, start), dtype)
    require_shape(name, start, (M, M))
    return require_finite(name, start)


def _require_weights(weights: Weights, classes: SequenceClasses) -> Weights:
    arrays = {name: as_real(name, array) for name, array in zip(Weights._fields, weights, strict=True)}
    for name, array in arrays.items():
        require_shape(name, array, (classes.vocab_size, classes.vocab_size))
    return Weights(**arrays)


def _guard(start: Any, rates: tuple, classes: SequenceClasses) -> Any:
    """Bad traced rates or classes become a start that is not finite, which `integrate` flags."""
    if not is_traced(rates, classes):  # they have been looked at
        return start
    good = all_finite((rates, classes.P))
    return jax.tree.map(lambda leaf: nan_unless(good, leaf), start)


# The full flow and its reductions by the names under which they are compared.
FLOWS = {"full": population_flow, "fast": fast_decoder_flow, "weak": weak_correlation_flow}
