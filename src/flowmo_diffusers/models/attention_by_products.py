"""Attention as products of matrices, an operator with a gradient."""

from collections.abc import Iterator
from typing import Any

import torch


ROWS = 512  # queries at a time: their scores stay in the cache, and memory does not grow with the square of the length


# An operator of its own, because its loops would become one large graph each time `torch.compile` meets it.
@torch.library.custom_op("flowmo_diffusers::attend_by_products", mutates_args=())
def attend_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention (b, length, heads, head width) as plain products of matrices, head by head, some queries at a time."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for q, k, v, out in zip(*map(_heads, (query, key, value, output)), strict=True):
        k, v = k.contiguous(), v.contiguous()
        for q_rows, out_rows in zip(q.split(ROWS), out.split(ROWS), strict=True):
            out_rows.copy_(_probabilities(q_rows.contiguous(), k, scale) @ v)
    return output


@attend_by_products.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("flowmo_diffusers::attend_by_products_backward", mutates_args=())
def _backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values; probabilities p are computed again. ds = p (dp - sum p dp)."""
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for q, k, v, o, do, dq, dk, dv in zip(*map(_heads, (query, key, value, output, grad, *grads)), strict=True):
        k, v = k.contiguous(), v.contiguous()
        k_sum, v_sum = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for start in range(0, len(q), ROWS):
            rows = slice(start, start + ROWS)
            q_rows, do_rows = q[rows].contiguous(), do[rows].contiguous()
            p = _probabilities(q_rows, k, scale)
            v_sum += p.T @ do_rows
            mean = (do_rows.float() * o[rows].float()).sum(-1, keepdim=True)
            ds = (do_rows @ v.T).sub_(mean.to(p.dtype)).mul_(p)
            dq[rows] = torch.addmm(dq[rows], ds, k, beta=0, alpha=scale)
            k_sum += ds.T @ q_rows
        dk.copy_(k_sum.mul_(scale))
        dv.copy_(v_sum)
    return tuple(grads)


@_backward.register_fake
def _(query, key, value, output, grad, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


attend_by_products.register_autograd(
    lambda ctx, grad: (*_backward(*ctx.saved_tensors, grad, ctx.scale), None), setup_context=_setup_context
)

OPERATOR = torch.ops.flowmo_diffusers.attend_by_products.default  # as dispatch modes see it


def _heads(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views (length, head width) of all heads of all images."""
    return (head for image in x.unbind(0) for head in image.unbind(1))


def _probabilities(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.addmm(q.new_empty(1), q, k.T, beta=0, alpha=scale)  # scaled before it is rounded
    return scores.softmax(-1)
