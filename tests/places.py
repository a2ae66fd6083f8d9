"""The list of places of the documents, sims/places.toml, and what claims it lacks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENTRIES = tomllib.loads((ROOT / "sims" / "places.toml").read_text(encoding="utf-8"))["place"]
_BIBLIOGRAPHY = (ROOT / "sims" / "references.bib").read_text(encoding="utf-8")
KEYS = set(re.findall(r"^@\w+\{(\w+),", _BIBLIOGRAPHY, re.MULTILINE))
_STATEMENTS = "theorem|lemma|corollary|assumption|definition|example|equation|algorithm"
_KINDS = f"{_STATEMENTS}|figure|table|section|appendix"
_NUMBER = r"(?:\d+(?:\.\d+)*|[A-Z](?:\.\d+)*)\b"
_NUMBERED = re.compile(rf"\b((?i:{_KINDS}))s? ({_NUMBER}(?:(?:, | and | to ){_NUMBER})*)")


def without_notes(text: str) -> str:
    """A source or a place without what stands in parentheses."""
    return re.sub(r"\s*\([^()]*\)", "", text)


def numbered(text: str) -> list[tuple[str, str]]:
    """Every numbered place in a text by kind and number: "Figures 2 and 6 to 8" is four."""
    found = []
    for kind, numbers in _NUMBERED.findall(without_notes(text)):
        for part in re.split(", | and ", numbers):
            first, _, last = part.partition(" to ")
            chapter, count = re.fullmatch(r"(.*?)(\d*)", first).groups()
            end = int(last.removeprefix(chapter)) + 1 if last else None
            span = [f"{chapter}{n}" for n in range(int(count), end)] if end else [first]
            found += [(kind.capitalize(), number) for number in span]
    return found


def unlisted(source: str, claim: str | None = None) -> list[str]:
    """What a source names and no entry has: with a claim, no entry that lists it.

    A source is a key of the bibliography and places. All numbered ones must have entries; one of them is
    enough where places are called by name.
    """
    key, _, place = source.partition(", ")
    if key.startswith("derived here"):
        return []
    places = [
        entry["place"]
        for entry in ENTRIES
        if entry["source"] == key and (claim is None or claim in entry.get("claims", ()))
    ]
    if wanted := numbered(place):
        there = {number for name in places for number in numbered(name)}
        return [f"{key}, {kind} {number}" for kind, number in wanted if (kind, number) not in there]
    named = (re.search(rf"\b{re.escape(without_notes(name))}", place, re.IGNORECASE) for name in places)
    return [] if any(named) else [source]


def listed() -> set[str]:
    """Every claim that an entry lists."""
    return {claim for entry in ENTRIES for claim in entry.get("claims", ())}


def in_ledger() -> set[str]:
    """Every claim in the committed ledger, which is of the standard preset."""
    ledger = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| \[`([\w./-]+)`\]", ledger, re.MULTILINE))
