"""ELECTRA for re-ranking: embeddings may be narrower than the encoder; the head is dense, gelu, linear.

Lightning-IR's monoELECTRA has a plain linear head instead (its weights are called `linear`). Since
gelu(x) - gelu(-x) = x, the usual head computes the same when its dense rows are w and -w and its output weights +1
and -1: that is how a plain head is saved, and recognised again. Source: Clark et al. 2020, arXiv 2003.10555.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrank.model.family import DenseHead, Family
from fastrank.model.settings import Settings


class DenseGeluHead(DenseHead):
    """logits = output(gelu(dense(x))), the erf form of gelu whatever the encoder uses."""

    hub_names = {"dense": "classifier.dense", "output": "classifier.out_proj"}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        """x: (pairs, hidden) float32; returns (pairs, num_labels)."""
        x = F.gelu(self.dense(F.dropout(x, self.dropout, self.training)))
        return self.output(F.dropout(x, self.dropout, self.training))


class PlainHead(nn.Module):
    """logits = x W^T, without a bias."""

    hub_names = {"output": "linear"}  # noqa: RUF012

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.output = nn.Linear(settings.hidden_size, settings.num_labels, bias=False)
        self.dropout = settings.head_dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: (pairs, hidden) float32; returns (pairs, num_labels)."""
        return self.output(F.dropout(x, self.dropout, self.training))


def to_dense_head(plain: Tensor) -> dict[str, Tensor]:
    """Weights of the usual ELECTRA head, by their hub names, that gives the same logits as a plain one.

    plain: (num_labels, hidden), with 2 * num_labels <= hidden.
    """
    num_labels, size = plain.shape
    if 2 * num_labels > size:
        raise ValueError(f"A hidden size of {size} has no room for the {num_labels} labels of a plain head.")
    dense, output = plain.new_zeros(size, size), plain.new_zeros(num_labels, size)
    for i in range(num_labels):
        dense[2 * i], dense[2 * i + 1] = plain[i], -plain[i]
        output[i, 2 * i], output[i, 2 * i + 1] = 1, -1
    return {
        "classifier.dense.weight": dense,
        "classifier.dense.bias": plain.new_zeros(size),
        "classifier.out_proj.weight": output,
        "classifier.out_proj.bias": plain.new_zeros(num_labels),
    }


def from_dense_head(weights: Mapping[str, Tensor]) -> Tensor | None:
    """The plain head, (num_labels, hidden), that to_dense_head made these weights of; None for any other weights."""
    dense, output = weights.get("classifier.dense.weight"), weights.get("classifier.out_proj.weight")
    if dense is None or output is None or dense.dim() != 2 or 2 * len(output) > len(dense):
        return None
    plain = dense[0 : 2 * len(output) : 2].clone()
    expected = to_dense_head(plain)
    same = (name in weights and torch.equal(weights[name], expected[name]) for name in expected)
    return plain if all(same) else None


ELECTRA = Family(
    prefix="electra",
    architecture="ElectraForSequenceClassification",
    head=DenseGeluHead,
    plain_head=PlainHead,
    defaults={
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
)
