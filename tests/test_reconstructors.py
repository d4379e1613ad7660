"""FlowMo pipelines as what is evaluated."""

import json

import pytest
import torch

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.metrics.reconstructors import FlowMoReconstructor


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_the_pipeline_s_reconstruction(tiny_pipeline, images):
    """Through the bytes that are stored, of which there are as many as are counted."""
    reconstructor = FlowMoReconstructor(tiny_pipeline, "tiny", sampling={"num_inference_steps": 3})
    found = reconstructor(images, [4, 5, 6])
    assert found.num_bytes.tolist() == [6.0, 6.0, 6.0]
    tokens = tiny_pipeline.encode(images)
    assert torch.equal(found.indices, tokens)
    assert found.images.shape == images.shape and found.images.dtype == torch.float32
    assert found.images.abs().max() <= 1


def test_noise_belongs_to_the_image(tiny_pipeline, images):
    """Neither batches nor other images change a reconstruction; its number and the seed do."""
    reconstructor = FlowMoReconstructor(tiny_pipeline, "tiny", sampling={"num_inference_steps": 2})
    together = reconstructor(images, [7, 8, 9]).images
    torch.testing.assert_close(reconstructor(images[1:2], [8]).images, together[1:2])
    assert (reconstructor(images[1:2], [7]).images - together[1:2]).abs().max() > 1e-3
    other = FlowMoReconstructor(tiny_pipeline, "tiny", seed=1, sampling={"num_inference_steps": 2})
    assert (other(images, [7, 8, 9]).images - together).abs().max() > 1e-3


def test_settings_tell_everything_apart(tiny_pipeline):
    """Weights, sampler, scheduler and seed are part of the key under which results are kept; it is plain JSON."""
    scheduler = FlowMoScheduler(solver="heun")
    heun = FlowMoPipeline(tiny_pipeline.autoencoder, scheduler)
    found = [
        FlowMoReconstructor(tiny_pipeline, "tiny"),
        FlowMoReconstructor(tiny_pipeline, "tiny", seed=1),
        FlowMoReconstructor(tiny_pipeline, "tiny", sampling={"guidance_scale": 1.0}),
        FlowMoReconstructor(heun, "tiny"),
    ]
    texts = [json.dumps(reconstructor.settings) for reconstructor in found]
    with torch.no_grad():
        next(tiny_pipeline.autoencoder.parameters()).view(-1)[0] += 1
    texts.append(json.dumps(FlowMoReconstructor(tiny_pipeline, "tiny").settings))
    assert len(set(texts)) == 5


def test_continuous_codes_are_stored_as_float16(tiny_config, images):
    """Two bytes a number, and the decoder gets no more than these."""
    torch.manual_seed(0)
    autoencoder = FlowMoAutoencoder(**tiny_config | {"quantizer": "kl"}).eval()
    pipeline = FlowMoPipeline(autoencoder, FlowMoScheduler())
    pipeline.set_progress_bar_config(disable=True)
    found = FlowMoReconstructor(pipeline, "kl", sampling={"num_inference_steps": 1})(images, [0, 1, 2])
    assert found.num_bytes.tolist() == [2.0 * 8 * 6] * 3 and found.indices is None
