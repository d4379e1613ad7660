"""Short names of content."""

import pytest
import torch

from flowmo_diffusers.engine.digests import json_digest, module_digest


def test_equal_values_have_equal_digests():
    """Whatever the order of keys."""
    assert json_digest({"a": 1, "b": [1, 2]}) == json_digest({"b": (1, 2), "a": 1})


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"b": 1}, [1], None])
def test_other_values_have_others(other):
    assert json_digest({"a": 1}) != json_digest(other)


def test_what_is_no_json_is_refused():
    with pytest.raises(TypeError):
        json_digest({"a": torch.ones(1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_is_that_of_the_weights(dtype):
    """One changed value, name, type or shape changes it; the layout in memory does not."""
    module = torch.nn.Conv2d(3, 4, 3).to(dtype)
    digest = module_digest(module)
    assert module_digest(module.to(memory_format=torch.channels_last)) == digest
    assert module_digest(torch.nn.Sequential(module)) != digest
    assert module_digest(module.to(torch.float16)) != digest
    module = module.to(dtype)
    with torch.no_grad():
        module.bias[1] += 1
    assert module_digest(module) != digest


def test_buffers_and_numbers_count():
    """Stored statistics are part of a network."""
    norm = torch.nn.BatchNorm2d(2)
    digest = module_digest(norm)
    norm.num_batches_tracked += 1
    assert module_digest(norm) != digest
