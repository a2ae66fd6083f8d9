"""The actual networks: Flax modules, their data and their training."""

import dynamics  # noqa: F401  its workarounds must come before JAX starts
