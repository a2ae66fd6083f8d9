"""The ledger: one page with every saved figure, its command, and the verdict on every claim."""

from __future__ import annotations

import re
from pathlib import Path

from sims.claims import Claim
from sims.results import Saved, load, write_whole


def write_page(out: Path) -> Path:
    """Write `<out>/README.md` from all the results saved in a folder, and return its path."""
    done = [load(out, path.stem) for path in sorted(out.glob("*.json")) if path.with_suffix(".npz").exists()]
    page = out / "README.md"
    write_whole(page, lambda path: path.write_text(render(done), encoding="utf-8"))
    return page


def render(done: list[Saved]) -> str:
    """The page as Markdown."""
    lines = [
        "# Figures and ledger",
        "",
        "Written by the command line from saved results; do not edit. A claim's verdict is one of: `holds`",
        "(as printed), `holds corrected` (the printed form fails, a corrected one holds), `holds if ...`",
        "(true under a condition that is not printed), `quoted` (not tested here), `fails`.",
        "",
        "| claim | source | verdict |",
        "|---|---|---|",
    ]
    for saved in done:
        lines += [
            f"| [`{claim.id}`](#{_anchor(saved.name)}) | {_text(claim.source)} | {_verdict(claim, saved)} |"
            for claim in saved.claims
        ]
    for saved in done:
        record = saved.record
        command = f"run {saved.name} --preset {record['preset']} --seed {record['seed']} {record['flags']}"
        precision = "64-bit" if record["x64"] else "32-bit"
        lines += [
            "",
            f"## {saved.name}",
            "",
            f"`python -m sims {command.strip()}`"
            f" ({record['seconds']:.0f} s, {precision}, jax {record['versions']['jax']})",
            "",
            f"![{saved.name}]({saved.name}.png)",
            "",
        ]
        for claim in saved.claims:
            told = _text(f"{claim.statement} ({claim.source})")
            lines.append(f"- **{_verdict(claim, saved)}** — {told}")
            lines += [f"  - {'✓' if check.holds else '✗'} {_text(str(check))}" for check in claim.checks]
    return "\n".join(lines) + "\n"


def _verdict(claim: Claim, saved: Saved) -> str:
    return _text(claim.at(saved.record["preset"]))


def _text(text: str) -> str:
    """Text with the signs escaped that Markdown would take for a table, a tag or emphasis."""
    return re.sub(r"([|*]|<(?=[\w/!?]))", r"\\\1", text)


def _anchor(name: str) -> str:
    return name.replace(".", "")
