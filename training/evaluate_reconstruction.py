#!/usr/bin/env python
"""
Measures tokenizers by what they make of images: bits per pixel, PSNR, SSIM, LPIPS and rFID, of FlowMo pipelines with
any settings of the sampler, and of diffusers' autoencoders, JPEG and WebP, on the same images.

    accelerate launch training/evaluate_reconstruction.py --pretrained_model_name_or_path my_tokenizer \
        --dataset my_images --resolution 256 --sweep num_inference_steps=1,4,25 --baseline jpeg --output_dir evaluation

A killed run goes on by the same command.
"""

import argparse
import itertools
import logging
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowmo_diffusers import FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.data.measuring import describe_bad, measure_images
from flowmo_diffusers.data.sources import ImageSource
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.digests import json_digest
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.engine.launch import build_accelerator
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.metrics.baselines import load_baseline
from flowmo_diffusers.metrics.codecs import CODECS
from flowmo_diffusers.metrics.evaluation import ReconstructionEvaluation, code_figures
from flowmo_diffusers.metrics.extraction import image_features
from flowmo_diffusers.metrics.options import (
    DTYPES,
    add_crop_options,
    add_data_options,
    add_network_options,
    add_protocol_options,
    build_network,
    build_protocol,
    build_source,
    feature_cache,
)
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.reconstruction import psnr_of
from flowmo_diffusers.metrics.reconstructors import FlowMoReconstructor, Reconstructor
from flowmo_diffusers.metrics.report import environment, markdown_table, plot_figures, write_json
from flowmo_diffusers.objectives.perceptual import load_perceptual_network


logger = logging.getLogger("evaluate_reconstruction")

METRICS = ("lpips_vgg", "lpips_alex", "rfid", "precision_recall")


def interval(text: str) -> tuple[float, float]:
    """ "0.17:1.02" as two noise levels."""
    low, high = text.split(":")
    return float(low), float(high)


# What can be swept, and how a value is read.
SAMPLER = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "guidance_interval": interval,
    "window_size": int,
    "window_overlap": int,
}
SCHEDULER = {"rho": float, "solver": str}


