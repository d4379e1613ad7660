"""What a pipeline is, as plain JSON values."""

from typing import Any

import torch

from flowmo_diffusers.cli.generator import assemble
from flowmo_diffusers.cli.options import EMBEDDED_TOKENIZERS
from flowmo_diffusers.cli.tokenizer import locate, quiet_diffusers
from flowmo_diffusers.data.tokens import tokenizer_identity
from flowmo_diffusers.engine.digests import config_entries
from flowmo_diffusers.models.flops import decoder_flops, encoder_flops, generator_flops
from flowmo_diffusers.pipelines.loading import load_pipeline
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.pipeline_generation import FlowMoGenerationPipeline


@quiet_diffusers()
def describe_model(model: str) -> dict[str, Any]:
    """
    Raises:
        OSError: If there is no such pipeline.
        ValueError: If it is not one of this library's.
    """
    place = locate(model)
    if model in EMBEDDED_TOKENIZERS and place != model:
        pipeline, _ = assemble(model)
    else:
        pipeline = load_pipeline(place, dtype=torch.float32)
    if isinstance(pipeline, FlowMoGenerationPipeline):
        tokenizer = FlowMoPipeline(pipeline.autoencoder, pipeline.scheduler)
        return _generator(pipeline) | {"tokenizer": _tokenizer(tokenizer)}
    if isinstance(pipeline, FlowMoPipeline):
        return _tokenizer(pipeline)
    raise ValueError(f"{model} is a {type(pipeline).__name__}, which is no pipeline of FlowMo's")


def _tokenizer(pipeline: FlowMoPipeline) -> dict[str, Any]:
    autoencoder, config = pipeline.autoencoder, pipeline.autoencoder.config
    side, forwards = config.sample_size, pipeline.num_forwards()
    encoding, velocity = encoder_flops(config, side, side), decoder_flops(config, side, side)
    return {
        "class": type(pipeline).__name__,
        "parameters": {
            "all": _parameters(autoencoder),
            "encoder": _parameters(autoencoder.encoder),
            "decoder": _parameters(autoencoder.decoder),
        },
        "sample_size": side,
        "patch_size": config.patch_size,
        "quantizer": config.quantizer,
        "tokens": _tokens(pipeline),
        "sampler": config_entries(pipeline.scheduler) | {"forwards": forwards},
        "flops": {
            "encoder": encoding,
            "decoder_forward": velocity,
            "reconstruction": encoding + forwards * velocity,
        },
    }


def _tokens(pipeline: FlowMoPipeline) -> dict[str, Any]:
    autoencoder, config = pipeline.autoencoder, pipeline.autoencoder.config
    if not autoencoder.quantize.is_discrete:
        return {"num_tokens": config.num_latent_tokens, "channels": config.latent_channels}
    bits = config.num_latent_tokens * autoencoder.bits_per_token
    return {
        "num_tokens": config.num_latent_tokens,
        "bits_per_token": autoencoder.bits_per_token,
        "bits_per_image": bits,
        "bytes_per_image": autoencoder.bytes_per_image,
        "bits_per_pixel": bits / config.sample_size**2,
        "tokenizer": tokenizer_identity(autoencoder)["digest"],
    }


def _generator(pipeline: FlowMoGenerationPipeline) -> dict[str, Any]:
    generator, config = pipeline.generator, pipeline.generator.config
    return {
        "class": type(pipeline).__name__,
        "parameters": _parameters(generator),
        "order": config.order,
        "num_classes": config.num_classes,
        "classes": dict(config.id2label or {}),
        "token_scheduler": config_entries(pipeline.token_scheduler),
        "flops": {"generator_forward": generator_flops(config)},
    }


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
