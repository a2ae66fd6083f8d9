"""The command line on a small simulation of its own: names, flags, files, verdicts and every mistake."""

import os
import subprocess
import sys
import types
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

import sims.__main__ as cli
from dynamics.flow import integrate
from sims import plotting
from sims.claims import Check, Claim
from sims.results import Result, load


@dataclass(frozen=True)
class Config:
    """The simulation's own options."""

    steps: int = 3
    """Number of steps."""
    rates: tuple[float, ...] = (0.1,)
    """Learning rates."""
    noisy: bool = False
    """Add noise."""
    trouble: str = ""
    """What goes wrong."""


def explode(t, y, args):
    return y**2


def run(config, context):
    context.progress("first half", 0.0)
    context.progress("second half", 0.5)
    context.progress("second half", 0.7)
    if config.trouble == "value":
        raise ValueError("rates must be positive, got -1\nand more")
    if config.trouble == "interrupt":
        raise KeyboardInterrupt
    if config.trouble == "solver":
        import equinox as eqx

        eqx.filter_jit(lambda y: integrate(explode, y, [0.0, 2.0]).ys)(jnp.ones(()))
    path = np.arange(config.steps + 1.0)
    count, end = Check("n", "equals", 3, config.steps), Check("end", "at most", 9, path[-1])
    claims = [
        Claim("toy.one/count", "Steps are counted", "someone2024, (1)", "stated", [count]),
        Claim("toy.one/limit", "It ends", "someone2024", "stated", [end]),
    ]
    return Result({"path": path, "seed": context.seed, "data": str(context.data_dir)}, tuple(claims))


def figure(saved):
    drawn, axes = plotting.new_figure()
    axes[0, 0].plot(saved["path"])
    if saved.config["trouble"] == "figure":
        raise ValueError("no ink")
    return drawn


