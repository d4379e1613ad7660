"""torch-fidelity's figures, as a reference for ours. Its networks need torchvision, which tests do without."""

import importlib.util
import sys
from types import ModuleType

import pytest


NAMES = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


def fidelity_module(name: str) -> ModuleType:
    """The module `torch_fidelity.<name>`; skips the test if torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    stand_ins = {module: ModuleType(module) for module in NAMES if module not in sys.modules}
    for module in stand_ins.values():
        vars(module).update(CIFAR10=object, CIFAR100=object, STL10=object)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    finally:
        for module in stand_ins:
            del sys.modules[module]
