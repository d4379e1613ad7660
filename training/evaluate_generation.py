#!/usr/bin/env python
"""
Measures generated images against real ones: FID, sFID, Inception Score, precision and recall, of the samples of a
pipeline or of images from anywhere, against a data set or stored statistics.

    accelerate launch training/evaluate_generation.py --pretrained_model_name_or_path my_generator \
        --num_samples 50000 --reference VIRTUAL_imagenet256_labeled.npz --output_dir evaluation

A killed run goes on by the same command.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowmo_diffusers.data.arrays import ArrayImages, write_npz
from flowmo_diffusers.data.images import load_dataset_images
from flowmo_diffusers.data.measuring import describe_bad
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.files import atomic_file, remove_partial
from flowmo_diffusers.engine.launch import build_accelerator
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.metrics.extraction import image_features
from flowmo_diffusers.metrics.features import INCEPTION_INPUTS, FeatureNetwork
from flowmo_diffusers.metrics.generation import METRICS, Reference, generation_metrics
from flowmo_diffusers.metrics.image_sets import SameSize, StoredSamples, common_size, first_size, pixel_arrays
from flowmo_diffusers.metrics.options import (
    DTYPES,
    add_crop_options,
    add_network_options,
    build_network,
    feature_cache,
)
from flowmo_diffusers.metrics.protocol import Protocol
from flowmo_diffusers.metrics.report import environment, markdown_table, write_json
from flowmo_diffusers.metrics.sampling import PipelineSampler, sample_npz
from flowmo_diffusers.metrics.statistics import array_names, read_statistics, write_statistics
from flowmo_diffusers.pipelines.loading import load_pipeline


logger = logging.getLogger("evaluate_generation")

NUM_SAMPLES = 50_000  # of a pipeline, as the field reports


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where figures and samples are written")

    samples = parser.add_argument_group("samples").add_argument
    samples("--samples", help="generated images: folder, .npz file, .tar, parquet file(s) or Hub id")
    samples("--samples_split", help="default: 'validation', else 'test', else the only one")
    samples("--pretrained_model_name_or_path", help="a diffusers pipeline to be sampled instead: folder or Hub id")
    samples("--num_samples", type=int, help=f"default: {NUM_SAMPLES} of a pipeline, all of --samples")
    samples("--num_classes", type=int, help="sample classes 0 to this one less in turn")
    samples("--class_labels", type=int, nargs="+", default=[], help="sample these classes in turn")
    samples("--pipeline_kwargs", default={}, help="further arguments of the pipeline's call, as a JSON mapping")
    samples("--dtype", choices=list(DTYPES), default="float32")
    samples("--sample_batch_size", type=int, default=16, help="images of one process at a time")
    samples("--seed", type=int, default=0, help="of the noise that samples start from")

    reference = parser.add_argument_group("reference").add_argument
    reference("--reference", required=True, help="real images, as --samples, or an .npz file of statistics")
    reference("--reference_split", help="default: 'validation', else 'test', else the only one")
    reference("--reference_config_name", help="configuration of a Hub data set")
    reference("--num_reference_images", type=int, help="so many, spread evenly over the split; default: all")
    reference("--image_column", default="image", help="column, or extension in .tar shards with several images a key")
    reference("--streaming", action="store_true", help="take the first --num_reference_images without the rest")
    reference("--cache_dir", type=Path, help="of data sets and features; default: the Hugging Face cache")
    reference("--max_bad_fraction", type=float, default=0.01, help="stop when more images than this cannot be read")

    add_crop_options(parser.add_argument_group("crop (default: images as they are)"))

    how = parser.add_argument_group("protocol")
    how.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    how.add_argument("--neighbours", type=int, default=3, help="k of precision and recall")
    how.add_argument("--inception_score_split", type=int, default=5000, help="images of one score")
    how.add_argument("--num_images_precision_recall", type=int, default=10_000, help="of either set, at most")
    how.add_argument("--inception_input", choices=INCEPTION_INPUTS, default=Protocol.inception_input,
                     help="how images are resized for Inception")  # fmt: skip
    how.add_argument("--jpeg_quality", type=int, help="store samples as JPEG before they are measured")
    add_network_options(how)

    run = parser.add_argument_group("run").add_argument
    run("--batch_size", type=int, default=32, help="images of one process that the network sees at a time")
    run("--chunk_size", type=int, default=128, help="samples after which they are kept")
    run("--dataloader_num_workers", type=int, default=0)
    run("--write_statistics", type=Path, help="store the reference as an .npz file of statistics and some images")
    run("--write_samples", type=Path, help="store samples as they are measured as an .npz file")

    args = parse_with_config(parser, argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before anything is loaded."""
    at_least_one = (
        *("num_samples", "num_classes", "sample_batch_size", "num_reference_images", "neighbours", "batch_size"),
        *("chunk_size", "inception_score_split", "num_images_precision_recall"),
    )
    for name in at_least_one:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if isinstance(args.pipeline_kwargs, str):
        try:
            args.pipeline_kwargs = json.loads(args.pipeline_kwargs)
        except json.JSONDecodeError as error:
            parser.error(f"--pipeline_kwargs {args.pipeline_kwargs} is no JSON: {error}")
    sampling = args.num_classes or args.class_labels or args.pipeline_kwargs
    files = [path for path in (args.write_statistics, args.write_samples) if path and path.suffix != ".npz"]
    rules = (
        ((args.samples is None) == (args.pretrained_model_name_or_path is None),
         "give exactly one of --samples and --pretrained_model_name_or_path"),
        (args.samples is not None and sampling,
         "--num_classes, --class_labels and --pipeline_kwargs belong to --pretrained_model_name_or_path"),
        (args.num_classes and args.class_labels, "give --num_classes or --class_labels, not both"),
        (not isinstance(args.pipeline_kwargs, dict), f"--pipeline_kwargs {args.pipeline_kwargs} must be a mapping"),
        (args.seed < 0, f"--seed {args.seed} must not be negative"),
        (not 0 <= args.max_bad_fraction < 1, f"--max_bad_fraction {args.max_bad_fraction} must be from 0 to 1"),
        (files, f"{', '.join(map(str, files))} must end in .npz"),
        (args.streaming and args.num_reference_images is None, "--streaming needs --num_reference_images"),
    )  # fmt: skip
    for wrong, message in rules:
        if wrong:
            parser.error(message)


