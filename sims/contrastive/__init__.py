"""Contrastive learning: losses with one energy, its min player, and the networks that ascend it."""
