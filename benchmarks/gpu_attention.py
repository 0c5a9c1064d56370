"""Packed attention beside varlen_attn, padded SDPA by back end, and FlexAttention: bytes and operations a second.

Timed is the GPU alone, by replays of a CUDA graph. Counted are the bytes that must move (forward: q, k, v read, out
written; backward: those and dout read, dq, dk, dv written) and the operations on real tokens. A contender's input is
what it wants: packed or padded, projections of qkv side by side for all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import Comparison, Contender, graphed
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastrank import ops

LENGTHS = {"32": 32, "64": 64, "90, mixed": None, "128": 128, "256": 256, "512": 512}
NUM_HEADS = 12
NUM_TOKENS = 131072
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


def contenders(inputs: Inputs, device: str, dry_run: bool, with_flex: bool) -> dict[str, tuple[Callable, bool]]:
    """By name: qkv -> out, and whether it takes the padded form."""
    found: dict[str, tuple[Callable, bool]] = {"fastrank": (inputs.packed, False)}
    offsets, longest = inputs.offsets, inputs.longest
    if device == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        found["varlen_attn"] = (lambda qkv: varlen_attn(*qkv.unbind(1), offsets, offsets, longest, longest), False)
    mask = inputs.real[:, None, None, :] if inputs.is_ragged else None
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("math", SDPBackend.MATH),
    ):
        if (name != "math") == dry_run or (name == "flash" and mask is not None):  # flash takes no mask
            continue

        def padded(qkv, backend=backend):
            q, k, v = (one.transpose(1, 2) for one in qkv.unbind(2))  # (pairs, heads, length, head_dim)
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        found[f"padded SDPA, {name}"] = (padded, True)
    if with_flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        pair = torch.repeat_interleave(torch.arange(len(inputs.lengths), device=device), offsets.diff())
        block = create_block_mask(
            lambda b, h, i, j: pair[i] == pair[j], None, None, len(pair), len(pair), device=device
        )
        compiled = torch.compile(flex_attention)

        def flex(qkv):
            q, k, v = (one.transpose(0, 1)[None] for one in qkv.unbind(1))
            return compiled(q, k, v, block_mask=block)[0].transpose(0, 1)

        found["FlexAttention"] = (flex, False)
    return found


def compare(title: str, inputs: Inputs, functions: dict, device: str, dry_run: bool, limits: dict) -> list[str]:
    """Forward and forward with backward; returns lines of GB/s and TFLOP/s."""
    tokens, _, heads, head_dim = inputs.qkv.shape
    squares = float((inputs.lengths.astype(float) ** 2).sum())
    lines = []
    for phase in ("forward", "forward and backward"):
        backward = phase != "forward"
        size = tokens * heads * head_dim * inputs.qkv.element_size()
        num_bytes, flop = (4 + 8 * backward) * size, (4 + 10 * backward) * squares * heads * head_dim
        made = []
        for name, (function, is_padded) in functions.items():
            qkv = inputs.pad(inputs.qkv) if is_padded else inputs.qkv
            upstream = inputs.pad(inputs.upstream) if is_padded else inputs.upstream
            leaf = qkv.clone().requires_grad_(backward)

            def once(function=function, leaf=leaf, upstream=upstream, backward=backward):
                out = function(leaf)
                return (out, *torch.autograd.grad(out, leaf, upstream)) if backward else (out,)

            def check(results, is_padded=is_padded):
                return inputs.check(tuple(one[inputs.real] for one in results) if is_padded else results)

            made.append(Contender(name, once, num_bytes, ours=name == "fastrank", check=check))
        comparison = Comparison(f"{title}, {phase}", "bytes", made, [], device)
        try_measure(comparison, dry_run)
        for one in comparison.contenders:
            if not one.failure:
                share = one.rate / limits["copy_bytes_per_second"]
                lines.append(
                    f"{comparison.title:55s} {one.name:25s} {one.rate / 1e9:8.0f} GB/s {share:5.0%} of copy "
                    f"{flop / one.median / 1e12:7.1f} TFLOP/s {one.median * 1e6:9.1f} us"
                )
    return lines


def try_measure(comparison: Comparison, dry_run: bool) -> None:
    """A contender that cannot run here is a failure in the table, not the end of the script."""
    for one in comparison.contenders:
        try:
            one.run()
            if comparison.device == "cuda":
                one.run = graphed(one.run)
        except Exception as error:
            one.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    comparison.measure(3 if dry_run else 7, shortest_round=0 if dry_run else 0.02)


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool) -> dict:
    lines = []
    dtype, tokens, heads = (torch.float32, 300, 2) if dry_run else (torch.bfloat16, NUM_TOKENS, NUM_HEADS)
    for head_dim in (32,) if dry_run else (32, 64):
        for name, length in LENGTHS.items():
            if dry_run and name not in ("32", "90, mixed"):
                continue
            inputs = Inputs(draw_lengths(length, tokens), head_dim, heads, device, dtype)
            functions = contenders(inputs, device, dry_run, length is None and head_dim == 64 and not dry_run)
            lines += compare(
                f"attention, length {name}, head dim {head_dim}", inputs, functions, device, dry_run, limits
            )
            del inputs, functions
            if device == "cuda":
                torch.cuda.empty_cache()
    return {"lines": lines}
