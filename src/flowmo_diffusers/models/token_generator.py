"""FlowMoTokenGenerator: a transformer over FlowMo's tokens that predicts them in groups of bits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from flowmo_diffusers.models.adapters import AdapterMixin
from flowmo_diffusers.models.loading import WholeCheckpointsOnly
from flowmo_diffusers.models.mmdit import HeadNorm, modulate


MASK = -1  # the index of a group that is not known
INIT_STD = 0.02


@dataclass
class FlowMoTokenGeneratorOutput(BaseOutput):
    """
    Args:
        logits: Of each group's values (b, tokens, groups, 2^group_bits).
    """

    logits: torch.Tensor


def indices_to_bits(indices: torch.Tensor, group_bits: int) -> torch.Tensor:
    """Indices (b, tokens, groups) to bits (b, tokens, groups, group_bits), ±1, lowest first; 0 where masked."""
    bits = (indices[..., None] >> torch.arange(group_bits, device=indices.device)) & 1
    return torch.where(indices[..., None] == MASK, 0, 2 * bits - 1)


class KeyValues:
    """Keys and values of one block's tokens so far, (b, length, heads, head width)."""

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All of them, with the new ones at the end."""
        self.key = key if self.key is None else torch.cat([self.key, key], dim=1)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=1)
        return self.key, self.value


class FlowMoTokenCache:
    """
    What an autoregressive generator has computed of the tokens so far: keys and values of each block, and the newest
    token's last hidden state, which all of its groups are predicted from. One cache serves one batch from its first
    token on.
    """

    def __init__(self) -> None:
        self.blocks: list[KeyValues] = []
        self.hidden: torch.Tensor | None = None
        self.length = 0


class FlowMoTokenAttnProcessor:
    """Self-attention through diffusers' attention dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "FlowMoTokenAttention", x: torch.Tensor, cache: KeyValues | None) -> torch.Tensor:
        query, key, value = attn.to_qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
        if cache is not None:
            key, value = cache.extend(key, value)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            is_causal=attn.causal and query.shape[1] > 1,  # a single new token sees all before it
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(attended.flatten(2))


