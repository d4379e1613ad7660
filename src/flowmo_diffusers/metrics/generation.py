"""How close generated images are to real ones, as sets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.metrics.extraction import moments
from flowmo_diffusers.metrics.features import FeatureNetwork
from flowmo_diffusers.metrics.frechet import Moments, frechet_distance
from flowmo_diffusers.metrics.inception_score import inception_score
from flowmo_diffusers.metrics.manifold import precision_recall


METRICS = ("fid", "sfid", "inception_score", "precision_recall")


@dataclass
class Reference:
    """
    What samples are compared with.

    Args:
        statistics: Of the features "pool" and, `None` where there are none, "spatial".
        features: Of the images themselves, or of some of them, for precision and recall.
    """

    statistics: dict[str, Moments | None]
    features: Chunks | None = None

    @classmethod
    def from_features(cls, features: Chunks) -> "Reference":
        """Images and nothing else: see [`image_features`]."""
        spatial = moments(features, "spatial") if "spatial" in features.columns() else None
        return cls({"pool": moments(features, "pool"), "spatial": spatial}, features)


def generation_metrics(
    samples: Chunks,
    reference: Reference,
    network: FeatureNetwork,
    metrics: Sequence[str] = METRICS,
    neighbours: int = 3,
    split_size: int = 5000,
    num_images_precision_recall: int = 10_000,
) -> tuple[dict[str, float], dict[str, str]]:
    """
    Args:
        samples: Features of generated images, see [`image_features`].
        network: That all features are of.
        metrics: Some of `METRICS`.
        neighbours: Of [`precision_recall`].
        split_size: Of [`inception_score`].
        num_images_precision_recall: At most so many of either set, spread evenly, are compared: the work grows by
            their product, and recall depends on their number. guided-diffusion takes 50 000 samples and 10 000 real
            images.

    Returns:
        Figures by name, each with the network's suffix ("fid", "sfid", "inception_score" and "inception_score_std",
        "precision" and "recall"), and the metrics that cannot be had, with the reason.

    Raises:
        ValueError: If a metric is unknown, or there are too few images.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"metrics={unknown} are unknown: {METRICS} are known")
    left_out = {name: reason for name, reason in _impossible(samples, reference, network).items() if name in metrics}
    wanted = set(metrics) - left_out.keys()
    figures = {}
    if "fid" in wanted:
        figures["fid"] = frechet_distance(moments(samples, "pool"), reference.statistics["pool"])
    if "sfid" in wanted:
        figures["sfid"] = frechet_distance(moments(samples, "spatial"), reference.statistics["spatial"])
    if "inception_score" in wanted:
        probabilities = [network.probabilities(part["pool"]).cpu() for part in samples.stream("pool") if part]
        score, deviation = inception_score(torch.cat(probabilities), split_size)
        figures |= {"inception_score": score, "inception_score_std": deviation}
    if "precision_recall" in wanted:
        sets = [_spread(chunks, num_images_precision_recall) for chunks in (samples, reference.features)]
        figures["precision"], figures["recall"] = precision_recall(*sets, neighbours)
    return {name + network.suffix: value for name, value in figures.items()}, left_out


def _impossible(samples: Chunks, reference: Reference, network: FeatureNetwork) -> dict[str, str]:
    """Why a metric cannot be had."""
    reasons = {}
    if "spatial" not in samples.columns():
        reasons["sfid"] = f"{network.description['network']} has no spatial features"
    elif reference.statistics["spatial"] is None:
        reasons["sfid"] = "the statistics of the reference have no mu_s and sigma_s"
    try:
        network.probabilities(torch.zeros(1, network.dims))
    except ValueError as error:
        reasons["inception_score"] = str(error)
    if reference.features is None:
        reasons["precision_recall"] = "the reference has statistics, but no images"
    return reasons


def _spread(chunks: Chunks, count: int) -> torch.Tensor:
    """At most so many of the pooled features."""
    pool = chunks.read("pool")["pool"]
    count = min(count, len(pool))
    return pool[torch.arange(count) * len(pool) // count]
