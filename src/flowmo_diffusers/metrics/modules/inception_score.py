"""
Inception Score of generated images: high where Inception-v3 is sure of each image's class and finds all classes
equally often. Real images are not looked at.
"""

from typing import Any

import datasets
import evaluate
import torch
from diffusers.image_processor import PipelineImageInput

from flowmo_diffusers.metrics.inception_score import inception_score
from flowmo_diffusers.metrics.modules.base import IMAGES
from flowmo_diffusers.metrics.modules.sets import ROWS, SetMetric, to_tensor


_CITATION = """\
@inproceedings{salimans2016improved,
    title = {Improved Techniques for Training {GAN}s},
    author = {Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and
              Chen, Xi},
    booktitle = {NeurIPS},
    year = {2016},
}
"""

_INPUTS = f"""
        predictions: {IMAGES}

    Returns:
        inception_score, inception_score_std: Mean and standard deviation over splits; of another network than FID's
            Inception its name follows.
"""


class InceptionScore(SetMetric):
    """
    See above.

    Args:
        split_size: Images of which one score is computed, in the order they were added, process by process; see
            [`inception_score`].
        options: Those of [`SetMetric`].
    """

    def __init__(self, split_size: int = 5000, **options):
        if split_size < 1:
            raise ValueError(f"split_size={split_size} must be at least 1")
        self.split_size = split_size
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(ROWS),
        )

    def _rows(
        self, predictions: PipelineImageInput | None, references: PipelineImageInput | None
    ) -> dict[str, list[Any]]:
        if references is not None:
            raise ValueError("references are not looked at by the Inception Score: leave them out")
        return super()._rows(predictions, None)

    def _measure(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.probabilities(self.network(images)["pool"])

    def _compute(self, is_reference: list[bool], vector: list[bytes]) -> dict[str, float]:
        mean, deviation = inception_score(to_tensor(vector, "predictions"), self.split_size)
        suffix = self.network.suffix
        return {f"inception_score{suffix}": mean, f"inception_score_std{suffix}": deviation}
