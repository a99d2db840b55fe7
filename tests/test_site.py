"""The site: it builds without a warning, and what it holds can be reached without a network."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("sphinx")
sys.path.insert(0, str(ROOT / "docs" / "extensions"))
public_names = importlib.import_module("public_names")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, the tutorials as they are written; `test_tutorials` runs them."""
    folder = tmp_path_factory.mktemp("site")
    for path in ROOT.iterdir():
        if path.name not in ("docs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    generated = shutil.ignore_patterns("_build", "gallery", "odenets*.rst", "solvers*.rst")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=generated)
    options = ["-W", "--keep-going", "-n", "-q", "-E", "-D", "plot_gallery=0", "-b", "html"]
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "docs", "html"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder / "html"


def test_every_public_name_has_its_place(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    places = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    for module in public_names.MODULES:
        for name, value in vars(importlib.import_module(module)).items():
            if name in importlib.import_module(module).__all__ and callable(value):
                assert public_names.homes().get(id(value), f"{module}.{name}") in places, f"{module}.{name}"


def test_no_page_asks_for_anything_beyond_its_folder(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|source|iframe)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text())
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page.name


def test_every_image_says_what_it_shows(site):
    for page in site.rglob("*.html"):
        for image in re.findall(r"<img\b[^>]*>", page.read_text()):
            if "_images" in image and "thumb" not in image:
                described = re.search(r'alt="([^"]{10,})"', image)
                assert described, (page.name, image)
                assert not described[1].endswith((".png", ".svg")), (page.name, image)


def test_what_one_looks_for_is_found(site):
    """The index that the search reads has the words of a newcomer."""
    words = (site / "searchindex.js").read_text()
    for word in ("dataload", "torchdiffeq", "event", "adjoint", "lightn", "checkpoint", "glossari"):
        assert f'"{word}' in words or f"{word}:" in words, word
