"""How an image becomes a tensor."""

from typing import Any

import numpy as np
import PIL.Image
import torch

from flowmo_diffusers.data.decoding import BadImage, to_rgb


# "adm" is bicubic too, after halving; see `ImageTransform`.
INTERPOLATIONS = {
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "adm": PIL.Image.Resampling.BICUBIC,
}
CROPS = ("center", "torchvision", "none")


class ImageTransform:
    """
    An image to a tensor (3, height, width) in [-1, 1]. By default this is as FlowMo was trained: resized (bilinear)
    so that it just covers the square, then cropped.

    Args:
        resolution: Side of the square in pixels, or (height, width).
        random_crop: Crop at random instead of at the centre.
        random_flip: Mirror half of the images.
        max_scale: Resize to the smallest size that covers the crop times a factor drawn from [1, max_scale], so that
            random crops differ also where images are square. 1 is the published training.
        interpolation: "bilinear", "bicubic" or "lanczos", all of them Pillow's, which average over what a new pixel
            covers. "adm" is that of guided-diffusion and the generators after it: while the image is at least twice
            as large as it has to be, it is halved by averages of 2 x 2 pixels, then resized by "bicubic".
        crop: "center". "torchvision" is as its `Resize` and `CenterCrop` have it, which the published FlowMo
            evaluation uses: the longer side is rounded down instead of to the nearest, and the place of the crop is
            rounded to the nearest (even) instead of down, a difference of at most one pixel. "none": the whole image
            is resized to the resolution, whatever its proportions.

    Raises:
        ValueError: If interpolation or crop is unknown, or something random is asked for that `crop` leaves no room
            for.
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        random_crop: bool = False,
        random_flip: bool = False,
        max_scale: float = 1.0,
        interpolation: str = "bilinear",
        crop: str = "center",
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={interpolation!r} must be one of {list(INTERPOLATIONS)}")
        if crop not in CROPS:
            raise ValueError(f"crop={crop!r} must be one of {list(CROPS)}")
        if crop != "center" and (random_crop or max_scale > 1):
            raise ValueError(f"crop={crop!r} has no place for random_crop={random_crop} or max_scale={max_scale}")
        self.resolution = resolution
        self.height, self.width = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.max_scale = max_scale
        self.interpolation = interpolation
        self.crop = crop

    def to_dict(self) -> dict[str, Any]:
        """All that a result depends on beside the image and the generator, as plain JSON values."""
        return vars(self) | {"resolution": [self.height, self.width]}

    def __call__(self, image: PIL.Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        `generator` makes scale, crop and flip; it may be left out where none is random.

        Raises:
            BadImage: If the image is so elongated that it would be resized to more than `PIL.Image.MAX_IMAGE_PIXELS`.
        """
        image = to_rgb(image)
        if self.interpolation == "adm":
            image = self._halve(image)
        size = self._resized(image, generator)
        if size != image.size:
            image = image.resize(size, INTERPOLATIONS[self.interpolation])
        left, top = self._place(image, generator)
        pixels = np.asarray(image)[top : top + self.height, left : left + self.width]
        if self.random_flip and _draw(0, 1, generator):
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(127.5).sub_(1)

    def _halve(self, image: PIL.Image.Image) -> PIL.Image.Image:
        while image.width >= 2 * self.width and image.height >= 2 * self.height:
            image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
        return image

    def _resized(self, image: PIL.Image.Image, generator: torch.Generator | None) -> tuple[int, int]:
        """Width and height that the image is resized to before it is cropped."""
        if self.crop == "none":
            return self.width, self.height
        # Of the side that just covers the crop, while the other one covers more.
        wanted, side = max((self.width, image.width), (self.height, image.height), key=lambda pair: pair[0] / pair[1])
        scale = wanted / side
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height * (scale * self.max_scale) ** 2 > limit:
            raise BadImage(f"{image.width} x {image.height} pixels are too elongated to be resized to {wanted}")
        if self.crop == "torchvision":
            return int(wanted * image.width / side), int(wanted * image.height / side)
        if self.max_scale > 1:
            scale *= 1 + (self.max_scale - 1) * torch.rand((), generator=generator).item()
        return round(image.width * scale), round(image.height * scale)

    def _place(self, image: PIL.Image.Image, generator: torch.Generator | None) -> tuple[int, int]:
        """Left and top of the crop in the resized image."""
        rest = image.width - self.width, image.height - self.height
        if self.random_crop:
            return _draw(0, rest[0], generator), _draw(0, rest[1], generator)
        if self.crop == "torchvision":
            return round(rest[0] / 2), round(rest[1] / 2)
        return rest[0] // 2, rest[1] // 2


def _draw(low: int, high: int, generator: torch.Generator | None) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
