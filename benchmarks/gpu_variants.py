"""Other tiles, numbers of warps and stages for the attention kernels: which are the fastest here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_attention import LENGTHS, NUM_HEADS, NUM_TOKENS, Inputs, draw_lengths
from gpu_compile import changed, compile_all
from timing import COMPARISONS, Comparison, Contender, describe, graphed

from fastrank.kernels.attention import gpu

CHANGES = ({"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8}, {"num_stages": 1}, {"num_stages": 3})
NAMES = "BLOCK_QUERIES", "BLOCK_KEYS", "TILES_PER_PAIR"
TILES = {  # queries and keys of a tile, and tiles of a pair where their number is fixed
    "forward long": ((128, 64), (64, 128), (128, 128), (64, 32)),
    "forward 128": ((128, 128, 1), (32, 128, 4)),
    "forward 64": ((32, 64, 2),),
    "forward 32": ((16, 32, 2),),
    "dq long": ((128, 64), (64, 32), (32, 64)),
    "dkdv long": ((64, 64), (32, 128), (64, 128)),
    "backward 128": ((16, 128), (64, 128), (128, 128)),
    "backward 64": ((32, 64), (16, 64)),
}


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    jobs = [(name, changes) for head_dim in (32, 64) for name in names(head_dim) for changes in candidates(name)]
    if dry_run:  # there is nothing to choose without a GPU
        yield f"{len(jobs)} variants of {len(dict(jobs))} kernels"
        return
    yield from compile_all(("attention", *job) for job in jobs)
    for head_dim in (32, 64):
        for name in names(head_dim):
            length = {"32": "32", "64": "64", "128": "90, mixed"}.get(name.split()[1], "512")
            inputs = Inputs(draw_lengths(LENGTHS[length], NUM_TOKENS), head_dim, NUM_HEADS, device, torch.bfloat16)
            yield from vary(name, length, inputs)


def names(head_dim: int) -> list[str]:
    """Kernels of bf16 that pairs of their own queries run through."""
    ends = f" bfloat16 {head_dim}"
    return [name for name in gpu.CONFIGURATIONS if name.endswith(ends) and " few " not in name]


def candidates(name: str) -> list[dict[str, int]]:
    """What can be changed of a kernel, nothing first."""
    kept = gpu.CONFIGURATIONS[name]
    shipped = {key: kept.constants[key] for key in ("BLOCK_QUERIES", "BLOCK_KEYS")}
    shipped |= {"num_warps": kept.num_warps, "num_stages": kept.num_stages}
    tiles = [dict(zip(NAMES, tile, strict=False)) for tile in TILES.get(" ".join(name.split()[:2]), ())]
    tiles = [tile | {"num_warps": warps} for tile in tiles for warps in (2, 4, 8)]
    return [{}, *(one for one in (*CHANGES, *tiles) if shipped | one != shipped)]


def vary(name: str, length: str, inputs: Inputs) -> Iterator[str]:
    kept = gpu.CONFIGURATIONS[name]
    for changes in candidates(name):
        gpu.CONFIGURATIONS[name] = changed(kept, changes)
        try:
            forward, both = seconds(inputs)  # raises where the result is wrong
            result = f"forward {forward * 1e6:.1f} us, with backward {both * 1e6:.1f} us"
        except Exception as error:  # it does not fit
            result = describe(error)
        yield f"{name}, length {length}, {changes or 'as shipped'}: {result}"
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
