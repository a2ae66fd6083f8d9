"""The contrastive covariance, and the energy whose max player is the network."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.arguments import ArrayLike, cast, nan_unless, require_arrays, require_shape, require_shapes
from dynamics.contrastive.family import half_squared_distances, require_views
from dynamics.flow import all_finite


def contrastive_covariance(
    alpha: ArrayLike,
    x: ArrayLike,
    x_aug: ArrayLike,
    y: ArrayLike | None = None,
    y_aug: ArrayLike | None = None,
) -> Float[Array, "d e"]:
    r"""How x and y vary together between samples, less how they do between views of one sample.

        C_alpha[x, y] = sum_{i, j != i} alpha_ij [(x_i - x_j)(y_i - y_j)^T - (x_i - x'_i)(y_i - y'_i)^T]

    It is computed without an array of all differences, from the sums of rows and columns of alpha.

    Source: tian2022contrastive, the talk's slide on the energy.

    Args:
        alpha: importance of pairs, (N, N); its diagonal has no part.
        x: one view of N >= 2 samples, (N, d).
        x_aug: the other view, x', (N, d).
        y: what x is compared to, (N, e); x where None.
        y_aug: its other view, y', (N, e).

    Returns:
        C, (d, e), which for y = x is symmetric, but not always positive.

    Raises:
        ValueError: the shapes do not fit, one of `y` and `y_aug` is given alone, there is one sample alone,
            or numbers are not finite.

    Example:
        >>> contrastive_covariance([[0.0, 1.0], [1.0, 0.0]], [[0.0], [2.0]], [[1.0], [2.0]]).tolist()
        [[7.0]]
    """
    if (y is None) != (y_aug is None):
        raise ValueError("y and y_aug must be given together, or neither of them")
    x, x_aug = require_views(x=x, x_aug=x_aug)
    own = y is None
    y, y_aug = (x, x_aug) if own else require_arrays(y=y, y_aug=y_aug)
    if not own:
        y, y_aug = cast(y, x.dtype), cast(y_aug, x.dtype)
        require_shapes(x=(x, "N d"), y=(y, "N e"), y_aug=(y_aug, "N e"))
    alpha = require_importance(alpha, x)
    # The diagonal of alpha has no part, but what is no number there is told too.
    return nan_unless(all_finite(alpha), covariance(alpha, x, x_aug, y, y_aug))


def contrastive_energy(alpha: ArrayLike, f: ArrayLike, f_aug: ArrayLike) -> Float[Array, ""]:
    r"""The energy tr C_alpha[f, f] = sum_{i, j != i} alpha_ij (|f_i - f_j|^2 - |f_i - f'_i|^2).

    A network that ascends it pulls samples apart and the views of a sample together.

    Source: tian2022contrastive, the talk's slide on the energy.

    Args:
        alpha: importance of pairs, (N, N); its diagonal has no part.
        f: embeddings of one view of N >= 2 samples, (N, o). For negatives of both views these are all 2N,
            the first view in front, and those of `f_aug` are the same with the second view in front.
        f_aug: those of the other view, (N, o).

    Returns:
        The energy, a number.

    Raises:
        ValueError: the shapes do not fit, there is one sample alone, or numbers are not finite.

    Example:
        >>> float(contrastive_energy([[0.0, 1.0], [1.0, 0.0]], [[0.0], [2.0]], [[1.0], [2.0]]))
        7.0
    """
    f, f_aug = require_views(f=f, f_aug=f_aug)
    alpha = require_importance(alpha, f)
    return nan_unless(all_finite(alpha), _energy(alpha, f, f_aug))


def require_importance(alpha: ArrayLike, x: Array) -> Array:
    """The importance of pairs of these samples."""
    (alpha,) = require_arrays(alpha=alpha)
    require_shape("alpha", alpha, (len(x), len(x)))
    return cast(alpha, x.dtype)


@eqx.filter_jit
def covariance(alpha, x, x_aug, y, y_aug):
    """`contrastive_covariance` of arrays that fit."""
    rows, laplacian = importance_laplacian(alpha)
    # A shift that all samples share has no part.
    x_between, y_between = (part - jnp.mean(part, axis=0, keepdims=True) for part in (x, y))
    return x_between.T @ (laplacian @ y_between) - (x - x_aug).T @ (rows[:, None] * (y - y_aug))


def importance_laplacian(alpha):
    """Sums of the rows of alpha, and the L of sum_ij alpha_ij (x_i - x_j) (y_i - y_j)^T = X^T L Y."""
    alpha = _off_diagonal(alpha)
    rows, columns = jnp.sum(alpha, axis=1), jnp.sum(alpha, axis=0)
    return rows, jnp.diag(rows + columns) - alpha - alpha.T


@eqx.filter_jit
def _energy(alpha, f, f_aug):
    alpha = _off_diagonal(alpha)
    within = jnp.sum((f - f_aug) ** 2, axis=1, keepdims=True)
    between = 2 * half_squared_distances(f, f)
    return jnp.sum(alpha * (between - within))


def _off_diagonal(alpha):
    return jnp.where(jnp.eye(len(alpha), dtype=bool), 0, alpha)
