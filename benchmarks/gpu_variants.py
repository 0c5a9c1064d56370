"""Other numbers of warps and stages for the attention kernels: which are the fastest here, pair lengths mixed."""

from __future__ import annotations

from pathlib import Path

import torch
from gpu_attention import LENGTHS, NUM_HEADS, NUM_TOKENS, Inputs, draw_lengths
from timing import COMPARISONS, Comparison, Contender, graphed

from fastrank.kernels.attention import gpu
from fastrank.kernels.configuration import Configuration

CHANGES = ({"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8}, {"num_stages": 1}, {"num_stages": 3})


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool) -> dict:
    if dry_run:  # there is nothing to choose without a GPU
        return {"lines": [f"{len(names(32))} and {len(names(64))} kernels to vary"]}
    lines = []
    for head_dim in (32, 64):
        for length in ("90, mixed", "512"):
            inputs = Inputs(draw_lengths(LENGTHS[length], NUM_TOKENS), head_dim, NUM_HEADS, device, torch.bfloat16)
            for name in names(head_dim):
                if length == "512" and " long " not in name:
                    continue
                lines += vary(name, length, inputs)
    return {"lines": lines}


def names(head_dim: int) -> list[str]:
    """Kernels of bf16 that pairs of their own queries run through."""
    ends = f" bfloat16 {head_dim}"
    return [name for name in gpu.CONFIGURATIONS if name.endswith(ends) and " few " not in name]


def vary(name: str, length: str, inputs: Inputs) -> list[str]:
    kept, lines = gpu.CONFIGURATIONS[name], []
    for changes in ({}, *CHANGES):
        settings = {"num_warps": kept.num_warps, "num_stages": kept.num_stages} | changes
        if changes and settings == {"num_warps": kept.num_warps, "num_stages": kept.num_stages}:
            continue
        gpu.CONFIGURATIONS[name] = Configuration(kept.kernel, kept.types, kept.constants, **settings)
        try:
            forward, both = seconds(inputs)
            result = f"forward {forward * 1e6:.1f} us, with backward {both * 1e6:.1f} us"
        except Exception as error:  # it does not fit
            result = type(error).__name__
        lines.append(f"{name}, length {length}, {settings}{' (shipped)' * (not changes)}: {result}")
    gpu.CONFIGURATIONS[name] = kept
    return lines


def seconds(inputs: Inputs) -> tuple[float, float]:
    """Of the forward, and of forward and backward, on the GPU alone."""
    leaf = inputs.qkv.clone().requires_grad_()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(inputs.packed(leaf), leaf, inputs.upstream)

    runs = {"forward": graphed(lambda: inputs.packed(inputs.qkv)), "both": graphed(both)}
    comparison = Comparison("", "runs", [Contender(name, run, 1) for name, run in runs.items()], [], "cuda")
    comparison.measure(3, shortest_round=0.005)
    COMPARISONS.remove(comparison)
    return comparison["forward"].median, comparison["both"].median
