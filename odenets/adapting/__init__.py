"""Networks as they are, torchvision's, timm's, Hugging Face's or one's own, as explicit Euler steps with h = 1.

:func:`~odenets.adapt` finds their residual additions in the program of one batch; where the states of each pass is a
:class:`BlockSpec`.
"""

from odenets.adapting.adaptation import adapt
from odenets.adapting.adapted import AdaptedModel
from odenets.adapting.blocks import BlockSpec, Samples
from odenets.adapting.program.places import Place
from odenets.adapting.rules import RULES, Rule, find_blocks

__all__ = ["RULES", "AdaptedModel", "BlockSpec", "Place", "Rule", "Samples", "adapt", "find_blocks"]
