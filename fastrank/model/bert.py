"""BERT for re-ranking (also MiniLM and TinyBERT): a pooler, tanh(dense), then a linear classifier.

Source: Devlin et al. 2019, arXiv 1810.04805; Nogueira and Cho 2019, arXiv 1901.04085.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrank.model.family import DenseHead, Family


class PoolerHead(DenseHead):
    """logits = output(tanh(dense(x)))."""

    # Our module name -> the hub's. The pooler counts as a part of the encoder there.
    hub_names = {"dense": "bert.pooler.dense", "output": "classifier"}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        """x: (pairs, hidden) float32; returns (pairs, num_labels)."""
        x = torch.tanh(self.dense(x))
        return self.output(F.dropout(x, self.dropout, self.training))


BERT = Family(prefix="bert", architecture="BertForSequenceClassification", head=PoolerHead)
