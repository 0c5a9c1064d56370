"""The losses of Lightning-IR and sentence-transformers, called on scores that are already there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

# (scores (documents,), labels (documents,), sizes of the lists) -> loss
PeerLoss = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


class _Scores(torch.nn.Module):
    """What sentence-transformers' losses want of a model: it returns scores that are already there."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores: Tensor):
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs: list, **_: object) -> dict:
        return {}

    def forward(self, _: dict) -> dict[str, Tensor]:
        return {"scores": self.scores[:, None]}


def sentence_transformers_loss(kind: str, scores: Tensor, labels: Tensor, sizes: Sequence[int], **options: object):
    """The loss of sentence_transformers.cross_encoder.losses of that name; lists of any length."""
    from sentence_transformers.cross_encoder import losses

    if isinstance(options.get("weighting_scheme"), str):
        options["weighting_scheme"] = getattr(losses, options["weighting_scheme"])()
    loss = getattr(losses, kind)(_Scores(scores), mini_batch_size=-1, **options)
    return loss([["query"] * len(sizes), [["document"] * size for size in sizes]], list(labels.split(tuple(sizes))))


def lightning_ir_loss(kind: str, scores: Tensor, labels: Tensor, sizes: Sequence[int], **options: object) -> Tensor:
    """The loss of lightning_ir.loss of that name; lists of one length."""
    import lightning_ir.loss

    output, batch = (SimpleNamespace(**{key: values.view(len(sizes), -1)}) for key, values in
                     (("scores", scores), ("targets", labels)))  # fmt: skip
    return getattr(lightning_ir.loss, kind)(**options).compute_loss(output, batch)


def _theirs(compute: Callable, kind: str, factor: float = 1.0, **options: object) -> PeerLoss:
    return lambda scores, labels, sizes: factor * compute(kind, scores, labels, sizes, **options)


# Where a peer computes the same number as our loss with its default options (or times a factor) on distinct labels.
PEERS: dict[str, dict[str, PeerLoss]] = {
    "ranknet": {
        "Lightning-IR": _theirs(lightning_ir_loss, "RankNet"),
        "sentence-transformers": _theirs(sentence_transformers_loss, "RankNetLoss", math.log(2)),
    },
    "lambda": {"sentence-transformers": _theirs(sentence_transformers_loss, "LambdaLoss", math.log(2))},
    "margin_mse": {"Lightning-IR": _theirs(lightning_ir_loss, "SupervisedMarginMSE")},
    "lce": {"Lightning-IR": _theirs(lightning_ir_loss, "InfoNCE")},
    "listnet": {"sentence-transformers": _theirs(sentence_transformers_loss, "ListNetLoss")},
    "kl": {"Lightning-IR": _theirs(lightning_ir_loss, "KLDivergence")},
    "listmle": {"sentence-transformers": _theirs(sentence_transformers_loss, "ListMLELoss", respect_input_order=False)},
    "p_listmle": {
        "sentence-transformers": _theirs(sentence_transformers_loss, "PListMLELoss", respect_input_order=False)
    },
    "adr_mse": {
        "Lightning-IR": _theirs(lightning_ir_loss, "ApproxRankMSE", discount="log2"),
        "sentence-transformers": _theirs(sentence_transformers_loss, "ADRMSELoss"),
    },
    "approx_ndcg": {"Lightning-IR": _theirs(lightning_ir_loss, "ApproxNDCG")},
    "approx_mrr": {"Lightning-IR": _theirs(lightning_ir_loss, "ApproxMRR")},
    "pearson": {"Lightning-IR": _theirs(lightning_ir_loss, "PearsonCorrelation")},
}
