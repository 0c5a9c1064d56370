"""Other tiles, numbers of warps and stages for the attention kernels: which are the fastest here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_attention import LENGTHS, NUM_HEADS, NUM_TOKENS, Inputs, draw_lengths
from timing import COMPARISONS, Comparison, Contender, describe, graphed

from fastrank.kernels.attention import gpu
from fastrank.kernels.configuration import Configuration

CHANGES = ({"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8}, {"num_stages": 1}, {"num_stages": 3})
TILES = {  # queries and keys of a tile, for kernels whose launch follows them
    "forward long": ((128, 64), (64, 128), (128, 128), (64, 32)),
    "dq long": ((128, 64), (64, 32), (32, 64)),
    "dkdv long": ((64, 64), (32, 128), (64, 128)),
    "backward 128": ((16, 128), (64, 128)),
}


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    for head_dim in (32, 64):
        if dry_run:  # there is nothing to choose without a GPU
            yield f"{len(names(head_dim))} kernels of head dimension {head_dim} to vary"
            continue
        for name in names(head_dim):
            length = {"32": "32", "64": "64", "128": "90, mixed"}.get(name.split()[1], "512")
            inputs = Inputs(draw_lengths(LENGTHS[length], NUM_TOKENS), head_dim, NUM_HEADS, device, torch.bfloat16)
            yield from vary(name, length, inputs)


def names(head_dim: int) -> list[str]:
    """Kernels of bf16 that pairs of their own queries run through."""
    ends = f" bfloat16 {head_dim}"
    return [name for name in gpu.CONFIGURATIONS if name.endswith(ends) and " few " not in name]


def vary(name: str, length: str, inputs: Inputs) -> Iterator[str]:
    kept = gpu.CONFIGURATIONS[name]
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
            forward, both = seconds(inputs)  # raises where the result is wrong
            result = f"forward {forward * 1e6:.1f} us, with backward {both * 1e6:.1f} us"
        except Exception as error:  # it does not fit
            result = describe(error)
        yield f"{name}, length {length}, {settings}{' (shipped)' * (not changes)}: {result}"
    gpu.CONFIGURATIONS[name] = kept


def seconds(inputs: Inputs) -> tuple[float, float]:
    """Of the forward, and of forward and backward, on the GPU alone."""
    leaf = inputs.qkv.clone().requires_grad_()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(inputs.packed(leaf), leaf, inputs.upstream)

    out = inputs.packed(leaf)
    wrong = inputs.check((out.detach(), *torch.autograd.grad(out, leaf, inputs.upstream)))
    if wrong:
        raise AssertionError(wrong)
    runs = {"forward": graphed(lambda: inputs.packed(inputs.qkv)), "both": graphed(both)}
    comparison = Comparison("", "runs", [Contender(name, run, 1) for name, run in runs.items()], [], "cuda")
    comparison.measure(3, shortest_round=0.005)
    COMPARISONS.remove(comparison)
    return comparison["forward"].median, comparison["both"].median
