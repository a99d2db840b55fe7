"""Known networks as compositions of fields and flows: each is a :class:`~odenets.Network`, with weights drawn anew.

All take ``in_channels`` of images and ``classes``; ``norm``, the normalization of the fields; ``normalize``, a first
layer, so that inputs are pixels in [0, 1]; ``readout``, as :class:`~odenets.Network` does; and the arguments of each
:class:`~odenets.Flow`. Every block has h = 1 unless told otherwise, whatever the method, so that the total time is the
depth; the method of residual networks is Euler's.
"""

from odenets.models.bottlenecks import resnet50
from odenets.models.by_scheme import network
from odenets.models.convnext import convnext
from odenets.models.listing import list_models as list
from odenets.models.mobilenet import mobilenet_v2
from odenets.models.normalize import Normalize
from odenets.models.resnets import resnet9, resnet110, resnet_km, wide_resnet
from odenets.models.resnext import resnext50
from odenets.models.small import points_network, small_network
from odenets.models.vision_transformer import vit

__all__ = [
    "Normalize",
    "convnext",
    "list",
    "mobilenet_v2",
    "network",
    "points_network",
    "resnet9",
    "resnet50",
    "resnet110",
    "resnet_km",
    "resnext50",
    "small_network",
    "vit",
    "wide_resnet",
]
