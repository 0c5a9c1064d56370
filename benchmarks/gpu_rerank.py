"""From strings to scores beside sentence-transformers (bf16, SDPA, its best batch size); the latency of one query."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_models import agrees, checkpoint, texts
from timing import Comparison, Contender, best_setting

from fastrank import Reranker

BATCH_SIZES = (32, 128, 512)


def run(*, device: str, limits: dict, data: Path | None, dry_run: bool, large: bool) -> Iterator[str]:
    source, lists = texts(data, dry_run)
    num_pairs = sum(len(one.documents) for one in lists)
    for shape in ("tiny",) if dry_run else ("MiniLM-L6", "ELECTRA-base", *["XLM-R-large"] * large):
        folder = checkpoint(shape, data, dry_run)
        some = lists[: 10 if shape == "XLM-R-large" else None]
        num_pairs = sum(len(one.documents) for one in some)
        queries, documents = [one.query for one in some], [list(one.documents) for one in some]
        reranker = Reranker(folder, device=device, max_length=256, activation="none")
        full = Reranker(folder, device=device, dtype="float32", max_length=256, activation="none")
        exact = full.predict([(queries[0], text) for text in documents[0]])
        del full

        def check(scores, exact=exact):
            return agrees(scores[: len(exact)], exact)

        def ours(reranker=reranker, queries=queries, documents=documents):
            return reranker._score(queries, documents, lambda i, j: f"{i} {j}")

        for _ in range(2 if device == "cuda" else 0):  # graphs are recorded when a bucket comes the third time
            ours()
        # Scores come back to the host, so its clock is the one that counts.
        made = [Contender("fastrank", ours, num_pairs, ours=True, check=check)]
        made += peers(folder, queries, documents, num_pairs, device, check, dry_run)
        title = f"re-ranking from strings, {shape}, {len(some)} lists of {source}, {num_pairs} pairs"
        Comparison(title, "pairs", made).measure(3 if dry_run else 5)
        yield title
        yield from latency(shape, "", reranker, some, dry_run)
        if not dry_run:
            for how, options in (
                (", without CUDA graphs", {"cuda_graphs": False}),
                (", deterministic", {"deterministic": True}),
            ):
                other = Reranker(folder, device=device, max_length=256, activation="none", **options)
                yield from latency(shape, how, other, some, dry_run)
                del other
        del reranker, made
        if device == "cuda":
            torch.cuda.empty_cache()


def latency(shape: str, how: str, reranker: Reranker, lists, dry_run: bool) -> list[str]:
    """Of one query with 10, 30 and 100 documents, one call after the other."""
    lines = []
    for count in (10, 30, 100):
        seconds = []
        for number in range(4 if dry_run else 60):
            one = lists[number % min(len(lists), 30)]
            started = time.perf_counter()
            reranker.rank(one.query, list(one.documents[:count]))
            seconds.append(time.perf_counter() - started)
        ranked = sorted(seconds[len(seconds) // 2 :])  # the first half meets every shape once
        p50, p95 = statistics.median(ranked) * 1e3, ranked[int(0.95 * (len(ranked) - 1))] * 1e3
        lines.append(f"{shape}{how}: one query, {count} documents: p50 {p50:.2f} ms, p95 {p95:.2f} ms")
    return lines


def peers(folder: Path, queries, documents, num_pairs: int, device: str, check, dry_run: bool) -> list[Contender]:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        return [Contender("sentence-transformers", lambda: None, num_pairs, failure="not installed")]
    dtype = torch.float32 if dry_run else torch.bfloat16
    model = CrossEncoder(
        str(folder),
        device=device,
        max_length=256,
        num_labels=1,
        model_kwargs={"dtype": dtype, "attn_implementation": "sdpa"},
        activation_fn=torch.nn.Identity(),
    )
    pairs = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
    best = best_setting(
        lambda size: lambda: model.predict(pairs[:1000], batch_size=size, show_progress_bar=False),
        list(BATCH_SIZES[: 1 if dry_run else None]),
    )
    name = f"sentence-transformers {str(dtype).removeprefix('torch.')}, by {best}"

    def predict():
        return model.predict(pairs, batch_size=best, show_progress_bar=False, convert_to_numpy=True)

    return [Contender(name, predict, num_pairs, check=check)]
