"""
Fréchet Inception distance between generated and real images: the Fréchet distance of two Gaussians with the mean and
covariance of the pooled features of Inception-v3. It falls with the number of images, so that it can be compared only
at equal numbers; fewer than 2049 leave the covariance singular.
"""

import datasets
import evaluate

from flowmo_diffusers.metrics.modules.sets import FRECHET_CITATION, ROWS, SETS, FrechetMetric


_RESULTS = """
    Returns:
        fid: The distance; of another network than FID's Inception its name follows, as in fid_mobilenet_v2.
"""


class FID(FrechetMetric):
    """See above."""

    key = "fid"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=FRECHET_CITATION,
            inputs_description=SETS + _RESULTS,
            features=datasets.Features(ROWS),
        )
