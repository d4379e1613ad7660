"""The command line of [`flowmo_diffusers.hub.convert`], without what takes time to import."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to convert, where to, and what a checkpoint does not tell."""
    parser.add_argument("source", type=Path, help="a published .pth, or a folder of this library to convert back")
    parser.add_argument("output", type=Path, help="the folder, or the .pth, to write")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema")
    told = parser.add_argument_group("what the shapes of a checkpoint cannot tell (default: the published values)")
    told.add_argument("--rope_axes", type=int, nargs=3, metavar=("TOKEN", "ROW", "COLUMN"))
    told.add_argument("--codebook_bits", type=int)
    told.add_argument("--sample_size", type=int)
    told.add_argument("--num_latent_tokens", type=int)
    told.add_argument("--quantizer", choices=["lfq", "kl", "none"])
