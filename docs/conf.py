"""The site: `make docs` builds it, and every warning is an error."""

import sys
from pathlib import Path

import flowmo_diffusers


sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "FlowMo for diffusers"
copyright = "the authors of flowmo_diffusers; Apache-2.0"
release = flowmo_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "docstrings"]
exclude_patterns = ["extensions", "templates"]
templates_path = ["templates"]
nitpicky = True
# Names of other libraries cannot be looked up without the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!flowmo_diffusers\b).*"),
    (r"py:.*", r"flowmo_diffusers\.data\.(images\.Images|sources\.Some)"),  # type variables
]

myst_heading_anchors = 4  # named as GitHub names them

default_role = "literal"  # docstrings write code as Markdown does
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
autodoc_default_options = {"members": True, "special-members": "__call__", "member-order": "bysource"}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

smartquotes = False  # they would change strings

html_theme = "furo"
html_title = project
html_copy_source = False
