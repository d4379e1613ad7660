"""Stage 1B, mode-seeking post-training: the decoder alone, through its own sampling chain (paper section 3.3)."""

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from flowmo_diffusers.engine.seeding import Generators, draw_uniform
from flowmo_diffusers.objectives.flow import FlowDraws, flow_loss, interpolate
from flowmo_diffusers.objectives.pretrain import LossWeights, Perceptual


def chain_times(u: torch.Tensor) -> torch.Tensor:
    """
    A random grid from 1 to 0 for each sample: t_i = sum_{j >= i} u_j / sum_j u_j.

    Args:
        u: Uniform draws (b, k + 1); the first only shifts and cancels, as in the published code.

    Returns:
        Times (b, k + 1), falling from 1 to 0.
    """
    sums = u.cumsum(dim=1)
    sums = sums - sums[:, :1]
    return (sums / sums[:, -1:]).flip(1)


@dataclass
class ChainDraws:
    """
    Everything random in the sampling chain of one batch.

    Args:
        z: The noise the chain starts from (b, c, h, w).
        times: Its grid (b, k + 1), falling from 1 to 0.
    """

    z: torch.Tensor
    times: torch.Tensor

    @classmethod
    def sample(cls, x: torch.Tensor, generators: list[torch.Generator], num_steps: int = 8) -> "ChainDraws":
        """Draws for images `x`, one generator an image."""
        z = randn_tensor(x.shape, generators, x.device)
        return cls(z=z, times=chain_times(draw_uniform((len(x), num_steps + 1), generators, x.device)))


def sample_chain(model: torch.nn.Module, codes: torch.Tensor, draws: ChainDraws) -> torch.Tensor:
    """
    Euler steps from noise to image, with gradients through every one of them.

    The model's own gradient checkpointing (`enable_gradient_checkpointing`) keeps the memory of k steps near that of
    one; it stands inside the model so that it works under every kind of parallel wrapper.
    """
    x_t = draws.z
    for t, t_next in zip(draws.times[:, :-1].T, draws.times[:, 1:].T, strict=True):
        v = model(x_t, t, codes=codes).velocity
        x_t = x_t - (t - t_next)[:, None, None, None] * v.float()
    return x_t


def posttraining_loss(
    model: torch.nn.Module,
    x: torch.Tensor,
    draws: FlowDraws,
    chain: ChainDraws,
    perceptual: Perceptual,
    weights: LossWeights,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """
    L = L_flow + 0.01 L_sample, L_sample the perceptual distance between x and the chain's sample. The encoder runs
    without autograd; its quantizer terms are constants that are reported in the sum as published.

    Args:
        model: A [`FlowMoAutoencoder`] in training mode with its encoder frozen, wrapped or not.
        x: Images (b, c, h, w) in [-1, 1].
        draws: For the flow loss, whose codes are dropped at random.
        chain: For the sample, whose codes never are.
        generator: For the Gaussian draw of a "kl" model, one or one an image.

    Returns:
        Scalars by name: "loss" to be minimised, and its unweighted terms.
    """
    with torch.no_grad():
        encoded = model(images=x, generator=generator)
    v = model(interpolate(x, draws.z, draws.t), draws.t, codes=encoded.codes, code_mask=draws.code_mask).velocity
    terms = {
        "flow_loss": flow_loss(v, x, draws.z),
        "sample_loss": perceptual(x, sample_chain(model, encoded.codes, chain)).mean(),
    }
    quantizer = weights.quantizer(encoded.quantizer_losses)
    loss = terms["flow_loss"] + weights.perceptual * terms["sample_loss"] + quantizer
    return {"loss": loss, **terms, **encoded.quantizer_losses}
