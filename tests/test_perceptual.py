"""Perceptual distances: equal to the official ones, frozen, differentiable, and never made of the wrong weights."""

import copy
import json
import sys
import types
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from flowmo_diffusers.objectives import perceptual
from flowmo_diffusers.objectives.perceptual import LogitDistance, load_perceptual_network


NETWORKS = ["lpips-alex", "lpips-vgg", "classifier"]
TINY_RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 5,
}


def torchvision_alexnet() -> nn.Sequential:
    """The `features` of torchvision's AlexNet, written out."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )


def torchvision_vgg16() -> nn.Sequential:
    """The `features` of torchvision's VGG16, written out."""
    layers, channels = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            layers += [nn.MaxPool2d(2, 2)]
        else:
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def torchvision_resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Every entry of torchvision's ResNet-50 state dict, by the rule of its construction."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 2048), "fc.bias": (1000,)}
    norms = {"bn1": 64}
    channels = 64
    for stage, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, channels, 1, 1)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            norms |= {f"{name}.bn1": width, f"{name}.bn2": width, f"{name}.bn3": 4 * width}
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                norms[f"{name}.downsample.1"] = 4 * width
            channels = 4 * width
    for name, width in norms.items():
        shapes |= {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


def torchvision_resnet50(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """torchvision's ResNet-50 in eval mode as a function of its state dict."""

    def norm(name: str, hidden: torch.Tensor) -> torch.Tensor:
        leaves = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(hidden, *(weights[f"{name}.{leaf}"] for leaf in leaves))

    hidden = F.relu(norm("bn1", F.conv2d(images, weights["conv1.weight"], stride=2, padding=3)))
    hidden = F.max_pool2d(hidden, 3, 2, 1)
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = F.relu(norm(f"{name}.bn1", F.conv2d(hidden, weights[f"{name}.conv1.weight"])))
            inner = F.conv2d(inner, weights[f"{name}.conv2.weight"], stride=stride, padding=1)
            inner = F.conv2d(F.relu(norm(f"{name}.bn2", inner)), weights[f"{name}.conv3.weight"])
            if block == 0:
                hidden = F.conv2d(hidden, weights[f"{name}.downsample.0.weight"], stride=stride)
                hidden = norm(f"{name}.downsample.1", hidden)
            hidden = F.relu(norm(f"{name}.bn3", inner) + hidden)
    return F.linear(hidden.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


def pairs(batch: int = 2, height: int = 64, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random images and noisy versions of them, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(batch, 3, 8, 8, generator=generator) * 2 - 1, (height, width), mode="bilinear")
    return x, (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def alex_weights() -> dict[str, torch.Tensor]:
    network = load_perceptual_network("lpips-alex")
    return {key: value for key, value in network.state_dict().items() if key.startswith("features.")}


@pytest.fixture(scope="module")
def vgg_weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torchvision_vgg16()
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        return {f"features.{key}": value for key, value in features.state_dict().items()}


@pytest.fixture(scope="module")
def networks(tmp_path_factory, vgg_weights) -> dict[str, nn.Module]:
    folder = tmp_path_factory.mktemp("networks")
    torch.save(vgg_weights, folder / "vgg16.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ResNetForImageClassification(ResNetConfig(**TINY_RESNET)).save_pretrained(folder / "classifier")
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "classifier" / "preprocessor_config.json").write_text(json.dumps(settings))
    return {
        "lpips-alex": load_perceptual_network("lpips-alex"),
        "lpips-vgg": load_perceptual_network("lpips-vgg", folder / "vgg16.pth"),
        "classifier": load_perceptual_network(str(folder / "classifier")),
    }


@pytest.fixture
def official_lpips(monkeypatch):
    """The `lpips` package on a stand-in for torchvision, which offers `features` without weights."""
    models = types.ModuleType("torchvision.models")
    models.alexnet = lambda pretrained: types.SimpleNamespace(features=torchvision_alexnet())
    models.vgg16 = lambda pretrained: types.SimpleNamespace(features=torchvision_vgg16())
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lpips"}
    for name in before:
        del sys.modules[name]
    yield pytest.importorskip("lpips", reason="compares with the lpips package", exc_type=ImportError)
    for name in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_equals_the_official_package(backbone, official_lpips, networks, alex_weights, vgg_weights):
    """Catches a wrong tap, scaling, head or mean: values and gradients are those of the `lpips` package."""
    official = official_lpips.LPIPS(net=backbone, verbose=False)
    weights = {"alex": alex_weights, "vgg": vgg_weights}[backbone]
    for index in range(1, 6):
        part = getattr(official.net, f"slice{index}")
        part.load_state_dict({key: weights[f"features.{key}"] for key in part.state_dict()})
    x, y = (images.requires_grad_() for images in pairs(3, 64, 80))
    expected, got = official(x, y).flatten(), networks[f"lpips-{backbone}"](x, y)
    assert got.shape == (3,) and got.dtype == torch.float32 and got.min() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    gradients = zip(torch.autograd.grad(got.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)), strict=True)
    for got_gradient, expected_gradient in gradients:
        # ReLUs near zero and ties of pools fall this way or that by the last bit of a product.
        assert (got_gradient - expected_gradient).norm() < 1e-2 * expected_gradient.norm()


def test_packaged_alexnet_is_the_trained_one():
    """Catches a damaged or swapped asset: values recorded from the `lpips` package with float32 ImageNet weights."""
    position = torch.arange(64) / 64
    x = torch.stack([torch.sin(2 * torch.pi * (k * position[:, None] + position)) for k in (1, 2, 3)])[None]
    y = torch.cat([x.flip(-1), x.roll(4, -2), 0.5 * x])
    distance = load_perceptual_network("lpips-alex")(x.expand(3, -1, -1, -1), y)
    torch.testing.assert_close(distance, torch.tensor([0.227171, 0.064610, 0.021891]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_distance_is_per_sample(name, networks):
    """Catches averaging over the batch: a batch is its singles, and equal images are at distance 0."""
    x, y = pairs(3)
    distance = networks[name](x, y)
    singles = torch.cat([networks[name](a[None], b[None]) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(distance, singles, rtol=1e-4, atol=1e-7)
    assert distance.min() > 0
    assert networks[name](x, x).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_the_images_only(name, networks):
    """Catches a detached path: a training loss that cannot move the images, or that trains the network."""
    x, y = (images.requires_grad_() for images in pairs())
    networks[name](x, y).sum().backward()
    for images in (x, y):
        assert images.grad.isfinite().all() and images.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(parameter.requires_grad for parameter in networks[name].parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_stays_in_eval_mode(name, networks):
    """Catches BatchNorm that learns from reconstructions once the loss around it is put in training mode."""
    x, y = pairs()
    expected, state = networks[name](x, y), {k: v.clone() for k, v in networks[name].state_dict().items()}
    nn.ModuleDict({"perceptual": networks[name]}).train()
    networks[name].train()
    assert not any(module.training for module in networks[name].modules())
    torch.testing.assert_close(networks[name](x, y), expected, rtol=0, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in networks[name].state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_is_finite_on_black_and_white(name, networks):
    """Catches a division by the norm of vanished features, and distances compared in bfloat16."""
    x = torch.stack([-torch.ones(3, 32, 32), torch.ones(3, 32, 32)])
    y = torch.full_like(x, -1.0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distance = networks[name](x, y)
        compared = networks[name].unit_features(x) if name.startswith("lpips") else [networks[name].logits(x)]
        assert {features.dtype for features in compared} == {torch.float32}
    distance.sum().backward()
    assert distance.dtype == torch.float32 and distance[0] == 0 and distance[1] > 0
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_images_and_networks(name, networks):
    """Catches dtype mismatches: bfloat16 images outside autocast, a network cast as diffusers' scripts cast theirs."""
    x, y = pairs()
    expected = networks[name](x, y)
    torch.testing.assert_close(networks[name](x.bfloat16(), y.bfloat16()), expected, rtol=0.1, atol=1e-4)
    cast = copy.deepcopy(networks[name]).to(torch.bfloat16)(x, y)
    assert cast.dtype == torch.float32 and cast.isfinite().all()


@pytest.mark.parametrize(("name", "smallest"), [("lpips-alex", 31), ("lpips-vgg", 16)])
def test_smallest_images(name, smallest, networks):
    """Catches an obscure pooling error, and a limit above 32: the size needed is named, and works."""
    for size in (smallest, 32):
        assert networks[name](*pairs(1, size, size)).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {smallest}x{smallest}"):
        networks[name](*pairs(1, 64, smallest - 1))


def test_shapes_that_do_not_match_are_refused(networks):
    """Catches broadcasting of one image against many, and grey images."""
    x, y = pairs(2)
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        networks["lpips-alex"](x, y[:1])
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        networks["classifier"](x[:, :1], y[:, :1])


def test_loading_draws_no_random_numbers():
    """Catches a training run whose noise depends on the perceptual network it is told to use."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_perceptual_network("lpips-alex")
    assert torch.rand(1) == expected


def test_none_is_none():
    """Catches a perceptual term that cannot be turned off, or weights that are ignored when it is."""
    assert load_perceptual_network("none") is None
    with pytest.raises(ValueError, match="takes no separate weights"):
        load_perceptual_network("none", "vgg16.pth")


@pytest.mark.parametrize(("name", "error"), [("lpips-squeeze", ValueError), ("./missing/folder", OSError)])
def test_unknown_names_list_the_known(name, error):
    """Catches a bare Hub error, or a guess at what was meant."""
    with pytest.raises(error, match="lpips-vgg, lpips-alex, resnet50, none"):
        load_perceptual_network(name)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(
    ("name", "file"), [("lpips-vgg", "vgg16-397923af.pth"), ("resnet50", "resnet50-0676ba61.pth")]
)
def test_missing_weights_say_what_to_do(name, file, offline, monkeypatch, tmp_path):
    """Catches a silent fallback to random weights, a download in offline mode, and errors that name no way out."""

    def unreachable(url, **kwargs):
        assert not offline and kwargs["check_hash"] and kwargs["weights_only"]
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        OSError, match=rf"{file}.*https://download.pytorch.org/models/{file}.*--perceptual_weights PATH"
    ):
        load_perceptual_network(name)
    with pytest.raises(FileNotFoundError, match="--perceptual_weights"):
        load_perceptual_network(name, tmp_path / "absent.pth")


def test_full_torchvision_file_in_a_folder(vgg_weights, networks, tmp_path):
    """Catches a refusal of torchvision's own file for its classifier, and a guess between two files of a folder."""
    classifier = {"classifier.0.weight": torch.zeros(1, 1), "classifier.0.bias": torch.zeros(1)}
    torch.save(vgg_weights | classifier, tmp_path / "vgg16-397923af.pth")
    network, x, y = load_perceptual_network("lpips-vgg", tmp_path), *pairs(1, 32, 32)
    torch.testing.assert_close(network(x, y), networks["lpips-vgg"](x, y), rtol=0, atol=0)
    save_file(vgg_weights, tmp_path / "vgg16.safetensors")
    with pytest.raises(OSError, match="vgg16.safetensors"):
        load_perceptual_network("lpips-vgg", tmp_path)


def test_given_weights_replace_the_embedded(alex_weights, tmp_path):
    """Catches AlexNet weights that are read and then not used."""
    save_file({key: value + 0.01 for key, value in alex_weights.items()}, tmp_path / "alexnet.safetensors")
    x, y = pairs()
    given, embedded = load_perceptual_network("lpips-alex", tmp_path), load_perceptual_network("lpips-alex")
    assert not torch.allclose(given(x, y), embedded(x, y), rtol=1e-3)


def test_weights_that_do_not_fit_are_refused_by_name(alex_weights, tmp_path):
    """Catches `strict=False` loading: layers left random, or a file of another network."""
    wrong = dict(alex_weights, **{"features.12.weight": torch.zeros(1), "features.0.bias": torch.zeros(3)})
    del wrong["features.8.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError) as error:
        load_perceptual_network("lpips-alex", tmp_path / "wrong.safetensors")
    for complaint in ("missing: features.8.bias", "unknown: features.12.weight", "misshapen: features.0.bias"):
        assert complaint in str(error.value)
    with pytest.raises(ValueError, match="missing: bn1.bias, .*layer4.2.conv3.weight.*unknown: features.0.bias"):
        load_perceptual_network("resnet50", tmp_path / "wrong.safetensors")


def test_resnet50_names_are_torchvisions():
    """Catches a layer that is mapped to another's weights, or to none: names and shapes match one to one."""
    with torch.device("meta"):
        network = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    ours = {perceptual.torchvision_resnet_key(k): tuple(v.shape) for k, v in network.state_dict().items()}
    assert ours == torchvision_resnet50_shapes()
    assert len(list(network.parameters())) == 161 and len(ours) == 161 + 3 * 53


def test_resnet50_equals_torchvisions(tmp_path):
    """Catches a stride in the wrong convolution, a wrong normalisation or a wrong resize before the logits."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in torchvision_resnet50_shapes().items():
        if len(shape) > 1:
            fan_in = torch.Size(shape[1:]).numel()
            weights[key] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        elif shape:
            offset = 0.5 if key.endswith(("running_var", "weight")) else 0.0
            weights[key] = (offset + 0.5 * torch.rand(shape, generator=generator)).abs()
    weights = {key: tensor.half() for key, tensor in weights.items()}
    torch.save(weights, tmp_path / "resnet50-0676ba61.pth")
    weights = {key: tensor.float() for key, tensor in weights.items()}

    x, y = pairs(1, 48, 40)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    resized = F.interpolate((torch.cat([x, y]) + 1) / 2, (224, 224), mode="bilinear", antialias=True)
    logits = torchvision_resnet50(weights, (resized - mean[:, None, None]) / std[:, None, None])
    expected = (logits[0] - logits[1]).square().mean()
    got = load_perceptual_network("resnet50", tmp_path)(x, y)
    torch.testing.assert_close(got, expected[None], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("settings", "size", "mean", "std"),
    [
        ({"size": {"height": 24, "width": 40}, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}, (24, 40), 0.5, 0.2),
        ({"size": {"shortest_edge": 32}, "do_normalize": False, "image_mean": [0.5] * 3}, (32, 32), 0.0, 1.0),
        ({"size": 40, "do_center_crop": True, "crop_size": 32, "do_normalize": False}, (32, 32), 0.0, 1.0),
    ],
)
def test_classifier_sees_what_its_preprocessor_says(settings, size, mean, std, tmp_path):
    """Catches a classifier fed with ImageNet's statistics, or at another size, than it was trained with."""
    network = ResNetForImageClassification(ResNetConfig(**TINY_RESNET)).eval()
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    x, y = pairs(2, 48, 48)
    resized = [F.interpolate((i + 1) / 2, size, mode="bilinear", antialias=True) for i in (x, y)]
    a, b = (network((images - mean) / std).logits for images in resized)
    torch.testing.assert_close(
        load_perceptual_network(str(tmp_path))(x, y), (a - b).square().mean(1), rtol=1e-4, atol=0
    )


def test_classifier_without_preprocessor(tmp_path, caplog):
    """Catches defaults taken in silence: ImageNet's statistics at 224 are assumed, and said."""
    ResNetForImageClassification(ResNetConfig(**TINY_RESNET)).save_pretrained(tmp_path)
    network = load_perceptual_network(str(tmp_path))
    assert isinstance(network, LogitDistance) and network.size == (224, 224)
    torch.testing.assert_close(network.mean.flatten(), torch.tensor(perceptual.IMAGENET_MEAN))
    assert "no preprocessor_config.json" in caplog.text


def test_classifier_that_is_not_whole_is_refused(tmp_path):
    """Catches a backbone without a head, which `transformers` completes with random weights and a warning."""
    ResNetModel(ResNetConfig(**TINY_RESNET)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="classifier.1.weight"):
        load_perceptual_network(str(tmp_path))


def test_unsupported_preprocessing_is_refused(tmp_path):
    """Catches a BGR classifier that is shown RGB."""
    ResNetForImageClassification(ResNetConfig(**TINY_RESNET)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "do_flip_channel_order": True}))
    with pytest.raises(ValueError, match="do_flip_channel_order"):
        load_perceptual_network(str(tmp_path))
