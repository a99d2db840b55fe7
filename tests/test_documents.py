"""What the documents show runs as it stands: each snippet of README alone, those of a page one after the other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

ROOT = Path(__file__).parent.parent
GENERATED = {"_build", "gallery"}
LONG = ("docs/how_to/compression.md", "docs/how_to/saving.md", "docs/how_to/solvers.md")
"""Pages that fit, compile or export more than once."""

PAGES = sorted(
    page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md") if not GENERATED & set(page.parts)
)


def snippets(page):
    """The Python of a page, with the line of each."""
    text = (ROOT / page).read_text()
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]


def run(page, line, code, names):
    exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), names)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize(("line", "code"), [pytest.param(*one, id=f"line {one[0]}") for one in snippets("README.md")])
def test_a_snippet_of_the_readme_runs_alone(line, code):
    run("README.md", line, code, {"__name__": "readme"})


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|many workers|log_every_n_steps|litlogger|is not empty)")  # of Lightning
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page in PAGES])
def test_a_page_runs_from_top_to_bottom(page):
    names = {"__name__": page}
    for line, code in snippets(page):
        run(page, line, code, names)


@pytest.fixture(scope="module")
def messages():
    """What the errors and warnings of the library say, "..." where a value stands."""
    files = [file for package in ("odenets", "solvers") for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    texts = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in nodes]
    return ["".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts) for parts in texts]


@pytest.mark.parametrize("page", [page for page in PAGES if "## What goes wrong" in (ROOT / page).read_text()])
def test_the_errors_that_a_page_explains_are_those_of_the_library(page, messages):
    table = (ROOT / page).read_text().partition("## What goes wrong")[2]
    errors = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| ") and "(torch's)" not in row]
    quoted = [part for error in errors for part in re.findall(r"`([^`]+)`", error)]
    assert quoted
    assert [error for error in quoted if not any(error in message for message in messages)] == []


def test_the_listing_of_several_processes_is_the_script():
    script, page = ((ROOT / "docs/how_to" / name).read_text() for name in ("several_processes.py", "data_loaders.md"))
    assert f"```py\n{script}```" in page


@pytest.mark.slow
def test_the_script_of_several_processes_runs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*run, ROOT / "docs/how_to/several_processes.py", "sharded"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.split()[-1]) < 0.6


DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "experiments/README.md", "tests/README.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_documents_beside_the_site_lead_to_files(document):
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    paths = [(one or other).partition("#")[0] for one, other in links if "://" not in one + other]
    missing = [path for path in paths if path and not (ROOT / document).parent.joinpath(path).exists()]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140
