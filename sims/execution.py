"""Runs of simulations, one after another or several at a time.

Workers are found by the name of their module, which `sims.__main__` is not.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from sims import progress, simulations, startup
from sims.claims import Preset

if TYPE_CHECKING:
    from sims.results import Saved


class UsageError(ValueError):
    """A mistake in the command, told in one line."""


@contextmanager
def usage() -> Iterator[None]:
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


def execute(
    names: Sequence[str], options: Options, config: Any = None, *, out: Path | None, console: Console
) -> list[Saved]:
    """Run simulations, several at a time where asked for; with a folder, save and draw each at once."""
    from sims.ranges import check_ranges

    with usage():
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
            simulations.save_with_figure(saved, options.out)
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
        return _execute_one(name, options, None, open_console(options.format))
    except Exception as error:  # those of compiled programs cannot be sent to another process
        if os.environ.get("DYNASCOPE_TRACEBACK"):
            traceback.print_exc()
        raise RuntimeError(f"{name}: {first_line(error)}") from None


def open_console(form: str = "table") -> Console:
    """Where progress goes: to the standard output, which claims as JSON have to themselves."""
    stream = sys.stderr if form == "json" else sys.stdout
    # A file has no width: room for the statements of the claims.
    return Console(file=stream, width=None if stream.isatty() else 120)


def first_line(error: Exception) -> str:
    """An error in one line: one from inside a compiled program comes wrapped in pages of advice."""
    inner = re.search(r"EquinoxRuntimeError: (.+)", str(error))
    return inner[1] if inner else str(error).strip().split("\n")[0]
