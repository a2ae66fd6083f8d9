"""Imports go one way, and none of them starts a device."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys

seen = set()
for package in ("dynamics", "models", "sims"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
    seen.add(package)
    loaded = {name.split(".")[0] for name in sys.modules} & {"dynamics", "models", "sims", "tests"}
    assert loaded <= seen, f"{package} imports {loaded - seen}"

import jax.numpy
from jax._src.xla_bridge import backends_are_initialized

assert not backends_are_initialized(), "an import starts a JAX backend"
jax.numpy.zeros(1)
assert backends_are_initialized()
"""


def test_layers_and_devices():
    """`sims` may import `models`, which may import `dynamics`; arrays are made by calls alone."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
