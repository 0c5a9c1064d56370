"""Token ids of pairs in, PackedBatch out: no padding, no mask; and the order of pairs under a token budget.

The one idea: tokens of all pairs lie in one flat array cut by `pair_offsets`, pairs of all lists are cut by
`list_offsets`; texts (EncodedTexts) and pairs (Pairs) lie so from the tokenizer on. What is done to each token is done
in C++ (csrc/pairs.cpp), and defined here. Pairs that are scored are sorted by length into batches of at most so many
tokens, and the caller's order is restored here; lists that are trained on keep their order and stay whole.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

if importlib.util.find_spec("fastrank._cpu") is None:
    _cpu = None  # what it does is written in Python, too
else:
    from fastrank import _cpu

Pair = tuple[np.ndarray, np.ndarray]  # token ids and token types, as PairTokenizer.pair returns them


class _Runs(Sequence):
    """What lies one after another in arrays that are cut by `ends`, int64: a sequence of views of these."""

    def __init__(self, ends: np.ndarray):
        self.begins, self.ends = np.zeros_like(ends), ends
        self.begins[1:] = ends[:-1]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        return self.ends - self.begins

    def _view(self, begin: int, end: int):
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._view(self.begins[index], self.ends[index])

    def __iter__(self) -> Iterator:
        return map(self._view, self.begins.tolist(), self.ends.tolist())


class EncodedTexts(_Runs):
    """Token ids of texts, one after another in one array: a sequence of int32 arrays (tokens,), views of it.

    Arguments:
        ids: int32 (tokens,).
        ends: int64 (texts,), where each text ends.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray):
        super().__init__(ends)
        self.ids = ids

    @classmethod
    def join(cls, arrays: Sequence[np.ndarray]) -> EncodedTexts:
        """The same texts."""
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return cls(np.concatenate([np.zeros(0, np.int32), *arrays]), lengths.cumsum())

    def insert(self, places: Sequence[int], arrays: Sequence[np.ndarray]) -> EncodedTexts:
        """With these in the places, ascending, of texts that have no tokens."""
        runs = np.split(self.ids, self.ends[places])
        lengths = self.lengths
        lengths[places] = [len(ids) for ids in arrays]
        between = itertools.chain.from_iterable(zip(arrays, runs[1:], strict=True))
        return EncodedTexts(np.concatenate([runs[0], *between]), lengths.cumsum())

    def _view(self, begin: int, end: int) -> np.ndarray:
        return self.ids[begin:end]


