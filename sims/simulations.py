"""Simulations: where they are found, and their three functions applied - measure, judge, draw.

A simulation is a module with a docstring, a `Config`, `PRESETS`, and

    run(config, context) -> dict          measures; see `sims.results.to_arrays` for what it may return
    claims(config, saved) -> Iterator     yields the claims, which read saved data only
    figure(config, saved) -> Figure       draws saved data only

It lies in `sims/<theory>/<experiment>.py`, or in a file of the user's own. One that reads, from
`context.results`, what others have saved names them in READS, and runs after them.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import io
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sims.claims import Claim
    from sims.results import Context, Saved


def available() -> dict[str, str]:
    """Names of the simulations and the first line of each docstring, read without importing them."""
    folder = Path(__file__).parent
    found = {}
    for file in sorted(folder.glob("*/[!_]*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[f"{file.parent.name}.{file.stem}"] = doc.split("\n")[0]
    return found


def resolve(names: Sequence[str], known: Iterable[str] | None = None) -> list[str]:
    """Simulations by name, theory, pattern, path of a file, or `all`, each once.

    Args:
        names: what is looked for.
        known: the names to choose from; those of `available` where None.

    Raises:
        ValueError: a name is unknown (its nearest is told), or a file does not exist.

    Example:
        >>> resolve(["toy.b", "toy", "g*.?"], ["toy.a", "toy.b", "game.c"])
        ['toy.b', 'toy.a', 'game.c']
    """
    known = list(available() if known is None else known)
    theories = sorted({name.split(".")[0] for name in known})
    chosen: list[str] = []
    for name in names:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise ValueError(f"a simulation's file must exist, got {name}")
            matches = [name]
        elif name == "all":
            matches = known
        else:
            pattern = f"{name}.*" if name in theories and name not in known else name
            matches = [entry for entry in known if entry == name or fnmatchcase(entry, pattern)]
        if not matches:
            near = difflib.get_close_matches(name, [*known, *theories], n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown simulation {name!r}{hint} (`python -m sims list` shows all)")
        chosen += matches
    return list(dict.fromkeys(chosen))


def load_simulation(name: str) -> ModuleType:
    """The module of a simulation, by name or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(f"sims.{name}")
    if not Path(name).is_file():
        raise ValueError(f"a simulation's file must exist, got {name}; name it where it is now")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise ValueError(f"a simulation's file must be a Python file, got {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    missing = [part for part in ("Config", "PRESETS", "run", "claims", "figure") if not hasattr(module, part)]
    if missing:
        raise ValueError(f"{name} must define {', '.join(missing)} to be a simulation")
    if not module.PRESETS:
        raise ValueError(f"PRESETS of {name} must have a preset, such as quick")
    return module


def reads_results(name: str) -> bool:
    """Whether a simulation reads what others have saved, so that its module has READS; none is imported."""
    own = name.endswith(".py")
    file = Path(name) if own else Path(__file__).parent.joinpath(*name.split(".")).with_suffix(".py")
    if not file.is_file():
        return False
    names = ast.parse(file.read_text(encoding="utf-8")).body
    targets = (target for node in names if isinstance(node, ast.Assign) for target in node.targets)
    return any(isinstance(target, ast.Name) and target.id == "READS" for target in targets)


def preset_config(sim: ModuleType, preset: str) -> Any:
    """The configuration of a preset."""
    if preset not in sim.PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(sim.PRESETS)} for this simulation, got {preset!r}"
        )
    return sim.PRESETS[preset]


def with_settings(config: Any, settings: dict[str, Any]) -> Any:
    """A configuration with some fields changed; the fields of its parts go by their own names."""
    left = dict(settings)
    changes: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in left:
            changes[field.name] = new = left.pop(field.name)
            if isinstance(value, tuple) and isinstance(new, list):
                changes[field.name] = tuple(tuple(each) if isinstance(each, list) else each for each in new)
            if is_dataclass(value) and not is_dataclass(new):
                raise ValueError(f"{field.name} must be given by its fields ({', '.join(_flat(value))})")
        elif is_dataclass(value) and not isinstance(value, type):
            own = {entry.name: left.pop(entry.name) for entry in fields(value) if entry.name in left}
            changes[field.name] = replace(value, **own)
    if left:
        known = ", ".join(_flat(config))
        raise ValueError(f"settings must be fields of the simulation ({known}), got {sorted(left)}")
    return replace(config, **changes)


def _flat(config: Any) -> dict[str, Any]:
    """All fields by name, those of parts among them."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= _flat(value) if is_dataclass(value) else {field.name: value}
    return found


def flags(config: Any, preset: Any) -> list[str]:
    """The flags that turn a preset into a configuration."""
    words: list[str] = []
    before = _flat(preset)
    for name, value in _flat(config).items():
        if value == before[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def measure(name: str, config: Any, context: Context) -> Saved:
    """Run a simulation and judge what it measured, as it would be saved."""
    import jax

    from sims.ranges import check_ranges
    from sims.results import save, to_saved

    sim = load_simulation(name)
    check_ranges(config)
    started = time.perf_counter()
    measured = sim.run(config, context)
    seconds = time.perf_counter() - started
    words = flags(config, preset_config(sim, context.preset))
    words += [] if jax.config.read("jax_enable_x64") else ["--no-x64"]
    file = name if name.endswith(".py") else None
    stem = Path(name).stem if file else name
    saved = to_saved(stem, config, context, measured, seconds=seconds, flags=shlex.join(words), file=file)
    try:
        return judge(saved)
    except Exception as error:
        if context.results is None:
            raise
        save(saved, context.results)
        raise RuntimeError(
            f"{stem}: claims must be made of what was measured, but {error!r}; the measurement is saved, and "
            "`judge` judges it once they are"
        ) from error


def module_and_config(saved: Saved) -> tuple[ModuleType, Any]:
    """The simulation that a result came from, and its configuration with the types that it had."""
    from sims.results import restore_config

    sim = load_simulation(saved.record["file"] or saved.record["name"])
    return sim, restore_config(sim.Config, saved.config)


def judge(saved: Saved) -> Saved:
    """The result with its claims judged anew from what was saved."""
    from sims.results import with_claims

    sim, config = module_and_config(saved)
    return with_claims(saved, _with_prefix(saved.record["name"], sim.claims(config, saved)))


def _with_prefix(name: str, claims: Iterable[Claim]) -> Iterator[Claim]:
    for claim in claims:
        yield replace(claim, id=f"{name}/{claim.id}")


def draw(saved: Saved) -> Figure:
    """The figure of a result, drawn from what was saved."""
    from sims import plotting

    sim, config = module_and_config(saved)
    with plotting.style():
        return plotting.with_fixed_colors(sim.figure(config, saved))


def save_figure(saved: Saved, out: Path, kind: str = "png") -> Path:
    """Draw the figure of a saved result into its folder, whole or not at all, and return its path."""
    from sims.results import save_beside

    return save_beside(saved, out, f".{kind}", _picture(saved, kind))


def save_with_figure(saved: Saved, out: Path) -> None:
    """Save a result with its figure in a folder, at once."""
    from sims.results import save

    try:
        figure = _picture(saved, "png")
    except Exception:
        save(saved, out)
        raise
    save(saved, out, figure)


def _picture(saved: Saved, kind: str) -> bytes:
    """The figure as a file of some kind."""
    from sims import plotting

    figure, file = draw(saved), io.BytesIO()
    with plotting.style():
        figure.savefig(file, format=kind)
    return file.getvalue()
