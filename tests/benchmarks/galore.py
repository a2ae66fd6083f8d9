"""GaLore on LLaMA-60M-shaped layers: against AdamW, Optax's own GaLore and the authors' PyTorch package.

All take the same steps in turns, in one process, each with its own parameters: a step is the update and its
application, compiled, with parameters and state given away. A basis is renewed every few steps, and those
steps are told from the others. Gradients have spectra that fall like a power and change by 30 % from refresh
to refresh. The energy that a new basis captures is over that of the best one, by a decomposition in float64;
the least of all refreshes and matrices of the first layer is shown.
The floor of a projected step is the time of its matrix products, P^T G and P N, alone.

    python -m tests.benchmarks.galore --rounds 6

times PyTorch as well where `torch` and `galore_torch` are installed.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tyro

from models.galore import galore, state_bytes
from models.galore.labels import is_hidden_kernel
from sims.startup import configure_jax

RATE = 1e-3
HIDDEN, INNER = 512, 1376


@dataclass(frozen=True)
class Options:
    """What is timed."""

    layers: int = 8
    """Layers."""
    vocab: int = 32_000
    """Words, of an embedding and a head that are not projected."""
    rank: int = 128
    """Rank."""
    gap: int = 4
    """Steps between two refreshes."""
    rounds: int = 6
    """Refreshes timed, after the first; each with the ordinary steps that follow."""
    seed: int = 0
    """Seed of the gradients."""


def main(options: Options) -> None:
    shapes = {f"layer{i}/{name}": shape for i in range(options.layers) for name, shape in _layer().items()}
    hidden = list(shapes)
    shapes |= {"embed": (options.vocab, HIDDEN), "lm_head": (HIDDEN, options.vocab)}
    rng = np.random.default_rng(options.seed)
    base = {name: _gradient(rng, shape) for name, shape in shapes.items()}
    noise = {name: 0.3 * np.std(G) * rng.standard_normal(G.shape, np.float32) for name, G in base.items()}
    # Two gradients in turns, 30 % apart, each for as long as a basis.
    gradients = [base, {name: base[name] + noise[name] for name in base}]
    runs = {name: _optax_run(optimizer, gradients) for name, optimizer in _optimizers(options).items()}
    if all(importlib.util.find_spec(name) for name in ("torch", "galore_torch")):
        runs |= {name: _torch_run(name, gradients, options) for name in ("torch AdamW", "torch GaLoreAdamW")}

    runs["products alone"] = _products_run(options.rank, {name: base[name] for name in hidden})

    steps = options.gap * (options.rounds + 1)
    seconds = {name: np.zeros(steps) for name in runs}
    energies: dict[str, list[float]] = {name: [] for name in runs}
    best = [
        {name: np.linalg.svd(np.asarray(G[name], float), compute_uv=False) for name in hidden[:7]}
        for G in gradients
    ]
    for step in range(steps):
        which = step // options.gap % 2
        for name, (take_step, look) in runs.items():
            started = time.perf_counter()
            take_step(which)
            seconds[name][step] = time.perf_counter() - started
            if step % options.gap == 0 and "galore," in name:
                energies[name] += _energies(look()[0], gradients[which], best[which])

    late = np.arange(steps) >= options.gap
    refresh = late & (np.arange(steps) % options.gap == 0)
    print(f"{options.layers} layers, {options.vocab} words, rank {options.rank}, float32; ", end="")
    print(f"{jax.devices()[0].device_kind}; medians of {options.rounds} refreshes")
    print("| | ordinary step | over AdamW | refresh | over optax's | energy captured | state |")
    print("|---|---|---|---|---|---|---|")
    adamw, theirs = seconds["optax.adamw"], seconds["optax.contrib.galore"]
    for name, (_, look) in runs.items():
        ordinary, slow = seconds[name][late & ~refresh], seconds[name][refresh]
        over = np.median(ordinary / adamw[late & ~refresh])
        row = [name, f"{1e3 * np.median(ordinary):.0f} ms", f"{over:.2f}"]
        if "galore" not in name.lower():
            row += ["", "", ""]
        else:
            row += [f"{1e3 * np.median(slow):.0f} ms", f"{np.median(slow / theirs[refresh]):.2f}"]
            row += [f"{min(energies[name]):.5f}" if energies[name] else ""]
        state = look()[1]
        print("| " + " | ".join([*row, f"{state / 1e6:.2f} MB" if state else ""]) + " |")

    matrices = {name: jax.ShapeDtypeStruct(shapes[name], jnp.float32) for name in hidden}
    numbers = sum(options.rank * (min(shapes[name]) + 2 * max(shapes[name])) for name in hidden)
    print(f"state of the {len(hidden)} matrices: {state_bytes(matrices, options.rank)} bytes; ", end="")
    print(f"m r + 2 n r numbers: {4 * numbers} bytes (two step counts are the difference)")


def _layer() -> dict[str, tuple[int, int]]:
    kernels = dict.fromkeys(("query", "key", "value", "output"), (HIDDEN, HIDDEN))
    return kernels | dict.fromkeys(("gate", "up"), (HIDDEN, INNER)) | {"down": (INNER, HIDDEN)}


def _gradient(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    short = min(shape)
    left = rng.standard_normal((shape[0], short), np.float32)
    return (left * np.arange(1, short + 1, dtype=np.float32) ** -0.7) @ rng.standard_normal(
        (short, shape[1]), np.float32
    )


def _optimizers(options: Options) -> dict[str, Any]:
    def labels(params):
        return {name: "galore" if is_hidden_kernel(name, None) else "adam" for name in params}

    theirs = optax.contrib.galore(RATE, options.rank, options.gap, 0.25)
    ours = {
        refresh: galore(RATE, options.rank, update_gap=options.gap, refresh=refresh)
        for refresh in ("eigh", "warm")
    }
    return {
        "optax.adamw": optax.adamw(RATE),
        "optax.contrib.galore": optax.partition({"galore": theirs, "adam": optax.adam(RATE)}, labels),
        **{f"galore, {refresh}": optimizer for refresh, optimizer in ours.items()},
    }


def _optax_run(optimizer: optax.GradientTransformation, gradients: list[dict[str, np.ndarray]]) -> Any:
    """A step, and a look at the bases and at the bytes of the state."""

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    on_device = [jax.tree.map(jnp.asarray, gradient) for gradient in gradients]
    params = jax.tree.map(jnp.zeros_like, on_device[0])
    carried = [params, optimizer.init(params)]
    # Compiled before it is timed.
    compiled = compiled.lower(*carried, on_device[0]).compile()

    def take_step(index: int) -> None:
        carried[:] = jax.block_until_ready(compiled(*carried, on_device[index]))

    def look() -> tuple[dict[str, Any], int]:
        leaves = jax.tree_util.tree_leaves_with_path(carried[1])
        bases = {}
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path)
            if ".bases" in name:
                bases[name.split(".bases")[1].split("'")[1]] = (np.asarray(leaf), ".left" in name)
        return bases, sum(leaf.nbytes for _, leaf in leaves)

    return take_step, look


def _products_run(rank: int, gradients: dict[str, np.ndarray]) -> Any:
    """The products of a projected step on the short side, and no bases or state to look at."""

    Gs = [jnp.asarray(G) for G in gradients.values()]
    Ps = [jnp.eye(min(G.shape), rank) for G in Gs]
    compiled = jax.jit(
        lambda Ps, Gs: [
            P @ (P.T @ G) if G.shape[0] <= G.shape[1] else (G @ P) @ P.T for P, G in zip(Ps, Gs, strict=True)
        ]
    )
    jax.block_until_ready(compiled(Ps, Gs))
    return lambda index: jax.block_until_ready(compiled(Ps, Gs)), lambda: ({}, 0)


def _torch_run(name: str, gradients: list[dict[str, np.ndarray]], options: Options) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from galore_torch import GaLoreAdamW  # pyright: ignore[reportMissingImports]

    # PyTorch's kernels are (out, in).
    weights = {key: torch.nn.Parameter(torch.zeros(G.T.shape)) for key, G in gradients[0].items()}
    held = [{key: torch.tensor(np.ascontiguousarray(G.T)) for key, G in each.items()} for each in gradients]
    hidden = [weight for key, weight in weights.items() if is_hidden_kernel(key, None)]
    others = [weight for key, weight in weights.items() if not is_hidden_kernel(key, None)]
    if "GaLore" in name:
        group = {"rank": options.rank, "update_proj_gap": options.gap, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": others}, {"params": hidden, **group}]
        optimizer = GaLoreAdamW(groups, lr=RATE, no_deprecation_warning=True)
    else:
        optimizer = torch.optim.AdamW(list(weights.values()), lr=RATE, weight_decay=0.0)

    def take_step(index: int) -> None:
        for key, weight in weights.items():
            weight.grad = held[index][key]
        optimizer.step()

    def look() -> tuple[dict[str, Any], int]:
        total = 0
        for state in optimizer.state.values():
            held_here = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
            total += sum(x.numel() * x.element_size() for x in held_here if torch.is_tensor(x))
        return {}, total

    return take_step, look


def _energies(
    bases: dict[str, Any], gradient: dict[str, np.ndarray], best: dict[str, np.ndarray]
) -> list[float]:
    """Energy captured by the basis of each matrix, over the largest there is."""
    ratios = []
    for name, values in best.items():
        basis, left = bases[name]
        G = np.asarray(gradient[name], float)
        projected = np.asarray(basis, float).T @ (G if left else G.T)
        ratios.append(float(np.sum(projected**2) / np.sum(values[: basis.shape[1]] ** 2)))
    return ratios


if __name__ == "__main__":
    configure_jax(x64=False)
    main(tyro.cli(Options, description=__doc__))
