"""Helpers shared by the tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """Collect the names of the programs that JAX compiles inside the block."""
    names: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("Compiling "):
                names.append(message.split()[1])

    logger = logging.getLogger("jax")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collect()], False
    try:
        with jax.log_compiles(True):
            yield names
    finally:
        logger.handlers, logger.propagate = handlers, propagate
