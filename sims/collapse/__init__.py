"""Collapse of regularized networks: how much is left, at which regularization, and in which order it goes."""
