"""The forward of small batches as CUDA graphs: one launch instead of a hundred, which is what a single query waits for.

A graph is recorded for shapes, so a batch is filled up to a bucket: of tokens, of pairs, and of the longest pair. What
fills it are pairs of their own, which no other pair sees; their scores are cut off. Scores are those of the forward
without a graph but for rounding. No one has run this on a GPU so far, hence it must be asked for.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrank.packing import PackedBatch

MOST_TOKENS = 16384  # of a bucket: larger batches keep a GPU busy without a graph
TOKEN_STEP, PAIR_STEP = 1024, 32
LONGEST = (32, 64, 128, 256, 512)  # where attention changes its kernels


@dataclass(frozen=True)
class Bucket:
    """Tokens, pairs and tokens of the longest pair that a graph is recorded for."""

    num_tokens: int
    num_pairs: int
    longest: int


def find_bucket(num_tokens: int, num_pairs: int, longest: int) -> Bucket | None:
    """The least bucket for a batch: with room for at least one more pair, a token for each pair that fills it up, and
    pairs enough to hold the tokens that do. None for a batch that is too large, or empty."""
    end = next((one for one in LONGEST if longest <= one), None)
    if end is None or not num_pairs or num_tokens > MOST_TOKENS:
        return None
    pairs = _up(num_pairs + 1, PAIR_STEP)
    tokens = _up(num_tokens + pairs - num_pairs, TOKEN_STEP)
    missing_pairs = -(-(tokens - num_tokens) // end)
    if missing_pairs > pairs - num_pairs:
        pairs = _up(num_pairs + missing_pairs, PAIR_STEP)
        tokens = max(tokens, _up(num_tokens + pairs - num_pairs, TOKEN_STEP))
    return Bucket(tokens, pairs, end)


def fill(batch: PackedBatch, bucket: Bucket, filler: tuple[int, int]) -> PackedBatch:
    """The batch, on a CPU, filled up to its bucket; filler: token id and token type of what is added."""
    num_tokens, num_pairs = bucket.num_tokens - batch.num_tokens, bucket.num_pairs - batch.num_pairs
    short, more = divmod(num_tokens, num_pairs)
    lengths = np.full(num_pairs, short)
    lengths[:more] += 1
    ends = batch.num_tokens + np.cumsum(lengths)
    positions = np.arange(num_tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    added = [torch.full((num_tokens,), value, dtype=torch.int64) for value in filler]
    return PackedBatch(
        torch.cat([batch.token_ids, added[0]]),
        torch.cat([batch.token_types, added[1]]),
        torch.cat([batch.positions, torch.from_numpy(positions)]),
        torch.cat([batch.pair_offsets, torch.from_numpy(ends.astype(np.int32))]),
        batch.list_offsets,
        max_pair_tokens=bucket.longest,
        min_pair_tokens=1,
    )


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class Graphs:
    """Scores of batches, each by the graph of its bucket; recorded the first time that a bucket is met.

    score: PackedBatch on the device -> scores (pairs,), which must not wait for the device. longest: tokens that a pair
    may have there. filler: as in fill(). One batch at a time: graphs share memory, and each has one place for inputs.
    """

    def __init__(
        self,
        score: Callable[[PackedBatch], Tensor],
        device: torch.device,
        *,
        longest: int,
        filler: tuple[int, int],
    ) -> None:
        self._score, self._device, self._longest, self._filler = score, device, longest, filler
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, PackedBatch, Tensor]] = {}
        self._pool = None
        self._lock = threading.Lock()

    def score(self, batch: PackedBatch) -> Tensor | None:
        """Scores of a batch that lies on the CPU, (pairs,) on the device; None where it fits no bucket."""
        bucket = find_bucket(batch.num_tokens, batch.num_pairs, batch.max_pair_tokens)
        if bucket is None or bucket.longest > self._longest:
            return None
        filled = fill(batch, bucket, self._filler)
        with self._lock, torch.cuda.device(self._device):
            if bucket not in self._graphs:
                self._graphs[bucket] = self._record(filled)
            graph, inputs, scores = self._graphs[bucket]
            for name in ("token_ids", "token_types", "positions", "pair_offsets"):
                getattr(inputs, name).copy_(getattr(filled, name).pin_memory(), non_blocking=True)
            graph.replay()
            return scores[: batch.num_pairs].clone()

    def _record(self, filled: PackedBatch) -> tuple[torch.cuda.CUDAGraph, PackedBatch, Tensor]:
        inputs = filled.to(self._device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what is made once, kernels above all, must not be made while it is recorded
                self._score(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            scores = self._score(inputs)
        self._pool = self._pool or graph.pool()
        return graph, inputs, scores
