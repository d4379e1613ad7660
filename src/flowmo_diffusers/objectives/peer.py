"""The loss of FlowMo's trained peers: what their packages have, and nothing adversarial."""

from collections.abc import Callable

import torch


def peer_loss(
    model: torch.nn.Module,
    x: torch.Tensor,
    perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    perceptual_weight: float = 0.1,
) -> dict[str, torch.Tensor]:
    """
    L = |y - x|^2 + L_codebook + w L_perc(x, y), means over all numbers, y the reconstruction.

    L_codebook is what the model returns, with its weights; z what the encoder gives, e the codes nearest to it, sg
    "without gradient":

    - `VQModel`: |sg(e) - z|^2 + 0.25 |e - sg(z)|^2 (VQ-VAE, arXiv 1711.00937, equation 3). It has the quantizer's
      `legacy` form, in which the 0.25 is at the codes and not, as in the paper, at the encoder.
    - [`TiTokModel`]: |e - z|^2, with gradient to both.

    There is no adversarial loss: neither package has a discriminator.

    Args:
        model: A `diffusers.VQModel` or a [`TiTokModel`] in training mode, wrapped or not.
        x: Images (b, 3, h, w) in [-1, 1].
        perceptual: Distance (x, y) -> (b,), or `None` to leave the term out.
        perceptual_weight: w.

    Returns:
        Scalars by name: "loss" to be minimised, and its terms: "reconstruction_loss", "codebook_loss" and, unweighted,
        "perceptual_loss".
    """
    y, codebook_loss = model(x, return_dict=False)
    y = y.float()
    terms = {"reconstruction_loss": (y - x).square().mean(), "codebook_loss": codebook_loss}
    loss = terms["reconstruction_loss"] + terms["codebook_loss"]
    if perceptual is not None:
        terms["perceptual_loss"] = perceptual(x, y).mean()
        loss = loss + perceptual_weight * terms["perceptual_loss"]
    return {"loss": loss, **terms}
