"""The wrapper around titok-pytorch: the package's function, whole in a folder, in float32 under autocast."""

import sys

import pytest
import torch
from peers import TINY_TITOK
from processes import on_processes
from safetensors.torch import load_file

from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.models.titok import TiTokModel
from flowmo_diffusers.objectives.peer import peer_loss


@pytest.fixture
def model() -> TiTokModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TiTokModel(**TINY_TITOK).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_it_is_the_package_s_function(model, x):
    """Catches another order of tokens, codes that are projected twice, and an encoder that is not the one trained."""
    package = model.tokenizer
    indices = model.encode(x)
    assert indices.shape == (8, 6) and indices.dtype == torch.int64 and 1 < len(indices.unique()) <= 12
    assert torch.equal(indices, package.tokenize(x))
    y = model.decode(indices)
    assert torch.equal(y, package.codebook_ids_to_images(indices))
    torch.testing.assert_close(y, model(x).sample, atol=1e-5, rtol=0)
    torch.testing.assert_close(package(x), (y - x).square().mean())


@torch.no_grad()
def test_a_folder_has_all_of_it(model, x, tmp_path):
    """Catches codes that are not saved, a field of the configuration that is lost, and a pickle."""
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == model.state_dict().keys()
    loaded, info = TiTokModel.from_pretrained(tmp_path, use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not loaded.training
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), model.decode(model.encode(x)))
    assert {name: loaded.config[name] for name in TINY_TITOK} == TINY_TITOK


@torch.no_grad()
def test_the_decoder_knows_the_order_of_tokens(model):
    """Catches a decoder that is given a set of codes, as the package's is without positions."""
    indices = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    y = model.decode(indices)
    assert (y[0] - y[1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_nearest_code_is_found_in_float32(model, x):
    """Catches autocast in the search and in the codes: bfloat16 has them wrong by parts in a hundred."""
    seen = []
    model.tokenizer.vq.register_forward_hook(lambda module, inputs, outputs: seen.append((inputs[0], outputs)))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    ((z, (quantized, indices, _)),) = seen
    quantizer = model.eval().tokenizer.vq.quantizer
    distances = torch.cdist(quantizer.project_in(z.float()), quantizer.codebook)
    assert torch.equal(indices, distances.argmin(-1))
    assert quantized.dtype == torch.float32
    torch.testing.assert_close(quantized, quantizer.get_output_from_indices(indices), atol=1e-5, rtol=0)


def test_averages_of_weights_have_codes_that_belong_to_the_encoder(model, x):
    """Catches codes outside the engine's EMA: averages of an encoder with the codes of its last step."""
    codes = model.tokenizer.vq.quantizer._codebook.embed
    assert any(parameter is codes for parameter in model.parameters())
    ema = EMA(model.parameters(), decay=0.5, update_every=1)
    before = codes.detach().clone()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    y, loss = model(x, return_dict=False)
    replaced = codes.detach().clone()  # where hardly anything is near
    ((y - x).square().mean() + loss).backward()
    optimizer.step()
    after = codes.detach().clone()
    assert not torch.equal(after, replaced)
    ema.update(model.parameters(), 0)
    with ema.applied(model.parameters()):
        torch.testing.assert_close(codes.detach(), (before + after) / 2)
        y = model.eval().decode(model.encode(x))
    with torch.no_grad():
        codes.copy_(after)
    assert not torch.equal(y, model.decode(model.encode(x)))


def test_codes_that_nothing_takes_are_replaced(model, x):
    """Catches a codebook of which few codes are ever used, and a replacement that the seed does not decide."""
    codes = model.tokenizer.vq.quantizer._codebook.embed
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ends = []
    for seed in (0, 0, 1):
        model.load_state_dict(start)
        with torch.no_grad():
            codes[0, 1:] += 100  # from everything
        torch.manual_seed(seed)
        for _ in range(6):
            model.train()(x)
        ends.append(codes.detach().clone())
    assert ends[0].abs().max() < 50
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 0}, "codebook_size=0 must be a whole number of at least 1"),
        ({"hidden_size": 16.5}, "hidden_size=16.5 must be a whole number"),
        ({"patch_size": 5}, "patch_size=5 must divide sample_size=32"),
        ({"attention_head_dim": 7}, "attention_head_dim=7 must be even"),
        ({"num_attention_heads": 1}, "attention_head_dim=8 of a single head must be hidden_size=16"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    """Catches an assertion without words, or an error from deep inside the package."""
    with pytest.raises(ValueError, match=message):
        TiTokModel(**TINY_TITOK | changes)


def test_without_the_package(monkeypatch):
    """Catches a message that does not say what to install."""
    monkeypatch.setitem(sys.modules, "titok_pytorch", None)
    with pytest.raises(ImportError, match=r'pip install "flowmo_diffusers\[peers\]"'):
        TiTokModel(**TINY_TITOK)


def codes_after_steps() -> torch.Tensor:
    """The codebook of one of several processes, each with images of its own, after codes were replaced."""
    torch.manual_seed(0)
    model = TiTokModel(**TINY_TITOK).train()
    with torch.no_grad():
        model.tokenizer.vq.quantizer._codebook.embed[0, 1:] += 100  # from everything
    trained = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(6):
        x = torch.rand(4, 3, 32, 32) * 2 - 1
        optimizer.zero_grad()
        peer_loss(trained, x)["loss"].backward()
        optimizer.step()
    return model.tokenizer.vq.quantizer._codebook.embed.detach()


@pytest.mark.slow
def test_processes_have_the_same_codes():
    """Catches codes that each process replaces by tokens of its own."""
    first, second = on_processes(2, codes_after_steps)
    assert first.abs().max() < 50
    assert torch.equal(first, second)
