"""
Structural similarity of images to their references, in [-1, 1], 1 for equal images: luminance, contrast and structure
compared in uniform windows of 7 x 7 pixels of each channel, as scikit-image does by default. The mean over images.
"""

import datasets
import evaluate
import torch

from flowmo_diffusers.metrics.modules.pairs import PAIRS, PairMetric, mean
from flowmo_diffusers.metrics.reconstruction import ssim


_CITATION = """\
@article{wang2004image,
    title = {Image quality assessment: from error visibility to structural similarity},
    author = {Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
    journal = {IEEE Transactions on Image Processing},
    volume = {13},
    number = {4},
    year = {2004},
}
"""

_RESULTS = """
    Returns:
        ssim: Mean over images.
"""


class SSIM(PairMetric):
    """See above."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=PAIRS + _RESULTS,
            features=datasets.Features({"similarity": datasets.Value("float64")}),
        )

    def _measure(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"similarity": ssim(x, y, self.rounding)}

    def _compute(self, similarity: list[float]) -> dict[str, float]:
        return {"ssim": mean(similarity)}
