#!/usr/bin/env python
"""
Turns images into tokens, on which a generator is trained: packed codes of exactly tokens x bits / 8 bytes, as a
Hugging Face dataset.

    accelerate launch training/tokenize_images.py --pretrained_model_name_or_path my_tokenizer \
        --dataset my_images --split train --flip --output_dir my_tokens

A killed run goes on by the same command. Further splits go into the same folder.
"""

import argparse
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline
from flowmo_diffusers.data.images import load_dataset_images
from flowmo_diffusers.data.measuring import describe_bad
from flowmo_diffusers.data.sources import ImageSource, Labels
from flowmo_diffusers.data.tokenizing import ImageVariants, tokenize
from flowmo_diffusers.data.tokens import (
    check_folder,
    packed_bytes,
    read_descriptions,
    tokenizer_identity,
    write_tokens,
)
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.engine.launch import build_accelerator
from flowmo_diffusers.engine.options import parse_with_config, resolution
from flowmo_diffusers.hub.card_parts import public
from flowmo_diffusers.metrics.report import environment


logger = logging.getLogger("tokenize_images")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="FlowMo pipeline, a folder or Hub id")
    add("--output_dir", type=Path, required=True, help="where the tokens are written")

    data = parser.add_argument_group("images").add_argument
    data("--dataset", required=True, help="Hub id, folder, .tar, parquet or .npz file(s), emoji or birds")
    data("--dataset_config_name")
    data("--split", default="train", help="of the data set, and its name among the tokens")
    data("--image_column", default="image", help="column, or extension in .tar shards that hold several images a key")
    data("--label_column", default="label", help="column of classes, field of .tar shards, or array of an .npz file")
    data("--num_images", type=int, help="so many, spread evenly over the split; default: all")
    data("--cache_dir", type=Path, help="of data sets; default: the Hugging Face cache")
    data("--max_bad_fraction", type=float, default=0.01, help="stop when more images than this cannot be read")
    data("--dataloader_num_workers", type=int, default=0)

    crops = parser.add_argument_group("crops").add_argument
    crops("--resolution", type=resolution, help="side of the crop in pixels, or HEIGHTxWIDTH; default: sample_size")
    crops("--num_crops", type=int, default=1, help="crops of an image: the one at the centre, the others at random")
    crops("--random_scale", type=float, default=1.0, help="resize by up to this factor before a random crop")
    crops("--flip", action="store_true", help="store each crop mirrored too")
    crops("--seed", type=int, default=0, help="of the random crops")

    run = parser.add_argument_group("run").add_argument
    run("--batch_size", type=int, default=64, help="images of one process at a time")
    run("--chunk_size", type=int, default=4096, help="images after which results are kept")
    run("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="may flip bits of values near zero")

    args = parse_with_config(parser, argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before anything is loaded."""
    for name in ("batch_size", "chunk_size", "num_images", "num_crops"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    rules = (
        (args.seed < 0, f"--seed {args.seed} must not be negative"),
        (args.dataloader_num_workers < 0, "--dataloader_num_workers must be at least 0"),
        (not 0 <= args.max_bad_fraction < 1, "--max_bad_fraction must be at least 0 and less than 1"),
        (args.random_scale < 1, f"--random_scale {args.random_scale} must be at least 1"),
        (args.random_scale > 1 and args.num_crops == 1, "--random_scale belongs to --num_crops 2 or more"),
        (not re.fullmatch(r"\w+", args.split), f"--split {args.split!r} must be letters, digits and underscores"),
        (args.mixed_precision == "fp16" and not torch.cuda.is_available(),
         "--mixed_precision fp16 needs a GPU; bf16 runs on a CPU too"),
    )  # fmt: skip
    for wrong, message in rules:
        if wrong:
            parser.error(message)


def load_tokenizer(args: argparse.Namespace) -> FlowMoAutoencoder:
    """In float32. Raises `ValueError` if it has no tokens of images of this resolution."""
    autoencoder = FlowMoPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32).autoencoder
    patch = autoencoder.config.patch_size
    if any(side % patch for side in args.resolution or ()):
        raise ValueError(f"--resolution {args.resolution} must be multiples of patch_size={patch}")
    return autoencoder.eval()


def load_source(args: argparse.Namespace) -> ImageSource:
    return load_dataset_images(
        args.dataset, args.split, args.dataset_config_name, args.cache_dir, args.image_column, args.num_images
    )


def throughput(chunks: Chunks, num_tokens: int, num_processes: int) -> dict[str, float]:
    """Of all processes together, loading included."""
    images = num_processes / chunks.read("seconds")["seconds"].double().mean().item()
    return {"images_per_second": images, "tokens_per_second": images * num_tokens, "num_processes": num_processes}


def write_card(folder: Path) -> None:
    """A short dataset card of all splits there are."""
    found = read_descriptions(folder)
    (*_, any_split) = found.values()
    identity, size = any_split["tokenizer"], any_split["bytes_per_image"]
    rows = [
        f"| {split} | {values['count']} | {values['settings']['num_images']} | {values['variants']} | "
        f"{values['num_classes']} |"
        for split, values in found.items()
    ]
    lines = [
        *("---", "tags:", "- flowmo", "- image-tokens", "---", "", f"# {folder.name}", ""),
        f"Images as tokens of a FlowMo tokenizer: {identity['num_tokens']} tokens of {identity['token_groups']} x "
        f"{identity['group_bits']} bits, packed into {size} bytes an image.",
        *("", "| split | rows | images | variants | classes |", "|---|---|---|---|---|", *rows, ""),
        "Columns: `codes` (packed bits), `label` (-1: none), `image` (its number in the source), `variant` (0: the "
        "centre crop). `tokens-*.json` say which tokenizer, images and crops these are of.",
        *("", "```python", "from flowmo_diffusers.data.tokens import load_tokens", ""),
        *(f'tokens = load_tokens("{folder.name}", "{next(iter(found))}")', "tokens.indices([0, 1])", "```", ""),
    ]
    with atomic_file(folder / "README.md") as path:
        path.write_text("\n".join(lines))


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = build_accelerator(args.output_dir, args.batch_size, mixed_precision=args.mixed_precision)
    with accelerator.main_process_first():  # who fills the caches for the others
        autoencoder = load_tokenizer(args)
        identity = tokenizer_identity(autoencoder)
        source = load_source(args)
        labels = source.labels(args.label_column)
    size = args.resolution or autoencoder.config.sample_size
    variants = ImageVariants(source, size, args.num_crops, args.random_scale, args.flip, args.seed)
    settings = {
        "images": source.fingerprint(),
        "num_images": len(source),
        "transform": variants.description,
        "label_column": args.label_column,
        "mixed_precision": args.mixed_precision,
    }
    wanted = {"tokenizer": identity, "class_names": labels and labels.names, "settings": settings}
    folder = args.output_dir / f".tokens-{args.split}"
    if check_folder(args.output_dir, args.split, wanted):
        if accelerator.is_main_process:
            print(f"{args.output_dir} holds split {args.split!r} already: nothing to do", flush=True)
    else:
        autoencoder.to(accelerator.device)
        chunks = tokenize(
            autoencoder,
            variants,
            folder,
            {"tokenizer": identity, **settings},
            accelerator,
            args.batch_size,
            args.chunk_size,
            args.dataloader_num_workers,
        )
        if accelerator.is_main_process:
            finish(args, variants, labels, chunks, wanted, accelerator)
    if accelerator.is_main_process:
        write_card(args.output_dir)
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def finish(
    args: argparse.Namespace,
    variants: ImageVariants,
    labels: Labels | None,
    chunks: Chunks,
    wanted: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Writes the token folder from what all processes have done."""
    identity = wanted["tokenizer"]
    bad = describe_bad(chunks, args.max_bad_fraction)
    speed = throughput(chunks, identity["num_tokens"], accelerator.num_processes)
    description = {
        "tokenizer": identity,
        "dataset": public(args.dataset),
        "settings": wanted["settings"],
        "bad_images": bad,
        "throughput": speed,
        "environment": environment(accelerator.device),
    }
    write_tokens(args.output_dir, args.split, chunks, labels, variants.variants, description)
    print(
        f"{len(chunks.read('number')['number'])} rows of {packed_bytes(identity)} bytes an image: "
        f"{speed['images_per_second']:.1f} images/s, {speed['tokens_per_second']:.0f} tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    main(parse_args())
