"""FlowMoAutoencoder: encoder, quantizer and velocity decoder of FlowMo (arXiv 2503.11056, section 3.1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from flowmo_diffusers.engine.seeding import Generators
from flowmo_diffusers.models.adapters import AdapterMixin
from flowmo_diffusers.models.checkpointing import checkpoint_but_attention
from flowmo_diffusers.models.loading import WholeCheckpointsOnly
from flowmo_diffusers.models.mmdit import BLOCKS, FlowMoTrunk, patchify, unpatchify
from flowmo_diffusers.models.quantizers import build_quantizer
from flowmo_diffusers.models.rotary import scale_rope_axes


@dataclass
class FlowMoEncoderOutput(BaseOutput):
    """
    Args:
        latents: The encoder's output before the quantizer (b, tokens, channels; twice the channels for "kl").
        codes: What the decoder sees (b, tokens, channels); in {-1, +1} for "lfq".
        indices: (b, tokens, groups) int64, `None` for "kl" and "none".
    """

    latents: torch.Tensor
    codes: torch.Tensor
    indices: torch.Tensor | None = None


@dataclass
class FlowMoAutoencoderOutput(BaseOutput):
    """
    Args:
        velocity: v(x_t, t, codes), an estimate of z - x (b, channels, h, w); `None` if no `sample` was given.
        codes: The codes that were decoded, straight-through to the encoder when `images` were given.
        indices: Their indices when `images` were given and the quantizer is discrete.
        quantizer_losses: Unweighted scalar terms of the quantizer, in training mode when `images` were given.
    """

    velocity: torch.Tensor | None
    codes: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    quantizer_losses: dict[str, torch.Tensor] | None = None


class FlowMoAutoencoder(WholeCheckpointsOnly, AdapterMixin, ModelMixin, AutoencoderMixin, AttentionMixin, ConfigMixin):
    r"""
    A transformer diffusion autoencoder: images to a sequence of codes, and codes to the velocity of a rectified flow
    from noise to the image. The sampling loop lives in [`FlowMoPipeline`]. The defaults are FlowMo-Lo.

    Args:
        sample_size: Height and width of the training images in pixels; any multiple of the patch size can be encoded.
        in_channels: Channels of an image.
        patch_size: Side of a patch in pixels.
        num_latent_tokens: Tokens an image becomes.
        latent_channels: Channels of a token; for "lfq" each is one bit.
        codebook_bits: Bits of a codebook group, over which indices and LFQ's entropy are taken.
        quantizer: "lfq", "fsq", "kl" (diagonal Gaussian) or "none".
        encoder_num_layers: Blocks of the encoder.
        decoder_num_layers: Blocks of the decoder.
        encoder_hidden_size: Width of the encoder.
        decoder_hidden_size: Width of the decoder.
        num_attention_heads: Heads of both.
        mlp_ratio: Width of a block's MLP over the block's width.
        rope_axes: Proportions of the rotary axes (token, row, column), scaled to each trunk's head width.
        rope_theta: Base of the rotary frequencies.
        fsq_levels: Values a channel can take, for "fsq" only; a power of two up to 256.

    Raises:
        ValueError: If fields do not fit each other; the message names the field and what would fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [block.__name__ for block in BLOCKS]
    _repeated_blocks = [block.__name__ for block in BLOCKS]
    # All children: offloading then hooks the trunks, which `encode` runs, not this class's forward, which it does not.
    _group_offload_block_modules = ["encoder", "quantize", "decoder"]
    _skip_layerwise_casting_patterns = ["patch_in", "token_in", "time_in", "norm", "head"]

    # Of the decoder alone: the encoder determines what tokens mean.
    lora_target_modules = r"decoder\.blocks\.\d+\..*(to_qkv|to_out|mlp\.0|mlp\.2)"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        patch_size: int = 4,
        num_latent_tokens: int = 256,
        latent_channels: int = 18,
        codebook_bits: int = 9,
        quantizer: str = "lfq",
        encoder_num_layers: int = 8,
        decoder_num_layers: int = 16,
        encoder_hidden_size: int = 768,
        decoder_hidden_size: int = 1152,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        rope_axes: Sequence[int] = (8, 28, 28),
        rope_theta: float = 10000.0,
        fsq_levels: int = 8,
    ):
        super().__init__()
        _check_config(self.config)
        self.quantize = build_quantizer(quantizer, latent_channels, codebook_bits, fsq_levels)
        trunk = {
            "patch_features": in_channels * patch_size**2,
            "num_heads": num_attention_heads,
            "mlp_ratio": mlp_ratio,
            "rope_axes": tuple(rope_axes),
            "rope_theta": rope_theta,
        }
        self.encoder = FlowMoTrunk(
            "tokens",
            token_features=latent_channels * self.quantize.latent_multiplier,
            num_layers=encoder_num_layers,
            dim=encoder_hidden_size,
            **trunk,
        )
        # The decoder's tokens carry one more channel, a constant 1, so that dropped codes (all zeros) are told apart.
        self.decoder = FlowMoTrunk(
            "patches",
            token_features=latent_channels + 1,
            num_layers=decoder_num_layers,
            dim=decoder_hidden_size,
            **trunk,
        )
        self.use_slicing = False
        # FSDP looks for every one of these, and a trunk of one block has the last kind only.
        built = {type(block).__name__ for block in [*self.encoder.blocks, *self.decoder.blocks]}
        self._no_split_modules = [name for name in self._no_split_modules if name in built]

    @property
    def bits_per_token(self) -> int:
        """Bits one token stores. Raises `ValueError` where the codes are not discrete."""
        return self._discrete("bits_per_token").bits_per_token

    @property
    def bytes_per_image(self) -> int:
        """Length of one image's [`~FlowMoAutoencoder.pack_codes`]."""
        return self._discrete("bytes_per_image").packed_bytes(self.config.num_latent_tokens)

    def block_weights(self) -> list[nn.Parameter]:
        """The weight matrices of the blocks, whose norms training holds at their initial values (section 3.1). Those
        of an adapter are not among them."""
        modules = [item for block in (*self.encoder.blocks, *self.decoder.blocks) for item in block.named_modules()]
        return [module.weight for name, module in modules if isinstance(module, nn.Linear) and "lora_" not in name]

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """
        As `ModelMixin.enable_gradient_checkpointing`, with another default: in the backward pass a block computes all
        but attention again, which would cost the most and keeps one stream more.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or checkpoint_but_attention)

    @apply_forward_hook
    def encode(
        self, images: torch.Tensor, generator: Generators = None, return_dict: bool = True
    ) -> FlowMoEncoderOutput | tuple:
        """
        Args:
            images: (b, channels, h, w) in [-1, 1]; h and w multiples of the patch size.
            generator: For the Gaussian draw of "kl".

        Raises:
            ValueError: If the images do not have this shape.
        """
        self._check_images(images, "images")
        latents = self._latents(images)
        quantized = self.quantize(latents, generator)
        if not return_dict:
            return latents, quantized.codes, quantized.indices
        return FlowMoEncoderOutput(latents, quantized.codes, quantized.indices)

    def forward(
        self,
        sample: torch.Tensor | None = None,
        timestep: torch.Tensor | float | None = None,
        images: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        code_mask: torch.Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FlowMoAutoencoderOutput | tuple:
        """
        The velocity of the flow at `sample` given the codes, or, from `images`, given the codes of those images.

        Args:
            sample: x_t = t z + (1 - t) x, (b, channels, h, w). `None` only encodes `images`.
            timestep: t in [0, 1] (1 is pure noise), a number or a tensor of shape (), (1,) or (b,).
            images: x in [-1, 1], (b, channels, h, w), encoded end to end. Give either this or `codes`.
            codes: (b, tokens, channels).
            code_mask: (b,) 1 keeps an image's codes, 0 drops them for classifier-free guidance.
            generator: For the Gaussian draw of "kl".

        Raises:
            ValueError: If arguments are missing or their shapes do not fit.
        """
        if (images is None) == (codes is None):
            raise ValueError("give either `images` or `codes`, not both and not neither")
        if sample is None and images is None:
            raise ValueError("sample is missing: `codes` alone have no velocity")
        indices = losses = None
        if images is not None:
            self._check_images(images, "images")
            quantized = self.quantize(self._latents(images), generator)
            codes, indices, losses = quantized.codes, quantized.indices, quantized.losses
        velocity = None if sample is None else self._velocity(sample, timestep, codes, code_mask)
        if not return_dict:
            return velocity, codes, indices, losses
        return FlowMoAutoencoderOutput(velocity, codes, indices, losses)

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """
        (b, tokens, channels) codes to (b, tokens, groups) int64 indices. Group g of a token holds channels g,
        g + groups, g + 2 groups, ...; for "lfq" its index is sum_d bit_d 2^d with bit = (code > 0).
        """
        quantizer = self._discrete("codes_to_indices")
        self._check_codes(codes)
        return quantizer.codes_to_indices(codes)

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """
        (b, tokens, groups) indices to (b, tokens, channels) codes in this model's dtype.

        Raises:
            ValueError: If the shape does not fit or an index lies outside [0, 2^codebook_bits).
        """
        quantizer = self._discrete("indices_to_codes")
        expected = (self.config.num_latent_tokens, quantizer.groups)
        if indices.ndim != 3 or tuple(indices.shape[1:]) != expected:
            raise ValueError(
                f"indices have shape {tuple(indices.shape)}; expected (batch, {expected[0]}, {expected[1]})"
            )
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"indices have dtype {indices.dtype}; expected whole numbers (int64)")
        indices = indices.long()
        if indices.numel() and (indices.min() < 0 or indices.max() >= quantizer.codebook_size):
            raise ValueError(
                f"indices range from {indices.min()} to {indices.max()}; this model's lie in "
                f"[0, {quantizer.codebook_size})"
            )
        return quantizer.indices_to_codes(indices).to(self.dtype)

    def pack_codes(self, codes: torch.Tensor) -> list[bytes]:
        """
        Codes to one `bytes` object an image, of exactly `tokens x bits / 8` bytes (rounded up, zeros behind).

        Bits run token by token, channel by channel, each byte filled from its most significant bit (big-endian); a
        channel of more than one bit writes its level, most significant bit first. For "lfq" +1 is a 1.

        Args:
            codes: (b, tokens, channels).
        """
        quantizer = self._discrete("pack_codes")
        self._check_codes(codes)
        return [row.tobytes() for row in quantizer.pack(codes).cpu().numpy()]

    def unpack_codes(self, packed: bytes | Sequence[bytes], device: torch.device | None = None) -> torch.Tensor:
        """
        The inverse of [`~FlowMoAutoencoder.pack_codes`]: one `bytes` object, or one an image, to codes
        (b, tokens, channels) in this model's dtype.

        Args:
            device: Of the codes. Default: the model's, which a model that is offloaded layer by layer does not have.

        Raises:
            ValueError: If a length is wrong or the padding behind the last bit is not zero.
        """
        quantizer = self._discrete("unpack_codes")
        rows = [packed] if isinstance(packed, (bytes, bytearray, memoryview)) else list(packed)
        for position, row in enumerate(rows):
            if len(row) != self.bytes_per_image:
                raise ValueError(f"packed image {position} has {len(row)} bytes; expected {self.bytes_per_image}")
        count = self.config.num_latent_tokens * self.bits_per_token
        buffer = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), self.bytes_per_image)
        if np.any(buffer[:, -1] & ((1 << -count % 8) - 1)):
            raise ValueError(f"packed codes have bits set behind the last of {count} bits: not this model's codes")
        codes = quantizer.unpack(torch.from_numpy(buffer.copy()), self.config.num_latent_tokens)
        return codes.to(self.device if device is None else device, self.dtype)

    def _latents(self, images: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and len(images) > 1:
            return torch.cat([self._latents(image) for image in images.split(1)])
        patches = patchify(images, self.config.patch_size)
        return self.encoder(patches, self._grid(images), self.config.num_latent_tokens)

    def _velocity(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | None,
        codes: torch.Tensor,
        code_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        self._check_images(sample, "sample")
        self._check_codes(codes)
        if codes.shape[0] != sample.shape[0]:
            raise ValueError(f"codes have batch {codes.shape[0]}, sample has {sample.shape[0]}: they must be equal")
        if timestep is None:
            raise ValueError("timestep is missing: the velocity needs t in [0, 1]")
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        if timestep.shape[0] not in (1, sample.shape[0]):
            raise ValueError(f"timestep has {timestep.shape[0]} values; expected 1 or the batch, {sample.shape[0]}")
        tokens = nn.functional.pad(codes, (0, 1), value=1.0)
        if code_mask is not None:
            if code_mask.shape != codes.shape[:1]:
                raise ValueError(f"code_mask has shape {tuple(code_mask.shape)}; expected ({codes.shape[0]},)")
            tokens = tokens * code_mask.to(tokens.dtype)[:, None, None]
        if self.use_slicing and len(sample) > 1:
            slices = zip(sample.split(1), timestep.expand(len(sample)).split(1), tokens.split(1), strict=True)
            return torch.cat([self._decode(*part) for part in slices])
        return self._decode(sample, timestep, tokens)

    def _decode(self, sample: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        patches = patchify(sample, self.config.patch_size)
        patches = self.decoder(patches, self._grid(sample), tokens.shape[1], tokens.to(patches.dtype), timestep)
        return unpatchify(patches, self.config.patch_size, *sample.shape[-2:])

    def _grid(self, images: torch.Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size

    def _discrete(self, wanted: str) -> nn.Module:
        if not self.quantize.is_discrete:
            raise ValueError(f"{wanted} needs discrete codes, but this model has quantizer={self.config.quantizer!r}")
        return self.quantize

    def _check_images(self, images: torch.Tensor, name: str) -> None:
        self._check_channels(images, name)
        patch, (height, width) = self.config.patch_size, images.shape[-2:]
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(f"{name} are {height} x {width} pixels; both must be positive multiples of {patch}")

    def _check_channels(self, images: torch.Tensor, name: str) -> None:
        channels = self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"{name} have shape {tuple(images.shape)}; expected (batch, {channels}, height, width)")

    def _check_codes(self, codes: torch.Tensor) -> None:
        expected = (self.config.num_latent_tokens, self.config.latent_channels)
        if codes.ndim != 3 or tuple(codes.shape[1:]) != expected:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (batch, {expected[0]}, {expected[1]})")


def _check_config(config) -> None:
    for name in (
        "sample_size",
        "in_channels",
        "patch_size",
        "num_latent_tokens",
        "latent_channels",
        "codebook_bits",
        "encoder_num_layers",
        "decoder_num_layers",
        "encoder_hidden_size",
        "decoder_hidden_size",
        "num_attention_heads",
        "fsq_levels",
    ):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name}={config[name]!r} must be a whole number of at least 1")
    for name, published in (("mlp_ratio", 4.0), ("rope_theta", 10000.0)):
        if type(config[name]) not in (int, float) or not 0 < config[name] < math.inf:
            raise ValueError(f"{name}={config[name]!r} must be a positive number; the published value is {published}")
    if config.sample_size % config.patch_size:
        raise ValueError(
            f"sample_size={config.sample_size} must be a multiple of patch_size={config.patch_size}, e.g. "
            f"{config.sample_size // config.patch_size * config.patch_size or config.patch_size}"
        )
    for name in ("encoder_hidden_size", "decoder_hidden_size"):
        width, heads = config[name], config.num_attention_heads
        if width % heads:
            raise ValueError(f"{name}={width} must be a multiple of num_attention_heads={heads}, e.g. {heads * 64}")
        try:
            scale_rope_axes(config.rope_axes, width // heads)
        except ValueError as error:
            raise ValueError(f"{name}={width} with num_attention_heads={heads}: {error}") from None
        if width * config.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio={config.mlp_ratio} leaves no channel in the MLP; the published value is 4.0")
