"""
Learned perceptual image patch similarity, v0.1, of images to their references: 0 for equal images, more for what looks
less alike. The mean over images. Named by its network, since the values of two networks cannot be compared.
"""

import datasets
import evaluate
import torch

from flowmo_diffusers.metrics.modules.pairs import PAIRS, PairMetric, mean
from flowmo_diffusers.metrics.reconstruction import round_images
from flowmo_diffusers.objectives.perceptual import load_perceptual_network


_CITATION = """\
@inproceedings{zhang2018unreasonable,
    title = {The Unreasonable Effectiveness of Deep Features as a Perceptual Metric},
    author = {Zhang, Richard and Isola, Phillip and Efros, Alexei A. and Shechtman, Eli and Wang, Oliver},
    booktitle = {CVPR},
    year = {2018},
}
"""

_RESULTS = """
    Returns:
        lpips_alex or lpips_vgg: Mean over images.
"""


class LPIPS(PairMetric):
    """
    See above.

    Args:
        network: "lpips-alex", for images of at least 31 x 31 pixels, or "lpips-vgg", 16 x 16.
        weights: See [`load_perceptual_network`], which also tells the errors.
        options: Those of [`ImageMetric`].
    """

    def __init__(self, network: str = "lpips-alex", weights: str | None = None, **options):
        if network not in ("lpips-alex", "lpips-vgg"):
            raise ValueError(f"network={network!r} must be 'lpips-alex' or 'lpips-vgg'")
        super().__init__(**options)
        self.key = network.replace("-", "_")
        self.network = load_perceptual_network(network, weights).to(self.device)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=PAIRS + _RESULTS,
            features=datasets.Features({"distance": datasets.Value("float64")}),
        )

    def _measure(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        x, y = round_images(x, self.rounding), round_images(y, self.rounding)
        return {"distance": self.network(x, y)}

    def _compute(self, distance: list[float]) -> dict[str, float]:
        return {self.key: mean(distance)}
