"""Re-ranking from strings to scores on the CPU: fastrank against the same checkpoint in transformers, padded and
length-sorted."""

from __future__ import annotations

import numpy as np
import pytest
from baselines import PaddedReranker, refusal
from timing import CLOCK, Comparison, Contender, best_setting
from workloads import checkpoint, ranking_lists

import fastrank

MAX_LENGTH = 512
BATCH_SIZES = [4, 8, 16, 32]
# What a dtype's rounding does to scores that spread by about 3; float32 must agree far closer.
TOLERANCE = {"float32": 1e-3, "bf16": 0.3}
NAMES = ["fastrank float32", "transformers float32", "transformers bf16"]


@pytest.fixture(scope="module")
def comparison(full) -> Comparison:
    folder = checkpoint("MiniLM-L6")
    source, lists = ranking_lists(*((43, 100) if full else (6, 50)))
    num_pairs = sum(len(one.documents) for one in lists)
    reference = PaddedReranker(folder, "float32", MAX_LENGTH)
    exact = reference.scores(lists, 8)

    def check(dtype):
        def compare(scores):
            difference = float(np.abs(np.asarray(scores) - exact).max())
            return None if difference <= TOLERANCE[dtype] else f"scores differ by {difference:.2g}"

        return compare

    reranker = fastrank.Reranker(folder, dtype="float32", max_length=MAX_LENGTH)
    queries, documents = [one.query for one in lists], [list(one.documents) for one in lists]

    def fastrank_scores():
        scores = np.empty(num_pairs)
        start = 0
        for ranking, texts in zip(reranker.rank(queries, documents, activation="none"), documents, strict=True):
            for item in ranking:
                scores[start + item.index] = item.score
            start += len(texts)
        return scores

    contenders = [Contender("fastrank float32", fastrank_scores, num_pairs, ours=True, check=check("float32"))]
    notes = [f"{num_pairs} pairs of {source}, MiniLM-L6, from strings to scores; exact scores checked first"]
    few = lists[:1]
    for dtype in ("float32", "bf16"):
        if reason := refusal(dtype):
            contenders.append(Contender(f"transformers {dtype}", lambda: None, num_pairs, failure=reason))
            continue
        padded = PaddedReranker(folder, dtype, MAX_LENGTH)
        size = best_setting(lambda size, padded=padded: lambda: padded.scores(few, size), BATCH_SIZES)
        contenders.append(
            Contender(
                f"transformers {dtype}",
                lambda padded=padded, size=size: padded.scores(lists, size),
                num_pairs,
                check=check(dtype),
            )
        )
        notes.append(f"transformers {dtype}: best batch size {size} of {BATCH_SIZES}")
    return Comparison("Re-ranking on the CPU", "pairs", contenders, notes).measure(5 if full else 3)


@pytest.mark.benchmark(group="rerank", timer=CLOCK)
@pytest.mark.parametrize("name", NAMES)
def bench_rerank(name, comparison, benchmark):
    comparison.hand_over(name, benchmark)
