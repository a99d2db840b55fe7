"""What a network does and costs: its blocks' refinement and lesions, its gradients, multiplications, and memory.

>>> import torch
>>> from odenets.analysis import Memory, Refinement, count_macs, iterative_refinement, measure_memory
>>> from odenets.models import points_network
>>> network, x, y = points_network(depth=3), torch.rand(8, 2), torch.arange(8) % 2
>>> refinement: Refinement = iterative_refinement(network, [(x, y)])
>>> kept: Memory = measure_memory(lambda: network(x))  # with the graph of a forward pass
>>> refinement.cosine.shape, kept.left < kept.peak, count_macs(network, x) > 0
(torch.Size([3]), True, True)
"""

from odenets.analysis.gradients import ShatteredGradients, shattered_gradients
from odenets.analysis.lesions import Lesions, lesion_study, permuted_blocks, removed_blocks
from odenets.analysis.macs import count_macs
from odenets.analysis.memory import Memory, measure_memory
from odenets.analysis.refinement import Refinement, iterative_refinement

__all__ = [
    "Lesions",
    "Memory",
    "Refinement",
    "ShatteredGradients",
    "count_macs",
    "iterative_refinement",
    "lesion_study",
    "measure_memory",
    "permuted_blocks",
    "removed_blocks",
    "shattered_gradients",
]
