"""What all processes of a run must know of each other."""

import torch
from accelerate import Accelerator


def on_any_process(accelerator: Accelerator, *flags: bool | torch.Tensor) -> list[bool]:
    """Which of the flags are set on at least one process. Every process must call this."""
    if accelerator.num_processes == 1:
        return [bool(flag) for flag in flags]
    values = [torch.as_tensor(flag, dtype=torch.float32, device=accelerator.device) for flag in flags]
    return (accelerator.reduce(torch.stack(values), "sum") > 0).tolist()
