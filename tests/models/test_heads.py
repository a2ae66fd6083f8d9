import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from models.attention import (
    AttentionHead,
    AttentionStack,
    Feedforward,
    diagonal_head,
    diagonal_head_loss,
    diagonal_stack,
    head_products,
    observe_products,
    product_coordinates,
    split_products,
)
from models.data.teachers import diagonal_teacher
from models.functional import as_function


def weights_of(seed, *shape):
    return [jnp.asarray(x) for x in np.random.default_rng(seed).normal(size=(4, *shape))]


def head_by_hand(weights, X):
    key, query, value, output = map(np.asarray, weights)
    return softmax(X @ key @ query.T @ X.T, axis=-1) @ X @ value @ output.T


def test_a_head_is_the_printed_formula():
    X = np.random.default_rng(9).normal(size=(2, 5, 4))
    full = weights_of(0, 4, 3)
    expected = np.stack([head_by_hand(full, x) for x in X])
    np.testing.assert_allclose(AttentionHead(*full)(X), expected, atol=1e-13)

    diagonal = weights_of(1, 4)
    expected = np.stack([head_by_hand([np.diag(w) for w in diagonal], x) for x in X])
    np.testing.assert_allclose(AttentionHead(*diagonal)(X), expected, atol=1e-13)
    key, query, value, output = diagonal
    np.testing.assert_allclose(diagonal_head(key * query, value * output, X), expected, atol=1e-13)


def test_a_stack_adds_heads_and_feedforward_to_its_input():
    X = np.random.default_rng(9).normal(size=(5, 4))
    layers, heads = 2, 3
    full = weights_of(2, layers, heads, 4, 2)
    up, down = weights_of(3, layers, 4, 6)[:2]
    stack = AttentionStack(*full, feedforward=Feedforward(up, down), activation=jnp.tanh)
    Z = X
    for layer in range(layers):
        Z = Z + sum(head_by_hand([w[layer, h] for w in full], Z) for h in range(heads))
        Z = Z + np.tanh(Z @ up[layer]) @ np.asarray(down[layer]).T
    np.testing.assert_allclose(stack(X), Z, rtol=1e-12)


def test_a_diagonal_stack_depends_on_products_alone():
    X = np.random.default_rng(9).normal(size=(5, 4))
    key, query, value, output = weights_of(4, 2, 3, 4)
    feedforward = Feedforward(*weights_of(5, 2, 4, 6)[:2])
    predict, params = as_function(AttentionStack(key, query, value, output, feedforward))
    kq, vo = split_products(observe_products(params), 4, layers=2, heads=3)
    np.testing.assert_array_equal(kq, key * query)
    np.testing.assert_array_equal(vo, value * output)
    np.testing.assert_allclose(predict(params, X), diagonal_stack(kq, vo, X, feedforward), rtol=1e-12)
    assert set(params) == {"key", "query", "value", "output"}  # the rest is frozen
    u, v = product_coordinates(params)
    np.testing.assert_array_equal(u * v, observe_products(params))


def test_what_starts_at_zero_cannot_attend():
    # With W_V W_O^T = 0 the output is zero whatever is attended to: no gradient for keys and queries.
    task = diagonal_teacher(jax.random.key(0), 6, 4, 3)

    def loss(kq, vo):
        return jnp.sum(jnp.square(diagonal_head(kq, vo, task.X) - task.Y))

    of_kq, of_vo = jax.grad(loss, argnums=(0, 1))(jnp.ones(3), jnp.zeros(3))
    assert of_kq.tolist() == [0.0, 0.0, 0.0]
    assert np.all(of_vo != 0)


def test_a_head_depends_on_two_products_of_matrices():
    full = AttentionHead(*weights_of(6, 4, 2))
    X = np.random.default_rng(9).normal(size=(5, 4))
    KQ, VO = map(np.asarray, head_products(as_function(full)[1]))
    np.testing.assert_allclose(full(X), softmax(X @ KQ @ X.T, axis=-1) @ X @ VO, atol=1e-12)


def test_bad_input():
    two, three = jnp.ones(2), jnp.ones(3)
    with pytest.raises(ValueError, match="key, query, value and output must have one shape"):
        AttentionHead(two, two, two, three)
    with pytest.raises(ValueError, match=r"\(layers, heads, d\)"):
        AttentionStack(two, two, two, two)
    stack = jnp.ones((1, 2, 3))
    with pytest.raises(ValueError, match=r"feedforward must hold two arrays \(1, 3, m\)"):
        AttentionStack(stack, stack, stack, stack, Feedforward(*jnp.ones((2, 1, 2, 5))))
    X = jnp.ones((3, 2))
    for call, message in (
        (lambda: diagonal_head([1.0], [0.5, 0.2], X), r"kq, vo and X must have shapes \(d,\), \(d,\) and"),
        (lambda: diagonal_head([1.0, 2.0], [0.5], X), "kq, vo and X must have shapes"),
        (lambda: diagonal_head([1.0], [0.5], X), "kq, vo and X must have shapes"),
        (lambda: diagonal_stack(stack, stack[:, :1], jnp.ones((3, 3))), "kq, vo and X must have shapes"),
        (
            lambda: diagonal_stack(stack, stack, jnp.ones((4, 3)), Feedforward(*jnp.ones((2, 2, 3, 5)))),
            r"feedforward must hold two arrays \(1, 3, m\)",
        ),
        (lambda: diagonal_head_loss(jnp.ones(4), X[None], X[None, :1]), "X and Y must have one shape"),
        (lambda: diagonal_head_loss(jnp.ones(3), X[None], X[None]), r"beta must have shape \(4,\)"),
        (lambda: split_products(jnp.ones(8), 2, heads=0), "heads must be a positive integer, got 0"),
        (lambda: AttentionHead(two, two, two, two)(jnp.ones((4, 1))), r"X must have shape \(\.\.\., n, 2\)"),
        (lambda: AttentionStack(stack, stack, stack, stack)(jnp.ones((4, 1))), "X must have shape"),
        (lambda: observe_products({"key": two}), "params must hold key, query, value, output, got no query"),
        (lambda: diagonal_head([1j], [0.5], jnp.ones((3, 1))), "kq must be real, got dtype complex128"),
        (
            lambda: diagonal_teacher(jax.random.key(0), 1, 2, 2, vo_scale=-1.0),
            "vo_scale must be a finite number",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    with pytest.raises(ValueError, match="tokens must be a positive integer"):
        diagonal_teacher(jax.random.key(0), 5, 0, 2)
