"""The tokenizer of a command, and images as it takes and gives them."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from flowmo_diffusers.assets import asset_path
from flowmo_diffusers.cli.options import EMBEDDED
from flowmo_diffusers.data.decoding import BadImage, decode_image
from flowmo_diffusers.data.token_file import TokenFile
from flowmo_diffusers.data.tokens import tokenizer_identity
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.models.window_layout import count_windows, default_overlap
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without its bars of loading, which are there without a terminal too, and its warnings, some of no matter."""
    former = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(former)
        logging.enable_progress_bar()


@dataclass
class Tokenizer:
    """
    Args:
        pipeline: On its device, in its dtype.
        identity: Of its float32 weights; see [`tokenizer_identity`]. `None` where its codes are not discrete.
        name: The last part of where it is from.
    """

    pipeline: FlowMoPipeline
    identity: dict[str, Any] | None
    name: str

    def sizes(self, height: int, width: int, window_size: int = 0, window_overlap: int = 0) -> dict[str, int]:
        """
        What a [`TokenFile`] says of an image.

        Args:
            height: In pixels, as is `width`.
            window_size: 0 without windows.
        """
        autoencoder = self.pipeline.autoencoder
        return {
            "height": height,
            "width": width,
            "num_tokens": autoencoder.config.num_latent_tokens,
            "bits_per_token": autoencoder.bits_per_token,
            "num_rows": count_windows(height, width, window_size, window_overlap) if window_size else 1,
            "window": window_size,
            "overlap": window_overlap,
        }

    def pack(self, indices: torch.Tensor, **sizes: int) -> list[TokenFile]:
        """
        Args:
            indices: (b, tokens, groups), or (b, windows, tokens, groups).
            sizes: Of [`~Tokenizer.sizes`].
        """
        autoencoder = self.pipeline.autoencoder
        packed = autoencoder.pack_codes(autoencoder.indices_to_codes(indices.flatten(0, -3)))
        rows = sizes["num_rows"]
        return [
            TokenFile(
                tokenizer=self.identity["digest"],
                codes=b"".join(packed[first : first + rows]),
                name=self.name,
                **sizes,
            )
            for first in range(0, len(packed), rows)
        ]


@quiet_diffusers()
def load_tokenizer(args: argparse.Namespace, discrete: bool = True) -> Tokenizer:
    """
    The tokenizer `args.model`, a folder, a Hub id or the name of an embedded one.

    Raises:
        OSError: If there is none.
        ValueError: If it is no tokenizer, and as [`prepare`].
    """
    pipeline = FlowMoPipeline.from_pretrained(locate(args.model), dtype=torch.float32)
    return prepare(pipeline, args, args.model, discrete)


def prepare(pipeline: FlowMoPipeline, args: argparse.Namespace, model: str, discrete: bool = True) -> Tokenizer:
    """
    Args:
        pipeline: In float32.
        model: Where it is from.
        discrete: Whether its codes must be.

    Raises:
        ValueError: If its codes are not discrete, or the device or `args.rho` cannot be.
    """
    identity = tokenizer_identity(pipeline.autoencoder) if discrete else None
    if getattr(args, "rho", None) is not None:
        scheduler = FlowMoScheduler.from_config(pipeline.scheduler.config, rho=args.rho)
        pipeline = FlowMoPipeline(pipeline.autoencoder, scheduler)
    name = Path(model).resolve().name
    return Tokenizer(to_device(pipeline, args), identity, name if name.isprintable() else "")


def locate(model: str) -> str | Path:
    """Where a pipeline is loaded from; what exists here goes before what is embedded."""
    return asset_path(model) if model in EMBEDDED and not Path(model).exists() else model


def to_device(pipeline: DiffusionPipeline, args: argparse.Namespace) -> DiffusionPipeline:
    """Raises `ValueError` if there is no such device."""
    device = args.device
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        pipeline.to(torch.device(device), getattr(torch, args.dtype))
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for CUDA
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    pipeline.set_progress_bar_config(disable=None, leave=False)  # silent where there is no terminal
    return pipeline


def sampling(args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """The options of [`add_sampling_options`] as arguments of a pipeline's call."""
    names = (f"{prefix}{name}" for name in ("num_inference_steps", "guidance_scale", "guidance_interval"))
    return {name: getattr(args, name) for name in names}


def generators(seed: int, count: int) -> list[torch.Generator]:
    """The same for each image, so that its noise depends on no other."""
    return [torch.Generator().manual_seed(seed) for _ in range(count)]


def image_reader(args: argparse.Namespace, pipeline: FlowMoPipeline) -> Callable[[Path], torch.Tensor]:
    """
    By the options of [`add_size_options`] and [`add_window_options`], a function of an image's path that gives
    (1, channels, h, w) in [-1, 1]. Where proportions are kept it resizes as training does, else as the pipeline.

    Raises:
        ValueError: If the size is not a multiple of the patch size and there are no windows, or these cannot be; the
            function, if an image cannot be used.
    """
    side = pipeline.autoencoder.config.sample_size
    height, width = (args.height, args.width) if args.height else args.resolution or (side, side)
    pipeline.check_inputs((1, 3, height, width), None, None, None, None, "pil", (), **windows(args, pipeline))
    if args.keep_size or args.windows and not (args.height or args.resolution):
        patch = 1 if args.windows else pipeline.autoencoder.config.patch_size
        return lambda path: _own_size(decode_image(path), patch, pipeline)
    if args.height:
        return lambda path: pipeline.image_processor.preprocess(decode_image(path), height, width)
    transform = ImageTransform((height, width))
    return lambda path: transform(decode_image(path))[None]


def windows(args: argparse.Namespace, pipeline: FlowMoPipeline) -> dict[str, int]:
    """The options of [`add_window_options`] as arguments of a pipeline's call; none where there are no windows."""
    if not args.windows:
        return {}
    size = args.window_size or pipeline.autoencoder.config.sample_size
    overlap = default_overlap(size) if args.window_overlap is None else args.window_overlap
    return {"window_size": size, "window_overlap": overlap}


def window_batch_size(args: argparse.Namespace, count: int) -> int:
    """How many windows of each of so many images at a time, so that there is room where there is for images."""
    return args.window_batch_size or max(1, args.batch_size // count)


def _own_size(image: PIL.Image.Image, patch: int, pipeline: FlowMoPipeline) -> torch.Tensor:
    if min(image.size) < patch:
        raise BadImage(f"{image.height} x {image.width} pixels are less than a patch of {patch} x {patch}")
    height, width = (side // patch * patch for side in (image.height, image.width))
    return pipeline.image_processor.preprocess(image, height, width)


def save_image(image: PIL.Image.Image, path: Path) -> None:
    """In the format that the path's extension names."""
    with atomic_file(path) as temporary:
        image.save(temporary)
