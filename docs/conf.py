"""The documentation's site: `sphinx-build -W docs build/site`, then open build/site/index.html.

Nothing is fetched, neither while it is built nor when it is read: formulas are drawn by a MathJax
of the site's own. Notebooks are shown with the outputs that `python scripts/run_notebooks.py --out
build/notebooks` left, if they are of the notebooks as they are; without, they have none.
"""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
sys.path.insert(0, str(DOCS.parent))

import site_pages  # noqa: E402

import cnnjax  # noqa: E402

site_pages.write_api(DOCS / "api", DOCS / "curriculum.md")
site_pages.copy_guide(DOCS / "search.md", DOCS / "copied" / "search_settings.md")
site_pages.copy_notebooks(
    DOCS.parent / "notebooks", DOCS.parent / "build" / "notebooks", DOCS / "notebooks"
)

REPOSITORY = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["urls"][
    "Repository"
]
project, author, release = "cnnjax", "cnnjax", cnnjax.__version__
copyright = "the authors of cnnjax, Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["search.md", "**.ipynb_checkpoints"]
# Two classes may have fields of one name, which a docstring names.
suppress_warnings = ["config.cache", "ref.python"]

# The guides are written for GitHub: what is indented is what a terminal shows.
highlight_language = "none"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
viewcode_line_numbers = True

html_title = "cnnjax"
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["cnnjax.css"]
html_show_sourcelink = False
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "navbar_persistent": [],
    "use_repository_button": True,
    "use_source_button": False,
    "use_download_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}
mathjax_path = "mathjax.js"


def setup(app):
    """Connects what turns our docstrings into those that Sphinx reads."""
    app.connect("autodoc-process-docstring", site_pages.as_rst, priority=400)
    app.connect("env-get-outdated", site_pages.always_outdated)
    app.connect("source-read", site_pages.for_the_site)
    app.connect("build-finished", site_pages.copy_mathjax)
