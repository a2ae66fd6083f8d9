"""Start-up: the settings of a program that runs simulations. Importing it does not import JAX."""

from __future__ import annotations

import os
from importlib.metadata import version

# Older versions fuse small products on CPU with what follows into kernels that compute wrong rows
# (tests/test_canary.py). Products alone are right.
_FUSION = "--xla_cpu_experimental_ynn_fusion_type="
_SAFE_FUSION = f"{_FUSION}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
# A batch of decompositions is split over XLA's pool of threads by a kernel that waits in one of them: as many
# of these at once as there are threads wait for ever, which has been seen on two cores. With more than four,
# networks of small matrices train a fifth slower there.
_THREADS = 4


def set_xla_flags() -> None:
    """Work around two faults of XLA on CPU. Must run before JAX starts a backend.

    A fusion that computes wrong numbers is turned off in jaxlib below 0.11. Small pools of threads, in which
    batches of decompositions can wait for each other for ever, get more threads. What the environment says
    about either is left as it is.
    """
    release = tuple(int(part) for part in version("jaxlib").split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release < (0, 11) and _FUSION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_SAFE_FUSION}".strip()
    if "NPROC" not in os.environ:
        os.environ.setdefault("PJRT_NPROC", str(max(_THREADS, os.cpu_count() or 1)))


def configure_jax(x64: bool) -> None:
    """Set the precision of a whole program: 64-bit or not, and matrix products that are not rounded down."""
    import jax

    jax.config.update("jax_enable_x64", x64)
    # Accelerators round float32 products to fewer bits by default, which a comparison would see.
    jax.config.update("jax_default_matmul_precision", "highest")
