from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.scipy.special import logsumexp
from jax.tree_util import Partial
from scipy.integrate import solve_ivp

from dynamics.replicator import (
    constant_fitness_solution,
    exponentiated_gradient,
    replicator_field,
    simulate,
    simulate_discrete,
    simulate_mutator,
    simulate_two_populations,
)
from sims.compare import convergence_order
from tests.helpers import count_compilations

# Nearly all tests use three strategies and three times, so that one compiled flow serves them.
TIMES = [0.0, 1.0, 4.0]
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
close = partial(np.testing.assert_allclose, rtol=0)
seeds = st.integers(0, 2**31)


def linear(payoff, x):
    return (payoff @ x) * x / x  # not a number where a strategy is absent


def random_game(seed, n=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, n)), rng.dirichlet(np.full(n, 2.0))


def replicator_numpy(t, x, payoff):
    fitness = payoff @ x
    return x * (fitness - x @ fitness)


def solve_numpy(field, y0, ts, *args):
    """SciPy's DOP853 as an oracle, shape (T, n)."""
    ts = np.asarray(ts)
    span = (float(ts[0]), float(ts[-1]))
    solution = solve_ivp(field, span, y0, "DOP853", ts, args=args, rtol=1e-12, atol=1e-14)
    assert solution.success
    return solution.y.T


def rock_paper_scissors(win, loss):
    return np.array([[0.0, -loss, win], [win, 0.0, -loss], [-loss, win, 0.0]])


@given(seed=seeds, log10_smallest=st.floats(-300, -1))
def test_constant_fitness_has_a_closed_form(seed, log10_smallest):
    payoff, x0 = random_game(seed)
    fitness = payoff[0]
    x0[0] = 10.0**log10_smallest
    x0[1] = 1 - x0[0] - x0[2]
    exact = np.log(x0)[None, :] + np.array(TIMES)[:, None] * fitness[None, :]
    exact -= np.logaddexp.reduce(exact, axis=1, keepdims=True)
    close(constant_fitness_solution(fitness, x0, TIMES), exact, rtol=1e-13, atol=1e-13)
    path = simulate(np.outer(fitness, np.ones(3)), x0, TIMES)
    close(path.ys, exact, rtol=1e-13, atol=1e-13)
    assert bool(path.ok)


@pytest.mark.parametrize("seed", range(4))
def test_random_games_agree_with_an_independent_solver(seed):
    payoff, x0 = random_game(seed)
    expected = solve_numpy(replicator_numpy, x0, TIMES, payoff)
    close(np.exp(simulate(payoff, x0, TIMES, **TIGHT).ys), expected, atol=1e-10)


@given(seed=seeds)
def test_an_absent_strategy_stays_absent_and_is_not_looked_at(seed):
    payoff, x0 = random_game(seed, n=2)
    present = solve_numpy(replicator_numpy, x0, TIMES, payoff)
    whole = np.full((3, 3), 1e9)
    whole[np.ix_([0, 2], [0, 2])] = payoff
    path = simulate(whole, [x0[0], 0.0, x0[1]], TIMES, **TIGHT)
    assert np.all(np.isneginf(path.ys[:, 1]))
    close(np.exp(path.ys[:, [0, 2]]), present, atol=1e-10)


def test_a_pure_strategy_stays():
    path = simulate(random_game(0)[0], [0.0, 1.0, 0.0], TIMES)
    np.testing.assert_array_equal(path.ys, [[-np.inf, 0.0, -np.inf]] * 3)


@given(seed=seeds, shifts=st.tuples(*[st.floats(-100, 100)] * 3), scale=st.floats(0.1, 10))
def test_payoffs_matter_up_to_column_shifts_and_scale_is_time(seed, shifts, scale):
    payoff, x0 = random_game(seed)
    changed = scale * (payoff + np.array(shifts)[None, :])
    same = simulate(changed, x0, np.array(TIMES) / scale, **TIGHT)
    close(same.ys, simulate(payoff, x0, TIMES, **TIGHT).ys, atol=1e-10)


@given(seed=seeds)
def test_mean_payoff_of_a_partnership_game_grows_by_twice_the_variance(seed):
    payoff, x0 = random_game(seed)
    payoff = payoff + payoff.T
    h = 1e-4
    x = np.exp(simulate(payoff, x0, [0.0, h, 2 * h], **TIGHT).ys)
    mean = np.einsum("ti,ij,tj->t", x, payoff, x)
    fitness = payoff @ x[1]
    variance = x[1] @ fitness**2 - (x[1] @ fitness) ** 2
    assert (mean[2] - mean[0]) / (2 * h) == pytest.approx(2 * variance, abs=1e-6)


