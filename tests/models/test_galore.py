"""GaLore: against NumPy, Optax and the authors' package; invariances; refreshes, moments, batches, 8 bits."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.galore import galore, scale_by_adam_8bit, scale_by_galore, state_bytes
from models.galore.labels import is_hidden_kernel
from tests.helpers import advance, compiled, count_compilations

RANK, GAP = 3, 3
SIDES = {"tall": (9, 5), "wide": (5, 8)}
SHAPES = {**SIDES, "square": (6, 6), "thin": (2, 7)}  # the last has r > min(m, n)


def draw(shapes, steps, seed=0) -> Any:
    """Gradients (steps, ...) that change slowly, with singular values well apart."""
    generator = np.random.default_rng(seed)

    def one(shape):
        U, V = (np.linalg.qr(generator.normal(size=(*shape[:-2], k, k)))[0] for k in shape[-2:])
        k = min(shape[-2:])
        base = U[..., :k] * 2.0 ** -np.arange(k) @ np.swapaxes(V, -1, -2)[..., :k, :]
        return base + 0.05 * generator.normal(size=(steps, *shape))

    return {name: one(shape) for name, shape in shapes.items()}


def like(gradients):
    return jax.tree.map(lambda g: np.zeros(g.shape[1:], g.dtype), gradients)


def run(transform, gradients) -> Any:
    """Updates of all steps, from the start."""
    return jax.tree.map(np.asarray, advance(transform, transform.init(like(gradients)), gradients)[1])


def assert_close(actual: Any, expected: Any, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), actual, expected)


# --- Independent references


def reference(gradients, projection, moments, *, eps, uncorrected, rank=RANK, gap=GAP, scale=0.25):
    """The algorithm of the paper for one matrix, step by step in NumPy."""
    m, n = gradients.shape[1:]
    rank = min(rank, m, n)
    sides = {
        "std": (m <= n, m > n),
        "reverse_std": (m > n, m <= n),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[projection]
    P: Any = np.eye(m)
    Q: Any = np.eye(n)
    M: Any = 0
    V: Any = 0
    k, updates = 0, []
    for t, G in enumerate(gradients):
        if t % gap == 0:
            old = P, Q
            U, _, Vt = np.linalg.svd(G)
            P, Q = (U[:, :rank] if sides[0] else P), (Vt[:rank].T if sides[1] else Q)
            if t and moments in ("align", "transport"):
                P = P * np.where(np.sum(P * old[0], axis=0) < 0, -1, 1)
                Q = Q * np.where(np.sum(Q * old[1], axis=0) < 0, -1, 1)
            if t and moments == "transport":
                C, D = P.T @ old[0], Q.T @ old[1]
                M, V = C @ M @ D.T, C**2 @ V @ (D**2).T
            if not t or moments == "reset":
                M, V, k = 0, 0, 0
        k += 1
        R = P.T @ G @ Q
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        if uncorrected:
            step = np.sqrt(1 - 0.999**k) / (1 - 0.9**k) * M / (np.sqrt(V) + eps)
        else:
            step = M / (1 - 0.9**k) / (np.sqrt(V / (1 - 0.999**k)) + eps)
        updates.append(scale * P @ step @ Q.T)
    return np.stack(updates)


@pytest.mark.parametrize(
    ("projection", "moments", "convention", "tolerance"),
    [
        ("std", "align", "corrected", 1e-11),
        ("std", "transport", "uncorrected", 1e-11),
        ("reverse_std", "reset", "uncorrected", 1e-11),
        ("left", "align", "uncorrected", 1e-11),
        ("right", "transport", "corrected", 1e-11),
        # At a refresh P^T G Q is diagonal up to rounding, and Adam divides the rounding by epsilon.
        ("full", "transport", "uncorrected", 1e-7),
    ],
)
def test_it_is_the_algorithm_of_the_paper(projection, moments, convention, tolerance):
    gradients = draw(SHAPES, 8)
    uncorrected = convention == "uncorrected"
    transform: Any = scale_by_galore(
        RANK,
        update_gap=GAP,
        projection=projection,
        moments=moments,
        eps=1e-6,
        eps_convention=convention,
    )
    updates: Any = run(transform, gradients)
    for name, G in gradients.items():
        expected = reference(np.asarray(G), projection, moments, eps=1e-6, uncorrected=uncorrected)
        np.testing.assert_allclose(updates[name], expected, rtol=0, atol=tolerance)


def test_it_reproduces_optax_up_to_the_second_refresh():
    # On square leaves the two differ by design: Optax projects the left side of them.
    gradients = draw({"tall": (9, 5), "wide": (5, 8)}, GAP)
    ours: Any = scale_by_galore(
        RANK, update_gap=GAP, scale=1.0, projection="reverse_std", moments="carry", refresh="eigh"
    )
    theirs: Any = optax.contrib.scale_by_galore(RANK, GAP, 1.0)
    assert_close(run(ours, gradients), run(theirs, gradients), 5e-6)


def test_a_swap_from_optax_gives_its_numbers_with_what_the_table_says():
    """Over three refreshes, with leaves that only one of the two projects unless it is told to."""
    shapes = {"embed": (9, 5), "wide": (5, 8), "square": (6, 6)}
    gradients = draw(shapes, 2 * GAP + 2)
    gradients["bias"] = gradients["embed"][:, 0]
    theirs: Any = optax.chain(optax.contrib.scale_by_galore(RANK, GAP), optax.scale_by_learning_rate(1e-2))
    told = {
        "scale": 1.0,
        "labels": lambda path, leaf: "galore",
        "projection": lambda path, leaf: "left" if leaf.shape[0] >= leaf.shape[1] else "right",
        "refresh": "svd",
        "moments": "carry",
        "drop_noise": False,
    }
    expected = run(theirs, gradients)
    assert_close(run(galore(1e-2, RANK, update_gap=GAP, **told), gradients), expected, 1e-7)


def test_it_reproduces_the_package_of_the_authors(monkeypatch):
    torch = pytest.importorskip("torch")
    galore_torch = pytest.importorskip("galore_torch")
    from galore_torch import galore_projector  # pyright: ignore[reportMissingImports]

    before: list[Any] = []

    def aligned(matrix, full_matrices=False):
        # In float64, with the signs of the vectors on the projected side that agree with those before.
        U, S, Vt = np.linalg.svd(matrix.double().numpy(), full_matrices=full_matrices)
        projected = Vt.T if matrix.shape[0] >= matrix.shape[1] else U
        signs = np.where(np.sum(projected * before[-1], axis=0) < 0, -1, 1) if before else 1.0
        before.append(projected * signs)
        return tuple(map(torch.tensor, (U * signs, S, (Vt.T * signs).T)))

    monkeypatch.setattr(galore_projector.torch.linalg, "svd", aligned)
    rate = 0.01
    for name, shape in {"tall": (9, 5), "wide": (5, 8)}.items():
        gradients = draw({name: shape}, 2 * GAP + 1)[name]
        before.clear()
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
        optimizer = galore_torch.GaLoreAdamW([group], lr=rate, eps=1e-6, no_deprecation_warning=True)
        ours: Any = scale_by_galore(RANK, update_gap=GAP, eps=1e-6, eps_convention="uncorrected")
        total = -rate * np.cumsum(run(ours, gradients), axis=0)
        for gradient, expected in zip(gradients, total, strict=True):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
            np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=0, atol=1e-6)


# --- Invariances


def test_the_first_step_has_the_norm_of_signs():
    # Adam's first step is the sign of every projected number, r max(m, n) of them, and P is orthonormal.
    updates: Any = run(scale_by_galore(RANK, scale=0.5, eps=1e-15), draw(SHAPES, 1))
    for name, (m, n) in SHAPES.items():
        expected = 0.5 * np.sqrt(min(RANK, m, n) * max(m, n))
        assert float(np.linalg.norm(updates[name][0])) == pytest.approx(expected, rel=1e-10)


def test_the_rank_of_the_change_grows_by_r_in_each_interval():
    generator = np.random.default_rng(0)
    gradients = {name: generator.normal(size=(3 * GAP, *shape)) for name, shape in SHAPES.items()}
    updates: Any = run(scale_by_galore(2, update_gap=GAP), gradients)
    for name, shape in SHAPES.items():
        for intervals in (1, 2, 3):
            change = np.sum(updates[name][: intervals * GAP], axis=0)
            assert np.linalg.matrix_rank(change, tol=1e-8) == min(2 * intervals, *shape)


@pytest.mark.parametrize("moments", ["align", "transport"])
def test_rotations_of_the_projected_side_and_signed_permutations_of_the_other_commute(moments):
    # Each shape but the square has its transpose beside it, so that one program serves all runs.
    shapes = {"tall": (9, 5), "wide": (5, 9), "thin": (2, 7), "narrow": (7, 2), "square": (6, 6)}
    transposes = {"tall": "wide", "wide": "tall", "thin": "narrow", "narrow": "thin"}
    gradients = draw(shapes, 2 * GAP + 1)
    transform: Any = scale_by_galore(RANK, update_gap=GAP, moments=moments)
    generator = np.random.default_rng(1)
    turns = {}
    for name, shape in shapes.items():
        projected, other = sorted(shape)
        rotation = np.linalg.qr(generator.normal(size=(projected, projected)))[0]
        permutation = np.eye(other)[generator.permutation(other)] * generator.choice([-1.0, 1.0], other)[None]
        turns[name] = (rotation, permutation) if shape[0] <= shape[1] else (permutation, rotation)

    def turn(trees):
        return {name: turns[name][0] @ G @ turns[name][1] for name, G in trees.items()}

    # The exact decomposition by rotation: tie signs of the first basis do not matter either.
    updates = run(transform, gradients)
    assert_close(run(transform, turn(gradients)), turn(updates), 1e-11)

    # A square leaf and its transpose are both projected on the left: this one is left as it is.
    def transpose(trees):
        turned = {name: np.swapaxes(trees[of], 1, 2) for name, of in transposes.items()}
        return {**turned, "square": trees["square"]}

    assert_close(run(transform, transpose(gradients)), transpose(updates), 1e-11)


@pytest.mark.parametrize(
    ("moments", "invariant"), [("align", True), ("transport", True), ("reset", True), ("carry", False)]
)
def test_carried_moments_depend_on_signs_that_mean_nothing_and_others_do_not(moments, invariant):
    # In the middle of an interval, the sign of a basis vector is flipped together with its moments. There are
    # as many steps before as after, so that one program serves both.
    gradients = draw(SHAPES, 6)
    transform: Any = scale_by_galore(RANK, update_gap=4, moments=moments)
    first, rest = (
        jax.tree.map(lambda g, part=part: g[part], gradients) for part in (slice(3), slice(3, None))
    )
    state, _ = advance(transform, transform.init(like(gradients)), first)
    (adam,) = state.inner
    bases, mu = jax.tree.map(lambda side: side, state.bases)._asdict(), {}
    for name, (m, n) in SHAPES.items():
        side = "left" if m <= n else "right"
        basis = getattr(state.bases, side)[name]
        signs = np.where(np.arange(basis.shape[1]) == 1, 1.0, -1.0)
        bases[side][name] = basis * signs[None]
        mu[name] = adam.mu[name] * (signs[:, None] if side == "left" else signs[None])
    flipped = state._replace(bases=type(state.bases)(**bases), inner=(adam._replace(mu=mu),))
    (_, expected), (_, updates) = (advance(transform, s, rest) for s in (state, flipped))
    for name in SHAPES:
        difference = np.abs(updates[name] - expected[name]).max(axis=(1, 2))
        np.testing.assert_allclose(difference[:1], 0, atol=1e-13)
        assert np.all(difference[1:] < 1e-12) == invariant


# --- Programs


@pytest.mark.parametrize("options", [{"moments": "reset"}, {"refresh": "warm", "stagger": True}])
def test_eager_loop_jit_scan_and_an_interrupted_run_give_the_same_numbers(options):
    gradients = draw(SIDES, 2 * GAP)
    transform: Any = scale_by_galore(RANK, update_gap=GAP, **options)
    state = start = transform.init(like(gradients))
    last, scanned = advance(transform, start, gradients)
    jitted, looped = compiled(transform.update), []
    for k in range(GAP + 1):  # stops in the middle of an interval
        gradient = jax.tree.map(lambda g, k=k: g[k], gradients)
        if k in (0, 1, GAP):
            eager, _ = transform.update(gradient, state)
            assert_close(eager, jitted(gradient, state)[0], 1e-13)
        updates, state = jitted(gradient, state)
        looped.append(updates)
    assert_close(
        jax.tree.map(lambda *leaves: np.stack(leaves), *looped),
        jax.tree.map(lambda leaf: leaf[: GAP + 1], scanned),
        1e-13,
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    saved = pickle.dumps(jax.tree.map(np.asarray, jax.tree.leaves(state)))
    restored = jax.tree.unflatten(jax.tree.structure(start), pickle.loads(saved))
    for k in range(GAP + 1, 2 * GAP):
        _, restored = jitted(jax.tree.map(lambda g, k=k: g[k], gradients), restored)
    assert_close(restored, last, 1e-13)


def decompositions(jaxpr, under_cond=False):
    """Whether each decomposition of a traced program, calls included, is under a cond."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("eigh", "svd", "householder_product"):
            found.append(under_cond)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                found += decompositions(inside, under_cond or equation.primitive.name == "cond")
    return found


