"""The slow mode near the critical point, moments at rest under noise, and escape, against integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import dblquad, quad

from dynamics.collapse import Moments, critical_amplitude, escape_rate, gibbs_mean, stochastic_linear_flow
from dynamics.flow import integrate

DATA = Moments(np.array([[1.5, 0.4], [0.4, 0.5]]), np.array([0.6, 0.8]), 2.0)  # |c| = 1
STRETCH = 0.6**2 * 1.5 + 2 * 0.48 * 0.4 + 0.8**2 * 0.5


def amplitude(ts, gamma, q0=0.4, noise=0.7, width=3):
    return critical_amplitude(ts, q0, gamma, DATA, noise, width)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1 - 1e-9, 1.0, 1.05, 3.0])
def test_the_amplitude_is_the_flow_of_the_slow_mode(gamma):
    ts = np.linspace(0, 20, 15)
    k = 2 * (3 + 0.7) * STRETCH
    path = integrate(lambda t, q, m: -m * q - k * q**3, 0.4, ts, 2 * (gamma - 1), rtol=1e-11, atol=1e-14)
    assert amplitude(ts, gamma) == pytest.approx(np.asarray(path.ys), rel=1e-8, abs=1e-12)
    assert amplitude(ts, gamma, q0=-0.4) == pytest.approx(-np.asarray(path.ys), rel=1e-8, abs=1e-12)


def test_its_rates_on_both_sides_and_its_power_law_between():
    ts = np.array([400.0, 500.0])
    above = amplitude(ts, 1.02)
    assert np.log(above[0] / above[1]) == pytest.approx(2 * 0.02 * 100, rel=1e-6)
    rest = float(amplitude(1e5, 0.98))
    below = abs(amplitude(ts / 3, 0.98) - rest)
    assert np.log(below[0] / below[1]) == pytest.approx(4 * 0.02 * 100 / 3, rel=1e-3)
    late = amplitude(1e6, 1.0) * np.sqrt(4 * (3 + 0.7) * STRETCH * 1e6)
    assert float(late) == pytest.approx(1, rel=1e-6)


def test_it_is_smooth_at_the_critical_point_and_finite_far_from_it():
    def of_gamma(gamma):
        return amplitude(7.0, gamma)

    first, second, third = jax.grad(of_gamma), jax.grad(jax.grad(of_gamma)), 1e-4
    values = [float(of_gamma(1 + s * third)) for s in (-2, -1, 0, 1, 2)]
    slope = (values[0] - 8 * values[1] + 8 * values[3] - values[4]) / (12 * third)
    bend = (-values[0] + 16 * values[1] - 30 * values[2] + 16 * values[3] - values[4]) / (12 * third**2)
    assert float(first(1.0)) == pytest.approx(slope, rel=1e-9)
    assert float(second(1.0)) == pytest.approx(bend, rel=1e-6)
    edge = 1 + 0.25 / (2 * 7 * 2)  # where the series of an exponential ends
    assert float(first(edge - 1e-9)) == pytest.approx(float(first(edge + 1e-9)), rel=1e-7)
    far = jax.vmap(jax.value_and_grad(lambda gamma, q0: amplitude(1e3, gamma, q0)))
    assert np.all(np.isfinite(far(jnp.array([5.0, 0.0, 0.0, 5.0]), jnp.array([0.4, 0.4, 0.0, 0.0]))))
    with pytest.raises(ValueError, match="c must not be zero"):
        critical_amplitude(1.0, 0.1, 1.0, DATA._replace(c=np.zeros(2)), 0.7, 3)


def test_networks_have_it_up_to_the_square_of_the_amplitude():
    """With a factor of the law that is wrong the gap would not fall by four."""

    def gap(q0):
        ts = np.linspace(0, 3 / q0**2, 5)
        start = [q0 * np.tile(DATA.c, (3, 1)), np.full((1, 3), q0)]
        path = stochastic_linear_flow(start, DATA, 0.7, [1.0, 1.0], ts, rtol=1e-9, atol=1e-12)
        law = np.asarray(amplitude(ts, 1.0, q0))
        return np.max(np.abs(path.ys[1][:, 0, 0] / law - 1))

    gaps = gap(0.08), gap(0.04)
    assert gaps[0] < 0.02
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)


def one_neuron(p, gamma):
    return p[0] ** 2 * p[1] ** 2 - 2 * p[0] * p[1] + gamma * (p @ p)


def test_moments_are_those_of_gaussians_and_of_quadrature():
    S = jnp.array([[2.0, 0.7], [0.7, 1.0]])
    box = [[-4.0, 4.0], [-5.0, 5.0]]
    mean = gibbs_mean(lambda p: p @ S @ p / 2 + 1e4, lambda p: p[0] * p[1], 0.3, box)
    assert float(mean) == pytest.approx(0.3 * float(jnp.linalg.inv(S)[0, 1]), rel=1e-8)

    box = [[-1.5, 1.5], [-1.5, 1.5]]
    for gamma, temperature in ((1.0, 0.01), (0.9, 0.02)):

        def density(w, u, of, gamma=gamma, temperature=temperature):
            loss = u**2 * w**2 - 2 * u * w + gamma * (u**2 + w**2)
            return of(u, w) * np.exp(-loss / temperature)

        parts = [
            dblquad(density, -1.5, 1.5, -1.5, 1.5, args=(of,))[0]
            for of in (lambda u, w: (u + w) ** 2 / 2, lambda u, w: 1)
        ]
        found = gibbs_mean(lambda p, g=gamma: one_neuron(p, g), _along, temperature, box)
        assert float(found) == pytest.approx(parts[0] / parts[1], rel=1e-7)


def _along(p):
    return (p[0] + p[1]) ** 2 / 2


def test_moments_at_many_temperatures_are_one_program_and_those_of_the_spec():
    box = jnp.array([[-2.0, 2.0], [-2.0, 2.0]])
    lanes = jnp.array([[1.0, 0.004], [1.1, 0.004], [0.9, 0.004], [1.0, 1e-4]])
    means = jax.jit(jax.vmap(lambda at: gibbs_mean(lambda p: one_neuron(p, at[0]), _along, at[1], box, 401)))(
        lanes
    )
    # At the critical strength, to leading order, sqrt(4 T) Gamma(3/4) / Gamma(1/4).
    law = np.sqrt(4e-4) * 0.3379891200336424
    assert means[:3] == pytest.approx(np.array([0.04303, 0.01641, 0.17545]), abs=6e-6)
    assert float(means[3]) == pytest.approx(law, rel=2e-3)
    assert np.isnan(jax.jit(lambda box: gibbs_mean(jnp.sum, jnp.sum, 1.0, box))(box[:, ::-1]))


def test_finite_steps_have_the_density_that_is_said():
    """The chain's own density comes from its transition kernel; a step dt leaves an error of order dt^2."""
    T, x = 0.3, np.linspace(-3, 3, 601)

    def loss(p):
        return p[0] ** 4 / 4 + p[0] ** 2 / 2 + p[1] ** 2 / 2

    def moment(dt):
        kernel = np.exp(-((x[:, None] - (x - dt * (x**3 + x))[None]) ** 2) / (4 * T * dt))
        kernel /= kernel.sum(axis=0)
        density = np.ones(x.size) / x.size
        for _ in range(int(12 / dt)):
            density = kernel @ density
        return density @ x**2 / density.sum()

    def at_rest(dt):
        def bent(p):
            slope, bend = jax.grad(loss)(p), jnp.trace(jax.hessian(loss)(p))
            return loss(p) - dt * (slope @ slope) / 4 + dt * T * bend / 2

        box = [[-2.6, 2.6], [-5.0, 5.0]]  # farther out the steps would turn the loss over
        return float(gibbs_mean(bent, lambda p: p[0] ** 2, T, box))

    plain = [moment(dt) - at_rest(0.0) for dt in (0.04, 0.02)]
    bent = [moment(dt) - at_rest(dt) for dt in (0.04, 0.02)]
    assert plain[0] / plain[1] == pytest.approx(2, rel=0.1)
    assert bent[0] / bent[1] == pytest.approx(4, rel=0.15)
    assert abs(bent[0]) < 0.1 * abs(plain[0])


