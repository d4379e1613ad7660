#!/usr/bin/env python
"""
The demo of `make demo`, all on what the package embeds: the starter tokenizer reconstructs images it never saw, then
the training script pre-trains and post-trains a tokenizer for a few minutes, and the same images are reconstructed
after each stage. The starter generator samples each class, and a generator is trained for a minute on the starter's
tokens. Writes `demo.png`, `generated.png` and `metrics.json`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from flowmo_diffusers import FlowMoAutoencoder, FlowMoGenerationPipeline, FlowMoPipeline
from flowmo_diffusers.assets import asset_path
from flowmo_diffusers.data.images import load_images, stack_images
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.metrics.class_samples import class_samples
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.objectives.perceptual import load_perceptual_network


HERE = Path(__file__).parent
NUM_IMAGES = 128
# A few minutes of each stage on 2 CPU cores, with an EMA to match; without these the preset's own, full lengths hold.
SHORT = {
    "pretrain": {"max_train_steps": 300, "ema_decay": 0.98},
    "posttrain": {"max_train_steps": 40, "ema_decay": 0.9},
    "generator": {"max_train_steps": 80, "lr_warmup_steps": 20, "ema_decay": 0.9, "num_inference_steps": 16},
}
# Name, preset and stage of the runs from nothing to the starter, each from the last one's result.
FROM_SCRATCH = (
    ("pre-training on emoji", "starter", "pretrain"),
    ("post-training on emoji", "starter", "posttrain"),
    ("pre-training on photos too", "starter_photos", "pretrain"),
    ("post-training on photos too", "starter_photos", "posttrain"),
    ("distillation", "starter_photos", "distill"),
)
SAMPLING = {"num_inference_steps": 64, "guidance_scale": 2.0}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--evaluate", type=Path, nargs="+", help="only measure these pipelines on the held-out images")
    parser.add_argument(
        "--from_scratch", action="store_true", help="train all the starter's presets to the end (hours)"
    )
    return parser.parse_args()


def precision() -> str:
    """bf16 where the processor computes in it; others imitate it, at a hundredth of the speed."""
    return "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


def run_script(name: str, *options: str | Path) -> float:
    """Runs one of the real scripts by `accelerate launch` and returns its seconds."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", str(HERE / name)]
    started = time.perf_counter()
    subprocess.run([*command, *map(str, options)], check=True)
    return time.perf_counter() - started


def train(preset: str, stage: str, output_dir: Path, *options: str | Path) -> float:
    """Trains a tokenizer by one of the starter's presets."""
    preset = ("--config", HERE / "configs" / f"{preset}.yaml", "--mixed_precision", precision())  # over the preset's
    return run_script("train_flowmo.py", *preset, "--stage", stage, "--output_dir", output_dir, *options)


def generate(starter: Path, output_dir: Path, from_scratch: bool) -> dict:
    """
    Samples of each class by the starter generator; then the tokens of the embedded images, and a generator trained on
    them for a minute.
    """
    tokenizer = FlowMoPipeline.from_pretrained(starter)
    pipeline = FlowMoGenerationPipeline.from_pretrained(asset_path("starter_generator"), **tokenizer.components)
    started = time.perf_counter()
    picture = class_samples(pipeline, **SAMPLING)
    figures = {"sampling_seconds": time.perf_counter() - started}
    with atomic_file(output_dir / "generated.png") as path:
        picture.save(path, format="PNG")

    tokens, trained = output_dir / "tokens", output_dir / "generator"
    if not from_scratch:
        shutil.rmtree(tokens, ignore_errors=True)
        shutil.rmtree(trained, ignore_errors=True)
    source = ("--pretrained_model_name_or_path", starter, "--dataset", "emoji", "--split", "train", "--flip")
    figures["tokenizing_seconds"] = run_script("tokenize_images.py", *source, "--output_dir", tokens)
    preset = ("--config", HERE / "configs" / "generator" / "starter.yaml", "--tokenizer", starter)
    options = steps("generator", from_scratch)
    data = ("--train_tokens_dir", tokens, "--output_dir", trained)
    figures["train_seconds"] = run_script("train_generator.py", *preset, *data, *options)
    record = json.loads((trained / "metrics.json").read_text())
    return figures | {name: record[name] for name in ("steps", "val/token_loss", "val/bits_per_bit")}


