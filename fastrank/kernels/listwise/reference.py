"""Listwise losses in plain PyTorch: the definition that every kernel is measured against, on any device, in any dtype.

One function a loss: the scores and labels of one list that is not empty in (higher is better, natural logarithm,
temperature divides the scores), the sum over its terms out. Equal labels are a tier: no pair lies inside one. What
depends on ranks or gains alone is a constant to the gradient.
"""

import inspect
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

LAMBDA_MU = 10.0  # the weight of NDCGLoss2 in NDCGLoss2++ (Wang et al. 2018)


def ranknet(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Sum over the pairs with label_i > label_j of log(1 + exp((score_j - score_i) / temperature)). Burges et al.
    2005."""
    return -functional.logsigmoid(_ahead(scores, temperature)[_prefers(labels)]).sum()


def weighted_ranknet(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """RankNet whose pairs weigh 1 / (rank_i + rank_j), ranks by label. FIRST: Reddy et al. 2024, arXiv 2406.15657."""
    prefers = _prefers(labels)
    rank = ranks(labels, "average").to(scores.dtype)
    weights = 1 / (rank[:, None] + rank[None, :])
    return -(weights[prefers] * functional.logsigmoid(_ahead(scores, temperature)[prefers])).sum()


def lambda_loss(
    scores: Tensor, labels: Tensor, *, temperature: float, weighting: str, k: int | None, gain: str
) -> Tensor:
    """RankNet whose pairs weigh what exchanging them does to nDCG. LambdaLoss: Wang et al. 2018; LambdaRank: Burges et
    al. 2006.

    Ranks are by score, equal scores in input order. With k, only pairs weigh anything of which one ranks within k
    (eq. 18 there), and gains are normalised by the ideal DCG at k. A list without a gain has only pairs of weight 0.
    """
    prefers = _prefers(labels)
    rank = ranks(scores.detach(), "first")
    if k is not None:
        prefers = prefers & ((rank[:, None] <= k) | (rank[None, :] <= k))
    weights = torch.ones_like(scores[:, None] * scores[None, :])
    if weighting != "none":
        gains = _normalised_gains(labels.to(scores.dtype), gain, k)
        steps = (gains[:, None] - gains[None, :]).abs()
        discounts = 1 / torch.log2(rank.to(scores.dtype) + 1)
        exchange = (discounts[:, None] - discounts[None, :]).abs()
        apart = (rank[:, None] - rank[None, :]).abs().clamp(min=1).to(scores.dtype)
        neighbours = 1 / torch.log2(apart + 1) - 1 / torch.log2(apart + 2)
        weights = {
            "ndcg1": gains[:, None] * discounts[:, None] * torch.ones_like(steps),
            "ndcg2": neighbours * steps,
            "lambdarank": exchange * steps,
            "ndcg2pp": (LAMBDA_MU * neighbours + exchange) * steps,
        }[weighting]
    return -(weights.detach()[prefers] * functional.logsigmoid(_ahead(scores, temperature)[prefers])).sum()


def margin_mse(scores: Tensor, labels: Tensor, *, temperature: float, margin: float | None) -> Tensor:
    """Sum over the pairs with label_i > label_j of ((score_i - score_j) / temperature - margin)^2; margin None: the
    difference of the labels. Hofstätter et al. 2020, arXiv 2010.02666."""
    prefers = _prefers(labels)
    labels = labels.to(scores.dtype)
    wanted = (
        labels[:, None] - labels[None, :] if margin is None else torch.full_like(prefers, margin, dtype=scores.dtype)
    )
    return (_ahead(scores, temperature)[prefers] - wanted[prefers]).square().sum()


def hinge(scores: Tensor, labels: Tensor, *, temperature: float, margin: float, squared: bool) -> Tensor:
    """Sum over the pairs with label_i > label_j of max(0, margin - (score_i - score_j) / temperature), squared or not.
    Where a pair just keeps the margin, the gradient is 0. Joachims 2002."""
    short = functional.relu(margin - _ahead(scores, temperature)[_prefers(labels)])
    return (short.square() if squared else short).sum()


def teacher_order(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Mean over the list's pairs with label_i > label_j of (label_i - label_j) * log(1 + exp((score_j - score_i) /
    temperature)); a list without a pair gives 0. D2LLM's ranking imitation: Liao et al. 2024, arXiv 2406.17262."""
    prefers = _prefers(labels)
    labels = labels.to(scores.dtype)
    weights = (labels[:, None] - labels[None, :])[prefers]
    return -(weights * functional.logsigmoid(_ahead(scores, temperature)[prefers])).sum() / max(len(weights), 1)


def lce(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of softmax(scores / temperature) against the first document of the highest label: log(1 + the sum
    over the others of exp((score - target's score) / temperature)). Without a label above 0 there is no term.
    Gao et al. 2021, arXiv 2101.08751."""
    if not (labels > 0).any():
        return scores[:0].sum()
    return _against_others(scores / temperature, int(labels.argmax()))


def contrastive_imitation(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of softmax(weight * score / temperature) against the first document of the highest label; labels
    are the teacher's probabilities, a weight is the target's label or 1 - another's. D2LLM: Liao et al. 2024."""
    labels = labels.to(scores.dtype)
    target = int(labels.argmax())
    weights = 1 - labels
    weights[target] = labels[target]
    return _against_others(weights * scores / temperature, target)


def listnet(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of softmax(scores / temperature) against softmax(labels). Cao et al. 2007."""
    target = torch.softmax(labels.to(scores.dtype), 0)
    return -(target * torch.log_softmax(scores / temperature, 0)).sum()


def kl(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """KL(softmax(labels) || softmax(scores / temperature)): ListNet less the entropy of the target."""
    target = torch.log_softmax(labels.to(scores.dtype), 0)
    return (target.exp() * (target - torch.log_softmax(scores / temperature, 0))).sum()


def listmle(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Sum over the documents of -log of the chance to be drawn before all documents of lower labels, exp(x_i) /
    (exp(x_i) + sum of theirs), x = scores / temperature. With distinct labels: Plackett-Luce, Xia et al. 2008."""
    return _drawn_too_late(scores / temperature, labels).sum()


def p_listmle(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """ListMLE whose documents weigh 2^(n - rank) - 1, normalised to sum 1; ranks by label, averaged over ties.
    Lan et al. 2014."""
    rank = ranks(labels, "average").to(scores.dtype)
    best = rank.min() if len(rank) else 0  # of many tied documents it is large, and 2^-rank nothing in float32
    weights = torch.exp2(best - rank) - torch.exp2(best - torch.full_like(rank, len(rank)))
    weights = weights / weights.sum().clamp(min=torch.finfo(scores.dtype).tiny)
    return (weights * _drawn_too_late(scores / temperature, labels)).sum()


def adr_mse(scores: Tensor, labels: Tensor, *, temperature: float, discount: str, ties: str) -> Tensor:
    """Sum over the documents of (smooth rank - teacher rank)^2 / discount(teacher rank). Schlatt et al. 2025, arXiv
    2405.07920."""
    teacher_ranks = ranks(labels, ties).to(scores.dtype)
    discounts = {"log2": torch.log2(teacher_ranks + 1), "reciprocal": teacher_ranks, "none": torch.ones_like(scores)}
    return ((smooth_ranks(scores, temperature) - teacher_ranks) ** 2 / discounts[discount]).sum()


def approx_ndcg(scores: Tensor, labels: Tensor, *, temperature: float, gain: str) -> Tensor:
    """1 - nDCG of the smooth ranks; a list without a gain gives 1. Qin et al. 2010."""
    gains = _normalised_gains(labels.to(scores.dtype), gain, None)
    return 1 - (gains / torch.log2(smooth_ranks(scores, temperature) + 1)).sum()


def approx_mrr(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """1 - the largest of min(label, 1) / smooth rank; a list without a positive gives 1. Documents of the largest's
    score and clipped label share its gradient."""
    clipped = labels.to(scores.dtype).clamp(0, 1)
    values = clipped / smooth_ranks(scores, temperature)
    best = int(values.argmax())
    return 1 - values[(clipped == clipped[best]) & (scores == scores[best])].mean()


def pearson(scores: Tensor, labels: Tensor) -> Tensor:
    """1 - Pearson's correlation of scores and labels; where either is constant, 1 with a gradient of 0."""
    centred = []
    for values in (scores, labels.to(scores.dtype)):
        values = values - values[0].detach()  # a shift that rounds to nothing: constant values become exactly 0
        if not values.any():
            return 1 + 0 * scores.sum()
        values = values - values.mean()
        centred.append(values / values.detach().abs().max())
    return 1 - functional.cosine_similarity(*centred, dim=0, eps=0)


def bce(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Sum over the documents of the binary cross-entropy of sigmoid(score / temperature) against a label in [0, 1]."""
    x = scores / temperature
    labels = labels.to(scores.dtype)
    return -(labels * functional.logsigmoid(x) + (1 - labels) * functional.logsigmoid(-x)).sum()


def mse(scores: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Sum over the documents of (score / temperature - label)^2."""
    return (scores / temperature - labels.to(scores.dtype)).square().sum()


def _prefers(labels: Tensor) -> Tensor:
    return labels[:, None] > labels[None, :]


def _ahead(scores: Tensor, temperature: float) -> Tensor:
    return (scores[:, None] - scores[None, :]) / temperature


def _against_others(x: Tensor, target: int) -> Tensor:
    others = torch.cat([x[:target], x[target + 1 :]])
    return -functional.logsigmoid(-torch.logsumexp(others - x[target], dim=0))


def _drawn_too_late(x: Tensor, labels: Tensor) -> Tensor:
    """Of each document log(1 + sum over the lower labels of exp(x_j - x_i)); 0 in the lowest tier."""
    lower = _prefers(labels)
    competes = lower.any(dim=1)
    behind = torch.where(lower[competes], x[None, :] - x[competes, None], -torch.inf)
    losses = -functional.logsigmoid(-torch.logsumexp(behind, dim=1))
    return torch.zeros_like(x).index_put((competes.nonzero()[:, 0],), losses)


def smooth_ranks(scores: Tensor, temperature: float) -> Tensor:
    """1 + the sum over the other documents of sigmoid((other's score - own score) / temperature)."""
    behind = (scores[None, :] - scores[:, None]) / temperature
    # Two forms of one sigmoid: autograd multiplies y by 1 - y, which keeps its digits only for a small y.
    steps = torch.where(behind > 0, 1 - torch.sigmoid(-behind), torch.sigmoid(behind))
    others = 1 - torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    return 1 + (others * steps).sum(dim=1)


def ranks(values: Tensor, ties: str) -> Tensor:
    """The rank of each document of one list, 1 for the highest value: equal ones share their average rank, or, with
    ties="first", rank in input order."""
    num_higher = (values[None, :] > values[:, None]).sum(dim=1)
    equal = values[None, :] == values[:, None]
    if ties == "first":
        return num_higher + equal.tril().sum(dim=1)
    return num_higher + (equal.sum(dim=1) + 1) / 2


def _normalised_gains(labels: Tensor, gain: str, k: int | None) -> Tensor:
    """Gains 2^label - 1 ("exponential") or label ("linear") over the ideal DCG at k; a negative label gains nothing.

    Both are divided by 2^(highest label) first, so that labels of a thousand do not overflow."""
    labels = labels.clamp(min=0)
    gains = (
        labels
        if gain == "linear"
        else -torch.exp2(labels - labels.max()) * torch.expm1(-labels * torch.log(torch.full_like(labels, 2.0)))
    )
    ideal = gains.sort(descending=True).values[:k]
    ideal_dcg = (ideal / torch.log2(torch.arange(len(ideal), dtype=labels.dtype, device=labels.device) + 2)).sum()
    return gains / ideal_dcg if ideal_dcg > 0 else torch.zeros_like(gains)


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


def count_lists(labels: Tensor, list_offsets: Tensor) -> Tensor:
    """1 for each list with a document, else 0."""
    return (list_offsets.diff() > 0).long()


def count_lists_with_positive(labels: Tensor, list_offsets: Tensor) -> Tensor:
    """1 for each list with a label above 0, else 0."""
    positives = functional.pad((labels > 0).cumsum(0), (1, 0))[list_offsets.long()]
    return (positives.diff() > 0).long()


LOSSES = {  # what sums a list's terms, what counts them
    "ranknet": (ranknet, count_pairs),
    "weighted_ranknet": (weighted_ranknet, count_pairs),
    "lambda": (lambda_loss, count_pairs),
    "margin_mse": (margin_mse, count_pairs),
    "hinge": (hinge, count_pairs),
    "lce": (lce, count_lists_with_positive),
    "listnet": (listnet, count_lists),
    "kl": (kl, count_lists),
    "listmle": (listmle, count_lists),
    "p_listmle": (p_listmle, count_lists),
    "approx_ndcg": (approx_ndcg, count_lists),
    "approx_mrr": (approx_mrr, count_lists),
    "pearson": (pearson, count_lists),
    "contrastive_imitation": (contrastive_imitation, count_lists),
    "teacher_order": (teacher_order, count_lists),
    "adr_mse": (adr_mse, count_documents),
    "bce": (bce, count_documents),
    "mse": (mse, count_documents),
}

OPTIONS = {name: tuple(inspect.signature(loss).parameters)[2:] for name, (loss, _) in LOSSES.items()}


def count_terms(name: str, labels: Tensor, list_offsets: Tensor) -> Tensor:
    return LOSSES[name][1](labels, list_offsets)


def listwise(
    name: str, scores: Tensor, labels: Tensor, list_offsets: Tensor, options: Mapping[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (lists,), terms (lists,) and the gradients of the sums (documents,), which autograd finds.

    Inside an operator that torch.compile calls, and in inference mode, autograd is switched off for the calling thread,
    hence another one.
    """
    arguments = name, scores, labels, list_offsets, options
    if _autograd_records():
        sums, gradients = _sum_and_differentiate(*arguments)
    else:
        with ThreadPoolExecutor(1) as thread:
            sums, gradients = thread.submit(_sum_and_differentiate, *arguments).result()
    return sums, count_terms(name, labels, list_offsets), gradients


def _autograd_records() -> bool:
    with torch.enable_grad():
        return (torch.zeros((), requires_grad=True) * 1).requires_grad


def _sum_and_differentiate(name: str, scores: Tensor, labels: Tensor, list_offsets: Tensor, options) -> tuple:
    loss = LOSSES[name][0]
    labels = labels.long() if labels.dtype == torch.bool else labels
    with torch.enable_grad():
        # Copies, since autograd takes no tensor that was made in inference mode.
        scores = scores.detach().clone().requires_grad_()
        labels = labels.detach().clone()
        sums = [
            loss(scores[begin:end], labels[begin:end], **options) if begin < end else scores[:0].sum()
            for begin, end in pairwise(list_offsets.tolist())
        ]
        sums = torch.stack(sums) if sums else scores[:0]
        (gradients,) = torch.autograd.grad(sums.sum(), scores)
    return sums.detach(), gradients
