"""Ranges of a configuration's fields: said once, next to the field, and checked in one place.

    tokens: Annotated[int, Range(at_least=2)] = 4
    rates: Annotated[tuple[Positive, ...], Length(2)] = (0.1, 0.01)

An annotation of a tuple's entries is of each of them. Every number must be finite. So that nothing compiles
for a value that cannot be meant, `check_ranges` is called before a simulation runs, and at the start of a
`__post_init__` that looks at relations between fields.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The values that a number may have."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        signs = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}
        ends = {sign: getattr(self, name) for name, sign in signs.items()}
        return " and ".join(f"{sign} {end:g}" for sign, end in ends.items() if math.isfinite(end))


@dataclass(frozen=True)
class Length:
    """The least number of entries of a tuple."""

    at_least: int

    def __contains__(self, value: Any) -> bool:
        return len(value) >= self.at_least

    def __str__(self) -> str:
        return f"at least {self.at_least} values"


Real = Annotated[float, Range()]
Count = Annotated[int, Range(at_least=1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(above=0, below=1)]

_KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a finite number"),
    bool: (bool, "True or False"),
    str: (str, "text"),
}


def check_ranges(config: Any) -> None:
    """Raise `ValueError` unless every field of a configuration has a value of its type and in its range.

    Example:
        >>> @dataclass(frozen=True)
        ... class Config:
        ...     tokens: Annotated[int, Range(at_least=2)] = 4
        >>> check_ranges(Config(tokens=1))
        Traceback (most recent call last):
            ...
        ValueError: tokens must be an integer >= 2, got 1
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            check_ranges(value)
            continue
        for wanted in _complaints(hints[field.name], value):
            raise ValueError(f"{field.name} must be {wanted}, got {value!r}")


def _complaints(hint: Any, value: Any, ranges: tuple[Any, ...] = ()) -> Iterator[str]:
    """What a value must be and is not."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        yield from _complaints(inner, value, (*ranges, *extras))
    elif get_origin(hint) in (Union, types.UnionType):
        found = [list(_complaints(option, value, ranges)) for option in get_args(hint)]
        if all(found):
            yield found[0][0]
    elif get_origin(hint) is Literal:
        if value not in get_args(hint):
            yield f"one of {get_args(hint)}"
    elif get_origin(hint) is tuple:
        yield from _tuple_complaints(get_args(hint), value, ranges)
    elif hint is type(None):
        if value is not None:
            yield "None"
    elif hint in _KINDS:
        kind, words = _KINDS[hint]
        good = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
        good = good and (hint is not float or math.isfinite(value))
        if not (good and all(value in limit for limit in ranges)):
            yield " ".join([words, *map(str, ranges)])


def _tuple_complaints(entries: tuple[Any, ...], value: Any, ranges: tuple[Any, ...]) -> Iterator[str]:
    if not isinstance(value, tuple):
        yield "a tuple"
        return
    for limit in ranges:
        if isinstance(limit, Length) and value not in limit:
            yield str(limit)
    of_entries = tuple(limit for limit in ranges if isinstance(limit, Range))
    if entries[-1] is not Ellipsis and len(entries) != len(value):
        yield f"{len(entries)} values"
        return
    hints = [entries[0]] * len(value) if entries[-1] is Ellipsis else entries
    for hint, entry in zip(hints, value, strict=True):
        yield from _complaints(hint, entry, of_entries)
