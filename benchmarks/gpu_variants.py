"""Other tiles, numbers of warps and stages for the attention kernels: which are the fastest here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_attention import LENGTHS, NUM_HEADS, NUM_TOKENS, Inputs, draw_lengths
from gpu_compile import changed, compile_all
from timing import COMPARISONS, Comparison, Contender, release_memory

from fastrank.kernels.attention import gpu

SHIPPED = "as shipped"
# By name: changes of configurations, by the part of their name before the dtype, and of PROGRAMS. Of a configuration
# they change options or compile-time values; those it has not got are passed over.
ONE_TILE = {"BLOCK_QUERIES": 128, "QUERY_TILES": 1, "num_warps": 8, "max_registers": 128}
TWO_TILES = {"BLOCK_QUERIES": 64, "QUERY_TILES": 2, "num_warps": 4, "max_registers": None}
VARIANTS: dict[str, dict[str, object]] = {
    "one head a program": {"PROGRAMS": 1 << 30},
    "fewer programs": {"PROGRAMS": 2048},
    "more programs": {"PROGRAMS": 8192},
    "forward 96, 8 warps": {"forward 96": ONE_TILE},
    "forward 96, any registers": {"forward 96": {"max_registers": None}},
    "forward 128, 8 warps": {"forward 128": ONE_TILE},
    "forward 128, 4 warps": {"forward 128": TWO_TILES},
    "forward 128, any registers": {"forward 128": {"max_registers": None}},
    "forward 128, 4 warps, 1 stage": {"forward 128": TWO_TILES | {"num_stages": 1, "max_registers": 168}},
    "forward, 3 stages": {f"forward {longest}": {"num_stages": 3} for longest in (32, 64, 96, 128)},
    "forward, 1 stage": {f"forward {longest}": {"num_stages": 1} for longest in (32, 64, 96, 128)},
    "backward 128, 2 stages": {"backward 128": {"num_stages": 2}},
    "backward 128, one tile": {"backward 128": {"BLOCK_KEYS": 128, "KEY_TILES": 1, "num_stages": 1}},
    "backward 128, tiles of 64": {"backward 128": {"BLOCK_KEYS": 64, "KEY_TILES": 2, "num_stages": 1}},
    "backward 128, tiles of 32": {"backward 128": {"BLOCK_KEYS": 32, "KEY_TILES": 4, "num_stages": 2}},
    "long, 2 stages": {f"{name} long": {"num_stages": 2} for name in ("forward", "dq", "dkdv")},
    "forward long, 128 queries": {"forward long": {"BLOCK_QUERIES": 128, "num_warps": 8, "max_registers": 128}},
    "forward long, any registers": {"forward long": {"max_registers": None}},
    "dq long, 128 queries": {"dq long": {"BLOCK_QUERIES": 128, "num_warps": 8}},
    "dkdv long, 3 stages": {"dkdv long": {"num_stages": 3}},
    "dkdv long, 2 stages": {"dkdv long": {"num_stages": 2, "max_registers": 168}},
    "dkdv long, 2 warps": {"dkdv long": {"BLOCK_QUERIES": 32, "num_warps": 2}},
}

# Of which lengths a variant's kernels take pairs: what its name holds, and these.
CASES = {"long": ("512", "256"), "96": ("90, mixed",), "128": ("90, mixed", "128"), "": ("32", "64", "90, mixed")}


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    jobs = [job for head_dim in (32, 64) for variant in VARIANTS for job in jobs_of(variant, head_dim)]
    if dry_run:  # there is nothing to choose without a GPU
        yield f"{len(VARIANTS)} variants, {len(jobs)} kernels"
        return
    yield from compile_all(jobs)
    for head_dim in (32, 64):
        for case in dict.fromkeys(case for cases in CASES.values() for case in cases):
            inputs = Inputs(draw_lengths(LENGTHS[case], NUM_TOKENS), head_dim, NUM_HEADS, device, torch.bfloat16)
            chosen = [name for name in VARIANTS if case in cases_of(name) and applies(name, head_dim)]
            yield from vary(f"length {case}, head dim {head_dim}", [SHIPPED, *chosen], inputs, head_dim)
            del inputs
            release_memory(device)


def cases_of(variant: str) -> tuple[str, ...]:
    return next(cases for part, cases in CASES.items() if part in variant.split(", ")[0])


def applies(variant: str, head_dim: int) -> bool:
    return "PROGRAMS" in VARIANTS[variant] or bool(jobs_of(variant, head_dim))


def jobs_of(variant: str, head_dim: int) -> list[tuple[str, str, dict]]:
    """The kernels of a variant, as gpu_compile takes them."""
    named = {f"{name} bfloat16 {head_dim}": changes for name, changes in VARIANTS[variant].items()}
    return [("attention", name, changes) for name, changes in named.items() if name in gpu.CONFIGURATIONS]


@contextlib.contextmanager
def using(variant: str, head_dim: int) -> Iterator[None]:
    """Inside it the configurations of one head dimension are a variant's."""
    kept, programs, alike = dict(gpu.CONFIGURATIONS), gpu.PROGRAMS, gpu.PROGRAMS_OF_ALIKE
    try:
        if variant != SHIPPED:
            if "PROGRAMS" in VARIANTS[variant]:
                gpu.PROGRAMS = VARIANTS[variant]["PROGRAMS"]
                gpu.PROGRAMS_OF_ALIKE = dict.fromkeys(alike, gpu.PROGRAMS)
            for _, name, changes in jobs_of(variant, head_dim):
                gpu.CONFIGURATIONS[name] = changed(kept[name], changes)
        yield
    finally:
        gpu.CONFIGURATIONS.update(kept)
        gpu.PROGRAMS, gpu.PROGRAMS_OF_ALIKE = programs, alike


