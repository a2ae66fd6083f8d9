"""Contrastive learning: a family of losses with one energy, and the min player that weights its pairs."""

from dynamics.contrastive.energy import contrastive_covariance as contrastive_covariance
from dynamics.contrastive.energy import contrastive_energy as contrastive_energy
from dynamics.contrastive.family import Pairs as Pairs
from dynamics.contrastive.family import contrastive_pairs as contrastive_pairs
from dynamics.contrastive.family import pairwise_importance as pairwise_importance
from dynamics.contrastive.min_player import min_player as min_player
