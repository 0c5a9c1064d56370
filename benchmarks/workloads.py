"""What is measured: dl19's BM25 lists from FASTRANK_DATA where it is at hand, else the demo corpus; and the models."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import torch

from fastrank.data import RankingList, read_documents, read_queries, read_run


def data_folder() -> Path | None:
    """FASTRANK_DATA, else ../shared/data beside the checkout; None where neither exists."""
    named = os.environ.get("FASTRANK_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@functools.cache
def ranking_lists(num_queries: int, num_documents: int) -> tuple[str, list[RankingList]]:
    """A name for the report, and `num_queries` lists of `num_documents`: label = -rank, so that all pairs are
    ordered."""
    folder = data_folder()
    if folder is None:
        from fastrank.data.demo import build_demo_corpus

        lists = [one for one in build_demo_corpus().test.lists if len(one.documents) >= num_documents][:num_queries]
        source = "the demo corpus (FASTRANK_DATA is not at hand)"
        return source, [_cut(one, num_documents) for one in lists]
    return "dl19, BM25", read_lists(folder / "trec-dl", num_queries, num_documents)


def read_lists(folder: Path, num_queries: int, num_documents: int) -> list[RankingList]:
    """Of dl19's queries, `num_queries` spread over all, with BM25's first `num_documents`; folder: TREC DL's files."""
    documents = read_documents(folder / "passages.msmarco-v1.dl19-dl20.jsonl.gz")
    queries = read_queries(folder / "queries.dl19.tsv")
    run = read_run(folder / "first_stage" / "BM25.dl19.run.gz")
    lists = []
    for query_id in sorted(run)[:: max(1, len(run) // num_queries)][:num_queries]:
        ids = sorted(run[query_id], key=lambda name: -run[query_id][name])[:num_documents]
        texts = tuple(documents[name] for name in ids)
        lists.append(
            RankingList(queries[query_id], texts, tuple(float(-i) for i in range(len(ids))), query_id, tuple(ids))
        )
    return lists


def _cut(one: RankingList, count: int) -> RankingList:
    return RankingList(one.query, one.documents[:count], tuple(float(-i) for i in range(count)), one.query_id)


@functools.cache
def checkpoint(shape: str = "MiniLM-L6") -> Path:
    """A folder that transformers wrote: the real weights and vocabulary of MiniLM-L6, or random weights of BERT-base's
    shape with that vocabulary; a head drawn so that scores spread."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from fastrank.train.demo import base_weights

    source = base_weights()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source, num_labels=1)
    if shape == "MiniLM-L6":
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config)
    else:
        config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.intermediate_size = (
            768,
            12,
            12,
            3072,
        )
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # as spread as trained ones, or all pairs would score alike
                if parameter.dim() == 2:
                    parameter.mul_(2)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 0.5)
        model.bert.pooler.dense.weight.normal_(0, 0.1)
    folder = Path(tempfile.mkdtemp(prefix="fastrank-bench-")) / shape
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
