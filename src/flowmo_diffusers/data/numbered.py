"""Images by number, each once, as tensors: for evaluation and tokenizing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.signals import follow_parent


@dataclass
class NumberedBatch:
    """
    Args:
        images: (b, 3, h, w) in [-1, 1]; b is 0 where all are bad.
        numbers: Of these images in their source.
        bad: Name and reason of those that cannot be used.
    """

    images: torch.Tensor
    numbers: list[int]
    bad: list[tuple[str, str]] = field(default_factory=list)


class NumberedImages(Dataset):
    """
    The images of a source as tensors.

    Args:
        source: Images.
        transform: Without anything random.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform):
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def pixels(self, number: int) -> torch.Tensor:
        """(3, h, w) in [-1, 1]. Raises [`BadImage`] if it cannot be used."""
        return self.transform(self.source[number])

    def name(self, number: int) -> str:
        """Where a person finds it."""
        return self.source.name(number)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor | None, tuple[str, str] | None]:
        try:
            return number, self.pixels(number), None
        except BadImage as error:
            return number, None, (self.name(number), str(error))


def numbered_batches(images: NumberedImages, batches: Sequence[Sequence[int]], num_workers: int = 0) -> DataLoader:
    """
    Loads the images of these numbers: one [`NumberedBatch`] for each sequence.

    Args:
        num_workers: Worker processes, each with one thread; 0 loads in this process.
    """
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=follow_parent,
        generator=torch.Generator(),  # else it would draw from the global one
    )


def _collate(items: list[tuple[int, torch.Tensor | None, tuple[str, str] | None]]) -> NumberedBatch:
    good = [(number, image) for number, image, _ in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, 0, 0)
    return NumberedBatch(images, [number for number, _ in good], [bad for *_, bad in items if bad is not None])
