"""Networks by whose features sets of images are compared."""

import os
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo_diffusers.engine.digests import json_digest, module_digest
from flowmo_diffusers.engine.pretrained import download_tensors, is_torchscript, load_exactly, read_tensors
from flowmo_diffusers.metrics.inception import POOL_DIMS, SIZE, Conv, FIDInception, resize_as_tensorflow
from flowmo_diffusers.objectives.vision import VisionModel, load_vision_model


INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)

# How images become what Inception sees; published figures differ in it.
INCEPTION_INPUTS = ("tensorflow", "pytorch-fid", "clean-fid")


class FeatureNetwork(nn.Module, ABC):
    """
    Frozen, in eval mode, in float32.

    Args:
        suffix: What results carry in their name; only those of FID's own Inception, preprocessed as in TensorFlow or
            pytorch-fid, have none.
        dims: Length of the features.
        description: Plain JSON values that tell a person which network it is.
    """

    def __init__(self, suffix: str, dims: int, description: dict):
        super().__init__()
        self.suffix = suffix
        self.dims = dims
        self.description = description

    @property
    def identity(self) -> str:
        """Digest of the weights and of all that the features depend on besides."""
        return json_digest(self.description)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: (b, 3, h, w) in [-1, 1], of any size, on any device.

        Returns:
            "pool": (b, dims), and of Inception "spatial": (b, 2023); float32.

        Raises:
            ValueError: If the shape is another one, or values are not finite.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected (b, 3, h, w)")
        if not torch.isfinite(images).all():
            raise ValueError("images have values that are not finite (NaN or infinity)")
        # The faster products of newer GPUs round features to three digits.
        with (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
            torch.autocast(self.device.type, enabled=False),
        ):
            return self.extract(images.to(self.device, torch.float32))

    @abstractmethod
    def extract(self, images: Tensor) -> dict[str, Tensor]: ...

    def probabilities(self, pool: Tensor) -> Tensor:
        """
        Class probabilities (b, classes) from features (b, dims), for the Inception Score.

        Raises:
            ValueError: If the network has no classifier.
        """
        raise ValueError(f"the Inception Score needs class probabilities: {self.description} gives features only")


class InceptionFeatures(FeatureNetwork):
    """
    Args:
        network: With its weights.
        input: "tensorflow" is what FID was defined with, "pytorch-fid" resizes between pixel centres, "clean-fid"
            smooths (Parmar et al. 2022, arXiv 2104.11222).
    """

    def __init__(self, network: FIDInception, input: str = "tensorflow"):
        if input not in INCEPTION_INPUTS:
            raise ValueError(f"input={input!r} must be one of {INCEPTION_INPUTS}")
        # The last layer, which not every file has, does not change features.
        layers = nn.ModuleDict({name: layer for name, layer in network.named_children() if name != "fc"})
        description = {"network": "inception-2015-12-05", "input": input, "weights": module_digest(layers)}
        super().__init__("_clean" if input == "clean-fid" else "", POOL_DIMS, description)
        self.input = input
        # On CPUs four times as fast.
        self.network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] to (b, 3, 299, 299) in the network's range."""
        if self.input == "pytorch-fid":
            return F.interpolate(images, (SIZE, SIZE), mode="bilinear")
        images = (images + 1) * 127.5
        if self.input == "tensorflow":
            images = resize_as_tensorflow(images)
        else:
            images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        return (images - 128) / 128

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        images = self.preprocess(images).contiguous(memory_format=torch.channels_last)
        pool, spatial = self.network(images)
        return {"pool": pool, "spatial": spatial}

    def probabilities(self, pool: Tensor) -> Tensor:
        if self.network.fc is None:
            raise ValueError(
                "the Inception Score needs the last layer of Inception, which these weights lack: the state dict "
                f"published at {INCEPTION_URL} has it"
            )
        return self.network.probabilities(pool.to(self.device))


