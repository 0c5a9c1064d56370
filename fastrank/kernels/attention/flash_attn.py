"""Packed attention by the flash-attn package, where it is installed."""

from flash_attn import flash_attn_varlen_func
from torch import Tensor

from fastrank.kernels.attention.reference import attend_to_real_tokens
from fastrank.kernels.attention.varlen import attend, refusals

__all__ = ["attention", "fused_attention", "padded_attention", "refusals"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float,
    span: tuple[int, int] | None = None,
) -> Tensor:
    return attend(flash_attn_varlen_func, "softmax_scale", q, k, v, offsets, query_offsets, scale, span)


def fused_attention(qkv: Tensor, offsets: Tensor, scale: float, span: tuple[int, int] | None = None) -> Tensor:
    return attention(*qkv.unbind(1), offsets, None, scale, span)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return attend_to_real_tokens(attention, q, k, v, lengths, scale)
