"""The command line: `python -m sims list | run | verify | draw | judge`."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sims import progress, simulations, startup
from sims.claims import Preset

if TYPE_CHECKING:
    from sims.results import Saved

HELP = """usage: python -m sims COMMAND ...

Theories of training dynamics beside the networks they describe.

  list [PATTERN...]         the simulations, by theory (--markdown: as a table)
  run NAME... [options]     run simulations: figure, numbers and claims of each go to a folder
  verify [NAME...] [options]  run simulations and check their claims; exits with 1 when one fails
  draw NAME... [options]    draw figures again from saved results
  judge NAME... [options]   judge claims again from saved results; exits with 1 when one fails

NAME is a name from `list`, a theory (all of its simulations), a pattern such as 'joma.*', `all`, or the path
of a file with a simulation of your own. `python -m sims COMMAND --help` shows the options of a command,
`python -m sims run NAME --help` also those of a simulation; `python -m sims --version` shows the version.
"""
COMMANDS = ("list", "run", "verify", "draw", "judge")


class UsageError(ValueError):
    """A mistake in the command, told in one line."""


@contextmanager
def _usage() -> Iterator[None]:
    """Turn a `ValueError` of what was asked for into a mistake in the command."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


@dataclass(frozen=True)
class Options:
    """Options of every simulation."""

    preset: Preset = "quick"
    """Size of the run: `quick` takes seconds, `standard` minutes, `paper` is the document's own setting."""
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """Folder for the results. Default: figures/<preset>; `verify` saves only where this is given."""
    x64: bool = True
    """Compute in 64-bit floats."""
    data_dir: Path | None = None
    """Folder of real data sets. Default: the environment variable DYNASCOPE_DATA."""
    jobs: int | None = None
    """Simulations at a time. Default: two where there are two cores and no accelerator."""
    cache: str | None = None
    """Folder of compiled programs, or `off`. Default: DYNASCOPE_CACHE, else the user's cache folder."""
    format: Literal["table", "json"] = "table"
    """How the claims are printed."""


@dataclass(frozen=True)
class ViewOptions:
    """Options of `draw` and `judge`."""

    preset: Preset = "quick"
    """The preset whose results are meant, where no folder is given."""
    out: Path | None = None
    """Folder of the saved results. Default: figures/<preset>."""
    format: Literal["png", "pdf", "svg", "table", "json"] | None = None
    """Of a figure: png, pdf or svg. Of the claims: table or json."""


def parse(command: str, names: list[str], arguments: list[str]) -> tuple[Options, Any]:
    """Options, and the configuration where one simulation is named: the preset's, changed by flags."""
    prog = f"python -m sims {command} {' '.join(names) or '[NAME...]'}"
    if len(names) != 1:
        description = "Options of every simulation; name a single one to see and set its own too."
        return tyro.cli(Options, args=arguments, prog=prog, description=description), None
    sim = simulations.load_simulation(names[0])
    plain = [argument for argument in arguments if argument not in ("-h", "--help")]
    preset = tyro.cli(Options, args=plain, return_unknown_args=True, prog=prog)[0].preset

    def both(shared: Any, simulation: Any) -> tuple[Options, Any]:  # the names are headings of the help
        return shared, simulation

    both.__annotations__ = {
        "shared": tyro.conf.OmitArgPrefixes[Options],
        "simulation": tyro.conf.OmitArgPrefixes[sim.Config],
    }
    both.__defaults__ = (Options(), simulations.preset_config(sim, preset))
    description = f"{sim.__doc__}\n\nDefaults are those of --preset {preset}."
    return tyro.cli(both, args=arguments, prog=prog, description=description)


def execute(
    names: Sequence[str], options: Options, config: Any = None, *, out: Path | None, console: Console
) -> list[Saved]:
    """Run simulations, several at a time where asked for; with a folder, save and draw each at once."""
    from sims.ranges import check_ranges

    with _usage():
        if out is not None:
            progress.require_writable(out)
        options = replace(options, out=out, data_dir=progress.require_data(options.data_dir))
        if config is not None:
            check_ranges(config)
    jobs = min(len(names), _default_jobs() if options.jobs is None else options.jobs)
    if jobs <= 1:
        return [_execute_one(name, options, config, console) for name in names]
    done = list(_in_workers(names, options, jobs))
    return sorted(done, key=lambda saved: names.index(saved.record["file"] or saved.record["name"]))


