"""FlowMoGenerationPipeline: classes to tokens, and tokens to images."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

from flowmo_diffusers.engine.seeding import Generators
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.models.token_generator import MASK, FlowMoTokenCache, FlowMoTokenGenerator
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline, FlowMoPipelineOutput
from flowmo_diffusers.pipelines.saving import Callback, SafePipeline, check_generator
from flowmo_diffusers.schedulers.scheduling_flowmo import FlowMoScheduler
from flowmo_diffusers.schedulers.scheduling_flowmo_tokens import FlowMoTokenScheduler


ClassLabel = int | str | None

DEFAULT_STEPS = 64


class FlowMoGenerationPipeline(SafePipeline):
    r"""
    Generates images of classes: a token generator fills in FlowMo's tokens, the tokenizer decodes them.

    Args:
        generator ([`FlowMoTokenGenerator`]): Predicts tokens.
        token_scheduler ([`FlowMoTokenScheduler`]): Which of them become known when.
        autoencoder ([`FlowMoAutoencoder`]): The tokenizer that the generator was trained on.
        scheduler ([`FlowMoScheduler`]): Times and steps of the tokenizer's flow.

    Raises:
        ValueError: If the tokens of the generator are not those of the autoencoder.

    Example:
        ```py
        >>> pipe = FlowMoGenerationPipeline.from_pretrained("path/or/hub-id")
        >>> images = pipe(class_labels=["dog", 3], generator=torch.Generator().manual_seed(0)).images
        ```
    """

    model_cpu_offload_seq = "generator->autoencoder"

    def __init__(
        self,
        generator: FlowMoTokenGenerator,
        token_scheduler: FlowMoTokenScheduler,
        autoencoder: FlowMoAutoencoder,
        scheduler: FlowMoScheduler,
    ):
        super().__init__()
        if generator is not None and autoencoder is not None:  # `None` where a part is left out when loading
            _check_fit(generator, autoencoder)
        self.register_modules(
            generator=generator, token_scheduler=token_scheduler, autoencoder=autoencoder, scheduler=scheduler
        )

    def class_ids(self, class_labels: ClassLabel | Sequence[ClassLabel]) -> list[int]:
        """
        Ids of classes that are given by id, by name (case does not matter, nor which of its synonyms it is) or as
        `None` for no class.

        Raises:
            ValueError: If there is no such class, or a name is of several.
        """
        single = isinstance(class_labels, str) or not isinstance(class_labels, Iterable)
        labels = [class_labels] if single else list(class_labels)
        if not labels:
            raise ValueError("class_labels is empty: there is nothing to generate")
        return [self._class_id(label) for label in labels]

    @torch.no_grad()
    def generate_tokens(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        tokens: torch.Tensor | np.ndarray | None = None,
        generator: Generators = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> torch.Tensor:
        """
        Tokens of images of these classes: indices (b, tokens, groups) int64 on the generator's device.

        Args:
            tokens: Indices (b, tokens, groups), or (1, tokens, groups) for all images, of which those that are not -1
                stay as they are, and those that are -1 are generated. A masked generator fits them to all that is
                given, an autoregressive one to what stands before them.

        The other arguments are those of [`~FlowMoGenerationPipeline.__call__`].

        Raises:
            ValueError: If an argument has the wrong type, shape or range.
        """
        ids = self.class_ids(class_labels)
        check_generator(generator, len(ids))
        self._check_callback(callback_on_step_end_tensor_inputs)
        device = self._execution_device
        latents = self._starting_tokens(tokens, len(ids)).to(device)
        labels = torch.tensor(ids, device=device)
        steps = self._num_steps(num_inference_steps)

        self._guidance_scale = guidance_scale
        self._interrupt = False
        self._num_timesteps = steps
        self.token_scheduler.set_timesteps(steps, device=device)
        masked = self.generator.config.order == "masked"
        # A cache has the same batch at each step, guided or not.
        cache = None if masked else FlowMoTokenCache()
        with self.progress_bar(total=steps) as progress_bar:
            for i, timestep in enumerate(self.token_scheduler.timesteps):
                if self.interrupt:
                    continue
                weight = self.token_scheduler.guidance_weights(self.guidance_scale)[i]  # a callback may change it
                if masked:
                    logits = self._logits(latents, labels, weight, weight != 1)
                    latents = self.token_scheduler.step(logits, timestep, latents, generator, return_dict=False)[0]
                else:
                    latents = self._next_token(i, latents, labels, weight, guidance_scale != 1, cache, generator)
                latents = self._call_back(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, timestep, latents
                )
                progress_bar.update()
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        tokens: torch.Tensor | np.ndarray | None = None,
        decoder_num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        decoder_guidance_interval: tuple[float, float] | None = None,
        decode_batch_size: int | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> FlowMoPipelineOutput | tuple:
        r"""
        Images of classes.

        Args:
            class_labels: A class or a list, one an image: its id, its name in the generator's `id2label`, or `None`
                for an image of no class.
            height: Of the images in pixels, a multiple of the tokenizer's patch size. Default: its `sample_size`.
            width: As `height`.
            num_inference_steps: In which tokens are filled in; 64 by default. An autoregressive generator has as many
                as there are tokens.
            guidance_scale: w of classifier-free guidance in the logits, l_null + w (l_class - l_null), with which the
                token scheduler's guidance schedule ends; 1 is none.
            tokens: Given ones, see [`~FlowMoGenerationPipeline.generate_tokens`].
            decoder_num_inference_steps: Steps of the tokenizer's flow. Default of this and the next two: those of its
                scheduler's configuration.
            decoder_guidance_scale: Of the tokenizer, see [`FlowMoPipeline`].
            decoder_guidance_interval: As `decoder_guidance_scale`.
            decode_batch_size: Images decoded at a time; all by default. The images do not depend on it, but for
                rounding.
            generator: One generator, or one for each image, which makes a batch equal to its images one by one.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent" (a tensor in [-1, 1]).
            return_dict: Whether to return a [`FlowMoPipelineOutput`] or a tuple (images, indices).
            callback_on_step_end: Called as `callback(pipe, i, timestep, kwargs)` after each step of the tokens;
                returns a dict, whose `latents` (indices, -1 where masked), if any, take their place. What it sets as
                `pipe._guidance_scale` holds from the next step on; an autoregressive generator that began without
                guidance goes on without.
            callback_on_step_end_tensor_inputs: Names of the tensors given to the callback.

        Raises:
            ValueError: If an argument has the wrong type, shape or range.
        """
        if decode_batch_size is not None and decode_batch_size < 1:
            raise ValueError(f"decode_batch_size={decode_batch_size} must be at least 1")
        side, channels = self.autoencoder.config.sample_size, self.autoencoder.config.in_channels
        shape = (
            len(self.class_ids(class_labels)),
            channels,
            side if height is None else height,
            side if width is None else width,
        )
        tokenizer = FlowMoPipeline(self.autoencoder, self.scheduler)
        tokenizer.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        tokenizer.check_inputs(
            shape, decoder_num_inference_steps, decoder_guidance_interval, generator, None, output_type, ()
        )

        indices = self.generate_tokens(
            class_labels,
            num_inference_steps,
            guidance_scale,
            tokens,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        # Drawn for all at once, so that the noise of an image does not depend on the batches of decoding.
        noise = randn_tensor(shape, generator, indices.device, torch.float32)
        known = indices.clamp(min=0)  # groups that an interrupted generation has left masked
        size = decode_batch_size or len(known)
        parts = [
            tokenizer.decode(
                known[i : i + size],
                *shape[-2:],
                num_inference_steps=decoder_num_inference_steps,
                guidance_scale=decoder_guidance_scale,
                guidance_interval=decoder_guidance_interval,
                latents=noise[i : i + size],
                output_type=output_type,
            )
            for i in range(0, len(known), size)
        ]
        images = _joined(parts)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, indices
        return FlowMoPipelineOutput(images=images, indices=indices)

    def _logits(
        self,
        indices: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        guided: bool,
        cache: FlowMoTokenCache | None = None,
    ) -> torch.Tensor:
        """Logits in float32; if guided, with no class asked in one pass with the class."""
        if not guided:
            return self.generator(indices, labels, cache, return_dict=False)[0].float()
        null = torch.full_like(labels, self.generator.null_class)
        both_logits = self.generator(indices.repeat(2, 1, 1), torch.cat([labels, null]), cache, return_dict=False)[0]
        l_class, l_null = both_logits.float().chunk(2)
        return l_null + weight * (l_class - l_null)

    def _next_token(
        self,
        position: int,
        indices: torch.Tensor,
        labels: torch.Tensor,
        weight: float,
        guided: bool,
        cache: FlowMoTokenCache,
        generator: Generators,
    ) -> torch.Tensor:
        """The indices with the groups of one more token drawn, one after the other, but for those that are given."""
        indices = indices.clone()
        for group in range(indices.shape[2]):
            past = indices[:, : position + 1].clone()
            past[:, -1, group:] = MASK
            logits = self._logits(past, labels, weight, guided, cache)[:, -1, group]
            drawn, _ = self.token_scheduler.sample(logits, generator)
            given = indices[:, position, group]
            indices[:, position, group] = torch.where(given == MASK, drawn, given)
        return indices

    def _num_steps(self, num_inference_steps: int | None) -> int:
        config = self.generator.config
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
        if config.order == "masked":
            return DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
        if num_inference_steps not in (None, config.num_tokens):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: an autoregressive generator has as many as there are "
                f"tokens, {config.num_tokens}; leave it out"
            )
        return config.num_tokens

    def _starting_tokens(self, tokens: torch.Tensor | np.ndarray | None, batch: int) -> torch.Tensor:
        config = self.generator.config
        shape = (config.num_tokens, config.token_groups)
        if tokens is None:
            return torch.full((batch, *shape), MASK)
        # Copied, because torch warns of arrays that cannot be written to.
        tokens = torch.tensor(tokens) if isinstance(tokens, np.ndarray) else tokens
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != shape or len(tokens) not in (1, batch):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected {(batch, *shape)} or {(1, *shape)}")
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens have dtype {tokens.dtype}; expected whole numbers (int64)")
        tokens = tokens.long()  # unsigned types compare otherwise, or not at all
        if tokens.min() < MASK or tokens.max() >= 2**config.group_bits:
            raise ValueError(
                f"tokens range from {tokens.min()} to {tokens.max()}; expected [0, {2**config.group_bits}), or -1 for "
                "those to be generated"
            )
        return tokens.expand(batch, -1, -1)

    def _class_id(self, label: ClassLabel) -> int:
        config = self.generator.config
        if label is None:
            return self.generator.null_class
        if isinstance(label, Integral) and not isinstance(label, bool):
            if not 0 <= label < config.num_classes:
                raise ValueError(f"class_labels has id {label}; this generator has {config.num_classes} classes")
            return int(label)
        if not isinstance(label, str):
            raise ValueError(f"class_labels has {label!r}; expected ids, names or None")
        names = _named_classes(config.id2label or {})
        ids = names.get(label.strip().lower(), [])
        if len(ids) == 1:
            return ids[0]
        if ids:
            raise ValueError(f"class_labels has {label!r}, which is the name of the classes {ids}: give an id")
        known = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
        raise ValueError(f"class_labels has {label!r}, which is no class of this generator; its names are: {known}")


def _named_classes(id2label: Mapping[int | str, str]) -> dict[str, list[int]]:
    """Ids by whole names and by each synonym, in lower case."""
    names: dict[str, list[int]] = {}
    for number, name in id2label.items():
        for one in {name.strip().lower(), *(part.strip().lower() for part in name.split(","))}:
            names.setdefault(one, []).append(int(number))
    return names


def _check_fit(generator: FlowMoTokenGenerator, autoencoder: FlowMoAutoencoder) -> None:
    """Whether the tokens have the same form. That they are of the same tokenizer is checked where it is trained."""
    if not autoencoder.quantize.is_discrete:
        raise ValueError(f"autoencoder has quantizer={autoencoder.config.quantizer!r}, whose tokens are not discrete")
    quantizer = autoencoder.quantize
    there = (autoencoder.config.num_latent_tokens, quantizer.groups, autoencoder.config.codebook_bits)
    config = generator.config
    here = (config.num_tokens, config.token_groups, config.group_bits)
    if there != here:
        raise ValueError(
            f"generator is for {here[0]} tokens of {here[1]} groups of {here[2]} bits, the autoencoder has {there[0]} "
            f"of {there[1]} of {there[2]}: it was trained on another tokenizer"
        )


def _joined(
    parts: list[list[PIL.Image.Image] | np.ndarray | torch.Tensor],
) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
    if isinstance(parts[0], list):
        return [image for part in parts for image in part]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts)
