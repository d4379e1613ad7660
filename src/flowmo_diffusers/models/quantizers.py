"""
Quantizers: from the encoder's latents to the codes the decoder sees.

One interface for all: `quantizer(latents, generator)` takes latents (b, tokens, channels) and gives codes, indices and
the unweighted terms of the training loss. Terms are computed in float32 whatever the latents' dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from flowmo_diffusers.engine.seeding import Generators


ENTROPY_TEMPERATURE = 0.1

JointMean = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class QuantizerOutput:
    """
    Args:
        codes: What the decoder sees (b, tokens, channels), in the latents' dtype.
        indices: (b, tokens, groups) int64, or `None` where the codes are not discrete.
        losses: Unweighted scalar terms by name; empty outside training.
    """

    codes: torch.Tensor
    indices: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


def straight_through(codes: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Exactly `codes` in value, the identity on `latents` in gradient."""
    return codes.detach() + (latents - latents.detach())


class NoQuantizer(nn.Module):
    """The continuous latent itself."""

    is_discrete = False
    latent_multiplier = 1

    def forward(self, latents: torch.Tensor, generator: Generators = None) -> QuantizerOutput:
        return QuantizerOutput(latents)


class KLQuantizer(nn.Module):
    """
    A diagonal Gaussian over the whole latent. The encoder emits mean and log-variance side by side, so its latents
    have twice the channels of the codes. The training term kl_loss is summed over the latent and averaged over images.
    """

    is_discrete = False
    latent_multiplier = 2

    def forward(self, latents: torch.Tensor, generator: Generators = None) -> QuantizerOutput:
        # (b, 2 channels, tokens, 1): the image-like layout diffusers' distribution splits and sums over.
        gaussian = DiagonalGaussianDistribution(latents.float().transpose(1, 2).unsqueeze(-1))
        codes = gaussian.sample(generator).squeeze(-1).transpose(1, 2).to(latents.dtype)
        losses = {"kl_loss": gaussian.kl().mean()} if self.training else {}
        return QuantizerOutput(codes, losses=losses)


