"""The site: it builds without a warning, and what it holds can be reached without a network."""

import importlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
        if path.suffix == ".md":  # whose links are relative to where they stand
            shutil.copy(path, folder)
        elif path.name not in ("docs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    generated = shutil.ignore_patterns("_build", "gallery", "odenets*.rst", "solvers*.rst")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=generated)
    options = ["-W", "--keep-going", "-n", "-q", "-E", "-d", "doctrees", "-D", "plot_gallery=0", "-b", "html"]
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
        for name, value in list(vars(importlib.import_module(module)).items()):  # some load others when they are seen
            if name in importlib.import_module(module).__all__ and callable(value):
                assert public_names.homes().get(id(value), f"{module}.{name}") in places, f"{module}.{name}"


def test_no_page_asks_for_anything_beyond_its_folder(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|source|iframe)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text())
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page.name


class Read(HTMLParser):
    """The places of a page, where its links lead, and its headings."""

    def __init__(self, page):
        super().__init__()
        self.places, self.links, self.titles = [], [], 0
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.places += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.titles += tag == "h1"

    def twice(self):
        return [place for place, count in Counter(self.places).items() if count > 1]


@pytest.fixture(scope="module")
def pages(site):
    return {page: Read(page) for page in site.rglob("*.html") if "_static" not in page.parts}


def test_every_link_leads_somewhere(site, pages):
    nowhere = []
    for page, read in pages.items():
        for link in read.links:
            scheme, host, path, _, place = urlsplit(link)
            file = (page.parent / unquote(path)).resolve() if path else page
            if scheme or host:
                continue
            if not file.is_file() or (place and file in pages and unquote(place) not in pages[file].places):
                nowhere.append((page.relative_to(site).as_posix(), link))
    assert nowhere == []


def test_a_page_has_one_title_and_no_place_twice(pages):
    assert {page.name: read.titles for page, read in pages.items() if read.titles != 1} == {}
    assert {page.name: twice for page, read in pages.items() if (twice := read.twice())} == {}


def test_no_markup_is_left_over(site):
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        assert not re.findall(r".{,40}(?:\]\(|\]\[|``|:\w+:`).{,40}", re.sub(r"<[^>]*>", "", text)), page.name


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


def test_the_site_is_small(site):
    """Pages and figures under 16 MB, of which those of the tutorials, which are not drawn here, take 2."""
    pages = [path for path in site.rglob("*") if path.is_file() and "_downloads" not in path.parts]
    assert sum(path.stat().st_size for path in pages) < 14e6
