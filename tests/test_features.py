"""FID's Inception and other networks whose features are compared."""

import os

import numpy as np
import PIL.Image
import pytest
import torch
from fidelity import fidelity_module
from transformers import MobileNetV2Config, MobileNetV2Model, ViTConfig, ViTModel

from flowmo_diffusers.engine.pretrained import is_torchscript
from flowmo_diffusers.metrics.features import InceptionFeatures, load_feature_network
from flowmo_diffusers.metrics.inception import Conv, FIDInception, resize_as_tensorflow


# Where `FLOWMO_INCEPTION` names StyleGAN's TorchScript archive of the real network, it is tested as well.
REAL = os.environ.get("FLOWMO_INCEPTION")


@pytest.fixture(scope="module")
def inception():
    """With random weights, and statistics as if it had been trained: features are neither 0 nor huge."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = FIDInception().eval()
        for module in network.modules():
            if isinstance(module, Conv):
                torch.nn.init.kaiming_normal_(module.conv.weight)
                module.bn.running_mean.normal_(0, 0.1)
                module.bn.running_var.uniform_(0.5, 1.5)
                module.bn.weight.uniform_(0.5, 1.5)
                module.bn.bias.normal_(0, 0.1)
    return network


@pytest.fixture(scope="module")
def state_dict_file(inception, tmp_path_factory):
    """As pytorch-fid and torch-fidelity publish it."""
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(inception.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images():
    """8-bit values in [-1, 1], smaller and larger than the network's input."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 40, 56), generator=generator).float() / 127.5 - 1


@pytest.fixture(scope="module")
def features(state_dict_file, images):
    network = load_feature_network(weights=state_dict_file)
    return network, network(images)


def test_features_and_probabilities_are_torch_fidelity_s(features, images, state_dict_file):
    """Catches a wrong block, pool, resize, range or order of channels: everything equals an independent network."""
    network, found = features
    extractor = fidelity_module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    official = extractor("reference", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(state_dict_file))
    pool, logits = official(((images + 1) * 127.5).round().to(torch.uint8))
    torch.testing.assert_close(found["pool"], pool, rtol=1e-4, atol=1e-4 * pool.abs().max().item())
    expected = logits.softmax(1)
    assert expected.std() > 1e-5  # classes differ, so a wrong layer would show
    torch.testing.assert_close(network.probabilities(found["pool"]), expected, rtol=1e-3, atol=1e-7)


def test_spatial_features_are_the_first_channels_of_mixed_6(features, inception, images):
    """What sFID compares: 7 channels of 17 x 17, of the first branch of torchvision's Mixed_6d."""
    network, found = features
    seen = []
    handle = network.network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    network(images)
    handle.remove()
    assert found["spatial"].shape == (2, 7 * 17 * 17)
    assert torch.equal(found["spatial"].view(2, 7, 17, 17), seen[0][:, :7])


def test_batches_do_not_matter(features, images):
    network, found = features
    single = network(images[1:])
    torch.testing.assert_close(single["pool"], found["pool"][1:], rtol=1e-4, atol=1e-4)


