"""Networks as they are, torchvision's and timm's, as explicit Euler steps with h = 1."""

from odenets.adapting.adapted import AdaptedModel, adapt
from odenets.adapting.blocks import RULES, Place, Rule, find_blocks

__all__ = ["RULES", "AdaptedModel", "Place", "Rule", "adapt", "find_blocks"]
