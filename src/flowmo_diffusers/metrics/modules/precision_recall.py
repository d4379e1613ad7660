"""
Improved precision and recall of generated images: the share of them that lie among the real images in feature space,
which is their quality, and the share of real images that lie among the generated ones, which is their variety.
"""

import datasets
import evaluate
import torch

from flowmo_diffusers.metrics.manifold import precision_recall
from flowmo_diffusers.metrics.modules.sets import ROWS, SETS, SetMetric, split_sets, to_tensor


_CITATION = """\
@inproceedings{kynkaanniemi2019improved,
    title = {Improved Precision and Recall Metric for Assessing Generative Models},
    author = {Kynk{\\"a}{\\"a}nniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo},
    booktitle = {NeurIPS},
    year = {2019},
}
"""

_RESULTS = """
    Returns:
        precision, recall: In [0, 1]; of another network than FID's Inception its name follows.
"""


class PrecisionRecall(SetMetric):
    """
    See above.

    Args:
        neighbours: k of [`precision_recall`]; each set needs more images than this.
        options: Those of [`SetMetric`].
    """

    def __init__(self, neighbours: int = 3, **options):
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours} must be at least 1")
        self.neighbours = neighbours
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=SETS + _RESULTS,
            features=datasets.Features(ROWS),
        )

    def _measure(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)["pool"]

    def _compute(self, is_reference: list[bool], vector: list[bytes]) -> dict[str, float]:
        predictions, references = split_sets(is_reference, vector)
        samples = to_tensor(predictions, "predictions").to(self.device)
        reals = to_tensor(references, "references").to(self.device)
        precision, recall = precision_recall(samples, reals, self.neighbours)
        suffix = self.network.suffix
        return {f"precision{suffix}": precision, f"recall{suffix}": recall}
