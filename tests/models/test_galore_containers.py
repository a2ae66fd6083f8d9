"""GaLore in the containers of other libraries, and options told by the path and the structure of a tree."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.tree_util import Partial

from models.galore import flax_axes, galore, report, scale_by_adam_8bit, scale_by_galore
from tests.helpers import compiled

STEPS = 7


class Net(nnx.Module):
    """Two layers, and a number that is no parameter."""

    def __init__(self, first, second):
        self.first, self.second = nnx.Param(first), nnx.Param(second)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return jnp.tanh(x @ self.first) @ self.second


class EquinoxNet(eqx.Module):
    """The same with a setting, which is no array."""

    first: Any
    second: Any
    act: Any = eqx.field(static=True)

    def __call__(self, x):
        return self.act(x @ self.first) @ self.second


def start():
    rng = np.random.default_rng(0)
    return {"first": jnp.asarray(rng.normal(size=(6, 5))), "second": jnp.asarray(rng.normal(size=(5, 8)))}


def loss(predict):
    x = jnp.linspace(-1, 1, 42).reshape(7, 6)
    return jnp.mean(jnp.square(predict(x) - jnp.cos(jnp.arange(56.0).reshape(7, 8))))


def of_dict(params):
    return loss(lambda x: jnp.tanh(x @ params["first"]) @ params["second"])


def in_nnx(optimizer):
    net = Net(**start())
    held = nnx.Optimizer(net, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(net, held):
        held.update(net, nnx.grad(loss)(net))

    for _ in range(STEPS):
        step(net, held)
    return {"first": net.first[...], "second": net.second[...]}


def in_nnx_loop(optimizer):
    graph, params, rest = nnx.split(Net(**start()), nnx.Param, ...)

    @compiled
    def step(params, state):
        gradient = jax.grad(lambda params: loss(nnx.merge(graph, params, rest)))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return nnx.to_pure_dict(params)


def in_train_state(optimizer):
    state = TrainState.create(apply_fn=of_dict, params=start(), tx=optimizer)

    @compiled
    def step(state):
        return state.apply_gradients(grads=jax.grad(state.apply_fn)(state.params))

    for _ in range(STEPS):
        state = step(state)
    return state.params


def in_equinox(optimizer):
    net = EquinoxNet(**start(), act=jnp.tanh)

    @eqx.filter_jit
    def step(net, state):
        updates, state = optimizer.update(
            eqx.filter_grad(loss)(net), state, eqx.filter(net, eqx.is_inexact_array)
        )
        return eqx.apply_updates(net, updates), state

    state = optimizer.init(eqx.filter(net, eqx.is_inexact_array))
    for _ in range(STEPS):
        net, state = step(net, state)
    return {"first": net.first, "second": net.second}


def in_dict(optimizer):
    params, state = start(), optimizer.init(start())

    @compiled
    def step(params, state):
        updates, state = optimizer.update(jax.grad(of_dict)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return params


# Moments in 8 bits are decoded in float32: seven steps of a tenth are off by some of its roundings.
OPTIMIZERS = {
    "adam": galore(0.1, 2, update_gap=3, stagger=True, moments="reset", weight_decay=0.1),
    "8bit": galore(0.1, 2, update_gap=3, projection="full", inner=scale_by_adam_8bit(block=4, min_size=3)),
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def expected(request):
    optimizer = OPTIMIZERS[request.param]
    return optimizer, in_dict(optimizer), 1e-10 if request.param == "adam" else 1e-6


@pytest.mark.parametrize("container", [in_nnx, in_nnx_loop, in_train_state, in_equinox])
def test_every_container_trains_alike(expected, container):
    optimizer, plain, tolerance = expected
    assert not np.allclose(plain["first"], start()["first"])
    for name, leaf in container(optimizer).items():
        np.testing.assert_allclose(leaf, plain[name], rtol=0, atol=tolerance)


def test_states_have_arrays_at_the_places_of_the_parameters():
    # So that they can be mapped, masked, sharded and saved like those of Optax.
    params = {"w": jnp.zeros((4, 6)), "v": jnp.zeros((6, 4)), "b": jnp.zeros(3)}
    transform: Any = scale_by_galore(2, inner=scale_by_adam_8bit(min_size=10))
    state = transform.init(params)
    assert {name: leaf.shape for name, leaf in state.bases.left.items() if hasattr(leaf, "shape")} == {
        "w": (4, 2)
    }
    names: Any = optax.tree.map_params(
        transform,
        lambda leaf, name: leaf if isinstance(leaf, optax.MaskedNode) else name,
        state,
        {name: name for name in params},
        transform_non_params=lambda _: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert names.bases.right == {"w": optax.MaskedNode(), "v": "v", "b": optax.MaskedNode()}
    assert names.inner[0].mu.codes == {name: name for name in params}
    assert names.inner[0].mu.peaks == {"w": "w", "v": "v", "b": optax.MaskedNode()}


# --- Options of leaves


class Rank(eqx.Module):
    """A function that is a pytree."""

    wide: int

    def __call__(self, path, leaf):
        return self.wide if leaf.shape[0] < leaf.shape[1] else 1


def bases_of(state):
    return [leaf.shape for leaf in jax.tree.leaves(state[0].inner_states["galore"].inner_state.bases)]


def test_a_module_that_can_be_called_is_a_pytree_of_options_if_it_has_the_structure_of_the_parameters():
    net = eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0))  # weights (5, 3) and (4, 5), and biases
    params = eqx.filter(net, eqx.is_inexact_array)
    places = jax.tree.map(lambda leaf: leaf.shape[0], params)
    ranks = jax.tree.map(lambda size: 3 if size == 5 else 2, places)
    labels = jax.tree.map(lambda size: "galore" if size == 5 else "adam", places)
    trees: Any = galore(
        0.1,
        ranks,
        labels=labels,
        scale=jax.tree.map(float, places),
        update_gap=places,
        projection=jax.tree.map(lambda _: "left", places),
        weight_decay=0.1,
        mask=jax.tree.map(lambda size: size == 4, places),
        matrix_axes=lambda path, leaf: (0, 1) if leaf.ndim == 2 else None,
    )
    assert bases_of(trees.init(params)) == [(5, 3)]
    state = trees.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = trees.update(ones, state, ones)
    # Only the leaves with four rows decay; scale is five on the projected one, of the rank-one gradient.
    np.testing.assert_allclose(updates.layers[1].weight, -0.1 * 1.1, rtol=1e-6)
    np.testing.assert_allclose(updates.layers[0].weight, -0.1 * 5 / 5**0.5, rtol=1e-6)
    np.testing.assert_allclose(updates.layers[0].bias, -0.1, rtol=1e-6)


@pytest.mark.parametrize("rank", [Rank(2), Partial(lambda wide, path, leaf: Rank(wide)(path, leaf), 2)])
def test_a_pytree_of_another_structure_that_can_be_called_is_a_function(rank):
    params = {"w": jnp.zeros((4, 6)), "v": jnp.zeros((6, 4))}
    assert bases_of(galore(0.1, rank).init(params)) == [(4, 2), (6 - 2, 1)]


def test_paths_tell_parameters_apart_that_have_the_same_name():
    params = {
        "a/b": jnp.zeros((6, 9)),
        "a": {"b": jnp.zeros((5, 8))},
        "c": [jnp.zeros((3, 4))],
        "c/0": jnp.zeros((2, 3)),
    }
    ranks = {"a/b": 1, "a": {"b": 4}, "c": [2], "c/0": 1}
    state: Any = scale_by_galore(ranks).init(params)
    assert state.bases.left["a/b"].shape == (6, 1)
    assert state.bases.left["a"]["b"].shape == (5, 4)
    assert state.bases.left["c"][0].shape == (3, 2)
    labels = {"a/b": "adam", "a": {"b": "galore"}, "c": ["adam"], "c/0": "adam"}
    assert bases_of(galore(0.1, 2, labels=labels).init(params)) == [(5, 2)]
    with pytest.raises(ValueError, match="rank must be a pytree, as 2 parameters are called 'a/b'"):
        scale_by_galore(lambda path, leaf: 2).init(params)


# --- Ranges


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        *(("learning_rate", value) for value in (-0.1, np.nan, np.inf, None, "fast", 1j)),
        *(("weight_decay", value) for value in (-0.1, np.inf)),
        *((decay, value) for decay in ("b1", "b2") for value in (-0.1, 1.0, 1.5, np.nan)),
        *(("eps", value) for value in (-1e-8, np.nan)),
        ("scale", -0.25),
    ],
)
def test_numbers_out_of_range_are_refused_and_nan_where_they_are_traced(argument, bad):
    options = {"learning_rate": 0.1, "rank": 2, "weight_decay": 0.1}
    with pytest.raises(ValueError, match=f"^{argument} must be") as caught:
        galore(**{**options, argument: bad})
    assert "\n" not in str(caught.value)
    if argument in ("b1", "b2", "eps"):
        with pytest.raises(ValueError, match=f"^{argument} must be"):
            scale_by_adam_8bit(**{argument: bad})
    if isinstance(bad, float):
        params = {"w": jnp.ones((2, 3))}

        def update(number):
            optimizer: Any = galore(**{**options, argument: number})
            return optimizer.update(params, optimizer.init(params), params)[0]["w"]

        assert np.all(np.isnan(jax.jit(update)(jnp.asarray(bad))))


def test_concrete_numbers_are_looked_at_under_somebody_s_jit():
    rate, gradient = jnp.float32(0.5), jnp.ones((4, 6))
    options: Any = {"scale": rate, "weight_decay": rate, "b1": rate, "b2": rate, "eps": rate}
    state = jax.jit(lambda g: galore(rate, rank=2, **options).init(g))(gradient)
    assert jax.tree.structure(state) == jax.tree.structure(galore(0.5, rank=2, **options).init(gradient))


def test_names_of_others_are_told_apart():
    with pytest.raises(
        TypeError, match=r"^galore: got an unexpected .*; update_proj_gap is called update_gap here$"
    ):
        galore(0.1, 2, update_proj_gap=100)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"^scale_by_galore: missing a required argument: 'rank'$"):
        scale_by_galore()  # pyright: ignore[reportCallIssue]


def test_traced_numbers_give_what_concrete_ones_do():
    params = {"w": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    numbers = {"learning_rate": 0.2, "weight_decay": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "scale": 0.5}

    def update(numbers):
        optimizer = galore(rank=1, **numbers)
        return optimizer.update(params, optimizer.init(params), params)[0]

    traced = jax.jit(update)(jax.tree.map(jnp.asarray, numbers))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced, update(numbers))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_8bit_moments_are_of_real_numbers(dtype):
    transform: Any = scale_by_adam_8bit()
    message = f"params must be real floating arrays, got {jnp.dtype(dtype)}"
    with pytest.raises(ValueError, match=message):
        transform.init({"w": jnp.ones(3, dtype)})
    state = transform.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=message):
        transform.update({"w": jnp.ones(3, dtype)}, state)


def test_a_report_tells_dtypes_apart_and_counts_no_vector_as_a_matrix():
    shapes = {"a": ((6, 8), "float32"), "half": ((6, 8), "bfloat16"), "vector": ((6,), "float32")}
    params = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    told = report(params, 2)
    assert [row.hidden for row in told.rows] == [True, True, False]
    assert [row.adam_bytes for row in told.rows] == [2 * 48 * 4, 2 * 48 * 2, 2 * 6 * 4]
    # Two moments and a basis; the counts are no parameter's.
    assert [row.state_bytes for row in told.rows] == [4 * (2 * 2 * 8 + 12), 2 * (2 * 2 * 8 + 12), 2 * 6 * 4]


def test_kernels_of_flax_are_found_in_boxes_and_below_stacked_axes():
    assert flax_axes("attention/query/kernel/value", jnp.zeros((8, 2, 4))) == (-3, (-2, -1))
    assert flax_axes("conv_0/kernel", jnp.zeros((5, 3, 3, 4, 6)), stacked=1) == ((-4, -3, -2), -1)
    assert flax_axes("dense/kernel", jnp.zeros((5, 4, 6)), stacked=1) == (-2, -1)
    assert flax_axes("dense/kernel", jnp.zeros((5, 4)), stacked=1) is None


def test_a_warning_where_kernels_of_more_axes_or_most_numbers_are_left_out():
    kernels = {"query": {"kernel": jnp.ones((8, 2, 4))}, "up": {"kernel": jnp.ones((8, 6))}}
    wide = {**kernels, "down": {"kernel": jnp.ones((48, 8))}}
    for params, share in ((kernels, 43), (wide, 87)):
        with pytest.warns(
            UserWarning, match=f"^galore projects {share}% of the numbers in hidden matrices; "
        ):
            galore(0.1, 2).init(params)

    def most(path, leaf):
        return (0, 1) if leaf.ndim == 2 else None

    galore(0.1, 2, matrix_axes=most).init(wide)  # as it was told to
    with pytest.warns(UserWarning, match="43%"):
        galore(0.1, 2, matrix_axes=most).init(kernels)
    told = report(kernels, 2, matrix_axes=flax_axes)
    assert [(row.path, row.layout.m, row.layout.n) for row in told.projected] == [
        ("query/kernel", 8, 8),
        ("up/kernel", 8, 6),
    ]
    state = galore(0.1, 2, matrix_axes=flax_axes).init(kernels)  # warnings are errors
    assert told.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


MESHES = """
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models.galore import galore

