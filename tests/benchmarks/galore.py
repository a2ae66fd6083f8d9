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
from collections.abc import Callable
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Options:
    """What is timed."""

    layers: int = 8
    """Layers."""
    vocab: int = 32_000
    """Words, of an embedding and a head that are not projected."""
    width: int = 512
    """Width of the hidden states."""
    inner: int = 1376
    """Width inside of an MLP."""
    rank: int = 128
    """Rank."""
    gap: int = 4
    """Steps between two refreshes."""
    rounds: int = 6
    """Refreshes timed, after the first; each with the ordinary steps that follow."""
    seed: int = 0
    """Seed of the gradients."""


def main(options: Options) -> None:
    show(measure(options))


def measure(options: Options) -> dict[str, Any]:
    """Times in seconds, energies and bytes of state of each optimizer, as numbers and words alone."""
    layer = _layer(options)
    shapes = {f"layer{i}/{name}": layer[name] for i in range(options.layers) for name in layer}
    hidden = list(shapes)
    shapes |= {"embed": (options.vocab, options.width), "lm_head": (options.width, options.vocab)}
    rng = np.random.default_rng(options.seed)
    base = {name: _gradient(rng, shape) for name, shape in shapes.items()}
    noise = {name: 0.3 * np.std(G) * rng.standard_normal(G.shape, np.float32) for name, G in base.items()}
    # Two gradients in turns, 30 % apart, each for as long as a basis.
    gradients = [base, {name: base[name] + noise[name] for name in base}]
    runs = {name: _optax_run(optimizer, gradients) for name, optimizer in _optimizers(options).items()}
    if all(importlib.util.find_spec(name) for name in ("torch", "galore_torch")):
        runs |= {name: _torch_run(name, gradients, options) for name in ("torch AdamW", "torch GaLoreAdamW")}
    runs["products alone"] = _products_run(options.rank, {name: base[name] for name in hidden})

    seconds, energies = _take_turns(options, runs, gradients, hidden[:7])
    matrices = {name: jax.ShapeDtypeStruct(shapes[name], jnp.float32) for name in hidden}
    numbers = sum(options.rank * (min(shapes[name]) + 2 * max(shapes[name])) for name in hidden)
    return {
        "options": asdict(options),
        "device": jax.devices()[0].device_kind,
        "rows": _rows(options, runs, seconds, energies),
        "matrices": len(hidden),
        "state bytes of the matrices": state_bytes(matrices, options.rank),
        "bytes of m r + 2 n r numbers": 4 * numbers,
    }


def _take_turns(
    options: Options, runs: dict[str, Any], gradients: list[dict[str, np.ndarray]], looked_at: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Seconds of each step, and the energy captured at each refresh, of every run."""
    steps = options.gap * (options.rounds + 1)
    seconds = {name: np.zeros(steps) for name in runs}
    energies: dict[str, list[float]] = {name: [] for name in runs}
    best = [
        {name: np.linalg.svd(np.asarray(G[name], float), compute_uv=False) for name in looked_at}
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
    return seconds, energies


def _rows(
    options: Options,
    runs: dict[str, Any],
    seconds: dict[str, np.ndarray],
    energies: dict[str, list[float]],
) -> dict[str, dict[str, float]]:
    """Medians after the first refresh, and of ratios taken step by step."""
    step = np.arange(options.gap * (options.rounds + 1))
    ordinary = (step >= options.gap) & (step % options.gap != 0)
    refresh = (step >= options.gap) & (step % options.gap == 0)
    rows = {}
    for name, (_, look) in runs.items():
        own, adamw, theirs = seconds[name], seconds["optax.adamw"], seconds["optax.contrib.galore"]
        row = {
            "ordinary step": float(np.median(own[ordinary])),
            "over AdamW": float(np.median(own[ordinary] / adamw[ordinary])),
        }
        if "galore" in name.lower():
            row["refresh"] = float(np.median(own[refresh]))
            row["over optax's"] = float(np.median(own[refresh] / theirs[refresh]))
        if energies[name]:
            row["energy captured"] = min(energies[name])
        if state := look()[1]:
            row["state"] = state
        rows[name] = row
    return rows


def show(measured: dict[str, Any]) -> None:
    """Print the table."""
    options = Options(**measured["options"])
    print(f"{options.layers} layers, {options.vocab} words, rank {options.rank}, float32; ", end="")
    print(f"{measured['device']}; medians of {options.rounds} refreshes")
    columns: dict[str, Callable[[float], str]] = {
        "ordinary step": lambda s: f"{1e3 * s:.3g} ms",
        "over AdamW": "{:.2f}".format,
        "refresh": lambda s: f"{1e3 * s:.3g} ms",
        "over optax's": "{:.2f}".format,
        "energy captured": "{:.5f}".format,
        "state": lambda size: f"{size / 1e6:.2f} MB",
    }
    print("| | " + " | ".join(columns) + " |")
    print("|" + "---|" * (len(columns) + 1))
    for name, row in measured["rows"].items():
        cells = [form(row[column]) if column in row else "" for column, form in columns.items()]
        print("| " + " | ".join([name, *cells]) + " |")
    print(
        f"state of the {measured['matrices']} matrices: {measured['state bytes of the matrices']} bytes; "
        f"m r + 2 n r numbers: {measured['bytes of m r + 2 n r numbers']} bytes "
        "(two step counts are the difference)"
    )


def _layer(options: Options) -> dict[str, tuple[int, int]]:
    d, inner = options.width, options.inner
    kernels = dict.fromkeys(("query", "key", "value", "output"), (d, d))
    return kernels | dict.fromkeys(("gate", "up"), (d, inner)) | {"down": (inner, d)}


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
