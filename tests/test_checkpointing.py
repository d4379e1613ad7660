"""Checkpointing computes the same gradients, with attention once."""

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.utils._python_dispatch import TorchDispatchMode

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.models import attention, attention_by_products, checkpointing
from flowmo_diffusers.models.checkpointing import KEPT, checkpoint_but_attention


class CountAttention(TorchDispatchMode):
    """Counts how often attention is computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in KEPT
        return func(*args, **(kwargs or {}))


@pytest.fixture
def images(tiny_autoencoder: FlowMoAutoencoder) -> torch.Tensor:
    side = tiny_autoencoder.config.sample_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def gradients(model: FlowMoAutoencoder, images: torch.Tensor, autocast: bool = False) -> torch.Tensor:
    """Of all parameters, through two calls of the model as in a chain."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = model(images=images).codes
        x_t = model(images, 0.5, codes=codes).velocity
        loss = model(x_t, 0.2, codes=codes).velocity.float().square().mean()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def plain_checkpoint(block: torch.nn.Module, *args):
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_changes_no_gradient(monkeypatch, tiny_autoencoder, images, autocast: bool, products: bool) -> None:
    """Catches attention that is computed again, the result of another block or call, and weights that autocast has
    cached in the forward pass and casts again in the backward pass."""
    monkeypatch.setattr(attention, "PRODUCTS_BEAT_FLASH", products)
    model = tiny_autoencoder.train()
    with CountAttention() as counter:
        expected = gradients(model, images, autocast)
    once = counter.count
    assert once == len(model.encoder.blocks) + 2 * len(model.decoder.blocks)
    assert expected.norm() > 0
    model.enable_gradient_checkpointing()
    for _ in range(2):  # nothing stays behind
        with CountAttention() as counter:
            assert torch.equal(gradients(model, images, autocast), expected)
        assert counter.count == once
    model.enable_gradient_checkpointing(plain_checkpoint)
    with CountAttention() as counter:
        gradients(model, images, autocast)
    assert counter.count == 2 * once


@pytest.mark.parametrize("part", ["blocks", "trunks"])
def test_compiled(monkeypatch, tiny_autoencoder, images, part: str) -> None:
    """Catches a graph that breaks at the checkpoint, and compiled blocks whose attention is computed again."""
    calls = []
    probabilities = attention_by_products._probabilities
    monkeypatch.setattr(attention, "PRODUCTS_BEAT_FLASH", True)
    monkeypatch.setattr(attention_by_products, "_probabilities", lambda *x: calls.append(1) or probabilities(*x))
    model = tiny_autoencoder.train()
    expected = gradients(model, images, autocast=True)
    once = len(calls)
    torch._dynamo.reset()
    if part == "blocks":
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    else:
        model.encoder.compile(backend="aot_eager", fullgraph=True)
        model.decoder.compile(backend="aot_eager", fullgraph=True)
    for checkpoint, expected_calls in ((None, once), (plain_checkpoint, once * 3 // 2)):  # the gradient's are a half
        model.enable_gradient_checkpointing(checkpoint)
        torch._dynamo.reset()
        for _ in range(2):
            calls.clear()
            found = gradients(model, images, autocast=True)
            torch.testing.assert_close(found, expected, rtol=5e-2, atol=1e-3)
        assert len(calls) == expected_calls
    torch._dynamo.reset()


def test_a_budget_for_compiled_blocks(monkeypatch, tiny_autoencoder, images) -> None:
    """Catches a PyTorch whose compiled blocks keep as much under a budget, or compute otherwise."""
    model = tiny_autoencoder.train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def step(budget: float) -> tuple[torch.Tensor, int]:
        torch._dynamo.reset()
        monkeypatch.setattr(functorch_config, "activation_memory_budget", budget)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = gradients(model, images)
        return found, sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)

    model.compile_repeated_blocks(backend="aot_eager_decomp_partition", fullgraph=True)
    expected, whole = step(1.0)
    found, less = step(0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert less < 0.6 * whole
    torch._dynamo.reset()


def test_outside_of_it_nothing_is_kept(tiny_autoencoder, images) -> None:
    """Catches a mode that is left on after a block, a backward pass or an error."""

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    model = tiny_autoencoder.train()
    model.enable_gradient_checkpointing()
    gradients(model, images)
    with pytest.raises(RuntimeError, match="broken"):
        checkpoint_but_attention(Broken(), torch.ones(1, requires_grad=True))
    with checkpointing.kept_for_backward() as mode:
        assert mode is None
