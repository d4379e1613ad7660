"""Peers small enough to train in milliseconds."""

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

# 32 x 32 pixels to 6 indices of 12 codes.
TINY_TITOK: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "encoder_num_layers": 1,
    "decoder_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_latent_tokens": 6,
    "codebook_size": 12,
    "codebook_dim": 4,
}
