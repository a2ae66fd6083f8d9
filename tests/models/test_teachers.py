import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.attention import attention_log_ratio, log_mean_ratio
from models.data.teachers import diagonal_teacher, nearly_orthogonal_keys, orthogonal_keys, teacher_with_ratio
from tests.helpers import assert_bad_lanes_are_nan, count_compilations


def normal_keys(shape, seed=0, dtype="float64"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def log10_mean_ratio(p, keys):
    """The sum itself, in extended precision."""
    logits = np.asarray(keys, np.longdouble) @ np.asarray(p, np.longdouble)
    return float(np.log10(np.mean(np.exp(logits.max(axis=1) - logits.min(axis=1)))))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("ratio", [1.5, 10, 1e25, 1e50])
def test_the_ratio_is_hit(ratio, dtype, tolerance):
    keys = normal_keys((100, 20, 20), dtype=dtype)
    p = teacher_with_ratio(jax.random.key(1), keys, ratio)
    assert (p.shape, p.dtype) == ((20,), keys.dtype)
    assert log10_mean_ratio(p, keys) == pytest.approx(np.log10(ratio), abs=tolerance)
    if ratio == 1e25:
        assert 7 < float(jnp.linalg.norm(p)) < 13  # ten seeds of another implementation: 8 to 12


@given(
    shape=st.sampled_from([(1, 2, 1), (5, 3, 2)]),
    seed=st.integers(0, 2**31),
    log10=st.floats(1e-3, 300),
    spread=st.floats(-6, 6),
)
def test_the_ratio_is_hit_for_keys_of_any_size(shape, seed, log10, spread):
    keys = 10.0**spread * normal_keys(shape, seed)
    p = teacher_with_ratio(jax.random.key(2), keys, 10.0**log10)
    reached = float(log_mean_ratio(attention_log_ratio(p, keys))) / np.log(10)
    assert reached == pytest.approx(log10, rel=1e-11)


def test_ratio_one_is_no_preference():
    assert not np.any(teacher_with_ratio(jax.random.key(0), normal_keys((3, 2, 4)), 1))


def test_seeds_keys_and_ratios_are_one_program():
    keys = normal_keys((3, 4, 2, 5))
    seeds = jax.random.split(jax.random.key(0), 3)
    ratios = jnp.array([2.0, 1e10, 1e30])
    many = jax.jit(jax.vmap(teacher_with_ratio))(seeds, keys, ratios)
    for index in range(3):
        one = teacher_with_ratio(seeds[index], keys[index], float(ratios[index]))
        np.testing.assert_allclose(many[index], one, rtol=1e-12)
    with count_compilations() as names:
        teacher_with_ratio(seeds[0], keys[1] + 1, 77.0)
    assert not [name for name in names if "teacher" in name]


def test_the_diagonals_of_a_teacher_are_independent_and_have_a_scale_each():
    key = jax.random.key(3)
    plain, scaled = (
        diagonal_teacher(key, 1, 2, 1000),
        diagonal_teacher(key, 1, 2, 1000, kq_scale=0.5, vo_scale=3.0),
    )
    np.testing.assert_allclose(
        np.cov(plain.kq, plain.vo), np.eye(2), atol=0.15
    )  # above three standard errors
    np.testing.assert_array_equal(scaled.kq, 0.5 * plain.kq)
    np.testing.assert_array_equal(scaled.vo, 3 * plain.vo)


def test_bad_traced_scales_give_nan():
    key = jax.random.key(0)
    for call, *values in (
        (lambda scale: orthogonal_keys(key, 1, 2, 3, scale), 2.0, 0.0, -1.0, jnp.inf),
        (lambda scale: nearly_orthogonal_keys(key, 1, 2, 3, scale, 0.1), 2.0, 0.0, -1.0),
        (lambda eps: nearly_orthogonal_keys(key, 1, 2, 3, 1.0, eps), 0.5, 1.0, -1.0, 1.01),
        (lambda scale: diagonal_teacher(key, 2, 3, 2, kq_scale=scale).Y, 0.5, -0.5, jnp.inf),
        (lambda scale: diagonal_teacher(key, 2, 3, 2, vo_scale=scale).Y, 0.5, -0.5, jnp.nan),
    ):
        assert_bad_lanes_are_nan(call, *values)


def test_a_bad_traced_ratio_or_key_gives_nan():
    keys = normal_keys((4, 3, 2))
    bad = jnp.array([0.5, -1.0, jnp.inf, jnp.nan])
    found = jax.vmap(lambda ratio: teacher_with_ratio(jax.random.key(0), keys, ratio))(bad)
    assert np.all(np.isnan(found))
    equal = jnp.ones((1, 4, 3, 2))
    assert np.all(np.isnan(jax.vmap(lambda keys: teacher_with_ratio(jax.random.key(0), keys, 9.0))(equal)))


@pytest.mark.parametrize("ratio", [0.5, 0, -3.0, float("inf"), float("nan"), [2.0, 3.0]])
def test_a_bad_ratio(ratio):
    with pytest.raises(ValueError, match=r"^ratio must be"):
        teacher_with_ratio(jax.random.key(0), normal_keys((2, 3, 4)), ratio)


@pytest.mark.parametrize(
    "keys",
    [
        np.ones((3, 4)),
        np.ones((0, 3, 4)),
        np.arange(4.0).reshape(2, 1, 2),
        np.full((2, 3, 4), np.nan),
        np.ones((2, 3, 4)),
        1j * np.arange(24.0).reshape(2, 3, 4),
    ],
)
def test_bad_keys(keys):
    with pytest.raises(ValueError, match=r"^keys must"):
        teacher_with_ratio(jax.random.key(0), keys, 10.0)


@pytest.mark.parametrize(("N", "n", "extra", "scale"), [(3, 2, 0, 1.0), (2, 3, 5, 7.3), (1, 1, 0, 0.1)])
def test_orthogonal_keys(N, n, extra, scale):
    keys = orthogonal_keys(jax.random.key(0), N, n, N * n + extra, scale)
    assert keys.shape == (N, n, N * n + extra)
    rows = np.asarray(keys).reshape(N * n, -1)
    np.testing.assert_allclose(rows @ rows.T, scale * np.eye(N * n), atol=1e-13 * scale)


def test_orthogonal_keys_keep_the_dtype():
    assert orthogonal_keys(jax.random.key(0), 1, 2, 3, dtype="float32").dtype == jnp.float32
    assert nearly_orthogonal_keys(jax.random.key(0), 1, 2, 3, 1.0, 0.1, "float32").dtype == jnp.float32


def test_nearly_orthogonal_keys_deviate_by_eps():
    eps = jnp.array([0.0, 1e-3, 0.1, 0.9, 5.0])
    keys = jax.vmap(lambda e: nearly_orthogonal_keys(jax.random.key(0), 3, 2, 8, 4.0, e))(eps)
    rows = np.asarray(keys).reshape(5, 6, 8)
    deviation = [np.linalg.norm(row @ row.T / 4 - np.eye(6), 2) for row in rows[:4]]
    np.testing.assert_allclose(deviation, eps[:4], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(keys[0], orthogonal_keys(jax.random.key(0), 3, 2, 8, 4.0), atol=1e-13)
    assert np.all(np.isnan(rows[4]))  # no Gram matrix deviates by that much


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dim": 5}, "dim"),
        ({"samples": 0}, "samples"),
        ({"dtype": "float16"}, "dtype"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"eps": 1.0}, "eps"),
    ],
)
def test_bad_orthogonal_keys(change, name):
    arguments = {"samples": 3, "tokens": 2, "dim": 6, "scale": 1.0, "eps": 0.1} | change
    with pytest.raises(ValueError, match=f"^{name} must be"):
        nearly_orthogonal_keys(jax.random.key(0), **arguments)
    if name != "eps":
        del arguments["eps"]
        with pytest.raises(ValueError, match=f"^{name} must be"):
            orthogonal_keys(jax.random.key(0), **arguments)
