"""The command line: `python -m sims list | run | verify | draw | judge | where`."""

from __future__ import annotations

import difflib
import errno
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sims import simulations, startup
from sims.claims import Preset
from sims.execution import Options, UsageError, execute, first_line, open_console, own_process, usage

if TYPE_CHECKING:
    from sims.results import Saved

HELP = """usage: python -m sims COMMAND ...

Theories of training dynamics beside the networks they describe.

  list [PATTERN...]         the simulations, by theory (--markdown: as a table)
  run NAME... [options]     run simulations: figure, numbers and claims of each go to a folder
  verify [NAME...] [options]  run simulations and check their claims; exits with 1 when one fails
  draw NAME... [options]    draw figures again from saved results
  judge NAME... [options]   judge claims again from saved results; exits with 1 when one fails
  where --kind KIND --data FILE [options]  which modes of data of your own collapse, and at what strength

NAME is a name from `list`, a theory (all of its simulations), a pattern such as 'joma.*', `all`, or the path
of a file with a simulation of your own. `python -m sims COMMAND --help` shows the options of a command,
`python -m sims run NAME --help` also those of a simulation; `python -m sims --version` shows the version.
Exit codes: 0, done; 1, a claim fails; 2, a mistake or an error, told in one line; 130, interrupted.
"""
COMMANDS = ("list", "run", "verify", "draw", "judge", "where")


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


def claims_table(done: Sequence[Saved], marks: str = "✓✗") -> Table:
    """The claims with their verdicts and the numbers behind them, marked by whether each check holds."""
    table = Table(title="Claims", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("claim", "verdict", "statement and checks"):
        table.add_column(heading, overflow="fold")
    for saved in done:
        for claim, verdict in zip(saved.claims, saved.verdicts, strict=True):
            colour = "red" if verdict == "fails" else "yellow" if verdict.startswith("needs") else "green"
            checks = (f"  {marks[0] if check.holds else marks[1]} {check}" for check in claim.checks)
            text = "\n".join([claim.statement, *checks])
            table.add_row(escape(claim.id), f"[{colour}]{escape(verdict)}[/]", escape(text))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, which `HELP` explains."""
    if arguments is None:
        own_process()
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = _dispatch(command, rest)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_output()
        return 0
    except Exception as error:
        told = isinstance(error, (MemoryError, OSError, OverflowError, RuntimeError, ValueError))
        if os.environ.get("DYNASCOPE_TRACEBACK") or not told:
            traceback.print_exc()
            return 2
        _drop_output()
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        where = ": standard output, or a file of the simulation's own" if full else ""
        print(f"error: {first_line(error)}{where} (DYNASCOPE_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Where the standard output takes no more, keep Python from trying once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    if command == "where":
        return _where(rest)
    names, flags = _names_and_flags(rest, ViewOptions if command in ("draw", "judge") else Options)
    wants_help = "-h" in flags or "--help" in flags
    if not names and command != "verify" and not wants_help:
        raise UsageError(f"{command} needs a name (`python -m sims list` shows all; `all` means all)")
    if command in ("draw", "judge"):
        return _view(command, names, flags)
    chosen = _resolve(names)
    startup.prepare_environment()
    with usage():
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
    with usage():
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


def _where(rest: list[str]) -> int:
    startup.prepare_environment()
    from sims import where

    options = tyro.cli(where.WhereOptions, args=rest, prog="python -m sims where")
    startup.configure_jax(x64=True)
    with usage():
        where.report(options)
    return 0


def _run(command: str, names: list[str], options: Options, config: Any) -> int:
    startup.configure_jax(options.x64, options.cache)
    out = options.out
    if out is None and command == "run":
        out = Path("figures") / options.preset
    console = open_console(options.format)
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
    own = {Path(name).stem: name for name in names if name.endswith(".py")}
    stems = _saved_stems([Path(name).stem if name.endswith(".py") else name for name in names], known, out)
    done = []
    for stem in stems:
        there = results.load(out, stem)
        file = own.get(there.record["name"], there.record["file"])  # which may have moved since
        saved = replace(there, record={**there.record, "file": file})
        if command == "draw":
            print(simulations.save_figure(saved, out, kind))
            continue
        judged = simulations.judge(saved)
        if judged.record != there.record:
            results.save_record(judged, out)
        done.append(judged)
    if command == "draw":
        return 0
    _print_claims(done, kind == "json")
    ledger.write_page(out)
    return int(any("fails" in saved.verdicts for saved in done))


def _saved_stems(names: list[str], known: list[str], out: Path) -> list[str]:
    """The saved results that are meant; a name that is not saved itself stands for its variants."""
    chosen = []
    for name in names:
        variants = [stem for stem in known if stem.startswith(f"{name}@")]
        try:
            chosen += variants if variants and name not in known else simulations.resolve([name], known)
        except ValueError:
            raise UsageError(
                f"a saved result must be named; {out} has none of {name!r}, but {', '.join(known)}"
            ) from None
    return list(dict.fromkeys(chosen))


def _print_claims(done: Sequence[Saved], as_json: bool) -> None:
    if as_json:
        print(json.dumps({saved.name: saved.record["claims"] for saved in done}, indent=1))
        return
    console = open_console()
    console.print(claims_table(done, "✓✗" if console.encoding.startswith("utf") else "+-"))
    verdicts = [verdict for saved in done for verdict in saved.verdicts]
    print(f"{len(verdicts)} claims: " + ", ".join(f"{n} {v}" for v, n in _tally(verdicts)))


def _tally(verdicts: list[str]) -> list[tuple[str, int]]:
    kinds = [verdict.split(" if ")[0] + (" if ..." if " if " in verdict else "") for verdict in verdicts]
    return [(kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)]


if __name__ == "__main__":
    sys.exit(main())
