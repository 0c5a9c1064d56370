"""Re-ranking from strings to scores on the CPU: fastrank against the same checkpoint in transformers, padded and
length-sorted."""

from __future__ import annotations

import numpy as np
import pytest
from baselines import PaddedReranker, padded_contenders
from timing import CLOCK, Comparison, Contender
from workloads import checkpoint, ranking_lists

import fastrank

MAX_LENGTH = 512
# What a dtype's rounding does to scores that spread by about 3; float32 must agree far closer.
TOLERANCE = {"float32": 1e-3, "bf16": 0.3}
NAMES = ["fastrank float32", "transformers float32", "transformers bf16"]


@pytest.fixture(scope="module")
def comparison(full) -> Comparison:
    folder = checkpoint()
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
    padded, padded_notes = padded_contenders(
        lambda dtype: PaddedReranker(folder, dtype, MAX_LENGTH), PaddedReranker.scores, lists, check
    )
    contenders += padded
    notes += padded_notes
    return Comparison("Re-ranking on the CPU", "pairs", contenders, notes).measure(5 if full else 3)


@pytest.mark.benchmark(group="rerank", timer=CLOCK)
@pytest.mark.parametrize("name", NAMES)
def bench_rerank(name, comparison, benchmark):
    comparison.hand_over(name, benchmark)
