"""
Spatial FID between generated and real images: the Fréchet distance of the first channels of an inner layer of
Inception-v3 at every position, instead of pooled features, so that it also sees where things are.
"""

import datasets
import evaluate

from flowmo_diffusers.metrics.modules.sets import ROWS, SETS, FrechetMetric


_CITATION = """\
@inproceedings{nash2021generating,
    title = {Generating Images with Sparse Representations},
    author = {Nash, Charlie and Menick, Jacob and Dieleman, Sander and Battaglia, Peter W.},
    booktitle = {ICML},
    year = {2021},
}
"""

_RESULTS = """
    Returns:
        sfid: The distance.
"""


class SFID(FrechetMetric):
    """See above."""

    key = "sfid"
    layer = "spatial"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=SETS + _RESULTS,
            features=datasets.Features(ROWS),
        )
