"""
Images of classes.

    flowmo generate --labels Flags 6 --num_images 4 --output generated
    flowmo generate --labels "Smileys & Emotion" --guidance_scale 2 --decoder_steps 8 --seed 1 --output generated
    flowmo generate --model my_generator --labels 207 none --tokens --output generated

A label is a class's number, its name, or "none" for an image of no class; `flowmo inspect MODEL` lists them. The model
is the embedded starter generator unless another is named. Image k of a class is the same whatever else is generated.
"""

import argparse

from flowmo_diffusers.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--labels", nargs="+", required=True, help="classes, by number or name, or 'none'")
    add("--num_images", type=options.positive, default=1, help="of each class")
    add("--num_inference_steps", "--steps", type=options.positive, help="in which tokens are filled in; default: 64")
    add("--guidance_scale", type=float, default=1.0, help="w of classifier-free guidance of the tokens; 1 is none")
    add("--resolution", type=options.resolution, help="side in pixels, or HEIGHTxWIDTH; default: the tokenizer's")
    options.add_output_options(parser, "folder for the PNGs")
    add("--tokens", action="store_true", help="write a token file of each image too")
    options.add_model_options(parser, options.STARTER_GENERATOR)
    add("--tokenizer", help="pipeline whose tokens these are, where the model's folder does not hold it")
    options.add_sampling_options(parser, "decoder_")
    options.add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(f"--output {args.output} is not a folder")
    from flowmo_diffusers.cli.files import Job
    from flowmo_diffusers.cli.generator import class_ids, file_name, load_generator
    from flowmo_diffusers.cli.tokenizer import sampling, save_image
    from flowmo_diffusers.cli.work import Work
    from flowmo_diffusers.data.token_file import SUFFIX
    from flowmo_diffusers.engine.seeding import keyed_generator

    pipeline, tokenizer = load_generator(args)
    labels = dict(zip(class_ids(pipeline, args.labels), args.labels, strict=True))
    wanted = {
        Job(f"{label} {k}", args.output / f"{file_name(pipeline, number)}-{k:04}.png"): (number, k)
        for number, label in labels.items()
        for k in range(args.num_images)
    }
    height, width = args.resolution or (None, None)
    work = Work(list(wanted), args.overwrite)
    for start in range(0, len(work.jobs), args.batch_size):
        jobs = work.jobs[start : start + args.batch_size]
        numbers = [wanted[job] for job in jobs]
        output = pipeline(
            [None if number == pipeline.generator.null_class else number for number, _ in numbers],
            height,
            width,
            args.num_inference_steps,
            args.guidance_scale,
            generator=[keyed_generator(args.seed, f"class {number}", k) for number, k in numbers],
            **sampling(args, "decoder_"),
        )
        if args.tokens:
            sizes = tokenizer.sizes(output.images[0].height, output.images[0].width)
            for job, file in zip(jobs, tokenizer.pack(output.indices, **sizes), strict=True):
                file.write(job.target.with_suffix(SUFFIX))
        for job, image in zip(jobs, output.images, strict=True):  # last: a job is done when its image is there
            save_image(image, job.target)
            work.done(job, f"{image.height} x {image.width} pixels")
    return work.finish()
