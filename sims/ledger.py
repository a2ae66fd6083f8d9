"""The ledger: one page with every saved figure, its command, and the verdict on every claim."""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

from sims.claims import Check
from sims.results import Saved, load
from sims.storage import write_whole


def write_page(out: Path) -> Path:
    """Write `<out>/README.md` from all the results saved in a folder, and return its path.

    A file that is no result of this version is passed over with a warning.
    """
    done = []
    for path in sorted(out.glob("[!.]*.json")):
        if path.with_suffix(".png").exists():
            try:
                saved = load(out, path.stem)
                _section(saved)
                done.append(saved)
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"warning: {path} is left out of the page: {error!r}", file=sys.stderr)
    page = out / "README.md"
    write_whole(page, render(done).encode())
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
        "tested here), `fails`. A check with ✗ is of a printed form that fails.",
        "",
        "| claim | source | verdict |",
        "|---|---|---|",
    ]
    lines += [row for section in sections for row in section.rows]
    lines += [line for section in sections for line in section.body]
    return "\n".join(lines) + "\n"


def _section(saved: Saved) -> _Section:
    """What the page says of one result: rows of the table, and the lines below it."""
    record, anchor = saved.record, re.sub(r"[^\w-]", "", saved.name)
    options = f"--preset {record['preset']} --seed {record['seed']} {record['flags']}"
    command = f"run {record['file'] or record['name']} {options}"
    precision = "64-bit" if record["x64"] else "32-bit"
    rows, body = [], ["", f"## {saved.name}", ""]
    body += [f"`python -m sims {command.strip()}` ({precision}, jax {record['versions']['jax']})", ""]
    body += [f"![{saved.name}]({saved.name}.png)", ""]
    for claim, verdict in zip(saved.claims, map(_text, saved.verdicts), strict=True):
        rows.append(f"| [`{claim.id}`](#{anchor}) | {_text(claim.source)} | {verdict} |")
        body.append(f"- **{verdict}** — {_text(f'{claim.statement} ({claim.source})')}")
        body += [f"  - {'✓' if check.holds else '✗'} {_text(_reasoned(check))}" for check in claim.checks]
        body += [f"  - A test would take {_text(claim.needs)}."] if claim.needs else []
    return _Section(rows, body)


def _reasoned(check: Check) -> str:
    """A check with the reason of its bound."""
    return f"{check}; {check.why}" if check.why else str(check)


def to_html(saved: Saved) -> str:
    """A result as a notebook shows it: its figure, and the verdicts with the checks behind them."""
    from sims import plotting

    picture = io.BytesIO()
    with plotting.style():
        saved.figure().savefig(picture, format="png")
    image = base64.b64encode(picture.getvalue()).decode()
    items = []
    for claim, verdict in zip(saved.claims, saved.verdicts, strict=True):
        marks = ("✓" if check.holds else "✗" for check in claim.checks)
        lines = (html.escape(_reasoned(check)) for check in claim.checks)
        checks = "".join(f"<li>{mark} {line}</li>" for mark, line in zip(marks, lines, strict=True))
        checks += f"<li>A test would take {html.escape(claim.needs)}.</li>" if claim.needs else ""
        title = f"<b>{html.escape(verdict)}</b>: {html.escape(f'{claim.statement} ({claim.source})')}"
        items.append(f"<li>{title}<ul>{checks}</ul></li>")
    heading = f"<h4>{html.escape(saved.name)}</h4>"
    return f'{heading}<img alt="" src="data:image/png;base64,{image}"><ul>{"".join(items)}</ul>'


def _text(text: str) -> str:
    """Text with the signs escaped that Markdown would take for a table, a tag or emphasis."""
    return re.sub(r"([|*]|<(?=[\w/!?]))", r"\\\1", text)
