"""Residual networks as explicit Runge-Kutta integrators over learned velocity fields."""

from odenets import fields, measures, models
from odenets.adapting import AdaptedModel, adapt
from odenets.checkpoints import load_weights, save_weights
from odenets.fields import ConvField, MLPField
from odenets.flow import Block, Flow
from odenets.initialization import initialize
from odenets.network import Network
from odenets.normalization import recalibrate
from odenets.recording import Records

__all__ = [
    "AdaptedModel",
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
