"""JoMA: joint dynamics of MLP and attention, its invariants and the reduced flows that follow."""

from dynamics.joma.attention import Kind as Kind
from dynamics.joma.attention import attend as attend
from dynamics.joma.attention import invariant as invariant
from dynamics.joma.attention import saliency as saliency
from dynamics.joma.attention import softmax_logits as softmax_logits
from dynamics.joma.mixture import Moments as Moments
from dynamics.joma.mixture import gaussian_moments as gaussian_moments
from dynamics.joma.mixture import isotropic_mixture_field as isotropic_mixture_field
from dynamics.joma.mixture import isotropic_moments as isotropic_moments
from dynamics.joma.mlp import Rescaled as Rescaled
from dynamics.joma.mlp import blow_up_time as blow_up_time
from dynamics.joma.mlp import modified_mlp_flow as modified_mlp_flow
from dynamics.joma.mlp import modified_mlp_solution as modified_mlp_solution
from dynamics.joma.mlp import rescaled_mlp_flow as rescaled_mlp_flow
from dynamics.joma.saturating import log_residual_flow as log_residual_flow
from dynamics.joma.saturating import onset_delay as onset_delay
from dynamics.joma.saturating import rate_ratio as rate_ratio
from dynamics.joma.saturating import saturating_flow as saturating_flow
