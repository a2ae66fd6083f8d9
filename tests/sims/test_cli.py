"""The command line on a small simulation of its own: names, flags, files, verdicts and every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import types
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import sims
import sims.__main__ as cli
from dynamics.flow import integrate
from sims import execution, plotting, simulations
from sims.claims import at_most, equals, stated
from sims.ranges import Count, Positive
from sims.results import load


@dataclass(frozen=True)
class Config:
    """The simulation's own options."""

    steps: Count = 3
    """Number of steps."""
    rates: tuple[Positive, ...] = (0.1,)
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
    if config.trouble == "memory":
        np.empty(2**60, np.uint8)
    if config.trouble == "bug":
        raise ZeroDivisionError
    if config.trouble == "solver":
        import equinox as eqx

        eqx.filter_jit(lambda y: integrate(explode, y, [0.0, 2.0]).ys)(jnp.ones(()))
    path = ("time", np.arange(config.steps + 1.0))
    return {"path": path, "seed": context.seed, "data": str(context.data_dir)}


def claims(config, saved):
    count = equals("n", len(saved["path"]) - 1, 3, why="three are asked for")
    yield stated("count", "Steps are counted", "someone2024, (1)", count)
    yield stated(
        "limit", "It ends", "someone2024", at_most("end", saved["path"][-1], 9, why="a day has nine")
    )


def figure(config, saved):
    drawn, axes = plotting.new_figure()
    axes[0, 0].plot(saved["path"])
    if config.trouble == "figure":
        raise ValueError("no ink")
    return drawn


