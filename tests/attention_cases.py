"""Inputs that the tests of every attention backend share."""

import torch
from torch import Tensor

from fastrank import ops


def cut(lengths) -> Tensor:
    """Offsets of pairs of these lengths."""
    return torch.tensor([0, *torch.as_tensor(lengths).cumsum(0)], dtype=torch.int32)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, largest: int, seed: int = 0) -> Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def run_fused(lengths, scale=None, span=None):
    offsets = cut(lengths)
    return lambda backend, qkv: ops.fused_attention(qkv, offsets, scale=scale, span=span, backend=backend)
