"""Flax modules as pure functions of their trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree


class Frozen(nnx.Variable):
    """A variable of a model that is not trained."""


def as_function(model: nnx.Module) -> tuple[Callable[[PyTree, Any], Any], PyTree]:
    """A model as a pure function `predict(params, inputs)` and its trained parameters.

    The function is a pytree that carries the frozen variables: another model of the same structure gives
    an equal function, which compiles nothing anew where it is passed to `eqx.filter_jit`.

    Raises:
        ValueError: the model draws random numbers when it is called (`nnx.Dropout`): the same ones at each
            call, since their state is frozen too.

    Example:
        >>> from models.attention import PromptAttention
        >>> predict, params = as_function(PromptAttention([0.0], [1.0], train_value=False))
        >>> float(predict(params, [[2.0], [4.0]])), [leaf.shape for leaf in jax.tree.leaves(params)]
        (3.0, [(1,)])
    """
    structure, params, frozen = nnx.split(model, nnx.Param, ...)
    return jax.tree_util.Partial(_predict, structure, frozen), params


def _predict(structure, frozen, params, inputs):
    model = nnx.merge(structure, params, frozen, copy=True)  # a call that draws numbers changes it
    counts = _counts(model)
    outputs = model(inputs)
    if any(before is not after for before, after in zip(counts, _counts(model), strict=True)):
        raise ValueError(
            "model must draw no random numbers, which would be the same ones at each call: "
            "call model.eval(), or train nnx.split(model, nnx.Param, ...) with keys drawn by batches"
        )
    return outputs


def _counts(model: nnx.Module) -> list[Any]:
    """How many random numbers were drawn, as the very objects that a draw replaces."""
    return jax.tree.leaves(nnx.state(model, nnx.RngCount))
