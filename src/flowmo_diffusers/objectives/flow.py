"""Rectified flow (paper section 3.2): t = 0 is the image x, t = 1 is noise z."""

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from flowmo_diffusers.engine.seeding import draw_uniform


def interpolate(x: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = t z + (1 - t) x, for images (b, c, h, w) and times (b,)."""
    t = t[:, None, None, None]
    return t * z + (1 - t) * x


def flow_loss(v: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """L_flow = E |v - (z - x)|^2."""
    return (v.float() - (z - x)).square().mean()


def one_step_estimate(x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The image at the end of a straight path: x_t - t v."""
    return x_t - t[:, None, None, None] * v


def thick_tailed(normal: torch.Tensor, selector: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """
    Noise levels that are logit-normal with probability 0.9 and uniform on [0, 1] otherwise (section 3.2): the
    logit-normal alone puts no mass at t = 1 and discolours images.

    Args:
        normal: Standard normal draws (b,).
        selector: Uniform draws (b,); above 0.9 the uniform level is taken.
        uniform: Uniform draws (b,).
    """
    return torch.where(selector <= 0.9, normal.sigmoid(), uniform)


# How t is drawn. "one" is no flow: from pure noise the best velocity is z - E[x | c], so training is regression of the
# image, and the model an autoencoder by mean squared error.
NOISE_LEVELS = ("thick-tailed", "logit-normal", "one")


@dataclass
class FlowDraws:
    """
    Everything random in the flow loss of one batch.

    Args:
        z: Noise (b, c, h, w).
        t: Noise levels (b,) in [0, 1].
        code_mask: (b,) 1 keeps an image's codes, 0 drops them for classifier-free guidance.
    """

    z: torch.Tensor
    t: torch.Tensor
    code_mask: torch.Tensor

    @classmethod
    def sample(
        cls,
        x: torch.Tensor,
        generators: list[torch.Generator],
        code_dropout: float = 0.1,
        noise_levels: str = "thick-tailed",
    ) -> "FlowDraws":
        """
        Draws for images `x`, one generator an image: an image's draws do not depend on the batch it is in.

        Args:
            code_dropout: Probability of dropping an image's codes.
            noise_levels: One of `NOISE_LEVELS`; all but the first are for comparison.

        Raises:
            ValueError: If there are no such noise levels.
        """
        if noise_levels not in NOISE_LEVELS:
            raise ValueError(f"noise_levels={noise_levels!r} must be one of {NOISE_LEVELS}")
        selector, uniform, keep = draw_uniform((len(x), 3), generators, x.device).unbind(1)
        normal = randn_tensor(x.shape[:1], generators, x.device)
        t = {
            "thick-tailed": thick_tailed(normal, selector, uniform),
            "logit-normal": normal.sigmoid(),
            "one": torch.ones_like(normal),
        }[noise_levels]
        z = randn_tensor(x.shape, generators, x.device)
        return cls(z=z, t=t, code_mask=(keep > code_dropout).float())
