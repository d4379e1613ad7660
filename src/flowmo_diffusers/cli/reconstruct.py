"""
Images through tokens and back, and how close they come.

    flowmo reconstruct photo.jpg --output reconstructions
    flowmo reconstruct photos --output reconstructions --compare --num_inference_steps 8
    flowmo reconstruct photo.jpg --windows --output large.png
    flowmo reconstruct photos --model my_flowmo --resolution 256 --dtype bfloat16 --output reconstructions

Writes a PNG of each image, folders in their structure, and prints what its tokens take, its PSNR and its time. The
model is the embedded starter, of 32 x 32 pixels, unless another is named. Images are resized and cropped to the
model's size, unless other sizes are given; `--windows` keeps every pixel of an image of any size.
"""

import argparse
import time
from pathlib import Path

from flowmo_diffusers.cli import options
from flowmo_diffusers.models.window_layout import count_windows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IMAGE|FOLDER")
    options.add_output_options(parser, "folder for the PNGs, or an image file for one image")
    parser.add_argument("--compare", action="store_true", help="write the original beside it, at the left")
    options.add_model_options(parser)
    options.add_size_options(parser)
    options.add_window_options(parser)
    options.add_sampling_options(parser)
    options.add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    options.check_size_options(args)
    import torch

    from flowmo_diffusers.cli.files import plan
    from flowmo_diffusers.cli.tokenizer import (
        generators,
        image_reader,
        load_tokenizer,
        sampling,
        save_image,
        window_batch_size,
        windows,
    )
    from flowmo_diffusers.cli.work import Work
    from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS
    from flowmo_diffusers.metrics.reconstruction import mean_psnr, mean_squared_error, psnr_of

    work = Work(plan(args, IMAGE_EXTENSIONS, IMAGE_EXTENSIONS, ".png"), args.overwrite)
    if not work.jobs:
        return work.finish()
    pipeline = load_tokenizer(args, discrete=False).pipeline
    layout = windows(args, pipeline)
    errors = []
    for jobs, images in work.batches(image_reader(args, pipeline), lambda image: image.shape, args.batch_size):
        started = time.perf_counter()
        originals = torch.cat(images)
        reconstructions = pipeline(
            originals,
            generator=generators(args.seed, len(jobs)),
            output_type="latent",
            window_batch_size=window_batch_size(args, len(jobs)),
            **layout,
            **sampling(args),
        ).images.cpu()
        seconds = (time.perf_counter() - started) / len(jobs)
        errors.append(mean_squared_error(originals, reconstructions))
        shown = torch.cat([originals, reconstructions], dim=-1) if args.compare else reconstructions
        pictures = pipeline.image_processor.postprocess(shown, output_type="pil")
        size = _size(pipeline.autoencoder, *originals.shape[-2:], **layout)
        for job, picture, psnr in zip(jobs, pictures, psnr_of(errors[-1]).tolist(), strict=True):
            save_image(picture, job.target)
            work.done(job, f"{size}, PSNR {psnr:.2f} dB, {seconds:.2f} s")
    return work.finish(*([f"mean PSNR {mean_psnr(torch.cat(errors))[0]:.2f} dB"] if errors else []))


def _size(autoencoder, height: int, width: int, window_size: int = 0, window_overlap: int = 0) -> str:
    """What is stored of an image."""
    pixels = options.size_text(height, width, window_size, window_overlap)
    if not autoencoder.quantize.is_discrete:
        return f"{pixels}, continuous tokens"
    rows = count_windows(height, width, window_size, window_overlap) if window_size else 1
    bits = rows * autoencoder.config.num_latent_tokens * autoencoder.bits_per_token
    per_pixel = bits / (height * width)
    return f"{pixels}, {bits} bits = {rows * autoencoder.bytes_per_image} bytes ({per_pixel:.3g} a pixel)"