def test_the_field_is_the_softmax_jacobian_times_fitness():
    payoff, x = random_game(1, n=4)
    fitness = payoff @ x
    expected = (np.diag(x) - np.outer(x, x)) @ fitness
    close(replicator_field(jnp.asarray(x), jnp.asarray(fitness)), expected, atol=1e-16)


@given(a=st.floats(0.3, 3), b=st.floats(0.3, 3), c=st.floats(0.3, 3))
def test_a_zero_sum_game_conserves_its_product(a, b, c):
    payoff = np.array([[0.0, a, -b], [-a, 0.0, c], [b, -c, 0.0]])
    equilibrium = np.array([c, b, a]) / (a + b + c)
    logs = simulate(payoff, [0.5, 0.3, 0.2], [0.0, 10.0, 100.0]).ys @ equilibrium
    close(logs, logs[0], atol=2e-7)


def test_the_heteroclinic_cycle_is_followed_far_below_the_smallest_share_that_solvers_in_x_keep():
    payoff, x0, ts = rock_paper_scissors(1.0, 2.0), np.array([0.5, 0.3, 0.2]), [0.0, 100.0, 1000.0]

    def in_logits(t, z):
        x = np.exp(z - np.logaddexp.reduce(z))
        return payoff @ x - x @ payoff @ x

    expected = solve_numpy(in_logits, np.log(x0), ts)
    expected -= np.logaddexp.reduce(expected, axis=1, keepdims=True)
    path = simulate(payoff, x0, ts)
    assert bool(path.ok)
    close(path.ys, expected, rtol=1e-8, atol=5e-7)
    close(logsumexp(path.ys, axis=1), 0, atol=1e-15)
    log10 = np.asarray(path.ys) / np.log(10)
    close(log10[1], [-4.62276, -33.08184, -1.035e-5], atol=2e-5)
    close(log10[2], [0, -220.67280, -204.28451], atol=2e-5)


def test_a_fitness_function_is_the_same_as_its_matrix_and_compiles_once():
    payoff, x0 = random_game(2)
    absent = np.array([0.4, 0.0, 0.6])
    for start in (x0, absent):
        path = simulate(Partial(linear, jnp.asarray(payoff)), start, TIMES)
        close(path.ys, simulate(payoff, start, TIMES).ys, atol=1e-14)
    with count_compilations() as names:
        simulate(Partial(linear, jnp.asarray(2 * payoff)), x0[::-1], [0.0, 2.0, 3.0])
        simulate(2 * payoff, x0[::-1], [0.0, 2.0, 3.0], rtol=1e-6)
    assert names == []


def test_games_and_starts_are_one_batch_where_bad_lanes_fail_alone():
    games = [random_game(seed) for seed in range(5)]
    payoffs, starts = (np.stack(parts) for parts in zip(*games, strict=True))
    payoffs[1, 0, 0] = np.nan
    starts[3] = [0.5, 0.5, 0.5]
    batch = jax.jit(jax.vmap(lambda payoff, x0: simulate(payoff, x0, TIMES, throw=False)))
    path = batch(payoffs, starts)
    np.testing.assert_array_equal(path.ok, [True, False, True, False, True])
    assert np.all(np.isnan(path.ys[1, 1:]))
    assert np.all(np.isnan(path.ys[3]))
    for lane in (0, 2, 4):
        close(path.ys[lane], simulate(*games[lane], TIMES).ys, atol=2e-9)


def test_the_gradient_with_respect_to_the_payoff():
    payoff, x0 = random_game(6)

    def end(payoff, **options):
        return simulate(payoff, x0, TIMES, **options).ys[-1, 0]

    h = 1e-4
    bumps = [h * np.eye(9)[entry].reshape(3, 3) for entry in range(9)]
    differences = [(end(payoff + bump, **TIGHT) - end(payoff - bump, **TIGHT)) / (2 * h) for bump in bumps]
    gradient = jax.jit(jax.grad(partial(end, **TIGHT)))(payoff)
    close(gradient.ravel(), np.stack(differences), atol=2e-8)


def test_single_precision_stays_and_follows_ratios_of_1e25():
    x0 = jnp.array([1.0, 1e-25, 1e-30], jnp.float32)
    fitness = np.array([0.0, 1.0, -0.5])
    payoff, ts = jnp.asarray(np.outer(fitness, np.ones(3)), jnp.float32), [0.0, 30.0, 70.0]
    path = simulate(payoff, x0, ts)
    assert {path.ts.dtype, path.ys.dtype} == {jnp.dtype("float32")}
    expected = constant_fitness_solution(fitness, np.asarray(x0, float), ts)
    # Each of some 1,340 steps rounds a logarithm by at most half of an ulp; most of these errors cancel.
    rounding = 1340 * np.finfo(np.float32).eps / 2 * np.abs(expected).max()
    close(path.ys, expected, atol=float(rounding))


