"""Parameters that FSDP2 has split over processes (`DTensor`), handled by what every process holds of them."""

from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def local(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What this process holds: the tensors themselves where nothing is sharded."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """A copy of the whole `tensor` on the device of `template`, and sharded as that is."""
    copy = tensor.to(template.device, copy=True)
    if isinstance(template, DTensor):
        # Every process has read the whole: nothing needs to be sent.
        return distribute_tensor(copy, template.device_mesh, template.placements, src_data_rank=None)
    return copy


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Frobenius norms of the whole tensors, in one exchange between processes."""
    own = torch._foreach_norm(local(tensors))
    first = tensors[0]
    if not isinstance(first, DTensor):
        return own
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in first.placements]
    squares = torch.stack(own).square()
    joint = DTensor.from_local(squares, first.device_mesh, placements, run_check=False).full_tensor()
    return list(joint.sqrt().unbind())


def reshard(model: torch.nn.Module) -> None:
    """Lets go of weights that a forward without backward left gathered, and that the next forward would use again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The unsharded weights by their names in the bare model, on the main process; every process must call this."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
