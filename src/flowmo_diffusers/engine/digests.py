"""Short names for what results depend on: two that are equal mean the same content."""

import hashlib
import json
from typing import Any

import torch


_DIGEST_BYTES = 16


def json_digest(value: Any) -> str:
    """
    Hex digest of a plain JSON value; the order of keys does not matter.

    Raises:
        TypeError: If it holds anything that JSON does not.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def module_digest(module: torch.nn.Module) -> str:
    """Hex digest of a module's state dict: names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
