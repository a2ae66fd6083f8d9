"""Verdicts: every relation and form on both sides of its edge, and the round trip through JSON."""

import json
import math
from typing import Any, cast

import pytest

from sims.claims import (
    Check,
    Claim,
    at_least,
    at_most,
    corrected,
    equals,
    every,
    from_json,
    qualified,
    quoted,
    slope,
    stated,
    to_json,
)

GOOD = Check("good", "equals", 1.0, 1.0, why="the same number")
BAD = Check("bad", "equals", 1.0, 2.0, why="the same number")
LOST = Check("lost", "equals", 1.0, math.nan, why="the same number")
WORDS = ("name", "something holds", "someone2024, Theorem 1")


def check(relation, predicted, measured, tolerance=0.0):
    return Check("x", relation, predicted, measured, tolerance, why="a reason")


@pytest.mark.parametrize(
    ("relation", "predicted", "tolerance", "inside", "outside"),
    [
        ("equals", 1.0, 0.25, [0.75, 1.0, 1.25], [0.7, 1.3, math.inf]),
        ("slope", 1.0, 0.25, [0.75, 1.25], [0.7, 1.3]),
        ("at most", 1.0, 0.25, [-math.inf, 1.0, 1.25], [1.3, math.inf]),
        ("at least", 1.0, 0.25, [0.75, 2.0, math.inf], [0.7, -math.inf]),
        ("all of", 8, 1, [7, 8], [6]),
        ("equals", 1.0, 0.0, [1.0], [1.0 + 1e-15]),
    ],
)
def test_relations_at_their_edge(relation, predicted, tolerance, inside, outside):
    assert all(check(relation, predicted, value, tolerance).holds for value in inside)
    assert not any(check(relation, predicted, value, tolerance).holds for value in outside)
    assert not check(relation, predicted, math.nan, math.inf).holds
    assert not check(relation, math.nan, 1.0, tolerance).holds


def test_each_relation_has_a_function_that_takes_what_was_measured_first():
    assert at_most("x", 1.0, 2.0, 0.5, why="w") == Check("x", "at most", 2.0, 1.0, 0.5, "w")
    assert at_least("x", 1.0, 2.0, 0.5, why="w") == Check("x", "at least", 2.0, 1.0, 0.5, "w")
    assert equals("x", 1.0, 2.0, 0.5, why="w") == Check("x", "equals", 2.0, 1.0, 0.5, "w")
    assert slope("x", 1.0, 2.0, 0.5, why="w") == Check("x", "slope", 2.0, 1.0, 0.5, "w")
    assert every("x", [True, False, True], 1) == Check("x", "all of", 3, 2, 1)


def test_nothing_and_nan_are_no_evidence():
    assert every("x", [[1.0, 2.0]]).holds
    assert not every("x", []).holds
    assert not every("x", [1.0, math.nan]).holds


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (stated(*WORDS, GOOD, GOOD), "holds"),
        (stated(*WORDS, GOOD, BAD), "fails"),
        (stated(*WORDS, GOOD, LOST), "fails"),
        (corrected(*WORDS, printed=[BAD], mended=[GOOD]), "holds corrected"),
        (corrected(*WORDS, printed=[GOOD], mended=[GOOD]), "fails"),
        (corrected(*WORDS, printed=[BAD], mended=[BAD]), "fails"),
        (corrected(*WORDS, printed=[LOST], mended=[GOOD]), "fails"),
        (corrected(*WORDS, printed=[BAD], mended=[LOST]), "fails"),
        (corrected(*WORDS, printed=[GOOD, BAD], mended=[GOOD]), "holds corrected"),
        (corrected(*WORDS, printed=[BAD, LOST], mended=[GOOD]), "fails"),
        (corrected(*WORDS, printed=[GOOD, GOOD], mended=[GOOD]), "fails"),
        (qualified(*WORDS, condition="n > 1", inside=[GOOD], outside=[GOOD]), "holds if n > 1"),
        (qualified(*WORDS, condition="n > 1", inside=[GOOD], outside=[BAD]), "fails"),
        (qualified(*WORDS, condition="n > 1", inside=[BAD], outside=[GOOD]), "fails"),
        (quoted(*WORDS), "quoted"),
    ],
)
def test_verdicts(made, verdict):
    assert made.verdict == verdict
    assert made.at("quick") == verdict