def build_sampler(args: argparse.Namespace, device: torch.device) -> PipelineSampler:
    """Raises `OSError` and `ValueError` as `from_pretrained` and [`PipelineSampler`]."""
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype=DTYPES[args.dtype])
    pipeline.set_progress_bar_config(disable=True)
    labels = range(args.num_classes) if args.num_classes else args.class_labels
    return PipelineSampler(pipeline.to(device), args.seed, labels, args.pipeline_kwargs)


def load_samples(args: argparse.Namespace) -> ImageSource:
    return load_dataset_images(
        args.samples,
        args.samples_split,
        cache_dir=args.cache_dir,
        image_column=args.image_column,
        num_images=args.num_samples,
    )


def load_reference(args: argparse.Namespace) -> ImageSource | None:
    """Images of the reference; `None` if it has statistics alone."""
    if has_statistics(args.reference):
        return ArrayImages(args.reference, args.cache_dir) if "arr_0" in array_names(args.reference) else None
    return load_dataset_images(
        args.reference,
        args.reference_split,
        args.reference_config_name,
        args.cache_dir,
        args.image_column,
        args.num_reference_images,
        args.streaming,
    )


def has_statistics(reference: str) -> bool:
    return Path(reference).suffix == ".npz" and "mu" in array_names(reference)


def measure(
    source: ImageSource,
    transform: ImageTransform | StoredSamples,
    network: FeatureNetwork,
    args: argparse.Namespace,
    accelerator: Accelerator,
    folder: Path,
    label: str,
) -> Chunks:
    """Features of the images of a set. Every process must call this."""
    chunks = image_features(
        source,
        transform,
        network,
        folder,
        accelerator,
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
        label=label,
    )
    describe_bad(chunks, args.max_bad_fraction)
    return chunks


