"""Packed attention in C++ (csrc/attention.cpp): float32 on CPU tensors, q, k and v read in place from strided views.

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
    return _forward(_parts(qkv), segments, scale, torch.empty)


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, allocate: Allocate) -> Tensor:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, segments, scale, allocate)
    return _forward([_array(q), _array(k), _array(v)], segments, scale, allocate)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _parts(qkv: Tensor) -> list[np.ndarray]:
    array = _array(qkv)
    return [array[:, 0], array[:, 1], array[:, 2]]


def _forward(
    arrays: list[np.ndarray], segments: Segments, scale: float, allocate: Allocate, statistics: Sequence[Tensor] = ()
) -> Tensor:
    """The output; `statistics` takes the largest score and the inverse sum of exponentials of every head and query."""
    out = allocate(arrays[0].shape, dtype=torch.float32)
    numbers = [tensor.numpy() for tensor in statistics] or [None, None]
    _cpu.attention_forward(*arrays, segments, scale, out.numpy(), *numbers, torch.get_num_threads())
    return out


def _statistics(q: np.ndarray) -> list[Tensor]:
    return [torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32) for _ in range(2)]


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, segments, scale, allocate):
        arrays = [_array(q), _array(k), _array(v)]
        statistics = _statistics(arrays[0])
        ctx.save_for_backward(q, k, v, *statistics)
        ctx.settings = segments, scale, allocate
        return _forward(arrays, segments, scale, allocate, statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        segments, scale, allocate = ctx.settings
        q, k, v, *statistics = (tensor.detach() for tensor in ctx.saved_tensors)
        gradients = [
            allocate(tensor.shape, dtype=torch.float32) if needed else None
            for tensor, needed in zip((q, k, v), ctx.needs_input_grad, strict=False)
        ]
        _cpu.attention_backward(
            q.numpy(),
            k.numpy(),
            v.numpy(),
            segments,
            scale,
            dout.contiguous().numpy(),
            *(tensor.numpy() for tensor in statistics),
            *(None if gradient is None else gradient.numpy() for gradient in gradients),
            torch.get_num_threads(),
        )
        return *gradients, None, None, None


class _FusedAttention(Function):
    @staticmethod
    def forward(ctx, qkv, segments, scale):
        arrays = _parts(qkv)
        statistics = _statistics(arrays[0])
        ctx.save_for_backward(qkv, *statistics)
        ctx.settings = segments, scale
        return _forward(arrays, segments, scale, torch.empty, statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        segments, scale = ctx.settings
        qkv, *statistics = ctx.saved_tensors
        gradient = torch.empty(qkv.shape, dtype=torch.float32)
        _cpu.attention_backward(
            *_parts(qkv),
            segments,
            scale,
            dout.contiguous().numpy(),
            *(tensor.numpy() for tensor in statistics),
            *_parts(gradient),
            torch.get_num_threads(),
        )
        return gradient, None, None
