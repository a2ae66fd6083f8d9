"""Memory of a weight matrix and its Adam state: at full rank, with LoRA, with GaLore; bytes of programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

from dynamics.arguments import require_choice, require_sizes

Projection = Literal["std", "reverse_std", "left", "right", "full"]


class Memory(NamedTuple):
    """What one weight matrix and its Adam state take, in numbers.

    Attributes:
        weights: numbers in the matrix, adaptors included.
        states: numbers in both moments.
        projection: numbers in the bases.
    """

    weights: int
    states: int
    projection: int

    @property
    def total(self) -> int:
        """Weights, states and projection together."""
        return self.weights + self.states + self.projection


def full_rank_memory(m: int, n: int) -> Memory:
    """Adam on the whole matrix: m n weights, 2 m n of state.

    Source: zhao2024galore, Table 1.

    Example:
        >>> full_rank_memory(4, 6).total
        72
    """
    m, n = require_sizes(m=m, n=n)
    return Memory(m * n, 2 * m * n, 0)


def lora_memory(m: int, n: int, rank: int, *, frozen: bool = True) -> Memory:
    """Adam on the factors of W_0 + B A: m n + m r + n r weights, 2 (m r + n r) of state.

    Source: zhao2024galore, Table 1.

    Args:
        m: rows.
        n: columns.
        rank: r, at most min(m, n) of which counts.
        frozen: whether W_0 is kept; without it, W = B A.

    Example:
        >>> lora_memory(4, 6, 2).total  # m n + 3 (m r + n r)
        84
    """
    m, n, rank = require_sizes(m=m, n=n, rank=rank)
    factors = (m + n) * min(rank, m, n)
    return Memory(m * n * frozen + factors, 2 * factors, 0)


def galore_memory(m: int, n: int, rank: int, projection: Projection | str = "std") -> Memory:
    """Adam on the projected gradient: for m <= n and "std", m r for the basis and 2 n r of state.

    Source: zhao2024galore, Table 1, for m <= n; the other sides follow.

    Args:
        m: rows.
        n: columns.
        rank: r, at most min(m, n) of which counts.
        projection: "std" projects the short side, "reverse_std" the long one, "left" rows, "right" columns,
            "full" both.

    Example:
        >>> galore_memory(4, 6, 2).total, galore_memory(6, 4, 2).total  # m n + m r + 2 n r, m <= n
        (56, 56)
    """
    m, n, rank = require_sizes(m=m, n=n, rank=rank)
    require_choice("projection", projection, get_args(Projection))
    rank = min(rank, m, n)
    if projection == "full":
        return Memory(m * n, 2 * rank**2, (m + n) * rank)
    short = {"std": min(m, n), "reverse_std": max(m, n), "left": m, "right": n}[projection]
    return Memory(m * n, 2 * (m + n - short) * rank, short * rank)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, such as an optimizer's state, or of their shapes.

    Example:
        >>> nbytes([jax.ShapeDtypeStruct((2, 3), "bfloat16"), jax.ShapeDtypeStruct((), "int32")])
        16
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled_bytes(step: Callable[..., Any], params: Any, state: Any, batch: Any) -> dict[str, int]:
    """Bytes that a compiled training step needs, by the compiler's own account; nothing is allocated or run.

    Args:
        step: function `(params, state, batch)`, which gives parameters and state back, updated.
        params: parameters, or their shapes and dtypes.
        state: the optimizer's state.
        batch: what the step is taken on.

    Returns:
        "weights" and "states" of the arguments, "in_place": what of these is updated without a copy, and
        "temporaries".

    Example:
        >>> halve = lambda params, state, batch: (params / 2, state + 1)
        >>> numbers = jax.ShapeDtypeStruct((100,), "float32")
        >>> compiled_bytes(halve, numbers, jax.ShapeDtypeStruct((), "int32"), None)["in_place"]
        404
    """
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    # A CPU multiplies bfloat16 numbers as float32: moved out of the loop over layers, that conversion would
    # make a float32 copy of all weights, which accelerators do not have.
    hoisting = ("while-loop-invariant-code-motion", "while-loop-expensive-invariant-code-motion")
    options = {
        "xla_disable_hlo_passes": ",".join(hoisting),
        "xla_backend_optimization_level": 0,  # of the machine code, which never runs
    }
    memory: Any = lowered.compile(compiler_options=options).memory_analysis()
    return {
        "weights": nbytes(params),
        "states": nbytes(state),
        "in_place": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
