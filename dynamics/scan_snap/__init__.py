"""Scan and Snap: how one attention layer scans its context for distinct tokens and then snaps onto them."""

from dynamics.scan_snap.classes import SequenceClasses as SequenceClasses
from dynamics.scan_snap.classes import common_tokens as common_tokens
from dynamics.scan_snap.classes import context_distribution as context_distribution
from dynamics.scan_snap.classes import distinct_entropy as distinct_entropy
from dynamics.scan_snap.classes import distinct_tokens as distinct_tokens
from dynamics.scan_snap.classes import log_context_weights as log_context_weights
from dynamics.scan_snap.classes import require_tokens as require_tokens
from dynamics.scan_snap.closed_forms import attention_growth as attention_growth
from dynamics.scan_snap.closed_forms import attention_growth_printed as attention_growth_printed
from dynamics.scan_snap.closed_forms import attention_growth_scanning as attention_growth_scanning
from dynamics.scan_snap.closed_forms import attention_growth_snapping as attention_growth_snapping
from dynamics.scan_snap.closed_forms import crossover_time as crossover_time
from dynamics.scan_snap.closed_forms import decoder_margin as decoder_margin
from dynamics.scan_snap.closed_forms import log_relative_gain as log_relative_gain
from dynamics.scan_snap.closed_forms import log_relative_gain_closed_form as log_relative_gain_closed_form
from dynamics.scan_snap.flows import Weights as Weights
from dynamics.scan_snap.flows import attended_features as attended_features
from dynamics.scan_snap.flows import class_overlap as class_overlap
from dynamics.scan_snap.flows import fast_decoder_flow as fast_decoder_flow
from dynamics.scan_snap.flows import growth_rate as growth_rate
from dynamics.scan_snap.flows import loss_gradient as loss_gradient
from dynamics.scan_snap.flows import population_field as population_field
from dynamics.scan_snap.flows import population_flow as population_flow
from dynamics.scan_snap.flows import row_sums as row_sums
from dynamics.scan_snap.flows import weak_correlation_flow as weak_correlation_flow
from dynamics.scan_snap.flows import weak_growth_rate as weak_growth_rate
