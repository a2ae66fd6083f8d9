"""What XLA gets wrong on a CPU, and the settings against it. Importing this does not import JAX."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version

# Versions before 0.11 fuse small products on CPU with what follows into kernels that compute wrong rows
# (tests/test_canary.py). Products alone are right.
_FUSION = "--xla_cpu_experimental_ynn_fusion_type="
_SAFE_FUSION = f"{_FUSION}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
# A batch of decompositions is split over XLA's pool of threads by a kernel that waits in one of them: as many
# of these at once as there are threads wait for ever, which has been seen on two cores. With more than four,
# networks of small matrices train a fifth slower there.
_THREADS = 4


def apply() -> None:
    """Set the environment variables that work around two faults of XLA on CPU, where they are needed.

    Runs when `dynamics`, `models` or `sims` is imported. A fusion that computes wrong numbers is turned off
    in jaxlib below 0.11. Small pools of threads, in which batches of decompositions can wait for each other
    for ever, get more threads. What the environment says about either is left as it is. JAX reads these
    variables once, when it starts a device: after that a warning says what to do.
    """
    wanted = _missing()
    if not wanted:
        return
    if _jax_has_started():
        # Nothing is wrong on an accelerator, and nothing is computed wrong from 0.11 on.
        if "XLA_FLAGS" in wanted and sys.modules["jax"].default_backend() == "cpu":
            warnings.warn(
                "JAX started before dynascope was imported, and this version computes wrong rows in some "
                "products on CPU: import dynamics first, or set the environment variable "
                f"XLA_FLAGS={wanted['XLA_FLAGS']!r}, or use Python 3.12 and jax 0.11 or later",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    os.environ.update(wanted)


def _missing() -> dict[str, str]:
    """The variables that should be set and are not."""
    wanted = {}
    release = tuple(int(part) for part in version("jaxlib").split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release < (0, 11) and _FUSION not in flags:
        wanted["XLA_FLAGS"] = f"{flags} {_SAFE_FUSION}".strip()
    if (os.cpu_count() or 1) < _THREADS and not {"NPROC", "PJRT_NPROC"} & set(os.environ):
        wanted["PJRT_NPROC"] = str(_THREADS)
    return wanted


def _jax_has_started() -> bool:
    """Whether JAX has made its devices; asking JAX itself would make them."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()
