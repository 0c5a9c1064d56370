"""Packed attention in C++ (csrc/attention.cpp): float32 on CPU tensors, q, k and v read in place from strided views.

Saved for the backward are the inputs and two numbers for each query and head, from which the very probabilities of the
forward are computed again.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastrank import _cpu

MAX_HEAD_DIM = 128
Segments = list  # begins and ends of each pair's queries, then of its keys: four int32 arrays


def refusals(tensor: Tensor) -> list[str]:
    head_dim = tensor.shape[-1]
    if head_dim <= MAX_HEAD_DIM:
        return []
    return [f"The cpu backend computes attention for head dimensions up to {MAX_HEAD_DIM}, not for {head_dim}."]


def attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, query_offsets: Tensor | None, scale: float) -> Tensor:
    cuts = offsets.numpy()
    query_cuts = cuts if query_offsets is None else query_offsets.numpy()
    segments = [query_cuts[:-1], query_cuts[1:], cuts[:-1], cuts[1:]]
    return _Attention.apply(q, k, v, segments, scale, torch.empty)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    batch, length = q.shape[:2]
    begins = torch.arange(batch, dtype=torch.int32) * length
    ends = (begins + lengths).int()
    segments = [begins.numpy(), ends.numpy()] * 2
    out = _Attention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), segments, scale, torch.zeros)
    return out.unflatten(0, (batch, length))


def fused_attention(qkv: Tensor, offsets: Tensor, scale: float) -> Tensor:
    cuts = offsets.numpy()
    return _FusedAttention.apply(qkv, [cuts[:-1], cuts[1:]] * 2, scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, out: Tensor, statistics: list) -> None:
    arrays = [tensor.detach().numpy() for tensor in (q, k, v)]
    _cpu.attention_forward(*arrays, segments, scale, out.numpy(), *statistics, torch.get_num_threads())


def _backward(saved: tuple, dout: Tensor, segments: Segments, scale: float, gradients: list) -> None:
    q, k, v, *statistics = (tensor.detach().numpy() for tensor in saved)
    dout = dout.contiguous().numpy()
    wanted = [None if gradient is None else gradient.numpy() for gradient in gradients]
    _cpu.attention_backward(q, k, v, segments, scale, dout, *statistics, *wanted, torch.get_num_threads())


def _statistics(q: Tensor, wanted: bool) -> list[Tensor]:
    """Room for the largest score and the inverse of the sum of exponentials of every head and query."""
    return [q.new_empty((q.shape[1], q.shape[0])) for _ in range(2)] if wanted else []


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, segments, scale, allocate):
        # `allocate` is torch.zeros where rows lie outside every pair.
        out = allocate(q.shape, dtype=q.dtype)
        statistics = _statistics(q, any(ctx.needs_input_grad))
        _forward(q, k, v, segments, scale, out, [tensor.numpy() for tensor in statistics] or [None, None])
        ctx.save_for_backward(q, k, v, *statistics)
        ctx.settings = segments, scale, allocate
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        segments, scale, allocate = ctx.settings
        gradients = [
            allocate(tensor.shape, dtype=tensor.dtype) if needed else None
            for tensor, needed in zip(ctx.saved_tensors[:3], ctx.needs_input_grad[:3], strict=True)
        ]
        _backward(ctx.saved_tensors, dout, segments, scale, gradients)
        return *gradients, None, None, None


class _FusedAttention(Function):
    @staticmethod
    def forward(ctx, qkv, segments, scale):
        q, k, v = qkv.unbind(1)
        out = torch.empty(q.shape, dtype=q.dtype)
        statistics = _statistics(q, any(ctx.needs_input_grad))
        _forward(q, k, v, segments, scale, out, [tensor.numpy() for tensor in statistics] or [None, None])
        ctx.save_for_backward(qkv, *statistics)
        ctx.settings = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, *statistics = ctx.saved_tensors
        gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
        _backward((*qkv.unbind(1), *statistics), dout, *ctx.settings, list(gradient.unbind(1)))
        return gradient, None, None