def _execute_one(name: str, options: Options, config: Any, console: Console) -> Saved:
    from sims import results

    with progress.shown(name, console) as report:
        context = results.Context(options.seed, options.preset, options.data_dir, report)
        if config is None:
            config = simulations.preset_config(simulations.load_simulation(name), options.preset)
        saved = simulations.measure(name, config, context)
        if options.out is not None:
            report("saving and drawing", 1.0)
            # An older figure must not stand beside new numbers, should drawing fail.
            simulations.figure_path(saved, options.out).unlink(missing_ok=True)
            results.save(saved, options.out)
            simulations.save_figure(saved, options.out)
    failing = saved.verdicts.count("fails")
    state = f"[red]{failing} fail[/red]" if failing else "none fails"
    seconds = saved.record["seconds"]
    console.print(f"{name}: {seconds:.1f} s, {len(saved.verdicts)} claims, {state}", highlight=False)
    return saved


def _default_jobs() -> int:
    return 2 if (os.cpu_count() or 1) >= 2 else 1


def _in_workers(names: Sequence[str], options: Options, jobs: int) -> Iterator[Saved]:
    """Results in the order of their ends, from processes of their own; one at a time on an accelerator."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (options,)) as workers:
        # This process starts no device: an accelerator's memory would be taken from the workers.
        if options.jobs is None and workers.submit(_backend).result() != "cpu":
            jobs = 1
        waiting, running = list(names), set()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.add(workers.submit(_work, waiting.pop(0), options))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _start_worker(options: Options) -> None:
    startup.prepare_environment()
    startup.configure_jax(options.x64, options.cache)


def _backend() -> str:
    import jax

    return jax.default_backend()


def _work(name: str, options: Options) -> Saved:
    try:
        return _execute_one(name, options, None, _console(options.format))
    except Exception as error:  # those of compiled programs cannot be sent to another process
        if os.environ.get("DYNASCOPE_TRACEBACK"):
            traceback.print_exc()
        raise RuntimeError(f"{name}: {_first_line(error)}") from None


def _console(form: str = "table") -> Console:
    # Claims as JSON have the standard output to themselves.
    stream = sys.stderr if form == "json" else sys.stdout
    # A file has no width: room for the statements of the claims.
    return Console(file=stream, width=None if stream.isatty() else 120)


def claims_table(done: Sequence[Saved]) -> Table:
    """The claims with their verdicts and the numbers behind them."""
    table = Table(title="Claims", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("claim", "verdict", "statement and checks"):
        table.add_column(heading, overflow="fold")
    for saved in done:
        for claim, verdict in zip(saved.claims, saved.verdicts, strict=True):
            colour = "red" if verdict == "fails" else "yellow" if verdict.startswith("needs") else "green"
            marks = (f"  {'✓' if check.holds else '✗'} {check}" for check in claim.checks)
            text = "\n".join([claim.statement, *marks])
            table.add_row(escape(claim.id), f"[{colour}]{escape(verdict)}[/]", escape(text))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 when a claim fails, 2 for a mistake."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return _dispatch(command, rest)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError, ValueError) as error:
        if os.environ.get("DYNASCOPE_TRACEBACK"):
            raise
        print(f"error: {_first_line(error)} (DYNASCOPE_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


def _first_line(error: Exception) -> str:
    # An error from inside a compiled program comes wrapped in pages of advice.
    inner = re.search(r"EquinoxRuntimeError: (.+)", str(error))
    return inner[1] if inner else str(error).strip().split("\n")[0]


def _dispatch(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"dynascope {version('dynascope')}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see --help"
        raise UsageError(f"unknown command {command!r}; {hint}")
    if command == "list":
        return _list(rest)
    names, flags = _names_and_flags(rest, ViewOptions if command in ("draw", "judge") else Options)
    wants_help = "-h" in flags or "--help" in flags
    if not names and command != "verify" and not wants_help:
        raise UsageError(f"{command} needs a name (`python -m sims list` shows all; `all` means all)")
    if command in ("draw", "judge"):
        return _view(command, names, flags)
    chosen = _resolve(names)
    startup.prepare_environment()
    with _usage():
        options, config = parse(command, chosen, flags)
    return _run(command, chosen or _resolve(["all"]), options, config)


def _names_and_flags(words: list[str], options: type) -> tuple[list[str], list[str]]:
    """Names, which stand together, and flags; options that all simulations share may come before names."""
    takes_value = {
        f"--{name.replace('_', '-')}" for name, field in options.__dataclass_fields__.items() if name != "x64"
    }
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] in takes_value else 1
    end = next((i for i in range(at, len(words)) if words[i].startswith("-")), len(words))
    return words[at:end], words[:at] + words[end:]


def _resolve(names: list[str], known: list[str] | None = None) -> list[str]:
    with _usage():
        return simulations.resolve(names, known)


def _list(rest: list[str]) -> int:
    if rest and rest[0] in ("-h", "--help"):
        print("usage: python -m sims list [--markdown] [PATTERN...]\n\nThe simulations by theory.")
        return 0
    sims = simulations.available()
    chosen = _resolve([word for word in rest if word != "--markdown"] or ["all"])
    if "--markdown" in rest:
        print("\n".join(["| simulation | what it shows |", "|---|---|"]))
        print("\n".join(f"| `{name}` | {sims[name].removesuffix('.')} |" for name in chosen))
        return 0
    width = max(map(len, chosen), default=0) + 4
    theory = ""
    for name in chosen:
        if name.split(".")[0] != theory:
            theory = name.split(".")[0]
            print(theory)
        line = textwrap.fill(sims[name], 80, initial_indent=" " * width, subsequent_indent=" " * width)
        print(f"  {name:<{width - 2}}{line[width:]}", flush=True)
    return 0


def _run(command: str, names: list[str], options: Options, config: Any) -> int:
    startup.configure_jax(options.x64, options.cache)
    out = options.out
    if out is None and command == "run":
        out = Path("figures") / options.preset
    console = _console(options.format)
    done = execute(names, options, config, out=out, console=console)
    _print_claims(done, options.format == "json")
    if out is not None:
        from sims.ledger import write_page

        page = write_page(out)
        console.print(f"figures, numbers and the page that shows them: {page}", highlight=False)
    return int(command == "verify" and any("fails" in saved.verdicts for saved in done))


def _view(command: str, names: list[str], flags: list[str]) -> int:
    """Draw or judge again what was saved."""
    prog = f"python -m sims {command} {' '.join(names) or 'NAME...'}"
    options = tyro.cli(ViewOptions, args=flags, prog=prog)
    allowed = ("table", "json") if command == "judge" else ("png", "pdf", "svg")
    kind = allowed[0] if options.format is None else options.format
    if kind not in allowed:
        raise UsageError(f"format must be one of {', '.join(allowed)} for {command}, got {kind}")
    from sims import ledger, results

    out = Path("figures") / options.preset if options.out is None else options.out
    known = sorted(path.stem for path in out.glob("[!.]*.json"))
    if not known:
        raise UsageError(f"out must be a folder with saved results, got {out}; `run` makes them")
    stems = _resolve([Path(name).stem if name.endswith(".py") else name for name in names], known)
    done = []
    for stem in stems:
        saved = results.load(out, stem)
        if command == "draw":
            print(simulations.save_figure(saved, out, kind))
            continue
        judged = simulations.judge(saved)
        if judged.record != saved.record:
            results.save_record(judged, out)
        done.append(judged)
    if command == "draw":
        return 0
    _print_claims(done, kind == "json")
    ledger.write_page(out)
    return int(any("fails" in saved.verdicts for saved in done))


def _print_claims(done: Sequence[Saved], as_json: bool) -> None:
    if as_json:
        print(json.dumps({saved.name: saved.record["claims"] for saved in done}, indent=1))
        return
    _console().print(claims_table(done))
    verdicts = [verdict for saved in done for verdict in saved.verdicts]
    print(f"{len(verdicts)} claims: " + ", ".join(f"{n} {v}" for v, n in _tally(verdicts)))


def _tally(verdicts: list[str]) -> list[tuple[str, int]]:
    kinds = [verdict.split(" if ")[0] + (" if ..." if " if " in verdict else "") for verdict in verdicts]
    return [(kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)]


if __name__ == "__main__":
    sys.exit(main())