@pytest.mark.parametrize("options", [{"refresh": "warm"}, {"moments": "reset", "stagger": True}])
def test_vmap_over_seeds_is_the_loop_and_decomposes_in_refresh_steps_only(options):
    transform: Any = scale_by_galore(RANK, update_gap=GAP, **options)
    seeds = [draw(SIDES, GAP + 2, seed) for seed in range(2)]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    first = jax.tree.map(lambda g: g[:, 0], together)
    states: Any = jax.vmap(transform.init)(first)
    _, updates = jax.vmap(lambda s, g: advance(transform, s, g))(states, together)
    for lane, gradients in enumerate(seeds):
        assert_close(jax.tree.map(lambda leaf, i=lane: leaf[i], updates), run(transform, gradients), 1e-12)
    for update, arguments in (
        (transform.update, (jax.tree.map(lambda g: g[0], first), transform.init(like(seeds[0])))),
        (jax.vmap(transform.update), (first, states)),
        (
            jax.vmap(jax.vmap(transform.update)),
            jax.tree.map(lambda leaf: np.asarray(leaf)[None], (first, states)),
        ),
    ):
        placed = decompositions(jax.make_jaxpr(update)(*arguments).jaxpr)
        assert placed
        assert all(placed)


def test_lanes_whose_steps_differ_are_right_as_well():
    transform: Any = scale_by_galore(RANK, update_gap=GAP, moments="transport")
    gradients = draw({"w": (5, 8)}, GAP + 2)
    update = compiled(transform.update)
    states: Any = [transform.init(like(gradients))]
    for gradient in gradients["w"][:-1]:
        states.append(update({"w": gradient}, states[-1])[1])
    states = states[GAP:]
    lanes = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    gradient = {"w": gradients["w"][-1]}
    updates, _ = compiled(jax.vmap(transform.update, in_axes=(None, 0)))(gradient, lanes)
    for lane, single in enumerate(states):
        expected, _ = update(gradient, single)
        np.testing.assert_allclose(updates["w"][lane], expected["w"], rtol=0, atol=1e-13)


