"""Packed attention by torch.nn.attention.varlen, which is FlashAttention 2 as torch carries it.

It wants to know the longest pair: without span, that is read back from the device. Queries of their own are taken to be
as many a pair as there are at all, which starts programs that have nothing to do.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fastrank.kernels.attention.reference import attend_to_real_tokens

MAX_HEAD_DIM = 256


def refusals(tensor: Tensor) -> list[str]:
    head_dim = tensor.shape[-1]
    if head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM:
        return []
    return [f"FlashAttention takes head dimensions that 8 divides, up to {MAX_HEAD_DIM}, not {head_dim}."]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float,
    span: tuple[int, int] | None = None,
) -> Tensor:
    return attend(varlen_attn, "scale", q, k, v, offsets, query_offsets, scale, span)


def fused_attention(qkv: Tensor, offsets: Tensor, scale: float, span: tuple[int, int] | None = None) -> Tensor:
    return attention(*qkv.unbind(1), offsets, None, scale, span)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return attend_to_real_tokens(attention, q, k, v, lengths, scale)


def attend(
    flash_attention: Callable[..., Tensor],
    scale_name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float,
    span: tuple[int, int] | None,
) -> Tensor:
    """flash_attention(q, k, v, both offsets, both longest lengths), as FlashAttention's own packages call it too."""
    if not q.numel() or not k.numel():
        return q.new_zeros(q.shape) + 0.0 * (q.sum() + k.sum() + v.sum())
    q, k, v = (one if one.data_ptr() % 16 == 0 else one.clone() for one in (q, k, v))
    longest = int(offsets.diff().max()) if span is None else span[1]
    queries, longest_queries = (offsets, longest) if query_offsets is None else (query_offsets, len(q))
    return flash_attention(q, k, v, queries, offsets, longest_queries, longest, **{scale_name: scale})
