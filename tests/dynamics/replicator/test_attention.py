from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial
from scipy.integrate import solve_ivp

from dynamics.replicator import (
    attention_field,
    attention_lipschitz,
    coupled_flow,
    natural_gradient_flow,
    overparametrized_rate,
    simulate,
    softmax_flow,
    softmax_jacobian,
    softmax_jacobian_product,
    squared_error_gradient,
    two_token_solution,
)
from tests.helpers import count_compilations

TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
TIMES = [0.0, 1.0, 20.0]
close = partial(np.testing.assert_allclose, rtol=0)
seeds = st.integers(0, 2**31)


def affine(matrix, offset, x):
    """Gradient of the quadratic loss x^T M x / 2 + <b, x>, of one row or of each of several."""
    return jnp.sum(matrix * x[..., None, :], axis=-1) + offset


def quadratic(seed, n=3):
    """A symmetric matrix, an offset, and logits to start from."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(n, n))
    return matrix + matrix.T, rng.normal(size=n), rng.normal(size=n)


def softmax(z):
    return np.exp(z - np.logaddexp.reduce(z, axis=-1, keepdims=True))


def jacobian_numpy(x):
    return np.diag(x) - np.outer(x, x)


@given(seed=seeds, key_scale=st.floats(0.1, 5))
def test_logits_keep_their_sum_and_the_loss_falls_at_its_rate(seed, key_scale):
    matrix, offset, z0 = quadratic(seed)
    h = 1e-4 / key_scale
    gradient = Partial(affine, matrix, offset)
    z = np.asarray(softmax_flow(gradient, z0, [0.0, h, 2 * h], key_scale, **TIGHT).ys)
    close(z.sum(axis=1), z0.sum(), atol=1e-14)
    x = softmax(z)
    loss = np.einsum("ti,ij,tj->t", x, matrix, x) / 2 + x @ offset
    pull = jacobian_numpy(x[1]) @ (matrix @ x[1] + offset)
    speed = (loss[2] - loss[0]) / (2 * h * key_scale)
    assert speed == pytest.approx(-pull @ pull, abs=1e-6)


def twice(gradient, key_scale, x):
    return -key_scale * softmax_jacobian_product(x, gradient(x))


def test_it_is_the_replicator_flow_whose_fitness_has_the_other_jacobian():
    matrix, offset, z0 = quadratic(0)
    gradient = Partial(affine, matrix, offset)
    flow = softmax_flow(gradient, z0, TIMES, 1.5, **TIGHT)
    population = simulate(Partial(twice, gradient, 1.5), softmax(z0), TIMES, **TIGHT)
    close(jax.nn.log_softmax(flow.ys, axis=1), population.ys, atol=1e-11)
    natural = natural_gradient_flow(gradient, z0, TIMES, 1.5, **TIGHT)
    # With one Jacobian the fitness is linear; an offset is a matrix of equal columns, since sum(x) = 1.
    payoff = -1.5 * (matrix + offset[:, None])
    log_x = jax.nn.log_softmax(natural.ys, axis=1)
    close(log_x, simulate(payoff, softmax(z0), TIMES, **TIGHT).ys, atol=1e-11)
    close(np.sum(natural.ys, axis=1), z0.sum(), atol=1e-13)
    assert np.max(np.abs(log_x - population.ys)) > 0.1  # the two flows are not the same one


def test_the_flow_is_that_of_a_trained_prompt():
    rng = np.random.default_rng(0)
    matrix, offset, _ = quadratic(1)
    keys, p0 = rng.normal(size=(3, 5)), rng.normal(size=5)
    keys = np.sqrt(1.5) * np.linalg.qr(keys.T)[0].T  # orthogonal, of squared length 1.5

    def descend(t, p):
        x = softmax(keys @ p)
        return -keys.T @ jacobian_numpy(x) @ (matrix @ x + offset)

    prompt = solve_ivp(descend, (0, 20), p0, "DOP853", TIMES, rtol=1e-12, atol=1e-12).y
    flow = softmax_flow(Partial(affine, matrix, offset), keys @ p0, TIMES, 1.5, **TIGHT)
    close(flow.ys, prompt.T @ keys.T, atol=1e-10)


def test_symmetric_losers_vanish_like_one_over_time():
    n, gap, key_scale, t = 3, 0.7, 1.5, 1e6
    worse = gap * jnp.array([0.0, 1.0, 1.0])
    z = softmax_flow(Partial(affine, jnp.zeros((n, n)), worse), np.zeros(n), [0.0, t, 2 * t], key_scale).ys
    shares = np.exp(jax.nn.log_softmax(z[1:], axis=1))[:, 1:]
    times = np.array([[t], [2 * t]])
    close(shares * n * key_scale * gap * times, 1, atol=1e-4)


def two_tokens(gap, x):
    return jnp.stack([jnp.zeros_like(gap), gap])


TWO_TOKEN_TIMES = [0.0, 1.0, 10.0, 1e3, 1e6]
TWO_TOKEN_GAPS = [0.0, -0.49007307, -2.68739012, -7.59328046, -14.50864323]


def gap_of_logits(path):
    return path.ys[:, 1] - path.ys[:, 0]


def test_two_tokens_follow_the_closed_form():
    path = softmax_flow(Partial(two_tokens, jnp.ones(())), [0.0, 0.0], TWO_TOKEN_TIMES)
    close(gap_of_logits(path), TWO_TOKEN_GAPS, atol=1e-7)
    close(two_token_solution(TWO_TOKEN_TIMES, 1.0), TWO_TOKEN_GAPS, atol=5.1e-9)  # all printed digits
    gap, key_scale, u0 = 0.6, 2.5, 3.0
    path = softmax_flow(Partial(two_tokens, jnp.asarray(gap)), [0.0, u0], TWO_TOKEN_TIMES, key_scale)
    close(gap_of_logits(path), two_token_solution(TWO_TOKEN_TIMES, gap, key_scale, u0), atol=1e-7)


def test_a_stiff_solver_reaches_ratios_of_1e25():
    ts = np.array([0.0, 1.0, 1e8, 1e16, 1e25])
    path = softmax_flow(Partial(two_tokens, jnp.ones(())), [0.0, 0.0], ts, solver=diffrax.Kvaerno5())
    assert bool(path.ok)
    close(gap_of_logits(path), two_token_solution(ts, 1.0), atol=1e-4)
    share = np.exp(jax.nn.log_softmax(path.ys[-1]))[1]
    assert share * 2 * ts[-1] == pytest.approx(1, abs=1e-5)


@given(t=st.floats(0, 1e30), gap=st.floats(-5, 5), u0=st.floats(-50, 50))
def test_the_closed_form_solves_its_equation(t, gap, u0):
    ts = t * np.array([0.0, 1e-20, 1e-9, 0.3, 1.0])
    for time, u in zip(ts, np.asarray(two_token_solution(ts, gap, 1.5, u0)), strict=True):
        slack = 1e-14 * max(1, abs(u))
        with mpmath.workdps(60):
            target = u0 + mpmath.sinh(u0) - mpmath.mpf(1.5) * gap * float(time)
            below, above = (mpmath.mpf(v) + mpmath.sinh(v) - target for v in (u - slack, u + slack))
        assert below < 0 < above


def test_single_precision():
    start = jnp.zeros(2, jnp.float32)
    path = softmax_flow(Partial(two_tokens, jnp.ones((), jnp.float32)), start, TWO_TOKEN_TIMES)
    closed = two_token_solution(jnp.asarray(TWO_TOKEN_TIMES, jnp.float32), 1.0)
    assert {path.ts.dtype, path.ys.dtype, closed.dtype} == {jnp.dtype("float32")}
    close(gap_of_logits(path), TWO_TOKEN_GAPS, atol=2e-5)
    close(closed, TWO_TOKEN_GAPS, atol=2e-6)


def gram_of(keys):
    return np.einsum("iad,jbd->iajb", keys, keys)


def test_one_prompt_moves_all_rows_by_its_keys():
    rng = np.random.default_rng(2)
    (first, b0, z0), (second, b1, z1) = quadratic(2), quadratic(3)
    gradient = Partial(affine, np.stack([first, second]), np.stack([b0, b1]))
    starts = np.stack([z0, z1])

    # Orthogonal keys: the rows move apart. A vector added to all keys of a row changes nothing.
    keys = np.sqrt(1.5) * np.linalg.qr(rng.normal(size=(7, 6)))[0].T.reshape(2, 3, 7)
    path = coupled_flow(gradient, starts, gram_of(keys), TIMES, **TIGHT)
    alone = [
        softmax_flow(Partial(affine, matrix, offset), start, TIMES, 1.5, **TIGHT).ys
        for matrix, offset, start in ((first, b0, z0), (second, b1, z1))
    ]
    close(path.ys, np.stack(alone, axis=1), atol=1e-10)
    moved = keys + 3 * rng.normal(size=(2, 1, 7))
    shifted = coupled_flow(gradient, starts, gram_of(moved), TIMES, **TIGHT)
    close(softmax(shifted.ys), softmax(path.ys), atol=1e-11)

    # Any keys, fewer dimensions than tokens: the prompt itself, by another solver.
    keys, p0 = rng.normal(size=(2, 3, 4)), rng.normal(size=4)

    def descend(t, p):
        rows = softmax(keys @ p)
        pulls = [jacobian_numpy(x) @ np.asarray(g) for x, g in zip(rows, gradient(rows), strict=True)]
        return -np.einsum("iad,ia->d", keys, np.stack(pulls))

    prompt = solve_ivp(descend, (0, 20), p0, "DOP853", TIMES, rtol=1e-12, atol=1e-12).y
    path = coupled_flow(gradient, keys @ p0, gram_of(keys), TIMES, **TIGHT)
    close(path.ys, np.einsum("iad,dt->tia", keys, prompt), atol=2e-11)


def test_the_jacobian_product_and_a_second_call_compiles_nothing():
    rng = np.random.default_rng(4)
    x, g = rng.dirichlet(np.ones(4), size=5), rng.normal(size=(5, 4))
    expected = np.stack([jacobian_numpy(row) @ other for row, other in zip(x, g, strict=True)])
    close(softmax_jacobian_product(jnp.asarray(x), jnp.asarray(g)), expected, atol=1e-15)
    (matrix, offset, z0), (other, b, start) = quadratic(5), quadratic(6)
    softmax_flow(Partial(affine, matrix, offset), z0, TIMES)
    two_token_solution(TWO_TOKEN_TIMES, 1.0)
    with count_compilations() as names:
        softmax_flow(Partial(affine, other, b), start, [0.0, 1.0, 2.0], 1.5)
        two_token_solution(TWO_TOKEN_TIMES[::-1], 1.5, 2.0)
    assert names == []


def test_the_lipschitz_bound_is_never_violated_and_is_sharp():
    rng = np.random.default_rng(0)

    def attended(tokens, keys, p):
        return np.einsum("in,ind->id", softmax(keys @ p), tokens)

    ratios = []
    for _ in range(500):
        tokens, keys = rng.normal(size=(2, 3, 4, 5))
        p = rng.normal(size=5) * rng.choice([0.1, 1.0])
        q = p + rng.normal(size=5) * rng.choice([1e-3, 1.0])
        step = np.linalg.norm(attended(tokens, keys, p) - attended(tokens, keys, q), ord=2)
        bound = float(attention_lipschitz(jnp.asarray(tokens), jnp.asarray(keys)))
        ratios.append(step / (bound * np.linalg.norm(p - q)))
    assert max(ratios) <= 1

    # Two tokens that differ along one direction, which p moves along: all estimates are equalities.
    line = np.tile([[[1.0, 0.0], [-1.0, 0.0]]], (3, 1, 1))
    tokens, keys = 2 * line, line / 2
    p, q = np.array([1e-4, 0.0]), np.array([-1e-4, 0.0])
    step = np.linalg.norm(attended(tokens, keys, p) - attended(tokens, keys, q), ord=2)
    bound = float(attention_lipschitz(jnp.asarray(tokens), jnp.asarray(keys)))
    assert step / np.linalg.norm(p - q) == pytest.approx(bound, rel=5e-9)


def test_the_overparametrized_rate_fits_together():
    sigma, lipschitz, residual = 0.8, 0.3, 0.2
    hypothesis, rate, displacement = map(float, overparametrized_rate(sigma, lipschitz, residual))
    # On the ball of radius sigma / (2 lipschitz) the smallest singular value is at least sigma / 2. There
    # |grad L|^2 >= 2 (sigma / 2)^2 L, so L falls at the rate 2 (sigma / 2)^2 and the path has length at
    # most |r_0| / (sigma / 2): the hypothesis says that this stays in the ball.
    assert rate == pytest.approx((sigma / 2) ** 2, rel=1e-15)
    assert displacement == pytest.approx(residual / (sigma / 2), rel=1e-15)
    assert hypothesis == pytest.approx(sigma / (2 * lipschitz) / displacement, rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z0": [[0.0, 0.0]]}, r"z0 must have shape \(n,\), got shape \(1, 2\)"),
        ({"z0": [0.0, np.inf]}, "z0 must be finite, got NaN or infinity"),
        ({"gradient": lambda x: x[:1]}, r"gradient must return shape \(2,\), got shape \(1,\)"),
        ({"key_scale": np.nan}, "key_scale must be a finite number >= 0, got nan"),
        ({"key_scale": [1.0, 2.0]}, "key_scale must be a finite number"),
        ({"ts": [1.0, 0.0]}, "ts must increase strictly"),
    ],
)
def test_bad_input_is_told(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        softmax_flow(**{"gradient": lambda x: x, "z0": [0.0, 0.0], "ts": [0.0, 1.0]} | changes)


def test_bad_grams_are_told():
    start = np.zeros((1, 2))
    with pytest.raises(ValueError, match=r"^z0 and gram must have shapes .*, got \(1, 2\) and \(2, 2\)"):
        coupled_flow(lambda x: x, start, np.eye(2), TIMES)
    with pytest.raises(ValueError, match=r"^gram must be finite"):
        coupled_flow(lambda x: x, start, np.full((1, 2, 1, 2), np.nan), TIMES)


def test_the_jacobian():
    x = np.random.default_rng(0).dirichlet(np.ones(5))
    close(softmax_jacobian(jnp.asarray(x)), np.diag(x) - np.outer(x, x), atol=1e-16)
    # Next to a vertex 1 - x_1 would have no digit left.
    x = np.array([1.0, 1e-20, 2e-20])
    assert float(softmax_jacobian(jnp.asarray(x))[0, 0]) == pytest.approx(3e-20, rel=1e-15, abs=0)


def test_the_field_has_the_jacobian_twice():
    x = jnp.array([0.2, 0.3, 0.5])
    gradient = jnp.array([1.0, -2.0, 0.5])
    twice = softmax_jacobian(x) @ (softmax_jacobian(x) @ gradient)
    np.testing.assert_allclose(attention_field(x, gradient, 3.0), -3 * twice, rtol=1e-14)


def test_gradient_of_the_squared_error_is_that_of_autodiff():
    random = np.random.default_rng(0)
    drawn = random.normal(size=(3, 4)), random.normal(size=3), random.dirichlet(np.ones(4), 3)
    values, targets, x = map(jnp.asarray, drawn)

    def loss(x):
        return jnp.sum((jnp.sum(values * x, axis=1) - targets) ** 2) / 2

    exact = jax.jit(jax.grad(loss))(x)
    close(squared_error_gradient(values, targets, x), exact, atol=1e-14)
    close(squared_error_gradient(values[1], targets[1], x[1]), exact[1], atol=1e-14)
