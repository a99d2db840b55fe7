"""Known networks as compositions of fields and flows."""

from odenets.models.normalize import Normalize
from odenets.models.resnets import resnet9, resnet110, resnet_km, wide_resnet
from odenets.models.resnext import resnext50
from odenets.models.small import points_network, small_network

__all__ = [
    "Normalize",
    "points_network",
    "resnet9",
    "resnet110",
    "resnet_km",
    "resnext50",
    "small_network",
    "wide_resnet",
]
