"""The Accelerator of a training script."""

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from flowmo_diffusers.engine.launch import build_accelerator


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accumulation_is_what_was_asked_for(tmp_path, monkeypatch):
    """Accumulation that the environment of a launch overrides without a word."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert build_accelerator(tmp_path, 4, accumulation=3).gradient_accumulation_steps == 3


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on a GPU these launches are what they say")
@pytest.mark.parametrize("library", ["fsdp", "deepspeed"])
def test_launch_that_is_not_had(tmp_path, monkeypatch, library):
    """A launch for sharding that trains unsharded."""
    monkeypatch.setenv(f"ACCELERATE_USE_{library.upper()}", "true")
    with pytest.raises((ValueError, ImportError), match="(?i)deepspeed|the launch asks for fsdp"):
        build_accelerator(tmp_path, 4)


def test_processes_that_do_not_know_each_other(tmp_path, monkeypatch):
    """Processes of which each trains by itself, all writing into one folder."""
    Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but Accelerate sees 1"):
        build_accelerator(tmp_path, 4)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, None),
        ({"state_dict_type": "FULL_STATE_DICT"}, "fsdp_state_dict_type: SHARDED_STATE_DICT"),
        ({"reshard_after_forward": False}, "fsdp_reshard_after_forward: true"),
    ],
)
def test_sharding_that_does_not_work_here(tmp_path, settings, missing):
    """Settings under which checkpoints may hang or averages be of other weights; gradients summed in bfloat16."""
    Accelerator(cpu=True, mixed_precision="bf16")
    settings = {"reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"} | settings
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        **settings,
    )
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if missing:
        with pytest.raises(ValueError, match=missing):
            build_accelerator(tmp_path, 4, mixed_precision="bf16")
    else:
        policy = build_accelerator(tmp_path, 4, mixed_precision="bf16").state.fsdp_plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs
