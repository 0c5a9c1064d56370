"""Listwise losses, forward and backward: time and peak memory of every loss on lists of one length, against the code
of Lightning-IR and sentence-transformers and torch.compile.

The work is scores in, loss and gradient of the scores out; a round repeats it for at least 20 ms. Every contender's
loss and gradient are first compared with the reference in float64 (lists of 10,000: with fastrank's own).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from peer_losses import PEERS
from timing import CLOCK, Comparison, Contender
from torch import Tensor

from fastrank.kernels.listwise import reference
from fastrank.losses import LOSSES

SHAPES = [(32, 16), (32, 100), (32, 1000), (1, 10_000)]  # lists, documents in each
IN_SHORT = [(32, 100), (32, 1000)]
COMPILED = "torch.compile of the reference"
DENSE = "torch.compile, dense and masked"
NAMES = ["fastrank", "Lightning-IR", "sentence-transformers", COMPILED, DENSE]


def dense_ranknet(scores: Tensor, labels: Tensor) -> Tensor:
    """RankNet of lists of one length, (lists, documents), as one would write it for a compiler."""
    prefers = labels[:, :, None] > labels[:, None, :]
    terms = torch.nn.functional.softplus(scores[:, None, :] - scores[:, :, None])
    return (terms * prefers).sum() / prefers.sum()


def with_gradient(loss: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@functools.cache
def comparison(name: str, num_lists: int, size: int, device: str, full: bool) -> Comparison:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(num_lists * size, generator=random)
    labels = torch.cat([torch.randperm(size, generator=random).float() for _ in range(num_lists)])
    if LOSSES[name].labels == "probabilities":
        labels = labels / size
    scores, labels = scores.to(device), labels.to(device)
    offsets = (torch.arange(num_lists + 1) * size).to(device)

    def ours(scores: Tensor, backend: str = "auto") -> Tensor:
        return LOSSES[name](scores, labels, offsets, backend=backend)

    backend, exact_scores = ("reference", scores.double()) if size <= 1000 else ("auto", scores)
    exact = with_gradient(lambda scores: ours(scores, backend), exact_scores)

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        for what, value, truth in zip(("loss", "gradient"), result, exact, strict=True):
            apart = float((value - truth).abs().max() / truth.abs().max())
            if not apart < 1e-3:
                return f"{what} off by {apart:.1e} of the largest"
        return None

    def contender(title: str, loss: Callable[[Tensor], Tensor], **more) -> Contender:
        return Contender(title, lambda: with_gradient(loss, scores), num_lists * size, check=check, **more)

    contenders = [contender("fastrank", ours, ours=True)]
    for title in ("Lightning-IR", "sentence-transformers"):
        if peer := PEERS.get(name, {}).get(title):
            contenders.append(contender(title, lambda scores, peer=peer: peer(scores, labels, [size] * num_lists)))
    if full or name == "ranknet":
        torch._dynamo.reset()
        formula = torch.compile(reference.LOSSES[name][0], dynamic=False)
        num_terms = reference.count_terms(name, labels, offsets).sum()
        options = LOSSES[name].fill({})
        contenders.append(
            contender(
                COMPILED,
                lambda scores: (
                    sum(
                        formula(one, its_labels, **options)
                        for one, its_labels in zip(scores.split(size), labels.split(size), strict=True)
                    )
                    / num_terms
                ),
            )
        )
    if name == "ranknet":
        dense = torch.compile(dense_ranknet, dynamic=False)
        contenders.append(
            contender(DENSE, lambda scores: dense(scores.view(num_lists, size), labels.view(num_lists, size)))
        )
    title = f"listwise {name}, {num_lists} lists of {size:,} documents, {device}"
    rounds = 3 if size >= 1000 else 20
    return Comparison(title, "documents", contenders, device=device).measure(rounds, memory=True, shortest_round=0.02)


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_lists", "size"), SHAPES, ids=lambda value: str(value))
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("contender", NAMES)
@pytest.mark.benchmark(timer=CLOCK)
def bench_listwise(benchmark, contender, name, num_lists, size, device, full):
    if not full and (num_lists, size) not in IN_SHORT:
        pytest.skip("a part of --benchmark-full")
    compared = comparison(name, num_lists, size, device, full)
    if contender not in [one.name for one in compared.contenders]:
        pytest.skip(f"{contender} has no {name}, or its row is a part of --benchmark-full")
    benchmark.group = compared.title
    compared.hand_over(contender, benchmark)
