"""
Docstrings as diffusers writes them, in the form that Sphinx reads.

They are Google's sections with Markdown's code and diffusers' references: [`Name`], or [`~Class.method`] to show the
last part alone.
"""

import importlib
import pkgutil
import re
import sys
from functools import cache
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import flowmo_diffusers
from flowmo_diffusers import pipelines


logger = logging.getLogger(__name__)

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
CODE = re.compile(r"(`[^`]*`)")
MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")  # means something in reStructuredText, and nothing in our docstrings
FENCE = re.compile(r"\s*```\w*")

# Of other libraries: named without a link, since where they are described cannot be looked up without the network.
ELSEWHERE = {"DiffusionPipeline", "EMAModel", "PeftAdapterMixin", "evaluate"}


@cache
def defined() -> dict[str, list[str]]:
    """The modules that define each class and function of the library, by its name."""
    found: dict[str, list[str]] = {}
    for package in (flowmo_diffusers, pipelines):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            for name, value in vars(importlib.import_module(info.name)).items():
                if getattr(value, "__module__", None) == info.name:
                    found.setdefault(name, []).append(info.name)
    return found


def whole_name(name: str, module: str) -> str | None:
    """Of what is called so in a module of the library, with its own module; `None` if nothing is, or several are."""
    if name.startswith("flowmo_diffusers."):
        return name
    places = defined().get(name.split(".")[0], [])
    if module in places:
        return f"{module}.{name}"
    return f"{places[0]}.{name}" if len(places) == 1 else None


def convert(line: str, module: str, place: str) -> str:
    """One line of a docstring."""

    def link(match: re.Match) -> str:
        short, name = match.groups()
        shown = name.split(".")[-1] if short else name
        first, last = name.split(".")[0], name.split(".")[-1]
        if first in ELSEWHERE or last.startswith("_") and not last.endswith("__"):  # or private, and on no page
            return f"`{shown}`"
        target = whole_name(name, module)
        if target is None:
            logger.warning("%s: [`%s`] is no one class or function of this library", place, name)
        return f":py:obj:`{shown} <{target}>`"

    parts = CODE.split(line)  # text and code in turn
    parts[::2] = [MARKUP.sub(r"\\\1", text) for text in parts[::2]]
    return REFERENCE.sub(link, "".join(parts))


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event: `lines` are the docstring of what is called `name`, and are changed in place."""
    module = name
    while module not in sys.modules:
        module = module.rpartition(".")[0]
    if getattr(obj, "__module__", module) == module:
        lines[:] = ["" if FENCE.fullmatch(line) else convert(line, module, name) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon reads the sections
    return {"parallel_read_safe": True}
