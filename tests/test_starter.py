"""The embedded starter model."""

import pytest
import torch

from flowmo_diffusers import FlowMoGenerationPipeline, FlowMoPipeline
from flowmo_diffusers.assets import starter, starter_generator
from flowmo_diffusers.data.images import load_images, stack_images
from flowmo_diffusers.data.tokens import tokenizer_identity
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.objectives.perceptual import load_perceptual_network


@pytest.mark.parametrize(("name", "least", "most"), [("emoji", 27, 0.008), ("birds", 24.5, 0.02)])
def test_starter_reconstructs_images_it_never_saw(name, least, most, tmp_path):
    """A starter that was not trained on such images, or no longer computes in its few steps what it learned."""
    pipeline = FlowMoPipeline.from_pretrained(starter())
    pipeline.set_progress_bar_config(disable=True)
    held_out = load_images(name, cache_dir=str(tmp_path))["test"].select(range(32))
    images = stack_images(held_out, pipeline.autoencoder.config.sample_size)
    output = pipeline(images, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert pipeline.scheduler.config.num_inference_steps == 4
    assert psnr(images, output.images).mean() > least
    assert load_perceptual_network("lpips-alex")(images, output.images).mean() < most

    packed = pipeline.autoencoder.pack_codes(pipeline.autoencoder.indices_to_codes(output.indices))
    assert {len(row) for row in packed} == {192}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    again = pipeline.decode(packed[:2], generator=generators, output_type="latent")
    assert psnr(images[:2], again).mean() > 20


def test_starter_is_small_and_safe():
    """A starter that outgrows the package, or weights in a format that runs code."""
    files = [path for path in starter().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    parameters = sum(p.numel() for p in FlowMoPipeline.from_pretrained(starter()).autoencoder.parameters())
    assert 4e6 <= parameters <= 10e6


def test_starter_generator_knows_its_classes():
    """A generator that was not trained, is of another tokenizer, or no longer computes what it learned."""
    tokenizer = FlowMoPipeline.from_pretrained(starter())
    pipeline = FlowMoGenerationPipeline.from_pretrained(starter_generator(), **tokenizer.components)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.generator.config.tokenizer == tokenizer_identity(tokenizer.autoencoder)["digest"]
    generators = [torch.Generator().manual_seed(i) for i in range(16)]
    smileys, flags = (
        pipeline([name] * 16, 32, 32, 16, 2.0, decoder_num_inference_steps=4, generator=generators, output_type="pt")
        for name in ("Smileys & Emotion", "Flags")
    )
    # Most smileys are yellow discs: little blue in the middle, white at the sides. Flags fill the width.
    red, green, blue = smileys.images[:, :, 12:20, 12:20].mean(dim=(0, 2, 3)).tolist()
    assert min(red, green) > blue + 0.1
    white = [output.images[:, :, 14:18, :2].mean().item() for output in (smileys, flags)]
    assert white[0] > white[1] + 0.1


def test_starter_generator_is_small_and_safe():
    """A generator that outgrows the package, weights in a format that runs code, or a path of some machine in it."""
    files = [path for path in starter_generator().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")
