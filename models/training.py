"""Training: gradient descent on a loss as one compiled scan, observed along the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from dynamics.arguments import nan_unless, require_number, require_positive, require_sizes
from dynamics.flow import ArrayLike, Trajectory, all_finite, is_traced
from models.checkpoints import hash_arrays, hash_program, open_checkpoints

Observe = Callable[[Any], Any]


class TrainState(NamedTuple):
    """All that a run needs to go on: parameters, optimizer state and the number of steps taken."""

    params: PyTree
    optimizer_state: PyTree
    step: Array


def _identity(params: PyTree) -> PyTree:
    return params


def train(
    loss: Callable[..., Array],
    params: PyTree,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    steps: int,
    observe: Observe | None = None,
    every: int = 1,
    batches: PyTree | Callable[[Array], Any] | None = None,
    key: Array | None = None,
    time_step: ArrayLike = 1.0,
) -> tuple[PyTree, Trajectory]:
    """Minimize a loss with an Optax optimizer: `steps` updates with `jax.grad(loss)`, in one scan.

    The functions (`loss`, `optimizer`, `observe`, a `batches` function) are static: a second call with
    the same objects compiles nothing. To sweep a hyperparameter, build the optimizer inside a traced
    function: `jax.vmap(lambda lr: train(loss, params, optax.sgd(lr), steps=100))(rates)`. To change
    data without compiling, pass the loss as `jax.tree_util.Partial(loss, data)`.

    Args:
        loss: scalar `loss(params)`, or `loss(params, batch)` where `batches` is given.
        params: parameters, any pytree of floating arrays. Functions among its leaves, such as the activations
            of an `eqx.nn.MLP`, are held: `loss` and `observe` see them, what is recorded has None there.
        optimizer: an Optax gradient transformation. It is handed `value`, `grad` and `value_fn`, which
            line searches (`optax.lbfgs`) and schedules by the loss (`reduce_on_plateau`) look at.
        steps: number of updates, at least 0.
        observe: function of the parameters whose value is recorded; the parameters themselves where None.
        every: steps between two records.
        batches: a pytree whose leaves have a leading axis of length `steps`, or a function of a key.
        key: PRNG key for a `batches` function; step k draws from `fold_in(key, k)`.
        time_step: time that one step stands for: the learning rate for gradient descent,
            learning_rate / (1 - momentum) with heavy-ball momentum.

    Returns:
        The last parameters, and the `Trajectory` of `observe(params)` at steps 0, every, 2 every, ...,
        the last step always included, with times `time_step * step`. `ok` says that everything recorded
        and the last parameters are finite.

    Raises:
        ValueError: an argument is out of range, or `batches` and `key` do not go together.

    Example:
        >>> params, path = train(lambda p: p**2, jnp.array(1.0), optax.sgd(0.25), steps=2)
        >>> path.ys.tolist()
        [1.0, 0.5, 0.25]
    """
    params, held = _require_params(params)
    optimizer = _require_run(optimizer, steps, every, batches, key)
    time_step = require_positive("time_step", time_step, jnp.result_type(float))
    steps, every = int(steps), int(every)
    observe = _identity if observe is None else _of_whole(observe, held)
    last, ys, ok = _train(_of_whole(loss, held), params, optimizer, steps, observe, every, batches, key)
    ts = _times(record_steps(steps, every), time_step, params)
    return eqx.combine(last, held), Trajectory(ts, ys, ok & all_finite(ts))


def _require_run(optimizer, steps, every, batches, key) -> optax.GradientTransformation:
    """Check what the two drivers share; return the optimizer as a transformation."""
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"optimizer must be an Optax transformation such as optax.sgd(0.1), got {optimizer!r}"
        )
    if not isinstance(steps, (int, np.integer)) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    if not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"every must be an integer >= 1, got {every!r}")
    if callable(batches) and key is None:
        raise ValueError("key must be given where batches is a function of a key")
    if batches is not None and not callable(batches):
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
        if lengths != {(steps,)}:
            raise ValueError(f"batches must have a leading axis of length steps = {steps}, got {lengths}")
    return optimizer


def _require_params(params: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters as arrays, and the functions among them, each with None for the others."""
    held, numbers = eqx.partition(params, callable)

    def as_parameter(path, leaf):
        try:
            array = jnp.asarray(leaf)
        except (TypeError, ValueError):
            array = None
        if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
            kind = type(leaf).__name__ if array is None else array.dtype
            raise ValueError(
                f"params must be floating arrays, got {kind} at {jax.tree_util.keystr(path) or 'the top'}: "
                "what is not trained is split off and put back within the loss, for instance by "
                "eqx.partition(model, eqx.is_inexact_array) or nnx.split(model, nnx.Param, ...)"
            )
        return array

    arrays = jax.tree_util.tree_map_with_path(as_parameter, numbers)
    if not jax.tree.leaves(arrays):
        raise ValueError("params must be floating arrays, got none")
    return arrays, held


