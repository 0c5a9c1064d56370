"""How long one query with 10, 30 or 100 documents takes on the CPU, from strings to scores: median and 95th percentile.

The peers pad their batches at the batch size that is best for 100 documents.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from baselines import PaddedReranker, best_batch_size
from bench_cpu_engine import MAX_LENGTH, PEERS, checked, scores_of
from timing import CLOCK, Comparison, Contender
from workloads import checkpoint, ranking_lists

import fastrank

SHAPE = "MiniLM-L6"
NAMES = ["fastrank float32", "fastrank int8", "ONNX Runtime float32", "ONNX Runtime int8", "transformers float32"]


@functools.cache
def runners() -> dict:
    """For each contender a function from ranking lists to scores."""
    folder = checkpoint(SHAPE)
    found = {}
    for name in NAMES:
        engine, dtype = name.rsplit(" ", 1)
        if engine == "fastrank":
            reranker = fastrank.Reranker(folder, dtype=dtype, max_length=MAX_LENGTH)
            found[name] = functools.partial(scores_of, reranker)
        else:
            made = PEERS[engine][0](folder, dtype, MAX_LENGTH)
            size = best_batch_size(made, ranking_lists(1, 100)[1])
            found[name] = functools.partial(made.scores, batch_size=size)
    return found


@functools.cache
def comparison(num_documents: int, full: bool) -> Comparison:
    source, lists = ranking_lists(1, num_documents)
    exact = PaddedReranker(checkpoint(SHAPE), "float32", MAX_LENGTH).scores(lists, 8)
    notes = [f"one query of {source}, {SHAPE}"]
    contenders = []
    for name, run in runners().items():
        dtype = name.rsplit(" ", 1)[1]
        # A correlation needs more than a few scores; int8's is checked where there are 100.
        check = {"check": checked(dtype, exact, [], name)} if dtype == "float32" or num_documents == 100 else {}
        contenders.append(Contender(name, functools.partial(run, lists), 1, ours=name.startswith("fastrank"), **check))
    rounds = 100 if full else max(8, 200 // num_documents)
    compared = Comparison(f"One query with {num_documents} documents on the CPU", "queries", contenders, notes)
    compared.measure(rounds)
    compared.notes += [
        f"{one.name}: p50 {1000 * one.median:.0f} ms, p95 {1000 * np.quantile(one.durations, 0.95):.0f} ms"
        for one in contenders
    ]
    return compared


@pytest.mark.parametrize("num_documents", [10, 30, 100])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=CLOCK)
def bench_cpu_latency(name, num_documents, benchmark, full):
    compared = comparison(num_documents, full)
    benchmark.group = compared.title
    compared.hand_over(name, benchmark)
