"""JoMA in theory against oracles: attention, invariants, modified MLP, mixtures, saturation."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.special import erf, erfinv
from scipy.stats import norm

from dynamics import joma
from dynamics.flow import Trajectory, integrate
from dynamics.spectra import entropy, stable_rank
from tests.helpers import assert_bad_lanes_are_nan, count_compilations

DELTA = jnp.array([1.0, 0.9, 0.5, 0.1, -0.3, 0.0])
ACTIVATIONS = {"identity": lambda s: s, "relu": jax.nn.relu, "square": lambda s: s**2 / 2, "tanh": jnp.tanh}


def block_loss(params, args):
    """A whole network above the block in the theory's coordinates: hidden activations, a head, a loss."""
    V, z, head = params
    x, bias, labels, kind, activation, squared = args
    # The part of the pre-activation that the residual gives does not depend on V or z.
    hidden = activation(joma.attend(z, x, kind) @ V + bias)
    logits = jnp.tanh(hidden @ head)
    if squared:
        return jnp.mean(jnp.sum((logits - labels) ** 2, axis=-1))
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))


def draw(seed, samples, tokens, hidden, classes=3):
    generator = np.random.default_rng(seed)
    x = jnp.asarray(generator.dirichlet(np.ones(tokens), samples) * tokens)
    labels = jnp.asarray(np.eye(classes)[generator.integers(0, classes, samples)])
    V, head = (jnp.asarray(generator.normal(size=shape)) for shape in ((tokens, hidden), (hidden, classes)))
    bias = jnp.asarray(generator.normal(size=(1, hidden)))
    return x, bias, labels, V, head


@pytest.mark.parametrize("kind", ["linear", "exp"])
@given(
    seed=st.integers(0, 2**31 - 1),
    name=st.sampled_from(sorted(ACTIVATIONS)),
    squared=st.booleans(),
    shape=st.sampled_from([(5, 4, 1), (5, 4, 3), (2, 3, 2)]),
    log_ratio=st.floats(-2, 2),
)
def test_invariants_are_constant_along_the_gradient_flow(kind, seed, name, squared, shape, log_ratio):
    samples, tokens, hidden = shape
    x, bias, labels, V, head = draw(seed, samples, tokens, hidden)
    z = jnp.asarray(np.random.default_rng(seed).normal(size=tokens)) + float(kind == "linear")
    rate_w, rate_z = 0.7, 0.7 * np.exp(log_ratio)
    gradient = jax.grad(block_loss)((V, z, head), (x, bias, labels, kind, ACTIVATIONS[name], squared))

    # The rate of change along the flow, exactly: a directional derivative.
    def rate_of(**rates):
        return jax.jvp(
            lambda V, z: joma.invariant(V, z, kind, **rates),
            (V, z),
            (-rate_w * gradient[0], -rate_z * gradient[1]),
        )[1]

    np.testing.assert_allclose(rate_of(learning_rate_w=rate_w, learning_rate_z=rate_z), 0, atol=1e-13)

    # A step of gradient descent breaks them, by a drift per time that is proportional to the learning rate.
    def drift(eta):
        stepped = (V - eta * rate_w * gradient[0], z - eta * rate_z * gradient[1])
        rates = {"learning_rate_w": rate_w, "learning_rate_z": rate_z}
        change = joma.invariant(*stepped, kind, **rates) - joma.invariant(V, z, kind, **rates)
        return float(jnp.max(jnp.abs(change))) / eta

    if drift(1e-3) > 1e-9:
        assert drift(1e-3) / drift(5e-4) == pytest.approx(2, abs=0.02)
    if abs(log_ratio) > 0.1 and float(jnp.max(jnp.abs(gradient[1]))) > 1e-3:
        assert float(jnp.max(jnp.abs(rate_of()))) > 1e-5


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_softmax_invariant_with_one_context(rate):
    x, bias, labels, V, head = draw(0, 5, 4, 3)
    x = jnp.broadcast_to(x[:1], x.shape)
    z = jnp.array([0.3, -0.2, 0.1, 0.0])
    grad_V, grad_z, _ = jax.grad(block_loss)((V, z, head), (x, bias, labels, "softmax", jnp.tanh, True))
    b = joma.attend(z, x[0], "softmax")
    # z' = sum_k (v_k v_k' - b <v_k, v_k'>), at each moment.
    grown = jnp.sum(V * grad_V, axis=1)
    np.testing.assert_allclose(rate * grad_z, rate * (grown - b * jnp.sum(grown)), atol=1e-14)
    # With the mean attention held fixed the invariant moves by that alone.
    tangent = jax.jvp(
        lambda V, z: joma.invariant(V, z, "softmax", learning_rate_z=rate, mean_attention=b),
        (V, z),
        (grad_V, rate * grad_z),
    )[1]
    np.testing.assert_allclose(tangent, 0, atol=1e-13)


