"""How much a reconstruction made of parts shows where they meet."""

from collections.abc import Sequence

import torch


def seam_ratio(
    images: torch.Tensor, originals: torch.Tensor, rows: Sequence[int], columns: Sequence[int], depth: int = 4
) -> float:
    """
    How far the error jumps across seams, over how far it jumps across any other line: 1 where seams cannot be told
    from the rest, more where they show. The error, not the image, so that edges of the scene count neither for nor
    against. A jump is the difference between the means of `depth` pixels on either side: what the eye sees of a seam
    is that brightness or colour differ, not noise.

    Args:
        images: (b, c, h, w).
        originals: The same images before, of the same range.
        rows: Seams between row r - 1 and row r, at least `depth` from the images' borders.
        columns: As `rows`.
        depth: In pixels.

    Raises:
        ValueError: If shapes differ, or there is no seam inside the images or nothing but seams.
    """
    if images.shape != originals.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, originals {tuple(originals.shape)}")
    error = images.double() - originals.double()
    at_seams, elsewhere = [], []
    for seams, lines in ((rows, error.mT), (columns, error)):
        means = lines.unfold(-1, depth, 1).mean(-1)
        jumps = (means[..., depth:] - means[..., :-depth]).abs()  # the first one is between depth - 1 and depth
        is_seam = torch.zeros(jumps.shape[-1], dtype=torch.bool)
        is_seam[[seam - depth for seam in seams if 0 <= seam - depth < len(is_seam)]] = True
        at_seams.append(jumps[..., is_seam].flatten())
        elsewhere.append(jumps[..., ~is_seam].flatten())
    at_seams, elsewhere = torch.cat(at_seams), torch.cat(elsewhere)
    if not at_seams.numel() or not elsewhere.numel():
        raise ValueError(f"there is no seam at least {depth} pixels inside the images, or nothing but seams")
    return (at_seams.mean() / elsewhere.mean()).item()
