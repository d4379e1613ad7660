"""Stage 1C, few-step distillation: the decoder reaches in k steps, unguided, where its teacher arrives in many."""

from dataclasses import dataclass

import torch

from flowmo_diffusers.objectives.flow import FlowDraws, flow_loss, interpolate
from flowmo_diffusers.objectives.posttrain import ChainDraws, sample_chain
from flowmo_diffusers.objectives.pretrain import Perceptual


@dataclass
class DistillationWeights:
    """
    Args:
        sample: Of the squared distance between the student's sample and the teacher's.
        perceptual: Of the perceptual distance between them.
        image: Of the perceptual distance between the student's sample and the image.
        flow: Of L_flow, which holds the velocity where the student's grid does not ask for it.
    """

    sample: float = 1.0
    perceptual: float = 0.1
    image: float = 0.01
    flow: float = 0.1


def distillation_loss(
    model: torch.nn.Module,
    x: torch.Tensor,
    codes: torch.Tensor,
    target: torch.Tensor,
    draws: FlowDraws,
    chain: ChainDraws,
    perceptual: Perceptual | None,
    weights: DistillationWeights,
) -> dict[str, torch.Tensor]:
    """
    L = |y - y_T|^2 + 0.1 d(y, y_T) + 0.01 d(y, x) + 0.1 L_flow, y the student's sample and y_T the teacher's from the
    same noise and codes. Gradients pass through all of the student's steps; terms of weight 0 are not computed.

    Args:
        model: A [`FlowMoAutoencoder`] in training mode with its encoder frozen, wrapped or not.
        x: Images (b, c, h, w) in [-1, 1].
        codes: Of the images (b, tokens, channels).
        target: The teacher's samples from the chain's noise (b, c, h, w).
        draws: For the flow loss, whose codes are dropped at random.
        chain: The student's grid and the noise.
        perceptual: Distance (x, y) -> (b,), or `None` to leave its terms out.

    Returns:
        Scalars by name: "loss" to be minimised, and its unweighted terms.
    """
    y = sample_chain(model, codes, chain)
    terms = {"sample_loss": (y - target).square().mean()}
    loss = weights.sample * terms["sample_loss"]
    if perceptual is not None and weights.perceptual:
        terms["perceptual_loss"] = perceptual(target, y).mean()
        loss = loss + weights.perceptual * terms["perceptual_loss"]
    if perceptual is not None and weights.image:
        terms["image_loss"] = perceptual(x, y).mean()
        loss = loss + weights.image * terms["image_loss"]
    if weights.flow:
        v = model(interpolate(x, draws.z, draws.t), draws.t, codes=codes, code_mask=draws.code_mask).velocity
        terms["flow_loss"] = flow_loss(v, x, draws.z)
        loss = loss + weights.flow * terms["flow_loss"]
    return {"loss": loss, **terms}
