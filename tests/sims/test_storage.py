"""Results on disk: the old one or the new one, whole, whoever is killed, fails or writes at the same time."""

import ast
import errno
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sims
from sims import storage
from sims.results import Context, Saved, load, save, save_beside, save_record, to_saved

NAME = "toy.run"


@dataclass(frozen=True)
class Config:
    steps: int = 3


def result(number):
    """A result in which everything says the same number."""
    measured = {"x": ("lane", np.full(50, number)), "below": {"y": float(number)}}
    return to_saved(NAME, Config(), Context(), measured, seconds=float(number))


def picture(number):
    return f"figure {number}".encode()


def number_of(folder):
    """The number of the result that lies in a folder; all of it says the same."""
    saved = load(folder, NAME)
    assert saved["x"].shape == (50,)
    (number,) = set(saved["x"].tolist())
    assert (float(saved["below/y"]), saved.record["seconds"]) == (number, number)
    assert (folder / f"{NAME}.png").read_bytes() == picture(number)
    with np.load(folder / f"{NAME}.npz") as arrays:
        assert set(arrays["x"].tolist()) == {number}
    return number


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = [f"{NAME}.json", f"{NAME}.npz", f"{NAME}.png"]


class Killed(BaseException):
    """The end of a process: nothing is done after it."""


def break_at(monkeypatch, step, error, once):
    """Let step `step` of what changes a disk fail, and all later ones unless `once`; count the steps."""
    done = itertools.count()
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def broken(name):
        def call(*arguments, **options):
            now = next(done)
            if now == step or (now > step and not once):
                if name == "fsync" and os.path.isfile(f"/proc/self/fd/{arguments[0]}"):
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)  # some of it is lost
                raise error
            return real[name](*arguments, **options)

        return call

    for name in real:
        monkeypatch.setattr(os, name, broken(name))
    return done


def test_a_kill_at_any_step_leaves_the_old_or_the_new_result(tmp_path):
    found, killed = [], True
    while killed:
        folder = tmp_path / str(len(found))
        folder.mkdir()
        save(result(1), folder, picture(1))
        with pytest.MonkeyPatch.context() as patch:
            break_at(patch, len(found), Killed(), once=False)
            try:
                save(result(2), folder, picture(2))
                killed = False
            except Killed:
                killed = True
        found.append(number_of(folder))
        assert names(folder) == WHOLE  # and no leftover
    assert found == sorted(found)
    assert found.count(1) >= 5  # each file is synced and moved before the record is
    assert found.count(2) >= 3


@pytest.mark.parametrize("once", [True, False], ids=["once", "for good"])
def test_a_full_disk_is_told_with_the_path_and_loses_nothing(tmp_path, monkeypatch, once):
    save(result(1), tmp_path, picture(1))
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        break_at(patch, 2, full, once)
        with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '.*{NAME}") as caught:
            save(result(2), tmp_path, picture(2))
    assert caught.value.errno == errno.ENOSPC
    assert number_of(tmp_path) == 1
    assert names(tmp_path) == WHOLE
    save(result(3), tmp_path, picture(3))
    assert number_of(tmp_path) == 3


def test_a_result_without_a_figure_keeps_no_older_one(tmp_path):
    save(result(1), tmp_path, picture(1))
    save(result(2), tmp_path)
    assert names(tmp_path) == WHOLE[:2]
    assert load(tmp_path, NAME)["below/y"] == 2


def test_leftovers_of_other_results_are_left_alone(tmp_path):
    """`toy` is no part of `toy.run`."""
    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        break_at(
            patch, 8, Killed(), once=False
        )  # its record is swapped, and its arrays are not in their place
        with pytest.raises(Killed):
            save(result(1), folder, picture(1))
    assert f"{NAME}.npz" not in names(folder)
    save(to_saved("toy", Config(), Context(), {"x": 1.0}), folder)
    assert number_of(folder) == 1