def _of_whole(function: Callable[..., Any], held: PyTree) -> Callable[..., Any]:
    """The function of the parameters together with what is held, as one of the parameters alone."""
    return jax.tree_util.Partial(_put_back, function, held) if jax.tree.leaves(held) else function


def _put_back(function, held, params, *batch):
    return function(eqx.combine(params, held), *batch)


@eqx.filter_jit
def _train(loss, params, optimizer, steps, observe, every, batches, key):
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], observe(params))
    state, rest = _advance(state, loss, optimizer, steps, observe, every, batches, key)
    ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)
    return state.params, ys, all_finite(ys) & all_finite(state.params)


def record_steps(steps: int, every: int) -> np.ndarray:
    """The steps at which `train` records: 0, every, 2 every, ..., and the last one."""
    marks = np.arange(0, steps + 1, every)
    return marks if marks[-1] == steps else np.append(marks, steps)


def _times(marks: np.ndarray | Array, time_step: ArrayLike, params: PyTree) -> Array:
    """Times of the records, in the parameters' precision but in no less than 32-bit."""
    precision = jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).dtype
    dtype = jnp.float32 if jnp.finfo(precision).bits < 32 else precision
    if is_traced(time_step):
        return jnp.asarray(marks, dtype) * jnp.asarray(time_step).astype(dtype)
    return jnp.asarray(marks * float(np.asarray(time_step)), dtype)


def _update(state, loss, optimizer, batch):
    """The state after one update; `batch` holds what the loss takes after the parameters."""
    params, optimizer_state = _descend(state.params, state.optimizer_state, loss, optimizer, batch)
    return TrainState(params, optimizer_state, state.step + 1)


def _descend(params, optimizer_state, loss, optimizer, batch=()):
    def value_fn(params):
        return loss(params, *batch)

    def in_the_dtype_of(old, new):
        # Some transformations start from JAX's default float, whatever the dtype of the parameters.
        same = jnp.result_type(old) == jnp.result_type(new)
        return new if same else jnp.asarray(new).astype(jnp.result_type(old))

    value, gradient = jax.value_and_grad(value_fn)(params)
    offered = {"value": value, "grad": gradient, "value_fn": value_fn}
    # Some that say they take any more arguments take none, such as optax.contrib.sam: what is taken counts.
    taken = inspect.signature(optimizer.update).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        offered = {name: more for name, more in offered.items() if name in taken}
    updates, moved = optimizer.update(gradient, optimizer_state, params, **offered)
    return optax.apply_updates(params, updates), jax.tree.map(in_the_dtype_of, optimizer_state, moved)


def _advance(state, loss, optimizer, steps, observe, every, batches, key):
    """Take `steps` updates; return the new state and what was observed after every `every` and at the end."""

    def update(state, batch):
        if callable(batches):
            batch = batches(jax.random.fold_in(key, state.step))
        return _update(state, loss, optimizer, () if batches is None else (batch,)), None

    def updates_then_record(state, batches_here, count):
        state, _ = jax.lax.scan(update, state, batches_here, length=count)
        return state, observe(state.params)

    data = None if callable(batches) else batches
    whole, left = divmod(steps, every)
    blocks = jax.tree.map(lambda leaf: leaf[: whole * every].reshape(whole, every, *leaf.shape[1:]), data)
    state, observed = jax.lax.scan(
        lambda state, block: updates_then_record(state, block, every), state, blocks, length=whole
    )
    if left:
        tail = jax.tree.map(lambda leaf: leaf[whole * every :], data)
        state, last = updates_then_record(state, tail, left)
        observed = jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.asarray(b)[None]]), observed, last)
    return state, observed


