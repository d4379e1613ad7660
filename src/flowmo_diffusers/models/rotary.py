"""Rotary positions shared by image patches and latent tokens (three axes: token, row, column)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed


def rotary_table(
    num_tokens: int, rows: int, columns: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> torch.Tensor:
    """
    Rotations for a sequence of `num_tokens` latent tokens followed by `rows x columns` patches.

    Token i sits at (i, i, i), a patch at (0, row, column). Tables depend on sizes only, so each is computed once and
    reused by every later forward.

    Args:
        axes: Even channel widths of the three axes; their sum is the head width.

    Returns:
        Float32 (num_tokens + rows * columns, head width / 2, 2, 2): for each pair of channels what becomes of its
        unit vectors, (cosine, sine) of the first and (-sine, cosine) of the second.
    """
    # While a graph is traced, sizes and tensors are symbols: kept, they would reach later calls outside of the graph.
    if torch.compiler.is_compiling():
        return _compute_table(num_tokens, rows, columns, axes, theta, device)
    return _cached_table(num_tokens, rows, columns, axes, theta, device)


@lru_cache(maxsize=64)
def _cached_table(*sizes) -> torch.Tensor:
    # A table born under inference mode could not be saved for backward by a later training step.
    with torch.inference_mode(False):
        return _compute_table(*sizes)


def _compute_table(
    num_tokens: int, rows: int, columns: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> torch.Tensor:
    tokens = torch.arange(num_tokens, device=device)[:, None].expand(-1, 3)
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    patches = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    positions = torch.cat([tokens, patches])

    # Angles in float64, hence on the CPU, since not every device has it: one row for each number along an axis.
    numbers = torch.arange(max(num_tokens, rows, columns), dtype=torch.float64, device="cpu")
    turns = [get_1d_rotary_pos_embed(width, numbers, theta, freqs_dtype=torch.float64) for width in axes]
    tables = [torch.view_as_real(turn).float().to(device) for turn in turns]
    cosine, sine = torch.cat([table[positions[:, axis]] for axis, table in enumerate(tables)], dim=1).unbind(-1)
    return torch.stack([cosine, sine, -sine, cosine], dim=-1).unflatten(-1, (2, 2))


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """
    Turns each pair of neighbouring channels 2k and 2k + 1 of float32 `x` (b, length, heads, head width) by its angle:
    (a + i b) e^(i angle). See [`rotary_table`] for `table`, of the same length.
    """
    pairs, (first, second) = x.unflatten(-1, (-1, 2)), table[:, None].unbind(-2)
    if torch.compiler.is_compiling():  # which makes no code for complex numbers
        return (pairs[..., :1] * first + pairs[..., 1:] * second).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(first)).flatten(-2)


def scale_rope_axes(rope_axes: Sequence[int], head_dim: int) -> tuple[int, ...]:
    """
    Rotary widths in the proportions of `rope_axes` that fill a head of `head_dim` channels.

    Raises:
        ValueError: If these are not three positive whole numbers, or their shares are not even whole numbers.
    """
    whole = isinstance(rope_axes, Sequence) and all(type(axis) is int and axis > 0 for axis in rope_axes)
    if not whole or len(rope_axes) != 3 or any(axis * head_dim % (2 * sum(rope_axes)) for axis in rope_axes):
        raise ValueError(
            f"rope_axes={rope_axes} cannot be scaled to a head width of {head_dim}: three positive whole proportions "
            f"are needed whose shares of {head_dim} are even whole numbers, e.g. {_even_axes(head_dim)}"
        )
    return tuple(axis * head_dim // sum(rope_axes) for axis in rope_axes)


def _even_axes(head_dim: int) -> str:
    """The published proportions (8, 28, 28), rounded to even widths."""
    side = head_dim * 28 // 64 // 2 * 2
    if head_dim % 2 or side == 0:
        return "any three of an even head width of at least 6"
    return str((head_dim - 2 * side, side, side))
