"""GaLore as an Optax transformation, and the optimizer made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import Literal as Constant

from .adam import scale_by_adam_uncorrected
from .labels import is_hidden_kernel
from .placement import everywhere, named_sharding, place_basis, place_inner
from .projection import (
    Basis,
    Layout,
    Projection,
    axes_of,
    from_matrices,
    is_number,
    path_name,
    plan,
    project,
    project_back,
    require_axes,
    require_choice,
    require_count,
    require_scale,
    to_matrices,
)
from .refresh import Refresh, initial_basis, is_due, refresh_bases, when_due

Moments = Literal["align", "carry", "transport", "reset"]
EpsConvention = Literal["corrected", "uncorrected"]
# Leaves of one group share an inner state: (batch shape, schedule of its resets).
_Group = tuple[tuple[int, ...], tuple[int, int] | None]


class GaloreState(NamedTuple):
    """State of `scale_by_galore`: a pytree of arrays.

    Attributes:
        count: steps taken.
        bases: a `Basis` for every parameter, without arrays where it is not projected.
        inner: states of the inner transformation. The leaves without batch axes share one; those of one batch
            shape share another, which has these batch axes in front of every array. With moments="reset"
            leaves with schedules of their own have states of their own.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    bases: Any
    inner: tuple[Any, ...]


def scale_by_galore(
    rank: Any,
    *,
    update_gap: Any = 200,
    scale: Any = 0.25,
    projection: Projection | str = "std",
    inner: Any = None,
    refresh: Refresh | str = "eigh",
    moments: Moments | str = "align",
    matrix_axes: Any = None,
    stagger: bool = False,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_convention: EpsConvention | str = "corrected",
) -> optax.GradientTransformation:
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
    refreshes only.

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
    for argument, option, require in (
        ("rank", rank, lambda value: require_count("rank", value)),
        ("update_gap", update_gap, lambda value: require_count("update_gap", value)),
        ("scale", scale, require_scale),
    ):
        if option is None:
            raise ValueError(f"{argument} must be a number, a pytree of numbers or a function, got None")
        if is_number(option):
            require(option)
    for argument, value, choices in (
        ("projection", projection, Projection),
        ("refresh", refresh, Refresh),
        ("moments", moments, Moments),
    ):
        require_choice(argument, value, choices)
    if matrix_axes is not None and not callable(matrix_axes):
        require_axes(matrix_axes)
    if inner is None:
        inner = _adam(b1, b2, eps, eps_convention)
    elif not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner must be an Optax transformation such as optax.scale_by_adam(), got {inner!r}"
        )
    elif (b1, b2, eps, eps_convention) != (0.9, 0.999, 1e-8, "corrected"):
        raise ValueError("b1, b2, eps and eps_convention must be left alone where inner is given")

    def plan_of(tree):
        return plan(tree, rank, update_gap, scale, projection, matrix_axes, stagger)

    def init(params):
        params = jax.tree.map(jnp.asarray, params)
        leaves, treedef = jax.tree.flatten(params)
        layouts, _ = plan_of(params)
        shardings = [named_sharding(leaf, layout) for leaf, layout in zip(leaves, layouts, strict=True)]
        bases = [
            Basis() if layout is None else place_basis(initial_basis(layout, leaf.dtype), sharding)
            for leaf, layout, sharding in zip(leaves, layouts, shardings, strict=True)
        ]
        states = []
        for group, members in _groups(layouts, moments).items():
            proxies = _proxies(leaves, layouts, members, treedef)
            _require_inner(inner, proxies, moments)
            inner_state = _over_batch(inner.init, group)(_zeros(proxies, group))
            wanted = {
                i: jax.ShapeDtypeStruct((*group[0], *proxy.shape), proxy.dtype, sharding=shardings[i])
                for i, proxy in zip(members, jax.tree.leaves(proxies), strict=True)
            }
            states.append(place_inner(inner, inner_state, _masked(wanted, members, treedef)))
        return GaloreState(jnp.zeros((), jnp.int32), treedef.unflatten(bases), tuple(states))

    # Compiled at once, so that nothing is compiled again where `update` is called outside of `jit`.
    @partial(jax.jit, static_argnums=(2, 3, 4, 5))
    def reset_when_due(state, count, layout, group, structure, shapes):
        start = _over_batch(inner.init, group)
        zeros = _zeros(jax.tree.unflatten(structure, shapes), group)
        return when_due(is_due(count, layout), lambda _: start(zeros), state)

    def update(updates, state, params=None):
        # A checkpoint may come back in NumPy arrays.
        updates, state = jax.tree.map(jnp.asarray, (updates, state))
        leaves, treedef = jax.tree.flatten(updates)
        layouts, scales = plan_of(updates)
        old = treedef.flatten_up_to(state.bases)
        projected = {i: layout for i, layout in enumerate(layouts) if layout is not None}
        matrices = {i: to_matrices(leaves[i], layout) for i, layout in projected.items()}

        fresh = refresh_bases(
            [matrices[i] for i in projected],
            [old[i] for i in projected],
            state.count,
            layouts=tuple(projected.values()),
            refresh=refresh,
            align=moments in ("align", "transport"),
        )
        bases = dict(zip(projected, map(everywhere, fresh), strict=True))
        low = list(leaves)
        for i in projected:
            dtype = jax.tree.leaves(bases[i])[0].dtype
            low[i] = project(matrices[i], bases[i]).astype(dtype)

        # Only shapes and dtypes are taken from the parameters.
        like = leaves if params is None else treedef.flatten_up_to(params)
        states = []
        for (group, members), inner_state in zip(_groups(layouts, moments).items(), state.inner, strict=True):
            proxies = _proxies(like, layouts, members, treedef)
            if moments == "reset" and group[1] is not None:
                shapes, structure = jax.tree.flatten(proxies)
                inner_state = reset_when_due(
                    inner_state, state.count, projected[members[0]], group, structure, tuple(shapes)
                )
            if moments == "transport":
                inner_state = _transport(inner_state, old, bases, state.count, layouts, members)
            step = _over_batch(lambda g, s, p=proxies: inner.update(g, s, _zeros(p)), group)
            tree = _masked(low, members, treedef)
            stepped, inner_state = step(tree, inner_state)
            states.append(inner_state)
            for i, leaf in zip(members, jax.tree.leaves(stepped), strict=True):
                low[i] = leaf

        for i, layout in projected.items():
            # On the small side of the product, where it costs nothing.
            scaled = low[i] * jnp.asarray(scales[i]).astype(low[i].dtype)
            low[i] = from_matrices(project_back(scaled, bases[i]), layout).astype(leaves[i].dtype)
        new_bases = treedef.unflatten([bases.get(i, Basis()) for i in range(len(leaves))])
        new_state = GaloreState(optax.safe_increment(state.count), new_bases, tuple(states))
        return treedef.unflatten(low), new_state

    return optax.GradientTransformation(init, update)


