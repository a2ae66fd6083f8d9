"""Simulations: a theory and a trained network on the same axes, with claims and a figure."""
