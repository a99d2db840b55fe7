"""Residual networks as explicit Runge-Kutta integrators over learned velocity fields."""

from odenets import fields, measures, models
from odenets.adapting import Adapted, adapt
from odenets.checkpoints import load_weights, save_weights
from odenets.fields import ConvField, MLPField
from odenets.flow import Block, Flow, Records
from odenets.initialization import initialize
from odenets.network import Network
from odenets.normalization import recalibrate

__all__ = [
    "Adapted",
    "Block",
    "ConvField",
    "Flow",
    "MLPField",
    "Network",
    "Records",
    "adapt",
    "fields",
    "initialize",
    "load_weights",
    "measures",
    "models",
    "recalibrate",
    "save_weights",
]