def test_softmax_logits_follow_a_moving_mean():
    ts = np.linspace(0, 1, 2001)
    V = jnp.asarray(np.stack([np.sin(ts), ts**2, 1 + ts], axis=1)[:, :, None])
    mean = np.stack([ts / 2, np.full_like(ts, 0.3), 0.7 - ts / 2], axis=1)
    z = joma.softmax_logits(V, mean, jnp.zeros(3), rate_ratio=2.0)
    half = [lambda t: np.sin(t) * np.cos(t), lambda t: 2 * t**3, lambda t: 1 + t]

    def total(t):
        return sum(f(t) for f in half)

    means = [lambda t: t / 2, lambda t: 0.3, lambda t: 0.7 - t / 2]
    grown = [
        2 * quad(lambda t, f=f, b=b: f(t) - b(t) * total(t), 0, 1)[0]
        for f, b in zip(half, means, strict=True)
    ]
    np.testing.assert_allclose(z[-1], grown, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "exp", "softmax"])
def test_attention_maps(kind):
    z, x = np.array([0.5, -1.0, 2.0]), np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    expected = {"linear": x * z / 2, "exp": x * np.exp(z / 2)}
    weights = expected["exp"]
    expected["softmax"] = weights / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(joma.attend(z, x, kind, temperature=2.0), expected[kind], rtol=1e-14)
    np.testing.assert_allclose(joma.attend(np.stack([z, z]), x, kind, 2.0), expected[kind], rtol=1e-14)


def test_softmax_attention_neither_overflows_nor_divides_by_zero():
    z = jnp.array([-3000.0, -3001.0, 3000.0])
    x = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert joma.attend([1000.0, 0.0], [0.0, 1.0], "exp").tolist() == [0.0, 1.0]
    b = joma.attend(z, x, "softmax")
    np.testing.assert_allclose(b, [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0], [0, 0, 0]], rtol=1e-12)
    pull = jax.grad(lambda z: joma.attend(z, x, "softmax")[:, 0].sum())(z)
    np.testing.assert_allclose(pull, [0.19661193, -0.19661193, 0], atol=1e-8)


def test_modified_mlp_flow_is_its_closed_form():
    end = float(joma.blow_up_time(DELTA))
    assert end == pytest.approx(np.sqrt(np.pi / 2))
    ts = jnp.array([0.0, 0.3, 0.9, 0.999]) * end
    path = joma.modified_mlp_flow(jnp.zeros(6), DELTA, ts)
    np.testing.assert_allclose(path.ys, joma.modified_mlp_solution(ts, DELTA), atol=1e-7)
    # The corrected ratio is common to all tokens, the printed one is not.
    at = path.ys[2, :5]
    assert np.ptp(erf(at / np.sqrt(2)) / DELTA[:5]) < 1e-7
    assert np.ptp(erf(at / 2) / DELTA[:5]) > 1e-2


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=5), st.floats(0, 3))
def test_solution_past_the_blow_up(delta, t):
    delta = np.array(delta)
    v = np.asarray(joma.modified_mlp_solution(t, delta))
    largest = np.max(np.abs(delta))
    if largest == 0:
        assert np.all(v == 0)
        assert np.isinf(joma.blow_up_time(delta))
    elif t < np.sqrt(np.pi / 2) / largest * (1 - 1e-9):
        np.testing.assert_allclose(
            v, np.sqrt(2) * erfinv(np.sqrt(2 / np.pi) * delta * t), rtol=1e-6, atol=1e-9
        )
    elif t > np.sqrt(np.pi / 2) / largest:
        winners = np.abs(delta) == largest
        np.testing.assert_array_equal(v[winners], np.sign(delta[winners]) * np.inf)
        limits = np.sqrt(2) * erfinv(delta[~winners] / largest)
        np.testing.assert_allclose(v[~winners], limits, rtol=1e-6, atol=1e-9)


