"""Options that several commands have."""

import argparse
from pathlib import Path

from flowmo_diffusers.engine.options import resolution
from flowmo_diffusers.models.window_layout import count_windows


STARTER = "starter"
STARTER_GENERATOR = "starter_generator"
EMBEDDED = (STARTER, STARTER_GENERATOR)
EMBEDDED_TOKENIZERS = {STARTER_GENERATOR: STARTER}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 0")
    return int(text)


def add_output_options(parser: argparse.ArgumentParser, help: str) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help=help)
    add("--overwrite", action="store_true", help="write files anew that exist; otherwise they are kept")


def add_model_options(parser: argparse.ArgumentParser, default: str = STARTER) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default=default, help=f"pipeline: a folder, a Hub id, or the embedded {default!r}, the default")
    add("--device", help="'cuda', 'cuda:1', 'mps', 'cpu' ...; default: an accelerator where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="that the model computes in")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("size of the images").add_argument
    text = "side in pixels, or HEIGHTxWIDTH, to which images are resized and cropped at the centre, as in training; "
    add("--resolution", type=resolution, help=text + "default: the model's sample_size")
    add("--height", type=positive, help="with --width: images are resized to exactly this, whatever their proportions")
    add("--width", type=positive, help="see --height")
    add("--keep_size", action="store_true", help="images keep their own size, down to a multiple of the patch size")


def add_window_options(parser: argparse.ArgumentParser, told: bool = False) -> None:
    """
    `args.windows` says whether there are any, after [`check_size_options`].

    Args:
        told: Whether the windows are told by what is read.
    """
    add = parser.add_argument_group("windows, for images of any size").add_argument
    if not told:
        text = "each image at its own size, to the pixel (or at that of --resolution, or --height and --width), in "
        text += "windows of the model's sample_size that overlap; each window has the tokens of one image"
        add("--windows", action="store_true", help=text)
        text = "side of a window in pixels, a multiple of the patch size; turns --windows on"
        add("--window_size", type=positive, help=text)
        text = "pixels that neighbours share at least (default: a quarter of the side); turns --windows on"
        add("--window_overlap", type=not_negative, help=text)
    text = "windows of each image at a time (default: as many as make --batch_size windows in all)"
    add("--window_batch_size", type=positive, help=text)


def check_size_options(args: argparse.Namespace) -> None:
    """Ends the program where they contradict each other."""
    args.windows = args.windows or args.window_size is not None or args.window_overlap is not None
    if args.window_batch_size and not args.windows:
        args.usage_error("--window_batch_size needs --windows")
    if (args.height is None) != (args.width is None):
        args.usage_error("--height and --width must be given together")
    if sum(map(bool, (args.resolution, args.height, args.keep_size))) > 1:
        args.usage_error("give one of --resolution, --height with --width, and --keep_size")


def size_text(height: int, width: int, window_size: int = 0, window_overlap: int = 0) -> str:
    """What a command prints of an image; `window_size` is 0 without windows."""
    text = f"{height} x {width} pixels"
    if not window_size:
        return text
    windows = count_windows(height, width, window_size, window_overlap)
    return f"{text} in {windows} window{'s' if windows > 1 else ''}"


def add_sampling_options(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """
    Of decoding.

    Args:
        prefix: Of the names of those that a generator has as well.
    """
    add = parser.add_argument_group("decoding (default: what the model's scheduler says)").add_argument
    names = [f"--{prefix}num_inference_steps", f"--{prefix}steps"]
    add(*names, type=positive, dest=f"{prefix}num_inference_steps", help="of the flow from noise to the image")
    add(f"--{prefix}guidance_scale", type=float, help="w of classifier-free guidance; 1 is none")
    add(f"--{prefix}guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels of guidance")
    add("--rho", type=float, help="power of the grid of times; 1 is an even one")


def add_run_options(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    add = parser.add_argument_group("run").add_argument
    if seed:
        add("--seed", type=not_negative, default=0, help="of the noise; an image is the same alone and among others")
    add("--batch_size", type=positive, default=8, help="images at a time")
