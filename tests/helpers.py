"""Helpers shared by the tests."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """Collect the names of the programs that JAX compiles inside the block."""
    names: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("Compiling "):
                names.append(message.split()[1])

    logger = logging.getLogger("jax")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collect()], False
    try:
        with jax.log_compiles(True):
            yield names
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def assert_bad_lanes_are_nan(call: Callable[[Any], Any], good: Any, *bad: Any) -> None:
    """A bad traced value gives NaN in every array of its own lane, and no other lane is touched."""
    lanes = jnp.stack([jnp.asarray(value) for value in (good, *bad)])
    for leaf, alone in zip(
        jax.tree.leaves(jax.vmap(call)(lanes)), jax.tree.leaves(call(lanes[0])), strict=True
    ):
        np.testing.assert_allclose(leaf[0], alone, rtol=1e-6, atol=1e-9)
        assert not np.any(np.isnan(alone))
        assert np.all(np.any(np.isnan(leaf[1:]).reshape(len(bad), -1), axis=1)), leaf


# For matrices so tiny that what takes the time is compiling.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(compiled, static_argnums=0)
def advance(transform: Any, state: Any, gradients: Any) -> Any:
    """The state after all steps of an Optax transformation, and the updates of each."""

    def step(state, gradient):
        updates, state = transform.update(gradient, state)
        return state, updates

    return jax.lax.scan(step, state, gradients)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _descended(loss, shapes, args, keys):
    optimizer = optax.adam(optax.exponential_decay(0.05, 6000, 1e-5))

    def from_start(key):
        keys = jax.random.split(key, len(shapes))
        start = [0.7 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, args), state)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=6000)
        return loss(end, args)

    return jax.vmap(from_start)(keys)


def lowest(loss, shapes, args):
    """The lowest loss that Adam reaches from 64 starts, in one program for all arguments.

    Adam stops short by up to 1e-6; that the minimum is reached, the weights in closed form show.
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        return float(jnp.min(_descended(loss, tuple(shapes), args, jax.random.split(jax.random.key(1), 64))))
