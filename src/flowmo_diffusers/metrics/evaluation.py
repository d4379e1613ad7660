"""The figures of a tokenizer, from rows that are measured image by image."""

from collections.abc import Mapping
from typing import Any

import torch

from flowmo_diffusers.data.measuring import Rows
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.digests import module_digest
from flowmo_diffusers.metrics.codebook import codebook_health, codebook_use
from flowmo_diffusers.metrics.extraction import moments
from flowmo_diffusers.metrics.features import FeatureNetwork
from flowmo_diffusers.metrics.frechet import frechet_distance
from flowmo_diffusers.metrics.manifold import precision_recall
from flowmo_diffusers.metrics.protocol import Protocol
from flowmo_diffusers.metrics.reconstruction import mean_psnr, mean_squared_error, psnr_over_batches, ssim
from flowmo_diffusers.metrics.reconstructors import FlowMoReconstructor, Reconstruction, Reconstructor
from flowmo_diffusers.objectives.perceptual import PerceptualDistance


class ReconstructionEvaluation:
    """
    Args:
        protocol: How images become figures.
        distances: Perceptual distances by the name of their figure, on their device.
        network: For rFID; `None` leaves it out.
        manifold: Also precision and recall of the reconstructions against their originals, by the same features.
    """

    def __init__(
        self,
        protocol: Protocol,
        distances: Mapping[str, PerceptualDistance],
        network: FeatureNetwork | None,
        manifold: bool = False,
    ):
        if manifold and network is None:
            raise ValueError("manifold=True (precision and recall) needs a feature network")
        self.protocol = protocol
        self.distances = dict(distances)
        self.network = network
        self.manifold = manifold

    @property
    def description(self) -> dict[str, Any]:
        """Plain JSON values, everything that rows depend on besides the images."""
        return {
            "protocol": self.protocol.to_dict(),
            "distances": {name: module_digest(distance) for name, distance in self.distances.items()},
            "network": self.network and self.network.description,
        }

    @torch.no_grad()
    def rows(self, originals: torch.Tensor, reconstruction: Reconstruction) -> Rows:
        """
        Args:
            originals: (b, 3, h, w) in [-1, 1].
        """
        x, y = originals, self.protocol.stored(reconstruction.images).to(originals.device)
        rows = {
            "num_bytes": reconstruction.num_bytes,
            "squared_error": mean_squared_error(x, y, self.protocol.rounding),
            "truncated_error": mean_squared_error(x, y, "truncate"),
            "ssim": ssim(x, y, self.protocol.rounding),
            "colour_error": (x - y).mean((2, 3)).square().mean(1),
        }
        if reconstruction.indices is not None:
            rows["indices"] = reconstruction.indices.int()
        seen_x, seen_y = self.protocol.for_networks(x), self.protocol.for_networks(y)
        for name, distance in self.distances.items():
            rows[name] = distance(seen_x, seen_y)
        if self.network is not None:
            rows["pool"] = self.network(seen_y)["pool"]
        return rows

    def figures(self, rows: Chunks, originals: Chunks | None, num_pixels: int) -> dict[str, float]:
        """
        Args:
            rows: Of all images.
            originals: Features of the originals, where there is a feature network.
            num_pixels: Height times width.

        Returns:
            "psnr" is the mean over images, "psnr_official" that over batches of `protocol.official_batch_size` images
            of truncated pixels, as published; "identical_images" have no PSNR. "colour_shift" is how far the mean
            colour of an image is off, as a root mean square over images and channels, in levels of 255.
        """
        columns = rows.read("num_bytes", "squared_error", "truncated_error", "ssim", "colour_error", *self.distances)
        num_bytes = columns["num_bytes"].mean().item()
        psnr, identical = mean_psnr(columns["squared_error"])
        figures = {
            "images": len(columns["ssim"]),
            "bits_per_pixel": 8 * num_bytes / num_pixels,
            "bytes_per_image": num_bytes,
            "psnr": psnr,
            "psnr_official": psnr_over_batches(columns["truncated_error"], self.protocol.official_batch_size),
            "identical_images": identical,
            "ssim": columns["ssim"].mean().item(),
            "colour_shift": 127.5 * columns["colour_error"].mean().sqrt().item(),
        }
        figures |= {name: columns[name].double().mean().item() for name in self.distances}
        if self.network is not None:
            suffix = self.network.suffix
            figures["rfid" + suffix] = frechet_distance(moments(rows, "pool"), moments(originals, "pool"))
            if self.manifold:
                figures |= self.manifold_figures(rows, originals)
        return figures

    def manifold_figures(self, rows: Chunks, references: Chunks, suffix: str = "") -> dict[str, float]:
        """Precision and recall of the reconstructions in `rows` against images of which these are the features."""
        both = precision_recall(rows.read("pool")["pool"], references.read("pool")["pool"])
        suffix = self.network.suffix + suffix
        return {name + suffix: value for name, value in zip(("precision", "recall"), both, strict=True)}


def code_figures(rows: Chunks, reconstructor: Reconstructor) -> dict[str, float]:
    """[`codebook_health`] of FlowMo's codes of all images, [`codebook_use`] of a peer's; nothing without codes."""
    if reconstructor.codebook_size is None:
        return {}
    indices = rows.read("indices")["indices"].long()
    if isinstance(reconstructor, FlowMoReconstructor):
        quantizer = reconstructor.pipeline.autoencoder.quantize
        return codebook_health(indices, quantizer.group_size, quantizer.levels)
    return codebook_use(indices, reconstructor.codebook_size)
