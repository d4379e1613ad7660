"""Peers get what they would get from their own encoder and decoder, and are charged for what they store."""

import json
import math
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from peers import TINY_TITOK
from safetensors.torch import load_file, save_file

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.baselines import SUPPORTED, DiffusersReconstructor, TiTokReconstructor, load_baseline
from flowmo_diffusers.metrics.codecs import CodecReconstructor
from flowmo_diffusers.models.titok import TiTokModel


DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
LEVELS = {"block_out_channels": (4, 8), "down_block_types": DOWN, "up_block_types": UP, "norm_num_groups": 4}

# Every supported class at its smallest, for 16 x 16 pixels: latents of 4 channels (VQModel 3, RAE 64), half the sides
# (RAE a quarter).
CONFIGS = {
    "AsymmetricAutoencoderKL": {
        "down_block_out_channels": (4, 8),
        "down_block_types": DOWN,
        "up_block_out_channels": (4, 8),
        "up_block_types": UP,
        "norm_num_groups": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
    },
    "AutoencoderKL": LEVELS,
    "AutoencoderKLFlux2": {**LEVELS, "latent_channels": 4, "layers_per_block": 1},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 16,
    },
    "AutoencoderKLKVAE": {
        "channels": 32,
        "num_enc_blocks": 1,
        "num_dec_blocks": 1,
        "z_channels": 4,
        "ch_mult": (1, 1),
        "sample_size": 16,
    },
    "AutoencoderRAE": {
        "encoder_hidden_size": 64,
        "encoder_patch_size": 4,
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": 16,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "patch_size": 4,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (4, 8),
        "encoder_down_block_types": DOWN,
        "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 4,
        "decoder_block_out_channels": (8, 8),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 4,
    },
    "VQModel": {**LEVELS, "num_vq_embeddings": 24},
}

# Bits of an image of 16 x 16 pixels: 64 positions, 4 numbers or 1 index each; RAE 16 positions of 64 numbers.
BITS = {kind: 64 * 4 * 16 for kind in SUPPORTED} | {
    "AutoencoderRAE": 16 * 64 * 16,
    "AutoencoderTiny": 64 * 4 * 8,
    "VQModel": 64 * math.log2(24),
}


def build(kind: str, **changes) -> diffusers.ModelMixin:
    """The same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, kind)(**{**CONFIGS[kind], **changes})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def by_hand(model: diffusers.ModelMixin, images: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """What each class's own documentation does, with latents rounded as they are stored."""
    match type(model).__name__:
        case "AutoencoderTiny":
            y = model(images).sample  # rounds its latents to 8 bits itself
        case "VQModel":
            y = model.decode(model.encode(images).latents).sample
        case "AutoencoderDC":
            y = model.decode(model.encode(images).latent.half().float()).sample
        case "AutoencoderRAE":
            y = model.decode(model.encode(images * 0.5 + 0.5).latent.half().float()).sample * 2 - 1
        case "ConsistencyDecoderVAE":
            z = model.encode(images).latent_dist.mode().half().float()
            generators = [keyed_generator(0, "decoding", number) for number in numbers]
            y = model.decode(z, generator=generators).sample
        case _:
            y = model.decode(model.encode(images).latent_dist.mean.half().float()).sample
    return y.clamp(-1, 1)


@pytest.mark.parametrize("kind", SUPPORTED)
@torch.no_grad()
def test_every_class_from_a_folder(tmp_path, images, kind):
    """Catches a class that does not load, another range or mode, latents not rounded, and bits that are not stored."""
    model = build(kind).eval()
    model.save_pretrained(tmp_path)
    reconstructor = load_baseline(str(tmp_path))
    result = reconstructor(images, [0, 1, 2])
    torch.testing.assert_close(result.images, by_hand(model, images, [0, 1, 2]), atol=1e-5, rtol=0)
    assert result.images.dtype == torch.float32 and result.images.shape == images.shape
    assert result.num_bytes.dtype == torch.float64
    assert result.num_bytes.tolist() == pytest.approx([BITS[kind] / 8] * 3)
    assert (result.indices is not None) == (kind == "VQModel")
    assert reconstructor.name == str(tmp_path) and reconstructor.settings["class"] == kind


@torch.no_grad()
def test_latents_are_rounded_to_float16(images):
    """Catches 16 bits that are counted of 32 that are used."""
    model = build("AutoencoderKL").eval()
    result = DiffusersReconstructor(model, "kl")(images, [0, 1, 2])
    z = model.encode(images).latent_dist.mode()
    assert torch.equal(result.images, model.decode(z.half().float()).sample.clamp(-1, 1))
    assert not torch.equal(result.images, model.decode(z).sample.clamp(-1, 1))