class FlowMoTokenAttention(nn.Module, AttentionModuleMixin):
    """Weights of self-attention over tokens, with RMS-normed queries and keys; the processor computes it."""

    _default_processor_cls = FlowMoTokenAttnProcessor
    _available_processors = [FlowMoTokenAttnProcessor]
    _supports_qkv_fusion = False  # the projections are one matrix already

    def __init__(self, dim: int, num_heads: int, causal: bool):
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = HeadNorm(dim // num_heads, eps=1e-6)
        self.norm_k = HeadNorm(dim // num_heads, eps=1e-6)
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(self._default_processor_cls())

    def forward(self, x: torch.Tensor, cache: KeyValues | None = None) -> torch.Tensor:
        return self.processor(self, x, cache)


class FlowMoTokenBlock(nn.Module):
    """
    A pre-norm block whose norms and gates depend on the class: a shift, scale and gate for attention and for the MLP,
    from one projection that all blocks share plus the block's own offsets (as in PixArt-alpha, arXiv 2310.00426).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, causal: bool):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = FlowMoTokenAttention(dim, num_heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, cache: KeyValues | None = None) -> torch.Tensor:
        """x (b, length, dim) and the class's modulation (b, 6, dim) to x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation).split(1, dim=1)
        x = x + (1 + gate1) * self.attn(modulate(self.norm1(x), shift1, scale1), cache)
        return x + (1 + gate2) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FlowMoGroupLinear(nn.Linear):
    """One linear layer for each group: row g of the input meets the g-th share of the weight's rows."""

    def __init__(self, dim: int, groups: int, values: int):
        super().__init__(dim, groups * values)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, n, groups, dim) to (b, n, groups, values)."""
        weight, bias = (part.unflatten(0, (self.groups, -1)) for part in (self.weight, self.bias))
        return torch.einsum("bngd,gvd->bngv", x, weight) + bias


class FlowMoTokenHead(nn.Module):
    """
    One softmax head for each group of bits, after a norm that depends on the class.

    Args:
        ordered: Whether a group is also predicted from the groups of its token before it. Without it, the groups of a
            token are independent given what the trunk has seen.
    """

    def __init__(self, dim: int, groups: int, group_bits: int, ordered: bool):
        super().__init__()
        self.groups = groups
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = (
            FlowMoGroupLinear(dim, groups, 2**group_bits) if ordered else nn.Linear(dim, groups * 2**group_bits)
        )
        self.ordered = ordered
        if ordered:
            self.own_bits = nn.Linear((groups - 1) * group_bits, dim)  # no group follows on the last one
            self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: Hidden states (b, n, dim).
            condition: Of the class (b, dim).
            bits: Of these very tokens (b, n, groups, group_bits); read only if `ordered`.
        """
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        if not self.ordered:
            return self.linear(modulate(self.norm(x), shift, scale)).unflatten(-1, (self.groups, -1))
        # Row g keeps the groups before g.
        before = torch.ones(self.groups, self.groups - 1, device=x.device, dtype=x.dtype).tril(-1)
        known = bits[:, :, None, :-1] * before[:, :, None]
        x = x[:, :, None] + self.own_bits(known.flatten(3))
        x = x + self.mlp(self.norm(x))
        return self.linear(modulate(self.norm(x), shift[:, None], scale[:, None]))


class FlowMoTokenGenerator(WholeCheckpointsOnly, AdapterMixin, ModelMixin, AttentionMixin, ConfigMixin):
    r"""
    A class-conditional transformer over the tokens of a [`FlowMoAutoencoder`] that predicts them in groups of bits, as
    MaskBit does (arXiv 2409.16211). The input of a token is its bits, ±1 and 0 where masked, through one linear layer;
    there is no table of embeddings. The class is added to each token and shifts, scales and gates the blocks. The
    defaults are MaskBit's size on FlowMo-Lo.

    Args:
        num_tokens: Tokens of an image.
        token_groups: Groups of a token, each masked and predicted by itself.
        group_bits: Bits of a group; its head has 2^group_bits values.
        num_classes: Classes; one more, of id `num_classes`, stands for no class. 0 for tokens without labels.
        hidden_size: Width.
        num_layers: Blocks.
        num_attention_heads: Heads.
        mlp_ratio: Width of a block's MLP over the block's width.
        order: "masked" predicts groups from all that are known, wherever they stand. "autoregressive" predicts a token
            from those before it, and a group from those before it in its token as well, so that the likelihood of an
            image is a plain product.
        id2label: Names of the classes by id, if they have any; synonyms are separated by ", ".
        tokenizer: Digest of the tokenizer whose tokens it was trained on.

    Raises:
        ValueError: If fields do not fit each other; the message names the field and what would fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FlowMoTokenBlock"]
    _repeated_blocks = ["FlowMoTokenBlock"]
    _skip_layerwise_casting_patterns = ["token_in", "class_in", "positions", "modulation", "norm", "head"]

    lora_target_modules = r"blocks\.\d+\.(attn\.to_qkv|attn\.to_out|mlp\.0|mlp\.2)"

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 256,
        token_groups: int = 2,
        group_bits: int = 9,
        num_classes: int = 1000,
        hidden_size: int = 1024,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        order: str = "masked",
        id2label: Mapping[int, str] | None = None,
        tokenizer: str | None = None,
    ):
        super().__init__()
        _check_config(self.config)
        # JSON has only strings as keys.
        self.register_to_config(id2label=None if id2label is None else {int(k): v for k, v in id2label.items()})
        causal = order == "autoregressive"
        self.token_in = nn.Linear(token_groups * group_bits, hidden_size)
        self.positions = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.class_in = nn.Embedding(num_classes + 1, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.blocks = nn.ModuleList(
            FlowMoTokenBlock(hidden_size, num_attention_heads, mlp_ratio, causal) for _ in range(num_layers)
        )
        self.head = FlowMoTokenHead(hidden_size, token_groups, group_bits, ordered=causal and token_groups > 1)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal of 0.02, less where a block adds to the stream; norms do not depend on the class at first."""
        nn.init.trunc_normal_(self.positions, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for out in (block.attn.to_out, block.mlp[-1]):
                nn.init.trunc_normal_(out.weight, std=INIT_STD * (2 * len(self.blocks)) ** -0.5)
        for modulation in (self.modulation, self.head.modulation):
            nn.init.zeros_(modulation.weight)

    @property
    def null_class(self) -> int:
        """The id that stands for no class."""
        return self.config.num_classes

    def forward(
        self,
        indices: torch.Tensor,
        class_labels: torch.Tensor,
        cache: FlowMoTokenCache | None = None,
        return_dict: bool = True,
    ) -> FlowMoTokenGeneratorOutput | tuple[torch.Tensor]:
        """
        Args:
            indices: (b, tokens, groups) int64 as [`FlowMoAutoencoder.encode`] gives them, -1 where masked. An
                autoregressive model also takes the first n tokens, of which the last may be masked in part.
            class_labels: (b,) int64 in [0, num_classes]; `num_classes` is no class.
            cache: Of an autoregressive model, to compute only what is not in it: the logits are then those of the last
                token (b, 1, groups, values).

        Raises:
            ValueError: If shapes do not fit, or there is a cache and nothing to be done with it.
        """
        self._check_inputs(indices, class_labels, cache)
        dtype = self.token_in.weight.dtype
        bits = indices_to_bits(indices, self.config.group_bits).to(dtype)
        condition = self.class_in(class_labels)
        if self.config.order == "masked":
            hidden = self._trunk(self.token_in(bits.flatten(2)) + self.positions, condition)
        else:
            hidden = self._past(bits, condition, cache)
        logits = self.head(hidden, condition, bits[:, -hidden.shape[1] :])
        return FlowMoTokenGeneratorOutput(logits) if return_dict else (logits,)

    def _past(self, bits: torch.Tensor, condition: torch.Tensor, cache: FlowMoTokenCache | None) -> torch.Tensor:
        """Hidden states of what comes before each token; the first one follows on a token all of zeros."""
        length = bits.shape[1]
        done = cache.length if cache else 0
        if done < length:
            before = F.pad(bits.flatten(2), (0, 0, 1, -1))[:, done:]
            hidden = self._trunk(self.token_in(before) + self.positions[done:length], condition, cache)
            if cache is None:
                return hidden
            cache.hidden, cache.length = hidden[:, -1:], length
        return cache.hidden

    def _trunk(self, x: torch.Tensor, condition: torch.Tensor, cache: FlowMoTokenCache | None = None) -> torch.Tensor:
        x = x + condition[:, None]
        modulation = self.modulation(F.silu(condition)).unflatten(-1, (6, -1))
        if cache is not None and not cache.blocks:
            cache.blocks = [KeyValues() for _ in self.blocks]
        parts = [None] * len(self.blocks) if cache is None else cache.blocks
        for block, part in zip(self.blocks, parts, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, modulation, part)
            else:
                x = block(x, modulation, part)
        return x

    def _check_inputs(self, indices: torch.Tensor, class_labels: torch.Tensor, cache: FlowMoTokenCache | None) -> None:
        config, shape = self.config, tuple(indices.shape)
        full = (config.num_tokens, config.token_groups)
        if config.order == "masked":
            if cache is not None:
                raise ValueError("cache: a masked generator has none, each of its steps changes what every token sees")
            fits = shape[1:] == full
        else:
            fits = len(shape) == 3 and 1 <= shape[1] <= full[0] and shape[2] == full[1]
            if cache is not None and (shape[1] < cache.length or 0 < cache.length < shape[1] - 1):
                raise ValueError(
                    f"cache holds {cache.length} tokens, indices have {shape[1]}: only one more can be added at a time"
                )
        if not fits:
            raise ValueError(f"indices have shape {shape}; expected (batch, {full[0]}, {full[1]})")
        if tuple(class_labels.shape) != shape[:1]:
            raise ValueError(f"class_labels have shape {tuple(class_labels.shape)}; expected ({shape[0]},)")


def _check_config(config: Mapping[str, Any]) -> None:
    at_least_one = ("num_tokens", "token_groups", "hidden_size", "num_layers", "num_attention_heads")
    for name in at_least_one:
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name}={config[name]!r} must be a whole number of at least 1")
    if type(config["group_bits"]) is not int or not 1 <= config["group_bits"] <= 16:
        raise ValueError(
            f"group_bits={config['group_bits']} must be from 1 to 16: a head has 2^group_bits values (a tokenizer of "
            "larger groups needs a smaller codebook_bits)"
        )
    if type(config["num_classes"]) is not int or config["num_classes"] < 0:
        raise ValueError(f"num_classes={config['num_classes']!r} must be a whole number of at least 0")
    ratio = config["mlp_ratio"]
    if type(ratio) not in (int, float) or not 1 <= ratio * config["hidden_size"] < math.inf:
        raise ValueError(f"mlp_ratio={ratio!r} must be a positive number that leaves a channel in the MLP, e.g. 4.0")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(
            f"hidden_size={config['hidden_size']} must be a multiple of "
            f"num_attention_heads={config['num_attention_heads']}"
        )
    if config["order"] not in ("masked", "autoregressive"):
        raise ValueError(f"order={config['order']!r} is unknown: it must be 'masked' or 'autoregressive'")
    names = config["id2label"]
    if names is not None and sorted(map(int, names)) != list(range(config["num_classes"])):
        raise ValueError(f"id2label has {len(names)} names; expected one for each id from 0 to num_classes - 1")
