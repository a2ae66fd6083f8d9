"""Memory of GaLore, LoRA and Adam on LLaMA shapes: the printed tables recomputed, and compiled programs.

Nothing here is trained or even allocated: sizes come from the formulas, from the shapes that the optimizers
would allocate, and from what the compiler says that a compiled training step needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.galore import Layerwise, Stack, galore, layerwise, scale_by_adam_8bit, state_bytes
from models.llama import SHAPES, Shape, Size, block, embed, joint_step, next_token_loss, param_shapes
from models.lowrank import LoraParams, lora_params, low_rank_params
from models.memory import Memory, compiled_bytes, full_rank_memory, galore_memory, lora_memory, nbytes
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, corrected, equals, every, qualified, quoted, stated
from sims.ranges import Count
from sims.results import Context, Saved

BYTES = 2  # of a bfloat16 number
GB = 1e9
BATCH = 512 * 256  # tokens per step of the printed runs: sequences times their length
TABLE = ("60M", "130M", "350M", "1B")  # with printed totals
# Heads and layers as printed, and a width to which the printed rank has the printed ratio.
AS_PRINTED = {
    "1B": SHAPES["1B"]._replace(layers=32, heads=24),
    "60M": SHAPES["60M"]._replace(hidden=256, intermediate=688),
}
# Printed: weights and optimizer states in GB, one number per model of the table.
PRINTED = {
    "Full-Rank": (0.36, 0.76, 2.06, 7.80),
    "GaLore": (0.24, 0.52, 1.22, 4.38),
    "LoRA": (0.36, 0.80, 1.76, 6.17),
    "Low-Rank": (0.26, 0.54, 1.08, 3.57),
}
METHODS: dict[str, Callable[[int, int, int], Memory]] = {
    "Full-Rank": lambda m, n, rank: full_rank_memory(m, n),
    "GaLore": galore_memory,
    "LoRA": lora_memory,
    "Low-Rank": lambda m, n, rank: lora_memory(m, n, rank, frozen=False),
}
STEPS = (10_000, 20_000, 60_000, 100_000)
TOKENS_PRINTED = (1.1, 2.2, 6.4, 13.1)  # in 1e9, beside the totals
DATA_PRINTED = (1.3, 2.6, 7.8, 13.1)  # beside the sizes and steps
REDUCTION_PRINTED = (65.5, 82.5)  # percent of the optimizer's memory at 7B, 16-bit and 8-bit
BAR_PRINTED = (58.0, 24.0)  # GB at 7B: Adam, 8-bit GaLore with per-layer updates
PROGRAMS = ("Adam", "GaLore, joint update", "8-bit GaLore, per layer")
# What is printed on large runs: the statement, its place, and what a test would take.
QUOTED = {
    "rtx-4090": (
        "Training 7B, 8-bit AdamW takes 40 GB at 1,434 tokens per second; 8-bit GaLore 28, 29 and 36 GB at "
        "1,532, 1,532 and 1,238 for ranks 16, 128 and 1024; 16-bit GaLore of rank 128 takes 30 GB at 1,615, "
        "and 18 GB at 1,587 where gradients are not retained, as the 24 GB of an RTX 4090 want it",
        "the talk's slide on 7B on an RTX 4090 (memory and speed)",
        "that card and, for five of the six rows, a larger one, with 8-bit kernels for the optimizer",
    ),
    "svd-time": (
        "The SVDs of a 7B model take around ten minutes, once in 500 to 1,000 steps",
        "the talk's slide on 7B on an RTX 4090 (time of an SVD)",
        "the singular vectors of the 224 matrices of 7B on such a card",
    ),
    "perplexity": (
        "On C4, 60M to 1B: perplexity 34.88, 25.36, 18.95 and 15.64 with GaLore, 34.06, 25.08, 18.80 and "
        "15.56 in full rank, and more with low-rank weights, LoRA and ReLoRA",
        "Table 2 (perplexities)",
        "C4, and 1.1 to 13.1 billion tokens of it for each method",
    ),
    "half-rank": (
        "At 1B with half of the rank, 1024 of 2048, perplexity is better, about 14.97",
        "the talk's slide on pretraining (half rank)",
        "C4, and 13.1 billion tokens of it at 1B",
    ),
    "update-frequency": (
        "A basis that changes too often or too seldom costs perplexity at 130M, for ranks 64 to 512",
        "the talk's slide on how often to change P (perplexities)",
        "C4, and a pretraining run of 130M for each rank and frequency",
    ),
    "7b-perplexity": (
        "7B on C4: perplexity 17.94, 15.39, 14.95 and 14.65 after 40, 80, 120 and 150 thousand steps of "
        "8-bit GaLore, 18.09, 15.47, 14.83 and 14.61 of 8-bit Adam",
        "Table 3",
        "19.7 billion tokens of C4 twice, on the 8 x 8 A100 that were used or the like",
    ),
}


@dataclass(frozen=True)
class Config:
    """The training step that is compiled."""

    model: Size = "60M"
    """Which model's step."""
    tokens: Count = 256
    """Tokens of the one sequence in a batch."""