class ScalarQuantizer(nn.Module):
    """
    Base of the discrete quantizers: every channel takes one of `levels` values evenly spaced on [-1, 1].

    Channels are gathered into groups of `codebook_bits` bits, group g holding channels g, g + groups, g + 2 groups,
    ...; a group's index is sum_d level_d * levels^d.

    Raises:
        ValueError: If `levels` is not a power of two up to 256, or the bits cannot be divided into groups.
    """

    is_discrete = True
    latent_multiplier = 1

    def __init__(self, channels: int, codebook_bits: int, levels: int):
        super().__init__()
        self.channels = channels
        self.levels = levels
        self.bits_per_channel = levels.bit_length() - 1
        if not 2 <= levels <= 256 or levels != 1 << self.bits_per_channel:
            raise ValueError(
                f"fsq_levels={levels} must be a power of two from 2 to 256: a channel then is whole bits, and "
                "bfloat16 still tells its levels apart"
            )
        self.group_size, rest = divmod(codebook_bits, self.bits_per_channel)
        if not 1 <= codebook_bits <= 24 or rest or channels % self.group_size:
            fitting = [d * self.bits_per_channel for d in range(1, channels + 1) if channels % d == 0]
            raise ValueError(
                f"codebook_bits={codebook_bits} does not divide the {channels * self.bits_per_channel} bits of a "
                f"token (latent_channels={channels}, {self.bits_per_channel} bit a channel) into equal groups of at "
                f"most 24 bits: one of {[bits for bits in fitting if bits <= 24]} would fit"
            )
        self.groups = channels // self.group_size

    @property
    def bits_per_token(self) -> int:
        return self.channels * self.bits_per_channel

    @property
    def codebook_size(self) -> int:
        return self.levels**self.group_size

    def codes_to_levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes to the nearest of the whole levels 0 ... levels - 1, int64."""
        return ((codes.float() + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()

    def levels_to_codes(self, levels: torch.Tensor) -> torch.Tensor:
        """Whole levels to float32 codes in [-1, 1]."""
        return levels.float() * (2 / (self.levels - 1)) - 1

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """(b, tokens, channels) codes to (b, tokens, groups) int64 indices."""
        digits = self.codes_to_levels(codes).unflatten(-1, (self.group_size, self.groups))
        return (digits * self._place_values(codes.device)[:, None]).sum(-2)

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """(b, tokens, groups) int64 indices to (b, tokens, channels) float32 codes."""
        digits = indices[..., None, :] // self._place_values(indices.device)[:, None] % self.levels
        return self.levels_to_codes(digits.flatten(-2))

    def packed_bytes(self, num_tokens: int) -> int:
        """Length of an image's packed codes: its bits, rounded up to whole bytes."""
        return -(-num_tokens * self.bits_per_token // 8)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """
        (b, tokens, channels) codes to (b, bytes) uint8, zeros behind the last bit.

        Bits run token by token, channel by channel, each byte filled from its most significant bit (big-endian); a
        channel of more than one bit writes its level, most significant bit first. For "lfq" +1 is a 1.
        """
        bits = _to_bits(self.codes_to_levels(codes), self.bits_per_channel).flatten(1)
        bits = F.pad(bits, (0, -bits.shape[1] % 8))
        return _from_bits(bits.unflatten(1, (bits.shape[1] // 8, 8))).to(torch.uint8)

    def unpack(self, packed: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """
        The inverse of [`~ScalarQuantizer.pack`]: (b, bytes) uint8 to (b, tokens, channels) float32 codes. What is
        behind the last bit is not looked at.

        Raises:
            ValueError: If shape or dtype do not fit.
        """
        size = self.packed_bytes(num_tokens)
        if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != size:
            raise ValueError(
                f"packed codes are {tuple(packed.shape)} of {packed.dtype}; expected (batch, {size}) uint8"
            )
        bits = _to_bits(packed.long(), 8).flatten(1)[:, : num_tokens * self.bits_per_token]
        return self.levels_to_codes(_from_bits(bits.unflatten(1, (num_tokens, self.channels, self.bits_per_channel))))

    def packed_to_indices(self, packed: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """(b, bytes) uint8 to (b, tokens, groups) int64 indices. Raises as [`~ScalarQuantizer.unpack`]."""
        return self.codes_to_indices(self.unpack(packed, num_tokens))

    def _place_values(self, device: torch.device) -> torch.Tensor:
        return self.levels ** torch.arange(self.group_size, device=device)


def _to_bits(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """(...) int64 to their last bits (..., count), most significant first."""
    return (numbers[..., None] >> torch.arange(count - 1, -1, -1, device=numbers.device)) & 1


def _from_bits(bits: torch.Tensor) -> torch.Tensor:
    """The inverse of [`_to_bits`]."""
    return (bits << torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)).sum(-1)


class LFQQuantizer(ScalarQuantizer):
    """
    Lookup-free quantization (paper section 3.1): c = sign(latent), straight-through gradient.

    Training terms: entropy_loss = E[H(q)] - H(E[q]) over the codebook groups and commit_loss = E|latent - c|^2.

    Attributes:
        joint_mean: See [`lfq_entropies`]; `None` takes E[q] over the batch at hand, as the published training does.
    """

    def __init__(self, channels: int, codebook_bits: int):
        super().__init__(channels, codebook_bits, levels=2)
        self.joint_mean: JointMean | None = None

    def forward(self, latents: torch.Tensor, generator: Generators = None) -> QuantizerOutput:
        signs = torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)
        losses = {}
        if self.training:
            groups = latents.unflatten(-1, (self.group_size, self.groups)).transpose(-1, -2).flatten(0, -2)
            per_sample, codebook = lfq_entropies(groups, joint_mean=self.joint_mean)
            losses = {
                "entropy_loss": per_sample - codebook,
                "commit_loss": F.mse_loss(latents.float(), signs.float()),
                "per_sample_entropy": per_sample.detach(),
                "codebook_entropy": codebook.detach(),
            }
        return QuantizerOutput(straight_through(signs, latents), self.codes_to_indices(signs), losses)


class FSQQuantizer(ScalarQuantizer):
    """
    Finite scalar quantization (Mentzer et al. 2024) on evenly spaced levels symmetric about zero: the channel is
    bounded by tanh and rounded, with a straight-through gradient. It needs no training term.
    """

    def forward(self, latents: torch.Tensor, generator: Generators = None) -> QuantizerOutput:
        bounded = latents.float().tanh()
        codes = self.levels_to_codes(self.codes_to_levels(bounded))
        return QuantizerOutput(straight_through(codes, bounded).to(latents.dtype), self.codes_to_indices(codes))


def lfq_entropies(
    vectors: torch.Tensor, eps: float = 1e-5, joint_mean: JointMean | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean per-sample entropy and entropy of the mean code distribution, in nats (paper, L_ent).

    q(code | x) = softmax(2 <x, code> / 0.1) over {-1, 1}^K factorises into K independent bits with
    P(bit_d = 1) = sigmoid(4 x_d / 0.1). The first entropy is a sum of K binary ones; the mean distribution is
    A^T B / N, where A and B hold the N distributions of the low and the high half of the bits. Nothing of size
    N x 2^K is formed. Everything comes from log P of single bits, all negative: no sum of them cancels.

    Args:
        vectors: Latent groups (N, K), of any floating dtype; computed in float32.
        eps: Added inside the logarithm of the mean distribution, as published.
        joint_mean: Where the vectors are one of several equal parts of a batch (processes, accumulated batches): maps
            their mean distribution to that of the whole batch, without a gradient. The second entropy is then that of
            the whole batch, and its gradient averaged over the parts is the whole batch's.

    Returns:
        Two scalars, from about 0 to K log 2.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        n, k = vectors.shape
        logits = vectors.float() * (4 / ENTROPY_TEMPERATURE)
        log_p = F.logsigmoid(torch.stack([-logits, logits], dim=1))  # (N, 2, K): of bit_d = 0 and of bit_d = 1
        per_sample = (log_p.exp() * log_p).sum() / -n

        halves = (log_p.flatten(1) @ _bits_of_codes(k, vectors.device)).exp()
        low, high = halves.split([2 ** ((k + 1) // 2), 2 ** (k // 2)], dim=1)  # q of the codes of either half
        mean = high.T @ low / n
        if joint_mean is not None:
            mean = straight_through(joint_mean(mean.detach()), mean)
        codebook = -(mean * (mean + eps).log()).sum()
    return per_sample, codebook


@lru_cache(maxsize=32)
def _bits_of_codes(k: int, device: torch.device) -> torch.Tensor:
    """
    (2 k, 2^low + 2^high): for each code of the low half of k bits, then of the high half, 1 at the bits that are 0 in
    it (first k rows) and at those that are 1 (last k rows), and 0 at the bits of the other half.
    """
    with torch.inference_mode(False):  # else no later training step could save it for backward
        halves = [(torch.arange(2**h) >> torch.arange(h)[:, None]) & 1 for h in ((k + 1) // 2, k // 2)]
        zeros, ones = torch.block_diag(*[1 - half for half in halves]), torch.block_diag(*halves)
        return torch.cat([zeros, ones]).float().to(device)


def build_quantizer(name: str, channels: int, codebook_bits: int, fsq_levels: int) -> nn.Module:
    """
    Args:
        name: "lfq", "fsq", "kl" or "none".
        channels: Channels of the codes.
        codebook_bits: Bits of a group, where codes are discrete.
        fsq_levels: Values a channel can take, for "fsq".

    Raises:
        ValueError: If the name is unknown or the bits cannot be divided into groups.
    """
    if name == "lfq":
        return LFQQuantizer(channels, codebook_bits)
    if name == "fsq":
        return FSQQuantizer(channels, codebook_bits, fsq_levels)
    if name == "kl":
        return KLQuantizer()
    if name == "none":
        return NoQuantizer()
    raise ValueError(f"quantizer={name!r} is unknown: it must be 'lfq', 'fsq', 'kl' or 'none'")
