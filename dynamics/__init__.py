"""Theories of training dynamics: pure functions that integrate them. Imports nothing of models or sims."""

from dynamics import workarounds

workarounds.apply()