def test_savers_at_once_never_mix(tmp_path):
    stop, failures = threading.Event(), []

    def save_often(number):
        while not stop.is_set():
            save(result(number), tmp_path, picture(number))

    save(result(0), tmp_path, picture(0))
    savers = [threading.Thread(target=save_often, args=(number,)) for number in (1, 2, 3)]
    for saver in savers:
        saver.start()
    try:
        seen = set()
        for _ in range(100):
            saved = load(tmp_path, NAME)
            seen.add(saved.record["seconds"])
            if {*saved["x"].tolist(), float(saved["below/y"])} != {saved.record["seconds"]}:
                failures.append(saved)
    finally:
        stop.set()
        for saver in savers:
            saver.join()
    assert not failures
    assert len(seen) > 1
    assert number_of(tmp_path) in (1, 2, 3)
    assert names(tmp_path) == WHOLE


def test_a_view_goes_with_its_own_arrays(tmp_path):
    old = result(1)
    save(old, tmp_path, picture(1))
    save_record(old, tmp_path)
    assert save_beside(old, tmp_path, ".svg", b"drawn").read_bytes() == b"drawn"
    save(result(2), tmp_path, picture(2))
    for view in (lambda: save_record(old, tmp_path), lambda: save_beside(old, tmp_path, ".png", b"old")):
        with pytest.raises(
            ValueError, match=r"toy\.run\.\w+ must go with toy\.run\.json, which holds another"
        ):
            view()
    assert number_of(tmp_path) == 2


def test_a_folder_that_can_be_read_only_is_read(tmp_path, monkeypatch):
    save(result(1), tmp_path, picture(1))
    with monkeypatch.context() as patch:
        break_at(patch, 8, Killed(), once=False)
        with pytest.raises(Killed):
            save(result(2), tmp_path, picture(2))
    with monkeypatch.context() as patch:
        break_at(patch, 0, PermissionError(errno.EACCES, "Permission denied"), once=False)
        assert load(tmp_path, NAME)["below/y"] == 2


