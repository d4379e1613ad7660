"""
Perceptual distances: frozen networks that compare images, differentiable in both.

FlowMo's pre-training compares by LPIPS-VGG, its post-training by the logits of ResNet-50 (arXiv 2503.11056). Every
distance takes two batches of images in [-1, 1] and gives one number per sample. Networks run in the surrounding
autocast; images are normalised, features and logits compared, in float32.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo_diffusers.engine.pretrained import download_tensors, load_exactly, read_tensors
from flowmo_diffusers.objectives.vision import IMAGENET_MEAN, IMAGENET_STD, load_vision_model


PERCEPTUAL_NETWORKS = ("lpips-vgg", "lpips-alex", "resnet50", "none")
KNOWN = f"known are {', '.join(PERCEPTUAL_NETWORKS)}, and a folder or Hub id of a transformers image classifier"

TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION_FILES = {
    "lpips-vgg": "vgg16-397923af.pth",
    "lpips-alex": "alexnet-owt-7be5be79.pth",
    "resnet50": "resnet50-0676ba61.pth",
}


class PerceptualDistance(nn.Module):
    """
    A network that measures and does not learn: in eval mode even inside a model that trains, without gradients of its
    own. `mean` and `std` are per channel, of images in [0, 1].
    """

    min_size = 1  # smallest height and width, in pixels

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        return super().train(False)

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuses (`ValueError`) what are not two equally shaped batches of large enough RGB images."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"x and y must both be (b, 3, h, w), got {tuple(x.shape)} and {tuple(y.shape)}")
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(f"images must be at least {self.min_size}x{self.min_size}, got {tuple(x.shape[2:])}")

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] of any floating type, scaled as the network's training images were, in float32."""
        return ((images.float() + 1) / 2 - self.mean) / self.std


class LPIPS(PerceptualDistance):
    """
    Learned perceptual image patch similarity, v0.1 (Zhang et al. 2018, arXiv 1801.03924, equation 1): features of unit
    length at every position, their squared differences weighted by a head, averaged over space, summed over layers.

    Args:
        backbone: `"vgg"` or `"alex"`.
    """

    def __init__(self, backbone: str):
        super().__init__()
        layers, self.taps, self.min_size = {"vgg": _vgg16, "alex": _alexnet}[backbone]()
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.zeros(1, layers[tap - 1].out_channels, 1, 1) for tap in self.taps)
        self.eval().requires_grad_(False)

    def unit_features(self, images: Tensor) -> Iterator[Tensor]:
        """Float32 features (b, c, h', w') at each tap, of unit length over the channels."""
        hidden = self.normalize(images).to(self.features[0].weight.dtype)
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in self.taps:
                features = hidden.float()
                yield features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Args:
            x, y: Images (b, 3, h, w) in [-1, 1]; h, w at least 16 for VGG, 31 for AlexNet, else `ValueError`.

        Returns:
            Distances (b,), float32; 0 for equal images.
        """
        self.check(x, y)
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for head, x_unit, y_unit in zip(self.heads, self.unit_features(x), self.unit_features(y), strict=True):
            difference = (x_unit - y_unit).square().mean((2, 3), keepdim=True)
            distance = distance + (head * difference).sum((1, 2, 3))
        return distance


class LogitDistance(PerceptualDistance):
    """
    Mean squared difference of a classifier's logits (FlowMo, arXiv 2503.11056, stage 1B). The whole image is resized
    to the classifier's input, without a crop: every pixel counts.

    Args:
        classifier: An image classifier of `transformers`.
        size: (height, width) of its input.
        mean, std: Per channel, what its input is normalised by.
    """

    def __init__(
        self,
        classifier: nn.Module,
        size: tuple[int, int] = (224, 224),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__(mean, std)
        self.classifier = classifier
        self.size = size
        self.eval().requires_grad_(False)

    def logits(self, images: Tensor) -> Tensor:
        """Float32 logits (b, classes) of images (b, 3, h, w) in [-1, 1]."""
        resized = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True)
        return self.classifier(self.normalize(resized).to(self.classifier.dtype)).logits.float()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Args:
            x, y: Images (b, 3, h, w) in [-1, 1] of any size.

        Returns:
            Distances (b,), float32; 0 for equal images.
        """
        self.check(x, y)
        return (self.logits(x) - self.logits(y)).square().mean(1)


