"""The Accelerator of a training script, whatever it was launched with."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType


def launched_with(library: str) -> bool:
    """Whether `accelerate launch` was given an "fsdp" or "deepspeed" configuration."""
    return os.environ.get(f"ACCELERATE_USE_{library.upper()}", "false").lower() == "true"


def build_accelerator(
    output_dir: str | Path,
    batch_size: int,
    accumulation: int = 1,
    mixed_precision: str | None = None,
    max_grad_norm: float | None = None,
    find_unused_parameters: bool = False,
    **kwargs,
) -> Accelerator:
    """
    An Accelerator with which one process, DDP, FSDP2 and DeepSpeed compute the same: weights, images and times stay in
    float32 under every kind of mixed precision, and so do sums of gradients; accumulation is what was asked for.

    Args:
        output_dir: Of the run.
        batch_size: Images of one process and one forward.
        accumulation: Batches a step.
        mixed_precision: "no", "fp16", "bf16", or `None` for that of the launch.
        max_grad_norm: Gradients are clipped to it; DeepSpeed does so itself.
        find_unused_parameters: Of DDP.
        **kwargs: Further arguments of `Accelerator`.

    Raises:
        ValueError: If the launch asked for something that cannot be had here.
    """
    deepspeed = launched_with("deepspeed")
    if deepspeed:
        # DeepSpeed's own mixed precision would keep the weights in bfloat16, where an EMA stands still.
        precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision == "fp16":
            raise ValueError("mixed_precision=fp16 is not supported under DeepSpeed: use bf16")
        mixed_precision = "no"
    accelerator = Accelerator(
        # Without it, several processes on CPUs would each be the only one; DeepSpeed has devices of its own.
        cpu=not torch.accelerator.is_available() and not deepspeed,
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
        project_config=ProjectConfiguration(str(output_dir), **kwargs.pop("project", {})),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True)
        ],
        **kwargs,
    )
    _check_launch(accelerator)
    if accelerator.is_fsdp2:
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if deepspeed:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": max_grad_norm or 0.0,
            "torch_autocast": {
                "enabled": precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # of these it would sum the gradients in bfloat16
            },
        }
    return accelerator


def _check_launch(accelerator: Accelerator) -> None:
    """What Accelerate passes over without a word."""
    kinds = {"fsdp": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}
    for library, kind in kinds.items():
        if launched_with(library) and accelerator.distributed_type != kind:
            raise ValueError(f"the launch asks for {library}, but gets {accelerator.distributed_type} on this machine")
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        wanted = {
            "fsdp_version: 2": accelerator.is_fsdp2,
            # A checkpoint written by one process alone cannot fail without the others waiting for ever.
            "fsdp_state_dict_type: SHARDED_STATE_DICT": plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT,
            # Weights left whole by a pass without gradients would no longer be those that are averaged.
            "fsdp_reshard_after_forward: true": plugin.reshard_after_forward is True,
        }
        if missing := [setting for setting, there in wanted.items() if not there]:
            raise ValueError(f"the configuration of the launch needs {', '.join(missing)} under fsdp_config")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were launched, but Accelerate sees {accelerator.num_processes}: each would train by "
            "itself and write into one folder"
        )
