"""The command line: `python -m sims list | run NAME... | verify [NAME...]`."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from sims import startup
from sims.claims import Preset

if TYPE_CHECKING:
    from sims.results import Saved

HELP = """usage: python -m sims COMMAND ...

Theories of training dynamics beside the networks they describe.

  list                      the simulations, one line each
  run NAME... [options]     run simulations: figure, numbers and claims of each go to a folder
  verify [NAME...] [options]  run simulations and check their claims; exits with 1 when one fails

NAME is a name from `list`, a theory (all of its simulations) or `all`.
`python -m sims run --help` shows the options, `python -m sims run NAME --help` also those of a simulation.
"""


class UsageError(Exception):
    """A mistake in the command, told in one line."""


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


def available() -> dict[str, str]:
    """Names of the simulations and the first line of each docstring, read without importing them."""
    folder = Path(__file__).parent
    found = {}
    for file in sorted(folder.glob("*/[!_]*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[f"{file.parent.name}.{file.stem}"] = doc.split("\n")[0]
    return found


def resolve(names: Sequence[str]) -> list[str]:
    """Full names of simulations from names, theories and `all`; an unknown one is told its nearest."""
    known = list(available())
    theories = sorted({name.split(".")[0] for name in known})
    chosen: list[str] = []
    for name in names:
        if name == "all":
            chosen += known
        elif name in theories:
            chosen += [entry for entry in known if entry.startswith(f"{name}.")]
        elif name in known:
            chosen.append(name)
        else:
            near = difflib.get_close_matches(name, [*known, *theories], n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"unknown simulation {name!r}{hint} (`python -m sims list` shows all)")
    return list(dict.fromkeys(chosen))


def load_sim(name: str) -> ModuleType:
    """The module of a simulation: it has `Config`, `PRESETS`, `run(config, context)` and `figure(saved)`."""
    return importlib.import_module(f"sims.{name}")


def parse(command: str, names: list[str], arguments: list[str]) -> tuple[Options, Any]:
    """Options, and the configuration where one simulation is named: the preset's, changed by flags."""
    prog = f"python -m sims {command} {' '.join(names) or '[NAME...]'}"
    if len(names) != 1:
        description = "Options of every simulation; name a single one to see and set its own too."
        return tyro.cli(Options, args=arguments, prog=prog, description=description), None
    sim = load_sim(names[0])
    plain = [argument for argument in arguments if argument not in ("-h", "--help")]
    preset = tyro.cli(Options, args=plain, return_unknown_args=True, prog=prog)[0].preset

    def both(shared: Any, simulation: Any) -> tuple[Options, Any]:  # the names are headings of the help
        return shared, simulation

    both.__annotations__ = {
        "shared": tyro.conf.OmitArgPrefixes[Options],
        "simulation": tyro.conf.OmitArgPrefixes[sim.Config],
    }
    both.__defaults__ = (Options(), sim.PRESETS[preset])
    description = f"{sim.__doc__}\n\nDefaults are those of --preset {preset}."
    return tyro.cli(both, args=arguments, prog=prog, description=description)


def execute(
    names: Sequence[str], options: Options, config: Any = None, *, out: Path | None, console: Console
) -> list[Saved]:
    """Run simulations one after the other; with a folder, save each and draw its figure at once."""
    from sims import plotting, results

    if out is not None:
        _require_writable(out)
    data_dir = options.data_dir or (Path(value) if (value := os.environ.get("DYNASCOPE_DATA")) else None)
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"data_dir must be a folder, got {data_dir}")
    done = []
    for name in names:
        sim = load_sim(name)
        chosen = sim.PRESETS[options.preset] if config is None else config
        started = time.perf_counter()
        with _progress(console, name) as report:
            context = results.Context(options.seed, options.preset, data_dir, report)
            result = sim.run(chosen, context)
            seconds = time.perf_counter() - started
            flags = _flags(chosen, sim.PRESETS[options.preset]) + ([] if options.x64 else ["--no-x64"])
            saved = results.to_saved(name, chosen, context, result, seconds, shlex.join(flags))
            if out is not None:
                report("saving and drawing", 1.0)
                # An older figure must not stand beside new numbers, should drawing fail.
                (out / f"{name}.png").unlink(missing_ok=True)
                results.save(saved, out)
                with plotting.style():
                    results.write_whole(out / f"{name}.png", sim.figure(saved).savefig)
        verdicts = saved.verdicts
        failing = verdicts.count("fails")
        state = f"[red]{failing} fail[/red]" if failing else "none fails"
        console.print(f"{name}: {seconds:.1f} s, {len(verdicts)} claims, {state}", highlight=False)
        done.append(saved)
    return done