def double_well(x):
    return x**4 / 4 - x**2 / 2


def passage(T):
    """Mean time of first passage from -1 to 1, in closed form but for two integrals."""

    def inner(x):
        return quad(lambda y: np.exp(-(double_well(y) + 0.25) / T), -4, x, epsabs=0, epsrel=1e-10)[0]

    return np.exp(0.25 / T) / T * quad(lambda x: np.exp(double_well(x) / T) * inner(x), -1, 1, epsrel=1e-8)[0]


def test_escape_takes_the_mean_time_of_first_passage():
    """Its error is of the order of the temperature, and twice the rate would leave one that stays."""
    temperatures = np.array([0.02, 0.01, 0.005])
    rates = [
        float(escape_rate(lambda p: jnp.sum(double_well(p)), [-1.0], [0.0], T).item()) for T in temperatures
    ]
    errors = np.array([rate * passage(T) for rate, T in zip(rates, temperatures, strict=True)]) - 1
    assert abs(errors[-1]) < 0.03
    assert errors[:-1] / errors[1:] == pytest.approx(2, rel=0.1)


def valley(p):
    """A double well whose width across is 1 at the minima and 4 at the saddle, and a flat direction."""
    return double_well(p[0]) + (4 - 3 * p[0] ** 2) * p[1] ** 2 / 2


