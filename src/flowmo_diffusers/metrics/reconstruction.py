"""How close reconstructions are to their originals."""

import torch


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to the 8-bit values a saved picture holds, rounded to nearest."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of each image in dB, over its 8-bit values.

    Args:
        x: Originals (b, c, h, w) in [-1, 1].
        y: Reconstructions, likewise.

    Returns:
        (b,); infinite where two images are equal.

    Raises:
        ValueError: If the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, not {tuple(x.shape)} and {tuple(y.shape)}")
    squares = (to_uint8(x).float() - to_uint8(y).float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / squares)
