"""What results depend on: a short name for it, and how one differs from another."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin


_DIGEST_BYTES = 16


def json_digest(value: Any) -> str:
    """
    Hex digest of a plain JSON value; the order of keys does not matter.

    Raises:
        TypeError: If it holds anything that JSON does not.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def config_entries(component: ConfigMixin) -> dict[str, Any]:
    """The configuration of a component of diffusers as plain JSON values, without what says where it is from."""
    return {name: value for name, value in json.loads(component.to_json_string()).items() if name[0] != "_"}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, each entry in which two mappings of plain JSON values differ."""
    there, here = (json.loads(json.dumps(values)) for values in (there, here))
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    return [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names]


def module_digest(module: torch.nn.Module) -> str:
    """Hex digest of a module's state dict: names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
