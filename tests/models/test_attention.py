import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import (
    PromptAttention,
    attention_log_ratio,
    attention_logits,
    log_mean_ratio,
    prompt_attention,
)
from models.functional import as_function
from models.losses import gauss_newton_spectrum


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def setting(N=6, n=4, d=3):
    """Tokens, key weights, prompt, value and labels of a scalar model."""
    shapes = [(N, n, d), (d, d), (d,), (d,), (N,)]
    return [draw(shape, seed) for seed, shape in enumerate(shapes)]


@settings(max_examples=5)  # every shape compiles anew
@given(heads=st.integers(1, 3), queries=st.integers(1, 2), n=st.integers(1, 4), d=st.integers(1, 4))
def test_against_a_loop_over_samples_heads_and_queries(heads, queries, n, d):
    X, W = np.asarray(draw((2, n, d), 0)), np.asarray(draw((d, d), 1))
    P, V = np.asarray(draw((heads, queries, d), 2)), np.asarray(draw((heads, d, 2), 3))
    expected = np.zeros((2, queries, 2))
    for i in range(2):
        for h in range(heads):
            for q in range(queries):
                a = np.exp(X[i] @ W @ P[h, q])
                expected[i, q] += (a / a.sum()) @ (X[i] @ V[h])
    np.testing.assert_allclose(prompt_attention(P, V, X, W), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(
        prompt_attention(P, V[:, :, 0], X, W), expected[:, :, 0], rtol=1e-11, atol=1e-12
    )


def test_heads_are_summed():
    X, P, V = draw((5, 4, 3), 0), draw((2, 1, 3), 1), draw((2, 3, 7), 2)
    single = sum(prompt_attention(P[h, 0], V[h], X) for h in range(2))
    np.testing.assert_allclose(prompt_attention(P, V, X)[:, 0], single, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("prompt", "value", "logits", "output"),
    [
        ((3,), (3,), (5, 4), (5,)),
        ((3,), (3, 2), (5, 4), (5, 2)),
        ((2, 6, 3), (2, 3), (5, 2, 6, 4), (5, 6)),
        ((2, 6, 3), (2, 3, 7), (5, 2, 6, 4), (5, 6, 7)),
    ],
)
def test_shapes_and_dtype(prompt, value, logits, output):
    model = PromptAttention(jnp.ones(prompt, "float32"), jnp.ones(value, "float32"))
    tokens = jnp.ones((5, 4, 3), "float32")
    assert model.logits(tokens).shape == model.attention(tokens).shape == logits
    out = model(tokens)
    assert (out.shape, out.dtype) == (output, jnp.float32)
    np.testing.assert_allclose(jnp.sum(model.attention(tokens), axis=-1), 1, rtol=1e-6)
    assert model(tokens[0]).shape == output[1:]


def test_gradients_are_the_formulas():
    X, W, p, v, y = setting()

    def loss(p, v):
        return 0.5 * jnp.sum((prompt_attention(p, v, X, W) - y) ** 2)

    K, u = np.asarray(X @ W), np.asarray(X @ v)
    a = np.exp(K @ np.asarray(p))
    a /= a.sum(axis=1, keepdims=True)
    residual = (u * a).sum(axis=1) - np.asarray(y)
    Ju = a * (u - (u * a).sum(axis=1, keepdims=True))
    grad_p, grad_v = jax.grad(loss, (0, 1))(p, v)
    np.testing.assert_allclose(grad_p, np.einsum("i,ind,in->d", residual, K, Ju), rtol=1e-12)
    np.testing.assert_allclose(grad_v, np.einsum("i,ind,in->d", residual, X, a), rtol=1e-12)


def test_logits_of_any_size_stay_finite():
    value, tokens = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    prompt = jnp.array([1e6, -1e6])
    assert float(prompt_attention(prompt, value, tokens)) == 1.0
    assert np.all(np.isfinite(jax.grad(prompt_attention)(prompt, value, tokens)))


@pytest.mark.parametrize("train_value", [True, False])
def test_exactly_the_trained_part_is_split_off(train_value):
    X, W, p, v, _ = setting()
    model = PromptAttention(p, v, W, train_value=train_value)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert set(params) == ({"prompt", "value"} if train_value else {"prompt"})
    assert len(jax.tree.leaves(rest)) == (1 if train_value else 2)
    predict, params = as_function(model)
    np.testing.assert_array_equal(predict(params, X), prompt_attention(p, v, X, W))
    # The function is the same for another model of this structure, so that nothing compiles twice.
    other, _ = as_function(PromptAttention(2 * p, v, W, train_value=train_value))
    assert jax.tree.structure(predict) == jax.tree.structure(other)


def test_standard_initialization():
    model = PromptAttention.standard(jax.random.key(0), 400, outputs=5, heads=10, queries=5, dtype="float32")
    prompt, value = model.prompt[...], model.value[...]
    assert prompt.shape == (10, 5, 400)
    assert value.shape == (10, 400, 5)
    assert prompt.dtype == value.dtype == jnp.float32
    # 20000 numbers each: the variance has a relative standard error of sqrt(2 / 20000) = 0.01.
    for array in (prompt, value):
        assert 400 * float(jnp.var(array)) == pytest.approx(1, abs=0.04)
    correlation = np.corrcoef(np.ravel(prompt), np.ravel(value.transpose(0, 2, 1)))[0, 1]
    assert abs(correlation) < 0.03
    small = PromptAttention.standard(jax.random.key(0), 4)
    assert small.prompt[...].shape == small.value[...].shape == (4,)


def test_log_ratio_is_that_of_the_softmax():
    X, _, p, _, _ = setting()
    a = np.asarray(jax.nn.softmax(attention_logits(p, X), axis=-1))
    ratios = a.max(axis=1) / a.min(axis=1)
    np.testing.assert_allclose(attention_log_ratio(p, X), np.log(ratios), rtol=1e-12)
    assert float(log_mean_ratio(attention_log_ratio(p, X))) == pytest.approx(np.log(ratios.mean()), rel=1e-13)
    assert attention_log_ratio(draw((2, 3, 3), 0), X).shape == (6, 2, 3)
    large = log_mean_ratio(jnp.array([[0.0, 200.0], [1.0, 1.0]], "float32"))
    assert large.dtype == jnp.float32
    np.testing.assert_allclose(large, [200 - np.log(2), 1], rtol=1e-6)


@pytest.mark.parametrize("train_value", [True, False])
def test_gauss_newton_spectrum_is_that_of_the_explicit_rows(train_value):
    X, W, p, v, _ = setting(N=20)
    predict, params = as_function(PromptAttention(p, v, W, train_value=train_value))
    K, u = np.asarray(X @ W), np.asarray(X @ v)
    a = np.asarray(jax.nn.softmax(X @ W @ p, axis=-1))
    rows = np.einsum("ind,in->id", K, a * (u - (u * a).sum(axis=1, keepdims=True)))
    if train_value:
        rows = np.concatenate([rows, np.einsum("ind,in->id", X, a)], axis=1)
    expected = np.linalg.eigvalsh(rows.T @ rows / 20)[::-1]
    np.testing.assert_allclose(gauss_newton_spectrum(predict, params, X), expected, rtol=1e-10)


def test_gauss_newton_spectrum_of_a_vector_output_by_finite_differences():
    X, P, V = np.asarray(draw((4, 3, 3), 0)), np.asarray(draw((2, 1, 3), 1)), np.asarray(draw((2, 3, 5), 2))
    predict, params = as_function(PromptAttention(P, V, train_value=False))
    step, columns = 1e-5, []
    for index in np.ndindex(P.shape):
        shift = np.zeros(P.shape)
        shift[index] = step
        up, down = (prompt_attention(P + sign * shift, V, X) for sign in (1, -1))
        columns.append(np.ravel((up - down) / (2 * step)))
    G = np.stack(columns, axis=1)
    spectrum = gauss_newton_spectrum(predict, params, X)
    np.testing.assert_allclose(spectrum, np.linalg.eigvalsh(G.T @ G / 4)[::-1], rtol=1e-6, atol=1e-10)


def test_gauss_newton_spectrum_with_few_samples_and_under_vmap():
    X, W, p, v, _ = setting(N=2)
    predict, params = as_function(PromptAttention(p, v, W))
    spectrum = gauss_newton_spectrum(predict, params, X)
    assert spectrum.shape == (6,)
    assert np.all(spectrum[:2] > 0)
    assert np.all(spectrum[2:] == 0)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = jax.jit(jax.vmap(lambda params: gauss_newton_spectrum(predict, params, X)))(many)
    np.testing.assert_allclose(both[0], spectrum, rtol=1e-10)


@pytest.mark.parametrize(
    ("prompt", "value", "tokens", "weights", "name"),
    [
        ((2, 3), (3,), (4, 3), None, "prompt"),
        ((), (3,), (4, 3), None, "prompt"),
        ((3,), (4,), (4, 3), None, "value"),
        ((3,), (), (4, 3), None, "value"),
        ((2, 1, 3), (3, 3), (4, 3), None, "value"),
        ((3,), (3,), (4, 2), None, "tokens"),
        ((3,), (3,), (3,), None, "tokens"),
        ((3,), (3,), (0, 3), None, "tokens"),
        ((3,), (3,), (4, 3), (3, 2), "key_weights"),
    ],
)
def test_bad_shapes(prompt, value, tokens, weights, name):
    weights = None if weights is None else jnp.ones(weights)
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        prompt_attention(jnp.ones(prompt), jnp.ones(value), jnp.ones(tokens), weights)
    if name != "tokens":
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            PromptAttention(jnp.ones(prompt), jnp.ones(value), weights)


@pytest.mark.parametrize("sizes", [{"dim": 0}, {"dim": 2, "heads": 0}, {"dim": 2, "queries": 3}])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=f"^{list(sizes)[-1]} must be"):
        PromptAttention.standard(jax.random.key(0), **sizes)
