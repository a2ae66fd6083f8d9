"""Training: the scan against a plain loop, sweeps, failures, chunks with resume, the rate of convergence."""

import shutil
import warnings
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.checkpoints import hash_arrays, open_checkpoints
from models.functional import as_function
from models.losses import cross_entropy, mean_squared_error, upstream_product
from models.training import (
    Descent,
    map_lanes,
    record_steps,
    sgd_until,
    train,
    train_in_chunks,
)
from sims.compare import convergence_order
from tests.helpers import count_compilations

A = np.array([[2.0, 0.5], [0.5, 1.0]])
PARAMS = {"w": np.array([1.0, -2.0]), "b": np.array(0.5)}
KEY = jax.random.key(3)
SGD = optax.sgd(0.1)
ADAM = optax.adam(0.1)


def loss(params, batch=0.0):
    return 0.5 * params["w"] @ A @ params["w"] + (params["b"] - batch) ** 4


def quadratic(y):
    return 0.5 * y @ A @ y


def draw(key):
    return jax.random.normal(key)


def energy(params):
    return {"b": params["b"], "norm": jnp.sum(params["w"] ** 2)}


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def plain_loop(optimizer, batches):
    """Parameters after 0, 1, 2, ... steps."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    path = [params]
    for batch in batches:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


@pytest.mark.parametrize(
    ("optimizer", "steps", "every", "marks"),
    [
        (SGD, 7, 3, [0, 3, 6, 7]),
        (optax.sgd(0.1, momentum=0.9), 6, 2, [0, 2, 4, 6]),
        (ADAM, 2, 5, [0, 2]),
        (SGD, 0, 1, [0]),
    ],
    ids=["sgd", "momentum", "adam", "none"],
)
@pytest.mark.parametrize("kind", ["no batches", "arrays", "keyed"])
def test_equals_a_plain_loop(optimizer, steps, every, marks, kind):
    data = np.linspace(-1, 1, steps)
    drawn = [jax.random.normal(jax.random.fold_in(KEY, step)) for step in range(steps)]
    each = {"no batches": [0.0] * steps, "arrays": data, "keyed": drawn}[kind]
    given = {"no batches": {}, "arrays": {"batches": data}, "keyed": {"batches": draw, "key": KEY}}[kind]
    params, path = train(loss, PARAMS, optimizer, steps=steps, every=every, time_step=0.1, **given)
    expected = plain_loop(optimizer, each)
    assert bool(path.ok)
    assert record_steps(steps, every).tolist() == marks
    np.testing.assert_allclose(path.ts, 0.1 * np.array(marks), rtol=1e-15)
    for row, mark in enumerate(marks):
        for name in PARAMS:
            np.testing.assert_allclose(path.ys[name][row], expected[mark][name], rtol=1e-13, err_msg=name)
    assert_trees_equal(params, jax.tree.map(lambda leaf: leaf[-1], path.ys))


def test_sweeps_equal_single_runs_and_lanes_fail_alone():
    rates = jnp.array([0.1, 1e9, 0.02])

    def run(rate):
        return train(loss, PARAMS, optax.sgd(rate), steps=9, observe=energy, every=9, time_step=rate)

    params, path = jax.jit(jax.vmap(run))(rates)
    np.testing.assert_array_equal(path.ok, [True, False, True])
    np.testing.assert_allclose(path.ts, rates[:, None] * np.array([[0.0, 9.0]]), rtol=1e-15)
    for lane in (0, 2):
        alone = run(float(rates[lane]))
        jax.tree.map(
            lambda a, b, lane=lane: np.testing.assert_allclose(a[lane], b, rtol=1e-13),
            (params, path),
            alone,
        )


def test_seeds_are_one_vmap():
    keys = jax.random.split(KEY, 3)
    run = jax.vmap(lambda key: train(loss, PARAMS, SGD, steps=4, batches=draw, key=key)[1].ys["b"])
    alone = train(loss, PARAMS, SGD, steps=4, batches=draw, key=keys[1])[1].ys["b"]
    lanes = run(keys)
    np.testing.assert_allclose(lanes[1], alone, rtol=1e-13)
    assert len(set(lanes[:, -1].tolist())) == 3


def test_parameters_that_are_lost_are_told_though_not_observed():
    _, path = train(lambda y: y**4, 1.0, optax.sgd(1e200), steps=3, observe=lambda y: jnp.ones(2))
    assert not bool(path.ok)
    np.testing.assert_array_equal(path.ys, 1)


def test_other_numbers_compile_nothing():
    train(quadratic, np.ones(2), SGD, steps=4, time_step=0.1)
    train(loss, PARAMS, SGD, steps=4, batches=np.ones(4))
    with count_compilations() as names:
        train(quadratic, np.array([3.0, 4.0]), SGD, steps=4, time_step=0.2)
        train(loss, {"w": np.zeros(2), "b": np.ones(())}, SGD, steps=4, batches=np.zeros(4))
    assert names == []


def test_python_numbers_are_parameters_too():
    bowl = lambda y: y**2  # noqa: E731
    assert train(bowl, 1.0, SGD, steps=1)[1].ys.tolist() == [1.0, 0.8]
    with count_compilations() as names:
        assert train(bowl, 2.0, SGD, steps=1)[1].ys.tolist() == [2.0, 1.6]
    assert names == []


def test_the_data_of_a_partial_loss_compile_nothing():
    def distance(data, y):
        return jnp.sum((y - data) ** 2)

    for target, compiled in ((np.zeros(2), ["jit(_train)"]), (np.ones(2), [])):
        with count_compilations() as names:
            params, _ = train(jax.tree_util.Partial(distance, target), np.ones(2), SGD, steps=1)
        assert names == compiled
        np.testing.assert_allclose(params, 1 - 0.2 * (1 - target), rtol=1e-15)


def test_float32_is_kept():
    params, path = train(quadratic, np.ones(2, np.float32), ADAM, steps=2, time_step=0.1)
    assert params.dtype == path.ys.dtype == path.ts.dtype == jnp.float32


def test_a_flax_module_trains():
    graph, state = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
    x = jnp.eye(2)

    def fit(state):
        return jnp.mean((nnx.merge(graph, state)(x) - 1) ** 2)

    trained, path = train(fit, state, optax.sgd(0.5), steps=200, observe=fit, every=100)
    assert bool(path.ok)
    assert path.ys[-1] < 1e-12 < path.ys[0]
    np.testing.assert_allclose(nnx.merge(graph, trained)(x), 1, atol=1e-6)


OPTIMIZERS = {
    "line search": (optax.lbfgs(), ("value", "grad", "value_fn")),
    "schedule by the loss": (
        optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5)),
        ("value",),
    ),
    "gradients of several steps": (optax.MultiSteps(optax.adam(0.1), 3), ()),
    "takes no more": (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01)), ()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_handed_what_they_look_at(name):
    """In 32-bit, though some of these begin from numbers of JAX's default dtype."""
    optimizer, takes = OPTIMIZERS[name]
    batches = np.linspace(-1, 1, 7, dtype=np.float32)
    params = jax.tree.map(np.float32, PARAMS)

    @jax.jit
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        offered = {"value": value, "grad": gradient, "value_fn": partial(loss, batch=batch)}
        taken = {name: offered[name] for name in takes}
        updates, state = optimizer.update(gradient, state, params, **taken)
        return optax.apply_updates(params, updates), state

    last, path = train(loss, params, optimizer, steps=7, batches=batches)
    chunks, _ = train_in_chunks(loss, params, optimizer, steps=7, chunk=7, batches=batches)
    assert bool(path.ok)
    assert_trees_equal(chunks, last)
    state = optimizer.init(params)
    for batch in batches:
        params, state = step(params, state, batch)
    for name, leaf in last.items():
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, params[name], rtol=2e-5, err_msg=name)