def vary(title: str, variants: list[str], inputs: Inputs, head_dim: int) -> Iterator[str]:
    """All variants for some pairs, then the best of them."""
    found: dict[str, dict[str, float]] = {}  # seconds by variant and phase
    for variant in variants:
        with using(variant, head_dim):
            contenders = measure(inputs)
        failures = [one.failure for one in contenders if one.failure]
        if failures:  # it does not fit, mostly
            yield f"{title}, {variant}: {failures[0]}"
            continue
        found[variant] = {one.name: one.median for one in contenders}
        yield f"{title}, {variant}: " + ", ".join(told(phase, variant, found) for phase in found[variant])
    if found:
        yield f"{title}, best: " + ", ".join(best(phase, found) for phase in next(iter(found.values())))


def told(phase: str, variant: str, found: dict[str, dict[str, float]]) -> str:
    """The time of a variant and what share of the shipped one's it saves."""
    seconds = found[variant][phase]
    saved = f" ({1 - seconds / found[SHIPPED][phase]:+.1%} saved)" if SHIPPED in found and variant != SHIPPED else ""
    return f"{phase} {seconds * 1e6:.1f} us{saved}"


def best(phase: str, found: dict[str, dict[str, float]]) -> str:
    variant = min(found, key=lambda one: found[one][phase])
    return f"{told(phase, variant, found)} {variant}"


def measure(inputs: Inputs) -> list[Contender]:
    """The forward, and forward and backward, checked and timed on the GPU alone."""
    leaf = inputs.qkv.clone().requires_grad_()

    def forward() -> tuple[torch.Tensor, ...]:
        return (inputs.packed(inputs.qkv),)

    def both() -> tuple[torch.Tensor, ...]:
        out = inputs.packed(leaf)
        return (out.detach(), *torch.autograd.grad(out, leaf, inputs.upstream))

    made = [
        Contender(phase, run, 1, ours=True, check=inputs.check, launches_hidden=True)
        for phase, run in {"forward": forward, "with backward": both}.items()
    ]
    Comparison("", "runs", made, [], inputs.qkv.device.type).measure(5, shortest_round=0.005)
    COMPARISONS.pop()  # the lines tell it
    return made