class Pairs(_Runs):
    """Pairs one after another in two arrays: a sequence of Pair, views of these, for which thousands need no Python
    each.

    Arguments:
        ids, types: int32 (tokens,).
        ends: int64 (pairs,), where each pair ends.
    """

    def __init__(self, ids: np.ndarray, types: np.ndarray, ends: np.ndarray):
        super().__init__(ends)
        self.ids, self.types = ids, types

    @classmethod
    def join(cls, pairs: Sequence[Pair]) -> Pairs:
        """The same pairs. Raises ValueError where a pair has not as many types as ids, or a number that is no int32."""
        if isinstance(pairs, Pairs):
            return pairs
        if not len(pairs):
            return cls(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64))
        lengths = _lengths(pairs)
        if (different := np.flatnonzero(lengths != [len(types) for _, types in pairs])).size:
            ids, types = pairs[different[0]]
            raise ValueError(f"Pair {different[0]} has {len(ids)} token ids and {len(types)} token types.")
        return cls(*map(_concatenate, zip(*pairs, strict=True)), lengths.cumsum())

    def _view(self, begin: int, end: int) -> Pair:
        return self.ids[begin:end], self.types[begin:end]

    def find_distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Which of the different pairs each one is, counted as they appear, and where each of those stands first; both
        int64."""
        if _cpu is not None:
            return _cpu.find_distinct(self.ids, self.types, self.begins, self.lengths)
        ids, types = (np.ascontiguousarray(array).tobytes() for array in (self.ids, self.types))
        size, places = self.ids.itemsize, {}
        cuts = itertools.pairwise([0, *(size * self.ends).tolist()])
        place = [places.setdefault((ids[begin:end], types[begin:end]), len(places)) for begin, end in cuts]
        place = np.array(place, dtype=np.int64)
        return place, np.unique(place, return_index=True)[1]


@dataclass(frozen=True)
class Bucket:
    """Tokens, pairs and tokens of the longest pair that batches are filled up to."""

    num_tokens: int
    num_pairs: int
    longest: int


@dataclass(frozen=True)
class PackedBatch:
    """Pairs of (query, document) without padding.

    Arguments:
        token_ids, token_types: int64 (tokens,), pair after pair.
        positions: int64 (tokens,): 0, 1, 2, ... restarting in every pair.
        pair_offsets: int32 (pairs + 1,): pair i is tokens [pair_offsets[i], pair_offsets[i + 1]).
        list_offsets: int32 (lists + 1,): list j is pairs [list_offsets[j], list_offsets[j + 1]).
        max_pair_tokens, min_pair_tokens: tokens of the longest and of the shortest pair, 0 for no pairs; found from
            pair_offsets where not given (which waits for a GPU).
    """

    token_ids: Tensor
    token_types: Tensor
    positions: Tensor
    pair_offsets: Tensor
    list_offsets: Tensor
    max_pair_tokens: int = -1
    min_pair_tokens: int = -1
    _memory: Tensor | None = field(default=None, repr=False)  # the bytes of all five, as _join() puts them

    def __post_init__(self):
        if min(self.max_pair_tokens, self.min_pair_tokens) < 0:
            lengths = self.pair_offsets.diff()
            shortest, longest = map(int, lengths.aminmax()) if len(lengths) else (0, 0)
            object.__setattr__(self, "max_pair_tokens", longest)
            object.__setattr__(self, "min_pair_tokens", shortest)

    @property
    def span(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest pair, as ops.attention takes them."""
        return self.min_pair_tokens, self.max_pair_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_pairs(self) -> int:
        return len(self.pair_offsets) - 1

    @property
    def num_lists(self) -> int:
        return len(self.list_offsets) - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device, without waiting for a GPU."""
        device, memory = torch.device(device), None
        if device.type == "cuda" and (joined := self._joined) is not None and not joined.is_cuda:
            memory = joined.pin_memory().to(device, non_blocking=True)  # which leaves pinned memory as it is
        moved = send_together(self._tensors, device) if memory is None else _split(memory, self._tensors)
        return PackedBatch(
            *moved, max_pair_tokens=self.max_pair_tokens, min_pair_tokens=self.min_pair_tokens, _memory=memory
        )

    def copy_to(self, other: PackedBatch) -> None:
        """Writes a batch that lies on a CPU over one of the same shapes that to() has put on a GPU."""
        memory = _join(self._tensors, pin_memory=True) if (joined := self._joined) is None else joined.pin_memory()
        target = _memory_of(other._tensors) if other._memory is None else other._memory
        target.copy_(memory, non_blocking=True)

    @property
    def _joined(self) -> Tensor | None:
        """_memory, if the tensors are still its parts: those of a copy, or of dataclasses.replace(), may not be."""
        if self._memory is None:
            return None
        places = _places([tensor.nbytes for tensor in self._tensors])[:-1]
        start = self._memory.data_ptr()
        return self._memory if places == [tensor.data_ptr() - start for tensor in self._tensors] else None

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.token_ids, self.token_types, self.positions, self.pair_offsets, self.list_offsets


def _memory_of(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes that _split() cut into these."""
    return torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(
        tensors[0].untyped_storage(), 0, (_places([tensor.nbytes for tensor in tensors])[-1],)
    )


def send_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors on a device. Those on their way to a GPU are one copy, from pinned memory: it neither waits for the GPU
    nor costs a launch each; they are views of one piece of memory then."""
    device = torch.device(device)
    if device.type != "cuda" or any(tensor.is_cuda for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    return _split(_join(tensors, pin_memory=True).to(device, non_blocking=True), tensors)


def _join(tensors: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
    """The bytes of tensors, one after the other, each from a multiple of 16 on."""
    places = _places([tensor.nbytes for tensor in tensors])
    memory = torch.empty(places[-1], dtype=torch.uint8, pin_memory=pin_memory)
    target = memory.numpy()
    for place, tensor in zip(places, tensors, strict=False):
        target[place : place + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
    return memory


def _split(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What _join() joined, of the dtypes and shapes of `like`."""
    return [
        memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(_places([tensor.nbytes for tensor in like]), like, strict=False)
    ]


