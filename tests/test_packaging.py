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
