"""The documentation as a site: sphinx-build -W -b html docs runs/site."""

project = "supcon_jax"
author = "The supcon_jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 4
# Docstrings name shapes in backticks, which are code here, as in the Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
# Links to files of the repository, which are no pages of the site.
suppress_warnings = ["myst.xref_missing"]
