"""What the demo page computes. Nothing here knows of the page, and no call leaves a trace for the next one."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

from flowmo_diffusers.data.decoding import decode_image
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.models.windows import Windows
from flowmo_diffusers.page.bits import flip_bits, mix_tokens, unpack
from flowmo_diffusers.page.bits import pack as pack_bits
from flowmo_diffusers.pipelines.animation import Trajectory
from flowmo_diffusers.pipelines.images import images_to_tensor
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.pipeline_generation import FlowMoGenerationPipeline
from flowmo_diffusers.pipelines.saving import Callback
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler
from flowmo_diffusers.schedulers.scheduling_flowmo_tokens import FlowMoTokenScheduler


# The largest image that is taken whole, as a multiple of the model's own area: 121 windows of a square, 170 at most.
MAX_AREA = 64
WINDOW_BATCH_SIZE = 8

# Told after each step how many are done, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """
    How tokens are decoded.

    Args:
        num_inference_steps: See [`FlowMoPipeline`] for this and the next.
        guidance_scale: 1 is none.
        rho: Of the [`FlowMoScheduler`].
        seed: Of the noise, which is the same for all images of a call.
    """

    num_inference_steps: int
    guidance_scale: float
    rho: float
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """
    Args:
        bits: Of an image's tokens, of all its windows.
        num_bytes: Likewise, packed.
        bits_per_pixel: bits / (height x width).
        forwards: How often an image, or each of its windows, passes through the decoder.
        seconds: Of the model, for all images.
        psnr: In dB, of the two images that are compared; `None` where none are.
        changed: Bits that differ from the image's own; `None` where nothing was edited.
        windows: How many; `None` where the image was not seen in windows.
    """

    bits: int
    num_bytes: int
    bits_per_pixel: float
    forwards: int
    seconds: float
    psnr: float | None = None
    changed: int | None = None
    windows: int | None = None


@dataclass(frozen=True)
class Reconstruction:
    """
    Args:
        original: The image as the model was given it.
        bits: (tokens, bits) bool; `None` where there are windows.
        image: Decoded from them.
        figures: PSNR is that of `image` against `original`.
    """

    original: PIL.Image.Image
    bits: np.ndarray | None
    image: PIL.Image.Image
    figures: Figures


@dataclass(frozen=True)
class Edit:
    """
    Args:
        images: Decoded from tokens that were not edited, one for each image given.
        bits: (tokens, bits) bool, edited.
        marked: (tokens, bits or 1) bool, what was edited.
        image: Decoded from `bits`, from the same noise as `images`.
        figures: PSNR is that of `image` against the first of `images`: how much the edit changes.
    """

    images: list[PIL.Image.Image]
    bits: np.ndarray
    marked: np.ndarray
    image: PIL.Image.Image
    figures: Figures


class Workbench:
    """
    A tokenizer, and a generator of its tokens, at work on single images. Several threads may use it at once: models
    are only read, and every call has schedulers of its own.

    Args:
        pipeline: Its scheduler's configuration is the sampling that is taken by default.
        generation_pipeline: Of the same tokenizer.

    Raises:
        ValueError: If the tokens are not discrete, or images are not in colour.
    """

    def __init__(self, pipeline: FlowMoPipeline, generation_pipeline: FlowMoGenerationPipeline | None = None):
        config = pipeline.autoencoder.config
        if not pipeline.autoencoder.quantize.is_discrete:
            raise ValueError(
                f"this tokenizer has quantizer={config.quantizer!r}: its tokens are not bits, to be shown"
            )
        if config.in_channels != 3:
            raise ValueError(f"this tokenizer has in_channels={config.in_channels}: expected 3, red, green and blue")
        self.autoencoder = pipeline.autoencoder
        self.scheduler_config = pipeline.scheduler.config
        self.generator = None if generation_pipeline is None else generation_pipeline.generator
        self.token_scheduler_config = (
            None if generation_pipeline is None else generation_pipeline.token_scheduler.config
        )

    @property
    def num_tokens(self) -> int:
        return self.autoencoder.config.num_latent_tokens

    @property
    def bits_per_token(self) -> int:
        return self.autoencoder.bits_per_token

    @property
    def max_pixels(self) -> int:
        """Of an image that is taken whole, extended to a window where it is smaller than one."""
        return MAX_AREA * self.autoencoder.config.sample_size**2

    @property
    def recipe(self) -> Sampling:
        """The sampling of the tokenizer's own scheduler."""
        config = self.scheduler_config
        return Sampling(config.num_inference_steps, config.guidance_scale, config.rho)

    @property
    def class_names(self) -> list[str]:
        """Of the generator, by id."""
        config = self.generator.config
        names = config.id2label or {}
        return [names.get(label, f"class {label}") for label in range(config.num_classes)]

    def reconstruct(
        self, file: str | Path, side: int, sampling: Sampling, progress: Progress | None = None
    ) -> Reconstruction:
        """
        An image through its tokens.

        Args:
            file: Of any format; its middle is cropped to a square.
            side: In pixels, to which it is resized.

        Raises:
            ValueError: If it is no image, or an argument is out of range.
        """
        original = self._read(file, side)
        started = time.perf_counter()
        (bits,) = self._encode([original])
        (image,) = self._decode([bits], side, sampling, _reporting(progress))
        seconds = time.perf_counter() - started
        figures = self._figures((side, side), sampling, seconds, _psnr(original, image))
        return Reconstruction(original, bits, image, figures)

    def reconstruct_whole(
        self, file: str | Path, sampling: Sampling, progress: Progress | None = None
    ) -> Reconstruction:
        """
        An image of any height and width through the tokens of its [`Windows`] of the model's size.

        Args:
            file: Of any format; an image of more than [`~Workbench.max_pixels`] is made smaller in its proportions.

        Raises:
            ValueError: If it is no image, or an argument is out of range.
        """
        original = self._bounded(decode_image(file))
        size = original.height, original.width
        windows = Windows(*size, self.autoencoder.config.sample_size)
        started = time.perf_counter()
        (image,) = self._pipeline(sampling)(
            original,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=torch.Generator().manual_seed(sampling.seed),
            callback_on_step_end=_reporting(progress),
            window_size=windows.size,
            window_overlap=windows.overlap,
            window_batch_size=WINDOW_BATCH_SIZE,
        ).images
        seconds = time.perf_counter() - started
        figures = self._figures(size, sampling, seconds, _psnr(original, image), windows=len(windows))
        return Reconstruction(original, None, image, figures)

    def trajectory(
        self, file: str | Path, side: int, sampling: Sampling, progress: Progress | None = None
    ) -> Trajectory:
        """All x_t of [`~Workbench.reconstruct`]."""
        original = self._read(file, side)
        trajectory = Trajectory(self._noise(side, sampling))
        report = _reporting(progress)

        def keep(pipe, i, timestep, kwargs):
            return trajectory(pipe, i, timestep, report(pipe, i, timestep, kwargs))

        self._decode(self._encode([original]), side, sampling, keep)
        return trajectory

    def flip(
        self,
        file: str | Path,
        side: int,
        sampling: Sampling,
        count: int,
        first: int,
        last: int,
        seed: int,
        progress: Progress | None = None,
    ) -> Edit:
        """
        An image whose tokens had bits flipped; see [`flip_bits`] for the arguments.

        Raises:
            ValueError: If it is no image, or an argument is out of range.
        """
        original = self._read(file, side)
        started = time.perf_counter()
        (bits,) = self._encode([original])
        flipped = flip_bits(bits, count, np.random.default_rng(seed), first, last)
        images = self._decode([bits, flipped], side, sampling, _reporting(progress))
        seconds = time.perf_counter() - started
        figures = self._figures((side, side), sampling, seconds, _psnr(*images), int((flipped != bits).sum()))
        return Edit(images[:1], flipped, flipped != bits, images[1], figures)

    def mix(
        self,
        file: str | Path,
        other: str | Path,
        side: int,
        sampling: Sampling,
        count: int,
        seed: int | None = None,
        progress: Progress | None = None,
    ) -> Edit:
        """
        An image some of whose tokens are another image's; see [`mix_tokens`].

        Args:
            seed: Draws which tokens; `None` for the last ones.

        Raises:
            ValueError: If one is no image, or an argument is out of range.
        """
        originals = [self._read(file, side), self._read(other, side)]
        started = time.perf_counter()
        bits, others = self._encode(originals)
        rng = None if seed is None else np.random.default_rng(seed)
        mixed, taken = mix_tokens(bits, others, count, rng)
        images = self._decode([bits, others, mixed], side, sampling, _reporting(progress))
        seconds = time.perf_counter() - started
        changed = int((mixed != bits).sum())
        figures = self._figures((side, side), sampling, seconds, _psnr(images[0], images[2]), changed)
        return Edit(images[:2], mixed, taken, images[2], figures)

    def generate(
        self,
        class_label: int | None,
        count: int,
        num_inference_steps: int,
        guidance_scale: float,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> tuple[list[PIL.Image.Image], list[np.ndarray], Figures]:
        """
        Images of a class at the tokenizer's own size, their bits, and figures. Image k has the seed
        `sampling.seed` + k.

        Args:
            class_label: `None` for no class.
            num_inference_steps: Of the generator; an autoregressive one has as many as there are tokens.

        Raises:
            ValueError: If there is no generator, or an argument is out of range.
        """
        if self.generator is None:
            raise ValueError("there is no generator: load one by --generator")
        masked = self.generator.config.order == "masked"
        pipeline = FlowMoGenerationPipeline(
            self.generator,
            FlowMoTokenScheduler.from_config(self.token_scheduler_config),
            self.autoencoder,
            self._scheduler(sampling),
        )
        pipeline.set_progress_bar_config(disable=True)
        started = time.perf_counter()
        output = pipeline(
            [class_label] * count,
            num_inference_steps=num_inference_steps if masked else None,
            guidance_scale=guidance_scale,
            decoder_num_inference_steps=sampling.num_inference_steps,
            decoder_guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(sampling.seed + k) for k in range(count)],
            callback_on_step_end=_reporting(progress),
        )
        seconds = time.perf_counter() - started
        side = self.autoencoder.config.sample_size
        codes = self.autoencoder.indices_to_codes(output.indices)
        return output.images, self._bits(codes), self._figures((side, side), sampling, seconds)

    def _read(self, file: str | Path, side: int) -> PIL.Image.Image:
        pixels = ImageTransform(side)(decode_image(file))
        return _pictures(pixels[None])[0]

    def _bounded(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """In its proportions, of at most `max_pixels`; a side that is shorter than a window counts as one."""
        longest = self.max_pixels / self.autoencoder.config.sample_size
        scale = min((self.max_pixels / (image.width * image.height)) ** 0.5, longest / max(image.size))
        if scale >= 1:
            return image
        return image.resize([max(1, int(side * scale)) for side in image.size], PIL.Image.Resampling.LANCZOS)

    def _encode(self, images: Sequence[PIL.Image.Image]) -> list[np.ndarray]:
        pipeline = FlowMoPipeline(self.autoencoder, FlowMoScheduler.from_config(self.scheduler_config))
        return self._bits(self.autoencoder.indices_to_codes(pipeline.encode(list(images))))

    def _bits(self, codes: torch.Tensor) -> list[np.ndarray]:
        return [unpack(packed, self.num_tokens) for packed in self.autoencoder.pack_codes(codes)]

    def _decode(
        self, bits: Sequence[np.ndarray], side: int, sampling: Sampling, callback: Callback
    ) -> list[PIL.Image.Image]:
        return self._pipeline(sampling).decode(
            [pack_bits(one) for one in bits],
            side,
            side,
            sampling.num_inference_steps,
            sampling.guidance_scale,
            latents=self._noise(side, sampling).expand(len(bits), -1, -1, -1),
            callback_on_step_end=callback,
        )

    def _pipeline(self, sampling: Sampling) -> FlowMoPipeline:
        pipeline = FlowMoPipeline(self.autoencoder, self._scheduler(sampling))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _noise(self, side: int, sampling: Sampling) -> torch.Tensor:
        return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(sampling.seed))

    def _scheduler(self, sampling: Sampling) -> FlowMoScheduler:
        return FlowMoScheduler.from_config(self.scheduler_config, rho=sampling.rho)

    def _figures(
        self,
        size: tuple[int, int],
        sampling: Sampling,
        seconds: float,
        psnr: float | None = None,
        changed: int | None = None,
        windows: int | None = None,
    ) -> Figures:
        rows = windows or 1
        bits, num_bytes = rows * self.num_tokens * self.bits_per_token, rows * self.autoencoder.bytes_per_image
        forwards = self._pipeline(sampling).num_forwards(sampling.num_inference_steps, sampling.guidance_scale)
        return Figures(bits, num_bytes, bits / math.prod(size), forwards, seconds, psnr, changed, windows)


def _psnr(x: PIL.Image.Image, y: PIL.Image.Image) -> float:
    return psnr(images_to_tensor(x), images_to_tensor(y)).item()


def _pictures(images: torch.Tensor) -> list[PIL.Image.Image]:
    """(b, c, h, w) in [-1, 1]."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images / 2 + 0.5))


def _reporting(progress: Progress | None) -> Callback:
    """A callback of pipelines that tells how far they are."""

    def report(pipe, i, timestep, kwargs):
        if progress is not None:
            progress(i + 1, pipe.num_timesteps)
        return kwargs

    return report
