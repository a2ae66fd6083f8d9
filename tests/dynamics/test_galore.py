"""Low-rank gradients: closed forms against descent, bounds on both sides of their conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamics import galore
from dynamics.spectra import stable_rank
from tests.helpers import count_compilations

RATE = 0.5
STEPS = np.arange(40)  # everywhere, and few shapes: what takes the time is compiling
seeds = st.integers(0, 2**16)
ranks_of = jax.jit(stable_rank)


def draw_terms(random, m, n, *, samples=8, rank_one=False):
    """A, B, C as they come from Jacobians and inputs; C of full rank unless each has one input only."""
    J = random.normal(size=(samples, m, m))
    f = random.normal(size=(samples, n, 1 if rank_one else n))
    return random.normal(size=(samples, m, n)), np.swapaxes(J, 1, 2) @ J / m, f @ np.swapaxes(f, 1, 2)


def orthonormal(random, m, r):
    return np.linalg.qr(random.normal(size=(m, r)))[0]


def safe_rate(S, share=1.0):
    return share / np.linalg.eigvalsh(np.asarray(S))[-1]


# --- The gradient of a network


def make_network(samples=6, sizes=(4, 3, 5, 3)):
    """A network without biases, its middle layer W, and data."""
    random = np.random.default_rng(0)
    first, W, last = (random.normal(size=sizes[i : i + 2]).T / np.sqrt(sizes[i]) for i in range(3))
    y = np.eye(sizes[-1])[np.arange(samples) % sizes[-1]]
    return first, W, last, random.normal(size=(samples, sizes[0])), y


def test_gradient_of_a_middle_layer_has_the_form_of_the_theorem():
    first, W, last, x, y = make_network()

    def after(hidden):
        return last @ jax.nn.leaky_relu(hidden, jnp.asarray(0.1))

    def loss(W, inputs):
        return jnp.mean(jnp.sum((jax.vmap(after)(inputs @ W.T) - y) ** 2, axis=1)) / 2

    @jax.jit
    def both(W):
        inputs = jax.nn.leaky_relu(x @ first.T, jnp.asarray(0.1))
        terms = galore.reversible_terms(jax.vmap(jax.jacrev(after))(inputs @ W.T), inputs, y, "squared")
        return galore.reversible_gradient(*terms, W), -jax.grad(loss)(W, inputs)

    np.testing.assert_allclose(*both(W), atol=2e-15)


@pytest.mark.parametrize(("loss", "tolerance"), [("squared", 1e-13), ("softmax", 1e-6)])
def test_monomials_behind_the_layer_multiply_the_degree(loss, tolerance):
    _, W, last, x, y = make_network()
    inputs, small = x[:, :3], 1.0 if loss == "squared" else 1e-5

    def after(hidden):
        return small * (last @ hidden**3) ** 2  # of degree six

    def error(W):
        out = jax.vmap(after)(inputs @ W.T)
        squared = jnp.sum((out - y) ** 2, axis=1) / 2
        return jnp.mean(squared if loss == "squared" else -jnp.sum(y * jax.nn.log_softmax(out), axis=1))

    J, exact = jax.vmap(jax.jacrev(after))(inputs @ W.T), -jax.grad(error)(jnp.asarray(W))
    forms = [
        galore.reversible_gradient(*galore.reversible_terms(J, inputs, y, loss, degree=degree), W)
        for degree in (6, 1)
    ]
    off, printed = (float(jnp.linalg.norm(form - exact) / jnp.linalg.norm(exact)) for form in forms)
    assert off < tolerance
    assert printed > 10 * off
    with pytest.raises(ValueError, match=r"^degree must be a positive number, got 0"):
        galore.reversible_terms(J, inputs, y, loss, degree=0.0)


def test_softmax_form_is_right_to_second_order_in_the_logits():
    _, W, last, x, y = make_network()
    inputs, scales = x[:, :3], np.array([1e-1, 1e-2, 1e-3])

    @jax.jit
    @jax.vmap
    def error(scale):
        def loss(W):
            logits = scale * inputs @ W.T @ last.T
            return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=1))

        J = jnp.broadcast_to(scale * last, (len(x), *last.shape))
        form = galore.reversible_gradient(*galore.reversible_terms(J, inputs, y, "softmax"), W)
        exact = -jax.grad(loss)(jnp.asarray(W))
        return jnp.linalg.norm(form - exact) / jnp.linalg.norm(exact)

    slope = np.polyfit(np.log(scales), np.log(np.asarray(error(scales))), 1)[0]
    assert slope == pytest.approx(2, abs=0.02)


# --- Linear dynamics


@given(st.sampled_from([(2, 3), (4, 3)]), seeds)
def test_iterates_are_those_of_descent_on_the_weights(shape, seed):
    random = np.random.default_rng(seed)
    A, B, C = draw_terms(random, *shape)
    S = galore.gradient_operator(B, C)
    np.testing.assert_allclose(
        S, np.mean([np.kron(c, b) for b, c in zip(B, C, strict=True)], axis=0), rtol=1e-13, atol=1e-14
    )
    W, rate, path = random.normal(size=shape), safe_rate(S, 1.5), []
    for _ in range(5):
        G = np.mean(A - B @ W @ C, axis=0)
        np.testing.assert_allclose(galore.reversible_gradient(A, B, C, W), G, rtol=1e-12, atol=1e-12)
        path.append(G)
        W = W + rate * G
    closed = galore.gradient_iterates(path[0], S, rate, STEPS)[:5]
    np.testing.assert_allclose(closed, path, atol=1e-12 * np.max(np.abs(path)))


@given(seeds, st.floats(0.01, 1.0))
def test_valid_bound_holds_up_to_the_largest_learning_rate(seed, share):
    random = np.random.default_rng(seed)
    m, n = shape = 4, 3
    U = orthonormal(random, m * n, m * n)
    values = np.sort(random.uniform(0, 1, m * n))
    S = U @ np.diag(values) @ U.T
    G0 = random.normal(size=shape)
    steps = 5 * STEPS
    limit = 2 / (values[1] + values[-1])
    rate = share * limit * (1 - 1e-12)
    bound = np.asarray(galore.stable_rank_bound(G0, S, rate, steps, "valid"))
    ranks = np.asarray(ranks_of(galore.gradient_iterates(G0, S, rate, steps)))
    assert np.all(ranks <= bound * (1 + 1e-9))
    # The formula itself, where it bounds anything.
    parallel = np.reshape(U[:, 0] * (U[:, 0] @ G0.T.reshape(-1)), (n, m)).T
    rho = ((1 - rate * values[1]) / (1 - rate * values[0])) ** steps
    a, b = np.linalg.norm(parallel, 2), np.linalg.norm(G0 - parallel, 2)
    with np.errstate(divide="ignore"):
        squares = np.linalg.norm(parallel) ** 2 + rho**2 * np.linalg.norm(G0 - parallel) ** 2
        formula = np.where(rho * b < a, squares / np.maximum(a - rho * b, 0) ** 2, np.inf)
    clear = np.abs(rho * b - a) > 1e-6 * a
    np.testing.assert_allclose(bound[clear], formula[clear], rtol=1e-6)
    assert np.all(np.isinf(galore.stable_rank_bound(G0, S, 1.001 * limit, steps, "valid")))


def test_printed_bound_fails_at_every_step_of_the_counterexample():
    G0, B, C = galore.bound_counterexample()
    assert np.linalg.eigvalsh(B).min() >= 0
    assert np.linalg.eigvalsh(C).min() >= 0
    S = galore.gradient_operator(B, C)
    np.testing.assert_allclose(np.linalg.eigvalsh(S), [0.1, 0.5, 1, 1.32], rtol=1e-13)
    steps = STEPS
    ranks = np.asarray(ranks_of(galore.gradient_iterates(G0, S, RATE, steps)))
    printed, valid = (
        np.asarray(galore.stable_rank_bound(G0, S, RATE, steps, form)) for form in ("printed", "valid")
    )
    np.testing.assert_allclose(printed[0], 1.3, rtol=1e-12)
    np.testing.assert_allclose(ranks[0], (1.8**2 + 1.4**2) / 1.8**2, rtol=1e-12)
    assert np.all(ranks > printed)
    assert np.all(ranks <= valid)
    # No constant repairs the exponent: what is above the limit falls like rho^t.
    rho = (1 - RATE * 0.5) / (1 - RATE * 0.1)
    excess = ranks - 1.25
    np.testing.assert_allclose(excess[31:] / excess[30:-1], rho, rtol=1e-3)
    np.testing.assert_allclose(excess[-1] / rho ** steps[-1], 0.25, rtol=1e-4)


def test_printed_bound_fails_in_the_end_on_half_of_all_random_networks():
    early, instances = 10.0 * STEPS, []
    for seed in range(40):
        A, B, C = draw_terms(np.random.default_rng(seed), 4, 3, rank_one=True)
        S = np.mean([np.kron(c, b) for b, c in zip(B, C, strict=True)], axis=0)
        instances.append((np.mean(A, axis=0), S))
    G0, S = (jnp.asarray(np.stack(side)) for side in zip(*instances, strict=True))

    def compare(G0, S):
        split, values = galore.slow_split(G0, S, "printed"), jnp.linalg.eigvalsh(S)
        rate = 1 / values[-1]
        rho = (1 - rate * split.second) / (1 - rate * split.slowest)
        steps = jnp.concatenate([early, jnp.round(jnp.log(1e-6) / jnp.log(rho))[None]])
        path = galore.gradient_iterates(G0, S, rate, steps)
        bounds = [galore.stable_rank_bound(G0, S, rate, steps, form) for form in ("printed", "valid")]
        # To first order the rest changes the stable rank by its share in the largest singular value.
        U, s, Vh = jnp.linalg.svd(split.parallel)
        left = galore.gradient_iterates(split.perpendicular, S, rate, steps[-1:])[0]
        left = left / (1 - rate * split.slowest) ** steps[-1]
        excess = -2 * stable_rank(split.parallel) * (U[:, 0] @ left @ Vh[0]) / s[0]
        return stable_rank(path), *bounds, stable_rank(split.parallel), excess

    ranks, printed, valid, limit, excess = map(np.asarray, jax.jit(jax.vmap(compare))(G0, S))
    assert np.all(ranks <= valid * (1 + 1e-12))
    assert np.mean(np.isfinite(valid)) > 0.5
    np.testing.assert_allclose(ranks[:, -1] - limit, excess, rtol=1e-3, atol=1e-9)
    violated = ranks > printed + 1e-12
    assert np.all(violated[:, -1] == (excess > 0))
    assert 12 <= np.sum(violated[:, -1]) <= 28
    # It takes a while.
    assert np.sum(violated[:, :10]) == 0


def test_one_kronecker_product_goes_to_rank_one_within_the_printed_bound():
    A, B, C = draw_terms(np.random.default_rng(3), 4, 3, samples=1)
    S, steps = galore.gradient_operator(B, C), 500 * STEPS
    rate = safe_rate(S)
    ranks = np.asarray(ranks_of(galore.gradient_iterates(A[0], S, rate, steps)))
    printed = np.asarray(galore.stable_rank_bound(A[0], S, rate, steps, "printed"))
    assert np.all(ranks <= printed * (1 + 1e-12))
    assert ranks[0] > 1.2
    np.testing.assert_allclose(ranks[-1], 1, atol=1e-9)


def test_where_the_inputs_do_not_span_the_null_space_holds_no_gradient():
    random = np.random.default_rng(5)
    m, n, samples, seen = 4, 3, 6, 2
    f = random.normal(size=(samples, seen)) @ random.normal(size=(seen, n))
    J, y = random.normal(size=(samples, 4, m)), random.normal(size=(samples, 4))
    terms = galore.reversible_terms(J, f, y, "squared")
    G0 = galore.reversible_gradient(*terms, random.normal(size=(m, n)))
    S = galore.gradient_operator(terms.B, terms.C)
    assert np.linalg.matrix_rank(G0) == seen
    printed, valid = (galore.slow_split(G0, S, form) for form in ("printed", "valid"))
    assert float(jnp.linalg.norm(printed.parallel)) < 1e-12 * float(jnp.linalg.norm(G0))
    values = np.linalg.eigvalsh(S)
    np.testing.assert_allclose(values[: m * (n - seen)], 0, atol=1e-12)
    np.testing.assert_allclose(printed.slowest, 0, atol=1e-12)
    np.testing.assert_allclose(printed.second, values[m * (n - seen)], rtol=1e-9)
    np.testing.assert_allclose(valid.slowest, values[m * (n - seen)], rtol=1e-9)
    np.testing.assert_allclose(valid.parallel + valid.perpendicular, G0, atol=1e-12)

    steps, rate = 10 * STEPS, safe_rate(S)
    ranks = np.asarray(ranks_of(galore.gradient_iterates(G0, S, rate, steps)))
    bound = np.asarray(galore.stable_rank_bound(G0, S, rate, steps, "valid"))
    assert np.all(np.isnan(galore.stable_rank_bound(G0, S, rate, steps, "printed")))
    assert np.all(ranks <= bound * (1 + 1e-12))
    late = galore.stable_rank_bound(G0, S, rate, 10_000 * STEPS, "valid")[-1]
    parallel = np.linalg.svd(valid.parallel)[1]
    np.testing.assert_allclose(late, np.sum(parallel**2) / parallel[0] ** 2, rtol=1e-12)


def test_a_gradient_in_one_eigenspace_keeps_its_stable_rank():
    G0 = np.array([[2.0, 0.0], [0.0, 1.0]])
    for form in ("printed", "valid"):
        bound = galore.stable_rank_bound(G0, np.eye(4), RATE, STEPS, form)
        np.testing.assert_allclose(bound, np.full(40, 1.25), rtol=1e-14)
    assert np.isnan(galore.stable_rank_bound(0 * G0, np.eye(4), RATE, STEPS, "printed")).all()


def test_float32_is_kept_however_small_the_gradient():
    G0, B, C = galore.bound_counterexample(jnp.float32)
    S = galore.gradient_operator(B, C)
    for form, expected in (("printed", 1.3), ("valid", 2.03125)):
        bound = galore.stable_rank_bound(1e-30 * G0, S, RATE, 0, form)
        assert bound.dtype == jnp.float32
        np.testing.assert_allclose(bound, expected, rtol=1e-5)


# --- A fixed projection


@given(seeds)
def test_descent_in_a_subspace_is_that_of_the_weights(seed):
    m, n, r, s = 4, 3, 2, 1
    random = np.random.default_rng(seed)
    A, B, C = draw_terms(random, m, n)
    P, Q = orthonormal(random, m, r), orthonormal(random, n, s)
    S = galore.gradient_operator(galore.projected_coefficients(B, P), galore.projected_coefficients(C, Q))
    rate, W = safe_rate(S, 1.5), np.zeros((m, n))
    weights, gradients = [], []
    for _ in range(5):
        G = np.mean(A - B @ W @ C, axis=0)
        weights.append(W)
        gradients.append(G)
        W = W + rate * P @ (P.T @ G @ Q) @ Q.T
    path = galore.projected_descent(gradients[0], B, C, P, Q, rate, STEPS)
    path = jax.tree.map(lambda leaf: leaf[:5], path)
    tolerance = 1e-12 * np.max(np.abs(gradients))
    np.testing.assert_allclose(path.change, weights, atol=tolerance * (1 + rate))
    np.testing.assert_allclose(path.gradient, gradients, atol=10 * tolerance)
    np.testing.assert_allclose(path.projected, P.T @ np.stack(gradients) @ Q, atol=10 * tolerance)


def test_inside_the_subspace_the_gradient_vanishes_and_outside_it_does_not():
    random = np.random.default_rng(0)
    A, B, C = draw_terms(random, 4, 3)
    G0, eye = np.mean(A, axis=0), np.eye(3)
    P = orthonormal(random, 4, 2)
    Q = orthonormal(random, 3, 1)
    S = galore.gradient_operator(galore.projected_coefficients(B, P), galore.projected_coefficients(C, Q))
    path = galore.projected_descent(G0, B, C, P, Q, safe_rate(S), 100 * STEPS)
    assert np.linalg.norm(path.projected[-1]) < 1e-12
    assert np.linalg.norm(path.gradient[-1]) > 0.5 * np.linalg.norm(G0)
    np.testing.assert_allclose(P.T @ np.asarray(path.gradient) @ Q, path.projected, atol=1e-12)
    # Without a projection it vanishes altogether, as the closed form of the whole dynamics says.
    whole = galore.gradient_operator(B, C)
    rate = safe_rate(whole)
    path = galore.projected_descent(G0, B, C, np.eye(4), eye, rate, 500 * STEPS)
    np.testing.assert_allclose(path.projected, path.gradient, atol=1e-11)
    exact = galore.gradient_iterates(G0, whole, rate, 500 * STEPS)
    np.testing.assert_allclose(path.gradient, exact, atol=1e-11)
    assert np.linalg.norm(path.gradient[-1]) < 1e-11


def test_where_nothing_decays_the_weights_move_linearly():
    B, C = np.diag([0.0, 1e-9, 1e-3, 1.0]), np.eye(3)
    B, C = (np.broadcast_to(matrix, (8, *matrix.shape)) for matrix in (B, C))
    path = galore.projected_descent(np.ones((4, 3)), B, C, np.eye(4), np.eye(3), 0.5, STEPS)
    exact = np.stack([0.5 * t - 0.125e-9 * t * (t - 1) for t in STEPS])
    np.testing.assert_allclose(path.change[:, 0, 1], 0.5 * STEPS, rtol=1e-14)
    np.testing.assert_allclose(path.change[:, 1, 1], exact, rtol=1e-14)
    np.testing.assert_allclose(path.change[:, 2, 1], (1 - 0.9995**STEPS) / 1e-3, rtol=1e-12)
    np.testing.assert_allclose(path.change[:, 3, 1], 1 - 0.5**STEPS, rtol=1e-14)


def test_printed_contraction_fails_where_the_coefficient_moves():
    # G = 0.6 - B(w) w with B(w) = 1 - 0.4 w, C = 1: L_C = 0, so that the printed product sees no change of B.
    rate, steps = 0.1, 60
    w = [0.0]
    for _ in range(steps - 1):
        w.append(w[-1] + rate * (0.6 - (1 - 0.4 * w[-1]) * w[-1]))
    w = np.array(w)
    G = 0.6 - (1 - 0.4 * w) * w
    measured = np.max(G[1:] / G[:-1])
    hats = (1 - 0.4 * w).reshape(-1, 1, 1, 1), np.ones((steps, 1, 1, 1))
    constants = {"lipschitz": (0, 0.4, 0), "weight_bound": np.max(w), "sup_B": 1, "sup_C": 1}
    printed, valid = (
        float(galore.contraction_factor(*hats, rate, form, **constants)) for form in ("printed", "valid")
    )
    np.testing.assert_allclose(printed, 1 - rate * (1 - 0.4 * w[-1]), rtol=1e-14)
    np.testing.assert_allclose(valid, 1 - rate * (1 - 0.8 * w[-1]), rtol=1e-14)
    assert printed < 0.97 * measured
    assert measured <= valid < 1.0002 * measured


def test_printed_contraction_needs_a_bound_on_the_learning_rate():
    A, B, C = draw_terms(np.random.default_rng(2), 4, 3)
    S = np.asarray(galore.gradient_operator(B, C))
    values = np.linalg.eigvalsh(S)
    for share in (0.9, 1.9, 2.1):
        rate = safe_rate(S, share)
        printed, factor = (
            float(galore.contraction_factor(B, C, rate, form)) for form in ("printed", "valid")
        )
        path = galore.gradient_iterates(np.mean(A, axis=0), S, rate, STEPS)
        norms = np.linalg.norm(path, axis=(1, 2))
        late = np.linalg.norm(
            galore.gradient_iterates(np.mean(A, axis=0), S, rate, 2000 + STEPS), axis=(1, 2)
        )
        assert np.all(norms[1:] <= factor * norms[:-1] * (1 + 1e-12))
        np.testing.assert_allclose(late[1:] / late[:-1], factor, rtol=1e-9)
        np.testing.assert_allclose(
            printed, 1 - rate * np.mean(np.linalg.eigvalsh(B)[:, 0] * np.linalg.eigvalsh(C)[:, 0]), rtol=1e-12
        )
        assert printed < 1
        assert (factor > 1) == (share > 2)
        if share < 1:
            np.testing.assert_allclose(factor, 1 - rate * values[0], rtol=1e-12)
            assert factor <= printed


def test_every_constant_of_the_contraction_has_its_place():
    hats, eta, (L_A, L_B, L_C), D, sup_B, sup_C = ([[[2.0]]], [[[3.0]]]), 0.01, (0.3, 0.5, 0.7), 1.1, 4.0, 3.5
    constants = {"lipschitz": (L_A, L_B, L_C), "weight_bound": D, "sup_B": sup_B, "sup_C": sup_C}
    for form, loss in {
        "printed": L_A + L_B * L_C * D**2,
        "valid": L_A + D * (L_B * sup_C + L_C * sup_B),
    }.items():
        factor = galore.contraction_factor(*hats, eta, form, **constants)
        np.testing.assert_allclose(factor, 1 - eta * (2 * 3 - loss), rtol=1e-14)


def test_printed_contraction_is_vacuous_for_single_inputs():
    _, B, C = draw_terms(np.random.default_rng(1), 4, 3, rank_one=True)
    rate = safe_rate(galore.gradient_operator(B, C))
    np.testing.assert_allclose(galore.contraction_factor(B, C, rate, "printed"), 1, atol=1e-14)
    assert float(galore.contraction_factor(B, C, rate, "valid")) < 0.996


# --- Bad input


def test_bad_input_is_refused():
    G0, B, C = galore.bound_counterexample()
    S = galore.gradient_operator(B, C)
    P = np.eye(2, 1)
    skew = S + np.triu(np.ones((4, 4)), 1)
    for match, call in {
        "form must be one of": lambda: galore.stable_rank_bound(G0, S, RATE, 0, "paper"),
        "G0 and S must have shapes": lambda: galore.stable_rank_bound(G0, S[:3, :3], RATE, 0, "valid"),
        "S must be symmetric": lambda: galore.gradient_iterates(G0, skew, RATE, 0),
        "G0 must be finite": lambda: galore.slow_split(G0 * np.nan, S, "valid"),
        "G0 must be real": lambda: galore.slow_split(np.full((2, 2), 1j), S, "valid"),
        "G0 must not be empty": lambda: galore.slow_split(np.zeros((0, 2)), S, "valid"),
        "learning_rate must be a finite number >= 0": lambda: galore.gradient_iterates(G0, S, -1.0, 0),
        "steps must be integers >= 0, got -1": lambda: galore.gradient_iterates(G0, S, RATE, -1),
        "steps must be integers >= 0, got 0.5": lambda: galore.gradient_iterates(G0, S, RATE, 0.5),
        "B and C must have shapes": lambda: galore.gradient_operator(B, C[0]),
        r"B and C must have shapes \(N, m, m\) and": lambda: galore.gradient_operator(B[:3], C),
        "W, A, B and C must have shapes": lambda: galore.reversible_gradient(B[:1], B, C, G0),
        "J, f and y must have": lambda: galore.reversible_terms(B, G0, G0, "squared"),
        "loss must be one of": lambda: galore.reversible_terms(B, C[:, 0], C[:, 0], "hinge"),
        "P must have orthonormal": lambda: galore.projected_coefficients(B, 2 * P),
        "B and P must have shapes": lambda: galore.projected_coefficients(B, P[:1]),
        "B_hat and C_hat must have": lambda: galore.contraction_factor(B, C[:3], RATE, "valid"),
        "B_hat must be symmetric": lambda: galore.contraction_factor(np.triu(B), C, RATE, "valid"),
        "lipschitz must be three": lambda: galore.contraction_factor(B, C, RATE, "valid", lipschitz=(1, 2)),
        r"lipschitz\[1\] must be": lambda: galore.contraction_factor(
            B, C, RATE, "valid", lipschitz=(0, -1, 0)
        ),
        "G0, B, C, P and Q must have": lambda: galore.projected_descent(G0, B, C, P, P[:1], RATE, 0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_a_bad_traced_value_gives_nan_in_its_lane_only():
    G0, B, C = galore.bound_counterexample()
    S = galore.gradient_operator(B, C)

    def results(rate, steps, factor):
        bounds = [
            galore.stable_rank_bound(factor * G0, S, rate, steps, form) for form in ("printed", "valid")
        ]
        descent = galore.projected_descent(factor * G0, B, C, np.eye(2), np.eye(2), rate, steps)
        return (
            *bounds,
            galore.gradient_iterates(factor * G0, S, rate, steps),
            descent.change,
            galore.contraction_factor(factor * B, C, rate, "valid") + 0 * steps,
        )

    rates = jnp.array([0.5, -0.5, 0.5, 0.5])
    lanes = jax.jit(jax.vmap(results))(
        rates, jnp.array([2.0, 2.0, 2.5, 2.0]), jnp.array([1.0, 1.0, 1.0, jnp.nan])
    )
    for number, result in enumerate(lanes):
        bad = [1, 3] if number == 4 else [1, 2, 3]  # the factor of one step has no steps
        assert np.all(np.isnan(np.asarray(result)[bad]))
        assert np.all(np.isfinite(np.asarray(result)[0]))


def test_other_numbers_compile_nothing():
    G0, B, C = galore.bound_counterexample()
    S = galore.gradient_operator(B, C)
    galore.stable_rank_bound(G0, S, RATE, STEPS, "valid")
    other = 2 * G0
    with count_compilations() as compiled:
        galore.stable_rank_bound(other, S, 0.25, STEPS + 7, "valid")
    assert compiled == []