# --- Leaves


@pytest.mark.parametrize(
    "options",
    [
        {"projection": "full", "moments": "transport", "eps": 1e-6, "eps_convention": "uncorrected"},
        {"refresh": "warm", "projection": "reverse_std", "inner": scale_by_adam_8bit(block=8, min_size=20)},
        {"refresh": "randomized", "inner": optax.scale_by_factored_rms(min_dim_size_to_factor=2)},
        {"moments": "reset", "inner": optax.chain(optax.clip_by_block_rms(0.1), optax.scale_by_adam())},
    ],
    ids=["full", "8bit", "factored", "clipped"],
)
def test_stacked_layers_are_separate_ones(options):
    stacked = draw({"tall": (1, 2, 9, 5), "wide": (2, 5, 8), "thin": (2, 2, 7)}, GAP + 2)
    split = {name: G.reshape(-1, 2, *G.shape[-2:]) for name, G in stacked.items()}
    options = {"update_gap": GAP, **options}
    together = run(scale_by_galore(RANK, matrix_axes=(-2, -1), **options), stacked)
    alone: Any = scale_by_galore(RANK, **options)
    tolerance = 1e-6 if options.get("projection") == "full" else 1e-10
    for layer in range(2):
        expected = run(alone, {name: G[:, layer] for name, G in split.items()})
        for name, updates in together.items():
            found = updates.reshape(split[name].shape)[:, layer]
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=tolerance)


