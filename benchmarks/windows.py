#!/usr/bin/env python
"""
Seams, quality and time of images that are reconstructed in windows, against the same windows without overlap (tiles).

    python benchmarks/windows.py photo.png --window_size 32 --overlaps 0 4 8 16 --output_dir windows

Takes any size. Writes `windows.json`, and `windows.png` with the middle of each reconstruction.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch

from flowmo_diffusers import FlowMoPipeline, starter
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.metrics.report import environment, markdown_table, write_json
from flowmo_diffusers.metrics.seams import seam_ratio
from flowmo_diffusers.models.windows import Windows
from flowmo_diffusers.pipelines.images import images_to_tensor


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--pretrained_model_name_or_path", default=starter())
    parser.add_argument("--window_size", type=int, help="Default: the model's own size.")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 4, 8, 16], help="In pixels; 0 is tiles.")
    parser.add_argument("--window_batch_size", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(args)


def measure(pipe: FlowMoPipeline, x: torch.Tensor, overlap: int, args: argparse.Namespace) -> dict:
    """Figures of one overlap, and the reconstruction (1, 3, h, w)."""
    windows = Windows(*x.shape[-2:], args.window_size, overlap)
    started = time.perf_counter()
    y = pipe(
        x.to(args.device),
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="latent",
        window_size=args.window_size,
        window_overlap=overlap,
        window_batch_size=args.window_batch_size,
    ).images.cpu()
    seconds = time.perf_counter() - started
    figures = {
        "windows": len(windows),
        "bits_per_pixel": 8 * len(windows) * pipe.autoencoder.bytes_per_image / x[0, 0].numel(),
        "psnr": psnr(x, y).item(),
        "seam_ratio": seam_ratio(y, x, *windows.borders()),
        "seconds": seconds,
    }
    return {"name": "tiles" if overlap == 0 else f"overlap {overlap}", "figures": figures, "image": y}


def main(args: argparse.Namespace) -> None:
    pipe = FlowMoPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    if args.window_size is None:
        args.window_size = pipe.autoencoder.config.sample_size
    x = images_to_tensor(PIL.Image.open(args.image).convert("RGB"))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = [measure(pipe, x, overlap, args) for overlap in args.overlaps]
    side = 4 * args.window_size
    top, left = ((length - side) // 2 for length in x.shape[-2:])
    rows = {"original": x} | {result["name"]: result.pop("image") for result in results}
    picture = labelled_rows({name: y[..., top : top + side, left : left + side] for name, y in rows.items()}, 3 * side)
    picture.save(args.output_dir / "windows.png")
    size = {"height": x.shape[-2], "width": x.shape[-1], "window_size": args.window_size}
    write_json(args.output_dir / "windows.json", {**environment(pipe.device), **size, "results": results})
    print(markdown_table(results), end="")


if __name__ == "__main__":
    main(parse_args())
