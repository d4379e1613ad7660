"""Weights that others trained: read from a file or downloaded, and loaded whole or not at all."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import constants as hub_constants
from torch import Tensor, nn


def read_tensors(path: str | os.PathLike, option: str) -> dict[str, Tensor]:
    """
    Tensors by the names of a .safetensors file, of a state dict saved by torch, or of a TorchScript archive.

    Args:
        option: Name of the command line's option that the path is from, for the message.

    Raises:
        OSError: If there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} ({option}) do not exist")
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if is_torchscript(path):
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    return torch.load(path, map_location="cpu", weights_only=True)


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether a file is a TorchScript archive; the zip archives of `torch.save` hold no code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def download_tensors(url: str, option: str) -> dict[str, Tensor]:
    """
    The state dict published at `url`, whose file name carries the start of its hash; kept in torch.hub's cache.

    Raises:
        OSError: If it is not in the cache and cannot be downloaded; says what to do by hand, naming the `option`.
    """
    file = url.rsplit("/", 1)[-1]
    cached = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        if hub_constants.HF_HUB_OFFLINE and not cached.is_file():
            raise OSError("offline mode is set")
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"weights {file} could not be loaded from {url} ({error}): download the file and "
            f"point at it by {option} PATH (in Python: weights=PATH), or put it at {cached}"
        ) from error


def load_exactly(
    network: nn.Module, tensors: dict[str, Tensor], source: str, file_key: Callable[[str], str] = lambda key: key
) -> None:
    """
    Loads `tensors`, which call the network's entry `key` by `file_key(key)`.

    Raises:
        ValueError: If entries are missing, unknown or misshapen.
    """
    # BatchNorm's step counter means nothing in eval mode, and not every file has it.
    wanted = {file_key(k): (k, v) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}
    problems = {
        "missing": wanted.keys() - tensors.keys(),
        "unknown": tensors.keys() - wanted.keys(),
        "misshapen": {k for k in wanted.keys() & tensors.keys() if wanted[k][1].shape != tensors[k].shape},
    }
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {', '.join(sorted(keys))}" for problem, keys in problems.items() if keys)
        raise ValueError(f"weights in {source} do not fit the {type(network).__name__}. {listed}")
    network.load_state_dict({key: tensors[name] for name, (key, _) in wanted.items()}, strict=False)
