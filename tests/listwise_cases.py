"""Losses, options and hard ragged cases that the tests of every listwise backend share."""

import math

import torch
from accuracy import assert_accurate
from torch import Tensor

from fastrank import ops
from fastrank.losses import LOSSES

# name of the variant: (loss, its options where they are not the defaults)
VARIANTS = {
    **{name: (name, {}) for name in LOSSES},
    "ranknet, temperature": ("ranknet", {"temperature": 0.3}),
    "weighted_ranknet, temperature": ("weighted_ranknet", {"temperature": 2.5}),
    "lambda, ndcg1, temperature": ("lambda", {"weighting": "ndcg1", "temperature": 0.7}),
    "lambda, ndcg2, linear": ("lambda", {"weighting": "ndcg2", "gain": "linear"}),
    "lambda, lambdarank, k": ("lambda", {"weighting": "lambdarank", "k": 5}),
    "lambda, none, k": ("lambda", {"weighting": "none", "k": 10}),
    "lambda, ndcg2pp, k": ("lambda", {"weighting": "ndcg2pp", "k": 10}),
    "margin_mse, constant": ("margin_mse", {"margin": 0.75, "temperature": 2.0}),
    "hinge, squared": ("hinge", {"squared": True, "margin": 0.5}),
    "hinge, temperature": ("hinge", {"temperature": 2.5}),
    "hinge, negative margin": ("hinge", {"margin": -0.25}),
    "lce, temperature": ("lce", {"temperature": 2.5}),
    "listnet, temperature": ("listnet", {"temperature": 0.5}),
    "kl, temperature": ("kl", {"temperature": 0.5}),
    "listmle, temperature": ("listmle", {"temperature": 2.5}),
    "p_listmle, temperature": ("p_listmle", {"temperature": 0.5}),
    "adr_mse, reciprocal": ("adr_mse", {"temperature": 0.7, "discount": "reciprocal"}),
    "adr_mse, none, first": ("adr_mse", {"temperature": 3.0, "discount": "none", "ties": "first"}),
    "approx_ndcg, linear": ("approx_ndcg", {"gain": "linear", "temperature": 0.5}),
    "approx_mrr, temperature": ("approx_mrr", {"temperature": 0.3}),
    "bce, temperature": ("bce", {"temperature": 0.7}),
    "mse, temperature": ("mse", {"temperature": 3.0}),
    "contrastive_imitation, temperature": ("contrastive_imitation", {"temperature": 0.5}),
    "teacher_order, temperature": ("teacher_order", {"temperature": 2.5}),
}


def options_of(variant: str) -> tuple[str, dict[str, object]]:
    """The loss of a variant and all its options."""
    name, options = VARIANTS[variant]
    return name, LOSSES[name].fill(options)


def _tiers(count: int):
    return lambda size, random: torch.randint(count, (size,), generator=random).float()


def _distinct(size: int, random: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=random).float() - size // 3


def _infinite(size: int, random: torch.Generator) -> Tensor:
    return torch.tensor([-math.inf, -1.0, 2.0, math.inf])[torch.randint(4, (size,), generator=random)]


# name: (scores from standard normal draws, labels from a size)
CASES = {
    "distinct": (lambda draws: 3 * draws, _distinct),
    "three tiers": (lambda draws: 3 * draws, _tiers(3)),
    "one relevant": (lambda draws: draws, lambda size, random: (torch.arange(size) == size // 2).float()),
    "all tied": (lambda draws: draws, lambda size, random: torch.ones(size)),
    "no positive": (lambda draws: draws, lambda size, random: -_distinct(size, random).abs()),
    "infinite labels": (lambda draws: draws, _infinite),
    "scores of 1e4": (lambda draws: 1e4 * draws, _distinct),
    "scores beside 1e4": (lambda draws: 1e4 + draws, _distinct),
    "tied scores": (lambda draws: draws.round(), _distinct),
    "equal scores": (lambda draws: 0 * draws + 5, _distinct),
    "scores 1e-6 apart": (lambda draws: 1e-6 * draws, _distinct),
    "right by far": (lambda draws: 8 * draws.sort().values, lambda size, random: torch.arange(size).float()),
    "wrong by far": (lambda draws: 8 * draws.sort().values, lambda size, random: -torch.arange(size).float()),
}


def make(variant: str, case: str, sizes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and list_offsets of a case, the labels brought to what the loss takes: numbers for infinities,
    probabilities (exact in every dtype) for numbers."""
    name, options = options_of(variant)
    random = torch.Generator().manual_seed(seed)
    to_scores, to_labels = CASES[case]
    scores = torch.cat([to_scores(torch.randn(size, generator=random)) for size in sizes])
    labels = torch.cat([to_labels(size, random) for size in sizes])
    allowed = LOSSES[name].allowed_labels(options)
    if allowed == "finite":
        labels = labels.clamp(-3, 5) if labels.isinf().any() else labels
    elif allowed == "probabilities":
        labels = (torch.sigmoid(labels / 4) * 128).round() / 128
    return scores, labels, torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32)


def check(variant: str, scores: Tensor, labels: Tensor, offsets: Tensor, backend: str) -> None:
    """Holds a backend to the accuracy rule, sums and gradients."""
    name, options = options_of(variant)

    def run(backend: str, scores: Tensor) -> tuple[Tensor, Tensor]:
        return ops.listwise(name, scores, labels, offsets, options=options, backend=backend)

    assert_accurate(run, {"scores": scores}, backend=backend)


def sums_and_gradients(
    variant: str, scores: Tensor, labels: Tensor, offsets: Tensor, upstream: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, terms, and the gradient of the scores for this upstream gradient of the sums."""
    name, options = options_of(variant)
    scores = scores.clone().requires_grad_()
    sums, terms = ops.listwise(name, scores, labels, offsets, options=options, backend=backend)
    (gradient,) = torch.autograd.grad(sums, scores, upstream)
    return sums.detach(), terms, gradient
