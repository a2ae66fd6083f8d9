"""Verdicts: every relation and form on both sides of its edge, and the round trip through JSON."""

import json
import math
from typing import Any, cast

import pytest

from sims.claims import Check, Claim, from_json, to_json

GOOD = Check("good", "equals", 1.0, 1.0)
BAD = Check("bad", "equals", 1.0, 2.0)
LOST = Check("lost", "equals", 1.0, math.nan)


def claim(form, *checks, **rest):
    return Claim("theory.sim/name", "something holds", "someone2024, Theorem 1", form, checks, **rest)


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
    assert all(Check("x", relation, predicted, value, tolerance).holds for value in inside)
    assert not any(Check("x", relation, predicted, value, tolerance).holds for value in outside)
    assert not Check("x", relation, predicted, math.nan, math.inf).holds
    assert not Check("x", relation, math.nan, 1.0, tolerance).holds


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (claim("stated", GOOD, GOOD), "holds"),
        (claim("stated", GOOD, BAD), "fails"),
        (claim("stated", GOOD, LOST), "fails"),
        (claim("corrected", BAD, GOOD), "holds corrected"),
        (claim("corrected", GOOD, GOOD), "fails"),
        (claim("corrected", BAD, BAD), "fails"),
        (claim("corrected", LOST, GOOD), "fails"),
        (claim("corrected", BAD, LOST), "fails"),
        (claim("corrected", GOOD, BAD, GOOD, printed=2), "holds corrected"),
        (claim("corrected", BAD, LOST, GOOD, printed=2), "fails"),
        (claim("corrected", GOOD, GOOD, GOOD, printed=2), "fails"),
        (claim("qualified", GOOD, GOOD, condition="n > 1"), "holds if n > 1"),
        (claim("qualified", GOOD, BAD, condition="n > 1"), "fails"),
        (claim("quoted"), "quoted"),
        (claim("quoted", BAD), "quoted"),
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
    assert claim("stated", BAD, preset=wanted).at(run) == verdict
    assert claim("quoted", preset=wanted).at(run) == "quoted"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Check("x", cast(Any, "about"), 1, 1),
            r"^relation must be one of \('equals', .*\), got 'about'$",
        ),
        (lambda: Check("x", "equals", 1, 1, -0.1), r"^tolerance must be >= 0, got -0\.1$"),
        (lambda: Check("x", "equals", 1, 1, math.nan), r"^tolerance must be >= 0, got nan$"),
        (lambda: claim("certain", GOOD), r"^form must be one of \('stated', .*\), got 'certain'$"),
        (lambda: claim("stated"), r"^checks must be >= 1 for a stated claim, got 0$"),
        (lambda: claim("corrected", BAD), r"^checks must be >= 2 for a corrected claim, got 1$"),
        (
            lambda: claim("corrected", BAD, GOOD, printed=2),
            r"^checks must be >= 3 for a corrected",
        ),
        (
            lambda: claim("qualified", GOOD, condition="n"),
            r"^checks must be >= 2 for a qualified",
        ),
        (lambda: claim("qualified", GOOD, GOOD), r"^condition must be given for a qualified claim, and only"),
        (lambda: claim("stated", GOOD, condition="n > 1"), r"^condition must be given for a qualified claim"),
    ],
)
def test_bad_claims_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_json_round_trip():
    infinite = Check("infinite", "at most", math.inf, -math.inf, 0.5)
    made = claim("corrected", LOST, infinite, GOOD, printed=2, preset="paper")
    text = json.dumps(to_json(made))
    # JSON has no such numbers: `sims.results` writes strings.
    for name in ("-Infinity", "Infinity", "NaN"):
        text = text.replace(f" {name}", f' "{float(name)}"')
    again = from_json(json.loads(text, parse_constant=pytest.fail))
    assert math.isnan(again.checks[0].measured)
    assert again.checks[1:] == (infinite, GOOD)
    assert (again.printed, again.preset, again.verdict) == (2, "paper", "fails")
    assert [check["holds"] for check in json.loads(text)["checks"]] == [False, True, True]
    assert json.loads(text)["verdict"] == "fails"


def test_text_of_a_check():
    assert str(Check("slope", "slope", 1, 1.01234, 0.05)) == "slope: 1.012 (slope 1 ± 0.05)"
    assert str(Check("gap", "at most", 1e-6, 2.5e-9)) == "gap: 2.5e-09 (at most 1e-06)"


def test_a_claim_that_fails_in_32_bit_asks_for_64():
    claim = Claim("a.b/c", "x", "s, t", "stated", [Check("gap", "at most", 1.0, 2.0)])
    assert claim.at("quick") == "fails"
    assert claim.at("quick", x64=False) == "needs --x64"


@pytest.mark.parametrize(("field", "value"), [("preset", "bogus"), ("printed", 0)])
def test_fields_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        Claim("a.b/c", "x", "s, t", "stated", [Check("gap", "at most", 1.0, 2.0)], **{field: value})
