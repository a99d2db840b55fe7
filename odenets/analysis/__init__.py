"""What a network does and costs: iterative refinement by its blocks, and the memory of a call."""

from odenets.analysis.memory import Memory, memory
from odenets.analysis.refinement import Refinement, refinement

__all__ = ["Memory", "Refinement", "memory", "refinement"]
