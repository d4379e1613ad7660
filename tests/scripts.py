"""The scripts of `training/` and `benchmarks/`."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_script(name: str, folder: str = "training") -> ModuleType:
    """A script as a module."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
