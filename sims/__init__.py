"""Simulations: a theory and a network on the same axes, with claims and figures.

`run` runs one and gives its result, `load` reads one that was saved, `available` names them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dynamics as dynamics  # its workarounds must come before JAX starts
from sims.simulations import available

if TYPE_CHECKING:
    from sims.claims import Preset
    from sims.results import Saved

__all__ = ["available", "load", "run"]


def run(
    name: str,
    *,
    preset: Preset = "quick",
    seed: int = 0,
    x64: bool = True,
    data_dir: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Saved:
    """Run a simulation and return its result, which a notebook shows with its figure and verdicts.

    JAX's settings are changed for the time of the run alone.

    Args:
        name: `<theory>.<experiment>`, or the path of a file with a simulation of your own.
        preset: `quick` takes seconds, `standard` minutes, `paper` is the document's own setting.
        seed: seed of everything random.
        x64: compute in 64-bit floats.
        data_dir: folder of real data sets; the environment variable DYNASCOPE_DATA where None.
        out: folder to save the result and its figure in; nowhere where None.
        progress: show what is being done.
        **settings: fields of the simulation's `Config`, instead of those of the preset.

    Returns:
        A `sims.results.Saved` with `claims`, `figure()`, `to_xarray()` and every array by path.

    Raises:
        ValueError: the simulation is unknown, or a setting is unknown or out of range.

    Example:
        >>> saved = run("joma.rates", mu=(0.0, 0.5, 1.0), progress=False)
        >>> "fails" in saved.verdicts
        False
    """
    import jax

    from sims import progress as bars
    from sims import results, simulations

    chosen, *others = simulations.resolve([name])
    if others:
        raise ValueError(f"name must be that of one simulation, got {name!r}, which are {1 + len(others)}")
    sim = simulations.load_simulation(chosen)
    config = simulations.with_settings(simulations.preset_config(sim, preset), settings)
    folder = None if out is None else bars.require_writable(Path(out))
    with (
        jax.enable_x64(x64),
        jax.default_matmul_precision("highest"),
        bars.shown(chosen, quiet=not progress) as report,
    ):
        context = results.Context(seed, preset, bars.require_data(data_dir), report, folder)
        saved = simulations.measure(chosen, config, context)
    if folder is not None:
        simulations.save_with_figure(saved, folder)
    return saved


def load(out: str | Path, name: str) -> Saved:
    """The result that a run saved in a folder, by the name of its files."""
    from sims import results

    return results.load(out, name)
