"""FlowMoPipeline: images to tokens and tokens to images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.pipelines.registration import register_library
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler


register_library()

Tokens = torch.Tensor | np.ndarray | bytes | Sequence[bytes]
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class FlowMoPipelineOutput(BaseOutput):
    """
    Args:
        images: A list of PIL images, or an array (b, h, w, c) or tensor (b, c, h, w) in [0, 1].
        indices: (b, tokens, groups) int64, `None` where the quantizer is not discrete.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    indices: torch.Tensor | None = None


class FlowMoPipeline(DiffusionPipeline):
    r"""
    Reconstructs images through FlowMo's tokens (arXiv 2503.11056).

    Args:
        autoencoder ([`FlowMoAutoencoder`]): Encoder, quantizer and velocity decoder.
        scheduler ([`FlowMoScheduler`]): Times and steps of the flow.
    """

    model_cpu_offload_seq = "autoencoder"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, autoencoder: FlowMoAutoencoder, scheduler: FlowMoScheduler):
        super().__init__()
        self.register_modules(autoencoder=autoencoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=autoencoder.config.patch_size if autoencoder is not None else 4
        )

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def encode(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """
        Images to tokens.

        Args:
            image: PIL, NumPy, tensor or a list of them; see [`~FlowMoPipeline.__call__`].
            generator: For the Gaussian draw of a "kl" model.

        Returns:
            Indices (b, tokens, groups) int64 if the quantizer is discrete, else codes (b, tokens, channels). Both are
            what [`~FlowMoPipeline.decode`] takes.
        """
        encoded = self.autoencoder.encode(self._images(image, height, width), generator)
        return encoded.codes if encoded.indices is None else encoded.indices

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.17, 1.02),
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Tokens to images.

        Args:
            tokens: Indices (b, tokens, groups) of whole numbers, codes (b, tokens, channels) of floats, or the
                `bytes` of [`FlowMoAutoencoder.pack_codes`], one object or one an image.
            height: Of the image in pixels; the size is not part of the tokens. Default: the model's `sample_size`.
            width: As `height`.

        The other arguments are those of [`~FlowMoPipeline.__call__`].

        Raises:
            ValueError: If the tokens have the wrong shape, length or range, or another argument is out of range.
        """
        height = height or self.autoencoder.config.sample_size
        width = width or self.autoencoder.config.sample_size
        self._check_inputs(height, width, guidance_interval, callback_on_step_end_tensor_inputs, output_type)
        codes = self._codes(tokens)
        latents = self._noise(codes.shape[0], height, width, generator, latents)

        self._guidance_scale = guidance_scale
        self._interrupt = False
        # The interval is given in EDM noise levels, x + sigma z; the flow's time is t = sigma / (1 + sigma).
        guided_from, guided_to = (sigma / (1 + sigma) for sigma in guidance_interval)
        self.scheduler.set_timesteps(num_inference_steps, device=codes.device)
        self._num_timesteps = len(self.scheduler.timesteps)
        times = (self.scheduler.timesteps / self.scheduler.config.num_train_timesteps).tolist()

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, (timestep, t) in enumerate(zip(self.scheduler.timesteps, times, strict=True)):
                if self.interrupt:
                    continue
                guided = guidance_scale != 1.0 and guided_from <= t <= guided_to
                v = self._velocity(latents, t, codes, guidance_scale if guided else None)
                latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    available = {"latents": latents}
                    given = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, timestep, given).pop("latents", latents)
                if i == len(times) - 1 or (i + 1) % self.scheduler.order == 0:
                    progress_bar.update()

        images = self.image_processor.postprocess(latents.clamp(-1, 1), output_type=output_type)
        self.maybe_free_model_hooks()
        return images

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.17, 1.02),
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> FlowMoPipelineOutput | tuple:
        r"""
        Images to tokens and back.

        Args:
            image: PIL images, NumPy arrays (h, w, c) or (b, h, w, c) in uint8 or in [0, 1], tensors (c, h, w) or
                (b, c, h, w) in [-1, 1], or a list of one kind.
            height: Height to which images are resized. Default: their own, down to a multiple of the patch size.
            width: As `height`.
            num_inference_steps: Steps of the flow.
            guidance_scale: w of classifier-free guidance, v = v_null + w (v_code - v_null); 1 is none.
            guidance_interval: Noise levels sigma between which guidance is applied, both ends included. Outside of it
                a step asks the model once.
            generator: One generator, or one for each image, which makes a batch equal to its images one by one.
            latents: The noise to start from (b, c, h, w) instead of a drawn one.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent" (a tensor in [-1, 1]).
            return_dict: Whether to return a [`FlowMoPipelineOutput`] or a tuple (images, indices).
            callback_on_step_end: Called as `callback(pipe, step, timestep, kwargs)` after each step; may return
                changed `latents` (x_t, in pixels).
            callback_on_step_end_tensor_inputs: Names of the tensors given to the callback.

        Raises:
            ValueError: If an argument has the wrong type, shape or range; before the model runs.
        """
        images = self._images(image, height, width)
        height, width = images.shape[-2:]
        self._check_inputs(height, width, guidance_interval, callback_on_step_end_tensor_inputs, output_type)
        encoded = self.autoencoder.encode(images, generator)
        images = self.decode(
            encoded.codes,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        if not return_dict:
            return images, encoded.indices
        return FlowMoPipelineOutput(images=images, indices=encoded.indices)

    def _velocity(self, latents: torch.Tensor, t: float, codes: torch.Tensor, guidance: float | None) -> torch.Tensor:
        x_t = latents.to(self.autoencoder.dtype)
        if guidance is None:
            return self.autoencoder(x_t, t, codes=codes, return_dict=False)[0]
        # One pass over both: the second half of the batch has its codes dropped.
        mask = torch.ones(2 * len(codes), device=codes.device)
        mask[len(codes) :] = 0
        both = self.autoencoder(x_t.repeat(2, 1, 1, 1), t, codes=codes.repeat(2, 1, 1), code_mask=mask)
        v_code, v_null = both.velocity.float().chunk(2)
        return v_null + guidance * (v_code - v_null)

    def _images(self, image: PipelineImageInput, height: int | None, width: int | None) -> torch.Tensor:
        """Any accepted input to (b, c, h, w) in [-1, 1] on the model's device and in its dtype."""
        items = image if isinstance(image, (list, tuple)) else [image]
        if not items or not all(isinstance(item, (PIL.Image.Image, np.ndarray, torch.Tensor)) for item in items):
            kinds = sorted({type(item).__name__ for item in items}) or ["an empty list"]
            raise ValueError(f"image must be PIL images, NumPy arrays or tensors, or a list of them; got {kinds}")
        if len({type(item) if not isinstance(item, PIL.Image.Image) else PIL.Image.Image for item in items}) > 1:
            raise ValueError("image must be a list of one kind: all PIL images, all NumPy arrays or all tensors")

        if isinstance(items[0], PIL.Image.Image):
            sizes = {item.size for item in items}
            if height is None and width is None and len(sizes) > 1:
                raise ValueError(f"image has different sizes in one batch, {sorted(sizes)}: give `height` and `width`")
            patch = self.autoencoder.config.patch_size
            if min(min(size) for size in sizes) < patch:
                raise ValueError(f"image is smaller than a patch of {patch} x {patch} pixels: {sorted(sizes)}")
            images = self.image_processor.preprocess([item.convert("RGB") for item in items], height, width)
        else:
            images = torch.cat([self._array_to_images(item) for item in items])
            if height is not None or width is not None:
                size = (height or images.shape[-2], width or images.shape[-1])
                images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        self.autoencoder._check_images(images, "image")
        return images.to(self._execution_device, self.autoencoder.dtype)

    def _array_to_images(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        if array.ndim not in (3, 4):
            raise ValueError(f"image has shape {tuple(array.shape)}; expected three dimensions, or four with a batch")
        array = array if array.ndim == 4 else array[None]
        if isinstance(array, np.ndarray):
            if array.dtype == np.uint8:
                array = array.astype(np.float32) / 255
            images = torch.from_numpy(np.ascontiguousarray(array)).float().permute(0, 3, 1, 2) * 2 - 1
            expected = "a float NumPy image lies in [0, 1] (or give uint8)"
        else:
            if not array.is_floating_point():
                raise ValueError(f"image tensor has dtype {array.dtype}; expected floats in [-1, 1]")
            images, expected = array.float(), "a tensor image lies in [-1, 1]"
        if images.numel() == 0 or not torch.isfinite(images).all():
            raise ValueError("image is empty or has values that are not finite (NaN or infinity)")
        if images.abs().max() > 1 + 1e-3:
            raise ValueError(f"image values range from {array.min():.3g} to {array.max():.3g}: {expected}")
        return images

    def _codes(self, tokens: Tokens) -> torch.Tensor:
        autoencoder = self.autoencoder
        if isinstance(tokens, np.ndarray):
            tokens = torch.from_numpy(tokens)
        if not isinstance(tokens, torch.Tensor):
            codes = autoencoder.unpack_codes(tokens)
        elif tokens.is_floating_point():
            autoencoder._check_codes(tokens)
            if not torch.isfinite(tokens).all():
                raise ValueError("tokens have values that are not finite (NaN or infinity)")
            codes = tokens
        else:
            codes = autoencoder.indices_to_codes(tokens)
        return codes.to(self._execution_device, autoencoder.dtype)

    def _noise(
        self, batch: int, height: int, width: int, generator: Generators, latents: torch.Tensor | None
    ) -> torch.Tensor:
        shape = (batch, self.autoencoder.config.in_channels, height, width)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
            return latents.to(self._execution_device, torch.float32)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator is a list of {len(generator)}; expected one for each of {batch} images")
        return randn_tensor(shape, generator, self._execution_device, torch.float32)

    def _check_inputs(
        self,
        height: int,
        width: int,
        guidance_interval: tuple[float, float],
        callback_tensor_inputs: Sequence[str],
        output_type: str,
    ) -> None:
        patch = self.autoencoder.config.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(f"height={height} and width={width} must be positive multiples of the patch size {patch}")
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1]:
            raise ValueError(f"guidance_interval={guidance_interval} must be two noise levels, the lower one first")
        if unknown := set(callback_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; known are {self._callback_tensor_inputs}"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'")
