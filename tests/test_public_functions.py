"""Every public function of `dynamics` and `models`: bad input is refused by name or gives NaN, whoever calls.

The functions are found, so that a new one fails until it has a line in `tests.public_calls`.
"""

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

import dynamics
import models
from dynamics.flow import Trajectory
from tests.public_calls import CALLS, NO_NUMBERS, Index, Real, of_vae_weights, quiet_of_classes, solve


def modules(package: ModuleType):
    """The modules whose names are public: a package that exports something stands for all of its own."""
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        if info.ispkg and all(
            inspect.ismodule(value) for name, value in vars(module).items() if name[0] != "_"
        ):
            yield from modules(module)
        elif module.__name__ != "dynamics.arguments":  # the guard itself, with tests of its own
            yield module


def public_functions():
    """By name: functions, and classes whose instances compute."""
    for module in (*modules(dynamics), *modules(models)):
        for name, value in vars(module).items():
            # What begins with require_ is a part of the guard.
            if name.startswith(("_", "require_")) or not callable(value):
                continue
            own = getattr(value, "__module__", None) or ""
            if own != module.__name__ and not (
                hasattr(module, "__path__") and own.startswith(module.__name__)
            ):
                continue
            if not inspect.isclass(value) or issubclass(value, (nnx.Module, eqx.Module)):
                yield f"{module.__name__}.{name}", value


FUNCTIONS = dict(public_functions())


@pytest.fixture(autouse=True)
def _as_users_call():
    """No annotation is checked, and shapes broadcast."""
    jaxtyping.config.update("jaxtyping_disable", True)
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_every_public_function_has_a_line():
    assert CALLS.keys() | NO_NUMBERS == FUNCTIONS.keys()
    assert not CALLS.keys() & NO_NUMBERS


def first_bad(value, bad):
    spoilt = np.array(value, float)
    spoilt.reshape(-1)[0] = bad
    return spoilt


# What an argument of real numbers is replaced by, if it is not `fine`.
KINDS = {
    "float16": lambda value: np.asarray(value, np.float16),
    "bfloat16": lambda value: jnp.asarray(value, jnp.bfloat16),
    "complex": lambda value: np.asarray(value, complex),
    "bool": lambda value: np.ones(np.shape(value), bool),
    "masked": lambda value: np.ma.masked_array(value, np.zeros(np.shape(value), bool)),
    "none": lambda value: None,
    "string": lambda value: "text",
    "strings": lambda value: ["1.0", "2.0"],
    "object": lambda value: object(),
    "empty": lambda value: np.zeros((*np.shape(value)[:-1], 0)),
    "deeper": lambda value: np.asarray(value)[None, None, None],
    "scalar": lambda value: np.ones(3) if np.ndim(value) == 0 else 1.0,
    "shorter": lambda value: np.asarray(value)[..., :-1] if np.size(value) > 1 else np.ones((2, 0)),
    "nan": lambda value: np.full(np.shape(value), np.nan),
    "nan-one": lambda value: first_bad(value, np.nan),
    "infinite": lambda value: np.full(np.shape(value), np.inf),
    "infinite-one": lambda value: first_bad(value, -np.inf),
}
VALUES = ("nan", "nan-one", "infinite", "infinite-one")
# An argument for which None means something may be left out.
OPTIONAL = {name for name in ("Y0", "Z0", "key_weights", "atol", "rtol", "u0", "v0", "gain_scale")}


def replacements(argument):
    """The bad values of an argument by kind, and those whose shape and dtype are right."""
    value = np.asarray(argument.value)
    if isinstance(argument, Index):
        below, above = np.full_like(value, -1), np.full_like(value, argument.size)
        values = {"negative": below, "beyond": above}
        others = {"float": value.astype(float), "bool": value > 0, "none": None, "string": "text"}
        others |= {kind: KINDS[kind](value) for kind in ("empty", "deeper", "scalar")}
    else:
        values = {kind: KINDS[kind](value) for kind in VALUES}
        values |= {f"bad {i}": np.asarray(bad, float) for i, bad in enumerate(argument.bad)}
        others = {kind: make(value) for kind, make in KINDS.items() if kind not in VALUES}
    fine = {*argument.fine.split(), *(f"{kind}-one" for kind in argument.fine.split())}
    return (*({kind: bad for kind, bad in kinds.items() if kind not in fine} for kinds in (values, others)),)


def numbers(result):
    """The floating leaves of a result, or None for a failure that it tells of."""
    trajectories = [leaf for leaf in jax.tree.leaves(result, is_leaf=is_path) if is_path(leaf)]
    if any(not bool(path.ok) for path in trajectories):
        return None
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(result) if not is_key(leaf)]
    return [leaf for leaf in leaves if np.issubdtype(leaf.dtype, np.inexact)]


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def is_path(node):
    return isinstance(node, Trajectory)