class _Convolution(torch.nn.Module):
    """As StyleGAN's archive names what belongs to a convolution."""

    def __init__(self, conv: Conv):
        super().__init__()
        self.weight = torch.nn.Parameter(conv.conv.weight.detach().clone())
        self.register_buffer("beta", conv.bn.bias.detach().clone())
        self.register_buffer("mean", conv.bn.running_mean.clone())
        self.register_buffer("var", conv.bn.running_var.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def archive(convs, path):
    layers = torch.nn.ModuleDict({f"tower_{n}": _Convolution(conv) for n, conv in enumerate(convs)})
    network = torch.nn.Sequential()
    network.add_module("layers", torch.nn.Sequential(*layers.values()))
    torch.jit.script(network).save(str(path))
    return path


def test_a_torchscript_archive_gives_the_same_features(inception, features, images, tmp_path):
    """Its convolutions have other names and no scale, and there is no last layer: the Inception Score is refused."""
    convs = [module for module in inception.modules() if isinstance(module, Conv)]
    path = archive(convs, tmp_path / "inception.pt")
    assert is_torchscript(path)
    network = load_feature_network(weights=path)
    plain = InceptionFeatures(network.network)
    assert network.identity == plain.identity != features[0].identity
    for conv in convs:
        conv_scale = conv.bn.weight.detach().clone()
        conv.bn.weight.data.fill_(1)
        conv.scale_before = conv_scale
    expected = InceptionFeatures(inception)(images)["pool"]
    for conv in convs:
        conv.bn.weight.data.copy_(conv.scale_before)
    torch.testing.assert_close(network(images)["pool"], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(ValueError, match="which these weights lack"):
        network.probabilities(torch.zeros(1, 2048))


def test_an_archive_of_something_else_is_refused(inception, tmp_path):
    convs = [module for module in inception.modules() if isinstance(module, Conv)][:3]
    with pytest.raises(ValueError, match="3 convolutions, not 94"):
        load_feature_network(weights=archive(convs, tmp_path / "other.pt"))


def test_weights_that_do_not_fit_are_refused(inception, tmp_path):
    """A file of another network, or of a part of this one."""
    tensors = inception.state_dict()
    del tensors["Mixed_7c.branch1x1.conv.weight"]
    torch.save(tensors, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="missing: Mixed_7c.branch1x1.conv.weight"):
        load_feature_network(weights=tmp_path / "part.pth")
    with pytest.raises(OSError, match="nowhere.pth .--inception_weights. do not exist"):
        load_feature_network(weights=tmp_path / "nowhere.pth")


def test_without_weights_and_network_it_is_said_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"pt_inception-2015-12-05-6726825d.pth.*offline mode.*--inception_weights PATH"):
        load_feature_network()


def test_tensorflow_s_resize():
    """Pixel i is taken at i h / 299, without half a pixel of shift and without smoothing."""
    row = torch.tensor([0.0, 10.0, 30.0]).view(1, 1, 1, 3)
    resized = resize_as_tensorflow(row.expand(1, 1, 2, 3), 6)
    assert resized[0, 0, 0].tolist() == [0, 5, 10, 20, 30, 30]
    large = torch.arange(12.0).view(1, 1, 12, 1).expand(1, 1, 12, 12)
    assert resize_as_tensorflow(large, 4)[0, 0, :, 0].tolist() == [0, 3, 6, 9]
    same = torch.rand(1, 3, 299, 299)
    assert torch.equal(resize_as_tensorflow(same), same)


def test_the_other_inputs(inception):
    """pytorch-fid: between pixel centres, in [-1, 1]. clean-fid: as Pillow's bicubic of each channel in floats."""
    pixels = torch.randint(0, 256, (1, 3, 420, 350), generator=torch.Generator().manual_seed(0)).float()
    x = pixels / 127.5 - 1
    official = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert torch.equal(InceptionFeatures(inception, "pytorch-fid").preprocess(x), official)
    clean = InceptionFeatures(inception, "clean-fid")
    assert clean.suffix == "_clean"
    channels = [
        PIL.Image.fromarray(channel).resize((299, 299), PIL.Image.Resampling.BICUBIC) for channel in pixels[0].numpy()
    ]
    expected = (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128
    torch.testing.assert_close(clean.preprocess(x)[0], expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="input='tensorflow2' must be one of"):
        InceptionFeatures(inception, "tensorflow2")


def test_identities_tell_inputs_and_weights_apart(inception):
    """They are part of the keys under which features are kept."""
    one = InceptionFeatures(inception)
    assert one.identity == InceptionFeatures(inception).identity != InceptionFeatures(inception, "clean-fid").identity
    bias = inception.Mixed_7c.branch_pool.bn.bias.data
    bias[0] += 1
    assert InceptionFeatures(inception).identity != one.identity
    bias[0] -= 1


def test_the_last_layer_is_no_part_of_the_identity(inception):
    """Features by a file without it are the same, and statistics of one are good for the other."""
    other = FIDInception(classifier=False)
    other.load_state_dict({name: value for name, value in inception.state_dict().items() if name[:3] != "fc."})
    assert InceptionFeatures(other).identity == InceptionFeatures(inception).identity


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\); expected \(b, 3, h, w\)"),
        (torch.zeros(3, 8, 8), r"expected \(b, 3, h, w\)"),
        (torch.full((1, 3, 8, 8), float("nan")), "not finite"),
    ],
)
def test_what_are_no_images_is_refused(features, wrong, message):
    with pytest.raises(ValueError, match=message):
        features[0](wrong)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """The folder of a small vision model that pools."""
    folder = tmp_path_factory.mktemp("mobilenet")
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, finegrained_output=False)
    MobileNetV2Model(config).save_pretrained(folder)
    return folder


def test_another_network_is_named_in_results(mobilenet):
    """Never plain "fid"; without a preprocessor_config.json ImageNet's mean and std are taken, and said so."""
    network = load_feature_network(str(mobilenet))
    assert network.suffix == "_mobilenet_v2"
    model = MobileNetV2Model.from_pretrained(mobilenet).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(((x + 1) / 2 - mean) / std).pooler_output
    found = network(x)
    assert found.keys() == {"pool"} and network.dims == expected.shape[1] == found["pool"].shape[1]
    torch.testing.assert_close(found["pool"], expected)
    with pytest.raises(ValueError, match="needs class probabilities"):
        network.probabilities(found["pool"])


def test_a_network_whose_pooler_was_never_trained_is_averaged_over_places(tmp_path):
    """Many checkpoints come without one, and `transformers` would make a random one."""
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    network = load_feature_network(str(tmp_path))
    assert network.suffix == "_vit" and network.dims == 8
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hidden = network.model(pixel_values=((x + 1) / 2 - network.mean) / network.std).last_hidden_state
    torch.testing.assert_close(network(x)["pool"], hidden.mean(1))
    assert load_feature_network(str(tmp_path)).identity == network.identity


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "inceptionv4"}, ValueError, "unknown feature network 'inceptionv4'"),
        ({"name": "some/model", "weights": "x.pth"}, ValueError, "weights and input are Inception's"),
        ({"name": "some/model", "input": "clean-fid"}, ValueError, "weights and input are Inception's"),
        ({"name": "no-one/no-model"}, OSError, "no-one/no-model cannot be loaded"),
    ],
)
def test_networks_that_are_not_there(arguments, error, message):
    with pytest.raises(error, match=message):
        load_feature_network(**arguments)


@pytest.mark.skipif(REAL is None, reason="FLOWMO_INCEPTION names no TorchScript archive of the real network")
def test_the_real_archive():
    """Our network with its weights computes what its own code does."""
    network = load_feature_network(weights=REAL)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = torch.jit.load(REAL).eval()(network.preprocess(x))
    torch.testing.assert_close(network(x)["pool"], expected, rtol=1e-4, atol=1e-4)