def test_a_scan_over_layers_is_the_joint_update():
    # With states from a vmapped init, layers can be updated one by one, as their gradients come.
    stacked = draw({"w": (3, 5, 8)}, GAP + 2)["w"]
    single: Any = scale_by_galore(2, update_gap=GAP)
    states = jax.vmap(single.init)(stacked[0])

    def layer(_, inputs):
        return None, single.update(*inputs)

    def step(states, gradient):
        updates, states = jax.lax.scan(layer, None, (gradient, states))[1]
        return states, updates

    _, updates = compiled(lambda states: jax.lax.scan(step, states, stacked))(states)
    joint = run(scale_by_galore(2, update_gap=GAP, matrix_axes=(-2, -1)), stacked)
    assert_close(updates, joint, 1e-12)


def test_merged_axes_are_one_matrix():
    flat = draw({"heads": (5, 8), "convolution": (6, 12)}, GAP + 1)

    def fold(flat):
        convolution = flat["convolution"]  # (out, height width in)
        return {
            "heads": flat["heads"].reshape(-1, 5, 2, 4),
            "convolution": convolution.reshape(-1, 6, 2, 2, 3).transpose(0, 2, 3, 4, 1),
        }

    axes = {"heads": (0, (1, 2)), "convolution": (3, (0, 1, 2)), "bias": None}
    folded = {**fold(flat), "bias": np.ones((GAP + 1, 4))}
    transform: Any = scale_by_galore(2, update_gap=GAP, matrix_axes=lambda path, leaf: axes[path])
    updates: Any = run(transform, folded)
    assert_close(updates.pop("bias"), run(optax.scale_by_adam(), folded["bias"]), 1e-15)
    assert_close(updates, fold(run(scale_by_galore(2, update_gap=GAP), flat)), 1e-11)


def test_options_of_leaves_are_numbers_pytrees_or_functions():
    gradients = {"layer": draw({"a": (5, 8), "b": (9, 5)}, 5)}
    ranks, gaps, scales = {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 0.5, "b": 2.0}
    trees = scale_by_galore({"layer": ranks}, update_gap={"layer": gaps}, scale={"layer": scales})
    functions = scale_by_galore(
        lambda path, leaf: ranks[path.split("/")[1]],
        update_gap=lambda path, leaf: {"layer/a": 2, "layer/b": 3}[path],
        scale=lambda path, leaf: 0.5 if leaf.shape == (5, 8) else 2.0,
    )
    updates: Any = run(trees, gradients)
    assert_close(run(functions, gradients), updates, 0)
    alone = scale_by_galore(4, update_gap=3, scale=2.0)
    assert_close(updates["layer"]["b"], run(alone, gradients["layer"]["b"]), 1e-12)
    # A scale may be traced, so that one program sweeps it.
    gradient, state = gradients["layer"]["b"][0], alone.init(gradients["layer"]["b"][0])

    @jax.jit
    @jax.vmap
    def sweep(scale):
        return scale_by_galore(4, scale=scale).update(gradient, state)[0]

    small, large = sweep(np.array([0.25, 1.0]))
    assert_close(4 * small, large, 1e-12)


