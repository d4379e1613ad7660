"""What is evaluated: anything that stores an image in some bytes and brings it back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flowmo_diffusers.engine.digests import config_entries, module_digest
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline


WINDOWS = ("window_size", "window_overlap")  # what encoding needs to know as well


@dataclass
class Reconstruction:
    """
    Args:
        images: (b, 3, h, w) float32 in [-1, 1].
        num_bytes: (b,) float64, what is stored of each image; may be a fraction.
        indices: (b, tokens, groups) int64 where the codes are discrete, of all windows one after another.
    """

    images: torch.Tensor
    num_bytes: torch.Tensor
    indices: torch.Tensor | None = None


class Reconstructor(ABC):
    """
    Images to what is stored of them and back.

    Args:
        name: Of its row in a table.
        settings: Plain JSON values, everything that its results depend on.
    """

    codebook_size: int | None = None  # codes that one of its indices can name, where there are any

    def __init__(self, name: str, settings: dict[str, Any]):
        self.name = name
        self.settings = settings

    @abstractmethod
    def __call__(self, images: torch.Tensor, numbers: Sequence[int]) -> Reconstruction:
        """
        Args:
            images: (b, 3, h, w) in [-1, 1].
            numbers: Of the images in their data set; what is random is drawn for each from its number, so that results
                do not depend on batches and processes.
        """


class FlowMoReconstructor(Reconstructor):
    """
    A FlowMo pipeline. The bytes counted are those of [`FlowMoAutoencoder.pack_codes`], or 2 a number (float16, to
    which the codes are really rounded) where the quantizer is not discrete.

    Args:
        pipeline: On its device, in its dtype.
        name: Of its row.
        seed: Of the noise that decoding starts from.
        sampling: Arguments of the pipeline's call, such as {"num_inference_steps": 8} or {"window_size": 256}; what is
            left out has the pipeline's default.
    """

    def __init__(self, pipeline: FlowMoPipeline, name: str, seed: int = 0, sampling: dict[str, Any] | None = None):
        self.pipeline = pipeline
        self.seed = seed
        self.sampling = dict(sampling or {})
        settings = {
            "class": type(pipeline).__name__,
            "weights": module_digest(pipeline.autoencoder),
            "autoencoder": config_entries(pipeline.autoencoder),
            "dtype": str(pipeline.autoencoder.dtype),
            "scheduler": config_entries(pipeline.scheduler),
            "seed": seed,
            "sampling": dict(self.sampling),
        }
        self.windows = {name: self.sampling.pop(name) for name in WINDOWS if name in self.sampling}
        quantizer = pipeline.autoencoder.quantize
        if quantizer.is_discrete:
            self.codebook_size = quantizer.levels**quantizer.group_size
        super().__init__(name, settings)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, numbers: Sequence[int]) -> Reconstruction:
        pipeline, autoencoder = self.pipeline, self.pipeline.autoencoder
        generators = [keyed_generator(self.seed, "encoding", n) for n in numbers]
        tokens = pipeline.encode(images, generator=generators, **self.windows)
        if autoencoder.quantize.is_discrete:
            rows = tokens if self.windows else tokens[:, None]  # one image's windows
            stored = [b"".join(autoencoder.pack_codes(autoencoder.indices_to_codes(row))) for row in rows]
            num_bytes = torch.tensor([len(packed) for packed in stored], dtype=torch.float64)
        else:
            tokens = tokens.half().to(tokens.dtype)
            stored, num_bytes = tokens, torch.full((len(images),), 2.0 * tokens[0].numel(), dtype=torch.float64)
        reconstructions = pipeline.decode(
            stored,
            height=images.shape[-2],
            width=images.shape[-1],
            generator=[keyed_generator(self.seed, "decoding", n) for n in numbers],
            output_type="latent",
            **self.sampling,
            **self.windows,
        )
        indices = tokens.flatten(1, -2).cpu() if autoencoder.quantize.is_discrete else None
        return Reconstruction(reconstructions.float().cpu().clamp(-1, 1), num_bytes, indices)
