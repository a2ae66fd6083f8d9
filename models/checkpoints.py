"""Checkpoints of a run: each is whole or not there at all, and only the run that wrote it goes on from it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var
from jaxtyping import PyTree

from dynamics.arguments import brief

_KEPT = 2
_DIGEST = hashlib.sha256().digest_size
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_NAMES = ("name", "debug_info", "name_and_src_info")  # what functions are called says not what they compute


def hash_program(function: Callable[..., Any], *arguments: Any) -> str:
    """SHA-256 of what a function computes: of its jaxpr and all numbers in it.

    Names and addresses do not count, so that an equal function made anew has an equal hash. Nor do the
    numbers of arrays that are leaves of the function, such as a `jax.tree_util.Partial`: they are its data.

    Example:
        >>> def scale(by):
        ...     return lambda x: by * x
        >>> hash_program(scale(2.0), 1.0) == hash_program(scale(2.0), 3.0) != hash_program(scale(3.0), 1.0)
        True
    """
    arrays, rest = eqx.partition(function, _is_array)
    traced = jax.make_jaxpr(lambda arrays, *arguments: eqx.combine(arrays, rest)(*arguments))
    return _digest(_words(traced(arrays, *arguments)))


def hash_arrays(tree: PyTree) -> str:
    """SHA-256 of the arrays of a pytree: of their places, dtypes, shapes and numbers.

    Leaves that are no arrays do not count.

    Example:
        >>> hash_arrays({"a": np.zeros(2)}) == hash_arrays({"b": np.zeros(2)})
        False
    """
    paths = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _is_array))
    return _digest(word for path, leaf in paths for word in (jax.tree_util.keystr(path), _of_array(leaf)))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _digest(words: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()


def _of_array(leaf: Any) -> str:
    array = _on_host(leaf)
    dtype = leaf.dtype if isinstance(leaf, jax.Array) else array.dtype  # that of keys names their kind
    return f"{dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def _on_host(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _words(value: Any) -> Iterator[str]:
    """A part of a jaxpr as words that are the same in every process."""
    jaxpr = getattr(value, "jaxpr", value)  # a closed one has its constants beside it
    if isinstance(jaxpr, Jaxpr):
        yield from _of_jaxpr(jaxpr)
        yield from _words(list(getattr(value, "consts", ())))
    elif isinstance(value, (tuple, list)):
        yield f"({len(value)}"
        for part in value:
            yield from _words(part)
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield str(name)
            yield from _words(value[name])
    elif isinstance(value, (set, frozenset)):
        yield from sorted(" ".join(_words(part)) for part in value)
    elif hasattr(value, "__array__"):
        yield _of_array(value)
    else:
        # A function within an equation is a rule of differentiation, which has been used, or calls the host.
        yield "function" if callable(value) else _ADDRESS.sub("", repr(value))


def _of_jaxpr(jaxpr: Jaxpr) -> Iterator[str]:
    numbers: dict[Var, int] = {}

    def atom(x: Any) -> str:
        value = _of_array(x.val) if isinstance(x, Literal) else numbers.setdefault(x, len(numbers))
        return f"{value}: {x.aval}"

    yield from map(atom, (*jaxpr.constvars, *jaxpr.invars))
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        yield from map(atom, equation.invars)
        yield from _words({name: value for name, value in equation.params.items() if name not in _NAMES})
        yield from map(atom, equation.outvars)
    yield from map(atom, jaxpr.outvars)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in its folder: the newest two, under the numbers of their steps.

    A checkpoint is one array of bytes, SHA-256 first: of who the run is, and of its numbers. Orbax writes it
    aside and renames it, so that a run which is killed leaves the checkpoint or none.

    Attributes:
        folder: where they are.
        run: who the run is: hashes or numbers, by names that are told where another run differs.
    """

    folder: Path
    run: dict[str, Any]

    def save(self, step: int, tree: PyTree) -> None:
        """Save the arrays of a pytree, and remove what is neither this checkpoint nor the one before it."""
        head = json.dumps({**self.run, "jax": version("jax")}).encode()
        body = b"".join([head, b"\n", *(_on_host(leaf).tobytes() for leaf in jax.tree.leaves(tree))])
        packed = np.frombuffer(hashlib.sha256(body).digest() + body, np.uint8)
        _orbax().save(str(self.folder.absolute() / str(step)), {"packed": packed}, overwrite=True)
        # Those of later steps could not be read, or the run would have gone on from them.
        earlier = sorted(other for other in self._steps() if other <= step)
        for other in set(self._steps()) - set(earlier[-_KEPT:]):
            shutil.rmtree(self.folder / str(other))
        for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left)

    def newest(self, like: PyTree) -> PyTree | None:
        """The newest checkpoint that is whole, in the shapes and dtypes of a pytree; None in a new folder.

        Raises:
            ValueError: no checkpoint is whole; it is another run's.

        Warns:
            RuntimeWarning: a newer checkpoint is damaged.
        """
        damaged: list[str] = []
        for step in sorted(self._steps(), reverse=True):
            try:
                run, payload = _read(self.folder / str(step))
            except Exception as error:  # Orbax raises all kinds for files that are damaged
                damaged.append(f"{step} ({brief(error)})")
                continue
            self._require_own(run)
            if damaged:
                warnings.warn(
                    f"checkpoints in {self.folder} are damaged at step {', '.join(damaged)}; "
                    f"the run goes on from step {step}",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return _unpack(payload, like)
        if damaged:
            raise ValueError(
                f"checkpoints must hold one that is whole, or none, got {self.folder} with damaged ones at "
                f"step {', '.join(damaged)}"
            )
        return None

    def _steps(self) -> list[int]:
        # A folder of somebody else's may be called by a number too.
        own = [path for path in self.folder.glob("*/state") if path.parent.name.isdecimal()]
        return [int(path.parent.name) for path in own]

    def _require_own(self, run: dict[str, Any]) -> None:
        def told(name: str) -> str:
            is_hash = isinstance(own[name], str) and name != "jax"
            return name if is_hash else f"{name} ({run.get(name)} there, {own[name]} here)"

        own = {**self.run, "jax": version("jax")}
        other = [name for name in own if own[name] != run.get(name)]
        # Another version alone is no other run, but may be why a program is another one.
        if other and other != ["jax"]:
            raise ValueError(
                "checkpoints must be the folder of this very run, got that of another one, which differs in "
                f"{', '.join(map(told, other))}: {self.folder}"
            )


def open_checkpoints(folder: str | Path, run: dict[str, Any]) -> Checkpoints:
    """The checkpoints of a run in a folder, which is made where there is none.

    Args:
        folder: where they are.
        run: as for `Checkpoints`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # an unwritable folder fails here, not in a writer thread
        pass
    return Checkpoints(folder, run)


def _orbax():
    import orbax.checkpoint.experimental.v1 as ocp  # takes a second to import; only long runs need it

    return ocp


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    packed = np.asarray(_orbax().load(str(path.absolute()))["packed"]).tobytes()
    digest, body = packed[:_DIGEST], packed[_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("its numbers are not those that were saved")
    head, payload = body.split(b"\n", 1)
    return json.loads(head), payload


def _unpack(payload: bytes, like: PyTree) -> PyTree:
    at = 0

    def unpack(leaf: Any) -> Any:
        nonlocal at
        was = _on_host(leaf)
        array = np.frombuffer(payload, was.dtype, was.size, at).reshape(was.shape).copy()
        at += array.nbytes
        if isinstance(leaf, np.ndarray):
            return array
        value = jnp.asarray(array)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and leaf.committed:
            value = jax.device_put(value, leaf.sharding)
        return value

    return jax.tree.map(unpack, like)
