"""The list of places of the documents is complete and in order; test_simulations.py looks claims up in it."""

import ast
import re
from itertools import groupby, pairwise

import pytest

from sims import available
from tests.places import ENTRIES, KEYS, ROOT, numbered, unlisted

REASONS = "Definition|Remark|Proof step|Quoted|Not checked yet"


def name(entry):
    return f"{entry['source']}, {entry['place']}"


def test_every_entry_says_what_checks_its_place_or_why_nothing_does():
    simulations = set(available())
    for entry in ENTRIES:
        assert set(entry) <= {"source", "place", "statement", "claims", "reason", "coming"}, name(entry)
        assert entry["source"] in KEYS, name(entry)
        assert entry["statement"].endswith("."), name(entry)
        claims, reason, coming = entry.get("claims", []), entry.get("reason"), entry.get("coming")
        assert claims or reason or coming, name(entry)
        assert not (coming and claims), f"{name(entry)}: a theory that is to come has no claims"
        assert reason is None or re.match(f"({REASONS})[: ]", reason), name(entry)
        assert len(set(claims)) == len(claims), name(entry)
        assert {claim.partition("/")[0] for claim in claims} <= simulations, name(entry)


def test_entries_come_by_source_and_in_the_order_of_the_document():
    assert len({name(entry) for entry in ENTRIES}) == len(ENTRIES)
    blocks = [(source, list(block)) for source, block in groupby(ENTRIES, lambda entry: entry["source"])]
    assert len({source for source, _ in blocks}) == len(blocks)
    for source, block in blocks:
        places = [place for entry in block for place in numbered(entry["place"])]
        for kind in {kind for kind, _ in places}:
            numbers = [number for other, number in places if other == kind]
            plain = [[int(part) for part in n.split(".")] for n in numbers if n[0].isdigit()]
            assert all(before <= after for before, after in pairwise(plain)), f"{source}: {kind} {numbers}"


def test_every_source_in_the_code_of_a_simulation_is_listed():
    sources = set()
    for file in (ROOT / "sims").glob("*/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                key, comma, place = node.value.partition(", ")
                sources |= {node.value} if key in KEYS and comma and place else set()
    assert len(sources) > 40
    missing = sorted({place for source in sources for place in unlisted(source)})
    assert not missing, "sims/places.toml must have an entry for each"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("section 5 (toys), Figures 2 and 6 to 8", ["Section 5", *(f"Figure {n}" for n in (2, 6, 7, 8))]),
        ("Theorem 4; the flow of Theorem 1 and its proof", ["Theorem 4", "Theorem 1"]),
        ("Lemmas D.1 to D.3, appendix B", ["Lemma D.1", "Lemma D.2", "Lemma D.3", "Appendix B"]),
        ("questions: additional heads", []),
    ],
)
def test_numbered_places_are_read_one_by_one(text, places):
    assert [f"{kind} {number}" for kind, number in numbered(text)] == places


@pytest.mark.parametrize(
    ("source", "claim", "missing"),
    [
        ("tian2024joma, Theorem 4", "joma.rates/ratio", []),
        ("tian2024joma, Theorem 4", "joma.rates/no-such-claim", ["tian2024joma, Theorem 4"]),
        ("tian2024joma, Theorem 9", None, ["tian2024joma, Theorem 9"]),
        ("tian2024joma, Theorem 4 and Figure 99", "joma.rates/ratio", ["tian2024joma, Figure 99"]),
        ("softmax2025talk, experiments", "replicator.boundary/gd-slow", []),
        ("softmax2025talk, a place that it does not have", None, None),
        ("no_such_key, Theorem 4", None, ["no_such_key, Theorem 4"]),
    ],
)
def test_a_place_that_is_not_listed_is_found(source, claim, missing):
    assert unlisted(source, claim) == ([source] if missing is None else missing)
