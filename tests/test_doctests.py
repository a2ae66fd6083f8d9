"""The examples in the docstrings run and say what they print."""

import doctest
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

ROOT = Path(__file__).parent.parent
PROMPT = re.compile(r"^ *>>> ", re.MULTILINE)
FILES = [
    file
    for package in ("dynamics", "models", "sims")
    for file in sorted((ROOT / package).rglob("*.py"))
    if PROMPT.search(file.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_examples_run(file):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "optax": optax}
    tests = [test for test in doctest.DocTestFinder().find(module, extraglobs=names) if test.examples]
    # A decorator that hides a function from the finder would hide its example.
    written = len(PROMPT.findall(file.read_text(encoding="utf-8")))
    assert sum(len(test.examples) for test in tests) == written
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    told: list[str] = []
    for test in tests:
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)
