"""Velocity fields ``v(t, x)``: networks whose output has the shape of the state.

:func:`make` makes those of images by :func:`names`.
"""

from odenets.fields.antisymmetric import AntisymmetricField
from odenets.fields.attention import AttentionField, FeedForwardField
from odenets.fields.basic import BasicField
from odenets.fields.bottleneck import BottleneckField
from odenets.fields.by_name import make, names
from odenets.fields.convnext import ConvNeXtField
from odenets.fields.convolution import ConvField
from odenets.fields.default import field_for
from odenets.fields.fixup_branch import FixupField
from odenets.fields.inverted import InvertedField
from odenets.fields.perceptron import MLPField
from odenets.fields.resnext import ResNeXtField
from odenets.fields.scaled import ScaledField
from odenets.fields.symmetric import SymmetricField
from odenets.fields.velocity_field import VelocityField, reset_modules

__all__ = [
    "AntisymmetricField",
    "AttentionField",
    "BasicField",
    "BottleneckField",
    "ConvField",
    "ConvNeXtField",
    "FeedForwardField",
    "FixupField",
    "InvertedField",
    "MLPField",
    "ResNeXtField",
    "ScaledField",
    "SymmetricField",
    "VelocityField",
    "field_for",
    "make",
    "names",
    "reset_modules",
]