def npz(header=b"", **arrays):
    """Bytes of an npz file; with one member whose header alone is there."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    if header:
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("x.npy", header)
    return file.getvalue()


def header_of(shape, dtype="<f8"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def damage_record(**changes):
    return lambda record, arrays: (json.dumps({**json.loads(record), **changes}).encode(), arrays)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda record, arrays: (b"[1, 2]", arrays), "the record must be a JSON object, got a list"),
        (lambda record, arrays: (b'{"name": "toy"}', arrays), "the record lacks arrays_sha256, claims, "),
        (lambda record, arrays: (b"\xff\xfe", arrays), "'utf-8|utf-16|Expecting"),
        (lambda record, arrays: (b"[" * 100_000, arrays), "recursion"),
        (damage_record(claims=3), "not iterable"),
        (damage_record(dims=["x"]), "no attribute 'items'"),
        (damage_record(dims={"x": ["lane"]}), "the record's dims are not those of the arrays"),
        (lambda record, arrays: (record, npz(x=np.ones(3))), "the arrays are not those that the record was"),
        (
            lambda record, arrays: (record, npz(header_of((10**12,)))),
            r"x\.npy has 0 bytes, and 8000000000000 by",
        ),
        (lambda record, arrays: (record, npz(header_of((-1, 8)))), r"x\.npy has 0 bytes"),
        (lambda record, arrays: (record, npz(x=np.array([{}, None]))), "Object arrays cannot be loaded"),
        (lambda record, arrays: (record, b"no archive"), "File is not a zip file"),
        (lambda record, arrays: (record, b""), "File is not a zip file"),
        (lambda record, arrays: (record, arrays[: len(arrays) // 2]), "File is not a zip file"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path, damage, reason):
    save(result(1), tmp_path)
    files = [tmp_path / f"{NAME}{suffix}" for suffix in (".json", ".npz")]
    for file, data in zip(files, damage(*(file.read_bytes() for file in files)), strict=True):
        file.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"^.*toy\.run\.json and its \.npz are no result that can be read: "
    ) as e:
        load(tmp_path, NAME)
    assert e.match(reason)
    assert "\n" not in str(e.value)


PACKED = storage.pack({"x": np.arange(5.0), "kind": np.array(["one", "two"])})


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255), st.booleans())
def test_damaged_arrays_are_refused_or_whole(tmp_path_factory, at, flip, cut):
    """A flipped byte may lie where nobody reads, such as in a date."""
    folder = tmp_path_factory.mktemp("damaged")
    saved = to_saved(NAME, Config(), Context(), {"x": ("i", np.arange(5.0)), "kind": ("j", ["one", "two"])})
    save(saved, folder)
    file = folder / f"{NAME}.npz"
    data = bytearray(file.read_bytes())
    assert len(data) == len(PACKED)
    data[at] ^= flip
    file.write_bytes(data[:at] if cut else data)
    try:
        found = load(folder, NAME).arrays
    except ValueError as error:
        found = str(error).split("\n")
    if isinstance(found, list):
        assert len(found) == 1
    else:
        np.testing.assert_array_equal(found["x"], np.arange(5.0))
        assert found["kind"].tolist() == ["one", "two"]


def test_a_digest_tells_names_dtypes_shapes_and_numbers_apart():
    zeros = np.zeros((2, 3))
    others = [{"y": zeros}, {"x": zeros.T}, {"x": zeros.astype(int)}, {"x": zeros + 1}]
    assert len({storage.digest(arrays) for arrays in ({"x": zeros}, *others)}) == 5
    both = {"x": zeros, "y": zeros + 1}
    assert storage.digest(both) == storage.digest(dict(reversed(both.items())))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.md"
    storage.write_whole(path, b"old")
    with path.open("rb") as reader:
        storage.write_whole(path, b"new")
        assert reader.read() == b"old"  # who reads it meanwhile sees the old file whole
    assert path.read_bytes() == b"new"
    for step in range(2):
        with pytest.MonkeyPatch.context() as patch:
            break_at(patch, step, Killed(), once=False)
            with pytest.raises(Killed):
                storage.write_whole(path, b"newer")
        assert path.read_bytes() == b"new"
    storage.write_whole(path, b"newest")
    assert names(tmp_path) == ["page.md"]
    with pytest.raises(OSError, match=r"nowhere"):
        storage.write_whole(tmp_path / "nowhere" / "page.md", b"")


def renumbered(saved, number):
    arrays = {path: np.full_like(array, number) for path, array in saved.arrays.items()}
    return Saved(arrays, {**saved.record, "seconds": float(number)})


def kill_savers(folder, savers, kills):
    """Kill processes that save without end: the numbers found after each, and how often files were left."""
    base, found, leftovers = load(folder, NAME), [], 0
    for kill in range(kills):
        running = []
        for index in range(savers):
            if process := os.fork():
                running.append(process)
                continue
            for number in itertools.count(10_000 * kill + 5_000 * index):
                save(renumbered(base, number), folder, picture(number))
        time.sleep(random.uniform(0, 0.1))
        for process in running:
            os.kill(process, signal.SIGKILL)
        for process in running:
            os.waitpid(process, 0)
        leftovers += names(folder) != WHOLE
        found.append(number_of(folder))
        assert names(folder) == WHOLE
    return found, leftovers


@pytest.mark.slow
@pytest.mark.parametrize("savers", [1, 3])
def test_real_kills(tmp_path, savers):
    save(result(0), tmp_path, picture(0))
    call = (
        f"from tests.sims.test_storage import *; print(kill_savers(Path({str(tmp_path)!r}), {savers}, 300))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sims.__file__).parents[1])}
    out = subprocess.check_output([sys.executable, "-c", call], text=True, env=environment)
    found, leftovers = ast.literal_eval(out)
    assert len(set(found)) > 150
    assert leftovers > 10
