"""What the evaluation scripts have in common on their command lines."""

import argparse
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from flowmo_diffusers.data.images import load_dataset_images
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import CROPS, INTERPOLATIONS
from flowmo_diffusers.engine.options import resolution
from flowmo_diffusers.metrics.features import INCEPTION_INPUTS, FeatureNetwork, load_feature_network
from flowmo_diffusers.metrics.protocol import PROTOCOLS, Protocol
from flowmo_diffusers.metrics.reconstruction import ROUNDINGS


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_data_options(parser: argparse._ArgumentGroup) -> None:
    """See [`load_dataset_images`]."""
    add = parser.add_argument
    add("--dataset", required=True, help="Hub id, folder, .tar, parquet or .npz file(s), emoji, birds or emoji+birds")
    add("--dataset_config_name")
    add("--split", help="default: 'validation', else 'test', else the only one")
    add("--image_column", default="image", help="column, or extension in .tar shards that hold several images a key")
    add("--num_images", type=int, help="so many, spread evenly over the split; default: all")
    add("--streaming", action="store_true", help="take the first --num_images of a Hub data set without the rest")
    add("--cache_dir", type=Path, help="of data sets and features; default: the Hugging Face cache")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more images than this cannot be read")
    add("--dataloader_num_workers", type=int, default=0)


def add_crop_options(parser: argparse._ArgumentGroup) -> None:
    """How images become crops; see [`ImageTransform`]."""
    add = parser.add_argument
    add("--resolution", type=resolution, help="side of the crop in pixels, or HEIGHTxWIDTH")
    add("--interpolation", choices=list(INTERPOLATIONS), default="bilinear", help="'adm' is guided-diffusion's")
    add("--crop", choices=CROPS, default="center", help="'none' resizes the whole image, whatever its proportions")


def add_protocol_options(parser: argparse._ArgumentGroup) -> None:
    """See [`Protocol`]; `--protocol` names a whole one, the other options change it."""
    add = parser.add_argument
    add("--protocol", choices=list(PROTOCOLS), default="standard", help="'flowmo' is that of the published evaluation")
    add("--rounding", choices=ROUNDINGS, help="of the images that PSNR and SSIM compare")
    add("--network_rounding", choices=ROUNDINGS, help="of the images that networks see")
    add("--inception_input", choices=INCEPTION_INPUTS, help="how images are resized for Inception")
    add("--jpeg_quality", type=int, help="store results as JPEG before they are measured")
    add("--official_batch_size", type=int, help="images of a batch of psnr_official; published: 5")


def add_network_options(parser: argparse._ArgumentGroup) -> None:
    """See [`load_feature_network`]."""
    add = parser.add_argument
    add("--network", default="inception", help="whose features are compared; else a transformers vision model")
    add("--inception_weights", type=Path, help="local file: a state dict, or StyleGAN's TorchScript archive")


def build_source(args: argparse.Namespace, split: str | None = None) -> ImageSource:
    """
    The images of `--dataset`, of another split than `--split` where one is named. Raises `OSError` and `ValueError` as
    [`load_dataset_images`].
    """
    return load_dataset_images(
        args.dataset,
        split or args.split,
        args.dataset_config_name,
        args.cache_dir,
        args.image_column,
        args.num_images,
        args.streaming,
    )


def feature_cache(args: argparse.Namespace) -> Path:
    """Where features of images are kept for other runs."""
    return args.cache_dir or Path(HF_HOME) / "flowmo_diffusers"


def build_protocol(args: argparse.Namespace) -> Protocol:
    """Raises `ValueError` as [`Protocol`]."""
    values = PROTOCOLS[args.protocol].to_dict()
    given = {name: getattr(args, name) for name in values if getattr(args, name) is not None}
    return Protocol(**values | given)


def build_network(args: argparse.Namespace, protocol: Protocol) -> FeatureNetwork:
    """Raises `OSError` and `ValueError` as [`load_feature_network`]."""
    if args.network != "inception":
        return load_feature_network(args.network, args.inception_weights)
    return load_feature_network(args.network, args.inception_weights, protocol.inception_input)
