"""Sphinx builds the site from here: ``make docs``."""

import sys
from pathlib import Path

import odenets

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "odenets"
author = "The odenets authors"
project_copyright = author
version = release = odenets.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "public_names",
]
exclude_patterns = ["_build", "tutorials/*"]
nitpicky = True
autosummary_generate = False  # extensions/public_names.py writes the pages
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
templates_path = ["templates"]
myst_heading_anchors = 4