def test_a_network_of_equinox_keeps_its_functions():
    model, x = eqx.nn.MLP(2, 1, 3, 1, activation=jnp.tanh, key=KEY), jnp.eye(2)
    arrays, held = eqx.partition(model, eqx.is_inexact_array)

    def fit(model):
        return jnp.mean((jax.vmap(model)(x) - 1) ** 2)

    trained, path = train(fit, model, SGD, steps=4, observe=fit)
    _, by_hand = train(lambda arrays: fit(eqx.combine(arrays, held)), arrays, SGD, steps=4)
    chunked, records = train_in_chunks(fit, model, SGD, steps=4, chunk=2)
    np.testing.assert_array_equal(fit(trained), path.ys[-1])
    assert_trees_equal(records.ys, by_hand.ys)
    assert_trees_equal(eqx.filter(chunked, eqx.is_array), eqx.filter(trained, eqx.is_array))
    with count_compilations() as names:
        train(
            fit, eqx.nn.MLP(2, 1, 3, 1, activation=jnp.tanh, key=jax.random.key(0)), SGD, steps=4, observe=fit
        )
    assert "jit(_train)" not in names
    _, lanes = Descent(0.4, 2, (1, 2)).train(fit, model, fit)
    np.testing.assert_allclose(
        lanes.ys[0, 1], train(fit, model, optax.sgd(0.2), steps=1, observe=fit)[1].ys[1]
    )


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(2, 1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.dropout(self.linear(x), rngs=rngs)


def test_dropout_draws_anew_at_each_step_or_is_refused():
    model, x = Dropping(nnx.Rngs(0)), jnp.ones((4, 2))
    graph, state = nnx.split(model)
    with pytest.raises(
        ValueError, match=r"^params must be floating arrays, got .* nnx\.split\(model, nnx\.Param,"
    ):
        train(lambda state: jnp.sum(nnx.merge(graph, state)(x)), state, SGD, steps=1)

    predict, params = as_function(model)
    for call in (predict, jax.jit(predict)):
        with pytest.raises(
            ValueError, match=r"^model must draw no random numbers, .* call model\.eval\(\), or"
        ):
            call(params, x)
    predict, params = as_function(nnx.view(model, deterministic=True))
    np.testing.assert_array_equal(predict(params, x), model.linear(x))

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def outputs(params, key):
        return jnp.sum(nnx.merge(graph, params, rest)(x, rngs=nnx.Rngs(dropout=key)))

    _, path = train(outputs, params, SGD, steps=5, batches=lambda key: key, key=KEY)
    steps = np.diff(
        path.ys["linear"]["bias"][...][:, 0]
    )  # -0.1 for each output, twice for those that are kept
    np.testing.assert_allclose(steps / -0.2, np.round(steps / -0.2), atol=1e-6)
    assert len(set(np.round(steps / -0.2))) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, r"^steps must be an integer >= 0, got -1$"),
        ({"every": 0}, r"^every must be an integer >= 1, got 0$"),
        ({"batches": draw}, r"^key must be given where batches is a function of a key$"),
        ({"batches": np.ones(5)}, r"^batches must have a leading axis of length steps = 4, got \{\(5,\)\}$"),
        ({"batches": (np.ones(4), 1.0)}, r"^batches must have a leading axis of length steps = 4, got"),
        ({"params": {}}, r"^params must be floating arrays, got none$"),
        ({"params": {"n": np.arange(2)}}, r"^params must be floating arrays, got int64 at \['n'\]: what is"),
        (
            {"params": (1.0, "relu")},
            r"^params must be floating arrays, got str at \[1\]: .* eqx\.partition\(",
        ),
        ({"params": jnp.tanh}, r"^params must be floating arrays, got none$"),
        ({"time_step": [0.1, 0.2]}, r"^time_step must be a positive number, got \["),
    ],
)
@pytest.mark.parametrize("driver", [train, train_in_chunks])
def test_bad_input_is_named(driver, change, message):
    arguments = {"params": PARAMS, "steps": 4, **change}
    if driver is train_in_chunks:
        arguments["chunk"] = 2
    with pytest.raises(ValueError, match=message):
        driver(loss, arguments.pop("params"), SGD, **arguments)


