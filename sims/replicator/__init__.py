"""Replicator dynamics of softmax attention."""
