"""Sphinx builds these pages: pip install -e '.[docs]' && sphinx-build -W docs docs/_build."""

from replica_plugin import __version__
from replica_plugin.config.settings import reference_table

project = "replica-plugin"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["deflist", "substitution"]
myst_heading_anchors = 3
# The reference page of the settings is made of the fields in the code.
myst_substitutions = {"settings": reference_table()}

# Single backquotes in docstrings are code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

html_theme = "furo"
html_title = "replica-plugin"
html_show_sourcelink = False
html_show_copyright = False