def galore(
    learning_rate: Any,
    rank: Any,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    labels: Any = None,
    plain: Any = None,
    update_gap: Any = 200,
    scale: Any = 0.25,
    projection: Projection | str = "std",
    inner: Any = None,
    refresh: Refresh | str = "eigh",
    moments: Moments | str = "align",
    matrix_axes: Any = None,
    stagger: bool = False,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_convention: EpsConvention | str = "corrected",
) -> optax.GradientTransformation:
    r"""GaLore on the hidden matrices, Adam on the rest, decoupled weight decay on all.

        update = -learning_rate (scale_by_galore(...)(G) + weight_decay W)

    on the parameters that are projected, and that of `optax.adam(learning_rate)`, with the same decay, on the
    others: embeddings, heads, norms and biases, told by their names, and whatever `matrix_axes` leaves alone.

    Source: zhao2024galore, section 5.

    Args:
        learning_rate: a number or a schedule.
        rank: as for `scale_by_galore`.
        weight_decay: decay, times the learning rate, of the old value; not multiplied by `scale`.
        mask: which parameters decay: a pytree of booleans or a function of the parameters, as in
            `optax.add_decayed_weights`; all where None.
        labels: "galore" or "adam" for each parameter: a pytree like the parameters or a function
            `(path, leaf)`. Where None, "adam" for those with, in the words of a path, one that begins with
            "embed" or ends with "norm", a key that ends with "head", or the last key a "bias" or "scale".
        plain: the transformation for what is not projected; `optax.scale_by_adam(b1, b2, eps)` where None.
        update_gap: as for `scale_by_galore`, like the options up to `stagger`.
        scale: factor of the projected updates.
        projection: which side is projected.
        inner: the transformation on projected gradients.
        refresh: the decomposition.
        moments: what a refresh does to the inner state.
        matrix_axes: which axes are the matrix.
        stagger: whether leaves refresh in turns.
        b1: decay of the first moment, for both where `inner` or `plain` are not given.
        b2: decay of the second moment.
        eps: epsilon.
        eps_convention: where epsilon is added, as for `scale_by_galore`.

    Returns:
        The optimizer. `update` needs the parameters where `weight_decay` is not zero.

    Raises:
        ValueError: an option is bad.

    Example:
        >>> optimizer = galore(0.5, rank=2)
        >>> state = optimizer.init({"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)})
        >>> gradient = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
        >>> optimizer.update(gradient, state)[0]["bias"].round(6).tolist()
        [-0.5, -0.5, -0.5, -0.5, -0.5, -0.5]
    """
    adam = {"b1": b1, "b2": b2, "eps": eps, "eps_convention": eps_convention}
    inner = _adam(**adam) if inner is None else inner
    plain = _adam(**adam) if plain is None else plain
    projected = scale_by_galore(
        rank,
        update_gap=update_gap,
        scale=scale,
        projection=projection,
        inner=inner,
        refresh=refresh,
        moments=moments,
        matrix_axes=matrix_axes,
        stagger=stagger,
    )

    def label(tree):
        named = jax.tree_util.tree_leaves_with_path(tree)
        given = None
        if labels is not None and not callable(labels):
            given = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(labels)}
        found = []
        for path, leaf in named:
            name = path_name(path)
            if given is not None:
                wanted = given.get(name)
            elif labels is not None:
                wanted = labels(name, leaf)
            else:
                wanted = "galore" if is_hidden_kernel(name, leaf) else "adam"
            if wanted not in ("galore", "adam"):
                raise ValueError(f'labels must be "galore" or "adam", got {wanted!r} for {name!r}')
            found.append(wanted if axes_of(name, leaf, matrix_axes) is not None else "adam")
        return jax.tree.unflatten(jax.tree.structure(tree), found)

    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)
    return optax.chain(
        optax.partition({"galore": projected, "adam": plain}, label),
        optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def state_bytes(params: Any, rank: Any, **options: Any) -> int:
    """Bytes that `scale_by_galore(rank, **options).init(params)` allocates; nothing is allocated here.

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


def _adam(b1: Any, b2: Any, eps: Any, eps_convention: str) -> optax.GradientTransformation:
    require_choice("eps_convention", eps_convention, EpsConvention)
    if eps_convention == "uncorrected":
        return scale_by_adam_uncorrected(b1, b2, eps)
    return optax.scale_by_adam(b1, b2, eps)


def _groups(layouts: tuple[Layout | None, ...], moments: str) -> dict[_Group, list[int]]:
    """Which leaves share an inner state."""
    groups: dict[_Group, list[int]] = {}
    for i, layout in enumerate(layouts):
        batch = () if layout is None else layout.batch_shape
        schedule = None if layout is None or moments != "reset" else (layout.gap, layout.phase)
        groups.setdefault((batch, schedule), []).append(i)
    return groups or {((), None): []}


def _masked(leaves: Any, members: list[int], treedef: Any) -> Any:
    """The tree with the leaves of one group, and Optax's placeholder for all others."""
    kept = [leaves[i] if i in members else optax.MaskedNode() for i in range(treedef.num_leaves)]
    return treedef.unflatten(kept)


def _proxies(like: Any, layouts: tuple[Layout | None, ...], members: list[int], treedef: Any) -> Any:
    """Shapes of one group's leaves as the inner transformation sees them, without batch axes."""
    shapes = {}
    for i in members:
        layout = layouts[i]
        shape = like[i].shape if layout is None else layout.projected_shape
        shapes[i] = jax.ShapeDtypeStruct(shape, like[i].dtype)
    return _masked(shapes, members, treedef)


def _zeros(proxies: Any, group: _Group = ((), None)) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*group[0], *leaf.shape), leaf.dtype), proxies)


