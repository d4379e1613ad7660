"""What all metrics of images share."""

from abc import ABC, abstractmethod
from inspect import signature
from typing import Any

import evaluate
import torch
from diffusers.image_processor import PipelineImageInput

from flowmo_diffusers.metrics.reconstruction import ROUNDINGS


IMAGES = """PIL images, NumPy arrays (h, w, 3) or (b, h, w, 3) in uint8 or in [0, 1], tensors (3, h, w) or (b, 3, h, w)
            in [-1, 1] or in uint8, or a list of one kind, whose images may be of several sizes."""


class ImageMetric(evaluate.Metric, ABC):
    """
    Measures images when they are added and keeps a row of numbers of each, in evaluate's file on disk: memory does not
    grow with their number before [`~ImageMetric.compute`], and several processes (`num_process`, `process_id`,
    `experiment_id`, as in any evaluate module) exchange rows, not images.

    Args:
        rounding: Of pixels before anything is measured: "nearest" (8 bits, as a well-saved picture), "truncate" (8
            bits, as a plain cast) or "float" (none).
        batch_size: Images measured at a time.
        device: Where it is done; default: the GPU if there is one.
        evaluate_options: Those of [`evaluate.EvaluationModule`].

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an option is unknown.
    """

    def __init__(
        self,
        rounding: str = "nearest",
        batch_size: int = 64,
        device: str | torch.device | None = None,
        **evaluate_options: Any,
    ):
        # evaluate would ignore them, and with them a misspelt `weights`.
        unknown = sorted(evaluate_options.keys() - signature(evaluate.EvaluationModule.__init__).parameters.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__} has no options {unknown}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} must be one of {', '.join(ROUNDINGS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.rounding = rounding
        self.batch_size = batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        super().__init__(**evaluate_options)

    @abstractmethod
    def _info(self) -> evaluate.MetricInfo: ...

    @abstractmethod
    def _rows(
        self, predictions: PipelineImageInput | None, references: PipelineImageInput | None
    ) -> dict[str, list[Any]]:
        """Columns of equal length by the names of `features`."""

    def add_batch(
        self, *, predictions: PipelineImageInput | None = None, references: PipelineImageInput | None = None
    ) -> None:
        """
        Measures images; nothing is added if any of them cannot be used.

        Raises:
            ValueError: If an image is none, has not three channels, or has values that are not finite or out of range.

        Args:
        """
        super().add_batch(**self._rows(predictions, references))

    def add(
        self, *, prediction: PipelineImageInput | None = None, reference: PipelineImageInput | None = None
    ) -> None:
        """
        As [`~ImageMetric.add_batch`], for one image.

        Args:
        """
        self.add_batch(predictions=prediction, references=reference)

    def compute(
        self, *, predictions: PipelineImageInput | None = None, references: PipelineImageInput | None = None
    ) -> dict[str, float] | None:
        """
        The figures of all images added before, by any process, and of those given here; then it begins anew. Every
        process must call this, also one that had no images; all but the first get `None`.

        Raises:
            ValueError: As [`~ImageMetric.add_batch`], or if there are too few images.

        Args:
        """
        return self._finish(predictions, references)

    def _finish(
        self, predictions: PipelineImageInput | None, references: PipelineImageInput | None, **options: Any
    ) -> dict[str, float] | None:
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:
            # The others wait for this process's file, even if it holds nothing.
            super().add_batch(**{name: [] for name in self.features})
        return super().compute(**options)
