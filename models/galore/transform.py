"""GaLore as an Optax transformation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .groups import Group, groups_of, require_no_values, zeros
from .moments import at_refresh, require_moments
from .noise import without_noise
from .options import Options, options_of, signature_of
from .placement import automatic, everywhere, named_sharding, place_basis, place_inner
from .plan import plan
from .projection import Basis, Layout, from_matrices, pack, project, project_back, to_matrices, unpack
from .refresh import Method, initial_basis, refresh_bases


class GaloreState(NamedTuple):
    """A state of `scale_by_galore` is a pytree of arrays.

    Attributes:
        count: steps taken.
        bases: left and right bases, each a tree like the parameters, without arrays where there is none.
        inner: states of the inner transformation. The leaves without batch axes share one; those of one batch
            shape share another, which has these batch axes in front of every array. With moments="reset"
            leaves with schedules of their own have states of their own.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    bases: Any
    inner: tuple[Any, ...]


@signature_of(Options)
def scale_by_galore(*arguments: Any, **keywords: Any) -> optax.GradientTransformation:  # noqa: D417
    r"""Run a transformation on gradients projected onto their leading singular vectors.

    For each matrix G (m, n), with P (m, r) and Q (n, r) the leading singular vectors of the gradient at the
    last refresh and rho the inner transformation, the update is

        left: scale P rho(P^T G),   right: scale rho(G Q) Q^T,   full: scale P rho(P^T G Q) Q^T

    A basis is renewed from this step's gradient when step mod update_gap = 0, and used at once. A gradient
    that is zero or not finite at a refresh keeps the old basis until the next one, for each matrix by itself;
    before the first it is a fixed random one. With Adam inside and m <= n the state of "std" is m r + 2 n r
    numbers. Bases count as constants where the update is differentiated.

    States and bases are in the parameters' dtype; decompositions in float32, or float64 for float64.
    Of sharded parameters `init`, called outside `jit`, gives a state that is sharded like them, and bases on
    every device, where the compiled `update` keeps them under `jax.set_mesh`. Gradients are gathered in
    refreshes only. Tested on four devices: meshes with explicit and with automatic axes, for tall, wide and
    stacked matrices, and `jax.shard_map` over examples (average the gradients first) and over layers.

    Source: zhao2024galore, Algorithm 2 (of "std", with m <= n).

    Args:
        rank: number r of basis vectors, at most min(m, n) of which are used: a positive integer, a pytree of
            them like the parameters, or a function `(path, leaf)`; a path is the keys joined with "/", as in
            "layer/kernel".
        update_gap: steps between two refreshes; a number, a pytree or a function, like `rank`.
        scale: factor of the projected updates; a number, a pytree or a function, like `rank`.
        projection: "left" projects rows, "right" columns, "full" both. "std" projects the short side and
            "reverse_std" the long one, by each matrix's shape; on a square leaf "std" projects the left side
            (rows) and "reverse_std" the right.
        inner: the transformation on projected gradients; `optax.scale_by_adam(b1, b2, eps)` where None. It
            is given zeros of the projected shapes for parameters, so that it may use their shapes but not
            their values. Leaves with batch axes go through it entry by entry, as if split; only
            a transformation that couples different leaves, such as clipping by the global norm, could tell.
        refresh: "eigh" is the exact decomposition by the Gram matrix of the short side, "svd" a full one.
            "randomized" is subspace iteration from a random start, "warm" from the old basis; both end with
            a rotation to the singular vectors in the subspace found (Rayleigh-Ritz).
        moments: what a refresh does to the inner state. "align" flips each new basis vector so that its
            product with the old one is not negative, and keeps the state; "carry" keeps both as they come;
            "transport" aligns, and maps the moments of Adam with C = P_new^T P_old, M to C M and V to
            (C * C) V; "reset" starts the inner transformation afresh, its count included.
        matrix_axes: `(rows, columns)`, each an axis or a tuple of axes that are merged, for every leaf of two
            or more dimensions; or a function `(path, leaf)` that returns such a pair, or None for a leaf that
            is left alone. All other axes are batch axes: every entry has a basis and moments of its own.
            Where None, the leaves of exactly two dimensions are projected.
        stagger: leaf j of the J projected ones refreshes at step 0 and then when step mod update_gap is
            floor(update_gap j / J), so that no step pays for all.
        drop_noise: directions in which a gradient has nothing but rounding errors get no update, where Adam
            would divide these errors by themselves. False gives the numbers of the published package.
        b1: decay of the first moment of the default inner transformation.
        b2: decay of its second moment.
        eps: its epsilon.
        eps_convention: "corrected" adds epsilon to the square root of the bias-corrected second moment, as
            Optax does; "uncorrected" to the square root before its correction, as the authors' code does.

    Returns:
        The transformation. A leaf that is not projected goes through `inner` as it is, without `scale`.
        `update` needs no parameters. Under `jax.vmap` over states that share their step, the decompositions
        run in refresh steps only.

    Raises:
        ValueError: an option is bad. From `init`: an option of some leaf is bad; `inner` reads the values of
            parameters; or moments="transport" and there is no Adam state.

    Example:
        >>> transform = scale_by_galore(2, scale=1.0)
        >>> state = transform.init({"w": jnp.zeros((4, 6))})
        >>> updates, state = transform.update({"w": jnp.eye(4, 6) * jnp.arange(4.0)[:, None]}, state)
        >>> jnp.abs(updates["w"]).round(3).diagonal().tolist(), state.inner[0].mu["w"].shape
        ([0.0, 0.0, 1.0, 1.0], (2, 6))
    """
    options = options_of("scale_by_galore", Options, arguments, keywords)
    if options.inner is not None and not options.has_default_adam():
        raise ValueError("b1, b2, eps and eps_convention must be left alone where inner is given")
    return transformation(options)


