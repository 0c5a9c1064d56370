"""Listwise losses, forward and backward, fused beside their definition in plain PyTorch, with their memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from timing import Comparison, Contender

from fastrank.losses import LOSSES

SHAPES = ((32, 100), (32, 1000), (2, 10000))
DENSE = 2000  # documents from which the definition's matrices of pairs would not fit


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    for count, size in ((2, 9),) if dry_run else SHAPES:
        for name in list(LOSSES)[: 3 if dry_run else None]:
            compare(name, count, size, device, dry_run)
            yield f"{name}, {count} lists of {size}"


def compare(name: str, count: int, size: int, device: str, dry_run: bool) -> None:
    loss, generator = LOSSES[name], torch.Generator().manual_seed(0)
    scores = torch.randn(count * size, generator=generator).to(device)
    offsets = (torch.arange(count + 1) * size).int().to(device)
    labels = torch.randint(0, 4, (count * size,), generator=generator).float()
    if loss.allowed_labels(loss.fill({})) == "probabilities":
        labels /= 3
    labels = labels.to(device)

    def once(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = scores.clone().requires_grad_()
        value = loss(leaf, labels, offsets, backend=backend)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    exact = once("reference") if size <= DENSE else None

    def check(results: tuple[torch.Tensor, torch.Tensor]) -> str | None:
        if not all(one.isfinite().all() for one in results):
            return "is not finite"
        for one, truth in zip(results, exact or (), strict=False):
            apart = float((one - truth).norm() / (truth.norm() + 1e-12))
            if not apart < 1e-3:
                return f"is off by {apart:.2g}"
        return None

    ours = "gpu" if device == "cuda" else "cpu"
    made = [Contender("fastrank", lambda: once(ours), count * size, ours=True, check=check)]
    if device == "cuda":  # launches take longer than small lists do
        alone = "fastrank, kernels alone"
        made.append(Contender(alone, lambda: once(ours), count * size, ours=True, check=check, launches_hidden=True))
    if exact is not None:
        made.append(Contender("plain PyTorch", lambda: once("reference"), count * size))
    comparison = Comparison(f"{name}, {count} lists of {size}", "documents", made, [], device)
    comparison.measure(3 if dry_run else 5, memory=not dry_run, shortest_round=0 if dry_run else 0.01)