def test_staggered_leaves_refresh_one_after_another():
    gap, names = 5, "abc"
    gradients = draw({name: (5, 8) for name in names}, 2 * gap)
    transform: Any = scale_by_galore(2, update_gap=gap, stagger=True)
    states: Any = [transform.init(like(gradients))]
    for k in range(2 * gap):
        states.append(advance(transform, states[-1], jax.tree.map(lambda g, k=k: g[k : k + 1], gradients))[0])
    for place, name in enumerate(names):
        bases = [np.asarray(state.bases.left[name]) for state in states]
        renewed = {k for k in range(2 * gap) if not np.array_equal(bases[k], bases[k + 1])}
        assert renewed == {k for k in range(2 * gap) if k == 0 or k % gap == gap * place // 3}


# --- Refreshes


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_gradient_without_directions_keeps_the_basis_of_its_matrix_alone(bad):
    gradients = draw({"w": (2, 5, 8)}, 1)["w"][0]
    transform: Any = scale_by_galore(2, update_gap=2, matrix_axes=(1, 2))
    update = compiled(transform.update)
    state: Any = transform.init(gradients)
    random = state.bases.left
    np.testing.assert_allclose(random.mT @ random, np.broadcast_to(np.eye(2), (2, 2, 2)), atol=1e-6)
    broken = gradients.copy()
    broken[1] = bad
    updates, state = update(broken, state)
    np.testing.assert_array_equal(state.bases.left[1], random[1])
    assert np.all(np.asarray(updates[0]) != 0)
    if bad == 0:
        np.testing.assert_array_equal(updates[1], 0)
        # The next step moves every row, though this is no refresh.
        updates, state = update(gradients, state)
        assert np.all(np.any(np.asarray(updates[1]) != 0, axis=1))
    before = update(gradients, state)[1] if bad != 0 else state
    after = update(broken, before)[1]
    np.testing.assert_array_equal(after.bases.left[1], before.bases.left[1])
    assert not np.array_equal(after.bases.left[0], random[0])
    assert np.all(np.isfinite(after.bases.left))


@pytest.mark.parametrize(
    ("projection", "refresh", "share"),
    [
        ("std", "eigh", 1 - 1e-6),
        ("reverse_std", "svd", 1 - 1e-6),
        ("std", "randomized", 0.9998),
        ("std", "warm", 0.999),
        ("reverse_std", "warm", 0.999),
    ],
)
def test_every_refresh_captures_the_energy(projection, refresh, share):
    # A flat power law, the hard case, in float32; the second gradient differs from the first by a third.
    generator = np.random.default_rng(0)
    U, V = (np.linalg.qr(generator.normal(size=(k, k)))[0] for k in (64, 96))
    first = U * np.arange(1, 65.0) ** -0.7 @ V[:64]
    noise = generator.normal(size=first.shape)
    second = first + 0.3 * noise * np.linalg.norm(first) / np.linalg.norm(noise)
    transform: Any = scale_by_galore(
        16, update_gap=1, refresh=refresh, projection=projection, inner=optax.identity(), scale=1.0
    )
    gradients = np.stack([first, second]).astype(np.float32)
    captured = np.linalg.norm(run(transform, gradients), axis=(1, 2)) ** 2
    best = np.sum(np.linalg.svd(gradients, compute_uv=False)[:, :16] ** 2, axis=1)
    assert np.all(captured >= share * best)
    assert np.all(captured <= (1 + 1e-5) * best)


def test_tiny_gradients_have_directions_too():
    gradients = draw({"w": (5, 8)}, 1)
    tiny = jax.tree.map(lambda g: (1e-30 * g).astype(np.float32), gradients)
    transform: Any = scale_by_galore(2, inner=optax.identity(), scale=1.0)
    np.testing.assert_allclose(run(transform, tiny)["w"] / 1e-30, run(transform, gradients)["w"], atol=1e-5)


def test_full_rank_without_adam_is_gradient_descent():
    for projection in ("std", "full"):
        gradients = draw({"wide": (5, 8), "square": (6, 6)} if projection == "std" else {"square": (6, 6)}, 2)
        transform: Any = scale_by_galore(
            9, scale=1.0, projection=projection, inner=optax.identity(), update_gap=1
        )
        assert_close(run(transform, gradients), gradients, 1e-12)


# --- Inner transformations


def test_shapes_of_parameters_are_given_to_the_inner_transformation_and_values_are_not():
    params = {"w": jnp.ones((5, 8)), "b": jnp.ones(3)}
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    state: Any = scale_by_galore(2, inner=factored).init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state.inner[0].v_row)} == {(2,), (1,)}
    for reader in (
        optax.adamw(0.1),
        optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()),
        optax.scale_by_param_block_rms(),
        optax.adafactor(0.1),
    ):
        with pytest.raises(ValueError, match="inner must not read the values of parameters"):
            scale_by_galore(2, inner=reader).init(params)
    without_scale = optax.adafactor(0.1, multiply_by_parameter_scale=False, min_dim_size_to_factor=2)
    for inner in (without_scale, optax.scale_by_lion(), optax.sgd(1.0, momentum=0.9), optax.rmsprop(0.1)):
        updates: Any = run(scale_by_galore(2, inner=inner), jax.tree.map(lambda p: p[None], params))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


