"""Adam with 8-bit moments, and Adam with the other epsilon convention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .checks import require_count, require_number, require_real
from .placement import automatic


class Blocks(NamedTuple):
    """The class holds one leaf in 8 bits, flat and padded to whole blocks; or a tree of such leaves.

    Attributes:
        codes: int8 or uint8, shape (blocks, block). In a tree, a small leaf is its float32 array itself.
        peaks: the largest absolute value of each block, float32, shape (blocks, 1). In a tree, a small leaf
            has Optax's placeholder.
    """

    codes: Any
    peaks: Any


class ScaleByAdam8bitState(NamedTuple):
    """A state of `scale_by_adam_8bit` is a pytree of arrays.

    Attributes:
        count: steps taken.
        mu: first moments, in linear int8 codes; both trees are like the parameters.
        nu: second moments, in uint8 codes of their square roots.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Blocks
    nu: Blocks


def scale_by_adam_8bit(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, *, block: int = 256, min_size: int = 4096
) -> optax.GradientTransformation:
    r"""Run Adam with moments that are kept in 8 bits, block by block: about 1.02 bytes per number.

    Each block of `block` consecutive numbers is divided by its largest absolute value. M is coded linearly
    in int8, V by its square root in uint8: a linear code of V would round the small ones to zero, and the
    update would divide by it; here no positive V is coded as zero. With D the decoded values, per block,

        |D(M) - M| <= max|M| / 127,   |sqrt(D(V)) - sqrt(V)| <= sqrt(max V) / 255

    Rounding is dithered: up or down by a sequence over steps and places that comes out even. The nearest
    code would stand still for ever, as a step changes V by a thousandth and a code by a hundredth. The update
    itself is taken from the moments before they are coded.

    Source: blocks as in Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022); the codes and
    their bounds are derived here.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the bias-corrected second moment, as in `optax.scale_by_adam`.
        block: numbers per block.
        min_size: leaves with fewer numbers keep float32 moments.

    Returns:
        The transformation; an inner one for `scale_by_galore`, or on its own.

    Raises:
        ValueError: a decay is not in [0, 1), `eps` not a number >= 0, `block` not a positive integer or
            `min_size` not an integer >= 0; from `init` and `update`: arrays are not real floating ones.

    Example:
        >>> state = scale_by_adam_8bit().init(jnp.zeros(4096))
        >>> state.mu.codes.dtype.name, state.nu.codes.dtype.name, state.mu.peaks.shape
        ('int8', 'uint8', (16, 1))
    """
    block = require_count("block", block)
    min_size = require_count("min_size", min_size, least=0)
    b1, b2, eps = (
        require_number("b1", b1, below=1.0),
        require_number("b2", b2, below=1.0),
        require_number("eps", eps),
    )

    def empty(leaf: Any, dtype: Any) -> Blocks | Array:
        size = math.prod(leaf.shape)
        if size < min_size:
            return jnp.zeros(leaf.shape, jnp.float32)
        blocks = math.ceil(size / block)
        return Blocks(jnp.zeros((blocks, block), dtype), jnp.zeros((blocks, 1), jnp.float32))

    def init(params):
        require_real(params)
        leaves, treedef = jax.tree.flatten(params)
        mu, nu = (_pack([empty(leaf, dtype) for leaf in leaves], treedef) for dtype in (jnp.int8, jnp.uint8))
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def moved(gradient: Array, mu: Blocks | Array, nu: Blocks | Array, count: Any) -> tuple[Any, Any, Any]:
        g = gradient.astype(jnp.float32)
        m = b1 * decode(mu, g.shape) + (1 - b1) * g
        v = b2 * decode(nu, g.shape) + (1 - b2) * g**2
        step = _corrected(m, b1, count) / (jnp.sqrt(_corrected(v, b2, count)) + eps)
        mu = encode(m, count, block, jnp.int8) if isinstance(mu, Blocks) else m
        nu = encode(v, count, block, jnp.uint8) if isinstance(nu, Blocks) else v
        return step.astype(gradient.dtype), mu, nu

    @automatic
    def updated(updates, state, params):
        del params
        count = optax.safe_increment(state.count)
        gradients, treedef = jax.tree.flatten(updates)
        old = zip(gradients, _unpack(state.mu, treedef), _unpack(state.nu, treedef), strict=True)
        moves = [moved(gradient, mu, nu, count) for gradient, mu, nu in old]
        steps, mu, nu = ([move[part] for move in moves] for part in range(3))
        return treedef.unflatten(steps), ScaleByAdam8bitState(count, _pack(mu, treedef), _pack(nu, treedef))

    def update(updates, state, params=None):
        updates, state = jax.tree.map(jnp.asarray, (updates, state))
        require_real(updates)
        return updated(updates, state, params)

    return optax.GradientTransformation(init, update)


