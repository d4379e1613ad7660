"""
The MMDiT trunk of FlowMo (paper section 3.1): two streams, image patches and latent tokens, joined in attention.

The encoder is a trunk without time that reads out its tokens; the decoder is a trunk with time that reads out its
patches. What the read-out stream does not depend on is not built: the last block keeps the other stream only as far
as it gives keys and values.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from flowmo_diffusers.models.attention import attend
from flowmo_diffusers.models.rotary import rotary_table, rotate, scale_rope_axes


# Latent tokens and patches, each (b, length, dim); `None` for a stream that attention leaves as it is.
Streams = tuple[torch.Tensor | None, torch.Tensor | None]

TIME_FEATURES = 256
TIME_SCALE = 1000.0


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(b, c, h, w) to a sequence (b, h/p * w/p, p * p * c), features ordered patch row, patch column, channel."""
    b, c, h, w = images.shape
    p = patch_size
    grid = images.reshape(b, c, h // p, p, w // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """The inverse of [`patchify`] for images of `height` x `width` pixels."""
    b, p = patches.shape[0], patch_size
    grid = patches.reshape(b, height // p, width // p, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """AdaLN: (1 + scale) x + shift, for x (b, length, dim) and shift and scale (b or 1, 1, dim)."""
    return torch.addcmul(shift, x, 1 + scale)


class FusedProjection(nn.Linear):
    """Queries, keys and values in one product. A context stream keeps the rows of the queries, since norm rescaling
    acts on the whole matrix, but never computes what nobody reads."""

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim)

    def forward(self, x: torch.Tensor, queries: bool = True) -> torch.Tensor:
        if queries:
            return super().forward(x)
        dim = self.in_features
        return F.linear(x, self.weight[dim:], self.bias[dim:])


class StreamNorm(nn.LayerNorm):
    """LayerNorm without affine, from and to the input's dtype. Autocast would keep the input and the result in float32
    for the backward pass, more than all else of a block's norms; the mean and the variance are float32 in any case."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class HeadNorm(nn.RMSNorm):
    """RMS norm to float32, scale included, whatever the dtype of the weights and of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class FlowMoStreamProjections(nn.Module):
    """What one stream brings to joint attention: fused projection, normed and turned queries and keys, output."""

    def __init__(self, dim: int, num_heads: int, context_only: bool):
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.context_only = context_only
        self.to_qkv = FusedProjection(dim)
        self.norm_q = None if context_only else HeadNorm(head_dim, eps=1e-6)
        self.norm_k = HeadNorm(head_dim, eps=1e-6)
        self.to_out = None if context_only else nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(b, length, dim) to queries (`None` in a context stream), keys, values: (b, length, heads, head width)."""
        heads = self._project(x).unflatten(-1, (-1, self.num_heads, x.shape[-1] // self.num_heads))
        *query, key, value = heads.unbind(2)
        # In float32 from the norm on, and rounded once.
        query = rotate(self.norm_q(query[0]), rotary).to(value.dtype) if query else None
        return query, rotate(self.norm_k(key), rotary).to(value.dtype), value

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        if not self.context_only:
            return self.to_qkv(x)
        if isinstance(self.to_qkv, FusedProjection):
            return self.to_qkv(x, queries=False)
        return self.to_qkv(x)[..., x.shape[-1] :]  # what PEFT has put in its place adds to the whole product


class FlowMoAttnProcessor:
    """Joint attention over latent tokens and patches, tokens first, through diffusers' attention dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "FlowMoAttention", tokens: torch.Tensor, patches: torch.Tensor, rotary: torch.Tensor
    ) -> Streams:
        token_query, token_key, token_value = attn.tokens(tokens, rotary[: tokens.shape[1]])
        patch_query, patch_key, patch_value = attn.patches(patches, rotary[tokens.shape[1] :])
        attended = attend(
            torch.cat([query for query in (token_query, patch_query) if query is not None], dim=1),
            torch.cat([token_key, patch_key], dim=1),
            torch.cat([token_value, patch_value], dim=1),
            attn.scale,
            self._attention_backend,
            self._parallel_config,
        ).flatten(2)

        num_tokens = 0 if token_query is None else tokens.shape[1]
        token_out, patch_out = attended[:, :num_tokens], attended[:, num_tokens:]
        return (
            None if token_query is None else attn.tokens.to_out(token_out),
            None if patch_query is None else attn.patches.to_out(patch_out),
        )


