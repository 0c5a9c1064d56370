"""Packed attention beside varlen_attn, padded SDPA by back end, and FlexAttention: bytes and operations a second.

Timed is the GPU alone, launches hidden. Counted are the bytes that must move (forward: q, k, v read, out written;
backward: those and dout read, dq, dk, dv written) and the operations on real tokens. A contender's input is what it
wants: packed or padded; ours finds q, k and v side by side, as a projection leaves them, others in tensors of their
own. Ours makes lists of tiles before the clock starts, as a model does once for all its layers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from timing import Comparison, Contender, describe, release_memory
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastrank import ops

LENGTHS = {"32": 32, "64": 64, "90, mixed": None, "128": 128, "256": 256, "512": 512}
OURS = "fastrank"
NUM_HEADS = 12
NUM_TOKENS = 131072
MOST_SCORE_BYTES = 20e9  # of the scores that the math back end lays out, three times in float32
TOLERANCE = 0.02  # of a bf16 output or gradient, relative to its norm


def draw_lengths(length: int | None, num_tokens: int) -> np.ndarray:
    """Pairs of one length, or log-normal ones around 90 as MS MARCO's are, of so many tokens together."""
    if length is not None:
        return np.full(max(1, num_tokens // length), length)
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(4.42, 0.4, max(2, num_tokens // 90)), 24, 256).astype(int)


class Inputs:
    """qkv of one case, packed and padded, and what the reference makes of it."""

    def __init__(self, lengths: np.ndarray, head_dim: int, heads: int, device: str, dtype: torch.dtype):
        self.lengths, self.longest = lengths, int(lengths.max())
        self.span = int(lengths.min()), self.longest
        generator = torch.Generator(device).manual_seed(0)
        shape = int(lengths.sum()), 3, heads, head_dim
        self.qkv = torch.randn(shape, generator=generator, device=device).to(dtype)
        self.upstream = torch.randn((shape[0], *shape[2:]), generator=generator, device=device).to(dtype)
        each = torch.from_numpy(lengths).to(device)
        self.offsets = functional.pad(each.cumsum(0), (1, 0)).int()
        self.real = torch.arange(self.longest, device=device) < each[:, None]  # (pairs, length)
        self.is_ragged = not bool(self.real.all())
        backend = "gpu" if device == "cuda" else "cpu"
        self.packed = lambda qkv: ops.fused_attention(qkv, self.offsets, span=self.span, backend=backend)
        few = int(np.searchsorted(lengths.cumsum(), 4096)) + 1  # the reference walks over pairs: some are enough
        self.num_checked = int(lengths[:few].sum())
        leaf = self.qkv[: self.num_checked].double().requires_grad_()
        out = ops.fused_attention(leaf, self.offsets[: few + 1], backend="reference")
        (gradient,) = torch.autograd.grad(out, leaf, self.upstream[: self.num_checked].double())
        self.expected = out.detach(), gradient

    def pad(self, tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros(*self.real.shape, *tensor.shape[1:])
        padded[self.real] = tensor
        return padded

    def check(self, results: tuple[Tensor, ...]) -> str | None:
        """results: output and, where it is measured, the gradient of qkv, packed."""
        for name, value, truth in zip(("out", "gradient"), results, self.expected, strict=False):
            apart = float((value[: self.num_checked].double() - truth).norm() / truth.norm())
            if not apart < TOLERANCE:
                return f"{name} is off by {apart:.2g}"
        return None


def contenders(inputs: Inputs, device: str, dry_run: bool, with_flex: bool) -> dict[str, tuple[Callable | str, bool]]:
    """By name: q, k, v -> out, or why there is no such function, and whether it takes the padded form. Ours takes qkv,
    as a projection gives it."""
    found: dict[str, tuple[Callable | str, bool]] = {OURS: (inputs.packed, False)}
    offsets, longest = inputs.offsets, inputs.longest
    if device == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        found["varlen_attn"] = (lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest), False)
    mask = inputs.real[:, None, None, :] if inputs.is_ragged else None
    score_bytes = 3 * 4 * len(inputs.lengths) * inputs.qkv.shape[2] * longest**2
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("math", SDPBackend.MATH),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        if (name != "math") == dry_run or (name == "math" and score_bytes > MOST_SCORE_BYTES):
            continue
        if name == "flash" and mask is not None:  # it takes none
            continue

        def padded(q, k, v, backend=backend):
            q, k, v = (one.transpose(1, 2) for one in (q, k, v))  # (pairs, heads, length, head_dim)
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        found[f"padded SDPA, {name}"] = (padded, True)
    if with_flex and is_wanted("FlexAttention"):
        try:
            found["FlexAttention"] = (flex_attention_of(inputs, device), False)
        except Exception as error:
            found["FlexAttention"] = (describe(error), False)
        release_memory(device)  # what making the mask, or failing to, has left
    return {name: one for name, one in found.items() if is_wanted(name)}


def is_wanted(name: str) -> bool:
    return name == OURS or re.search(os.environ.get("FASTRANK_GPU_CASES", ""), name) is not None


def flex_attention_of(inputs: Inputs, device: str) -> Callable:
    """FlexAttention with a mask of documents, made before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pair = torch.repeat_interleave(torch.arange(len(inputs.lengths), device=device), inputs.offsets.diff())

    def same_pair(b, h, i, j):
        return pair[i] == pair[j]

    block = torch.compile(create_block_mask)(same_pair, None, None, len(pair), len(pair), device=device)
    compiled = torch.compile(flex_attention)

    def flex(q, k, v):
        q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
        return compiled(q, k, v, block_mask=block)[0].transpose(0, 1)

    return flex


def make_contender(name: str, function: Callable | str, is_padded: bool, inputs: Inputs, backward: bool) -> Contender:
    """Output and, with backward, the gradients of what it reads: of qkv as one tensor for ours, of q, k and v as three
    for others, so that nobody stacks."""
    if isinstance(function, str):
        return Contender(name, lambda: None, 0, failure=function)
    qkv = inputs.pad(inputs.qkv) if is_padded else inputs.qkv
    upstream = inputs.pad(inputs.upstream) if is_padded else inputs.upstream
    dim = 2 if is_padded else 1
    given = [qkv] if name == OURS else qkv.unbind(dim)
    leaves = [one.clone(memory_format=torch.contiguous_format).requires_grad_(backward) for one in given]

    def once() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out.detach(), *(torch.autograd.grad(out, leaves, upstream) if backward else ()))

    def check(results: tuple[Tensor, ...]) -> str | None:
        out, *gradients = results
        found = [out, *([gradients[0] if name == OURS else torch.stack(gradients, dim)] if backward else [])]
        return inputs.check(tuple(one[inputs.real] for one in found) if is_padded else tuple(found))

    num_bytes = (4 + 8 * backward) * inputs.upstream.numel() * inputs.upstream.element_size()
    return Contender(name, once, num_bytes, ours=name == OURS, check=check, launches_hidden=True)


def compare(title: str, inputs: Inputs, functions: dict, device: str, dry_run: bool, limits: dict) -> Iterator[str]:
    """Forward, and forward with backward; yields lines of GB/s and TFLOP/s."""
    heads, head_dim = inputs.upstream.shape[1:]
    squares = float((inputs.lengths.astype(float) ** 2).sum())
    for backward in (False, True):
        flop = (4 + 10 * backward) * squares * heads * head_dim
        made = [make_contender(name, *function, inputs, backward) for name, function in functions.items()]
        notes = ["padded: all pairs to the longest"] if inputs.is_ragged else []
        phase = "forward and backward" if backward else "forward"
        comparison = Comparison(f"{title}, {phase}", "bytes", made, notes, device)
        comparison.measure(3 if dry_run else 7, shortest_round=0 if dry_run else 0.02)
        for one in comparison.contenders:
            share = "" if one.failure else f"{one.rate / limits['copy_bytes_per_second']:.0%}"
            yield f"{comparison.title:55s} {one.name:25s} " + (
                one.failure
                or f"{one.rate / 1e9:8.0f} GB/s {share:>5s} of copy {flop / one.median / 1e12:7.1f} TFLOP/s "
                f"{one.median * 1e6:9.1f} us"
            )
        del made, comparison
        release_memory(device)


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    dtype, tokens, heads = (torch.float32, 300, 2) if dry_run else (torch.bfloat16, NUM_TOKENS, NUM_HEADS)
    for head_dim in (32,) if dry_run else (32, 64):
        for name, length in LENGTHS.items():
            if dry_run and name not in ("32", "90, mixed"):
                continue
            inputs = Inputs(draw_lengths(length, tokens), head_dim, heads, device, dtype)
            functions = contenders(inputs, device, dry_run, length is None and head_dim == 64 and not dry_run)
            title = f"attention, length {name}, head dim {head_dim}"
            yield from compare(title, inputs, functions, device, dry_run, limits)
            del inputs, functions
