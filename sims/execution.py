"""Runs of simulations, one after another or several at a time.

Workers are found by the name of their module, which `sims.__main__` is not.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    from sims import results
    from sims.ranges import check_ranges

    with usage():
        results.require_seed(options.seed)
        if out is not None:
            progress.require_writable(out)
        options = replace(options, out=out, data_dir=progress.require_data(options.data_dir))
        if config is not None:
            check_ranges(config)
    jobs = min(len(names), _default_jobs() if options.jobs is None else options.jobs)
    ordered = sorted(names, key=simulations.reads_results)
    if jobs <= 1:
        done = [_execute_one(name, options, config, console) for name in ordered]
    else:
        done = list(_in_workers(ordered, options, jobs))
    return sorted(done, key=lambda saved: names.index(saved.record["file"] or saved.record["name"]))


def _execute_one(name: str, options: Options, config: Any, console: Console) -> Saved:
    from sims import results

    with progress.shown(name, console) as report:
        context = results.Context(options.seed, options.preset, options.data_dir, report, options.out)
        if config is None:
            config = simulations.preset_config(simulations.load_simulation(name), options.preset)
        try:
            saved = simulations.measure(name, config, context)
            if options.out is not None:
                report("saving and drawing", 1.0)
                simulations.save_with_figure(saved, options.out)
        except MemoryError as error:  # which says at most for how many bytes
            raise MemoryError(f"{name}: memory ran out ({error})") from error
    failing = saved.verdicts.count("fails")
    state = f"[red]{failing} fail[/red]" if failing else "none fails"
    seconds = saved.record["seconds"]
    console.print(f"{name}: {seconds:.1f} s, {len(saved.verdicts)} claims, {state}", highlight=False)
    return saved


def _default_jobs() -> int:
    return 2 if (os.cpu_count() or 1) >= 2 else 1


class _Worker(NamedTuple):
    """A process of its own, and the line to it."""

    process: SpawnProcess
    line: connection.Connection


_starting = threading.Lock()  # a worker that is half started is nobody's child yet


def _in_workers(names: Sequence[str], options: Options, jobs: int) -> Iterator[Saved]:
    """Results in the order of their ends, from processes of their own; one at a time on an accelerator."""
    waiting, workers = list(names), [_start_worker(options)]
    running: dict[Any, tuple[_Worker, str]] = {}

    def start_next(worker: _Worker) -> None:
        # One that reads what others save comes after them, and waits for those that still run.
        if waiting and not (running and simulations.reads_results(waiting[0])):
            running[worker.line] = worker, waiting.pop(0)
            worker.line.send((_work, running[worker.line][1], options))

    try:
        # This process starts no device: an accelerator's memory would be taken from the workers.
        if options.jobs is None:
            workers[0].line.send((_backend,))
            jobs = jobs if _answer(workers[0], "a worker") == "cpu" else 1
        workers += [_start_worker(options) for _ in range(jobs - 1)]
        for worker in workers:
            start_next(worker)
        while running:
            for line in connection.wait(list(running)):
                worker, name = running.pop(line)
                saved = _answer(worker, name)
                start_next(worker)
                yield saved
    except (KeyboardInterrupt, GeneratorExit):
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.line.close()  # so that it ends, after what it is at
        for worker in workers:
            worker.process.join()


def _start_worker(options: Options) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, options))
    with _starting, _interrupts_blocked():
        process.start()
    there.close()  # the worker has it, and nobody else: that tells either side of the other's end
    return _Worker(process, here)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes here that never see a Ctrl-C, which goes to all that a terminal has started.

    Whoever has started them ends them; by themselves they would print a traceback each.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its own start would unblock what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(line: connection.Connection, options: Options) -> None:
    """Answer calls of functions, until nobody is there to send one."""
    replace_unprintable()
    startup.prepare_environment()
    startup.configure_jax(options.x64, options.cache)
    with suppress(EOFError, ConnectionError):
        while True:
            function, *arguments = line.recv()
            line.send(function(*arguments))


def _answer(worker: _Worker, what: str) -> Any:
    try:
        answer = worker.line.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode
        raise RuntimeError(f"{what}: its process was ended, maybe for want of memory (code {code})") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _backend() -> str:
    import jax

    return jax.default_backend()


def _work(name: str, options: Options) -> Saved | Exception:
    try:
        return _execute_one(name, options, None, open_console(options.format))
    except MemoryError as error:
        return MemoryError(str(error))
    except Exception as error:  # those of compiled programs cannot be sent to another process
        if os.environ.get("DYNASCOPE_TRACEBACK"):
            traceback.print_exc()
        return RuntimeError(f"{name}: {first_line(error)}")
    finally:
        startup.forget_programs()  # the next simulation has its own


def own_process() -> None:
    """Settings of a process that is a command: how it prints, and how it ends at Ctrl-C."""
    replace_unprintable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_interrupt, args=(reader,), daemon=True).start()


def _end_at_interrupt(reader: int) -> None:
    """Wait for Ctrl-C, and end this process and its workers at once, with exit code 130.

    A `KeyboardInterrupt` would be lost in a garbage collection, would wait for a compiled program to end, and
    XLA's threads crash while the interpreter is taken down after it.
    """
    os.read(reader, 1)
    try:
        with _starting:
            for worker in multiprocessing.active_children():
                worker.kill()
        if os.isatty(1):
            os.write(1, b"\r\x1b[2K\x1b[?25h")  # the bar goes, the cursor comes back
        os.write(2, b"interrupted\n")
    finally:
        os._exit(130)


def replace_unprintable() -> None:
    """Print signs that the locale's encoding lacks as question marks: a table is worth more than they are."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def open_console(form: str = "table") -> Console:
    """Where progress goes: to the standard output, which claims as JSON have to themselves."""
    stream = sys.stderr if form == "json" else sys.stdout
    # A file has no width: room for the statements of the claims.
    return Console(file=stream, width=None if stream.isatty() else 120)


def first_line(error: Exception) -> str:
    """An error in one line: one from inside a compiled program comes wrapped in pages of advice."""
    inner = re.search(r"EquinoxRuntimeError: (.+)", str(error))
    return inner[1] if inner else str(error).strip().split("\n")[0] or type(error).__name__
