"""Claims: what a document states, set against what was measured, with a verdict.

A check is made by the function of its relation (`at_most`, `at_least`, `equals`, `slope`, `every`), a claim
by the function of its form (`stated`, `corrected`, `qualified`, `quoted`). A simulation names its claims
within itself; whoever judges puts `<theory>.<experiment>/` in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Relation = Literal["equals", "at most", "at least", "slope", "all of"]
Form = Literal["stated", "corrected", "qualified", "quoted"]
Role = Literal["", "printed", "mended", "inside", "outside"]
Preset = Literal["quick", "standard", "paper"]

# Reasons that many bounds share.
ROUNDING = "rounding alone"
SOLVER = "the solver's error alone"
SECOND_ORDER = "the largest rates add a second order"

# The roles that the checks of a form have, each of which needs at least one check.
_ROLES: dict[str, tuple[Role, ...]] = {
    "stated": ("",),
    "corrected": ("printed", "mended"),
    "qualified": ("inside", "outside"),
    "quoted": (),
}


@dataclass(frozen=True)
class Check:
    """One number against another.

    Attributes:
        label: what is measured.
        relation: `equals` and `slope`: measured within `tolerance` of predicted; `at most` and `at least`:
            measured on that side of predicted, up to `tolerance`; `all of`: measured cases out of predicted
            ones, no more than `tolerance` of them missing.
        predicted: the number that the statement gives.
        measured: the number that was found.
        tolerance: how far off it may be; fixed before the run.
        why: the reason of the bound and of its tolerance, in one line.
        role: the side of its claim that the check is on: the `printed` or the `mended` form of a corrected
            claim, `inside` or `outside` of the condition of a qualified one.
    """

    label: str
    relation: Relation
    predicted: float
    measured: float
    tolerance: float = 0.0
    why: str = ""
    role: Role = ""

    def __post_init__(self):
        for name, options in (("relation", Relation), ("role", Role)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name} must be one of {get_args(options)}, got {getattr(self, name)!r}")
        for name in ("predicted", "measured", "tolerance"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, got {self.tolerance}")
        if not self.why and self.relation != "all of":
            raise ValueError(f"why must be the reason of the bound, got none for {self.label!r}")

    @property
    def holds(self) -> bool:
        """Whether the relation holds: never for a measured NaN, nor for all of no cases."""
        if math.isnan(self.measured) or (self.relation == "all of" and self.predicted == 0):
            return False
        if self.relation == "at most":
            return self.measured <= self.predicted + self.tolerance
        if self.relation in ("at least", "all of"):
            return self.measured >= self.predicted - self.tolerance
        return abs(self.measured - self.predicted) <= self.tolerance

    def __str__(self) -> str:
        spread = f" ± {self.tolerance:.3g}" if self.tolerance else ""
        form = ".0f" if self.relation == "all of" else ".4g"
        return f"{self.label}: {self.measured:{form}} ({self.relation} {self.predicted:{form}}{spread})"


def at_most(label: str, measured: Any, bound: Any, within: Any = 0.0, *, why: str) -> Check:
    """A check that a number is no larger than a bound, up to `within`.

    Example:
        >>> str(at_most("gap", 2.5e-9, 1e-6, why="The solver's tolerance is 1e-8."))
        'gap: 2.5e-09 (at most 1e-06)'
    """
    return Check(label, "at most", bound, measured, within, why)


def at_least(label: str, measured: Any, bound: Any, within: Any = 0.0, *, why: str) -> Check:
    """A check that a number is no smaller than a bound, up to `within`."""
    return Check(label, "at least", bound, measured, within, why)


def equals(label: str, measured: Any, expected: Any, within: Any = 0.0, *, why: str) -> Check:
    """A check that a number is an expected one, up to `within`."""
    return Check(label, "equals", expected, measured, within, why)


def slope(label: str, measured: Any, expected: Any, within: Any = 0.0, *, why: str) -> Check:
    """A check that a fitted slope, such as an order of convergence, is an expected one, up to `within`."""
    return Check(label, "slope", expected, measured, within, why)


def every(label: str, cases: Any, missing: Any = 0, *, why: str = "") -> Check:
    """A check that a condition holds in all of many cases, but for `missing` of them. A NaN does not hold.

    Example:
        >>> str(every("steps that descend", [True, True, False], missing=1))
        'steps that descend: 2 (all of 3 ± 1)'
    """
    import numpy as np  # claims are listed without it

    cases = np.asarray(cases)
    if cases.dtype.kind == "f":
        cases = np.where(np.isnan(cases), 0, cases)
    return Check(label, "all of", cases.size, int(np.count_nonzero(cases)), missing, why)


@dataclass(frozen=True)
class Claim:
    """A statement of a document with the checks that decide it.

    Attributes:
        id: `<theory>.<experiment>/<name>`; within a simulation, the name alone.
        statement: what is claimed, in one sentence.
        source: a key of references.bib and the place, such as "tian2024joma, Theorem 2".
        form: `stated`: checked as printed, or as derived where the source says so. `corrected`: the printed
            form fails (at least one of its checks must) and the mended one holds. `qualified`: true under
            `condition`, with checks inside and outside of it. `quoted`: quoted, never tested.
        checks: the checks.
        condition: for `qualified`: the condition, as in "holds if <condition>".
        preset: the smallest preset at which the tolerances bind. They are meant for 64-bit.
        needs: for `quoted`: what a test of it would take.
    """

    id: str
    statement: str
    source: str
    form: Form
    checks: Sequence[Check] = ()
    condition: str = ""
    preset: Preset = "quick"
    needs: str = ""

    def __post_init__(self):
        object.__setattr__(self, "checks", tuple(self.checks))
        for name, options in (("form", Form), ("preset", Preset)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name} must be one of {get_args(options)}, got {getattr(self, name)!r}")
        needed, given = set(_ROLES[self.form]), {check.role for check in self.checks}
        if needed != given:
            raise ValueError(
                f"checks must be {' and '.join(sorted(needed - {''})) or 'given'} for the {self.form} claim "
                f"{self.id!r}, got {sorted(given) or 'none'}"
            )
        if (self.form == "qualified") != bool(self.condition):
            raise ValueError("condition must be given for a qualified claim, and only there")
        if self.needs and self.form != "quoted":
            raise ValueError(f"needs must be given for a quoted claim alone, got a {self.form} one")

    def of_role(self, role: Role) -> list[Check]:
        """The checks on one side of the claim."""
        return [check for check in self.checks if check.role == role]

    @property
    def verdict(self) -> str:
        """`holds`, `holds corrected`, `holds if ...`, `quoted` or `fails`."""
        if self.form == "quoted":
            return "quoted"
        if self.form == "corrected":
            printed, mended = self.of_role("printed"), self.of_role("mended")
            # A NaN is no evidence against the printed form.
            measured = all(not math.isnan(check.measured) for check in printed)
            refuted = measured and not all(check.holds for check in printed)
            return "holds corrected" if refuted and all(check.holds for check in mended) else "fails"
        if not all(check.holds for check in self.checks):
            return "fails"
        return f"holds if {self.condition}" if self.form == "qualified" else "holds"

    def at(self, preset: Preset, x64: bool = True) -> str:
        """The verdict as seen from a run: a claim that wants a larger preset, or 64-bit, says so."""
        order = get_args(Preset)
        if self.form != "quoted" and order.index(preset) < order.index(self.preset):
            return f"needs --preset {self.preset}"
        return "needs --x64" if self.verdict == "fails" and not x64 else self.verdict

    def __str__(self) -> str:
        marks = [f"  {'✓' if check.holds else '✗'} {check}" for check in self.checks]
        marks += [f"  a test would take {self.needs}"] if self.needs else []
        return "\n".join([f"{self.id} {self.verdict}: {self.statement} ({self.source})", *marks])


def stated(name: str, statement: str, source: str, *checks: Check, preset: Preset = "quick") -> Claim:
    """A claim that is checked as printed, or as derived where the source says so."""
    return Claim(name, statement, source, "stated", checks, preset=preset)


def corrected(
    name: str,
    statement: str,
    source: str,
    *,
    printed: Sequence[Check],
    mended: Sequence[Check],
    preset: Preset = "quick",
) -> Claim:
    """A claim whose printed form fails, by at least one of its checks, and whose mended form holds."""
    checks = _as("printed", printed) + _as("mended", mended)
    return Claim(name, statement, source, "corrected", checks, preset=preset)


def qualified(
    name: str,
    statement: str,
    source: str,
    *,
    condition: str,
    inside: Sequence[Check],
    outside: Sequence[Check],
    preset: Preset = "quick",
) -> Claim:
    """A claim that is true under a condition that is not printed: what is so inside of it, and outside."""
    checks = _as("inside", inside) + _as("outside", outside)
    return Claim(name, statement, source, "qualified", checks, condition, preset)


def quoted(name: str, statement: str, source: str, *, needs: str = "") -> Claim:
    """A claim that needs data or compute that is not here: the printed statement, never tested.

    `needs` tells what a test would take, as in "a test would take <needs>".

    Example:
        >>> quoted("large", "It holds at scale", "someone2024, Table 1", needs="a thousand GPUs").verdict
        'quoted'
    """
    return Claim(name, statement, source, "quoted", needs=needs)


def _as(role: Role, checks: Sequence[Check]) -> list[Check]:
    return [replace(check, role=role) for check in checks]


def to_json(claim: Claim, preset: Preset, x64: bool) -> dict[str, Any]:
    """A claim as plain data, the state of each check and the verdict as seen from a run included."""
    checks = [{**asdict(check), "holds": check.holds} for check in claim.checks]
    return {**asdict(claim), "checks": checks, "verdict": claim.at(preset, x64)}


def from_json(data: dict[str, Any]) -> Claim:
    """The claim that `to_json` wrote; results may be saved without `needs`."""
    data = {"needs": "", **data}
    fields = {name: data[name] for name in Claim.__dataclass_fields__ if name != "checks"}
    checks = tuple(
        Check(**{name: check[name] for name in Check.__dataclass_fields__}) for check in data["checks"]
    )
    return Claim(**fields, checks=checks)
