"""Incremental rank: networks that depend on products of weights, at tiny initialization."""

from dynamics.incremental.flows import LogProducts as LogProducts
from dynamics.incremental.flows import Products as Products
from dynamics.incremental.flows import canonical_start as canonical_start
from dynamics.incremental.flows import conserved_quantity as conserved_quantity
from dynamics.incremental.flows import log_flow as log_flow
from dynamics.incremental.flows import negative_gradient as negative_gradient
from dynamics.incremental.flows import raw_flow as raw_flow
from dynamics.incremental.greedy import GreedyPath as GreedyPath
from dynamics.incremental.greedy import greedy as greedy
from dynamics.incremental.greedy import time_until_active as time_until_active
from dynamics.incremental.staircase import jump_times as jump_times
from dynamics.incremental.staircase import staircase as staircase
from dynamics.incremental.staircase import staircase_distance as staircase_distance
