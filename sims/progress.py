"""Progress of a run, shown on a terminal or told in lines, and the folders that a run needs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn


@contextmanager
def shown(
    name: str, console: Console | None = None, *, quiet: bool = False
) -> Iterator[Callable[[str, float], None]]:
    """A function `report(label, fraction)` that shows a bar on a terminal and prints lines elsewhere."""
    console = Console(stderr=True, quiet=quiet) if console is None else console
    if console.is_terminal and not console.quiet:
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


def require_writable(out: Path) -> Path:
    """The folder, made where it is missing, or `ValueError` where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {out} ({error.strerror})") from None
    return out


def require_data(data_dir: str | Path | None) -> Path | None:
    """The folder of data sets, by argument or by the environment variable DYNASCOPE_DATA."""
    chosen = data_dir or os.environ.get("DYNASCOPE_DATA")
    if not chosen:
        return None
    if not Path(chosen).is_dir():
        raise ValueError(f"data_dir must be a folder, got {chosen}")
    return Path(chosen)
