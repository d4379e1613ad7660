"""How images become figures: what published numbers differ by, said in one place."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from flowmo_diffusers.metrics.codecs import CodecReconstructor
from flowmo_diffusers.metrics.features import INCEPTION_INPUTS
from flowmo_diffusers.metrics.reconstruction import ROUNDINGS, round_images


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """
    Args:
        rounding: Of the images that PSNR and SSIM compare: "nearest" and "truncate" are two ways to 8 bits, "float" is
            none.
        network_rounding: Of the images that LPIPS and the feature network see.
        inception_input: How images become Inception's input, see [`InceptionFeatures`].
        jpeg_quality: Reconstructions (or samples) are stored as JPEG before they are measured, with this quality;
            `None` keeps all pixels.
        official_batch_size: Images of a batch over which "psnr_official" is taken.

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    rounding: str = "nearest"
    network_rounding: str = "nearest"
    inception_input: str = "tensorflow"
    jpeg_quality: int | None = None
    official_batch_size: int = 5

    def __post_init__(self):
        for name, known in (
            ("rounding", ROUNDINGS),
            ("network_rounding", ROUNDINGS),
            ("inception_input", INCEPTION_INPUTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {tuple(known)}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality={self.jpeg_quality} must be from 1 to 100")
        if self.official_batch_size < 1:
            raise ValueError(f"official_batch_size={self.official_batch_size} must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def stored(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructions or samples (b, 3, h, w) in [-1, 1] as they come back from where they are stored."""
        if self.jpeg_quality is None:
            return images
        return CodecReconstructor("jpeg", quality=self.jpeg_quality)(images, range(len(images))).images

    def for_networks(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1] to what LPIPS and the feature network see, in the same range."""
        return round_images(images, self.network_rounding)


# What the published FlowMo evaluation computes.
PROTOCOLS = {
    "standard": Protocol(),
    "flowmo": Protocol(rounding="truncate", network_rounding="float", inception_input="pytorch-fid"),
}
