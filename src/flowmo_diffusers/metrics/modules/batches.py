"""Images as they are added to a metric, to batches of tensors."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput

from flowmo_diffusers.pipelines.images import ImageItem, image_items, image_size, images_to_tensor


def single_images(images: PipelineImageInput, name: str) -> list[ImageItem]:
    """
    Any kind of images to a list with an entry an image; arrays and tensors are views, not copies.

    Args:
        images: See [`images_to_tensor`]; a list may hold images of several sizes.
        name: Of the argument, for errors.

    Raises:
        ValueError: If they are no images, or not of three channels.
    """
    try:
        items = image_items(images)
        for item in items:
            image_size(item)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    singles = []
    for item in items:
        channels = _channels(item)
        if channels != 3:
            raise ValueError(f"{name}: image has {channels} channels; expected 3, RGB")
        singles += [item] if isinstance(item, PIL.Image.Image) or item.ndim == 3 else list(item)
    return singles


def image_pairs(
    predictions: PipelineImageInput | None, references: PipelineImageInput | None
) -> tuple[list[ImageItem], list[ImageItem]]:
    """
    Both as [`single_images`].

    Raises:
        ValueError: If one is missing, or numbers or sizes differ.
    """
    if predictions is None or references is None:
        raise ValueError("predictions and references must be given together: the n-th is compared with the n-th")
    predictions, references = single_images(predictions, "predictions"), single_images(references, "references")
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions are {len(predictions)} images and references {len(references)}; expected as many"
        )
    for number, (first, second) in enumerate(zip(predictions, references, strict=True)):
        if image_size(first) != image_size(second):
            raise ValueError(
                f"prediction {number} has size (h, w) = {image_size(first)} and its reference {image_size(second)}"
            )
    return predictions, references


def tensor_batches(singles: list[ImageItem], name: str, batch_size: int) -> Iterator[torch.Tensor]:
    """
    Images of [`single_images`] in their order, as (n, 3, h, w) float32 in [-1, 1]: neighbours of one size together, at
    most `batch_size` of them.

    Raises:
        ValueError: If values are not finite or outside their range.
    """
    for _, run in groupby(singles, key=image_size):
        run = list(run)
        for start in range(0, len(run), batch_size):
            try:
                images = images_to_tensor(run[start : start + batch_size])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            yield images


def _channels(item: ImageItem) -> int:
    if isinstance(item, PIL.Image.Image):
        return 3  # to which it is converted
    return item.shape[-1] if isinstance(item, np.ndarray) else item.shape[-3]
