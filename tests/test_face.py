"""``import odenets``: what it offers, what it loads, and what it says of names that it has not."""

import ast
import copy
import importlib
import inspect
import json
import pickle
import pkgutil
import pydoc
import re
import subprocess
import sys
import traceback
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import odenets
import solvers

ROOT = Path(__file__).parent.parent
FACE = {
    "AdaptedModel", "Block", "ConvField", "Flow", "MLPField", "Network", "NeuralODE", "Recorder", "Records",
    "ReversibleFlow", "adapt", "fields", "initialize", "load_weights", "measures", "models", "recalibrate",
    "save_weights",
}  # fmt: skip
ROOMS = {
    "adapting", "analysis", "depth", "detection", "fixup", "least_action", "maximum_principle", "module_wise",
    "normalization", "penalties", "plotting", "recording", "schemes", "training", "transport",
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
        if module.name != "__main__":
            assert getattr(odenets, module.name) is importlib.import_module(f"odenets.{module.name}")


def test_type_checkers_and_freezers_read_of_the_same_names():
    """In imports of the source that never run."""
    nodes = [
        node for node in ast.walk(ast.parse(Path(odenets.__file__).read_text())) if isinstance(node, ast.ImportFrom)
    ]
    nodes = [node for node in nodes if node.level or str(node.module).startswith("odenets")]
    imported = {alias.name: node.module for node in nodes for alias in node.names}
    assert set(imported) == FACE | ROOMS
    for name, home in imported.items():
        assert home is None or getattr(importlib.import_module(home), name) is getattr(odenets, name)


def test_no_name_is_that_of_a_module_too():
    """An import of the module would put it in the place of the function."""
    rooms = {module.name for module in pkgutil.iter_modules(odenets.__path__)}
    assert rooms & FACE == {name for name in FACE if isinstance(getattr(odenets, name), ModuleType)}


def test_an_import_loads_nothing_else_and_its_names_nothing_but_torch_numpy_and_einops():
    alone, names, rooms = printed("""
import sys
def loaded(before):
    found = {name.partition(".")[0] for name in set(sys.modules) - before}
    return {name for name in found - sys.stdlib_module_names - {"einops"} if not name.startswith("_sysconfigdata")}
before = set(sys.modules)
import odenets
print(*loaded(before))
import torch, numpy, einops
before = set(sys.modules)
from odenets import *
print(*sorted(loaded(before)))
for room in dir(odenets):
    room == "detection" or getattr(odenets, room)  # whose detectors are scikit-learn's
print(*sorted(loaded(before)))
""")
    assert alone == "odenets"
    assert names == rooms == "odenets solvers"


@pytest.mark.slow
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
    "name", ["AdaptiveDepth", "Batches", "Detector", "LeastAction", "Pipeline", "Step", "evaluate", "fit",
             "fit_modules", "integrate", "odeint", "split_into_modules"],
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


GENERATED = {"_build", "gallery"}
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    "tests/README.md",
    *(
        page.relative_to(ROOT).as_posix()
        for page in (ROOT / "docs").rglob("*.md")
        if not {"_build", "gallery"} & set(page.parts)
    ),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_in_a_document_is_there(document):
    text = (ROOT / document).read_text()
    text = re.sub(r"^\+.*$", "", text, flags=re.MULTILINE)  # what a change of CONTRIBUTING adds
    for name in set(re.findall(r"(?<![\w.])(?:odenets|solvers)(?:\.(?!md\b)[A-Za-z_]\w*)+", text)):
        resolve(name)
    for package, names in set(re.findall(r"from ((?:odenets|solvers)[\w.]*) import ([\w, ]+)", text)):
        for name in names.split(","):
            resolve(f"{package}.{name.split()[0]}")


def references(node, scopes):
    """What docstrings refer to, each with what it may be an attribute of: the module, the classes around."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from references(child, [*scopes, getattr(scopes[-1], child.name, None)])
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        for name in re.findall(r":(?!attr)\w+:`~?([\w.]+)`", ast.get_docstring(node) or ""):
            yield name, scopes


@pytest.mark.parametrize("package", [odenets, solvers])
def test_every_name_that_a_docstring_refers_to_is_there(package):
    """By its path, as an attribute of what is around, or as a public name of a room, as the reference looks for it."""
    packages = SimpleNamespace(odenets=odenets, solvers=solvers)
    rooms = [getattr(odenets, room) for room in sorted(ROOMS)]
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, scopes in references(ast.parse(inspect.getsource(module)), [packages, *rooms, module]):
            assert any(reaches(scope, name) for scope in scopes), (info.name, name)


def reaches(scope, name):
    try:
        return attrgetter(name)(scope) is not None
    except AttributeError:
        return False


@pytest.mark.parametrize(
    "name",
    [
        "odenets.AdaptedModel",
        "odenets.depth.DepthReport",
        "odenets.module_wise.LocalModule",
        "odenets.transport.wasserstein",
        "solvers.Solution.x1",
        "solvers.Tolerance",
    ],
)
def test_names_that_stay(name):
    resolve(name)
    assert hasattr(odenets.least_action.LeastAction(), "multiplier")


@pytest.mark.slow
def test_threads_may_use_all_of_it_at_once():
    lines = printed("""
import sys, threading
import odenets
sys.setswitchinterval(1e-6)
names = 2 * dir(odenets)
start, failed = threading.Barrier(len(names)), []
def use(name):
    start.wait()
    try:
        getattr(odenets, name)
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=use, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failed)
""")
    assert lines == ["[]"]


@pytest.mark.slow
def test_no_import_warns():
    assert (
        printed("from odenets import *; import odenets; odenets.training.fit; odenets.module_wise", "-W", "error") == []
    )


def test_a_reload_keeps_classes():
    flow, room = odenets.Flow(), odenets.training
    importlib.reload(odenets)
    assert isinstance(flow, odenets.Flow)
    assert odenets.training is room


@pytest.mark.slow
def test_objects_are_copied_and_pickled_and_read_where_nothing_is_loaded(tmp_path):
    network = odenets.models.points_network()
    x = torch.randn(3, 2)
    torch.testing.assert_close(copy.deepcopy(network)(x).shape, network(x).shape)
    content = pickle.dumps((odenets.MLPField(2), odenets.training.Batches, odenets.least_action.LeastAction()))
    (tmp_path / "pickled").write_bytes(content)
    lines = printed(f"import pickle; print(*map(repr, pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb'))))")
    assert "odenets.training.data.Batches" in " ".join(lines)


@pytest.mark.slow
def test_a_compiler_takes_a_name_that_is_not_loaded_yet():
    lines = printed("""
