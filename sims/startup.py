"""Start-up: the settings of a program that runs simulations. Importing it does not import JAX."""

from __future__ import annotations

import os
from importlib.metadata import version

# Older versions fuse small products on CPU with what follows into kernels that compute wrong rows
# (tests/test_canary.py). Products alone are right; without their kernels too, large batches of small matrices
# have been seen to wait for ever on two cores.
_FUSION = "--xla_cpu_experimental_ynn_fusion_type="
_SAFE_FUSION = f"{_FUSION}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def set_xla_flags() -> None:
    """Turn off a miscompiling CPU fusion in jaxlib below 0.11. Must run before JAX starts a backend."""
    release = tuple(int(part) for part in version("jaxlib").split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release < (0, 11) and _FUSION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_SAFE_FUSION}".strip()


def configure_jax(x64: bool) -> None:
    """Set the precision of a whole program: 64-bit or not, and matrix products that are not rounded down."""
    import jax

    jax.config.update("jax_enable_x64", x64)
    # Accelerators round float32 products to fewer bits by default, which a comparison would see.
    jax.config.update("jax_default_matmul_precision", "highest")
