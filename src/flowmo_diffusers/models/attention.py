"""Attention by the fastest way there is on the device at hand."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from flowmo_diffusers.models.attention_by_products import attend_by_products
from flowmo_diffusers.models.checkpointing import kept_for_backward


def cpu_has(feature: str) -> bool:
    """Whether this CPU is known to have it; a PyTorch that cannot tell says no."""
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return probe is not None and probe()


# PyTorch's flash attention multiplies bfloat16 on a CPU by AMX, and without it no faster than float32. Products of
# matrices need AVX512-BF16 only, and are several times as fast with it.
PRODUCTS_BEAT_FLASH = cpu_has("avx512_bf16") and not cpu_has("amx_tile")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    backend: AttentionBackendName | None = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """
    softmax(scale q k^T) v of (b, length, heads, head width), through diffusers' dispatcher but for one case: bfloat16
    on a CPU whose matrix products are fast and whose flash attention is not. A backend that is named is always taken.
    """
    unnamed = backend is None and parallel_config is None
    with kept_for_backward():
        if unnamed and query.device.type == "cpu" and query.dtype == torch.bfloat16 and PRODUCTS_BEAT_FLASH:
            return attend_by_products(query, key, value, scale)
        return dispatch_attention_fn(query, key, value, scale=scale, backend=backend, parallel_config=parallel_config)
