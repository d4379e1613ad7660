"""FlowMoPipeline: images to tokens and tokens to images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from flowmo_diffusers.engine.seeding import Generators
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.pipelines.images import array_to_tensor, image_items, image_size
from flowmo_diffusers.pipelines.saving import Callback, SafePipeline, check_generator
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler, check_guidance_interval


Tokens = torch.Tensor | np.ndarray | bytes | Sequence[bytes]


@dataclass
class FlowMoPipelineOutput(BaseOutput):
    """
    Args:
        images: A list of PIL images, or an array (b, h, w, c) or tensor (b, c, h, w) in [0, 1].
        indices: (b, tokens, groups) int64, `None` where the quantizer is not discrete.
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
        ```
    """

    model_cpu_offload_seq = "autoencoder"

    def __init__(self, autoencoder: FlowMoAutoencoder, scheduler: FlowMoScheduler):
        super().__init__()
        self.register_modules(autoencoder=autoencoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=autoencoder.config.patch_size if autoencoder is not None else 4
        )

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
            image: PIL, NumPy, tensor or a list of them, resized to `height` x `width`; see
                [`~FlowMoPipeline.__call__`].
            generator: For the Gaussian draw of a "kl" model; one, or one for each image.

        Returns:
            Indices (b, tokens, groups) int64 if the quantizer is discrete, else codes (b, tokens, channels). Both are
            what [`~FlowMoPipeline.decode`] takes.

        Raises:
            ValueError: If an argument has the wrong type, shape or range.
        """
        images = self._images(image, height, width)
        check_generator(generator, len(images))
        encoded = self.autoencoder.encode(images, generator)
        self.maybe_free_model_hooks()
        return encoded.codes if encoded.indices is None else encoded.indices

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
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Tokens to images.

        Args:
            tokens: Indices (b, tokens, groups) of whole numbers, codes (b, tokens, channels) of floats (in [-1, 1] if
                the quantizer is discrete), or the `bytes` of [`FlowMoAutoencoder.pack_codes`], one object or one an
                image.
            height: Of the image in pixels; the size is not part of the tokens. Default: the model's `sample_size`.
            width: As `height`.

        The other arguments are those of [`~FlowMoPipeline.__call__`].

        Raises:
            ValueError: If the tokens have the wrong shape, length or range, or another argument is out of range.
        """
        codes = self._codes(tokens)
        num_inference_steps, guidance_scale, guidance_interval = self._recipe(
            num_inference_steps, guidance_scale, guidance_interval
        )
        height = self.autoencoder.config.sample_size if height is None else height
        width = self.autoencoder.config.sample_size if width is None else width
        shape = (len(codes), self.autoencoder.config.in_channels, height, width)
        self.check_inputs(
            shape,
            num_inference_steps,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if latents is None:
            latents = randn_tensor(shape, generator, codes.device, torch.float32)
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
                v = self._velocity(latents, t, codes, self.guidance_scale if guided else None)
                latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
                latents = self._call_back(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, timestep, latents
                )
                if i == len(timesteps) - 1 or (i + 1) % self.scheduler.order == 0:
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
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> FlowMoPipelineOutput | tuple:
        r"""
        Images to tokens and back.

        Args:
            image: PIL images, NumPy arrays (h, w, c) or (b, h, w, c) in uint8 or in [0, 1], tensors (c, h, w) or
                (b, c, h, w) in [-1, 1], or a list of one kind.
            height: Height in pixels to which images are resized, a multiple of the patch size. Default: their own,
                down to a multiple.
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

        Raises:
            ValueError: If an argument has the wrong type, shape or range; before the model runs.
        """
        images = self._images(image, height, width)
        self.check_inputs(
            tuple(images.shape),
            num_inference_steps,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        encoded = self.autoencoder.encode(images, generator)
        images = self.decode(
            encoded.codes,
            height=images.shape[-2],
            width=images.shape[-1],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if not return_dict:
            return images, encoded.indices
        return FlowMoPipelineOutput(images=images, indices=encoded.indices)

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

    def _images(self, image: PipelineImageInput, height: int | None, width: int | None) -> torch.Tensor:
        """Any accepted input to (b, c, height, width) in [-1, 1] on the model's device and in its dtype."""
        items = image_items(image)
        sizes = sorted({image_size(item) for item in items})
        if len(sizes) > 1 and (height is None or width is None):
            raise ValueError(f"image has different sizes (h, w) in one batch, {sizes}: give `height` and `width`")
        patch = self.autoencoder.config.patch_size
        if height is None and sizes[0][0] < patch or width is None and sizes[0][1] < patch:
            raise ValueError(f"image of (h, w) = {sizes[0]} is smaller than a patch of {patch} x {patch} pixels")
        height = sizes[0][0] // patch * patch if height is None else height
        width = sizes[0][1] // patch * patch if width is None else width
        self._check_size(height, width)
        images = torch.cat([self._image(item, height, width) for item in items])
        return images.to(self._execution_device, self.autoencoder.dtype)

    def _image(self, item: PIL.Image.Image | np.ndarray | torch.Tensor, height: int, width: int) -> torch.Tensor:
        """One item to (n, c, height, width) float32 in [-1, 1]; n is 1 but for arrays with a batch dimension."""
        if isinstance(item, PIL.Image.Image):
            item = item.convert("L" if self.autoencoder.config.in_channels == 1 else "RGB")
            return self.image_processor.preprocess(item, height, width)
        images = array_to_tensor(item)
        if images.shape[-2:] != (height, width):
            images = torch.nn.functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
        self.autoencoder._check_images(images, "image")
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

    def check_inputs(
        self,
        shape: tuple[int, int, int, int],
        num_inference_steps: int | None,
        guidance_interval: tuple[float, float] | None,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        callback_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises the `ValueError` of [`~FlowMoPipeline.decode`] for images of this shape (b, c, h, w)."""
        self._check_size(*shape[-2:])
        check_generator(generator, shape[0])
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
        if guidance_interval is not None:
            check_guidance_interval(guidance_interval)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'")
        self._check_callback(callback_tensor_inputs)

    def _check_size(self, height: int, width: int) -> None:
        patch = self.autoencoder.config.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(f"height={height} and width={width} must be positive multiples of the patch size {patch}")


def _inside(times: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
    """Which times t = sigma / (1 + sigma) lie in the interval; an end met up to float32's rounding is inside."""
    low, high = (1 - 1 / (1 + sigma) for sigma in interval)
    return [low - 1e-6 <= t <= high + 1e-6 for t in times.tolist()]