def _over_batch(function: Callable[..., Any], group: _Group) -> Callable[..., Any]:
    """Map a function over all batch axes of a group."""
    for _ in group[0]:
        function = jax.vmap(function)
    return function


def _transport(
    state: Any,
    old: list[Basis],
    new: dict[int, Basis],
    count: Array,
    layouts: tuple[Layout | None, ...],
    members: list[int],
) -> Any:
    """Map the moments of the members that are due from the old coordinates to the new."""
    adam_states = [node for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node)]
    moved = []
    for adam in adam_states:
        mu, treedef = jax.tree.flatten(adam.mu)
        nu = treedef.flatten_up_to(adam.nu)
        for place, i in enumerate(members):
            layout = layouts[i]
            if layout is not None:
                pair = mu[place], nu[place]
                mu[place], nu[place] = _move_when_due(pair, old[i], new[i], count, layout)
        moved.append(adam._replace(mu=treedef.unflatten(mu), nu=treedef.unflatten(nu)))
    places = iter(moved)
    return jax.tree.map(lambda node: next(places) if _is_adam(node) else node, state, is_leaf=_is_adam)


@partial(jax.jit, static_argnums=4)
def _move_when_due(pair, old, new, count, layout):
    return when_due(is_due(count, layout), _move, pair, old, new)


