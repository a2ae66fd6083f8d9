"""The actual networks: Flax modules, their data and their training."""
