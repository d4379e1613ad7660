"""FlowMoPipeline: images to tokens and tokens to images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from flowmo_diffusers.engine.seeding import Generators
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.models.windows import Windows
from flowmo_diffusers.pipelines.images import array_to_tensor, image_items, image_size
from flowmo_diffusers.pipelines.published import converted_folder, published_file
from flowmo_diffusers.pipelines.saving import Callback, SafePipeline, check_generator
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler, check_guidance_interval


Tokens = torch.Tensor | np.ndarray | bytes | Sequence[bytes]


@dataclass
class FlowMoPipelineOutput(BaseOutput):
    """
    Args:
        images: A list of PIL images, or an array (b, h, w, c) or tensor (b, c, h, w) in [0, 1].
        indices: (b, tokens, groups) int64, (b, windows, tokens, groups) where there are windows; `None` where the
            quantizer is not discrete.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    indices: torch.Tensor | None = None


class FlowMoPipeline(SafePipeline):
    r"""
    Reconstructs images through FlowMo's tokens (arXiv 2503.11056).

    Args:
        autoencoder ([`FlowMoAutoencoder`]): Encoder, quantizer and velocity decoder.
        scheduler ([`FlowMoScheduler`]): Times and steps of the flow.

    Example:
        ```py
        >>> pipe = FlowMoPipeline.from_pretrained("path/or/hub-id", dtype=torch.bfloat16).to("cuda")
        >>> reconstruction = pipe(image, generator=torch.Generator().manual_seed(0)).images[0]

        >>> tokens = pipe.encode(image)  # to be stored, and decoded later
        >>> reconstruction = pipe.decode(tokens)[0]

        >>> large = pipe(photo, window_size=256).images[0]  # of any size, windows by windows
        ```
    """

    model_cpu_offload_seq = "autoencoder"

    def __init__(self, autoencoder: FlowMoAutoencoder, scheduler: FlowMoScheduler):
        super().__init__()
        self.register_modules(autoencoder=autoencoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)  # sizes are checked here, not rounded there

    @classmethod
    def from_published(
        cls,
        name_or_path: str | os.PathLike,
        weights: str = "ema",
        config: Mapping[str, Any] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **kwargs,
    ) -> "FlowMoPipeline":
        """
        A checkpoint of the published code (github.com/kylesargent/FlowMo). It is converted once, into a folder in
        huggingface_hub's cache of assets, and loaded from there.

        Args:
            name_or_path: "lo" or "hi", the authors' FlowMo-Lo and FlowMo-Hi, downloaded from `ksarge/FlowMo` on the
                Hub where they are not in its cache; or a `.pth` of the published training.
            weights: "ema" (those to use) or "raw".
            config: Fields of [`FlowMoAutoencoder`] that the shapes of the tensors cannot tell (`rope_axes`,
                `codebook_bits`, `sample_size`, `num_latent_tokens`, `quantizer`), where they are not the published
                ones.
            revision: Of the repository on the Hub, and so the next three.
            token: For the Hub.
            cache_dir: Of the Hub's files.
            local_files_only: Whether to leave the Hub alone and take what is in its cache.
            kwargs: For `from_pretrained` (`dtype`, ...).

        Raises:
            OSError: If there is no such name or file, it cannot be downloaded or read, or the disk is full.
            ValueError: If its tensors are not those of a FlowMo model.
        """
        file = published_file(
            name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )

        def save(model: FlowMoAutoencoder, folder: Path) -> None:
            cls(model, FlowMoScheduler()).save_pretrained(folder)

        return cls.from_pretrained(converted_folder(file, weights, dict(config or {}), save), **kwargs)

    @torch.no_grad()
    def encode(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        window_size: int | None = None,
        window_overlap: int | None = None,
        window_batch_size: int = 1,
    ) -> torch.Tensor:
        """
        Images to tokens.

        Args:
            image: PIL, NumPy, tensor or a list of them, resized to `height` x `width`; see
                [`~FlowMoPipeline.__call__`].
            generator: For the Gaussian draw of a "kl" model; one, or one for each image.
            window_size: See [`~FlowMoPipeline.__call__`].
            window_overlap: As `window_size`.
            window_batch_size: As `window_size`.

        Returns:
            Indices (b, tokens, groups) int64 if the quantizer is discrete, else codes (b, tokens, channels); with
            windows (b, windows, tokens, ...). All are what [`~FlowMoPipeline.decode`] takes.

        Raises:
            ValueError: If an argument has the wrong type, shape or range.
        """
        images = self._images(image, height, width, whole_patches=window_size is None)
        windows = self._windows(*images.shape[-2:], window_size, window_overlap)
        check_generator(generator, len(images))
        _check_window_batch_size(window_batch_size)
        codes, indices = self._encode(images, windows, generator, window_batch_size)
        self.maybe_free_model_hooks()
        return codes if indices is None else indices

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        window_size: int | None = None,
        window_overlap: int | None = None,
        window_batch_size: int = 1,
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Tokens to images.

        Args:
            tokens: Indices (b, tokens, groups) of whole numbers, codes (b, tokens, channels) of floats (in [-1, 1] if
                the quantizer is discrete), or the `bytes` of [`FlowMoAutoencoder.pack_codes`], one object or one an
                image. In windows they are (b, windows, tokens, ...), or the bytes of an image's windows joined.
            height: Of the image in pixels; the size is not part of the tokens. Default: the model's `sample_size`.
            width: As `height`.

        The other arguments are those of [`~FlowMoPipeline.__call__`].

        Raises:
            ValueError: If the tokens have the wrong shape, length or range, or another argument is out of range.
        """
        height = self.autoencoder.config.sample_size if height is None else height
        width = self.autoencoder.config.sample_size if width is None else width
        windows = self._windows(height, width, window_size, window_overlap)
        codes = self._codes(tokens) if windows is None else self._window_codes(tokens, windows)
        num_inference_steps, guidance_scale, guidance_interval = self._recipe(
            num_inference_steps, guidance_scale, guidance_interval
        )
        shape = (len(codes), self.autoencoder.config.in_channels, height, width)
        self.check_inputs(
            shape,
            num_inference_steps,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            window_size,
            window_overlap,
            window_batch_size,
        )
        if latents is None:
            canvas = shape if windows is None else (*shape[:2], *windows.canvas)
            latents = randn_tensor(canvas, generator, codes.device, torch.float32)
        latents = latents.to(codes.device, torch.float32)

        self._guidance_scale = guidance_scale
        self._interrupt = False
        self.scheduler.set_timesteps(num_inference_steps, device=codes.device)
        self.scheduler.set_begin_index(0)  # else the first step looks for its time, which waits for the device
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        times = timesteps / self.scheduler.config.num_train_timesteps
        inside = _inside(times, guidance_interval)

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, (timestep, t) in enumerate(zip(timesteps, times, strict=True)):
                if self.interrupt:
                    continue
                guided = inside[i] and self.guidance_scale != 1  # which a callback may change
                guidance = self.guidance_scale if guided else None
                if windows is None:
                    v = self._velocity(latents, t, codes, guidance)
                else:
                    v = self._blended_velocity(latents, t, codes, guidance, windows, window_batch_size)
                latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
                latents = self._call_back(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, timestep, latents
                )
                if i == len(timesteps) - 1 or (i + 1) % self.scheduler.order == 0:
                    progress_bar.update()

        if windows is not None:
            latents = windows.cut(latents)
        images = self.image_processor.postprocess(latents.clamp(-1, 1), output_type=output_type)
        self.maybe_free_model_hooks()
        return images

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        window_size: int | None = None,
        window_overlap: int | None = None,
        window_batch_size: int = 1,
    ) -> FlowMoPipelineOutput | tuple:
        r"""
        Images to tokens and back.

        Args:
            image: PIL images, NumPy arrays (h, w, c) or (b, h, w, c) in uint8 or in [0, 1], tensors (c, h, w) or
                (b, c, h, w) in [-1, 1], or a list of one kind.
            height: Height in pixels to which images are resized, a multiple of the patch size. Default: their own,
                down to a multiple. With windows any height will do.
            width: As `height`.
            num_inference_steps: Steps of the flow. This and the next two default to what the configuration of the
                scheduler says.
            guidance_scale: w of classifier-free guidance, v = v_null + w (v_code - v_null); 1 is none.
            guidance_interval: EDM noise levels sigma between which guidance is applied, both ends included; the
                flow's time is t = sigma / (1 + sigma), so (0, inf) is every step. A guided step asks the model once,
                with twice the batch.
            generator: One generator, or one for each image, which makes a batch equal to its images one by one.
            latents: The noise to start from (b, c, h, w) instead of a drawn one.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent" (a tensor in [-1, 1]).
            return_dict: Whether to return a [`FlowMoPipelineOutput`] or a tuple (images, indices).
            callback_on_step_end: Called as `callback(pipe, i, timestep, kwargs)` after each of the `num_timesteps`
                answers of the model; returns a dict, whose `latents` (x_t, in pixels), if any, take their place.
            callback_on_step_end_tensor_inputs: Names of the tensors given to the callback.
            window_size: Side in pixels, a multiple of the patch size, of square [`Windows`] over an image of any size,
                best the size the model was trained on. Each has tokens of its own; their velocities are blended at
                every step, so that they meet without seams. An image smaller than a window is extended to one and cut
                back. Default: the image as a whole.
            window_overlap: Pixels that neighbouring windows share at least. Default: a quarter of `window_size`.
            window_batch_size: How many windows of each image pass through the model at a time. As with any batch,
                rounding may depend on it.

        Raises:
            ValueError: If an argument has the wrong type, shape or range; before the model runs.
        """
        images = self._images(image, height, width, whole_patches=window_size is None)
        height, width = images.shape[-2:]
        windows = self._windows(height, width, window_size, window_overlap)
        self.check_inputs(
            tuple(images.shape),
            num_inference_steps,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            window_size,
            window_overlap,
            window_batch_size,
        )
        codes, indices = self._encode(images, windows, generator, window_batch_size)
        images = self.decode(
            codes,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            window_size=window_size,
            window_overlap=window_overlap,
            window_batch_size=window_batch_size,
        )
        if not return_dict:
            return images, indices
        return FlowMoPipelineOutput(images=images, indices=indices)

    def num_forwards(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> int:
        """
        How often one image passes through the decoder with these arguments of [`~FlowMoPipeline.decode`]: a guided
        step counts twice. Lays the scheduler's grid.
        """
        num_inference_steps, scale, interval = self._recipe(num_inference_steps, guidance_scale, guidance_interval)
        self.scheduler.set_timesteps(num_inference_steps)
        times = self.scheduler.timesteps / self.scheduler.config.num_train_timesteps
        return len(times) + (sum(_inside(times, interval)) if scale != 1 else 0)

    def _recipe(
        self, num_inference_steps: int | None, guidance_scale: float | None, interval: tuple[float, float] | None
    ) -> tuple[int, float, tuple[float, float]]:
        """What was given, and what the scheduler says of the rest."""
        recipe = self.scheduler.config
        return (
            recipe.num_inference_steps if num_inference_steps is None else num_inference_steps,
            recipe.guidance_scale if guidance_scale is None else guidance_scale,
            recipe.guidance_interval if interval is None else interval,
        )

    def _encode(
        self, images: torch.Tensor, windows: Windows | None, generator: Generators, window_batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes and indices of images, or of their windows."""
        if windows is None:
            encoded = self.autoencoder.encode(images, generator)
            return encoded.codes, encoded.indices
        canvas = windows.extend(images)
        generators = generator if isinstance(generator, list) else [generator] * len(images)
        encoded = []
        for some in windows.batches(window_batch_size):
            # Window by window, each with a draw of its own: so what is drawn does not depend on `window_batch_size`.
            crops = windows.crop(canvas, some).transpose(0, 1).flatten(0, 1)
            encoded.append(self.autoencoder.encode(crops, None if generator is None else generators * len(some)))

        def joined(rows: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(rows).unflatten(0, (len(windows), len(images))).transpose(0, 1)

        discrete = encoded[0].indices is not None
        return joined([one.codes for one in encoded]), joined([one.indices for one in encoded]) if discrete else None

    def _blended_velocity(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        codes: torch.Tensor,
        guidance: float | None,
        windows: Windows,
        window_batch_size: int,
    ) -> torch.Tensor:
        """The mean over all windows that hold a pixel, so that they are denoised together."""
        total = torch.zeros_like(latents)
        for some in windows.batches(window_batch_size):
            x_t = windows.crop(latents, some).flatten(0, 1)
            v = self._velocity(x_t, t, codes[:, some.start : some.stop].flatten(0, 1), guidance)
            windows.add(total, v.float().unflatten(0, (len(latents), len(some))), some)
        return total

    def _velocity(
        self, latents: torch.Tensor, t: torch.Tensor, codes: torch.Tensor, guidance: float | None
    ) -> torch.Tensor:
        x_t = latents.to(self.autoencoder.dtype)
        if guidance is None:
            return self.autoencoder(x_t, t, codes=codes, return_dict=False)[0]
        # One pass over both: the second half of the batch has its codes dropped.
        mask = torch.ones(2 * len(codes), device=codes.device)
        mask[len(codes) :] = 0
        both = self.autoencoder(x_t.repeat(2, 1, 1, 1), t, codes=codes.repeat(2, 1, 1), code_mask=mask)
        v_code, v_null = both.velocity.float().chunk(2)
        return v_null + guidance * (v_code - v_null)

    def _images(
        self, image: PipelineImageInput, height: int | None, width: int | None, whole_patches: bool = True
    ) -> torch.Tensor:
        """Any accepted input to (b, c, height, width) in [-1, 1] on the model's device and in its dtype."""
        items = image_items(image)
        sizes = sorted({image_size(item) for item in items})
        if len(sizes) > 1 and (height is None or width is None):
            raise ValueError(f"image has different sizes (h, w) in one batch, {sizes}: give `height` and `width`")
        patch = self.autoencoder.config.patch_size if whole_patches else 1
        if height is None and sizes[0][0] < patch or width is None and sizes[0][1] < patch:
            raise ValueError(f"image of (h, w) = {sizes[0]} is smaller than a patch of {patch} x {patch} pixels")
        height = sizes[0][0] // patch * patch if height is None else height
        width = sizes[0][1] // patch * patch if width is None else width
        self._check_size(height, width, patch)
        images = torch.cat([self._image(item, height, width) for item in items])
        return images.to(self._execution_device, self.autoencoder.dtype)

    def _windows(self, height: int, width: int, window_size: int | None, window_overlap: int | None) -> Windows | None:
        patch = self.autoencoder.config.patch_size
        if window_size is not None:
            if window_size % patch:
                raise ValueError(f"window_size={window_size} must be a multiple of the patch size {patch}")
            return Windows(height, width, window_size, window_overlap)
        if window_overlap is not None:
            raise ValueError(f"window_overlap={window_overlap} needs a window_size")
        self._check_size(height, width, patch)
        return None

    def _check_size(self, height: int, width: int, patch: int) -> None:
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(
                f"height={height} and width={width} must be positive multiples of the patch size "
                f"{self.autoencoder.config.patch_size}, or positive where a window_size is given"
            )

    def _image(self, item: PIL.Image.Image | np.ndarray | torch.Tensor, height: int, width: int) -> torch.Tensor:
        """One item to (n, c, height, width) float32 in [-1, 1]; n is 1 but for arrays with a batch dimension."""
        if isinstance(item, PIL.Image.Image):
            item = item.convert("L" if self.autoencoder.config.in_channels == 1 else "RGB")
            return self.image_processor.preprocess(item, height, width)
        images = array_to_tensor(item)
        if images.shape[-2:] != (height, width):
            images = torch.nn.functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
        self.autoencoder._check_channels(images, "image")
        return images

    def _codes(self, tokens: Tokens) -> torch.Tensor:
        """Any accepted tokens to codes (b, tokens, channels) on the model's device and in its dtype."""
        autoencoder = self.autoencoder
        if isinstance(tokens, np.ndarray):
            tokens = torch.tensor(tokens)
        if not isinstance(tokens, torch.Tensor):
            packed = [tokens] if isinstance(tokens, bytes) else tokens
            if not isinstance(packed, (list, tuple)) or not all(isinstance(row, bytes) for row in packed):
                raise ValueError("tokens must be a tensor, a NumPy array, bytes, or a list of bytes, one an image")
            codes = autoencoder.unpack_codes(packed, self._execution_device)
        elif tokens.is_floating_point():
            autoencoder._check_codes(tokens)
            if not torch.isfinite(tokens).all():
                raise ValueError("tokens have values that are not finite (NaN or infinity)")
            if autoencoder.quantize.is_discrete and (tokens.abs() > 1).any():
                raise ValueError(f"tokens range from {tokens.min():.3g} to {tokens.max():.3g}: codes lie in [-1, 1]")
            codes = tokens
        else:
            codes = autoencoder.indices_to_codes(tokens)
        if len(codes) == 0:
            raise ValueError("tokens are empty: there is no image to decode")
        return codes.to(self._execution_device, autoencoder.dtype)

    def _window_codes(self, tokens: Tokens, windows: Windows) -> torch.Tensor:
        """As `_codes`, (b, windows, tokens, channels)."""
        if isinstance(tokens, (torch.Tensor, np.ndarray)):
            if tokens.ndim != 4 or tokens.shape[1] != len(windows):
                raise ValueError(
                    f"tokens have shape {tuple(tokens.shape)}; expected (batch, {len(windows)} windows, tokens, ...)"
                )
            rows = tokens.reshape(-1, *tokens.shape[2:])
        else:
            packed = [tokens] if isinstance(tokens, bytes) else list(tokens)
            window = self.autoencoder.bytes_per_image
            rows = []
            for image in packed:
                if not isinstance(image, bytes) or len(image) != len(windows) * window:
                    raise ValueError(
                        f"tokens must be tensors, or bytes of {len(windows)} windows of {window} bytes for each image"
                    )
                rows += [image[i : i + window] for i in range(0, len(image), window)]
        return self._codes(rows).unflatten(0, (-1, len(windows)))

    def check_inputs(
        self,
        shape: tuple[int, int, int, int],
        num_inference_steps: int | None,
        guidance_interval: tuple[float, float] | None,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: Sequence[str],
        window_size: int | None = None,
        window_overlap: int | None = None,
        window_batch_size: int = 1,
    ) -> None:
        """Raises the `ValueError` of [`~FlowMoPipeline.decode`] for images of this shape (b, c, h, w)."""
        windows = self._windows(*shape[-2:], window_size, window_overlap)
        check_generator(generator, shape[0])
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
        if guidance_interval is not None:
            check_guidance_interval(guidance_interval)
        canvas = shape if windows is None else (*shape[:2], *windows.canvas)
        if latents is not None and tuple(latents.shape) != canvas:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {canvas}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'")
        _check_window_batch_size(window_batch_size)
        self._check_callback(callback_tensor_inputs)


def _check_window_batch_size(window_batch_size: int) -> None:
    if window_batch_size < 1:
        raise ValueError(f"window_batch_size={window_batch_size} must be at least 1")


def _inside(times: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
    """Which times t = sigma / (1 + sigma) lie in the interval; an end met up to float32's rounding is inside."""
    low, high = (1 - 1 / (1 + sigma) for sigma in interval)
    return [low - 1e-6 <= t <= high + 1e-6 for t in times.tolist()]
