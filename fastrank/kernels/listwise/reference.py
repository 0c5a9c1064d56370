"""Listwise losses in plain PyTorch: the definition that every kernel is measured against, on any device, in any dtype.

One function a loss: the scores and labels of one list in (higher is better, natural logarithm, temperature divides
the scores), the sum over its terms out. RankNet: Burges et al. 2005; LCE: Gao et al. 2021; ADR-MSE: Schlatt et al. 2025
(arXiv 2405.07920).
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


def ranknet(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Sum over the pairs with label_i > label_j of log(1 + exp((score_j - score_i) / temperature))."""
    prefers = labels[:, None] > labels[None, :]
    ahead = (scores[:, None] - scores[None, :]) / temperature
    return -functional.logsigmoid(ahead[prefers]).sum()


def lce(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of softmax(scores / temperature) against the first document of the highest label: log(1 + the sum
    over the others of exp((score - target's score) / temperature)). Without a label above 0 there is no term."""
    if not (labels > 0).any():
        return scores[:0].sum()
    target = int(labels.argmax())
    others = torch.cat([scores[:target], scores[target + 1 :]])
    behind = torch.logsumexp((others - scores[target]) / temperature, dim=0)
    return -functional.logsigmoid(-behind)


def adr_mse(scores: Tensor, labels: Tensor, *, temperature: float, discount: str, ties: str) -> Tensor:
    """Sum over the documents of (smooth rank - teacher rank)^2 / discount(teacher rank)."""
    behind = (scores[None, :] - scores[:, None]) / temperature
    # Two forms of one sigmoid: autograd multiplies y by 1 - y, which keeps its digits only for a small y.
    steps = torch.where(behind > 0, 1 - torch.sigmoid(-behind), torch.sigmoid(behind))
    others = 1 - torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    smooth_ranks = 1 + (others * steps).sum(dim=1)
    teacher_ranks = ranks(labels, ties).to(scores.dtype)
    discounts = {"log2": torch.log2(teacher_ranks + 1), "reciprocal": teacher_ranks, "none": torch.ones_like(scores)}
    return ((smooth_ranks - teacher_ranks) ** 2 / discounts[discount]).sum()


def ranks(labels: Tensor, ties: str) -> Tensor:
    """The rank of each document of one list, 1 for the highest label: equal labels share their average rank, or, with
    ties="first", rank in input order."""
    num_higher = (labels[None, :] > labels[:, None]).sum(dim=1)
    equal = labels[None, :] == labels[:, None]
    if ties == "first":
        return num_higher + equal.tril().sum(dim=1)
    return num_higher + (equal.sum(dim=1) + 1) / 2


def count_pairs(labels: Tensor, list_offsets: Tensor) -> Tensor:
    """Of each list, the pairs with label_i > label_j: all pairs but those inside a run of equal labels."""
    num_documents = list_offsets.diff().long()
    lists = torch.arange(len(num_documents), device=labels.device).repeat_interleave(num_documents)
    order = labels.argsort(stable=True)
    order = order[lists[order].argsort(stable=True)]  # by list, then by label
    labels, lists = labels[order], lists[order]
    begins = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    begins[1:] = (labels[1:] != labels[:-1]) | (lists[1:] != lists[:-1])
    run_lengths = begins.nonzero()[:, 0].diff(append=begins.new_tensor([len(labels)], dtype=torch.long))
    counts = num_documents * (num_documents - 1) // 2
    return counts.index_add(0, lists[begins], -(run_lengths * (run_lengths - 1) // 2))


def count_documents(labels: Tensor, list_offsets: Tensor) -> Tensor:
    """The documents of each list."""
    return list_offsets.diff().long()


def count_lists_with_positive(labels: Tensor, list_offsets: Tensor) -> Tensor:
    """1 for each list with a label above 0, else 0."""
    positives = functional.pad((labels > 0).cumsum(0), (1, 0))[list_offsets.long()]
    return (positives.diff() > 0).long()


LOSSES = {  # what sums a list's terms, what counts them
    "ranknet": (ranknet, count_pairs),
    "lce": (lce, count_lists_with_positive),
    "adr_mse": (adr_mse, count_documents),
}


def count_terms(name: str, labels: Tensor, list_offsets: Tensor) -> Tensor:
    return LOSSES[name][1](labels, list_offsets)


def listwise(
    name: str, scores: Tensor, labels: Tensor, list_offsets: Tensor, options: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    loss = LOSSES[name][0]
    bounds = pairwise(list_offsets.tolist())
    sums = [loss(scores[begin:end], labels[begin:end], **options) for begin, end in bounds]
    return torch.stack(sums) if sums else scores[:0], count_terms(name, labels, list_offsets)
