"""Networks as they are, torchvision's and timm's, as explicit Euler steps with h = 1: :func:`~odenets.adapt`.

Blocks are recognized by the names of their parts, :data:`RULES`, or named by hand; where the states of each pass is a
:class:`BlockSpec`.
"""

from odenets.adapting.adapted import AdaptedModel, adapt
from odenets.adapting.blocks import RULES, BlockSpec, Rule, find_blocks

__all__ = ["RULES", "AdaptedModel", "BlockSpec", "Rule", "adapt", "find_blocks"]
