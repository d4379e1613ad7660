"""Held-out images through the tokenizer, by all processes of a run."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator

from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.codebook import codebook_health
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.objectives.perceptual import PerceptualDistance
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline


class Validation:
    """
    Reconstructs the same images from the same noise each time, each process its share.

    Args:
        accelerator: Of the run.
        originals: (n, 3, h, w) in [-1, 1], the same on every process.
        distances: Perceptual networks by name, on the run's device.
        num_inference_steps: Of the sampler; default: those of the pipeline's scheduler.
        batch_size: Images of one process at a time.
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
        self.accelerator = accelerator
        self.originals = originals
        self.distances = dict(distances)
        self.num_inference_steps = num_inference_steps
        self.batch_size = batch_size
        self.seed = seed

    @torch.no_grad()
    def __call__(self, pipeline: FlowMoPipeline) -> tuple[torch.Tensor, dict[str, float]]:
        """
        Every process must call this.

        Returns:
            The reconstructions (n, 3, h, w) on the CPU, and mean figures: "psnr" in dB, the distances by name, and for
            discrete codes those of [`codebook_health`].
        """
        accelerator, count = self.accelerator, len(self.originals)
        share = -(-count // accelerator.num_processes)
        first = accelerator.process_index * share
        # The last processes repeat images: all must run equally often, or sharded ones would wait for ever.
        mine = [number % count for number in range(first, first + share)]
        parts = [self._reconstruct(pipeline, mine[i : i + self.batch_size]) for i in range(0, share, self.batch_size)]
        gathered = {
            name: accelerator.gather(torch.cat([part[name] for part in parts]))[:count].cpu() for name in parts[0]
        }
        images, indices = gathered.pop("images"), gathered.pop("indices", None)
        figures = {name: values.mean().item() for name, values in gathered.items()}
        if indices is not None:
            quantizer = pipeline.autoencoder.quantize
            figures |= codebook_health(indices, quantizer.group_size, quantizer.levels)
        return images, figures

    def _reconstruct(self, pipeline: FlowMoPipeline, numbers: list[int]) -> dict[str, torch.Tensor]:
        x = self.originals[numbers].to(self.accelerator.device)
        generators = [keyed_generator(self.seed, "validation", number) for number in numbers]
        with self.accelerator.autocast():
            output = pipeline(
                x, num_inference_steps=self.num_inference_steps, generator=generators, output_type="latent"
            )
        y = output.images.float()
        measured = {"images": y, "psnr": psnr(x, y)}
        if output.indices is not None:
            measured["indices"] = output.indices
        for name, distance in self.distances.items():
            measured[name] = distance(x, y)
        return measured
