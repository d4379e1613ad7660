"""Held-out tokens through a token generator, by all processes of a run."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.models.token_generator import FlowMoTokenGenerator
from flowmo_diffusers.objectives.tokens import log_likelihood, masked_losses


# Midpoints of equal parts of [0, 1]: the mean of the losses at these is that over all ratios, by the midpoint rule.
MASK_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


class TokenValidation:
    """
    The loss on the same tokens, hidden in the same places, each time. Each process does its share.

    Args:
        accelerator: Of the run.
        indices: (n, tokens, groups) int64, the same on every process.
        class_labels: (n,) int64.
        ratios: Masking ratios at which a masked generator is asked.
        batch_size: Images of one process at a time.
        seed: Of what is hidden.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        indices: torch.Tensor,
        class_labels: torch.Tensor,
        ratios: Sequence[float] = MASK_RATIOS,
        batch_size: int = 64,
        seed: int = 0,
    ):
        self.accelerator = accelerator
        self.indices = indices
        self.class_labels = class_labels
        self.ratios = tuple(ratios)
        self.batch_size = batch_size
        self.seed = seed

    @torch.no_grad()
    def __call__(self, model: FlowMoTokenGenerator) -> dict[str, float]:
        """
        Every process must call this.

        Returns:
            Means over the images: "token_loss", in nats a group (of a masked generator an estimate of an upper
            bound, see [`masked_losses`]; exact of an autoregressive one), "bits_per_bit", the same as bits a bit that
            is stored (1 is no better than a coin), and of a masked generator "token_loss_at_0.5" for each ratio.
        """
        accelerator, count = self.accelerator, len(self.indices)
        share = -(-count // accelerator.num_processes)
        first = accelerator.process_index * share
        # The last processes repeat images: all must run equally often, or sharded ones would wait for ever.
        mine = [number % count for number in range(first, first + share)]
        parts = [self._losses(model, mine[i : i + self.batch_size]) for i in range(0, share, self.batch_size)]
        losses = accelerator.gather(torch.cat(parts))[:count].mean(0).tolist()
        mean = sum(losses) / len(losses)
        figures = {"token_loss": mean, "bits_per_bit": mean / math.log(2) / model.config.group_bits}
        if model.config.order == "masked":
            figures |= {f"token_loss_at_{ratio:g}": loss for ratio, loss in zip(self.ratios, losses, strict=True)}
        return figures

    def _losses(self, model: FlowMoTokenGenerator, numbers: list[int]) -> torch.Tensor:
        """(b, ratios), or (b, 1) for an autoregressive generator."""
        device = self.accelerator.device
        indices, labels = self.indices[numbers].to(device), self.class_labels[numbers].to(device)
        with self.accelerator.autocast():
            if model.config.order != "masked":
                return -log_likelihood(model, indices, labels)[:, None] / indices[0].numel()
            columns = []
            for ratio in self.ratios:
                generators = [keyed_generator(self.seed, f"validation at {ratio}", n, device) for n in numbers]
                columns.append(masked_losses(model, indices, labels, ratio, generators))
        return torch.stack(columns, dim=1)
