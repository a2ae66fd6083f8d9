"""Classical games: known equilibria, invariances, and independent oracles for every decision."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynamics.replicator import linearize
from dynamics.replicator.equilibria import eigenvalues, is_ess, is_nash, rest_points, stability
from dynamics.replicator.games import (
    conserved_quantity,
    coordination,
    hawk_dove,
    hawk_dove_bourgeois,
    kl_divergence,
    matching_pennies,
    mean_fitness,
    prisoners_dilemma,
    rock_paper_scissors,
    stag_hunt,
    zeeman,
)
from dynamics.replicator.population import replicator_field, simulate

CENTRE = np.full(3, 1 / 3)


def replicator(payoff):
    return lambda x: replicator_field(x, payoff @ x)


@pytest.mark.parametrize(("win", "loss"), [(2.0, 1.0), (1.0, 1.0), (1.0, 2.0), (3.0, 0.5)])
def test_rock_paper_scissors_has_the_known_eigenvalues(win, loss):
    expected = -(win - loss) / 6 + 1j * (win + loss) / (2 * np.sqrt(3)) * np.array([1, -1])
    found = eigenvalues(rock_paper_scissors(win, loss), CENTRE)
    np.testing.assert_allclose(found[np.argsort(-np.imag(found))], expected, atol=1e-14)


def test_hawk_dove_has_the_known_rest_point_and_rate():
    value, cost = 2.0, 3.0
    found = rest_points(hawk_dove(value, cost))
    assert found.exists.tolist() == [True, True, True]
    np.testing.assert_allclose(found.points[2], [value / cost, 1 - value / cost], atol=1e-15)
    rate = eigenvalues(hawk_dove(value, cost), found.points[2])
    np.testing.assert_allclose(rate, [-value * (cost - value) / (2 * cost)], atol=1e-14)


def test_eigenvalues_are_those_of_the_differentiated_field():
    rng = np.random.default_rng(0)
    payoffs = rng.standard_normal((6, 4, 4))
    states = rng.dirichlet(np.ones(4), 6)
    states[0] = [0.0, 1.0, 0.0, 0.0]
    found = eigenvalues(payoffs, states)
    for payoff, x, values in zip(payoffs, states, found, strict=True):
        expected = np.linalg.eigvals(np.asarray(linearize(replicator(payoff), x)))
        np.testing.assert_allclose(np.sort_complex(values), np.sort_complex(expected), atol=1e-12)


@pytest.mark.parametrize(
    ("payoff", "x", "nash", "ess", "expected"),
    [
        (rock_paper_scissors(2.0, 1.0), CENTRE, True, True, "attracting"),
        (rock_paper_scissors(1.0, 1.0), CENTRE, True, False, "centre"),
        (rock_paper_scissors(1.0, 2.0), CENTRE, True, False, "repelling"),
        (rock_paper_scissors(1.0, 2.0), [1.0, 0.0, 0.0], False, False, "saddle"),
        (hawk_dove(2.0, 4.0), [0.5, 0.5], True, True, "attracting"),
        # Where value and cost are equal the hawk has alternative best replies and is stable all the same.
        (hawk_dove(2.0, 2.0), [1.0, 0.0], True, True, "degenerate"),
        (prisoners_dilemma(), [0.0, 1.0], True, True, "attracting"),
        (prisoners_dilemma(), [1.0, 0.0], False, False, "repelling"),
        (stag_hunt(), [1.0, 0.0], True, True, "attracting"),
        (stag_hunt(4.0, 3.0), [0.75, 0.25], True, False, "repelling"),
        (coordination([1.0, 2.0, 3.0]), [0.0, 0.0, 1.0], True, True, "attracting"),
        (coordination([1.0, 2.0, 3.0]), [6 / 11, 3 / 11, 2 / 11], True, False, "repelling"),
        (coordination([1.0, 1.0, 1.0]), [0.5, 0.5, 0.0], True, False, "saddle"),
        (zeeman(), CENTRE, True, False, "attracting"),
        (zeeman(), [1.0, 0.0, 0.0], True, True, "attracting"),
        (hawk_dove_bourgeois(2.0, 4.0), [0.0, 0.0, 1.0], True, True, "attracting"),
        # Against a mixture of hawks and doves bourgeois does as well as they do, and then better.
        (hawk_dove_bourgeois(2.0, 4.0), [0.5, 0.5, 0.0], True, False, "degenerate"),
        (np.zeros((3, 3)), CENTRE, True, False, "degenerate"),
    ],
)
def test_known_games(payoff, x, nash, ess, expected):
    assert (is_nash(payoff, x), is_ess(payoff, x), stability(payoff, x)) == (nash, ess, expected)


def test_rock_paper_scissors_beats_in_the_order_of_its_name():
    rock, paper, scissors = range(3)
    payoff = rock_paper_scissors(3.0, 1.0)
    assert (payoff[paper, rock], payoff[scissors, paper], payoff[rock, scissors]) == (3, 3, 3)
    assert (payoff[rock, paper], payoff[paper, scissors], payoff[scissors, rock]) == (-1, -1, -1)


def test_matching_pennies_is_zero_sum_with_value_zero():
    row, column = matching_pennies()
    np.testing.assert_array_equal(row + column, 0)
    np.testing.assert_array_equal(row @ jnp.array([0.5, 0.5]), 0)


integers = st.integers(-3, 3).map(float)
games = st.integers(2, 4).flatmap(lambda n: arrays(float, (n, n), elements=integers))


@given(games, st.integers(0, 2**31 - 1))
def test_columns_and_scale_decide_nothing(payoff, seed):
    rng = np.random.default_rng(seed)
    other = 10 ** rng.uniform(-10, 10) * (payoff + rng.normal(scale=5, size=len(payoff))[None, :])
    found, found_other = rest_points(payoff), rest_points(other)
    assert found.exists.tolist() == found_other.exists.tolist()
    assert found.continuum.tolist() == found_other.continuum.tolist()
    np.testing.assert_allclose(found.points, found_other.points, atol=1e-13)
    for x in found.points[found.exists]:
        for decide in (is_nash, is_ess, stability):
            assert decide(payoff, x) == decide(other, x)


@given(games)
def test_rest_points_rest_and_continua_are_lines_of_them(payoff):
    n = len(payoff)
    found = rest_points(payoff)
    assert found.supports.shape == (2**n - 1, n)
    assert len(np.unique(found.supports, axis=0)) == 2**n - 1
    assert not np.any(found.exists & found.continuum)
    for support, x in zip(found.supports[found.exists], found.points[found.exists], strict=True):
        assert (x > 0).tolist() == support.tolist()
        np.testing.assert_allclose(replicator(payoff)(jnp.asarray(x)), 0, atol=1e-13)
    for support in found.supports[found.continuum]:
        part = payoff[np.ix_(support, support)]
        gaps = np.vstack([part[1:] - part[0], np.ones(len(part))])
        assert np.linalg.matrix_rank(gaps) < len(part)


def test_a_continuum_is_flagged_and_an_inconsistent_support_is_not():
    # Two copies of one strategy that beats a third: any mixture of the copies rests.
    copies = rest_points(np.array([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    flagged = copies.supports[copies.continuum]
    assert flagged.tolist() == [[True, True, False]]
    # A strategy that is better by one against everything: no support with both rests.
    dominated = rest_points(np.array([[1.0, 1.0], [0.0, 0.0]]))
    assert dominated.exists.tolist() == [True, True, False]
    assert not np.any(dominated.continuum)


def directions(rng, x, best, count=4000):
    """Unit vectors that lead from x to mixtures of best replies, at most `count` rows."""
    d = rng.standard_normal((count, x.size)) * best
    d = np.where(x > 0, d, np.abs(d))
    # Half of them lead along lower faces, where the form can be at its worst.
    d[::2] *= (rng.random((count // 2, x.size)) < 0.5) | (x > 0)
    d[:, np.argmax(x)] -= d.sum(axis=1)
    length = np.linalg.norm(d, axis=1)
    return d[length > 0] / length[length > 0, None]


def test_ess_withstands_every_invasion_and_others_are_invaded():
    rng = np.random.default_rng(1)
    verdicts = []
    for case in range(240):
        n = 3 + case % 2
        payoff = rng.standard_normal((n, n)) - rng.uniform(0, 1.5) * np.eye(n)
        support = np.arange(n) < rng.integers(1, n + 1)
        x = np.where(support, rng.dirichlet(np.ones(n)) + 0.1, 0)
        x /= x.sum()
        # Rows are shifted so that x is a Nash equilibrium whose best replies reach beyond its support.
        best = support | (rng.random(n) < 0.6)
        payoff += np.where(best, -payoff @ x, -payoff @ x - 1)[:, None]
        d = directions(rng, x, best)
        worst = np.max(np.einsum("ki,ij,kj->k", d, payoff, d), initial=-np.inf)
        found = is_ess(payoff, x)
        assert is_nash(payoff, x)
        assert found == (worst < 0), (case, found, worst)
        verdicts.append((found, np.sum(best) > np.sum(support), np.sum(support) > 1))
    # Pure and mixed, with and without best replies outside of the support, stable and not: all kinds occur
    # but a strict equilibrium that is not stable, which there is not.
    assert len(set(verdicts)) == 7


def is_strictly_copositive(form):
    """Hadeler's criterion on integer matrices: no principal minor <= 0 whose adjugate is positive."""
    for size in range(1, len(form) + 1):
        for members in combinations(range(len(form)), size):
            part = form[np.ix_(members, members)]
            minors = [
                [np.linalg.det(np.delete(np.delete(part, i, 0), j, 1)) for i in range(size)]
                for j in range(size)
            ]
            signs = (-1.0) ** np.add.outer(np.arange(size), np.arange(size))
            if round(np.linalg.det(part)) <= 0 and np.all(np.rint(signs * minors) > 0):
                return False
    return True


