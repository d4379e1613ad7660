"""Metrics that compare each prediction with its reference."""

from abc import abstractmethod
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput

from flowmo_diffusers.metrics.modules.base import IMAGES, ImageMetric
from flowmo_diffusers.metrics.modules.batches import image_pairs, tensor_batches


PAIRS = f"""
        predictions: {IMAGES}
        references: As many, the n-th of the size of the n-th prediction.
"""


class PairMetric(ImageMetric):
    """A metric whose rows are measures of pairs of images."""

    @abstractmethod
    def _measure(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Columns (b,) of references and predictions (b, 3, h, w) in [-1, 1]."""

    @torch.no_grad()
    def _rows(
        self, predictions: PipelineImageInput | None, references: PipelineImageInput | None
    ) -> dict[str, list[Any]]:
        predictions, references = image_pairs(predictions, references)
        columns: dict[str, list[float]] = {name: [] for name in self.features}
        batches = zip(
            tensor_batches(references, "references", self.batch_size),
            tensor_batches(predictions, "predictions", self.batch_size),
            strict=True,
        )
        for x, y in batches:
            for name, values in self._measure(x.to(self.device), y.to(self.device)).items():
                columns[name] += values.tolist()
        return columns


def mean(values: list[float]) -> float:
    """`ValueError` if there are none."""
    if not values:
        raise ValueError("no images were added: there is nothing to compute")
    return sum(values) / len(values)
