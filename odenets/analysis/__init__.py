"""What a network does and costs: iterative refinement by its blocks, and the memory of a call."""

from odenets.analysis.memory import Memory, measure_memory
from odenets.analysis.refinement import Refinement, iterative_refinement

__all__ = ["Memory", "Refinement", "iterative_refinement", "measure_memory"]
