"""
Work of one forward pass, counted from a configuration: 2 FLOPs for each multiply-add of a matrix product or of
attention. Element-wise work (norms, activations, rotary embedding) is not counted, as is usual for model FLOPs.
"""

from collections.abc import Mapping
from typing import Any

from flowmo_diffusers.models.mmdit import TIME_FEATURES
from flowmo_diffusers.models.quantizers import build_quantizer


def encoder_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """
    FLOPs of encoding one image.

    Args:
        config: The `config` of a [`FlowMoAutoencoder`].
        height: Of the image in pixels; a multiple of the patch size, as is `width`.
    """
    quantizer = build_quantizer(
        config["quantizer"], config["latent_channels"], config["codebook_bits"], config["fsq_levels"]
    )
    dim, patches, tokens = config["encoder_hidden_size"], _num_patches(config, height, width), _num_tokens(config)
    read_in = _linear(patches, _patch_features(config), dim)
    read_out = _linear(tokens, dim, config["latent_channels"] * quantizer.latent_multiplier)
    blocks = _blocks(config["encoder_num_layers"], dim, config["mlp_ratio"], kept=tokens, context=patches)
    return read_in + blocks + read_out


def decoder_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """
    FLOPs of one velocity of one image: one step of a sampler without guidance.

    Args:
        config: The `config` of a [`FlowMoAutoencoder`].
        height: Of the image in pixels; a multiple of the patch size, as is `width`.
    """
    layers, dim = config["decoder_num_layers"], config["decoder_hidden_size"]
    patches, tokens = _num_patches(config, height, width), _num_tokens(config)
    read_in = _linear(patches, _patch_features(config), dim) + _linear(tokens, config["latent_channels"] + 1, dim)
    read_out = _linear(patches, dim, _patch_features(config))
    # Shift, scale and gate twice for both streams of every block, shift and scale of the read-out.
    time = _linear(1, TIME_FEATURES, dim) + _linear(1, dim, dim) + _linear(1, dim, (layers * 2 * 6 + 2) * dim)
    return read_in + time + _blocks(layers, dim, config["mlp_ratio"], kept=patches, context=tokens) + read_out


def decoder_attention_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """The part of [`decoder_flops`] that is attention itself: scores, and their product with the values."""
    patches, both = _num_patches(config, height, width), _num_patches(config, height, width) + _num_tokens(config)
    queries = (config["decoder_num_layers"] - 1) * both + patches  # the last block has the patches' alone
    return _attention(queries, both, config["decoder_hidden_size"])


def generator_flops(config: Mapping[str, Any]) -> int:
    """
    FLOPs of one pass over all tokens of one image.

    Args:
        config: The `config` of a [`FlowMoTokenGenerator`].
    """
    tokens, dim, groups = config["num_tokens"], config["hidden_size"], config["token_groups"]
    bits, hidden = groups * config["group_bits"], int(dim * config["mlp_ratio"])
    mlp = _linear(tokens, dim, hidden) + _linear(tokens, hidden, dim)
    block = _linear(tokens, dim, 4 * dim) + _attention(tokens, tokens, dim) + mlp
    head = _linear(1, dim, 2 * dim) + _linear(tokens, dim, groups * 2 ** config["group_bits"])
    if config["order"] == "autoregressive":
        own = bits - config["group_bits"]
        head += groups * (_linear(tokens, own, dim) + 2 * _linear(tokens, dim, 2 * dim)) if groups > 1 else 0
    return _linear(tokens, bits, dim) + _linear(1, dim, 6 * dim) + config["num_layers"] * block + head


def _blocks(layers: int, dim: int, mlp_ratio: float, kept: int, context: int) -> int:
    """All blocks of a trunk: both streams joined in attention; the last gives keys and values of the context only."""
    hidden, both = int(dim * mlp_ratio), kept + context
    mlp = _linear(1, dim, hidden) + _linear(1, hidden, dim)
    position = _linear(1, dim, 3 * dim) + _attention(1, both, dim) + _linear(1, dim, dim) + mlp
    return (layers - 1) * both * position + kept * position + _linear(context, dim, 2 * dim)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(queries: int, keys: int, dim: int) -> int:
    """Scores, and their product with the values."""
    return 2 * (2 * queries * keys * dim)


def _num_tokens(config: Mapping[str, Any]) -> int:
    return config["num_latent_tokens"]


def _num_patches(config: Mapping[str, Any], height: int, width: int) -> int:
    return (height // config["patch_size"]) * (width // config["patch_size"])


def _patch_features(config: Mapping[str, Any]) -> int:
    return config["in_channels"] * config["patch_size"] ** 2
