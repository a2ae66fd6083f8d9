"""Simulations of JoMA."""
