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
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.models.published import to_published
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.published import WEIGHTS, load_published
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler


def save_published(model: FlowMoAutoencoder, path: str | Path) -> None:
    """Writes a model as a `.pth` that the published code loads; the same weights stand as raw and as EMA."""
    state_dict = to_published(model)
    with atomic_file(path) as temporary:
        torch.save({"total_steps": 0, "model_state_dict": state_dict, "model_ema_state_dict": state_dict}, temporary)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowmo_diffusers.hub.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a published .pth, or a folder of this library to convert back")
    parser.add_argument("output", type=Path, help="the folder, or the .pth, to write")
    parser.add_argument("--weights", choices=list(WEIGHTS), default="ema")
    told = parser.add_argument_group("what the shapes of a checkpoint cannot tell (default: the published values)")
    told.add_argument("--rope_axes", type=int, nargs=3, metavar=("TOKEN", "ROW", "COLUMN"))
    told.add_argument("--codebook_bits", type=int)
    told.add_argument("--sample_size", type=int)
    told.add_argument("--num_latent_tokens", type=int)
    told.add_argument("--quantizer", choices=["lfq", "kl", "none"])
    args = parser.parse_args(argv)
    try:
        if args.source.is_dir():
            save_published(FlowMoPipeline.from_pretrained(args.source).autoencoder, args.output)
        else:
            given = {
                name: getattr(args, name)
                for name in ("rope_axes", "codebook_bits", "sample_size", "num_latent_tokens", "quantizer")
            }
            model = load_published(args.source, args.weights, **given)
            with atomic_folder(args.output) as folder:
                FlowMoPipeline(model, FlowMoScheduler()).save_pretrained(folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
