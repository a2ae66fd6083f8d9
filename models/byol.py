"""Linear BYOL: an online network with a predictor, trained to meet a target that follows it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_real,
    require_arrays,
    require_number,
    require_shapes,
)
from dynamics.noncontrastive import ByolWeights
from models.collapse import linear_layers
from models.functional import Frozen
from models.self_supervised import Views, covariance_root


class LinearByol(nnx.Module):
    r"""Prediction W_p W x_1 of one view, and the target W_a x_2 of another, three `flax.nnx.Linear`.

    No gradient passes through the target, unless that is asked for.

    Source: tian2021directpred.

    Args:
        weights: `ByolWeights` to start from, W (n2, n1), W_p (n2, n2) and W_a (n2, n1). Without W_a (None)
            the target is the online network itself. Without W_p there is no predictor.
        stop_gradient: whether the target is constant to gradients.
        train_predictor: whether the predictor is trained; else it stays as it is.

    Raises:
        ValueError: the matrices do not fit each other, or the views do not fit them.

    Example:
        >>> net = LinearByol(ByolWeights([[2.0]], [[0.5]], [[3.0]]))
        >>> [part.tolist() for part in net(Views(jnp.ones((1, 1)), jnp.ones((1, 1))))]
        [[[1.0]], [[3.0]]]
    """

    def __init__(self, weights: ByolWeights, *, stop_gradient: bool = True, train_predictor: bool = True):
        if weights.W is None:
            raise ValueError("weights.W must be a matrix, got None")
        named = {f"weights.{name}": W for name, W in weights._asdict().items() if W is not None}
        shapes = {"weights.W": "n2 n1", "weights.Wp": "n2 n2", "weights.Wa": "n2 n1"}
        arrays = dict(zip(named, require_arrays(**named), strict=True))
        require_shapes(**{name: (array, shapes[name]) for name, array in arrays.items()})
        layers: list[Any] = [linear_layers([arrays[name]])[0] if name in arrays else None for name in shapes]
        self.online, self.predictor, self.target = layers
        if self.predictor is not None and not train_predictor:
            self.predictor.kernel = Frozen(self.predictor.kernel[...])
        self.stop_gradient = stop_gradient

    def __call__(self, views: Views) -> tuple[Float[Array, "n n2"], Float[Array, "n n2"]]:
        """The prediction of the first view and the target of the second, views (n, n1)."""
        first, second = (as_real(name, view) for name, view in zip(Views._fields, views, strict=True))
        require_shapes(first=(first, "n d"), second=(second, "n d"))
        predicted = self.online(first)
        predicted = predicted if self.predictor is None else self.predictor(predicted)
        held = (self.online if self.target is None else self.target)(second)
        return predicted, jax.lax.stop_gradient(held) if self.stop_gradient else held


def byol_weights(params: PyTree) -> ByolWeights:
    """The matrices of the trained parameters of a `LinearByol`; None for those that are not trained.

    Example:
        >>> from models.functional import as_function
        >>> _, params = as_function(LinearByol(ByolWeights([[2.0, 1.0]], None, [[3.0, 0.0]])))
        >>> byol_weights(params).Wa.tolist()
        [[3.0, 0.0]]
    """
    parts = _parts(params)
    return ByolWeights(*(parts[name][0].T if name in parts else None for name in _PARTS))


_PARTS = "online", "predictor", "target"


def byol_loss(predict: Any, params: PyTree, views: Views) -> Float[Array, ""]:
    r"""J = (1/2) E|W_p W x_1 - W_a x_2|^2, the mean over a batch of views.

    Args:
        predict: what a `LinearByol`, or another network that gives a prediction and a target, is as a
            function of parameters and views; from `models.functional.as_function`.
        params: its parameters.
        views: `Views`, (n, n1) each.

    Example:
        >>> from models.functional import as_function
        >>> predict, params = as_function(LinearByol(ByolWeights([[2.0]], [[0.5]], [[3.0]])))
        >>> float(byol_loss(predict, params, Views(jnp.ones((1, 1)), jnp.ones((1, 1)))))
        2.0
    """
    predicted, held = predict(params, views)
    return jnp.mean(jnp.sum((predicted - held) ** 2, axis=1)) / 2


def flow_gradient(
    *, predictor_rate: ArrayLike = 1.0, ema_rate: ArrayLike = 0.0, weight_decay: ArrayLike = 0.0
) -> optax.GradientTransformation:
    r"""Gradients as `dynamics.noncontrastive.byol_flow` has them, for plain gradient descent after it.

        g_W + eta W,   alpha_p g_p + eta W_p,   beta (W_a - W)

    Args:
        predictor_rate: alpha_p >= 0.
        ema_rate: beta >= 0 and finite, per unit of time: EMA with momentum 1 - beta learning_rate.
        weight_decay: eta >= 0.

    Raises:
        ValueError: a number is out of range and can be looked at.

    Example:
        >>> params = {"online": jnp.array(2.0), "target": jnp.array(5.0)}
        >>> transform = flow_gradient(ema_rate=0.5)
        >>> updates = {"online": jnp.array(1.0), "target": jnp.array(0.0)}
        >>> transform.update(updates, transform.init(params), params)[0]["target"].tolist()
        1.5
    """
    given = {"predictor_rate": predictor_rate, "ema_rate": ema_rate, "weight_decay": weight_decay}
    rates = {
        name: require_number(name, rate, jnp.result_type(float), at_least=0) for name, rate in given.items()
    }
    return optax.stateless(Partial(_flow_gradient, rates))


def _flow_gradient(rates, updates, params):
    alpha_p, beta, eta = rates.values()
    g, w = _parts(updates), _parts(params)
    scales = {"online": 1, "predictor": alpha_p}
    moves = {
        name: [scale * leaf + eta * own for leaf, own in zip(g[name], w[name], strict=True)]
        for name, scale in scales.items()
        if name in g
    }
    if "target" in g:
        pairs = zip(w["online"], w["target"], strict=True)
        moves["target"] = [beta * (follower - online) for online, follower in pairs]
    return _refill(updates, moves)


def with_average(
    optimizer: optax.GradientTransformation, momentum: ArrayLike
) -> optax.GradientTransformation:
    r"""An optimizer of the online network and the predictor, whose target is an exponential moving average.

        W_a <- m W_a + (1 - m) W, with W after its update

    Parameters are a mapping with `"online"` and `"target"`, of one structure.

    Source: grill2020.

    Args:
        optimizer: any Optax transformation; what it says of the target is not used.
        momentum: m, from 0 to 1.

    Raises:
        ValueError: `momentum` is out of range and can be looked at.

    Example:
        >>> params = {"online": jnp.array(2.0), "target": jnp.array(4.0)}
        >>> optimizer = with_average(optax.sgd(1.0), 0.5)
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["target"].tolist()  # (4 + 0) / 2
        2.0
    """
    momentum = require_number("momentum", momentum, jnp.result_type(float), at_least=0, at_most=1)
    inner = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params must be given, since the target follows them, got None")
        moves: Any
        moves, state = inner.update(updates, state, params, **extra)

        w, steps = _parts(params), _parts(moves)
        steps["target"] = [
            ((1 - momentum) * (online + step - follower)).astype(follower.dtype)
            for online, step, follower in zip(w["online"], steps["online"], w["target"], strict=True)
        ]
        return _refill(moves, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _parts(tree: PyTree) -> dict[str, list[Array]]:
    """The leaves of each part of a network, by its name."""
    parts: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts.setdefault(path[0].key, []).append(leaf)
    return parts


def _refill(tree: PyTree, parts: dict[str, list[Array]]) -> PyTree:
    """The tree with other leaves."""
    left = {name: iter(leaves) for name, leaves in parts.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: next(left[path[0].key]), tree)


def exact_views(X: ArrayLike, X_aug_cov: ArrayLike) -> Views:
    r"""Finitely many views whose moments are exactly E[xbar xbar^T] = X and E[Cov(x | xbar)] = X'.

    Clean samples are the columns of n^{1/2} X^{1/2}, views xbar +- n^{1/2} X'^{1/2} e_m in all pairs of
    signs: the noise of the two views of a pair is not correlated.

    Args:
        X: covariance of means over augmentations, (n, n), positive semidefinite.
        X_aug_cov: X', mean covariance of augmentations, (n, n), positive semidefinite.

    Returns:
        `Views`, (4 n^2, n) each.

    Raises:
        ValueError: the shapes do not fit, or a matrix is out of range and can be looked at.

    Example:
        >>> views = exact_views([[4.0]], [[1.0]])
        >>> views.first[:, 0].tolist(), views.second[:, 0].tolist()
        ([3.0, 3.0, 1.0, 1.0], [3.0, 1.0, 3.0, 1.0])
    """
    X, X_aug_cov = require_arrays(X=X, X_aug_cov=X_aug_cov)
    require_shapes(X=(X, "n n"), X_aug_cov=(X_aug_cov, "n n"))
    n = len(X)
    clean = n**0.5 * covariance_root("X", X)
    noise = n**0.5 * covariance_root("X_aug_cov", X_aug_cov)
    signs = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], X.dtype)
    views = clean[:, None, None, None] + signs[None, None, :, :, None] * noise[None, :, None, None]
    first, second = jnp.moveaxis(views.reshape(-1, 2, n), 1, 0)
    return Views(first, second)