def test_a_pure_ess_is_strict_copositivity():
    rng = np.random.default_rng(2)
    verdicts, definite = [], []
    for case in range(400):
        n = 2 + case % 3
        form = rng.integers(-2, 4, (n, n)).astype(float)
        form = np.triu(form) + np.triu(form, 1).T
        np.fill_diagonal(form, rng.integers(0, 4, n))
        # The first strategy earns nothing and nothing is earned against it: all are best replies.
        payoff = np.zeros((n + 1, n + 1))
        payoff[1:, 1:] = -form
        expected = is_strictly_copositive(form)
        assert is_ess(payoff, np.eye(n + 1)[0]) == expected, form
        verdicts.append(expected)
        definite.append(np.linalg.eigvalsh(form)[0] > 1e-9)
    # A test of definiteness alone would fail on many of them.
    assert 100 < sum(verdicts) < 300
    assert sum(verdicts) - sum(definite) > 50


@given(st.integers(0, 2**31 - 1))
def test_interior_ess_is_negative_definiteness_on_the_tangent_space(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    payoff = rng.standard_normal((n, n)) - rng.uniform(0, 3) * np.eye(n)
    x = rng.dirichlet(np.ones(n) * 5)
    payoff -= (payoff @ x)[:, None]
    tangent = np.eye(n) - 1 / n
    top = np.linalg.eigvalsh(tangent @ (payoff + payoff.T) @ tangent)
    assert is_ess(payoff, x) == bool(np.sort(top)[-2] < 0 if top[-1] < 1e-9 else False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:nashpy")
def test_symmetric_equilibria_are_those_of_nashpy():
    nashpy = pytest.importorskip("nashpy")
    rng = np.random.default_rng(3)
    for _ in range(20):
        payoff = rng.standard_normal((3, 3))
        found = rest_points(payoff)
        ours = [x for x in found.points[found.exists] if is_nash(payoff, x)]
        pairs = nashpy.Game(payoff, payoff.T).vertex_enumeration()
        theirs = [x for x, y in pairs if np.allclose(x, y, atol=1e-9)]
        assert len(ours) == len(theirs)
        for x in theirs:
            assert min(np.max(np.abs(x - y)) for y in ours) < 1e-12


def test_divergence_and_conserved_quantity_along_trajectories():
    ts = np.linspace(0, 20, 41)
    closed = simulate(rock_paper_scissors(1.0, 1.0), [0.5, 0.3, 0.2], ts, rtol=1e-10)
    np.testing.assert_allclose(conserved_quantity(CENTRE, closed.ys), np.log(0.03) / 3, atol=2e-9)
    np.testing.assert_allclose(kl_divergence(CENTRE, closed.ys), -np.log(3 * 0.03 ** (1 / 3)), atol=2e-9)
    inward = simulate(rock_paper_scissors(2.0, 1.0), [0.5, 0.3, 0.2], ts, rtol=1e-10)
    assert np.all(np.diff(kl_divergence(CENTRE, inward.ys)) < 0)
    assert np.all(np.diff(conserved_quantity(CENTRE, inward.ys)) > 0)


def test_divergence_falls_at_its_exact_rate():
    payoff, x_star = hawk_dove_bourgeois(2.0, 3.0), jnp.array([0.2, 0.5, 0.3])
    x = jnp.array([0.6, 0.1, 0.3])
    _, rate = jax.jvp(lambda y: kl_divergence(x_star, jnp.log(y)), (x,), (replicator(payoff)(x),))
    np.testing.assert_allclose(rate, (x - x_star) @ payoff @ x, rtol=1e-13)


def test_absent_strategies_cost_nothing_or_everything():
    log_x = jnp.log(jnp.array([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]))
    np.testing.assert_allclose(kl_divergence([0.0, 0.5, 0.5], log_x), [0.0, np.inf], atol=1e-15)


def test_a_missing_number_is_no_share_of_an_absent_strategy():
    log_x = jnp.array([[np.nan, -0.5], [-0.5, np.nan]])
    for measure in (conserved_quantity, kl_divergence):
        assert np.isnan(measure([0.0, 1.0], log_x)).all()


def test_mean_fitness_of_symmetric_games_grows_by_twice_the_variance():
    rng = np.random.default_rng(4)
    payoff = rng.standard_normal((4, 4))
    payoff += payoff.T
    x = jnp.asarray(rng.dirichlet(np.ones(4)))
    _, growth = jax.jvp(lambda y: mean_fitness(payoff, y), (x,), (replicator(payoff)(x),))
    fitness = payoff @ x
    np.testing.assert_allclose(growth, 2 * (x @ fitness**2 - (x @ fitness) ** 2), rtol=1e-13)
    np.testing.assert_allclose(mean_fitness(payoff, jnp.stack([x, x])), jnp.full(2, x @ fitness), rtol=1e-13)


def test_tolerance_follows_the_precision_of_the_input():
    x = np.full(3, 1 / 3, np.float32)
    assert rock_paper_scissors(jnp.float32(1), jnp.float32(1)).dtype == jnp.float32
    assert is_nash(rock_paper_scissors(2.0, 1.0), x)
    assert stability(rock_paper_scissors(1.0, 1.0), x) == "centre"
    assert not is_nash(hawk_dove(2.0, 4.0), [0.5 + 1e-6, 0.5 - 1e-6])
    assert is_nash(hawk_dove(2.0, 4.0), [0.5 + 1e-6, 0.5 - 1e-6], atol=1e-5)


def test_games_can_be_swept_and_a_bad_one_is_nan():
    losses = jnp.array([0.5, 1.0, -2.0])
    payoffs = jax.vmap(lambda loss: rock_paper_scissors(1.0, loss))(losses)
    np.testing.assert_array_equal(payoffs[0], rock_paper_scissors(1.0, 0.5))
    assert np.isnan(payoffs).all(axis=(1, 2)).tolist() == [False, False, True]
    assert np.isnan(jax.jit(hawk_dove_bourgeois)(-1.0, 1.0)).all()
    slopes = jax.vmap(jax.grad(lambda loss: jnp.sum(rock_paper_scissors(1.0, loss))))(losses)
    np.testing.assert_array_equal(slopes, [-3.0, -3.0, np.nan])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: is_nash(np.ones((2, 3)), [0.5, 0.5]),
            r"payoff must have shape \(n, n\), got shape \(2, 3\)",
        ),
        (lambda: is_ess([[np.nan, 0.0], [0.0, 1.0]], [0.5, 0.5]), "payoff must be finite"),
        (lambda: is_ess(np.eye(2), [0.6, 0.6]), "x must be a point of the simplex"),
        (lambda: is_nash(np.eye(2), [1.5, -0.5]), "x must be a point of the simplex"),
        (lambda: is_nash(np.eye(3), [0.5, 0.5]), r"x must have shape \(3,\), got shape \(2,\)"),
        (lambda: is_nash(np.eye(2), [0.5, 0.5], atol=-1.0), "atol must be a finite number >= 0, got -1.0"),
        (lambda: rest_points(np.zeros((0, 0))), "payoff must have shape"),
        (lambda: stability(np.eye(2), [0.6, 0.4]), "x must be a rest point"),
        (lambda: eigenvalues(np.eye(3), [0.5, 0.5]), "payoff and x must have shapes"),
        (lambda: eigenvalues(np.zeros((3, 2, 2)), np.full((4, 2), 0.5)), "payoff and x must have shapes"),
        (lambda: jax.jit(rest_points)(np.eye(2)), "payoff must be concrete"),
        (lambda: jax.jit(lambda _: hawk_dove(1.0, 0.0))(0.0), "cost must be a positive number, got 0.0"),
        (lambda: conserved_quantity([0.5, 0.6], jnp.zeros(2)), "x_star must be a point of the simplex"),
        (lambda: rock_paper_scissors(1.0, -1.0), "win must be above -loss"),
        (lambda: rock_paper_scissors([1.0, 2.0], 1.0), r"win must be a finite number, got \[1. 2.\]"),
        (lambda: hawk_dove(np.inf, 1.0), "value must be a finite number, got inf"),
        (lambda: hawk_dove(1.0, 0.0), "cost must be a positive number, got 0.0"),
        (lambda: prisoners_dilemma(reward=6.0), "temptation > reward > punishment > sucker"),
        (lambda: stag_hunt(1.0, 2.0), "stag > hare > 0"),
        (lambda: coordination([[1.0]]), "rewards must have shape"),
        (lambda: coordination([1.0, 0.0]), "rewards must be positive"),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_payoffs_near_the_largest_number_are_those_of_their_shape():
    """A positive factor changes the speed of the flow alone, and no sum on the way to that overflows."""
    huge, centre = 1.5 * 2.0**1023, [1 / 3, 1 / 3, 1 / 3]
    for game in (
        rock_paper_scissors(1.0, 1.0),
        np.array([[-1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, -1.0]]),
    ):
        game = np.asarray(game)
        for decide in (is_nash, is_ess, stability):
            assert decide(huge * game, centre) == decide(game, centre)
            assert not is_nash(huge * game, [1.0, 0.0, 0.0])
        np.testing.assert_array_equal(rest_points(huge * game).points, rest_points(game).points)
        np.testing.assert_allclose(
            eigenvalues(huge * game, centre) / huge, eigenvalues(game, centre), atol=1e-15
        )
    ours = np.asarray(hawk_dove_bourgeois(huge, huge)) / huge
    np.testing.assert_allclose(ours, hawk_dove_bourgeois(1.0, 1.0))
    assert np.isfinite(rock_paper_scissors(huge, huge)).all()
