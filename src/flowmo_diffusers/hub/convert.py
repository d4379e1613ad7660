"""
Converts a checkpoint of the published FlowMo code into a folder for `FlowMoPipeline.from_pretrained`, and back.

    python -m flowmo_diffusers.hub.convert flowmo_lo.pth flowmo-lo
    python -m flowmo_diffusers.hub.convert flowmo-lo flowmo_lo.pth
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from flowmo_diffusers.engine.files import atomic_file, atomic_folder
from flowmo_diffusers.hub.convert_options import add_arguments
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.models.published import to_published
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.published import load_published
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler


def save_published(model: FlowMoAutoencoder, path: str | Path) -> None:
    """Writes a model as a `.pth` that the published code loads; the same weights stand as raw and as EMA."""
    state_dict = to_published(model)
    with atomic_file(path) as temporary:
        torch.save({"total_steps": 0, "model_state_dict": state_dict, "model_ema_state_dict": state_dict}, temporary)


def convert(args: argparse.Namespace) -> None:
    """
    In the direction that the source tells; see [`~flowmo_diffusers.hub.convert_options.add_arguments`].

    Raises:
        OSError: As [`load_published`] and `from_pretrained`.
        ValueError: As these.
    """
    if args.source.is_dir():
        save_published(FlowMoPipeline.from_pretrained(args.source).autoencoder, args.output)
    else:
        told = ("rope_axes", "codebook_bits", "sample_size", "num_latent_tokens", "quantizer")
        model = load_published(args.source, args.weights, **{name: getattr(args, name) for name in told})
        with atomic_folder(args.output) as folder:
            FlowMoPipeline(model, FlowMoScheduler()).save_pretrained(folder)
    print(f"written to {args.output}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowmo_diffusers.hub.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        convert(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