_WHOLE = Config(model="7B", tokens=2048)
PRESETS: dict[Preset, Config] = {"quick": Config(), "standard": _WHOLE, "paper": _WHOLE}


def _matrices(params: Stack) -> dict[str, tuple[int, int]]:
    """The matrices of one layer that GaLore projects."""
    return {name: leaf.shape[1:] for name, leaf in params.layers.items() if len(leaf.shape) == 3}


def _axes(path: str, leaf: Any) -> tuple[int, int] | None:
    """The matrices of a stack have the layers in front."""
    return (-2, -1) if path.startswith("layers/") and leaf.ndim == 3 else None


def _size(leaves: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(leaves))


def _memory(shape: Shape, method: str) -> tuple[int, int]:
    """Weights and optimizer state in numbers: the method on the layers' matrices, Adam on the rest."""
    params = param_shapes(shape)
    sizes = _matrices(params).values()
    parts = [METHODS[method](m, n, shape.rank) for m, n in sizes]
    rest = _size(params) - shape.layers * sum(m * n for m, n in sizes)
    weights = shape.layers * sum(part.weights for part in parts) + rest
    return weights, shape.layers * sum(part.states + part.projection for part in parts) + 2 * rest


def _allocated(shape: Shape, method: str) -> tuple[int, int, int]:
    """Numbers of the weights and of the optimizer by their shapes, and the step counts there are besides."""
    params, optimizer = param_shapes(shape), optax.adam(1e-3)
    if method == "GaLore":
        optimizer = galore(1e-3, shape.rank, matrix_axes=_axes)

    def rank(path, leaf):
        return shape.rank if _axes(path, leaf) else None

    adapted = {
        "LoRA": lambda params: lora_params(params, rank, jax.random.key(0)),
        "Low-Rank": lambda params: low_rank_params(params, rank),
    }
    if method in adapted:
        params = jax.eval_shape(adapted[method], params)
    trained = params.trained if isinstance(params, LoraParams) else params
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, trained))
    floating = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return _size(params), _size(floating), _size(leaves) - _size(floating)


def _one_layer_bytes(shape: Shape) -> tuple[int, int]:
    """Bytes of the state of one layer's matrices: by the formula, and as `state_bytes` has it."""
    sizes = _matrices(param_shapes(shape))
    layer = {name: jax.ShapeDtypeStruct(size, jnp.bfloat16) for name, size in sizes.items()}
    parts = [galore_memory(m, n, shape.rank) for m, n in sizes.values()]
    return BYTES * sum(part.states + part.projection for part in parts), state_bytes(layer, shape.rank)


