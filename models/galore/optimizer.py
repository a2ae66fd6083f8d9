"""The optimizer made of GaLore for hidden matrices and Adam for the rest."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .options import GaloreOptions, options_of, signature_of
from .paths import Absent, by_keys, is_tree, parameters
from .plan import axes_of
from .transform import transformation


@signature_of(GaloreOptions)
def galore(*arguments: Any, **keywords: Any) -> optax.GradientTransformation:  # noqa: D417
    r"""Run GaLore on the hidden matrices and Adam on the rest, with decoupled weight decay on all.

        update = -learning_rate (scale_by_galore(...)(G) + weight_decay W)

    on the parameters that are projected, and that of `optax.adam(learning_rate)`, with the same decay, on the
    others: embeddings, heads, norms and biases, told by their names, and whatever `matrix_axes` leaves alone.

    Source: zhao2024galore, section 5.

    `optax.contrib.galore` has other names and other defaults. The same numbers come from, beside its rank,

        optax.contrib.galore    galore                  to be set here
        update_proj_gap=200     update_gap=200
        scale=1.0               scale=0.25              scale=1.0
        base_optimizer          inner, plain            both
        weight_dimension_numbers    matrix_axes
        every matrix            hidden matrices         labels=lambda path, leaf: "galore"
        long side, square left  short, square left      projection="left" where rows >= columns, else "right"
        SVD                     refresh="eigh"          refresh="svd"
        signs as they come      moments="align"         moments="carry"
        rounding errors move    drop_noise=True         drop_noise=False

    Args:
        learning_rate: a number or a schedule.
        rank: as for `scale_by_galore`.
        weight_decay: decay, times the learning rate, of the old value; not multiplied by `scale`.
        mask: which parameters decay: a pytree of booleans or a function of the parameters, as in
            `optax.add_decayed_weights`; all where None.
        labels: "galore" or "adam" for each parameter: a pytree like the parameters or a function
            `(path, leaf)`. Where None, names decide. "adam" is for those with, in the words of a path, one
            that begins with "embed", "unembed" or ends with "norm", or is one of "emb", "wte", "wpe", "pos",
            "position", "logits", "classifier"; a key that ends with "head"; or the last key a "bias" or
            "scale".
        plain: the transformation for what is not projected; `optax.scale_by_adam(b1, b2, eps)` where None.
        **keywords: all options of `scale_by_galore`. b1, b2, eps and eps_convention are for both parts, where
            `inner` or `plain` are None.

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
    options = options_of("galore", GaloreOptions, arguments, keywords)
    optimizer = whole_optimizer(options)

    def init(params):
        share = projected_share(params, options)
        # By default what has more than two axes is left alone, the attention of Flax for instance.
        if share < (1.0 if options.matrix_axes is None else 0.5):
            warnings.warn(
                f"galore projects {share:.0%} of the numbers in hidden matrices; models.galore.report tells "
                "which ones, matrix_axes=flax_axes knows the kernels of Flax, and labels says what is hidden",
                stacklevel=2,
            )
        return optimizer.init(params)

    return optimizer._replace(init=init)


def whole_optimizer(options: GaloreOptions) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer that the options describe."""
    plain = options.adam() if options.plain is None else options.plain
    decay = options.weight_decay
    decays = not (isinstance(decay, (int, float)) and decay == 0)
    mask = None if options.mask is None else partial(_decaying, options)
    return optax.chain(
        optax.partition({"galore": transformation(options), "adam": plain}, partial(labels_of, options)),
        optax.add_decayed_weights(decay, mask) if decays else optax.identity(),
        optax.scale_by_learning_rate(options.learning_rate),
    )


def projected_share(params: Any, options: GaloreOptions) -> float:
    """Return the share of projected numbers among those of hidden matrices, 1 where there are none.

    Hidden matrices are the parameters of two axes or more that are labelled "galore".
    """
    every = parameters(params)
    hidden = projected = 0
    for parameter, want, spec in zip(every, options.wanted(every), axes_of(every, options), strict=True):
        if want and not isinstance(parameter.leaf, Absent) and jnp.ndim(parameter.leaf) >= 2:
            hidden += math.prod(parameter.leaf.shape)
            projected += math.prod(parameter.leaf.shape) * (spec is not None)
    return projected / hidden if hidden else 1.0


def labels_of(options: GaloreOptions, tree: Any) -> Any:
    """Label each leaf "galore" or "adam"; leaves without a matrix get "adam"."""
    every = parameters(tree)
    labels = [
        "galore" if want and spec is not None else "adam"
        for parameter, want, spec in zip(every, options.wanted(every), axes_of(every, options), strict=True)
        if not isinstance(parameter.leaf, Absent)
    ]
    return jax.tree.structure(tree).unflatten(labels)


def _decaying(options: GaloreOptions, tree: Any) -> Any:
    """Tell for each leaf whether it decays; a pytree may stop above the leaves, as everywhere in Optax."""
    every = parameters(tree)
    if callable(options.mask) and not is_tree(options.mask, every):
        return options.mask(tree)
    given = by_keys(options.mask)
    above = [
        [given[p.keys[:length]] for length in range(len(p.keys) + 1) if p.keys[:length] in given]
        for p in every
        if not isinstance(p.leaf, Absent)
    ]
    if not all(above):
        raise ValueError("mask must have a value for every parameter, got a pytree that does not")
    return jax.tree.structure(tree).unflatten([found[-1] for found in above])
