"""Listwise losses in C++ (csrc/listwise_*.cpp): float32 scores, labels in float64.

Threaded over lists and, where every pair of a long list is visited, over blocks of rows; the same bit for bit on any
number of threads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastrank import _cpu

LOSSES = (
    "ranknet",
    "weighted_ranknet",
    "lambda",
    "margin_mse",
    "hinge",
    "lce",
    "listnet",
    "kl",
    "listmle",
    "p_listmle",
    "approx_ndcg",
    "approx_mrr",
    "pearson",
    "contrastive_imitation",
    "teacher_order",
    "adr_mse",
    "bce",
    "mse",
)


def listwise(
    name: str, scores: Tensor, labels: Tensor, list_offsets: Tensor, options: Mapping[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (lists,), terms (lists,) and the gradients of the sums (documents,)."""
    num_lists = len(list_offsets) - 1
    sums = torch.empty(num_lists, dtype=torch.float32)
    terms = torch.empty(num_lists, dtype=torch.int64)
    gradients = torch.empty(len(scores), dtype=torch.float32)
    getattr(_cpu, name)(
        scores.detach().contiguous().numpy(),
        labels.detach().to(torch.float64).contiguous().numpy(),
        list_offsets.contiguous().numpy(),
        sums.numpy(),
        terms.numpy(),
        gradients.numpy(),
        torch.get_num_threads(),
        **options,
    )
    return sums, terms, gradients
