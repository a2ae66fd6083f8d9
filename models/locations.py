"""A network of two layers whose nodes see disjoint locations, and which tokens its nodes are close to."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynamics.arguments import ArrayLike, as_real, require_arrays, require_shapes
from dynamics.spectra import norm
from models.collapse import linear_layers


class LocalNet(nnx.Module):
    r"""Nodes on each of K disjoint locations, normalized over the batch, and a linear layer; without biases.

        f(x) = V N(h(W_1 x_1), ..., h(W_K x_K)),   N(z) = (z - mean z) / sqrt(var z + 1e-5)

    The mean and the variance of each node are those of the batch, and gradients pass through both.

    Source: tian2023nonlinear, Section 5; its public code can hold the variance in gradients besides.

    Args:
        filters: the nodes W to start from, (K, M, d).
        head: the linear layer V, (o, K M).
        activation: h, elementwise.
        normalized: whether N is there; else f(x) = V (h(W_1 x_1), ..., h(W_K x_K)).

    Raises:
        ValueError: the arrays do not fit each other or are not finite, or the inputs do not fit them.

    Example:
        >>> net = LocalNet([[[1.0]], [[1.0]]], [[1.0, 0.0]], nnx.relu, normalized=False)
        >>> net(jnp.array([[[2.0], [3.0]], [[-1.0], [5.0]]])).tolist()
        [[2.0], [0.0]]
    """

    def __init__(
        self,
        filters: ArrayLike,
        head: ArrayLike,
        activation: Callable[[Array], Array],
        normalized: bool = True,
    ):
        filters, head = require_arrays(filters=filters, head=head)
        require_shapes(filters=(filters, "K M d"), head=(head, "o n"))
        locations, count, _ = filters.shape
        nodes = locations * count
        if head.shape[1] != nodes:
            raise ValueError(f"head must have shape (o, {nodes}), as filters have nodes, got {head.shape}")
        self.filters = nnx.Einsum(
            "nkd,kmd->nkm",
            filters.shape,
            param_dtype=filters.dtype,
            kernel_init=lambda *_: filters,
            rngs=nnx.Rngs(0),
        )
        batch = nnx.BatchNorm(
            nodes,
            use_running_average=False,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,
            param_dtype=filters.dtype,
            rngs=nnx.Rngs(0),
        )
        # Its averages over batches, which are not used here, are float32 whatever its numbers are.
        batch.mean, batch.var = (
            nnx.BatchStat(stat[...].astype(filters.dtype)) for stat in (batch.mean, batch.var)
        )
        self.norm = batch if normalized else None
        (self.head,), self.activation = linear_layers([head]), activation

    def __call__(self, x: ArrayLike) -> Float[Array, "n o"]:
        """Outputs (n, o) of a batch of inputs (n, K, d), which are at least two where it is normalized."""
        inputs, (locations, _, d) = as_real("x", x), self.filters.kernel_shape
        if inputs.ndim != 3 or inputs.shape[1:] != (locations, d) or not len(inputs):
            raise ValueError(f"x must have shape (n, {locations}, {d}), got shape {inputs.shape}")
        if self.norm is not None and len(inputs) < 2:
            raise ValueError("x must hold at least 2 inputs, since one has no variance, got 1")
        hidden = self.activation(self.filters(inputs)).reshape(len(inputs), -1)
        return self.head(hidden if self.norm is None else self.norm(hidden))


def token_overlaps(filters: ArrayLike, *, signed: bool = True) -> Float[Array, "K d"]:
    r"""How close the closest node of a location is to each token, max_m w_{md} / |w_m|.

    Source: tian2023nonlinear, Section 5 and its public code.

    Args:
        filters: the nodes of each location, (K, M, d).
        signed: whether signs count; for linear nodes, which have none, max_m |w_{md}| / |w_m|.

    Returns:
        Cosines, (K, d); nodes that are zero are close to none.

    Raises:
        ValueError: the filters are no finite numbers of that shape.

    Example:
        >>> token_overlaps([[[2.0, 0.0], [0.0, -3.0]]]).tolist()
        [[1.0, 0.0]]
        >>> token_overlaps([[[2.0, 0.0], [0.0, -3.0]]], signed=False).tolist()
        [[1.0, 1.0]]
    """
    (filters,) = require_arrays(filters=filters)
    require_shapes(filters=(filters, "K M d"))
    norms = norm(filters, axis=2)[..., None]
    cosines = filters / jnp.where(norms == 0, 1, norms)  # a norm that is NaN stays so
    return jnp.max(cosines if signed else jnp.abs(cosines), axis=1)
