"""The generator of a command, its classes, and what their images are called."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from flowmo_diffusers.cli.options import EMBEDDED_TOKENIZERS
from flowmo_diffusers.cli.tokenizer import Tokenizer, locate, prepare, quiet_diffusers, to_device
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.pipeline_generation import FlowMoGenerationPipeline


@quiet_diffusers()
def load_generator(args: argparse.Namespace) -> tuple[FlowMoGenerationPipeline, Tokenizer]:
    """
    Raises:
        OSError: If there is no such generator or tokenizer.
        ValueError: If they do not fit each other, and as [`prepare`].
    """
    pipeline, source = assemble(args.model, args.tokenizer)
    tokenizer = prepare(FlowMoPipeline(pipeline.autoencoder, pipeline.scheduler), args, source)
    parts = tokenizer.pipeline.components
    pipeline = FlowMoGenerationPipeline(pipeline.generator, pipeline.token_scheduler, **parts)
    return to_device(pipeline, args), tokenizer


def assemble(model: str, tokenizer: str | None = None) -> tuple[FlowMoGenerationPipeline, str]:
    """
    A generator in float32, and where its tokenizer is from: the model's own folder unless another is named, or it is
    embedded, which leaves it out.
    """
    place = locate(model)
    if tokenizer is None and isinstance(place, Path):
        tokenizer = EMBEDDED_TOKENIZERS.get(model)
    parts = FlowMoPipeline.from_pretrained(locate(tokenizer), dtype=torch.float32).components if tokenizer else {}
    pipeline = FlowMoGenerationPipeline.from_pretrained(place, dtype=torch.float32, **parts)
    return pipeline, tokenizer or model


def class_ids(pipeline: FlowMoGenerationPipeline, labels: Sequence[str]) -> list[int]:
    """
    Ids of classes by number, name or "none", which has the id `null_class`.

    Raises:
        ValueError: If there is no such class.
    """
    return pipeline.class_ids([None if text == "none" else int(text) if text.isdecimal() else text for text in labels])


def file_name(pipeline: FlowMoGenerationPipeline, number: int) -> str:
    """Of a class, without an extension: its number, and its first name in letters that every system has."""
    if number == pipeline.generator.null_class:
        return "none"
    names = {int(key): name for key, name in (pipeline.generator.config.id2label or {}).items()}
    words = re.findall(r"[a-z0-9]+", names.get(number, "").split(",")[0].lower())
    return "-".join([f"{number:03}", *words])
