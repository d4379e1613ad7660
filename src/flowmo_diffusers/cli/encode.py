"""
Images to token files.

    flowmo encode photo.jpg --output photo.flowmo
    flowmo encode photos more/photo.png --output tokens
    flowmo encode photos --model my_flowmo --resolution 256 --output tokens --overwrite

A token file is the packed codes, 43 bytes around them, and the name of the model. `flowmo decode` makes images of them
again, by the same model; `flowmo inspect` shows what is in them. Folders keep their structure. Images that cannot be
read are named and passed over; the exit code is then 1.
"""

import argparse
from pathlib import Path

from flowmo_diffusers.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IMAGE|FOLDER")
    options.add_output_options(parser, "folder for the token files, or a .flowmo file for one image")
    options.add_model_options(parser)
    options.add_size_options(parser)
    options.add_run_options(parser, seed=False)


def run(args: argparse.Namespace) -> int:
    options.check_size_options(args)
    import torch

    from flowmo_diffusers.cli.files import plan
    from flowmo_diffusers.cli.tokenizer import image_reader, load_tokenizer
    from flowmo_diffusers.cli.work import Work
    from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS
    from flowmo_diffusers.data.token_file import SUFFIX

    work = Work(plan(args, IMAGE_EXTENSIONS, (SUFFIX,), SUFFIX), args.overwrite)
    if not work.jobs:
        return work.finish()
    tokenizer = load_tokenizer(args)
    read = image_reader(args, tokenizer.pipeline)
    for jobs, images in work.batches(read, lambda image: image.shape, args.batch_size):
        indices = tokenizer.pipeline.encode(torch.cat(images))
        for job, file in zip(jobs, tokenizer.pack(indices, *images[0].shape[-2:]), strict=True):
            file.write(job.target)
            work.done(job, f"{file.height} x {file.width} pixels, {job.target.stat().st_size} bytes")
    return work.finish()
