"""Every simulation as a whole: its claims, its figure, and what it saves."""

import io
import json
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sims import results, simulations
from sims.execution import Options, execute
from sims.results import Saved
from tests import places
from tests.helpers import count_compilations

# Points of lines that lie under a legend at the quick preset: where a figure cannot do without, no more.
UNDER_LEGENDS = json.loads(Path(__file__).with_name("under_legends.json").read_text())


@pytest.mark.parametrize("name", simulations.available())
def test_simulation(name, tmp_path):
    """One run, looked at from all sides: running is what takes long."""
    saved = run(name, "quick", tmp_path)
    loaded = results.load(tmp_path, saved.name)
    assert_nothing_is_lost_on_disk(saved, loaded, tmp_path)
    with count_compilations() as compiled:
        assert simulations.judge(loaded).record == saved.record
        figure, drawn = draw_and_watch(loaded)
    assert not compiled, "claims and figures read what was saved, and compute nothing that compiles"
    assert_panels_are_complete(figure)
    assert_labels_are_apart(figure)
    assert points_under_legends(figure) <= UNDER_LEGENDS.get(name, 0)
    judged = assert_every_claim_can_fail(loaded)
    coordinates = {path for path, dims in loaded.record["dims"].items() if dims == [path]}
    assert set(loaded.arrays) <= judged | drawn | coordinates, "saved, and neither judged nor drawn"
    assert_xarray_has_names(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("name", simulations.available())
def test_every_claim_stands_at_standard(name, tmp_path):
    run(name, "standard", tmp_path)


def run(name, preset, folder) -> Saved:
    """A result whose claims all stand, saved with its figure."""
    options = Options(preset=preset, jobs=1)
    (saved,) = execute([name], options, out=folder, console=Console(file=io.StringIO()))
    assert saved.claims
    failing = [str(claim) for claim in saved.claims if claim.at(preset) == "fails"]
    assert not failing, failing
    assert all(claim.id.startswith(f"{name}/") for claim in saved.claims)
    assert_places_are_listed(name, saved.claims)
    assert 10_000 < (folder / f"{name}.png").stat().st_size < 300_000
    return saved


def assert_places_are_listed(name, claims):
    """The list of places has every claim where its source says, and no claim that is not there."""
    missing = {claim.id: places.unlisted(claim.source, claim.id) for claim in claims}
    missing = {claim: where for claim, where in missing.items() if where}
    assert not missing, f"sims/places.toml must list these claims at these places: {missing}"
    listed = {claim for claim in places.listed() if claim.startswith(f"{name}/")}
    # Some claims are made at larger presets alone: the ledger has them.
    unknown = listed - {claim.id for claim in claims} - places.in_ledger()
    assert not unknown, f"sims/places.toml lists claims that there are not: {unknown}"


def assert_nothing_is_lost_on_disk(saved, loaded, folder):
    assert loaded.record == saved.record
    assert (folder / f"{saved.name}.npz").stat().st_size < 5_000_000
    for path, array in saved.arrays.items():
        assert array.dtype == loaded[path].dtype
        np.testing.assert_array_equal(loaded[path], array)


class Watched(dict):
    """Arrays that note which of them were looked at."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.seen = set()

    def __getitem__(self, path):
        self.seen.add(path)
        return super().__getitem__(path)


def draw_and_watch(saved):
    """The figure, and the paths of the arrays that it was drawn from."""
    arrays = Watched(saved.arrays)
    return simulations.draw(Saved(arrays, saved.record)), arrays.seen


def assert_panels_are_complete(figure):
    panels = [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]
    assert panels
    for ax in panels:
        title = "".join(ax.get_title(loc) for loc in ("left", "center", "right"))
        assert title, "a panel without a title"
        assert ax.get_xlabel(), f"{title}: no label of the horizontal axis"
        assert ax.get_ylabel(), f"{title}: no label of the vertical axis"
        finite = [
            np.isfinite(line.get_xydata()).all(axis=1).any() for line in ax.lines if len(line.get_xydata())
        ]
        assert any(finite) or ax.patches or ax.collections or ax.images, f"{title}: nothing is drawn"


def assert_labels_are_apart(figure):
    """No two labels of ticks of an axis lie one over another."""
    figure.draw_without_rendering()  # places everything
    for axis in (axis for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        shown = [tick for which in (False, True) for tick in axis.get_ticklabels(minor=which)]
        place = 0 if axis.axis_name == "x" else 1
        shown = [label for label in shown if label.get_text() and low <= label.get_position()[place] <= high]
        # The box of a slanted label is larger than the label.
        boxes = [label.get_window_extent() for label in shown if label.get_rotation() % 90 == 0]
        over = [one.overlaps(other) for one, other in combinations(boxes, 2)]
        assert not any(over), (
            f"{axis.axes.get_title('left')}: labels overlap: {[t.get_text() for t in shown]}"
        )


def points_under_legends(figure) -> int:
    """How many points of visible lines lie under a legend of their panel."""
    count = 0
    for ax in figure.axes:
        if (legend := ax.get_legend()) is None:
            continue
        box, panel = legend.get_window_extent(), ax.get_window_extent()
        for line in ax.lines:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                points = line.get_transform().transform(line.get_xydata())
            points = points[np.isfinite(points).all(axis=1)]
            inside = [panel.contains(*point) and box.contains(*point) for point in points]
            count += int(np.count_nonzero(inside)) if line.get_visible() else 0
    return count


def assert_every_claim_can_fail(saved) -> set[str]:
    """Corrupt each array in turn: every check must notice one. Returns the paths that some check noticed."""
    before = checks(saved)
    noticed: dict[str, set] = {}
    for path, array in saved.arrays.items():
        broken = Saved({**saved.arrays, path: corrupted(array)}, saved.record)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            after = checks(broken)
        noticed[path] = {key for key, state in before.items() if after.get(key) != state}
    missed = set(before) - set().union(*noticed.values())
    assert not missed, f"no saved array changes these checks: {sorted(missed)}"
    return {path for path, keys in noticed.items() if keys}


def checks(saved) -> dict:
    """What every check measured and whether it holds; what cannot be judged any more is missing."""
    found = {}
    sim, config = simulations.module_and_config(saved)
    try:
        for claim in sim.claims(config, saved):
            for index, check in enumerate(claim.checks):
                found[claim.id, index, check.label] = (check.holds, repr(check.measured))
    except (ValueError, IndexError, KeyError, ArithmeticError):
        pass
    return found


def corrupted(array):
    if array.dtype.kind in "fc":
        return np.full_like(array, np.nan)
    if array.dtype.kind == "U":
        return np.full_like(array, "?")
    return ~array


def assert_xarray_has_names(saved):
    pytest.importorskip("xarray")
    dataset = saved.to_xarray()
    for path, dims in saved.record["dims"].items():
        assert list(dataset[path.replace("/", ".")].dims) == dims
    assert dataset.attrs["preset"] == Options().preset
