"""Start-up: the settings of a program that runs simulations. Importing it does not import JAX."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from dynamics import workarounds

# Bytes of compiled programs that are kept; one program takes some ten to some hundred thousand.
_CACHE_BOUND = 10**9
# Bytes that must be free: on a full disk half of a program may be written, which cannot be loaded.
_FREE = 10**8
# The share of a process's memory mappings at which its programs are forgotten.
_MAPPED = 0.4
CACHE_WARNING = "Error (reading|writing) persistent compilation cache entry"


def prepare_environment() -> None:
    """Set the environment variables of a whole program. Must run before JAX and Equinox are imported.

    What the environment says already is left as it is.
    """
    workarounds.apply()
    # Diffrax checks its own input inside compiled programs by calls to the host, and a program that calls the
    # host is never cached. `dynamics.flow.integrate` has looked at all of that, and raises by itself.
    os.environ.setdefault("EQX_ON_ERROR", "nan")
    # XLA takes preferences of its own compiler for features that the machine lacks, and complains in pages at
    # each program it loads. They are errors to it; nothing but a crash is above them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def configure_jax(x64: bool, cache: Path | str | None = None) -> None:
    """Set the precision of a whole program, and where it keeps what it has compiled.

    Precision is 64-bit or not, with matrix products that are not rounded down. The cache is a folder, `off`,
    or, where None, what `cache_root` says; where that cannot be written the program runs without one.
    """
    import jax

    jax.config.update("jax_enable_x64", x64)
    # Accelerators round float32 products to fewer bits by default, which a comparison would see.
    jax.config.update("jax_default_matmul_precision", "highest")

    root = cache_root(cache)
    folder = None if root is None else _open_cache(root)
    if folder is None:
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Loading is quicker than compiling for the smallest program, and simulations have many of these.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # An entry that cannot be read or written any more costs time, not a result.
    warnings.filterwarnings("ignore", CACHE_WARNING)


def forget_programs(share: float = _MAPPED) -> bool:
    """Forget what this process has compiled, where that fills its table of memory mappings; whether it did.

    Linux gives a process some 65,000 mappings. A compiled program keeps a handful, a large one hundreds, for
    as long as JAX may call it again, and one that finds the table full ends the process with a segmentation
    fault. What is called again after this is loaded from the cache. Other systems have no such bound.
    """
    try:
        bound = int(Path("/proc/sys/vm/max_map_count").read_text())
        mappings = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return False
    if mappings <= share * bound:
        return False
    import jax

    jax.clear_caches()
    return True


def cache_root(cache: Path | str | None = None) -> Path | None:
    """The folder of compiled programs of all machines, or None for no cache.

    `cache` is a folder or `off`. Where it is None the variable DYNASCOPE_CACHE says the same; without it the
    folder is where such caches belong on the platform, and XDG_CACHE_HOME moves it on any.
    """
    chosen = os.environ.get("DYNASCOPE_CACHE") if cache is None else cache
    if chosen and str(chosen) == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home has no cache either
        return None
    usual = {"darwin": home / "Library/Caches", "win32": home / "AppData/Local"}
    caches = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, home / ".cache")
    return Path(caches) / "dynascope"


def _open_cache(root: Path) -> Path | None:
    """The folder for programs of this machine, made and within bounds; None where it cannot be written."""
    folder = root / f"xla-{_machine()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        with contextlib.suppress(FileNotFoundError):  # another program is at it
            _prune(root)
        return folder if shutil.disk_usage(folder).free > _FREE else None
    except OSError:
        return None


def _machine() -> str:
    """A name for the kind of processor: compiled programs use all features of the one they are made on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]


def _prune(root: Path) -> None:
    """Remove the programs that were used least recently, until all together are within the bound."""
    # JAX's own bound needs another package, and locks and lists the folder for each program.
    entries = []
    for file in root.glob("xla-*/*-cache"):
        seen = file.stat()
        entries.append((max(seen.st_atime, seen.st_mtime), seen.st_size, file))
    size = sum(entry[1] for entry in entries)
    for _, freed, file in sorted(entries):
        if size <= _CACHE_BOUND:
            break
        file.unlink(missing_ok=True)
        size -= freed
