"""Packed attention in plain PyTorch: the definition that every kernel is measured against, on any device and in any
dtype.

Query i of a pair sees every key of its own pair and no other: softmax(scale * q k^T) v. A query whose pair has no key
gives 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float,
    span: tuple[int, int] | None = None,
) -> Tensor:
    key_bounds = offsets.tolist()
    query_bounds = key_bounds if query_offsets is None else query_offsets.tolist()
    outputs = [q[:0]]
    for pair in range(len(key_bounds) - 1):
        queries = q[query_bounds[pair] : query_bounds[pair + 1]].transpose(0, 1)  # (heads, queries, head_dim)
        keys = k[key_bounds[pair] : key_bounds[pair + 1]].transpose(0, 1)
        values = v[key_bounds[pair] : key_bounds[pair + 1]].transpose(0, 1)
        probabilities = torch.softmax(queries @ keys.transpose(1, 2) * scale, dim=-1)  # (heads, queries, keys)
        outputs.append((probabilities @ values).transpose(0, 1))
    return torch.cat(outputs)


def fused_attention(qkv: Tensor, offsets: Tensor, scale: float, span: tuple[int, int] | None = None) -> Tensor:
    q, k, v = qkv.unbind(1)
    return attention(q, k, v, offsets, None, scale)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return attend_to_real_tokens(attention, q, k, v, lengths, scale)


def attend_to_real_tokens(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Packs a padded batch for a function like attention(), and unpacks what that returns."""
    real = torch.arange(q.shape[1], device=q.device) < lengths[:, None]  # (batch, length)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    return out.index_put((real,), attend(q[real], k[real], v[real], offsets, None, scale))
