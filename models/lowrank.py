"""Low-rank weights: LoRA, ReLoRA and W = A B, for any model that is a function of a pytree of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from dynamics.arguments import brief, require_number, require_sizes
from models.draws import normal

Predict = Callable[[PyTree, Any], Any]


class Factors(NamedTuple):
    """A matrix as a product A B, in the place of the array itself.

    Attributes:
        A: what inputs meet first, shape (..., m, r).
        B: shape (..., r, n).
    """

    A: Any
    B: Any


class LoraParams(NamedTuple):
    """Parameters of a model with low-rank adaptors.

    Attributes:
        trained: the model's parameters, with `Factors` in the place of every adapted matrix.
        frozen: the adapted matrices themselves, W_0, in their places in the same tree; None in all others.
    """

    trained: PyTree
    frozen: PyTree


class ReloraState(NamedTuple):
    """State of `relora`.

    Attributes:
        count: steps taken.
        inner: state of the optimizer of the trained parameters.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: Any


def lora_params(params: PyTree, rank: Any, key: Array) -> LoraParams:
    r"""Start of W_0 + A B with W_0 frozen: A Gaussian of variance 1 / m, B zero.

    W = W_0 + A B is (m, n) with m inputs, as Flax keeps kernels: the B A of the paper, transposed.

    Source: hu2022lora, section 4.1.

    Args:
        params: parameters of a model, a pytree of arrays.
        rank: r, at most min(m, n) of which is used, for every leaf of exactly two dimensions; or a function
            `(path, leaf)` that returns it, or None for a leaf that is trained as it is. A path is the
            keys joined with "/". Axes before the last two are batch axes.
        key: PRNG key.

    Returns:
        The parameters, of a model that computes what it did.

    Raises:
        ValueError: a rank is not a positive integer, a leaf with a rank is no matrix, or there is none.

    Example:
        >>> start = lora_params({"kernel": jnp.eye(3, 4), "bias": jnp.zeros(4)}, 2, jax.random.key(0))
        >>> start.trained["kernel"].A.shape, start.trained["kernel"].B.shape
        ((3, 2), (2, 4))
        >>> jax.tree.map(jnp.shape, start.frozen)
        {'bias': None, 'kernel': (3, 4)}
    """
    ranks = _ranks(params, rank)

    def zeros(leaf, r):
        if r is None:
            return leaf
        *batch, m, n = leaf.shape
        return Factors(jnp.zeros((*batch, m, r), leaf.dtype), jnp.zeros((*batch, r, n), leaf.dtype))

    frozen = jax.tree.map(lambda leaf, r: None if r is None else leaf, params, ranks)
    return LoraParams(_fresh(jax.tree.map(zeros, params, ranks), key), frozen)


def low_rank_params(params: PyTree, rank: Any) -> PyTree:
    r"""Start of W = A B at the best approximation of rank r: A = U sqrt(s), B = sqrt(s) V^T.

    Source: zhao2024galore, section 5.1 ("Low-Rank"), which does not say where it starts.

    Args:
        params: parameters of a model.
        rank: as for `lora_params`.

    Returns:
        The parameters, with `Factors` in the place of the chosen matrices.

    Raises:
        ValueError: as `lora_params`.

    Example:
        >>> factors = low_rank_params({"kernel": jnp.diag(jnp.array([4.0, 1.0]))}, 1)["kernel"]
        >>> (factors.A @ factors.B).tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """

    def start(leaf, r):
        if r is None:
            return leaf
        # In half precision there is no decomposition.
        exact = jnp.promote_types(leaf.dtype, jnp.float32)
        U, s, Vh = jnp.linalg.svd(leaf.astype(exact), full_matrices=False)
        root = jnp.sqrt(s[..., :r])
        A, B = U[..., :, :r] * root[..., None, :], root[..., :, None] * Vh[..., :r, :]
        return Factors(A.astype(leaf.dtype), B.astype(leaf.dtype))

    return jax.tree.map(start, params, _ranks(params, rank))


