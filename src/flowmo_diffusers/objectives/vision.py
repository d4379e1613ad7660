"""Vision models of `transformers` with what their input looks like."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionModel(NamedTuple):
    """
    Args:
        model: In float32.
        size: (height, width) of its input.
        mean, std: Per channel of images in [0, 1], what its input is normalised by.
    """

    model: nn.Module
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_vision_model(auto_class: type, name: str) -> VisionModel:
    """
    Args:
        auto_class: Of `transformers`, such as `AutoModel`.
        name: Folder or Hub id.

    Raises:
        OSError: If it is not there, or not whole.
        ValueError: If its preprocessing does what is not supported here.
    """
    from transformers.utils import cached_file

    try:
        model, report = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise OSError(f"{name} cannot be loaded ({error})") from error
    missing = {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    if missing:
        raise OSError(f"{name} has no weights for {sorted(missing)}")
    if report["missing_keys"]:
        model.pooler = None  # it would be random; checkpoints of classifiers often come without
    settings = {"size": getattr(model.config, "image_size", 224)}
    if file is None:
        logger.warning(
            f"{name} has no preprocessor_config.json: assuming ImageNet mean and std, size {settings['size']}"
        )
    else:
        settings |= json.loads(Path(file).read_text())
    return VisionModel(model, *_input_settings(settings))


def _input_settings(settings: dict[str, Any]) -> tuple[tuple, tuple, tuple]:
    """Size, mean and std from the entries of a preprocessor_config.json, "size" at least."""
    for unsupported in ("do_flip_channel_order", "rescale_offset"):
        if settings.get(unsupported):
            raise ValueError(f"a model with {unsupported} in its preprocessor_config.json is not supported")
    size = (settings.get("do_center_crop") and settings.get("crop_size")) or settings["size"]
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    if settings.get("do_normalize") is False:
        return size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return size, tuple(settings.get("image_mean") or IMAGENET_MEAN), tuple(settings.get("image_std") or IMAGENET_STD)
