"""Batches filled up to a bucket, whose shapes are few: for CUDA graphs, and for scores that are the same bit for bit.

A bucket says how many tokens and pairs there are, and how long a pair may be. What fills a batch up are pairs of their
own, which no other pair sees; their scores are cut off. A graph of a bucket is one launch instead of a hundred, for
single queries. And where all batches have one shape, a product of matrices computes each row in one way, whatever the
others hold.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastrank.model.gpu_layers import state_of
from fastrank.packing import Bucket, PackedBatch, Pairs, filler_lengths, pack_pairs, plan_batches

Made = TypeVar("Made")

MOST_TOKENS = 65536  # of a batch: larger ones keep a GPU busy without a graph
TOKEN_STEP, PAIR_STEP = 1024, 32  # the least; buckets of many tokens or pairs lie up to a sixteenth apart
ONE_SHAPE = 8192, 512  # tokens and pairs of a batch where all have one shape, at least
MOST_GRAPHS = 64
LONGEST = (32, 64, 128, 256, 512)  # where attention changes its kernels

_recording = threading.Lock()


def find_bucket(num_tokens: int, num_pairs: int, longest: int, *, most_tokens: int = MOST_TOKENS) -> Bucket | None:
    """The least bucket for a batch: with room for at least one more pair, a token for each pair that fills it up, and
    pairs enough to hold the tokens that do. None for a batch that is too large, or empty."""
    end = next((one for one in LONGEST if longest <= one), None)
    if end is None or not num_pairs or num_tokens > most_tokens:
        return None
    token_step, pair_step = (
        max(least, 2 ** (count.bit_length() - 5)) for least, count in ((TOKEN_STEP, num_tokens), (PAIR_STEP, num_pairs))
    )
    pairs = _up(num_pairs + 1, pair_step)
    tokens = _up(num_tokens + pairs - num_pairs, token_step)
    missing_pairs = -(-(tokens - num_tokens) // end)
    if missing_pairs > pairs - num_pairs:
        pairs = _up(num_pairs + missing_pairs, pair_step)
        tokens = max(tokens, _up(num_tokens + pairs - num_pairs, token_step))
    return Bucket(tokens, pairs, end)


def fill(batch: PackedBatch, bucket: Bucket, filler: tuple[int, int]) -> PackedBatch:
    """The batch, on a CPU, filled up to its bucket; filler: token id and token type of what is added."""
    num_tokens, num_pairs = bucket.num_tokens - batch.num_tokens, bucket.num_pairs - batch.num_pairs
    lengths = filler_lengths(num_tokens, num_pairs)
    ends = batch.num_tokens + np.cumsum(lengths)
    positions = np.arange(num_tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    added = [np.full(num_tokens, value) for value in filler]
    return PackedBatch(
        _extended(batch.token_ids, added[0]),
        _extended(batch.token_types, added[1]),
        _extended(batch.positions, positions),
        _extended(batch.pair_offsets, ends.astype(np.int32)),
        batch.list_offsets,
        max_pair_tokens=bucket.longest,
        min_pair_tokens=1,
    )


def _extended(tensor: Tensor, more: np.ndarray) -> Tensor:
    # torch would start its threads for this, which takes longer than the copy where others compute.
    return torch.from_numpy(np.concatenate([tensor.numpy(), more]))


def plan_one_shape(lengths: Sequence[int], longest: int) -> tuple[list[np.ndarray], Bucket]:
    """Batches that can all be filled up to one bucket, which depends on nothing but `longest`, the tokens that a pair
    may have in the model; lengths: tokens of each pair. Returns them as plan_batches() does, and the bucket."""
    tokens, pairs = max(ONE_SHAPE[0], _up(2 * longest, TOKEN_STEP)), ONE_SHAPE[1]
    pairs = max(pairs, 2 * -(-tokens // longest))  # half of them can hold all tokens, so none that fills up is too long
    plan = [
        part
        for batch in plan_batches(lengths, tokens - pairs)
        for part in np.split(batch, range(pairs // 2, len(batch), pairs // 2))
    ]
    return plan, Bucket(tokens, pairs, longest)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class Graphs:
    """Scores of batches, each by the graph of its bucket, which is recorded when the bucket has been met often enough.

    score: PackedBatch on the device -> scores (pairs,), which must not wait for the device. longest: tokens that a pair
    may have there. filler: as in fill(). parameters: what score() reads beside the batch; graphs are forgotten when one
    changes, as far as gpu_layers.state_of() sees. unrecorded: how often a bucket goes without a graph at first; it is
    filled up all the same, so that its scores stay the same bits. One batch at a time: graphs share memory, and each
    has one place for inputs.
    """

    def __init__(
        self,
        score: Callable[[PackedBatch], Tensor],
        device: torch.device,
        *,
        longest: int,
        filler: tuple[int, int],
        parameters: Sequence[Tensor],
        unrecorded: int = 0,
    ) -> None:
        self._score, self._device, self._longest, self._filler = score, device, longest, filler
        self._parameters, self._unrecorded = parameters, unrecorded
        self._met: Counter[Bucket] = Counter()
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, PackedBatch, Tensor]] = {}
        self._pool = None
        self._state: list[tuple] = []
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # with the inputs of the last replay

    def score(self, pairs: Pairs, order: np.ndarray) -> Tensor | None:
        """Scores of some pairs in that order, (pairs,) on the device; None where they fit no bucket."""
        lengths = pairs.lengths[order]
        bucket = find_bucket(int(lengths.sum()), len(order), int(lengths.max(initial=0)))
        if bucket is None or bucket.longest > self._longest:
            return None
        filled = pack_pairs(pairs, order, bucket=bucket, filler=self._filler, pin_memory=self._device.type == "cuda")
        with self._lock, torch.cuda.device(self._device):
            self._forget_if_changed()
            self._met[bucket] += 1
            if bucket not in self._graphs and self._unrecorded < self._met[bucket] and len(self._graphs) < MOST_GRAPHS:
                self._graphs[bucket] = self._record(filled)
            if bucket in self._graphs:
                return self._replay(bucket, filled)[: len(order)]
        return self._score(filled.to(self._device))[: len(order)]

    def _replay(self, bucket: Bucket, filled: PackedBatch) -> Tensor:
        graph, inputs, scores = self._graphs[bucket]
        stream = torch.cuda.current_stream()
        if self._done is not None:  # another thread's stream may still be at it
            stream.wait_event(self._done)
        filled.copy_to(inputs)
        graph.replay()
        copy = scores.clone()
        self._done = stream.record_event()
        return copy

    def _forget_if_changed(self) -> None:
        state = state_of(self._parameters)
        if state != self._state:
            if self._graphs:
                torch.cuda.synchronize()
            self._graphs, self._pool, self._state = {}, None, state
            self._met.clear()

    def _record(self, filled: PackedBatch) -> tuple[torch.cuda.CUDAGraph, PackedBatch, Tensor]:
        inputs = filled.to(self._device)
        run_before_recording(lambda: self._score(inputs))
        graph, scores = record(lambda: self._score(inputs), self._pool)
        self._pool = self._pool or graph.pool()
        return graph, inputs, scores


def run_before_recording(run: Callable[[], object]) -> None:
    """What is made once must not be made while it is recorded, nor on a stream of its own."""
    run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def record(run: Callable[[], Made], pool: object) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of what run() does on the GPU, in the memory of `pool` (of its own for None), and what run() returned."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating meanwhile, but streams to record on are the process's.
    with _recording, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        made = run()
    return graph, made
