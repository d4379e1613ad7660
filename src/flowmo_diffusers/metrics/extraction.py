"""Features of the images of a source, computed once, by all processes of a run."""

from pathlib import Path

from accelerate import Accelerator

from flowmo_diffusers.data.measuring import measure_images
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.digests import json_digest
from flowmo_diffusers.metrics.features import FeatureNetwork
from flowmo_diffusers.metrics.frechet import Moments
from flowmo_diffusers.metrics.reconstruction import round_images


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