def steps(stage: str, from_scratch: bool) -> list[str]:
    """Options of a short run, or of one to the preset's end that goes on where it was left."""
    if from_scratch:
        return ["--resume_from_checkpoint", "latest"]
    short = SHORT[stage] | {"validation_steps": 0, "checkpointing_steps": 100_000}
    return [part for name, value in short.items() for part in (f"--{name}", str(value))]


def reconstruct(folder: Path, images: torch.Tensor, perceptual: torch.nn.Module) -> tuple[torch.Tensor, dict]:
    """The images through the tokens of the pipeline in `folder`, and the figures."""
    pipeline = FlowMoPipeline.from_pretrained(folder)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    output = pipeline(images, generator=generator, output_type="latent")
    seconds = time.perf_counter() - started
    packed = pipeline.autoencoder.pack_codes(pipeline.autoencoder.indices_to_codes(output.indices))
    # At 32 x 32 AlexNet sees little: its last maps are one pixel. Enlarged images are judged more strictly.
    enlarged = [torch.nn.functional.interpolate(part, 64, mode="bilinear") for part in (images, output.images)]
    figures = {
        "psnr": psnr(images, output.images).mean().item(),
        "lpips_alex": perceptual(images, output.images).mean().item(),
        "lpips_alex_enlarged_to_64": perceptual(*enlarged).mean().item(),
        "bytes_per_image": len(packed[0]),
        "seconds_per_image": seconds / len(images),
    }
    return output.images, figures


def main() -> None:
    args = parse_args()
    held_out = load_images("emoji+birds")["test"].pick(NUM_IMAGES)
    perceptual = load_perceptual_network("lpips-alex")
    starter = asset_path("starter")
    side = FlowMoAutoencoder.load_config(starter, subfolder="autoencoder")["sample_size"]
    images = stack_images(held_out, side)

    mean_colour = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    rows = {"original": images}
    metrics = {
        "images": NUM_IMAGES,
        "side": side,
        "mean colour": {"psnr": psnr(images, mean_colour).mean().item()},
    }

    def add(name: str, folder: Path, **more) -> None:
        rows[name], metrics[name] = reconstruct(folder, images, perceptual)
        metrics[name] |= more
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics[name].items()), flush=True)

    if args.evaluate:
        for folder in args.evaluate:
            add(str(folder), folder)
        return
    add("starter", starter)
    runs = FROM_SCRATCH if args.from_scratch else FROM_SCRATCH[:2]
    start: tuple[str | Path, ...] = ()
    for name, preset, stage in runs:
        folder = args.output_dir / name.replace(" ", "_")
        if not args.from_scratch:  # the long run continues where it was left
            shutil.rmtree(folder, ignore_errors=True)
        seconds = train(preset, stage, folder, *start, *steps(stage, args.from_scratch))
        add(name if args.from_scratch else f"a few minutes of {name}", folder, train_seconds=seconds)
        start = ("--pretrained_model_name_or_path", folder)

    picture = labelled_rows(
        {
            f"{name}   {metrics[name]['psnr']:.1f} dB, LPIPS {metrics[name]['lpips_alex']:.3f}"
            if name in metrics
            else name: row[:: NUM_IMAGES // 12][:12]
            for name, row in rows.items()
        }
    )
    with atomic_file(args.output_dir / "demo.png") as path:
        picture.save(path, format="PNG")
    metrics["generator"] = generate(starter, args.output_dir, args.from_scratch)
    with atomic_file(args.output_dir / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"painting each image in its mean colour would give {metrics['mean colour']['psnr']:.1f} dB")
    print("generator: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics["generator"].items()))
    print(f"written to {args.output_dir}: demo.png, generated.png, metrics.json")


if __name__ == "__main__":
    main()
