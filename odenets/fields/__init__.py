"""Velocity fields ``v(t, x)``: networks whose output has the shape of the state."""

from odenets.fields.convolution import ConvField
from odenets.fields.default import field_for
from odenets.fields.perceptron import MLPField
from odenets.fields.resnext import ResNeXtField
from odenets.fields.velocity_field import VelocityField, reset_modules

__all__ = ["ConvField", "MLPField", "ResNeXtField", "VelocityField", "field_for", "reset_modules"]