def test_ties_share_the_win_and_zero_saliency_stays():
    v = joma.modified_mlp_solution(jnp.array([0.5, 9.0]), jnp.array([2.0, -2.0, 0.0, 1.0]))
    assert v.shape == (2, 4)
    assert v[1].tolist()[:3] == [np.inf, -np.inf, 0.0]
    assert joma.modified_mlp_solution(jnp.inf, [0.0, 0.0]).tolist() == [0.0, 0.0]
    path = joma.modified_mlp_flow(jnp.zeros(3), jnp.zeros(3), [0.0, 1e6])
    assert np.all(np.asarray(path.ys) == 0)


def test_beyond_the_blow_up_the_flow_says_so():
    with pytest.raises(RuntimeError, match="ts must end before the blow-up"):
        joma.modified_mlp_flow(jnp.zeros(2), jnp.array([1.0, 0.5]), [0.0, 1.3])
    path = joma.modified_mlp_flow(jnp.zeros(2), jnp.array([1.0, 0.5]), [0.0, 1.0, 1.3], throw=False)
    assert not bool(path.ok)
    assert np.isnan(path.ys[-1]).all()


def test_hidden_nodes_stay_parallel_to_their_saliency():
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    ts = jnp.array([0.0, 0.5, 0.9]) * joma.blow_up_time(delta)
    path = joma.modified_mlp_flow(jnp.zeros((5, 3)), delta, ts)
    np.testing.assert_allclose(path.ys, joma.modified_mlp_solution(ts, delta), atol=1e-7)
    past = joma.modified_mlp_solution(9.0, [[2.0, 0.0], [0.0, -1.0], [0.0, 0.0]]).round(5).tolist()
    assert past == [[np.inf, 0.0], [0.0, -0.67449], [0.0, 0.0]]


def test_rescaled_flow_goes_through_the_blow_up_on_the_same_orbit():
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    path = joma.rescaled_mlp_flow(jnp.zeros((5, 3)), delta, jnp.array([0.0, 0.5, 1.0, 30.0]))
    direct = joma.modified_mlp_flow(jnp.zeros((5, 3)), delta, path.ys.t[:3])
    np.testing.assert_allclose(path.ys.V[:3], direct.ys, atol=1e-7)
    assert float(jnp.max(jnp.sum(path.ys.V[-1] ** 2, axis=1))) > 1000  # exp of half of it overflows
    assert float(path.ys.t[-1]) == pytest.approx(float(joma.blow_up_time(delta)), rel=1e-7)
    assert float(stable_rank(path.ys.V[-1])) < float(stable_rank(path.ys.V[1]))


@given(st.floats(-3, 3), st.floats(0.01, 5), st.floats(0.1, 3))
def test_moments_of_a_gaussian_cluster(r, length, scale):
    u = r / (scale * length)
    cases = {
        "relu": (norm.cdf(u), scale * norm.pdf(u) / length),
        "identity": (1.0, 0.0),
        "square": (r, scale**2),
    }
    for name, expected in cases.items():
        found = joma.gaussian_moments(r, length, ACTIVATIONS[name], scale)
        np.testing.assert_allclose(found, expected, atol=1e-11 * max(1, scale / length))


def test_moments_against_quadrature():
    def density(u):
        return norm.pdf(u, scale=0.7)

    def slope(u):
        return 1 / np.cosh(0.4 + 1.3 * u) ** 2

    gain = quad(lambda u: slope(u) * density(u), -8, 8, epsabs=1e-13)[0]
    stretch = quad(lambda u: slope(u) * u * density(u), -8, 8, epsabs=1e-13)[0] / 1.3
    np.testing.assert_allclose(joma.gaussian_moments(0.4, 1.3, jnp.tanh, 0.7), (gain, stretch), atol=1e-11)


def test_mixture_field_is_the_mean_over_samples():
    generator = np.random.default_rng(0)
    centers, weights, v, scale = (
        generator.normal(size=(3, 4)),
        np.array([0.5, -0.3, 0.2]),
        generator.normal(size=4),
        0.6,
    )
    field = joma.isotropic_mixture_field(v, centers, weights, 0.1, jax.nn.relu, scale)
    noise = scale * generator.normal(size=(200_000, 4))
    x = centers[:, None, :] + noise
    terms = np.sum(weights[:, None, None] * x * (x @ v + 0.1 > 0)[:, :, None], axis=0)
    errors = terms.std(axis=0) / np.sqrt(len(noise))
    assert np.all(np.abs(terms.mean(axis=0) - field) < 5 * errors)


