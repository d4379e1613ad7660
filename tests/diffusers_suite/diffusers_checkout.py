"""
diffusers' own tests, from the checkout that DIFFUSERS_CHECKOUT names. They are imported as the package
`diffusers_tests`: their own name, `tests`, is everybody's.

On a CPU diffusers skips what it says needs an accelerator, much of which needs none: training, compiling, sharding.
That requirement is lifted here, and what does need an accelerator says so itself, by [`needs_accelerator`].
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


LIFTED = ("require_accelerator", "require_torch_accelerator")


def _package() -> ModuleType:
    checkout = os.environ.get("DIFFUSERS_CHECKOUT")
    if not checkout:
        pytest.skip("DIFFUSERS_CHECKOUT names no checkout of diffusers", allow_module_level=True)
    folder = Path(checkout) / "tests"
    if not (folder / "models" / "testing_utils" / "common.py").is_file():
        raise OSError(f"DIFFUSERS_CHECKOUT={checkout} must be a checkout of diffusers of version 0.40 or newer")
    spec = importlib.util.spec_from_file_location(
        "diffusers_tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    return package


_package()
testing_utils = importlib.import_module("diffusers_tests.testing_utils")
torch_device = testing_utils.torch_device
if torch_device == "cpu":
    for name in LIFTED:
        setattr(testing_utils, name, lambda test: test)

# After the requirement is lifted, which these read as they are imported.
models = importlib.import_module("diffusers_tests.models.testing_utils")
lora = importlib.import_module("diffusers_tests.models.testing_utils.lora")
autoencoders = importlib.import_module("diffusers_tests.models.autoencoders.testing_utils")
pipelines = importlib.import_module("diffusers_tests.pipelines.testing_utils")
parameters = importlib.import_module("diffusers_tests.pipelines.pipeline_params")
schedulers = importlib.import_module("diffusers_tests.schedulers.test_schedulers")

needs_accelerator = pytest.mark.skipif(torch_device == "cpu", reason="needs the memory or the streams of a GPU")
no_pickles = pytest.mark.skip(reason="weights are written to and read from safetensors only")
