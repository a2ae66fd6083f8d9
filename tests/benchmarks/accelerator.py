"""What a machine with a GPU or TPU does with this project, in about five minutes: a JSON file and a table.

Every part is a process of its own, one after another: tests of the theories, the GaLore benchmark, batches
of replicator flows, and two simulations at the size of their documents. The file is written anew after each
part, so that a run that is cut off leaves what it had. A part that exceeds what is left of the limit is cut
off itself, and the file says so.

    python -m tests.benchmarks.accelerator --out accelerator.json

installs nothing and takes any jax from 0.11 on. `--small` is for a CPU: the same parts in sizes of seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

TESTS = ("tests/test_canary.py", "tests/dynamics/replicator", "tests/dynamics/test_flow.py")
SMALL_TESTS = ("tests/test_canary.py",)
# What needs a machine of this kind the most: 640 networks on a grid of learning rates, and long descents.
PAPERS = ("scan_snap.learning_rates", "replicator.boundary")
# The same flow at once for more and more games.
BATCHES = (1_000, 100_000)
REFRESH = "over optax's"


@dataclass(frozen=True)
class Options:
    """What is run."""

    out: Path = Path("accelerator.json")
    """File of the results."""
    limit: float = 300.0
    """Seconds for all parts together; what is left is cut off."""
    small: bool = False
    """Sizes of seconds, for a CPU."""
    parts: tuple[str, ...] = ("machine", "tests", "galore", "replicator", *PAPERS)
    """Which parts, in this order."""
    part: str | None = None
    """Run this part alone in this process, and print it."""


def main(options: Options) -> None:
    """Run all parts and print their table."""
    if options.part:
        print(json.dumps(PARTS.get(options.part, simulation)(options)))
        return
    known = [*PARTS, *PAPERS]
    if unknown := set(options.parts) - set(known):
        raise SystemExit(f"error: --parts must be among {', '.join(known)}, got {', '.join(unknown)}")
    started, results = time.perf_counter(), {}
    for part in options.parts:
        left = max(options.limit - (time.perf_counter() - started), 0.0)
        results[part] = run_part(part, left, options.small)
        aside = options.out.with_suffix(".part")
        aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, options.out)
        print(row(part, results[part]), flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all: {options.out}")


def run_part(part: str, left: float, small: bool) -> dict[str, Any]:
    """What a part measures, or why it did not, with the seconds it took."""
    command = [sys.executable, "-m", "tests.benchmarks.accelerator", "--part", part]
    command += ["--small"] if small else []
    started = time.perf_counter()
    # Files instead of pipes: what a part said before it was cut off is kept.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        try:
            code = subprocess.call(command, stdout=said, stderr=told, timeout=max(left, 0.1))
            failure = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"cut off after {left:.0f} s"
        said.seek(0)
        told.seek(0)
        last = (said.read().strip().splitlines() or ["{}"])[-1]
        if failure:
            lines = told.read().strip().splitlines()
            measured = {"failure": f"{failure}: {lines[-1]}" if lines else failure}
        else:
            measured = json.loads(last)
    return {**measured, "seconds": round(time.perf_counter() - started, 1)}


def machine(options: Options) -> dict[str, Any]:
    """The hardware and the versions."""
    from importlib.metadata import version

    import jax

    (device, *others) = jax.devices()
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "diffrax")}
    return {
        "device": device.device_kind,
        "devices": 1 + len(others),
        "platform": device.platform,
        "python": sys.version.split()[0],
        **versions,
    }


def tests(options: Options) -> dict[str, Any]:
    """How many tests pass on this device; the first lines of those that do not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *(SMALL_TESTS if options.small else TESTS)], capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode not in (0, 1):
        raise SystemExit((lines or done.stderr.splitlines() or ["pytest did not start"])[-1])
    failed = [line for line in lines if line.startswith("FAILED")]
    return {"outcome": lines[-1].strip("= "), "failed": failed[:20]}


def galore(options: Options) -> dict[str, Any]:
    """State bytes, ordinary step against AdamW, refresh against Optax's."""
    from sims.startup import configure_jax
    from tests.benchmarks import galore

    configure_jax(x64=False)
    if options.small:
        return galore.measure(galore.Options(layers=1, vocab=64, rank=4, gap=2, rounds=1, width=32, inner=48))
    return galore.measure(galore.Options())


def replicator(options: Options) -> dict[str, Any]:
    """Seconds of one call for a batch of games, compiled, by the number of games; the best of three."""
    import jax

    from sims.startup import configure_jax
    from tests.benchmarks import replicator_games as games

    configure_jax(x64=True)
    seconds = {}
    for count in (10, 100) if options.small else BATCHES:
        call = partial(games.batched(*games.draw_games(games.Options(games=count))), 1e-8)
        first, _ = games.timed(call)
        again = [games.timed(call)[0] for _ in range(3)]
        seconds[f"{count} games"] = {"first call": first, "call": min(again)}
    return {"device": jax.devices()[0].device_kind, "times": seconds}


def simulation(options: Options) -> dict[str, Any]:
    """Seconds and verdicts of a simulation at the size of its document."""
    import sims
    from sims.startup import configure_jax

    configure_jax(x64=True)
    saved = sims.run(str(options.part), preset="quick" if options.small else "paper", progress=False)
    return {
        "seconds of the run": saved.record["seconds"],
        "claims": len(saved.verdicts),
        "failing": [claim.id for claim in saved.claims if claim.verdict == "fails"],
    }


def row(part: str, result: dict[str, Any]) -> str:
    """A row of the table."""
    if "failure" in result:
        said = result["failure"]
    elif part == "machine":
        said = f"{result['device']} x {result['devices']}, jax {result['jax']}, Python {result['python']}"
    elif part == "tests":
        said = result["outcome"]
    elif part == "galore":
        ours = result["rows"]["galore, eigh"]
        said = (
            f"ordinary step {ours['over AdamW']:.2f} x AdamW, refresh {ours[REFRESH]:.2f} x Optax's, "
            f"state of the matrices {result['state bytes of the matrices']} bytes"
        )
    elif part == "replicator":
        said = ", ".join(f"{name}: {each['call']:.3g} s" for name, each in result["times"].items())
    else:
        failing = ", ".join(result["failing"]) or "none fails"
        said = f"{result['seconds of the run']:.1f} s, {result['claims']} claims, {failing}"
    return f"| {part} | {said} | {result['seconds']:.0f} s |"


PARTS = {"machine": machine, "tests": tests, "galore": galore, "replicator": replicator}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
