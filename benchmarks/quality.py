"""nDCG@10 of BM25, of the base weights' bi-encoder and of a checkpoint, on queries that it was not trained on.

python benchmarks/quality.py scifact|dl19|dl20 [--model FOLDER]: reads FASTRANK_DATA; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

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
    folder = data / "trec-dl"
    return DataSource(
        queries=folder / f"queries.{name}.tsv",
        documents=folder / "passages.msmarco-v1.dl19-dl20.jsonl.gz",
        qrels=folder / f"qrels.{name}-passage.txt",
        run=folder / "first_stage" / f"BM25.{name}.run.gz",
        depth=100,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=LIMITS)
    parser.add_argument("--model", action="append", default=[], help="checkpoint folder; may be given several times")
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
    seconds = {}
    for model in arguments.model:
        started = time.perf_counter()
        scores[model] = Reranker(model, activation="none", **LIMITS[arguments.data]).score_lists(loaded.candidates)
        seconds[model] = round(time.perf_counter() - started, 1)
    figures = {
        name: round(evaluate(run_from_scores(loaded.candidates, values, loaded.keys), loaded.qrels)["nDCG@10"], 4)
        for name, values in scores.items()
    }
    pairs = sum(map(len, loaded.candidates))
    print(
        json.dumps({"data": arguments.data, "queries": len(loaded), "pairs": pairs, "nDCG@10": figures, "s": seconds})
    )


if __name__ == "__main__":
    main()
