"""LLM orders into a cross-encoder on the 97 judged queries of TREC DL 2019 and 2020: every query scored once.

python benchmarks/distillation.py --model CHECKPOINT --output_dir OUT [--loss adr_mse] [--num_pairs 3200] [--folds 5]:
trains one model a fold on the LLM orders of the other folds' queries (FASTRANK_DATA/trec-dl) and ranks BM25's top 100
of the fold's with it; --folds dl19 trains once, on dl19, and ranks dl20. --num_pairs 0 ranks with CHECKPOINT as it is.
Writes OUT/<track>.run, which `fastrank compare` reads, and prints one JSON object: nDCG@10 with a bootstrap interval.
--plot LINES.jsonl draws such objects over depth and over the share of queries, into OUT/ablations.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap
from workloads import data_folder

from fastrank import Reranker
from fastrank.bi_encoder import bi_encoder_scores
from fastrank.data import DataSource, load_data, write_run
from fastrank.evaluate import evaluate, run_from_scores
from fastrank.train import TrainConfig, train
from fastrank.train.demo import base_weights

LIMITS = {"max_query_tokens": 24, "max_document_tokens": 96}
BM25_TEACHERS = (
    "setwise_runs/BM25.{}.flan-t5-xxl.setwise.bubblesort",
    "setwise_runs/BM25.{}.flan-t5-xl.pairwise.allpair",
)
TEACHERS = {  # chosen by runs.tsv
    "dl19": (
        *(name.format("dl19") for name in BM25_TEACHERS),
        "llm_runs/SPLADE_P_P_ENSEMBLE_DISTIL.dl19.rankvicuna-7b-ckpt800.d100.20230909T174715",
        "llm_runs/OPEN_AI_ADA2.dl19.rankvicuna-7b-aug.d100.20230913T163620",
        "llm_runs/D_BERT_KD_TASB.dl19.rankvicuna-7b-aug.d100.20230913T163605",
    ),
    "dl20": (
        *(name.format("dl20") for name in BM25_TEACHERS),
        "llm_runs/SPLADE_P_P_ENSEMBLE_DISTIL.dl20.rankvicuna-7b-aug.d100.20230913T123108",
        "llm_runs/OPEN_AI_ADA2.dl20.rankvicuna-7b-aug.d100.20230913T170731",
        "llm_runs/D_BERT_KD_TASB.dl20.rankvicuna-7b-aug.d100.20230913T123000",
    ),
}
RAG24 = "RANK_ZEPHYR_RHO.*_top100.jsonl.gz"  # 12 more queries, which no fold ranks
LIST_SIZE = 16  # documents of a teacher's order that one training example shows
LISTS_PER_STEP = 2


def texts(track: str, data: Path) -> dict:
    return {
        "queries": str(data / f"queries.{track}.tsv"),
        "documents": str(data / "passages.msmarco-v1.dl19-dl20.jsonl.gz"),
    }


def training_source(track: str, data: Path, part: Sequence[float], options: argparse.Namespace) -> dict:
    names = TEACHERS[track][: len(BM25_TEACHERS)] if options.depth else TEACHERS[track]
    source = texts(track, data) | {
        "run": [str(data / f"{name}.run.gz") for name in names],
        "targets": "rank",
        "sampling": "random",
        "sample_size": min(LIST_SIZE, options.depth or LIST_SIZE),
        "queries_part": list(part),
    }
    if options.depth:  # by the first stage's rank, as in the study
        source |= {"depth": options.depth, "depth_run": str(data / f"first_stage/BM25.{track}.run.gz")}
    return source


def test_source(track: str, data: Path, part: Sequence[float]) -> DataSource:
    return DataSource(
        **texts(track, data),
        qrels=data / f"qrels.{track}-passage.txt",
        run=data / f"first_stage/BM25.{track}.run.gz",
        depth=100,
        queries_part=part,
    )


def folds(name: str, share: float) -> list[tuple[list[tuple[str, list[float]]], list[tuple[str, list[float]]]]]:
    """For each model: what it learns from and what it ranks, as (track, part of the queries)."""
    tracks = list(TEACHERS)
    if name in tracks:
        (other,) = (track for track in tracks if track != name)
        return [([(name, [0.0, share])], [(other, [0.0, 1.0])])]
    count, cuts = int(name), []
    for i in range(count):
        own, rest = [i / count, (i + 1) / count], [[0.0, i / count], [(i + 1) / count, 1.0]]
        learn = [(track, [a, a + share * (b - a)]) for a, b in rest if b > a for track in tracks]
        cuts.append((learn, [(track, own) for track in tracks]))
    return cuts


def train_fold(learn, folder: Path, data: Path, options: argparse.Namespace) -> str:
    sources = [training_source(track, data, part, options) for track, part in learn]
    if options.depth is None:
        sampled = {"sampling": "random", "sample_size": LIST_SIZE}
        sources += [{"lists": str(path), **sampled} for path in sorted((data.parent / "rag24-rankzephyr").glob(RAG24))]
    size = sources[0]["sample_size"]
    config = TrainConfig(
        model=options.model,
        train_data=sources,
        output_dir=str(folder),
        loss=options.loss,
        learning_rate=options.learning_rate,
        warmup_steps=0.1,
        per_device_train_batch_size=LISTS_PER_STEP,
        max_steps=max(1, round(options.num_pairs / (LISTS_PER_STEP * size))),
        dropout=0.0,
        freeze_layers=0,
        seed=options.seed,
        select_by=options.select_by,
        overwrite=True,
        **LIMITS,
    )
    train(config, quiet=True)
    return config.output_dir


def plot(lines: Path, path: Path) -> None:
    """nDCG@10 with its interval over the teachers' depth and over the share of queries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [json.loads(line) for line in lines.read_text().splitlines() if line.startswith("{")]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True, sharey=True)
    for axis, key, other, label in (
        (axes[0], "depth", "query_share", "depth of the teachers' lists"),
        (axes[1], "query_share", "depth", "share of the queries"),
    ):
        most = max(one[other] for one in found)
        points = sorted((one[key], one["nDCG@10"], *one["interval_95"]) for one in found if one[other] == most)
        x, y, low, high = map(np.array, zip(*points, strict=True))
        axis.errorbar(x, y, (y - low, high - y), marker="o", capsize=3)
        axis.set(xlabel=label, ylabel="nDCG@10")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="checkpoint to start from; default: the demo's base weights")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--loss", default="ranknet")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--num_pairs", type=int, default=3200, help="pairs that each model is trained on")
    parser.add_argument("--folds", default="5", help="their number, or the track to learn from")
    parser.add_argument("--depth", type=int, help="of the teachers' orders, by BM25's rank; teachers over BM25 alone")
    parser.add_argument("--query_share", type=float, default=1.0, help="of the queries to learn from")
    parser.add_argument(
        "--select_by", help="train on the half of the lists that this measure picks: gap, difficulty..."
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bi_encoder", action="store_true", help="rank with the base weights' cosines, train nothing")
    parser.add_argument("--plot", type=Path, metavar="LINES", help="what was printed before; draw it and stop")
    options = parser.parse_args()
    if options.plot is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        return plot(options.plot, options.output_dir / "ablations.png")
    folder = data_folder()
    if folder is None:
        parser.error("set FASTRANK_DATA to the folder that holds the data")
    data = folder / "trec-dl"
    options.model = options.model or str(base_weights())
    runs: dict[str, dict] = {track: {} for track in TEACHERS}
    values: list[float] = []
    for number, (learn, rank) in enumerate(folds(options.folds, options.query_share)):
        model, fold = options.model, options.output_dir / f"fold-{number}"
        if options.num_pairs and not options.bi_encoder:
            model = train_fold(learn, fold, data, options)
        reranker = None if options.bi_encoder else Reranker(model, activation="none", **LIMITS)
        for track, part in rank:
            loaded = load_data(test_source(track, data, part), seed=0)
            scores = (
                bi_encoder_scores(model, loaded.candidates)
                if reranker is None
                else reranker.score_lists(loaded.candidates)
            )
            run = run_from_scores(loaded.candidates, scores, loaded.keys)
            runs[track] |= run
            values += [one["nDCG@10"] for one in evaluate(run, loaded.qrels, per_query=True).values()]
        shutil.rmtree(fold, ignore_errors=True)
    for track, run in runs.items():
        if run:
            write_run(options.output_dir / f"{track}.run", run)
    interval = bootstrap((values,), np.mean, n_resamples=10_000, rng=0).confidence_interval
    print(
        json.dumps(
            {
                **{name: value for name, value in vars(options).items() if name not in ("output_dir", "plot")},
                "queries": len(values),
                "nDCG@10": round(float(np.mean(values)), 4),
                "interval_95": [round(float(edge), 4) for edge in interval],
            }
        )
    )


if __name__ == "__main__":
    main()
