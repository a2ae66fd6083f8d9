"""Collapse: minima of regularized networks, their landscapes, and the order of their transitions.

where                                       one call that reads a data matrix: thresholds, and what survives
moments, Moments                            second moments of data, which all of the theory takes
ridge_minimum, two_layer_minimum            exact minima of linear networks with L2 regularization and noise
deep_minimum, nuclear_minimum               the same at any depth, and for several outputs
critical_gamma, metastable_gamma            where everything is gone, and until where networks hold on
transition_order, effective_landscape       the order of a transition, and the loss over one amplitude
stochastic_linear_loss, ..._flow            the loss of a linear network with noise, and descent on it
imbalance, hysteresis_sweep                 what descent keeps, and what lowering gamma brings back
vae_minimum, vae_modes                      posterior collapse: minima, and the modes of data that decide
linear_vae_loss, linear_vae_flow            the loss of a linear variational autoencoder, and descent on it
infonce_minimum, infonce_encoder            dimensional collapse: minima of InfoNCE on Gaussian data
infonce_loss, landau_loss, landau_minimum   that loss, and its quartic form with its minimum
taylor_coefficients                         orders of a loss along a ray of embeddings
hessian_index                               how many directions lead down from a stationary point
rescaled_loss, rescaled_curvature           a network's loss on the way to collapse, and its curvature at zero
sgd_lyapunov, sampled_sgd_lyapunov          exponents of SGD at zero
sgd_collapse_windows                        learning rates at which SGD stays there
critical_amplitude                          slowing down near the critical strength
gibbs_mean, escape_rate                     moments and escape times under gradient descent with noise
relu_critical_gamma                         the critical strength of a two-layer ReLU network
features_minimum                            the unconstrained-features model of neural collapse
"""

from dynamics.collapse.critical import critical_gamma as critical_gamma
from dynamics.collapse.critical import metastable_gamma as metastable_gamma
from dynamics.collapse.critical import transition_order as transition_order
from dynamics.collapse.features import features_minimum as features_minimum
from dynamics.collapse.landscape import hessian_index as hessian_index
from dynamics.collapse.landscape import rescaled_curvature as rescaled_curvature
from dynamics.collapse.landscape import rescaled_loss as rescaled_loss
from dynamics.collapse.langevin import critical_amplitude as critical_amplitude
from dynamics.collapse.langevin import escape_rate as escape_rate
from dynamics.collapse.langevin import gibbs_mean as gibbs_mean
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
from dynamics.collapse.relu import ReluCritical as ReluCritical
from dynamics.collapse.relu import relu_critical_gamma as relu_critical_gamma
from dynamics.collapse.selfsupervised import InfonceMinimum as InfonceMinimum
from dynamics.collapse.selfsupervised import LandauMinimum as LandauMinimum
from dynamics.collapse.selfsupervised import infonce_encoder as infonce_encoder
from dynamics.collapse.selfsupervised import infonce_loss as infonce_loss
from dynamics.collapse.selfsupervised import infonce_minimum as infonce_minimum
from dynamics.collapse.selfsupervised import landau_loss as landau_loss
from dynamics.collapse.selfsupervised import landau_minimum as landau_minimum
from dynamics.collapse.sgd import SampledExponent as SampledExponent
from dynamics.collapse.sgd import sampled_sgd_lyapunov as sampled_sgd_lyapunov
from dynamics.collapse.sgd import sgd_collapse_windows as sgd_collapse_windows
from dynamics.collapse.sgd import sgd_lyapunov as sgd_lyapunov
from dynamics.collapse.taylor import taylor_coefficients as taylor_coefficients
from dynamics.collapse.vae import VaeMinimum as VaeMinimum
from dynamics.collapse.vae import VaeWeights as VaeWeights
from dynamics.collapse.vae import linear_vae_flow as linear_vae_flow
from dynamics.collapse.vae import linear_vae_loss as linear_vae_loss
from dynamics.collapse.vae import vae_minimum as vae_minimum
from dynamics.collapse.vae import vae_modes as vae_modes
from dynamics.collapse.where import Unit as Unit
from dynamics.collapse.where import Where as Where
from dynamics.collapse.where import where as where
