"""Metrics that compare two sets of images, or look at one, through a network's features."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput

from flowmo_diffusers.metrics.features import FeatureNetwork, load_feature_network
from flowmo_diffusers.metrics.frechet import Moments, frechet_distance
from flowmo_diffusers.metrics.modules.base import IMAGES, ImageMetric
from flowmo_diffusers.metrics.modules.batches import single_images, tensor_batches
from flowmo_diffusers.metrics.reconstruction import round_images


SETS = f"""
        predictions: Generated images. {IMAGES}
        references: Real images, likewise. There may be more or fewer of them, and either may be left out of a call.
"""

FRECHET_CITATION = """\
@inproceedings{heusel2017gans,
    title = {{GAN}s Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium},
    author = {Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
    booktitle = {NeurIPS},
    year = {2017},
}
"""

# Vectors as the bytes of their float32: Arrow takes them at 20 times the speed of lists of numbers.
ROWS = {"is_reference": datasets.Value("bool"), "vector": datasets.Value("binary")}

_ROWS_AT_A_TIME = 1000


class SetMetric(ImageMetric):
    """
    A metric whose rows are vectors of single images.

    Args:
        network: Of [`load_feature_network`], loaded when the first image is added, or one that is loaded already,
            which several metrics can share. If it is not FID's Inception, its name is part of the results' names.
        weights: Of the network.
        options: Those of [`ImageMetric`].
    """

    def __init__(self, network: str | FeatureNetwork = "inception", weights: str | None = None, **options: Any):
        super().__init__(**options)
        self._network = network
        self._weights = weights

    @cached_property
    def network(self) -> FeatureNetwork:
        network = self._network
        if isinstance(network, str):
            network = load_feature_network(network, self._weights)
        return network.to(self.device)

    @abstractmethod
    def _measure(self, images: torch.Tensor) -> torch.Tensor:
        """Vectors (b, d) of images (b, 3, h, w) in [-1, 1]."""

    def _rows(
        self, predictions: PipelineImageInput | None, references: PipelineImageInput | None
    ) -> dict[str, list[Any]]:
        if predictions is None and references is None:
            raise ValueError("predictions or references must be given")
        vectors = [] if predictions is None else self._vectors(predictions, "predictions")
        count = len(vectors)
        vectors += [] if references is None else self._vectors(references, "references")
        return {"is_reference": [number >= count for number in range(len(vectors))], "vector": vectors}

    @torch.no_grad()
    def _vectors(self, images: PipelineImageInput, name: str) -> list[bytes]:
        vectors: list[bytes] = []
        for batch in tensor_batches(single_images(images, name), name, self.batch_size):
            measured = self._measure(round_images(batch.to(self.device), self.rounding))
            vectors += [vector.tobytes() for vector in measured.float().cpu().numpy()]
        return vectors


class FrechetMetric(SetMetric):
    """The Fréchet distance of features `layer` of two sets; it is called `key`."""

    key: str
    layer = "pool"

    def compute(
        self,
        *,
        predictions: PipelineImageInput | None = None,
        references: PipelineImageInput | None = None,
        reference_statistics: Moments | None = None,
    ) -> dict[str, float] | None:
        """
        As [`ImageMetric.compute`], with statistics instead of references where only these are there.

        Args:
            reference_statistics: Of features of the same layer and network.
        """
        return self._finish(predictions, references, reference_statistics=reference_statistics)

    def _measure(self, images: torch.Tensor) -> torch.Tensor:
        features = self.network(images)
        if self.layer not in features:
            raise ValueError(f"{self.key} needs {self.layer!r} features; this network has only {sorted(features)}")
        return features[self.layer]

    def _compute(
        self, is_reference: list[bool], vector: list[bytes], reference_statistics: Moments | None
    ) -> dict[str, float]:
        predictions, references = split_sets(is_reference, vector)
        if (reference_statistics is None) == (not references):
            raise ValueError(
                f"{len(references)} references were added and reference_statistics are "
                f"{'not ' if reference_statistics is None else ''}given: there must be one of the two"
            )
        if reference_statistics is None:
            reference_statistics = _moments(references, "references")
        distance = frechet_distance(_moments(predictions, "predictions"), reference_statistics)
        return {self.key + self.network.suffix: distance}


def split_sets(is_reference: list[bool], vectors: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Rows of the predictions, and of the references."""
    rows = list(zip(is_reference, vectors, strict=True))
    return [vector for real, vector in rows if not real], [vector for real, vector in rows if real]


def to_tensor(vectors: list[bytes], name: str) -> torch.Tensor:
    """Rows to (n, d) float32. `ValueError` if there are none."""
    if not vectors:
        raise ValueError(f"no {name} were added: there is nothing to compute")
    return torch.from_numpy(np.frombuffer(bytearray().join(vectors), np.float32).reshape(len(vectors), -1))


def _moments(vectors: list[bytes], name: str) -> Moments:
    moments = Moments(to_tensor(vectors[:1], name).shape[1])
    for start in range(0, len(vectors), _ROWS_AT_A_TIME):
        moments.add(to_tensor(vectors[start : start + _ROWS_AT_A_TIME], name))
    return moments