def test_mixture_field_of_the_square_is_exact():
    # phi = s^2 / 2: E[s x] = r_c center_c + scale^2 v, with a bias for each cluster.
    generator = np.random.default_rng(1)
    centers, weights, bias = generator.normal(size=(3, 4)), generator.normal(size=3), generator.normal(size=3)
    v, scale = generator.normal(size=4), 0.6
    field = joma.isotropic_mixture_field(v, centers, weights, bias, ACTIVATIONS["square"], scale)
    expected = (weights * (centers @ v + bias)) @ centers + weights.sum() * scale**2 * v
    np.testing.assert_allclose(field, expected, rtol=1e-11)


@pytest.mark.parametrize("length", [1e-200, 1.0, 10.0, 1000.0])
def test_moments_of_an_activation_that_saturates(length):
    found = joma.gaussian_moments(0.5, length, jnp.tanh, 1.0)

    # In s = r + |v| u: the layer around zero is resolved by its own width.
    def kernel(s):
        return norm.pdf((s - 0.5) / length) / length / np.cosh(s) ** 2

    gain = quad(kernel, -40, 40, points=[0], epsabs=1e-14)[0] if length > 0.1 else 1 / np.cosh(0.5) ** 2
    assert float(found.gain) == pytest.approx(gain, rel=1e-8)


def test_tiny_weights_have_the_field_of_their_direction():
    centers, weights = jnp.array([[3.0, 0.0]]), jnp.array([1.0])
    tiny, small = (
        joma.isotropic_mixture_field(jnp.array([size, 0.0]), centers, weights, 0.0, jax.nn.relu, 1.0)
        for size in (1e-200, 1e-3)
    )
    np.testing.assert_allclose(tiny, small, rtol=1e-9)


@pytest.mark.parametrize(
    "flow",
    [
        lambda x: joma.modified_mlp_flow(0 * x, x, [0.0, 0.5]),
        lambda x: joma.saturating_flow(0 * x, x, [0.0, 50.0]),
        lambda x: joma.log_residual_flow(x, [0.0, 20.0]),
    ],
)
def test_flows_in_32_bit(flow):
    single, double = (flow(jnp.array([1.0, 0.5, 0.0, -0.7], dtype)) for dtype in (jnp.float32, jnp.float64))
    assert single.ys.dtype == jnp.float32
    assert bool(single.ok)
    np.testing.assert_allclose(single.ys, double.ys, rtol=1e-3, atol=1e-4)


def test_traced_bad_numbers_fail_in_their_lanes_alone():
    bad = jnp.array([[1.0, 0.5], [jnp.nan, 0.5]])
    for flow in (
        lambda x: joma.modified_mlp_flow(jnp.zeros(2), x, [0.0, 0.5], throw=False),
        lambda x: joma.log_residual_flow(x, [0.0, 1.0], throw=False),
    ):
        assert jax.vmap(flow)(bad).ok.tolist() == [True, False]


def attend_row(name, kind):
    """Attention as a function of one of its arguments; a token of the context has no logit to speak of."""
    given = {"z": jnp.array([0.3, -0.2, 0.1]), "x": jnp.array([2.0, 0.0, 1.0]), "temperature": 0.5}
    return lambda value: joma.attend(**{**given, name: value}, kind=kind)


def moments_at(name):
    given = {"r": 0.4, "norm": 1.5, "scale": 0.7}
    return lambda value: joma.gaussian_moments(**{**given, name: value}, activation=jax.nn.relu)


def field_at(name):
    given = {
        "v": [1.0, -0.5],
        "centers": [[0.0, 2.0], [1.0, 1.0]],
        "weights": [0.5, 0.2],
        "bias": 0.1,
        "scale": 1.0,
    }
    return lambda value: joma.isotropic_mixture_field(**{**given, name: value}, activation=jax.nn.relu)


def invariant_at(name):
    given = {"learning_rate_w": 0.5, "learning_rate_z": 0.3}
    return lambda rate: joma.invariant([[2.0], [1.0]], [2.0, 1.0], "exp", **{**given, name: rate})


