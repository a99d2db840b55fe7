"""``import odenets``: what it offers, what it loads, and what it says of names that it has not."""

import importlib
import pkgutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest

import odenets
import solvers

ROOT = Path(__file__).parent.parent
FACE = {
    "AdaptedModel", "Block", "ConvField", "Flow", "MLPField", "Network", "Recorder", "Records", "adapt", "fields",
    "initialize", "load_weights", "measures", "models", "recalibrate", "save_weights",
}  # fmt: skip
ROOMS = {
    "adapting", "analysis", "depth", "detection", "least_action", "module_wise", "normalization", "plotting",
    "training", "transport",
}  # fmt: skip


def printed(code, *options):
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_the_face_is_the_documented_one():
    assert set(odenets.__all__) == FACE
    assert set(dir(odenets)) == FACE | ROOMS | {"__version__"}
    assert all(getattr(odenets, name) is not None for name in dir(odenets))


def test_every_module_is_an_attribute():
    for module in pkgutil.iter_modules(odenets.__path__):
        assert getattr(odenets, module.name) is importlib.import_module(f"odenets.{module.name}")


def test_no_name_is_that_of_a_module_too():
    """An import of the module would put it in the place of the function."""
    rooms = {module.name for module in pkgutil.iter_modules(odenets.__path__)}
    assert rooms & FACE == {name for name in FACE if isinstance(getattr(odenets, name), ModuleType)}


def test_an_import_loads_nothing_else_and_its_names_nothing_but_torch_numpy_and_einops():
    alone, all_of_it = printed("""
import sys
before = set(sys.modules)
import odenets
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
import torch, numpy, einops
before = set(sys.modules)
from odenets import *
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names - {"einops"})
""")
    assert alone == "odenets"
    assert set(all_of_it.split()) <= {"odenets", "solvers"}


def test_what_walks_over_all_modules_loads_nothing():
    """As unittest's assertWarns, inspect and torch.package do."""
    lines = printed("""
import sys, odenets
before = set(sys.modules)
for module in list(sys.modules.values()):
    for name in ("__warningregistry__", "__wrapped__", "__file__", "__path__", "_fields", "__torch_function__"):
        getattr(module, name, None)
print(*(name for name in set(sys.modules) - before if name.startswith(("odenets", "solvers"))))
""")
    assert lines == [""]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("Flwo", ": did you mean odenets.Flow?"),
        ("netwrok", ": did you mean odenets.Network?"),
        ("least_actoin", ": did you mean odenets.least_action?"),
        ("fit", ": it is odenets.training.fit"),
        ("LeastActoin", ": did you mean odenets.least_action.LeastAction?"),
        ("Adapted", ": it is odenets.AdaptedModel"),
        ("xyzzy", ""),
        ("_Flow", ""),
        ("flow.Flow", ""),
        ("", ""),
    ],
)
def test_an_unknown_name_is_an_attribute_error_with_near_ones(name, remedy):
    with pytest.raises(AttributeError) as raised:
        getattr(odenets, name)
    assert str(raised.value) == f"module 'odenets' has no attribute {name!r}{remedy}"
    assert "".join(traceback.format_exception(raised.value)).lower().count("did you mean") <= 1
    assert not hasattr(odenets, name)


@pytest.mark.parametrize(
    "name", ["AdaptiveDepth", "Batches", "Detector", "LeastAction", "Pipeline", "Step", "data", "evaluate", "fit",
             "fit_modules", "instances", "integrate", "memory", "objectives", "odeint", "refinement", "runs",
             "split_into_modules"],
)  # fmt: skip
def test_a_name_that_is_elsewhere_is_there(name):
    with pytest.raises(AttributeError, match=": it is ") as raised:
        getattr(odenets, name)
    resolve(str(raised.value).partition(": it is ")[2])


def resolve(path):
    """The object of a dotted name, from ``import odenets`` or ``import solvers`` alone."""
    value = {"odenets": odenets, "solvers": solvers}[path.split(".")[0]]
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value
