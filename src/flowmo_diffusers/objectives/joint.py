"""LFQ's batch entropy over everything one optimiser step sees, not over each process's batch alone."""

from collections.abc import Callable, Sequence

import torch

from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder


class JointCodeDistribution:
    """
    The mean code distribution E[q] over all processes and accumulated batches, given to the model's quantizer. Without
    it H(E[q]) is that of the batch of one process, as published, and changes with how a batch is spread.

    One exchange of 2^K numbers a batch. Accumulated batches have to be known before the first backward:
    [`~JointCodeDistribution.observe`] costs one more pass through the encoder, without autograd.

    Args:
        model: Its quantizer must be "lfq".
        average: Averages a tensor over processes, say `lambda mean: accelerator.reduce(mean, "mean")`.

    Raises:
        ValueError: If the quantizer has no batch entropy.
    """

    def __init__(self, model: FlowMoAutoencoder, average: Callable[[torch.Tensor], torch.Tensor]):
        if model.config.quantizer != "lfq":
            raise ValueError(f'a joint entropy needs quantizer="lfq"; this model has {model.config.quantizer!r}')
        self.average = average
        self.latest: torch.Tensor | None = None
        self.known: torch.Tensor | None = None
        model.quantize.joint_mean = self

    def __call__(self, mean: torch.Tensor) -> torch.Tensor:
        if self.known is not None:
            return self.known
        self.latest = self.average(mean)
        return self.latest

    @torch.no_grad()
    def observe(self, encode: Callable[[torch.Tensor], object], batches: Sequence[torch.Tensor]) -> None:
        """
        Fixes the distribution to that of `batches`, until it is called again.

        Args:
            encode: Runs the model's encoder and quantizer on images, in training mode.
            batches: The images (b, c, h, w) that one optimiser step accumulates, of equal size.
        """
        self.known = None
        means = []
        for images in batches:
            encode(images)
            means.append(self.latest)
        self.known = torch.stack(means).mean(0)
