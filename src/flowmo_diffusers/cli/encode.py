"""
Images to token files.

    flowmo encode photo.jpg --output photo.flowmo
    flowmo encode photos more/photo.png --output tokens
    flowmo encode photo.jpg --windows --output photo.flowmo
    flowmo encode photos --model my_flowmo --resolution 256 --output tokens --overwrite

Images are resized and cropped to the model's size, unless other sizes are given; `--windows` keeps every pixel of an
image of any size. A token file is the packed codes, 43 bytes around them, and the name of the model. `flowmo decode`
makes images of them again, by the same model; `flowmo inspect` shows what is in them. Folders keep their structure.
Images that cannot be read are named and passed over; the exit code is then 1.
"""

import argparse
from pathlib import Path

from flowmo_diffusers.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IMAGE|FOLDER")
    options.add_output_options(parser, "folder for the token files, or a .flowmo file for one image")
    options.add_model_options(parser)
    options.add_size_options(parser)
    options.add_window_options(parser)
    options.add_run_options(parser, seed=False)


def run(args: argparse.Namespace) -> int:
    options.check_size_options(args)
    import torch

    from flowmo_diffusers.cli.files import plan
    from flowmo_diffusers.cli.tokenizer import image_reader, load_tokenizer, window_batch_size, windows
    from flowmo_diffusers.cli.work import Work
    from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS
    from flowmo_diffusers.data.token_file import SUFFIX, check_sizes

    work = Work(plan(args, IMAGE_EXTENSIONS, (SUFFIX,), SUFFIX), args.overwrite)
    if not work.jobs:
        return work.finish()
    tokenizer = load_tokenizer(args)
    layout = windows(args, tokenizer.pipeline)
    read_image = image_reader(args, tokenizer.pipeline)

    def read(path: Path) -> torch.Tensor:
        image = read_image(path)
        check_sizes(**tokenizer.sizes(*image.shape[-2:], **layout))  # before it is encoded
        return image

    for jobs, images in work.batches(read, lambda image: image.shape, args.batch_size):
        count = window_batch_size(args, len(jobs))
        indices = tokenizer.pipeline.encode(torch.cat(images), **layout, window_batch_size=count)
        sizes = tokenizer.sizes(*images[0].shape[-2:], **layout)
        for job, file in zip(jobs, tokenizer.pack(indices, **sizes), strict=True):
            file.write(job.target)
            pixels = options.size_text(file.height, file.width, **file.windows)
            work.done(job, f"{pixels}, {job.target.stat().st_size} bytes")
    return work.finish()
