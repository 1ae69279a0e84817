"""Sphinx configuration."""

import gramian
from gramian.linalg.engine.function import methods_table

project = "gramian"
author = "the gramian developers"
version = release = gramian.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
myst_enable_extensions = ["colon_fence", "substitution"]
myst_substitutions = {"matrix_functions": methods_table()}
suppress_warnings = ["myst.header"]
