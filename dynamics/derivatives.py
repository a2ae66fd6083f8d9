"""What a derivative is where there is none: NaN, or an error in one line."""

from __future__ import annotations

from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree


def nan_derivatives(failed: Array, ys: PyTree, inputs: PyTree) -> PyTree:
    """The states of a solve, all of whose derivatives in the inputs are NaN where it failed.

    The derivatives of the states that were reached would be taken for the solution's, and those of the other
    states are zero, as if the solve had converged.
    """
    return _nan_derivatives(
        failed, ys, [leaf for leaf in jax.tree.leaves(inputs) if eqx.is_inexact_array(leaf)]
    )


@jax.custom_jvp
def _nan_derivatives(failed, ys, inputs):
    return ys


@_nan_derivatives.defjvp
def _(primals, tangents):
    (failed, ys, _), (_, ys_dot, inputs_dot) = primals, tangents
    moved = [jnp.sum(jnp.real(leaf)) for leaf in inputs_dot]
    return ys, jax.tree.map(
        # Zero times whatever the inputs do, where nothing failed; NaN times that, where it did.
        lambda leaf: (
            leaf
            + sum(
                move.astype(leaf.dtype) * jnp.where(failed, jnp.nan, 0).astype(leaf.dtype) for move in moved
            )
        ),
        ys_dot,
    )


def only_in_reverse(tree: PyTree, message: str) -> PyTree:
    """The pytree, whose numbers have derivatives in reverse mode only.

    A derivative in forward mode ends in a ValueError with the message, in a compiled program as well.

    Example:
        >>> square = lambda x: only_in_reverse(x, "no forward mode") ** 2
        >>> float(jax.grad(square)(3.0))
        6.0
        >>> try:
        ...     jax.jit(jax.jacfwd(square))(3.0)
        ... except ValueError as error:
        ...     print(error)
        no forward mode
    """
    numbers, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda x: _only_in_reverse_p.bind(x, message=message), numbers), rest)


def _refuse(*_: Any, message: str) -> NoReturn:
    raise ValueError(message)


# The identity of tangents: forward mode computes or batches it, and is refused; reverse mode transposes it.
_refuse_p = Primitive("refuse_forward_mode")
_refuse_p.def_abstract_eval(lambda tangent, *, message: tangent)
_refuse_p.def_impl(_refuse)
mlir.register_lowering(_refuse_p, _refuse)
batching.primitive_batchers[_refuse_p] = _refuse
ad.deflinear2(_refuse_p, lambda cotangent, _, **message: [cotangent])

# The identity of numbers, whose tangents pass through `_refuse_p`. A `custom_jvp` cannot do that: it has its
# tangents batched in reverse mode too.
_only_in_reverse_p = Primitive("only_in_reverse")
_only_in_reverse_p.def_abstract_eval(lambda x, *, message: x)
_only_in_reverse_p.def_impl(lambda x, *, message: x)
mlir.register_lowering(_only_in_reverse_p, lambda _, x, *, message: [x])
batching.defvectorized(_only_in_reverse_p)
ad.defjvp(_only_in_reverse_p, lambda tangent, _, **message: _refuse_p.bind(tangent, **message))