_advance_compiled = eqx.filter_jit(_advance)


def train_in_chunks(
    loss: Callable[..., Array],
    params: PyTree,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    steps: int,
    chunk: int,
    observe: Observe | None = None,
    every: int = 1,
    batches: PyTree | Callable[[Array], Any] | None = None,
    key: Array | None = None,
    time_step: ArrayLike = 1.0,
    checkpoints: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PyTree, Trajectory]:
    """`train` for long runs: the same updates, `chunk` steps per compiled call, with progress and resume.

    Not itself traceable: it is a Python loop over one compiled program.

    Args:
        loss: as for `train`, like every argument that is not named here.
        params: initial parameters.
        optimizer: an Optax gradient transformation.
        steps: number of updates.
        chunk: steps per compiled call, a multiple of `every`.
        observe: what is recorded.
        every: steps between two records.
        batches: batches, or a function of a key.
        key: PRNG key for a `batches` function.
        time_step: time that one step stands for.
        checkpoints: folder of this run's checkpoints. After every chunk the whole state is saved there
            (the newest two are kept); a run that finds a checkpoint goes on from it and ends with the same
            numbers as one that was never interrupted. Who the run is, and a checksum, are in each: the
            programs of an update and of `observe` with the numbers in them, the parameters, `batches`, `key`,
            `steps` and `every`, but not `chunk`. Functions made anew are the same if they compute the same;
            what a callback to the host computes is not seen.
        progress: called as `progress(steps_done, steps)` after every chunk.

    Returns:
        What `train` returns.

    Raises:
        ValueError: an argument is out of range; the folder holds another run, or no checkpoint that is whole.
        OSError: the folder cannot be written.

    Warns:
        RuntimeWarning: the newest checkpoint is damaged, and the run goes on from the one before it.

    Example:
        >>> _, path = train_in_chunks(lambda p: p**2, jnp.array(1.0), optax.sgd(0.25), steps=4, chunk=2)
        >>> path.ys.tolist()
        [1.0, 0.5, 0.25, 0.125, 0.0625]
    """
    for name, value in (("params", params), ("batches", batches), ("time_step", time_step)):
        if is_traced(value):
            raise ValueError(
                f"{name} must be concrete, since chunks are run by the host; train can be traced"
            )
    params, held = _require_params(params)
    optimizer = _require_run(optimizer, steps, every, batches, key)
    time_step = require_positive("time_step", time_step, jnp.result_type(float))
    if not isinstance(chunk, (int, np.integer)) or chunk < 1 or chunk % every:
        raise ValueError(f"chunk must be a positive multiple of every = {every}, got {chunk!r}")
    steps, every, chunk = int(steps), int(every), int(chunk)
    loss, observe = _of_whole(loss, held), _identity if observe is None else _of_whole(observe, held)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    first = jax.tree.map(np.asarray, observe(params))
    marks = record_steps(steps, every)
    records = jax.tree.map(lambda leaf: np.zeros((marks.size, *leaf.shape), leaf.dtype), first)
    _write(records, 0, jax.tree.map(lambda leaf: leaf[None], first))

    store = None
    if checkpoints is not None:
        run = _who(loss, optimizer, observe, batches, key, state)
        store = open_checkpoints(checkpoints, {**run, "steps": steps, "every": every})
        state, records = store.newest((state, records)) or (state, records)
    while (done := int(state.step)) < steps:
        count = min(chunk, steps - done)
        here = batches
        if batches is not None and not callable(batches):
            here = jax.tree.map(lambda leaf, a=done, b=done + count: leaf[a:b], batches)
        state, observed = _advance_compiled(state, loss, optimizer, count, observe, every, here, key)
        _write(records, done // every + 1, observed)
        if store is not None:
            store.save(done + count, (state, records))
        if progress is not None:
            progress(done + count, steps)
    ys = jax.tree.map(jnp.asarray, records)
    ts = _times(marks, time_step, params)
    whole = eqx.combine(state.params, held)
    return whole, Trajectory(ts, ys, all_finite(ys) & all_finite(state.params) & all_finite(ts))


def _write(records: PyTree, start: int, observed: PyTree) -> None:
    def write(record, leaf):
        record[start : start + len(leaf)] = leaf

    jax.tree.map(write, records, observed)


def _who(loss, optimizer, observe, batches, key, state: TrainState) -> dict[str, str]:
    """Hashes of what makes a run what it is, by names for the error where another run differs."""

    def update(loss, state, *batch):
        return _update(state, loss, optimizer, batch)

    draw, batch = "", ()
    if callable(batches):
        draw, batch = hash_program(batches, key), (jax.eval_shape(batches, key),)
    elif batches is not None:
        batch = (jax.tree.map(_of_one_step, batches),)
    return {
        "the loss or the optimizer": hash_program(jax.tree_util.Partial(update, loss), state, *batch),
        "what is observed": hash_program(observe, state.params),
        "the start": hash_arrays(state.params),
        "the optimizer's state": hash_arrays(state.optimizer_state),
        "the data": hash_arrays((loss, observe, batches)) + draw,
        "the key": hash_arrays(key if callable(batches) else None),
    }


def _of_one_step(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of what one step gets of an array of batches."""
    return jax.ShapeDtypeStruct(np.shape(leaf)[1:], jnp.result_type(leaf))


def sgd_until(learning_rate: ArrayLike, steps: ArrayLike, momentum: float | None = None):
    """Gradient descent that stands still after `steps` steps, both of which may be traced.

    With it one compiled program trains lanes of different learning rates to the same time.
    """
    rate = require_number("learning_rate", learning_rate, jnp.result_type(float), at_least=0)
    last = require_number("steps", steps, jnp.result_type(float), at_least=0)
    # A comparison with NaN would let it stand still.
    return optax.sgd(lambda count: nan_unless(last >= 0, jnp.where(count < last, rate, 0)), momentum=momentum)


def scale_by_name(**scales: ArrayLike) -> optax.GradientTransformation:
    """Multiply the updates of each named parameter by a number, which may be traced.

    In front of an optimizer with learning rate 1 the numbers are learning rates of their own.

    Example:
        >>> transform = scale_by_name(a=2.0, b=3.0)
        >>> transform.update({"a": jnp.array(1.0), "b": jnp.array(1.0)}, transform.init({}))[0]["b"].tolist()
        3.0
    """
    numbers = {name: require_number(name, scale, jnp.result_type(float)) for name, scale in scales.items()}

    def scale(path, update):
        return numbers[path[0].key].astype(update.dtype) * update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


# Small networks that a CPU trains at once. Batches of 8 or 16 out of 64 to 128 took a quarter less time than
# one vmap, single lanes and batches of 4 or 32 gained less.
_LANES = 16


def map_lanes(f: Callable[[Any], Any], lanes: PyTree, at_once: int = _LANES) -> PyTree:
    """`jax.vmap(f)(lanes)`, in batches one after another where JAX runs on a CPU.

    For many seeds of a small network: a CPU computes them in less time so, an accelerator does not. Lanes
    whose loops differ in length wait for the longest one of their batch alone.

    Args:
        f: function of one lane, such as a run from one key.
        lanes: pytree whose leaves have one leading axis of lanes.
        at_once: the most lanes of a batch, whose number is a divisor of all, so that `f` is compiled once.

    Returns:
        What `f` returns, with the lanes in front.

    Raises:
        ValueError: `lanes` holds no array, or leading axes of several lengths; `at_once` is not a
            positive integer.

    Example:
        >>> map_lanes(lambda x: x**2, jnp.arange(40.0))[-1].item()
        1521.0
    """
    (at_once,) = require_sizes(at_once=at_once)
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(lanes)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"lanes must be arrays with one leading axis of lanes, got lengths {sorted(counts)}")
    ((count,),) = counts
    if jax.default_backend() != "cpu" or count <= at_once:
        return jax.vmap(f)(lanes)
    batch = max(size for size in range(1, at_once + 1) if count % size == 0)
    return jax.lax.map(f, lanes, batch_size=batch if batch > 1 else None)


_UNCHANGED = optax.identity()  # one object: a new one would be compiled anew


@dataclass(frozen=True)
class Descent:
    """Gradient descent at several learning rates to the same time, recorded at the same times.

    Lane i takes `substeps[i]` steps between two records, so that its learning rate is
    `horizon / (points * substeps[i])`: what `sims.compare.convergence_order` is fed with. It is hashable, and
    so may be a static argument of a compiled function.

    Raises:
        ValueError: `substeps`, `points` or `horizon` is not positive.

    Example:
        >>> descent = Descent(horizon=1.0, points=5, substeps=(1, 10))
        >>> descent.rates.tolist()
        [0.2, 0.02]
        >>> descent.train(lambda p: p**2, jnp.array(1.0))[1].ys.shape
        (2, 6)
    """

    horizon: float
    """Time at which all runs end."""
    points: int
    """Records along a run, the start not counted."""
    substeps: tuple[int, ...]
    """Steps between two records, one per learning rate: the rate is horizon / (points * substeps)."""

    def __post_init__(self):
        if len(self.substeps) < 2 or min(self.substeps) < 1:
            raise ValueError(f"substeps must be positive integers, at least two, got {self.substeps}")
        if self.points < 1:
            raise ValueError(f"points must be a positive integer, got {self.points}")
        if not 0 < self.horizon < np.inf:
            raise ValueError(f"horizon must be positive and finite, got {self.horizon}")

    @property
    def times(self) -> np.ndarray:
        """The times of the records, (points + 1,)."""
        return np.linspace(0.0, self.horizon, self.points + 1)

    @property
    def rates(self) -> np.ndarray:
        """The learning rates, (L,)."""
        return self.horizon / (self.points * np.asarray(self.substeps))

    def train(
        self,
        loss: Callable[..., Array],
        params: PyTree,
        observe: Observe | None = None,
        precondition: optax.GradientTransformation | None = None,
    ) -> tuple[Array, Trajectory]:
        """Train all lanes in one program, which other learning rates and horizons use again.

        What is kept while it runs are the records, not the steps. The loops have no fixed length, so that the
        result cannot be differentiated in reverse.

        Args:
            loss: scalar `loss(params)`.
            params: parameters, the same ones for every lane.
            observe: what is recorded; the parameters where None.
            precondition: transformation of the gradients in front of gradient descent, such as
                `scale_by_name`.

        Returns:
            The learning rates (L,) and a `Trajectory` with `ts` (L, points + 1) and leaves
            (L, points + 1, ...); `ok` (L,): the records and the last parameters of a lane are finite.
        """
        params, held = _require_params(params)
        rates = jnp.asarray(self.rates, jnp.result_type(*jax.tree.leaves(params)))
        loss, observe = _of_whole(loss, held), _identity if observe is None else _of_whole(observe, held)
        precondition = _UNCHANGED if precondition is None else precondition
        counts = jnp.asarray(self.substeps)
        return rates, _train_lanes(loss, params, counts, rates, self.points, observe, precondition)


@eqx.filter_jit
def _train_lanes(loss, params, counts, rates, points, observe, precondition):
    def lane(count, rate):
        optimizer = optax.chain(precondition, optax.sgd(rate))

        def update(_, carry):
            params, state = carry
            return _descend(params, state, loss, optimizer)

        def to_next_record(carry, _):
            carry = jax.lax.fori_loop(0, count, update, carry)
            return carry, observe(carry[0])

        (last, _), ys = jax.lax.scan(to_next_record, (params, optimizer.init(params)), length=points)
        ys = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), observe(params), ys)
        ts = _times(jnp.arange(points + 1) * count, rate, params)
        return Trajectory(ts, ys, all_finite(ys) & all_finite(last))

    # Side by side, lanes with fewer steps wait for the others: on a CPU that is work.
    return map_lanes(lambda one: lane(*one), (counts, rates), at_once=1)