class FlowMoAttention(nn.Module, AttentionModuleMixin):
    """
    Weights of joint attention over both streams; the processor computes it.

    Args:
        context: The stream ("tokens" or "patches") that gives keys and values only, or `None`.
    """

    _default_processor_cls = FlowMoAttnProcessor
    _available_processors = [FlowMoAttnProcessor]
    _supports_qkv_fusion = False  # the projections are one matrix already

    def __init__(self, dim: int, num_heads: int, context: str | None):
        super().__init__()
        # muP: 8 / head width, which is the usual 1 / sqrt at 64 and falls faster beyond (paper section 3.1).
        self.scale = 8.0 * num_heads / dim
        self.tokens = FlowMoStreamProjections(dim, num_heads, context_only=context == "tokens")
        self.patches = FlowMoStreamProjections(dim, num_heads, context_only=context == "patches")
        self.set_processor(self._default_processor_cls())

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor, rotary: torch.Tensor) -> Streams:
        return self.processor(self, tokens, patches, rotary)


class FlowMoModulation(nn.Linear):
    """AdaLN: shift, scale and gate for attention, then for the MLP, from the time embedding. Gates start at zero."""

    def __init__(self, dim: int):
        super().__init__(dim, 6 * dim)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        dim = self.in_features
        with torch.no_grad():
            for gate in (2, 5):
                self.weight[gate * dim : (gate + 1) * dim] = 0
                self.bias[gate * dim : (gate + 1) * dim] = 0

    def forward(self, time: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(F.silu(time))[:, None].chunk(6, dim=-1)


class FlowMoStream(nn.Module):
    """Norms, modulation and MLP of one stream of a block; attention is shared between the two."""

    def __init__(self, dim: int, mlp_ratio: float, timed: bool, context_only: bool):
        super().__init__()
        self.modulation = FlowMoModulation(dim) if timed else None
        self.norm1 = StreamNorm(dim)
        if not context_only:
            hidden = int(dim * mlp_ratio)
            self.norm2 = StreamNorm(dim)
            self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def before_attention(self, x: torch.Tensor, time: torch.Tensor | None) -> tuple[torch.Tensor, tuple | None]:
        if self.modulation is None:
            return self.norm1(x), None
        shift, scale, *rest = self.modulation(time)
        return modulate(self.norm1(x), shift, scale), rest

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor, rest: tuple | None) -> torch.Tensor:
        if rest is None:
            x = x + attended
            return x + self.mlp(self.norm2(x))
        gate1, shift2, scale2, gate2 = rest
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FlowMoBlock(nn.Module):
    """
    A double-stream block.

    Args:
        timed: Whether the block is modulated by time. Without it modulation is the identity and gates are one.
        context: The stream ("tokens" or "patches") that only gives keys and values, or `None`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, timed: bool, context: str | None = None):
        super().__init__()
        self.attn = FlowMoAttention(dim, num_heads, context)
        self.tokens = FlowMoStream(dim, mlp_ratio, timed, context_only=context == "tokens")
        self.patches = FlowMoStream(dim, mlp_ratio, timed, context_only=context == "patches")

    def forward(
        self, tokens: torch.Tensor, patches: torch.Tensor, time: torch.Tensor | None, rotary: torch.Tensor
    ) -> Streams:
        """
        Args:
            tokens: (b, num_tokens, dim).
            patches: (b, rows * columns, dim).
            time: Time embedding (b or 1, dim); `None` without modulation.
            rotary: See [`rotary_table`].

        Returns:
            Both streams; a context stream as it came.
        """
        token_input, token_rest = self.tokens.before_attention(tokens, time)
        patch_input, patch_rest = self.patches.before_attention(patches, time)
        token_attended, patch_attended = self.attn(token_input, patch_input, rotary)
        if token_attended is not None:
            tokens = self.tokens.after_attention(tokens, token_attended, token_rest)
        if patch_attended is not None:
            patches = self.patches.after_attention(patches, patch_attended, patch_rest)
        return tokens, patches


# `torch.compile` keeps few versions of a function, and takes a width for variable that is another one at the next
# call. So each kind of block has a `forward` of its own, compiled once for all blocks of its kind.


class FlowMoEncoderBlock(FlowMoBlock):
    def forward(self, *streams) -> Streams:
        return super().forward(*streams)


class FlowMoEncoderLastBlock(FlowMoBlock):
    def forward(self, *streams) -> Streams:
        return super().forward(*streams)


class FlowMoDecoderBlock(FlowMoBlock):
    def forward(self, *streams) -> Streams:
        return super().forward(*streams)


class FlowMoDecoderLastBlock(FlowMoBlock):
    def forward(self, *streams) -> Streams:
        return super().forward(*streams)


BLOCKS = [FlowMoEncoderBlock, FlowMoEncoderLastBlock, FlowMoDecoderBlock, FlowMoDecoderLastBlock]


class FlowMoReadout(nn.Module):
    """The output layer. With time a modulated norm comes first; its result is normed once more, as published."""

    def __init__(self, dim: int, out_features: int, timed: bool):
        super().__init__()
        self.norm = StreamNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim) if timed else None
        self.linear = nn.Linear(dim, out_features)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        if self.modulation is not None:
            shift, scale = self.modulation(F.silu(time))[:, None].chunk(2, dim=-1)
            x = modulate(self.norm(x), shift, scale)
        return self.linear(self.norm(x))


class FlowMoTrunk(nn.Module):
    """
    MMDiT over image patches and latent tokens.

    Args:
        readout: "tokens" for an encoder (no time, tokens start as one learned vector, told apart by their rotary
            position alone), "patches" for a decoder (modulated by time, tokens given).
        patch_features: Width of a flattened patch.
        token_features: Width of a latent token where it enters (decoder) or leaves (encoder).
        num_layers: Blocks.
        dim: Width of both streams.
        rope_axes: Proportions of the three rotary axes, scaled to the head width.
        rope_theta: Base of the rotary frequencies.
    """

    def __init__(
        self,
        readout: str,
        patch_features: int,
        token_features: int,
        num_layers: int,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        rope_axes: tuple[int, ...],
        rope_theta: float,
    ):
        super().__init__()
        timed = readout == "patches"
        context = "tokens" if timed else "patches"
        self.readout = readout
        self.rope_axes = scale_rope_axes(rope_axes, dim // num_heads)
        self.rope_theta = rope_theta
        self.patch_in = nn.Linear(patch_features, dim)
        if timed:
            self.token_in = nn.Linear(token_features, dim)
            self.time_in = TimestepEmbedding(TIME_FEATURES, dim)
        else:
            bound = token_features**-0.5
            self.latent_token = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))
        block, last_block = BLOCKS[2:] if timed else BLOCKS[:2]
        sizes = (dim, num_heads, mlp_ratio, timed)
        self.blocks = nn.ModuleList(block(*sizes) for _ in range(num_layers - 1))
        self.blocks.append(last_block(*sizes, context))
        self.head = FlowMoReadout(dim, patch_features if timed else token_features, timed)
        self.gradient_checkpointing = False

    def forward(
        self,
        patches: torch.Tensor,
        grid: tuple[int, int],
        num_tokens: int,
        tokens: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            patches: Flattened patches (b, rows * columns, patch features).
            grid: Rows and columns of patches.
            tokens: Latent tokens (b, num_tokens, token features); decoder only.
            timestep: t in [0, 1], shape (b,) or (1,); decoder only.

        Returns:
            The read-out stream: (b, num_tokens, token features) or (b, rows * columns, patch features).
        """
        patches = self.patch_in(patches)
        if self.readout == "tokens":
            time = None
            tokens = self.latent_token.to(patches.dtype).repeat(patches.shape[0], num_tokens, 1)
        else:
            # Features in float32 whatever the model's dtype: neighbouring times differ in the last bits of 1000 t.
            features = get_timestep_embedding(timestep.float() * TIME_SCALE, TIME_FEATURES, True, 0)
            time = self.time_in(features.to(patches.dtype))
            tokens = self.token_in(tokens)

        rotary = rotary_table(num_tokens, *grid, self.rope_axes, self.rope_theta, patches.device)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, patches = self._gradient_checkpointing_func(block, tokens, patches, time, rotary)
            else:
                tokens, patches = block(tokens, patches, time, rotary)
        return self.head(tokens if self.readout == "tokens" else patches, time)
