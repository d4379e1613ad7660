"""Attention by products of matrices: the same function, and taken only where it is faster."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.models import attention
from flowmo_diffusers.models.attention import attend
from flowmo_diffusers.models.attention_by_products import ROWS, attend_by_products


SCALE = 0.3
Tensors = list[torch.Tensor]


def heads(queries: int, keys: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, queries, 3, 8), (2, keys, 3, 8), (2, keys, 3, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for shape in shapes]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * SCALE
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def gradients(function, tensors: Tensors, towards: torch.Tensor) -> Tensors:
    return list(torch.autograd.grad(function(*tensors), tensors, towards))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (ROWS, 9), (2 * ROWS + 1, 6)])
def test_it_is_attention(queries: int, keys: int) -> None:
    """Catches heads or images that are mixed up, a forgotten scale, rows left out at the end, and wrong gradients."""
    tensors = heads(queries, keys, grad=True)
    towards = torch.randn(2, queries, 3, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attend_by_products(*tensors, SCALE), reference(*tensors))
    found = gradients(lambda *x: attend_by_products(*x, SCALE), tensors, towards)
    for ours, expected in zip(found, gradients(reference, tensors, towards), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_strides_do_not_matter() -> None:
    """Catches inputs that are parts of one projection, read as if they lay alone."""
    query, key, value = torch.randn(2, 5, 3, 4, 8).unbind(2)
    expected = reference(query, key, value)
    torch.testing.assert_close(attend_by_products(query, key, value, SCALE), expected)


def test_bfloat16_is_as_exact_as_flash() -> None:
    """Catches scores or sums that are rounded more than bfloat16 needs, over several parts of the queries."""
    exact = heads(3 * ROWS, 300, torch.float64, grad=True)
    tensors = [x.detach().bfloat16().requires_grad_() for x in exact]
    towards = torch.randn(2, 3 * ROWS, 3, 8, generator=torch.Generator().manual_seed(1))

    def flash(query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=SCALE).transpose(1, 2)

    def errors(function) -> list[float]:
        found = [function(*tensors), *gradients(function, tensors, towards.bfloat16())]
        wanted = [reference(*exact), *gradients(reference, exact, towards.double())]
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]

    for ours, theirs in zip(errors(lambda *x: attend_by_products(*x, SCALE)), errors(flash), strict=True):
        assert ours < 2 * theirs and ours < 0.02


@pytest.mark.parametrize(
    ("dtype", "backend", "fast_products", "taken"),
    [
        (torch.bfloat16, None, True, True),
        (torch.bfloat16, None, False, False),
        (torch.bfloat16, AttentionBackendName.NATIVE, True, False),
        (torch.float32, None, True, False),
        (torch.float16, None, True, False),
    ],
)
def test_when_it_is_taken(monkeypatch, dtype, backend, fast_products: bool, taken: bool) -> None:
    """Catches it where it is slower, and a backend that was asked for and is not taken."""
    calls = []
    monkeypatch.setattr(attention, "PRODUCTS_BEAT_FLASH", fast_products)
    monkeypatch.setattr(attention, "attend_by_products", lambda *x: calls.append(1) or attend_by_products(*x))
    tensors = heads(4, 6, dtype)
    result = attend(*tensors, SCALE, backend)
    assert bool(calls) == taken and result.dtype == dtype
    tolerance = 0.03 if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(
        result.float(), reference(*(x.float() for x in tensors)), atol=tolerance, rtol=tolerance
    )


def test_a_pytorch_that_cannot_tell_has_flash(monkeypatch) -> None:
    """Catches an import that fails where PyTorch does not say what the CPU can do."""
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert attention.cpu_has("avx512_bf16") is False
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert attention.cpu_has("avx512_bf16") is True


def test_models_train_and_compile_with_it(monkeypatch, tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches an operator that breaks the graph of a compiled block, or has no gradient within one."""
    monkeypatch.setattr(attention, "PRODUCTS_BEAT_FLASH", True)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def losses() -> Tensors:
        tiny_autoencoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = tiny_autoencoder(x, 0.5, images=x).velocity.float().square().mean()
        loss.backward()
        weight = tiny_autoencoder.encoder.blocks[0].attn.patches.to_qkv.weight
        return [loss.detach(), weight.grad.clone()]

    expected = losses()
    assert expected[1].norm() > 0
    torch._dynamo.reset()
    tiny_autoencoder.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for compiled, plain in zip(losses(), expected, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=5e-2)
    torch._dynamo.reset()
