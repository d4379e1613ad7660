"""
Converts a checkpoint of the published FlowMo code into a folder for `FlowMoPipeline.from_pretrained`, and back.

    python -m flowmo_diffusers.hub.convert flowmo_lo.pth flowmo-lo
    python -m flowmo_diffusers.hub.convert flowmo-lo flowmo_lo.pth
"""

import argparse
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from flowmo_diffusers.engine.files import atomic_file, atomic_folder
from flowmo_diffusers.hub.published import from_published, to_published
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler


WEIGHTS = {"ema": "model_ema_state_dict", "raw": "model_state_dict"}


def load_published(path: str | Path, weights: str = "ema", **given) -> FlowMoAutoencoder:
    """
    A published `.pth` as a [`FlowMoAutoencoder`].

    Args:
        path: A checkpoint of the published training; opened without running any code in it (`weights_only=True`).
        weights: "ema" (those to use) or "raw".
        given: Fields that shapes cannot tell; see [`~flowmo_diffusers.hub.published.infer_config`].

    Raises:
        OSError: If the file is missing or not such a checkpoint.
        ValueError: If its tensors are not a FlowMo model's, with their names.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"checkpoint {path} does not exist")
    try:
        # Memory-mapped, so that only the chosen weights are read; the older format of torch.save cannot be.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise OSError(f"checkpoint {path} cannot be read as tensors saved by torch: {error}") from error
    key = WEIGHTS[weights]
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict):
        found = sorted(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise OSError(f"checkpoint {path} holds no {key!r} (--weights {weights}); it holds {found}")
    return from_published(checkpoint[key], **given)


def save_published(model: FlowMoAutoencoder, path: str | Path) -> None:
    """Writes a model as a `.pth` that the published code loads; the same weights stand as raw and as EMA."""
    state_dict = to_published(model)
    with atomic_file(path) as temporary:
        torch.save({"total_steps": 0, "model_state_dict": state_dict, "model_ema_state_dict": state_dict}, temporary)


def build_parser() -> argparse.ArgumentParser:
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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
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
