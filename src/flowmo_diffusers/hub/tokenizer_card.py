"""What a model card says of a tokenizer."""

from flowmo_diffusers.hub.card_parts import Metric, Subject, TrainingRun, code
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline


METRICS = {
    "psnr": Metric(name="PSNR", hub_type="psnr", meaning="dB, of each image over its 8-bit values; higher is better"),
    "ssim": Metric(name="SSIM", hub_type="ssim", meaning="higher is better"),
    "lpips-alex": Metric(name="LPIPS (AlexNet)", hub_type="lpips", meaning="lower is better"),
    "lpips-vgg": Metric(name="LPIPS (VGG16)", hub_type="lpips", meaning="lower is better"),
}


def describe_tokenizer(pipeline: FlowMoPipeline, run: TrainingRun, source: str) -> Subject:
    """Args: source: Hub id or folder that the snippet loads."""
    model = pipeline.autoencoder
    side = model.config.sample_size
    return Subject(
        introduction=(
            "A [FlowMo](https://arxiv.org/abs/2503.11056) image tokenizer: it turns an image of "
            f"{side} × {side} pixels into\n{token_facts(model)}, and those back into the image by a rectified flow "
            "from noise."
        ),
        picture="Held-out images and their reconstructions",
        snippet=_snippet(source, model),
        architecture=_architecture(model),
        figures=(
            f"Means over {run.held_out_images:,} images that were not trained on, at {run.resolution} × "
            f"{run.resolution} pixels,\nreconstructed in {run.num_inference_steps} steps "
            f"({pipeline.num_forwards(run.num_inference_steps)} forwards of the decoder)."
        ),
        metrics=METRICS,
        pipeline_tag="image-to-image",
        task="Reconstruction",
        tags=("flowmo", "image-tokenizer", "autoencoder", "rectified-flow"),
    )


def _architecture(model: FlowMoAutoencoder) -> dict[str, str]:
    config = model.config
    return {
        "parameters": f"{model.num_parameters():,}",
        "images": f"{config.sample_size} × {config.sample_size} pixels, {config.in_channels} channels",
        "patches": f"{config.patch_size} × {config.patch_size} pixels",
        "tokens": token_facts(model),
        "quantizer": code(config.quantizer),
        "encoder": f"{config.encoder_num_layers} blocks of width {config.encoder_hidden_size}",
        "decoder": f"{config.decoder_num_layers} blocks of width {config.decoder_hidden_size}",
    }


def token_facts(model: FlowMoAutoencoder) -> str:
    """ "256 tokens of 18 bits (576 bytes an image, 0.0703 bits a pixel)" """
    config = model.config
    if config.quantizer in ("kl", "none"):
        return f"{config.num_latent_tokens} continuous tokens of {config.latent_channels} channels"
    bits = config.num_latent_tokens * model.bits_per_token
    return (
        f"{config.num_latent_tokens} tokens of {model.bits_per_token} bits ({model.bytes_per_image:,} bytes an image, "
        f"{bits / config.sample_size**2:.3g} bits a pixel)"
    )


def _snippet(source: str, model: FlowMoAutoencoder) -> str:
    size = model.config.sample_size
    lines = [
        "from diffusers.utils import load_image",
        "from flowmo_diffusers import FlowMoPipeline",
        "",
        f'pipe = FlowMoPipeline.from_pretrained({source!r})  # and .to("cuda") where there is one',
        'image = load_image("photo.jpg")',
        f'pipe(image, height={size}, width={size}).images[0].save("reconstruction.png")',
        "",
        f"tokens = pipe.encode(image, height={size}, width={size})  # to be stored, and decoded later",
    ]
    if model.config.quantizer not in ("kl", "none"):
        lines += [
            "codes = pipe.autoencoder.indices_to_codes(tokens)",
            f"tokens = pipe.autoencoder.pack_codes(codes)[0]  # {model.bytes_per_image} bytes",
        ]
    lines.append('pipe.decode(tokens)[0].save("decoded.png")')
    return "\n".join(lines)