def test_dtypes_are_kept():
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
        gradients = {"wide": draw({"w": (5, 8)}, 2)["w"].astype(dtype)}
        transform: Any = scale_by_galore(2, update_gap=1, refresh="warm", moments="transport")
        last, updates = advance(transform, transform.init(like(gradients)), gradients)
        floating = [leaf for leaf in jax.tree.leaves((last, updates)) if leaf.dtype != jnp.int32]
        assert {leaf.dtype for leaf in floating} == {jnp.dtype(dtype)}
        P = np.asarray(last.bases.left["wide"], np.float64)
        # Two factorizations of columns of length five, each within five roundings.
        np.testing.assert_allclose(P.T @ P, np.eye(2), rtol=0, atol=10 * float(jnp.finfo(dtype).eps))


def test_gradients_of_another_dtype_leave_the_state_as_it_is():
    gradients = jax.tree.map(lambda g: g.astype(jnp.bfloat16), draw({"w": (5, 8)}, 3))
    transform: Any = scale_by_galore(2)
    state: Any = transform.init({"w": jnp.zeros((5, 8), jnp.float32)})
    last, updates = advance(transform, state, gradients)
    assert jax.tree.map(jnp.result_type, last) == jax.tree.map(jnp.result_type, state)
    assert updates["w"].dtype == jnp.bfloat16


# --- The whole optimizer


def model():
    names = (
        "embed/embedding",
        "layers/attention/query/kernel",
        "layers/attention/query/bias",
        "layers/MultiHeadAttention_0/out/kernel",
        "LayerNorm_0/kernel",
        "lm_head/kernel",
        "wte",
    )
    return dict.fromkeys(names, (5, 8))


def test_embeddings_heads_norms_and_biases_get_adam_and_all_decay_alike():
    gradients = draw(model(), GAP + 1)
    rate, decay = (lambda count: 0.1 * 0.5 ** count.astype(jnp.float64)), 0.2
    params: Any = jax.tree.map(lambda g: g[0] + 1.0, gradients)
    projected = {"layers/attention/query/kernel", "layers/MultiHeadAttention_0/out/kernel"}

    def train(optimizer) -> Any:
        def step(carry, gradient):
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), (params, updates)

        return compiled(lambda p, g: jax.lax.scan(step, (p, optimizer.init(p)), g)[1])(params, gradients)

    olds, updates = train(galore(rate, 2, weight_decay=decay, update_gap=GAP))
    adamw = train(optax.adamw(rate, weight_decay=decay))[1]
    steps = run(scale_by_galore(2, update_gap=GAP), {name: gradients[name] for name in projected})
    rates = 0.1 * 0.5 ** np.arange(GAP + 1)[:, None, None]
    for name in gradients:
        expected = -rates * (steps[name] + decay * olds[name]) if name in projected else adamw[name]
        np.testing.assert_allclose(updates[name], expected, rtol=0, atol=1e-12)
    adam = run(optax.adam(0.1), gradients)
    labels = {name: "galore" if name == "wte" else "adam" for name in gradients}
    for given in (labels, lambda path, leaf: labels[path]):
        plain = run(galore(0.1, 2, labels=given), gradients)
        assert {name for name in plain if not np.allclose(plain[name], adam[name])} == {"wte"}


def test_stacked_norms_are_no_matrices():
    params = {"layers": {"norm": {"scale": jnp.ones((3, 4))}, "kernel": jnp.ones((3, 4, 6))}}
    state: Any = galore(0.1, 2, matrix_axes=(-2, -1)).init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert shapes == {(), (3,), (3, 4), (3, 4, 2), (3, 2, 6)}


@pytest.mark.parametrize("moments", ["transport", "reset"])
def test_outside_of_jit_nothing_is_compiled_again(moments):
    gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), draw({"w": (5, 8)}, 4))
    # Gradients wider than the parameters, whose dtype the state keeps.
    transform: Any = scale_by_galore(2, update_gap=1, moments=moments)
    state = transform.init({"w": jnp.zeros((5, 8), jnp.bfloat16)})
    dtypes = jax.tree.map(jnp.result_type, state)
    for step in range(3):
        _, state = transform.update({"w": gradients["w"][step]}, state)
    assert jax.tree.map(jnp.result_type, state) == dtypes
    with count_compilations() as names:
        transform.update({"w": gradients["w"][3]}, state)
    assert names == []


def test_inner_transformations_that_wait_and_injected_hyperparameters():
    params = {"w": jnp.zeros((5, 8))}
    every_second = optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation()
    state: Any = scale_by_galore(2, inner=every_second).init(params)
    assert state.inner[0].inner_opt_state.mu["w"].shape == (2, 8)
    static = ("rank", "update_gap", "scale", "b1", "b2", "eps")
    injected = optax.inject_hyperparams(galore, static_args=static)(learning_rate=0.1, rank=2)
    injected_state: Any = injected.init(params)
    assert float(injected_state.hyperparams["learning_rate"]) == pytest.approx(0.1)


def test_flax_modules_are_labelled_by_their_attributes():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.mlp = nnx.Linear(4, 6, rngs=rngs)
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.head = nnx.Linear(6, 7, rngs=rngs)

    params = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    state: Any = jax.eval_shape(galore(0.1, 2).init, params)
    bases = state[0].inner_states["galore"].inner_state.bases
    assert [leaf.shape for leaf in jax.tree.leaves(bases)] == [(4, 2)]