def test_the_width_of_the_pass_and_the_number_of_saddles_count():
    line = escape_rate(lambda p: jnp.sum(double_well(p)), [-1.0], [0.0], 0.1)
    rate = escape_rate(valley, [-1.0, 0.0], [0.0, 0.0], 0.1, 3)
    assert float(rate) == pytest.approx(3 * float(line) / 2, rel=1e-12)
    log_rate = jax.grad(lambda T: jnp.log(escape_rate(valley, [-1.0, 0.0], [0.0, 0.0], T)))
    assert float(log_rate(0.1)) == pytest.approx(0.25 / 0.1**2, rel=1e-12)


def test_points_have_to_be_a_minimum_and_a_saddle():
    for minimum, saddle, message in (
        ([-0.9, 0.0], [0.0, 0.0], "minimum must be a minimum"),
        ([0.0, 0.0], [0.0, 0.0], "minimum must be a minimum"),
        ([-1.0, 0.0], [1.0, 0.0], "saddle must be a stationary"),
        ([-1.0, 0.0], [0.1, 0.0], "saddle must be a stationary"),
    ):
        with pytest.raises(ValueError, match=message):
            escape_rate(valley, minimum, saddle, 0.1)
        traced = jax.jit(lambda a, b: escape_rate(valley, a, b, 0.1))
        assert np.isnan(traced(jnp.array(minimum), jnp.array(saddle)))
    # On a slope the minimum behind a saddle farther down lies above it.
    wave, slope = np.arcsin(0.5), 0.5
    with pytest.raises(ValueError, match="saddle must lie above"):
        escape_rate(lambda p: jnp.sum(jnp.cos(p) + slope * p), [3 * np.pi - wave], [wave], 0.1)


def test_equal_eigenvalues_have_derivatives():
    def log_rate(stiff):
        def loss(p):
            return double_well(p[0]) + stiff * (p[1] ** 2 + p[2] ** 2) * (1 + p[0] ** 2) / 2

        return jnp.log(escape_rate(loss, jnp.array([-1.0, 0, 0]), jnp.zeros(3), 0.1))

    assert float(log_rate(2.0)) == pytest.approx(float(log_rate(1.0)))  # both widths scale alike
    assert float(jax.grad(log_rate)(2.0)) == pytest.approx(0, abs=1e-12)


def test_a_box_that_cuts_the_density_gives_no_mean():
    def wells(p):
        return (p[0] ** 2 - 1) ** 2 + 2 * p[1] ** 2

    def mean(box, points=257):
        return gibbs_mean(wells, lambda p: p[0] ** 2, 0.1, box, points)

    assert mean([[-3.0, 3.0], [-3.0, 3.0]]) == pytest.approx(0.97252276, abs=1e-8)
    assert np.isnan(mean([[-0.5, 0.5], [-4.0, 4.0]]))
    # A density that is flat up to the edge of its own grid weighs the ends by half.
    flat = gibbs_mean(lambda p: 8.0 * p @ p, lambda p: p[0] ** 2, 1.0, [[-1.0, 1.0], [-1.0, 1.0]], 5)
    x, ends = np.linspace(-1, 1, 5), np.array([0.5, 1, 1, 1, 0.5])
    assert flat == pytest.approx(np.sum(ends * x**2 * np.exp(-8 * x**2)) / np.sum(ends * np.exp(-8 * x**2)))
