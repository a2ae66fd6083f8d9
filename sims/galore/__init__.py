"""Simulations of GaLore."""
