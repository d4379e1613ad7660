"""Rotary positions shared by image patches and latent tokens (three axes: token, row, column)."""

from functools import lru_cache

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed


@lru_cache(maxsize=64)
def rotary_table(
    num_tokens: int, rows: int, columns: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines for a sequence of `num_tokens` latent tokens followed by `rows x columns` patches.

    Token i sits at (i, i, i), a patch at (0, row, column). Tables depend on sizes only, so each is computed once, in
    float64 on the CPU, and reused by every later forward.

    Args:
        axes: Even channel widths of the three axes; their sum is the head width.

    Returns:
        Two float32 tensors of shape (num_tokens + rows * columns, head width); neighbours 2k and 2k + 1 form a pair.
    """
    # A table born under inference mode could not be saved for backward by a later training step.
    with torch.inference_mode(False), torch.device("cpu"):
        tokens = torch.arange(num_tokens)[:, None].expand(-1, 3)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        patches = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        positions = torch.cat([tokens, patches]).double()
        tables = [
            get_1d_rotary_pos_embed(
                width, positions[:, axis], theta, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            for axis, width in enumerate(axes)
        ]
        cosines, sines = (torch.cat(parts, dim=-1).to(device) for parts in zip(*tables, strict=True))
    return cosines, sines
