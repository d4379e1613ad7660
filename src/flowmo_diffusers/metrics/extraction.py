"""From the images of a source to rows of numbers, in chunks that survive a kill, by all processes of a run."""

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from flowmo_diffusers.data.numbered import numbered_batches
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.digests import json_digest
from flowmo_diffusers.metrics.features import FeatureNetwork
from flowmo_diffusers.metrics.frechet import Moments
from flowmo_diffusers.metrics.reconstruction import round_images


logger = logging.getLogger(__name__)

Rows = dict[str, torch.Tensor]


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
    """
    Fills the chunks with the rows of the images of a source. Every process must call this; each does its share of what
    is missing, and all return when everything is there.

    Args:
        transform: Without anything random.
        measure: Images (b, 3, h, w) in [-1, 1] and their numbers to one row each.
        batch_size: Images measured at a time.
        label: For the progress bar.
    """
    mine = chunks.missing(accelerator.process_index, accelerator.num_processes)
    batches = {chunk: _split(chunks.items(chunk), batch_size) for chunk in mine}
    loaded = iter(numbered_batches(source, transform, [batch for c in mine for batch in batches[c]], num_workers))
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


def image_features(
    source: ImageSource,
    transform: ImageTransform,
    network: FeatureNetwork,
    cache_dir: str | Path,
    accelerator: Accelerator,
    rounding: str = "nearest",
    batch_size: int = 32,
    chunk_size: int = 512,
    num_workers: int = 0,
    label: str = "features",
) -> Chunks:
    """
    What a feature network says of the images of a source, computed once: the folder's name in the cache is a digest of
    all it depends on, the images, how they are cropped and rounded, and the network. Every process must call this.

    Args:
        rounding: See [`pixels`].

    Returns:
        Columns as the network's outputs, "pool" and maybe "spatial".
    """
    description = {
        "images": source.fingerprint(),
        "transform": transform.to_dict(),
        "rounding": rounding,
        "network": network.description,
    }
    folder = Path(cache_dir) / "features" / json_digest({**description, "chunk_size": chunk_size})
    chunks = Chunks(folder, description, len(source), chunk_size)
    measure_images(
        source,
        transform,
        chunks,
        lambda images, numbers: network(round_images(images, rounding)),
        accelerator,
        batch_size,
        num_workers,
        label,
    )
    return chunks


def moments(chunks: Chunks, column: str) -> Moments:
    """Of a column of features, one chunk in memory at a time."""
    result = None
    for part in chunks.stream(column):
        if column in part:
            result = result or Moments(part[column].shape[1])
            result.add(part[column])
    if result is None:
        raise ValueError(f"{chunks.folder} has no column {column!r}: it has {sorted(chunks.columns())}")
    return result


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
