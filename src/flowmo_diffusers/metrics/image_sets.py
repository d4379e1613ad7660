"""Two sets of images that are compared must be of one size, and come to it in one way."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.metrics.protocol import Protocol
from flowmo_diffusers.metrics.reconstruction import to_uint8


class SameSize(ImageTransform):
    """
    Images as they are.

    Args:
        size: Height and width that all must have.
    """

    def __init__(self, size: tuple[int, int]):
        super().__init__(size)

    def __call__(self, image: PIL.Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """Raises `ValueError` if the image is of another size."""
        if image.size != (self.width, self.height):
            raise ValueError(
                f"an image has {image.width} x {image.height} pixels where others have {self.width} x {self.height}: "
                "give the size that all are to be resized to (--resolution)"
            )
        return super().__call__(image)


class StoredSamples:
    """
    A transform, and then what is left of its images where they are stored as the protocol has it.

    Args:
        transform: Without anything random.
        protocol: See [`~Protocol.stored`].
    """

    def __init__(self, transform: ImageTransform, protocol: Protocol):
        self.transform = transform
        self.protocol = protocol

    def to_dict(self) -> dict[str, Any]:
        return {**self.transform.to_dict(), "jpeg_quality": self.protocol.jpeg_quality}

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        return self.protocol.stored(self.transform(image)[None])[0]


def first_size(source: ImageSource, name: str) -> tuple[int, int]:
    """
    Height and width of the first image that can be read.

    Args:
        name: What a message calls the images.

    Raises:
        OSError: If none can.
    """
    for number in range(len(source)):
        try:
            image = source[number]
        except BadImage:
            continue
        return image.height, image.width
    raise OSError(f"{name}: none of {len(source)} images can be read")


def common_size(sizes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """
    The height and width that all sets have.

    Args:
        sizes: Of sets of images, by what a message calls them.

    Raises:
        ValueError: If they differ.
    """
    if len(set(sizes.values())) > 1:
        listed = " and ".join(f"{name} of {height} x {width}" for name, (height, width) in sizes.items())
        raise ValueError(
            f"images differ in height x width: {listed}; give the size that all are resized to (--resolution)"
        )
    return next(iter(sizes.values()))


def pixel_arrays(
    source: ImageSource, transform: ImageTransform | StoredSamples, numbers: Sequence[int]
) -> Iterator[np.ndarray]:
    """Images of these numbers, all of which can be read, as (height, width, 3) uint8."""
    for number in numbers:
        yield to_uint8(transform(source[number])).permute(1, 2, 0).numpy()
