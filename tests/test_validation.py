"""Validation measures the same images from the same noise, however many processes share them."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from processes import on_processes, own_accelerators
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.engine.sharding import reshard
from flowmo_diffusers.metrics.codebook import codebook_health
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.metrics.validation import Validation


IMAGES, STEPS = 7, 3


class Distance(nn.Module):
    """A perceptual network's stand-in: one number an image."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).abs().mean((1, 2, 3))


@pytest.fixture(autouse=True)
def separate() -> Iterator[None]:
    with own_accelerators():
        yield


@pytest.fixture
def originals() -> torch.Tensor:
    return torch.rand(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def build_validation(originals: torch.Tensor, batch_size: int = 2, **options) -> Validation:
    options = {"num_inference_steps": STEPS, "batch_size": batch_size} | options
    return Validation(Accelerator(cpu=True), originals, {"distance": Distance()}, **options)


def test_figures_are_those_of_the_pipeline(tiny_pipeline, originals):
    """Catches another sampler, noise shared by images, a figure under another's name, or images in another order."""
    found, figures = build_validation(originals, seed=5)(tiny_pipeline)
    generators = [keyed_generator(5, "validation", number) for number in range(IMAGES)]
    output = tiny_pipeline(originals, num_inference_steps=STEPS, generator=generators, output_type="latent")
    torch.testing.assert_close(found, output.images)
    health = codebook_health(output.indices, 3)
    assert figures.keys() == {"psnr", "distance", *health}
    assert {name: figures[name] for name in health} == health
    assert figures["psnr"] == pytest.approx(psnr(originals, output.images).mean().item(), rel=1e-4)
    assert figures["distance"] == pytest.approx(Distance()(originals, output.images).mean().item(), rel=1e-5)


def test_same_noise_each_time(tiny_pipeline, originals):
    """Catches noise that goes on from one validation to the next: figures then move where weights do not."""
    validation = build_validation(originals)
    first, second = validation(tiny_pipeline), validation(tiny_pipeline)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    other = build_validation(originals, seed=1)(tiny_pipeline)
    assert not torch.allclose(first[0], other[0], atol=0.1)
    assert not torch.allclose(first[0][0] - first[0][1], other[0][0] - other[0][1], atol=0.1)


def build_pipeline(config: dict, weights: dict) -> FlowMoPipeline:
    model = FlowMoAutoencoder(**config).eval()
    model.load_state_dict(weights)
    pipeline = FlowMoPipeline(model, FlowMoScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_weights(config: dict, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = FlowMoAutoencoder(**config).state_dict()
    return {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


def measure(config: dict, weights: dict, originals: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, dict]:
    return build_validation(originals, batch_size)(build_pipeline(config, weights))


@pytest.mark.parametrize(
    ("quantizer", "count", "processes", "batch_size"),
    [("lfq", 7, 2, 2), ("lfq", 6, 2, 2), ("lfq", 1, 2, 4), ("lfq", 4, 3, 1), ("none", 7, 3, 64)],
)
def test_processes_share_the_images(tiny_config, originals, quantizer, count, processes, batch_size):
    """Catches images left out or counted twice where they cannot be divided, or processes that wait for ever."""
    config = tiny_config | {"quantizer": quantizer}
    weights = random_weights(config)
    expected, figures = measure(config, weights, originals[:count], 64)
    assert len(expected) == count and ("used_codes" in figures) == (quantizer == "lfq")
    for images, ours in on_processes(processes, measure, config, weights, originals[:count], batch_size):
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        assert ours == pytest.approx(figures, rel=1e-4)


def measure_sharded(config: dict, weights: dict, averages: dict, originals: torch.Tensor) -> list[torch.Tensor]:
    """What the averages and then the weights of a model that FSDP2 has sharded make of the images."""
    pipeline = build_pipeline(config, averages)
    model = pipeline.autoencoder
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "encode")
    ema = EMA(model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(weights[name], parameter.device_mesh, parameter.placements))
    validation = build_validation(originals)
    with ema.applied(model.parameters()):
        averaged, _ = validation(pipeline)
        reshard(model)  # as a run does before the weights are back
    return [averaged, validation(pipeline)[0]]


def test_sharded_averages(tiny_config, originals):
    """Catches averages that a sharded model keeps gathered when the weights are back in their place."""
    weights, averages = random_weights(tiny_config, 3), random_weights(tiny_config, 4)
    expected = [measure(tiny_config, state, originals, 2)[0] for state in (averages, weights)]
    for found in on_processes(2, measure_sharded, tiny_config, weights, averages, originals):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*expected, atol=0.1)
