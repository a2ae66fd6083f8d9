"""JoMA's block: what it computes, what training of it conserves and at which rate, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynamics import joma
from dynamics.flow import gradient_flow, integrate
from models.attention import JomaBlock, JomaInputs, joma_observer
from models.functional import as_function
from models.losses import bind, cross_entropy, upstream_product
from models.training import Descent, scale_by_name, train
from sims.compare import convergence_order
from tests.helpers import assert_bad_lanes_are_nan

KEY = jax.random.key(0)
TOKENS, QUERIES = 4, 2


def draw(samples=6):
    keys = jax.random.split(KEY, 3)
    x = jax.random.dirichlet(keys[0], jnp.ones(TOKENS), (samples,))
    query = jax.random.randint(keys[1], (samples,), 0, QUERIES)
    return JomaInputs(x, query), jax.random.randint(keys[2], (samples,), 0, 3)


def make(kind, activation=jnp.tanh, hidden=2, **options):
    head = nnx.Sequential(
        nnx.Linear(hidden, 5, rngs=nnx.Rngs(1)), jnp.tanh, nnx.Linear(5, 3, rngs=nnx.Rngs(2))
    )
    return JomaBlock.standard(
        KEY,
        TOKENS,
        hidden,
        kind=kind,
        queries=QUERIES,
        scale=0.5,
        activation=activation,
        head=head,
        **options,
    )


@pytest.mark.parametrize("kind", ["linear", "exp", "softmax"])
def test_the_block_is_what_its_formula_says(kind):
    block, (inputs, _) = make(kind, temperature=2.0), draw()
    U, u, W, z = (
        np.asarray(array[...]) for array in (block.embedding, block.query_embedding, block.W, block.z)
    )
    np.testing.assert_allclose(np.hstack([U, u]).T @ np.hstack([U, u]), np.eye(6), atol=1e-14)
    z = z + np.random.default_rng(0).normal(size=z.shape)
    block.z[...] = jnp.asarray(z)
    for x, q, hidden in zip(*map(np.asarray, inputs), np.asarray(block.hidden(inputs)), strict=True):
        b = x * (z[q] / 2 if kind == "linear" else np.exp(z[q] / 2))
        b = b / b.sum() if kind == "softmax" else b
        np.testing.assert_allclose(hidden, np.tanh(W.T @ (U @ b + u[:, q])), rtol=1e-12)
    state = joma_observer(block)(as_function(block)[1])
    np.testing.assert_allclose(state.V, U.T @ W, atol=1e-15)
    np.testing.assert_array_equal(state.z, z)


@pytest.mark.parametrize("kind", ["linear", "exp"])
def test_drift_of_the_invariant_is_of_first_order_in_the_learning_rate(kind):
    block, (inputs, labels) = make(kind), draw()
    # One query: its logits are what V goes with.
    inputs = JomaInputs(inputs.x, jnp.zeros_like(inputs.query))
    predict, params = as_function(block)
    rate_w, rate_z = 1.0, 0.3
    rates, path = Descent(horizon=4.0, points=1, substeps=(10, 30, 100)).train(
        bind(cross_entropy, (predict, inputs, labels)),
        params,
        observe=joma_observer(block),
        precondition=scale_by_name(W=rate_w, z=rate_z, head=1.0),
    )

    def drift(**learning_rates):
        values = jax.vmap(jax.vmap(lambda V, z: joma.invariant(V, z[0], kind, **learning_rates)))(*path.ys)
        return np.asarray(jnp.max(jnp.abs(values[:, -1] - values[:, 0]), axis=-1))

    weighted = drift(learning_rate_w=rate_w, learning_rate_z=rate_z)
    assert convergence_order(rates, weighted).slope == pytest.approx(1, abs=0.05)
    # As printed, for equal rates, it is not conserved at all.
    assert abs(convergence_order(rates, drift()).slope) < 0.1
    assert np.all(drift() > 20 * weighted[-1])
    assert float(jnp.max(jnp.abs(path.ys.z[0, -1] - path.ys.z[0, 0]))) > 0.01


def test_linear_activation_from_zero_follows_the_closed_form():
    block = JomaBlock.standard(KEY, TOKENS, 1, kind="exp", scale=0.0, activation=lambda s: s)
    inputs, _ = draw()
    inputs = JomaInputs(inputs.x, jnp.zeros_like(inputs.query))
    upstream = jnp.array([1.0, -0.5, 0.8, 2.0, -1.0, 0.3])
    delta = joma.saliency(upstream, inputs.x)
    predict, params = as_function(block)
    end = 0.9 * joma.blow_up_time(delta)
    expected = joma.modified_mlp_solution(end, delta)
    # The gradient flow of the network itself, to solver precision.
    path = integrate(
        gradient_flow(upstream_product),
        params,
        jnp.stack([0 * end, end]),
        (predict, inputs, upstream[:, None]),
        rtol=1e-10,
    )
    V, z = joma_observer(block)(jax.tree.map(lambda leaf: leaf[-1], path.ys))
    np.testing.assert_allclose(V[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(z[0], expected**2 / 2, atol=1e-6)


def test_bad_input_is_refused():
    U = jnp.eye(3)
    with pytest.raises(ValueError, match="embedding, query_embedding, W and z must have shapes"):
        JomaBlock(U[:, :2], U[:, 2:], jnp.ones((3, 1)), jnp.zeros((2, 2)), kind="exp")
    with pytest.raises(ValueError, match="z must not be zero for linear attention"):
        JomaBlock(U[:, :2], U[:, 2:], jnp.ones((3, 1)), jnp.zeros((1, 2)), kind="linear")
    with pytest.raises(ValueError, match="kind must be one of"):
        JomaBlock(U[:, :2], U[:, 2:], jnp.ones((3, 1)), jnp.zeros((1, 2)), kind="cosine")
    with pytest.raises(ValueError, match="dim must be at least tokens"):
        JomaBlock.standard(KEY, 3, 2, kind="exp", dim=3)
    with pytest.raises(ValueError, match="hidden must be a positive integer"):
        JomaBlock.standard(KEY, 3, 0, kind="exp")
    with pytest.raises(ValueError, match="queries must be a positive integer, got True"):
        JomaBlock.standard(KEY, 3, 1, kind="exp", queries=True)
    with pytest.raises(ValueError, match="scale must be a finite number >= 0"):
        JomaBlock.standard(KEY, 3, 1, kind="exp", scale=-1.0)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        JomaBlock.standard(KEY, 3, 1, kind="exp", temperature=0.0)
    block = JomaBlock.standard(KEY, 2, 1, kind="exp", queries=2)
    for query in (2, -1):
        with pytest.raises(ValueError, match=f"query must be integers from 0 to 1, got {query}"):
            block(JomaInputs(jnp.ones((1, 2)), jnp.array([query])))
    with pytest.raises(ValueError, match=r"x and query must have shapes \(\.\.\., 2\) and \(\.\.\.\)"):
        block(JomaInputs(jnp.ones((2, 2)), jnp.array([0])))


@pytest.mark.parametrize("kind", ["linear", "exp", "softmax"])
def test_a_traced_query_that_does_not_exist_gives_nan(kind):
    block = JomaBlock.standard(KEY, 2, 3, kind=kind, queries=2, activation=jax.nn.relu)
    x = jnp.array([[1.0, 2.0]])
    assert_bad_lanes_are_nan(lambda query: block.attention(JomaInputs(x, query)), [1], [2], [-1])
    assert_bad_lanes_are_nan(lambda query: block(JomaInputs(x, query)), [0], [2], [-1])


def test_any_optimizer_trains_the_block_in_one_scan():
    block, (inputs, labels) = make("softmax", jax.nn.relu), draw()
    predict, params = as_function(block)
    loss = bind(cross_entropy, (predict, inputs, labels))
    last, path = train(loss, params, optax.adam(0.05), steps=100, observe=joma_observer(block), every=50)
    assert float(loss(last)) < 0.5 * float(loss(params))
    assert path.ys.V.shape == (3, TOKENS, 2)
    np.testing.assert_allclose(path.ys.z.sum(axis=-1)[0], 0, atol=1e-15)