class VisionFeatures(FeatureNetwork):
    """
    Any vision model of `transformers`: its pooled output, or the mean of its last hidden state over places. The whole
    image is resized (bilinear, smoothed) to the model's input.

    Args:
        loaded: See [`load_vision_model`].
        name: Where it is from.
    """

    def __init__(self, loaded: VisionModel, name: str):
        kind = loaded.model.config.model_type.replace("-", "_")
        description = {
            "network": kind,
            "name": os.path.basename(os.path.normpath(name)),
            "weights": module_digest(loaded.model),
            "input": {"size": list(loaded.size), "mean": list(loaded.mean), "std": list(loaded.std)},
        }
        super().__init__(f"_{kind}", 0, description)
        self.model = loaded.model.eval().requires_grad_(False)
        self.size = loaded.size
        self.register_buffer("mean", torch.tensor(loaded.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(loaded.std).view(1, -1, 1, 1), persistent=False)
        self.dims = self(torch.zeros(1, 3, *self.size))["pool"].shape[1]

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        output = self.model(pixel_values=((images + 1) / 2 - self.mean) / self.std)
        pool = getattr(output, "pooler_output", None)
        if pool is None:
            hidden = output.last_hidden_state
            pool = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        return {"pool": pool.flatten(1)}


def load_feature_network(
    name: str = "inception", weights: str | os.PathLike | None = None, input: str = "tensorflow"
) -> FeatureNetwork:
    """
    Args:
        name: "inception" for FID's, else the folder or Hub id of a vision model of `transformers`.
        weights: Of Inception: a local file, either the state dict that pytorch-fid and torch-fidelity publish or the
            TorchScript archive of StyleGAN's metrics (which has no last layer for the Inception Score). Without it,
            pytorch-fid's is downloaded.
        input: See [`InceptionFeatures`].

    Raises:
        OSError: The weights are not there and cannot be downloaded, or the model is not there or not whole.
        ValueError: The weights do not fit, or an argument belongs to the other kind of network.
    """
    with torch.random.fork_rng(devices=[]):  # random layers that weights overwrite must not move the caller's stream
        if name == "inception":
            return InceptionFeatures(_load_inception(weights), input)
        if weights is not None or input != "tensorflow":
            raise ValueError(f"weights and input are Inception's; network {name!r} has its own")
        from transformers import AutoModel

        if "/" not in name and not os.path.isdir(name):
            raise ValueError(
                f"unknown feature network {name!r}: known are 'inception', and the folder or Hub id of a vision model "
                "of transformers"
            )
        return VisionFeatures(load_vision_model(AutoModel, name), name)


def _load_inception(weights: str | os.PathLike | None) -> FIDInception:
    option = "--inception_weights"
    tensors = download_tensors(INCEPTION_URL, option) if weights is None else read_tensors(weights, option)
    if weights is not None and is_torchscript(weights):
        tensors = _rename_torchscript(tensors, str(weights))
    network = FIDInception(classifier="fc.weight" in tensors)
    load_exactly(network, tensors, str(weights or INCEPTION_URL))
    return network


def _rename_torchscript(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """
    StyleGAN's archive has the convolutions under TensorFlow's names, but in the order in which `FIDInception` has
    them: "layers.mixed.tower.conv.{weight,beta,mean,var}", no scale (gamma) in the normalisation.
    """
    names = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in tensors if key.endswith(".beta")))
    places = [name for name, module in FIDInception(classifier=False).named_modules() if isinstance(module, Conv)]
    if len(names) != len(places):
        raise ValueError(f"{source} is no archive of FID's Inception: {len(names)} convolutions, not {len(places)}")
    renamed = {}
    for name, place in zip(names, places, strict=True):
        renamed[f"{place}.conv.weight"] = tensors[f"{name}.weight"]
        renamed[f"{place}.bn.weight"] = torch.ones_like(tensors[f"{name}.beta"])
        renamed[f"{place}.bn.bias"] = tensors[f"{name}.beta"]
        renamed[f"{place}.bn.running_mean"] = tensors[f"{name}.mean"]
        renamed[f"{place}.bn.running_var"] = tensors[f"{name}.var"]
    return renamed
