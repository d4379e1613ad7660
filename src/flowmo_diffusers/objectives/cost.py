"""
Work of training on one image, from the model's configuration.

A trained part counts three forwards, one of them forward and two backward. The perceptual networks are not counted:
they are no part of the model, and small beside it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowmo_diffusers.models.flops import decoder_attention_flops, decoder_flops, encoder_flops, generator_flops
from flowmo_diffusers.objectives.peer import peer_loss


def pretraining_flops(config: Mapping[str, Any], height: int, width: int, encoder_trained: bool = True) -> int:
    """
    Model FLOPs of one image in stage 1A.

    Args:
        config: The `config` of a [`FlowMoAutoencoder`].
        height: Of the image in pixels; a multiple of the patch size, as is `width`.
        encoder_trained: Whether the encoder is not frozen yet; frozen it runs without autograd.
    """
    return (3 if encoder_trained else 1) * encoder_flops(config, height, width) + 3 * decoder_flops(
        config, height, width
    )


def posttraining_flops(
    config: Mapping[str, Any], height: int, width: int, chain_steps: int = 8, recomputed: bool = False
) -> int:
    """
    FLOPs of one image in stage 1B: the encoder once, the decoder once for the flow loss and once a step of the chain.

    Args:
        config: The `config` of a [`FlowMoAutoencoder`].
        height: Of the image in pixels; a multiple of the patch size, as is `width`.
        chain_steps: Euler steps of the sampling chain.
        recomputed: Count also what gradient checkpointing repeats, each forward but its attention, which a device must
            do and which does not count in model FLOPs.
    """
    image = (config, height, width)
    a_pass = 3 * decoder_flops(*image)
    if recomputed:
        a_pass += decoder_flops(*image) - decoder_attention_flops(*image)
    return encoder_flops(*image) + (1 + chain_steps) * a_pass


def distillation_flops(
    config: Mapping[str, Any], height: int, width: int, student_steps: int, teacher_forwards: int, flow: bool = True
) -> int:
    """
    Model FLOPs of one image in stage 1C: the encoder once, the teacher's sample, the student's, and the flow loss.

    Args:
        config: The `config` of a [`FlowMoAutoencoder`].
        height: Of the image in pixels; a multiple of the patch size, as is `width`.
        student_steps: Forwards of the student's sample.
        teacher_forwards: Of the teacher's sample, guidance counted twice; 0 where it is read from a cache.
        flow: Whether there is a flow loss.
    """
    image = (config, height, width)
    return encoder_flops(*image) + (teacher_forwards + 3 * (student_steps + flow)) * decoder_flops(*image)


def generator_training_flops(config: Mapping[str, Any]) -> int:
    """
    Model FLOPs of training a token generator on the tokens of one image.

    Args:
        config: The `config` of a [`FlowMoTokenGenerator`].
    """
    return 3 * generator_flops(config)


def peer_training_flops(model_class: type[ModelMixin], config: Mapping[str, Any], height: int, width: int) -> int:
    """
    Model FLOPs of training a peer on one image, counted while it trains on one, on the CPU: convolutions, linear
    layers, attention and the search for the nearest codes.

    Args:
        model_class: `diffusers.VQModel` or [`TiTokModel`].
        config: The model's.
        height: Of the image in pixels; what the model takes, as is `width`.
    """
    search = dict.fromkeys((torch.ops.aten._euclidean_dist, torch.ops.aten._cdist_forward), _distance_flops)
    # Attention as products of matrices: what a kernel computes again in its backward pass is not the model's.
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        model, x = model_class.from_config(config), torch.zeros(1, 3, height, width)
        with FlopCounterMode(display=False, custom_mapping=search) as counter:
            peer_loss(model, x)["loss"].backward()
    return counter.get_total_flops()


def _distance_flops(x: torch.Size, y: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of all distances between two sets of vectors, (n, c) and (m, c), by a product of matrices."""
    return 2 * x[0] * y[0] * x[1]