@pytest.mark.parametrize(
    ("wanted", "run", "verdict"),
    [
        ("quick", "paper", "fails"),
        ("standard", "quick", "needs --preset standard"),
        ("standard", "standard", "fails"),
        ("paper", "standard", "needs --preset paper"),
        ("paper", "paper", "fails"),
    ],
)
def test_a_claim_binds_from_its_preset_on(wanted, run, verdict):
    claim = stated(*WORDS, BAD, preset=wanted)
    assert claim.at(run) == verdict
    assert to_json(claim, run, True)["verdict"] == verdict
    assert quoted(*WORDS).at(run) == "quoted"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check(cast(Any, "about"), 1, 1), r"^relation must be one of \('equals', .*\), got 'about'$"),
        (lambda: check("equals", 1, 1, -0.1), r"^tolerance must be >= 0, got -0\.1$"),
        (lambda: check("equals", 1, 1, math.nan), r"^tolerance must be >= 0, got nan$"),
        (lambda: at_most("gap", 1, 1, why=""), r"^why must be the reason of the bound, got none for 'gap'$"),
        (
            lambda: Claim(*WORDS, cast(Any, "certain"), [GOOD]),
            r"^form must be one of \('stated', .*'certain'$",
        ),
        (lambda: stated(*WORDS), r"^checks must be given for the stated claim 'name', got none$"),
        (
            lambda: corrected(*WORDS, printed=[], mended=[GOOD]),
            r"^checks must be mended and printed for the corrected claim 'name', got \['mended'\]$",
        ),
        (
            lambda: qualified(*WORDS, condition="n", inside=[GOOD], outside=[]),
            r"^checks must be inside and outside for the qualified claim 'name', got \['inside'\]$",
        ),
        (lambda: qualified(*WORDS, condition="", inside=[GOOD], outside=[GOOD]), r"^condition must be given"),
        (lambda: Claim(*WORDS, "stated", [GOOD], condition="n > 1"), r"^condition must be given"),
        (lambda: stated(*WORDS, GOOD, preset=cast(Any, "bogus")), r"^preset must be one of"),
        (lambda: Claim(*WORDS, "stated", [GOOD], needs="a GPU"), r"^needs must be given for a quoted claim"),
    ],
)
def test_bad_claims_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_json_round_trip():
    infinite = at_most("infinite", -math.inf, math.inf, 0.5, why="no bound")
    made = corrected(*WORDS, printed=[LOST, infinite], mended=[GOOD], preset="paper")
    text = json.dumps(to_json(made, "paper", True))
    # JSON has no such numbers: `sims.results` writes strings.
    for name in ("-Infinity", "Infinity", "NaN"):
        text = text.replace(f" {name}", f' "{float(name)}"')
    again = from_json(json.loads(text, parse_constant=pytest.fail))
    assert math.isnan(again.checks[0].measured)
    assert again.checks[1:] == made.checks[1:]
    assert (again.of_role("mended"), again.preset, again.verdict) == ([made.checks[2]], "paper", "fails")
    plain = json.loads(text)
    assert [check["holds"] for check in plain["checks"]] == [False, True, True]
    assert [check["why"] for check in plain["checks"]] == ["the same number", "no bound", "the same number"]


def test_text_of_checks_and_claims():
    order = slope("slope", 1.01234, 1, 0.05, why="a reason")
    assert str(order) == "slope: 1.012 (slope 1 ± 0.05)"
    assert str(at_most("gap", 2.5e-9, 1e-6, why="a reason")) == "gap: 2.5e-09 (at most 1e-06)"
    assert str(stated(*WORDS, order)) == (
        "name holds: something holds (someone2024, Theorem 1)\n  ✓ slope: 1.012 (slope 1 ± 0.05)"
    )


def test_a_quoted_claim_tells_what_a_test_would_take():
    claim = quoted(*WORDS, needs="a thousand GPUs")
    plain = to_json(claim, "quick", True)
    assert from_json(plain) == claim
    assert str(claim).splitlines()[1:] == ["  a test would take a thousand GPUs"]
    assert from_json({name: value for name, value in plain.items() if name != "needs"}) == quoted(*WORDS)


def test_a_claim_that_fails_in_32_bit_asks_for_64():
    claim = stated(*WORDS, BAD)
    assert claim.at("quick") == "fails"
    assert claim.at("quick", x64=False) == "needs --x64"
