"""Scan and Snap in theory: gradients, flows, invariants, closed forms, against independent oracles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.stats import entropy

from dynamics import scan_snap
from dynamics.scan_snap import SequenceClasses, Weights
from tests.helpers import assert_bad_lanes_are_nan, count_compilations

FLOWS = (scan_snap.population_flow, scan_snap.fast_decoder_flow, scan_snap.weak_correlation_flow)
RATES = {"learning_rate_Y": 1.0, "learning_rate_Z": 0.5}
M = 7
# Two classes share query 5; token 0 is common to all, 1 to the first two; 2, 3, 4 are distinct.
P = np.array(
    [
        [0.3, 0.2, 0.5, 0.0, 0.0, 0.0, 0.0],
        [0.2, 0.3, 0.0, 0.4, 0.1, 0.0, 0.0],
        [0.4, 0.0, 0.0, 0.0, 0.0, 0.35, 0.25],
    ]
)
CLASSES = SequenceClasses(P, query=[5, 5, 6], next_token=[0, 3, 6])
# One common token; the distinct ones of a class have probabilities of their own.
ONE_COMMON = SequenceClasses(
    [[0.2, 0.5, 0.3, 0, 0, 0, 0], [0.2, 0, 0, 0.6, 0.2, 0, 0]], query=[5, 6], next_token=[0, 1]
)


def brute_force(Y, Z, counts, query, next_token):
    """Features, gradient of the decoder and of attention, sequence by sequence, by the book."""
    dY, dZ = np.zeros_like(Y), np.zeros_like(Z)
    for N, m, n in zip(counts, query, next_token, strict=True):
        b = N * np.exp(Z[m]) / np.sum(N * np.exp(Z[m]))
        f = b / np.linalg.norm(b)
        alpha = np.exp(Y.T @ f) / np.sum(np.exp(Y.T @ f))
        g = np.eye(len(Y))[n] - alpha
        dY += np.outer(f, g) / len(counts)
        # Through the softmax Jacobian and the norm's, term by term.
        softmax_jacobian = np.diag(b) - np.outer(b, b)
        norm_jacobian = (np.eye(len(f)) - np.outer(f, f)) / np.linalg.norm(b)
        dZ[m] += softmax_jacobian @ norm_jacobian @ Y @ g / len(counts)
    return dY, dZ


@given(st.sampled_from([2, 6]), st.sampled_from([1, 4]), st.integers(0, 2**31 - 1))
def test_loss_gradient_is_that_of_the_book(size, batch, seed):
    draw = np.random.default_rng(seed)
    Y, Z = draw.normal(size=(2, size, size))
    counts = draw.integers(0, 4, (batch, size)).astype(float)
    counts[:, 0] += counts.sum(axis=1) == 0
    query, next_token = draw.integers(0, size, (2, batch))
    found = scan_snap.loss_gradient(
        *map(jnp.asarray, (Y, Z, counts, query, next_token))  # pyright: ignore[reportArgumentType]
    )
    for gradient, ascent in zip(found, brute_force(Y, Z, counts, query, next_token), strict=True):
        np.testing.assert_allclose(gradient, -ascent, atol=1e-14)


def test_population_flow_is_that_of_the_book():
    rate_Y, rate_Z = 2.0, 3.0

    def field(t, state):
        Y, Z = state.reshape(2, M, M)
        dY, dZ = brute_force(Y, Z, P, [5, 5, 6], [0, 3, 6])
        return np.stack([rate_Y * dY, rate_Z * dZ]).ravel()

    start = np.random.default_rng(0).normal(size=(2, M, M))
    oracle = solve_ivp(field, (0, 8), start.ravel(), rtol=1e-10, atol=1e-12).y[:, -1].reshape(2, M, M)
    path = scan_snap.population_flow(
        CLASSES, [0.0, 8.0], learning_rate_Y=rate_Y, learning_rate_Z=rate_Z, Y0=start[0], Z0=start[1]
    )
    np.testing.assert_allclose(path.ys.Y[-1], oracle[0], atol=1e-7)
    np.testing.assert_allclose(path.ys.Z[-1], oracle[1], atol=1e-7)


@pytest.mark.parametrize("flow", FLOWS)
def test_row_sums_are_conserved(flow):
    Z0 = np.random.default_rng(1).normal(size=(M, M))
    path = flow(CLASSES, [0.0, 1.0, 50.0], **RATES, Z0=Z0)
    sums = scan_snap.row_sums(path.ys)
    np.testing.assert_allclose(sums.Y, 0, atol=1e-13)
    np.testing.assert_allclose(sums.Z, np.broadcast_to(Z0.sum(axis=1), (3, M)), atol=1e-13)
    # Rows of tokens that are no query, and of the decoder for tokens that do not occur, never move.
    np.testing.assert_array_equal(path.ys.Z[-1, :5], Z0[:5])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    "classes",
    [
        pytest.param(
            SequenceClasses([[0.3, 0.7, 0.0, 0.0], [0.0, 0.0, 0.6, 0.4]], [0, 1], [2, 3]), id="apart"
        ),
        pytest.param(SequenceClasses([[0.3, 0.7, 0.0, 0.0]] * 2, [0, 1], [2, 3]), id="the same"),
        pytest.param(SequenceClasses([[0.3, 0.7, 0.0, 0.0]], [0], [2]), id="a single one"),
    ],
)
def test_attention_stands_still_where_there_is_nothing_to_tell_apart(flow, classes):
    path = flow(classes, [0.0, 20.0], **RATES)
    assert bool(path.ok)
    np.testing.assert_allclose(path.ys.Z, 0, atol=1e-13)
    assert float(jnp.max(path.ys.Y)) > 0.5


@pytest.mark.parametrize("flow", FLOWS)
def test_common_tokens_fall_and_distinct_ones_rise(flow):
    Z = flow(ONE_COMMON, [0.0, 3.0, 30.0], **RATES).ys.Z[1:, [5, 6]]
    assert np.all(Z[..., 0] < 0)
    assert np.all(Z[:, 0, 1:3] > 0)
    assert np.all(Z[:, 1, 3:5] > 0)
    # The more probable a distinct token, the faster.
    assert np.all(Z[:, 0, 1] > Z[:, 0, 2])
    assert np.all(Z[:, 1, 3] > Z[:, 1, 4])


def test_weak_correlation_becomes_the_fast_decoder_as_the_overlap_vanishes():
    gaps = []
    for common in (1e-2, 1e-3):
        law = np.array([[common, 1 - common, 0.0, 0.0], [common, 0.0, 1 - common, 0.0]])
        classes = SequenceClasses(law, [0, 3], [1, 2])
        overlap = scan_snap.class_overlap(jnp.zeros((4, 4)), classes)[0, 1]
        assert float(overlap) == pytest.approx(common**2, rel=0.03)
        fast, weak = (
            flow(classes, [0.0, 30.0], **RATES, rtol=1e-10, atol=1e-16).ys.Z[-1] for flow in FLOWS[1:]
        )
        gaps.append(float(jnp.linalg.norm(weak - fast) / jnp.linalg.norm(fast)))
    assert gaps[0] < 1e-3
    assert gaps[1] < gaps[0] / 50  # the overlap fell by a hundred


@pytest.mark.parametrize("flow", FLOWS[1:])
def test_relative_gain_has_its_closed_form_in_the_reduced_flows(flow):
    Z = flow(ONE_COMMON, [0.0, 5.0, 100.0], learning_rate_Y=1.0, learning_rate_Z=3.0).ys.Z[-1]
    token, reference = jnp.array([1, 3]), jnp.array([2, 4])
    gain = scan_snap.log_relative_gain(Z, ONE_COMMON, token, reference)
    closed = scan_snap.log_relative_gain_closed_form(Z, ONE_COMMON, token, reference)
    start = scan_snap.log_relative_gain(jnp.zeros((M, M)), ONE_COMMON, token, reference)
    assert np.all(gain > start + 0.1)
    np.testing.assert_allclose(gain, closed, atol=1e-7)


def test_relative_gain_from_a_start_that_is_not_zero():
    Z0 = np.random.default_rng(2).normal(size=(M, M))
    Z = scan_snap.fast_decoder_flow(ONE_COMMON, [0.0, 20.0], **RATES, Z0=Z0).ys.Z[-1]
    closed = scan_snap.log_relative_gain_closed_form(Z, ONE_COMMON, [1, 3], [2, 4], Z0)
    np.testing.assert_allclose(scan_snap.log_relative_gain(Z, ONE_COMMON, [1, 3], [2, 4]), closed, atol=1e-7)


@given(st.integers(2, 10**5), st.integers(1, 50), st.floats(1e-3, 1e3), st.floats(0, 1e7), st.booleans())
def test_decoder_margin_solves_its_equation(vocab, classes, rate, t, single):
    dtype = jnp.float32 if single else jnp.float64
    h = scan_snap.decoder_margin(jnp.asarray(t, dtype), rate, classes, vocab)
    assert h.dtype == dtype
    left = (vocab - 1) * float(h) + np.expm1(vocab * float(h)) / vocab
    # Relative error of e^{M h} is that of h times M h, which stays below 30.
    assert left == pytest.approx(rate * t / classes, rel=1e-4 if single else 1e-12, abs=1e-30)


def test_decoder_margin_differentiates_from_zero_on_and_vmaps():
    ts, rate, K, vocab = jnp.array([0.0, 1e-8, 1.0, 20.0, 1e6]), 1.5, 3.0, 34.0
    h = jax.vmap(scan_snap.decoder_margin, (0, None, None, None))(ts, rate, K, vocab)
    np.testing.assert_array_equal(h, scan_snap.decoder_margin(ts, rate, K, vocab))
    slope = rate / K / (vocab - 1 + jnp.exp(vocab * h))
    margin = partial(scan_snap.decoder_margin, learning_rate_Y=rate, num_classes=K, vocab_size=vocab)
    np.testing.assert_allclose(jax.vmap(jax.grad(margin))(ts), slope, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(margin))(ts), slope, rtol=1e-12)
    # h'' = -M e^{M h} h'^2 / (M - 1 + e^{M h}).
    curvature = -vocab * jnp.exp(vocab * h) * slope**2 / (vocab - 1 + jnp.exp(vocab * h))
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(margin)))(ts), curvature, rtol=1e-11)


@pytest.mark.parametrize(("vocab", "K", "C0"), [(34, 2, 1.0), (1000, 10, 0.3)])
def test_attention_growth_is_the_integral_of_its_hypothesis(vocab, K, C0):
    rates = {"learning_rate_Y": 2.0, "learning_rate_Z": 0.7}
    setting = {**rates, "num_classes": K, "vocab_size": vocab, "C0": C0}
    end = 3 * K * np.log(vocab) / 2.0

    def gamma(t):
        h = float(scan_snap.decoder_margin(t, 2.0, K, vocab))
        return (vocab - 1) ** 2 * h / (vocab - 1 + np.exp(vocab * h))

    # B' = learning_rate_Z gamma exp(-4 B) / C0, since z_CT = -B: exp(4 B) - 1 is an integral.
    integral = quad(gamma, 0, end, epsabs=0, epsrel=1e-10)[0]
    expected = np.log1p(4 * 0.7 / C0 * integral) / 4
    assert float(scan_snap.attention_growth(end, **setting)) == pytest.approx(expected, rel=1e-9)


def test_attention_growth_has_an_early_and_a_late_form():
    setting = {"learning_rate_Y": 1.0, "learning_rate_Z": 1.0, "num_classes": 10, "vocab_size": 1000}
    unit = 10 * np.log(1000)

    def ratio(form, t):
        return float(form(t, **setting) / scan_snap.attention_growth(t, **setting))

    assert ratio(scan_snap.attention_growth_scanning, 1e-3 * unit) == pytest.approx(1, abs=1e-3)
    assert ratio(scan_snap.attention_growth_snapping, 2 * unit) == pytest.approx(1, abs=0.09)
    assert ratio(scan_snap.attention_growth_snapping, 1e4 * unit) == pytest.approx(1, abs=1e-4)
    assert 3.8 < ratio(scan_snap.attention_growth_printed, 1e4 * unit) < 4.6
    crossover = scan_snap.crossover_time(1.0, 10, 1000)
    h = scan_snap.decoder_margin(crossover, 1.0, 10, 1000)
    assert float(jnp.exp(1000 * h)) == pytest.approx(999, rel=1e-10)


def test_attention_growth_without_learning():
    setting = {"num_classes": 2, "vocab_size": 34, "C0": 1.0}
    for rates in (
        {"learning_rate_Y": 0.0, "learning_rate_Z": 1.0},
        {"learning_rate_Y": 1.0, "learning_rate_Z": 0.0},
    ):
        assert scan_snap.attention_growth(jnp.array([0.0, 5.0]), **rates, **setting).tolist() == [0.0, 0.0]


def test_token_kinds_and_attention():
    assert scan_snap.common_tokens(CLASSES).tolist() == [True, True] + [False] * 5
    distinct = np.array(scan_snap.distinct_tokens(CLASSES))
    assert [np.flatnonzero(row).tolist() for row in distinct] == [[2], [3, 4], [5, 6]]
    Z = np.random.default_rng(3).normal(size=(M, M))
    weights = P * np.exp(Z[[5, 5, 6]])
    c = scan_snap.context_distribution(Z, CLASSES)
    np.testing.assert_allclose(c, weights / weights.sum(axis=1, keepdims=True), atol=1e-15)
    assert np.all(np.asarray(c)[P == 0] == 0)
    expected = [entropy(row[keep]) for row, keep in zip(weights, distinct, strict=True)]
    np.testing.assert_allclose(scan_snap.distinct_entropy(Z, CLASSES), expected, atol=1e-14)


def test_entropy_of_a_class_without_distinct_tokens_is_zero_and_so_is_its_gradient():
    classes = SequenceClasses([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], [0, 1], [1, 2])
    value, pull = jax.value_and_grad(lambda Z: scan_snap.distinct_entropy(Z, classes).sum())(jnp.ones((3, 3)))
    assert float(value) == 0
    assert np.all(np.asarray(pull) == 0)


def test_suppressed_tokens_do_not_underflow():
    Z = np.zeros((M, M))
    Z[5, 1], Z[5, 2] = -2000.0, -1000.0
    gain = scan_snap.log_relative_gain(Z, ONE_COMMON, 2, 1)
    assert float(gain[0]) == pytest.approx(2 * (1000 + np.log(0.3 / 0.5)))
    assert np.all(np.isfinite(scan_snap.context_distribution(Z, ONE_COMMON)))
    # Distinct tokens that have lost all attention still have an entropy among themselves.
    assert float(scan_snap.distinct_entropy(Z - 1e4 * (Z < 0), ONE_COMMON)[0]) >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": [[0.5, 0.4], [0.5, 0.5]]}, "P must have rows that sum to 1, got 0.9 in row 0"),
        ({"P": [[0.5, 0.5001], [0.5, 0.5]]}, "P must have rows that sum to 1, got 1.0001 in row 0"),
        ({"P": [[1.5, -0.5], [0.5, 0.5]]}, "P must be finite and >= 0, got -0.5"),
        ({"P": [[np.nan, 1.0], [0.5, 0.5]]}, "P must be finite and >= 0, got nan"),
        ({"P": np.array([[0.5, 0.5], [0.5, 0.5]], np.float16)}, "P must be float32 or float64"),
        ({"P": [0.5, 0.5]}, r"P must have shape \(K, M\)"),
        ({"query": [0, 2]}, "query must be integers from 0 to 1, got 2"),
        ({"query": [-1, 0]}, "query must be integers from 0 to 1, got -1"),
        ({"query": [0]}, r"query must have shape \(2,\), got shape \(1,\)"),
        ({"next_token": [0.0, 1.0]}, "next_token must hold integers"),
        ({"next_token": [0, 5]}, "next_token must be integers from 0 to 1, got 5"),
    ],
)
def test_bad_classes_are_refused(change, message):
    good = {"P": [[0.5, 0.5], [0.5, 0.5]], "query": [0, 1], "next_token": [0, 1]}
    with pytest.raises(ValueError, match=message):
        SequenceClasses(**{**good, **change})


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate_Y": -1.0}, "learning_rate_Y must be a finite number >= 0, got -1.0"),
        ({"learning_rate_Z": -1.0}, "learning_rate_Z must be a finite number >= 0, got -1.0"),
        ({"learning_rate_Z": np.nan}, "learning_rate_Z must be a finite number >= 0, got nan"),
        ({"learning_rate_Y": [1.0, 2.0]}, "learning_rate_Y must be a finite number"),
        ({"Z0": np.zeros((2, 2))}, r"Z0 must have shape \(7, 7\), got shape \(2, 2\)"),
        ({"Z0": np.full((7, 7), np.nan)}, "Z0 must be finite"),
        ({"learning_rate_Y": 1j}, "learning_rate_Y must be a finite number >= 0, got 1j"),
        ({"ts": [1.0, 0.0]}, "ts must increase strictly"),
    ],
)
def test_bad_arguments_of_flows_are_refused(flow, change, message):
    with pytest.raises(ValueError, match=message):
        flow(CLASSES, **{"ts": [0.0, 1.0], **RATES, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": -1.0}, "t must be finite and >= 0"),
        ({"learning_rate_Y": -1.0}, "learning_rate_Y must be a finite number >= 0"),
        ({"num_classes": 0}, "num_classes must be a finite number >= 1"),
        ({"vocab_size": 1}, "vocab_size must be a finite number >= 2"),
        ({"learning_rate_Z": -1.0}, "learning_rate_Z must be a finite number >= 0"),
        ({"C0": 0.0}, "C0 must be a positive number"),
    ],
)
def test_bad_arguments_of_closed_forms_are_refused(change, message):
    good = {
        "t": 1.0,
        "learning_rate_Y": 1.0,
        "learning_rate_Z": 1.0,
        "num_classes": 2,
        "vocab_size": 4,
        "C0": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        scan_snap.attention_growth(**{**good, **change})


def test_a_traced_negative_rate_fails_in_its_lane_alone():
    ts = jnp.array([0.0, 1.0])
    path = jax.vmap(
        lambda rate: scan_snap.fast_decoder_flow(
            CLASSES, ts, learning_rate_Y=1.0, learning_rate_Z=rate, throw=False
        )
    )(jnp.array([0.5, -1.0, jnp.nan]))
    assert path.ok.tolist() == [True, False, False]
    assert np.all(np.isfinite(path.ys.Z[0]))
    assert np.isnan(jax.vmap(lambda t: scan_snap.decoder_margin(t, 1.0, 2, 3))(jnp.array([-1.0]))[0])


def test_other_numbers_compile_nothing():
    for flow in FLOWS:
        flow(CLASSES, [0.0, 1.0], **RATES)
        other = SequenceClasses(P[:, ::-1], [0, 1, 2], [3, 4, 5])
        with count_compilations() as names:
            flow(other, [0.0, 2.0], learning_rate_Y=2.0, learning_rate_Z=0.1)
        assert not names, names
    scan_snap.decoder_margin(1.0, 1.0, 2, 34)
    with count_compilations() as names:
        scan_snap.decoder_margin(2.0, 3.0, 4, 5)
    assert not names, names


def test_traced_bad_classes_fail_in_their_lanes_alone():
    queries = jnp.array([[5, 6], [7, 6], [-1, 6], [5, 6]])
    laws = jnp.stack([ONE_COMMON.P] * 3 + [1.1 * ONE_COMMON.P])

    def ok(P, query):
        classes = SequenceClasses(P, query, ONE_COMMON.next_token)
        return scan_snap.population_flow(classes, [0.0, 1.0], **RATES, throw=False).ok

    assert jax.vmap(ok)(laws, queries).tolist() == [True, False, False, False]


LOGITS = np.random.default_rng(7).normal(size=(2, M, M))
WEIGHTS = Weights(*jnp.asarray(LOGITS))
QUERY, NEXT = [5, 5, 6], [0, 3, 6]
BAD_TOKENS = [7, 5, 6], [5, -1, 6]
BAD_LAWS = 1.5 * P, P - 0.1, np.where(P > 0.45, np.nan, P), np.where(P > 0.45, np.inf, P)
OF_CLASSES = {
    "context_distribution": lambda classes: scan_snap.context_distribution(LOGITS[0], classes),
    "log_context_weights": lambda classes: scan_snap.log_context_weights(LOGITS[0], classes)[:, 0],
    "distinct_entropy": lambda classes: scan_snap.distinct_entropy(LOGITS[0], classes),
    "class_overlap": lambda classes: scan_snap.class_overlap(LOGITS[0], classes),
    "growth_rate": lambda classes: scan_snap.growth_rate(WEIGHTS, classes),
    "population_field": lambda classes: scan_snap.population_field(WEIGHTS, classes),
    "weak_growth_rate": lambda classes: scan_snap.weak_growth_rate(LOGITS[0], classes, 1.0, 1.0),
    "log_relative_gain": lambda classes: scan_snap.log_relative_gain(LOGITS[0], classes, 0, 0),
}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_nothing_comes_of_traced_classes_that_are_bad(name):
    call = OF_CLASSES[name]
    assert_bad_lanes_are_nan(lambda law: call(SequenceClasses(law, QUERY, NEXT)), P, *BAD_LAWS)
    assert_bad_lanes_are_nan(lambda query: call(SequenceClasses(P, query, NEXT)), QUERY, *BAD_TOKENS)
    assert_bad_lanes_are_nan(lambda token: call(SequenceClasses(P, QUERY, token)), NEXT, *BAD_TOKENS)


COUNTS = np.array([[2.0, 1, 0, 0, 0, 0, 3], [0, 0, 1, 0, 0, 0, 0]])
TOKENS = {
    "attended_features": (lambda m: scan_snap.attended_features(LOGITS[0], COUNTS, m), "query"),
    "loss_gradient, query": (lambda m: scan_snap.loss_gradient(*WEIGHTS, COUNTS, m, [1, 2]), "query"),
    "loss_gradient, next": (lambda n: scan_snap.loss_gradient(*WEIGHTS, COUNTS, [1, 2], n), "next_token"),
    "log_relative_gain, token": (
        lambda token: scan_snap.log_relative_gain(LOGITS[0], ONE_COMMON, token, [0, 0]),
        "token",
    ),
    "log_relative_gain, reference": (
        lambda token: scan_snap.log_relative_gain(LOGITS[0], ONE_COMMON, [0, 0], token),
        "reference",
    ),
    "log_relative_gain_closed_form": (
        lambda token: scan_snap.log_relative_gain_closed_form(LOGITS[0], ONE_COMMON, token, [0, 0]),
        "token",
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_outside_of_the_vocabulary_are_neither_clamped_nor_wrapped_nor_dropped(name):
    call, argument = TOKENS[name]
    assert_bad_lanes_are_nan(call, [0, 0], [0, M], [-1, 0], [2 * M, -M])
    for bad in (M, -1):
        with pytest.raises(ValueError, match=f"^{argument} must be integers from 0 to 6, got {bad}"):
            call([0, bad])
        with pytest.raises(ValueError, match=f"^{argument} must"):
            jax.jit(lambda scale, bad=bad: jax.tree.map(lambda leaf: scale * leaf, call([bad, 0])))(1.0)


def test_counts_are_not_negative():
    def features(counts):
        return scan_snap.attended_features(LOGITS[0], counts, [1, 2])

    assert_bad_lanes_are_nan(features, COUNTS, COUNTS - 1, COUNTS * np.nan, COUNTS + np.inf)
    with pytest.raises(ValueError, match=r"^counts must be finite and >= 0, got -1\.0"):
        features(COUNTS - 1)
    with pytest.raises(ValueError, match=r"^counts and query must have shapes"):
        features(COUNTS[:1])


SETTING = {"t": 3.0, "learning_rate_Y": 1.0, "num_classes": 2.0, "vocab_size": 34.0}
GROWTH = {**SETTING, "learning_rate_Z": 0.5, "C0": 2.0}
CLOSED_FORMS = {
    scan_snap.decoder_margin: SETTING,
    scan_snap.crossover_time: {name: value for name, value in SETTING.items() if name != "t"},
    scan_snap.attention_growth: GROWTH,
    scan_snap.attention_growth_scanning: GROWTH,
    scan_snap.attention_growth_snapping: GROWTH,
    scan_snap.attention_growth_printed: GROWTH,
}


@pytest.mark.parametrize("form", CLOSED_FORMS, ids=lambda form: form.__name__)
def test_a_bad_traced_number_has_no_closed_form(form):
    for name, value in CLOSED_FORMS[form].items():
        assert_bad_lanes_are_nan(
            lambda x, name=name: form(**{**CLOSED_FORMS[form], name: x}), value, -value, jnp.inf, jnp.nan
        )


def test_without_a_theory_the_error_is_the_size_of_attention():
    Z, theory = np.array([[3.0, 4.0]]), np.array([[[0.0, 0.0]], [[0.0, 4.0]]])
    assert scan_snap.attention_error(Z, theory).tolist() == [5.0, 0.75]


def test_a_measure_hands_on_what_is_not_a_number():
    Z = np.ones((2, 2, 2))
    Z[1, 0, 0] = np.nan
    assert np.isnan(scan_snap.attention_error(Z, np.ones((2, 2)))).tolist() == [False, True]
    assert np.isnan(scan_snap.attention_error(Z[0], Z)).tolist() == [False, True]
    assert np.isnan(scan_snap.rank_correlation([1.0, np.nan, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]))
    assert scan_snap.rank_correlation([1.0, 2.0, 3.0], [-np.inf, 0.0, 1.0]) == 1.0
    xi = np.array([[0.0, 1.0], [np.nan, 1.0], [1.0, 1.0]])
    assert np.isnan(scan_snap.growth_along(xi, [0.0, 1.0, 2.0], 1.0)).any(axis=0).tolist() == [True, False]
    # A measure that is squared in half the digits would be zero, and the error the size of Z.
    small = np.full((2, 2), 1e-23, np.float32)
    assert scan_snap.attention_error(2 * small, small) == pytest.approx(1.0)
    for call, message in (
        (lambda: scan_snap.rank_correlation([1.0, 2.0], [1.0]), "z and score must have one shape"),
        (
            lambda: scan_snap.growth_along(xi, [0.0, 1.0], 1.0),
            r"growth_rate must have shape \(\.\.\., 2, K\)",
        ),
        (lambda: scan_snap.growth_along(xi, [0.0, 2.0, 1.0], 1.0), "ts must increase strictly"),
        (lambda: scan_snap.growth_along(xi, [0.0, 1.0, 2.0], -1.0), "learning_rate_Z must be >= 0, got -1.0"),
        (lambda: scan_snap.attention_error(Z * 1j, Z), "Z must be real"),
        (lambda: scan_snap.attention_error([1.0], [1.0]), "Z and theory must have shapes"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_what_does_not_occur_has_no_gradient():
    def share(P):
        classes = SequenceClasses(P, [1, 2], [1, 2])
        return scan_snap.context_distribution(jnp.zeros((3, 3)), classes)[0, 1]

    pull = jax.grad(share)(jnp.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]))
    np.testing.assert_allclose(pull, [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], atol=1e-15)


def test_growth_rate_is_what_attention_does():
    path = scan_snap.fast_decoder_flow(ONE_COMMON, [0.0, 5.0], **RATES)
    weights = Weights(path.ys.Y[-1], path.ys.Z[-1])
    c = scan_snap.context_distribution(weights.Z, ONE_COMMON)
    f = c / jnp.linalg.norm(c, axis=1, keepdims=True)
    velocity = scan_snap.population_field(weights, ONE_COMMON).Z[ONE_COMMON.query]
    xi = scan_snap.growth_rate(weights, ONE_COMMON)
    # The same for both distinct tokens of a class.
    np.testing.assert_allclose(velocity[0, 1:3] / f[0, 1:3] ** 2, xi[0], rtol=1e-10)
    np.testing.assert_allclose(velocity[1, 3:5] / f[1, 3:5] ** 2, xi[1], rtol=1e-10)
    # The weak-correlation flow has its own.
    path = scan_snap.weak_correlation_flow(
        ONE_COMMON, [0.0, 4.999, 5.0, 5.001], **RATES, rtol=1e-11, atol=1e-14
    )
    Z = path.ys.Z
    c = scan_snap.context_distribution(Z[2], ONE_COMMON)
    f = c / jnp.linalg.norm(c, axis=1, keepdims=True)
    velocity = (Z[3] - Z[1])[ONE_COMMON.query] / 0.002 / RATES["learning_rate_Z"]
    xi = scan_snap.weak_growth_rate(Z[2], ONE_COMMON, 5.0, RATES["learning_rate_Y"])
    np.testing.assert_allclose(velocity[0, 1:3] / f[0, 1:3] ** 2, xi[0], rtol=1e-5)
    assert scan_snap.growth_rate(Weights(weights.Y, weights.Z - 1e4), ONE_COMMON).shape == (2,)
    lost = weights.Z.at[5, 1].set(-1000.0)
    assert np.all(np.isfinite(scan_snap.growth_rate(Weights(weights.Y, lost), ONE_COMMON)))


def test_growth_starts_with_the_decoders_rate():
    setting = {"learning_rate_Z": 1.0, "num_classes": 10.0, "vocab_size": 1000.0}
    slope = jax.grad(lambda rate: scan_snap.attention_growth(1.0, learning_rate_Y=rate, **setting))(0.0)
    assert float(slope) == pytest.approx(0.5 / 10 * 0.999**2, rel=1e-12)


@pytest.mark.parametrize("flow", FLOWS)
def test_dtype_follows_the_classes_and_one_time_gives_the_start(flow):
    classes = SequenceClasses(jnp.asarray(P, jnp.float32), [5, 5, 6], [0, 3, 6])
    path = flow(classes, [0.0], **RATES)
    assert bool(path.ok)
    assert path.ys.Y.dtype == path.ys.Z.dtype == jnp.float32
    np.testing.assert_array_equal(path.ys.Z, np.zeros((1, M, M)))
    assert scan_snap.growth_rate(Weights(path.ys.Y[0], path.ys.Z[0]), classes).dtype == jnp.float32