def _places(sizes: Sequence[int]) -> list[int]:
    """Where arrays of so many bytes begin, and where the last one ends."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // 16) * 16)
    return places


def _lengths(pairs: Sequence[Pair]) -> np.ndarray:
    """Tokens of each pair, int64 (pairs,)."""
    return pairs.lengths if isinstance(pairs, Pairs) else np.array([len(ids) for ids, _ in pairs], dtype=np.int64)


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(arrays)
    if joined.dtype == np.int32:
        return joined
    with np.errstate(invalid="ignore"):
        as_int32 = joined.astype(np.int32)
    if (wrong := joined != as_int32).any():
        raise ValueError(f"Token ids and types must be whole numbers of 32 bits, not {joined[wrong][0]}.")
    return as_int32


def pack_pairs(
    pairs: Sequence[Pair],
    order: np.ndarray | None = None,
    *,
    bucket: Bucket | None = None,
    filler: tuple[int, int] = (0, 0),
    pin_memory: bool = False,
) -> PackedBatch:
    """Packs pairs as one list.

    Arguments:
        pairs: (ids, types) each, int (tokens of the pair,). No pairs give one empty list.
        order: int (n,), which of the pairs, and in which order; default: all as they stand.
        bucket: what the batch is filled up to, as model.graphs.fill does it, with pairs of such a token id and type
            (`filler`); it must have room for one more pair, and a token for each. Default: nothing is added.
        pin_memory: where the batch lies on the CPU, so that its copy to a GPU need not wait.
    """
    return _pack(pairs, [len(pairs) if order is None else len(order)], order, bucket, filler, pin_memory)


def pack_lists(lists: Sequence[Sequence[Pair]]) -> PackedBatch:
    """Packs ranking lists, whole and in order.

    Arguments:
        lists: the pairs of each list; a list may be empty.
    """
    return _pack([pair for pairs in lists for pair in pairs], [len(pairs) for pairs in lists])


def plan_batches(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> list[np.ndarray]:
    """Sorts pairs into batches of at most `max_batch_tokens` tokens, the longest pairs first.

    Arguments:
        lengths: tokens of each pair, (pairs,).
        max_batch_tokens: a pair that is longer gets a batch of its own.

    Returns int64 indices into `lengths` per batch; every pair is in exactly one. Equal lengths keep their order.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    return [order[start:stop] for start, stop in _cut_by_budget(lengths[order], max_batch_tokens)]


def plan_even_batches(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> list[np.ndarray]:
    """plan_batches() into about equally many tokens, so that those of one call look like those of the next."""
    total = int(np.sum(lengths))
    if total and max_batch_tokens > 0:
        even = -(-total // -(-total // max_batch_tokens))
        max_batch_tokens = min(max_batch_tokens, even + int(np.max(lengths)))
    return plan_batches(lengths, max_batch_tokens)


def restore_order(plan: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    """Puts the values of planned batches back into the caller's order.

    Arguments:
        plan: what `plan_batches` or `plan_even_batches` returned.
        values: float32 (pairs of the batch,) for each batch.

    Returns float32 (pairs,).
    """
    restored = np.empty(sum(len(indices) for indices in plan), dtype=np.float32)
    for indices, part in zip(plan, values, strict=True):
        restored[indices] = part
    return restored


def plan_chunks(list_tokens: Sequence[int] | np.ndarray, max_batch_tokens: int) -> list[range]:
    """Cuts the lists of a training step into chunks of at most `max_batch_tokens` tokens, whole and in order.

    Arguments:
        list_tokens: tokens of each list, (lists,).
        max_batch_tokens: a list that is longer stands alone.

    Returns consecutive ranges of list indices that cover all lists.
    """
    return [range(start, stop) for start, stop in _cut_by_budget(list_tokens, max_batch_tokens)]


def _cut_by_budget(sizes: Sequence[int] | np.ndarray, budget: int) -> list[tuple[int, int]]:
    if budget < 1:
        raise ValueError(f"max_batch_tokens is {budget}; it must be at least 1.")
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    cuts = []
    start, used = 0, 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, used + budget, side="right")))
        cuts.append((start, stop))
        start, used = stop, int(ends[stop - 1])
    return cuts


