"""Checkpoints of the published FlowMo code: fetched from the Hub, read, and kept as folders of this library."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import cached_assets_path, hf_hub_download
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError

from flowmo_diffusers.engine.digests import json_digest
from flowmo_diffusers.engine.files import atomic_folder, remove_partial
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.models.published import from_published


# Where the README of the published code (github.com/kylesargent/FlowMo) says that they are.
REPO_ID = "ksarge/FlowMo"
FILES = {"lo": "flowmo_lo.pth", "hi": "flowmo_hi.pth"}

WEIGHTS = {"ema": "model_ema_state_dict", "raw": "model_state_dict"}

CONVERSION = 1  # to be raised when one and the same file becomes another folder than before


def published_file(name_or_path: str | os.PathLike, **download: Any) -> Path:
    """
    The file of a published checkpoint, from the Hub or its cache where it has a name.

    Args:
        name_or_path: "lo", "hi" or a file.
        download: Arguments of `hf_hub_download` (`revision`, `token`, `cache_dir`, `local_files_only`, ...).

    Raises:
        OSError: If it is neither a known name nor a file, or cannot be downloaded.
    """
    if name_or_path in FILES:
        file = FILES[name_or_path]
        try:
            return Path(hf_hub_download(REPO_ID, file, **download))
        except OSError as error:
            raise OSError(
                f"the published checkpoint {name_or_path!r} could not be had from {REPO_ID} on the Hub ({error}): "
                f"download {file} from there by hand and give its path"
            ) from error
    path = Path(name_or_path)
    if path.is_dir():
        raise OSError(f"name_or_path {str(path)!r} is a folder: `from_pretrained` loads those")
    if not path.is_file():
        known = ", ".join(map(repr, FILES))
        raise OSError(f"name_or_path {str(path)!r} does not exist: it must be {known} or the file of a checkpoint")
    return path


def load_published(path: str | os.PathLike, weights: str = "ema", **given: Any) -> FlowMoAutoencoder:
    """
    A published `.pth` as a [`FlowMoAutoencoder`].

    Args:
        path: A checkpoint of the published training; opened without running any code in it (`weights_only=True`).
        weights: "ema" (those to use) or "raw".
        given: Fields that shapes cannot tell; see [`~flowmo_diffusers.models.published.infer_config`].

    Raises:
        OSError: If the file is missing or not such a checkpoint.
        ValueError: If its tensors are not a FlowMo model's, with their names.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} must be one of {list(WEIGHTS)}")
    path = Path(path)
    if not path.is_file():
        raise OSError(f"checkpoint {path} does not exist")
    try:
        # Memory-mapped, so that only the chosen weights are read; the older format of torch.save cannot be.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise OSError(f"checkpoint {path} cannot be read as tensors saved by torch: {error}") from error
    key = WEIGHTS[weights]
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict):
        found = sorted(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise OSError(f"checkpoint {path} holds no {key!r} (--weights {weights}); it holds {found}")
    return from_published(checkpoint[key], **given)


def converted_folder(
    path: Path, weights: str, given: dict[str, Any], save: Callable[[FlowMoAutoencoder, Path], None]
) -> Path:
    """
    The folder that a published checkpoint becomes, in huggingface_hub's cache of assets (`HF_ASSETS_CACHE`, by default
    in `HF_HOME`). Converted once, by one process while others wait, and again when the file has changed.

    Args:
        path: The checkpoint.
        weights: See [`load_published`].
        given: See [`load_published`].
        save: Writes the model into a folder, with its `model_index.json`.

    Raises:
        OSError: As [`load_published`], or if the disk has no room.
        ValueError: As [`load_published`].
    """
    place, stat = path.resolve(), path.stat()  # what the Hub's cache has is a link to a file named by its content
    key = json_digest([str(place), stat.st_size, stat.st_mtime_ns, weights, given, CONVERSION])
    folder = cached_assets_path("flowmo_diffusers", namespace="published", subfolder=f"{path.stem}-{key}")
    with WeakFileLock(folder.parent / f"{folder.name}.lock"):
        if not (folder / "model_index.json").is_file():
            model = load_published(path, weights, **given)
            remove_partial(folder)
            _check_room(folder, sum(tensor.nbytes for tensor in model.state_dict().values()))
            try:
                with atomic_folder(folder) as temporary:
                    save(model, temporary)
            except SafetensorError as error:  # which is no OSError, though it says of a full disk what that would
                raise OSError(f"checkpoint {path} could not be converted into {folder}: {error}") from error
    return folder


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"{folder} needs {size / 2**20:,.0f} MiB and its disk has {free / 2**20:,.0f}: make room, or set "
            "HF_ASSETS_CACHE to a folder on another disk"
        )
