"""Axes of the matrices in the kernels of Flax."""

from __future__ import annotations

from typing import Any

Spec = tuple[Any, Any] | None


def flax_axes(path: str, leaf: Any, *, stacked: int = 0) -> Spec:
    """Tell the matrix in a kernel of flax.nnx or flax.linen: from all inputs to all outputs of a layer.

    It is an option `matrix_axes` of `galore`. Kernels of attention are known by name: those of query, key and
    value have the shape (d, heads, head_dim), that of out (heads, head_dim, d). The kernel of a convolution
    has a name with "conv" in it and the shape (*window, in, out). Every other leaf of two axes is a matrix,
    but for biases and scales; what is left alone is told by `report`.

    Args:
        path: the keys of the leaf, joined with "/".
        leaf: the parameter.
        stacked: leading axes that count layers, as `flax.linen.scan` and `flax.nnx.vmap` put there. Where
            some are stacked, use `lambda path, leaf: flax_axes(path, leaf, stacked="layers" in path)`.

    Returns:
        The axes of rows and of columns, or None.

    Example:
        >>> flax_axes("attention/query/kernel", jnp.zeros((8, 2, 4)))
        (-3, (-2, -1))
        >>> flax_axes("MultiHeadDotProductAttention_0/out/kernel", jnp.zeros((2, 4, 8)))
        ((-3, -2), -1)
    """
    # Boxes of linen's metadata have the array under a last key "value".
    layer, last = (["", "", *path.removesuffix("/value").split("/")])[-2:]
    axes = leaf.ndim - stacked
    if last in ("bias", "scale") or axes < 2:
        return None
    if axes == 2:
        return -2, -1
    if last != "kernel":
        return None
    if axes == 3 and layer in ("query", "key", "value"):
        return -3, (-2, -1)
    if axes == 3 and layer == "out":
        return (-3, -2), -1
    return (tuple(range(-axes, -1)), -1) if "conv" in layer.lower() else None