def merge(params: PyTree, scale: Any = 1.0) -> PyTree:
    r"""The dense parameters: W_0 + scale A B of `LoraParams`, A B of any other tree with `Factors`.

    Gradients do not pass into W_0.

    Args:
        params: `LoraParams`, or a tree with `Factors`.
        scale: factor of the adaptors, alpha / r in the paper; of `LoraParams` only.

    Returns:
        Parameters of the model itself; NaN where a traced `scale` is not finite.

    Raises:
        ValueError: `scale` is no finite number and can be looked at.

    Example:
        >>> merge({"kernel": Factors(jnp.ones((2, 1)), jnp.ones((1, 2)))})["kernel"].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    if not isinstance(params, LoraParams):
        return jax.tree.map(
            lambda node: node.A @ node.B if _is_factors(node) else node, params, is_leaf=_is_factors
        )

    def dense(node, W):
        return jax.lax.stop_gradient(W) + _adaptor(node, scale) if _is_factors(node) else node

    return jax.tree.map(dense, params.trained, params.frozen, is_leaf=_is_factors)


def on_factors(predict: Predict, scale: Any = 1.0) -> Partial:
    """A model's function, such as that of `as_function`, of `LoraParams` or of a tree with `Factors`.

    Example:
        >>> linear = lambda params, x: x @ params
        >>> on_factors(linear)(low_rank_params(jnp.eye(2), 2), jnp.array([[3.0, 4.0]])).round(6).tolist()
        [[3.0, 4.0]]
    """
    return Partial(_predict, Partial(predict), scale)


def _predict(predict, scale, params, inputs):
    return predict(merge(params, scale), inputs)


def on_trained(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of `LoraParams` that leaves W_0 as it is, and keeps no state for it.

    Example:
        >>> params = lora_params(jnp.eye(2), 1, jax.random.key(0))
        >>> optimizer = on_trained(optax.adam(0.1))
        >>> sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(params)))  # 2 (m r + r n), and a count
        9
    """

    def init(params):
        return optimizer.init(_require_lora(params).trained)

    def update(updates, state, params=None):
        trained = None if params is None else _require_lora(params).trained
        steps, state = optimizer.update(_require_lora(updates).trained, state, trained)
        return LoraParams(steps, jax.tree.map(jnp.zeros_like, updates.frozen)), state

    return optax.GradientTransformation(init, update)