SIMPLEX = r"x0 must be a point of the simplex \(no negative entry, sum one\), got \["


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": [0.5, 0.3, 0.3]}, SIMPLEX),
        ({"x0": [0.6, 0.6, -0.2]}, SIMPLEX),
        ({"x0": [0.5, np.nan, 0.5]}, SIMPLEX),
        ({"x0": [[0.5, 0.5]]}, r"x0 must have shape \(n,\), got shape \(1, 2\)"),
        ({"x0": [0.5, 0.5]}, r"fitness must have shape \(2, 2\), got shape \(3, 3\)"),
        ({"fitness": np.ones((2, 3))}, r"fitness must have shape \(3, 3\), got shape \(2, 3\)"),
        ({"fitness": np.full((3, 3), np.nan)}, "fitness must be finite, got NaN or infinity"),
        ({"fitness": lambda x: x[:2]}, r"fitness must return shape \(3,\), got shape \(2,\)"),
        ({"ts": [0.0, 2.0, 1.0]}, "ts must increase strictly"),
        ({"ts": [0.0, np.inf]}, "ts must be finite"),
    ],
)
def test_bad_input_is_told(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        simulate(**{"fitness": np.eye(3), "x0": [0.5, 0.3, 0.2], "ts": TIMES} | changes)


def test_running_out_of_steps_is_never_silent():
    payoff, x0, ts = rock_paper_scissors(1.0, 2.0), [0.5, 0.3, 0.2], [0.0, 1.0, 1000.0]
    with pytest.raises(RuntimeError, match=r"gave up after t = 1 \(limit: 50 steps\)"):
        simulate(payoff, x0, ts, max_steps=50)
    path = simulate(payoff, x0, ts, max_steps=50, throw=False)
    assert not bool(path.ok)
    np.testing.assert_array_equal(np.isnan(path.ys).all(axis=1), [False, False, True])


PENNIES = np.array([[1.0, -1.0], [-1.0, 1.0]])


def test_two_populations():
    row, column = np.random.default_rng(0).normal(size=(2, 3, 2))
    x0, y0, ts = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.4]), [0.0, 3.0, 6.0]

    def field(t, state):
        x, y = state[:3], state[3:]
        to_x, to_y = row @ y, column.T @ x
        return np.concatenate([x * (to_x - x @ to_x), y * (to_y - y @ to_y)])

    path = simulate_two_populations(row, column, x0, y0, ts, **TIGHT)
    expected = solve_numpy(field, np.concatenate([x0, y0]), ts)
    close(np.exp(np.concatenate(path.ys, axis=1)), expected, atol=1e-11)

    # Matching pennies, with a third strategy that nobody plays and whose payoff would win.
    row, column = np.vstack([PENNIES, [9.0, 9.0]]), np.vstack([-PENNIES, [9.0, -9.0]])
    path = simulate_two_populations(row, column, [0.7, 0.3, 0.0], y0, [0.0, 10.0, 100.0])
    assert np.all(np.isneginf(path.ys[0][:, 2]))
    conserved = path.ys[0][:, :2].sum(axis=1) + path.ys[1].sum(axis=1)
    close(conserved, conserved[0], atol=2e-7)
    assert np.ptp(path.ys[0][:, 0]) > 0.1  # it does move
    with pytest.raises(ValueError, match=r"^column_payoff must have shape \(3, 2\), got shape \(2, 3\)"):
        simulate_two_populations(row, column.T, [0.7, 0.3, 0.0], y0, ts)
    with pytest.raises(ValueError, match=r"^y0 must be a point of the simplex"):
        simulate_two_populations(row, column, [0.7, 0.3, 0.0], [0.7, 0.7], ts)


