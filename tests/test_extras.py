"""Installs with some of the dependencies: folders of links to them, and nothing else on the path."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
COMMAND = ROOT / "odenets" / "command"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BY_TASK = ("training", "detection", "transport", "plot", "images", "command")


def own(extra):
    """Distributions that an extra of ours lists, by itself or by another of our extras."""
    names = set()
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            names |= set().union(*map(own, requirement.extras))
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def with_theirs(names):
    """Distributions, and what they depend on."""
    complete, queue = set(), [Requirement(name) for name in names]
    while queue:
        wanted = queue.pop()
        for extra in {"", *wanted.extras}:
            if (each := (canonicalize_name(wanted.name), extra)) not in complete:
                complete.add(each)
                theirs = map(Requirement, distribution(wanted.name).requires or ())
                queue += [r for r in theirs if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in complete}


CORE = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}


def printed(folder, names, code, packages=("odenets", "solvers")):
    """What an interpreter prints that finds these distributions and our packages alone."""
    for name in with_theirs(names):
        files = distribution(name)
        for top in {file.parts[0] for file in files.files or ()} - {"..", "__pycache__"}:
            (folder / top).exists() or (folder / top).symlink_to(files.locate_file(top))
    for package in packages:
        (folder / package).symlink_to(ROOT / package)
    script = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(folder)!r})\n{code}"]
    run = subprocess.run(script, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def import_all(package):
    """Code that imports every module of a package but those of the command, which looks for its libraries first."""
    files = [path for path in (ROOT / package).rglob("*.py") if COMMAND not in path.parents]
    return f"""
import importlib, pkgutil, sys, {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not module.name.startswith("odenets.command"):
        importlib.import_module(module.name)
assert {len(files)} == len([name for name in sys.modules if name.startswith("{package}") and "command" not in name])
"""


# what needs an extra: the package that a bare install lacks first, the extra, and code
USES = {
    "fit": ("lightning_fabric", "training", "odenets.training.fit(net, data, epochs=1, optimizer=optimizer)"),
    "save_weights": ("safetensors", "training", "odenets.save_weights(net, 'weights')"),
    "load_weights": ("safetensors", "training", "odenets.load_weights(net, 'weights')"),
    "load": ("sklearn", "training", "odenets.training.load('digits')"),
    "points": ("sklearn", "training", "odenets.training.points('moons', 10, 0)"),
    "split": ("sklearn", "training", "odenets.training.hold_out(points, 0.5)"),
    "wasserstein": ("ot", "transport", "odenets.transport.wasserstein(points.x, 1 + points.x)"),
    "blocks_by_samples": (
        "matplotlib",
        "plot",
        "odenets.plotting.blocks_by_samples(odenets.Records({'a': torch.rand(2, 3)}))",
    ),
    "histograms": ("matplotlib", "plot", "odenets.plotting.histograms({'a': {'b': array}}, xlabel='')"),
    "to_dataframe": ("pandas", "plot", "net.record(points.x, action=odenets.measures.action)[1].to_dataframe()"),
    "load_images": (
        "torchvision",
        "images",
        "import contextlib\nwith contextlib.suppress(FileNotFoundError):\n    odenets.training.load('mnist', '.')",
    ),
    "Detector": ("sklearn", "detection", "odenets.detection.Detector()"),
    "preset": ("art", "detection", "odenets.detection.preset('FGM', eps=0.1)"),
    "run_attack": ("art", "detection", "odenets.detection.run_attack(images, 'FGM', torch.rand(2, 1, 8, 8), label)"),
    "save": ("sklearn", "detection", "odenets.detection.Pipeline(images).save('detector')"),
    "odenets info": ("rich", "command", "odenets.command.main()"),
}
SETTING = """
import json, sys, torch, odenets, odenets.command
sys.argv = ["odenets", "info"]
net = odenets.models.points_network()
points = odenets.training.TensorData(torch.randn(8, 2), torch.arange(8) % 2)
data = odenets.training.Batches(points, 2)
net(points.x)
images, label, array = odenets.models.small_network().eval(), torch.tensor([0, 1]), torch.randn(9).numpy()
images(torch.rand(2, 1, 8, 8))
optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1)
results = {}
for name, use in USES.items():
    try:
        exec(use)
        results[name] = "works"
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
    except SystemExit as end:  # of the command, with an error or with 0
        results[name] = f"Exit: {end}" if end.code else "works"
print(json.dumps(results))
"""


def tried(folder, names, uses, before=""):
    code = SETTING.replace("USES", repr({name: USES[name][2] for name in uses}))
    return json.loads(printed(folder, names, before + code)[-1])


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Every module is imported, and then each use is tried."""
    return tried(tmp_path_factory.mktemp("bare"), CORE, USES, import_all("odenets"))


@pytest.mark.parametrize(("name", "library", "extra"), [(name, *use[:2]) for name, use in USES.items()])
def test_a_bare_install_says_which_extra_is_lacking(bare, name, library, extra):
    remedy = f"{library} is needed here and not installed: pip install 'odenets[{extra}]'"
    assert bare[name] == ("Exit: Error: " if extra == "command" else "ModuleNotFoundError: ") + remedy


@pytest.mark.slow
def test_solvers_import_with_torch_and_numpy_alone(tmp_path):
    assert printed(tmp_path, {"torch", "numpy"}, import_all("solvers"), ["solvers"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("extra", BY_TASK)
def test_an_extra_is_enough(tmp_path, extra):
    uses = [name for name, use in USES.items() if use[1] == extra]
    assert uses
    assert tried(tmp_path, CORE | own(extra), uses) == dict.fromkeys(uses, "works")


def optional_imports(tree, extra=None):
    """Imports that run, each with the extra of the ``needs`` around it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (each for child in node.orelse for each in optional_imports(child, extra))
        elif isinstance(node, ast.With) and (called := re.match(r"needs\('(\w+)'\)", ast.unparse(node.items[0]))):
            yield from optional_imports(node, called[1])
        elif isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], extra) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], extra
        else:
            yield from optional_imports(node, extra)


@cache
def needed():
    """The distributions that the library imports: file, those that offer the import, and the extra that it names."""
    offering, needed = packages_distributions(), []
    for path in sorted((ROOT / "odenets").rglob("*.py")):
        for name, extra in optional_imports(ast.parse(path.read_text())):
            if name not in {*sys.stdlib_module_names, "odenets", "solvers"}:
                names = {canonicalize_name(each) for each in offering.get(name, [name])}
                of = extra or ("command" if COMMAND in path.parents and not names & CORE else None)
                needed.append((path.relative_to(ROOT).as_posix(), names, of))
    return needed


def test_what_needs_names_is_in_its_extra():
    assert not [each for each in needed() if not each[1] & (CORE | own(each[2]) if each[2] else CORE)]


def test_an_extra_by_task_holds_nothing_that_is_not_needed():
    for extra in BY_TASK:
        assert own(extra) <= set().union(*(names for _, names, named in needed() if named == extra))


def test_all_is_every_extra_by_task():
    assert own("all") == set().union(*map(own, BY_TASK))
    assert own("all") < own("experiments") < own("dev")


def test_extras_that_share_a_package_ask_for_the_same_version():
    wanted = {}
    for requirement in (Requirement(line) for lines in EXTRAS.values() for line in lines):
        if requirement.name != PROJECT["name"]:
            wanted.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    assert not {name: versions for name, versions in wanted.items() if len(versions) > 1}
