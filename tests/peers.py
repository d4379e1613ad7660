"""A `VQModel` small enough to train in milliseconds."""

from typing import Any


# 32 x 32 pixels to 16 x 16 indices of 8 codes.
TINY_VQMODEL: dict[str, Any] = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8,
}
