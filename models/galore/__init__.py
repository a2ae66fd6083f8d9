"""GaLore keeps optimizer states in the leading subspace of the gradient, as Optax transformations.

The package imports nothing else of this project, so that it can be lifted out.
"""

from .adam import scale_by_adam_8bit as scale_by_adam_8bit
from .kernels import flax_axes as flax_axes
from .layerwise import Layerwise as Layerwise
from .layerwise import Stack as Stack
from .layerwise import layerwise as layerwise
from .optimizer import galore as galore
from .report import Report as Report
from .report import report as report
from .transform import scale_by_galore as scale_by_galore
from .transform import state_bytes as state_bytes
