"""Other tiles, numbers of warps and stages for the attention kernels: which are the fastest here."""

from __future__ import annotations

from pathlib import Path

import torch
from gpu_attention import LENGTHS, NUM_HEADS, NUM_TOKENS, Inputs, draw_lengths
from timing import COMPARISONS, Comparison, Contender, graphed

from fastrank.kernels.attention import gpu
from fastrank.kernels.configuration import Configuration

CHANGES = ({"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8}, {"num_stages": 1}, {"num_stages": 3})
TILES = {  # queries and keys of a tile, for kernels whose launch follows them
    "forward long": ((128, 64), (64, 128), (128, 128), (64, 32)),
    "dq long": ((128, 64), (64, 32), (32, 64)),
    "dkdv long": ((64, 64), (32, 128), (64, 128)),
    "backward 128": ((16, 128), (64, 128)),
}


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
    shipped = {key: kept.constants[key] for key in ("BLOCK_QUERIES", "BLOCK_KEYS")}
    shipped |= {"num_warps": kept.num_warps, "num_stages": kept.num_stages}
    tiles = TILES.get(" ".join(name.split()[:2]), ())
    changed = [dict(zip(("BLOCK_QUERIES", "BLOCK_KEYS"), tile, strict=True)) for tile in tiles]
    changed = [one | {"num_warps": warps} for one in changed for warps in (4, 8)]
    for changes in ({}, *CHANGES, *changed):
        settings = shipped | changes
        if changes and settings == shipped:
            continue
        numbers = {key: settings[key] for key in ("num_warps", "num_stages")}
        constants = dict(kept.constants) | {key: settings[key] for key in ("BLOCK_QUERIES", "BLOCK_KEYS")}
        gpu.CONFIGURATIONS[name] = Configuration(kept.kernel, kept.types, constants, **numbers)
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