host = {"tall": (8, 4), "wide": (4, 8), "stack": (2, 8, 4)}
host = {name: np.random.default_rng(1).normal(size=shape).astype("f4") for name, shape in host.items()}
specs = {"tall": P("d", None), "wide": P(None, "d"), "stack": P(None, "d", None)}
options = {"matrix_axes": lambda path, leaf: (-2, -1), "labels": lambda *_: "galore"}
optimizer = galore(0.1, 2, update_gap=2, **options)

def three_steps(gradients):
    state, update = optimizer.init(gradients), jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(gradients, state)
    return updates

expected = three_steps(host)
for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        found = three_steps({k: jax.device_put(host[k], NamedSharding(mesh, specs[k])) for k in host})
        for name in host:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)
            if kind == AxisType.Explicit:
                assert jax.typeof(found[name]).sharding.spec == specs[name], name

# Each device has the gradients of its own examples and its own layer of a stack.
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
mean = {"tall": host["tall"], "wide": host["wide"]}
parts = {name: np.stack([4 * mean[name], 0 * mean[name], -mean[name], mean[name]]) for name in mean}
layers = np.random.default_rng(2).normal(size=(4, 8, 4)).astype("f4")

def shards(parts, layers):
    def step(parts, layers, state):
        gradients = {name: jax.lax.pmean(parts[name][0], "d") for name in parts}
        return optimizer.update({**gradients, "layers": layers}, state)

    state = optimizer.init({**mean, "layers": layers})
    of_state = jax.tree.map(lambda leaf: P("d") if leaf.ndim == 3 or leaf.shape == (4,) else P(), state)
    placed = {"tall": P(), "wide": P(), "layers": P("d")}
    update = jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(P("d"), P("d"), of_state), out_specs=(placed, of_state)
    ))
    for _ in range(3):
        updates, state = update(parts, layers, state)
    return updates

optimizer = galore(0.1, 2, update_gap=2, refresh="warm", **options)
expected, found = three_steps({**mean, "layers": layers}), shards(parts, layers)
for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)
"""


def test_meshes_and_shard_map_give_the_numbers_of_one_device():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", MESHES], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
