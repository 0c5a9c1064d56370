"""Packed attention in Triton (gpu_kernels.py), forward and backward, q, k and v read in place from strided views.

Which kernel takes a pair depends on the pair's own length alone, and there are no atomics: its result is the same bit
for bit in any batch. Short pairs, up to 64 or 128 tokens, have kernels by their length, which hold a whole head of one
on the chip; for longer ones a list of tiles is made on the device, once a batch: nothing is read back to the host.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

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
    Launch,
    Table,
    align,
    configure,
    name_of,
    run_together,
)

HEAD_DIMS = (32, 64, 128)


class ForwardTiles(NamedTuple):
    """Tile of queries and how many of these, keys and more keys behind them; registers of a thread at most."""

    queries: int
    query_tiles: int
    keys: int
    more_keys: int
    warps: int
    stages: int
    registers: int | None = None


class BackwardTiles(NamedTuple):
    """Tile of queries, tile of keys and how many of these; registers of a thread at most."""

    queries: int
    keys: int
    key_tiles: int
    warps: int
    stages: int
    registers: int | None = None


# Of short pairs, by head dimension and the longest pair of a kernel; longer pairs are long ones. Chosen by measurement
# on an H200; tiles for up to 96 tokens at head dim 64 took a tenth less for such pairs alone, but not where pairs of 97
# to 128 need a kernel, too.
FORWARD_TILES = {
    32: {
        32: ForwardTiles(32, 1, 32, 0, 2, 2),
        64: ForwardTiles(64, 1, 64, 0, 4, 2),
        96: ForwardTiles(64, 2, 64, 32, 4, 2, 128),
        128: ForwardTiles(64, 2, 128, 0, 4, 2, 128),
    },
    64: {
        32: ForwardTiles(32, 1, 32, 0, 2, 2),
        64: ForwardTiles(64, 1, 64, 0, 4, 2),
        128: ForwardTiles(128, 1, 128, 0, 8, 2, 128),
    },
    128: {
        32: ForwardTiles(32, 1, 32, 0, 2, 1),
        64: ForwardTiles(64, 1, 64, 0, 4, 1),
        96: ForwardTiles(128, 1, 64, 32, 8, 1),
        128: ForwardTiles(64, 2, 128, 0, 8, 1),
    },
}
BACKWARD_TILES = {
    32: {
        32: BackwardTiles(32, 32, 1, 2, 1),
        64: BackwardTiles(64, 64, 1, 4, 1),
        128: BackwardTiles(128, 64, 2, 8, 1, 128),
    },
    64: {
        32: BackwardTiles(32, 32, 1, 2, 1),
        64: BackwardTiles(64, 64, 1, 4, 1),
        128: BackwardTiles(128, 32, 4, 8, 2, 128),
    },
    128: {
        32: BackwardTiles(32, 32, 1, 2, 1),
        64: BackwardTiles(64, 64, 1, 8, 1),
    },
}
# A forward of short pairs has more heads a program where it would have more programs than so many: it loads the next
# head's rows while it computes. Where pairs of up to 64 tokens are alone in a batch, there are loads enough without.
# That of long ones looks its tile up once for all its heads.
PROGRAMS = 4096
PROGRAMS_OF_ALIKE = {32: 1 << 30, 64: 8192, 128: 8192}
PROGRAMS_OF_LONG = 8192
FEW = 16  # queries of a tile where queries have offsets of their own: the fewest that a matrix unit takes
LOG2_E = math.log2(math.e)
ENDS = ("begins", "ends")


def _configure(
    kernel: Callable,
    dtype: torch.dtype,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
    **constants: object,
) -> Configuration:
    types = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), POINTERS[dtype]) | {"scale": "fp32"}
    types |= dict.fromkeys(("highest", "log_totals", "delta"), "*fp32")
    types |= dict.fromkeys(("tiles", *(f"{side}{end}" for side in ("", "query_", "key_") for end in ENDS)), "*i32")
    return configure(kernel, types, constants, num_warps, num_stages, max_registers)


def _short_configurations(dtype: torch.dtype, head_dim: int) -> dict[str, Configuration]:
    made = {}
    shortest = 1
    for longest, tiles in FORWARD_TILES[head_dim].items():
        made[f"forward {longest}"] = _configure(
            gpu_kernels.attention_short_forward_kernel,
            dtype,
            tiles.warps,
            tiles.stages,
            tiles.registers,
            HEAD_DIM=head_dim,
            BLOCK_QUERIES=tiles.queries,
            QUERY_TILES=tiles.query_tiles,
            BLOCK_KEYS=tiles.keys,
            MORE_KEYS=tiles.more_keys,
            MIN_KEYS=shortest,
        )
        shortest = longest + 1
    shortest = 1
    for longest, tiles in BACKWARD_TILES[head_dim].items():
        made[f"backward {longest}"] = _configure(
            gpu_kernels.attention_short_backward_kernel,
            dtype,
            tiles.warps,
            tiles.stages,
            tiles.registers,
            HEAD_DIM=head_dim,
            BLOCK_QUERIES=tiles.queries,
            BLOCK_KEYS=tiles.keys,
            KEY_TILES=tiles.key_tiles,
            MIN_KEYS=shortest,
        )
        shortest = longest + 1
    return made


def _configurations(dtype: torch.dtype, head_dim: int) -> dict[str, Configuration]:
    """The kernels of one dtype and head dimension. float32 goes without matrix units: all its pairs count as long."""
    if dtype == torch.float32:
        tile = {"HEAD_DIM": head_dim, "BLOCK_QUERIES": FEW, "BLOCK_KEYS": 32 if head_dim < 128 else 16}
        made, warps, stages = {}, 4 if head_dim < 64 else 8, 1
    else:
        tile = {"HEAD_DIM": head_dim, "BLOCK_QUERIES": 64, "BLOCK_KEYS": 64}
        made, warps, stages = _short_configurations(dtype, head_dim), 4, 3 if head_dim < 128 else 2
    exact = {"IS_EXACT": dtype == torch.float32}
    for name, queries in (("long", tile["BLOCK_QUERIES"]), ("few", FEW)):
        cut = tile | {"BLOCK_QUERIES": queries} | exact
        held = 128 if head_dim == 64 and name == "long" and dtype != torch.float32 else None
        made[f"forward {name}"] = _configure(gpu_kernels.attention_forward_kernel, dtype, warps, stages, held, **cut)
        if head_dim == 128:
            warps = 8  # with 4 the backward would spill
        # Few queries have small gradients, in which the rounding of out that is in delta would be seen.
        mends = {"MENDS_DELTA": dtype == torch.float32 or name == "few"}
        made[f"dq {name}"] = _configure(gpu_kernels.attention_dq_kernel, dtype, warps, stages, **cut, **mends)
        # At 64, three programs to a processor are worth more than loading ahead.
        last_stages = 1 if dtype == torch.float32 or head_dim == 64 else 2
        made[f"dkdv {name}"] = _configure(gpu_kernels.attention_dkdv_kernel, dtype, warps, last_stages, **cut)
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


def find_cuts(offsets: Tensor, query_offsets: Tensor | None, num_queries: int, num_keys: int, span) -> Cuts:
    """Of a packed batch; the same ones as long as `offsets` is the same tensor."""
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


def first_token_cuts(cuts: Cuts) -> Cuts:
    """For queries of the first tokens alone, a row a pair."""
    pairs = cuts.num_pairs
    numbers, tiles = _count(1 << pairs.bit_length(), cuts.key_begins.device)
    one_each = numbers[:pairs], numbers[1 : pairs + 1]
    first = Cuts(*one_each, cuts.key_begins, cuts.key_ends, pairs, cuts.num_keys, False, cuts.span)
    first.tiles["query", FEW, 0] = tiles[:pairs]
    return first


@functools.cache  # for ever, since CUDA graphs may hold their addresses
def _count(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0, 1, 2, ... (size + 1,), and each beside a 0, (size + 1, 2)."""
    with torch.inference_mode(False):
        numbers = torch.arange(size + 1, dtype=torch.int32, device=device)
        return numbers, torch.stack([numbers, torch.zeros_like(numbers)], 1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    scale: float,
    span: tuple[int, int] | None = None,
) -> Tensor:
    cuts = find_cuts(offsets, query_offsets, len(q), len(k), span)
    return _attend(q, k, v, cuts, scale, torch.empty)


