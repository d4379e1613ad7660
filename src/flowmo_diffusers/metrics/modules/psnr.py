"""
Peak signal-to-noise ratio of images to their references in dB: 10 log10(255² / e), e the mean squared difference of
the pixel values of an image. `psnr` is the mean over images; those that equal their reference have none and are
counted as `identical_images` instead.
"""

import datasets
import evaluate
import torch

from flowmo_diffusers.metrics.modules.pairs import PAIRS, PairMetric
from flowmo_diffusers.metrics.reconstruction import mean_psnr, mean_squared_error, psnr_over_batches


_RESULTS = """
    Returns:
        psnr: Mean over the images that differ from their references; infinite if none does.
        identical_images: How many do not.
        psnr_official: With `official_batch_size` only: what FlowMo's published evaluation calls PSNR, see
            `psnr_over_batches`; its batch size is 5. It depends on the order of images.
"""


class PSNR(PairMetric):
    """
    See above.

    Args:
        official_batch_size: Also compute `psnr_official`, over batches of this size.
        options: Those of [`ImageMetric`]; `rounding` is that of `psnr`, while `psnr_official` always truncates.
    """

    def __init__(self, official_batch_size: int | None = None, **options):
        if official_batch_size is not None and official_batch_size < 1:
            raise ValueError(f"official_batch_size={official_batch_size} must be at least 1")
        self.official_batch_size = official_batch_size
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        columns = {"error": datasets.Value("float64"), "truncated_error": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=PAIRS + _RESULTS,
            features=datasets.Features(columns),
        )

    def _measure(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "error": mean_squared_error(x, y, self.rounding),
            "truncated_error": mean_squared_error(x, y, "truncate"),
        }

    def _compute(self, error: list[float], truncated_error: list[float]) -> dict[str, float]:
        psnr, identical = mean_psnr(torch.tensor(error, dtype=torch.float64))
        figures = {"psnr": psnr, "identical_images": identical}
        if self.official_batch_size is not None:
            errors = torch.tensor(truncated_error, dtype=torch.float64)
            figures["psnr_official"] = psnr_over_batches(errors, self.official_batch_size)
        return figures