@torch.no_grad()
def test_tiny_latents_take_256_values(images):
    """Catches more than 8 bits of a latent, and values outside the range that are not clamped."""
    model = build("AutoencoderTiny", latent_magnitude=0.05).eval()
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    DiffusersReconstructor(model, "tiny")(images, [0, 1, 2])
    levels = (seen[0] / 0.1 + 0.5) * 255
    assert levels.min().item() == pytest.approx(0, abs=1e-3) and levels.max().item() == pytest.approx(255, abs=1e-3)
    assert (levels - levels.round()).abs().max() < 1e-3
    assert len(levels.round().unique()) > 50


@torch.no_grad()
def test_indices_are_all_that_a_vq_model_keeps(images):
    """Catches indices in another order, of other vectors than the nearest, or of which the decoder knows more."""
    model = build("VQModel").eval()
    z = model.encode(images).latents.flatten(2).transpose(1, 2)
    model.quantize.embedding.weight.copy_(z.flatten(0, 1)[::8])  # as the latents are spread
    seen = []
    model.quantize.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    result = DiffusersReconstructor(model, "vq")(images, [0, 1, 2])
    codebook = model.quantize.embedding.weight
    nearest = (z[:, :, None] - codebook).square().sum(-1).argmin(-1)
    assert result.indices.shape == (3, 64, 1) and torch.equal(result.indices[..., 0], nearest)
    assert len(nearest.unique()) == 24
    expected = codebook[nearest].transpose(1, 2).reshape(3, 3, 8, 8)
    assert torch.equal(seen[-1], expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_titok_from_a_folder(tmp_path, dtype):
    """Catches bits that are not those of its indices, a dtype the quantizer does not take, and training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TiTokModel(**TINY_TITOK).eval()
    model.save_pretrained(tmp_path)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reconstructor = load_baseline(str(tmp_path), dtype=dtype)
    result = reconstructor(x, [0, 1, 2])
    model = model.to(dtype)
    indices = model.encode(x.to(dtype))
    assert torch.equal(result.indices, indices[..., None]) and result.indices.dtype == torch.int64
    assert torch.equal(result.images, model.decode(indices).float().clamp(-1, 1))
    assert result.num_bytes.tolist() == pytest.approx([6 * math.log2(12) / 8] * 3)
    assert (reconstructor.codebook_size, reconstructor.settings["class"]) == (12, "TiTokModel")
    assert reconstructor.settings["dtype"] == str(dtype)
    with pytest.raises(ValueError, match="takes images of 32 x 32 pixels, not of 32 x 40"):
        reconstructor(torch.zeros(1, 3, 32, 40), [0])
    assert not TiTokReconstructor(model.train(), "titok").model.training


def test_titok_without_its_package(tmp_path, monkeypatch):
    """Catches a class that is called unknown where only its package is missing."""
    TiTokModel(**TINY_TITOK).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "titok_pytorch", None)
    with pytest.raises(ImportError, match="pip install"):
        load_baseline(str(tmp_path))


@torch.no_grad()
def test_range_of_amused(images):
    """Catches aMUSEd's model, which is trained on [0, 1], given images in [-1, 1]."""
    model = build("VQModel", lookup_from_codebook=True).eval()
    reconstructor = DiffusersReconstructor(model, "amused")
    expected = model.decode(model.encode((images + 1) / 2).latents).sample.clamp(0, 1) * 2 - 1
    torch.testing.assert_close(reconstructor(images, [0, 1, 2]).images, expected, atol=1e-5, rtol=0)
    assert reconstructor.settings["range"] == [0, 1]
    assert DiffusersReconstructor(build("VQModel"), "vq").settings["range"] == [-1, 1]


def test_noise_belongs_to_an_image(images):
    """Catches a consistency decoder whose noise depends on the batch, the call, or not on the seed."""
    model = build("ConsistencyDecoderVAE")
    reconstructor = DiffusersReconstructor(model, "consistency")
    together = reconstructor(images, [4, 5, 6]).images
    torch.testing.assert_close(reconstructor(images[2:], [6]).images, together[2:], atol=1e-5, rtol=0)
    assert not torch.allclose(reconstructor(images[2:], [7]).images, together[2:], atol=1e-2)
    other_seed = DiffusersReconstructor(model, "consistency", seed=1)
    assert not torch.allclose(other_seed(images[2:], [6]).images, together[2:], atol=1e-2)
    assert other_seed.settings != reconstructor.settings


def test_outputs_stay_in_range(images):
    """Catches reconstructions outside [-1, 1], and a model left in training mode."""
    model = build("AutoencoderKL").train()
    with torch.no_grad():
        model.decoder.conv_out.weight *= 100
    result = DiffusersReconstructor(model, "kl")(images, [0, 1, 2])
    assert result.images.min() == -1 and result.images.max() == 1 and not result.images.requires_grad
    assert not model.training


def test_a_part_of_a_pipeline_in_another_type(tmp_path, images):
    """Catches a subfolder that is not found, and a dtype that is not taken."""
    build("AutoencoderKL").save_pretrained(tmp_path / "part")
    reconstructor = load_baseline(f"{tmp_path}:part", dtype=torch.bfloat16)
    assert reconstructor.autoencoder.dtype == torch.bfloat16
    assert reconstructor.settings["dtype"] == "torch.bfloat16"
    assert reconstructor(images, [0, 1, 2]).images.dtype == torch.float32


def test_a_folder_with_a_colon(tmp_path):
    """Catches a folder that is there taken for a part of another."""
    build("AutoencoderKL").save_pretrained(tmp_path / "one:two")
    assert load_baseline(f"{tmp_path}/one:two").kind == "AutoencoderKL"


def test_settings_say_what_results_depend_on(tmp_path):
    """Catches stored results taken for those of other weights or another configuration."""
    models = [build("AutoencoderTiny"), build("AutoencoderTiny", latent_magnitude=2), build("AutoencoderTiny")]
    with torch.no_grad():
        next(models[2].parameters()).add_(1e-3)
    texts = {json.dumps(DiffusersReconstructor(model, "tiny").settings) for model in models}
    assert len(texts) == 3
    for number in range(2):
        models[0].save_pretrained(tmp_path / str(number))
    first, second = (load_baseline(str(tmp_path / str(number))) for number in range(2))
    assert first.settings == second.settings  # wherever they are from


@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind != "AutoencoderRAE"])
def test_sizes_that_cannot_be_divided_are_refused(kind):
    """Catches an error from deep inside, or an image that comes back smaller."""
    reconstructor = DiffusersReconstructor(build(kind), "peer")
    with pytest.raises(ValueError, match="'peer' takes sides that are multiples of 2, not 16 x 17 pixels"):
        reconstructor(torch.zeros(1, 3, 16, 17), [0])
    with pytest.raises(ValueError, match="multiples of 2, not 15 x 16"):
        reconstructor(torch.zeros(1, 3, 15, 16), [0])
    assert reconstructor(torch.zeros(1, 3, 8, 12), [0]).images.shape == (1, 3, 8, 12)


