"""What a model card says of a generator of tokens."""

import re

from flowmo_diffusers.hub.card_parts import Metric, Subject, TrainingRun, code
from flowmo_diffusers.hub.tokenizer_card import token_facts
from flowmo_diffusers.models.token_generator import FlowMoTokenGenerator
from flowmo_diffusers.pipelines.pipeline_generation import FlowMoGenerationPipeline


NATS = "nats a group of bits, without label smoothing; lower is better"
METRICS = {
    "token_loss": Metric(name="token loss", meaning=NATS),
    "bits_per_bit": Metric(name="bits per stored bit", meaning="1 is no better than a coin; lower is better"),
    "fid": Metric(name="FID", hub_type="fid", meaning="lower is better"),
    "inception_score": Metric(name="Inception score", hub_type="inception_score", meaning="higher is better"),
}
ORDERS = {
    "masked": "masked prediction, as [MaskBit](https://arxiv.org/abs/2409.16211): all tokens see each other",
    "autoregressive": "autoregressive: a token sees those before it",
}
SHOWN_CLASSES = 10


def describe_generator(pipeline: FlowMoGenerationPipeline, run: TrainingRun, source: str) -> Subject:
    """Args: source: Hub id or folder that the snippet loads."""
    side = pipeline.autoencoder.config.sample_size
    return Subject(
        introduction=(
            "A generator of images on the tokens of a [FlowMo](https://arxiv.org/abs/2503.11056) tokenizer: a "
            f"transformer\ndraws the tokens of an image of {side} × {side} pixels, of a class that is asked for, and "
            "the tokenizer decodes them."
        ),
        picture="Generated images, a row for each class",
        snippet=_snippet(source, pipeline.generator),
        architecture=_architecture(pipeline),
        figures=f"Means over {run.held_out_images:,} images that were not trained on.",
        metrics=METRICS | _losses_at_ratios(run),
        pipeline_tag="unconditional-image-generation",  # the Hub has no task that knows classes
        task="Class-conditional generation",
        tags=("flowmo", "image-generation", "class-conditional", "discrete-tokens"),
    )


def _losses_at_ratios(run: TrainingRun) -> dict[str, Metric]:
    names = [re.fullmatch(r"(?:val/)?(token_loss_at_([\d.]+))", name) for name in run.figures]
    return {found[1]: Metric(name=f"token loss at masking ratio {found[2]}", meaning=NATS) for found in names if found}


def _architecture(pipeline: FlowMoGenerationPipeline) -> dict[str, str]:
    generator, autoencoder, config = pipeline.generator, pipeline.autoencoder, pipeline.generator.config
    values = 2**config.group_bits
    return {
        "parameters": f"{generator.num_parameters():,}, beside {autoencoder.num_parameters():,} of the tokenizer",
        "order": ORDERS[config.order],
        "transformer": f"{config.num_layers} blocks of width {config.hidden_size}, {config.num_attention_heads} heads",
        "tokens": token_facts(autoencoder),
        "groups": f"{config.token_groups} of {config.group_bits} bits a token, each one of {values:,} values",
        "classes": _classes(generator),
    }


def _classes(generator: FlowMoTokenGenerator) -> str:
    config = generator.config
    if config.num_classes == 0:
        return "none"
    names = [code(config.id2label[number]) for number in range(config.num_classes)] if config.id2label else []
    shown = ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "")
    return f"{config.num_classes:,}" + (f": {shown}" if shown else "")


def _snippet(source: str, generator: FlowMoTokenGenerator) -> str:
    label = 0 if generator.config.num_classes else None
    lines = [
        "import torch",
        "from flowmo_diffusers import FlowMoGenerationPipeline",
        "",
        f'pipe = FlowMoGenerationPipeline.from_pretrained({source!r})  # and .to("cuda") where there is one',
        "generator = torch.Generator().manual_seed(0)",
        f"image = pipe(class_labels=[{label}], generator=generator).images[0]",
        'image.save("generated.png")',
    ]
    return "\n".join(lines)
