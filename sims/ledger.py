"""The ledger: one page with every saved figure, its command, and the verdict on every claim."""

from __future__ import annotations

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
            f"| [`{claim.id}`](#{_anchor(saved.name)}) | {claim.source} | {_verdict(claim, saved)} |"
            for claim in saved.claims
        ]
    for saved in done:
        record = saved.record
        precision = "64-bit" if record["x64"] else "32-bit"
        lines += [
            "",
            f"## {saved.name}",
            "",
            f"`python -m sims run {saved.name} --preset {record['preset']} --seed {record['seed']}`"
            f" ({record['seconds']:.0f} s, {precision}, jax {record['versions']['jax']})",
            "",
            f"![{saved.name}]({saved.name}.png)",
            "",
        ]
        for claim in saved.claims:
            lines.append(f"- **{_verdict(claim, saved)}** — {claim.statement} ({claim.source})")
            lines += [f"  - {'✓' if check.holds else '✗'} {check}" for check in claim.checks]
    return "\n".join(lines) + "\n"


def _verdict(claim: Claim, saved: Saved) -> str:
    return claim.at(saved.record["preset"])


def _anchor(name: str) -> str:
    return name.replace(".", "")
