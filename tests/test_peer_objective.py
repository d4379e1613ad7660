"""The losses of the peers, by hand."""

import pytest
import torch
from diffusers import VQModel
from peers import TINY_TITOK, TINY_VQMODEL
from torch import nn

from flowmo_diffusers.models.titok import TiTokModel
from flowmo_diffusers.objectives.cost import peer_training_flops
from flowmo_diffusers.objectives.peer import peer_loss


@pytest.fixture
def model() -> VQModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQModel(**TINY_VQMODEL)
        nn.init.normal_(model.quantize.embedding.weight)  # far apart: several are nearest to some position
    return model.train()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def quantized(model: VQModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoder gives, and the nearest codes, both (positions, channels), found one by one."""
    z = model.quant_conv(model.encoder(x)).movedim(1, -1).flatten(0, 2)
    codes = model.quantize.embedding.weight
    nearest = [int((row - codes).square().sum(1).argmin()) for row in z.detach()]
    assert 1 < len(set(nearest))
    return z, codes[nearest]


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().mean((1, 2, 3))


def assert_terms(losses, x: torch.Tensor, y: torch.Tensor, codebook_loss: torch.Tensor) -> None:
    """That these are the terms with a perceptual distance of weight 0.3, and their sum."""
    expected = {
        "reconstruction_loss": (y - x).square().mean(),
        "codebook_loss": codebook_loss,
        "perceptual_loss": (y - x).abs().mean(),
    }
    assert losses.keys() == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)
    total = expected["reconstruction_loss"] + expected["codebook_loss"] + 0.3 * expected["perceptual_loss"]
    torch.testing.assert_close(losses["loss"], total, rtol=1e-4, atol=1e-6)


def test_values_by_hand(model, x):
    """Catches a sum for a mean, a term left out, doubled or of another sign, and a weight in the wrong place."""
    losses = peer_loss(model, x, distance, 0.3)
    z, e = quantized(model, x)
    grid = e.unflatten(0, (2, 16, 16)).movedim(-1, 1)
    y = model.decoder(model.post_quant_conv(grid))
    assert_terms(losses, x, y, 1.25 * (e - z).square().mean())
    plain = peer_loss(model, x)
    assert plain.keys() == {"loss", "reconstruction_loss", "codebook_loss"}
    torch.testing.assert_close(plain["loss"], plain["reconstruction_loss"] + plain["codebook_loss"])


def test_the_encoder_commits_four_times_as_much_as_the_codes_follow(model, x):
    """Catches a version of diffusers whose quantizer has its weights the other way round, unlike the docstring."""
    losses = peer_loss(model, x)
    z, e = quantized(model, x)
    codes = model.quantize.embedding.weight
    (ours,) = torch.autograd.grad(losses["codebook_loss"], codes, retain_graph=True)
    (expected,) = torch.autograd.grad(0.25 * (e - z.detach()).square().mean(), codes, retain_graph=True)
    torch.testing.assert_close(ours, expected)
    kernel = model.quant_conv.weight
    (ours,) = torch.autograd.grad(losses["codebook_loss"], kernel)
    (expected,) = torch.autograd.grad((e.detach() - z).square().mean(), kernel)
    torch.testing.assert_close(ours, expected)


def test_gradients_reach_every_part(model, x):
    """Catches a reconstruction that stops at the codes, and a codebook that nothing trains."""
    losses = peer_loss(model, x, distance, 0.1)
    for name in ("reconstruction_loss", "perceptual_loss"):  # straight through the codes
        (gradient,) = torch.autograd.grad(losses[name], model.encoder.conv_in.weight, retain_graph=True)
        assert gradient.abs().max() > 0, name
    losses["loss"].backward()
    assert all(
        p.grad.isfinite().all() and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "to_k.b" not in n
    )
    used = model.quantize.embedding.weight.grad.abs().sum(1) > 0
    assert 1 < used.sum() <= 8


def test_flops_are_those_of_the_layers():
    """Catches attention or the search counted twice or not at all, a frozen part, or a batch in place of an image."""
    model = VQModel(**TINY_VQMODEL)
    counts = {}

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        features = module.weight[0].numel()  # of one output
        counts[module] = 2 * features * output.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32))
    attention = 2 * 2 * (2 * 256 * 256 * 8)  # scores and their product with values, of encoder and decoder
    search = 2 * 256 * 8 * 3  # positions, codes, channels
    # The image has no gradient.
    expected = 3 * (sum(counts.values()) + attention) - counts[model.encoder.conv_in] + search
    assert peer_training_flops(VQModel, model.config, 32, 32) == expected
    bigger = VQModel(**TINY_VQMODEL | {"num_vq_embeddings": 16}).config
    assert peer_training_flops(VQModel, bigger, 32, 32) == expected + search


def test_flops_of_titok_are_those_of_its_layers():
    """Catches attention that a kernel hides from the count, a search left out, and a count that moves the seed."""
    model = TiTokModel(**TINY_TITOK).eval()
    counts = {}

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        counts[module] = 2 * module.weight[0].numel() * output.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32))
    attention = 2 * 2 * (2 * 22 * 22 * 16)  # 16 patches and 6 tokens; of encoder and decoder
    search = 2 * 6 * 12 * 4  # as much again: to take the codes, its gradient, what takes each
    rotation = 8 * (2 * 6 * 4)  # of the gradient through the codes (arXiv 2410.06424)
    image = counts[model.tokenizer.image_to_tokens[1]]  # has no gradient
    expected = 3 * (sum(counts.values()) + attention) - image + 4 * search + rotation
    torch.manual_seed(0)
    assert peer_training_flops(TiTokModel, model.config, 32, 32) == expected
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.fixture
def titok() -> TiTokModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TiTokModel(**TINY_TITOK).train()


def test_titok_s_values_by_hand(titok, x):
    """Catches the quantizer's loss left out, as in the package's own forward, or one that trains only one side."""
    seen = []
    titok.tokenizer.vq.quantizer.project_in.register_forward_hook(lambda *call: seen.append(call[-1]))
    losses = peer_loss(titok, x, distance, 0.3)
    (z,) = seen
    indices = titok.eval().encode(x)
    y = titok.decode(indices)
    codes = titok.tokenizer.vq.quantizer.codebook[indices]
    assert_terms(losses, x, y, (codes - z).square().mean())


def test_gradients_reach_every_part_of_titok(titok, x):
    """Catches a reconstruction that stops at the codes, codes that nothing trains, and an unused part."""
    losses = peer_loss(titok, x)
    codes = titok.tokenizer.vq.quantizer._codebook.embed
    (gradient,) = torch.autograd.grad(losses["reconstruction_loss"], titok.tokenizer.latents, retain_graph=True)
    assert gradient.abs().max() > 0
    assert torch.autograd.grad(losses["reconstruction_loss"], codes, retain_graph=True, allow_unused=True) == (None,)
    losses["loss"].backward()
    assert isinstance(codes, nn.Parameter)
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in titok.parameters())