def transformation(options: Options) -> optax.GradientTransformation:
    """Return the transformation that the options describe; those of Adam have no effect beside an `inner`."""
    inner = options.adam() if options.inner is None else options.inner
    moments_at_refresh = at_refresh(inner, options.moments)

    def init(params):
        params = jax.tree.map(_with_shape, params)
        leaves, treedef = jax.tree.flatten(params)
        layouts, _ = plan(params, options)
        shardings = list(map(named_sharding, leaves, layouts))
        bases = list(map(_first_basis, leaves, layouts, shardings))
        states = []
        for group in groups_of(layouts, options.moments):
            shapes = group.shapes(leaves, layouts, treedef)
            require_no_values(inner, shapes)
            require_moments(inner, shapes, options.moments)
            inner_state = group.over_batch(inner.init)(zeros(shapes, group.batch_shape))
            states.append(_placed(inner, inner_state, shapes, shardings, group, treedef))
        return GaloreState(jnp.zeros((), jnp.int32), pack(bases, treedef), tuple(states))

    @automatic
    def updated(updates, state, params):
        leaves, treedef = jax.tree.flatten(updates)
        layouts, scales = plan(updates, options)
        old = unpack(state.bases, treedef)
        matrices = list(map(_matrices, leaves, layouts))
        new = _renewed(old, matrices, state.count, layouts, options)
        low = list(map(partial(_projected, options.drop_noise), matrices, new, layouts))

        # Only shapes and dtypes are taken from the parameters.
        like = leaves if params is None else treedef.flatten_up_to(params)
        states = []
        for group, inner_state in zip(groups_of(layouts, options.moments), state.inner, strict=True):
            shapes = group.shapes(like, layouts, treedef)
            inner_state = moments_at_refresh(inner_state, state.count, old, new, layouts, group, shapes)
            step = group.over_batch(lambda g, s, shapes=shapes: inner.update(g, s, zeros(shapes)))
            stepped, inner_state = step(group.tree(low, treedef), inner_state)
            states.append(inner_state)
            for i, leaf in zip(group.members, jax.tree.leaves(stepped), strict=True):
                low[i] = leaf

        full = list(map(_projected_back, low, new, layouts, scales, leaves))
        new_state = GaloreState(optax.safe_increment(state.count), pack(new, treedef), tuple(states))
        return treedef.unflatten(full), new_state

    def update(updates, state, params=None):
        # A checkpoint may come back in NumPy arrays.
        updates, state = jax.tree.map(jnp.asarray, (updates, state))
        return updated(updates, state, params)

    return optax.GradientTransformation(init, update)


def state_bytes(params: Any, rank: Any, **options: Any) -> int:
    """Count the bytes that `scale_by_galore(rank, **options).init(params)` allocates, and allocate nothing.

    Args:
        params: parameters, or their shapes (`jax.ShapeDtypeStruct`).
        rank: as for `scale_by_galore`.
        **options: its other options.

    Returns:
        The number of bytes of all arrays of the state.

    Raises:
        ValueError: as `scale_by_galore` and its `init`.

    Example:
        >>> state_bytes({"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}, 2)  # 4 (m r + 2 n r), two counts
        136
    """
    state = jax.eval_shape(scale_by_galore(rank, **options).init, params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _first_basis(leaf: Any, layout: Layout | None, sharding: Any) -> Basis:
    return Basis() if layout is None else place_basis(initial_basis(layout, leaf.dtype), sharding)


def _placed(inner: Any, state: Any, shapes: Any, shardings: list[Any], group: Group, treedef: Any) -> Any:
    """Lay an inner state out like the projected parameters."""
    like = {
        i: jax.ShapeDtypeStruct((*group.batch_shape, *shape.shape), shape.dtype, sharding=shardings[i])
        for i, shape in zip(group.members, jax.tree.leaves(shapes), strict=True)
    }
    return place_inner(inner, state, group.tree(like, treedef))


def _renewed(
    old: list[Basis], matrices: list[Array], count: Array, layouts: list[Layout | None], options: Options
) -> list[Basis]:
    """Return the bases for this step; those of leaves that are not projected have no arrays."""
    projected = {i: layout for i, layout in enumerate(layouts) if layout is not None}
    fresh = refresh_bases(
        [matrices[i] for i in projected],
        [old[i] for i in projected],
        count,
        layouts=tuple(projected.values()),
        method=Method(options.refresh, options.moments in ("align", "transport"), options.drop_noise),
    )
    bases = dict(zip(projected, map(everywhere, fresh), strict=True))
    return [bases.get(i, Basis()) for i in range(len(layouts))]


def _matrices(leaf: Array, layout: Layout | None) -> Array:
    return leaf if layout is None else to_matrices(leaf, layout)


def _with_shape(leaf: Any) -> Any:
    """Return an array, or a shape and dtype alone, which are enough for the start of a state."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)


def _projected(drop_noise: bool, matrices: Array, basis: Basis, layout: Layout | None) -> Array:
    if layout is None:
        return matrices
    low = project(matrices, basis).astype(basis.dtype)
    return without_noise(low, basis, layout, matrices.dtype) if drop_noise else low


def _projected_back(low: Array, basis: Basis, layout: Layout | None, scale: Any, leaf: Array) -> Array:
    if layout is None:
        return low
    # The scale goes on the small side of the product, where it costs nothing.
    scaled = low * jnp.asarray(scale).astype(low.dtype)
    return from_matrices(project_back(scaled, basis), layout).astype(leaf.dtype)
