"""Collapse: minima of regularized networks, their landscapes, and the order of their transitions."""

from dynamics.collapse.critical import critical_gamma as critical_gamma
from dynamics.collapse.critical import metastable_gamma as metastable_gamma
from dynamics.collapse.critical import transition_order as transition_order
from dynamics.collapse.minima import DeepMinimum as DeepMinimum
from dynamics.collapse.minima import Ridge as Ridge
from dynamics.collapse.minima import TwoLayerMinimum as TwoLayerMinimum
from dynamics.collapse.minima import deep_minimum as deep_minimum
from dynamics.collapse.minima import effective_landscape as effective_landscape
from dynamics.collapse.minima import ridge_minimum as ridge_minimum
from dynamics.collapse.minima import two_layer_minimum as two_layer_minimum
from dynamics.collapse.moments import Moments as Moments
from dynamics.collapse.moments import moments as moments
from dynamics.collapse.network import Sweep as Sweep
from dynamics.collapse.network import hysteresis_sweep as hysteresis_sweep
from dynamics.collapse.network import imbalance as imbalance
from dynamics.collapse.network import stochastic_linear_flow as stochastic_linear_flow
from dynamics.collapse.network import stochastic_linear_loss as stochastic_linear_loss
from dynamics.collapse.nuclear import NuclearMinimum as NuclearMinimum
from dynamics.collapse.nuclear import nuclear_minimum as nuclear_minimum
