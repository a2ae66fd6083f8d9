"""The optimizer made of GaLore for hidden matrices and Adam for the rest."""

from __future__ import annotations

from typing import Any

import optax

from .labels import labels_of
from .options import GaloreOptions, signature_of
from .transform import transformation


@signature_of(GaloreOptions)
def galore(*arguments: Any, **keywords: Any) -> optax.GradientTransformation:  # noqa: D417
    r"""Run GaLore on the hidden matrices and Adam on the rest, with decoupled weight decay on all.

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
    options = GaloreOptions(*arguments, **keywords)
    projected = transformation(options)
    plain = options.adam() if options.plain is None else options.plain
    decay = options.weight_decay
    decays = not (isinstance(decay, (int, float)) and decay == 0)

    def label(tree):
        return labels_of(tree, options.labels, options.matrix_axes)

    return optax.chain(
        optax.partition({"galore": projected, "adam": plain}, label),
        optax.add_decayed_weights(decay, options.mask) if decays else optax.identity(),
        optax.scale_by_learning_rate(options.learning_rate),
    )
