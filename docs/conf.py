"""How ``make docs`` turns these pages into a site: Sphinx, with the pages' Markdown read as GitHub reads it (MyST)."""

from __future__ import annotations

import importlib.metadata

project = "regroup"
author = "the authors of regroup"
version = release = importlib.metadata.version("regroup-gqa")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images"]
# A block without a language is text.
highlight_language = "none"

# So that a link to a heading is what it is on GitHub.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"regroup {release}"
# Copies commands without their prompts and what they print.
copybutton_exclude = ".linenos, .gp, .go"
