"""Simulations that fail: they raise by default, and else tell by `ok`, in their own lane alone."""

from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.replicator import (
    attention_lipschitz,
    condition_bounds,
    condition_number,
    coupled_flow,
    exponentiated_gradient,
    natural_gradient_flow,
    overparametrized_rate,
    simulate,
    simulate_discrete,
    simulate_mutator,
    simulate_two_populations,
    softmax_flow,
)

close = partial(np.testing.assert_allclose, rtol=0)
TIMES = [0.0, 0.1, 0.3]
GAME, START = np.array([[0.0, 2.0], [1.0, 0.5]]), np.array([0.7, 0.3])
KEYS, SWAP = np.eye(2).reshape(1, 2, 1, 2), np.array([[0.9, 0.1], [0.1, 0.9]])
# A solver that is quick to compile, and gives up soon.
SOLVE: dict[str, Any] = {
    "solver": diffrax.Heun(),
    "rtol": 1e-4,
    "atol": 1e-6,
    "max_steps": 64,
    "adjoint": diffrax.ForwardMode(),
}


def slope(x):
    return x - 0.2


# Each as a function of one number, a good number and a bad one.
SIMULATIONS = {
    "simulate": (lambda s, **o: simulate(s * GAME, START, TIMES, **o, **SOLVE), 1.0, 1e6),
    "two": (
        lambda s, **o: simulate_two_populations(s * GAME, GAME, START, START, TIMES, **o, **SOLVE),
        1.0,
        1e6,
    ),
    "mutator": (lambda s, **o: simulate_mutator(GAME + s, SWAP, [1.0, 0.0], TIMES, **o, **SOLVE), 1.0, -5.0),
    "discrete": (lambda s, **o: simulate_discrete(GAME, START, 2, background=s, **o), 1.0, -1.0),
    "exponentiated": (lambda s, **o: exponentiated_gradient(9 * GAME, START, 2, s, **o), 0.5, 1e308),
    "softmax": (lambda s, **o: softmax_flow(slope, START, TIMES, s, **o, **SOLVE), 1.0, 1e6),
    "natural": (lambda s, **o: natural_gradient_flow(slope, START, TIMES, s, **o, **SOLVE), 1.0, 1e6),
    "coupled": (lambda s, **o: coupled_flow(slope, START[None], s * KEYS, TIMES, **o, **SOLVE), 1.0, 1e6),
}


@pytest.mark.parametrize("name", SIMULATIONS)
def test_a_failure_is_told_and_stays_in_its_lane(name):
    run, good, bad = SIMULATIONS[name]

    def first_share(number):
        path = run(number, throw=False)
        return jnp.exp(jax.tree.leaves(path.ys)[0][1].ravel()[0]), path.ok

    lanes = jax.jit(jax.vmap(jax.jacfwd(first_share, has_aux=True)))
    gradient, ok = lanes(jnp.array([good, bad]))
    np.testing.assert_array_equal(ok, [True, False])
    assert np.isnan(gradient[1])
    alone, _ = lanes(jnp.array([good, good]))
    np.testing.assert_array_equal(gradient[0], alone[0])
    assert abs(alone[0]) > 1e-4
    assert bool(run(good).ok)
    with pytest.raises(RuntimeError):
        run(bad)


def test_mutation_of_negative_births_takes_the_state_off_the_simplex():
    payoff = [[-5.0, -4.0], [-3.0, -6.0]]
    flow = partial(simulate_mutator, payoff, SWAP, [0.99, 0.01])
    # With x = (1, 0) there are -5 births, a tenth of which would be subtracted from nothing.
    path = flow([0.0, 0.01, 0.3], throw=False)
    assert not bool(path.ok)
    np.testing.assert_array_equal(np.isfinite(path.ys).all(axis=1), [True, True, False])
    with pytest.raises(RuntimeError, match=r"^simulate_mutator: negative fitness with mutation"):
        flow([0.0, 0.01, 0.3])
    assert bool(flow([0.0, 0.005, 0.01]).ok)  # it is still on the simplex


def test_a_state_that_leaves_the_simplex_and_would_come_back_has_left_it():
    # Births of the third strategy are -0.1 x_1 + 0.2 x_2, below zero at first.
    fitness, mutation = np.array([-1.0, 2.0, 0.0]), [[0.9, 0.0, 0.1], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]]
    payoff = np.outer(fitness, np.ones(3))
    path = simulate_mutator(payoff, mutation, [0.9, 0.1, 0.0], [0.0, 10.0], throw=False)
    assert not bool(path.ok)
    path = simulate_mutator(payoff, mutation, [0.5, 0.5, 0.0], [0.0, 10.0])
    assert bool(path.ok)


def test_without_mutation_the_sign_of_fitness_does_not_matter():
    payoff, ts = np.array([[-4.0, 1.0], [1.0, -4.0]]) - 10, [0.0, 1.0, 5.0]
    path = simulate_mutator(payoff, np.eye(2), START, ts)
    close(np.exp(path.ys), np.exp(simulate(payoff, START, ts).ys), atol=1e-8)


def test_rejected_steps_and_empty_strategies_leave_derivatives_alone():
    """With loose tolerances a step is tried that leaves the simplex; the flow does not."""
    rng = np.random.default_rng(0)
    payoffs = jnp.asarray(rng.uniform(0.05, 5, (8, 3, 3)) * 40)
    mutation = rng.dirichlet(np.full(3, 0.3), size=3)
    options: dict[str, Any] = {"solver": diffrax.Heun(), "rtol": 1e-2, "atol": 1e-2, "throw": False}

    def end(payoff):
        path = simulate_mutator(payoff, mutation, [1.0, 0.0, 0.0], [0.0, 0.1], **options)
        return path.ys[1, 0], path.ok

    gradients, ok = jax.jit(jax.vmap(jax.grad(end, has_aux=True)))(payoffs)
    assert np.all(ok)
    assert np.all(np.isfinite(gradients))


@pytest.mark.parametrize("scale", [1e-23, 1e30])
def test_ratios_do_not_depend_on_the_scale(scale):
    x = jnp.array([0.5, 0.3, 0.2], jnp.float32)
    hessian = jnp.diag(jnp.array([1.0, 2.0, 4.0], jnp.float32))
    conditioning = jax.jit(lambda h: (condition_number(x, h), *condition_bounds(x, h)))
    ratios = np.array(conditioning(scale * hessian)) / np.array(conditioning(hessian))
    close(ratios, 1, atol=1e-6)


def test_small_numbers_in_single_precision():
    small = 1e-12 * jnp.eye(2, dtype=jnp.float32)[None]
    assert float(attention_lipschitz(small, small)) == pytest.approx(5e-25, rel=1e-6)
    rate = overparametrized_rate(*jnp.array([1e-23, 1e-23, 1e-24], jnp.float32))
    assert float(rate.hypothesis) == pytest.approx(2.5, rel=1e-6)
