"""Start-up: the settings of a program that runs simulations. Importing it does not import JAX."""

from __future__ import annotations

import os
from importlib.metadata import version

# Older versions fuse small products on CPU into kernels that compute wrong rows (tests/test_canary.py).
_SAFE_FUSION = "--xla_cpu_experimental_ynn_fusion_type="


def set_xla_flags() -> None:
    """Turn off a miscompiling CPU fusion in jaxlib below 0.11. Must run before JAX starts a backend."""
    release = tuple(int(part) for part in version("jaxlib").split(".")[:2])
    flags = os.environ.get("XLA_FLAGS", "")
    if release < (0, 11) and _SAFE_FUSION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_SAFE_FUSION}".strip()


def configure_jax(x64: bool) -> None:
    """Set the precision of a whole program: 64-bit or not, and matrix products that are not rounded down."""
    import jax

    jax.config.update("jax_enable_x64", x64)
    # Accelerators round float32 products to fewer bits by default, which a comparison would see.
    jax.config.update("jax_default_matmul_precision", "highest")
