"""Listwise losses in C++ (csrc/listwise.cpp): float32 scores, labels compared in float64.

Threaded over lists and, in a long list, over blocks of rows; the same bit for bit on any number of threads.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fastrank import _cpu

from .fused import FusedLoss

LOSSES = ("ranknet", "lce", "adr_mse")


def _run(name: str, scores: Tensor, labels: Tensor, list_offsets: Tensor, options) -> tuple[Tensor, Tensor, Tensor]:
    num_lists = len(list_offsets) - 1
    sums = torch.empty(num_lists, dtype=torch.float32)
    terms = torch.empty(num_lists, dtype=torch.int64)
    gradients = torch.empty(len(scores), dtype=torch.float32)
    getattr(_cpu, name)(
        scores.contiguous().numpy(),
        labels.detach().to(torch.float64).contiguous().numpy(),
        list_offsets.contiguous().numpy(),
        sums.numpy(),
        terms.numpy(),
        gradients.numpy(),
        torch.get_num_threads(),
        **options,
    )
    return sums, terms, gradients


def listwise(
    name: str, scores: Tensor, labels: Tensor, list_offsets: Tensor, options: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    return FusedLoss.apply(scores, labels, list_offsets, partial(_run, name), options)
