"""Losses: of a network's outputs against targets, with their curvature, and contrastive ones of two views.

Those of targets are functions of parameters and data, as training calls them; the contrastive ones are
functions of the embeddings of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_real,
    brief,
    nan_unless,
    require_finite,
    require_indices,
    require_vector,
)
from dynamics.contrastive import contrastive_energy, contrastive_pairs
from dynamics.contrastive.family import Name, Negatives, anchor_losses, require_hyper


def squared_error(params: PyTree, data: Any) -> Array:
    r"""Half the squared error, (1/2) sum_i |f(X_i) - y_i|^2, of data = (f, X, y) with outputs f(params, X).

    It takes its data where `dynamics.flow.gradient_flow` hands them on; for `models.training.train`, `bind`
    them first. Outputs of float16 or bfloat16 are looked at in float32, here and in the losses below.

    Raises:
        ValueError: outputs or targets are no real numbers, or differ in shape.

    Example:
        >>> double = lambda params, x: params * x
        >>> float(squared_error(2.0, (double, jnp.array([1.0]), jnp.array([1.0]))))
        0.5
    """
    return jnp.sum(optax.losses.l2_loss(*_pair(params, data, "targets")))


def mean_squared_error(params: PyTree, data: Any) -> Array:
    r"""Half the squared error of a sample, (1/2N) sum_i |f(X_i) - Y_i|^2, of data = (f, X, Y).

    Outputs f(params, X) and targets are (N, ...): the square is summed over all axes but the first. It takes
    its data like `squared_error`.

    Example:
        >>> double = lambda params, x: params * x
        >>> float(mean_squared_error(2.0, (double, jnp.ones((5, 3)), jnp.ones((5, 3)))))
        1.5
    """
    outputs, targets = _samples(params, data, "targets")
    return jnp.sum(optax.losses.l2_loss(outputs, targets)) / len(targets)


def total_squared_error(params: PyTree, data: Any) -> Array:
    r"""Weighted sum of the `mean_squared_error` of many networks side by side, sum_l w_l L(params_l).

    No network acts on another's loss: each trains as it would alone, at w_l times the learning rate.

    Args:
        params: parameters of all networks, leading axis L.
        data: (w, (f, X, Y)) with the weights w, (L,), and what `mean_squared_error` takes.

    Example:
        >>> double = lambda params, x: params * x
        >>> data = (double, jnp.ones((5, 3)), jnp.ones((5, 3)))
        >>> float(total_squared_error(jnp.array([2.0, 1.0]), (jnp.array([10.0, 1.0]), data)))
        15.0
    """
    weights, data = data
    weights = require_finite("weights", require_vector("weights", weights, "L"))
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if lengths != {weights.shape}:
        raise ValueError(f"weights must have one number per network of params, got shape {weights.shape}")
    return jnp.sum(weights * jax.vmap(lambda params: mean_squared_error(params, data))(params))


def cross_entropy(params: PyTree, data: Any) -> Array:
    r"""Mean cross-entropy of logits f(params, X) against labels y, of data = (f, X, y); in nats.

    It takes its data like `squared_error`; `on_batches` is for batches that change. Logits of float16 or
    bfloat16, in which networks are trained, are looked at in float32, which is what is returned.

    Raises:
        ValueError: logits are no real numbers, or of another shape than the labels; a label that is not
            traced is none of 0, ..., classes - 1. A traced one makes the loss NaN.

    Example:
        >>> constant = lambda params, x: jnp.stack([params, 0 * params])[None]
        >>> round(float(cross_entropy(0.0, (constant, None, jnp.array([0])))), 6)
        0.693147
    """
    predict, inputs, labels = data
    logits = _wide("the logits of params", predict(params, inputs))
    if logits.ndim == 0 or logits.size == 0:
        raise ValueError(f"params must give logits of shape (..., classes), got shape {logits.shape}")
    classes = logits.shape[-1]
    labels = require_indices("labels", labels, classes)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the logits of params but for its last axis, {logits.shape[:-1]}, "
            f"got shape {labels.shape}"
        )
    loss = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
    # A label below zero would count from the end.
    return nan_unless(jnp.all((labels >= 0) & (labels < classes)), loss)


def upstream_product(params: PyTree, data: Any) -> Array:
    r"""The loss whose upstream gradient is given, -(1/N) sum_i <g_i, f(X_i)>, of data = (f, X, g).

    Outputs f(params, X) and gradients g of the negative loss are (N, ...). It takes its data like
    `squared_error`.

    Example:
        >>> double = lambda params, x: params * x
        >>> float(upstream_product(2.0, (double, jnp.ones((5, 3)), jnp.ones((5, 3)))))
        -6.0
    """
    outputs, gradient = _samples(params, data, "gradients")
    return -jnp.sum(gradient * outputs) / len(gradient)


def on_batches(loss: Callable[[Any, Any], Array], predict: Callable[[PyTree, Any], Array]) -> Partial:
    """The loss as a function of the parameters and a batch (X, y), as `models.training.train` calls it.

    Example:
        >>> double = lambda params, x: params * x
        >>> float(on_batches(squared_error, double)(2.0, (jnp.array([1.0]), jnp.array([1.0]))))
        0.5
    """
    return Partial(_of_batch, Partial(loss), Partial(predict))


def bind(loss: Callable[[Any, Any], Array], data: Any) -> Partial:
    """The loss as a function of the parameters alone; other data of the same shapes compile nothing anew.

    Example:
        >>> float(bind(lambda params, data: params * data, jnp.array(3.0))(jnp.array(2.0)))
        6.0
    """
    return Partial(_of_params, Partial(loss), data)


def gauss_newton_spectrum(
    predict: Callable[[PyTree, Any], Array], params: PyTree, tokens: ArrayLike
) -> Float[Array, " P"]:
    r"""Eigenvalues of the Gauss-Newton matrix G^T G / N, where G = d f / d params.

    For (1/2N) sum_i |f_i - y_i|^2 this is the Hessian at an exact fit, and its spectrum says how fast
    gradient descent closes each direction. Squared singular values of G: nothing is squared before they
    are taken, so that condition numbers up to the square of 1/epsilon survive.

    Args:
        predict: `predict(params, tokens)`, the outputs of all samples, for instance from `as_function`.
        params: the trained parameters, a pytree of P numbers in all.
        tokens: the samples, leading axis N.

    Returns:
        Eigenvalues in descending order, shape (P,); zeros where there are fewer outputs than parameters. NaN
        where a traced parameter is not finite.

    Raises:
        ValueError: parameters or samples are no finite numbers of float32 or float64, or there are none.

    Example:
        >>> linear = lambda params, tokens: tokens @ params
        >>> gauss_newton_spectrum(linear, jnp.zeros(2), jnp.diag(jnp.array([2.0, 4.0]))).tolist()
        [8.0, 2.0]
    """
    tokens = require_finite("tokens", as_real("tokens", tokens))
    if tokens.ndim == 0 or tokens.size == 0:
        raise ValueError(f"tokens must have shape (N, ...) and not be empty, got shape {tokens.shape}")
    each = [require_finite("params", as_real("params", leaf)) for leaf in jax.tree.leaves(params)]
    flat, unravel = ravel_pytree(jax.tree.structure(params).unflatten(each))

    def outputs(flat):
        return as_real("the outputs of params", predict(unravel(flat), tokens)).reshape(-1)

    rows = jax.eval_shape(outputs, flat).size
    jacobian = jax.jacfwd if flat.size <= rows else jax.jacrev
    singular = jnp.linalg.svd(jacobian(outputs)(flat), compute_uv=False)
    # A Jacobian need not show what is wrong with the parameters.
    eigenvalues = nan_unless(jnp.all(jnp.isfinite(flat)), singular**2 / len(tokens))
    return jnp.pad(eigenvalues, (0, flat.size - singular.size))


def contrastive_loss(
    name: Name | str, f: ArrayLike, f_aug: ArrayLike, *, negatives: Negatives | str = "view", **hyper: Any
) -> Float[Array, ""]:
    r"""A contrastive loss of two views of a batch, sum_i phi(sum_j psi(u_ij)), summed over anchors.

        u_ij = |f_i - f'_i|^2 / 2 - |f_i - f_j|^2 / 2

    `dynamics.contrastive.pairwise_importance` has the table of phi and psi. Temperatures as small as 0.01 are
    safe in 32-bit.

    The functions `infonce` and `soft_triplet` of `models.self_supervised` are of another theory: they are
    means over examples, and negatives of f_i are other views f'_j there. That InfoNCE is not multiplied by
    the temperature, and has the mean over negatives, without epsilon; that soft triplet has a logarithm for
    each pair, this one for each anchor.

    Source: tian2022contrastive, the talk's slides on contrastive losses and on a general family.

    Args:
        name: "infonce", "mine", "triplet", "soft_triplet", "n_plus_1_tuplet", "lifted", "coria" or "ji".
        f: embeddings of one view of N >= 2 samples, (N, o).
        f_aug: those of the other view, (N, o).
        negatives: "view": the same view of the other samples, as the source has it; "both": both views are
            anchors, with 2N - 2 negatives each, as common code has it.
        **hyper: `temperature`, `epsilon` and `scale`, as far as the loss has them.

    Returns:
        The loss, a number.

    Raises:
        ValueError: the loss is unknown or has no such hyperparameter, the shapes do not fit, there is one
            sample alone, or a number is out of range and can be looked at.

    Example:
        >>> round(float(contrastive_loss("infonce", [[0.0], [0.0]], [[0.0], [0.0]])), 4)  # log 2
        0.6931
    """
    pairs = contrastive_pairs(f, f_aug, negatives=negatives)
    checked = require_hyper(name, hyper, pairs.excess.dtype)
    return jnp.sum(anchor_losses(name, pairs, checked))


def alpha_cl_loss(
    alpha: ArrayLike, f: ArrayLike, f_aug: ArrayLike, *, stop_gradient: bool = True
) -> Float[Array, ""]:
    r"""Minus half the contrastive energy, -(1/2) tr C_alpha[f, f]: what alpha-CL descends.

    With the `dynamics.contrastive.pairwise_importance` of a loss it has that loss's gradient; the half is
    here, and nowhere else. `dynamics.contrastive.min_player` gives other alpha.

    An alpha for `negatives="both"` is (2N, 2N). It goes with the 2N embeddings of both views, [f, f'] as f
    and [f', f] as f_aug: `alpha_cl_loss(alpha, concatenate([f, f_aug]), concatenate([f_aug, f]))`.

    Source: tian2022contrastive, the talk's slide on alpha-CL.

    Args:
        alpha: importance of pairs, (N, N); its diagonal has no part.
        f: embeddings of one view of N >= 2 samples, (N, o), or of both views, as above.
        f_aug: those of the other view, of the same shape.
        stop_gradient: whether alpha is held; else its own dependence on f is differentiated too.

    Returns:
        The loss, a number.

    Raises:
        ValueError: the shapes do not fit, there is one sample alone, numbers are not finite, or
            `stop_gradient` is no truth value.

    Example:
        >>> float(alpha_cl_loss([[0.0, 1.0], [1.0, 0.0]], [[0.0], [2.0]], [[1.0], [2.0]]))
        -3.5
    """
    if not isinstance(stop_gradient, (bool, np.bool_)):
        raise ValueError(f"stop_gradient must be True or False, got {brief(stop_gradient)}")
    alpha = jax.lax.stop_gradient(as_real("alpha", alpha)) if stop_gradient else alpha
    return -contrastive_energy(alpha, f, f_aug) / 2


def _samples(params: PyTree, data: Any, name: str) -> tuple[Array, Array]:
    """What `_pair` gives, with a leading axis of samples."""
    outputs, others = _pair(params, data, name)
    if others.ndim == 0:
        raise ValueError(f"{name} and the outputs of params must have shape (N, ...), got shape ()")
    return outputs, others


def _pair(params: PyTree, data: Any, name: str) -> tuple[Array, Array]:
    """The outputs of a network and what they are held against, of one shape: nothing is broadcast."""
    predict, inputs, others = data
    outputs, others = _wide("the outputs of params", predict(params, inputs)), _wide(name, others)
    if outputs.shape != others.shape or outputs.size == 0:
        raise ValueError(
            f"{name} must have the shape of the outputs of params, {outputs.shape}, and not be empty, "
            f"got shape {others.shape}"
        )
    return outputs, others


def _wide(name: str, array: Any) -> Array:
    """Real numbers; those of half precision, in which networks are trained, in float32."""
    if getattr(array, "dtype", None) in (jnp.float16, jnp.bfloat16):
        array = jnp.asarray(array, jnp.float32)
    return as_real(name, array)


def _of_params(loss: Callable[[Any, Any], Array], data: Any, params: Any) -> Array:
    return loss(params, data)


def _of_batch(loss: Callable[[Any, Any], Array], predict: Any, params: Any, batch: Any) -> Array:
    return loss(params, (predict, *batch))