@pytest.fixture
def sim(monkeypatch, tmp_path):
    """A theory `toy` with the simulations `toy.one` and `toy.other`, in an empty working folder."""
    module = types.ModuleType("toy", "Count to three.\n\nMore about counting.")
    presets = {"quick": Config(), "standard": Config(steps=4, rates=(0.1, 0.2)), "paper": Config(steps=8)}
    module.__dict__.update(Config=Config, PRESETS=presets, run=run, claims=claims, figure=figure)
    names = {
        "toy.one": "Count to three.",
        "toy.other": "Count again, and " + "again " * 12,
        "game.last": "Play.",
    }
    monkeypatch.setattr(simulations, "load_simulation", lambda name: module)
    monkeypatch.setattr(simulations, "available", lambda: names)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("DYNASCOPE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return module


def test_list_is_grouped_and_fits_a_terminal(sim, capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "toy\n  toy.one    Count to three.\n  toy.other  Count again, and again again again "
    )
    assert out.endswith("\ngame\n  game.last  Play.\n")
    assert max(map(len, out.splitlines())) <= 80
    assert cli.main(["list", "*.last"]) == 0
    assert capsys.readouterr().out == "game\n  game.last  Play.\n"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dynascope ")


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
    name = "toy.one@steps=12"
    assert written == ["README.md", f"{name}.json", f"{name}.npz", f"{name}.png"]
    assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert "`python -m sims run toy.one --preset quick --seed 0 --steps 12`" in page
    assert load(tmp_path / "results", name)["path"].tolist() == list(range(13))


def test_run_goes_on_though_a_claim_fails_and_fills_the_folder_of_its_preset(sim, capsys, tmp_path):
    options = ["--preset", "standard", "--seed", "5", "--jobs", "1"]
    assert cli.main(["run", "toy", "toy.one", *options]) == 0
    folder = tmp_path / "figures" / "standard"
    stems = ["toy.one@seed=5", "toy.other@seed=5"]
    assert sorted(path.stem for path in folder.glob("*.png")) == stems
    for name in stems:
        saved = load(folder, name)
        assert saved.config == {"steps": 4, "rates": [0.1, 0.2], "noisy": False, "trouble": ""}
        assert (int(saved["seed"]), saved.record["seed"], saved.record["flags"]) == (5, 5, "")
    assert "4 claims: 2 fails, 2 holds\n" in capsys.readouterr().out


def test_flags_change_the_preset_and_the_page_repeats_them(sim, tmp_path):
    flags = ["--steps", "5", "--rates", "0.5", "0.25", "--noisy"]
    assert cli.main(["run", "toy.one", "--preset", "standard", *flags, "--out", "a"]) == 0
    name = "toy.one@steps=5,rates=0.5+0.25,noisy"
    saved = load("a", name)
    assert saved.config == {"steps": 5, "rates": [0.5, 0.25], "noisy": True, "trouble": ""}
    page = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    command = page.split("`python -m sims ")[1].split("`")[0]
    assert cli.main([*command.split(), "--out", "b"]) == 0
    assert load("b", name).config == saved.config
    assert not (tmp_path / "a" / "toy.one.png").exists()  # the preset's own result is another


def test_the_figure_is_missing_when_it_cannot_be_drawn(sim, tmp_path, capsys):
    assert cli.main(["run", "toy.one", "--trouble", "figure", "--out", "a"]) == 2
    name = "toy.one@trouble=figure"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{name}.json", f"{name}.npz"]
    assert capsys.readouterr().err == "error: no ink (DYNASCOPE_TRACEBACK=1 shows where)\n"


def test_a_mistake_in_the_claims_leaves_what_was_measured(sim, tmp_path, capsys, monkeypatch):
    right = sim.claims
    monkeypatch.setattr(sim, "claims", lambda config, saved: iter([saved["nothing"]]))
    assert cli.main(["run", "toy.one", "--out", "a"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: toy.one: claims must be made of what was measured, but KeyError(")
    assert "the measurement is saved, and `judge` judges it" in err
    monkeypatch.setattr(sim, "claims", right)
    assert cli.main(["judge", "toy.one", "--out", "a"]) == 0
    assert load(tmp_path / "a", "toy.one").verdicts == ("holds", "holds")


def test_an_older_figure_does_not_stand_beside_new_numbers(sim, tmp_path, monkeypatch):
    assert cli.main(["run", "toy.one", "--out", "a"]) == 0
    assert (tmp_path / "a" / "toy.one.png").exists()
    monkeypatch.setattr(sim, "figure", lambda config, saved: 1 / 0)
    assert cli.main(["run", "toy.one", "--out", "a"]) == 2
    assert not (tmp_path / "a" / "toy.one.png").exists()


def test_errors_of_a_simulation_are_one_line_or_a_traceback(sim, capsys, monkeypatch):
    assert cli.main(["verify", "toy.one", "--trouble", "value"]) == 2
    err = capsys.readouterr().err
    assert err == "error: rates must be positive, got -1 (DYNASCOPE_TRACEBACK=1 shows where)\n"
    assert cli.main(["verify", "toy.one", "--trouble", "solver"]) == 2
    assert (
        "error: integrate: the solution blows up, leaving every bound"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert cli.main(["verify", "toy.one", "--trouble", "interrupt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert cli.main(["verify", "toy.one", "--trouble", "memory"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: toy.one: memory ran out (Unable to allocate 1.00 EiB")
    assert cli.main(["verify", "toy.one", "--trouble", "bug"]) == 2  # 1 is for claims
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):")
    monkeypatch.setenv("DYNASCOPE_TRACEBACK", "1")
    assert cli.main(["verify", "toy.one", "--trouble", "value"]) == 2
    assert "ValueError: rates must be positive, got -1\nand more\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "unknown command 'lst'; did you mean 'list'?"),
        (["zzz"], "unknown command 'zzz'; see --help"),
        (["list", "gme"], "unknown simulation 'gme'; did you mean 'game'? (`python -m sims list` shows all)"),
        (["run"], "run needs a name (`python -m sims list` shows all; `all` means all)"),
        (["run", "--seed", "1"], "run needs a name (`python -m sims list` shows all; `all` means all)"),
        (["draw"], "draw needs a name (`python -m sims list` shows all; `all` means all)"),
        *(
            (["run", "toy.one", "--seed", seed], f"seed must be an integer >= 0 and < 2**31, got {seed}")
            for seed in ("12345678901234567890", "-1", str(2**31))
        ),
        (["run", "nowhere.py"], "a simulation's file must exist, got nowhere.py"),
        (["run", "toy.one", "--steps", "-3"], "steps must be an integer >= 1, got -3"),
        (["run", "toy.one", "--rates", "0.1", "nan"], "rates must be a finite number > 0, got (0.1, nan)"),
        (
            ["judge", "toy.one"],
            "out must be a folder with saved results, got figures/quick; `run` makes them",
        ),
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
    (saved,) = execution.execute(["toy.one"], execution.Options(), out=None, console=Console(quiet=True))
    assert str(saved["data"]) == str(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    options = execution.Options(data_dir=other)
    (saved,) = execution.execute(["toy.one"], options, out=None, console=Console(quiet=True))
    assert str(saved["data"]) == str(other)


def test_names_patterns_and_all(sim):
    assert simulations.resolve(["toy.other", "toy", "toy.one"]) == ["toy.other", "toy.one"]
    assert simulations.resolve(["*.o[nt]*"]) == ["toy.one", "toy.other"]
    assert simulations.resolve(["all"]) == ["toy.one", "toy.other", "game.last"]
    assert simulations.resolve([]) == []


def test_options_of_all_simulations_may_come_before_names(sim, tmp_path):
    assert cli.main(["run", "--preset", "standard", "--no-x64", "toy.one", "--out", "a", "--steps", "3"]) == 0
    assert load("a", "toy.one@steps=3,no-x64").record["preset"] == "standard"


def test_draw_and_judge_work_from_what_was_saved(sim, tmp_path, capsys, monkeypatch):
    assert cli.main(["run", "toy.one", "game", "--jobs", "1", "--out", "a"]) == 0
    assert cli.main(["run", "toy.one", "--steps", "5", "--out", "a"]) == 0
    drawn = (tmp_path / "a" / "toy.one.png").read_bytes()
    (tmp_path / "a" / "toy.one.png").unlink()
    monkeypatch.setattr(sim, "run", lambda *_: pytest.fail("nothing is run again"))
    capsys.readouterr()
    assert cli.main(["draw", "toy.one", "--out", "a"]) == 0
    assert capsys.readouterr().out == f"{os.path.join('a', 'toy.one.png')}\n"
    assert (tmp_path / "a" / "toy.one.png").read_bytes() == drawn
    assert cli.main(["draw", "toy", "--format", "pdf", "--out", "a"]) == 0
    pages = sorted(path.name for path in (tmp_path / "a").glob("*.pdf"))
    assert pages == ["toy.one.pdf", "toy.one@steps=5.pdf"]
    assert (tmp_path / "a" / pages[0]).read_bytes().startswith(b"%PDF")

    record = (tmp_path / "a" / "toy.one.json").read_text()
    assert cli.main(["judge", "toy.one", "--out", "a"]) == 0
    assert (tmp_path / "a" / "toy.one.json").read_text() == record
    assert cli.main(["judge", "all", "--out", "a"]) == 1  # one run of five steps
    capsys.readouterr()

    def stricter(config, saved):
        yield stated("limit", "It ends", "someone2024", at_most("end", saved["path"][-1], 2, why="stricter"))

    monkeypatch.setattr(sim, "claims", stricter)
    assert cli.main(["judge", "--out", "a", "toy.one", "--format", "json"]) == 1
    (claim,) = json.loads(capsys.readouterr().out)["toy.one"]
    assert (claim["id"], claim["verdict"], claim["checks"][0]["why"]) == (
        "toy.one/limit",
        "fails",
        "stricter",
    )
    assert load("a", "toy.one").verdicts == ("fails",)
    assert "stricter" in (tmp_path / "a" / "README.md").read_text()


def test_a_format_that_does_not_fit_is_told(sim, tmp_path, capsys):
    assert cli.main(["run", "toy.one", "--out", "a"]) == 0
    assert cli.main(["draw", "toy.one", "--out", "a", "--format", "json"]) == 2
    assert capsys.readouterr().err == "error: format must be one of png, pdf, svg for draw, got json\n"


def test_verify_prints_json_alone(sim, capsys):
    assert cli.main(["verify", "toy.one", "--format", "json"]) == 0
    claims = json.loads(capsys.readouterr().out)["toy.one"]
    assert [claim["verdict"] for claim in claims] == ["holds", "holds"]


OWN = """
import os
import signal
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sims import plotting
from sims.claims import at_most, stated


@dataclass(frozen=True)
class Config:
    steps: int = 3


PRESETS = {"quick": Config()}


def run(config, context):
    if config.steps == 13:
        raise ValueError("steps must not be 13\\nfor luck")
    if context.seed == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if context.seed == 14:
        context.progress("for hours", 0.5)
        jax.lax.fori_loop(0, 10**12, lambda i, x: jnp.sin(x @ x), jnp.eye(9)).block_until_ready()
    return {"path": ("time", np.arange(config.steps) + context.seed)}


def claims(config, saved):
    end = at_most("end", saved["path"][-1], 5, why="so few steps")
    yield stated("end", "It ends \N{EM DASH} soon", "own", end)


def figure(config, saved):
    drawn, axes = plotting.new_figure()
    axes[0, 0].plot(saved["path"])
    return drawn
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Files with simulations of a user's own, `mine.py` and `yours.py`, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "yours.py"):
        (tmp_path / name).write_text(OWN, encoding="utf-8")
    return tmp_path


def start(*arguments, **environment):
    """The command line as a process, in a group of its own as under a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "sims", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(sims.__file__).parents[1]), **environment},
        start_new_session=True,
    )


def run_command(*arguments, **environment):
    """Exit code, standard output and standard error of the command line."""
    process = start(*arguments, **environment)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("files", [["mine.py"], ["mine.py", "yours.py"]], ids=["alone", "workers"])
def test_an_interrupt_ends_all_processes_at_once_with_one_line(own, files):
    """Though a compiled program is running, which Python cannot interrupt, and in workers too."""
    # A suite that runs in the background ignores what its processes are to hear.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("run", *files, "--jobs", str(len(files)), "--seed", "14")
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    try:
        for _ in files:
            assert "for hours" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)  # until the last process has closed its output
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_worker_that_is_killed_is_told(own):
    code, _, err = run_command("run", "mine.py", "yours.py", "--jobs", "2", "--seed", "13")
    assert code == 2
    assert re.search(
        r"^error: (mine|yours)\.py: its process was ended, maybe for want of memory \(code -9\)", err
    )
    assert err.count("\n") == 1


def test_a_locale_without_signs_loses_no_result(own):
    code, out, err = run_command("verify", "mine.py", "--out", "a", PYTHONIOENCODING="ascii:strict")
    assert (code, err) == (0, "")
    assert "It ends ? soon" in out
    assert "+ end: 2 (at most 5)" in out
    assert "\N{EM DASH}" in (own / "a" / "README.md").read_text(encoding="utf-8")


def test_an_output_on_a_full_disk_is_told():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sims", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: [Errno 28] No space left on device: standard output, or a file of ")
    assert done.stderr.count("\n") == 1


def test_simulations_of_ones_own_run_by_path_in_two_processes(own):
    def run(*arguments):
        return subprocess.CompletedProcess("sims", *run_command(*arguments))

    done = run("run", "mine.py", "yours.py", "--jobs", "2", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "2 claims: 2 holds" in done.stdout
    for name in ("mine", "yours"):
        assert f"{name}.py: 0.0 s, 1 claims, none fails" in done.stdout
        assert load(own / "figures" / "quick", f"{name}@seed=1")["path"].tolist() == [1, 2, 3]
    done = run("verify", "mine.py", "yours.py", "--jobs", "2", "--format", "json")
    assert list(json.loads(done.stdout)) == ["mine", "yours"]


READS = """
READS = ("mine", "yours")


def run(config, context):
    there = sorted(path.stem for path in context.results.glob("*.json"))
    return {"path": ("time", np.arange(1, len(there) + 1)), "names": ("time", there)}
"""


def test_one_that_reads_what_others_save_runs_after_them(own):
    (own / "first.py").write_text(OWN + READS, encoding="utf-8")
    code, _, err = run_command("run", "first.py", "mine.py", "yours.py", "--jobs", "2", "--out", "a")
    assert code == 0, err
    assert load(own / "a", "first")["names"].tolist() == ["mine", "yours"]


def test_views_of_ones_own(own, capsys):
    assert cli.main(["run", "mine.py", "--seed", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["draw", "yours.py"]) == 2
    assert capsys.readouterr().err == (
        "error: a saved result must be named; figures/quick has none of 'yours', but mine@seed=1\n"
    )
    for name in ("mine@seed=1", "mine.py"):  # what is not saved itself stands for its variants
        assert cli.main(["draw", name, "--format", "svg"]) == 0
        assert capsys.readouterr().out == "figures/quick/mine@seed=1.svg\n"
    assert cli.main(["run", "mine.py", "--preset", "paper"]) == 2
    assert capsys.readouterr().err == (
        "error: preset must be one of quick for this simulation, got 'paper'\n"
    )


def test_a_file_that_has_moved_is_named_anew(own, capsys):
    assert cli.main(["run", "mine.py", "--out", "a"]) == 0
    (own / "sub").mkdir()
    (own / "mine.py").rename(own / "sub" / "mine.py")
    capsys.readouterr()
    assert cli.main(["draw", "mine", "--out", "a"]) == 2
    err = capsys.readouterr().err
    assert "a simulation's file must exist, got mine.py; name it where it is now" in err
    for command in ("draw", "judge"):
        assert cli.main([command, "sub/mine.py", "--out", "a"]) == 0
    assert load(own / "a", "mine").record["file"] == "sub/mine.py"


def test_as_a_library(own):
    import jax

    with jax.enable_x64(False):
        saved = sims.run("mine.py", steps=4, progress=False, out=own / "a")
        assert not jax.config.read("jax_enable_x64")
    assert (saved.name, saved.record["x64"], saved.verdicts) == ("mine@steps=4", True, ("holds",))
    assert saved.claims[0].id == "mine/end"
    (ax,) = saved.figure().axes
    assert all(
        str(line.get_color()).startswith("#") for line in ax.lines
    )  # the style's, wherever it is drawn
    html = saved._repr_html_()
    assert "<b>holds</b>: It ends \N{EM DASH} soon (own)" in html
    assert "data:image/png;base64," in html
    assert sims.load(own / "a", saved.name).record == saved.record
    bad: list[tuple[dict[str, Any], str]] = [
        ({"stepz": 4}, r"^settings must be fields of the simulation \(steps\), got \['stepz'\]$"),
        ({"steps": 2.5}, r"^steps must be an integer, got 2\.5$"),
        ({"preset": "huge"}, r"^preset must be one of quick for this simulation, got 'huge'$"),
        ({"data_dir": "nowhere"}, r"^data_dir must be a folder, got nowhere$"),
    ]
    with pytest.raises(ValueError, match=r"^name must be that of one simulation, got 'joma\.\*', which are"):
        sims.run("joma.*")
    for settings, message in bad:
        with pytest.raises(ValueError, match=message):
            sims.run("mine.py", progress=False, **settings)


def test_a_terminal_gets_a_bar_and_keeps_no_trace_of_it(sim, tmp_path):
    with (tmp_path / "terminal").open("w+") as terminal:
        console = Console(file=terminal, force_terminal=True, width=80)
        execution.execute(["toy.one"], execution.Options(), out=None, console=console)
        terminal.seek(0)
        text = terminal.read()
    assert "second half" in text
    last = text.split("\r")[-1].split("\x1b[2K")[-1]
    assert "2 claims, none fails" in last
    assert "half" not in last


def test_every_simulation_has_a_line():
    for name, line in sims.available().items():
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
    assert set(sims.available()) <= set(done.stdout.split())
