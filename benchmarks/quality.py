"""nDCG@10 of BM25, of the base weights' bi-encoder and of a checkpoint, on queries that it was not trained on.

python benchmarks/quality.py scifact|dl19|dl20|cranfield [--model FOLDER] [--dtype bf16|int8|fp8]: reads FASTRANK_DATA;
prints one JSON object. With a dtype also what it does to the ranking: nDCG@10, Kendall's tau of each list's scores with
those in float32, averaged, and the largest difference of two scores beside their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau
from workloads import data_folder

from fastrank import Reranker
from fastrank.bi_encoder import bi_encoder_scores
from fastrank.data import DataSource, load_data
from fastrank.evaluate import evaluate, run_from_scores
from fastrank.train.demo import base_weights

LIMITS = {
    "scifact": {"max_query_tokens": 40, "max_document_tokens": 128},
    "dl19": {"max_query_tokens": 24, "max_document_tokens": 96},
    "dl20": {"max_query_tokens": 24, "max_document_tokens": 96},
    "cranfield": {"max_query_tokens": 40, "max_document_tokens": 128},
}


def source(name: str, data: Path) -> DataSource:
    if name == "scifact":
        folder = data / "scifact"
        return DataSource(
            queries=folder / "queries.train.tsv",
            documents=folder / "corpus.jsonl.gz",
            qrels=folder / "qrels.train.trec",
            run="bm25",
            depth=100,
            queries_part=[0.75, 1.0],
        )
    if name == "cranfield":
        folder = data / "cranfield"
        return DataSource(
            queries=folder / "queries.tsv",
            documents=folder / "corpus.jsonl.gz",
            qrels=folder / "qrels.trec",
            run="bm25",
            depth=50,
        )
    folder = data / "trec-dl"
    return DataSource(
        queries=folder / f"queries.{name}.tsv",
        documents=folder / "passages.msmarco-v1.dl19-dl20.jsonl.gz",
        qrels=folder / f"qrels.{name}-passage.txt",
        run=folder / "first_stage" / f"BM25.{name}.run.gz",
        depth=100,
    )


def agreement(scores: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, float]:
    """How lists of scores rank beside exact ones."""
    taus = [kendalltau(one, other).statistic for one, other in zip(scores, exact, strict=True) if len(one) > 1]
    largest = np.abs(np.concatenate(scores) - np.concatenate(exact)).max()
    return {
        "tau": round(float(np.mean(taus)), 4),
        "largest_difference": round(float(largest), 3),
        "standard_deviation": round(float(np.concatenate(exact).std()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=LIMITS)
    parser.add_argument("--model", action="append", default=[], help="checkpoint folder; may be given several times")
    parser.add_argument("--dtype", action="append", default=[], help="of the re-ranker, beside float32; as often")
    arguments = parser.parse_args()
    folder = data_folder()
    if folder is None:
        parser.error("set FASTRANK_DATA to the folder that holds the data")
    loaded = load_data(source(arguments.data, folder), seed=0)
    base = base_weights()
    scores = {
        "bm25": [[-rank for rank in range(len(one))] for one in loaded.candidates],
        "bi_encoder": bi_encoder_scores(base, loaded.candidates),
    }
    seconds, rankings = {}, {}
    for model in arguments.model:
        for dtype in ("float32", *arguments.dtype):
            name = model if dtype == "float32" else f"{model} {dtype}"
            reranker = Reranker(model, dtype=dtype, activation="none", **LIMITS[arguments.data])
            started = time.perf_counter()
            scores[name] = reranker.score_lists(loaded.candidates)
            seconds[name] = round(time.perf_counter() - started, 1)
            if dtype != "float32":
                rankings[name] = agreement(scores[name], scores[model])
    figures = {
        name: round(evaluate(run_from_scores(loaded.candidates, values, loaded.keys), loaded.qrels)["nDCG@10"], 4)
        for name, values in scores.items()
    }
    pairs = sum(map(len, loaded.candidates))
    print(
        json.dumps(
            {
                "data": arguments.data,
                "queries": len(loaded),
                "pairs": pairs,
                "nDCG@10": figures,
                "s": seconds,
                "agreement": rankings,
            }
        )
    )


if __name__ == "__main__":
    main()
