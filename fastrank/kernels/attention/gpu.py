"""Packed attention in Triton (gpu_kernels.py), forward and backward, q, k and v read in place from strided views.

Which kernel takes a pair depends on the pair's own length alone, and there are no atomics: its result is the same bit
for bit in any batch. Pairs of up to 128 tokens have all their keys in one tile; for longer ones a list of tiles is made
on the device, once a batch, so that nothing is read back to the host.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from fastrank.kernels.attention import gpu_kernels
from fastrank.kernels.configuration import (
    ALIGNMENT,
    FLOATS,
    POINTERS,
    STEP,
    Configuration,
    Table,
    align,
    configure,
    name_of,
)

HEAD_DIMS = (32, 64, 128)
# Pairs of up to so many tokens are one tile of keys; a forward program takes the second number of queries of one.
SHORT_TILES = {32: 32, 64: 64, 128: 64}
FEW = 16  # queries of a tile where queries have offsets of their own: the fewest that a matrix unit takes
LOG2_E = math.log2(math.e)
ENDS = ("begins", "ends")


def _configure(
    kernel: Callable, dtype: torch.dtype, num_warps: int, num_stages: int = 1, **constants: object
) -> Configuration:
    types = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), POINTERS[dtype]) | {"scale": "fp32"}
    types |= dict.fromkeys(("highest", "log_totals", "delta"), "*fp32")
    types |= dict.fromkeys(("tiles", *(f"{side}{end}" for side in ("", "query_", "key_") for end in ENDS)), "*i32")
    return configure(kernel, types, constants, num_warps, num_stages)


def _configurations(dtype: torch.dtype, head_dim: int) -> dict[str, Configuration]:
    """The kernels of one dtype and head dimension. float32 goes without matrix units: all its pairs count as long."""
    forward, backward = gpu_kernels.attention_forward_kernel, gpu_kernels.attention_backward_kernel
    made = {}
    if dtype == torch.float32:
        tile = {"HEAD_DIM": head_dim, "BLOCK_QUERIES": FEW, "BLOCK_KEYS": 32 if head_dim < 128 else 16}
        warps, stages = 4 if head_dim < 64 else 8, 1
    else:
        tile, warps, stages = {"HEAD_DIM": head_dim, "BLOCK_QUERIES": 64, "BLOCK_KEYS": 64}, 4, 2
        shortest = 1
        for longest, queries in SHORT_TILES.items():
            short = {"HEAD_DIM": head_dim, "BLOCK_KEYS": longest, "MIN_KEYS": shortest}
            made[f"forward {longest}"] = _configure(
                forward,
                dtype,
                num_warps=2 if longest == 32 else 4,
                **short,
                BLOCK_QUERIES=queries,
                TILES_PER_PAIR=longest // queries,
            )
            made[f"backward {longest}"] = _configure(
                backward,
                dtype,
                num_warps=8 if longest * head_dim > 64 * 64 else 4,
                **short,
                BLOCK_QUERIES=32 if longest == 128 else longest,
            )
            shortest = longest + 1
    for name, queries in (("long", tile["BLOCK_QUERIES"]), ("few", FEW)):
        cut = tile | {"BLOCK_QUERIES": queries}
        made[f"forward {name}"] = _configure(forward, dtype, warps, stages, **cut, TILES_PER_PAIR=0, MIN_KEYS=0)
        if head_dim == 128:
            warps = 8  # with 4 the backward would spill
        exact = {"IS_EXACT": dtype == torch.float32}
        made[f"dq {name}"] = _configure(gpu_kernels.attention_dq_kernel, dtype, warps, stages, **cut, **exact)
        if head_dim == 64:
            cut["BLOCK_QUERIES"] = min(cut["BLOCK_QUERIES"], 32)  # with more it would spill
        made[f"dkdv {name}"] = _configure(gpu_kernels.attention_dkdv_kernel, dtype, warps, stages, **cut, **exact)
    return made


CONFIGURATIONS = Table(
    {
        f"{name} {name_of(dtype)} {head_dim}": configuration
        for dtype in FLOATS
        for head_dim in HEAD_DIMS
        for name, configuration in _configurations(dtype, head_dim).items()
    }
)


def refusals(tensor: Tensor) -> list[str]:
    if tensor.shape[-1] in HEAD_DIMS:
        return []
    known = ", ".join(map(str, HEAD_DIMS))
    return [f"The gpu backend computes attention for head dimensions of {known}, not of {tensor.shape[-1]}."]


@dataclass(eq=False)
class Cuts:
    """Where pairs begin and end: int32 (pairs,) each, in the rows of q and in those of k.

    Attributes:
        num_queries, num_keys: Rows of q and of k.
        are_shared: Queries and keys are the same tokens.
        span: Tokens of the shortest and of the longest pair, as far as they are known.
        tiles: Lists of tiles made so far, by what they cut.
    """

    query_begins: Tensor
    query_ends: Tensor
    key_begins: Tensor
    key_ends: Tensor
    num_queries: int
    num_keys: int
    are_shared: bool
    span: tuple[int, int]
    tiles: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    @functools.cached_property
    def num_pairs(self) -> int:
        return len(self.key_begins)

    def may_hold(self, shortest: int, longest: int) -> bool:
        """Whether a pair of so many tokens can be here."""
        return self.num_pairs > 0 and shortest <= self.span[1] and self.span[0] <= longest

    def cut(self, side: str, block: int, above: int) -> Tensor:
        """Tiles of `block` rows of the "query" or "key" side of all pairs with more than `above` keys: int32 (tiles, 2)
        of pair and first row, filled up with -1 to the most that there can be."""
        key = side, block, above
        if key not in self.tiles:
            begins, ends, rows = (
                (self.query_begins, self.query_ends, self.num_queries)
                if side == "query"
                else (self.key_begins, self.key_ends, self.num_keys)
            )
            most_pairs = min(self.num_pairs, rows // (above + 1)) if self.are_shared else self.num_pairs
            counts = (ends - begins + (block - 1)) // block
            if above:
                counts = counts * (self.key_ends - self.key_begins > above)
            after = counts.cumsum(0, dtype=torch.int32)
            place = torch.arange(rows // block + most_pairs, dtype=torch.int32, device=begins.device)
            pair = torch.searchsorted(after, place, right=True, out_int32=True)
            inside = pair < self.num_pairs
            at = pair.clamp(max=self.num_pairs - 1).long()
            first = (place - (after - counts)[at]) * block
            self.tiles[key] = torch.stack([torch.where(inside, pair, -1), first], 1).contiguous()
        return self.tiles[key]


_known_cuts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # those of one batch serve all its layers


def _find_cuts(offsets: Tensor, query_offsets: Tensor | None, num_queries: int, num_keys: int, span) -> Cuts:
    # What changes an inference tensor in place is not counted, so nothing is kept for those.
    keeps = query_offsets is None and not offsets.is_inference()
    state = (offsets._version, span) if keeps else None
    known = _known_cuts.get(offsets) if keeps else None
    if known is not None and known[0] == state:
        return known[1]
    # A view of the detached tensor: one of the tensor itself would keep its key in the dictionary alive.
    keys = offsets.detach().contiguous()
    queries = keys if query_offsets is None else query_offsets.detach().contiguous()
    cuts = Cuts(
        queries[:-1],
        queries[1:],
        keys[:-1],
        keys[1:],
        num_queries,
        num_keys,
        query_offsets is None,
        span or (0, num_keys),
    )
    if keeps:
        _known_cuts[offsets] = state, cuts
    return cuts


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float,
    span: tuple[int, int] | None = None,
) -> Tensor:
    cuts = _find_cuts(offsets, query_offsets, len(q), len(k), span)
    return _attend(q, k, v, cuts, scale, torch.empty)


def fused_attention(qkv: Tensor, offsets: Tensor, scale: float, span: tuple[int, int] | None = None) -> Tensor:
    if scale <= 0:
        return attention(*qkv.unbind(1), offsets, None, scale, span)
    cuts = _find_cuts(offsets, None, len(qkv), len(qkv), span)
    qkv = _aligned(qkv)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _FusedAttention.apply(qkv, cuts, scale)
    return _forward(*qkv.detach().unbind(1), cuts, scale, torch.empty)[0]


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    batch, length = q.shape[:2]
    begins = torch.arange(batch, dtype=torch.int32, device=q.device) * length
    ends = begins + lengths.int()
    cuts = Cuts(begins, ends, begins, ends, batch * length, batch * length, True, (0, length))
    out = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cuts, scale, torch.zeros)
    return out.unflatten(0, (batch, length))


def _attend(q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float, allocate: Callable[..., Tensor]) -> Tensor:
    if scale <= 0:  # the highest score stands for the highest probability only where scale is positive
        q, scale = (0 * q, 1.0) if scale == 0 else (-q, -scale)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, cuts, scale, allocate)
    return _forward(q.detach(), k.detach(), v.detach(), cuts, scale, allocate)[0]


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its rows do not begin at multiples of 16 bytes."""
    stands = tensor.data_ptr() % ALIGNMENT == 0 and all(
        stride % STEP.value == 0 for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False) if size > 1
    )
    return (
        tensor
        if stands and (tensor.stride(-1) == 1 or not tensor.numel())
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _steps(*tensors: Tensor) -> list[int]:
    """How far tokens and heads of each lie apart."""
    return [stride // STEP.value for tensor in tensors for stride in tensor.stride()[:2]]


@functools.cache
def _full_name(name: str, dtype: torch.dtype, head_dim: int) -> str:
    return f"{name} {name_of(dtype)} {head_dim}"


def _launch(name: str, like: Tensor, num_programs: int, *arguments: Tensor | int | float) -> None:
    CONFIGURATIONS.launch(_full_name(name, like.dtype, like.shape[2]), num_programs, *arguments)


def _constants(name: str, like: Tensor) -> Mapping[str, object]:
    return CONFIGURATIONS[_full_name(name, like.dtype, like.shape[2])].constants


def _tile(name: str, like: Tensor) -> tuple[int, int]:
    constants = _constants(name, like)
    return constants["BLOCK_QUERIES"], constants["BLOCK_KEYS"]


@functools.cache
def _short(dtype: torch.dtype) -> list[tuple[int, int]]:
    """Shortest and longest pair of each kernel that takes short ones."""
    ends = () if dtype == torch.float32 else tuple(SHORT_TILES)
    return list(zip((1, *(end + 1 for end in ends)), ends, strict=False))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float, allocate: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    out = allocate(q.shape, dtype=q.dtype, device=q.device)
    statistics = torch.empty(2, q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, statistics
    rows = cuts.query_begins, cuts.query_ends, cuts.key_begins, cuts.key_ends
    heads = q.shape[1]
    numbers = heads, len(q), *_steps(q, k, v), scale * LOG2_E
    above = 0
    if cuts.are_shared:
        for shortest, longest in _short(q.dtype):
            above = longest
            if cuts.may_hold(shortest, longest):
                name = f"forward {longest}"
                programs = cuts.num_pairs * _constants(name, q)["TILES_PER_PAIR"] * heads
                _launch(name, q, programs, q, k, v, out, *statistics, *rows, cuts.key_begins, *numbers)
    if not cuts.are_shared or cuts.may_hold(above + 1, cuts.num_keys):
        name = "forward long" if cuts.are_shared else "forward few"
        tiles = cuts.cut("query", _tile(name, q)[0], above)
        _launch(name, q, len(tiles) * heads, q, k, v, out, *statistics, *rows, tiles, *numbers)
    return out, statistics


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    statistics: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    cuts: Cuts,
    scale: float,
) -> None:
    if not (q.numel() or k.numel()):
        return
    dout = align(dout)
    rows = cuts.query_begins, cuts.query_ends, cuts.key_begins, cuts.key_ends
    heads = q.shape[1]
    dq, dk, dv = gradients
    dq_step, dk_step, dv_step = (gradient.stride(0) // STEP.value for gradient in gradients)
    steps = _steps(q, k, v)
    scale *= LOG2_E
    above = 0
    if cuts.are_shared:
        for shortest, longest in _short(q.dtype):
            above = longest
            if cuts.may_hold(shortest, longest):
                given = q, k, v, dout, *statistics, dq, dk, dv, cuts.key_begins, cuts.key_ends, heads, len(q), *steps
                programs = cuts.num_pairs * heads
                _launch(f"backward {longest}", q, programs, *given, dq_step, dk_step, dv_step, scale)
    if not cuts.are_shared or cuts.may_hold(above + 1, cuts.num_keys):
        name = "long" if cuts.are_shared else "few"
        delta = torch.empty_like(statistics[0])
        queries, keys = _tile(f"dq {name}", q)
        tiles = cuts.cut("query", queries, above)
        given = q, k, v, out, dout, *statistics, delta, dq, *rows, tiles, heads, len(q), *steps, dq_step, scale
        _launch(f"dq {name}", q, len(tiles) * heads, *given)
        tiles = cuts.cut("key", keys, above)
        given = q, k, v, dout, *statistics, delta, dk, dv, *rows, tiles, heads, len(q), *steps, dk_step, dv_step, scale
        _launch(f"dkdv {name}", q, len(tiles) * heads, *given)


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, cuts, scale, allocate):
        out, statistics = _forward(q, k, v, cuts, scale, allocate)
        ctx.save_for_backward(q, k, v, out, statistics)
        ctx.settings = cuts, scale, allocate
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        cuts, scale, allocate = ctx.settings
        q, k, v, out, statistics = ctx.saved_tensors
        gradients = tuple(allocate(one.shape, dtype=one.dtype, device=one.device) for one in (q, k, v))
        _backward(q, k, v, out, dout, statistics, gradients, cuts, scale)
        wanted = (one if needed else None for one, needed in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None


class _FusedAttention(Function):
    @staticmethod
    def forward(ctx, qkv, cuts, scale):
        out, statistics = _forward(*qkv.unbind(1), cuts, scale, torch.empty)
        ctx.save_for_backward(qkv, out, statistics)
        ctx.settings = cuts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        cuts, scale = ctx.settings
        qkv, out, statistics = ctx.saved_tensors
        gradient = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        _backward(*qkv.unbind(1), out, dout, statistics, gradient.unbind(1), cuts, scale)
        return gradient, None, None
