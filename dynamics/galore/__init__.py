"""Low-rank gradients: their linear dynamics, a bound on their stable rank, descent in a fixed subspace."""

from dynamics.galore.gradient import GradientTerms as GradientTerms
from dynamics.galore.gradient import gradient_iterates as gradient_iterates
from dynamics.galore.gradient import gradient_operator as gradient_operator
from dynamics.galore.gradient import reversible_gradient as reversible_gradient
from dynamics.galore.gradient import reversible_terms as reversible_terms
from dynamics.galore.projection import ProjectedDescent as ProjectedDescent
from dynamics.galore.projection import contraction_factor as contraction_factor
from dynamics.galore.projection import projected_coefficients as projected_coefficients
from dynamics.galore.projection import projected_descent as projected_descent
from dynamics.galore.stable_rank import SlowSplit as SlowSplit
from dynamics.galore.stable_rank import bound_counterexample as bound_counterexample
from dynamics.galore.stable_rank import slow_split as slow_split
from dynamics.galore.stable_rank import stable_rank_bound as stable_rank_bound
