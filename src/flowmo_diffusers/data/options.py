"""What the scripts that train on images have in common on their command lines, and the images that follow from it."""

import argparse
from typing import Any

import torch

from flowmo_diffusers.data.images import EMBEDDED, hold_out, load_images, load_streams, stack_images
from flowmo_diffusers.data.loading import ShuffledImages, StreamedImages
from flowmo_diffusers.data.transforms import ImageTransform


# What may change when a run is resumed, and ranges: see `engine/training_options.py`.
FREE_DATA_OPTIONS = {"cache_dir", "train_data_dir", "max_bad_fraction"}
DATA_LIMITS = {
    "at least 1": ("shuffle_buffer", "resolution"),
    "at least 0 and less than 1": ("max_bad_fraction",),
}


def add_training_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset_name", help="Hub id, local dataset, or embedded images: emoji, birds, emoji+birds")
    add("--dataset_config_name")
    add("--train_data_dir", help="folder of images, parquet file(s), .tar shards, or ImageNet's .tar files")
    add("--image_column", default="image", help="column, or extension in .tar shards that hold several images a key")
    add("--split", default="train")
    add("--validation_split", help="default: 'validation' or 'test' if there is one, else images of the split itself")
    add("--cache_dir")
    add("--streaming", action="store_true", help="read a data set as it is downloaded, without keeping it")
    add("--shuffle_buffer", type=int, help="images within which order is random; default: all, 10000 for .tar shards")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more images than this cannot be read")
    add("--resolution", type=int, help="default: the model's sample_size")
    add("--center_crop", action="store_true", help="crop at the centre instead of at random")
    add("--random_scale", type=float, default=1.0, help="resize by up to this factor before the random crop")
    add("--random_flip", action=argparse.BooleanOptionalAction, default=True)


def data_rules(args: argparse.Namespace) -> tuple[tuple[Any, str], ...]:
    """Pairs of what must not be true of these options and what is said if it is."""
    return (
        ((args.dataset_name is None) == (args.train_data_dir is None),
         "give exactly one of --dataset_name and --train_data_dir"),
        (args.dataset_config_name and args.dataset_name is None, "--dataset_config_name belongs to --dataset_name"),
        (args.streaming and args.dataset_name in EMBEDDED, "--streaming: the embedded images are here already"),
        (args.random_scale < 1 or (args.random_scale > 1 and args.center_crop),
         "--random_scale must be at least 1, and 1 with --center_crop"),
    )  # fmt: skip


def reader_facts(args: argparse.Namespace, num_processes: int) -> dict[str, Any]:
    """What decides the course of a run beside the options: readers share a stream's shards, but images of all else."""
    if not args.streaming:
        return {}
    return {"num_processes": num_processes, "dataloader_num_workers": args.dataloader_num_workers}


def build_training_images(
    args: argparse.Namespace, resolution: int
) -> tuple[ShuffledImages | StreamedImages, torch.Tensor]:
    """
    The endless training images, and the held-out ones as a tensor.

    Raises:
        OSError, ValueError: As [`load_images`] and [`hold_out`].
    """
    place = (args.dataset_name, args.train_data_dir, args.split, args.dataset_config_name, args.cache_dir)
    found = (load_streams if args.streaming else load_images)(*place, args.image_column)
    train, held_out = hold_out(found, args.split, args.validation_split, args.num_validation_images)
    transform = ImageTransform(resolution, not args.center_crop, args.random_flip, args.random_scale)
    endless = StreamedImages if args.streaming else ShuffledImages
    return endless(train, transform, args.seed, args.shuffle_buffer), stack_images(held_out, resolution)
