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
from flowmo_diffusers.hub.convert_options import WEIGHTS, add_arguments
from flowmo_diffusers.hub.published import from_published, to_published
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowmo_diffusers.hub.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        convert(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
