"""The documentation site: `make docs` builds it, offline, and warnings are errors."""

import logging
import re
import sys
from pathlib import Path

import tmm_engine

logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # which instructions it was built for
sys.path.insert(0, str(Path(__file__).parent))

project = "tmm-engine"
author = "The maintainers of tmm-engine"
release = version = tmm_engine.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_design",
    "notebooks",  # beside this file
]
source_suffix = {".md": "markdown", ".ipynb": "notebook"}
exclude_patterns = ["_build"]
default_role = "code"  # docstrings say `name` for code

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = f"tmm-engine {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7ab8f0", "color-brand-content": "#7ab8f0"},
}

ROOTS = {"../README.md": "index.md", "../CONTRIBUTING.md": "contributing.md", "../CHANGELOG.md": "changelog.md"}


def link_pages(app, docname, source):
    """Documents are read in the repository too: what they link to above docs/ has a page of its own here."""
    for path, page in ROOTS.items():
        source[0] = source[0].replace(f"]({path})", f"]({page})")


def as_code(app, ctx, lines):
    """Examples in a command's help, and other blocks that click is told not to wrap, are code."""
    shown, inside = [], False
    for line in lines:
        if line.startswith("| ") and not inside:
            inside = True
            shown += [f".. rubric:: {line.removeprefix('| ').rstrip(':')}", "", ".. code-block:: text", ""]
        elif inside and line.startswith("| "):
            shown.append("   " + line.removeprefix("| "))
        else:
            inside = False
            shown.append(as_text(line))
    lines[:] = shown


def of_options(app, ctx, lines):
    """What the help of options says is text."""
    lines[:] = [line if line.startswith(".. option::") else as_text(line) for line in lines]


def as_text(line):
    """An asterisk is one, and an option is code."""
    line = line.replace("*", r"\*").replace(r"\*\*Required\*\*", "**Required**")
    return re.sub(r"(?<![`\w-])(--[a-z][\w-]*)", r"``\1``", line)


def setup(app):
    app.connect("sphinx-click-process-options", of_options)
    app.connect("sphinx-click-process-description", as_code)
    app.connect("sphinx-click-process-epilog", as_code)
    app.connect("source-read", link_pages)
