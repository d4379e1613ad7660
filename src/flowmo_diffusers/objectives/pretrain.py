"""Stage 1A, mode-matching pre-training: encoder and decoder end to end (paper section 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flowmo_diffusers.engine.seeding import Generators
from flowmo_diffusers.objectives.flow import FlowDraws, flow_loss, interpolate, one_step_estimate


Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class LossWeights:
    """Weights of the terms beside L_flow. The paper's perceptual weight is 0.1 in stage 1A and 0.01 in stage 1B."""

    perceptual: float = 0.1
    entropy: float = 0.0025
    commit: float = 0.000625
    kl: float = 1.0

    def quantizer(self, losses: dict[str, torch.Tensor]) -> torch.Tensor | float:
        """The weighted sum of a quantizer's terms; those that only inform have no weight."""
        weights = {"entropy_loss": self.entropy, "commit_loss": self.commit, "kl_loss": self.kl}
        return sum(weights[name] * value for name, value in losses.items() if name in weights)


def pretraining_loss(
    model: torch.nn.Module,
    x: torch.Tensor,
    draws: FlowDraws,
    perceptual: Perceptual | None = None,
    weights: LossWeights | None = None,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """
    L = L_flow + 0.1 L_perc + 0.0025 L_ent + 0.000625 L_commit, L_perc between x and its one-step estimate.

    Args:
        model: A [`FlowMoAutoencoder`] in training mode, wrapped or not.
        x: Images (b, c, h, w) in [-1, 1].
        perceptual: Distance (x, y) -> (b,), or `None` to leave the term out.
        weights: Defaults to the paper's.
        generator: For the Gaussian draw of a "kl" model, one or one an image.

    Returns:
        Scalars by name: "loss" to be minimised, and its unweighted terms.
    """
    weights = weights or LossWeights()
    x_t = interpolate(x, draws.z, draws.t)
    output = model(x_t, draws.t, images=x, code_mask=draws.code_mask, generator=generator)
    terms = {"flow_loss": flow_loss(output.velocity, x, draws.z)}
    loss = terms["flow_loss"] + weights.quantizer(output.quantizer_losses)
    if perceptual is not None:
        estimate = one_step_estimate(x_t, draws.t, output.velocity.float())
        terms["perceptual_loss"] = perceptual(x, estimate).mean()
        loss = loss + weights.perceptual * terms["perceptual_loss"]
    return {"loss": loss, **terms, **output.quantizer_losses}