import torch, odenets
odenets.Flow
calls = torch.compile(lambda x: x + len(odenets.transport.__all__), backend="eager", fullgraph=True)
print(calls(torch.zeros(1)).item() > 0)
""")
    assert lines == ["True"]


def test_a_module_that_breaks_while_it_loads_is_not_a_missing_name(monkeypatch):
    monkeypatch.delitem(vars(odenets), "transport", raising=False)
    broken = AttributeError("module 'torch' has no attribute 'linalgebra'")

    def import_module(name):
        raise broken

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(
        ImportError, match=r"odenets.transport does not load: module 'torch' has no attribute"
    ) as raised:
        odenets.transport  # noqa: B018
    assert raised.value.__cause__ is broken


@pytest.mark.slow
def test_a_type_checker_knows_the_names_and_no_others(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import odenets
from odenets import Flow, Network, measures, training
from typing_extensions import assert_type

reveal_type(odenets.training.fit)
reveal_type(odenets.models.resnet9())
assert_type(odenets.Flow(), Flow)
assert_type(odenets.__version__, str)
odenets.detection.Pipeline, odenets.least_action.LeastAction, odenets.depth, odenets.module_wise.fit_modules
odenets.analysis, odenets.plotting, odenets.transport.wasserstein, odenets.measures.action
odenets.fitt
""")
    command = [sys.executable, "-m", "pyright", "--outputjson", str(script)]
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout)
    messages = [each["message"] for each in report["generalDiagnostics"] if each["severity"] == "error"]
    assert messages == ['"fitt" is not a known attribute of module "odenets"']
    assert 'Type of "odenets.models.resnet9()" is "Network"' in str(report)


def test_help_lists_the_face():
    text = pydoc.render_doc(odenets, renderer=pydoc.plaintext)
    assert all(name in text for name in FACE)
