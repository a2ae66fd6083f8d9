"""The ledger: one page with every saved figure, its command, and the verdict on every claim."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from sims.results import Saved, load, write_whole


def write_page(out: Path) -> Path:
    """Write `<out>/README.md` from all the results saved in a folder, and return its path.

    A file that is no result of this version is passed over with a warning.
    """
    done = []
    for path in sorted(out.glob("*.json")):
        if path.with_suffix(".png").exists():
            try:
                saved = load(out, path.stem)
                _section(saved)
                done.append(saved)
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"warning: {path} is left out of the page: {error!r}", file=sys.stderr)
    page = out / "README.md"
    write_whole(page, lambda path: path.write_text(render(done), encoding="utf-8"))
    return page


class _Section(NamedTuple):
    rows: list[str]
    body: list[str]


def render(done: list[Saved]) -> str:
    """The page as Markdown."""
    sections = [_section(saved) for saved in done]
    lines = [
        "# Figures and ledger",
        "",
        "Written by the command line from saved results; do not edit. A claim's verdict is one of: `holds`",
        "(as printed, or as derived where the source says so), `holds corrected` (the printed form fails, a",
        "corrected one holds), `holds if ...` (true under a condition that is not printed), `quoted` (not",
        "tested here), `fails`.",
        "",
        "| claim | source | verdict |",
        "|---|---|---|",
    ]
    lines += [row for section in sections for row in section.rows]
    lines += [line for section in sections for line in section.body]
    return "\n".join(lines) + "\n"


def _section(saved: Saved) -> _Section:
    """What the page says of one result: rows of the table, and the lines below it."""
    record, anchor = saved.record, saved.name.replace(".", "")
    command = f"run {saved.name} --preset {record['preset']} --seed {record['seed']} {record['flags']}"
    precision = "64-bit" if record["x64"] else "32-bit"
    rows, body = [], ["", f"## {saved.name}", ""]
    body += [f"`python -m sims {command.strip()}` ({precision}, jax {record['versions']['jax']})", ""]
    body += [f"![{saved.name}]({saved.name}.png)", ""]
    for claim, verdict in zip(saved.claims, map(_text, saved.verdicts), strict=True):
        rows.append(f"| [`{claim.id}`](#{anchor}) | {_text(claim.source)} | {verdict} |")
        body.append(f"- **{verdict}** — {_text(f'{claim.statement} ({claim.source})')}")
        body += [f"  - {'✓' if check.holds else '✗'} {_text(str(check))}" for check in claim.checks]
    return _Section(rows, body)


def _text(text: str) -> str:
    """Text with the signs escaped that Markdown would take for a table, a tag or emphasis."""
    return re.sub(r"([|*]|<(?=[\w/!?]))", r"\\\1", text)
