"""Replicator dynamics, classical and as softmax attention follows it under gradient descent."""