def _flags(config: Any, preset: Any) -> list[str]:
    """The flags that turn a preset into a configuration."""
    words: list[str] = []
    for name, value in asdict(config).items():
        if value == getattr(preset, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"out must be a folder that can be written, got {out} ({error.strerror})") from None


@contextmanager
def _progress(console: Console, name: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn())  # stages give no time to go
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(name, total=1.0)
            yield lambda label, fraction: bar.update(task, completed=fraction, description=f"{name}: {label}")
        return
    last: list[str] = []

    def report(label: str, fraction: float) -> None:
        if last != [label]:
            last[:] = [label]
            console.print(f"{name}: {label} ({fraction:.0%})", highlight=False)

    yield report


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
    """Run the command line; returns the exit code: 1 when a claim fails in `verify`, 2 for a mistake."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # A file has no width: room for the statements of the claims.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if command in ("-h", "--help"):
            print(HELP, end="")
            return 0
        if command == "list":
            return _list(rest)
        if command not in ("run", "verify"):
            near = difflib.get_close_matches(command, ["list", "run", "verify"], n=1)
            raise UsageError(
                f"unknown command {command!r}; " + (f"did you mean {near[0]!r}?" if near else "see --help")
            )
        first_flag = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
        names, flags = rest[:first_flag], rest[first_flag:]
        wants_help = "-h" in flags or "--help" in flags
        late = sorted({*available(), "all"} & set(flags))
        if late:
            raise UsageError(f"names come before options: python -m sims {command} {late[0]} ...")
        if not names and command == "run" and not wants_help:
            raise UsageError("run needs a name (`python -m sims list` shows all; `all` runs all)")
        chosen = resolve(names)
        startup.set_xla_flags()
        options, config = parse(command, chosen, flags)
        return _run(command, chosen or resolve(["all"]), options, config, console)
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
        # An error from inside a compiled program comes wrapped in pages of advice.
        inner = re.search(r"EquinoxRuntimeError: (.+)", str(error))
        first = inner[1] if inner else str(error).strip().split("\n")[0]
        print(f"error: {first} (DYNASCOPE_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


def _list(rest: list[str]) -> int:
    if rest and rest[0] not in ("-h", "--help"):
        raise UsageError(f"list takes no arguments, got {rest[0]!r}")
    if rest:
        print("usage: python -m sims list\n\nThe simulations by name, one line each.")
        return 0
    sims = available()
    width = max(map(len, sims), default=0)
    print("\n".join(f"{name:<{width}}  {line}" for name, line in sims.items()), flush=True)
    return 0


def _run(command: str, names: list[str], options: Options, config: Any, console: Console) -> int:
    startup.configure_jax(options.x64)
    out = options.out
    if out is None and command == "run":
        out = Path("figures") / options.preset
    done = execute(names, options, config, out=out, console=console)
    console.print(claims_table(done))
    verdicts = [verdict for saved in done for verdict in saved.verdicts]
    print(f"{len(verdicts)} claims: " + ", ".join(f"{n} {v}" for v, n in _tally(verdicts)))
    if out is not None:
        from sims.ledger import write_page

        page = write_page(out)
        print(f"figures, numbers and the page that shows them: {page}")
    return int(command == "verify" and "fails" in verdicts)


def _tally(verdicts: list[str]) -> list[tuple[str, int]]:
    kinds = [verdict.split(" if ")[0] + (" if ..." if " if " in verdict else "") for verdict in verdicts]
    return [(kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)]


if __name__ == "__main__":
    sys.exit(main())