def sweep(text: str) -> tuple[str, list[Any]]:
    """ "num_inference_steps=1,2,4" as the option's name and its values."""
    name, _, values = text.partition("=")
    kind = (SAMPLER | SCHEDULER).get(name)
    if kind is None:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be swept: {', '.join(SAMPLER | SCHEDULER)} can")
    try:
        return name, [kind(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{values!r} are no values of {name}, as in {name}=a,b,c") from None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="where figures, pictures and intermediate results are written")

    what = parser.add_argument_group("what is evaluated").add_argument
    what("--pretrained_model_name_or_path", nargs="+", default=[], help="FlowMo pipelines, folders or Hub ids")
    what("--sweep", type=sweep, nargs="+", default=[], help="settings of the sampler: num_inference_steps=1,4,25")
    what("--baseline", nargs="+", default=[], help="jpeg or webp (at the pipelines' bytes), jpeg:75 (quality), or a "
         "diffusers autoencoder: folder, Hub id, or id:subfolder")  # fmt: skip
    what("--baseline_bytes", type=int, nargs="+", default=[], help="for jpeg and webp; default: the pipelines'")
    what("--dtype", choices=list(DTYPES), default="float32")
    what("--seed", type=int, default=0, help="of the noise that decoding starts from")

    data = parser.add_argument_group("images")
    add_data_options(data)
    add_crop_options(data)

    how = parser.add_argument_group("protocol")
    how.add_argument("--metrics", nargs="*", choices=METRICS, default=["lpips_vgg", "lpips_alex", "rfid"],
                     help="beside PSNR and SSIM")  # fmt: skip
    how.add_argument("--reference_split", help="also precision and recall against as many images of this split")
    add_protocol_options(how)
    add_network_options(how)
    how.add_argument("--lpips_weights", type=Path, help="local file of torchvision's VGG16 weights")

    run = parser.add_argument_group("run").add_argument
    run("--batch_size", type=int, default=16, help="images of one process at a time")
    run("--chunk_size", type=int, default=128, help="images after which results are kept")
    run("--num_picture_images", type=int, default=4, help="best, median and worst ones to be shown")

    args = parse_with_config(parser, argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before anything is loaded."""
    for name in ("batch_size", "chunk_size", "num_images", "num_picture_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    budgeted = [word for word in args.baseline if word in CODECS]
    rules = (
        (not args.pretrained_model_name_or_path and not args.baseline,
         "nothing to evaluate: give --pretrained_model_name_or_path or --baseline"),
        (budgeted and not args.pretrained_model_name_or_path and not args.baseline_bytes,
         f"--baseline {budgeted} need --baseline_bytes, or pipelines whose bytes they take"),
        (budgeted and not args.baseline_bytes and any(name == "window_size" for name, _ in args.sweep),
         f"--baseline {budgeted} need --baseline_bytes where the bytes depend on windows"),
        (args.seed < 0, f"--seed {args.seed} must not be negative"),
        (len({name for name, _ in args.sweep}) < len(args.sweep), "--sweep names a setting twice"),
        ("precision_recall" in args.metrics and "rfid" not in args.metrics, "--metrics precision_recall needs rfid"),
        (args.reference_split and "precision_recall" not in args.metrics,
         "--reference_split is for --metrics precision_recall"),
    )  # fmt: skip
    for wrong, message in rules:
        if wrong:
            parser.error(message)


def row_names(args: argparse.Namespace) -> dict[str, str]:
    """What is evaluated by name: of a folder the last part of its path, or all of it where that is not enough."""
    words = [*args.pretrained_model_name_or_path, *args.baseline]
    short = {word: Path(word).resolve().name if Path(word).is_dir() else word for word in words}
    return short if len(set(short.values())) == len(words) else dict(zip(words, words, strict=True))


def pipelines(args: argparse.Namespace, device: torch.device) -> list[tuple[str, FlowMoPipeline]]:
    """All pipelines by name."""
    names = row_names(args)
    return [
        (names[path], load_pipeline(path, DTYPES[args.dtype], device)) for path in args.pretrained_model_name_or_path
    ]


def load_pipeline(path: str, dtype: torch.dtype, device: torch.device) -> FlowMoPipeline:
    pipeline = FlowMoPipeline.from_pretrained(path, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(sweeps: Sequence[tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """Every combination of the values swept; a single one, all defaults, if there are none."""
    names = [name for name, _ in sweeps]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in sweeps))]


def flowmo_reconstructors(name: str, pipeline: FlowMoPipeline, args: argparse.Namespace) -> list[FlowMoReconstructor]:
    """One for each combination of settings; they share the weights."""
    found = []
    for values in settings(args.sweep):
        changes = {key: value for key, value in values.items() if key in SCHEDULER}
        sampling = {key: value for key, value in values.items() if key in SAMPLER}
        scheduler = FlowMoScheduler.from_config(pipeline.scheduler.config, **changes)
        changed = FlowMoPipeline(pipeline.autoencoder, scheduler)
        changed.set_progress_bar_config(disable=True)
        label = ", ".join([name, *(f"{key} {value}" for key, value in values.items())])
        found.append(FlowMoReconstructor(changed, label, args.seed, sampling))
    return found


def packed_bytes(pipeline: FlowMoPipeline) -> int | None:
    """What the pipeline stores of an image, if its codes are discrete."""
    autoencoder = pipeline.autoencoder
    if not autoencoder.quantize.is_discrete:
        return None
    tokens, channels = autoencoder.config.num_latent_tokens, autoencoder.config.latent_channels
    return len(autoencoder.pack_codes(torch.ones(1, tokens, channels))[0])


def baselines(args: argparse.Namespace, budgets: Sequence[int], device: torch.device) -> list[Reconstructor]:
    """A codec without a quality is there once for each number of bytes."""
    names = row_names(args)
    return [
        load_baseline(word, num_bytes, device, DTYPES[args.dtype], names[word])
        for word in args.baseline
        for num_bytes in (budgets if word in CODECS else (None,))
    ]


def peer_group(reconstructor: Reconstructor) -> str:
    """A codec's qualities are one curve, its numbers of bytes, which are counted in another way, another."""
    codec = reconstructor.settings.get("codec")
    if codec is None:
        return reconstructor.name
    return f"{codec} files" if reconstructor.settings["quality"] else f"{codec}, packed"


def measure_all(
    reconstructor: Reconstructor,
    evaluation: ReconstructionEvaluation,
    source: ImageSource,
    transform: ImageTransform,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> Chunks:
    """The rows of all images. Every process must call this."""
    description = {
        "images": source.fingerprint(),
        "transform": transform.to_dict(),
        **evaluation.description,
        "reconstructor": reconstructor.settings,
    }
    folder = args.output_dir / "rows" / json_digest({**description, "chunk_size": args.chunk_size})
    rows = Chunks(folder, description, len(source), args.chunk_size)
    measure_images(
        source,
        transform,
        rows,
        partial(measure, reconstructor, evaluation, accelerator.device),
        accelerator,
        args.batch_size,
        args.dataloader_num_workers,
        reconstructor.name,
    )
    return rows


def summarize(
    group: str,
    reconstructor: Reconstructor,
    evaluation: ReconstructionEvaluation,
    rows: Chunks,
    originals: Chunks | None,
    others: Chunks | None,
    transform: ImageTransform,
    args: argparse.Namespace,
) -> dict:
    """One row of the table."""
    bad = describe_bad(rows, args.max_bad_fraction)
    figures = evaluation.figures(rows, originals, transform.height * transform.width)
    if others is not None:
        figures |= evaluation.manifold_figures(rows, others, f"_{args.reference_split}")
    figures["images_per_second"] = 1 / rows.read("seconds")["seconds"].mean().item()
    if isinstance(reconstructor, FlowMoReconstructor):
        figures["forwards"] = reconstructor.pipeline.num_forwards(**reconstructor.sampling)
    figures |= code_figures(rows, reconstructor)
    return {
        "name": reconstructor.name,
        "group": group,
        "settings": reconstructor.settings,
        "figures": figures,
        "bad_images": bad,
    }


def measure(
    reconstructor: Reconstructor,
    evaluation: ReconstructionEvaluation,
    device: torch.device,
    images: torch.Tensor,
    numbers: Sequence[int],
) -> dict[str, torch.Tensor]:
    images = images.to(device)
    started = time.perf_counter()
    reconstruction = reconstructor(images, numbers)  # ends on the CPU, so nothing is still running
    seconds = (time.perf_counter() - started) / len(images)
    return {**evaluation.rows(images, reconstruction), "seconds": torch.full((len(images),), seconds)}


def draw(
    rows: Chunks, reconstructor: Reconstructor, source: ImageSource, transform: ImageTransform, count: int, path: Path
) -> None:
    """A picture of the images with the best, median and worst PSNR beside their reconstructions."""
    measured = rows.read("number", "squared_error")
    order = measured["number"][measured["squared_error"].argsort(stable=True)].tolist()
    middle = max((len(order) - count) // 2, 0)
    shown = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:]}
    error = dict(zip(measured["number"].tolist(), measured["squared_error"].tolist(), strict=True))
    pictures = {}
    for kind, numbers in shown.items():
        originals = torch.stack([transform(source[number]) for number in numbers])
        values = [psnr_of(torch.tensor(error[number])).item() for number in numbers]
        pictures[f"{kind}: originals"] = originals
        pictures[f"{kind}: {min(values):.1f} to {max(values):.1f} dB"] = reconstructor(originals, numbers).images
    save_rows(pictures, transform, path)


def draw_together(
    reconstructors: Sequence[Reconstructor],
    numbers: Sequence[int],
    source: ImageSource,
    transform: ImageTransform,
    path: Path,
) -> None:
    """A picture of the images of these numbers and of what every reconstructor makes of them, to compare by eye."""
    originals = torch.stack([transform(source[number]) for number in numbers])
    pictures = {each.name: each(originals, numbers).images for each in reconstructors}
    save_rows({"originals": originals, **pictures}, transform, path)


def save_rows(rows: Mapping[str, torch.Tensor], transform: ImageTransform, path: Path) -> None:
    with atomic_file(path) as temporary:
        labelled_rows(rows, side=min(max(transform.height, 96), 256)).save(temporary, format="PNG")


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = build_accelerator(args.output_dir, args.batch_size)
    device = accelerator.device
    protocol = build_protocol(args)
    with accelerator.main_process_first():  # who fills the caches for the others
        source = build_source(args)
        reference = build_source(args, args.reference_split) if args.reference_split else None
        found = pipelines(args, device)
        budgets = args.baseline_bytes or sorted({packed_bytes(p) for _, p in found} - {None})
        peers = baselines(args, budgets, device)
        network = build_network(args, protocol).to(device) if "rfid" in args.metrics else None
        distances = {
            name: load_perceptual_network(
                name.replace("_", "-"), args.lpips_weights if name == "lpips_vgg" else None
            ).to(device)
            for name in ("lpips_vgg", "lpips_alex")
            if name in args.metrics
        }
    size = args.resolution or sample_size(found)
    transform = ImageTransform(size, interpolation=args.interpolation, crop=args.crop)
    evaluation = ReconstructionEvaluation(protocol, distances, network, "precision_recall" in args.metrics)
    conditions = {
        "dataset": str(args.dataset),
        "images": len(source),
        **transform.to_dict(),
        **protocol.to_dict(),
        "network": network and network.description,
    }
    if accelerator.is_main_process:
        print("protocol: " + ", ".join(f"{name} {value}" for name, value in conditions.items()), flush=True)
    features = partial(
        image_features,
        transform=transform,
        network=network,
        cache_dir=feature_cache(args),
        accelerator=accelerator,
        rounding=protocol.network_rounding,
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
    )
    originals = None if network is None else features(source, label="originals")
    others = None if reference is None else features(reference, label=f"{args.reference_split} images")
    subjects = [(name, each) for name, pipeline in found for each in flowmo_reconstructors(name, pipeline, args)]
    subjects += [(peer_group(each), each) for each in peers]
    results = []
    for group, reconstructor in subjects:
        rows = measure_all(reconstructor, evaluation, source, transform, args, accelerator)
        if accelerator.is_main_process:
            results.append(summarize(group, reconstructor, evaluation, rows, originals, others, transform, args))
            report(args, conditions, results, device)
            draw(rows, reconstructor, source, transform, args.num_picture_images, picture_path(args, reconstructor))
    if accelerator.is_main_process and len(subjects) > 1:
        numbers = rows.read("number")["number"].sort().values[: args.num_picture_images].tolist()
        reconstructors = [each for _, each in subjects]
        draw_together(reconstructors, numbers, source, transform, args.output_dir / "together.png")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def report(args: argparse.Namespace, conditions: dict, results: list[dict], device: torch.device) -> None:
    """Writes everything that is known so far."""
    write_json(
        args.output_dir / "metrics.json",
        {"protocol": conditions, "results": results, "environment": environment(device)},
    )
    table = markdown_table(results)
    with atomic_file(args.output_dir / "metrics.md") as path:
        path.write_text(table)
    print(table, flush=True)
    if len({result["group"] for result in results}) > 1:
        plot_figures(results, args.output_dir / "rate_distortion.png")
    by_steps = [{**each, "group": curve(each["name"])} for each in results if "forwards" in each["figures"]]
    if len({each["figures"]["forwards"] for each in by_steps}) > 1:
        plot_figures(by_steps, args.output_dir / "forwards.png", against="forwards")


def curve(name: str) -> str:
    """The name of a setting without its number of steps."""
    return re.sub(r", num_inference_steps \d+", "", name)


def picture_path(args: argparse.Namespace, reconstructor: Reconstructor) -> Path:
    return args.output_dir / "pictures" / (re.sub(r"[^\w.-]+", "_", reconstructor.name) + ".png")


def sample_size(found: Sequence[tuple[str, FlowMoPipeline]]) -> int:
    """The one size of all pipelines."""
    sizes = {name: pipeline.autoencoder.config.sample_size for name, pipeline in found}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"--resolution must be given: the pipelines' own are {sizes}")
    return next(iter(sizes.values()))


if __name__ == "__main__":
    main(parse_args())