def _per_layer(shape: Shape) -> Layerwise:
    """8-bit GaLore that updates layer by layer."""
    moments = scale_by_adam_8bit()
    optimizer = galore(1e-3, shape.rank, inner=moments, plain=moments)
    return layerwise(optimizer, embed, partial(block, heads=shape.heads), next_token_loss)


def _programs(config: Config, context: Context) -> dict[str, np.ndarray]:
    """Bytes of each of the programs: weights, states, what is updated in place, temporaries."""
    shape = SHAPES[config.model]
    params = param_shapes(shape)
    adam, low_rank = optax.adam(1e-3), galore(1e-3, shape.rank, matrix_axes=_axes)
    by_layer = _per_layer(shape)
    steps = (
        (joint_step(adam, shape.heads), adam.init),
        (joint_step(low_rank, shape.heads), low_rank.init),
        (by_layer.step, by_layer.init),
    )
    batch, found = jax.ShapeDtypeStruct((config.tokens + 1,), jnp.int32), []
    for index, (name, (step, init)) in enumerate(zip(PROGRAMS, steps, strict=True)):
        context.progress(f"compiling {config.model}: {name}", 0.3 + 0.2 * index)
        found.append(compiled_bytes(step, params, jax.eval_shape(init, params), batch))
    return {name: np.array([program[name] for program in found]) for name in found[0]}


def run(config: Config, context: Context) -> dict:
    """Count, ask the optimizers what they would allocate, and compile the training steps."""
    context.progress("counting", 0.0)
    counted = np.array([[_memory(shape, name) for shape in SHAPES.values()] for name in METHODS])
    layers = np.array([_one_layer_bytes(shape) for shape in SHAPES.values()])
    as_printed = {name: BYTES / GB * sum(_memory(shape, "Full-Rank")) for name, shape in AS_PRINTED.items()}
    context.progress("asking the optimizers", 0.1)
    allocated = np.array([[_allocated(shape, name) for shape in SHAPES.values()] for name in METHODS])
    seven, heads = SHAPES["7B"], (AS_PRINTED["1B"].heads, SHAPES["1B"].heads)
    return {
        "method": ("method", np.array(list(METHODS))),
        "model": ("model", np.array(list(SHAPES))),
        "number": ("method model", {"weights": counted[..., 0], "states": counted[..., 1]}),
        "layer": ("model", {"formula": layers[:, 0], "allocated": layers[:, 1]}),
        "allocated": ("method model", {"weights": allocated[..., 0], "states": allocated[..., 1]}),
        "counts": ("model", allocated[list(METHODS).index("GaLore"), :, 2]),
        "allocated_8bit": nbytes(jax.eval_shape(_per_layer(seven).init, param_shapes(seven))),
        "as_printed": as_printed,
        "heads": ("heads", np.array(heads)),
        "left_over": ("heads", SHAPES["1B"].hidden % np.array(heads)),
        "size": ("size", np.array(TABLE)),
        "tokens": ("size", BATCH * np.array(STEPS) / 1e9),
        "program": ("program", np.array(PROGRAMS)),
        "bytes": ("program", _programs(config, context)),
    }


def _totals(saved: Saved) -> dict[str, np.ndarray]:
    """Weights and states by the formula in GB, of the models of the table, by method."""
    numbers = saved["number/weights"] + saved["number/states"]
    return dict(zip(METHODS, BYTES / GB * numbers[:, : len(TABLE)], strict=True))


def _reduction(saved: Saved) -> np.ndarray:
    """Percent less than Adam at 7B: in 16 bits, in 8 with the bases, in 8 without these."""
    states = dict(zip(METHODS, saved["number/states"][:, -1], strict=True))
    kept = np.array([BYTES * states["GaLore"], states["GaLore"], saved["allocated_8bit"]])
    return 100 * (1 - kept / (BYTES * states["Full-Rank"]))


