"""Overlapping windows over an image of any size, whose velocities are blended (the paper's way beyond 256²)."""

from functools import cached_property

import torch

from flowmo_diffusers.models.window_layout import default_overlap, starts_along


class Windows:
    """
    Square windows that cover an image: the fewest that overlap by at least `overlap`, evenly spread so that the first
    and the last lie at the image's borders. An image smaller than a window is extended to one, at the bottom and the
    right, by its last row and column.

    Args:
        height: Of the image in pixels.
        width: As `height`.
        size: Side of a window in pixels.
        overlap: Pixels that neighbours share at least, in [0, size). Default: a quarter of the size.

    Attributes:
        canvas: Height and width of the image, or of the one it is extended to.
        boxes: Top and left of each window, row by row.

    Raises:
        ValueError: If a size is not positive or the overlap is out of range.
    """

    def __init__(self, height: int, width: int, size: int, overlap: int | None = None):
        if height < 1 or width < 1:
            raise ValueError(f"height={height} and width={width} must be at least 1 pixel")
        if size < 1:
            raise ValueError(f"window_size={size} must be at least 1 pixel")
        overlap = default_overlap(size) if overlap is None else overlap
        if not 0 <= overlap < size:
            raise ValueError(f"window_overlap={overlap} must be at least 0 and less than window_size={size}")
        self.size, self.overlap = size, overlap
        self.image_size = (height, width)
        self.canvas = (max(height, size), max(width, size))
        self.boxes = [
            (top, left)
            for top in starts_along(self.canvas[0], size, overlap)
            for left in starts_along(self.canvas[1], size, overlap)
        ]

    def __len__(self) -> int:
        return len(self.boxes)

    def batches(self, size: int) -> list[range]:
        """The windows' numbers, so many at a time."""
        return [range(first, min(first + size, len(self))) for first in range(0, len(self), size)]

    def borders(self) -> tuple[list[int], list[int]]:
        """Rows and columns at which a window begins or ends inside the image: where a seam would be."""
        sides = zip(zip(*self.boxes, strict=True), self.image_size, strict=True)
        return tuple(
            sorted({edge for start in starts for edge in (start, start + self.size) if 0 < edge < length})
            for starts, length in sides
        )

    def extend(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, c, h, w) on the canvas."""
        bottom, right = (side - length for side, length in zip(self.canvas, self.image_size, strict=True))
        return torch.nn.functional.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images

    def cut(self, canvas: torch.Tensor) -> torch.Tensor:
        """The inverse of [`~Windows.extend`]."""
        return canvas[..., : self.image_size[0], : self.image_size[1]]

    def crop(self, canvas: torch.Tensor, windows: range) -> torch.Tensor:
        """The windows of these numbers (b, windows, c, size, size) of the canvas (b, c, h, w)."""
        boxes = [self.boxes[i] for i in windows]
        return torch.stack([self._view(canvas, box) for box in boxes], dim=1)

    def add(self, total: torch.Tensor, crops: torch.Tensor, windows: range) -> None:
        """Adds what was computed in these windows to `total` (b, c, h, w), so that over all windows the weights of a
        pixel sum to 1."""
        weight = self.weight.to(total)
        for crop, box in zip(crops.unbind(1), [self.boxes[i] for i in windows], strict=True):
            weights = self._view(self.weights, box).to(total)  # of the box only: the canvas may be large
            self._view(total, box).add_(crop * (weight / weights))

    @cached_property
    def weight(self) -> torch.Tensor:
        """(size, size) of a window before neighbours are regarded: rising linearly over `overlap` from each border."""
        distance = torch.arange(self.size, dtype=torch.float64) + 0.5
        ramp = torch.minimum(distance, self.size - distance).div(max(self.overlap, 1)).clamp(max=1)
        return ramp[:, None] * ramp

    @cached_property
    def weights(self) -> torch.Tensor:
        """(h, w) the sum of all windows' weights."""
        weights = torch.zeros(self.canvas, dtype=torch.float64)
        for box in self.boxes:
            self._view(weights, box).add_(self.weight)
        return weights

    def _view(self, canvas: torch.Tensor, box: tuple[int, int]) -> torch.Tensor:
        top, left = box
        return canvas[..., top : top + self.size, left : left + self.size]