def test_names_of_embeddings_heads_norms_and_biases_are_known_word_by_word():
    told = """
        unembed/kernel Unembed_0/kernel embedder/w token_embedding/w emb wte wpe/value logits/kernel
        classifier/kernel lm_head/w norm_1/w LayerNorm_0/kernel ln_f/w bn1/w mlp/scale mlp/gamma mlp/beta
        mlp/b mlp/bias pos position/w
    """
    hidden = "member/w heads/w header/w MultiHeadAttention_0/out/w normal/w scale/w b/kernel mlp/value"
    assert [name for name in told.split() if is_hidden_kernel(name, None)] == []
    assert [name for name in hidden.split() if not is_hidden_kernel(name, None)] == []
    # What a matrix is called is no bias, unless it is a letter alone.
    matrix, stacked = np.ones((3, 4)), np.ones((2, 4))
    assert all(is_hidden_kernel(name, matrix) for name in ("mlp/lora_b", "mlp/B", "W_beta"))
    assert not any(is_hidden_kernel(name, stacked) for name in ("layers/b", "layers/beta", "q/bias"))


# --- Sharding

SHARDED = """
import re
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models.galore import scale_by_galore

mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
jax.set_mesh(mesh)
specs = {"rows": P("d", None), "columns": P(None, "d"), "stack": P(None, "d", None), "bias": P("d")}
shapes = {"rows": (16, 24), "columns": (16, 24), "stack": (2, 24, 16), "bias": (16,)}
generator = np.random.default_rng(0)
host = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
gradients = {name: jax.device_put(host[name], NamedSharding(mesh, specs[name])) for name in host}
transform = scale_by_galore(4, matrix_axes=(-2, -1))
state = transform.init(gradients)
update = jax.jit(transform.update)
updates, after = update(gradients, state)
for here in (state, after):
    assert all(side.sharding.is_fully_replicated for side in jax.tree.leaves(here.bases))
    for moments in (here.inner[0].mu, here.inner[0].nu):
        assert moments["columns"].sharding.shard_shape((4, 24)) == (4, 3)
        assert moments["bias"].sharding.shard_shape((16,)) == (2,)
    assert here.inner[1].nu["stack"].sharding.shard_shape((2, 24, 4)) == (2, 3, 4)
program = update.lower(gradients, state).compile().as_text()
# Computations begin at the left margin; the branches of the cond are not the entry.
gathers = ("all-gather", "all-to-all", "collective-permute")
places = {
    computation.startswith("ENTRY"): any(f"{name}(" in computation for name in gathers)
    for computation in re.split(r"\\n(?=%|ENTRY)", program)
    if computation.startswith("ENTRY") or any(f"{name}(" in computation for name in gathers)
}
assert places == {True: False, False: True}, places
single, _ = update(host, transform.init(host))
for name in host:
    np.testing.assert_allclose(updates[name], single[name], rtol=0, atol=1e-5)
"""


def test_sharded_states_are_sharded_and_gathered_in_refreshes_only():
    root = Path(__file__).parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


# --- Sizes


def test_state_bytes_are_what_init_allocates():
    params = {"w": jnp.zeros((5, 8), jnp.float32), "stack": jnp.zeros((2, 5, 8), jnp.bfloat16)}
    params["bias"] = jnp.zeros(7, jnp.float32)
    cases: Any = (
        {"matrix_axes": (-2, -1), "moments": "reset", "stagger": True},
        {"inner": scale_by_adam_8bit(min_size=10), "projection": "full"},
    )
    for options in cases:
        allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(scale_by_galore(2, **options).init(params)))
        assert state_bytes(params, 2, **options) == allocated
        assert state_bytes(jax.eval_shape(lambda: params), 2, **options) == allocated


@pytest.mark.parametrize("projection", ["std", "reverse_std", "full"])
def test_the_state_has_the_size_of_the_formula(projection):
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    numbers = 0
    for shape in SHAPES.values():
        m, n = sorted(shape)
        r = min(RANK, m)
        sizes = {
            "std": m * r + 2 * n * r,
            "reverse_std": n * r + 2 * m * r,
            "full": (m + n) * r + 2 * r**2,
        }
        numbers += sizes[projection]
    assert state_bytes(shapes, RANK, projection=projection) == 4 * numbers + 8  # and two counts


# --- Eight bits


