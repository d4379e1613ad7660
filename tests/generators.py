"""Generators and a feature network that are small enough to run in milliseconds."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from torch import Tensor, nn

from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.metrics.features import FeatureNetwork


class TinyNetwork(FeatureNetwork):
    """Features of length 6 and 4, and, without a suffix, 5 classes."""

    def __init__(self, suffix: str = ""):
        super().__init__(suffix, 6, {"network": "tiny" + suffix})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.pool, self.spatial, self.classes = nn.Linear(48, 6), nn.Linear(48, 4), nn.Linear(6, 5)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        small = F.adaptive_avg_pool2d(images, 4).flatten(1)
        pool = {"pool": self.pool(small)}
        return pool if self.suffix else {**pool, "spatial": self.spatial(small)}

    @torch.no_grad()
    def probabilities(self, pool: Tensor) -> Tensor:
        return super().probabilities(pool) if self.suffix else (8 * self.classes(pool)).softmax(1)


def tiny_ddpm(channels: int = 3) -> DDPMPipeline:
    """Without classes, 8 x 8 pixels; draws noise at every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
        )
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_dit() -> DiTPipeline:
    """Of 3 classes, 8 x 8 pixels."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            sample_size=8,
            patch_size=4,
            num_embeds_ada_norm=3,
            norm_num_groups=1,
            dropout=0.0,
        )
        for parameter in transformer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # else no class makes a difference
        vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=2, sample_size=8)
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_images(count: int, seed: int, side: int = 8) -> np.ndarray:
    """(count, side, side, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def features_of(folder: Path, images: np.ndarray, network: FeatureNetwork, size: int = 5) -> Chunks:
    """As `image_features` has them."""
    chunks = Chunks(folder, {}, len(images), size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for chunk in range(len(chunks)):
        numbers = list(chunks.items(chunk))
        chunks.write(chunk, {**network(pixels[numbers]), "number": torch.tensor(numbers)})
    return chunks


def one_process() -> Accelerator:
    return Accelerator(cpu=True)
