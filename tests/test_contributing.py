"""The changes that CONTRIBUTING.md shows fit this tree, are short, and do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHANGES = re.findall(r"## (?:A|An) ([\w ]+)\n.*?```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
WHAT_THEY_ADD = {
    "measure": ["-m", "pytest", "-q", "-p", "no:xdist", "tests/odenets/test_measures.py", "-k", "straightness"],
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