def build_transform(
    args: argparse.Namespace, samples: ImageSource | PipelineSampler, reference: ImageSource | None
) -> ImageTransform:
    """Raises `ValueError` if sizes differ and no resolution is given. A pipeline is tried by one sample."""
    tried = isinstance(samples, PipelineSampler)
    sizes = {"samples": tuple(samples([0]).shape[1:3]) if tried else first_size(samples, "samples")}
    if reference is not None:
        sizes["reference"] = first_size(reference, "reference")
    if args.resolution is None:
        return SameSize(common_size(sizes))
    return ImageTransform(args.resolution, interpolation=args.interpolation, crop=args.crop)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = build_accelerator(args.output_dir, args.batch_size)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)
    protocol = Protocol(inception_input=args.inception_input, jpeg_quality=args.jpeg_quality)
    stored = has_statistics(args.reference)
    if stored and args.write_statistics:
        raise ValueError(f"--write_statistics: the reference {args.reference} has statistics already")
    with accelerator.main_process_first():  # who fills the caches for the others
        if accelerator.is_main_process:
            remove_partial(args.output_dir)
        real = load_reference(args)
        network = build_network(args, protocol).to(accelerator.device)
        samples = load_samples(args) if args.samples else build_sampler(args, accelerator.device)
    transform = build_transform(args, samples, real)
    conditions = {**transform.to_dict(), "network": network.description}
    statistics = read_statistics(args.reference, conditions) if stored else None
    if accelerator.is_main_process:
        listed = {**conditions, "jpeg_quality": args.jpeg_quality}
        print("protocol: " + ", ".join(f"{name} {value}" for name, value in listed.items()), flush=True)

    if isinstance(samples, PipelineSampler):
        path, count = args.output_dir / "samples.npz", args.num_samples or NUM_SAMPLES
        sample_npz(samples, count, path, accelerator, args.sample_batch_size, args.chunk_size)
        samples = ArrayImages(path)
    as_stored = transform if args.jpeg_quality is None else StoredSamples(transform, protocol)
    measured = measure(samples, as_stored, network, args, accelerator, args.output_dir, "samples")
    features = real and measure(real, transform, network, args, accelerator, feature_cache(args), "reference")
    if accelerator.is_main_process:
        reference = Reference(statistics, features) if stored else Reference.from_features(features)
        if args.write_statistics:
            write_reference(args, reference, conditions, real, transform)
        if args.write_samples:
            numbers = measured.read("number")["number"].tolist()
            write_npz(args.write_samples, pixel_arrays(samples, as_stored, numbers), len(numbers))
        report(args, conditions, measured, reference, network)
    accelerator.end_training()


def write_reference(
    args: argparse.Namespace,
    reference: Reference,
    conditions: dict[str, Any],
    images: ImageSource,
    transform: ImageTransform,
) -> None:
    """Statistics of all images, and as many of these as precision and recall need."""
    numbers = reference.features.read("number")["number"]
    count = min(len(numbers), args.num_images_precision_recall)
    picked = numbers[torch.arange(count) * len(numbers) // count].tolist()
    write_statistics(
        args.write_statistics, reference.statistics, conditions, pixel_arrays(images, transform, picked), count
    )


def report(
    args: argparse.Namespace,
    conditions: dict[str, Any],
    samples: Chunks,
    reference: Reference,
    network: FeatureNetwork,
) -> None:
    """Computes the figures, writes and prints them."""
    figures, left_out = generation_metrics(
        samples,
        reference,
        network,
        args.metrics,
        args.neighbours,
        args.inception_score_split,
        args.num_images_precision_recall,
    )
    count = len(samples.read("number")["number"])
    source = args.samples or args.pretrained_model_name_or_path
    protocol = {
        **conditions,
        "jpeg_quality": args.jpeg_quality,
        "neighbours": args.neighbours,
        "inception_score_split": args.inception_score_split,
        "num_images_precision_recall": args.num_images_precision_recall,
    }
    results = {
        "figures": figures,
        "left_out": left_out,
        "protocol": protocol,
        "samples": {
            "source": source,
            "split": args.samples_split,
            "images": count,
            "bad_images": samples.notes(),
        },
        "reference": {
            "source": args.reference,
            "split": args.reference_split,
            "images": reference.statistics["pool"].count,
            "bad_images": reference.features.notes() if reference.features else [],
        },
        "environment": environment(network.device),
    }
    if args.samples is None:
        names = ("num_classes", "class_labels", "pipeline_kwargs", "dtype", "seed")
        results["samples"] |= {name: getattr(args, name) for name in names}
    write_json(args.output_dir / "metrics.json", results)
    table = markdown_table([{"name": source, "figures": {"images": count, **figures}}])
    table += "".join(f"\nNo {name}: {reason}.\n" for name, reason in left_out.items())
    with atomic_file(args.output_dir / "metrics.md") as path:
        path.write_text(table)
    print(table, flush=True)


if __name__ == "__main__":
    main(parse_args())