def _step_gb(saved: Saved) -> np.ndarray:
    """Memory of a compiled step in GB, (program,)."""
    return (saved["bytes/weights"] + saved["bytes/states"] + saved["bytes/temporaries"]) / GB


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The formula and what it gives at 7B, the printed tables, and the compiled steps."""
    yield from _optimizer_state(saved)
    yield from _tables(saved)
    of_program = saved["bytes"]
    both = of_program["weights"] + of_program["states"]
    yield stated(
        "in_place",
        "Compiled, all updates are in place: no second copy of weights and optimizer states",
        "derived here",
        every("programs that alias weights and states byte by byte", of_program["in_place"] == both),
    )
    (full, joint, by_layer), (adam, below) = _step_gb(saved), BAR_PRINTED
    copies = "four copies of 13.5 GB are printed as 14; activations vary by a tenth"
    gradients = "weights and all gradients are 27 GB, and a CPU's float32 copies add to it"
    yield qualified(
        "bar",
        "A training step of 7B with one sequence takes 58 GB with Adam and less than 24 GB with 8-bit GaLore",
        "zhao2024galore, section 1 and Figure 1",
        condition="gradients are used and forgotten layer by layer",
        inside=[
            equals("Adam: GB", full, adam, 0.1 * adam, why=copies),
            at_most("8-bit GaLore, per layer: GB", by_layer, below, why="the printed number itself"),
        ],
        outside=[at_least("GaLore, joint update: GB", joint, below, why=gradients)],
        preset="standard",
    )
    for name, (statement, place, needs) in QUOTED.items():
        yield quoted(name, statement, f"zhao2024galore, {place}", needs=needs)


def _optimizer_state(saved: Saved) -> Iterator[Claim]:
    # One count of Adam's per layer of the stack, one of GaLore's, one of the other parameters' Adam.
    counts = np.array([shape.layers + 2 for shape in SHAPES.values()])
    more = saved["layer/allocated"] - saved["layer/formula"]
    states = dict(zip(METHODS, saved["number/states"], strict=True))
    yield stated(
        "formula",
        "A matrix (m, n), m <= n, takes m n + m r + 2 n r numbers with GaLore",
        "zhao2024galore, Table 1",
        every(
            "models whose state has the numbers of the formula",
            saved["allocated/states"][list(METHODS).index("GaLore")] == states["GaLore"],
        ),
        every(
            "models with one count per layer and two more, and nothing else",
            saved["counts"] == counts,
        ),
        every(
            "models where one layer's state is the formula and 8 bytes",
            more == 8,
            why="two counts of four bytes: of the refreshes and of Adam",
        ),
    )
    (half, byte, moments), (printed_half, printed_byte) = _reduction(saved), REDUCTION_PRINTED
    point = "shares of norms, embedding and head, and how GB are counted, are not printed"
    yield stated(
        "reduction",
        "At 7B with rank 1024 in bfloat16 the optimizer takes 65.5 % less than Adam",
        "zhao2024galore, section 1",
        equals("reduction in percent", half, printed_half, 1.0, why=point),
    )
    weights = BYTES * saved["number/weights"][0, -1]  # in full rank
    galore_gb, adam_gb = ((weights + states[name][-1]) / GB for name in ("GaLore", "Full-Rank"))
    whole, scales = "printed in whole GB", "bases of two bytes, moments of one and their scales"
    yield corrected(
        "eight_bit_adam",
        "8-bit Adam takes 26 GB at 7B with the weights; corrected: 27",
        "zhao2024galore, Table 3",
        printed=[equals("printed: GB with the weights", adam_gb, 26.0, 0.5, why=whole)],
        mended=[equals("GB with the weights", adam_gb, 27.0, 0.5, why=whole)],
    )
    yield qualified(
        "eight_bit",
        "8-bit GaLore takes 82.5 % less than Adam at 7B, and 18 GB with the weights",
        "zhao2024galore, section 1 and Table 3",
        condition="the bases, too, take one byte per number",
        inside=[
            equals("reduction, one byte per number", byte, printed_byte, 1.0, why=point),
            equals("GB with the weights, GaLore", galore_gb, 18.0, 0.5, why=whole),
        ],
        outside=[at_most("reduction, the moments alone in 8 bits", moments, printed_byte - 1, why=scales)],
    )


def _tables(saved: Saved) -> Iterator[Claim]:
    totals = _totals(saved)
    off = {name: np.max(np.abs(totals[name] / PRINTED[name] - 1)) for name in PRINTED}
    ours, printed = (
        np.stack([np.array(table["GaLore"]) < table[name] for name in ("Full-Rank", "LoRA")])
        for table in (totals, PRINTED)
    )
    gb = "counting GB or GiB makes 7 %, rounding to two digits the rest"
    yield corrected(
        "table",
        "Weights and optimizer states from 60M to 1B are as printed; corrected: as by the formula",
        "zhao2024galore, Table 2",
        printed=[
            at_most(f"printed: {name}, largest deviation of a total", off[name], 0.08, why=gb)
            for name in PRINTED
        ],
        mended=[
            every(
                "formula: all methods and sizes whose parameters and optimizers have its numbers",
                [saved[f"allocated/{part}"] == saved[f"number/{part}"] for part in ("weights", "states")],
                why="counted by shapes, of what is trained",
            ),
            every(
                "GaLore below full rank and below LoRA, every size, as printed",
                ours & printed,
                why="the order is what the table is for",
            ),
        ],
    )
    yield from _sizes(saved, gb)


def _sizes(saved: Saved, gb: str) -> Iterator[Claim]:
    """The sizes of the models that the tables name, and the tokens they were trained on."""
    totals = _totals(saved)
    one_b, sixty_m = (
        saved["as_printed"][name] / PRINTED["Full-Rank"][TABLE.index(name)] for name in AS_PRINTED
    )
    first, *_, last = totals["Full-Rank"] / PRINTED["Full-Rank"]
    left_over, evenly = saved["left_over"], "heads share the hidden width evenly"
    yield corrected(
        "one_b",
        "The 1B model has 24 heads and 32 layers; corrected: 32 heads and 24 layers",
        "zhao2024galore, appendix C, sizes of the models",
        printed=[
            at_most("printed: width left over by heads", left_over[0], 0.0, why=evenly),
            equals("printed: its total over the printed GB", one_b, 1.0, 0.08, why=gb),
        ],
        mended=[
            at_most("width left over by 32 heads", left_over[1], 0.0, why=evenly),
            equals("24 layers: total over the printed GB", last, 1.0, 0.08, why=gb),
        ],
    )
    label = "full-rank total at width 256, over the printed GB"
    yield corrected(
        "rank_over_width",
        "The 60M model has r / d_model = 128 / 256; corrected: 128 / 512",
        "zhao2024galore, Table 2",
        printed=[equals(f"printed: {label}", sixty_m, 1.0, 0.08, why=gb)],
        mended=[equals("total at width 512, over the printed GB", first, 1.0, 0.08, why=gb)],
    )
    totals_off, steps_off = (
        np.max(np.abs(saved["tokens"] - printed)) for printed in (TOKENS_PRINTED, DATA_PRINTED)
    )
    tenth = "printed to a tenth of a billion, some rounded down"
    yield corrected(
        "tokens",
        "Training took 1.1, 2.2, 6.4 and 13.1 billion tokens; corrected: steps x 512 x 256 of them",
        "zhao2024galore, Table 2 and appendix C",
        printed=[at_most("printed beside the totals: largest distance, 1e9", totals_off, 0.1, why=tenth)],
        mended=[at_most("printed beside the steps: largest distance, 1e9", steps_off, 0.1, why=tenth)],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """The table ours beside printed and their ratio, the reduction at 7B, and the compiled bars."""
    drawn, ((table, ratio), (reduction, bar)) = plotting.new_figure(2, 2, width=5.0, height=3.5)
    totals, place = _totals(saved), np.arange(len(TABLE))
    for index, (name, printed) in enumerate(PRINTED.items()):
        x, ours = place + 0.2 * (index - 1.5), totals[name]
        table.bar(x, ours, 0.18, color=f"C{index}", alpha=0.85, label=name)
        table.plot(x, printed, "_", color="black", markersize=9, markeredgewidth=1.8)
        ratio.plot(place, ours / printed, "o-", color=f"C{index}", label=name)
    table.plot([], [], "_", color="black", markersize=9, markeredgewidth=1.8, label="printed")
    table.set(yscale="log", ylabel="weights and states (GB)", ylim=(0.1, 30))
    table.set_title("Table of sizes: formula and printed")
    table.legend(loc="upper left", ncols=2)

    one_b = saved["as_printed/1B"] / PRINTED["Full-Rank"][-1]
    ratio.plot(place[-1], one_b, "D", color="C0", markerfacecolor="white", label="Full-Rank, 32 layers")
    ratio.axhline(1, **plotting.THEORY)
    ratio.set(ylabel="formula / printed", ylim=(0.6, 1.65), title="Which printed totals the formula gives")
    ratio.legend(loc="upper left", ncols=2)
    for ax in (table, ratio):
        ax.set_xticks(place, TABLE)
        ax.set_xlabel("model")

    ways = ("16-bit", "8-bit,\nbases too", "8-bit,\nmoments only")
    bars = reduction.bar(range(3), _reduction(saved), 0.6, color=["C0", "C1", "C2"], alpha=0.85)
    reduction.bar_label(bars, fmt="%.1f %%", padding=2)
    for x, printed in enumerate(REDUCTION_PRINTED):
        reduction.hlines(printed, x - 0.4, x + 0.4, label=f"printed: {printed} %", **plotting.THEORY)
    reduction.set_xticks(range(3), ways)
    reduction.set(xlabel="state of GaLore", ylabel="less than Adam (%)", ylim=(0, 118))
    reduction.set_title("Optimizer memory saved at 7B, rank 1024")
    reduction.legend(loc="upper left", ncols=2)
    _draw_steps(bar, config, saved)
    return drawn


def _draw_steps(ax: Axes, config: Config, saved: Saved) -> None:
    """What each compiled step needs, in parts."""
    weights, states, temporaries = (saved[f"bytes/{name}"] for name in ("weights", "states", "temporaries"))
    # A joint update holds all gradients at once; of temporaries of one layer the compiler does not tell more.
    gradients = np.array([1, 1, 0]) * weights
    parts = {
        "weights": weights,
        "optimizer": states,
        "gradients": gradients,
        "activations, workspace": temporaries - gradients,
    }
    base, places = np.zeros(len(PROGRAMS)), range(len(PROGRAMS))
    for index, (name, part) in enumerate(parts.items()):
        ax.bar(places, part / GB, 0.6, bottom=base, color=f"C{index}", label=name, alpha=0.85)
        base = base + part / GB
    for x, total in enumerate(_step_gb(saved)):
        ax.text(x, total + 0.02 * max(base), f"{total:.3g} GB", ha="center", va="bottom")
    if config.model == "7B":
        for x, printed in zip((0, 2), BAR_PRINTED, strict=True):
            ax.hlines(printed, x - 0.4, x + 0.4, **plotting.THEORY)
        ax.plot([], [], label="printed: 58 GB, 24 GB", **plotting.THEORY)
    ax.set_xticks(places, [name.replace(", ", ",\n") for name in PROGRAMS])
    ax.set(xlabel="training step", ylabel="memory of a step (GB)", ylim=(0, 1.6 * max(base)))
    ax.set_title(f"Compiled step of {config.model}, {config.tokens} tokens")
    ax.legend(loc="upper left", ncols=2)