@pytest.fixture
def sim(monkeypatch, tmp_path):
    """A theory `toy` with the simulations `toy.one` and `toy.other`, in an empty working folder."""
    module = types.ModuleType("toy", "Count to three.\n\nMore about counting.")
    presets = {"quick": Config(), "standard": Config(steps=4, rates=(0.1, 0.2)), "paper": Config(steps=8)}
    module.__dict__.update(Config=Config, PRESETS=presets, run=run, figure=figure)
    names = {"toy.one": "Count to three.", "toy.other": "Count again.", "game.last": "Play."}
    monkeypatch.setattr(cli, "load_sim", lambda name: module)
    monkeypatch.setattr(cli, "available", lambda: names)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("DYNASCOPE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return module


def test_list(sim, capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == (
        "toy.one    Count to three.\ntoy.other  Count again.\ngame.last  Play.\n"
    )


def test_verify_passes_and_writes_nothing(sim, capsys, tmp_path):
    assert cli.main(["verify", "toy.one"]) == 0
    out = capsys.readouterr().out
    assert "toy.one: first half (0%)\ntoy.one: second half (50%)\ntoy.one: 0." in out
    assert "s, 2 claims, none fails" in out
    assert "2 claims: 2 holds\n" in out
    assert list(tmp_path.iterdir()) == []


def test_verify_fails_with_1_and_a_table(sim, capsys, tmp_path):
    assert cli.main(["verify", "toy.one", "--steps", "12", "--out", "results"]) == 1
    out = capsys.readouterr().out
    assert "2 claims, 2 fail" in out
    assert "✗ n: 12 (equals 3)" in out
    assert "toy.one/count" in out
    assert "2 claims: 2 fails\n" in out
    written = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert written == ["README.md", "toy.one.json", "toy.one.npz", "toy.one.png"]
    assert (tmp_path / "results" / "toy.one.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert "`python -m sims run toy.one --preset quick --seed 0 --steps 12`" in page
    assert load(tmp_path / "results", "toy.one")["path"].tolist() == list(range(13))


def test_run_goes_on_though_a_claim_fails_and_fills_the_folder_of_its_preset(sim, capsys, tmp_path):
    assert cli.main(["run", "toy", "toy.one", "--preset", "standard", "--seed", "5"]) == 0
    folder = tmp_path / "figures" / "standard"
    assert sorted(path.stem for path in folder.glob("*.png")) == ["toy.one", "toy.other"]
    for name in ("toy.one", "toy.other"):
        saved = load(folder, name)
        assert saved.config == {"steps": 4, "rates": [0.1, 0.2], "noisy": False, "trouble": ""}
        assert (int(saved["seed"]), saved.record["seed"], saved.record["flags"]) == (5, 5, "")
    assert "4 claims: 2 fails, 2 holds\n" in capsys.readouterr().out


def test_flags_change_the_preset_and_the_page_repeats_them(sim, tmp_path):
    flags = ["--steps", "5", "--rates", "0.5", "0.25", "--noisy"]
    assert cli.main(["run", "toy.one", "--preset", "standard", *flags, "--out", "a"]) == 0
    saved = load("a", "toy.one")
    assert saved.config == {"steps": 5, "rates": [0.5, 0.25], "noisy": True, "trouble": ""}
    page = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    command = page.split("`python -m sims ")[1].split("`")[0]
    assert cli.main([*command.split(), "--out", "b"]) == 0
    assert load("b", "toy.one").config == saved.config


def test_the_figure_is_missing_when_it_cannot_be_drawn(sim, tmp_path, capsys):
    assert cli.main(["run", "toy.one", "--trouble", "figure", "--out", "a"]) == 2
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["toy.one.json", "toy.one.npz"]
    assert capsys.readouterr().err == "error: no ink (DYNASCOPE_TRACEBACK=1 shows where)\n"


def test_errors_of_a_simulation_are_one_line_or_a_traceback(sim, capsys, monkeypatch):
    assert cli.main(["verify", "toy.one", "--trouble", "value"]) == 2
    err = capsys.readouterr().err
    assert err == "error: rates must be positive, got -1 (DYNASCOPE_TRACEBACK=1 shows where)\n"
    assert cli.main(["verify", "toy.one", "--trouble", "solver"]) == 2
    assert "error: integrate: a bad start, or the solver gave up" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["verify", "toy.one", "--trouble", "interrupt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setenv("DYNASCOPE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="rates must be positive"):
        cli.main(["verify", "toy.one", "--trouble", "value"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "unknown command 'lst'; did you mean 'list'?"),
        (["zzz"], "unknown command 'zzz'; see --help"),
        (["list", "toy"], "list takes no arguments, got 'toy'"),
        (["run"], "run needs a name (`python -m sims list` shows all; `all` runs all)"),
        (["run", "--seed", "1"], "run needs a name (`python -m sims list` shows all; `all` runs all)"),
        (
            ["run", "toy.on"],
            "unknown simulation 'toy.on'; did you mean 'toy.one'? (`python -m sims list` shows all)",
        ),
        (
            ["verify", "gme"],
            "unknown simulation 'gme'; did you mean 'game'? (`python -m sims list` shows all)",
        ),
        (["run", "XYZW"], "unknown simulation 'XYZW' (`python -m sims list` shows all)"),
        (
            ["run", "toy.one", "--out", "file/out"],
            "out must be a folder that can be written, got file/out (Not a directory)",
        ),
        (
            ["run", "toy.one", "--out", "file"],
            "out must be a folder that can be written, got file (File exists)",
        ),
        (["run", "toy.one", "--data-dir", "nowhere"], "data_dir must be a folder, got nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(sim, capsys, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "toy.one", "--preset", "huge"], "huge"),
        (["run", "toy", "--steps", "5"], "--steps"),
        (["run", "toy.one", "--steps", "many"], "many"),
    ],
)
def test_wrong_flags_exit_with_2(sim, capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_help_of_each_command(sim, capsys):
    for arguments in ([], ["--help"], ["list", "--help"]):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.startswith("usage: python -m sims")
    for arguments, words in (
        (["run", "--help"], ["--preset", "--seed", "--out", "--x64", "--data-dir"]),
        (["verify", "toy", "-h"], ["--preset"]),
        (
            ["run", "toy.one", "--help"],
            [
                "Count to three",
                "shared options",
                "simulation options",
                "--steps",
                "Number of steps",
                "default: 3",
                "--preset",
                "--noisy",
                "--no-noisy",
            ],
        ),
        (["run", "toy.one", "--preset", "standard", "--help"], ["default: 4", "those of --preset standard"]),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), out


def test_data_folder(sim, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNASCOPE_DATA", str(tmp_path))
    (saved,) = cli.execute(["toy.one"], cli.Options(), out=None, console=cli.Console(quiet=True))
    assert str(saved["data"]) == str(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    options = cli.Options(data_dir=other)
    (saved,) = cli.execute(["toy.one"], options, out=None, console=cli.Console(quiet=True))
    assert str(saved["data"]) == str(other)


def test_names_of_theories_and_all(sim):
    assert cli.resolve(["toy.other", "toy", "toy.one"]) == ["toy.other", "toy.one"]
    assert cli.resolve(["all"]) == ["toy.one", "toy.other", "game.last"]
    assert cli.resolve([]) == []


def test_a_terminal_gets_a_bar_and_keeps_no_trace_of_it(sim, tmp_path):
    with (tmp_path / "terminal").open("w+") as terminal:
        console = cli.Console(file=terminal, force_terminal=True, width=80)
        cli.execute(["toy.one"], cli.Options(), out=None, console=console)
        terminal.seek(0)
        text = terminal.read()
    assert "second half" in text
    last = text.split("\r")[-1].split("\x1b[2K")[-1]
    assert "2 claims, none fails" in last
    assert "half" not in last


def test_every_simulation_has_a_line():
    for name, line in cli.available().items():
        assert line.endswith("."), name
        assert len(line) <= 110, name


def test_a_reader_that_stops_reading_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sims", "list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_list_imports_nothing_heavy():
    program = """
import sys
from sims.__main__ import main
assert main(["list"]) == 0
heavy = {"jax", "matplotlib", "scipy", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(cli.available())
