"""Files of results: written whole or not at all, several at once, whoever else writes there or is killed.

A result is the record `<name>.json`, the arrays `<name>.npz` and mostly the figure `<name>.png`. All writing
and reading happens under a lock of the folder, and in this order: arrays and figure are staged under hidden
names with the hash of the new record, the record is swapped, the staged files are moved to their places.
Whoever comes next after a kill finds either the old record, and removes what is staged, or the new one, and
moves it.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of names, dtypes, shapes and numbers."""
    found = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        found.update(repr((path, array.dtype.str, array.shape)).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as an npz file, which `np.load` reads."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, array in arrays.items():
            with archive.open(f"{path}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    return file.getvalue()


def unpack(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file.

    Raises:
        ValueError: an array holds objects, or is not as large as its header says. Other errors of `zipfile`
            and `zlib` mean that the file is damaged, or no npz file.
    """
    with zipfile.ZipFile(file) as archive:
        return {info.filename.removesuffix(".npy"): _unpack_one(archive, info) for info in archive.infolist()}


def _unpack_one(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    layout = np.lib.format
    with archive.open(info) as stream:
        readers = {(1, 0): layout.read_array_header_1_0, (2, 0): layout.read_array_header_2_0}
        shape, _, dtype = readers[layout.read_magic(stream)](stream)
        told, found = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        # Memory is taken for what the header says before a byte is read.
        if not dtype.hasobject and told != found:
            raise ValueError(f"{info.filename} has {found} bytes, and {told} by its header")
        stream.seek(0)
        return layout.read_array(stream, allow_pickle=False)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which waits for others and ends with the process.

    Where a file system has no locks nobody waits; the digests tell then what was mixed.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace_whole(path: Path, data: bytes) -> None:
    """Write a file aside and move it into place: a reader, a kill or a full disk meet the old or the new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written; with the path.
    """
    aside = path.with_name(f".{path.name.lstrip('.')}.part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_whole(path: Path, data: bytes) -> None:
    """`replace_whole` under the lock of the folder."""
    with locked(path.parent):
        replace_whole(path, data)


def commit(folder: Path, name: str, record: bytes, files: Mapping[str, bytes | None]) -> None:
    """Replace a record and the files that belong to it, by suffix, at once; None removes one.

    To be called under the lock of the folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the old files are there as they were.
    """
    settle(folder, name)
    try:
        for suffix, data in files.items():
            replace_whole(_staged(folder, name, record, suffix), data or b"")
        _sync(folder)
        replace_whole(folder / f"{name}.json", record)
        _sync(folder)
    except OSError as error:
        with suppress(OSError):
            settle(folder, name)
        raise OSError(error.errno, error.strerror, str(folder / name)) from error
    settle(folder, name)


def settle(folder: Path, name: str) -> None:
    """Finish or undo, under the lock, what a kill has cut off."""
    path = folder / f"{name}.json"
    record = path.read_bytes() if path.is_file() else b""
    left = re.compile(re.escape(f".{name}.") + r"(?:[0-9a-f]{64}\.\w+|(?:[0-9a-f]{64}\.)?\w+\.part)")
    for file in [file for file in folder.iterdir() if left.fullmatch(file.name)]:
        ours = file == _staged(folder, name, record, file.suffix)
        if ours and file.stat().st_size:
            os.replace(file, folder / f"{name}{file.suffix}")
            continue
        if ours:  # there is none in the new result
            (folder / f"{name}{file.suffix}").unlink(missing_ok=True)
        file.unlink()


def locate(folder: Path, name: str, record: bytes, suffix: str) -> Path:
    """Where a file of a record is: in its place, or staged where a kill came before it was moved."""
    staged = _staged(folder, name, record, suffix)
    return staged if staged.exists() else folder / f"{name}{suffix}"


def _staged(folder: Path, name: str, record: bytes, suffix: str) -> Path:
    return folder / f".{name}.{hashlib.sha256(record).hexdigest()}{suffix}"


def _sync(folder: Path) -> None:
    """Let the names in a folder outlive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(handle)
    finally:
        os.close(handle)