def plausible(valid, result):
    """Why a result of bad input could be taken for one: a finite number that differs, or no sign of it."""
    bad = numbers(result)
    if bad is None:
        return ""
    good = numbers(valid) or []
    if len(good) != len(bad):
        return "numbers of another dtype"
    for before, after in zip(good, bad, strict=True):
        if before.shape != after.shape:
            return f"shape {after.shape}"
        changed = np.isfinite(after) & ~(np.abs(after - before) <= 1e-6 * (1 + np.abs(before)))
        if np.any(changed):
            return f"{after[changed].ravel()[0]} where {before[changed].ravel()[0]} was right"
    if all(
        np.all(np.isfinite(after) | ~np.isfinite(before)) for before, after in zip(good, bad, strict=True)
    ):
        return "no sign of it"
    return ""


class Subject:
    """A public function with a valid call."""

    def __init__(self, name):
        call = CALLS[name]
        self.function, self.through, self.host = FUNCTIONS[name], call.through, call.host
        self.numeric = {k: v for k, v in call.arguments.items() if isinstance(v, (Real, Index))}
        self.fixed = {k: v for k, v in call.arguments.items() if k not in self.numeric}
        self.values = {k: jnp.asarray(v.value) for k, v in self.numeric.items()}

    def __call__(self, **changed):
        arguments = {**self.fixed, **self.values, **changed}
        return (
            self.function(**arguments) if self.through is None else self.through(self.function, **arguments)
        )


def complaint(call, valid, argument):
    """What is wrong with the outcome of bad input, in words; nothing where it is refused or NaN."""
    try:
        result = call()
    except (ValueError, TypeError) as error:
        message = str(error)
        if "\n" in message or len(message) > 300:
            return f"raises {type(error).__name__} of many lines: {message[:80]!r}"
        named = re.search(rf"(?<!\w){argument}(?!\w)", message)
        return "" if named else f"raises, but does not name it: {message!r}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:80]!r}"
    return plausible(valid, result)


NAMES = list(CALLS)


def of_one(subject: "Subject", argument: str) -> Callable[[Any], Any]:
    """The call as a function of one argument."""
    return lambda value: subject(**{argument: value})


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_by_name_or_gives_nan(name):
    subject = Subject(name)
    valid = subject()
    found = {}
    for argument, spec in subject.numeric.items():
        values, others = replacements(spec)
        for kind, bad in {**values, **others}.items():
            if bad is None and argument in OPTIONAL:
                continue
            found[argument, kind] = complaint(partial(subject, **{argument: bad}), valid, argument)
    found = {case: what for case, what in found.items() if what}
    assert not found, found


@pytest.mark.parametrize("name", NAMES)
def test_traced_bad_values_give_nan_in_their_own_lane(name):
    """All lanes are one program: the valid call, and each bad value of each argument."""
    subject = Subject(name)
    if subject.host:
        for argument, value in subject.values.items():
            outcome = complaint(partial(jax.jit(of_one(subject, argument)), value), None, argument)
            assert not outcome, outcome
        return
    valid = subject()
    cases = [("", "")]
    lanes: dict[str, list[Any]] = {argument: [value] for argument, value in subject.values.items()}
    for argument, spec in subject.numeric.items():
        for kind, bad in replacements(spec)[0].items():
            cases.append((argument, kind))
            for other, values in lanes.items():
                values.append(bad if other == argument else subject.values[other])
    results = jax.jit(jax.vmap(lambda lanes: subject(**lanes)))({k: jnp.stack(v) for k, v in lanes.items()})
    split = [jax.tree.map(itemgetter(i), results) for i in range(len(cases))]
    for one, other in zip(jax.tree.leaves(valid), jax.tree.leaves(split[0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    if numbers(valid):  # truth values and integers cannot be NaN
        found = {case: plausible(valid, lane) for case, lane in zip(cases[1:], split[1:], strict=True)}
        found = {case: what for case, what in found.items() if what}
        assert not found, found


@pytest.mark.parametrize("name", NAMES)
def test_under_somebody_s_jit_and_grad(name):
    """Each argument alone is traced, or none, while the others are concrete."""
    subject = Subject(name)
    if subject.host:
        return
    valid = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, subject()))
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype),
        valid,
        jax.eval_shape(lambda _: jax.tree.map(jnp.asarray, subject()), 0.0),
    )
    assert all(jax.tree.leaves(same))
    for argument, value in subject.values.items():
        jax.eval_shape(of_one(subject, argument), value)

    if CALLS[name].through in (solve, of_vae_weights, quiet_of_classes):
        return  # tracing a derivative of a solver takes seconds; tests/dynamics/test_flow.py has them

    def total(arguments):
        floats = [
            leaf
            for leaf in jax.tree.leaves(subject(**arguments))
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        ]
        return sum((jnp.sum(leaf) for leaf in floats), jnp.zeros(()))

    real = {k: v for k, v in subject.values.items() if isinstance(subject.numeric[k], Real)}
    jax.eval_shape(jax.grad(total), real)
