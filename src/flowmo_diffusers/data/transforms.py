"""How an image becomes a tensor."""

import numpy as np
import PIL.Image
import torch

from flowmo_diffusers.data.decoding import BadImage, to_rgb


class ImageTransform:
    """
    An image to a tensor (3, resolution, resolution) in [-1, 1], as the published training did it: the shorter side
    resized to the resolution (bilinear), then a crop.

    Args:
        resolution: Side of the square in pixels.
        random_crop: Crop at random instead of at the centre.
        random_flip: Mirror half of the images.
        max_scale: Resize the shorter side to the resolution times a factor drawn from [1, max_scale], so that random
            crops differ also where images are square. 1 is the published training.
    """

    def __init__(self, resolution: int, random_crop: bool = False, random_flip: bool = False, max_scale: float = 1.0):
        self.resolution = resolution
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.max_scale = max_scale

    def __call__(self, image: PIL.Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        `generator` makes scale, crop and flip; it may be left out where none is random.

        Raises:
            BadImage: If the image is so elongated that it would be resized to more than `PIL.Image.MAX_IMAGE_PIXELS`.
        """
        side = self.resolution
        image = to_rgb(image)
        scale = side / min(image.size)
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height * (scale * self.max_scale) ** 2 > limit:
            raise BadImage(f"{image.width} x {image.height} pixels are too elongated to be resized to {side}")
        if self.max_scale > 1:
            scale *= 1 + (self.max_scale - 1) * torch.rand((), generator=generator).item()
        width, height = (round(length * scale) for length in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
        if self.random_crop:
            left, top = (_draw(0, length - side, generator) for length in (width, height))
        else:
            left, top = (width - side) // 2, (height - side) // 2
        pixels = np.asarray(image)[top : top + side, left : left + side]
        if self.random_flip and _draw(0, 1, generator):
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(127.5).sub_(1)


def _draw(low: int, high: int, generator: torch.Generator | None) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