def _pack(moments: Sequence[Blocks | Array], treedef: Any) -> Blocks:
    """Return the moments of all leaves as one pair of trees, which other libraries find their way in."""
    codes = [moment.codes if isinstance(moment, Blocks) else moment for moment in moments]
    peaks = [moment.peaks if isinstance(moment, Blocks) else optax.MaskedNode() for moment in moments]
    return Blocks(treedef.unflatten(codes), treedef.unflatten(peaks))


def _unpack(packed: Blocks, treedef: Any) -> list[Blocks | Array]:
    """Return the moments of the leaves one by one."""
    pairs = zip(treedef.flatten_up_to(packed.codes), treedef.flatten_up_to(packed.peaks), strict=True)
    return [codes if isinstance(peaks, optax.MaskedNode) else Blocks(codes, peaks) for codes, peaks in pairs]


def encode(values: Array, count: Any, block: int, dtype: Any) -> Blocks:
    """Code numbers in int8, linearly, or numbers that are not negative in uint8, by their square roots."""
    flat = values.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    peaks = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    unit = blocks / jnp.where(peaks > 0, peaks, 1)
    # Multiples of the golden ratio modulo 1 are spread as evenly as can be. They are cut to 12 bits, so that
    # their sums with numbers up to 255 are exact in float32.
    places = jnp.arange(blocks.size, dtype=jnp.uint32).reshape(blocks.shape) * jnp.uint32(2246822519)
    turns = places + count.astype(jnp.uint32) * jnp.uint32(2654435769)
    dither = (turns >> 20).astype(jnp.float32) / 2**12
    if dtype == jnp.int8:
        codes = jnp.floor(127 * unit + dither)
    else:
        codes = jnp.floor(255 * jnp.sqrt(unit) + dither)
        codes = jnp.where(blocks > 0, jnp.maximum(codes, 1), codes)
    return Blocks(codes.astype(dtype), peaks)


def decode(coded: Blocks | Array, shape: tuple[int, ...]) -> Array:
    """Return what `encode` coded, up to rounding; an array is returned as it is."""
    if not isinstance(coded, Blocks):
        return coded
    codes = coded.codes.astype(jnp.float32)
    unit = codes / 127 if coded.codes.dtype == jnp.int8 else (codes / 255) ** 2
    return (coded.peaks * unit).reshape(-1)[: math.prod(shape)].reshape(shape)


def scale_by_adam_uncorrected(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformation:
    """Run Adam with epsilon added to sqrt(V) before its bias is corrected.

    The step is sqrt(1 - b2^k) / (1 - b1^k) M / (sqrt(V) + eps), k = 1, 2, ...; Optax adds epsilon to the
    corrected square root, which at k = 1 and b2 = 0.999 is an epsilon 32 times smaller.
    """

    def init(params):
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g**2, updates, state.nu)

        def step(m, v):
            correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
            return correction.astype(m.dtype) * m / (jnp.sqrt(v) + eps)

        return jax.tree.map(step, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _corrected(moment: Array, decay: Any, count: Any) -> Array:
    return moment / (1 - decay**count).astype(moment.dtype)
