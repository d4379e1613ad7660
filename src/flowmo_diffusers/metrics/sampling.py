"""Samples of any pipeline that generates images, each by its number."""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from tqdm.auto import tqdm

from flowmo_diffusers.data.arrays import write_npz
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.digests import config_entries, json_digest, module_digest
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.statistics import add_arrays, read_text


# What a sampler says itself to a pipeline.
_OWN_ARGUMENTS = {"class_labels", "batch_size", "generator", "output_type", "return_dict"}


class PipelineSampler:
    """
    Image i of a pipeline is drawn by a generator of its own: it is the same (but for the rounding of other batch
    sizes) however many images are drawn before it, and by how many processes.

    Args:
        pipeline: Its `__call__` takes `class_labels`, or else `batch_size`.
        seed: Not negative.
        class_labels: Image i is of class `class_labels[i % len(class_labels)]`.
        arguments: Further ones of the pipeline's `__call__`, plain JSON values.

    Raises:
        ValueError: If the pipeline takes neither, needs labels or has none, or does not know an argument.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        seed: int = 0,
        class_labels: Sequence[int] = (),
        arguments: Mapping[str, Any] | None = None,
    ):
        self.pipeline = pipeline
        self.seed = seed
        self.class_labels = list(class_labels)
        self.arguments = dict(arguments or {})
        self._check(set(inspect.signature(pipeline.__call__).parameters))

    def _check(self, known: set[str]) -> None:
        name = type(self.pipeline).__name__
        if not {"class_labels", "batch_size"} & known:
            raise ValueError(f"{name} cannot be sampled: its __call__ takes neither class_labels nor batch_size")
        if not {"generator", "output_type"} <= known:
            raise ValueError(f"{name} cannot be sampled: its __call__ takes no generator or no output_type")
        if bool(self.class_labels) != ("class_labels" in known):
            wrong = "has no classes, but class_labels are" if self.class_labels else "needs class_labels, none are"
            raise ValueError(f"{name} {wrong} given")
        if min(self.class_labels, default=0) < 0:
            raise ValueError(f"class_labels={self.class_labels} must not be negative")
        if unknown := sorted(self.arguments.keys() - known | self.arguments.keys() & _OWN_ARGUMENTS):
            raise ValueError(f"arguments {unknown} cannot be set for {name}: {sorted(known - _OWN_ARGUMENTS)} can")

    @property
    def description(self) -> dict[str, Any]:
        """Plain JSON values, everything that the images depend on."""
        components = sorted(self.pipeline.components.items())
        return {
            "pipeline": type(self.pipeline).__name__,
            "components": {name: _describe(component) for name, component in components},
            "seed": self.seed,
            "class_labels": self.class_labels,
            "arguments": self.arguments,
        }

    def labels(self, numbers: Sequence[int]) -> list[int]:
        """Classes of the images of these numbers; empty where the pipeline has none."""
        return [self.class_labels[n % len(self.class_labels)] for n in numbers] if self.class_labels else []

    def __call__(self, numbers: Sequence[int]) -> torch.Tensor:
        """
        The images of these numbers: (n, height, width, 3) uint8, rounded to the nearest value.

        Raises:
            ValueError: If the pipeline returns anything but colour images, or values that are not finite.
        """
        content = {"class_labels": self.labels(numbers)} if self.class_labels else {"batch_size": len(numbers)}
        generators = [keyed_generator(self.seed, "sample", number) for number in numbers]
        device = self.pipeline.device
        # Some schedulers draw noise besides the generators.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(keyed_generator(self.seed, "noise of samples", numbers[0]).initial_seed())
            images = self.pipeline(**content, **self.arguments, generator=generators, output_type="np").images
        name = type(self.pipeline).__name__
        if images.ndim != 4 or images.shape[::3] != (len(numbers), 3):
            raise ValueError(f"{name} gives {images.shape}, not ({len(numbers)}, height, width, 3)")
        if not np.isfinite(images).all():
            raise ValueError(f"{name} gives images that are not finite among {numbers[0]} to {numbers[-1]}")
        return torch.from_numpy(np.rint(images.clip(0, 1) * 255).astype(np.uint8))


def _describe(component: Any) -> dict[str, Any]:
    """Class, settings and weights; not where they are from or by which version they were saved."""
    described = {"class": type(component).__name__}
    if isinstance(component, ConfigMixin):
        described["config"] = config_entries(component)
    if isinstance(component, torch.nn.Module):
        described["weights"] = module_digest(component)
    return described


def sample_chunks(
    sampler: PipelineSampler,
    count: int,
    folder: str | Path,
    accelerator: Accelerator,
    batch_size: int = 16,
    chunk_size: int = 128,
) -> Chunks:
    """
    Images 0 ... count - 1, kept as they come. Every process must call this; each does its share of what is missing.

    Args:
        folder: In it each kind of samples has a folder of its own.
        batch_size: Images drawn at a time.

    Returns:
        Columns "images" (count, height, width, 3) uint8 and, where there are classes, "label" (count,).
    """
    description = sampler.description
    key = json_digest({**description, "count": count, "chunk_size": chunk_size})
    chunks = Chunks(Path(folder) / key, description, count, chunk_size)
    mine = chunks.missing(accelerator.process_index, accelerator.num_processes)
    total = sum(len(chunks.items(chunk)) for chunk in mine)
    with tqdm(total=total, desc="samples", disable=not accelerator.is_main_process) as progress:
        for chunk in mine:
            numbers, images = chunks.items(chunk), []
            for start in range(0, len(numbers), batch_size):
                images.append(sampler(numbers[start : start + batch_size]))
                progress.update(len(images[-1]))
            labels = {"label": torch.tensor(sampler.labels(numbers))} if sampler.class_labels else {}
            chunks.write(chunk, {"images": torch.cat(images), **labels})
    accelerator.wait_for_everyone()
    return chunks


def sample_npz(
    sampler: PipelineSampler,
    count: int,
    path: str | Path,
    accelerator: Accelerator,
    batch_size: int = 16,
    chunk_size: int = 128,
) -> None:
    """
    Images 0 ... count - 1 as an `.npz` file that guided-diffusion's evaluator reads (`arr_0` and, where there are
    classes, `arr_1`), with a description. It stays as it is if it holds these very images already. What is done is
    kept in a folder beside the file until all is. Every process must call this; see [`sample_chunks`].
    """
    path = Path(path)
    folder = path.with_suffix("")
    description = {**sampler.description, "count": count}
    if not path.is_file() or read_text(path, "description") != description:
        chunks = sample_chunks(sampler, count, folder, accelerator, batch_size, chunk_size)
        if accelerator.is_main_process:
            _pack(chunks, path, description)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)


def _pack(chunks: Chunks, path: Path, description: Mapping[str, Any]) -> None:
    labels = chunks.read("label")["label"].numpy() if "label" in chunks.columns() else None
    images = (image for part in chunks.stream("images") for image in part["images"].numpy())
    with atomic_file(path) as temporary:
        write_npz(temporary, images, chunks.count, labels)
        add_arrays(temporary, {"description": np.array(json.dumps(description))})
