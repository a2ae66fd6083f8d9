"""Ranges: what is out of them is told before anything compiles, in every field of every simulation."""

import math
import re
from dataclasses import dataclass, is_dataclass, replace
from typing import Annotated, Any, Literal, cast, get_type_hints

import pytest

from sims import simulations
from sims.ranges import Count, Length, Positive, Range, Share, check_ranges


@dataclass(frozen=True)
class Part:
    depth: Count = 1


@dataclass(frozen=True)
class Config:
    tokens: Annotated[int, Range(at_least=2)] = 4
    momentum: Annotated[float, Range(at_least=0, below=1)] = 0.9
    rates: Annotated[tuple[Positive, ...], Length(2)] = (0.1, 0.2)
    sizes: Annotated[tuple[int, int], Range(at_least=1)] = (1, 2)
    pairs: tuple[tuple[Count, Share], ...] = ((1, 0.5),)
    batch: Count | None = None
    kind: Literal["linear", "exp"] = "linear"
    noisy: bool = False
    name: str = "a"
    part: Part = Part()


def test_what_is_in_range_passes():
    check_ranges(Config())
    check_ranges(Config(momentum=0, rates=(1, 2.5), batch=3, pairs=(), kind="exp", noisy=True))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("tokens", 1, "an integer >= 2"),
        ("tokens", 2.5, "an integer >= 2"),
        ("tokens", True, "an integer >= 2"),
        ("tokens", "5", "an integer >= 2"),
        ("momentum", 1.0, "a finite number >= 0 and < 1"),
        ("momentum", math.nan, "a finite number >= 0 and < 1"),
        ("rates", (0.1,), "at least 2 values"),
        ("rates", (0.1, 0.0), "a finite number > 0"),
        ("rates", (0.1, math.inf), "a finite number > 0"),
        ("rates", 0.1, "a tuple"),
        ("sizes", (1, 2, 3), "2 values"),
        ("sizes", (1, 0), "an integer >= 1"),
        ("pairs", ((1, 1.0),), "a finite number > 0 and < 1"),
        ("batch", 0, "an integer >= 1"),
        ("kind", "cubic", "one of ('linear', 'exp')"),
        ("noisy", 1, "True or False"),
    ],
)
def test_what_is_not_is_named(field, value, wanted):
    message = re.escape(f"{field} must be {wanted}, got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_ranges(replace(Config(), **{field: value}))


def test_parts_are_looked_into():
    with pytest.raises(ValueError, match=r"^depth must be an integer >= 1, got 0$"):
        check_ranges(Config(part=Part(0)))


def far_below(value):
    if isinstance(value, tuple):
        return tuple(map(far_below, value))
    return -1e9 if isinstance(value, float) else -(10**9)


@pytest.mark.parametrize("simulation", simulations.available())
def test_every_number_of_every_simulation_has_a_range(simulation):
    sim = simulations.load_simulation(simulation)
    for config in sim.PRESETS.values():
        check_ranges(config)
    config = sim.PRESETS["quick"]
    for part in (config, *filter(is_dataclass, vars(config).values())):
        hints = get_type_hints(type(part), include_extras=True)
        for name, value in vars(part).items():
            if isinstance(value, (bool, str)) or is_dataclass(value) or repr(Range()) in repr(hints[name]):
                continue  # a range without ends is said on purpose
            bad = tuple(map(far_below, value or (0, 0))) if isinstance(value, tuple) else far_below(value)
            with pytest.raises(ValueError, match=name):
                check_ranges(replace(cast(Any, part), **{name: bad}))
