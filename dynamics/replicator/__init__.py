"""Replicator dynamics, classical and as softmax attention follows it under gradient descent."""

from dynamics.replicator.attention import LinearRate as LinearRate
from dynamics.replicator.attention import attention_lipschitz as attention_lipschitz
from dynamics.replicator.attention import coupled_flow as coupled_flow
from dynamics.replicator.attention import natural_gradient_flow as natural_gradient_flow
from dynamics.replicator.attention import overparametrized_rate as overparametrized_rate
from dynamics.replicator.attention import softmax_flow as softmax_flow
from dynamics.replicator.attention import softmax_jacobian_product as softmax_jacobian_product
from dynamics.replicator.attention import two_token_solution as two_token_solution
from dynamics.replicator.local import condition_bounds as condition_bounds
from dynamics.replicator.local import condition_number as condition_number
from dynamics.replicator.local import kkt_residual as kkt_residual
from dynamics.replicator.local import linearize as linearize
from dynamics.replicator.local import softmax_jacobian as softmax_jacobian
from dynamics.replicator.local import tangent_basis as tangent_basis
from dynamics.replicator.population import constant_fitness_solution as constant_fitness_solution
from dynamics.replicator.population import exponentiated_gradient as exponentiated_gradient
from dynamics.replicator.population import replicator_field as replicator_field
from dynamics.replicator.population import require_simplex as require_simplex
from dynamics.replicator.population import simulate as simulate
from dynamics.replicator.population import simulate_discrete as simulate_discrete
from dynamics.replicator.population import simulate_mutator as simulate_mutator
from dynamics.replicator.population import simulate_two_populations as simulate_two_populations
