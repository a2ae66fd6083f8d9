"""Theories of training dynamics: pure functions that integrate them. Imports nothing of models or sims.

flow            trajectories, and the integration of any field (t, y, args) -> dy/dt
replicator      attention with a learned prompt as replicator dynamics; evolutionary games; conditioning
scan_snap       one-layer transformers on classes of sequences: attention scans, and then snaps
joma            the joint dynamics of an MLP and the attention below it: invariants, fields, rates
incremental     products of weights that learn one by one: greedy path, staircase, flows from tiny starts
galore          low-rank gradients: their form, the fall of their stable rank, descent in a fixed subspace
collapse        minima of regularized networks, their landscapes, and the order of their transitions
contrastive     one energy behind a family of contrastive losses: its min player, and networks that ascend it
noncontrastive  why linear BYOL does not collapse: its flows, its aligned modes and their phase line
spectra         what is measured on weight matrices, attention rows and subspaces
"""

from dynamics import workarounds

workarounds.apply()
