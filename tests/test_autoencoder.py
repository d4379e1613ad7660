"""FlowMoAutoencoder: its shapes, codes and errors, in every mode, dtype and wrapping a user may put it in."""

import copy
import math
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.models.mmdit import FlowMoAttnProcessor, FlowMoBlock, HeadNorm, StreamNorm, patchify, unpatchify
from flowmo_diffusers.models.published import published_shapes
from flowmo_diffusers.models.rotary import _cached_table, rotary_table, rotate
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.pretrain import pretraining_loss


HI = {"latent_channels": 56, "codebook_bits": 14}


def build(config: dict, **changes) -> FlowMoAutoencoder:
    """A model of a changed configuration, with noise on every parameter, so that gates are open."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = FlowMoAutoencoder(**{**config, **changes})
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def on_meta(**config) -> FlowMoAutoencoder:
    with torch.device("meta"):
        return FlowMoAutoencoder(**config)


def pictures(batch: int = 2, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_codes(model: FlowMoAutoencoder, batch: int = 2, seed: int = 1) -> torch.Tensor:
    shape = (batch, model.config.num_latent_tokens, model.config.latent_channels)
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def training_step(model: FlowMoAutoencoder, batch: int = 4) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of pre-training, from fixed draws of which some drop the codes."""
    x = pictures(batch)
    draws = FlowDraws.sample(x, [torch.Generator().manual_seed(2 + i) for i in range(batch)])
    draws.code_mask = torch.tensor([1.0, 0.0] * (batch // 2))
    model.zero_grad()
    loss = pretraining_loss(model.train(), x, draws, generator=torch.Generator().manual_seed(3))["loss"]
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def default_backend() -> Iterator[AttentionBackendName]:
    """The process-wide backend, which `set_attention_backend` of any model changes; restored afterwards."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield before
    _AttentionBackendRegistry.set_active_backend(before)


# Configuration


def test_defaults_are_flowmo_lo() -> None:
    """Catches a changed default: published files are read with them, and 79.8 of 945.4 M weights there are dead."""
    model = on_meta()
    count = sum(parameter.numel() for parameter in model.parameters())
    published = sum(math.prod(shape) for shape in published_shapes(model.config).values())
    assert round(count / 1e6, 1) == 865.5
    assert round(published / 1e6, 1) == 945.4
    assert round((published - count) / 1e6, 1) == 79.8
    assert len(published_shapes(model.config)) == 608
    assert model.bits_per_token == 18 and model.quantize.groups == 2
    hi = on_meta(**HI)
    assert hi.bits_per_token == 56 and hi.quantize.groups == 4


@pytest.mark.parametrize("quantizer", ["lfq", "fsq", "kl", "none"])
def test_saved_model_is_bit_exact(quantizer: str, tiny_config: dict, tmp_path) -> None:
    """Catches a configuration that JSON changes, a weight that is not saved, and a model that loads into training."""
    model = build(tiny_config, quantizer=quantizer, rope_axes=(2, 3, 3), mlp_ratio=2.5)
    model.save_pretrained(tmp_path)
    loaded = FlowMoAutoencoder.from_pretrained(tmp_path)

    def plain(config: dict) -> dict:
        values = {name: value for name, value in config.items() if not name.startswith("_")}
        return {**values, "rope_axes": list(values["rope_axes"])}

    assert plain(loaded.config) == plain(model.config)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    outputs = [
        m(pictures(), 0.3, images=pictures(), generator=torch.Generator().manual_seed(0), return_dict=False)[:2]
        for m in (model, copy.deepcopy(loaded))  # copied: a file's tensors are aligned otherwise, and kernels care
    ]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 0}, "patch_size=0 must be"),
        ({"in_channels": 0}, "in_channels=0 must be"),
        ({"num_latent_tokens": -1}, "num_latent_tokens=-1 must be"),
        ({"latent_channels": 6.0}, "latent_channels=6.0 must be"),
        ({"encoder_num_layers": 0}, "encoder_num_layers=0 must be"),
        ({"decoder_num_layers": True}, "decoder_num_layers=True must be"),
        ({"num_attention_heads": None}, "num_attention_heads=None must be"),
        ({"sample_size": "16"}, "sample_size='16' must be"),
        ({"sample_size": 18}, "sample_size=18 must be a multiple of patch_size=4, e.g. 16"),
        ({"encoder_hidden_size": 33}, "encoder_hidden_size=33 must be a multiple of num_attention_heads=2"),
        ({"decoder_hidden_size": 33}, "decoder_hidden_size=33 must be a multiple of num_attention_heads=2"),
        ({"encoder_hidden_size": 36}, "encoder_hidden_size=36.*head width of 18"),
        ({"decoder_hidden_size": 4}, "decoder_hidden_size=4.*head width of 2.*at least 6"),
        ({"rope_axes": [1, 1, 1]}, r"rope_axes=\[1, 1, 1\].*e\.g\. \(4, 6, 6\)"),
        ({"rope_axes": [4, 12]}, "rope_axes.*three positive"),
        ({"rope_axes": [4, -6, 18]}, "rope_axes.*three positive"),
        ({"rope_axes": [4.0, 6.0, 6.0]}, "rope_axes.*whole"),
        ({"rope_axes": 16}, "rope_axes=16"),
        ({"rope_axes": "466"}, "rope_axes=466"),
        ({"rope_theta": 0}, "rope_theta=0 must be"),
        ({"rope_theta": math.inf}, "rope_theta=inf must be"),
        ({"rope_theta": None}, "rope_theta=None must be"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 must be"),
        ({"mlp_ratio": math.nan}, "mlp_ratio=nan must be"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4' must be"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01 leaves no channel"),
        ({"quantizer": "vq"}, "quantizer='vq' is unknown"),
        ({"codebook_bits": 4}, r"codebook_bits=4.*\[1, 2, 3, 6\]"),
        ({"codebook_bits": 3.0}, "codebook_bits=3.0 must be"),
        ({"quantizer": "fsq", "fsq_levels": 6}, "fsq_levels=6 must be"),
        ({"quantizer": "fsq", "fsq_levels": 8.0}, "fsq_levels=8.0 must be"),
        ({"quantizer": "fsq", "fsq_levels": 8, "codebook_bits": 4}, r"codebook_bits=4.*\[3, 6, 9, 18\]"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(changes: dict, message: str, tiny_config: dict) -> None:
    """Catches a field that fails far from its cause, with another error, or that a model quietly accepts."""
    with pytest.raises(ValueError, match=message):
        FlowMoAutoencoder(**{**tiny_config, **changes})


def test_names_that_diffusers_looks_up_exist(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches a renamed block: regional compilation and device maps would then skip it in silence."""
    classes = {type(module).__name__ for module in tiny_autoencoder.modules()}
    assert set(FlowMoAutoencoder._repeated_blocks) <= classes
    assert set(FlowMoAutoencoder._no_split_modules) <= classes
    names = [name for name, _ in tiny_autoencoder.named_modules()]
    for pattern in ("patch_in", "token_in", "time_in", "norm", "head"):
        assert pattern in FlowMoAutoencoder._skip_layerwise_casting_patterns
        assert any(pattern in name for name in names)


def test_block_weights_are_all_matrices_of_the_blocks(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches norm rescaling that misses a matrix, or that reaches a norm's scale, a bias or the outer layers."""
    wanted = {
        name for name, parameter in tiny_autoencoder.named_parameters() if ".blocks." in name and parameter.ndim == 2
    }
    names = {id(parameter): name for name, parameter in tiny_autoencoder.named_parameters()}
    weights = tiny_autoencoder.block_weights()
    assert len(weights) == len(wanted) and {names[id(weight)] for weight in weights} == wanted


# Encoding


@pytest.mark.parametrize("size", [(16, 16), (4, 4), (8, 24), (32, 12)])
@pytest.mark.parametrize(("quantizer", "groups"), [("lfq", 2), ("fsq", 6), ("kl", None), ("none", None)])
def test_encode_shapes(quantizer: str, groups: int | None, size: tuple[int, int], tiny_config: dict) -> None:
    """Catches sizes tied to `sample_size`, rows taken for columns, and outputs of another shape than promised."""
    model = build(tiny_config, quantizer=quantizer)
    output = model.encode(pictures(3, *size))
    assert output.latents.shape == (3, 8, 12 if quantizer == "kl" else 6)
    assert output.codes.shape == (3, 8, 6)
    if groups is None:
        assert output.indices is None
    else:
        assert output.indices.shape == (3, 8, groups) and output.indices.dtype == torch.int64
    plain = model.encode(pictures(3, *size), return_dict=False)
    assert len(plain) == 3 and torch.equal(plain[0], output.latents)
    velocity = model(pictures(3, *size), 0.5, codes=output.codes).velocity
    assert velocity.shape == (3, 3, *size)


def test_encode_and_forward_agree(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches two roads from images to codes: `encode`, and `forward` with and without a sample."""
    images, model = pictures(), tiny_autoencoder
    encoded, alone, both = model.encode(images), model(images=images), model(pictures(seed=1), 0.4, images=images)
    for output in (alone, both):
        assert torch.equal(output.codes, encoded.codes) and torch.equal(output.indices, encoded.indices)
    assert torch.equal(encoded.codes, torch.where(encoded.latents > 0, 1.0, -1.0))
    assert alone.velocity is None
    velocity = model(pictures(seed=1), 0.4, codes=encoded.codes).velocity
    assert torch.equal(velocity, both.velocity)
    assert not both.quantizer_losses
    assert model.train()(images=images).quantizer_losses.keys() >= {"entropy_loss", "commit_loss"}


def test_order_of_patch_features() -> None:
    """Catches (channel, row, column) features, which published weights do not have, and height taken for width."""
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    expected = [images[0, c, 2 + r, 4 + k] for r in range(2) for k in range(2) for c in range(3)]
    assert patches[0, 5].tolist() == expected
    assert torch.equal(unpatchify(patches, 2, 4, 6), images)


@pytest.mark.parametrize(
    "shape", [(2, 1, 16, 16), (2, 4, 16, 16), (3, 16, 16), (2, 3, 18, 16), (2, 3, 16, 6), (2, 3, 0, 16), (2, 3, 2, 2)]
)
def test_images_that_do_not_fit_are_refused(shape: tuple, tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches images whose last rows are dropped, or that fail inside a reshape."""
    codes = random_codes(tiny_autoencoder)
    with pytest.raises(ValueError, match="images (have shape|are .* pixels)"):
        tiny_autoencoder.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="images (have shape|are .* pixels)"):
        tiny_autoencoder(images=torch.zeros(shape))
    with pytest.raises(ValueError, match="sample (have shape|are .* pixels)"):
        tiny_autoencoder(torch.zeros(shape), 0.5, codes=codes)


def test_batch_equals_singles(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches anything computed across the batch: an image's codes and velocity are its own."""
    images, t, mask = pictures(3), torch.tensor([0.1, 0.5, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    z = pictures(3, seed=5)
    batch = tiny_autoencoder(z, t, images=images, code_mask=mask)
    for i in range(3):
        one = slice(i, i + 1)
        single = tiny_autoencoder(z[one], t[one], images=images[one], code_mask=mask[one])
        assert torch.equal(single.indices, batch.indices[one])
        torch.testing.assert_close(single.velocity, batch.velocity[one], rtol=1e-5, atol=1e-5)


def test_slicing_encodes_one_by_one(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches `enable_slicing` that changes the result, or that does not split the batch."""
    batches = []
    tiny_autoencoder.encoder.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    images = pictures(3)
    expected = tiny_autoencoder.encode(images)
    tiny_autoencoder.enable_slicing()
    sliced = tiny_autoencoder.encode(images)
    tiny_autoencoder.disable_slicing()
    tiny_autoencoder.encode(images)
    assert batches == [3, 1, 1, 1, 3]
    torch.testing.assert_close(sliced.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert torch.equal(sliced.indices, expected.indices)


def test_tiling_is_not_pretended(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches `enable_tiling` accepted without effect."""
    with pytest.raises(NotImplementedError):
        tiny_autoencoder.enable_tiling()


# Codes, indices, bytes


@pytest.mark.parametrize(
    "changes", [{}, {"quantizer": "fsq", "fsq_levels": 4, "codebook_bits": 6}], ids=["lfq", "fsq"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_indices_and_bytes_round_trip(changes: dict, dtype: torch.dtype, tiny_config: dict) -> None:
    """Catches any of the three forms of an image's tokens that does not bring back the others, in another dtype."""
    model = build(tiny_config, **changes).to(dtype)
    encoded = model.encode(pictures(3).to(dtype))
    assert torch.equal(model.codes_to_indices(encoded.codes), encoded.indices)
    codes = model.indices_to_codes(encoded.indices)
    assert codes.dtype == dtype and torch.equal(codes, encoded.codes)
    assert torch.equal(model.indices_to_codes(encoded.indices.to(torch.int16)), codes)
    packed = model.pack_codes(encoded.codes)
    assert [type(row) for row in packed] == [bytes] * 3
    assert {len(row) for row in packed} == {model.bytes_per_image} == {model.bits_per_token}  # 8 tokens
    codes = model.unpack_codes(packed)
    assert codes.dtype == dtype and torch.equal(codes, encoded.codes)
    for form in (packed[1], bytearray(packed[1]), memoryview(packed[1])):
        assert torch.equal(model.unpack_codes(form), encoded.codes[1:2])


@pytest.mark.parametrize(("config", "count"), [({}, 576), (HI, 1792)], ids=["lo", "hi"])
def test_bytes_of_the_published_models(config: dict, count: int) -> None:
    """Catches a byte more an image than the paper's 0.070 and 0.219 bits per pixel."""
    model = on_meta(**config)
    assert model.bytes_per_image == count
    codes = random_codes(model, 1)
    (packed,) = model.pack_codes(codes)
    assert len(packed) == count
    ones = sum(byte.bit_count() for byte in packed)
    assert ones == (codes > 0).sum()


def test_bit_order_of_lfq_by_hand(tiny_config: dict) -> None:
    """Catches a little-endian byte, channels in group order, and padding in front: stored tokens become unreadable."""
    model = build(tiny_config, num_latent_tokens=2)
    codes = torch.tensor([[[1, -1, -1, 1, -1, 1], [1, 1, -1, -1, -1, 1]]]).float()
    assert model.pack_codes(codes) == [bytes([0b10010111, 0b00010000])]
    assert torch.equal(model.unpack_codes(b"\x97\x10"), codes)


def test_bit_order_of_fsq_by_hand(tiny_config: dict) -> None:
    """Catches a level written least significant bit first."""
    model = build(tiny_config, quantizer="fsq", fsq_levels=8, latent_channels=3, codebook_bits=3, num_latent_tokens=1)
    codes = torch.tensor([[[6, 1, 7]]]) * (2 / 7) - 1
    assert model.pack_codes(codes) == [bytes([0b11000111, 0b10000000])]
    torch.testing.assert_close(model.unpack_codes(b"\xc7\x80"), codes)


def test_bytes_that_do_not_fit_are_refused(tiny_config: dict) -> None:
    """Catches tokens of another model that unpack to noise."""
    model = build(tiny_config, num_latent_tokens=2)  # 12 bits
    assert model.unpack_codes([]).shape == (0, 2, 6)
    for bad, message in [
        (b"", "image 0 has 0 bytes; expected 2"),
        (b"\x97", "image 0 has 1 bytes; expected 2"),
        (b"\x97\x10\x00", "image 0 has 3 bytes; expected 2"),
        ([b"\x97\x10", b"\x97"], "image 1 has 1 bytes; expected 2"),
        (b"\x97\x11", "bits set behind the last of 12 bits"),
        ([b"\x97\x10", b"\x97\x18"], "bits set behind the last of 12 bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.unpack_codes(bad)


def test_indices_and_codes_that_do_not_fit_are_refused(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches indices of another codebook wrapped into this one, and shapes that broadcast by chance."""
    model = tiny_autoencoder
    assert model.indices_to_codes(torch.full((1, 8, 2), 7)).shape == (1, 8, 6)
    for indices, message in [
        (torch.zeros(1, 8, 3, dtype=torch.int64), r"shape \(1, 8, 3\); expected \(batch, 8, 2\)"),
        (torch.zeros(1, 7, 2, dtype=torch.int64), r"shape \(1, 7, 2\)"),
        (torch.zeros(8, 2, dtype=torch.int64), r"shape \(8, 2\)"),
        (torch.full((1, 8, 2), 8), r"range from 8 to 8; this model's lie in \[0, 8\)"),
        (torch.full((1, 8, 2), -1), "range from -1 to -1"),
        (torch.zeros(1, 8, 2), "dtype torch.float32"),
        (torch.zeros(1, 8, 2, dtype=torch.bool), "dtype torch.bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.indices_to_codes(indices)
    for shape in ((1, 8, 5), (1, 7, 6), (8, 6)):
        for method in (model.codes_to_indices, model.pack_codes):
            with pytest.raises(ValueError, match="codes have shape"):
                method(torch.ones(shape))


@pytest.mark.parametrize("quantizer", ["kl", "none"])
def test_continuous_models_have_no_bits(quantizer: str, tiny_config: dict) -> None:
    """Catches bits or indices invented for a latent that has none."""
    model = build(tiny_config, quantizer=quantizer)
    for call in (
        lambda: model.bits_per_token,
        lambda: model.bytes_per_image,
        lambda: model.codes_to_indices(random_codes(model)),
        lambda: model.indices_to_codes(torch.zeros(1, 8, 2, dtype=torch.int64)),
        lambda: model.pack_codes(random_codes(model)),
        lambda: model.unpack_codes(b""),
    ):
        with pytest.raises(ValueError, match=f"needs discrete codes.*quantizer='{quantizer}'"):
            call()


# Decoding


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ("", {}, "either `images` or `codes`"),
        ("sample timestep", {}, "either `images` or `codes`"),
        ("sample timestep images codes", {}, "either `images` or `codes`"),
        ("codes", {}, "sample is missing"),
        ("sample codes", {}, "timestep is missing"),
        ("sample images", {}, "timestep is missing"),
        ("sample timestep codes", {"timestep": torch.ones(3)}, "timestep has 3 values; expected 1 or the batch, 2"),
        ("sample timestep codes", {"codes": torch.ones(3, 8, 6)}, "codes have batch 3, sample has 2"),
        ("sample timestep images", {"images": pictures(1)}, "codes have batch 1, sample has 2"),
        ("sample timestep codes", {"codes": torch.ones(2, 8, 7)}, r"codes have shape \(2, 8, 7\)"),
        ("sample timestep codes", {"codes": torch.ones(2, 6)}, r"codes have shape \(2, 6\)"),
        ("sample timestep codes", {"code_mask": torch.ones(3)}, r"code_mask has shape \(3,\); expected \(2,\)"),
        ("sample timestep codes", {"code_mask": torch.ones(1)}, r"code_mask has shape \(1,\)"),
        ("sample timestep codes", {"code_mask": torch.ones(2, 1)}, r"code_mask has shape \(2, 1\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    names: str, changes: dict, message: str, tiny_autoencoder: FlowMoAutoencoder
) -> None:
    """Catches a missing or misshapen argument of `forward` that broadcasts, is ignored, or fails deep inside."""
    fitting = {"sample": pictures(), "timestep": 0.5, "images": pictures(), "codes": torch.ones(2, 8, 6)}
    with pytest.raises(ValueError, match=message):
        tiny_autoencoder(**{name: fitting[name] for name in names.split()} | changes)


def test_dropped_codes_are_zeros_with_their_mask_channel(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches a null code that keeps the constant channel: dropped codes and codes of zero must be told apart."""
    model, z, t = tiny_autoencoder, pictures(), torch.tensor([0.2, 0.7])
    codes = random_codes(model)

    def decoded(tokens: torch.Tensor) -> torch.Tensor:
        return unpatchify(model.decoder(patchify(z, 4), (4, 4), 8, tokens, t), 4, 16, 16)

    dropped = model(z, t, codes=codes, code_mask=torch.zeros(2)).velocity
    kept = model(z, t, codes=codes, code_mask=torch.ones(2)).velocity
    zeros = model(z, t, codes=torch.zeros_like(codes), code_mask=torch.ones(2)).velocity
    assert torch.equal(dropped, decoded(torch.zeros(2, 8, 7)))
    assert torch.equal(kept, decoded(torch.cat([codes, torch.ones(2, 8, 1)], dim=-1)))
    assert torch.equal(kept, model(z, t, codes=codes).velocity)
    assert (dropped - zeros).abs().max() > 1e-3
    assert (dropped - kept).abs().max() > 1e-3
    for mask in (torch.tensor([True, False]), torch.tensor([1, 0])):
        mixed = model(z, t, codes=codes, code_mask=mask).velocity
        assert torch.equal(mixed, torch.stack([kept[0], dropped[1]]))


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([0.3] * 2).double(), 0, 1])
def test_one_time_for_all_equals_one_for_each(t, tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches a number, a scalar tensor or a double as time that is refused or means something else."""
    codes = random_codes(tiny_autoencoder)
    expanded = torch.as_tensor(t, dtype=torch.float32).expand(2)
    expected = tiny_autoencoder(pictures(), expanded, codes=codes).velocity
    torch.testing.assert_close(tiny_autoencoder(pictures(), t, codes=codes).velocity, expected, rtol=1e-5, atol=1e-5)
    other = tiny_autoencoder(pictures(), expanded * 0.9 + 0.05, codes=codes).velocity
    assert (other - expected).abs().max() > 1e-3


def test_tuple_output(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches another order of the tuple than of the output class."""
    output = tiny_autoencoder.train()(pictures(), 0.5, images=pictures())
    plain = tiny_autoencoder(pictures(), 0.5, images=pictures(), return_dict=False)
    assert len(plain) == 4
    assert torch.equal(plain[0], output.velocity)
    assert torch.equal(plain[1], output.codes)
    assert torch.equal(plain[2], output.indices)
    assert plain[3].keys() == output.quantizer_losses.keys()


# Training


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("quantizer", ["lfq", "fsq", "kl", "none"])
def test_no_parameter_is_dead(quantizer: str, layers: int, tiny_config: dict) -> None:
    """Catches weights that nothing depends on, which need `find_unused_parameters`: 80 M in the published code."""
    model = build(tiny_config, quantizer=quantizer, encoder_num_layers=layers, decoder_num_layers=layers)
    loss, gradients = training_step(model)
    assert torch.isfinite(loss)
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


def test_gates_start_closed(tiny_config: dict) -> None:
    """Catches a random start of AdaLN's gates: a new decoder's blocks must leave its patches as they are."""
    torch.manual_seed(0)
    decoder = FlowMoAutoencoder(**tiny_config).decoder
    stream = torch.randn(2, 16, 32), torch.randn(2, 32)
    table = rotary_table(8, 4, 4, (4, 6, 6), 10000.0, torch.device("cpu"))
    _, patches = decoder.blocks[0](torch.randn(2, 8, 32), stream[0], stream[1], table)
    assert torch.equal(patches, stream[0])


def test_gradient_checkpointing_changes_nothing(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches checkpointing that alters loss or gradients, or that is switched on without effect."""
    calls = []
    for module in tiny_autoencoder.modules():
        if isinstance(module, FlowMoBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = training_step(tiny_autoencoder)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    assert len(calls) == 4
    tiny_autoencoder.enable_gradient_checkpointing()
    checkpointed_loss, checkpointed = training_step(tiny_autoencoder)
    assert len(calls) == 4 + 8  # each block once more, in the backward pass
    assert torch.equal(checkpointed_loss, loss)
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in gradients.items())


def test_training_under_autocast(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches mixed dtypes that meet in a block, and losses computed in bfloat16."""
    loss, gradients = training_step(tiny_autoencoder)
    gradients = torch.cat([gradient.flatten() for gradient in gradients.values()])
    x = pictures(4)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half = training_step(tiny_autoencoder)
        output = tiny_autoencoder(x, 0.5, images=x)
    assert output.velocity.dtype == torch.bfloat16
    assert {value.dtype for value in output.quantizer_losses.values()} == {torch.float32}
    assert half_loss.item() == pytest.approx(loss.item(), rel=0.05)
    half = torch.cat([gradient.flatten() for gradient in half.values()])
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    assert torch.nn.functional.cosine_similarity(half, gradients, dim=0) > 0.9


# Rotary tables


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (1, 300)])
def test_rotary_table_by_definition(rows: int, columns: int) -> None:
    """Catches swapped rows and columns, tokens placed among the patches, and angles rounded to float32 too early."""
    axes, theta, num_tokens = (2, 4, 6), 100.0, 4
    table = rotary_table(num_tokens, rows, columns, axes, theta, torch.device("cpu"))
    positions = [(i, i, i) for i in range(num_tokens)] + [(0, r, c) for r in range(rows) for c in range(columns)]
    assert table.shape == (len(positions), 6, 2, 2) and table.dtype == torch.float32
    for place, position in enumerate(positions):
        angles = [
            position[axis] * theta ** (-2 * pair / width)
            for axis, width in enumerate(axes)
            for pair in range(width // 2)
        ]
        turns = [[(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))] for angle in angles]
        torch.testing.assert_close(table[place], torch.tensor(turns), atol=1e-7, rtol=0)


def test_rotation_by_definition() -> None:
    """Catches pairs that are not neighbours, a turn the other way, heads that differ, and compiled code that does."""
    x, angles = torch.randn(2, 5, 3, 8), torch.rand(5, 4) * 6
    first, second = (torch.stack([turn.cos(), turn.sin()], dim=-1) for turn in (angles, angles + math.pi / 2))
    table = torch.stack([first, second], dim=-2)
    rotated = rotate(x, table)
    for k in range(4):
        (a, b), angle = (x[..., 2 * k], x[..., 2 * k + 1]), angles[:, k, None]
        torch.testing.assert_close(rotated[..., 2 * k], a * angle.cos() - b * angle.sin())
        torch.testing.assert_close(rotated[..., 2 * k + 1], a * angle.sin() + b * angle.cos())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(rotate, backend="eager", fullgraph=True)(x, table), rotated)
    torch._dynamo.reset()


def test_rotary_tables_are_made_once(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches tables rebuilt at every forward, as the published code does, or one table for every size."""
    _cached_table.cache_clear()
    codes = random_codes(tiny_autoencoder)
    for _ in range(3):
        tiny_autoencoder(pictures(), 0.5, images=pictures())
    # Both trunks have heads of one width here, and thus share a table.
    assert _cached_table.cache_info()[:2] == (5, 1)
    tiny_autoencoder(pictures(2, 8, 16), 0.5, codes=codes)
    assert _cached_table.cache_info().misses == 2
    arguments = (8, 4, 4, (4, 6, 6), 10000.0, torch.device("cpu"))
    assert rotary_table(*arguments) is rotary_table(*arguments)
    assert _cached_table.cache_info().misses == 2


def test_tables_made_in_inference_mode_serve_training(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches "inference tensors cannot be saved for backward" in a run that validates before its first step."""
    _cached_table.cache_clear()
    with torch.inference_mode():
        tiny_autoencoder(pictures(), 0.5, images=pictures())
    training_step(tiny_autoencoder)
    assert _cached_table.cache_info().misses == 1
    assert not rotary_table(8, 4, 4, (4, 6, 6), 10000.0, torch.device("cpu")).is_inference()


def test_tables_ignore_the_default_device() -> None:
    """Catches a table without numbers, kept from a model that was tried under `torch.device("meta")`."""
    _cached_table.cache_clear()
    with torch.device("meta"):
        table = rotary_table(8, 4, 4, (4, 6, 6), 10000.0, torch.device("cpu"))
    assert table.device.type == "cpu" and table[0].tolist() == [[[1.0, 0.0], [0.0, 1.0]]] * 8


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_finite_and_close(dtype: torch.dtype, tiny_config: dict) -> None:
    """Catches NaN from flat images, from overflow in half precision, and an output in another dtype."""
    model = build(tiny_config, decoder_hidden_size=64)
    x = torch.cat([torch.full((1, 3, 16, 16), -1.0), torch.full((1, 3, 16, 16), 1.0), pictures(1)])
    z, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)), torch.tensor([0.0, 0.5, 1.0])
    codes = random_codes(model, 3)
    expected = model(z, t, codes=codes).velocity
    latents = model.encode(x).latents
    model = model.to(dtype)
    encoded = model.encode(x.to(dtype))
    velocity = model(z.to(dtype), t, codes=codes).velocity
    assert encoded.latents.dtype == encoded.codes.dtype == velocity.dtype == dtype
    assert torch.isfinite(encoded.latents).all() and torch.isfinite(velocity).all()
    assert encoded.codes.abs().eq(1).all()
    tolerance = {torch.float32: 0, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (velocity.float() - expected).norm() <= tolerance * expected.norm()
    assert (encoded.latents.float() - latents).norm() <= tolerance * latents.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_norm_does_not_round(dtype: torch.dtype) -> None:
    """Catches a mean square, a scale or a result in half precision, and mixed dtypes, for which PyTorch leaves its
    fast kernel: the result must be that of float32, without a warning."""
    norm = HeadNorm(64, eps=1e-6)
    torch.nn.init.normal_(norm.weight, 1, 0.3, generator=torch.Generator().manual_seed(0))
    norm = norm.to(dtype)
    x = (torch.randn(500, 64, generator=torch.Generator().manual_seed(1)) * 300).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            normed = norm(x)
    finally:
        torch.set_warn_always(False)
    assert normed.dtype == torch.float32
    error = (normed.double() - exact).abs() / exact.abs().clamp_min(torch.finfo(torch.float32).tiny)
    assert error.max() < 3 * torch.finfo(torch.float32).eps


def test_stream_norm_keeps_the_dtype(monkeypatch) -> None:
    """Catches float32 copies of every norm's input and result, which the autocast of a GPU makes, and a mean or a
    variance in bfloat16."""
    within = []
    layer_norm = F.layer_norm
    monkeypatch.setattr(
        F, "layer_norm", lambda *args, **options: within.append(torch.is_autocast_enabled("cpu")) or layer_norm(*args)
    )
    norm, x = StreamNorm(512), (torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        normed = norm(x)
    assert within == [False] and normed.dtype == torch.bfloat16
    exact = F.layer_norm(x.double(), (512,), eps=1e-6)
    assert (normed.double() - exact).abs().max() < torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighbouring_times_stay_apart_in_half_precision(dtype: torch.dtype, tiny_autoencoder) -> None:
    """Catches t or 1000 t rounded to the model's dtype: 500.0 and 500.2 are one number there."""
    model = tiny_autoencoder.to(dtype)
    codes = random_codes(model)
    a, b = (model(pictures().to(dtype), t, codes=codes).velocity for t in (0.5, 0.5002))
    assert not torch.equal(a, b)


def test_layerwise_casting(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches a projection that reads weights outside of its own forward, where they are still in storage dtype."""
    model = tiny_autoencoder.to(torch.bfloat16)
    codes, z = random_codes(model), pictures().to(torch.bfloat16)
    expected = model(z, 0.5, codes=codes).velocity.float()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    stored = {parameter.dtype for parameter in model.parameters()}
    velocity = model(z, 0.5, codes=codes).velocity
    assert stored == {torch.float8_e4m3fn, torch.bfloat16}
    assert velocity.dtype == torch.bfloat16
    assert 0 < (velocity.float() - expected).norm() < 0.5 * expected.norm()


# Attention processors


class CountingProcessor(FlowMoAttnProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


def test_processors_are_listed_and_replaced(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches attention that diffusers does not find, or that does not go through its processor."""
    model, images = tiny_autoencoder, pictures()
    expected = model(images, 0.5, images=images).velocity
    names = [f"{trunk}.blocks.{i}.attn.processor" for trunk in ("encoder", "decoder") for i in range(2)]
    assert list(model.attn_processors) == names
    assert all(type(processor) is FlowMoAttnProcessor for processor in model.attn_processors.values())

    shared = CountingProcessor()
    model.set_attn_processor(shared)
    assert torch.equal(model(images, 0.5, images=images).velocity, expected)
    assert shared.calls == 4

    own = {name: CountingProcessor() for name in names}
    model.set_attn_processor(dict(own))
    model(images, 0.5, codes=random_codes(model))
    assert [processor.calls for processor in own.values()] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({names[0]: CountingProcessor()})

    model.fuse_qkv_projections()  # the projections are one matrix already: nothing to do, and no error
    assert torch.equal(model(images, 0.5, images=images).velocity, expected)


def test_attention_backend_reaches_every_block(
    tiny_autoencoder: FlowMoAutoencoder, default_backend: AttentionBackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a backend that is set on the model and not used, and a processor that shares it with other models."""
    model, images = tiny_autoencoder, pictures()
    other = copy.deepcopy(model)
    expected = model(images, 0.5, images=images).velocity
    model.set_attention_backend("_native_math")
    used = {processor._attention_backend for processor in model.attn_processors.values()}
    assert {backend.value for backend in used} == {"_native_math"}
    assert {processor._attention_backend for processor in other.attn_processors.values()} == {None}

    calls = []
    (backend,) = used
    function = _AttentionBackendRegistry._backends[backend]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, backend, lambda **kwargs: calls.append(1) or function(**kwargs)
    )
    _AttentionBackendRegistry.set_active_backend(default_backend)  # what counts now is what the model was told
    velocity = model(images, 0.5, images=images).velocity
    assert len(calls) == 4
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}
    with pytest.raises(ValueError, match="backend"):
        model.set_attention_backend("nonsense")


# Copies and graphs


def test_copies_are_equal_and_independent(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches a model that cannot be pickled or copied for an EMA or a worker, or whose copy shares its weights."""
    model, images = tiny_autoencoder, pictures()
    expected = model(images, 0.5, images=images).velocity
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dict(twin.config) == dict(model.config)
        assert torch.equal(twin(images, 0.5, images=images).velocity, expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(model(images, 0.5, images=images).velocity, expected)


def test_model_compiles_in_one_graph(tiny_config: dict) -> None:
    """Catches a graph break in the model, the cached tables above all; the backend is eager, so nothing is built."""
    model = build(tiny_config, encoder_num_layers=1, decoder_num_layers=1)
    codes = random_codes(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((16, 16), (24, 16)):  # the second makes sizes symbols
        z = pictures(2, *size)
        torch.testing.assert_close(
            compiled(z, torch.tensor([0.2, 0.8]), codes=codes).velocity,
            model(z, torch.tensor([0.2, 0.8]), codes=codes).velocity,
        )
    torch._dynamo.reset()


def test_blocks_compile_in_one_graph(tiny_autoencoder: FlowMoAutoencoder) -> None:
    """Catches a graph break in a block, the part that training compiles."""
    model, codes = tiny_autoencoder, random_codes(tiny_autoencoder)
    expected = model(pictures(), 0.5, codes=codes).velocity
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(pictures(), 0.5, codes=codes).velocity, expected)
    torch._dynamo.reset()


def test_export_leaves_no_trace(tiny_config: dict) -> None:
    """Catches the symbols of a traced graph kept in the cache of tables: every later forward would get them."""
    _cached_table.cache_clear()
    model = build(tiny_config, encoder_num_layers=1, decoder_num_layers=1)
    codes, t = random_codes(model), torch.tensor([0.2, 0.8])
    program = torch.export.export(model, (pictures(), t), {"codes": codes}, strict=False)
    velocity = model(pictures(), t, codes=codes).velocity
    assert type(velocity) is torch.Tensor
    torch.testing.assert_close(program.module()(pictures(), t, codes=codes).velocity, velocity)
