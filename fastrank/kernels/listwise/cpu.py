"""Listwise losses in C++ (csrc/listwise_*.cpp): float32 scores, labels in float64.

Threaded over lists and, where every pair of a long list is visited, over blocks of rows; the same bit for bit on any
number of threads.
"""

from collections.abc import Mapping

import numpy as np
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
    num_lists = list_offsets.shape[0] - 1
    sums = np.empty(num_lists, np.float32)  # NumPy's: a small tensor and its view in NumPy take longer to make
    terms = np.empty(num_lists, np.int64)
    gradients = np.empty(scores.shape[0], np.float32)
    getattr(_cpu, name)(
        scores.detach().contiguous().numpy(),
        labels.detach().to(torch.float64).contiguous().numpy(),
        list_offsets.contiguous().numpy(),
        sums,
        terms,
        gradients,
        torch.get_num_threads(),
        **options,
    )
    return torch.from_numpy(sums), torch.from_numpy(terms), torch.from_numpy(gradients)
