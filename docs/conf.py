"""Sphinx configuration: Markdown pages that also read well on a forge, and API pages from docstrings. No network."""

import re

from sphinx.application import Sphinx

import vision_ssm

# Placeholder: the project has no public address yet. Links to files outside docs/ lead here, nothing else does.
SOURCE = "https://github.com/vision-ssm/vision-ssm/blob/main"

project = "vision-ssm"
author = "The vision-ssm developers"
release = version = vision_ssm.__version__
html_title = f"vision-ssm {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_heading_anchors = 3
default_role = "literal"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_ignore_module_all = False
maximum_signature_line_length = 110
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False

# Files outside docs/ that are pages of the site.
INCLUDED = {"../src/vision_ssm/scan/README.md": "operator.md", "../CONTRIBUTING.md": "contributing.md"}


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Point links that leave docs/ at the forge, and build the navigation from the sections of the index."""
    text = source[0]
    for file, page in INCLUDED.items():
        text = text.replace(f"]({file}", f"]({page}")
    text = re.sub(r"\]\(\.\./", f"]({SOURCE}/", text)
    if name == "index":
        for title, body in re.findall(r"^## (.+)\n((?:(?!## ).*\n)+)", text, re.MULTILINE):
            pages = "\n".join(re.findall(r"\]\(([\w-]+)\.md\)", body))
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{pages}\n```\n"
    source[0] = text


def setup(app: Sphinx) -> None:
    """Connect what reads pages."""
    app.connect("source-read", read_page)
