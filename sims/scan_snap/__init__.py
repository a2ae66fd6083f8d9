"""Simulations of Scan and Snap."""
