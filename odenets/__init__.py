"""Residual networks as explicit Runge-Kutta integrators over learned velocity fields."""

from importlib.metadata import PackageNotFoundError, version

from odenets import fields, measures, models
from odenets.adapting import AdaptedModel, adapt
from odenets.blocks import Block
from odenets.checkpoints import load_weights, save_weights
from odenets.fields import ConvField, MLPField
from odenets.flow import Flow
from odenets.initialization import initialize
from odenets.network import Network
from odenets.normalization import recalibrate
from odenets.recording import Recorder, Records

__all__ = [
    "AdaptedModel",
    "Block",
    "ConvField",
    "Flow",
    "MLPField",
    "Network",
    "Recorder",
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

try:
    __version__ = version("odenets")
except PackageNotFoundError:  # run from its sources
    __version__ = "unknown"
