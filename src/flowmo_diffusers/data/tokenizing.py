"""Images to stored tokens: which crops of them, and their codes, by all processes of a run."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator

from flowmo_diffusers.data.measuring import measure_numbered
from flowmo_diffusers.data.numbered import NumberedImages
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder


class ImageVariants(NumberedImages):
    """
    Several crops of each image of a source. Number i is variant `i % variants` of image `i // variants`; variant v is
    crop `v % num_crops`, mirrored from `v = num_crops` on. Crop 0 is the one at the centre; the others are drawn from
    (seed, image, crop).

    Args:
        source: Images.
        resolution: Side of the square in pixels, or (height, width).
        num_crops: Crops of an image, at least 1.
        random_scale: See `max_scale` of [`ImageTransform`]; of the random crops. Where images are square, these differ
            only if it is above 1.
        flip: Each crop is there mirrored too.
        seed: Of the random crops, not negative.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: int | tuple[int, int],
        num_crops: int = 1,
        random_scale: float = 1.0,
        flip: bool = False,
        seed: int = 0,
    ):
        super().__init__(source, ImageTransform(resolution))
        self.random_transform = ImageTransform(resolution, random_crop=True, max_scale=random_scale)
        self.num_crops = num_crops
        self.random_scale = random_scale
        self.flip = flip
        self.seed = seed
        self._last: tuple[int, PIL.Image.Image] | None = None

    @property
    def variants(self) -> int:
        """How many there are of each image."""
        return self.num_crops * (2 if self.flip else 1)

    @property
    def description(self) -> dict[str, Any]:
        """All that they depend on beside the images, as plain JSON values."""
        drawn = {"random_scale": self.random_scale, "seed": self.seed} if self.num_crops > 1 else {}
        return {**self.transform.to_dict(), "num_crops": self.num_crops, "flip": self.flip, **drawn}

    def __len__(self) -> int:
        return len(self.source) * self.variants

    def pixels(self, number: int) -> torch.Tensor:
        """(3, h, w) in [-1, 1]. Raises [`BadImage`] if it cannot be used."""
        index, variant = divmod(number, self.variants)
        flipped, crop = divmod(variant, self.num_crops)
        image = self._image(index)
        if crop == 0:
            pixels = self.transform(image)
        else:
            pixels = self.random_transform(image, keyed_generator(self.seed, f"crop {crop}", index))
        return pixels.flip(-1) if flipped else pixels

    def name(self, number: int) -> str:
        index, variant = divmod(number, self.variants)
        return self.source.name(index) + (f" (variant {variant})" if self.variants > 1 else "")

    def _image(self, index: int) -> PIL.Image.Image:
        """Decoded once for variants that follow each other."""
        if self._last is None or self._last[0] != index:
            self._last = index, self.source[index]
        return self._last[1]


class _Tokenizer:
    """Images to packed codes, and the seconds that passed since those before were done, loading included."""

    def __init__(self, autoencoder: FlowMoAutoencoder, accelerator: Accelerator):
        self.autoencoder = autoencoder
        self.accelerator = accelerator
        self.done = time.perf_counter()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            codes = self.autoencoder.encode(images.to(self.accelerator.device)).codes
        packed = self.autoencoder.quantize.pack(codes).cpu()
        before, self.done = self.done, time.perf_counter()
        seconds = torch.full((len(packed),), (self.done - before) / len(packed))
        return {"packed": packed, "seconds": seconds}


def tokenize(
    autoencoder: FlowMoAutoencoder,
    variants: ImageVariants,
    folder: str | Path,
    description: dict[str, Any],
    accelerator: Accelerator,
    batch_size: int = 64,
    chunk_size: int = 4096,
    num_workers: int = 0,
) -> Chunks:
    """
    The packed codes of all variants, kept as they come: a killed run goes on. Every process must call this; each does
    its share of what is missing.

    Args:
        autoencoder: On the accelerator's device.
        folder: Of these results alone.
        description: Plain JSON values, everything that the tokens depend on.
        batch_size: Images of one process at a time.
        chunk_size: Images after which results are kept.

    Returns:
        Columns "packed" (n, bytes) uint8, "number" (n,) int64 and "seconds" (n,) that one process took of each.

    Raises:
        ValueError: If the folder holds results of another description; names the difference.
    """
    chunks = Chunks(folder, description, len(variants), chunk_size)
    measure = _Tokenizer(autoencoder, accelerator)
    measure_numbered(variants, chunks, measure, accelerator, batch_size, num_workers, "tokens")
    return chunks
