"""Simulations of incremental rank."""
