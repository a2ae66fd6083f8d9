"""The network of Scan and Snap and its sequences: forms, gradients, invariants, sampling, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics import scan_snap
from models.attention import ScanSnapAttention, observe_weights
from models.data.recorded import figure_6
from models.data.tokens import (
    Contexts,
    count_tokens,
    one_common_token,
    population_contexts,
    sample_contexts,
    sample_long_contexts,
    sample_tokens,
    synthetic_classes,
)
from models.functional import as_function
from models.losses import cross_entropy, on_batches
from models.training import scale_by_name, train
from tests.helpers import assert_bad_lanes_are_nan

CLASSES = synthetic_classes(2, 2, num_common=2, num_distinct=3)
M = CLASSES.vocab_size
KEY = jax.random.key(0)


@given(st.integers(0, 2**31 - 1), st.floats(0.0, 30.0))
def test_counts_and_positions_give_the_same_logits(seed, scale):
    key = jax.random.key(seed)
    start = ScanSnapAttention.uniform(key, M)
    model = ScanSnapAttention(start.Y[...], scale * start.Z[...])
    tokens, _ = sample_tokens(key, CLASSES, length=6, batch=4)
    by_counts = model(count_tokens(tokens, M))
    np.testing.assert_allclose(by_counts, model.of_tokens(tokens), atol=1e-14)
    # The query itself is not attended to, and the order does not count.
    np.testing.assert_allclose(by_counts, model.of_tokens(tokens[:, [3, 1, 0, 4, 2, 5]]), atol=1e-14)


def test_attention_does_not_underflow_beside_a_token_that_does_not_occur():
    Z = jnp.zeros((3, 3)).at[2].set(jnp.array([-2000.0, -2001.0, 0.0]))
    logits = ScanSnapAttention(jnp.eye(3), Z)(Contexts(jnp.array([[1.0, 1.0, 0.0]]), jnp.array([2])))
    expected = np.array([1, np.exp(-1), 0]) / np.hypot(1, np.exp(-1))
    np.testing.assert_allclose(logits[0], expected, rtol=1e-12)


def test_uniform_weights_fill_their_range():
    model = ScanSnapAttention.uniform(KEY, 50)
    weights = np.stack([model.Y[...], model.Z[...]]) * 50**0.5
    # Of 2500 such numbers the extreme ones are within 0.02 of the ends, but for one case in 1e10.
    np.testing.assert_allclose(np.max(weights, axis=(1, 2)), 1, atol=0.02)
    np.testing.assert_allclose(np.min(weights, axis=(1, 2)), -1, atol=0.02)


def test_the_gradient_by_hand_is_that_of_the_network():
    model = ScanSnapAttention.uniform(KEY, M)
    predict, params = as_function(model)
    contexts, labels = sample_contexts(KEY, CLASSES, length=9, batch=5)

    @jax.jit
    def gradient(contexts, labels):
        return observe_weights(jax.grad(cross_entropy)(params, (predict, contexts, labels)))

    automatic = gradient(contexts, labels)
    by_hand = scan_snap.loss_gradient(model.Y[...], model.Z[...], contexts.counts, contexts.query, labels)
    np.testing.assert_allclose(by_hand.Y, automatic.Y, atol=1e-15)
    np.testing.assert_allclose(by_hand.Z, automatic.Z, atol=1e-15)
    # An infinitely long context of each class: the population's.
    automatic = gradient(*population_contexts(CLASSES))
    direction = scan_snap.population_field(scan_snap.Weights(model.Y[...], model.Z[...]), CLASSES)
    np.testing.assert_allclose(direction.Z, -automatic.Z, atol=1e-15)


def test_an_empty_context_says_nothing():
    predict, params = as_function(ScanSnapAttention.uniform(KEY, 3))
    empty = Contexts(jnp.zeros((1, 3)), jnp.array([0]))
    assert predict(params, empty).tolist() == [[0.0, 0.0, 0.0]]
    gradient = jax.jit(lambda params: jax.grad(cross_entropy)(params, (predict, empty, jnp.array([1]))))(
        params
    )
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))
    Y, Z = (jnp.ones((3, 3)) for _ in range(2))
    by_hand = scan_snap.loss_gradient(Y, Z, *empty, jnp.array([1]))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in by_hand)


@pytest.mark.parametrize("length", [2, 17])
def test_row_sums_are_conserved_with_momentum_on_samples(length):
    predict, params = as_function(ScanSnapAttention.uniform(KEY, M))
    optimizer = optax.chain(scale_by_name(Y=1.0, Z=0.3), optax.sgd(1.0, momentum=0.9))
    _, path = train(
        on_batches(cross_entropy, predict),
        params,
        optimizer,
        steps=50,
        every=10,
        batches=lambda key: sample_contexts(key, CLASSES, length, batch=8),
        key=KEY,
        observe=observe_weights,
    )
    sums = scan_snap.row_sums(path.ys)
    # In a context of one token there is nothing to choose from.
    assert (float(jnp.max(jnp.abs(path.ys.Z[-1] - path.ys.Z[0]))) > 0.01) == (length > 2)
    for start_and_later in sums:
        np.testing.assert_allclose(start_and_later, np.broadcast_to(start_and_later[0], (6, M)), atol=1e-12)


def test_the_classes_of_figure_4():
    classes = synthetic_classes(2)
    P = np.asarray(classes.P)
    assert classes.query.tolist() == [30, 31]
    assert classes.next_token.tolist() == [32, 33]
    np.testing.assert_allclose(P[1, :10], 1 / 15.5)
    np.testing.assert_allclose(P[1, 20:30], np.linspace(0.1, 1, 10) / 15.5)
    assert np.count_nonzero(P) == 40
    overlap = scan_snap.class_overlap(jnp.zeros((34, 34)), classes)[0, 1]
    assert float(overlap) == pytest.approx(10 / (10 + np.sum(np.linspace(0.1, 1, 10) ** 2)))


def test_classes_share_queries_and_may_have_no_common_token():
    classes = synthetic_classes(3, 2, num_common=0, num_distinct=2, vocab_size=40)
    assert classes.query.tolist() == [12, 12, 13, 13, 14, 14]
    assert not bool(jnp.any(scan_snap.common_tokens(classes)))
    assert classes.vocab_size == 40
    assert not set(classes.query.tolist()) & set(classes.next_token.tolist())


@pytest.mark.parametrize("long", [False, True])
def test_samples_follow_the_classes(long):
    draw = sample_long_contexts if long else sample_contexts
    contexts, labels = draw(KEY, CLASSES, 101, 4000)
    which = np.asarray(labels) - int(CLASSES.next_token[0])
    np.testing.assert_array_equal(contexts.query, np.asarray(CLASSES.query)[which])
    # Four equal classes of 1000: three standard deviations are 82.
    assert np.all(np.abs(np.bincount(which) - 1000) < 100)
    counts = np.asarray(contexts.counts)
    np.testing.assert_array_equal(counts.sum(axis=1), 100)
    for n, law in enumerate(np.asarray(CLASSES.P)):
        rows = counts[which == n]
        assert np.all(rows[:, law == 0] == 0)
        # Multinomial: mean and variance of the counts, at five standard errors of about 1000 rows.
        error = np.sqrt(100 * law * (1 - law) / len(rows))
        assert np.all(np.abs(rows.mean(axis=0) - 100 * law) <= 5 * error)
        np.testing.assert_allclose(rows.var(axis=0), 100 * law * (1 - law), rtol=0.25)


def test_counts_are_those_of_the_tokens():
    tokens, labels = sample_tokens(KEY, CLASSES, length=8, batch=3)
    contexts, same = sample_contexts(KEY, CLASSES, length=8, batch=3)
    again = count_tokens(tokens, M)
    np.testing.assert_array_equal(contexts.counts, again.counts)
    np.testing.assert_array_equal(contexts.query, again.query)
    np.testing.assert_array_equal(labels, same)
    for row, counts in zip(np.asarray(tokens), np.asarray(again.counts), strict=True):
        np.testing.assert_array_equal(np.bincount(row[:-1], minlength=M), counts)


def test_a_traced_token_outside_of_the_vocabulary_gives_nan():
    model, counts = ScanSnapAttention.uniform(KEY, 3), np.array([[2.0, 0.0, 1.0]])
    bad = [[3]], [[-1]]
    assert_bad_lanes_are_nan(lambda query: model(Contexts(jnp.asarray(counts), query[0])), [[2]], *bad)
    bad = [-1, 1, 2], [0, 3, 2], [0, 1, 3], [0, 1, -1]
    assert_bad_lanes_are_nan(lambda tokens: model.of_tokens(tokens[None]), [0, 1, 2], *bad)
    for place in (0, 1):
        assert_bad_lanes_are_nan(
            lambda tokens: model(count_tokens(tokens[None], 3)), [0, 1, 2], *np.roll(bad, place, axis=0)
        )
    assert_bad_lanes_are_nan(lambda tokens: count_tokens(tokens[None], 3).counts, [0, 1, 2], *bad[:2])


def test_traced_counts_that_are_bad_give_nan():
    model, query = ScanSnapAttention.uniform(KEY, 3), jnp.array([2])

    def call(counts):
        return model(Contexts(counts[None], query))

    assert_bad_lanes_are_nan(call, [2.0, 0.0, 1.0], [2.0, -1.0, 1.0], [np.nan, 0.0, 1.0], [np.inf, 0.0, 1.0])
    assert_bad_lanes_are_nan(
        lambda length: sample_long_contexts(KEY, CLASSES, length, 2)[0].counts, 4, 1, 0, -3
    )


def test_samples_of_traced_classes_that_are_bad_are_none():
    model = ScanSnapAttention.uniform(KEY, M)

    def draw(sample, law):
        return sample(KEY, scan_snap.SequenceClasses(law, CLASSES.query, CLASSES.next_token), 5, 3)[0]

    laws = np.stack([CLASSES.P, 1.5 * CLASSES.P, CLASSES.P - 0.1])
    for call in (
        lambda law: model.of_tokens(draw(sample_tokens, law)),
        lambda law: draw(sample_contexts, law).counts,
        lambda law: draw(sample_long_contexts, law).counts,
    ):
        assert_bad_lanes_are_nan(call, *laws)


def test_probabilities_whose_square_vanishes_are_attended_to():
    # The token that attention is on is so rare that the square of its share is zero in 32-bit.
    Z = jnp.zeros((3, 3), jnp.float32).at[2, 0].set(200.0)
    counts = jnp.array([[1e-25, 1.0, 0.0]], jnp.float32)
    logits = ScanSnapAttention(jnp.eye(3, dtype=jnp.float32), Z)(Contexts(counts, jnp.array([2])))
    np.testing.assert_allclose(logits, [[1.0, 0.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(logits, scan_snap.attended_features(Z, counts, [2]), atol=1e-6)


def test_lengths_are_one_vmap():
    lengths = jnp.array([2, 1_000_001])
    counts = jax.vmap(lambda length: sample_long_contexts(KEY, CLASSES, length, 2)[0].counts)(lengths)
    np.testing.assert_array_equal(counts.sum(axis=-1), [[1, 1], [1_000_000, 1_000_000]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_tokens(KEY, CLASSES, length=1, batch=2), "length must be an integer >= 2, got 1"),
        (lambda: sample_contexts(KEY, CLASSES, length=1, batch=2), "length must be an integer >= 2, got 1"),
        (lambda: sample_long_contexts(KEY, CLASSES, 1, 2), "length must be an integer >= 2, got 1"),
        (lambda: sample_contexts(KEY, CLASSES, length=5, batch=0), "batch must be an integer >= 1, got 0"),
        (lambda: count_tokens([[0], [1]], 3), r"tokens must have shape \(B, T\) with T >= 2"),
        (lambda: count_tokens([[0, 3]], 3), "tokens must be integers from 0 to 2, got 3"),
        (
            lambda: ScanSnapAttention.zeros(3).of_tokens([[0, 1, 99]]),
            "tokens must be integers from 0 to 2, got 99",
        ),
        (
            lambda: ScanSnapAttention.zeros(3).of_tokens([[0, -1, 1]]),
            "tokens must be integers from 0 to 2, got -1",
        ),
        (lambda: ScanSnapAttention.zeros(3).of_tokens([[1]]), r"tokens must have shape \(B, T\) with T >= 2"),
        (lambda: ScanSnapAttention.zeros(3).of_tokens([[0.5, 1.0]]), "tokens must hold integers"),
        (
            lambda: ScanSnapAttention.zeros(3)(Contexts(jnp.ones((1, 3)), jnp.array([7]))),
            "query must be integers from 0 to 2, got 7",
        ),
        (
            lambda: ScanSnapAttention.zeros(3)(Contexts(-jnp.ones((1, 3)), jnp.array([1]))),
            "counts must be >= 0, got -1.0",
        ),
        (lambda: ScanSnapAttention.zeros(0), "vocab_size must be a positive integer, got 0"),
        (lambda: ScanSnapAttention.zeros(3, "float16"), "Y must be float32 or float64"),
        (lambda: one_common_token(1.0), "overlap must be above 0 and below 1, got 1.0"),
        (lambda: one_common_token(-0.1), "overlap must be above 0 and below 1, got -0.1"),
        (lambda: figure_6((1, 2)), r"queries must be among \(1, 3, 5, 10\), got 2"),
        (
            lambda: ScanSnapAttention.zeros(3)(Contexts(jnp.ones((2, 3)), jnp.array([1]))),
            r"counts and query must have shapes \(..., 3\) and \(...\)",
        ),
        (lambda: synthetic_classes(1, distinct_weights=(0.1, np.inf)), "distinct_weights must be finite"),
        (lambda: synthetic_classes(0), "num_queries must be an integer >= 1, got 0"),
        (lambda: synthetic_classes(1, num_common=0, num_distinct=0), "num_distinct must be positive"),
        (lambda: synthetic_classes(1, common_weight=-1.0), "common_weight must be positive and finite"),
        (lambda: synthetic_classes(1, distinct_weights=(0.0, 1.0)), "distinct_weights must be positive"),
        (lambda: synthetic_classes(2, vocab_size=33), "vocab_size must be an integer >= 34, got 33"),
        (
            lambda: ScanSnapAttention(jnp.eye(2), jnp.eye(3)),
            r"Y and Z must have shapes \(M, M\) and",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
