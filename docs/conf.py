"""Sphinx builds the site from here: ``make docs``."""

import logging
import sys
from pathlib import Path

import odenets

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

logging.getLogger("art").setLevel(logging.WARNING)  # the theme's package of colors makes every logger speak

project = "odenets"
author = "The odenets authors"
project_copyright = author
version = release = odenets.__version__

extensions = [
    "myst_parser",
    "public_names",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials/*.rst", "tutorials/*.py"]
nitpicky = True
default_role = "any"  # `single` quotes are a reference too

# The reference
autosummary_generate = False  # public_names writes the pages
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

# Pages
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
copybutton_prompt_text = r">>> |\.\.\. ?|\$ "  # what is copied: the lines behind these, where there are any
copybutton_prompt_is_regexp = True

# Tutorials: each is executed
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": "",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("gallery_figures.scrape",),
    "reset_modules": ("matplotlib", "figure_style.reset"),
    "abort_on_example_error": True,
    "only_warn_on_example_error": False,
    "capture_repr": (),
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "nested_sections": False,
}

html_theme = "furo"
html_title = "odenets"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7cb2f0", "color-brand-content": "#7cb2f0"},
}
html_static_path = ["static"]
templates_path = ["templates"]
html_css_files = ["odenets.css"]
html_js_files = ["scroll.js"]
html_show_sphinx = False
html_copy_source = False
