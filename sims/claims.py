"""Claims: what a document states, set against what was measured, with a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Relation = Literal["equals", "at most", "at least", "slope", "all of"]
Form = Literal["stated", "corrected", "qualified", "quoted"]
Preset = Literal["quick", "standard", "paper"]


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
        tolerance: fixed before the run; its reason belongs in a comment beside it.
    """

    label: str
    relation: Relation
    predicted: float
    measured: float
    tolerance: float = 0.0

    def __post_init__(self):
        if self.relation not in get_args(Relation):
            raise ValueError(f"relation must be one of {get_args(Relation)}, got {self.relation!r}")
        for name in ("predicted", "measured", "tolerance"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, got {self.tolerance}")

    @property
    def holds(self) -> bool:
        """Whether the relation holds; a measured NaN never does."""
        if math.isnan(self.measured):
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


@dataclass(frozen=True)
class Claim:
    """A statement of a document with the checks that decide it.

    Attributes:
        id: `<theory>.<experiment>/<name>`.
        statement: what is claimed, in one sentence.
        source: a key of references.bib and the place, such as "tian2024joma, Theorem 2".
        form: `stated`: checked as printed, or as derived where the source says so. `corrected`: the printed
            form fails (its checks come first, `printed` of them, and at least one must fail) and the
            corrected one holds. `qualified`: true under `condition`, with checks on both sides of it.
            `quoted`: quoted, never tested.
        checks: the checks.
        condition: for `qualified`: the condition, as in "holds if <condition>".
        printed: for `corrected`: how many of the first checks are of the printed form.
        preset: the smallest preset at which the tolerances bind. They are meant for 64-bit.
    """

    id: str
    statement: str
    source: str
    form: Form
    checks: Sequence[Check] = ()
    condition: str = ""
    printed: int = 1
    preset: Preset = "quick"

    def __post_init__(self):
        object.__setattr__(self, "checks", tuple(self.checks))
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {get_args(Form)}, got {self.form!r}")
        if self.preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {get_args(Preset)}, got {self.preset!r}")
        if self.printed < 1:
            raise ValueError(f"printed must be >= 1, got {self.printed}")
        least = {"stated": 1, "corrected": self.printed + 1, "qualified": 2, "quoted": 0}[self.form]
        if len(self.checks) < least:
            raise ValueError(f"checks must be >= {least} for a {self.form} claim, got {len(self.checks)}")
        if (self.form == "qualified") != bool(self.condition):
            raise ValueError("condition must be given for a qualified claim, and only there")

    @property
    def verdict(self) -> str:
        """`holds`, `holds corrected`, `holds if ...`, `quoted` or `fails`."""
        if self.form == "quoted":
            return "quoted"
        if self.form == "corrected":
            printed, mended = self.checks[: self.printed], self.checks[self.printed :]
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


def all_of(label: str, holds: Any, missing: float = 0) -> Check:
    """A check that a condition holds in all of many cases, but for `missing` of them.

    Example:
        >>> str(all_of("steps that descend", [True, True, False], missing=1))
        'steps that descend: 2 (all of 3 ± 1)'
    """
    import numpy as np  # claims are listed without it

    cases = np.asarray(holds, bool)
    return Check(label, "all of", cases.size, int(np.count_nonzero(cases)), missing)


def to_json(claim: Claim) -> dict[str, Any]:
    """A claim as plain data, its verdict and the state of each check included."""
    checks = [{**asdict(check), "holds": check.holds} for check in claim.checks]
    return {**asdict(claim), "checks": checks, "verdict": claim.verdict}


def from_json(data: dict[str, Any]) -> Claim:
    """The claim that `to_json` wrote."""
    fields = {name: data[name] for name in Claim.__dataclass_fields__ if name != "checks"}
    checks = tuple(
        Check(**{name: check[name] for name in Check.__dataclass_fields__}) for check in data["checks"]
    )
    return Claim(**fields, checks=checks)
