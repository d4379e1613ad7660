"""Gradient checkpointing that does not compute attention again: its result is one stream wide, and costs the most."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flowmo_diffusers.models.attention_by_products import OPERATOR


KEPT = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    OPERATOR,
]

_this_thread = threading.local()  # whose `keeping` is the mode that attention is to run in


def checkpoint_but_attention(block: nn.Module, *args: Any) -> Any:
    """
    The result of a block that draws nothing at random. In the backward pass everything in it is computed again but
    attention, of which the result stays in memory beside the block's inputs. Attention that is no operator of
    PyTorch's own is computed again too.
    """
    contexts = partial(create_selective_checkpoint_contexts, KEPT)
    # PyTorch's way looks at every operator from Python, of which a compiled block has few, and an eager one so many
    # that attention alone is shown to it.
    eager = block._compiled_call_impl is None and not torch.compiler.is_compiling()
    context_fn = (lambda: map(_for_attention, contexts())) if eager else contexts
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)


def kept_for_backward() -> AbstractContextManager:
    """Around attention: within [`checkpoint_but_attention`] its result is kept, or given back."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return getattr(_this_thread, "keeping", None) or nullcontext()


@contextmanager
def _for_attention(mode: AbstractContextManager) -> Iterator[None]:
    before, _this_thread.keeping = getattr(_this_thread, "keeping", None), mode
    try:
        yield
    finally:
        _this_thread.keeping = before
