"""From numbered images to rows of numbers, in chunks that survive a kill, by all processes of a run."""

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from flowmo_diffusers.data.numbered import NumberedImages, numbered_batches
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks


logger = logging.getLogger(__name__)

Rows = dict[str, torch.Tensor]


def measure_numbered(
    images: NumberedImages,
    chunks: Chunks,
    measure: Callable[[torch.Tensor, Sequence[int]], Rows],
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
    label: str = "images",
) -> None:
    """
    Fills the chunks with the rows of the images of these numbers. Every process must call this; each does its share of
    what is missing, and all return when everything is there.

    Args:
        images: As many as the chunks have items.
        measure: Images (b, 3, h, w) in [-1, 1] and their numbers to one row each.
        batch_size: Images measured at a time.
        label: For the progress bar.
    """
    mine = chunks.missing(accelerator.process_index, accelerator.num_processes)
    batches = {chunk: _split(chunks.items(chunk), batch_size) for chunk in mine}
    loaded = iter(numbered_batches(images, [batch for c in mine for batch in batches[c]], num_workers))
    total = sum(len(chunks.items(chunk)) for chunk in mine)
    with tqdm(total=total, desc=label, disable=not accelerator.is_main_process) as progress:
        for chunk in mine:
            parts, bad = [], []
            for batch in islice(loaded, len(batches[chunk])):
                bad += batch.bad
                if batch.numbers:
                    rows = measure(batch.images, batch.numbers)
                    parts.append({**rows, "number": torch.tensor(batch.numbers)})
                progress.update(len(batch.numbers) + len(batch.bad))
            rows = {name: torch.cat([part[name].cpu() for part in parts]) for name in (parts[0] if parts else ())}
            chunks.write(chunk, rows, bad)
    accelerator.wait_for_everyone()


def _split(numbers: range, batch_size: int) -> list[range]:
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


def measure_images(
    source: ImageSource,
    transform: ImageTransform,
    chunks: Chunks,
    measure: Callable[[torch.Tensor, Sequence[int]], Rows],
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
    label: str = "images",
) -> None:
    """[`measure_numbered`] of the images of a source, cropped by a transform without anything random."""
    images = NumberedImages(source, transform)
    measure_numbered(images, chunks, measure, accelerator, batch_size, num_workers, label)


def describe_bad(chunks: Chunks, max_fraction: float) -> list[Any]:
    """
    The bad images of finished chunks as [name, reason]; they are left out of all figures, and logged.

    Raises:
        OSError: If they are more than this fraction of all.
    """
    bad = chunks.notes()
    listed = ", ".join(f"{name} ({reason})" for name, reason in bad[:10]) + (" ..." if len(bad) > 10 else "")
    if len(bad) > max_fraction * chunks.count or len(bad) == chunks.count:
        raise OSError(f"{len(bad)} of {chunks.count} images cannot be used: {listed}")
    if bad:
        logger.warning(f"{len(bad)} of {chunks.count} images are left out: {listed}")
    return bad