def test_mutation_fills_empty_strategies_up_to_the_dominant_eigenvector():
    rng = np.random.default_rng(0)
    fitness, mutation = np.array([1.0, 2.0, 3.0]), rng.dirichlet(np.ones(3), size=3)
    payoff, x0 = random_game(3)
    x0_empty, ts = np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0, 60.0])
    # Lanes: the quasispecies; the same with a fertile start; no mutation; rows that sum to 1.1; an entry
    # below zero; negative fitness, which leaves the simplex.
    lanes = [
        (np.outer(fitness, np.ones(3)), mutation, x0_empty),
        (payoff + 5, np.eye(3), x0),
        (np.outer(fitness, np.ones(3)), 1.1 * mutation, x0),
        (np.ones((3, 3)), np.eye(3) + np.outer(np.ones(3), [0.5, 0.0, -0.5]), x0),
        (-0.01 * np.outer(fitness, np.ones(3)), mutation, x0_empty),
    ]
    batch = [np.stack(parts) for parts in zip(*lanes, strict=True)]
    flow = jax.jit(jax.vmap(lambda f, q, x: simulate_mutator(f, q, x, ts, throw=False, **TIGHT)))
    path = flow(*batch)
    np.testing.assert_array_equal(path.ok, [True, True, False, False, False])

    def field(t, x):
        return (x * fitness) @ mutation - x * (x @ fitness)

    expected = solve_numpy(field, x0_empty, ts)
    close(np.exp(path.ys[0]), expected, atol=1e-11)
    values, vectors = np.linalg.eig(mutation.T @ np.diag(fitness))
    dominant = np.real(vectors[:, np.argmax(np.real(values))])
    close(np.exp(path.ys[0, -1]), dominant / dominant.sum(), atol=1e-13)
    replicator = solve_numpy(replicator_numpy, x0, ts, payoff)
    close(np.exp(path.ys[1]), replicator, atol=1e-11)
    for bad in (1.1 * mutation, np.eye(3) + np.outer(np.ones(3), [0.5, 0.0, -0.5])):
        with pytest.raises(ValueError, match=r"^mutation must have non-negative rows that sum to one"):
            simulate_mutator(np.eye(3), bad, x0, ts)


def test_a_share_below_zero_by_more_than_a_millionth_ends_the_mutator_flow():
    # x_2' = -q (1 - x_2): what is born to the empty strategy is negative.
    def run(q):
        mutation = [[1 - q, q], [0.0, 1.0]]
        return simulate_mutator(-np.ones((2, 2)), mutation, [1.0, 0.0], [0.0, 1.0], throw=False)

    assert [bool(run(q).ok) for q in (1e-8, 1e-4)] == [True, False]


def test_the_discrete_map_is_that_of_generations():
    rng = np.random.default_rng(0)
    payoff, x = rng.uniform(0.1, 1, (3, 3)), np.array([0.5, 0.5, 0.0])
    payoff[2] = -1.0  # of the absent strategy: nobody gets it
    path = simulate_discrete(payoff, x, steps=6, background=0.25)
    np.testing.assert_array_equal(path.ts, np.arange(7.0))
    assert bool(path.ok)
    for logs in path.ys:
        close(np.exp(logs), x, atol=1e-15)
        grown = x * (payoff @ x + 0.25)
        x = grown / grown.sum()
    assert not bool(simulate_discrete(-payoff, [0.5, 0.5, 0.0], steps=6, throw=False).ok)


RATES = [1 / 20, 1 / 40, 1 / 80]


@pytest.mark.parametrize("scheme", ["discrete", "exponentiated gradient"])
def test_discrete_schemes_follow_the_flow_at_first_order(scheme):
    payoff, x0 = random_game(4)
    flow = simulate(payoff, x0, TIMES).ys[-1]

    def end(rate):
        steps = round(TIMES[-1] / rate)
        if scheme == "discrete":
            return simulate_discrete(payoff, x0, steps, background=1 / rate).ys[-1]
        path = exponentiated_gradient(payoff, x0, steps, rate)
        assert float(path.ts[-1]) == pytest.approx(TIMES[-1], rel=1e-14)
        return path.ys[-1]

    errors = [np.max(np.abs(end(rate) - flow)) for rate in RATES]
    fit = convergence_order(RATES, errors)
    assert fit.slope == pytest.approx(1, abs=0.05)
    assert fit.r2 > 0.999


def test_the_exponentiated_gradient_step():
    payoff, x0 = random_game(5)
    logs = np.log(x0) + 0.7 * payoff @ x0
    path = exponentiated_gradient(payoff, x0, 1, 0.7)
    close(path.ys[1], logs - np.logaddexp.reduce(logs), atol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate_discrete(np.eye(2), [0.5, 0.5], -1), "steps must be an integer >= 0, got -1"),
        (
            lambda: simulate_discrete(np.eye(2), [0.5, 0.5], 1, background=np.inf),
            "background must be a finite number, got inf",
        ),
        (
            lambda: exponentiated_gradient(np.eye(2), [0.5, 0.5], 1, np.nan),
            "learning_rate must be a finite number >= 0, got nan",
        ),
        (
            lambda: constant_fitness_solution([1.0], [0.5, 0.5], TIMES),
            r"fitness must have shape \(2,\), got shape \(1,\)",
        ),
    ],
)
def test_bad_input_of_maps_and_closed_forms_is_told(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