def fused_attention(qkv: Tensor, offsets: Tensor, scale: float, span: tuple[int, int] | None = None) -> Tensor:
    if scale <= 0:
        return attention(*qkv.unbind(1), offsets, None, scale, span)
    cuts = find_cuts(offsets, None, len(qkv), len(qkv), span)
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


def _prepare(name: str, like: Tensor, num_programs: int, *arguments: Tensor | int | float) -> Launch:
    return CONFIGURATIONS.prepare(_full_name(name, like.dtype, like.shape[2]), num_programs, *arguments)


def _tile(name: str, like: Tensor) -> tuple[int, int]:
    constants = CONFIGURATIONS[_full_name(name, like.dtype, like.shape[2])].constants
    return constants["BLOCK_QUERIES"], constants["BLOCK_KEYS"]


@functools.cache
def _short(dtype: torch.dtype, tiles: str, head_dim: int) -> list[tuple[int, int]]:
    """Shortest and longest pair of each kernel of the "forward" or "backward" that takes short ones."""
    known = FORWARD_TILES if tiles == "forward" else BACKWARD_TILES
    ends = () if dtype == torch.float32 else tuple(known[head_dim])
    return list(zip((1, *(end + 1 for end in ends)), ends, strict=False))


def _heads_each(cuts: Cuts, num_heads: int, head_dim: int) -> int:
    """How many heads a forward program of short pairs walks over."""
    shortest, longest = cuts.span
    alike = longest <= 32 or 32 < shortest <= longest <= 64
    most = PROGRAMS_OF_ALIKE[head_dim] if alike else PROGRAMS
    return min(max(1, cuts.num_pairs * num_heads // most), num_heads)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float, allocate: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    out = allocate(q.shape, dtype=q.dtype, device=q.device)
    statistics = empty_statistics(q)
    run_together(list(forward_launches(q, k, v, out, statistics, cuts, scale)))
    return out, statistics


def empty_statistics(q: Tensor) -> Tensor:
    """Room for the highest score of each row and the logarithm of its divisor, float32 (2, heads, queries); in 16 bits
    the second alone is written, and holds their sum."""
    return torch.empty(2, q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cuts: Cuts, scale: float
) -> Iterator[Launch]:
    """Together they write out and statistics, each those of its own pairs; scale is positive."""
    if not out.numel():
        return
    rows = cuts.query_begins, cuts.query_ends, cuts.key_begins, cuts.key_ends
    heads = q.shape[1]
    numbers = len(q), *_steps(q, k, v), scale * LOG2_E
    above = 0
    if cuts.are_shared:
        each = _heads_each(cuts, heads, q.shape[2])
        programs = cuts.num_pairs * -(-heads // each)
        for shortest, longest in _short(q.dtype, "forward", q.shape[2]):
            above = longest
            if cuts.may_hold(shortest, longest):
                given = q, k, v, out, *statistics, cuts.key_begins, cuts.key_ends, heads, each, *numbers
                yield _prepare(f"forward {longest}", q, programs, *given)
    if not cuts.are_shared or cuts.may_hold(above + 1, cuts.num_keys):
        name = "forward long" if cuts.are_shared else "forward few"
        tiles = cuts.cut("query", _tile(name, q)[0], above)
        each = min(max(1, len(tiles) * heads // PROGRAMS_OF_LONG), heads)
        programs = len(tiles) * -(-heads // each)
        yield _prepare(name, q, programs, q, k, v, out, *statistics, *rows, tiles, heads, each, *numbers)


def backward_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    statistics: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    cuts: Cuts,
    scale: float,
) -> Iterator[Launch]:
    """Run in order, they write the gradients of q, k and v; dout lies as align() leaves it."""
    if not (q.numel() or k.numel()):
        return
    rows = cuts.query_begins, cuts.query_ends, cuts.key_begins, cuts.key_ends
    heads = q.shape[1]
    dq, dk, dv = gradients
    dq_step, dk_step, dv_step = (gradient.stride(0) // STEP.value for gradient in gradients)
    steps = _steps(q, k, v)
    scale *= LOG2_E
    above = 0
    if cuts.are_shared:
        for shortest, longest in _short(q.dtype, "backward", q.shape[2]):
            above = longest
            if cuts.may_hold(shortest, longest):
                given = q, k, v, out, dout, statistics[1], dq, dk, dv, cuts.key_begins, cuts.key_ends
                programs = cuts.num_pairs * heads
                more = heads, len(q), *steps, dq_step, dk_step, dv_step, scale
                yield _prepare(f"backward {longest}", q, programs, *given, *more)
    if not cuts.are_shared or cuts.may_hold(above + 1, cuts.num_keys):
        name = "long" if cuts.are_shared else "few"
        delta = torch.empty_like(statistics[0])
        queries, keys = _tile(f"dq {name}", q)
        tiles = cuts.cut("query", queries, above)
        given = q, k, v, out, dout, *statistics, delta, dq, *rows, tiles, heads, len(q), *steps, dq_step, scale
        yield _prepare(f"dq {name}", q, len(tiles) * heads, *given)
        tiles = cuts.cut("key", keys, above)
        given = q, k, v, dout, *statistics, delta, dk, dv, *rows, tiles, heads, len(q), *steps, dk_step, dv_step, scale
        yield _prepare(f"dkdv {name}", q, len(tiles) * heads, *given)


def _backward(q, k, v, out, dout, statistics, gradients, cuts: Cuts, scale: float) -> None:
    for launch in backward_launches(q, k, v, out, align(dout), statistics, gradients, cuts, scale):
        launch()


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
