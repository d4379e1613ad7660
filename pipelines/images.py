"""Images as people hold them, PIL, NumPy or tensors, to tensors in [-1, 1]."""

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput


ImageItem = PIL.Image.Image | np.ndarray | torch.Tensor


def image_items(images: PipelineImageInput) -> list[ImageItem]:
    """
    What is given as one image, one batch or a list, as a list of items of one kind; nothing is copied or checked but
    the kind.

    Raises:
        ValueError: If there is no item, or they are not all PIL images, NumPy arrays or tensors.
    """
    items = list(images) if isinstance(images, list | tuple) else [images]
    kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
    if not items or not any(all(isinstance(item, kind) for item in items) for kind in kinds):
        names = sorted({type(item).__name__ for item in items})
        raise ValueError(f"image must be PIL images, NumPy arrays or tensors, or a list of one kind; got {names}")
    return items


def image_size(item: ImageItem) -> tuple[int, int]:
    """Height and width in pixels. `ValueError` if an array has not three dimensions, or four with a batch."""
    if isinstance(item, PIL.Image.Image):
        return item.height, item.width
    if item.ndim not in (3, 4):
        raise ValueError(f"image has shape {tuple(item.shape)}; expected three dimensions, or four with a batch")
    return tuple(item.shape[-3:-1] if isinstance(item, np.ndarray) else item.shape[-2:])


def array_to_tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    A NumPy array (h, w, c) or (n, h, w, c), uint8 or in [0, 1], or a tensor (c, h, w) or (n, c, h, w) in [-1, 1], to
    (n, c, h, w) float32 in [-1, 1].

    Raises:
        ValueError: If it is empty, or values are not finite, outside their range, or a tensor's whole numbers.
    """
    if isinstance(array, np.ndarray):
        scale = 255 if array.dtype == np.uint8 else 1
        images = torch.tensor(np.ascontiguousarray(array, np.float32)).movedim(-1, -3) / scale * 2 - 1
        expected = "a float NumPy image lies in [0, 1] (or give uint8)"
    elif array.is_floating_point():
        images, expected = array.float(), "a tensor image lies in [-1, 1]"
    else:
        raise ValueError(f"image tensor has dtype {array.dtype}; expected floats in [-1, 1]")
    if images.numel() == 0 or not torch.isfinite(images).all():
        raise ValueError("image is empty or has values that are not finite (NaN or infinity)")
    if images.abs().max() > 1 + 1e-3:
        raise ValueError(f"image values range from {array.min():.3g} to {array.max():.3g}: {expected}")
    return images if images.ndim == 4 else images[None]


def images_to_tensor(images: PipelineImageInput) -> torch.Tensor:
    """
    Any kind of images of one size to (n, c, h, w) float32 in [-1, 1], without resizing.

    Args:
        images: PIL images, of which the RGB colours are taken as a pipeline takes them; NumPy arrays (h, w, c) or
            (n, h, w, c) in uint8 or in [0, 1]; tensors (c, h, w) or (n, c, h, w) in [-1, 1] or in uint8; or a list of
            one kind.

    Raises:
        ValueError: As [`image_items`], [`image_size`] and [`array_to_tensor`], or if sizes differ or a PIL image has
            more than 8 bits.
    """
    items = image_items(images)
    sizes = sorted({image_size(item) for item in items})
    if len(sizes) > 1:
        raise ValueError(f"image has different sizes (h, w) in one batch: {sizes}")
    return torch.cat([_item_to_tensor(item) for item in items])


def _item_to_tensor(item: ImageItem) -> torch.Tensor:
    if isinstance(item, PIL.Image.Image):
        if item.mode.startswith(("I", "F")):
            # PIL would cut them off at 255.
            raise ValueError(f"image has mode {item.mode!r}, of more than 8 bits: convert it to 'L' or 'RGB' first")
        item = np.asarray(item.convert("RGB"))
    elif isinstance(item, torch.Tensor) and item.dtype == torch.uint8:
        item = item / 127.5 - 1
    return array_to_tensor(item)