def load_perceptual_network(name: str, weights: str | os.PathLike | None = None) -> PerceptualDistance | None:
    """
    A frozen perceptual distance: `distance(x, y)` is (b,) for images (b, 3, h, w) in [-1, 1].

    Args:
        name: `"lpips-vgg"`, `"lpips-alex"`, `"resnet50"`, `"none"` (gives `None`), or the folder or Hub id of a
            `transformers` image classifier.
        weights: A local .safetensors or .pth file of torchvision's weights, or a folder with one such file. Without it
            AlexNet is taken from this package, VGG16 and ResNet-50 from torchvision's download. The heads of LPIPS are
            always this package's.

    Raises:
        OSError: The weights are not there and cannot be downloaded, or the classifier is not there or not whole.
        ValueError: The name is unknown, or the weights have missing, unknown or misshapen entries.
    """
    # The random layers that the weights overwrite must not move the caller's random stream.
    with torch.random.fork_rng(devices=[]):
        if name in ("lpips-vgg", "lpips-alex"):
            return _load_lpips(name, weights)
        if name == "resnet50":
            return _load_resnet50(weights)
        if weights is not None:
            raise ValueError(f"perceptual network {name!r} takes no separate weights, got {weights}")
        return None if name == "none" else _load_classifier(name)


def _load_lpips(name: str, weights: str | os.PathLike | None) -> LPIPS:
    network = LPIPS(name.removeprefix("lpips-"))
    source = "alexnet.safetensors" if name == "lpips-alex" else "vgg_heads.safetensors"
    tensors = safetensors.torch.load((files("flowmo_diffusers") / "assets" / "lpips" / source).read_bytes())
    if weights is not None or name == "lpips-vgg":
        backbone, source = _read_weights(name, weights)
        heads = {key: tensor for key, tensor in tensors.items() if key.startswith("heads.")}
        tensors = heads | {key: tensor for key, tensor in backbone.items() if not key.startswith("classifier.")}
    load_exactly(network, tensors, source)
    return network


def _load_resnet50(weights: str | os.PathLike | None) -> LogitDistance:
    from transformers import ResNetConfig, ResNetForImageClassification

    tensors, source = _read_weights("resnet50", weights)
    # torchvision's is v1.5: a bottleneck strides in its 3x3 convolution.
    classifier = ResNetForImageClassification(ResNetConfig(num_labels=1000, downsample_in_bottleneck=False))
    load_exactly(classifier, tensors, source, torchvision_resnet_key)
    return LogitDistance(classifier)


def _load_classifier(name: str) -> LogitDistance:
    from transformers import AutoModelForImageClassification

    if "/" not in name and not os.path.isdir(name):
        raise ValueError(f"unknown perceptual network {name!r}: {KNOWN}")
    try:
        return LogitDistance(*load_vision_model(AutoModelForImageClassification, name))
    except OSError as error:
        raise OSError(f"perceptual network {name!r}: {error}; {KNOWN}") from error


def _read_weights(name: str, weights: str | os.PathLike | None) -> tuple[dict[str, Tensor], str]:
    """Tensors by the names of their file, and the file they are from."""
    official = TORCHVISION_FILES[name]
    if weights is None:
        return download_tensors(TORCHVISION_URL + official, "--perceptual_weights"), official
    path = Path(weights)
    if path.is_dir():
        stem = official.split("-")[0]
        found = sorted(file for suffix in (".safetensors", ".pth") for file in path.glob(f"{stem}*{suffix}"))
        if len(found) != 1:
            raise OSError(f"{path} must hold one {stem}*.safetensors or {stem}*.pth, found {[f.name for f in found]}")
        path = found[0]
    return read_tensors(path, "--perceptual_weights"), str(path)


def torchvision_resnet_key(key: str) -> str:
    """What torchvision calls an entry of the state dict of `transformers.ResNetForImageClassification`."""
    *path, kind, leaf = key.split(".")
    conv = kind == "convolution"
    match path:
        case ["classifier"]:
            return f"fc.{leaf}"
        case ["resnet", "embedder", "embedder"]:
            return f"{'conv' if conv else 'bn'}1.{leaf}"
        case [*_, stage, "layers", block, "shortcut"]:
            return f"layer{int(stage) + 1}.{block}.downsample.{0 if conv else 1}.{leaf}"
        case [*_, stage, "layers", block, "layer", index]:
            return f"layer{int(stage) + 1}.{block}.{'conv' if conv else 'bn'}{int(index) + 1}.{leaf}"
    raise ValueError(f"{key} is no entry of a ResNet")


def _vgg16() -> tuple[list[nn.Module], tuple[int, ...], int]:
    """The convolutional layers of torchvision's VGG16, the indices LPIPS taps, the smallest image side."""
    layers, channels = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers += [nn.MaxPool2d(2)]
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return layers, (3, 8, 15, 22, 29), 16


def _alexnet() -> tuple[list[nn.Module], tuple[int, ...], int]:
    """The convolutional layers of torchvision's AlexNet, the indices LPIPS taps, the smallest image side."""
    layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)]
    for channels, width in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
    return layers, (1, 4, 7, 9, 11), 31