def test_the_one_size_of_rae():
    """Catches images that are resized inside and come back in another size."""
    reconstructor = DiffusersReconstructor(build("AutoencoderRAE"), "rae")
    with pytest.raises(ValueError, match="'rae' takes images of 16 x 16 pixels, not of 16 x 32"):
        reconstructor(torch.zeros(1, 3, 16, 32), [0])


def test_spectrograms_are_refused():
    """Catches an autoencoder of sound, of the same class as those of images."""
    with pytest.raises(ValueError, match="'sound' is for inputs of 1 channels; images have 3"):
        DiffusersReconstructor(build("AutoencoderKL", in_channels=1, out_channels=1), "sound")


@pytest.mark.parametrize("kind", ["AutoencoderKLWan", "FluxTransformer2DModel", None, ["file", "AutoencoderKL"]])
def test_other_classes_are_refused(tmp_path, kind):
    """Catches a video autoencoder, a transformer, or code from a checkpoint that is run."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ValueError, match="no image autoencoder.*AutoencoderDC, AutoencoderKL, .*VQModel") as caught:
        load_baseline(str(tmp_path))
    assert str(kind) in str(caught.value)


def test_flowmo_is_no_baseline(tmp_path, tiny_autoencoder: FlowMoAutoencoder):
    """Catches a FlowMo tokenizer that is decoded without its sampler."""
    tiny_autoencoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
        load_baseline(str(tmp_path))


def test_nothing_there(tmp_path):
    """Catches a pipeline whose part is not named, and a message without the way out."""
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(OSError, match="'id:vae'"):
        load_baseline(str(tmp_path))
    with pytest.raises(OSError, match="missing.*'id:vae'"):
        load_baseline(str(tmp_path / "missing"))


def test_pickled_weights_are_refused(tmp_path: Path):
    """Catches weights that run code when they are read."""
    model = build("AutoencoderKL")
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_baseline(str(tmp_path))


def test_incomplete_weights_are_refused(tmp_path: Path):
    """Catches a network that is part noise."""
    build("AutoencoderKL").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_in.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights lack \['decoder.conv_in.weight'\]"):
        load_baseline(str(tmp_path))


def test_codecs_by_a_word():
    """Catches a budget that replaces a given quality, or is not passed on."""
    within = load_baseline("webp", num_bytes=576)
    assert isinstance(within, CodecReconstructor) and within.name == "webp, 576 bytes"
    assert load_baseline("jpeg:75", num_bytes=576).name == "jpeg, quality 75"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jpeg", "'jpeg' needs num_bytes, or a quality as in 'jpeg:75'"),
        ("webp:", "'webp:': the quality must be a whole number"),
        ("jpeg:best", "'jpeg:best': the quality must be a whole number"),
        ("jpeg:-5", "'jpeg:-5': the quality must be"),
        ("jpeg:101", "quality=101 must be"),
    ],
)
def test_wrong_words_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        load_baseline(spec)
