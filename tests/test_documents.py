"""README, ledger, references and code tell the same story."""

import ast
import re
from pathlib import Path

import pytest

import sims
import sims.__main__ as cli
from sims import available
from tests.places import KEYS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LEDGER = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")


def test_readme_examples_run_and_print_what_they_state(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    number = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
    names = {}
    for code, stated in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        if stated:
            assert number.sub("#", printed) == number.sub("#", stated)
            values = [[float(part) for part in number.findall(text)] for text in (printed, stated)]
            assert values[0] == pytest.approx(values[1], rel=0.1)


def test_readme_lists_the_simulations():
    (table,) = re.findall(r"<!-- python -m sims list --markdown -->\n(.*?)<!-- end -->", README, re.DOTALL)
    rows = [f"| `{name}` | {line.removesuffix('.')} |" for name, line in available().items()]
    assert table.splitlines()[2:] == rows, "`make ledger`, or .ci/readme.py, renews the table"


def test_the_example_of_a_simulation_runs_by_path_is_drawn_and_opened_elsewhere(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert block.count("\n") < 70
    monkeypatch.chdir(tmp_path)
    Path("decay.py").write_text(block, encoding="utf-8")
    saved = sims.run("decay.py", out=".", progress=False)
    assert saved.verdicts == ("holds",)
    assert cli.main(["draw", "decay", "--out", ".", "--format", "pdf"]) == 0
    assert Path("decay.pdf").read_bytes().startswith(b"%PDF")
    dataset = saved.to_xarray()
    assert set(dataset.coords) == {"rate", "time"}
    assert dataset["trained"].dims == ("rate", "time")


@pytest.mark.parametrize("name", available())
def test_ledger_has_every_simulation_at_the_standard_preset(name):
    assert f"`python -m sims run {name} --preset standard --seed 0`" in LEDGER
    assert f"]({name}.png)" in LEDGER
    figure = ROOT / "figures" / f"{name}.png"
    assert figure.stat().st_size < 300_000


def test_no_claim_in_the_ledger_fails():
    rows = re.findall(r"^\| \[`([\w./-]+)`\]\(#\w+\) \| (.*?) \| (.*?) \|$", LEDGER, re.MULTILINE)
    assert len(rows) >= 20
    assert not [row for row in rows if not row[2].startswith(("holds", "quoted"))]


def test_every_quoted_claim_in_the_ledger_tells_what_a_test_would_take():
    quoted = re.findall(r"^- \*\*quoted\*\* .*\n(.*)$", LEDGER, re.MULTILINE)
    assert len(quoted) == len(re.findall(r"\| quoted \|$", LEDGER, re.MULTILINE)) >= 10
    assert all(line.startswith("  - A test would take ") for line in quoted)


def test_every_cited_source_is_in_the_references():
    cited = set()
    for package in ("dynamics", "models", "sims"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for source in re.findall(r"Source: ([^\n]+)", node.value):
                        cited |= set(re.findall(r"\b([a-z]+\d{4}\w*)\b", source))
    cited |= set(re.findall(r"^\| \[`.*?\| (\w+\d{4}\w*)", LEDGER, re.MULTILINE))
    assert cited
    assert cited <= KEYS, cited - KEYS