def _move(pair: tuple[Array, Array], old: Basis, new: Basis) -> tuple[Array, Array]:
    def turn(moment, turned, power):
        # A basis that was kept is not mapped: its C is the identity up to rounding only.
        same = jnp.ones((*moment.shape[:-2], 1, 1), bool)
        for side in ("left", "right"):
            before, after = getattr(old, side), getattr(new, side)
            if before is not None:
                same = same & jnp.all(before == after, axis=(-2, -1), keepdims=True)
                C = (after.mT @ before) ** power
                turned = C @ turned if side == "left" else turned @ C.mT
        return jnp.where(same, moment, turned.astype(moment.dtype))

    M, V = pair
    return turn(M, M, 1), turn(V, V, 2)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _require_inner(inner: optax.GradientTransformation, proxies: Any, moments: str) -> None:
    """The inner transformation reads no parameters, and has Adam's moments where these are transported."""
    state = jax.eval_shape(inner.init, proxies)
    traced = jax.make_jaxpr(lambda params, g, s: inner.update(g, s, params))(proxies, proxies, state)
    parameters = len(jax.tree.leaves(proxies))
    if any(_reaches(traced.jaxpr, [i < parameters for i in range(len(traced.jaxpr.invars))])):
        raise ValueError(
            "inner must not read the values of parameters (weight decay, trust ratios and parameter scales "
            "go after scale_by_galore), got one that does"
        )
    if moments == "transport":
        adams = [node for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node)]
        if not adams or any(len(jax.tree.leaves(adam.mu)) != parameters for adam in adams):
            raise ValueError(
                'moments must not be "transport" unless inner keeps the state of optax.scale_by_adam, got '
                f"{type(state).__name__}"
            )


def _reaches(jaxpr: Any, marked: list[bool]) -> list[bool]:
    """Which outputs of a traced program depend on the marked inputs."""
    reached = {var for var, mark in zip(jaxpr.invars, marked, strict=True) if mark}

    def is_reached(var):
        return not isinstance(var, Constant) and var in reached

    for equation in jaxpr.eqns:
        inputs = [is_reached(var) for var in equation.invars]
        called = equation.params.get("jaxpr")
        if called is not None and equation.primitive.name in ("jit", "pjit"):
            outputs = _reaches(called.jaxpr, inputs)
        elif equation.primitive.name == "cond" and not inputs[0]:
            branches = [_reaches(branch.jaxpr, inputs[1:]) for branch in equation.params["branches"]]
            outputs = [any(of_branches) for of_branches in zip(*branches, strict=True)]
        else:
            outputs = [any(inputs)] * len(equation.outvars)
        reached |= {var for var, mark in zip(equation.outvars, outputs, strict=True) if mark}
    return [is_reached(var) for var in jaxpr.outvars]
