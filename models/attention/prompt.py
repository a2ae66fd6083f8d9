"""Prompt attention: one layer that is read out by a trained prompt, and what is measured on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import logsumexp
from jaxtyping import Array, PyTree

from dynamics.arguments import ArrayLike, as_real, require_dtype, require_sizes
from models.draws import normal
from models.functional import Frozen


def attention_logits(prompt: ArrayLike, tokens: ArrayLike, key_weights: ArrayLike | None = None) -> Array:
    r"""Attention logits z = X W p: one per token.

    Source: tarzanagh2023, section 1; softmax2025talk, setting.

    Args:
        prompt: p of shape (d,), or one per head and query, (heads, queries, d).
        tokens: X, shape (..., n, d).
        key_weights: W, shape (d, d); the identity where None.

    Returns:
        Logits of shape (..., n), with heads (..., heads, queries, n).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> attention_logits([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]]).tolist()
        [1.0, 2.0]
    """
    return _logits(prompt, "tokens", tokens, key_weights)


def _logits(prompt: ArrayLike, name: str, tokens: ArrayLike, key_weights: ArrayLike | None = None) -> Array:
    """`attention_logits`, where the tokens have a name of their own in errors."""
    prompt, tokens = as_real("prompt", prompt), as_real(name, tokens)
    key_weights = _require_prompt(prompt, key_weights)
    d = prompt.shape[-1]
    if tokens.ndim < 2 or tokens.shape[-2] == 0 or tokens.shape[-1] != d:
        shape = f"(..., n, {d}) with n >= 1 for a prompt of {d} numbers"
        raise ValueError(f"{name} must have shape {shape}, got shape {tokens.shape}")
    keys = tokens if key_weights is None else tokens @ key_weights
    return keys @ prompt if prompt.ndim == 1 else jnp.einsum("...nd,hqd->...hqn", keys, prompt)


def prompt_attention(
    prompt: ArrayLike, value: ArrayLike, tokens: ArrayLike, key_weights: ArrayLike | None = None
) -> Array:
    r"""One attention layer read out by a trained prompt: f(X) = <X v, softmax(X W p)>.

    Heads have a prompt and a value each, and their outputs are summed.

    Source: tarzanagh2023, section 1; softmax2025talk, setting.

    Args:
        prompt: p of shape (d,), or one per head and query, (heads, queries, d).
        value: v of shape (d,) for a scalar output or (d, m) for an output of m numbers; with heads (heads, d)
            or (heads, d, m).
        tokens: X, shape (..., n, d).
        key_weights: W, shape (d, d); the identity where None.

    Returns:
        f(X) of shape (...) or (..., m); with heads (..., queries) or (..., queries, m).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> float(prompt_attention([0.0, 0.0], [1.0, 3.0], [[1.0, 0.0], [0.0, 1.0]]))
        2.0
    """
    prompt, value, tokens = as_real("prompt", prompt), as_real("value", value), as_real("tokens", tokens)
    _require_prompt(prompt, key_weights)
    _require_value(prompt, value)
    attention = jax.nn.softmax(attention_logits(prompt, tokens, key_weights), axis=-1)
    heads = "" if prompt.ndim == 1 else "h"
    queries = "" if prompt.ndim == 1 else "q"
    outputs = "m" if value.ndim - len(heads) == 2 else ""
    product = f"...{heads}{queries}n,...nd,{heads}d{outputs}->...{queries}{outputs}"
    return jnp.einsum(product, attention, tokens, value)


def _require_prompt(prompt: Array, key_weights: ArrayLike | None) -> Array | None:
    """The key weights, where they are not the identity."""
    if prompt.ndim not in (1, 3) or prompt.size == 0:
        raise ValueError(f"prompt must have shape (d,) or (heads, queries, d), got shape {prompt.shape}")
    if key_weights is None:
        return None
    weights, d = as_real("key_weights", key_weights), prompt.shape[-1]
    if weights.shape != (d, d):
        shape = f"({d}, {d}) for a prompt of {d} numbers"
        raise ValueError(f"key_weights must have shape {shape}, got shape {weights.shape}")
    return weights


def _require_value(prompt: Array, value: Array) -> None:
    expected = prompt.shape if prompt.ndim == 1 else (prompt.shape[0], prompt.shape[2])
    if value.shape[: len(expected)] != expected or value.ndim not in (len(expected), len(expected) + 1):
        sizes = ", ".join(map(str, expected))
        shapes = f"({sizes}) or ({sizes}, m) for a prompt of shape {prompt.shape}"
        raise ValueError(f"value must have shape {shapes}, got shape {value.shape}")


class PromptAttention(nnx.Module):
    r"""Prompt attention f(X) = <X v, softmax(X W p)> as a module; `prompt_attention` is its function.

    `nnx.split(model, nnx.Param, ...)` gives exactly what is trained: p, or p and v. W is never trained.

    Attributes:
        prompt: p, trained.
        value: v, trained where `train_value`, otherwise `Frozen`.
        key_weights: W, `Frozen`; None for the identity.

    Example:
        >>> model = PromptAttention([0.0, 0.0], [1.0, 3.0], train_value=False)
        >>> float(model([[1.0, 0.0], [0.0, 1.0]]))
        2.0
    """

    def __init__(
        self,
        prompt: ArrayLike,
        value: ArrayLike,
        key_weights: ArrayLike | None = None,
        *,
        train_value: bool = True,
    ):
        """Build the model from its arrays, whose shapes are those of `prompt_attention`.

        Raises:
            ValueError: the shapes do not fit.
        """
        prompt, value = as_real("prompt", prompt), as_real("value", value)
        weights = _require_prompt(prompt, key_weights)
        _require_value(prompt, value)
        self.prompt = nnx.Param(prompt)
        self.value = nnx.Param(value) if train_value else Frozen(value)
        self.key_weights = None if weights is None else Frozen(weights)

    @classmethod
    def standard(
        cls,
        key: Array,
        dim: int,
        *,
        outputs: int | None = None,
        heads: int | None = None,
        queries: int = 1,
        key_weights: ArrayLike | None = None,
        train_value: bool = True,
        dtype: Any = None,
    ) -> PromptAttention:
        r"""The standard initialization: the entries of p and v are independent N(0, 1/d).

        Args:
            key: PRNG key.
            dim: token dimension d.
            outputs: m for an output of m numbers; a scalar output where None.
            heads: number of heads; one without a head axis, and a prompt of shape (d,), where None.
            queries: queries of each head; only with heads.
            key_weights: W, shape (d, d); the identity where None.
            train_value: whether v is trained.
            dtype: floating dtype; JAX's default where None.

        Returns:
            The model.

        Raises:
            ValueError: a size is not positive, or `queries` is given without `heads`.

        Example:
            >>> PromptAttention.standard(jax.random.key(0), 4, heads=2, outputs=3)(jnp.ones((5, 4))).shape
            (1, 3)
        """
        sizes = {"dim": dim, "outputs": outputs, "heads": heads, "queries": queries}
        require_sizes(**{name: size for name, size in sizes.items() if size is not None})
        if heads is None and queries != 1:
            raise ValueError(f"queries must be 1 where heads is None, got {queries}")
        key_prompt, key_value = jax.random.split(key)
        shape = (dim,) if heads is None else (heads, queries, dim)
        dtype = require_dtype(dtype)
        prompt = normal(key_prompt, shape, dtype)
        leading = () if heads is None else (heads,)
        trailing = () if outputs is None else (outputs,)
        value = normal(key_value, (*leading, dim, *trailing), dtype)
        return cls(prompt / dim**0.5, value / dim**0.5, key_weights, train_value=train_value)

    def logits(self, tokens: ArrayLike) -> Array:
        """Attention logits X W p, shape (..., n) or (..., heads, queries, n)."""
        weights = None if self.key_weights is None else self.key_weights[...]
        return attention_logits(self.prompt[...], tokens, weights)

    def attention(self, tokens: ArrayLike) -> Array:
        """Attention softmax(X W p): non-negative, one in sum over the tokens; of the shape of the logits."""
        return jax.nn.softmax(self.logits(tokens), axis=-1)

    def __call__(self, tokens: ArrayLike) -> Array:
        """The output f(X), see `prompt_attention`."""
        weights = None if self.key_weights is None else self.key_weights[...]
        return prompt_attention(self.prompt[...], self.value[...], tokens, weights)


def attention_function(model: PromptAttention) -> Callable[[PyTree, Any], Any]:
    """The attention of a model as a pure function of its trained parameters and the tokens.

    Example:
        >>> from models.functional import as_function
        >>> model = PromptAttention([0.0], [1.0])
        >>> attention_function(model)(as_function(model)[1], [[2.0], [4.0]]).tolist()
        [0.5, 0.5]
    """
    structure, _, frozen = nnx.split(model, nnx.Param, ...)
    return jax.tree_util.Partial(_attend, structure, frozen)


def _attend(structure, frozen, params, inputs):
    return nnx.merge(structure, params, frozen).attention(inputs)


def attention_log_ratio(prompt: ArrayLike, keys: ArrayLike) -> Array:
    r"""Logarithm of the largest over the smallest attention of a sample: max_j (K p)_j - min_j (K p)_j.

    The ratio itself is never formed: it overflows long before its logarithm does.

    Source: softmax2025talk, experiment.

    Args:
        prompt: p of shape (d,), or (heads, queries, d).
        keys: K, shape (..., n, d).

    Returns:
        Natural logarithms of shape (...), with heads (..., heads, queries).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> float(attention_log_ratio([1.0], [[3.0], [5.0], [4.0]]))
        2.0
    """
    logits = _logits(prompt, "keys", keys)
    return jnp.max(logits, axis=-1) - jnp.min(logits, axis=-1)


def log_mean_ratio(log_ratios: ArrayLike, axis: int = -1) -> Array:
    r"""Logarithm of the arithmetic mean of ratios that are given by their logarithms.

    A few samples with large ratios make up this mean; the mean and the median of the logarithms themselves
    belong beside it.

    Args:
        log_ratios: natural logarithms, for instance of `attention_log_ratio`, shape (..., N).
        axis: the axis of the samples.

    Returns:
        log((1/N) sum_i exp(log_ratios_i)), shape (...).

    Raises:
        ValueError: there are no ratios.

    Example:
        >>> round(float(log_mean_ratio([0.0, 1000.0])), 4)  # 1000 - log 2
        999.3069
    """
    log_ratios = as_real("log_ratios", log_ratios)
    if log_ratios.ndim == 0 or log_ratios.size == 0:
        raise ValueError(f"log_ratios must have shape (..., N) with N >= 1, got shape {log_ratios.shape}")
    return logsumexp(log_ratios, axis=axis) - jnp.log(log_ratios.shape[axis]).astype(log_ratios.dtype)
