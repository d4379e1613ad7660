"""
Reconstruction FID: the Fréchet Inception distance between the reconstructions of images and these images themselves,
as many of one as of the other.
"""

from typing import Any

import datasets
import evaluate
from diffusers.image_processor import PipelineImageInput

from flowmo_diffusers.metrics.modules.batches import image_pairs
from flowmo_diffusers.metrics.modules.pairs import PAIRS
from flowmo_diffusers.metrics.modules.sets import FRECHET_CITATION, ROWS, FrechetMetric


_RESULTS = """
    Returns:
        rfid: The distance; of another network than FID's Inception its name follows, as in rfid_mobilenet_v2.
"""


class RFID(FrechetMetric):
    """See above."""

    key = "rfid"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=FRECHET_CITATION,
            inputs_description=PAIRS + _RESULTS,
            features=datasets.Features(ROWS),
        )

    def _rows(
        self, predictions: PipelineImageInput | None, references: PipelineImageInput | None
    ) -> dict[str, list[Any]]:
        return super()._rows(*image_pairs(predictions, references))
