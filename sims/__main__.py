"""The command line: `python -m sims list | run NAME... | verify [NAME...]`."""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sims.claims import Preset

if TYPE_CHECKING:
    pass

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
    """Full names of simulations from names, theories and `all`; `UsageError` suggests the nearest to an unknown."""
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


def parse(command: str, names: list[str], arguments: list[str]) -> tuple[Options, Callable[[str], Any]]:
    """Options, and the configuration of each simulation: the preset's, changed by flags where one is named."""
    prog = f"python -m sims {command} {' '.join(names) or '[NAME...]'}"
    if len(names) != 1:
        options = tyro.cli(Options, args=arguments, prog=prog, description="Options of every simulation.")
        return options, lambda name: load_sim(name).PRESETS[options.preset]
    sim = load_sim(names[0])
    shown = [argument for argument in arguments if argument not in ("-h", "--help")]
    preset = tyro.cli(Options, args=shown, return_unknown_args=True, prog=prog)[0].preset

    def both(
        options: Annotated[Options, tyro.conf.arg(name="")], config: Annotated[Any, tyro.conf.arg(name="")]
    ) -> tuple[Options, Any]:
        return options, config

    both.__annotations__["config"] = Annotated[sim.Config, tyro.conf.arg(name="")]
    default = sim.PRESETS[preset]
    description = f"{sim.__doc__}\n\nDefaults are those of --preset {preset}."
    options, config = (
        tyro.cli(both, args=arguments, prog=prog, description=description, default=None)
        if False
        else _parse_both(sim, default, arguments, prog, description)
    )
    return options, lambda name: config


def _parse_both(sim: ModuleType, default: Any, arguments: list[str], prog: str, description: str):
    def both(options: Any = Options(), config: Any = default) -> tuple[Options, Any]:
        return options, config

    both.__annotations__ = {
        "options": tyro.conf.OmitArgPrefixes[Options],
        "config": tyro.conf.OmitArgPrefixes[sim.Config],
    }
    return tyro.cli(both, args=arguments, prog=prog, description=description)
