"""Non-contrastive learning: why linear BYOL does not collapse, its aligned modes and their phase line."""

from dynamics.noncontrastive.byol import ByolWeights as ByolWeights
from dynamics.noncontrastive.byol import balance as balance
from dynamics.noncontrastive.byol import byol_flow as byol_flow
from dynamics.noncontrastive.byol import no_predictor_flow as no_predictor_flow
from dynamics.noncontrastive.byol import no_stop_gradient_flow as no_stop_gradient_flow
from dynamics.noncontrastive.isotropic import Correlation as Correlation
from dynamics.noncontrastive.isotropic import alignment_matrix as alignment_matrix
from dynamics.noncontrastive.isotropic import isotropic_flow as isotropic_flow
from dynamics.noncontrastive.measures import PredictorMeasures as PredictorMeasures
from dynamics.noncontrastive.measures import predictor_measures as predictor_measures
from dynamics.noncontrastive.modes import FixedPoints as FixedPoints
from dynamics.noncontrastive.modes import Modes as Modes
from dynamics.noncontrastive.modes import collapse_threshold as collapse_threshold
from dynamics.noncontrastive.modes import decoupled_flow as decoupled_flow
from dynamics.noncontrastive.modes import fixed_points as fixed_points
from dynamics.noncontrastive.modes import phase_velocity as phase_velocity