def test_codes_of_eight_bits_keep_to_their_bounds():
    generator = np.random.default_rng(0)
    transform: Any = scale_by_adam_8bit(block=16, min_size=0)
    gradient = generator.normal(size=(7, 11)) * 10.0 ** generator.integers(-6, 6, (7, 11))
    gradient = gradient.astype(np.float32)
    first: Any = jax.jit(transform.update)(gradient, transform.init(gradient))
    updates, state = first
    np.testing.assert_allclose(updates, run(optax.scale_by_adam(), gradient[None])[0], rtol=1e-6)
    assert (state.mu.codes.dtype, state.nu.codes.dtype) == (jnp.int8, jnp.uint8)
    flat = np.pad(np.asarray(gradient, np.float64).ravel(), (0, 3)).reshape(5, 16)
    m, root = 0.1 * flat, np.sqrt(0.001) * np.abs(flat)
    found_m = np.asarray(state.mu.peaks * state.mu.codes / 127, np.float64)
    found_root = np.asarray(np.sqrt(state.nu.peaks) * state.nu.codes / 255, np.float64)
    assert np.all(np.abs(found_m - m) <= 1.0001 * np.abs(m).max(axis=1, keepdims=True) / 127)
    assert np.all(np.abs(found_root - root) <= 1.0001 * root.max(axis=1, keepdims=True) / 255)
    assert np.all((found_root > 0) == (root > 0))


def test_eight_bits_follow_adam_over_many_steps():
    # Rows of very different sizes; after 100 steps every other column falls to a thirtieth, which the nearest
    # code would never follow.
    keys = jax.random.split(jax.random.key(0), 1000)
    sizes = 10.0 ** jnp.linspace(-3, 0, 16, dtype=jnp.float32)[:, None]

    @functools.partial(jax.jit, static_argnums=0)
    def total(transform):
        def step(carry, inputs):
            state, halves = carry
            k, key = inputs
            fall = jnp.where((k > 100) & (jnp.arange(256) % 2 == 1), 1 / 30, 1.0)[None, :]
            gradient = (
                sizes * fall.astype(jnp.float32) * (0.3 + jax.random.normal(key, (16, 256), jnp.float32))
            )
            updates, state = transform.update(gradient, state)
            return (state, halves + updates), None

        start = jnp.zeros((16, 256), jnp.float32)
        return jax.lax.scan(step, (transform.init(start), start), (jnp.arange(1000), keys))[0][1]

    exact, coded = total(optax.scale_by_adam()), total(scale_by_adam_8bit())
    for half, tolerance in ((0, 0.015), (1, 0.05)):
        error = jnp.linalg.norm((coded - exact)[:, half::2]) / jnp.linalg.norm(exact[:, half::2])
        assert float(error) < tolerance


def test_small_leaves_keep_32_bits():
    params = {"small": jnp.zeros(4095), "large": jnp.zeros(4096)}
    state: Any = scale_by_adam_8bit().init(params)
    assert state.mu.codes["small"].dtype == jnp.float32
    assert sum(leaf.nbytes for leaf in jax.tree.leaves([part["large"] for part in state.nu])) == 4096 + 4 * 16
    gradients = draw({"w": (5, 8)}, 4)
    assert_close(run(scale_by_adam_8bit(), gradients), run(optax.scale_by_adam(), gradients), 1e-5)


# --- Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2.5}, "rank must be a positive integer, got 2.5"),
        ({"rank": None}, "rank must be a number, a pytree of numbers or a function, got None"),
        ({"rank": {"v": 2}}, "rank must have a value for every projected leaf, got none for 'w'"),
        ({"rank": lambda path, leaf: -1}, "rank must be a positive integer, got -1"),
        ({"update_gap": 0}, "update_gap must be a positive integer, got 0"),
        ({"scale": np.nan}, "scale must be a finite number >= 0, got nan"),
        ({"scale": "big"}, "scale must be a finite number >= 0, got 'big'"),
        ({"projection": "up"}, "projection must be one of .*, got 'up'"),
        ({"refresh": "qr"}, "refresh must be one of .*, got 'qr'"),
        ({"moments": "keep"}, "moments must be one of .*, got 'keep'"),
        ({"eps_convention": "none"}, "eps_convention must be one of .*, got 'none'"),
        ({"inner": 3}, "inner must be an Optax transformation such as .*, got 3"),
        ({"inner": optax.scale_by_lion(), "b1": 0.8}, "b1, b2, eps and eps_convention must be left alone"),
        ({"inner": optax.scale_by_lion(), "moments": "transport"}, 'moments must not be "transport" unless'),
        ({"matrix_axes": 3}, "matrix_axes must be a pair .*, got 3"),
        ({"matrix_axes": (0, ())}, "matrix_axes must be a pair"),
        ({"matrix_axes": (0, 2)}, r"matrix_axes must be axes of 'w' of shape \(4, 6\), got \(0, 2\)"),
        ({"matrix_axes": (1, -1)}, r"matrix_axes must name each axis of 'w' at most once, got \(1, -1\)"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        scale_by_galore(**{"rank": 2, **options}).init({"w": jnp.zeros((4, 6))})
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="params must be real floating arrays, got int32 for 'w'"):
        scale_by_galore(2).init({"w": jnp.zeros((4, 6), jnp.int32)})
    with pytest.raises(ValueError, match='labels must be "galore" or "adam", got None for'):
        galore(0.1, 2, labels={"v": "galore"}).init({"w": jnp.zeros((4, 6))})
    with pytest.raises(ValueError, match="block must be a positive integer, got 0"):
        scale_by_adam_8bit(block=0)
    with pytest.raises(ValueError, match="min_size must be an integer >= 0, got -1"):
        scale_by_adam_8bit(min_size=-1)
