"""Held-out images through the tokenizer, by all processes of a run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.codebook import codebook_health, codebook_use
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.metrics.reconstructors import Reconstructor
from flowmo_diffusers.objectives.perceptual import PerceptualDistance
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline


class ImageValidation(ABC):
    """
    Reconstructs the same images each time, each process its share.

    Args:
        accelerator: Of the run.
        originals: (n, 3, h, w) in [-1, 1], the same on every process.
        distances: Perceptual networks by name, on the run's device.
        batch_size: Images of one process at a time.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        originals: torch.Tensor,
        distances: Mapping[str, PerceptualDistance],
        batch_size: int = 64,
    ):
        self.accelerator = accelerator
        self.originals = originals
        self.distances = dict(distances)
        self.batch_size = batch_size

    @abstractmethod
    def reconstruct(self, tokenizer: Any, x: torch.Tensor, numbers: list[int]) -> tuple[torch.Tensor, Any]:
        """Images like `x`, which are the held-out ones of these numbers, and indices (b, tokens, groups) or `None`."""

    @abstractmethod
    def code_figures(self, tokenizer: Any, indices: torch.Tensor) -> dict[str, float]:
        """Of the indices of all images."""

    @torch.no_grad()
    def __call__(self, tokenizer: Any) -> tuple[torch.Tensor, dict[str, float]]:
        """
        Every process must call this.

        Returns:
            The reconstructions (n, 3, h, w) on the CPU, and mean figures: "psnr" in dB, the distances by name, and for
            discrete codes those of the codebook.
        """
        accelerator, count = self.accelerator, len(self.originals)
        share = -(-count // accelerator.num_processes)
        first = accelerator.process_index * share
        # The last processes repeat images: all must run equally often, or sharded ones would wait for ever.
        mine = [number % count for number in range(first, first + share)]
        parts = [self._measure(tokenizer, mine[i : i + self.batch_size]) for i in range(0, share, self.batch_size)]
        gathered = {
            name: accelerator.gather(torch.cat([part[name] for part in parts]))[:count].cpu() for name in parts[0]
        }
        images, indices = gathered.pop("images"), gathered.pop("indices", None)
        figures = {name: values.mean().item() for name, values in gathered.items()}
        if indices is not None:
            figures |= self.code_figures(tokenizer, indices)
        return images, figures

    def _measure(self, tokenizer: Any, numbers: list[int]) -> dict[str, torch.Tensor]:
        x = self.originals[numbers].to(self.accelerator.device)
        with self.accelerator.autocast():
            y, indices = self.reconstruct(tokenizer, x, numbers)
        y = y.to(x.device, torch.float32)
        measured = {"images": y, "psnr": psnr(x, y)}
        if indices is not None:
            measured["indices"] = indices.to(x.device)
        for name, distance in self.distances.items():
            measured[name] = distance(x, y)
        return measured


class Validation(ImageValidation):
    """
    Of a FlowMo pipeline, from the same noise each time.

    Args:
        accelerator: See [`ImageValidation`], as for `originals`, `distances` and `batch_size`.
        num_inference_steps: Of the sampler; default: those of the pipeline's scheduler.
        seed: Of the noise.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        originals: torch.Tensor,
        distances: Mapping[str, PerceptualDistance],
        num_inference_steps: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ):
        super().__init__(accelerator, originals, distances, batch_size)
        self.num_inference_steps = num_inference_steps
        self.seed = seed

    def reconstruct(
        self, tokenizer: FlowMoPipeline, x: torch.Tensor, numbers: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        generators = [keyed_generator(self.seed, "validation", number) for number in numbers]
        output = tokenizer(x, num_inference_steps=self.num_inference_steps, generator=generators, output_type="latent")
        return output.images, output.indices

    def code_figures(self, tokenizer: FlowMoPipeline, indices: torch.Tensor) -> dict[str, float]:
        """Those of [`codebook_health`]."""
        quantizer = tokenizer.autoencoder.quantize
        return codebook_health(indices, quantizer.group_size, quantizer.levels)


class PeerValidation(ImageValidation):
    """Of a peer, as evaluation measures it: a [`Reconstructor`]."""

    def reconstruct(
        self, tokenizer: Reconstructor, x: torch.Tensor, numbers: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = tokenizer(x, numbers)
        return output.images, output.indices

    def code_figures(self, tokenizer: Reconstructor, indices: torch.Tensor) -> dict[str, float]:
        """Those of [`codebook_use`]."""
        return codebook_use(indices, tokenizer.codebook_size)
