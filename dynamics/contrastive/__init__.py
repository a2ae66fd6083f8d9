"""Contrastive learning: losses with one energy, its min player, and the networks that ascend it."""

from dynamics.contrastive.energy import contrastive_covariance as contrastive_covariance
from dynamics.contrastive.energy import contrastive_energy as contrastive_energy
from dynamics.contrastive.family import Pairs as Pairs
from dynamics.contrastive.family import contrastive_pairs as contrastive_pairs
from dynamics.contrastive.family import pairwise_importance as pairwise_importance
from dynamics.contrastive.linear import PrincipalComponent as PrincipalComponent
from dynamics.contrastive.linear import aligned_flow as aligned_flow
from dynamics.contrastive.linear import balance as balance
from dynamics.contrastive.linear import deep_linear_energy as deep_linear_energy
from dynamics.contrastive.linear import deep_linear_flow as deep_linear_flow
from dynamics.contrastive.linear import deep_linear_maximum as deep_linear_maximum
from dynamics.contrastive.linear import encoder_flow as encoder_flow
from dynamics.contrastive.min_player import min_player as min_player
from dynamics.contrastive.patterns import gated_covariance as gated_covariance
from dynamics.contrastive.patterns import homogeneous_activation as homogeneous_activation
from dynamics.contrastive.patterns import pattern_coverage as pattern_coverage
from dynamics.contrastive.patterns import power_flow as power_flow
