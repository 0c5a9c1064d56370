"""LayerNorm(x + residual) * weight + bias, and of the vectors of token ids, in plain PyTorch: the definition that every
kernel is measured against."""

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    summed = x if residual is None else x + residual
    wider = torch.promote_types(x.dtype, weight.dtype)
    summed, weight, bias = summed.to(wider), weight.to(wider), bias.to(wider)
    return functional.layer_norm(summed, weight.shape, weight, bias, eps).to(x.dtype)


def sum_vectors(
    ids: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor, Tensor], padding: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor]:
    """Word and type vectors summed, and position vectors: (tokens, columns) each."""
    words = functional.embedding(ids[0], tables[0], padding[0])
    return words + functional.embedding(ids[1], tables[1]), functional.embedding(ids[2], tables[2], padding[1])


def embedding_norm(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    padding: tuple[int | None, int | None],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return layer_norm(*sum_vectors(ids, tables, padding), weight, bias, eps).to(dtype)
