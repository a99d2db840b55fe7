import ast
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_string
from email.policy import default
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from trove_classifiers import classifiers

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def build(folder, kind):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def described(wheel):
    """The wheel's metadata, with README as PyPI shows it."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(files.read(name).decode(), policy=default)


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in names if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("odenets", "solvers")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours == sources
    assert {"odenets/py.typed", "solvers/py.typed"} <= ours
    assert {Path(name).suffix for name in ours} == {".py", ".typed"}
    assert not [name for name in names if "test" in name or "conftest" in name]
    information = {name.partition(".dist-info/")[2] for name in set(names) - ours}
    assert information == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_the_metadata_say_what_pypi_shows(described):
    assert described["Name"] == "odenets"
    assert described["License-Expression"] == "MIT"
    assert described["Requires-Python"] == PROJECT["requires-python"]
    assert set(described.get_all("Classifier")) == set(PROJECT["classifiers"]) <= set(classifiers)
    core = {Requirement(line).name for line in described.get_all("Requires-Dist") if "extra ==" not in line}
    assert core == {Requirement(line).name for line in PROJECT["dependencies"]}
    assert set(described.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_the_readme_on_pypi_leads_nowhere_that_is_not_there(described):
    page, readme = described.get_content(), (ROOT / "README.md").read_text()
    links = {link for pair in LINK.findall(CODE.sub("", page)) for link in pair if link}
    assert not {link for link in links if not link.startswith(("https://", "mailto:"))}
    assert "<picture" not in page
    assert CODE.findall(page) == CODE.findall(readme)  # the rules for links touch no code
    assert re.findall(r"^#.*", page, re.MULTILINE) == re.findall(r"^#.*", readme, re.MULTILINE)


@pytest.mark.slow
def test_the_sdist_is_a_checkout(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(build(tmp_path, "sdist")) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    tracked = {line for line in listed.stdout.splitlines() if (ROOT / line).exists() and not line.startswith(".ci/")}
    assert tracked <= names


@pytest.mark.slow
def test_the_wheel_works_far_from_its_sources(wheel, tmp_path):
    """Beside the packages that are here, without those of the checkout, what a user does first."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    steps = [python, "-I", ROOT / "tests" / "smoke.py", "core", "training"]
    run = subprocess.run(steps, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"works with odenets {PROJECT['version']}" in run.stdout


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
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    released = re.search(r"^## (\d\S*) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version == released[1]
    assert f"\ndate-released: {released[2]}\n" in (ROOT / "CITATION.cff").read_text()
    typed = subprocess.run(
        ["git", "grep", "-lF", version, "--", "*.py", "*.toml", "*.cff", "*.cfg"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if typed.returncode == 0:  # a git checkout
        assert set(typed.stdout.split()) == {"CITATION.cff", "pyproject.toml"}


def test_the_installed_version_is_that_of_the_project():
    import odenets

    assert odenets.__version__ == PROJECT["version"]
