"""What the tests of diffusers need around them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from flowmo_diffusers.models.mmdit import FlowMoModulation


def pytest_configure(config: pytest.Config) -> None:
    """The marks that diffusers sets on its tests, some of which it declares nowhere."""
    source = Path(os.environ.get("DIFFUSERS_CHECKOUT", ""), "tests", "testing_utils.py")
    text = source.read_text() if source.is_file() else ""
    for mark in sorted(set(re.findall(r"return pytest\.mark\.(\w+)\(", text))):
        config.addinivalue_line("markers", f"{mark}: of diffusers' tests")


@pytest.fixture(scope="module", autouse=True)
def open_gates() -> Iterator[None]:
    """New models whose gates are not zero: else blocks would do nothing, and neither would a test of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowMoModulation, "reset_parameters", nn.Linear.reset_parameters)
        yield
