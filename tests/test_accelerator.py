"""The command for accelerators runs on a CPU as well, in small, and keeps what it had when it is cut off."""

import json

import pytest

from tests.benchmarks import accelerator


def run(path, *parts, limit=600.0):
    accelerator.main(accelerator.Options(out=path, limit=limit, small=True, parts=parts))
    return json.loads(path.read_text())


def test_small_parts_are_measured_and_tabled(tmp_path, capsys):
    results = run(tmp_path / "a.json", "machine", "galore", "replicator")
    assert results["machine"]["platform"] == "cpu"
    rows = results["galore"]["rows"]
    assert rows["optax.adamw"]["over AdamW"] == 1
    assert rows["galore, eigh"]["refresh"] > 0
    # 4 (32, 32), 2 (32, 48) and 1 (48, 32) of rank 4: m r + 2 n r numbers of 4 bytes.
    assert results["galore"]["bytes of m r + 2 n r numbers"] == 4 * 4 * (4 * 96 + 3 * (32 + 96))
    assert set(results["replicator"]["times"]) == {"10 games", "100 games"}
    table = capsys.readouterr().out
    parts = [line.split(" | ")[0] for line in table.splitlines()[:3]]
    assert parts == ["| machine", "| galore", "| replicator"]


def test_what_is_cut_off_keeps_what_was_there(tmp_path, capsys):
    results = run(tmp_path / "a.json", "machine", "galore", limit=0.0)
    assert results["machine"]["failure"].startswith("cut off after 0 s")
    assert list(results) == ["machine", "galore"]
    with pytest.raises(SystemExit, match=r"^error: --parts must be among machine, .*, got games$"):
        run(tmp_path / "b.json", "games")
    assert not (tmp_path / "b.json").exists()