def _offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    _refuse_too_many(int(offsets[-1]))
    return offsets


def _refuse_too_many(num_tokens: int) -> None:
    if num_tokens > np.iinfo(np.int32).max:
        raise ValueError(f"A batch of {num_tokens} tokens is past what 32-bit offsets can say; lower max_batch_tokens.")


def _pack(
    pairs: Sequence[Pair],
    list_sizes: Sequence[int],
    order: np.ndarray | None = None,
    bucket: Bucket | None = None,
    filler: tuple[int, int] = (0, 0),
    pin_memory: bool = False,
) -> PackedBatch:
    lengths = _lengths(pairs)[slice(None) if order is None else order]
    # Before anything is copied: what is too much for the offsets may be too much for the memory.
    _refuse_too_many(int(lengths.sum()))
    list_offsets = _offsets(list_sizes)
    pairs = Pairs.join(pairs)
    begins = pairs.begins[slice(None) if order is None else order]
    num_tokens, num_pairs = (
        (int(lengths.sum()), len(lengths)) if bucket is None else (bucket.num_tokens, bucket.num_pairs)
    )
    # Written once, to where a GPU takes all of it from.
    memory, parts = _allocate(
        [(np.int64, num_tokens)] * 3 + [(np.int32, num_pairs + 1), (np.int32, len(list_offsets))], pin_memory
    )
    if _cpu is None:
        _write(pairs, begins, lengths, filler, *parts[:4])
    else:
        _cpu.pack_pairs(pairs.ids, pairs.types, begins, lengths, *filler, *parts[:4])
    parts[4][:] = list_offsets
    if bucket is not None:
        shortest, longest = 1, bucket.longest
    else:
        shortest, longest = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
    return PackedBatch(*map(torch.from_numpy, parts), max_pair_tokens=longest, min_pair_tokens=shortest, _memory=memory)


def filler_lengths(num_tokens: int, num_pairs: int) -> np.ndarray:
    """Tokens of each pair that fills a batch up, int64 (num_pairs,): about equally many, the longer ones first."""
    shorter, num_longer = divmod(num_tokens, max(num_pairs, 1))
    lengths = np.full(num_pairs, shorter, np.int64)
    lengths[:num_longer] += 1
    return lengths


def _write(pairs, begins, lengths, filler, token_ids, token_types, positions, pair_offsets) -> None:
    """Pairs, and what fills the arrays up, as csrc/pairs.hpp's pack_pairs() writes them."""
    num_tokens, num_missing = int(lengths.sum()), len(pair_offsets) - 1 - len(lengths)
    every = np.concatenate([lengths, filler_lengths(len(token_ids) - num_tokens, num_missing)])
    pair_offsets[0] = 0
    np.cumsum(every, out=pair_offsets[1:])
    positions[:] = np.arange(len(positions)) - np.repeat(pair_offsets[:-1], every)
    places = positions[:num_tokens] + begins.repeat(lengths)
    for target, source, value in zip((token_ids, token_types), (pairs.ids, pairs.types), filler, strict=True):
        target[:num_tokens] = source[places]
        target[num_tokens:] = value


def _allocate(parts: Iterable[tuple[type, int]], pin_memory: bool) -> tuple[Tensor, list[np.ndarray]]:
    """Memory for arrays of such types and sizes as _join() lays them out, and the arrays."""
    sizes = [(np.dtype(kind), np.dtype(kind).itemsize * count) for kind, count in parts]
    places = _places([size for _, size in sizes])
    memory = torch.empty(places[-1], dtype=torch.uint8, pin_memory=pin_memory)
    target = memory.numpy()
    return memory, [target[place : place + size].view(kind) for place, (kind, size) in zip(places, sizes, strict=False)]