PATH = jnp.array([[[0.0], [0.0]], [[2.0], [1.0]]])
BAD_NUMBERS = {
    **{
        f"attend {kind}, x": (attend_row("x", kind), [2.0, 0.0, 1.0], [2.0, -1.0, 1.0], [np.nan, 1.0, 1.0])
        for kind in ("linear", "exp", "softmax")
    },
    **{
        f"attend {kind}, temperature": (attend_row("temperature", kind), 0.5, -0.5, 0.0, np.inf, np.nan)
        for kind in ("linear", "exp", "softmax")
    },
    "attend, z": (attend_row("z", "softmax"), [0.3, 0.0, 0.1], [np.nan, 0.0, 0.1]),
    **{
        f"invariant, {name}": (invariant_at(name), 0.5, -0.5, 0.0, np.inf)
        for name in ("learning_rate_w", "learning_rate_z")
    },
    "softmax_logits": (
        lambda ratio: joma.softmax_logits(PATH, jnp.full((2, 2), 0.5), [0.0, 0.0], ratio)[-1],
        0.5,
        -0.5,
        np.inf,
    ),
    **{
        f"gaussian_moments, {name}": (moments_at(name), *values)
        for name, values in {
            "r": (0.4, np.nan, np.inf),
            "norm": (1.5, -1.5, np.nan, np.inf),
            "scale": (0.7, -0.7, 0.0, np.nan),
        }.items()
    },
    "isotropic_moments": (
        lambda width: joma.isotropic_moments(0.4, 1.0, jax.nn.relu, lambda u: 0.5 + 0 * u, width),
        1.0,
        -1.0,
        0.0,
    ),
    "isotropic_mixture_field, v": (field_at("v"), [1.0, -0.5], [1.0, np.nan], [np.inf, 0.0]),
    "isotropic_mixture_field, scale": (field_at("scale"), 1.0, -1.0, 0.0, np.nan),
    "modified_mlp_solution, t": (lambda t: joma.modified_mlp_solution(t, [1.0, 0.0]), 0.5, -0.5, np.nan),
    "modified_mlp_solution, delta": (
        lambda delta: joma.modified_mlp_solution(0.5, delta)[0],
        [1.0, 0.5],
        [1.0, np.nan],
        [0.5, np.inf],
    ),
    "modified_mlp_solution, nodes": (
        lambda delta: joma.modified_mlp_solution(0.5, delta)[0],
        [[1.0, 0.5], [0.2, 0.1]],
        [[1.0, 0.5], [np.nan, 0.1]],
    ),
    "blow_up_time": (joma.blow_up_time, [1.0, -2.0], [1.0, np.nan], [np.inf, 1.0]),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_a_bad_traced_number_gives_nan_in_its_lane_alone(name):
    call, good, *bad = BAD_NUMBERS[name]
    assert_bad_lanes_are_nan(call, good, *bad)


def test_small_saliencies_do_not_vanish_when_they_are_squared():
    tiny = jnp.array([[3e-30, 4e-30], [1e-30, 0.0]], jnp.float32)
    assert float(joma.blow_up_time(tiny)) == pytest.approx(np.sqrt(np.pi / 2) / 5e-30, rel=1e-5)
    t = jnp.asarray(0.5 / 5e-30, jnp.float32)
    expected = joma.modified_mlp_solution(0.5, 1e30 / 5 * np.asarray(tiny, float))
    np.testing.assert_allclose(joma.modified_mlp_solution(t, tiny), expected, rtol=1e-5)
    assert float(joma.blow_up_time(tiny[:, 1])) == pytest.approx(np.sqrt(np.pi / 2) / 4e-30, rel=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: joma.attend(x, x, "exp"),
        lambda x: joma.invariant(x[:, None], x, "exp"),
        lambda x: joma.softmax_logits(x[None, :, None], x[None], x),
        lambda x: joma.saliency(x, x[:, None]),
        lambda x: joma.isotropic_mixture_field(x, x[None], [1.0], 0.0, jax.nn.relu, 1.0),
        lambda x: joma.gaussian_moments(x[:1].reshape(()), 1.0, jax.nn.relu, 1.0),
        lambda x: joma.modified_mlp_solution(1.0, x),
        lambda x: joma.modified_mlp_flow(x, x, [0.0, 0.1]),
        lambda x: joma.saturating_flow(x, x, [0.0, 0.1]),
        lambda x: joma.log_residual_flow(x, [0.0, 0.1]),
        lambda x: joma.rate_ratio(x, 0.0),
        joma.onset_delay,
        joma.blow_up_time,
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex128", "masked"])
def test_dtypes_that_are_not_served_are_refused(call, dtype):
    x = np.ma.masked_array(np.ones(2), [False, True]) if dtype == "masked" else jnp.ones(2, dtype)
    rule = {"complex128": "be real", "masked": "be an array without a mask"}.get(
        dtype, "be float32 or float64"
    )
    with pytest.raises(ValueError, match=rf"^\w+ must {rule}, got"):
        call(x)


def test_mixture_field_at_zero_weight():
    centers, weights = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.array([1.0, 2.0])
    field = joma.isotropic_mixture_field(jnp.zeros(2), centers, weights, jnp.array([0.0, 1.0]), jnp.tanh, 1.0)
    expected = centers[0] + 2 * centers[1] / np.cosh(1.0) ** 2
    np.testing.assert_allclose(field, expected, rtol=1e-12)
    slope = jax.jacfwd(lambda v: joma.isotropic_mixture_field(v, centers, weights, 0.0, jnp.tanh, 1.0))(
        jnp.zeros(2)
    )
    assert np.all(np.isfinite(slope))


def test_saturating_flow_against_its_log_residual():
    mu, ts = jnp.array([0.0, 0.5, 1.0, 2.0, 3.7]), jnp.array([0.0, 0.1, 1.0, 4.0])
    s = joma.log_residual_flow(mu, ts).ys
    v = joma.saturating_flow(jnp.zeros(5), mu, ts).ys
    np.testing.assert_allclose(v, mu[None] * -np.expm1(-np.asarray(s)), atol=1e-6)
    np.testing.assert_allclose(s[:, 0], ts, rtol=1e-9)
    oracle = solve_ivp(lambda t, v: (2 - v) * np.exp(v**2 / 2), (0, 1), [0.05], rtol=1e-10, atol=1e-12).y[
        0, -1
    ]
    found = joma.saturating_flow([0.05], [2.0], [0.0, 1.0], solver=diffrax.Dopri8()).ys[-1, 0]
    assert float(found) == pytest.approx(oracle, abs=1e-7)


def test_a_component_that_should_vanish_does():
    path = joma.saturating_flow([2.0, -1.0], [0.0, 0.0], [0.0, 20.0])
    assert np.all(np.abs(path.ys[-1]) < 1e-7)


def test_log_residual_has_its_late_law():
    mu, t = jnp.array([0.5, 1.0, 1.5, 2.0]), 20.0
    s = joma.log_residual_flow(mu, [0.0, t], rtol=1e-11, atol=1e-12).ys[-1]
    np.testing.assert_allclose(s, jnp.exp(mu**2 / 2) * (t - joma.onset_delay(mu)), rtol=1e-9)
    # Recorded: 22.468, 32.094, 59.123, 141.438.
    np.testing.assert_allclose(s, [22.468, 32.094, 59.123, 141.438], atol=1e-3)
    slow, fast = (joma.log_residual_flow(mu, [0.0, t]).ys[-1] for t in (100.0, 1000.0))
    for later, bound in ((slow, 1e-2), (fast, 1e-3)):
        ratio = later / later[1] / joma.rate_ratio(mu, 1.0)
        np.testing.assert_allclose(ratio, 1, atol=bound)


@pytest.mark.parametrize("mu", [0.0, 1e-6, 7.0])
def test_onset_delay_against_quadrature(mu):
    def integrand(x):
        return np.exp(-((mu * np.expm1(-x)) ** 2) / 2) - np.exp(-(mu**2) / 2)

    expected = quad(integrand, 0, 60, epsabs=1e-13, limit=200)[0]
    assert float(joma.onset_delay(mu)) == pytest.approx(expected, abs=1e-9)


def test_entropy_dips_and_recovers():
    mu, ts = jnp.array([1.0, 2.0, 3.0]), jnp.linspace(0.0, 200.0, 20001)
    v = joma.saturating_flow(jnp.full(3, 0.05), mu, ts, rtol=1e-7).ys
    over_time = entropy(jax.nn.softmax(v**2 / 2, axis=-1))
    # Recorded: 1.0986 at the start, 0.1721 at the dip, 0.3487 at the end.
    np.testing.assert_allclose(
        [over_time[0], over_time.min(), over_time[-1]], [1.0986, 0.1721, 0.3487], atol=2e-3
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: joma.attend([1.0], [1.0], "cosine"), "kind must be one of"),
        (
            lambda: joma.attend([1.0, 2.0], [1.0], "exp"),
            r"z and x must have shapes \(M,\) or \(\.\.\., M\), and \(\.\.\., M\), got \(2,\) and \(1,\)",
        ),
        (lambda: joma.attend([1.0], [1.0], "exp", 0.0), "temperature must be a positive number"),
        (lambda: joma.attend([1.0], [-1.0], "exp"), "x must be >= 0, got -1.0"),
        (lambda: joma.blow_up_time([np.nan]), "delta must be finite"),
        (
            lambda: joma.isotropic_mixture_field([np.nan], [[1.0]], [1.0], 0.0, jnp.tanh, 1.0),
            "v must be finite",
        ),
        (lambda: joma.invariant([[1.0]], [1.0, 2.0], "exp"), r"V and z must have shapes \(M, K\) and \(M,\)"),
        (
            lambda: joma.invariant([[1.0]], [1.0], "exp", learning_rate_w=0.0),
            "learning_rate_w must be a positive",
        ),
        (lambda: joma.invariant([[1.0]], [1.0], "softmax"), "mean_attention must be given for softmax"),
        (lambda: joma.invariant([[1.0]], [1.0], "exp", mean_attention=[1.0]), "mean_attention must be given"),
        (lambda: joma.modified_mlp_flow([0.0], [1.0, 2.0], [0.0, 1.0]), "V0 and delta must have one shape"),
        (lambda: joma.modified_mlp_flow([0.0], [np.nan], [0.0, 1.0]), "delta must be finite"),
        (lambda: joma.modified_mlp_solution(-1.0, [1.0]), "t must be >= 0"),
        (lambda: joma.modified_mlp_solution(1.0, [[[1.0]]]), r"delta must have shape \(M,\) or \(M, K\)"),
        (lambda: joma.blow_up_time(1.0), "delta must have shape"),
        (lambda: joma.saturating_flow([0.0], [1.0, 2.0], [0.0, 1.0]), "v0 and mu must have one shape"),
        (lambda: joma.log_residual_flow([np.inf], [0.0, 1.0]), "mu must be finite"),
        (lambda: joma.gaussian_moments(0.0, 1.0, jnp.tanh, 0.0), "scale must be a positive number"),
        (
            lambda: joma.isotropic_mixture_field([1.0], [[1.0, 2.0]], [1.0], 0.0, jnp.tanh, 1.0),
            "v, centers and weights must have shapes",
        ),
        (lambda: joma.saliency([1.0], [[1.0], [2.0]]), "gradient and x must have shapes"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_saliency_is_the_mean_over_samples():
    generator = np.random.default_rng(0)
    g, x = generator.normal(size=(7, 2)), generator.uniform(size=(7, 3))
    np.testing.assert_allclose(joma.saliency(g, x), np.mean(x[:, :, None] * g[:, None, :], axis=0))
    np.testing.assert_allclose(joma.saliency(g[:, 0], x), joma.saliency(g, x)[:, 0])


def test_other_numbers_compile_nothing():
    for call in (
        lambda shift: joma.modified_mlp_flow(jnp.zeros(2), jnp.array([1.0, shift]), [0.0, 1.0]),
        lambda shift: joma.saturating_flow(jnp.zeros(2), jnp.array([1.0, shift]), [0.0, 1.0]),
        lambda shift: joma.log_residual_flow(jnp.array([1.0, shift]), [0.0, 1.0]),
    ):
        call(0.5)
        with count_compilations() as names:
            call(0.25)
        assert not names, names


def test_mixture_field_integrates():
    def field(t, v, args):
        centers, weights = args
        return joma.isotropic_mixture_field(v, centers, weights, 0.0, jnp.tanh, 0.5)

    args = (jnp.eye(2), jnp.array([1.0, 0.5]))
    path = integrate(field, jnp.array([0.1, 0.0]), [0.0, 1.0], args)
    assert isinstance(path, Trajectory)
    assert bool(path.ok)
