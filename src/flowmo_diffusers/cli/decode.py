"""
Token files to images.

    flowmo decode photo.flowmo --output photo.png
    flowmo decode tokens --output images --num_inference_steps 8 --seed 1
    flowmo decode tokens --model my_flowmo --output images

The size of an image, and the windows in which it was encoded, are those that its file says. The model must be the one
that made the tokens; its decoder may be trained on. An image depends on its tokens, the options and the seed, not on
the files beside it. Files that are damaged, something else, or of another model are named and passed over; the exit
code is then 1.
"""

import argparse
from pathlib import Path

from flowmo_diffusers.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", metavar="FILE|FOLDER")
    options.add_output_options(parser, "folder for PNGs, or an image file for one token file")
    options.add_model_options(parser)
    options.add_sampling_options(parser)
    options.add_window_options(parser, told=True)
    options.add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    from flowmo_diffusers.cli.files import plan
    from flowmo_diffusers.cli.tokenizer import generators, load_tokenizer, sampling, save_image, window_batch_size
    from flowmo_diffusers.cli.work import Work
    from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS
    from flowmo_diffusers.data.token_file import SUFFIX, TokenFile

    work = Work(plan(args, (SUFFIX,), IMAGE_EXTENSIONS, ".png"), args.overwrite)
    if not work.jobs:
        return work.finish()
    tokenizer = load_tokenizer(args)
    pipeline = tokenizer.pipeline

    def read(path: Path) -> TokenFile:
        file = TokenFile.read(path)
        file.check_tokenizer(tokenizer.identity)
        pipeline.check_inputs((1, 3, file.height, file.width), None, None, None, None, "pil", (), **file.windows)
        return file

    def size(file: TokenFile) -> tuple[int, ...]:
        return file.height, file.width, file.window, file.overlap

    for jobs, files in work.batches(read, size, args.batch_size):
        images = pipeline.decode(
            [file.codes for file in files],
            files[0].height,
            files[0].width,
            generator=generators(args.seed, len(jobs)),
            window_batch_size=window_batch_size(args, len(jobs)),
            **files[0].windows,
            **sampling(args),
        )
        for job, image in zip(jobs, images, strict=True):
            save_image(image, job.target)
            work.done(job, options.size_text(image.height, image.width, **files[0].windows))
    return work.finish()
