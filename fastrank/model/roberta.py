"""RoBERTa and XLM-RoBERTa for re-ranking: positions count from padding_idx + 1; the head is dense, tanh, linear.

Source: Liu et al. 2019, arXiv 1907.11692; Conneau et al. 2020, arXiv 1911.02116.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrank.model.family import DenseHead, Family


class DenseTanhHead(DenseHead):
    """logits = output(tanh(dense(x)))."""

    hub_names = {"dense": "classifier.dense", "output": "classifier.out_proj"}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        """x: (pairs, hidden) float32; returns (pairs, num_labels)."""
        x = torch.tanh(self.dense(F.dropout(x, self.dropout, self.training)))
        return self.output(F.dropout(x, self.dropout, self.training))


def positions_after_padding(token_ids: Tensor, positions: Tensor, padding_idx: int) -> Tensor:
    """Rows of the position table: padding_idx + 1, + 2, ... in each pair, as transformers counts them.

    A padding token that a text spells out ("<pad>") gets the row padding_idx and is not counted.
    token_ids, positions (0, 1, ... in each pair): (tokens,) int64; returns (tokens,) int64.
    """
    is_text = token_ids != padding_idx
    counted = is_text.cumsum(0)
    first_of_pair = torch.arange(len(positions), device=positions.device) - positions
    # The first token of a pair is never padding, so it stands at 1 in its own pair's count.
    count_in_pair = counted - counted[first_of_pair] + 1
    return torch.where(is_text, padding_idx + count_in_pair, padding_idx)


ROBERTA = Family(
    prefix="roberta",
    architecture="RobertaForSequenceClassification",
    head=DenseTanhHead,
    defaults={"vocab_size": 50265, "pad_token_id": 1},
    positions_after_padding=positions_after_padding,
)
XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    architecture="XLMRobertaForSequenceClassification",
    defaults={"pad_token_id": 1},
)
