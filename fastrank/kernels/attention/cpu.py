"""Packed attention in C++ (csrc/attention.cpp): CPU tensors of float32 or bf16, computed in float32; q, k and v are
read in place from strided views.

Saved for the backward are the inputs and two numbers for each query and head, from which the very probabilities of the
forward are computed again.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastrank import _cpu
from fastrank.kernels.arrays import array_of

MAX_HEAD_DIM = 128
Segments = list[np.ndarray]  # begins and ends of each pair's queries, then of its keys: four int32 arrays
Allocate = Callable[..., Tensor]  # torch.empty, or torch.zeros where some rows belong to no pair


def refusals(tensor: Tensor) -> list[str]:
    head_dim = tensor.shape[-1]
    if head_dim <= MAX_HEAD_DIM:
        return []
    return [f"The cpu backend computes attention for head dimensions up to {MAX_HEAD_DIM}, not for {head_dim}."]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float,
    span: tuple[int, int] | None = None,
) -> Tensor:
    cuts = offsets.contiguous().numpy()
    query_cuts = cuts if query_offsets is None else query_offsets.contiguous().numpy()
    segments = [query_cuts[:-1], query_cuts[1:], cuts[:-1], cuts[1:]]
    return _attend(q, k, v, segments, scale, torch.empty)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    batch, length = q.shape[:2]
    begins = torch.arange(batch, dtype=torch.int32) * length
    ends = (begins + lengths).int()
    segments = [begins.numpy(), ends.numpy()] * 2
    out = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), segments, scale, torch.zeros)
    return out.unflatten(0, (batch, length))


def fused_attention(qkv: Tensor, offsets: Tensor, scale: float, span: tuple[int, int] | None = None) -> Tensor:
    cuts = offsets.contiguous().numpy()
    segments = [cuts[:-1], cuts[1:]] * 2
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _FusedAttention.apply(qkv, segments, scale)
    return _forward(qkv.unbind(1), segments, scale, torch.empty)


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, allocate: Allocate) -> Tensor:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, segments, scale, allocate)
    return _forward((q, k, v), segments, scale, allocate)


def _forward(
    qkv: Sequence[Tensor], segments: Segments, scale: float, allocate: Allocate, statistics: Sequence[Tensor] = ()
) -> Tensor:
    """The output; `statistics` takes the largest score and the inverse sum of exponentials of every head and query."""
    out = allocate(qkv[0].shape, dtype=qkv[0].dtype)
    numbers = map(array_of, statistics or (None, None))
    _cpu.attention_forward(*map(array_of, qkv), segments, scale, array_of(out), *numbers, torch.get_num_threads())
    return out


def _backward(
    qkv: Sequence[Tensor],
    segments: Segments,
    scale: float,
    dout: Tensor,
    statistics: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> None:
    """Writes the gradients that are given."""
    arrays = map(array_of, (dout.contiguous(), *statistics, *gradients))
    _cpu.attention_backward(*map(array_of, qkv), segments, scale, *arrays, torch.get_num_threads())


def _statistics(q: Tensor) -> list[Tensor]:
    return [torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32) for _ in range(2)]


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, segments, scale, allocate):
        statistics = _statistics(q)
        ctx.save_for_backward(q, k, v, *statistics)
        ctx.settings = segments, scale, allocate
        return _forward((q, k, v), segments, scale, allocate, statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        segments, scale, allocate = ctx.settings
        q, k, v, *statistics = ctx.saved_tensors
        gradients = [
            allocate(tensor.shape, dtype=tensor.dtype) if needed else None
            for tensor, needed in zip((q, k, v), ctx.needs_input_grad, strict=False)
        ]
        _backward((q, k, v), segments, scale, dout, statistics, gradients)
        return *gradients, None, None, None


class _FusedAttention(Function):
    @staticmethod
    def forward(ctx, qkv, segments, scale):
        q, k, v = qkv.unbind(1)
        statistics = _statistics(q)
        ctx.save_for_backward(qkv, *statistics)
        ctx.settings = segments, scale
        return _forward((q, k, v), segments, scale, torch.empty, statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        segments, scale = ctx.settings
        qkv, *statistics = ctx.saved_tensors
        gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
        _backward(qkv.unbind(1), segments, scale, dout, statistics, gradient.unbind(1))
        return gradient, None, None
