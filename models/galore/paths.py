"""Parameters by the keys on their way from the root of a tree, and options that tell something of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path


@jax.tree_util.register_static
@dataclass(frozen=True)
class Absent:
    """A parameter that is updated elsewhere, such as one of another layer, in the place of its array.

    It has no leaves. What depends on all parameters, as staggered refreshes do, counts it all the same.
    """

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)


def absent(tree: Any, axes: int = 0) -> Any:
    """Return a tree with `Absent` for every array, without its first `axes` axes."""
    return jax.tree.map(lambda leaf: Absent(jnp.shape(leaf)[axes:], jnp.result_type(leaf)), tree)


class Parameter(NamedTuple):
    """A parameter, and where it is.

    Attributes:
        keys: keys from the root of the tree. They tell it from all others.
        name: the keys joined with "/", which is what functions of a path are given.
        leaf: the array, or what has its shape and dtype.
    """

    keys: tuple[Any, ...]
    name: str
    leaf: Any


def parameters(tree: Any) -> list[Parameter]:
    """Return the parameters of a tree in its order, those of `Absent` among them.

    Flax keeps an array in a variable or bare, according to who hands it on; the way is the same for both.
    """
    found = []
    for path, node in tree_leaves_with_path(tree, is_leaf=_is_whole):
        for rest, leaf in tree_leaves_with_path(node, is_leaf=_is_absent):
            whole = path + rest[_is_variable(node) :]
            found.append(Parameter(tuple(map(_key, whole)), keystr(whole, simple=True, separator="/"), leaf))
    return found


def by_keys(tree: Any) -> dict[tuple[Any, ...], Any]:
    """Return the leaves of a tree by their keys."""
    return {parameter.keys: parameter.leaf for parameter in parameters(tree)}


def is_single(option: Any) -> bool:
    """Tell whether an option is one value for all parameters: neither a function nor a pytree."""
    return not callable(option) and jax.tree_util.all_leaves([option])


def is_tree(option: Any, every: Sequence[Parameter]) -> bool:
    """Tell whether an option is a pytree of values.

    A pytree that can be called, as a module of Equinox can, is one of values if it has the structure of the
    parameters. Otherwise it is a function, as a `jax.tree_util.Partial` is.
    """
    if jax.tree_util.all_leaves([option]):
        return False
    return not callable(option) or {parameter.keys for parameter in every} <= set(by_keys(option))


def teller(argument: str, option: Any, every: Sequence[Parameter]) -> Callable[[Parameter], Any]:
    """Return the function that tells an option's value for a parameter, None where a pytree has none."""
    if is_tree(option, every):
        values = by_keys(option)
        return lambda parameter: values.get(parameter.keys)
    if not callable(option):
        return lambda parameter: option
    require_distinct(argument, every)
    return lambda parameter: option(parameter.name, parameter.leaf)


def require_distinct(argument: str, every: Sequence[Parameter]) -> None:
    """Refuse two parameters of one name where an option is a function of names."""
    for name, count in Counter(parameter.name for parameter in every).items():
        if count > 1:
            raise ValueError(f"{argument} must be a pytree, as {count} parameters are called {name!r}")


def _is_absent(node: Any) -> bool:
    return isinstance(node, Absent)


def _is_whole(node: Any) -> bool:
    return _is_absent(node) or _is_variable(node)


def _is_variable(node: Any) -> bool:
    # Variables of flax.nnx are told by what they can do, as Flax need not be installed.
    return hasattr(node, "get_metadata") and hasattr(node, "get_value")


def _key(entry: Any) -> Any:
    """Return the bare key of a dict, an attribute or a place in a sequence."""
    for kind in ("key", "name", "idx"):
        if hasattr(entry, kind):
            return getattr(entry, kind)
    return entry