@pytest.mark.parametrize(("chunk", "every"), [(0, 1), (3, 2)])
def test_a_bad_chunk_is_named(chunk, every):
    with pytest.raises(
        ValueError, match=f"^chunk must be a positive multiple of every = {every}, got {chunk}"
    ):
        train_in_chunks(loss, PARAMS, SGD, steps=4, chunk=chunk, every=every)


RUN = {"steps": 11, "every": 2, "observe": energy, "time_step": 0.1}
BATCHES = {"arrays": {"batches": np.linspace(-1, 1, 11)}, "keyed": {"batches": draw, "key": KEY}}


@pytest.mark.parametrize("kind", BATCHES)
def test_chunks_and_resume_change_no_bit(kind, tmp_path):
    class Crash(Exception):
        pass

    def crash(done, steps):
        if done == 8:
            raise Crash

    whole = train(loss, PARAMS, ADAM, **RUN, **BATCHES[kind])
    chunks = {**RUN, **BATCHES[kind], "chunk": 4}
    done = []
    with count_compilations() as names:
        assert_trees_equal(train_in_chunks(loss, PARAMS, ADAM, **chunks), whole)
    assert names.count("jit(_advance)") == 2  # whole chunks, and the last three steps

    with pytest.raises(Crash):
        train_in_chunks(loss, PARAMS, ADAM, **chunks, checkpoints=tmp_path, progress=crash)
    for expected in ([(11, 11)], []):  # goes on, then finds nothing left to do
        done.clear()
        resumed = train_in_chunks(
            loss, PARAMS, ADAM, **chunks, checkpoints=tmp_path, progress=lambda *now: done.append(now)
        )
        assert done == expected
        assert_trees_equal(resumed, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11", "8"]


def damped(by):
    """A loss that is made anew at every call, with a number and an array inside."""
    scale = jnp.array([by, 1.0])
    return lambda params, batch=0.0: loss(params, batch) + by * jnp.sum(scale * params["w"] ** 2)


RUN_OF_NUMBERS = {"steps": 4, "chunk": 2, "batches": draw}


def go_on(folder, loss=None, params=PARAMS, optimizer=None, **changed):
    """A short run with functions made anew, and how many chunks of it had to be computed."""
    done = []
    result = train_in_chunks(
        damped(0.5) if loss is None else loss,
        params,
        optax.adam(0.1) if optimizer is None else optimizer,
        **{"observe": lambda params: energy(params), "key": KEY, **RUN_OF_NUMBERS, **changed},
        checkpoints=folder,
        progress=lambda *now: done.append(now),
    )
    return result, len(done)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has finished, and what it returned."""
    folder = tmp_path_factory.mktemp("run")
    return folder, go_on(folder)[0]


SAME_SHAPES = {
    "learning rate": ({"optimizer": optax.adam(0.2)}, "the loss or the optimizer"),
    "number in the loss": ({"loss": damped(0.25)}, "the loss or the optimizer"),
    "array in the loss": (
        {"loss": (lambda two: lambda params, batch: jnp.sum(two * params["w"]) + params["b"])(jnp.ones(2))},
        "the loss or the optimizer",
    ),
    "injected rate": (
        {"optimizer": optax.inject_hyperparams(optax.adam)(0.1)},
        "the loss or the optimizer, the optimizer's state",
    ),
    "observed": ({"observe": lambda params: {**energy(params), "b": -params["b"]}}, "what is observed"),
    "start": ({"params": {**PARAMS, "b": np.array(0.25)}}, "the start"),
    "names": (
        {"loss": lambda p, _: p["c"] + p["w"].sum(), "params": {"w": np.ones(2), "c": 1.0}, "observe": None},
        "the loss or the optimizer, what is observed, the start, the optimizer's state",
    ),
    "key": ({"key": jax.random.key(4)}, "the key"),
    "kind of key": ({"key": jax.random.key(3, impl="rbg")}, "the data, the key"),
    "draws": ({"batches": lambda key: 2 * draw(key)}, "the data"),
    "data": ({"batches": np.zeros(4)}, "the data, the key"),
    "more steps": ({"steps": 6}, r"steps \(4 there, 6 here\)"),
    "records": ({"every": 2}, r"every \(1 there, 2 here\)"),
}


@pytest.mark.parametrize("case", SAME_SHAPES)
def test_another_run_of_the_same_shapes_is_refused_by_what_differs(case, finished):
    change, words = SAME_SHAPES[case]
    with pytest.raises(ValueError, match=rf"^checkpoints must be .* differs in {words}: \S+$"):
        go_on(finished[0], **change)


def test_data_that_a_loss_carries_are_told_from_the_loss(tmp_path):
    def distance(data, params, batch):
        return jnp.sum((params["w"] - data) ** 2) + params["b"] * batch

    go_on(tmp_path, loss=jax.tree_util.Partial(distance, np.zeros(2)))
    with pytest.raises(ValueError, match="differs in the data: "):
        go_on(tmp_path, loss=jax.tree_util.Partial(distance, np.ones(2)))


def test_equal_functions_made_anew_go_on_with_any_chunk(finished):
    folder, expected = finished
    again, chunks = go_on(folder, chunk=3)
    assert chunks == 0
    assert_trees_equal(again, expected)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, tmp_path):
    folder, expected = finished
    fell_back = 0
    for name in [path.relative_to(folder) for path in (folder / "4").rglob("*") if path.stat().st_size]:
        if (folder / name).is_dir():
            continue
        copy = shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)
        flip(copy / name)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result, chunks = go_on(copy)
        told = [str(one.message) for one in told if one.category is RuntimeWarning]
        assert len(told) == chunks <= 1
        if told:
            assert told[0].startswith(f"checkpoints in {copy} are damaged at step 4 (")
            assert told[0].endswith("); the run goes on from step 2")
        assert_trees_equal(result, expected)
        assert go_on(copy)[1] == 0  # what was damaged has been written again
        fell_back += chunks
        shutil.rmtree(copy)
    assert fell_back > 0


def test_another_version_of_jax_alone_is_no_other_run(tmp_path, monkeypatch):
    mine, other = (open_checkpoints(tmp_path, {"seed": seed}) for seed in (1, 2))
    mine.save(3, {"w": np.arange(2.0)})
    monkeypatch.setattr("models.checkpoints.version", lambda _: "0.1")
    found: Any = mine.newest({"w": np.zeros(2)})
    assert found["w"].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"differs in seed \(1 there, 2 here\), jax \(.* there, 0\.1 here\)"):
        other.newest({"w": np.zeros(2)})


def test_arrays_of_equal_bytes_have_hashes_of_their_own():
    same = [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((3, 2), int), {"a": np.zeros((3, 2))}]
    assert len({hash_arrays(tree) for tree in same}) == 4


def test_no_whole_checkpoint_is_an_error_of_one_line(finished, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(copy / "4" / "state")
    (copy / "2" / "state" / "_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=r"^checkpoints must hold one that is whole, or none, got") as error:
        go_on(copy)
    assert "\n" not in str(error.value)


def test_checkpoints_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "folder"):
        with pytest.raises(OSError, match="file"):
            train_in_chunks(loss, PARAMS, SGD, **RUN, chunk=4, checkpoints=folder)


def test_learning_rates_end_together_and_close_in_on_the_flow():
    y0, substeps = np.array([1.0, -2.0]), (4, 16, 64)
    descent = Descent(horizon=2.0, points=4, substeps=substeps)
    rates, path = descent.train(quadratic, y0)
    np.testing.assert_allclose(rates, 0.5 / np.array(substeps), rtol=1e-15)
    np.testing.assert_array_equal(rates, descent.rates)
    np.testing.assert_array_equal(descent.times, np.linspace(0, 2, 5))
    np.testing.assert_allclose(path.ts, np.tile(descent.times, (3, 1)), rtol=1e-14)
    assert path.ok.all()
    _, alone = train(quadratic, y0, optax.sgd(float(rates[1])), steps=64, every=16)
    np.testing.assert_allclose(path.ys[1], alone.ys, rtol=1e-13)

    values, vectors = np.linalg.eigh(A)
    for factor, least, most in ((1.0, 0.95, 1.05), (1.1, -0.5, 0.5)):
        decay = np.exp(-factor * values[None, :] * np.linspace(0, 2, 5)[:, None])
        flow = (decay * (vectors.T @ y0)[None, :]) @ vectors.T
        gaps = np.max(np.abs(path.ys - flow[None]), axis=(1, 2))
        assert least < convergence_order(rates, gaps).slope < most


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_descent_stands_still_after_its_steps(momentum):
    y0 = np.array([1.0, -2.0])
    _, path = train(quadratic, y0, sgd_until(0.1, 3, momentum), steps=5)
    _, free = train(quadratic, y0, optax.sgd(0.1, momentum), steps=3)
    np.testing.assert_allclose(path.ys[:4], free.ys, rtol=1e-14)
    np.testing.assert_array_equal(path.ys[3:], np.tile(path.ys[3], (3, 1)))


def test_a_diverging_rate_fails_alone():
    _, path = Descent(100.0, 10, (1, 100)).train(lambda y: y**4, 1.0)
    assert path.ok.tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"substeps": ()}, r"^substeps must be positive integers, at least two, got \(\)$"),
        ({"substeps": (0, 4)}, r"^substeps must be positive integers, at least two, got \(0, 4\)$"),
        ({"points": 0}, r"^points must be a positive integer, got 0$"),
        ({"horizon": -1.0}, r"^horizon must be positive and finite, got -1\.0$"),
        ({"horizon": np.inf}, r"^horizon must be positive and finite, got inf$"),
    ],
)
def test_bad_rates_are_named(change, message):
    arguments = {"substeps": (1, 2), "horizon": 1.0, "points": 2, **change}
    with pytest.raises(ValueError, match=message):
        Descent(**arguments)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_other_horizons_and_rates_compile_nothing(preconditioned):
    precondition = optax.trace(0.5) if preconditioned else None
    Descent(2.0, 4, (1, 2)).train(quadratic, np.ones(2), precondition=precondition)
    with count_compilations() as names:
        for horizon, substeps in ((2.0, (1, 2)), (3.0, (1, 2)), (2.0, (4, 5))):
            rates, path = Descent(horizon, 4, substeps).train(
                quadratic, np.zeros(2), precondition=precondition
            )
            assert rates.tolist() == [horizon / (4 * count) for count in substeps]
            assert path.ok.tolist() == [True, True]
    assert names == []


def test_lanes_with_a_preconditioner_that_remembers_equal_runs_alone():
    momentum = optax.trace(0.5)
    rates, path = Descent(2.0, 4, (3, 10)).train(loss, PARAMS, energy, momentum)
    for lane, count in enumerate((3, 10)):
        optimizer = optax.chain(momentum, optax.sgd(float(rates[lane])))
        _, alone = train(loss, PARAMS, optimizer, steps=4 * count, every=count, observe=energy)
        for name, record in alone.ys.items():
            np.testing.assert_allclose(path.ys[name][lane], record, rtol=1e-12)


def test_memory_is_that_of_the_records_whatever_the_steps():
    records = 2 * 11 * 2 * 8  # lanes, times, parameters, bytes of a number
    for count in (2, 100_000):
        descent = Descent(1.0, 10, (1, count))
        lowered = jax.jit(lambda y0, descent=descent: descent.train(quadratic, y0)[1].ys).lower(jnp.ones(2))
        memory = lowered.compile().memory_analysis()
        assert records <= memory.temp_size_in_bytes + memory.output_size_in_bytes < 6 * records


def test_a_descent_is_a_static_argument():
    run = jax.jit(lambda y0, descent: descent.train(quadratic, y0), static_argnums=1)
    rates, path = run(jnp.ones(2), Descent(2.0, 4, (1, 2)))
    again, same = Descent(2.0, 4, (1, 2)).train(quadratic, np.ones(2))
    assert_trees_equal((rates, path.ts), (again, same.ts))
    np.testing.assert_allclose(path.ys, same.ys, rtol=1e-14)


@pytest.mark.parametrize(("axis", "converges"), [(1 / (1 - 0.5), True), (1.0, False)])
def test_heavy_ball_follows_the_flow_at_the_longer_time_step(axis, converges):
    rates, decay, momentum, horizon = (0.1, 0.02, 0.004), jnp.array([0.5, 1.0]), 0.5, 4.0
    gaps = []
    for rate in rates:
        steps = round(horizon * (1 - momentum) / rate)
        _, path = train(
            lambda y: 0.5 * jnp.sum(decay * y**2),
            jnp.ones(2),
            optax.sgd(rate, momentum=momentum),
            steps=steps,
            every=steps // 5,
            time_step=axis * rate,
        )
        gaps.append(np.max(np.abs(path.ys - np.exp(-path.ts[:, None] * decay[None, :]))))
    order = convergence_order(rates, gaps).slope
    assert (order == pytest.approx(1.0, abs=0.1)) if converges else order < 0.2


@pytest.mark.parametrize(
    ("backend", "count", "at_once", "loops"),
    [("cpu", 16, 16, 0), ("cpu", 40, 16, 1), ("cpu", 17, 16, 1), ("cpu", 2, 1, 1), ("gpu", 40, 1, 0)],
)
def test_lanes_are_one_vmap_or_batches_compiled_once(backend, count, at_once, loops, monkeypatch):
    traced = []

    def run(lane):
        traced.append(lane)
        return {"y": jnp.tanh(lane["x"] @ A), "key": jax.random.normal(lane["key"])}

    x = np.random.default_rng(0).normal(size=(count, 3, 2))
    lanes = {"x": x, "key": jax.random.split(KEY, count)}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    text = str(jax.make_jaxpr(lambda lanes: map_lanes(run, lanes, at_once))(lanes))
    assert len(traced) == 1
    assert text.count("scan[") == loops
    found, expected = map_lanes(run, lanes, at_once), jax.vmap(run)(lanes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), found, expected)


@pytest.mark.parametrize("lanes", [{}, {"x": np.ones(())}, (np.ones(2), np.ones(3))])
def test_lanes_that_do_not_fit_are_named(lanes):
    with pytest.raises(
        ValueError, match=r"^lanes must be arrays with one leading axis of lanes, got lengths"
    ):
        map_lanes(lambda lane: lane, lanes)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_cross_entropy_of_half_precision_is_computed_in_float32(dtype):
    logits = jnp.array([[3.0, 1.0, -2.0]] * 1000, dtype)
    value = cross_entropy(logits, (lambda params, _: params, None, np.ones(1000, int)))
    exact = np.log(np.sum(np.exp([3.0, 1.0, -2.0]))) - 1
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train(lambda p: jnp.abs(p) ** 2, 1j, optax.sgd(0.1), steps=2), "^params must be floating"),
        (
            lambda: train(jnp.square, 1.0, optax.sgd(0.1), steps=2, time_step=np.nan),
            "^time_step must be a po",
        ),
        (lambda: train(jnp.square, 1.0, optax.sgd(0.1), steps=2, time_step=-1.0), "^time_step must be a po"),
        (lambda: sgd_until(-0.1, 3), "^learning_rate must be a finite number >= 0"),
        (lambda: sgd_until(0.1, np.nan), "^steps must be a finite number >= 0"),
    ],
)
def test_numbers_of_a_run_are_looked_at(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "notes").write_text("mine")
    for _ in range(2):
        train_in_chunks(jnp.square, 1.0, optax.sgd(0.1), steps=6, chunk=2, checkpoints=tmp_path)
    assert (tmp_path / "2024" / "notes").read_text() == "mine"


def test_lanes_at_once_and_samples_are_looked_at():
    with pytest.raises(ValueError, match=r"^at_once must be a positive integer, got 0$"):
        map_lanes(lambda lane: lane, jnp.arange(4.0), 0)
    for loss, name in ((mean_squared_error, "targets"), (upstream_product, "gradients")):
        with pytest.raises(
            ValueError, match=rf"^{name} and the outputs of params must have shape \(N, \.\.\.\)"
        ):
            loss(2.0, (lambda params, x: params * x, 1.0, 1.0))
