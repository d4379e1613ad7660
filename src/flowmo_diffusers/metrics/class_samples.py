"""A picture of what a generator makes of each class."""

from typing import Any

import PIL.Image

from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.pipelines.pipeline_generation import FlowMoGenerationPipeline


def class_samples(
    pipeline: FlowMoGenerationPipeline,
    num_classes: int = 10,
    images_per_class: int = 8,
    seed: int = 0,
    decode_batch_size: int | None = 16,
    **sampling: Any,
) -> PIL.Image.Image:
    """
    A row of samples for each class, or for so many of them, spread evenly; a row of no class where there are none.

    Args:
        seed: Sample k of a class comes from the same noise each time.
        sampling: Arguments of the pipeline's call.
    """
    config = pipeline.generator.config
    count = min(num_classes, config.num_classes)
    classes = [number * config.num_classes // count for number in range(count)] if count else [None]
    names = config.id2label or {}
    labels = [label for label in classes for _ in range(images_per_class)]
    generators = [keyed_generator(seed, "class sample", number) for number in range(len(labels))]
    images = pipeline(
        class_labels=labels,
        generator=generators,
        decode_batch_size=decode_batch_size,
        output_type="latent",
        **sampling,
    ).images
    rows = images.float().cpu().split(images_per_class)
    titles = ["no class" if label is None else names.get(label, f"class {label}") for label in classes]
    return labelled_rows({f"{n}  {title}": row for n, (title, row) in enumerate(zip(titles, rows, strict=True))})