def relora(
    optimizer: optax.GradientTransformation, restart_every: int, key: Array, *, scale: Any = 1.0
) -> optax.GradientTransformation:
    r"""LoRA with restarts: after every `restart_every` steps W_0 <- W_0 + scale A B, A is drawn anew, B = 0.

    Every restart lets the whole change of W grow by another rank r. At a restart whatever the optimizer keeps
    per entry of A and B is set to zero; its counts, and all it keeps for other parameters, go on. The paper
    drops 99 % of the moments; here it is all. With Adam the first step after a restart is
    (1 - b1) / sqrt(1 - b2) times the learning rate per entry, 3.2 by default, since its count goes on: the
    paper warms the learning rate up again after each, which a schedule of `optimizer` may do.

    Source: lialin2024relora, Algorithm 1.

    Args:
        optimizer: the optimizer of the trained parameters.
        restart_every: steps from one restart to the next.
        key: PRNG key of the new A; restart k draws from `fold_in(key, k)`.
        scale: factor of the adaptors, the same as in `on_factors`.

    Returns:
        An optimizer of `LoraParams`; its `update` needs the parameters.

    Raises:
        ValueError: `restart_every` is not a positive integer, `key` is no PRNG key, `scale` is no finite
            number, or parameters are missing or no `LoraParams`.

    Example:
        >>> params = lora_params(jnp.eye(2), 1, jax.random.key(0))
        >>> optimizer = relora(optax.sgd(0.1), 1, jax.random.key(1))
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).trained.B.tolist()
        [[0.0, 0.0]]
    """
    require_sizes(restart_every=restart_every)
    require_number("scale", scale, float)
    _require_key(key)

    def init(params):
        return ReloraState(jnp.zeros((), jnp.int32), optimizer.init(_require_lora(params).trained))

    def update(updates, state, params=None):
        params = _require_lora(params)
        steps, inner = optimizer.update(updates.trained, state.inner, params.trained)
        count: Any = optax.safe_increment(state.count)

        def restart():
            learned = LoraParams(optax.apply_updates(params.trained, steps), params.frozen)
            renewed = _restart(learned, jax.random.fold_in(key, count // restart_every), scale)
            # Adding the difference to the parameters gives the renewed ones, with B exactly zero.
            return jax.tree.map(jnp.subtract, renewed, params), _forget(optimizer, inner, params.trained)

        def go_on():
            return LoraParams(steps, jax.tree.map(jnp.zeros_like, params.frozen)), inner

        updates, inner = jax.lax.cond(count % restart_every == 0, restart, go_on)
        return updates, ReloraState(count, inner)

    return optax.GradientTransformation(init, update)


def _restart(params: LoraParams, key: Array, scale: Any) -> LoraParams:
    """The same model with what the adaptors learned in W_0, and new adaptors that do nothing yet."""

    def learned(node, W):
        return W + _adaptor(node, scale) if _is_factors(node) else None

    merged = jax.tree.map(learned, params.trained, params.frozen, is_leaf=_is_factors)
    return LoraParams(_fresh(params.trained, key), merged)


def _adaptor(factors: Factors, scale: Any) -> Array:
    return require_number("scale", scale, factors.A.dtype) * (factors.A @ factors.B)


def _forget(optimizer: optax.GradientTransformation, state: Any, trained: PyTree) -> Any:
    """An optimizer state with zeros for the entries of all factors."""
    flags = jax.tree.map(
        lambda node: Factors(True, True) if _is_factors(node) else False, trained, is_leaf=_is_factors
    )
    return optax.tree.map_params(
        optimizer, lambda leaf, flag: jnp.zeros_like(leaf) if flag else leaf, state, flags
    )


def _fresh(trained: PyTree, key: Array) -> PyTree:
    """The tree with all A drawn anew, each from the key of its place, and all B zero."""
    nodes, structure = jax.tree.flatten(trained, is_leaf=_is_factors)
    places = itertools.count()

    def renewed(node):
        if not _is_factors(node):
            return node
        A = normal(jax.random.fold_in(key, next(places)), node.A.shape, node.A.dtype)
        return Factors(A / node.A.shape[-2] ** 0.5, jnp.zeros_like(node.B))

    return structure.unflatten([renewed(node) for node in nodes])


def _is_factors(node: Any) -> bool:
    return isinstance(node, Factors)


def _ranks(params: PyTree, rank: Any) -> PyTree:
    """The ranks of the leaves that are replaced, in their places in the tree; None in all others."""
    places, structure = jax.tree_util.tree_flatten_with_path(params)
    ranks = [
        _rank(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, rank) for path, leaf in places
    ]
    if not any(ranks):
        raise ValueError("params must hold a matrix to replace, got none")
    return structure.unflatten(ranks)


def _rank(name: str, leaf: Any, rank: Any) -> int | None:
    leaf = jnp.asarray(leaf)
    r = rank(name, leaf) if callable(rank) else rank if leaf.ndim == 2 else None
    if r is None:
        return None
    (r,) = require_sizes(**{f"rank of {name!r}": r})
    if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"rank must be None for what is no real matrix, got {r} for {name!r}: {leaf.shape}")
    return min(r, *leaf.shape[-2:])


def _require_key(key: Any) -> None:
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError):
        raise ValueError(f"key must be a PRNG key, got {brief(key)}") from None


def _require_lora(params: Any) -> LoraParams:
    if not isinstance(params, LoraParams):
        raise ValueError(f"params must be LoraParams, as lora_params makes them, got {type(params).__name__}")
    return params
