import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import odenets

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_both_packages_and_no_tests(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"odenets", "solvers"}
    assert not [name for name in names if "test" in name or "conftest" in name]
    for package in ("odenets", "solvers"):
        tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert tracked <= set(names)
        assert f"{package}/py.typed" in names


def imports(path):
    """The modules a file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_imports_run_one_way():
    for path in (ROOT / "solvers").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= set(sys.stdlib_module_names) | {
            "torch",
            "numpy",
            "solvers",
        }
    for path in (ROOT / "odenets").rglob("*.py"):
        assert not {"experiments", "benchmarks", "tests"} & {name.split(".")[0] for name in imports(path)}


EXTRAS = ["lightning_fabric", "matplotlib", "ot", "safetensors", "scipy", "sklearn", "tabulate", "torchdiffeq"]
EXTRAS += ["art", "skops", "torchvision", "tqdm", "tyro"]


WITHOUT_EXTRAS = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({EXTRAS}))
import torch, odenets, odenets.training, solvers
"""


def run(code):
    script = [sys.executable, "-c", WITHOUT_EXTRAS + code]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_module_but_the_plots_is_there_without_the_extras():
    lines = run("""
for package in (odenets, solvers):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name, error)
""")
    assert lines == ["odenets.plotting matplotlib is needed here and not installed: pip install odenets[experiments]"]


@pytest.mark.parametrize(
    ("use", "library", "extra"),
    [
        ("odenets.training.fit(net, data, epochs=1, optimizer=sgd)", "lightning_fabric", "training"),
        ("odenets.save_weights(net, 'weights')", "safetensors", "training"),
        ("odenets.training.load('digits')", "sklearn", "experiments"),
        ("odenets.training.load('mnist')", "torchvision", "experiments"),
    ],
)
def test_what_lacks_an_extra_names_it_where_it_is_used(use, library, extra):
    lines = run(f"""
sgd = lambda network: torch.optim.SGD(network.parameters(), 0.1)
net = odenets.models.points_network()
points = odenets.training.TensorData("points", torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), 2, (0, 0), (1, 1))
data = odenets.training.Batches(points, 2)
net(points.x)
try:
    {use}
except ModuleNotFoundError as error:
    print(error)
""")
    assert lines == [f"{library} is needed here and not installed: pip install odenets[{extra}]"]


def test_only_plotting_imports_matplotlib():
    found = [p for p in (ROOT / "odenets").rglob("*.py") if any(n.startswith("matplotlib") for n in imports(p))]
    assert {path.relative_to(ROOT / "odenets").parts[0] for path in found} == {"plotting"}


def test_no_folder_but_ours_at_the_root():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert folders <= {"odenets", "solvers", "experiments", "tests", "benchmarks", "docs", ".ci"}


def test_the_version_is_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert odenets.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
