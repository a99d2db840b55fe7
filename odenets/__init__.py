"""Residual networks as explicit Runge-Kutta integrators over learned velocity fields.

``import odenets`` loads nothing else: every name here, and every module of the package, such as
``odenets.training.fit``, loads on its first use (PEP 562). ``dir(odenets)`` lists them.
"""

from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (  # noqa: F401  # isort: skip
        adapting, analysis, depth, detection, fields, fixup, least_action, maximum_principle, measures, models,
        module_wise, normalization, penalties, plotting, recording, schemes, training, transport,
    )  # fmt: skip
    from odenets.adapting import AdaptedModel, adapt
    from odenets.blocks import Block
    from odenets.checkpoints import load_weights, save_weights
    from odenets.fields import ConvField, MLPField
    from odenets.flow import Flow
    from odenets.initialization import initialize
    from odenets.network import Network
    from odenets.neural_ode import NeuralODE
    from odenets.normalization import recalibrate
    from odenets.recording import Recorder
    from odenets.records import Records
    from odenets.reversible_flow import ReversibleFlow

    __version__: str

__all__ = [
    "AdaptedModel",
    "Block",
    "ConvField",
    "Flow",
    "MLPField",
    "Network",
    "NeuralODE",
    "Recorder",
    "Records",
    "ReversibleFlow",
    "adapt",
    "fields",
    "initialize",
    "load_weights",
    "measures",
    "models",
    "recalibrate",
    "save_weights",
]

_HOMES = {
    "AdaptedModel": "adapting",
    "Block": "blocks",
    "ConvField": "fields",
    "Flow": "flow",
    "MLPField": "fields",
    "Network": "network",
    "NeuralODE": "neural_ode",
    "Recorder": "recording",
    "Records": "records",
    "ReversibleFlow": "reversible_flow",
    "adapt": "adapting",
    "initialize": "initialization",
    "load_weights": "checkpoints",
    "recalibrate": "normalization",
    "save_weights": "checkpoints",
}
_ROOMS = (
    "adapting", "analysis", "depth", "detection", "fixup", "least_action", "maximum_principle", "module_wise",
    "normalization", "penalties", "plotting", "recording", "schemes", "training", "transport",
)  # fmt: skip
_ELSEWHERE = {
    "AdaptiveDepth": "odenets.depth.AdaptiveDepth",
    "Batches": "odenets.training.Batches",
    "Detector": "odenets.detection.Detector",
    "ErrorPenalty": "odenets.penalties.ErrorPenalty",
    "LeastAction": "odenets.least_action.LeastAction",
    "Pipeline": "odenets.detection.Pipeline",
    "Step": "solvers.Step",
    "Tolerance": "solvers.Tolerance",
    "Trainer": "odenets.training.fit",
    "count_macs": "odenets.analysis.count_macs",
    "evaluate": "odenets.training.evaluate",
    "fit": "odenets.training.fit",
    "fit_modules": "odenets.module_wise.fit_modules",
    "integrate": "solvers.integrate",
    "odeint": "solvers.odeint",
    "split_into_modules": "odenets.module_wise.split_into_modules",
}

_LOADING = RLock()

if not TYPE_CHECKING:  # a type checker that sees this function takes every name for one of the package

    def __getattr__(name: str):
        from importlib.util import find_spec

        if name == "__version__":
            value = _version()
        elif name in _HOMES:
            value = getattr(_load(_HOMES[name]), name)
        elif name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return _load(name)  # which makes it an attribute
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_remedy(name)}", name=name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS, "__version__"})


def _load(name: str) -> ModuleType:
    """A module of the package; an AttributeError of its own is not that of a missing name."""
    from importlib import import_module

    try:
        with _LOADING:  # threads that load modules which need each other's would wait for each other
            return import_module(f"{__name__}.{name}")
    except AttributeError as error:
        raise ImportError(f"{__name__}.{name} does not load: {error}", name=f"{__name__}.{name}") from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("odenets")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def _remedy(name: str) -> str:
    from difflib import get_close_matches

    if name.startswith("_"):
        return ""
    if name in _ELSEWHERE:
        return f": it is {_ELSEWHERE[name]}"
    near = get_close_matches(name, [*__dir__(), *_ELSEWHERE], cutoff=0.7)
    return f": did you mean {' or '.join(_ELSEWHERE.get(n, f'odenets.{n}') for n in near)}?" if near else ""
