"""Texts and judgments by an id of ir_datasets in place of a file: `ir_datasets:msmarco-passage/train/judged`.

Rank-DistiLLM's runs name that id at the end of their file name, with dashes for slashes
(`__rankzephyr-colbert-10000-sampled-100__msmarco-passage-train-judged.run`), and it may be written so here, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from fastrank.data.files import DataError

PREFIX = "ir_datasets:"
_NAMED_RUN = re.compile(r".*__([^_]+)\.(run|tsv|parquet|pq)(\.gz)?", re.IGNORECASE)


def is_catalogued(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(PREFIX)


def named_by(run: str | os.PathLike[str]) -> str | None:
    """The data set that the run's file name ends in, by Rank-DistiLLM's convention; None where it follows another."""
    found = _NAMED_RUN.fullmatch(os.path.basename(os.fspath(run)))
    return None if found is None else PREFIX + found[1]


def read_texts(path: str, noun: str) -> Iterator[tuple[str, str]]:
    """(id, text) of each `query` or `document`, as ir_datasets has it by default."""
    for one in _read(path, "queries_iter" if noun == "query" else "docs_iter", noun):
        yield (one.query_id if noun == "query" else one.doc_id), one.default_text()


def read_judgments(path: str) -> Iterator[tuple[str, str, int]]:
    """(query id, document id, grade) of each judgment."""
    for one in _read(path, "qrels_iter", "judgment"):
        yield one.query_id, one.doc_id, one.relevance


def _read(path: str, method: str, noun: str) -> Iterator[Any]:
    read: Callable[[], Iterator[Any]] | None = getattr(_load(path), method, None)
    if read is None:
        raise DataError(f"the data set has no {noun}", path)
    try:
        yield from read()
    except Exception as error:  # what downloads and parsers raise
        raise DataError(f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}", path) from error


def _load(path: str) -> Any:
    try:
        import ir_datasets
    except ImportError:
        raise DataError("ids of ir_datasets need the package: pip install ir_datasets", path) from None
    name = path.removeprefix(PREFIX)
    known = list(ir_datasets.registry)
    dashed = [one for one in known if one.replace("/", "-") == name]
    if name not in known and len(dashed) != 1:
        what = f"may be any of {', '.join(dashed)}" if dashed else "is none that it knows"
        raise DataError(f"the id {name!r} {what}; write it with its slashes", path)
    return ir_datasets.load(name if name in known else dashed[0])
