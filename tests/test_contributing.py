"""The changes that the pages for contributors show fit this tree, are short, and do what they say."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/contributing").glob("*.md"))
CHANGES = [
    change
    for page in PAGES
    for change in re.findall(
        r"^#+ (?:Add a|Add an|A|An) ([\w ]+)\n(?:(?!^#).)*?```diff\n(.*?)```",
        page.read_text(),
        re.DOTALL | re.MULTILINE,
    )
]
WHAT_THEY_ADD = {
    "measure": ["-m", "pytest", "-q", "-p", "no:xdist", "tests/odenets/test_measures.py", "-k", "straightness"],
    "scheme": [
        "-m", "pytest", "-q", "-p", "no:xdist", "tests/solvers/test_step.py", "tests/solvers/test_tableaus.py",
        "-k", "ralston",
    ],
    "feature of the detector": [
        "-m", "pytest", "-q", "-p", "no:xdist", "tests/odenets/detection/features/test_base.py", "-k", "displacement",
    ],
    "attack": ["-m", "pytest", "-q", "-p", "no:xdist", "tests/odenets/detection/attacks/test_presets.py"],
    "experiment": ["experiments/blocks.py", "--quick", "--workers", "1"],
}  # fmt: skip


@pytest.fixture(params=CHANGES, ids=lambda change: change[0])
def changed(request, tmp_path):
    name, diff = request.param
    for folder in ("experiments", "odenets", "solvers", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True, env=environment)
    return name, diff, tmp_path


def test_the_change_is_short_and_fits(changed):
    _, diff, _ = changed
    lines = [line for line in diff.splitlines() if line[1:].strip() and not line.startswith(("@@", "+++", "---"))]
    assert len(lines) < 40


@pytest.mark.slow
def test_the_change_works(changed):
    name, _, folder = changed
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, *WHAT_THEY_ADD[name]], cwd=folder, check=True, env=environment)


def test_all_are_there():
    assert {name for name, _ in CHANGES} == set(WHAT_THEY_ADD)


def test_the_architecture_shows_every_floor_of_the_import_contract(monkeypatch):
    """The rooms in the picture are those that there are."""
    monkeypatch.syspath_prepend(ROOT / "docs/contributing")
    picture = importlib.import_module("architecture")
    for contract, package in (("networks", "odenets"), ("solves", "solvers")):
        shown = {name for floor in picture.floors(contract) for name in floor}
        there = {
            path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        assert shown == {name for name in there if not name.startswith("__")}
    with Image.open(picture.PICTURE) as drawn:
        assert drawn.info["Description"] == picture.contents(), "python docs/contributing/architecture.py draws it anew"
